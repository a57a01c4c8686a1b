"""Coverage of the finite-sample intervals, by summation over all outcomes of small designs."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from lmppl.diagnostics import binomial_upper, clopper_pearson, empirical_bernstein
from lmppl.errors import ModelError, ShapeError

LEVEL = 0.9
PROBABILITIES = (0.003, 0.05, 0.2, 0.5, 0.77, 0.98)


def wald(successes: Tensor, trials: Tensor, level: float) -> Tensor:
    """The textbook interval p̂ ± z √(p̂(1−p̂)/N), whose coverage collapses near 0 and 1: the mutant."""
    p = successes / trials
    half = stats.norm.ppf((1 + level) / 2) * torch.sqrt(p * (1 - p) / trials)
    return torch.stack([p - half, p + half], -1)


def fixed_design(p: float, trials: int = 30) -> tuple[Tensor, Tensor, Tensor]:
    """Outcomes (k, N) and their probabilities where N is fixed."""
    k = torch.arange(trials + 1)
    return k, torch.full_like(k, trials), torch.tensor(stats.binom.pmf(k.numpy(), trials, p))


def stopped_design(p: float, wanted: int = 3, cap: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    """Outcomes and their probabilities where sampling stops at the third success, or at a cap."""
    n = torch.arange(wanted, cap + 1)
    short = torch.arange(wanted)
    k = torch.cat([torch.full_like(n, wanted), short])
    stopped = stats.nbinom.pmf((n - wanted).numpy(), wanted, p)
    capped = stats.binom.pmf(short.numpy(), cap, p)
    return k, torch.cat([n, torch.full_like(short, cap)]), torch.cat([torch.tensor(stopped), torch.tensor(capped)])


def coverage(intervals: Tensor, mass: Tensor, p: float) -> float:
    assert float(mass.sum()) == pytest.approx(1.0, abs=1e-9)
    inside = (intervals[:, 0] <= p) & (p <= intervals[:, 1])
    return float(mass[inside].sum())


@pytest.mark.parametrize("design", [fixed_design, stopped_design])
@pytest.mark.parametrize("p", PROBABILITIES)
def test_clopper_pearson_covers_where_n_is_fixed_and_where_the_third_success_stops(design, p) -> None:
    k, n, mass = design(p)
    assert coverage(clopper_pearson(k, n, LEVEL), mass, p) >= LEVEL - 1e-9


def test_the_wald_interval_does_not_cover() -> None:
    k, n, mass = fixed_design(0.05)
    assert coverage(wald(k, n, LEVEL), mass, 0.05) < LEVEL - 0.05


@pytest.mark.parametrize("p", PROBABILITIES)
def test_the_one_sided_bound_covers(p) -> None:
    k, n, mass = fixed_design(p)
    assert float(mass[binomial_upper(k, n, LEVEL) >= p].sum()) >= LEVEL - 1e-9


def test_no_success_in_n_gives_the_rule_of_three() -> None:
    bound = float(binomial_upper(torch.tensor(0), torch.tensor(100_000), 0.95))
    assert bound == pytest.approx(1 - 0.05 ** (1 / 100_000), rel=1e-9)
    assert bound == pytest.approx(3e-5, rel=0.01)


def test_the_ends_are_closed() -> None:
    both = clopper_pearson(torch.tensor([0, 7]), torch.tensor([7, 7]))
    assert float(both[0, 0]) == 0.0
    assert float(both[1, 1]) == 1.0
    assert float(both[0, 1]) == pytest.approx(1 - 0.025 ** (1 / 7))


@pytest.mark.parametrize(("k", "n"), [(3, 2), (-1, 2), (0, 0)])
def test_impossible_counts_are_refused(k, n) -> None:
    with pytest.raises(ModelError, match="expected 0 ≤ k ≤ N"):
        clopper_pearson(torch.tensor(k), torch.tensor(n))


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0])
def test_a_level_is_a_probability(level) -> None:
    with pytest.raises(ModelError, match="level"):
        clopper_pearson(torch.tensor(1), torch.tensor(2), level)


def bernstein_coverage(p: float, n: int, low: float, high: float) -> float:
    """Exact coverage for values that are `low` or `high`: there are n+1 different samples."""
    mean = low + p * (high - low)
    total = 0.0
    for k in range(n + 1):
        values = torch.cat([torch.full((k,), high), torch.full((n - k,), low)]).double()
        ends = empirical_bernstein(values, low, high, LEVEL)
        if float(ends[0]) <= mean <= float(ends[1]):
            total += float(stats.binom.pmf(k, n, p))
    return total


@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize(("n", "low", "high"), [(20, 0.0, 1.0), (200, 0.0, 1.0), (60, -2.0, 5.0)])
def test_empirical_bernstein_covers(p, n, low, high) -> None:
    assert bernstein_coverage(p, n, low, high) >= LEVEL


def test_empirical_bernstein_is_narrower_than_hoeffding_where_the_variance_is_small() -> None:
    values = torch.full((1000,), 0.01, dtype=torch.float64)
    values[:3] = 1.0
    low, high = empirical_bernstein(values, 0.0, 1.0, 0.95).tolist()
    assert high - low < 2 * math.sqrt(math.log(2 / 0.05) / 2000)


def test_empirical_bernstein_needs_the_true_range() -> None:
    with pytest.raises(ModelError, match=r"got 1\.5, expected values in \[0\.0, 1\.0\]"):
        empirical_bernstein(torch.tensor([0.5, 1.5]), 0.0, 1.0)
    with pytest.raises(ShapeError, match="at least 2"):
        empirical_bernstein(torch.tensor([0.5]), 0.0, 1.0)
    with pytest.raises(ModelError, match="low < high"):
        empirical_bernstein(torch.tensor([0.5, 0.5]), 1.0, 1.0)
