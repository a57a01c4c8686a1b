"""Divergences between q and π*, from enumerated tables or from draws, and the bounds on log Z that carry them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lmppl.diagnostics.intervals import empirical_bernstein
from lmppl.diagnostics.normalizers import normal_quantile
from lmppl.diagnostics.weights import checked_log_weights, normalised_log_weights
from lmppl.errors import ModelError, ShapeError
from lmppl.sequences import Estimate, EstimateKind

__all__ = [
    "elbo",
    "eubo",
    "kl_divergence",
    "self_normalised_kl",
    "total_variation",
    "total_variation_from_weights",
]

TABLE_TOLERANCE = 1e-4  # how far an enumerated law may be from summing to 1 (float32 log-probabilities)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q) = Σ p (log p − log q) of two enumerated laws, in nats; inf where q = 0 < p, and 0·log 0 = 0.

    KL(π*‖q) sees modes that q misses, KL(q‖π*) sees mass that q puts where π* has little.

    Parameters
    ----------
    log_p, log_q : Tensor (S,)
        Log-probabilities of the same S outcomes, in the same order, every outcome of positive probability included.

    Returns
    -------
    Tensor (), float64

    Raises
    ------
    ShapeError
        Where the two are not both (S,).
    ModelError
        Where a table does not sum to 1 (within 1e-4): a missing outcome would make the figure wrong.
    """
    p, q = _tables(log_p, log_q)
    inside = p > -math.inf
    return torch.sum(p[inside].exp() * (p[inside] - q[inside]))


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """TV(p, q) = ½ Σ |p − q| of two enumerated laws, between 0 and 1.

    The largest difference of the probability of any event. Arguments and errors are those of `kl_divergence`.

    Returns
    -------
    Tensor (), float64
    """
    p, q = _tables(log_p, log_q)
    return 0.5 * (p.exp() - q.exp()).abs().sum()


def elbo(log_weights: Tensor, level: float = 0.95) -> Estimate:
    """ELBO = E_q[log w], w = γ/q, from draws of q: log Z − ELBO = KL(q‖π*) ≥ 0.

    Detects mass that q puts where π* has little. Blind to modes that q misses. It is −inf as soon as q can violate a
    hard constraint; then `note` gives the share of such draws, and N-sample bounds (log Ẑ) have to be used instead.

    Parameters
    ----------
    log_weights : Tensor (N,)
        log γ − log q of independent draws of q, in nats.
    level : float
        Nominal coverage of the normal interval mean ± z·s/√N.

    Returns
    -------
    Estimate
        `value` (), kind "lower_bound" (in expectation).
    """
    log_w = checked_log_weights(log_weights)
    zero = int((log_w == -math.inf).sum())
    if zero:
        note = f"−inf: {zero} of {len(log_w)} draws have γ = 0, so Pr_q(γ = 0) > 0"
        return Estimate(log_w.new_tensor(-math.inf), None, level, "lower_bound", None, len(log_w), note)
    return _mean(log_w, level, "lower_bound")


def eubo(log_weights: Tensor, level: float = 0.95) -> Estimate:
    """EUBO = E_π*[log w], w = γ/q, from exact draws of π*: EUBO − log Z = KL(π*‖q) ≥ 0.

    The only cheap figure that sees missed modes: exact draws visit them, and log q is small or −inf there. Its draws
    must be exact (enumeration, rejection): draws of another engine, or resampled ones, miss what that engine misses.

    Parameters
    ----------
    log_weights : Tensor (N,)
        log γ − log q of independent exact draws, in nats; +inf where q = 0.
    level : float
        Nominal coverage of the normal interval.

    Returns
    -------
    Estimate
        `value` (), kind "upper_bound" (in expectation); +inf where q does not cover a draw.

    Raises
    ------
    ModelError
        Where a draw has γ = 0 (log w = −inf): such a draw cannot come from π*.
    """
    if bool((log_weights == -math.inf).any()):
        raise ModelError("eubo: got a draw with γ = 0, expected exact draws of π*")
    log_w = -checked_log_weights(-log_weights)  # of the inverse weights, where q = 0 is the −inf
    missed = int((log_w == math.inf).sum())
    if missed:
        note = f"+inf: q gives probability 0 to {missed} of {len(log_w)} exact draws, so it does not cover π*"
        return Estimate(log_w.new_tensor(math.inf), None, level, "upper_bound", None, len(log_w), note)
    return _mean(log_w, level, "upper_bound")


def self_normalised_kl(log_weights: Tensor, level: float = 0.95) -> Estimate:
    """Σ w̄ log(N w̄) → KL(π*‖q), from draws of q; it never exceeds log N, and `note` prints that cap.

    Detects weights that are far from equal. Blind to mass that no draw reached; where the truth is above log N it is
    sure to be too small, so a figure near its cap means "at least this much".

    Parameters
    ----------
    log_weights : Tensor (N,)
        In nats; not all −inf.
    level : float
        Nominal coverage of the interval by the delta method, cut to [0, log N].

    Returns
    -------
    Estimate
        `value` (), in nats; biased of order 1/N.
    """
    log_w = normalised_log_weights(log_weights)
    n = len(log_w)
    cap = math.log(n)
    w = log_w.exp()
    value = torch.special.xlogy(w, w).sum() + cap
    note = f"at most log N = {cap:.2f}, whatever the truth"
    if n == 1:
        return Estimate(value, None, level, "unbiased", None, n, note)
    ratio = n * w  # w/Ẑ, of mean 1
    influence = torch.special.xlogy(ratio, ratio) - (value + 1.0) * ratio
    error = influence.std() / math.sqrt(n)
    half = normal_quantile((1.0 + level) / 2.0) * error
    ends = torch.stack([(value - half).clamp(0.0, cap), (value + half).clamp(0.0, cap)])
    return Estimate(value, ends, level, "unbiased", error, n, note)


def total_variation_from_weights(log_weights: Tensor, log_normalizer: float, level: float = 0.95) -> Estimate:
    """TV(q, π*) = E_q[(1 − w/Z)₊], from draws of q: unbiased with the true Z, even where q does not cover π*.

    (½ E_q|w/Z − 1| is not the total variation where q does not cover.) The interval is empirical Bernstein's, at
    every N. With an estimate of Z that misses modes the figure is too small: then it cannot see them either.

    Parameters
    ----------
    log_weights : Tensor (N,)
        log γ − log q of N ≥ 2 independent draws of q, in nats.
    log_normalizer : float
        log Z, in nats.
    level : float
        Coverage, given Z.

    Returns
    -------
    Estimate
        `value` (), between 0 and 1.
    """
    log_w = checked_log_weights(log_weights)
    short = torch.relu(1.0 - torch.exp(log_w - log_normalizer))
    interval = empirical_bernstein(short, 0.0, 1.0, level).to(short.device)
    error = short.std() / math.sqrt(len(short))
    note = "given Z; too small where Z misses modes"
    return Estimate(short.mean(), interval, level, "unbiased", error, len(short), note)


def _mean(values: Tensor, level: float, kind: EstimateKind) -> Estimate:
    n = len(values)
    if n == 1:
        return Estimate(values.mean(), None, level, kind, None, 1, "one draw: no variance can be estimated")
    error = values.std() / math.sqrt(n)
    half = normal_quantile((1.0 + level) / 2.0) * error
    ends = torch.stack([values.mean() - half, values.mean() + half])
    return Estimate(values.mean(), ends, level, kind, error, n, "normal interval: asymptotic")


def _tables(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    if log_p.dim() != 1 or log_p.shape != log_q.shape:
        raise ShapeError(f"tables: got shapes {tuple(log_p.shape)} and {tuple(log_q.shape)}, expected the same (S,)")
    for name, table in (("log_p", log_p), ("log_q", log_q)):
        mass = float(table.double().exp().sum())
        if not abs(mass - 1.0) <= TABLE_TOLERANCE:
            raise ModelError(f"{name}: the probabilities sum to {mass:.6f}, expected 1 over the enumerated outcomes")
    return log_p.double(), log_q.double()
