"""SMC by its exact law: every outcome of whole sweeps with two particles, on models that brute force can sum."""

import math
import re
from dataclasses import replace

import pytest
import torch

from lmppl.inference import resampling
from lmppl.inference.smc import SMC
from lmppl.inference.sweep import Sweep
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence.automata import Automaton
from lmppl.modeling.evidence.constraint import Constraint
from lmppl.modeling.evidence.power import PowerPrior
from lmppl.modeling.evidence.reward import Reward
from lmppl.modeling.target import Target
from tests.inference.smc_cases import (
    KINDS,
    SCHEMES,
    VISIBLE,
    ArbitraryTwist,
    Law,
    brute_of,
    conditional_law,
    counts,
    forbids,
    possible,
    small_lm,
    small_model,
    sweep_law,
)
from tests.models import TOLERANCE, has_no, wavy

PROPOSALS = ("prior", "optimal", "lm")


def engine(kind, scheme="systematic", proposal="prior", *, twist=True, horizon=2, **options):
    """Two particles, an arbitrary twist, resampling whenever weights differ."""
    if proposal == "lm":
        proposal = small_lm("tabular", horizon, seed=5)
        proposal = proposal if kind == "tabular" else other_lm(kind, horizon)
    options = {"ess_threshold": 1.0} | options
    return SMC(2, resampling=scheme, proposal=proposal, twist=ArbitraryTwist(3) if twist else None, **options)


def other_lm(kind, horizon):
    from lmppl.lm.transformers import TransformersLM
    from tests.lm.random_models import build, tokenizer

    return TransformersLM(
        build(kind, 3, seed=7), tokenizer=tokenizer(3), context=["ab", "bacab"], max_new_tokens=horizon
    )


def check(model, smc, context=0):
    """E Ẑ = Z and E[Ẑ Σ W̄ f] = Z E_π*[f] for every f."""
    brute, target = brute_of(model, context), Target(model)
    law = Law(brute, sweep_law(target, smc, context))
    assert math.isclose(law.total, 1.0, abs_tol=1e-10)
    assert math.isclose(law.mean_z, float(brute.log_z.exp()), abs_tol=TOLERANCE)
    assert torch.allclose(law.mean_mass, brute.log_gamma.exp(), rtol=0, atol=TOLERANCE)
    return law


def is_wrong(model, smc):
    """Whether the estimate of γ is visibly biased."""
    brute = brute_of(model)
    law = Law(brute, sweep_law(Target(model), smc))
    return float((law.mean_mass - brute.log_gamma.exp()).abs().max()) > VISIBLE


@pytest.mark.parametrize(
    ("scheme", "proposal", "hard"),
    [(s, p, (i + j) % 2 == 0) for i, s in enumerate(SCHEMES) for j, p in enumerate(PROPOSALS)],
)
def test_z_is_unbiased_and_weighted_draws_are_of_the_posterior(scheme, proposal, hard):
    check(small_model("tabular", hard), engine("tabular", scheme, proposal))


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize("context", [0, 1])
def test_through_the_real_decoder(kind, proposal, context):
    scheme = SCHEMES[(KINDS.index(kind) + PROPOSALS.index(proposal)) % len(SCHEMES)]
    check(small_model(kind, hard=context == 1), engine(kind, scheme, proposal), context)


@pytest.mark.parametrize("scheme", ["ssp"])
def test_three_tokens_with_resampling_by_ess(scheme):
    check(small_model("tabular", True, horizon=3), engine("tabular", scheme, horizon=3, ess_threshold=0.8))


@pytest.mark.parametrize(("every", "mark"), [(2, "b"), ("word", " "), ("sentence", "."), (re.compile("a"), "b")])
def test_rounds_of_several_tokens(every, mark):
    """Rows wait for each other at boundaries, with an arbitrary twist and with a factor's form."""
    table = TabularLM.random(3, 3, order=2, seed=1).log_table.exp().view(4, 4, 3)
    lm = TabularLM(table, ["a", mark, "<eos>"], max_new_tokens=3, context=["", "a"])
    model = lm * counts("a", 3, 0.7) * Reward(wavy, beta=0.6)
    smc = engine("tabular", "systematic", every=every, proposal="optimal", ess_threshold=0.85)
    check(model, smc)
    if every == "word":
        check(model, replace(smc, twist=None), 1)


@pytest.mark.parametrize("proposal", ["prior", "optimal"])
def test_factors_with_a_form_are_the_twist(proposal):
    lm = small_lm("tabular", 3)
    model = lm * forbids("b", 3) * counts("a", 3, 0.7) * small_model("tabular", False).factors[0]
    smc = engine("tabular", proposal=proposal, twist=False, horizon=3)
    check(model, smc)
    check(model, replace(smc, ess_threshold=0.0))


@pytest.mark.parametrize("kind", ["tabular", "llama"])
@pytest.mark.parametrize("proposal", [None, "prior"])
@pytest.mark.parametrize(
    "factor",
    [
        PowerPrior(1.7),
        Constraint(Automaton.avoiding("ba") & Automaton.length(1)),
        Constraint(has_no("b"), prefix_closed=True),
    ],
    ids=["power", "automaton", "prefix closed"],
)
def test_factors_of_the_library_are_twists(kind, proposal, factor):
    model = small_model(kind, False) * factor
    smc = engine(kind, proposal=proposal, twist=False)
    assert smc.twist_of(Target(model)).names == (factor.name,)
    check(model, smc, context=1)


@pytest.mark.parametrize(("scheme", "hard"), [(s, i % 2 == 0) for i, s in enumerate(SCHEMES)])
def test_the_law_of_a_draw(scheme, hard):
    """q_SMC(x) = γ(x) E_cSMC|x[1/Ẑ], and the two bounds on its divergence from π*."""
    model, smc = small_model("tabular", hard), engine("tabular", scheme)
    brute, target = brute_of(model), Target(model)
    law = Law(brute, sweep_law(target, smc))
    inverse = torch.zeros_like(law.draw)
    log_upper = 0.0
    for row in possible(brute):
        given = conditional_law(target, smc, brute, row)
        inverse[row] = given.inverse
        log_upper += float(brute.log_posterior[row].exp()) * given.mean_log_z
    assert torch.allclose(law.draw, brute.log_gamma.exp() * inverse, rtol=0, atol=TOLERANCE)
    assert math.isclose(float(law.draw.sum()), law.chance, abs_tol=TOLERANCE)
    star, log_z = brute.log_posterior.exp(), float(brute.log_z)
    q = law.draw / law.chance
    rows = star > 0
    forward = float((star[rows] * (star[rows] / law.draw[rows]).log()).sum())
    assert forward <= log_upper - log_z + TOLERANCE
    reverse = float((q[rows] * (q[rows] / star[rows]).log()).sum())
    assert reverse <= log_z - law.mean_log_z / law.chance - math.log(law.chance) + TOLERANCE


def test_the_reverse_divergence_is_bounded_by_the_chance_of_a_draw_too():
    """With weights of 0 and 1 a draw that exists is exact: KL = 0, and the bound without log Pr(Ẑ > 0) is negative."""
    lm = small_lm("tabular")
    model = lm * Constraint(lambda texts: [t == "ab" for t in texts])
    smc = SMC(2, ess_threshold=0.0, proposal="prior")
    brute, target = brute_of(model), Target(model)
    law = Law(brute, sweep_law(target, smc))
    q, star = law.draw / law.chance, brute.log_posterior.exp()
    rows = star > 0
    reverse = float((q[rows] * (q[rows] / star[rows]).log()).sum())
    wrong = float(brute.log_z) - law.mean_log_z / law.chance
    assert reverse <= wrong - math.log(law.chance) + TOLERANCE
    assert reverse > wrong + VISIBLE  # mutant: without log Pr(Ẑ > 0)


# Mutants.


class DropsFinished(Sweep):
    """Finished particles leave the pool."""

    def _resample(self, *, final):
        if not final:
            done = torch.ones_like(self.log_w, dtype=torch.bool)
            done[self.frontier.live] = False
            self.log_w[done] = -math.inf
        super()._resample(final=final)


class KeepsTwist(Sweep):
    """ψ is not replaced by φ at the end."""

    def _end(self, rows, died):
        log_w = self.log_w.clone()
        super()._end(rows, died)
        self.log_w = log_w


class IgnoresTheStart(Sweep):
    """ψ(∅) divides the first increment, as it must, but is in no weight before it."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        assert bool((self.log_psi != 0).all())
        self.log_w.zero_()


@pytest.mark.parametrize("mutant", [DropsFinished, KeepsTwist, IgnoresTheStart])
def test_mutant_sweeps_fail(monkeypatch, mutant):
    model, smc = small_model("tabular", False), engine("tabular")
    check(model, smc)
    monkeypatch.setattr("lmppl.inference.smc.Sweep", mutant)
    assert is_wrong(model, smc)


def test_beam_search_is_no_resampling_scheme(monkeypatch):
    def top(weights, source):
        return weights.argmax(-1, keepdim=True).expand_as(weights).clone()

    model, smc = small_model("tabular", False), engine("tabular")
    scheme = resampling.RESAMPLING["systematic"]
    monkeypatch.setitem(resampling.RESAMPLING, "systematic", scheme._replace(draw=top))
    assert is_wrong(model, smc)


def test_a_twist_that_is_zero_too_early_is_caught():
    class Zero(ArbitraryTwist):
        def value(self, context, prefix):
            return -math.inf if prefix == (0, 2) else super().value(context, prefix)

    from lmppl.errors import ModelError

    smc = SMC(2, twist=Zero(3), proposal="prior")
    with pytest.raises(ModelError, match="ψ = 0 for the text 'a'"):
        sweep_law(Target(small_model("tabular", False)), smc)
