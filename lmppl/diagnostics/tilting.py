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

    It is if μ is a mean of all distinct values with weights that are all positive: a linear programme.
    """
    from scipy.optimize import linprog  # imports much

    labels = torch.zeros(len(values), dtype=torch.float64) if group is None else group.double()
    points = torch.unique(torch.cat([labels[:, None], values.double()], 1), dim=0)
    labels, points = points[:, 0], points[:, 1:]
    groups = labels.unique()
    scale = points.abs().amax(0).maximum(target.abs()).clamp_min(1e-300)
    shares = (labels == groups[:, None]).double()  # (G, n), one for each weight of the group
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
    f, log_w = values[inside].double(), log_weight[inside].double()
    labels = torch.zeros(len(f), dtype=torch.int64) if group is None else group[inside]
    _, labels = torch.unique(labels, return_inverse=True)
    groups = [torch.nonzero(labels == g).squeeze(1) for g in range(int(labels.max()) + 1)]
    away = f - target
    scale = away.abs().amax(0).clamp_min(1e-300)
    away = away / scale  # multipliers of features of any unit

    def normalised(log_weight: Tensor) -> tuple[Tensor, Tensor]:
        """The mean over groups of log Σ w, and the weights with sum 1/G in each group."""
        sums = torch.stack([log_weight[rows].logsumexp(0) for rows in groups])
        return sums.mean(), log_weight - sums[labels] - math.log(len(groups))

    def at(theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value, weights = normalised(log_w + away @ theta)
        return value, weights, weights.exp() @ away

    def spread(weights: Tensor, x: Tensor) -> Tensor:
        """The mean over groups of Cov[x]."""
        total = x.new_zeros(x.shape[1], x.shape[1])
        for rows in groups:
            p = weights[rows].exp()
            centred = x[rows] - (p @ x[rows]) / p.sum()
            total += centred.T @ (p[:, None] * centred)
        return total

    _, log_w = normalised(log_w)
    log_w = log_w + math.log(len(groups))
    theta = torch.zeros(f.shape[1], dtype=torch.float64)
    value, weights, gradient = at(theta)
    complete = False
    for _ in range(NEWTON_STEPS):
        complete = float(gradient.abs().max()) < 1e-13
        if complete:
            break
        step = -torch.linalg.lstsq(spread(weights, away), gradient[:, None], driver="gelsd").solution[:, 0]
        length, descent = 1.0, float(gradient @ step)
        if not descent < 0:
            break
        while True:
            new = at(theta + length * step)
            enough = float(new[0]) <= float(value) + ARMIJO * length * descent + 1e-15
            if enough and _ess(new[1]) >= min_ess:
                break
            length /= 2
            if length < 2**-40:
                break
        if length < 2**-40:
            break
        theta = theta + length * step
        value, weights, gradient = new
    complete = float(gradient.abs().max()) < 1e-10
    whole = torch.full_like(log_weight, -torch.inf, dtype=torch.float64)
    whole[inside] = weights
    multipliers = theta / scale
    return Tilt(multipliers, whole, value + multipliers @ target, spread(weights, f), _ess(weights), complete)


def _ess(log_weight: Tensor) -> float:
    return float(torch.exp(2 * log_weight.logsumexp(0) - (2 * log_weight).logsumexp(0)))
