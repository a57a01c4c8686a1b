"""Expectations of draws that depend on each other: sweeps are the independent units."""

import math
from dataclasses import replace

import pytest
import torch

from lmppl.errors import FactorError, ShapeError
from lmppl.inference import SMC, Chains, Guarantee, Importance, Particles, infer
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence.reward import Reward
from lmppl.modeling.factors import Feature
from tests.models import enumerable_lm, wavy

LENGTH = Feature("length", lambda rows: rows.lengths.double(), on="ids")


def particles(num_draws: int = 4000):
    return infer(enumerable_lm("tabular") * Reward(wavy, beta=0.5), Importance(), num_draws, seed=2)


def in_sweeps(result, sweep: torch.Tensor):
    return replace(result, draws=result.draws.with_columns(columns={"sweep": sweep}))


def test_each_draw_a_sweep_of_its_own_is_the_ordinary_error():
    result = particles()
    alone = in_sweeps(result, torch.arange(len(result.draws)))
    usual, clustered = result.expectation(LENGTH), alone.expectation(LENGTH)
    assert torch.equal(usual.value, clustered.value)
    assert torch.allclose(usual.standard_error, clustered.standard_error, rtol=1e-3)


def test_repeated_draws_do_not_make_the_error_smaller():
    result = particles(500)
    rows = torch.arange(len(result.draws)).repeat_interleave(8)
    eightfold = replace(result, draws=result.draws.select(rows))
    alone = in_sweeps(result, torch.arange(len(result.draws)))
    together = in_sweeps(eightfold, rows)
    naive, honest = eightfold.expectation(LENGTH), together.expectation(LENGTH)
    assert torch.allclose(honest.standard_error, alone.expectation(LENGTH).standard_error)
    assert torch.allclose(naive.standard_error * 8**0.5, result.expectation(LENGTH).standard_error)


def test_one_sweep_states_no_error():
    result = particles(100)
    estimate = in_sweeps(result, torch.zeros(len(result.draws), dtype=torch.int64)).expectation(LENGTH)
    assert bool(estimate.standard_error.isnan().all())
    assert bool(estimate.interval.isnan().all())
    assert "one sweep" in estimate.note


def test_weights_of_zero_do_not_count():
    result = particles(200)
    log_w = result.draws.log_weight.clone()
    log_w[::2] = -torch.inf
    kept = Particles(result.draws.with_columns(log_weight=log_w), result.log_normalizer, Guarantee.CONSISTENT)
    alone = Particles(result.draws.select(slice(1, None, 2)), result.log_normalizer, Guarantee.CONSISTENT)
    assert torch.allclose(kept.expectation(LENGTH).value, alone.expectation(LENGTH).value)


@pytest.mark.parametrize(("num_chains", "num_steps"), [(64, 3), (64, 5), (64, 40), (4, 10), (6, 150)])
def test_the_error_of_chains_is_that_of_their_mean(num_chains, num_steps):
    """200 runs of AR(1) chains: the variance of their means is what the squared errors must average to."""
    generator = torch.Generator().manual_seed(num_chains + num_steps)
    rho, runs = 0.8, 200
    x = torch.empty(runs, num_chains, num_steps, dtype=torch.float64)
    x[..., 0] = torch.randn(runs, num_chains, generator=generator, dtype=torch.float64)
    for t in range(1, num_steps):
        noise = torch.randn(runs, num_chains, generator=generator, dtype=torch.float64)
        x[..., t] = rho * x[..., t - 1] + (1 - rho**2) ** 0.5 * noise
    size = num_chains * num_steps
    columns = {
        "chain": torch.arange(num_chains).repeat_interleave(num_steps),
        "step": torch.arange(num_steps).repeat(num_chains),
    }
    draws = particles(100).draws.select([0] * size).with_columns(columns=columns, log_weight=None)
    chains, rows = Chains(draws, (), Guarantee.CONSISTENT), torch.ones(size, dtype=torch.bool)
    squares = [chains.error_of_mean((run - run.mean()).flatten() / size, rows).square() for run in x]
    truth = x.mean((1, 2)).var()
    assert 0.7 < float(torch.stack(squares).mean() / truth) < 1.5


def test_information_is_printed_without_its_large_tensors():
    model = enumerable_lm("tabular") * Reward(wavy)
    run = infer(model, SMC(64), progress=False)
    assert len(repr(run.info)) < 1000
    assert "'ancestors': (tensor of shape (" in repr(run.info)
    assert "'zero_sweeps': tensor([0, 0])" in repr(run.info)
    assert dict(run.info)["ess_history"].shape[:2] == (2, 8)


def test_errors_of_an_expectation_name_no_factor():
    run = infer(enumerable_lm("tabular") * Reward(wavy), Importance(20), progress=False)
    with pytest.raises(FactorError, match=r"^expectation: <lambda> returned nan"):
        run.expectation(lambda texts: [math.nan for _ in texts])
    with pytest.raises(ShapeError, match=r"^expectation: <lambda> returned: got shape \(1,\)"):
        run.expectation(lambda texts: [1.0])


def test_an_engine_without_an_estimate_says_so():
    prior = TabularLM.random(3, 2, seed=5)
    found = infer(prior * Reward(lambda texts: [float(len(t)) for t in texts], name="r"), "best_of_n", 8)
    assert found.log_normalizer == ()
    assert found.log_normalizer[:1] == ()
    with pytest.raises(IndexError, match="this engine gives no estimate of log Z"):
        found.log_normalizer[0]
