"""The ladder of annealing, λ from 0 to 1: where the next temperature is, and what a given ladder must be."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from lmppl.errors import ModelError

__all__ = ["check_ladder", "conditional_ess", "next_level"]

HALVINGS = 60  # of [λ, 1], to find the next λ: beyond the precision of a float


def conditional_ess(log_weights: Tensor, increments: Tensor) -> Tensor:
    """(G,) (Σ W u)²/Σ W u² in (0, 1], of log increments log u (G, N), W the weights of the living, which sum to 1.

    1 where all living particles have one increment; nan where nothing lives (`zhou2016`).
    """
    living = (log_weights > -math.inf) & (increments > -math.inf)
    log_w = log_weights.masked_fill(~living, -math.inf)
    log_w = log_w - torch.logsumexp(log_w, -1, keepdim=True)
    log_u = increments.masked_fill(~living, 0.0)
    return torch.exp(2.0 * torch.logsumexp(log_w + log_u, -1) - torch.logsumexp(log_w + 2.0 * log_u, -1))


def next_level(log_weights: Tensor, log_phi: Tensor, level: float, ess_target: float) -> float:
    """The largest λ in (`level`, 1] at which every group's conditional ESS is at least `ess_target`, by bisection.

    Parameters
    ----------
    log_weights, log_phi : Tensor (G, N)
        Weights so far, and log φ, in nats.
    level : float
        The present λ.
    ess_target : float
        In (0, 1).
    """

    def enough(new: float) -> bool:
        share = conditional_ess(log_weights, (new - level) * log_phi)
        return bool(((share >= ess_target) | share.isnan()).all())

    if enough(1.0):
        return 1.0
    low, high = level, 1.0
    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if enough(middle) else (low, middle)
    return low if low > level else high


def check_ladder(who: str, ladder: tuple[float, ...]) -> None:
    """Raise `ModelError` where a ladder that is given does not rise from 0 to 1."""
    numbers = isinstance(ladder, tuple | list) and all(type(step) in (int, float) for step in ladder)
    rising = numbers and all(a < b for a, b in itertools.pairwise(ladder))
    if not rising or len(ladder) < 2 or ladder[0] != 0.0 or ladder[-1] != 1.0:
        raise ModelError(f"{who}: got ladder={ladder!r}, expected a tuple of numbers that rise from 0 to 1")
