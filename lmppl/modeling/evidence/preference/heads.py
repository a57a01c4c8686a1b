"""The linear head of a reward model: its parameters, its log joint density with the pairs, and both derivatives.

r(x) = wᵀf(x). Annotator j has the head w + δ_j. With Δ = f(chosen) − f(rejected), u = (w + δ_j)ᵀΔ and
θ = (w, δ_1, …, δ_J, η), of which η = log ν is there where there are ties:

log p(y, θ) = Σ_n log P(y_n | u_n, η) + log N(w; 0, σ²I) + Σ_j log N(δ_j; 0, τ²I) + log N(η; 0, 1.5²)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lmppl.modeling.evidence.preference.likelihood import Derivatives, derivatives, log_said

__all__ = ["TIE_SCALE", "Curvature", "HeadProblem", "Scales"]

TIE_SCALE = 1.5  # of η: at u = 0 a tie then has prior probability 0.03 to 0.91, with probability 0.95


class Scales(NamedTuple):
    """Standard deviations of the prior: σ of each weight, τ of each annotator's deviation from it."""

    weights: float
    annotators: float


class Curvature(NamedTuple):
    """−log p(y, θ) with its gradient (P,) and Hessian (P, P)."""

    value: Tensor
    gradient: Tensor
    hessian: Tensor


@dataclass(frozen=True, eq=False)
class HeadProblem:
    """What a head is fitted to.

    Parameters
    ----------
    delta : Tensor (N, D)
        f(chosen) − f(rejected).
    tie : Tensor (N,)
    annotator : Tensor (N,)
        Index from 0; not read where `num_annotators` is 0.
    num_annotators : int
        J; 0 for one population.
    noise : float
        ε.
    """

    delta: Tensor
    tie: Tensor
    annotator: Tensor
    num_annotators: int
    noise: float

    @property
    def dim(self) -> int:
        """D."""
        return self.delta.shape[1]

    @property
    def has_ties(self) -> bool:
        """Whether η is a parameter."""
        return bool(self.tie.any())

    @property
    def num_parameters(self) -> int:
        """P."""
        return self.dim * (1 + self.num_annotators) + self.has_ties

    def log_likelihood(self, weights: Tensor, deviations: Tensor | None, eta: Tensor | None) -> Tensor:
        """(...) Σ_n log P(y_n), in nats, of weights (..., D), deviations (..., J, D) and η (...)."""
        tie = self.tie
        if deviations is None:
            u = weights @ self.delta.T
        else:
            heads = weights[..., None, :] + deviations
            u = torch.cat([heads[..., j, :] @ delta.T for j, delta in enumerate(self._deltas)], -1)
            tie = self._ties
        return log_said(u, None if eta is None else eta[..., None], tie, self.noise).sum(-1)

    def precision(self, scales: Scales) -> Tensor:
        """(P,) of the prior."""
        parts = [torch.full((self.dim,), scales.weights**-2.0, dtype=torch.float64)]
        parts.append(torch.full((self.dim * self.num_annotators,), scales.annotators**-2.0, dtype=torch.float64))
        parts.append(torch.full((int(self.has_ties),), TIE_SCALE**-2.0, dtype=torch.float64))
        return torch.cat(parts)

    def log_joint(self, theta: Tensor, scales: Scales) -> Tensor:
        """log p(y, θ), in nats, with every constant: its integral over θ is the evidence p(y | σ, τ)."""
        precision = self.precision(scales)
        log_prior = 0.5 * (precision.log() - math.log(2 * math.pi) - precision * theta**2).sum()
        return self._said(theta).value.sum() + log_prior

    def curvature(self, theta: Tensor, scales: Scales) -> Curvature:
        """The closed forms at θ (P,)."""
        said, precision = self._said(theta), self.precision(scales)
        log_prior = 0.5 * (precision.log() - math.log(2 * math.pi) - precision * theta**2).sum()
        return Curvature(
            value=-(said.value.sum() + log_prior),
            gradient=precision * theta - self._gradient(said),
            hessian=torch.diag(precision) - self._second(said.uu, said),
        )

    def safe_hessian(self, theta: Tensor, scales: Scales) -> Tensor:
        """(P, P) the Hessian without what noise adds: positive at every θ."""
        said = self._said(theta)
        return torch.diag(self.precision(scales)) - self._second(said.concave, said)

    def split(self, theta: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """w (D,), δ (J, D) and η () of θ; None for what there is not."""
        d, j = self.dim, self.num_annotators
        deviations = theta[d : d * (1 + j)].view(j, d) if j else None
        return theta[:d], deviations, theta[-1] if self.has_ties else None

    def _said(self, theta: Tensor) -> Derivatives:
        weights, deviations, eta = self.split(theta)
        head = weights if deviations is None else weights + deviations[self.annotator]
        return derivatives((self.delta * head).sum(1), eta, self.tie, self.noise)

    @cached_property
    def _rows(self) -> list[Tensor]:
        """The pairs of each annotator; of all, where they are one population."""
        if not self.num_annotators:
            return [torch.arange(len(self.delta))]
        return [torch.nonzero(self.annotator == j)[:, 0] for j in range(self.num_annotators)]

    @cached_property
    def _deltas(self) -> list[Tensor]:
        return [self.delta[rows] for rows in self._rows]

    @cached_property
    def _ties(self) -> Tensor:
        return self.tie[torch.cat(self._rows)]

    def _gradient(self, said: Derivatives) -> Tensor:
        pulls = said.u[:, None] * self.delta
        parts = [pulls.sum(0)]
        if self.num_annotators:
            parts += [pulls[rows].sum(0) for rows in self._rows]
        if self.has_ties:
            parts.append(said.eta.sum()[None])
        return torch.cat(parts)

    def _second(self, uu: Tensor, said: Derivatives) -> Tensor:
        """(P, P) second derivatives of the log-likelihood, with `uu` as those by u."""
        d, size = self.dim, self.num_parameters
        second = torch.zeros(size, size, dtype=torch.float64)
        for j, (rows, delta) in enumerate(zip(self._rows, self._deltas, strict=True)):
            block = delta.T @ (uu[rows, None] * delta)
            cross = (said.ue[rows, None] * delta).sum(0)
            places = [slice(0, d)]
            if self.num_annotators:
                places.append(slice(d * (1 + j), d * (2 + j)))
            for one in places:
                for other in places:
                    second[one, other] += block
                if self.has_ties:
                    second[one, -1] += cross
                    second[-1, one] += cross
        if self.has_ties:
            second[-1, -1] += said.ee.sum()
        return second
