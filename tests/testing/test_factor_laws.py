"""check_factor passes right factors, and each broken one fails by the law that it breaks."""

import dataclasses
import itertools
import math

import pytest
import torch

from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence import Automaton, Constraint, Optimality, Reward
from lmppl.modeling.factors import Factor, Feature
from lmppl.testing import CheckFailed, check_factor

LM = TabularLM.random(3, 4, order=1, seed=2, context=["", "ab"])


def lengths(texts):
    return [float(len(t)) for t in texts]


def ids_factor(log_phi, **options):
    """A factor over token lists, as a user would write one by hand."""
    feature = Feature("f", lambda rows: [log_phi(tuple(t)) for t in rows.token_lists()], on="ids")
    return Factor("own", (feature,), lambda columns: columns["f"], **options)


# Right ones.


@pytest.mark.parametrize(
    "factor",
    [
        Reward(lengths, beta=0.5, upper=4),
        Reward(lambda full: [float(len(t)) for t in full], on="full"),
        Optimality(lambda texts: [-float(len(t)) if t else -math.inf for t in texts]),
        Constraint(lambda texts: ["bb" not in t for t in texts]),
        Constraint(Automaton.avoiding("bb")),
        Constraint(Automaton.exactly([(0, 2), (1, 2)])),
        Constraint(lambda texts: ["bb" not in t for t in texts], automaton=Automaton.avoiding("bb")),
    ],
)
def test_a_right_factor_passes(factor):
    report = check_factor(factor, LM)
    assert "log φ does not depend on the batch" in report.held
    assert ("the automaton accepts exactly where φ > 0" in report.skipped) == (factor.automaton is None)
    given = check_factor(factor, LM.enumerate_sequences(1)).held.keys()
    prefixes = {"potential(start) + Σ weigh = potential(final) = log φ", "a potential of −inf stays −inf"}
    assert given == report.held.keys() if factor.automaton is None else given | prefixes <= report.held.keys()


def test_a_stochastic_factor_need_not_repeat():
    report = check_factor(Reward(lambda texts: torch.rand(len(texts)), stochastic=True), LM)
    assert report.skipped["log φ is a function of the row"] == "a feature is declared stochastic=True"


# Broken ones.


class Changing:
    """Returns the number of the call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, texts):
        self.calls += 1
        return [float(self.calls)] * len(texts)


def centred(texts):
    values = torch.tensor(lengths(texts))
    return values - values.mean()


def by_position(texts):
    return [float(i % 3) for i in range(len(texts))]


def by_size(texts):
    return [float(len(texts) == 1)] * len(texts)


@pytest.mark.parametrize(
    ("factor", "law"),
    [
        (Reward(Changing()), "the same when computed again"),
        (Reward(centred), "depend on the batch"),
        (Reward(by_position), "depend on the order of a batch"),
        (Reward(by_size), "depend on the batch"),
        (Reward(lambda texts: [math.nan] * len(texts)), "defined on every row.*nan"),
        (Reward(lambda texts: [1.0]), "defined on every row.*expected"),
        (Reward(lambda texts: [1 / len(t) for t in texts]), "defined on every row.*ZeroDivisionError.*''"),
        (Reward(lengths, upper=2), "defined on every row.*above the declared upper=2"),
        (ids_factor(len, upper=2.0), "log φ is at most `upper`.*got [34] for the text"),
        (ids_factor(lambda t: -math.inf if 1 in t else 0.0, hard=False), "φ > 0, as hard=False says"),
        (Factor("own", (Feature("f", lengths),), lambda c: c["f"][:, None]), r"one number a row.*\(\d+, 1\)"),
        (Factor("own", (Feature("f", lengths),), lambda c: c["f"] * math.inf), r"finite or −inf.*for the text"),
        (
            Constraint(lambda texts: ["bb" not in t for t in texts], automaton=Automaton.avoiding("ab")),
            "automaton accepts exactly where φ = 1.*it (rejects|accepts)",
        ),
        (
            dataclasses.replace(ids_factor(lambda t: -0.5), automaton=Automaton.length(0)),
            "automaton accepts exactly where φ = 1",
        ),
    ],
)
def test_a_broken_factor_fails(factor, law):
    with pytest.raises(CheckFailed, match=r"factor '\w+': ") as failure:
        check_factor(factor, LM)
    assert failure.match(law)


# Incremental forms: 0.3 for each "a", nothing after "bb".


class Prefixes:
    needs = frozenset({"ids"})

    def __init__(self, log_phi=None):
        self.log_phi = log_phi or log_value

    def start(self, contexts):
        return [()] * len(contexts)

    def weigh(self, state, candidates):
        tokens = [range(3)] * len(state) if candidates is None else candidates.tolist()
        return torch.tensor(
            [[self.ratio(row, token) for token in some] for row, some in zip(state, tokens, strict=True)]
        ).double()

    def ratio(self, row, token):
        before = self.log_phi(row)
        return -math.inf if before == -math.inf else self.log_phi((*row, token)) - before

    def advance(self, state, tokens, step):
        return [(*row, token) for row, token in zip(state, tokens.tolist(), strict=True)]

    def potential(self, state):
        return torch.tensor([self.log_phi(row) for row in state]).double()

    def select(self, state, index):
        return [state[i] for i in index.tolist()]

    def crop(self, state, lengths):
        return [row[:n] for row, n in zip(state, lengths.tolist(), strict=True)]


def log_value(row):
    if (1, 1) in itertools.pairwise(row):
        return -math.inf
    return 0.3 * row.count(0)


class Forgetful(Prefixes):
    def weigh(self, state, candidates):
        return super().weigh(state, candidates) * 0.9


class OtherForAll(Prefixes):
    def weigh(self, state, candidates):
        return super().weigh(state, candidates) + (0.1 if candidates is None else 0.0)


class Recovering(Prefixes):
    def potential(self, state):
        values = super().potential(state)
        return torch.where(torch.tensor([len(row) == 4 for row in state]), 0.0, values)


class SelectsNothing(Prefixes):
    def select(self, state, index):
        return list(state)


class NeedsHidden(Prefixes):
    needs = frozenset({"hidden"})

    def advance(self, state, tokens, step):
        assert step.log_probs.shape[0] == len(tokens)
        return super().advance(state, tokens, step)


def test_a_right_incremental_form_passes():
    factor = ids_factor(log_value, incremental=Prefixes())
    for where in (LM, LM.enumerate_sequences(0)):
        report = check_factor(factor, where)
        assert "potential(start) + Σ weigh = potential(final) = log φ" in report.held
        assert "a potential of −inf stays −inf" in report.held


def test_a_form_that_reads_hidden_states_needs_an_lm():
    factor = ids_factor(log_value, incremental=NeedsHidden())
    assert "potential(start) + Σ weigh = potential(final) = log φ" in check_factor(factor, LM).held
    report = check_factor(factor, LM.enumerate_sequences(0))
    assert "give an LM" in report.skipped["the incremental form adds up to log φ"]


@pytest.mark.parametrize(
    ("form", "law"),
    [
        (Forgetful(), "Σ weigh = potential"),
        (Prefixes(lambda row: 0.3 * row.count(0)), "potential.final. = log φ"),
        (OtherForAll(), "weigh of all tokens agrees with weigh of one"),
        (Recovering(), "a potential of −inf stays −inf"),
        (SelectsNothing(), "select reorders the incremental form"),
    ],
)
def test_a_broken_incremental_form_fails(form, law):
    with pytest.raises(CheckFailed, match=law):
        check_factor(ids_factor(log_value, incremental=form), LM.enumerate_sequences(0))


# The laws of automata on texts that no draw shows, and of soft forms.


def test_an_automaton_that_is_wrong_on_texts_that_the_lm_cannot_write():
    """The LM writes four letters at most: only random texts show that five are too many for the predicate alone."""

    def declared(automaton):
        return Constraint(lambda texts: ["bbbbb" not in t for t in texts], automaton=automaton, name="own")

    law = "the automaton agrees with the predicate on random texts"
    assert "on 300 texts" in check_factor(declared(Automaton.avoiding("bbbbb")), LM).held[law]
    for mutant in (Automaton.length(0), Automaton.avoiding("bbbbbb"), Automaton.length(0, 4)):
        with pytest.raises(CheckFailed, match=f"{law} does not hold: got φ ="):
            check_factor(declared(mutant), LM)


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (lambda step: -step.log_probs[:, 0] + 2.0 * step.log_probs[:, 0].detach(), "a gradient of"),
        (lambda step: step.log_probs[:, 0].detach(), "a value without a gradient"),
        (lambda step: step.log_probs[:, 0] + step.log_probs[:, 1].detach(), "a gradient of"),
    ],
    ids=["sign", "detached", "half"],
)
def test_a_soft_form_whose_gradient_is_another_function_s(wrong, got):
    right = dataclasses.replace(ids_factor(lambda t: -float(len(t))), soft=lambda lm: lambda step: step.log_probs[:, 0])
    law = "the gradient of the soft form agrees with finite differences"
    assert law in check_factor(right, LM).held
    with pytest.raises(CheckFailed, match=f"{law} does not hold: got {got}"):
        check_factor(dataclasses.replace(right, soft=lambda lm: wrong), LM)
