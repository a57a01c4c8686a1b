"""Tests of counts against probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

__all__ = ["chi_square_p_value", "too_many_misses"]

MIN_EXPECTED = 5.0


def chi_square_p_value(counts: Sequence[float], probabilities: Sequence[float]) -> float:
    """The p-value of Pearson's test that independent draws have these probabilities.

    Cells that expect fewer than 5 draws are pooled. A draw in a cell of probability 0 gives p = 0. A single cell that
    is left over gives p = 1: nothing can be tested.

    Parameters
    ----------
    counts, probabilities : sequence of float
        One entry a cell; probabilities sum to 1.
    """
    observed, expected = np.asarray(counts, dtype=float), np.asarray(probabilities, dtype=float)
    if observed[expected <= 0].sum() > 0:
        return 0.0
    observed, expected = observed[expected > 0], expected[expected > 0]
    expected = expected / expected.sum() * observed.sum()
    order = np.argsort(-expected)
    observed, expected = observed[order], expected[order]
    large = int((expected >= MIN_EXPECTED).sum())
    rest = expected[large:].sum()
    if 0 < rest < MIN_EXPECTED and large > 0:  # too small to stand alone: it joins the smallest large cell
        large -= 1
    observed = np.append(observed[:large], observed[large:].sum()) if large < len(observed) else observed
    expected = np.append(expected[:large], expected[large:].sum()) if large < len(expected) else expected
    if len(observed) < 2:
        return 1.0
    statistic = float(((observed - expected) ** 2 / expected).sum())
    return float(stats.chi2.sf(statistic, len(observed) - 1))


def too_many_misses(misses: int, trials: int, level: float) -> float:
    """The probability that independent intervals of coverage `level` miss at least `misses` times in `trials`."""
    return float(stats.binom.sf(misses - 1, trials, 1 - level))
