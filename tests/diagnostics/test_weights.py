"""Effective sample sizes and the Pareto shape: identities, known tails, and the cases where k̂ has no meaning."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lmppl.diagnostics import (
    effective_sample_size,
    entropy_effective_sample_size,
    max_weight_share,
    normalised_log_weights,
    pareto_khat,
    pareto_smooth,
    zero_weight_share,
)
from lmppl.errors import ModelError, ShapeError

FIGURES = (effective_sample_size, entropy_effective_sample_size, max_weight_share)


def pareto(shape: float, n: int, seed: int = 0) -> Tensor:
    """Log-weights of a Pareto law with k = `shape`: w = u^{−k}."""
    return -shape * torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log()


def test_effective_sample_size_is_the_ratio_of_sums() -> None:
    w = torch.tensor([0.5, 2.0, 0.0, 1.25], dtype=torch.float64)
    assert float(effective_sample_size(w.log())) == pytest.approx(float(w.sum() ** 2 / (w**2).sum()), abs=1e-12)


@pytest.mark.parametrize("figure", [effective_sample_size, entropy_effective_sample_size])
def test_sizes_lie_between_one_and_n(figure) -> None:
    equal = torch.zeros(7)
    single = torch.full((7,), -math.inf)
    single[3] = 2.0
    assert float(figure(equal)) == pytest.approx(7.0)
    assert float(figure(single)) == pytest.approx(1.0)
    assert 1.0 < float(figure(pareto(0.5, 50))) < 50.0


def test_the_entropy_size_is_never_smaller() -> None:
    for seed in range(20):
        log_w = pareto(1.0, 30, seed)
        assert float(entropy_effective_sample_size(log_w)) >= float(effective_sample_size(log_w))


def test_n_over_ess_estimates_one_plus_chi_square() -> None:
    # q uniform over 4 outcomes, each drawn equally often: the estimate is then the exact value.
    p = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    chi_square = float(((p - 0.25) ** 2 / 0.25).sum())
    log_w = (p / 0.25).log().repeat(5)
    assert len(log_w) / float(effective_sample_size(log_w)) == pytest.approx(1 + chi_square, abs=1e-12)


@pytest.mark.parametrize("figure", FIGURES)
def test_the_scale_of_the_weights_does_not_matter(figure) -> None:
    log_w = pareto(0.4, 40)
    assert float(figure(log_w + 2000.0)) == pytest.approx(float(figure(log_w)), rel=1e-9)


def test_zero_weights_count() -> None:
    log_w = torch.tensor([0.0, -math.inf, -math.inf, -math.inf])
    assert float(zero_weight_share(log_w)) == 0.75
    assert float(effective_sample_size(log_w)) == 1.0
    assert normalised_log_weights(log_w).exp().tolist() == [1.0, 0.0, 0.0, 0.0]
    assert float(zero_weight_share(torch.full((3,), -math.inf))) == 1.0


@pytest.mark.parametrize("figure", FIGURES)
def test_all_zero_weights_are_an_error_and_not_nan(figure) -> None:
    with pytest.raises(ModelError, match="all 3 weights are zero"):
        figure(torch.full((3,), -math.inf))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_weights_are_named(bad) -> None:
    with pytest.raises(ModelError, match="at row 1"):
        effective_sample_size(torch.tensor([0.0, bad]))


@pytest.mark.parametrize("shape", [(0,), (2, 2), ()])
def test_the_shape_is_one_row_of_draws(shape) -> None:
    with pytest.raises(ShapeError, match="expected"):
        effective_sample_size(torch.zeros(shape))


# k̂


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_khat_recovers_the_shape_of_a_pareto_tail(shape) -> None:
    # The standard deviation of k̂ at a tail of 670 draws is about (1+k)/√670 < 0.075: the bound is four of these.
    khat = pareto_khat(pareto(shape, 50_000))
    assert khat.note == ""
    assert khat.value == pytest.approx(shape, abs=0.3)


UNDEFINED = {
    "too few": (pareto(0.5, 24), "24 draws are too few"),
    "one": (torch.zeros(1), "1 draws are too few"),
    "tied": (torch.zeros(100), "largest weights are tied"),
    "tied up to rounding": (torch.full((100,), 3.0) + 1e-13 * torch.arange(100), "largest weights are tied"),
    "few levels": (torch.arange(100).remainder(3).double(), "tied|few distinct"),
    "few distinct": (torch.arange(1000).div(12, rounding_mode="floor").double(), "few distinct weights"),
    "zeros": (torch.where(torch.arange(1000) < 30, pareto(0.5, 1000), -math.inf), "30 positive weights among 1000"),
    "all zero": (torch.full((100,), -math.inf), "0 positive weights"),
    "too wide": (torch.arange(100).double() * 1000.0, "vanish beside the largest"),
}


@pytest.mark.parametrize("case", UNDEFINED)
def test_where_khat_is_undefined_it_is_nan_with_the_reason(case) -> None:
    log_w, words = UNDEFINED[case]
    khat = pareto_khat(log_w)
    assert math.isnan(khat.value)
    assert khat.note.startswith("k̂ undefined")
    assert any(word in khat.note for word in words.split("|")), khat.note
    smoothed, _ = pareto_smooth(log_w)
    assert torch.equal(smoothed, log_w.double())


def test_khat_is_defined_beside_zero_weights() -> None:
    log_w = torch.cat([pareto(0.5, 2000), torch.full((1000,), -math.inf)])
    assert pareto_khat(log_w).value == pytest.approx(0.5, abs=0.4)


def test_smoothing_keeps_the_total_the_order_and_the_zeros() -> None:
    log_w = torch.cat([pareto(0.8, 2000, seed=3), torch.full((500,), -math.inf)])
    smoothed, khat = pareto_smooth(log_w)
    assert not math.isnan(khat.value)
    assert float(torch.logsumexp(smoothed, 0)) == pytest.approx(float(torch.logsumexp(log_w, 0)), abs=1e-10)
    assert torch.equal(torch.argsort(smoothed[:2000], stable=True), torch.argsort(log_w[:2000], stable=True))
    assert torch.equal(smoothed == -math.inf, log_w == -math.inf)


def test_smoothing_takes_weight_from_an_outlier() -> None:
    log_w = pareto(0.5, 2000)
    log_w[0] = log_w.max() + 2.0
    smoothed, _ = pareto_smooth(log_w)
    assert float(max_weight_share(smoothed)) < 0.5 * float(max_weight_share(log_w))


def test_smoothing_leaves_all_but_the_tail_as_it_was() -> None:
    log_w = pareto(0.6, 400, seed=1)
    smoothed, _ = pareto_smooth(log_w)
    body = torch.argsort(log_w)[: 400 - math.floor(3 * math.sqrt(400))]
    shift = (smoothed - log_w)[body]
    assert np.ptp(shift.numpy()) == pytest.approx(0.0, abs=1e-12)
