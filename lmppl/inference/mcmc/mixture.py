"""Mixture: one of several kernels each step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lmppl.errors import ModelError
from lmppl.inference.mcmc.chains import ChainState, Evidence, Kernel, StepInfo
from lmppl.inference.mcmc.kernels import Restart, SuffixResample
from lmppl.lm.randomness import Source
from lmppl.modeling.target import Target, log_evidence

__all__ = ["Mixture"]


@dataclass(frozen=True)
class Mixture(Kernel):
    """One of several kernels each step, by `weights`, the same for all chains: invariant as each of them is.

    Parameters
    ----------
    kernels : tuple of Kernel
        By default `Restart()` and `SuffixResample()`: far moves and near ones.
    weights : tuple of float, optional
        Positive; by default equal.

    References
    ----------
    tierney1994
    """

    kernels: tuple[Kernel, ...] = (Restart(), SuffixResample())
    weights: tuple[float, ...] | None = None

    name: ClassVar[str] = "mixture"

    @property
    def log_weights(self) -> Tensor:
        """(K,) log-probability of each kernel."""
        weights = torch.tensor(self.weights or (1.0,) * len(self.kernels), dtype=torch.float64)
        return (weights / weights.sum()).log()

    def check(self, target: Target) -> None:
        """As `Kernel.check`, for each of the kernels."""
        several = isinstance(self.kernels, tuple | list) and len(self.kernels) > 0
        if not several or not all(isinstance(k, Kernel) for k in self.kernels):
            raise ModelError(f"Mixture: got kernels={self.kernels!r}, expected a tuple of kernels")
        weights = self.weights
        if weights is not None and not (_positive(weights) and len(weights) == len(self.kernels)):
            raise ModelError(f"Mixture: got weights={weights!r}, expected {len(self.kernels)} positive numbers")
        for kernel in self.kernels:
            kernel.check(target)

    def coverage(self, target: Target) -> str:
        """As `Kernel.coverage`: one of the kernels that reaches everything is enough."""
        notes = [kernel.coverage(target) for kernel in self.kernels]
        return notes[0] if all(notes) else ""

    def step(
        self, state: ChainState, source: Source, power: float | Tensor = 1.0, *, evidence: Evidence = log_evidence
    ) -> tuple[ChainState, StepInfo]:
        """As `Kernel.step`."""
        chosen, _ = source.tokens(self.log_weights[None])
        return self.kernels[int(chosen)].step(state, source, power, evidence=evidence)


def _positive(weights: object) -> bool:
    numbers = isinstance(weights, tuple | list) and all(type(w) in (int, float) for w in weights)
    return numbers and all(0 < w < math.inf for w in weights)  # type: ignore[attr-defined]
