"""Exponential tilting: the multipliers λ at which weighted draws have given means, by Newton's method on a convex dual.

min_λ log Σ_i w̄_i e^{λ·f_i} − λ·μ has the gradient E_λ[f] − μ and the Hessian Cov_λ[f]; at its minimum the tilted draws
have the mean μ, and it has one only where μ lies in the relative interior of the hull of the f_i.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lmppl.errors import ModelError

__all__ = ["Tilt", "is_reachable", "tilt"]

NEWTON_STEPS = 200
ARMIJO = 1e-4
HALVINGS = tuple(2.0**-k for k in range(40))
SETTLED, REACHED = 1e-13, 1e-10  # of the gradient, in features of size one
ROUNDING = 1e-15


class Tilt(NamedTuple):
    """Where Newton's method ended.

    `multipliers` (K,), in nats per unit of f; `log_weight` (N,) of the tilted draws, normalised; `log_ratio`
    log Σ w̄ e^{λ·f} and `covariance` (K, K) of f under the tilted weights, their means over groups; `ess` of the tilted
    weights; `complete` whether the means are μ, which they are not where a guard on the effective size came first.
    """

    multipliers: Tensor
    log_weight: Tensor
    log_ratio: Tensor
    covariance: Tensor
    ess: float
    complete: bool


def is_reachable(values: Tensor, target: Tensor, group: Tensor | None = None) -> bool:
    """Whether μ (K,) is in the relative interior of what means of `values` (N, K) reach; of the mean over groups (N,).

    Of one number: whether it is between the ends. Else whether μ is a mean of all distinct values with weights that are
    all positive: a linear programme.
    """
    labels = torch.zeros(len(values), dtype=torch.int64) if group is None else group
    _, labels = torch.unique(labels, return_inverse=True)
    if values.shape[1] == 1:
        rows = [values[labels == g, 0].double() for g in range(int(labels.max()) + 1)]
        low, high = (float(torch.stack(ends).mean()) for ends in zip(*(r.aminmax() for r in rows), strict=True))
        return low < float(target) < high or low == float(target) == high
    return _inside_hull(values.double(), target, labels)


def _inside_hull(values: Tensor, target: Tensor, labels: Tensor) -> bool:
    from scipy.optimize import linprog  # imports much

    distinct = torch.unique(torch.cat([labels[:, None].double(), values], 1), dim=0)
    of, points = distinct[:, 0], distinct[:, 1:]
    groups = of.unique()
    scale = points.abs().amax(0).maximum(target.abs()).clamp_min(1e-300)  # a feature that is 0 everywhere has none
    shares = (of == groups[:, None]).double()  # (G, n), one for each weight of the group
    equations = torch.cat([(points / scale).T / len(groups), shares])
    # Weights p_i = q_i + t/n_g with q ≥ 0 and t as large as possible.
    slack = equations @ (shares / shares.sum(1, keepdim=True)).sum(0)[:, None]
    found = linprog(
        [0.0] * len(points) + [-1.0],
        A_eq=torch.cat([equations, slack], 1).numpy(),
        b_eq=[*(target / scale).tolist(), *[1.0] * len(groups)],
        bounds=[(0, None)] * len(points) + [(0, 1)],
        method="highs",
    )
    return bool(found.status == 0 and found.x[-1] > 1e-9)


def tilt(
    values: Tensor, log_weight: Tensor, target: Tensor, group: Tensor | None = None, *, min_ess: float = 0.0
) -> Tilt:
    """Multipliers at which the weighted mean of `values` is `target`.

    Parameters
    ----------
    values : Tensor (N, K)
        f of each draw.
    log_weight : Tensor (N,)
        log w, in nats; −inf draws do not count.
    target : Tensor (K,)
        μ.
    group : Tensor (N,), int64, optional
        Draws of several laws that share λ: the mean over groups of their tilted means is μ, and min_λ of the mean over
        groups of log Σ w̄ e^{λ·f} − λ·μ gives it. Each group's weights have sum one, whatever λ.
    min_ess : float
        Stop on the way where the effective size (Σ w)²/Σ w² of the tilted weights would fall below it.

    Returns
    -------
    Tilt

    Raises
    ------
    ModelError
        Where no draw has weight.
    """
    inside = log_weight > -torch.inf
    if not bool(inside.any()):
        raise ModelError("tilt: no draw has a positive weight")
    f = values[inside].double()
    labels = torch.zeros(len(f), dtype=torch.int64) if group is None else group[inside]
    dual = _Dual(f - target, log_weight[inside].double(), labels)
    theta = torch.zeros(f.shape[1], dtype=torch.float64)
    value, weights, gradient = dual.at(theta)
    for _ in range(NEWTON_STEPS):
        step = dual.newton_step(weights, gradient)
        descent = float(gradient @ step)
        if float(gradient.abs().max()) < SETTLED or not descent < 0:
            break
        for length in HALVINGS:
            new = dual.at(theta + length * step)
            if float(new[0]) <= float(value) + ARMIJO * length * descent + ROUNDING and _ess(new[1]) >= min_ess:
                break
        else:  # the guard, or rounding, allows no step
            break
        theta = theta + length * step
        value, weights, gradient = new
    complete = float(gradient.abs().max()) < REACHED
    whole = torch.full_like(log_weight, -torch.inf, dtype=torch.float64)
    whole[inside] = weights
    multipliers, covariance = theta / dual.scale, dual.covariance(weights) * torch.outer(dual.scale, dual.scale)
    return Tilt(multipliers, whole, value + multipliers @ target, covariance, _ess(weights), complete)


class _Dual:
    """λ ↦ the mean over groups of log Σ w̄ e^{λ·(f − μ)}, in multipliers θ of features that are scaled to size one.

    Parameters
    ----------
    away : Tensor (N, K)
        f − μ.
    log_weight : Tensor (N,)
        Finite.
    group : Tensor (N,), int64
    """

    def __init__(self, away: Tensor, log_weight: Tensor, group: Tensor) -> None:
        self.scale = away.abs().amax(0).clamp_min(1e-300)  # a feature that is μ everywhere has none
        self.away = away / self.scale
        _, self.group = torch.unique(group, return_inverse=True)
        self.rows = [torch.nonzero(self.group == g).squeeze(1) for g in range(int(self.group.max()) + 1)]
        self.log_weight = log_weight - self._log_sums(log_weight)[self.group]

    def at(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The value, the tilted log-weights (N,), of sum 1/G in each group, and the gradient (K,)."""
        tilted = self.log_weight + self.away @ theta
        sums = self._log_sums(tilted)
        weights = tilted - sums[self.group] - math.log(len(self.rows))
        return sums.mean(), weights, weights.exp() @ self.away

    def covariance(self, log_weight: Tensor) -> Tensor:
        """(K, K) the mean over groups of Cov[f/scale], the Hessian."""
        total = self.away.new_zeros(self.away.shape[1], self.away.shape[1])
        for rows in self.rows:
            p, x = log_weight[rows].exp(), self.away[rows]
            centred = x - (p @ x) / p.sum()
            total += centred.T @ (p[:, None] * centred)
        return total

    def newton_step(self, log_weight: Tensor, gradient: Tensor) -> Tensor:
        """(K,) −Hessian⁻¹ gradient; the shortest where features depend on each other."""
        found: Tensor = torch.linalg.lstsq(self.covariance(log_weight), gradient[:, None], driver="gelsd").solution
        return -found[:, 0]

    def _log_sums(self, log_weight: Tensor) -> Tensor:
        return torch.stack([log_weight[rows].logsumexp(0) for rows in self.rows])


def _ess(log_weight: Tensor) -> float:
    return float(torch.exp(2 * log_weight.logsumexp(0) - (2 * log_weight).logsumexp(0)))
