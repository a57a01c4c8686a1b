"""log E[σ(X)] of a Gaussian X: the probability of success when its log-odds are only known to a Gaussian.

The probit approximation σ(μ/√(1 + πτ²/8)) is good as a probability and bad as a log-probability where μ ≪ 0; here the
logarithm itself is right to about 1e-12 of its value.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = ["log_mean_sigmoid"]

NODES = 128  # of each panel
KNEE = 40.0  # beyond it σ(−x) is e^{−x} to 1e-17, and has no scale of its own
WIDTHS = 14.0  # standard deviations after which nothing is left


def log_mean_sigmoid(mean: Tensor, spread: Tensor) -> Tensor:
    """log E[σ(X)], X ~ N(μ, τ²), of μ `mean` and τ ≥ 0 `spread`, of equal shapes.

    For μ ≤ 0, E[σ(X)] = Φ(μ/τ) + ∫_0^∞ σ(−x) [p(−x) − p(x)] dx, where no term is negative, so that nothing cancels;
    for μ > 0, E[σ(X)] = 1 − E[σ(−X)].
    """
    mean, spread = torch.broadcast_tensors(mean.double(), spread.double())
    certain = spread == 0
    lower = -mean.abs()
    below = torch.where(certain, logsigmoid(lower), _below_zero(lower, spread.masked_fill(certain, 1.0)))
    return torch.where(mean > 0, torch.log1p(-below.exp()), below)


def _below_zero(mean: Tensor, spread: Tensor) -> Tensor:
    """For μ ≤ 0 and τ > 0."""
    depth = -mean
    peak = (depth - spread**2).clamp_min(0.0)  # of e^{−x} p(−x), x ≥ 0
    slope = (1 - depth / spread**2).clamp_min(0.0)  # of its logarithm at 0, where that is the peak
    reach = torch.where(peak > 0, WIDTHS * spread, torch.minimum(WIDTHS * spread, KNEE / slope))
    low, high = (peak - WIDTHS * spread).clamp_min(0.0), peak + reach
    knee = high.clamp(max=KNEE).maximum(low)
    above: Tensor = torch.special.log_ndtr(mean / spread)
    parts = [above, _panel(low, knee, mean, spread), _panel(knee, high, mean, spread)]
    return torch.stack(parts).logsumexp(0)


def _panel(left: Tensor, right: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    """log of the integral's part between `left` and `right`, by Gauss and Legendre."""
    at, weight = (torch.from_numpy(a).to(mean) for a in np.polynomial.legendre.leggauss(NODES))
    left, right, mean, spread = (v[..., None] for v in (left, right, mean, spread))
    half = (right - left) / 2
    x = left + half * (1 + at)
    log_density = -0.5 * ((x + mean) / spread) ** 2 - spread.log() - 0.5 * math.log(2 * math.pi)
    log_share = torch.log(-torch.expm1(2 * x * mean / spread**2))  # of p(−x) that p(x) leaves
    return (logsigmoid(-x) + log_density + log_share + (half * weight).log()).logsumexp(-1)
