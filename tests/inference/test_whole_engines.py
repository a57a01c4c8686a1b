"""Whole runs of importance sampling and best-of-n, plan to merge, over every outcome of their choices."""

import math

import pytest
import torch

import lmppl.inference.importance as importance
from lmppl.inference.best_of_n import BestOfN, best_of_n_law, soft_best_of_n_law
from lmppl.inference.importance import Importance
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence.constraint import Constraint
from lmppl.modeling.evidence.reward import Reward
from tests.inference.whole_runs import every_run
from tests.lm.random_models import build, tokenizer
from tests.models import TOLERANCE, brute_force, count_of, has_no, wavy

VISIBLE = 1e-3  # a mutant must be wrong by this much
MODELS = {
    "soft": lambda lm: lm * Reward(wavy, beta=0.5, name="wavy"),
    "ties": lambda lm: lm * Reward(count_of("a"), beta=0.7, name="a"),
    "hard": lambda lm: lm * Reward(wavy, beta=0.5, name="wavy") * Constraint(has_no("b"), name="no b"),
}


def small(kind, seed=0, blind=False):
    """Seven outcomes of one context; `blind` never writes the token b."""
    if kind != "tabular":
        from lmppl.lm.transformers import TransformersLM

        options = {"context": "ab", "max_new_tokens": 2, "temperature": 4.0}  # no outcome is almost certain
        return TransformersLM(build(kind, 3, seed=seed), tokenizer=tokenizer(3), **options)
    table = torch.softmax(torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), -1)
    if blind:
        table[:, 1] = 0.0
        table /= table.sum(-1, keepdim=True)
    return TabularLM(table.tolist(), ["a", "b", "<eos>"], max_new_tokens=2)


def weighted(engine, model, num_draws=2):
    """(S,) E[mean of w·1(x)] and E Ẑ over all runs, and γ, Z by brute force; a run that is refused has Ẑ = 0."""
    brute = brute_force(model, 0)
    number = {key: i for i, key in enumerate(brute.sequences.keys())}
    mass, mean, total = torch.zeros(len(number), dtype=torch.float64), 0.0, 0.0
    for probability, result in every_run(engine, model, num_draws):
        total += probability
        if result is None:
            continue
        mean += probability * math.exp(float(result.log_normalizer[0].value))
        weights = result.draws.log_weight.exp() / num_draws
        for key, weight in zip(result.draws.keys(), weights.tolist(), strict=True):
            mass[number[key]] += probability * weight
    assert total == pytest.approx(1.0, abs=TOLERANCE)
    return mass, mean, brute.log_gamma.exp(), float(brute.log_z.exp())


PROPOSALS = {
    "prior": lambda kind: Importance(),
    "other": lambda kind: Importance(proposal=small(kind, 1)),
    "defensive": lambda kind: Importance(proposal=small(kind, 1), defensive=0.5),
}


ON = [("tabular", "soft"), ("tabular", "hard"), ("llama", "soft"), ("mistral", "hard")]


@pytest.mark.parametrize(("kind", "shape"), ON)
@pytest.mark.parametrize("name", PROPOSALS)
def test_importance_weights_every_outcome_by_gamma(kind, shape, name):
    mass, mean, gamma, z = weighted(PROPOSALS[name](kind), MODELS[shape](small(kind)))
    assert float((mass - gamma).abs().max()) < TOLERANCE
    assert mean == pytest.approx(z, abs=TOLERANCE)


def test_the_defensive_share_covers_what_the_proposal_leaves_out():
    model, blind = MODELS["soft"](small("tabular")), small("tabular", 1, blind=True)
    mass, mean, gamma, z = weighted(Importance(proposal=blind, defensive=0.3), model)
    assert float((mass - gamma).abs().max()) < TOLERANCE
    assert mean == pytest.approx(z, abs=TOLERANCE)
    _, mean, _, z = weighted(Importance(proposal=blind), model)
    assert mean < z - VISIBLE


def test_mutants_of_importance(monkeypatch):
    model, engine = MODELS["soft"](small("tabular")), Importance(proposal=small("tabular", 1), defensive=0.5)
    with monkeypatch.context() as patch:  # the mixture's density taken for the proposal's
        patch.setattr(importance, "log_mixture", lambda log_prior, log_q, share: log_q.double())
        mass, _, gamma, _ = weighted(engine, model)
        assert float((mass - gamma).abs().max()) > VISIBLE
    with monkeypatch.context() as patch:  # φ in the place of γ/q
        patch.setattr(importance, "densities", lambda draws: (draws.log_prior, draws.log_prior))
        mass, _, gamma, _ = weighted(Importance(proposal=small("tabular", 1)), model)
        assert float((mass - gamma).abs().max()) > VISIBLE


def chosen(engine, model, num_draws):
    """The joint law of the draws of a run, and each outcome's number; runs that are refused are left out."""
    brute = brute_force(model, 0)
    number = {key: i for i, key in enumerate(brute.sequences.keys())}
    law = torch.zeros((len(number),) * num_draws, dtype=torch.float64)
    for probability, result in every_run(engine, model, num_draws):
        if result is not None:
            law[tuple(number[key] for key in result.draws.keys())] += probability  # noqa: SIM118 - a method
    return law, brute


@pytest.mark.parametrize(
    ("kind", "shape"), [("tabular", "soft"), ("tabular", "ties"), ("llama", "ties"), ("mistral", "soft")]
)
def test_best_of_n_has_its_law(kind, shape):
    model = MODELS[shape](small(kind))
    law, brute = chosen(BestOfN(2), model, 1)
    assert torch.allclose(law, best_of_n_law(brute.log_prior, brute.log_phi, 2).exp(), atol=TOLERANCE, rtol=0)
    assert float((law - best_of_n_law(brute.log_prior, brute.log_phi, 3).exp()).abs().max()) > VISIBLE
    assert float((law - brute.log_posterior.exp()).abs().max()) > VISIBLE  # mutant: it is not π*
    law, _ = chosen(BestOfN(2, soft=0.8), model, 1)
    expected = soft_best_of_n_law(brute.log_prior, brute.log_phi, 2, 0.8).exp()
    assert torch.allclose(law, expected, atol=TOLERANCE, rtol=0)


def test_each_draw_has_proposals_of_its_own():
    """Two draws of a run are independent, so that their joint law is the product; one pool for both would not be."""
    lm = TabularLM([[0.7, 0.3], [0.0, 1.0], [0.45, 0.55]], ["a", "<eos>"], max_new_tokens=2)
    law, brute = chosen(BestOfN(2), MODELS["ties"](lm), 2)
    one = best_of_n_law(brute.log_prior, brute.log_phi, 2).exp()
    assert torch.allclose(law, one[:, None] * one, atol=TOLERANCE, rtol=0)


def test_runs_without_a_possible_proposal_are_refused_and_the_others_have_the_law():
    model = MODELS["hard"](small("tabular"))
    law, brute = chosen(BestOfN(2), model, 1)
    impossible = brute.log_prior[brute.log_phi == -math.inf].exp().sum()
    assert float(law.sum()) == pytest.approx(1 - float(impossible) ** 2, abs=TOLERANCE)
    possible = brute.log_phi > -math.inf
    expected = best_of_n_law(brute.log_prior, brute.log_phi, 2).exp()
    assert torch.allclose(law[possible], expected[possible], atol=TOLERANCE, rtol=0)
    assert float(law[~possible].sum()) == 0.0
