"""Confidence intervals that hold at every sample size: binomial proportions and means of bounded variables."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lmppl.errors import ModelError, ShapeError

__all__ = ["binomial_upper", "clopper_pearson", "empirical_bernstein"]


def clopper_pearson(successes: Tensor, trials: Tensor, level: float = 0.95) -> Tensor:
    """Exact interval for a probability p after k successes in N trials.

    Lower end: the (1−level)/2 quantile of Beta(k, N−k+1), 0 where k = 0. Upper end: the (1+level)/2 quantile of
    Beta(k+1, N−k), 1 where k = N. Coverage is at least `level` at every N and p. It stays so where sampling stops at
    the k-th success, or at a cap on N, whichever comes first: the event "k successes within N trials" is the same
    under both designs, so the lower end is that of the negative binomial, and Pr(≤ k in N) ≥ Pr(≤ k−1 in N−1) makes
    the upper end conservative.

    Parameters
    ----------
    successes, trials : Tensor (C,)
        k and N ≥ 1, integers.
    level : float
        Coverage, in (0, 1).

    Returns
    -------
    Tensor (C, 2), float64
        Lower and upper ends.

    Raises
    ------
    ModelError
        Where 0 ≤ k ≤ N or N ≥ 1 fails, or the level is not in (0, 1).

    References
    ----------
    clopper1934
    """
    from scipy.special import betaincinv

    k, n = _counts(successes, trials)
    tail = (1.0 - _checked_level(level)) / 2.0
    # Shapes are kept positive at the ends, where the quantile is not asked for.
    below = betaincinv(torch.where(k > 0, k, 1.0).numpy(), (n - k + 1).numpy(), tail)
    above = betaincinv((k + 1).numpy(), torch.where(k < n, n - k, 1.0).numpy(), 1.0 - tail)
    low = torch.where(k > 0, torch.as_tensor(below), 0.0)
    high = torch.where(k < n, torch.as_tensor(above), 1.0)
    return torch.stack([low, high], -1)


def binomial_upper(successes: Tensor, trials: Tensor, level: float = 0.95) -> Tensor:
    """One-sided upper bound for a probability: the `level` quantile of Beta(k+1, N−k).

    With k = 0 it is 1 − (1−level)^{1/N} ≈ 3/N at 95 %. Arguments and errors are those of `clopper_pearson`.

    Returns
    -------
    Tensor (C,), float64

    References
    ----------
    clopper1934
    """
    from scipy.special import betaincinv

    k, n = _counts(successes, trials)
    above = betaincinv((k + 1).numpy(), torch.where(k < n, n - k, 1.0).numpy(), _checked_level(level))
    return torch.where(k < n, torch.as_tensor(above), 1.0)


def empirical_bernstein(values: Tensor, low: float, high: float, level: float = 0.95) -> Tensor:
    """Interval for the mean of independent variables in [low, high], from their sample variance V.

    mean ± (high − low)·[√(2 V' ln(4/(1−level)) / N) + 7 ln(4/(1−level)) / (3(N−1))], with V' the unbiased variance of
    the values rescaled to [0, 1], cut to [low, high], where the mean certainly is. Each side fails with probability
    at most (1−level)/2, at every N. The draws must be independent; they need not have one law. Far narrower than
    Hoeffding's interval where the variance is small; at small N the second term makes it wide.

    Parameters
    ----------
    values : Tensor (N,)
        N ≥ 2 draws.
    low, high : float
        The known range, not the observed one.
    level : float
        Coverage, in (0, 1).

    Returns
    -------
    Tensor (2,), float64

    Raises
    ------
    ShapeError
        Where `values` is not (N,) with N ≥ 2.
    ModelError
        Where a value lies outside [low, high].

    References
    ----------
    maurer2009
    """
    if values.dim() != 1 or len(values) < 2:
        raise ShapeError(f"empirical_bernstein: got shape {tuple(values.shape)}, expected (N,) with N of at least 2")
    if not low < high:
        raise ModelError(f"empirical_bernstein: got the range [{low}, {high}], expected low < high")
    values = values.double().cpu()
    inside = (values >= low) & (values <= high)
    if not bool(inside.all()):
        raise ModelError(f"empirical_bernstein: got {float(values[~inside][0])}, expected values in [{low}, {high}]")
    n = len(values)
    scaled = (values - low) / (high - low)
    rate = math.log(4.0 / (1.0 - _checked_level(level)))
    half = math.sqrt(2.0 * float(scaled.var()) * rate / n) + 7.0 * rate / (3.0 * (n - 1))
    mean = float(scaled.mean())
    ends = torch.tensor([max(mean - half, 0.0), min(mean + half, 1.0)], dtype=torch.float64)
    return low + (high - low) * ends


def _counts(successes: Tensor, trials: Tensor) -> tuple[Tensor, Tensor]:
    k, n = torch.broadcast_tensors(torch.as_tensor(successes).cpu().double(), torch.as_tensor(trials).cpu().double())
    if not bool(((k >= 0) & (k <= n) & (n >= 1)).all()):
        got = f"{k.tolist()} successes in {n.tolist()} trials"
        raise ModelError(f"binomial interval: got {got}, expected 0 ≤ k ≤ N and N ≥ 1")
    return k, n


def _checked_level(level: float) -> float:
    if not 0.0 < level < 1.0:
        raise ModelError(f"level: got {level}, expected a number between 0 and 1")
    return level
