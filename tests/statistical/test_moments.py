"""Intervals of fitted multipliers hold the right ones as often as they say."""

from __future__ import annotations

import math
import re

import torch
from scipy import stats

import lmppl
from lmppl.lm.tabular import TabularLM


def has_a(texts: list[str]) -> list[bool]:
    return ["a" in t for t in texts]


def test_intervals_cover_as_often_as_they_say() -> None:
    """95 % intervals of λ, over 200 fits by importance sampling: within the 99.9 % limits of a binomial."""
    lm = TabularLM([0.2, 0.8, 0.0], ["a", "b", "<eos>"], max_new_tokens=1)
    model = lm * lmppl.Reward(lambda texts: [0.8 * ("b" in t) for t in texts], name="r") * lmppl.Moment(has_a, 0.5)
    right = float(lmppl.fit_moments(model).multipliers["has_a"].value)
    covered = 0
    for seed in range(200):
        fit = lmppl.fit_moments(model, lmppl.Importance(200), seed=1000 * seed)
        low, high = fit.multipliers["has_a"].interval[0, 0].tolist()
        covered += low <= right <= high
    low, high = stats.binom.ppf([0.0005, 0.9995], 200, 0.95)
    assert low <= covered <= high


FEMALE, MALE = {"she", "her", "hers", "herself"}, {"he", "him", "his", "himself"}


def female(texts: list[str]) -> list[bool]:
    words = [re.findall(r"[a-z]+", text.lower()) for text in texts]
    return [sum(w in FEMALE for w in one) > sum(w in MALE for w in one) for one in words]


def test_half_of_the_stories_have_a_female_character() -> None:
    """Of a bear, for whom the prior says "she" one time in ten: E[female] = ½ within the interval of fresh draws.

    For a binary feature of prior probability p, λ = log((1−p)/p) and KL(π*‖π0) = ½ log(1/4p(1−p)): both within 4.5
    standard errors of those of 2,000 other draws of the prior.
    """
    prior = lmppl.LM("tiny", context="Once upon a time, there was a bear", max_new_tokens=14)
    draws = prior.draw(2000, generator=torch.Generator().manual_seed(11))
    p = sum(female(list(draws.text))) / 2000
    assert p < 0.15
    error = 1 / math.sqrt(2000 * p * (1 - p))  # of the log-odds
    fit = lmppl.fit_moments(prior * lmppl.Moment(female, 0.5, range=(0, 1)), lmppl.Importance(2000), seed=2)
    achieved, multiplier = fit.achieved["female"], fit.multipliers["female"]
    low, high = achieved.interval[0, 0].tolist()
    assert low <= 0.5 <= high
    assert high - low < 0.12
    gap = abs(float(multiplier.value) - math.log((1 - p) / p))
    assert gap < 4.5 * math.hypot(error, float(multiplier.standard_error))
    slope = 0.5 * abs(1 - 2 * p)  # d KL / d log-odds
    wanted = 0.5 * math.log(1 / (4 * p * (1 - p)))
    assert abs(float(fit.kl_prior[0]) - wanted) < 4.5 * (slope * error + 0.5 * float(multiplier.standard_error) + 0.05)
    assert 0.4 < wanted < 1.0
