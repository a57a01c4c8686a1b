"""What importance weights say about themselves: effective sample sizes, tail shape, and what they cannot see.

Every figure here looks at log-weights alone, so all of them are blind to mass of π* that no draw reached: a proposal
that misses 99 % of the posterior can have equal weights, full effective sample size and a small k̂. Exact draws (see
`lmppl.diagnostics.divergences.eubo`) see that, weights never do.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmppl.errors import ModelError, ShapeError

__all__ = [
    "KHAT_LIMIT",
    "TailShape",
    "effective_sample_size",
    "entropy_effective_sample_size",
    "max_weight_share",
    "normalised_log_weights",
    "pareto_khat",
    "pareto_smooth",
    "zero_weight_share",
]

KHAT_LIMIT = 0.7
TIED = 1e-9  # nats; log-weights closer than this differ by rounding only
MIN_TAIL = 5  # tail weights below which no generalised Pareto law is fitted [vehtari2024]


class TailShape(NamedTuple):
    """A Pareto shape k̂; nan where it is undefined, and then `note` says why."""

    value: float
    note: str = ""


def normalised_log_weights(log_weights: Tensor) -> Tensor:
    """log w̄ = log w − log Σ w, in nats; −inf stays −inf.

    Parameters
    ----------
    log_weights : Tensor (N,)
        log w = log γ − log q of one context's draws; −inf is a weight like any other.

    Returns
    -------
    Tensor (N,), float64

    Raises
    ------
    ShapeError
        Where the shape is not (N,) with N ≥ 1.
    ModelError
        On nan or +inf, and where every weight is zero, so that nothing can be normalised.
    """
    log_w = checked_log_weights(log_weights)
    total = torch.logsumexp(log_w, 0)
    if float(total) == -math.inf:
        raise ModelError(f"weights: all {len(log_w)} weights are zero, so they cannot be normalised")
    return log_w - total


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """ESS = (Σw)²/Σw², between 1 and N; N/ESS estimates 1 + χ²(π*‖q).

    Detects a few draws that carry all the weight. Blind to mass that no draw reached, and too large while the heavy
    weights of a heavy tail have not been drawn yet.

    Parameters
    ----------
    log_weights : Tensor (N,)
        In nats; errors as in `normalised_log_weights`.

    Returns
    -------
    Tensor (), float64

    References
    ----------
    kong1992, agapiou2017
    """
    return torch.exp(-torch.logsumexp(2.0 * normalised_log_weights(log_weights), 0))


def entropy_effective_sample_size(log_weights: Tensor) -> Tensor:
    """exp(−Σ w̄ log w̄), between 1 and N: the perplexity of the normalised weights, at least the ESS.

    log N minus its logarithm is the self-normalised KL. Reacts less than the ESS to one heavy draw; same blind spots.

    Parameters
    ----------
    log_weights : Tensor (N,)
        In nats; errors as in `normalised_log_weights`.

    Returns
    -------
    Tensor (), float64
    """
    log_w = normalised_log_weights(log_weights)
    return torch.exp(-torch.special.xlogy(log_w.exp(), log_w.exp()).sum())


def max_weight_share(log_weights: Tensor) -> Tensor:
    """max w / Σ w, between 1/N and 1. Where it does not fall with N, the weights have no finite mean in practice.

    Parameters
    ----------
    log_weights : Tensor (N,)
        In nats; errors as in `normalised_log_weights`.

    Returns
    -------
    Tensor (), float64

    References
    ----------
    chatterjee2018
    """
    return normalised_log_weights(log_weights).max().exp()


def zero_weight_share(log_weights: Tensor) -> Tensor:
    """Share of draws with w = 0: an estimate of Pr_q(γ = 0). The only figure here that is defined where all are zero.

    Parameters
    ----------
    log_weights : Tensor (N,)
        In nats.

    Returns
    -------
    Tensor (), float64
    """
    return (checked_log_weights(log_weights) == -math.inf).double().mean()


def pareto_khat(log_weights: Tensor) -> TailShape:
    """Shape k̂ of the generalised Pareto law fitted to the largest weights.

    The largest min(N/5, 3√N) weights are fitted. 1/k̂ estimates how many moments the weights have: k̂ > 0.7 means
    that Ẑ and its standard error are not to be trusted at any affordable N. Detects heavy right tails. Blind to mass
    that no draw reached.

    It is a figure for weights with a continuous law. Undefined, hence nan with the reason in `note` and never inf:
    too few draws (N < 25), no more positive weights than the tail, tied or few distinct weights in the tail (discrete
    rewards, repeated texts, hard constraints), and tails too wide for float64.

    Parameters
    ----------
    log_weights : Tensor (N,)
        In nats; nan and +inf are errors.

    References
    ----------
    vehtari2024
    """
    return pareto_smooth(log_weights)[1]


def pareto_smooth(log_weights: Tensor) -> tuple[Tensor, TailShape]:
    """Pareto-smoothed log-weights and k̂.

    The tail's weights are replaced by the expected order statistics of the fitted law, cut at the largest raw weight.
    That lowers the variance of self-normalised expectations at the price of a bias that vanishes with N and is
    largest for functions that single out the heaviest draws. Smoothed weights are no ratios γ/q any more, so their
    mean is no unbiased estimate of Z: they are rescaled to the raw total, so that Σw/N stays the raw Ẑ. Where k̂ is
    undefined the weights come back as they were.

    Parameters
    ----------
    log_weights : Tensor (N,)
        In nats; nan and +inf are errors.

    Returns
    -------
    log_weights : Tensor (N,), float64
        With the same Σw as the input.
    shape : TailShape

    References
    ----------
    vehtari2024
    """
    log_w = checked_log_weights(log_weights)
    reason = _why_undefined(log_w)
    if reason:
        return log_w, TailShape(math.nan, reason)
    from arviz_stats.base.array import array_stats

    psislw: Any = array_stats.psislw  # untyped
    smoothed, khat = psislw(-log_w.cpu().numpy())
    total = torch.logsumexp(log_w, 0)  # psislw gives Σw = 1
    return torch.as_tensor(smoothed, device=log_w.device) + total, TailShape(float(khat))


def checked_log_weights(log_weights: Tensor) -> Tensor:
    """`log_weights` in float64 where they are (N,), N ≥ 1, finite or −inf; else an error."""
    if log_weights.dim() != 1 or len(log_weights) == 0:
        raise ShapeError(f"log_weights: got shape {tuple(log_weights.shape)}, expected (N,) with N of at least 1")
    log_w = log_weights.double()
    bad = torch.isnan(log_w) | (log_w == math.inf)
    if bool(bad.any()):
        row = int(torch.nonzero(bad)[0, 0])
        raise ModelError(f"log_weights: got {float(log_w[row])} at row {row}, expected finite values or −inf")
    return log_w


def _why_undefined(log_w: Tensor) -> str:
    """Why no generalised Pareto law can be fitted to the largest weights; "" where one can."""
    n = len(log_w)
    tail = int(3 * math.sqrt(n)) if n > 225 else n // 5  # the rule of vehtari2024, as in arviz_stats
    if tail < MIN_TAIL:
        return f"k̂ undefined: {n} draws are too few, 25 are needed"
    positive = int((log_w > -math.inf).sum())
    if positive <= tail:
        return f"k̂ undefined: {positive} positive weights among {n}, no more than the tail of {tail} that is fitted"
    ordered = torch.sort(log_w).values
    distinct = 1 + int((ordered[-tail:].diff() > TIED).sum())
    if distinct == 1:
        return f"k̂ undefined: the {tail} largest weights are tied"
    if distinct < max(MIN_TAIL, tail // 2):
        return f"k̂ undefined: few distinct weights, {distinct} among the {tail} largest"
    above = torch.exp(ordered[-tail:] - ordered[-1]) - torch.exp(ordered[-tail - 1] - ordered[-1])
    if float(above[int(tail / 4 + 0.5) - 1]) <= 0.0:  # the quartile that scales the fit
        return "k̂ undefined: the lower tail weights tie with each other or vanish beside the largest"
    return ""
