"""Normalisers of a cut mixture: intervals that hold the right ones as often as they say, and members far away."""

from __future__ import annotations

import math

import pytest
from scipy import stats

import lmppl
from lmppl.inference.mcmc import MCMC, TokenGibbs
from lmppl.lm.tabular import TabularLM


def members(texts: list[str]) -> list[list[float]]:
    return [[1.5 * t.count("a"), -0.7 * t.count("a")] for t in texts]


def letters(sharp: float, texts: list[str]) -> list[list[float]]:
    return [[sharp * t.count("a"), sharp * t.count("b"), sharp * t.count("c")] for t in texts]


def test_intervals_cover_as_often_as_they_say() -> None:
    """95 % intervals of log Z of one member, over 200 fits by importance sampling: within the 99.9 % limits."""
    lm = TabularLM([0.3, 0.6, 0.1], ["a", "b", "<eos>"], max_new_tokens=3)
    model = lm * lmppl.UncertainReward(members, 1.0, lmppl.CutMixture())
    right = float(lmppl.fit_cut_mixture(model).log_normalizers.value[0, 0])
    covered = 0
    for seed in range(200):
        interval = lmppl.fit_cut_mixture(model, lmppl.Importance(400), seed=1000 * seed).log_normalizers.interval
        assert interval is not None
        low, high = interval[0, 0].tolist()
        covered += low <= right <= high
    low, high = stats.binom.ppf([0.0005, 0.9995], 200, 0.95)
    assert low <= covered <= high


@pytest.mark.parametrize("sharp", [5.0, 6.0])
def test_members_far_from_the_prior_are_reached_by_steps(sharp: float) -> None:
    """log Z_m = 6 log(0.96 + 0.04 e^s), up to 17 nats, within 4.5 errors; a single power falls 5 short.

    Each member likes one letter much, so that the members' posteriors do not overlap, and the prior has none of them.
    """
    lm = TabularLM([0.04, 0.04, 0.04, 0.88, 0.0], ["a", "b", "c", "d", "<eos>"], max_new_tokens=6)
    model = lm * lmppl.UncertainReward(lambda texts: letters(sharp, texts), 1.0, lmppl.CutMixture(), name="r")
    fit = lmppl.fit_cut_mixture(model, MCMC(num_chains=96, num_steps=50, kernel=TokenGibbs()), seed=1)
    right = 6 * math.log(0.96 + 0.04 * math.exp(sharp))
    gap = (fit.log_normalizers.value - right).abs()
    assert bool((gap < 4.5 * fit.log_normalizers.standard_error).all())
    assert float(fit.log_normalizers.standard_error.max()) <= 0.35
