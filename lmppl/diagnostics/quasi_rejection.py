"""Quasi-rejection's trade-off: how often draws of q are accepted at a bound M_q, and how far their law is from π*.

A draw of q is accepted with probability min(1, w/M_q), w = γ/q, so that accepted draws have the law ∝ min(γ, M_q q)
[eikema2022]. Everything here is arithmetic on log w.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lmppl.diagnostics.weights import checked_log_weights
from lmppl.errors import InfeasibleModel, ModelError, ShapeError
from lmppl.sequences import Estimate, EstimateKind

__all__ = ["QuasiRejectionCurve", "log_bound_of_acceptance", "log_quasi_acceptance", "quasi_rejection_curve"]

DISTANCES = ("total_variation", "total_variation_bound", "kl", "reverse_kl")


def log_quasi_acceptance(log_weights: Tensor, log_bound: Tensor | float) -> Tensor:
    """(N,) log Pr(accept x) = min(0, log w(x) − log M_q), w = γ/q, in nats; −inf where γ = 0.

    q(x)·Pr(accept x) = min(γ(x), M_q q(x))/M_q =: γ_q(x)/M_q, so that accepted draws have the law γ_q/Z_q, and
    Pr(accept) = Z_q/M_q.
    """
    return (log_weights.double() - log_bound).clamp_max(0.0)


@dataclass(frozen=True, eq=False)
class QuasiRejectionCurve:
    """The trade-off between acceptance and distance, at K bounds, for one context.

    Each figure is an `Estimate` of shape (K,) with a standard error: of the law γ_q/Z_q, γ_q = min(γ, M_q q).

    Parameters
    ----------
    log_bound : Tensor (K,)
        log M_q, in nats.
    acceptance : Estimate
        Z_q/M_q.
    total_variation : Estimate
        TV(law, π*).
    total_variation_bound : Estimate
        1 − Z_q/Z, which is at least TV(law, π*).
    tail : Estimate
        Pr_π*(γ/q ≥ M_q), which is at least 1 − Z_q/Z.
    kl, reverse_kl : Estimate
        KL(π*‖law) and KL(law‖π*), in nats.
    """

    log_bound: Tensor
    acceptance: Estimate
    total_variation: Estimate
    total_variation_bound: Estimate
    tail: Estimate
    kl: Estimate
    reverse_kl: Estimate

    def __str__(self) -> str:
        columns = {
            "log M_q": self.log_bound,
            "acceptance": self.acceptance.value,
            "TV": self.total_variation.value,
            "± TV": self.total_variation.standard_error,
            "TV ≤": self.total_variation_bound.value,
            "KL(π*‖law)": self.kl.value,
            "KL(law‖π*)": self.reverse_kl.value,
        }
        lines = ["  ".join(f"{name:>10}" for name in columns)]
        for k in range(len(self.log_bound)):
            row = [math.nan if values is None else float(values[k]) for values in columns.values()]
            lines.append("  ".join(f"{value:10.4f}" for value in row))
        return "\n".join(lines)


def quasi_rejection_curve(
    log_weights: Tensor, log_bounds: Tensor, *, log_masses: Tensor | None = None, level: float = 0.95
) -> QuasiRejectionCurve:
    """Acceptance rate and divergences of quasi-rejection at each of K bounds, from one set of draws of q.

    With w = γ/q, w_M = min(w, M_q), Z = E_q[w], Z_q = E_q[w_M]:

        acceptance = Z_q/M_q;   TV(law, π*) = E_q[(w_M/Z_q − w/Z)₊] ≤ 1 − Z_q/Z ≤ Pr_π*(w ≥ M_q);
        KL(π*‖law) = E_π*[(log w − log M_q)₊] − log Z/Z_q;   KL(law‖π*) = log Z/Z_q − E_law[(log w − log M_q)₊].

    Z is estimated from the same draws: mass that none of them reached does not show, and heavy weights that were not
    drawn make every divergence too small. Standard errors are those of the delta method.

    Parameters
    ----------
    log_weights : Tensor (N,)
        log γ − log q of draws of q, in nats; −inf is a weight like any other.
    log_bounds : Tensor (K,)
        log M_q, in nats.
    log_masses : Tensor (N,), optional
        log q of each of N *enumerated* outcomes: the figures are then exact and have no error. None: independent
        draws, of mass 1/N each.
    level : float
        Nominal coverage that the estimates carry.

    Returns
    -------
    QuasiRejectionCurve

    Raises
    ------
    ModelError
        Where every weight is zero, there is no bound, or one is not finite.

    References
    ----------
    eikema2022
    """
    log_w = checked_log_weights(log_weights)
    bounds = torch.as_tensor(log_bounds, dtype=torch.float64, device=log_w.device)
    if bounds.dim() != 1 or len(bounds) == 0 or not bool(torch.isfinite(bounds).all()):
        raise ModelError(
            f"quasi_rejection_curve: got log_bounds {log_bounds!r}, expected finite numbers of shape (K,), K ≥ 1"
        )
    if log_masses is not None and log_masses.shape != log_w.shape:
        got = tuple(log_masses.shape)
        raise ShapeError(f"quasi_rejection_curve: got log_masses of shape {got}, expected {tuple(log_w.shape)}")
    n = len(log_w)
    mass = torch.full_like(log_w, 1.0 / n) if log_masses is None else log_masses.double().exp()
    log_z = torch.logsumexp(log_w + mass.log(), 0)
    if float(log_z) == -math.inf:
        raise ModelError(f"quasi_rejection_curve: all {n} weights are zero, so that there is nothing to accept")
    figures: dict[str, list[tuple[Tensor, Tensor]]] = {
        name: [] for name in ("acceptance", *DISTANCES, "tail")
    }  # value and influence (N,) of each
    star = torch.exp(log_w - log_z)  # w/Z, of mean 1
    for bound in bounds:
        capped = torch.minimum(log_w, bound)
        log_zq = torch.logsumexp(capped + mass.log(), 0)
        law = torch.exp(capped - log_zq)  # w_M/Z_q, of mean 1
        excess = (log_w - bound).clamp_min(0.0)
        acceptance = torch.exp(capped - bound)
        gain = law - star
        higher = gain > 0
        above = (log_w >= bound).double()
        total_variation = (mass * gain.clamp_min(0.0)).sum()
        slope_law, slope_star = (mass * higher * law).sum(), (mass * higher * star).sum()
        retained = torch.exp(log_zq - log_z)
        mean_star, mean_law = (mass * star * excess).sum(), (mass * law * excess).sum()
        tail = (mass * star * above).sum()
        rate = (mass * acceptance).sum()
        figures["acceptance"].append((rate, acceptance - rate))
        figures["total_variation"].append(
            (
                total_variation,
                gain.clamp_min(0.0) - total_variation - slope_law * (law - 1.0) + slope_star * (star - 1.0),
            )
        )
        figures["total_variation_bound"].append(((1.0 - retained).clamp_min(0.0), retained * (star - law)))
        figures["tail"].append((tail, star * (above - tail)))
        figures["kl"].append((mean_star + log_zq - log_z, star * (excess - mean_star) + law - star))
        figures["reverse_kl"].append((log_z - log_zq - mean_law, star - law - law * (excess - mean_law)))
    made = {}
    for name, found in figures.items():
        value = torch.stack([v for v, _ in found])
        if log_masses is not None:
            made[name] = Estimate(value, torch.stack([value, value], -1), 1.0, "exact", torch.zeros_like(value), n)
            continue
        kind: EstimateKind = "unbiased" if name == "acceptance" else "consistent"
        error = torch.stack([i.std() if n > 1 else i.new_tensor(math.nan) for _, i in found]) / math.sqrt(n)
        made[name] = Estimate(value, None, level, kind, error, n, "delta method; blind to mass that no draw reached")
    return QuasiRejectionCurve(bounds, **made)


def log_bound_of_acceptance(log_weights: Tensor, rate: float) -> float:
    """log M_q at which the draws' mean acceptance min(1, w/M_q) is `rate`, in nats.

    Exact for the given draws: with the m heaviest above M_q, (m + Σ_{others} w/M_q)/N = rate.

    Parameters
    ----------
    log_weights : Tensor (N,)
        log γ − log q of draws of q, in nats.
    rate : float
        In (0, 1).

    Raises
    ------
    InfeasibleModel
        Where no bound reaches the rate, because fewer draws than that have γ > 0.
    """
    log_w = torch.sort(checked_log_weights(log_weights), descending=True).values
    n = len(log_w)
    positive = int((log_w > -math.inf).sum())
    if positive < rate * n:
        raise InfeasibleModel(
            f"an acceptance rate of {rate:g} is out of reach: {positive:,} of {n:,} proposals have γ > 0"
        )
    log_w = log_w[:positive]
    # rest[m] = log Σ_{i ≥ m} w_i, of the weights that stay below the bound when m lie above it
    rest = torch.flip(torch.logcumsumexp(torch.flip(log_w, [0]), 0), [0])
    above = torch.arange(positive, dtype=torch.float64, device=log_w.device)
    at_weight = above + torch.exp(rest - log_w)  # N times the rate with M_q = w_m: it grows with m
    enough = torch.nonzero(at_weight >= rate * n).squeeze(1)
    if len(enough) == 0:  # every draw with γ > 0 is to be accepted
        return float(log_w[-1])
    m = int(enough[0])
    return float(rest[m]) - math.log(rate * n - m)
