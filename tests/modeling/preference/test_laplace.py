"""The Laplace approximation: Hessian, mode, evidence, scales; and the wrong variants of each."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd.functional import hessian

from lmppl.errors import ModelError
from lmppl.modeling.evidence.preference.heads import HeadProblem, Scales
from lmppl.modeling.evidence.preference.laplace import best_scales, laplace
from tests.modeling.preference.cases import f64, problem

SCALES = Scales(0.8, 0.4)
KINDS = {
    "plain": problem(),
    "ties": problem(ties=True),
    "noise": problem(noise=0.15),
    "annotators": problem(annotators=3),
    "everything": problem(annotators=3, ties=True, noise=0.1),
}
EACH = pytest.mark.parametrize("kind", list(KINDS))


@EACH
def test_gradient_and_hessian_are_those_of_autograd(kind: str) -> None:
    """At an arbitrary θ; the mutant, which leaves p(1 − p) at ¼, fails."""
    one = KINDS[kind]
    theta = 0.7 * torch.randn(one.num_parameters, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    at = theta.clone().requires_grad_(True)
    value = -one.log_joint(at, SCALES)
    (slope,) = torch.autograd.grad(value, at)
    second = hessian(lambda t: -one.log_joint(t, SCALES), theta)
    found = one.curvature(theta, SCALES)
    assert float(found.value) == pytest.approx(float(value.detach()), abs=1e-10)
    assert float((found.gradient - slope).abs().max()) < 1e-10
    assert float((found.hessian - second).abs().max()) < 1e-10
    quarter = one.delta.T @ one.delta / 4 + torch.eye(one.dim, dtype=torch.float64) / SCALES.weights**2
    assert float((quarter - second[: one.dim, : one.dim]).abs().max()) > 0.1


@EACH
def test_what_samplers_see_is_the_same_density(kind: str) -> None:
    """The likelihood by parts plus the prior is log p(y, θ), for one θ and for a batch."""
    one = KINDS[kind]
    thetas = torch.randn(4, one.num_parameters, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    parts = [one.split(theta) for theta in thetas]
    batched = one.log_likelihood(
        *(None if column[0] is None else torch.stack(column) for column in zip(*parts, strict=True))
    )  # type: ignore[arg-type]
    precision = one.precision(SCALES)
    for theta, value in zip(thetas, batched, strict=True):
        log_prior = 0.5 * (precision.log() - math.log(2 * math.pi) - precision * theta**2).sum()
        assert float(value + log_prior) == pytest.approx(float(one.log_joint(theta, SCALES)), abs=1e-10)


@EACH
def test_the_mode_has_no_slope_and_newton_finds_it_from_afar(kind: str) -> None:
    one = KINDS[kind]
    fit = laplace(one, SCALES)
    assert float(one.curvature(fit.mode, SCALES).gradient.abs().max()) < 1e-7
    far = laplace(one, SCALES, torch.full_like(fit.mode, 5.0))
    if one.noise == 0:  # otherwise there may be several
        assert float((far.mode - fit.mode).abs().max()) < 1e-7
    eye = fit.hessian @ fit.covariance
    assert float((eye - torch.eye(len(eye), dtype=torch.float64)).abs().max()) < 1e-9


def test_the_evidence_is_the_integral_where_the_posterior_is_nearly_gaussian() -> None:
    """One weight, 400 pairs: log ∫ p(y, θ) dθ by the trapezium rule; the mutant without ½ log|H| is a nat away."""
    one = problem(count=400, dim=1)
    fit = laplace(one, SCALES)
    sd = float(fit.covariance.sqrt())
    grid = torch.linspace(-10, 10, 2001, dtype=torch.float64) * sd + fit.mode
    values = torch.stack([one.log_joint(point[None], SCALES) for point in grid])
    truth = float(values.logsumexp(0)) + math.log(20 * sd / 2000)
    assert fit.log_evidence == pytest.approx(truth, abs=2e-3)
    mutant = fit.log_evidence + 0.5 * float(torch.logdet(fit.hessian))
    assert abs(mutant - truth) > 1


def test_the_evidence_of_nothing_learned_is_a_coins() -> None:
    one = problem(count=50)
    assert laplace(one, Scales(1e-6, 1.0)).log_evidence == pytest.approx(50 * math.log(0.5), abs=1e-6)


def test_the_prior_scale_maximises_the_evidence() -> None:
    one = problem(count=300, dim=4)
    best = best_scales(one, None)
    around = [laplace(one, Scales(best.scales.weights * f, 1.0)).log_evidence for f in (0.5, 0.9, 1.1, 2.0)]
    assert best.log_evidence > max(around)
    assert best_scales(one, 0.3).scales.weights == pytest.approx(0.3)


def test_the_annotators_scale_does_not_collapse_as_the_joint_mode_does() -> None:
    """The mutant maximises p(y, θ, τ) over θ and τ together: it grows without bound as τ → 0, whatever the pairs."""
    generator = torch.Generator().manual_seed(1)
    heads = f64([0.8, -0.5, 0.0]) + 0.8 * torch.randn(8, 3, dtype=torch.float64, generator=generator)
    delta = torch.randn(800, 3, dtype=torch.float64, generator=generator)
    annotator = torch.arange(800) % 8
    u = (delta * heads[annotator]).sum(1)
    first = torch.rand(800, dtype=torch.float64, generator=generator) < torch.sigmoid(u)
    one = HeadProblem(torch.where(first[:, None], delta, -delta), torch.zeros(800, dtype=torch.bool), annotator, 8, 0.0)
    best = best_scales(one, 1.0)
    assert 0.5 < best.scales.annotators < 1.3  # the truth is 0.8
    small, smaller = (laplace(one, Scales(1.0, tau)) for tau in (1e-3, 1e-4))
    assert float(one.log_joint(smaller.mode, smaller.scales)) > float(one.log_joint(small.mode, small.scales)) + 20
    assert float(one.log_joint(small.mode, small.scales)) < float(one.log_joint(smaller.mode, smaller.scales))
    assert small.log_evidence < best.log_evidence - 10


def test_noise_bounds_what_one_absurd_choice_can_do() -> None:
    """Sixty choices say w > 0 and two that are far apart say the contrary: without noise these two win."""
    delta = torch.cat([torch.full((60, 1), 1.0), torch.full((2, 1), -60.0)]).double()
    tie, annotator = torch.zeros(62, dtype=torch.bool), torch.zeros(62, dtype=torch.long)
    clean, noisy = (laplace(HeadProblem(delta, tie, annotator, 0, e), SCALES).mode for e in (0.0, 0.05))
    assert float(clean) < 0.1
    assert float(noisy) > 0.5


def test_choices_that_do_not_depend_on_the_features_are_refused() -> None:
    delta = f64([[1.0, 0.3], [-1.0, -0.3], [0.2, -1.0], [-0.2, 1.0]]).repeat(20, 1)
    one = HeadProblem(delta, torch.zeros(80, dtype=torch.bool), torch.zeros(80, dtype=torch.long), 0, 0.0)
    with pytest.raises(ModelError, match="do not depend on these features; give others, or state prior_scale="):
        best_scales(one, None)
    assert best_scales(one, 0.5).scales.weights == pytest.approx(0.5)
