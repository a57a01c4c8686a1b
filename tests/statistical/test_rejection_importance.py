"""Draws, weights and intervals of rejection and importance against written-out posteriors.

Seeds are fixed. Each comparison fails by chance with probability at most `ALPHA`, and there are fewer than 80, so that
a correct implementation fails this file for fewer than 8 seeds in 1000.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lmppl.diagnostics import normalised_log_weights, pareto_smooth
from lmppl.inference.importance import Importance
from lmppl.inference.rejection import Rejection
from lmppl.inference.run import infer
from lmppl.modeling.evidence import Constraint, Optimality, Reward
from lmppl.modeling.model import Model
from lmppl.sequences import Draws, Estimate
from lmppl.testing.statistics import chi_square_p_value, too_many_misses
from tests.models import BruteForce, brute_force, count_of, enumerable_lm, has_no, wavy

ALPHA = 1e-4
Z_LIMIT = 3.9  # two-sided normal p-value of about ALPHA

FACTORS = {
    "wavy": (Reward(wavy, beta=0.5, upper=1.0, name="wavy"),),
    "levels": (Reward(count_of("a"), beta=1.5, upper=4.0, name="a"),),
    "hard": (
        Optimality(lambda texts: [-0.4 * len(t) if t != "c" else -math.inf for t in texts], name="short"),
        Constraint(has_no("b"), name="no b"),
    ),
}


def counts(draws: Draws, table: BruteForce, context: int) -> list[int]:
    """How often each outcome of the table was drawn."""
    row_of = {tuple(row): i for i, row in enumerate(table.sequences.token_lists())}
    found = [0] * len(row_of)
    for row in draws.select(draws.context == context).token_lists():
        found[row_of[tuple(row)]] += 1
    return found


@pytest.mark.parametrize("kind", ["tabular", "llama"])
@pytest.mark.parametrize("factors", FACTORS)
def test_rejection_draws_have_the_posterior(kind, factors) -> None:
    model = Model(enumerable_lm(kind), FACTORS[factors])
    draws = infer(model, Rejection(batch=500), 4000, seed=11).draws
    for c in (0, 1):
        table = brute_force(model, c)
        assert chi_square_p_value(counts(draws, table, c), table.log_posterior.exp().tolist()) > ALPHA


def test_the_chi_square_sees_draws_of_the_prior() -> None:
    model = Model(enumerable_lm("tabular"), FACTORS["wavy"])
    table = brute_force(model, 0)
    draws = model.prior.draw(4000, generator=torch.Generator().manual_seed(0))
    assert chi_square_p_value(counts(draws, table, 0), table.log_posterior.exp().tolist()) < 1e-20


def test_the_first_draws_of_many_runs_have_the_posterior_too() -> None:
    """A stopping rule that favours some texts would show in short runs."""
    model = Model(enumerable_lm("tabular"), FACTORS["hard"])
    runs = [infer(model, Rejection(batch=16), 4, seed=s).draws for s in range(400)]
    for c in (0, 1):
        table = brute_force(model, c)
        total = torch.tensor([counts(draws, table, c) for draws in runs]).sum(0).tolist()
        assert chi_square_p_value(total, table.log_posterior.exp().tolist()) > ALPHA


ENGINES = {
    "prior": Importance(1500),
    "proposal": Importance(1500, enumerable_lm("tabular", seed=1)),
    "defensive": Importance(1500, enumerable_lm("tabular", seed=1), defensive=0.3),
}


@pytest.mark.parametrize("way", ENGINES)
@pytest.mark.parametrize("factors", FACTORS)
def test_importance_estimates_z_and_expectations(way, factors) -> None:
    """z-tests with the standard deviation over 40 runs: Ẑ is unbiased at any N, expectations up to O(1/N)."""
    model = Model(enumerable_lm("tabular"), FACTORS[factors])
    runs = [infer(model, ENGINES[way], seed=s) for s in range(40)]
    for c in (0, 1):
        table = brute_force(model, c)
        z = torch.stack([r.log_normalizer[-1].value[c].exp() for r in runs])
        assert abs(z_score(z, float(table.log_z.exp()))) < Z_LIMIT
        lengths = table.sequences.lengths.double()
        truth = float((table.log_posterior.exp() * lengths).sum())
        found = torch.stack([self_normalised(r.draws, c) for r in runs])
        assert abs(z_score(found, truth)) < Z_LIMIT


def self_normalised(draws: Draws, context: int) -> Tensor:
    own = draws.context == context
    return (draws.weights[own] * draws.lengths[own].double()).sum()


def z_score(values: Tensor, truth: float) -> float:
    return float((values.mean() - truth) / (values.std() / math.sqrt(len(values))))


def misses(estimates: list[Estimate], truth: list[float]) -> int:
    """How many intervals, over estimates and contexts, leave the truth out."""
    outside = 0
    for estimate in estimates:
        for (low, high), value in zip(estimate.interval.tolist(), truth, strict=True):
            outside += not low <= value <= high
    return outside


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("num_draws", [2, 25])
def test_rejection_intervals_cover(factors, num_draws) -> None:
    model = Model(enumerable_lm("tabular"), FACTORS[factors])
    truth = [float(brute_force(model, c).log_z) for c in (0, 1)]
    estimates = [infer(model, Rejection(batch=64), num_draws, seed=s).log_normalizer[0] for s in range(150)]
    missed = misses(estimates, truth)
    assert too_many_misses(missed, 300, 0.95) > ALPHA


@pytest.mark.parametrize("factors", FACTORS)
def test_importance_intervals_cover(factors) -> None:
    """Asymptotic ones included: 1500 draws of a bounded weight, with a slack of 1 % for the normal approximation."""
    model = Model(enumerable_lm("tabular"), FACTORS[factors])
    truth = [float(brute_force(model, c).log_z) for c in (0, 1)]
    runs = [infer(model, ENGINES["prior"], seed=s).log_normalizer for s in range(150)]
    for which in range(len(runs[0])):
        missed = misses([run[which] for run in runs], truth)
        assert too_many_misses(missed, 300, 0.94) > ALPHA


def test_an_interval_of_half_the_width_would_be_caught() -> None:
    model = Model(enumerable_lm("tabular"), FACTORS["wavy"])
    truth = [float(brute_force(model, c).log_z) for c in (0, 1)]
    missed = 0
    for seed in range(150):
        estimate = infer(model, ENGINES["prior"], seed=seed).log_normalizer[0]
        for c in (0, 1):
            half = (estimate.interval[c, 1] - estimate.interval[c, 0]) / 4
            missed += not bool(abs(estimate.value[c] - truth[c]) <= half)
    assert too_many_misses(missed, 300, 0.94) < 1e-10


def test_pareto_smoothing_trades_variance_for_bias() -> None:
    """400 runs of N = 500, weights with a Pareto tail of k = 0.7; h is the worst case: it marks the largest weights."""
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    log_w, h = -0.7 * u.log(), (u < 0.02).double()
    generator = torch.Generator().manual_seed(2)
    raw, smooth = [], []
    for _ in range(400):
        rows = torch.randint(20_000, (500,), generator=generator)
        smoothed, shape = pareto_smooth(log_w[rows])
        assert shape.note == ""
        raw.append(float((normalised_log_weights(log_w[rows]).exp() * h[rows]).sum()))
        smooth.append(float((normalised_log_weights(smoothed).exp() * h[rows]).sum()))
    # A ratio of variances of 0.47 over 400 runs has a standard deviation of 0.05: 0.8 is six of these away.
    assert torch.tensor(smooth).var() < 0.8 * torch.tensor(raw).var()
    assert sum(smooth) < sum(raw), "mass of the tail is lost: this is why log Ẑ comes from the raw weights"
