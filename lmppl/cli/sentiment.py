"""The demonstration's own evidence, small lists of words, so that it needs no further package."""

from __future__ import annotations

import re

__all__ = ["is_impersonal", "sentiment"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


PRAISE = _words(
    """
    admired adored amazing beautiful best brilliant charm charming clever cozy delicious delight delightful
    elegant engaging enjoy enjoyable enjoyed entertaining excellent exciting fantastic fascinating favorite
    favorites fresh friendly fun funny gentle gladly good great gripping happy heart hilarious honest hopeful
    impressive incredible inspired inspiring interesting joy joyful laugh laughed liked love loved lovely
    masterpiece memorable moving nice perfect perfectly pleasant pleasure powerful proud recommend rewarding
    satisfying smart smile strong success superb sweet talented tender thoughtful thrilling touching treat warm
    wonderful worth
    """
)
BLAME = _words(
    """
    absurd angry annoying argued asleep awful awkward bad bland bore bored boredom boring cheap cheesy cliche
    cliched clumsy cold confused confusing cruel depressing dirty disappointed disappointing disappointment
    disaster disliked dreadful dull dumb embarrassing empty fake flat forgettable gloomy grim hate hated headache
    horrible insult irritating lack lacked lazy lifeless mediocre mess messy miserable noisy painful pathetic
    pointless poor predictable ridiculous rude ruined sad shallow sick silly slow stupid tedious terrible ugly
    unbearable uneven uninspired uninteresting unpleasant unrealistic unremarkable violent warn warned waste
    wasted weak worry worst wrong
    """
)
NEGATION = _words(
    """
    not no never nothing nobody hardly without n't cannot don't didn't wasn't isn't couldn't
    """
)
PERSON = _words("i me my mine myself we us our ours")


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


def is_impersonal(texts: list[str]) -> list[bool]:
    """Whether each text does without the first person: no I, me, my, mine, we, us, our."""
    return [PERSON.isdisjoint(re.findall(r"[a-z]+", text.lower())) for text in texts]
