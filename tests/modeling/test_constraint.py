"""Constraints: b(x) = 1 means allowed; scores need `where`; automata agree with what they are read as."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from lmppl.errors import FactorError, ModelError, ShapeError
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence import Automaton, Constraint, Reward
from lmppl.modeling.model import Model
from lmppl.modeling.target import Target
from lmppl.sequences import Sequences

LM = TabularLM.random(3, 4)
DRAWS = LM.enumerate_sequences()
TEXTS = DRAWS.text


def has_a(texts: list[str]) -> list[bool]:
    return ["a" in t for t in texts]


def count_a(texts: list[str]) -> list[float]:
    return [float(t.count("a")) for t in texts]


def log_factor(model: Model, name: str) -> list[float]:
    values: list[float] = Target(model).log_factors(DRAWS.sequences)[name].tolist()
    return values


def hard(allowed: list[bool]) -> list[float]:
    return [0.0 if a else -math.inf for a in allowed]


@pytest.mark.parametrize(
    "convert", [list, np.array, torch.tensor, lambda v: [int(b) for b in v], lambda v: [float(b) for b in v]]
)
def test_true_means_allowed(convert: Any) -> None:
    values = log_factor(LM * Constraint(lambda texts: convert(has_a(texts)), name="b"), "b")
    assert values == hard(has_a(TEXTS))
    assert values != hard([not b for b in has_a(TEXTS)])  # the inverted reading


def test_what_a_constraint_declares() -> None:
    factor = Constraint(has_a)
    assert (factor.upper, factor.hard, factor.automaton) == (0.0, True, None)
    assert (factor.name, factor.named, factor.formula) == ("has_a", False, "1[has_a(x)]")
    assert Constraint(lambda texts: [True for _ in texts]).name == "constraint"
    assert Constraint(count_a, where=lambda s: s > 0).formula == "1[where(count_a(x))]"
    assert Constraint(has_a, on="full").formula == "1[has_a(c, x)]"


def test_log_z_is_the_log_probability_of_the_event() -> None:
    log_gamma = Target(LM * Constraint(has_a)).log_prob_unnormalized(DRAWS.sequences)
    allowed = sum(math.exp(p) for p, t in zip(DRAWS.log_prior.tolist(), TEXTS, strict=True) if "a" in t)  # type: ignore[union-attr]
    assert torch.logsumexp(log_gamma, 0).item() == pytest.approx(math.log(allowed), abs=1e-12)


def test_where_shares_the_scorer_with_a_reward() -> None:
    calls = []

    def score(texts: list[str]) -> list[float]:
        calls.append(len(texts))
        return count_a(texts)

    model = LM * Reward(score, beta=0.5) * Constraint(score, where=lambda s: s > 1.5, name="often")
    assert log_factor(model, "often") == hard([t.count("a") > 1 for t in TEXTS])
    assert len(calls) == 1
    assert list(model.features) == ["score"]


def test_where_reads_vectors() -> None:
    def both(texts: list[str]) -> list[list[float]]:
        return [[float(t.count("a")), float(t.count("b"))] for t in texts]

    values = log_factor(LM * Constraint(both, where=lambda s: (s[:, 0] > 0) & (s[:, 1] == 0), name="b"), "b")
    assert values == hard(["a" in t and "b" not in t for t in TEXTS])


def test_where_may_read_minus_infinity() -> None:
    values = log_factor(
        LM
        * Constraint(lambda texts: [-math.inf if "b" in t else 0.0 for t in texts], where=lambda s: s > -1, name="b"),
        "b",
    )
    assert values == hard(["b" not in t for t in TEXTS])


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        (
            {"predicate": lambda texts: [0.7 for _ in texts]},
            FactorError,
            r"got 0.7 for '.*', expected True or False; .*where=",
        ),
        ({"predicate": count_a}, FactorError, r"got 2 for '\w+', expected True or False"),
        (
            {"predicate": count_a, "where": lambda s: s * 2},
            FactorError,
            r"got 2 for '\w+', expected True or False from where=",
        ),
        ({"predicate": count_a, "where": lambda s: (s > 0).any()}, ShapeError, r"where= returned shape \(\)"),
        ({"predicate": count_a, "where": lambda s: s > 0 and s < 2}, FactorError, "log_factor raised RuntimeError"),
        ({"predicate": lambda texts: [[True, False] for _ in texts]}, ShapeError, r"\(\d+, 2\)"),
        ({"predicate": lambda texts: ["yes" for _ in texts]}, FactorError, "returned 'yes', expected a number"),
    ],
)
def test_mistakes_name_the_factor(arguments: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words) as caught:
        log_factor(LM * Constraint(**arguments, name="b"), "b")
    assert "factor 'b'" in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        {"predicate": "a"},
        {"predicate": has_a, "where": 0.5},
        {"predicate": has_a, "automaton": "a+"},
        {"predicate": Automaton.containing("a"), "where": lambda s: s > 0},
        {"predicate": Automaton.containing("a"), "on": "ids"},
    ],
)
def test_what_is_no_constraint(arguments: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="Constraint: got"):
        Constraint(**arguments)


# Automata as constraints.


def test_an_automaton_over_characters() -> None:
    machine = Automaton.containing("ab") | Automaton.exactly(["", "b"])
    factor = Constraint(machine, name="shape")
    assert factor.automaton is machine
    assert factor.is_automaton
    assert factor.formula == "1[shape(x)]"
    assert log_factor(LM * factor, "shape") == hard(["ab" in t or t in ("", "b") for t in TEXTS])
    assert Constraint(machine).name == "automaton"


def test_an_automaton_over_tokens_reads_eos_too() -> None:
    eos = LM.eos_ids[0]
    rows = DRAWS.token_lists()
    contains = Constraint(Automaton.containing([0, 1]), name="m")
    assert log_factor(LM * contains, "m") == hard([any(r[i : i + 2] == [0, 1] for i in range(len(r))) for r in rows])
    exactly = Constraint(Automaton.exactly([[0, eos], [1, 1]]), name="m")
    assert log_factor(LM * exactly, "m") == hard([r in ([0, eos], [1, 1]) for r in rows])


@pytest.mark.parametrize("machine", [Automaton.containing("ab"), Automaton.containing([0, 1]), Automaton.length(1, 2)])
def test_the_lifted_automaton_accepts_what_the_predicate_allows(machine: Automaton) -> None:
    symbols = ["" if v in LM.eos_ids else s for v, s in enumerate(LM.vocabulary)]
    table = machine.lift(symbols)
    accepted = []
    for row in DRAWS.token_lists():
        state = machine.start
        for token in row:
            state = int(table[state, token])
        accepted.append(bool(machine.accept[state]))
    assert log_factor(LM * Constraint(machine, name="m"), "m") == hard(accepted)


def test_a_predicate_may_come_with_its_automaton() -> None:
    factor = Constraint(has_a, automaton=Automaton.containing("a"))
    assert factor.automaton is not None
    assert not factor.is_automaton
    assert log_factor(LM * factor, "has_a") == hard(has_a(TEXTS))


def test_a_predicate_of_sequences() -> None:
    def short(rows: Sequences) -> torch.Tensor:
        return rows.lengths <= 2

    values = log_factor(LM * Constraint(short, on="ids"), "short")
    assert values == hard([n <= 2 for n in DRAWS.lengths.tolist()])
