"""Estimates of log Z, with their errors, from weights or from acceptances.

Each function treats one context where it takes weights, and all contexts where it takes counts; `stack` puts
estimates of single contexts together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import NormalDist

import torch
from torch import Tensor

from lmppl.diagnostics.intervals import clopper_pearson, empirical_bernstein
from lmppl.diagnostics.weights import TIED, checked_log_weights
from lmppl.errors import ModelError
from lmppl.sequences import Estimate, EstimateKind

__all__ = [
    "log_acceptance",
    "log_mean_sweeps",
    "log_mean_weight",
    "log_mean_weight_bounded",
    "mean_of_logs",
    "normal_quantile",
    "stack",
]


def log_mean_weight(log_weights: Tensor, level: float = 0.95) -> Estimate:
    """log Ẑ = log (1/N) Σ w, with the interval log Ẑ ± z·s, s² = Var(w)/(N Ẑ²) by the delta method.

    E Ẑ = Z where q covers π*, so that E log Ẑ ≤ log Z. The interval is asymptotic: it rests on a finite variance of w
    (doubtful for k̂ > 0.7) and sees no error where all drawn weights are equal, in which case it is nan and `note`
    says so. It is blind to mass that no draw reached.

    Parameters
    ----------
    log_weights : Tensor (N,)
        log w = log γ − log q of independent draws of q, in nats; −inf is a weight like any other.
    level : float
        Nominal coverage.

    Returns
    -------
    Estimate
        `value` (): log Ẑ, −inf where all weights are zero; kind "unbiased_Z".

    References
    ----------
    owen2000
    """
    log_w = checked_log_weights(log_weights)
    n = len(log_w)
    value = torch.logsumexp(log_w, 0) - math.log(n)
    reason = ""
    if n == 1:
        reason = "one draw: no variance can be estimated, so there is no interval"
    elif float(value) == -math.inf:
        reason = f"all {n} weights are zero: the delta method has no interval for log Ẑ = −inf"
    elif float(log_w.max() - log_w.min()) <= TIED:
        reason = f"all {n} weights are equal: the delta method sees no error, so there is no interval"
    if reason:
        none = value.new_tensor([math.nan, math.nan])
        return Estimate(value, none, level, "unbiased_Z", none[0], n, reason)
    error = torch.exp(log_w - value).std() / math.sqrt(n)
    half = normal_quantile((1.0 + level) / 2.0) * error
    note = "delta method: asymptotic, needs a finite variance of the weights"
    return Estimate(value, torch.stack([value - half, value + half]), level, "unbiased_Z", error, n, note)


def log_mean_sweeps(log_z: Tensor, level: float = 0.95) -> Estimate:
    """log Ẑ = log of the mean of S independent unbiased estimates of Z, with Student's t for their small number.

    log Ẑ ± t_{S−1}·s by the delta method, s as in `log_mean_weight`. The error is that of the spread between the
    estimates, whatever each of them says about itself; nan for S = 1 and where all are equal, as the note says.

    Parameters
    ----------
    log_z : Tensor (S,)
        log Ẑ_s in nats; −inf is an estimate like any other.
    level : float
        Nominal coverage.

    Returns
    -------
    Estimate
        `value` (), kind "unbiased_Z", S replicates.
    """
    estimate = log_mean_weight(log_z, level)
    assert estimate.standard_error is not None
    if not math.isfinite(float(estimate.standard_error)):
        note = estimate.note.replace("weights are", "sweeps are").replace("one draw", "one sweep")
        return replace(estimate, note=note)
    from scipy import stats  # imports much, and changes warning filters

    half = float(stats.t.ppf((1.0 + level) / 2.0, len(log_z) - 1)) * estimate.standard_error
    interval = torch.stack([estimate.value - half, estimate.value + half])
    note = f"delta method over {len(log_z)} independent sweeps, Student's t: sees no mass that every sweep missed"
    return replace(estimate, interval=interval, note=note)


def mean_of_logs(log_z: Sequence[Tensor], kind: EstimateKind, note: str = "", level: float = 0.95) -> Estimate:
    """(C,) means of log Ẑ over independent runs, with Student's t intervals for E log Ẑ, which bounds log Z.

    From below where E Ẑ = Z, from above where each run retains an exact draw. nan where a context has one run only, or
    a run with Ẑ = 0, whose log is −inf and bounds nothing, as the note then says.

    Parameters
    ----------
    log_z : sequence of Tensor (S_c,)
        log Ẑ of the runs of each context, in nats.
    kind : {"lower_bound", "upper_bound"}
    note : str
        What the runs are.
    level : float
        Nominal coverage.
    """
    from scipy import stats  # imports much, and changes warning filters

    if not 0.0 < level < 1.0:
        raise ModelError(f"mean_of_logs: got level={level}, expected a coverage between 0 and 1")
    means = torch.stack([v.mean() for v in log_z])
    errors, intervals = [], []
    for v, mean in zip(log_z, means, strict=True):
        count = len(v)
        known = count > 1 and math.isfinite(float(mean))
        error = v.std() / math.sqrt(count) if known else v.new_tensor(math.nan)
        half = float(stats.t.ppf((1.0 + level) / 2.0, count - 1)) * error if known else error
        errors.append(error)
        intervals.append(torch.stack([mean - half, mean + half]))
    if bool((means == -math.inf).any()):
        note += "; some sweep has Ẑ = 0, so that its log is −inf and bounds nothing: use more particles"
    replicates = min(len(v) for v in log_z)
    return Estimate(means, torch.stack(intervals), level, kind, torch.stack(errors), replicates, note)


def log_mean_weight_bounded(log_weights: Tensor, log_bound: float, level: float = 0.95) -> Estimate:
    """log Ẑ from weights 0 ≤ w ≤ M with the empirical Bernstein interval, which holds at every N.

    The lower end is −inf where the data cannot exclude Z = 0. Needs a bound that is known, not the largest weight
    seen.

    Parameters
    ----------
    log_weights : Tensor (N,)
        log w of N ≥ 2 independent draws, in nats.
    log_bound : float
        log M ≥ sup log w, in nats.
    level : float
        Coverage.

    Returns
    -------
    Estimate
        `value` (), kind "unbiased_Z"; the standard error is that of `log_mean_weight`.

    Raises
    ------
    ModelError
        Where a weight lies above the bound.

    References
    ----------
    maurer2009
    """
    log_w = checked_log_weights(log_weights)
    ends = empirical_bernstein(torch.exp(log_w - log_bound), 0.0, 1.0, level)
    delta = log_mean_weight(log_w, level)
    interval = ends.log().to(log_w.device) + log_bound
    return replace(delta, interval=interval, note="empirical Bernstein: holds at every N for weights between 0 and M")


def log_acceptance(
    accepted: Tensor, tried: Tensor, log_bound: float, *, stopped: Tensor | None = None, level: float = 0.95
) -> Estimate:
    """log Ẑ = log M + log p̂ from k acceptances among N proposals, whose probability is p = Z/M.

    p̂ = k/N where N was fixed. Where sampling stopped at the k-th acceptance (inverse sampling) k/N is too large in
    expectation, and p̂ = (k−1)/(N−1), k ≥ 2, is unbiased; so is the rule that takes whichever applies when sampling
    stops at the k-th acceptance or at a cap, whichever comes first [girshick1946]. For a stop at the first acceptance
    no useful unbiased estimate exists: p̂ = 1/N, for which E log p̂ ≥ log p, so the kind is "upper_bound". The
    interval is Clopper–Pearson's, valid under all these designs (see `clopper_pearson`).

    Parameters
    ----------
    accepted, tried : Tensor (C,), int64
        k and N of each context; N counts up to and including the k-th acceptance where `stopped`.
    log_bound : float
        log M, in nats.
    stopped : Tensor (C,), bool, optional
        True where the k-th acceptance ended the sampling; None means nowhere.
    level : float
        Coverage, at least.

    Returns
    -------
    Estimate
        `value` (C,) in nats, −inf where k = 0; kind "unbiased_Z", or "upper_bound" where a context stopped at its
        first.

    References
    ----------
    clopper1934, girshick1946
    """
    k, n = accepted.double(), tried.double()
    inverse = torch.zeros_like(accepted, dtype=torch.bool) if stopped is None else stopped
    single = inverse & (k == 1)
    curtailed = inverse & (k > 1)
    rate = torch.where(curtailed, (k - 1.0) / torch.where(n > 1, n - 1.0, 1.0), k / n)
    interval = clopper_pearson(accepted, tried, level).to(k.device).log() + log_bound
    error = torch.sqrt((1.0 - rate) / torch.where(k > 0, k, torch.nan))
    note = "Clopper–Pearson: holds at every N"
    if bool(single.any()):
        note += "; a run that stops at its first acceptance overestimates Z (1/N), so ask for two draws or more"
    kind: EstimateKind = "upper_bound" if bool(single.any()) else "unbiased_Z"
    return Estimate(rate.log() + log_bound, interval, level, kind, error, int(n.min()), note)


def stack(estimates: Sequence[Estimate]) -> Estimate:
    """Estimates () of single contexts as one Estimate (C,); notes that differ are listed with their contexts.

    Raises
    ------
    ModelError
        Where there are none, or their kinds or levels differ.
    """
    if not estimates:
        raise ModelError("stack: got no estimates, expected one a context")
    first = estimates[0]
    if any((e.kind, e.level) != (first.kind, first.level) for e in estimates):
        raise ModelError("stack: got estimates of different kind or level, expected one of each")
    notes = dict.fromkeys(e.note for e in estimates)
    if len(notes) > 1:
        where = {note: [c for c, e in enumerate(estimates) if e.note == note] for note in notes}
        note = "; ".join(f"contexts {', '.join(map(str, cs))}: {text}" for text, cs in where.items() if text)
    else:
        note = first.note
    intervals = [e.interval for e in estimates if e.interval is not None]
    errors = [e.standard_error for e in estimates if e.standard_error is not None]
    return Estimate(
        torch.stack([e.value for e in estimates]),
        torch.stack(intervals) if len(intervals) == len(estimates) else None,
        first.level,
        first.kind,
        torch.stack(errors) if len(errors) == len(estimates) else None,
        min(e.replicates for e in estimates),
        note,
    )


def normal_quantile(probability: float) -> float:
    """Φ⁻¹(probability)."""
    return NormalDist().inv_cdf(probability)
