"""A small word-list sentiment score: the demonstration's own evidence, so that it needs no further package."""

from __future__ import annotations

import re

__all__ = ["is_sentence", "sentiment"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


PRAISE = _words(
    """
    admired adored amazing beautiful believe best brilliant charm charming clever delight delightful elegant
    enjoyed enjoyable excellent exciting fantastic fascinating favorite favorites fresh friendly fun funny gladly
    good great gripping happy heart honest hopeful incredible interesting inspiring joy joyful laugh laughed liked
    love loved lovely masterpiece moving nice perfect perfectly pleasure powerful recommend smart smile strong
    success superb surprise sweet tender thoughtful touching treat warm wonderful young
    """
)
BLAME = _words(
    """
    angry annoying argued asleep awful bad bored boredom bore boring cheap cold confused confusing cruel
    depressing dirty disappointed disappointing disappointment disaster disliked dreadful dull empty fake hate
    hated headache horrible insult lazy lost mess miserable noisy painful pathetic poor predictable ridiculous
    rude sad sick silly slow stupid tedious terrible ugly violent walked warn warned waste weak worry worst wrong
    """
)
NEGATION = _words(
    """
    not no never nothing nobody hardly without n't cannot don't didn't wasn't isn't couldn't
    """
)


def sentiment(texts: list[str]) -> list[float]:
    """(praise − blame)/(praise + blame) over the words of each text, 0 without any: between −1 and 1.

    A word after a negation, up to two words before it, counts for the other side.
    """
    return [_score(text) for text in texts]


def _score(text: str) -> float:
    words = re.findall(r"[a-z']+", text.lower())
    balance = count = 0
    for i, word in enumerate(words):
        sign = (word in PRAISE) - (word in BLAME)
        if sign:
            negated = any(w in NEGATION for w in words[max(0, i - 2) : i])
            balance += -sign if negated else sign
            count += 1
    return balance / count if count else 0.0


def is_sentence(texts: list[str]) -> list[bool]:
    """Whether each text ends as a sentence does, with a full stop, an exclamation mark or a question mark."""
    return [text.rstrip().rstrip("\"'").endswith((".", "!", "?")) for text in texts]
