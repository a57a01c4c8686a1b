"""Rewards learned from preferences: coverage of the head, three posteriors on real pairs, and where they part."""

from __future__ import annotations

import gzip
import json
import math
import re
import zlib
from pathlib import Path

import pytest
import torch
from scipy.stats import binom
from torch import Tensor

import lmppl
from lmppl import BayesianRewardModel
from lmppl.modeling.evidence.preference.features import differences
from lmppl.modeling.evidence.preference.heads import HeadProblem, Scales
from lmppl.modeling.evidence.preference.laplace import laplace
from lmppl.modeling.evidence.preference.pairs import read_pairs
from lmppl.modeling.evidence.preference.sampling import autoguide, nuts
from tests.modeling.preference.cases import problem, world

WORDS = 14


def answer(dialogue: str) -> str:
    return dialogue.rsplit("\n\nAssistant:", 1)[-1]


def hashed(texts: list[str]) -> Tensor:
    """(B, 16) of the last answer: words by their hash, on a scale of their number; the number; a question."""
    rows = torch.zeros(len(texts), WORDS + 2, dtype=torch.float64)
    for row, text in zip(rows, texts, strict=True):
        words = re.findall(r"[a-z']+", answer(text).lower())
        for word in words:
            row[zlib.crc32(word.encode()) % WORDS] += 1 / math.sqrt(len(words) + 1)
        row[WORDS] = math.log1p(len(words))
        row[WORDS + 1] = "?" in answer(text)
    return rows


def real_pairs(shared: Path, name: str) -> list[tuple[str, str]]:
    with gzip.open(shared / "data" / "hh-rlhf" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [(row["chosen"], row["rejected"]) for row in rows if answer(row["chosen"]) != answer(row["rejected"])]


@pytest.mark.parametrize("annotators", [None, (12, 0.3)])
def test_the_true_head_is_covered(annotators: tuple[int, float] | None) -> None:
    """Heads drawn from the prior itself, 200 weights in all: intervals at 0.9 hold 0.9 of them.

    The count is binomial but for the dependence within a head; it fails by chance with probability below 0.01.
    """
    inside, total = 0, 0
    for seed in range(40):
        options = {} if annotators is None else {"annotators": annotators}
        one = world(5, seed=seed, **options)
        pairs = one.pairs(300, seed=1000 + seed)
        model = BayesianRewardModel.fit(pairs, one.features, prior_scale=0.5)
        scale = model.belief.features.scale  # the weights are of standardised features
        gap = (model.posterior.mean - one.weights * scale).abs()
        inside += int((gap < 1.645 * model.posterior.covariance.diagonal().sqrt()).sum())
        total += 5
    low, high = binom.ppf([0.002, 0.998], total, 0.9)
    assert low <= inside <= high, f"{inside} of {total}"


def test_nuts_and_the_autoguide_against_quadrature() -> None:
    """Two weights, 25 pairs, ties and noise, where the posterior is skewed: moments on a grid of 121 × 121 × 61.

    NUTS within four of its standard errors; the AutoGuide's moments within 0.15 of a spread; Laplace misses the mean.
    """
    one = problem(count=25, dim=2, ties=True, noise=0.05, seed=2)
    fit = laplace(one, Scales(2.0, 1.0))
    sd = fit.covariance.diagonal().sqrt()
    axes = [fit.mode[k] + sd[k] * torch.linspace(-5, 8, n, dtype=torch.float64) for k, n in enumerate((121, 121, 61))]
    grid = torch.cartesian_prod(*axes)
    values = []
    for part in grid.split(4096):
        prior = -0.5 * (part.square() * one.precision(fit.scales)).sum(1)
        values.append(one.log_likelihood(part[:, :2], None, part[:, 2]) + prior)
    weight = torch.cat(values).softmax(0)
    mean = weight @ grid
    spread = (weight @ (grid - mean) ** 2).sqrt()
    drawn, facts = nuts(one, fit, 600, 0)
    draws = torch.cat([drawn.weights, drawn.eta[:, None]], 1)  # type: ignore[index]
    error = spread / facts["n_eff"] ** 0.5
    assert float(((draws.mean(0) - mean) / error).abs().max()) < 4
    assert float((draws.std(0) / spread - 1).abs().max()) < 0.2
    guided, said = autoguide(one, fit, 4000, 0)
    draws = torch.cat([guided.weights, guided.eta[:, None]], 1)  # type: ignore[index]
    assert float(((draws.mean(0) - mean) / spread).abs().max()) < 0.15
    evidence = float(torch.cat(values).logsumexp(0)) + 0.5 * float(
        (one.precision(fit.scales) / (2 * math.pi)).log().sum()
    )
    evidence += sum(math.log(float(axis[1] - axis[0])) for axis in axes)
    assert said["elbo"] < evidence + 0.05
    assert said["elbo"] > evidence - 0.5
    assert abs(fit.log_evidence - evidence) < 0.5
    assert float(((fit.mode - mean) / spread).abs().max()) > 0.15


@pytest.mark.shared
def test_three_posteriors_agree_on_many_real_pairs(shared: Path) -> None:
    """1500 pairs, 16 weights: one posterior by three ways, with one held-out report; its calibration error is known."""
    pairs = real_pairs(shared, "harmless-base-test")
    train, test = pairs[:1500], pairs[1500:]
    models = {
        name: BayesianRewardModel.fit(train, hashed, posterior=name, num_draws=400)
        for name in ("laplace", "nuts", "autoguide")
    }
    for name in ("laplace", "autoguide"):
        agreement = models[name].agreement(models["nuts"])
        assert agreement.apart == [], f"{name}: {agreement}"
    reports = {name: model.evaluate(test) for name, model in models.items()}
    coin = math.log(0.5)
    for name, report in reports.items():
        assert report.log_likelihood.value.item() > coin + 0.01, f"{name}: {report}"
        assert report.accuracy.interval is not None
        assert report.accuracy.interval[0, 0] > 0.5
        assert report.calibration.error < 0.06
        assert report.calibration.p_value > 0.01
        assert report.contradictions == ()
    values = [report.log_likelihood.value.item() for report in reports.values()]
    assert max(values) - min(values) < 0.003


def manners(texts: list[str]) -> Tensor:
    """(B, 3) of the last answer: its length, a question, a refusal."""
    refusal = re.compile(r"sorry|can't|cannot|not sure|don't|illegal|wrong")
    refuses = torch.tensor([[float(bool(refusal.search(answer(text).lower())))] for text in texts], dtype=torch.float64)
    return torch.cat([hashed(texts)[:, WORDS:], refuses], 1)


@pytest.mark.shared
def test_laplace_and_nuts_part_where_pairs_are_few(shared: Path) -> None:
    """10 pairs for 3 weights with a wide prior: the posterior leans away from the mode, and the report says so."""
    train = real_pairs(shared, "harmless-base-test")[:10]
    models = [
        BayesianRewardModel.fit(train, manners, posterior=name, prior_scale=20.0, num_draws=250)
        for name in ("laplace", "nuts")
    ]
    agreement = models[0].agreement(models[1])
    assert agreement.apart != [], str(agreement)
    assert "they differ in columns" in repr(agreement)


def both_objectives(shared: Path) -> list[lmppl.Preference]:
    files = (("harmless", "harmless-base-test"), ("helpful", "relabeled-helpful-test"))
    return [lmppl.Preference(*p, annotator=name) for name, file in files for p in real_pairs(shared, file)]


@pytest.mark.shared
def test_two_objectives_are_two_annotators(shared: Path) -> None:
    """The same dialogues judged for harmlessness, which likes short answers, and helpfulness, which likes long ones.

    Heads of annotators explain both; one population is contradicted.
    """
    named = both_objectives(shared)
    anonymous = [lmppl.Preference(one.chosen, one.rejected) for one in named]
    two, one = (BayesianRewardModel.fit(pairs, manners, prior_scale=0.3) for pairs in (named, anonymous))
    reports = [model.evaluate(named) for model in (two, one)]
    assert reports[0].log_likelihood.value.item() > reports[1].log_likelihood.value.item() + 0.01
    assert reports[0].contradictions == ()
    assert "agreement of helpful" in {check.name for check in reports[1].contradictions}


def integrated_spread(one: HeadProblem, sigma: float) -> Tensor:
    """(D,) standard deviations of w when the Laplace approximations at 60 values of τ are weighed by p(τ | y)."""
    log_taus = torch.linspace(-4.5, 1.8, 60, dtype=torch.float64).tolist()
    fits = [laplace(one, Scales(sigma, math.exp(t))) for t in log_taus]
    weight = torch.tensor(
        [f.log_evidence + t - math.exp(2 * t) / 2 for f, t in zip(fits, log_taus, strict=True)], dtype=torch.float64
    ).softmax(0)
    modes = torch.stack([f.mode[: one.dim] for f in fits])
    variances = torch.stack([f.covariance.diagonal()[: one.dim] for f in fits])
    mean = weight @ modes
    return (weight @ (variances + (modes - mean) ** 2)).sqrt()


@pytest.mark.shared
def test_laplace_leaves_out_what_two_annotators_leave_open(shared: Path) -> None:
    """τ of two annotators is hardly known: Laplace's spread of w is too small by a fifth or more; NUTS has it right.

    The truth is an integral over τ; the spread of 400 draws with a heavy tail is known to a third or so.
    """
    named = [pair for pair in both_objectives(shared) if len(answer(pair.chosen)) % 16 == 0]
    first, second = (
        BayesianRewardModel.fit(named, manners, posterior=name, num_draws=400, prior_scale=3.0)
        for name in ("laplace", "nuts")
    )
    known = read_pairs(named, "test", "text")
    delta = differences(first.belief.features, known, "test")
    truth = integrated_spread(HeadProblem(delta, known.tie, known.annotator, 2, 0.0), 3.0)
    ratios = [model.posterior.covariance.diagonal().sqrt() / truth for model in (first, second)]
    assert float(ratios[0].max()) < 0.8
    assert float((ratios[1].log()).abs().max()) < math.log(4 / 3)
