"""The probabilities of choices and ties, and their derivatives in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import hessian

from lmppl.modeling.evidence.preference.likelihood import derivatives, log_outcomes, log_said
from tests.modeling.preference.cases import f64

U = torch.linspace(-6, 6, 25, dtype=torch.float64)
CASES = pytest.mark.parametrize(("eta", "noise"), [(None, 0.0), (None, 0.2), (-0.7, 0.0), (0.4, 0.2)])


def given(eta: float | None) -> Tensor | None:
    return None if eta is None else f64(eta)


@CASES
def test_outcomes_sum_to_one(eta: float | None, noise: float) -> None:
    total = log_outcomes(U, given(eta), noise).exp().sum(-1)
    assert float((total - 1).abs().max()) < 1e-14


def test_the_special_cases() -> None:
    """Bradley and Terry without ties; Davidson's ν = P(tie)/√(P(a ≻ b) P(b ≻ a)); noise moves choices, never ties."""
    assert float((log_outcomes(U, None, 0.0)[:, 0].exp() - torch.sigmoid(U)).abs().max()) < 1e-15
    first, second, tie = log_outcomes(U, f64(0.4), 0.0).unbind(-1)
    assert float((tie - (first + second) / 2 - 0.4).abs().max()) < 1e-12
    assert float((first - second - U).abs().max()) < 1e-12
    noisy = log_outcomes(U, f64(0.4), 0.2).exp()
    assert float((noisy[:, 2] - tie.exp()).abs().max()) < 1e-15
    assert float((noisy[:, 0] - 0.8 * first.exp() - 0.2 * second.exp()).abs().max()) < 1e-15


@CASES
def test_what_samplers_differentiate_is_the_same(eta: float | None, noise: float) -> None:
    for tie in (False, True):
        if tie and eta is None:
            continue
        wanted = log_outcomes(U, given(eta), noise)[:, 2 if tie else 0]
        found = log_said(U, given(eta), torch.tensor(tie), noise)
        assert float((found - wanted).abs().max()) < 1e-13


@CASES
@pytest.mark.parametrize("tie", [False, True])
def test_derivatives_are_those_of_autograd(eta: float | None, noise: float, tie: bool) -> None:
    if tie and eta is None:
        return
    for u in U.tolist():

        def value(at: Tensor) -> Tensor:
            return log_outcomes(at[0], None if eta is None else at[1], noise)[2 if tie else 0]

        at = f64([u, 0.0 if eta is None else eta]).requires_grad_(True)
        (slope,) = torch.autograd.grad(value(at), at)
        second = hessian(value, at.detach())
        found = derivatives(f64([u]), given(eta), torch.tensor([tie]), noise)
        assert float(found.value) == pytest.approx(float(value(at).detach()), abs=1e-13)
        assert float(found.u) == pytest.approx(float(slope[0]), abs=1e-12)
        assert float(found.uu) == pytest.approx(float(second[0, 0]), abs=1e-12)
        assert float(found.concave) <= 0
        if eta is not None:
            assert float(found.eta) == pytest.approx(float(slope[1]), abs=1e-12)
            assert float(found.ue) == pytest.approx(float(second[0, 1]), abs=1e-12)
            assert float(found.ee) == pytest.approx(float(second[1, 1]), abs=1e-12)


def test_noise_has_a_floor_that_a_coin_has_not() -> None:
    """However sure the reward is, a noisy choice costs at most −log ε; a mutant that shrinks u costs without bound."""
    cost = -log_outcomes(f64(-50.0), None, 0.1)[0]
    assert float(cost) == pytest.approx(-math.log(0.1), abs=1e-12)
    assert float(-log_outcomes(f64(-50.0 * 0.8), None, 0.0)[0]) > 30
