"""Laws of automata on texts that no LM need have drawn: random words, and words that are almost accepted."""

from __future__ import annotations

import random

import torch

from lmppl.modeling.evidence.automata import Automaton
from lmppl.modeling.evidence.character_sets import CharacterSet, as_set
from lmppl.modeling.factors import Factor
from lmppl.modeling.user_functions import evaluate, evaluate_log_factor
from lmppl.sequences import Sequences
from lmppl.testing.reports import Report

__all__ = ["check_automaton_on_texts", "random_texts"]

LAW = "the automaton agrees with the predicate on random texts"


def check_automaton_on_texts(report: Report, factor: Factor, rows: Sequences, num_texts: int, seed: int) -> None:
    """φ = 1 where the automaton accepts, and 0 elsewhere, on words that are drawn from the automaton itself.

    Needs functions of the completion's text alone, which can be given any text.
    """
    automaton = factor.automaton
    assert automaton is not None
    plain = all(f.on == "text" and not f.reads_prompts for f in factor.features)
    if automaton.over != "characters" or not plain or len(rows) == 0:
        report.skip(LAW, "its function reads more than the text")
        return
    texts = random_texts(automaton, num_texts, seed, letters="".join(sorted(set("".join(rows.text)))))
    tried = rows.select([0] * len(texts))
    tried.__dict__["text"] = texts
    columns = {f.name: evaluate(f, tried, factor=factor.name) for f in factor.features}
    allowed = evaluate_log_factor(factor, columns, tried) == 0
    accepted = automaton.accepts_texts(texts)
    bad = torch.nonzero(allowed.cpu() != accepted).squeeze(1).tolist()
    shown = f"φ = {int(allowed[bad[0]])} for the text {texts[bad[0]]!r}" if bad else ""
    verdict = f"it {'accepts' if bad and accepted[bad[0]] else 'rejects'} the text"
    share = float(accepted.double().mean())
    report.require(not bad, LAW, shown, verdict, f"on {len(texts)} texts, {share:.0%} of them accepted")


def random_texts(
    automaton: Automaton, num_texts: int, seed: int, *, letters: str = "", max_length: int = 40
) -> list[str]:
    """Words for trying an automaton over characters: walks that end where it accepts, the same with an edit, and noise.

    Parameters
    ----------
    automaton : Automaton
    num_texts : int
    seed : int
    letters : str
        Characters of which noise is made too, beside those that the automaton tells apart.
    max_length : int
        Where walks stop looking for an accepting state.
    """
    source = random.Random(seed)
    named = [as_set(s) for s in automaton.alphabet if not isinstance(s, int)]
    sets = [*named, ~CharacterSet.of_ranges(r for one in named for r in one.ranges)]
    columns = [i for i, one in enumerate(sets) if one]
    live, accept, moves = automaton.live().tolist(), automaton.accept.tolist(), automaton.transitions.tolist()

    def character(column: int) -> str:
        ranges = sets[column].ranges
        low, high = ranges[source.randrange(min(len(ranges), 8))]  # the first ranges are the ones that people write
        return chr(low + source.randrange(min(high - low + 1, 64)))

    def noise() -> str:
        if letters and source.randrange(4):
            return letters[source.randrange(len(letters))]
        return character(columns[source.randrange(len(columns))])

    def walk() -> str:
        state, word = automaton.start, ""
        while len(word) < max_length:
            if accept[state] and source.randrange(4) == 0:
                break
            on = [c for c in columns if live[moves[state][c]]]
            if not on:
                break
            column = on[source.randrange(len(on))]
            word += character(column)
            state = moves[state][column]
        return word

    texts = ["", str(automaton.shortest() or "")]
    while len(texts) < num_texts:
        word, kind = walk(), len(texts) % 3
        if kind == 1 and word:
            at = source.randrange(len(word))
            word = word[:at] + character(columns[source.randrange(len(columns))]) * source.randrange(2) + word[at + 1 :]
        elif kind == 2:
            word = "".join(noise() * source.randrange(1, 8) for _ in range(source.randrange(8)))
        texts.append(word)
    return texts[:num_texts]
