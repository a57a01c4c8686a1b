"""Predictions of choices are averages over the posterior; what evaluations say of them, with their error rates."""

from __future__ import annotations

import math

import pytest
import torch

import lmppl
from lmppl.modeling.evidence.preference.evaluation import Evaluation, evaluate_predictions
from lmppl.modeling.evidence.preference.heads import Scales
from lmppl.modeling.evidence.preference.laplace import laplace
from lmppl.modeling.evidence.preference.likelihood import log_outcomes
from lmppl.modeling.evidence.preference.pairs import read_pairs
from lmppl.modeling.evidence.preference.posteriors import DrawnHead, GaussianHead
from tests.modeling.preference.cases import f64, problem, world


def gaussian(annotators: int, ties: bool, noise: float) -> GaussianHead:
    one = problem(count=40, annotators=annotators, ties=ties, noise=noise)
    fit = laplace(one, Scales(0.8, 0.5))
    return GaussianHead(fit.mode, fit.covariance, one.dim, annotators, 0.5, noise)


def trapezium(head: GaussianHead, delta: torch.Tensor, annotator: int) -> torch.Tensor:
    """(3,) E P(outcome), over a grid of (u, η), from the joint law of x = (u, η) written out."""
    d, size = head.dim, len(head.location)
    rows = torch.zeros(2, size, dtype=torch.float64)
    rows[0, :d] = delta
    if annotator >= 0:
        rows[0, d * (1 + annotator) : d * (2 + annotator)] = delta
    if head.has_ties:
        rows[1, -1] = 1.0
    mean, cov = rows @ head.location, rows @ head.spread @ rows.T
    if head.num_annotators and annotator < 0:
        cov[0, 0] += head.annotator_scale**2 * delta.square().sum()
    z = torch.linspace(-8, 8, 321, dtype=torch.float64)
    weight = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    if not head.has_ties:
        u = mean[0] + cov[0, 0].sqrt() * z
        return (log_outcomes(u, None, head.noise).exp() * weight[:, None]).sum(0)
    factor = torch.linalg.cholesky(cov)
    u = mean[0] + factor[0, 0] * z[:, None] + 0 * z
    eta = mean[1] + factor[1, 0] * z[:, None] + factor[1, 1] * z
    return (log_outcomes(u, eta, head.noise).exp() * (weight[:, None] * weight)[..., None]).sum((0, 1))


@pytest.mark.parametrize(
    ("annotators", "ties", "noise"), [(0, False, 0.0), (0, False, 0.1), (3, False, 0.0), (3, True, 0.1)]
)
def test_predictions_of_a_gaussian_are_integrals(annotators: int, ties: bool, noise: float) -> None:
    """Against the trapezium rule; the plug-in P(y | θ̂) and another annotator's head are mutants."""
    head = gaussian(annotators, ties, noise)
    delta = f64([[0.5, -1.0, 0.3], [2.0, 1.0, -2.0], [-1.5, 2.0, 2.0]])
    annotator = torch.tensor([1, -1, 0]) if annotators else torch.tensor([-1, -1, -1])
    found = head.log_predictive(delta, annotator).exp()
    for row in range(3):
        wanted = trapezium(head, delta[row], int(annotator[row]))
        assert float((found[row] - wanted).abs().max()) < 1e-9
    assert float((found.sum(1) - 1).abs().max()) < 1e-9
    u = delta @ head.mean
    plug_in = log_outcomes(u, head.location[-1] if ties else None, noise).exp()
    assert float((found - plug_in).abs().max()) > 0.01
    if annotators:
        assert float((found - head.log_predictive(delta, torch.tensor([0, 1, 2])).exp()).abs().max()) > 0.005


@pytest.mark.parametrize(("mean", "spread"), [(0.0, 0.0), (1.0, 0.4), (-2.0, 3.0), (4.0, 20.0), (-60.0, 8.0)])
def test_predictions_with_ties_hold_at_every_spread(mean: float, spread: float) -> None:
    """Logarithms against the trapezium rule with many nodes; 96 of Gauss and Hermite are 0.1 nats off at s = 20."""
    eta_spread = 0.8
    head = GaussianHead(f64([mean, 0.3]), torch.diag(f64([spread**2, eta_spread**2])), 1, 0, 1.0, 0.0)
    z, v = torch.linspace(-20, 20, 4001, dtype=torch.float64), torch.linspace(-9, 9, 101, dtype=torch.float64)
    log_p = log_outcomes((mean + spread * z)[:, None], 0.3 + eta_spread * v, 0.0)
    log_weight = (
        -(z[:, None] ** 2 + v**2) / 2 - math.log(2 * math.pi) + float((z[1] - z[0]).log() + (v[1] - v[0]).log())
    )
    wanted = (log_p + log_weight[..., None]).logsumexp((0, 1))
    found = head.log_predictive(f64([[1.0]]), torch.tensor([-1]))[0]
    assert float((found - wanted).abs().max()) < 1e-9


def test_two_texts_of_equal_features_are_equally_likely_to_win() -> None:
    """u = 0 for sure, with and without ties."""
    for ties in (False, True):
        log_p = gaussian(0, ties, 0.1).log_predictive(torch.zeros(1, 3, dtype=torch.float64), torch.tensor([-1]))[0]
        assert float(log_p[0]) == float(log_p[1])
        assert float(log_p.logsumexp(0)) == pytest.approx(0.0, abs=1e-9)


def test_draws_of_a_gaussian_predict_what_it_predicts() -> None:
    """Within five standard errors of 20000 draws, for known and for unknown annotators."""
    head = gaussian(3, True, 0.1)
    drawn = DrawnHead(head.draws(20000, torch.Generator().manual_seed(0)), head.noise)
    delta, annotator = f64([[0.5, -1.0, 0.3], [2.0, 1.0, -2.0]]), torch.tensor([1, -1])
    gap = (drawn.log_predictive(delta, annotator).exp() - head.log_predictive(delta, annotator).exp()).abs()
    assert float(gap.max()) < 5 * 0.5 / math.sqrt(20000)
    assert float((drawn.mean - head.mean).abs().max()) < 0.02
    assert float((drawn.covariance - head.covariance).abs().max()) < 0.02
    assert len(drawn.draws(30000, torch.Generator()).weights) == 30000


def decided(count: int, seed: int, temper: float) -> tuple[torch.Tensor, list[tuple[str, str]]]:
    """Predictions p = σ(temper · u) of choices that follow σ(u), with the chosen text first."""
    generator = torch.Generator().manual_seed(seed)
    u = 1.5 * torch.randn(count, dtype=torch.float64, generator=generator)
    first = torch.rand(count, dtype=torch.float64, generator=generator) < torch.sigmoid(u)
    log_p = log_outcomes(torch.where(first, u, -u) * temper, None, 0.0)
    return log_p, [(f"{i} a", f"{i} b") for i in range(count)]


def evaluated(log_p: torch.Tensor, pairs: list[tuple[str, str]]) -> Evaluation:
    """Of predictions that leave nothing open."""
    replicate = log_p.exp()
    return evaluate_predictions(log_p, read_pairs(pairs, "test", "text"), lambda n: replicate.expand(len(n), -1, -1))


@pytest.mark.slow  # eight seconds of replicates
def test_calibration_has_its_size_and_its_power() -> None:
    """40 evaluations of true predictions: at most 6 with p < 0.05 (probability 0.003 of more); overconfident: all."""

    def p_values(temper: float) -> list[float]:
        made = [decided(500, seed, temper) for seed in range(40)]
        return [evaluated(log_p, pairs).calibration.p_value for log_p, pairs in made]

    assert sum(p < 0.05 for p in p_values(1.0)) <= 6
    assert max(p_values(3.0)) < 0.05


def test_figures_of_an_evaluation_by_hand() -> None:
    p = f64([0.92, 0.83, 0.28, 0.5])
    log_p = torch.stack([p.log(), (1 - p).log(), torch.full_like(p, -math.inf)], 1)
    said = evaluated(log_p, [("a", "b")] * 4)
    assert float(said.log_likelihood.value) == pytest.approx(float(p.log().mean()))
    assert said.log_likelihood.standard_error is not None
    assert float(said.log_likelihood.standard_error) == pytest.approx(float(p.log().std()) / 2)
    assert float(said.accuracy.value) == pytest.approx(2.5 / 4)
    assert said.calibration.count.tolist() == [1, 0, 0, 0, 1, 0, 1, 0, 1, 0]
    assert said.calibration.error == pytest.approx((0.08 + 0.17 + 0.72 + 0.0) / 4)


def test_checks_find_an_annotator_who_says_the_contrary() -> None:
    """The model has one population; the fourth of four has −w. Without that annotator nothing is contradicted."""
    true = world(3, seed=1)
    contrary = world(3, seed=1, deviations=torch.stack([torch.zeros(3).double()] * 3 + [-2 * true.weights]))
    pairs = contrary.pairs(800, seed=2)
    anonymous = [lmppl.Preference(p.chosen, p.rejected) for p in pairs]
    fitted = lmppl.BayesianRewardModel.fit(anonymous, contrary.features, prior_scale=0.5)
    found = [check.name for check in fitted.evaluate(pairs).contradictions]
    assert "agreement of person 3" in found
    honest = [p for p in pairs if p.annotator != "person 3"]
    fitted = lmppl.BayesianRewardModel.fit(
        [lmppl.Preference(p.chosen, p.rejected) for p in honest], contrary.features, prior_scale=0.5
    )
    report = fitted.evaluate(honest)
    assert report.contradictions == ()
    assert "agreement of person 0" in repr(report)
