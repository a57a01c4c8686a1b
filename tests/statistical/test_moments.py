"""Intervals of fitted multipliers hold the right ones as often as they say."""

from __future__ import annotations

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
