"""The reference posteriors: the problems on which every engine is checked.

Their answers come from `brute_force`, or for the long horizon from a recursion written for it alone, so that they share
no code with the engines.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence.attitudes import Robust
from lmppl.modeling.evidence.automata import Automaton
from lmppl.modeling.evidence.constraint import Constraint
from lmppl.modeling.evidence.languages import Finished, Regex
from lmppl.modeling.evidence.lm_factors import LMFactor
from lmppl.modeling.evidence.reward import Optimality, Reward
from lmppl.modeling.evidence.uncertain import UncertainReward
from lmppl.modeling.factors import Factor, Feature
from lmppl.modeling.model import Model
from lmppl.sequences import Sequences
from lmppl.testing.brute_force import Outcome, outcomes
from lmppl.testing.reference import ReferencePosterior, enumerated

__all__ = ["RECORDED", "references"]

RECORDED = {  # log Z of each context, in nats: version 1
    "no_evidence": (0.0,),
    "bounded_reward": (0.8822447968054197,),
    "unbounded_reward": (2.999162608565978,),
    "optimality": (-0.6417926647750667,),
    "hard_constraint": (-0.16263658347755627,),
    "rare_constraint": (-7.082108666126915,),
    "reward_and_constraint": (0.13499802669547378,),
    "two_contexts": (0.4491566600473875, 1.1969317719292778),
    "forced_length": (1.784330520304553,),
    "languages_and_experts": (-1.595179490728597,),
    "sparse_support": (3.0804130279062063,),
    "long_horizon": (-0.5260083898499488,),
}

SYMBOLS = ("a", "b", "<eos>")
EOS = 2
BIGRAM = (  # after a, after b, after <eos> (never asked), at the start
    (0.30, 0.45, 0.25),
    (0.50, 0.20, 0.30),
    (0.00, 0.00, 1.00),
    (0.55, 0.35, 0.10),
)
EXPERT = ((0.2, 0.2, 0.6), (0.7, 0.2, 0.1), (0.0, 0.0, 1.0), (0.3, 0.6, 0.1))
FORCED = ((0.2, 0.5, 0.3), (0.6, 0.1, 0.3), (0.25, 0.25, 0.5), (0.4, 0.4, 0.2))  # no <eos>: symbols a, b, c
TREE = {  # with zeros: the support is no product set
    (): (0.5, 0.5, 0.0),
    (0,): (0.0, 0.4, 0.6),
    (1,): (0.7, 0.0, 0.3),
    (0, 1): (0.2, 0.3, 0.5),
    (1, 0): (0.0, 0.9, 0.1),
}
LONG_CAP = 40
LONG = (  # a, b, c, <eos>; after each of them, at the start
    (0.12, 0.48, 0.38, 0.02),
    (0.30, 0.30, 0.37, 0.03),
    (0.25, 0.40, 0.30, 0.05),
    (0.00, 0.00, 0.00, 1.00),
    (0.40, 0.30, 0.29, 0.01),
)


def references() -> list[ReferencePosterior]:
    """All reference posteriors, built and checked against their recorded answers."""
    built = [build() for build in BUILDERS]
    return [reference.checked(RECORDED[reference.name]) for reference in built]


# User functions, as a user would write them: a list of texts in, one number a text out.


def count_a(texts: list[str]) -> list[int]:
    """How often each text says "a"."""
    return [text.count("a") for text in texts]


def count_b(texts: list[str]) -> list[int]:
    """How often each text says "b"."""
    return [text.count("b") for text in texts]


def log_shortness(texts: list[str]) -> list[float]:
    """log p(O=1|x): −inf for the empty text, else −0.4 for each symbol after the first."""
    return [-0.4 * (len(text) - 1) if text else -math.inf for text in texts]


def without_bb(texts: list[str]) -> list[bool]:
    """Whether "bb" is nowhere in each text."""
    return ["bb" not in text for text in texts]


def is_bbbb(texts: list[str]) -> list[bool]:
    """Whether each text is "bbbb"."""
    return [text == "bbbb" for text in texts]


def changes(full_texts: list[str]) -> list[int]:
    """How often the symbol changes in each context + completion."""
    return [sum(a != b for a, b in itertools.pairwise(text)) for text in full_texts]


def two_judges(texts: list[str]) -> list[list[int]]:
    """An ensemble: one judge counts "a", the other "b" twice."""
    return [[text.count("a"), 2 * text.count("b")] for text in texts]


def ended(rows: Sequences) -> Tensor:
    """Whether each row ended by EOS before the cap cut it."""
    return rows.finished


# The problems.


def _no_evidence() -> ReferencePosterior:
    return _bigram("no_evidence", "a bigram LM with no evidence: π* = π0", (), lambda x: 0.0)


def _bounded_reward() -> ReferencePosterior:
    factor = Reward(count_b, beta=1.5, upper=4)
    return _bigram("bounded_reward", "a reward with a bound", (factor,), lambda x: x.text.count("b") / 1.5)


def _unbounded_reward() -> ReferencePosterior:
    factor = Reward(count_a, beta=0.7)
    return _bigram("unbounded_reward", "a reward that declares no bound", (factor,), lambda x: x.text.count("a") / 0.7)


def _optimality() -> ReferencePosterior:
    factor = Optimality(log_shortness)
    return _bigram("optimality", "p(O=1|x), zero for the empty text", (factor,), lambda x: log_shortness([x.text])[0])


def _hard_constraint() -> ReferencePosterior:
    factor = Constraint(without_bb)
    return _bigram("hard_constraint", "a predicate", (factor,), lambda x: _log(not x.text.count("bb")))


def _rare_constraint() -> ReferencePosterior:
    return _bigram(
        "rare_constraint", "a predicate of prior probability about 1e-3", (Constraint(is_bbbb),),
        lambda x: _log(x.ids == (1, 1, 1, 1, EOS)), cap=5, num_draws=30, num_proposals=20_000, rare=True,
    )  # fmt: skip


def _reward_and_constraint() -> ReferencePosterior:
    return _bigram(
        "reward_and_constraint", "a bounded reward times a predicate over tokens: ended before the cap",
        (Reward(count_b, beta=1.5, upper=4), Constraint(Feature("ended", ended, on="ids"))),
        lambda x: x.text.count("b") / 1.5 + _log(x.finished),
    )  # fmt: skip


def _two_contexts() -> ReferencePosterior:
    contexts = ["", "abb"]
    full = Reward(changes, beta=2.0, upper=5, on="full")
    return _bigram(
        "two_contexts", "contexts of different length, and a reward that reads them", (full, Constraint(without_bb)),
        lambda x, c: changes([c + x.text])[0] / 2 + _log("bb" not in x.text), contexts=contexts,
    )  # fmt: skip


def _forced_length() -> ReferencePosterior:
    prior = TabularLM(FORCED, ["a", "b", "c"], eos=None, max_new_tokens=4)
    table = outcomes(lambda ids: FORCED[ids[-1] if ids else -1], "abc", eos=None, cap=4)
    model = prior * Reward(count_a, beta=1.0, upper=4)
    return enumerated(
        "forced_length", "no EOS: every row runs to the cap", model, [table],
        lambda x, c: float(x.text.count("a")),
    )  # fmt: skip


def _languages_and_experts() -> ReferencePosterior:
    expert = TabularLM(EXPERT, SYMBOLS, max_new_tokens=4)
    factors = (
        Regex("[ab]*b") | ~Finished(),
        UncertainReward(two_judges, beta=2.0, attitude=Robust(1.0), upper=8.0),
        LMFactor(expert, 0.5),
    )

    def log_evidence(x: Outcome) -> float:
        judges = -math.log(sum(math.exp(-r / 2) for r in two_judges([x.text])[0]) / 2)
        before = (-1, *x.ids[:-1])
        expert = math.fsum(math.log(EXPERT[b][token]) for b, token in zip(before, x.ids, strict=True))
        return judges + expert / 2 + _log(x.text.endswith("b") or not x.finished)

    about = "texts of a language, or cut by the cap; two judges by their certainty; another LM"
    return _bigram("languages_and_experts", about, factors, log_evidence)


def _sparse_support() -> ReferencePosterior:
    prior = TabularLM.from_prefixes(TREE, SYMBOLS, max_new_tokens=3)
    table = outcomes(lambda ids: TREE[ids], SYMBOLS, eos=EOS, cap=3)
    model = prior * Reward(count_b, beta=0.5, upper=2) * Constraint(Automaton.length(2))
    return enumerated(
        "sparse_support", "a prior given prefix by prefix, with zeros", model, [table],
        lambda x, c: x.text.count("b") / 0.5 + _log(len(x.text) >= 2),
    )  # fmt: skip


def _long_horizon() -> ReferencePosterior:
    symbols = ["a", "b", "c", "<eos>"]
    prior = TabularLM(LONG, symbols, max_new_tokens=LONG_CAP)
    model = prior * Constraint(Automaton.avoiding("aa"), name="no_aa")
    total, sums = _sum_over_long_paths()
    log_z = torch.tensor([math.log(total)], dtype=torch.float64)
    exact = {name: torch.tensor([value / total], dtype=torch.float64) for name, value in sums.items()}
    about = f"T = {LONG_CAP}, an automaton: no text with 'aa'"
    return ReferencePosterior("long_horizon", about, "1", model, log_z, None, exact, num_proposals=1000)


BUILDERS: tuple[Callable[[], ReferencePosterior], ...] = (
    _no_evidence,
    _bounded_reward,
    _unbounded_reward,
    _optimality,
    _hard_constraint,
    _rare_constraint,
    _reward_and_constraint,
    _two_contexts,
    _forced_length,
    _languages_and_experts,
    _sparse_support,
    _long_horizon,
)


def _log(allowed: bool) -> float:
    return 0.0 if allowed else -math.inf


def _bigram(
    name: str,
    description: str,
    factors: Sequence[Factor],
    log_evidence: Callable[..., float],
    *,
    contexts: Sequence[str] = ("",),
    cap: int = 4,
    **options: Any,
) -> ReferencePosterior:
    prior = TabularLM(BIGRAM, SYMBOLS, max_new_tokens=cap, context=list(contexts))
    tables = [
        outcomes(
            lambda ids: BIGRAM[ids[-1] if ids else -1], SYMBOLS, eos=EOS, cap=cap,
            context=tuple("ab".index(s) for s in context),
        )
        for context in contexts
    ]  # fmt: skip
    with_context = log_evidence if len(contexts) > 1 else lambda x, c: log_evidence(x)
    return enumerated(name, description, Model(prior, factors), tables, with_context, **options)


def _sum_over_long_paths() -> tuple[float, dict[str, float]]:
    """Σ γ and Σ γ·h for the long horizon: forward over (first is a, last symbol), time by time."""
    mass = {(token == 0, token): LONG[-1][token] for token in range(3)}
    total = LONG[-1][3]
    sums = {"length": total, "finished": total, "begins_with_a": 0.0}

    def end(amount: float, length: int, finished: bool, first: bool) -> None:
        nonlocal total
        total += amount
        sums["length"] += amount * length
        sums["finished"] += amount * finished
        sums["begins_with_a"] += amount * first

    for length in range(2, LONG_CAP + 1):
        following: dict[tuple[bool, int], float] = {}
        for (first, last), amount in mass.items():
            end(amount * LONG[last][3], length, True, first)
            for token in range(3):
                if not (last == 0 and token == 0):
                    state = (first, token)
                    following[state] = following.get(state, 0.0) + amount * LONG[last][token]
        mass = following
    for (first, _), amount in mass.items():
        end(amount, LONG_CAP, False, first)
    return total, sums
