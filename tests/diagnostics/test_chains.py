"""Figures about chains: known laws, agreement with arviz on continuous data, and what discrete data does to them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from arviz_stats.base.array import array_stats
from torch import Tensor

from lmppl.diagnostics import (
    autocorrelation_time,
    bulk_ess,
    mcse,
    nested_rhat,
    nested_rhat_floor,
    rhat,
    stuck_chains,
    tail_ess,
)
from lmppl.diagnostics.chains import _normal_scores, _plain_nested_rhat
from lmppl.errors import ModelError, ShapeError

FIGURES = (rhat, bulk_ess, tail_ess, mcse, autocorrelation_time)


def normal(chains: int, steps: int, seed: int = 0) -> Tensor:
    return torch.randn(chains, steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def autoregression(rho: float, chains: int, steps: int, seed: int = 0) -> Tensor:
    """Stationary AR(1) of unit variance: τ = (1 + ρ)/(1 − ρ)."""
    noise = normal(chains, steps, seed)
    rows = [noise[:, 0]]
    for t in range(1, steps):
        rows.append(rho * rows[-1] + math.sqrt(1 - rho**2) * noise[:, t])
    return torch.stack(rows, 1)


# Known laws.


def test_independent_draws_are_worth_their_number() -> None:
    x = normal(8, 1000)
    assert rhat(x).value == pytest.approx(1.0, abs=0.005)
    assert bulk_ess(x).value == pytest.approx(8000, rel=0.1)
    assert tail_ess(x).value == pytest.approx(8000, rel=0.15)
    assert mcse(x).value == pytest.approx(1 / math.sqrt(8000), rel=0.07)
    assert autocorrelation_time(x).value == pytest.approx(1.0, abs=0.1)
    assert all(figure(x).note == "" for figure in FIGURES)


@pytest.mark.parametrize("rho", [0.5, 0.9, -0.4])
def test_an_autoregression_has_its_known_time(rho: float) -> None:
    x = autoregression(rho, 16, 4000)
    time = (1 + rho) / (1 - rho)
    assert autocorrelation_time(x).value == pytest.approx(time, rel=0.12)
    assert bulk_ess(x).value == pytest.approx(x.numel() / time, rel=0.12)
    assert mcse(x).value == pytest.approx(math.sqrt(time / x.numel()), rel=0.08)
    assert rhat(x).value < 1.01


def test_the_monte_carlo_error_is_the_spread_of_means() -> None:
    repeats = [autoregression(0.7, 4, 400, seed) for seed in range(150)]
    spread = float(torch.stack([x.mean() for x in repeats]).std())
    typical = float(torch.tensor([mcse(x).value for x in repeats]).median())
    assert typical == pytest.approx(spread, rel=0.15)


# Agreement with arviz where it is right.


@pytest.mark.parametrize("shape", [(4, 100), (2, 51), (7, 8)])
def test_figures_agree_with_arviz_on_continuous_data(shape: tuple[int, int]) -> None:
    x = autoregression(0.6, *shape, seed=3) + torch.arange(shape[0])[:, None] * 0.1
    array = x.numpy()
    assert rhat(x).value == pytest.approx(float(array_stats.rhat(array, method="rank")), abs=1e-12)
    assert bulk_ess(x).value == pytest.approx(float(array_stats.ess(array, method="bulk")), abs=1e-9)
    # No 0.05 · (N − 1) is an integer here: the quantiles fall between values.
    assert tail_ess(x).value == pytest.approx(float(array_stats.ess(array, method="tail", prob=0.05)), abs=1e-9)
    assert mcse(x).value == pytest.approx(float(array_stats.mcse(array, method="mean")), abs=1e-12)


def test_the_nested_figure_is_that_of_arviz_before_ranks() -> None:
    x = autoregression(0.8, 12, 10, seed=5).numpy()
    ids = np.repeat(np.arange(3), 4)
    expected = float(array_stats.rhat_nested(x, superchain_ids=ids, method="identity"))
    assert _plain_nested_rhat(x.reshape(3, 4, 10)) == pytest.approx(expected, abs=1e-12)


def test_nested_groups_may_come_in_any_order() -> None:
    x, groups = autoregression(0.8, 12, 10), torch.arange(3).repeat_interleave(4)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    assert nested_rhat(x[order], groups[order] * 7).value == pytest.approx(nested_rhat(x, groups).value, abs=1e-12)


# What the figures are for.


def test_two_modes_are_seen() -> None:
    x = normal(4, 500)
    x[2:] += 4.0
    assert rhat(x).value > 1.5
    assert bulk_ess(x).value < 20


def test_different_spreads_are_seen() -> None:
    x = normal(4, 500)
    x[0] *= 5.0
    assert rhat(x).value > 1.1


def test_drift_of_all_chains_is_seen() -> None:
    assert rhat(normal(4, 500) + torch.linspace(0, 2, 500, dtype=torch.float64)).value > 1.1


def test_one_chain_is_compared_with_its_other_half() -> None:
    x = normal(1, 400)
    assert rhat(x).value < 1.02
    x[:, 200:] += 3.0
    assert rhat(x).value > 1.5


@pytest.mark.parametrize("steps", [1, 3])
def test_many_short_chains_that_forgot_their_start_reach_the_floor(steps: int) -> None:
    groups = torch.arange(16).repeat_interleave(32)
    x = normal(512, steps)
    assert nested_rhat(x, groups).value == pytest.approx(nested_rhat_floor(32), abs=0.02)
    remembered = x + 2.0 * normal(16, 1, seed=9).repeat_interleave(32, 0)
    assert nested_rhat(remembered, groups).value > 1.2


def test_the_rank_transform_is_over_all_chains() -> None:
    assert _normal_scores(np.array([[1.0, 2.0], [2.0, 9.0]]))[0, 1] == pytest.approx(0.0)  # the mean rank of a tie


# Discrete data.


def test_constants_are_named_and_never_look_converged() -> None:
    x = torch.full((4, 50), 2.5)
    for figure in FIGURES:
        found = figure(x)
        assert found.constant
        assert found.note.startswith("constant: every value is 2.5")
        assert not math.isnan(found.value)
    assert rhat(x).value == math.inf
    assert nested_rhat(x, torch.tensor([0, 0, 1, 1])).value == math.inf
    assert bulk_ess(x).value == tail_ess(x).value == 4
    assert mcse(x).value == math.inf
    assert float(array_stats.ess(x.numpy(), method="bulk")) == 200  # what arviz makes of it


def test_chains_that_never_move_are_named() -> None:
    x = normal(12, 60)
    x[3] = 0.1
    assert "chain 3 never changes its value" in rhat(x).note
    assert rhat(x).value > 1.05
    x[7] = -0.4
    assert "chains 3, 7 never change their value" in bulk_ess(x).note
    everything = torch.arange(12.0)[:, None].expand(12, 60)
    assert rhat(everything).value == math.inf
    assert rhat(everything).note == "stuck: none of the 12 chains ever changes its value"
    assert bulk_ess(everything).value < 25
    assert nested_rhat(everything, torch.arange(12) // 2).value > 3  # groups of two: they differ within too
    halves = torch.arange(12) // 6
    assert nested_rhat(halves[:, None].expand(12, 60), halves).value == math.inf


def test_many_stuck_chains_are_cut_short() -> None:
    x = normal(20, 30)
    x[:15] = torch.arange(15.0, dtype=torch.float64)[:, None]
    assert "chains 0, 1, 2, 3, 4, 5, 6, 7, ... never" in rhat(x).note


def test_an_indicator_that_every_chain_keeps_is_two_modes() -> None:
    x = torch.tensor([0.0, 0.0, 1.0, 1.0])[:, None].expand(4, 40)
    assert rhat(x).value == math.inf  # within-chain variance is 0, and |x − median| is constant
    assert bulk_ess(x).value < 10
    assert mcse(x).value > 0.1


@pytest.mark.parametrize("p", [0.5, 0.3, 0.02])
def test_an_indicator_of_independent_draws_is_worth_their_number(p: float) -> None:
    x = (torch.rand(8, 2000, generator=torch.Generator().manual_seed(2)) < p).double()
    assert rhat(x).value < 1.01
    for figure in (bulk_ess, tail_ess):
        assert figure(x).value == pytest.approx(16000, rel=0.15)
    assert mcse(x).value == pytest.approx(math.sqrt(p * (1 - p) / 16000), rel=0.1)


def test_a_balanced_indicator_folds_to_a_constant_without_harm() -> None:
    x = torch.tensor([[0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 1.0]])
    assert math.isfinite(rhat(x).value)
    assert math.isfinite(nested_rhat(x.repeat(2, 1), torch.tensor([0, 0, 1, 1])).value)


def test_a_tail_that_ties_is_not_taken_for_perfect() -> None:
    # A slow indicator of which 97 % are 0, so that both quantiles are 0 and {x ≥ 0} is everything.
    x = torch.zeros(4, 500, dtype=torch.float64)
    for chain in range(4):
        x[chain, 100 * chain : 100 * chain + 15] = 1.0
    assert tail_ess(x).value < 0.1 * x.numel()
    flipped = tail_ess(1.0 - x).value
    assert flipped == pytest.approx(tail_ess(x).value)
    three = x + (x.cumsum(1) > 0)  # levels 0, 1, 2: the upper quantile is the top of a tie or below it
    assert math.isfinite(tail_ess(three).value)
    # An indicator of which 70 % are 0: arviz's upper tail {x ≤ 1} is everything, and counts as perfect.
    slow = (autoregression(0.98, 4, 500) > 0.52).double()
    assert float(array_stats.ess(slow.numpy(), method="quantile", prob=0.95)) == slow.numel()
    assert tail_ess(slow).value < 0.1 * slow.numel()


def test_a_count_with_ties_keeps_its_time() -> None:
    x = (autoregression(0.8, 8, 3000) * 1.5).round()
    assert autocorrelation_time(x).value == pytest.approx(9.0, rel=0.2)
    assert rhat(x).value < 1.01


# Stuck chains.


def test_stuck_chains_of_scalars_and_of_states() -> None:
    states = torch.zeros(3, 5, 4, dtype=torch.int64)
    states[1, 3, 2] = 1
    assert stuck_chains(states) == (0, 2)
    assert stuck_chains(states.sum(2)) == (0, 2)
    assert stuck_chains(normal(3, 5)) == ()


# Bad input.


@pytest.mark.parametrize("figure", FIGURES)
def test_figures_refuse_what_they_cannot_read(figure) -> None:
    with pytest.raises(ShapeError, match=r"got shape \(10,\), expected \(chains, steps\)"):
        figure(torch.zeros(10))
    with pytest.raises(ShapeError, match="at least 4 steps"):
        figure(torch.zeros(10, 3))
    x = normal(2, 8)
    x[1, 3] = -math.inf
    with pytest.raises(ModelError, match="got -inf in chain 1 at step 3"):
        figure(x)


def test_nested_groups_must_be_equal() -> None:
    with pytest.raises(ModelError, match=r"groups of \[1, 3\] chains"):
        nested_rhat(normal(4, 3), torch.tensor([0, 1, 1, 1]))
    with pytest.raises(ShapeError, match="one for each chain"):
        nested_rhat(normal(4, 3), torch.tensor([0, 1]))


def test_one_step_cannot_show_movement() -> None:
    with pytest.raises(ShapeError, match="at least 2 steps"):
        stuck_chains(torch.zeros(4, 1))


def test_a_tail_has_a_probability() -> None:
    with pytest.raises(ModelError, match="between 0 and 1/2"):
        tail_ess(normal(2, 8), 0.5)


@pytest.mark.parametrize("steps", [4, 7, 15])
def test_short_chains_are_worth_what_their_means_say(steps):
    """64 AR(1) chains of ρ = 0.9 and few steps: each is worth little more than one draw."""
    generator = torch.Generator().manual_seed(steps)
    x = torch.randn(64, steps, generator=generator, dtype=torch.float64)
    for t in range(1, steps):
        x[:, t] = 0.9 * x[:, t - 1] + (1 - 0.81) ** 0.5 * x[:, t]
    exact = 64 * steps / (1 + 2 * sum((1 - k / steps) * 0.9**k for k in range(1, steps)))
    for figure in (bulk_ess(x).value, (float(x.std()) / mcse(x).value) ** 2):
        assert 0.6 < figure / exact < 1.7
