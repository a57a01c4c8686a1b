"""What a person says of two texts whose rewards differ by u: one is better, or there is a tie; in closed form.

Davidson's model, with a share ε of choices that are the wrong way round:

P(a ≻ b | u) = (1−ε) e^{u/2}/Z + ε e^{−u/2}/Z,   P(tie | u) = ν/Z,   Z = e^{u/2} + e^{−u/2} + ν

Without ties (ν = 0) and noise (ε = 0) it is the model of Bradley and Terry, P(a ≻ b) = σ(u).
"""

from __future__ import annotations

import math
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = ["Derivatives", "derivatives", "flipped", "log_outcomes", "log_said"]


class Derivatives(NamedTuple):
    """Derivatives of log P(outcome) by u and by η = log ν, one for each pair, in nats.

    Parameters
    ----------
    value : Tensor (N,)
        log P of what was said.
    u, eta : Tensor (N,)
        First derivatives; `eta` is 0 without ties.
    uu, ue, ee : Tensor (N,)
        Second derivatives.
    concave : Tensor (N,)
        The part of `uu` that is negative whatever u: all of it without noise.
    """

    value: Tensor
    u: Tensor
    eta: Tensor
    uu: Tensor
    ue: Tensor
    ee: Tensor
    concave: Tensor


def log_outcomes(u: Tensor, eta: Tensor | None, noise: float) -> Tensor:
    """(..., 3) log P of "a is better", "b is better" and "tie", in nats; −inf for ties where `eta` is None.

    Parameters
    ----------
    u : Tensor (...)
        r(a) − r(b).
    eta : Tensor, optional
        log ν, broadcast with u.
    noise : float
        ε.
    """
    if eta is None:
        first, second, tie = logsigmoid(u), logsigmoid(-u), torch.full_like(u, -inf)
    else:
        u, eta = torch.broadcast_tensors(u, eta)
        total = torch.stack([u / 2, -u / 2, eta]).logsumexp(0)
        first, second, tie = u / 2 - total, -u / 2 - total, eta - total
    if noise:
        first, second = flipped(first, second, noise)
    return torch.stack([first, second, tie], -1)


def log_said(u: Tensor, eta: Tensor | None, tie: Tensor, noise: float) -> Tensor:
    """(..., N) log P that the first text was called better, or that there was a tie where `tie`; in nats.

    Its graph is small: samplers differentiate it at every step.
    """
    first = logsigmoid(u)
    if noise:
        first, _ = flipped(first, logsigmoid(-u), noise)
    if eta is None:
        return first
    both = torch.logaddexp(u / 2, -u / 2)
    return torch.where(tie, logsigmoid(eta - both), first + logsigmoid(both - eta))


def flipped(first: Tensor, second: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """log P of the two choices when a share `noise` > 0 of them is the wrong way round."""
    right, wrong = math.log1p(-noise), math.log(noise)
    return torch.logaddexp(right + first, wrong + second), torch.logaddexp(right + second, wrong + first)


def derivatives(u: Tensor, eta: Tensor | None, tie: Tensor, noise: float) -> Derivatives:
    """Value and derivatives of log P that the first text was called better, or that there was a tie where `tie`.

    log P(a ≻ b) = A(u) − log Z with A' = κ − ½ and A'' = κ(1−κ), κ = σ(u + logit(1−ε)); log Z has the gradient
    (½(p_a − p_b), p_t), with p of no noise, and the covariance of (±½ or 0, 1[tie]) as its Hessian.
    """
    log_p = log_outcomes(u, eta, 0.0)
    p_first, p_second, p_tie = log_p.exp().unbind(-1)
    mean = (p_first - p_second) / 2
    kappa = torch.sigmoid(u + math.log1p(-noise) - math.log(noise)) if noise else torch.ones_like(u)
    said = log_outcomes(u, eta, noise)
    decided = (~tie).to(u.dtype)
    concave = mean**2 - (p_first + p_second) / 4
    return Derivatives(
        value=torch.where(tie, said[..., 2], said[..., 0]),
        u=decided * (kappa - 0.5) - mean,
        eta=tie.to(u.dtype) - p_tie,
        uu=concave + decided * kappa * (1 - kappa),
        ue=mean * p_tie,
        ee=-p_tie * (1 - p_tie),
        concave=concave,
    )
