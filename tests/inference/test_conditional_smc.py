"""Conditional SMC by its exact law: the invariant kernel, the inverse of Ẑ, the upper bound; and what breaks them."""

import math
from dataclasses import replace

import pytest
import torch

from lmppl.errors import ModelError, UnsupportedModel
from lmppl.inference import AIS, bounds, resampling, reverse_ais
from lmppl.inference.conditional_smc import conditional_smc, particle_gibbs_step, sandwich
from lmppl.inference.exact import Exact
from lmppl.inference.mcmc import MCMC
from lmppl.inference.rejection import Rejection
from lmppl.inference.run import infer
from lmppl.inference.smc import SMC
from lmppl.lm.randomness import Source
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence.constraint import Constraint
from lmppl.modeling.evidence.reward import Reward
from lmppl.modeling.target import Target
from lmppl.testing.enumeration import every_outcome
from tests.inference.smc_cases import (
    SCHEMES,
    VISIBLE,
    ArbitraryTwist,
    Law,
    brute_of,
    conditional_law,
    kernel,
    one_row,
    possible,
    small_lm,
    small_model,
    sweep_law,
)
from tests.models import TOLERANCE, brute_force, enumerable_lm, has_no, wavy

INVARIANT = 1e-12


def engine(scheme, particles=2, **options):
    return SMC(particles, resampling=scheme, twist=ArbitraryTwist(3), **{"ess_threshold": 1.0} | options)


def invariance(model, smc, context=0):
    """max |π*K − π*| of the iterated kernel."""
    brute = brute_of(model, context)
    matrix = kernel(Target(model), smc, brute, particle_gibbs_step)
    star = brute.log_posterior.exp()
    assert torch.allclose(matrix.sum(1)[possible(brute)], torch.ones((), dtype=torch.float64), rtol=0, atol=1e-12)
    return float((star @ matrix - star).abs().max())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("threshold", [1.0, 0.9])
def test_iterated_conditional_smc_leaves_the_posterior_invariant(scheme, threshold):
    proposal = "optimal" if threshold == 1.0 else "prior"
    smc = engine(scheme, ess_threshold=threshold, proposal=proposal)
    assert invariance(small_model("tabular", True), smc) < INVARIANT


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_invariance_through_the_real_decoder(kind):
    scheme = {"llama": "systematic", "mistral": "residual"}[kind]
    assert invariance(small_model(kind, True), engine(scheme, proposal="optimal"), context=1) < INVARIANT


def test_invariance_with_another_proposal_and_without_hard_factors():
    model = small_model("tabular", True)
    proposal = small_lm("tabular", seed=5)
    assert invariance(model, engine("systematic", ess_threshold=0.9, proposal=proposal)) < INVARIANT
    assert invariance(small_model("tabular", False), engine("ssp")) < INVARIANT


@pytest.mark.slow
def test_invariance_where_rows_wait_at_the_ends_of_words():
    table = TabularLM.random(3, 3, order=2, seed=1).log_table.exp().view(4, 4, 3)
    lm = TabularLM(table, ["a", " ", "<eos>"], max_new_tokens=3)
    model = lm * Reward(wavy, beta=0.4) * Constraint(lambda texts: ["a a" not in t for t in texts])
    assert invariance(model, engine("systematic", every="word")) < INVARIANT


@pytest.mark.parametrize("scheme", SCHEMES)
def test_keeping_a_slot_is_right_for_multinomial_only(monkeypatch, scheme):
    """Mutant: the retained particle keeps its slot, and the rest is resampled as if it were not there."""

    def keeps(weights, retained, source):
        ancestors = resampling.RESAMPLING[scheme].draw(weights, source)
        ancestors[torch.arange(len(weights)), retained] = retained
        return ancestors, retained

    model, smc = small_model("tabular", True), engine(scheme)
    if scheme == "residual":  # with two particles the two laws have the same invariant law
        model = TabularLM.random(2, 2, order=2) * Reward(wavy, beta=0.4)
        smc = replace(smc, num_particles=3, twist=ArbitraryTwist(2))
        assert invariance(model, smc) < INVARIANT
    kept = resampling.RESAMPLING[scheme]._replace(draw_given=keeps)
    monkeypatch.setitem(resampling.RESAMPLING, scheme, kept)
    off = invariance(model, smc)
    assert off < INVARIANT if scheme == "multinomial" else off > VISIBLE


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("scheme", ["systematic", "residual"])
def test_inverse_of_z_and_the_upper_bound(scheme, hard):
    """E[1/Ẑ] = Pr(Ẑ > 0)/Z and E log Ẑ ≥ log Z from an exact draw; Pr(Ẑ > 0) = 1 only without zero weights."""
    model, smc = small_model("tabular", hard), engine(scheme)
    brute, target = brute_of(model), Target(model)
    chance = Law(brute, sweep_law(target, smc)).chance
    inverse = upper = 0.0
    for row in possible(brute):
        law = conditional_law(target, smc, brute, row)
        assert math.isclose(law.total, 1.0, abs_tol=1e-10)
        assert math.isclose(law.chance, 1.0, abs_tol=1e-10)  # the retained row keeps Ẑ positive
        inverse += float(brute.log_posterior[row].exp()) * law.inverse
        upper += float(brute.log_posterior[row].exp()) * law.mean_log_z
    log_z = float(brute.log_z)
    assert math.isclose(inverse, chance / math.exp(log_z), abs_tol=TOLERANCE)
    assert math.isclose(inverse, math.exp(-log_z), abs_tol=TOLERANCE) is not hard
    assert upper > log_z + 1e-6


def test_the_retained_rows_survive_and_groups_do_not_mix():
    model = enumerable_lm("llama") * Reward(wavy, beta=0.4) * Constraint(has_no("b"))
    target = Target(model)
    rows = infer(model, Rejection(log_upper=2.5), 6, progress=False).draws
    source = Source(torch.Generator().manual_seed(0))
    for scheme in SCHEMES:
        smc = SMC(8, resampling=scheme, ess_threshold=1.0, proposal="prior")
        result = conditional_smc(target, smc, rows, source)
        kept = result.draws.select(torch.arange(len(rows)) * 8 + result.slots)
        assert kept.keys() == rows.keys()
        assert result.draws.context.view(-1, 8).eq(rows.context[:, None]).all()
        assert torch.allclose(result.draws.log_prior, model.prior.score(result.draws), atol=1e-10)
        assert not torch.equal(result.slots, torch.zeros_like(result.slots))
        new = particle_gibbs_step(target, smc, rows, source)
        assert new.context.equal(rows.context)
        assert new.log_weight is None
        assert set(new.log_factors) == set(rows.log_factors)


def test_sandwich_holds_log_z():
    model = enumerable_lm("tabular") * Reward(wavy, beta=0.4) * Constraint(has_no("b"))
    table = infer(model, Exact(), progress=False)
    draws = table.draw(60, generator=torch.Generator().manual_seed(1))
    found = sandwich(model, SMC(32, proposal="prior"), draws, num_sweeps=60)
    for c in range(2):
        log_z = float(brute_force(model, c).log_z)
        assert float(found.lower.interval[c, 0]) < log_z < float(found.upper.interval[c, 1])
        assert float(found.lower.value[c]) < float(found.upper.value[c]) + 0.02
        assert float(found.upper.interval[c, 1] - found.lower.interval[c, 0]) < 0.3
    assert (found.lower.kind, found.upper.kind) == ("lower_bound", "upper_bound")


def test_the_upper_bound_sees_a_mode_that_every_sweep_misses():
    """99 % of the mass is where the proposal hardly goes: sweeps agree with each other, and are all wrong."""
    lm = small_lm("tabular", 2)
    model = lm * Reward(lambda texts: [12.0 * (t == "bb") for t in texts], name="needle")

    class Blind(ArbitraryTwist):
        def value(self, context, prefix):
            return -9.0 * prefix.count(1)

    smc = SMC(4, twist=Blind(3), proposal="optimal")
    draws = infer(model, Exact(), progress=False).draw(20, generator=torch.Generator().manual_seed(0))
    found = sandwich(model, smc, draws, num_sweeps=8)
    log_z = brute_force(model, 0).log_z
    assert found.lower.interval[0, 1] < log_z - 3  # a tight interval in the wrong place
    assert found.upper.value[0] > log_z - 0.1


def test_a_twist_that_kills_the_retained_row_is_refused():
    class Zero(ArbitraryTwist):
        def value(self, context, prefix):
            return -math.inf if prefix == (0,) else super().value(context, prefix)

    model = small_model("tabular", True)
    brute, target = brute_of(model), Target(model)
    row = next(i for i in possible(brute) if len(brute.sequences.token_lists()[i]) == 2)
    smc = SMC(2, twist=Zero(3), proposal="prior")
    with pytest.raises(ModelError, match="is 0 for a row with γ > 0"):
        conditional_smc(target, smc, one_row(target, brute, row), Source(torch.Generator().manual_seed(0)))


def test_a_conditional_run_refuses_estimates_of_factors():
    model = enumerable_lm("tabular") * Reward(wavy, stochastic=True, name="noisy")
    rows = model.prior.draw(1, generator=torch.Generator().manual_seed(0)).with_columns(log_weight=None)
    with pytest.raises(UnsupportedModel, match="conditional SMC needs exact factor values: factor 'noisy'"):
        conditional_smc(Target(model), SMC(4), rows, Source(torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_row_that_the_others_outweigh_by_far_survives(scheme):
    model = small_lm("tabular", 4) * Reward(wavy)
    smc = SMC(8, 1.0, scheme, twist=ArbitraryTwist(3, spread=60.0), proposal="prior")
    rows = model.prior.draw(20, generator=torch.Generator().manual_seed(1)).with_columns(log_weight=None, log_q=None)
    result = conditional_smc(Target(model), smc, rows, Source(torch.Generator().manual_seed(2)))
    kept = result.draws.select(torch.arange(len(rows)) * 8 + result.slots)
    assert kept.ids.equal(rows.ids)
    assert kept.lengths.equal(rows.lengths)


def test_the_retained_row_starts_in_every_slot_alike():
    """Schemes are not symmetric in the slots, so that a fixed one would not do where there are more than three."""
    model = small_model("tabular", False, horizon=1)
    brute, target = brute_of(model), Target(model)
    for i in possible(brute):
        row = one_row(target, brute, i)
        found = torch.zeros(3, dtype=torch.float64)
        for probability, result in every_outcome(lambda s, r=row: conditional_smc(target, SMC(3), r, s)):
            found[result.slots] += probability
            assert result.draws.keys()[int(result.slots)] == row.keys()[0]
        assert torch.allclose(found, torch.full_like(found, 1 / 3), atol=INVARIANT, rtol=0)


def test_wrong_rows_are_refused():
    model = small_model("tabular", True)
    brute, target = brute_of(model), Target(model)
    source = Source(torch.Generator().manual_seed(0))
    dead = next(i for i, g in enumerate(brute.log_gamma.tolist()) if g == -math.inf)
    with pytest.raises(ModelError, match="has γ = 0"):
        conditional_smc(target, engine("systematic"), one_row(target, brute, dead), source)
    row = one_row(target, brute, possible(brute)[0])
    cut = replace(row, lengths=row.lengths - 1, finished=torch.tensor([False]))
    with pytest.raises(ModelError, match="no outcome of the prior"):
        conditional_smc(target, engine("systematic"), cut, source)
    weighted = infer(model, SMC(4), 8, progress=False).draws
    with pytest.raises(ModelError, match="weighted draws"):
        sandwich(model, engine("systematic"), weighted)


def test_draws_of_another_model_or_engine_are_refused():
    """They would make a number that bounds nothing."""
    model = small_model("tabular", True)
    exact = infer(model, Exact(), progress=False).draw(4, generator=torch.Generator().manual_seed(0))
    other = infer(model.prior * Reward(wavy, beta=9.0, upper=1.0), Rejection(), 8, progress=False).draws
    with pytest.raises(ModelError, match=r"the draws are of another model, π\*\(x\|c\) ∝ .* than π"):
        bounds.sandwich(model, engine("systematic"), other)
    chains = infer(model, MCMC(num_chains=4, num_steps=4, warmup=0), progress=False).draws
    with pytest.raises(ModelError, match=r"come from mcmc.*, which is consistent, expected exact draws"):
        bounds.sandwich(model, engine("systematic"), chains)
    assert bounds.sandwich(model, engine("systematic"), exact).upper.kind == "upper_bound"
    with pytest.raises(ModelError, match="reverse_ais: the draws are of another model"):
        reverse_ais(model, AIS(8, ladder=(0.0, 1.0)), other)
    for level in (0.0, 1.5):
        with pytest.raises(ModelError, match=f"got level={level}"):
            bounds.sandwich(model, engine("systematic"), exact, level=level)
    bare = infer(model.prior, Exact(), progress=False).draw(4, generator=torch.Generator().manual_seed(0))
    assert bounds.sandwich(model.prior, SMC(4), bare).upper.value.shape == (2,)


def test_an_effective_size_of_no_number_is_none():
    assert bool(resampling.effective_sizes(torch.tensor([[math.nan, 0.0]])).isnan().all())
