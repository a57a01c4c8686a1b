"""Quasi-rejection's arithmetic: its law by brute force, the chain of bounds on its distance, standard errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lmppl.diagnostics.divergences import kl_divergence, total_variation
from lmppl.diagnostics.quasi_rejection import log_bound_of_acceptance, log_quasi_acceptance, quasi_rejection_curve
from lmppl.errors import InfeasibleModel, ModelError
from tests.models import ENUMERABLE, TOLERANCE, brute_force
from tests.quasi_rejection_cases import HARD, SOFT, model_of, weights_of

# The law, exactly.


@pytest.mark.parametrize("kind", ENUMERABLE)
@pytest.mark.parametrize("context", [0, 1])
@pytest.mark.parametrize("factors", [SOFT, HARD], ids=["soft", "hard"])
@pytest.mark.parametrize("other", [False, True], ids=["prior", "proposal"])
@pytest.mark.parametrize("log_bound", [-1.5, 0.0, 1.0])
def test_the_law_is_gamma_cut_at_the_bound_and_every_figure_is_right(kind, context, factors, other, log_bound) -> None:
    model = model_of(kind, factors)
    table = brute_force(model, context)
    log_q, log_w = weights_of(kind, table, other)
    cut = torch.minimum(table.log_gamma, log_bound + log_q)  # γ_q
    log_zq = torch.logsumexp(cut, 0)
    law = cut - log_zq
    mass = log_q + log_quasi_acceptance(log_w, log_bound)
    assert float(mass.exp().sum()) == pytest.approx(math.exp(float(log_zq) - log_bound), abs=TOLERANCE)
    assert torch.allclose((mass - torch.logsumexp(mass, 0)).exp(), law.exp(), rtol=0, atol=TOLERANCE)

    possible = log_q > -math.inf
    bounds = torch.tensor([log_bound], dtype=torch.float64)
    curve = quasi_rejection_curve(log_w[possible], bounds, log_masses=log_q[possible])
    distance = total_variation(law, table.log_posterior)
    retained = float((log_zq - table.log_z).exp())
    tail = float(table.log_posterior.exp()[log_w >= log_bound].sum())
    assert float(curve.acceptance.value) == pytest.approx(math.exp(float(log_zq) - log_bound), abs=TOLERANCE)
    assert float(curve.total_variation.value) == pytest.approx(float(distance), abs=TOLERANCE)
    assert float(curve.total_variation_bound.value) == pytest.approx(1 - retained, abs=TOLERANCE)
    assert float(curve.tail.value) == pytest.approx(tail, abs=TOLERANCE)
    assert float(distance) - TOLERANCE <= 1 - retained <= tail + TOLERANCE
    assert float(curve.kl.value) == pytest.approx(float(kl_divergence(table.log_posterior, law)), abs=TOLERANCE)
    assert float(curve.reverse_kl.value) == pytest.approx(float(kl_divergence(law, table.log_posterior)), abs=TOLERANCE)


@pytest.mark.parametrize("kind", ENUMERABLE)
def test_weights_of_the_excess_bring_the_law_back_to_the_posterior(kind) -> None:
    table = brute_force(model_of(kind, HARD), 0)
    log_q, log_w = weights_of(kind, table, other=True)
    law = log_q + log_quasi_acceptance(log_w, 0.2)
    back = law + (log_w - 0.2).clamp_min(0.0)
    assert torch.allclose((back - torch.logsumexp(back, 0)).exp(), table.log_posterior.exp(), rtol=0, atol=TOLERANCE)
    assert not torch.allclose((law - torch.logsumexp(law, 0)).exp(), table.log_posterior.exp(), rtol=0, atol=1e-3)


def poisson(mean: float) -> Tensor:
    k = torch.arange(200, dtype=torch.float64)
    return k * math.log(mean) - mean - torch.lgamma(k + 1)


def test_the_arithmetic_of_two_poisson_laws() -> None:
    """p = Poisson(11), q = Poisson(10) at b = 1/2, 1 and 2; each law truncated where it has mass below 1e-100.

    At b = 2 the distance is .00353, not the .0041 that is quoted for it.
    """
    log_p, log_q = poisson(11.0), poisson(10.0)
    bounds = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    curve = quasi_rejection_curve(log_p - log_q, bounds.log(), log_masses=log_q)
    assert curve.acceptance.value.tolist() == pytest.approx([0.999, 0.877, 0.498], abs=6e-4)
    assert curve.total_variation.value.tolist() == pytest.approx([0.123, 0.0749, 0.00353], abs=1e-4)
    p, q = log_p.exp(), log_q.exp()
    for k, bound in enumerate(bounds.tolist()):
        cut = torch.minimum(p, bound * q)
        assert float(curve.acceptance.value[k]) == pytest.approx(float(cut.sum()) / bound, abs=1e-12)
        distance = 0.5 * (p / p.sum() - cut / cut.sum()).abs().sum()
        assert float(curve.total_variation.value[k]) == pytest.approx(float(distance), abs=1e-12)
    assert curve.acceptance.kind == "exact"
    assert "TV" in str(curve)


# Errors and estimates.


def test_standard_errors_of_the_curve_are_those_that_repeats_show() -> None:
    table = brute_force(model_of("tabular", HARD), 0)
    log_q, log_w = weights_of("tabular", table, other=True)
    bounds = torch.tensor([-1.0, 0.0, 0.5], dtype=torch.float64)
    exact = quasi_rejection_curve(log_w, bounds, log_masses=log_q)
    generator = torch.Generator().manual_seed(0)
    values: dict[str, list[Tensor]] = {}
    errors: dict[str, list[Tensor]] = {}
    for _ in range(300):
        rows = torch.multinomial(log_q.exp(), 800, replacement=True, generator=generator)
        curve = quasi_rejection_curve(log_w[rows], bounds)
        for name in ("acceptance", "total_variation", "total_variation_bound", "tail", "kl", "reverse_kl"):
            estimate = getattr(curve, name)
            values.setdefault(name, []).append(estimate.value)
            errors.setdefault(name, []).append(estimate.standard_error)
    for name, found in values.items():
        spread, stated = torch.stack(found).std(0), torch.stack(errors[name]).mean(0)
        assert torch.allclose(spread, stated, rtol=0.2, atol=1e-6), name
        mean = torch.stack(found).mean(0)
        assert bool(((mean - getattr(exact, name).value).abs() < 5 * spread / math.sqrt(300) + 2e-3).all()), name


def test_the_bound_of_a_rate_gives_that_rate() -> None:
    generator = torch.Generator().manual_seed(1)
    log_w = torch.randn(500, generator=generator, dtype=torch.float64) * 2
    log_w[::3] = -math.inf
    for rate in (0.01, 0.2, 0.5, 0.65):
        bound = log_bound_of_acceptance(log_w, rate)
        assert float(log_quasi_acceptance(log_w, bound).exp().mean()) == pytest.approx(rate, abs=1e-12)
    equal = torch.zeros(8, dtype=torch.float64)
    assert log_bound_of_acceptance(equal, 0.25) == pytest.approx(math.log(4))
    positive = int((log_w > -math.inf).sum())
    assert log_bound_of_acceptance(log_w, positive / 500) <= float(log_w[log_w > -math.inf].min()) + 1e-12
    with pytest.raises(InfeasibleModel, match="333 of 500 proposals have γ > 0"):
        log_bound_of_acceptance(log_w, 0.7)


def test_a_curve_without_bounds_is_refused() -> None:
    with pytest.raises(ModelError, match="K ≥ 1"):
        quasi_rejection_curve(torch.zeros(4), torch.tensor([]))
