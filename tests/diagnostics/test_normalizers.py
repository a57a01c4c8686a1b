"""Estimates of log Z: unbiasedness by summation over all outcomes of a design, intervals, and what has none."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from lmppl.diagnostics import log_acceptance, log_mean_weight, log_mean_weight_bounded, stack
from lmppl.errors import ModelError

WEIGHTS = torch.tensor([0.0, 0.5, 1.0, 4.0], dtype=torch.float64)
Q = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
Z = float((WEIGHTS * Q).sum())


def test_the_mean_weight_of_two_draws_is_unbiased_and_its_log_is_low() -> None:
    mean, mean_of_logs, covered = 0.0, 0.0, 0.0
    for i in range(4):
        for j in range(4):
            p = float(Q[i] * Q[j])
            log_z = float(log_mean_weight(WEIGHTS[[i, j]].log()).value)
            mean += p * math.exp(log_z)
            if math.isfinite(log_z):
                covered += p
                mean_of_logs += p * log_z
    assert mean == pytest.approx(Z, abs=1e-12)
    assert mean_of_logs / covered < math.log(Z / covered)


def test_the_standard_error_is_that_of_the_delta_method() -> None:
    w = torch.tensor([1.0, 2.0, 0.0, 3.0], dtype=torch.float64)
    estimate = log_mean_weight(w.log(), 0.9)
    error = float(w.std()) / math.sqrt(4) / 1.5
    assert float(estimate.value) == pytest.approx(math.log(1.5))
    assert estimate.kind == "unbiased_Z"
    assert float(estimate.standard_error) == pytest.approx(error)
    half = stats.norm.ppf(0.95) * error
    assert estimate.interval.tolist() == pytest.approx([math.log(1.5) - half, math.log(1.5) + half])


@pytest.mark.parametrize(
    ("log_w", "value", "words"),
    [
        (torch.zeros(5), 0.0, "all 5 weights are equal"),
        (torch.full((5,), -math.inf), -math.inf, "all 5 weights are zero"),
        (torch.tensor([2.0]), 2.0, "one draw"),
    ],
)
def test_where_the_delta_method_sees_no_error_there_is_no_interval(log_w, value, words) -> None:
    estimate = log_mean_weight(log_w)
    assert float(estimate.value) == value
    assert words in estimate.note
    assert torch.isnan(estimate.interval).all()


def test_bounded_weights_have_a_finite_sample_interval() -> None:
    log_w = WEIGHTS.repeat(50).log() + 7.0
    estimate = log_mean_weight_bounded(log_w, math.log(4.0) + 7.0)
    low, high = estimate.interval.tolist()
    assert low < float(estimate.value) < high <= math.log(4.0) + 7.0
    assert float(estimate.value) == pytest.approx(math.log(5.5 / 4) + 7.0)
    assert float(log_mean_weight_bounded(WEIGHTS[[0, 1]].log(), 10.0).interval[0]) == -math.inf


def test_a_weight_above_its_bound_is_an_error() -> None:
    with pytest.raises(ModelError, match="expected values in"):
        log_mean_weight_bounded(WEIGHTS.log(), math.log(3.9))


def expected_rate(p: float, wanted: int, cap: int, *, plain: bool = False) -> float:
    """E p̂ where sampling stops at the `wanted`-th acceptance or at the cap; `plain` is the mutant k/N throughout."""
    n = torch.arange(wanted, cap + 1)
    k = torch.full_like(n, wanted)
    mass = torch.tensor(stats.nbinom.pmf((n - wanted).numpy(), wanted, p))
    short = torch.arange(wanted)
    k, tried = torch.cat([k, short]), torch.cat([n, torch.full_like(short, cap)])
    mass = torch.cat([mass, torch.tensor(stats.binom.pmf(short.numpy(), cap, p))])
    stopped = torch.zeros_like(k, dtype=torch.bool) if plain else k == wanted
    return float((mass * log_acceptance(k, tried, 0.0, stopped=stopped).value.exp()).sum())


@pytest.mark.parametrize("p", [0.02, 0.3, 0.9])
@pytest.mark.parametrize(("wanted", "cap"), [(2, 5), (3, 40), (7, 7)])
def test_acceptance_is_unbiased_under_inverse_sampling_with_a_cap(p, wanted, cap) -> None:
    assert expected_rate(p, wanted, cap) == pytest.approx(p, abs=1e-12)


def test_k_over_n_is_biased_upwards_under_inverse_sampling() -> None:
    assert expected_rate(0.3, 3, 40, plain=True) > 0.3 + 0.05


def test_the_first_acceptance_alone_is_an_upper_bound_and_says_so() -> None:
    n = torch.arange(1, 4000)
    p = 0.05
    mass = torch.tensor(stats.geom.pmf(n.numpy(), p))
    ones, yes = torch.ones_like(n), torch.ones_like(n, dtype=torch.bool)
    estimate = log_acceptance(ones, n, 0.0, stopped=yes)
    assert estimate.kind == "upper_bound"
    assert "ask for two draws" in estimate.note
    assert float((mass * estimate.value).sum()) >= math.log(p)


def test_acceptance_carries_the_bound_and_the_interval() -> None:
    estimate = log_acceptance(torch.tensor([10, 0]), torch.tensor([40, 40]), 2.0)
    assert estimate.value.tolist() == pytest.approx([math.log(0.25) + 2.0, -math.inf])
    assert float(estimate.interval[0, 0]) < math.log(0.25) + 2.0 < float(estimate.interval[0, 1])
    assert float(estimate.interval[1, 0]) == -math.inf
    assert math.isfinite(float(estimate.interval[1, 1]))
    assert estimate.kind == "unbiased_Z"


def test_stacking_keeps_notes_with_their_contexts() -> None:
    equal, spread = log_mean_weight(torch.zeros(4)), log_mean_weight(torch.tensor([0.0, 1.0]))
    both = stack([spread, equal, spread])
    assert both.value.shape == (3,)
    assert both.interval.shape == (3, 2)
    assert "contexts 1: all 4 weights are equal" in both.note
    assert both.replicates == 2
    with pytest.raises(ModelError, match="different kind"):
        stack([spread, log_mean_weight(torch.zeros(4), 0.5)])
    with pytest.raises(ModelError, match="no estimates"):
        stack([])
