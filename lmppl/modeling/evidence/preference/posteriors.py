"""Posteriors over the head of a reward model: a Gaussian, or draws; what they believe of rewards and predict of pairs.

The belief is about the population's reward r(x) = wᵀf(x). What a choice will be is predicted by averaging P(y | u) over
the posterior, and, for an annotator who is not known, over δ ~ N(0, τ²I).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from lmppl.modeling.evidence.logistic_normal import log_mean_sigmoid
from lmppl.modeling.evidence.preference.likelihood import flipped, log_outcomes

__all__ = ["DrawnHead", "GaussianHead", "HeadDraws", "HeadPosterior"]

NODES_TIE = 24  # of Gauss and Hermite, over η: its posterior is narrower than its prior
TAIL = 9.0  # standard deviations after which nothing is left
STEP = 0.74  # of the trapezium rule, whose error is about e^{−2π²/STEP²} = e^{−36}
CHUNK = 256  # pairs at a time
CELLS = 500_000  # pairs × nodes at a time, with ties


class HeadDraws(NamedTuple):
    """M draws of a head's parameters.

    Parameters
    ----------
    weights : Tensor (M, D)
        w.
    deviations : Tensor (M, J, D), optional
        δ of the known annotators.
    unknown : Tensor (M, D), optional
        δ of an annotator who is not known, from N(0, τ²I) at the draw's own τ.
    eta : Tensor (M,), optional
        log ν.
    """

    weights: Tensor
    deviations: Tensor | None = None
    unknown: Tensor | None = None
    eta: Tensor | None = None

    def select(self, index: Tensor) -> HeadDraws:
        """The draws `index`."""
        return HeadDraws(*(None if one is None else one[index] for one in self))  # type: ignore[arg-type]

    def advantages(self, delta: Tensor, annotator: Tensor) -> Tensor:
        """(M, N) u of N pairs, each as its annotator sees it; −1 is an annotator who is not known."""
        u = self.weights @ delta.T
        if self.deviations is None or self.unknown is None:
            return u
        everyone = torch.cat([self.deviations, self.unknown[:, None]], 1)
        return u + torch.einsum("mnd,nd->mn", everyone[:, annotator], delta)


class HeadPosterior(Protocol):
    """A law of θ = (w, δ, η) given the pairs."""

    @property
    def noise(self) -> float:
        """ε of the likelihood."""
        ...

    @property
    def mean(self) -> Tensor:
        """(D,) E[w]."""
        ...

    @property
    def covariance(self) -> Tensor:
        """(D, D) of w."""
        ...

    def belief(self, features: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        """Of rewards wᵀf, for features (B, D): means and standard deviations (B,), or members (B, M)."""
        ...

    def log_predictive(self, delta: Tensor, annotator: Tensor) -> Tensor:
        """(N, 3) log P of "first", "second", "tie", averaged over the posterior, in nats."""
        ...

    def draws(self, num_draws: int, generator: torch.Generator) -> HeadDraws:
        """Draws of θ."""
        ...


@dataclass(frozen=True, eq=False)
class GaussianHead:
    """θ ~ N(θ̂, Σ), so that r(x) ~ N(ŵᵀf, fᵀΣ_ww f).

    Parameters
    ----------
    location : Tensor (P,)
        θ̂ = (w, δ_1, …, δ_J, η).
    spread : Tensor (P, P)
        Σ.
    dim : int
        D.
    num_annotators : int
        J.
    annotator_scale : float
        τ, at its most probable value; not read where J = 0.
    noise : float
    """

    location: Tensor
    spread: Tensor
    dim: int
    num_annotators: int
    annotator_scale: float
    noise: float

    @property
    def mean(self) -> Tensor:
        """(D,) ŵ."""
        return self.location[: self.dim]

    @property
    def covariance(self) -> Tensor:
        """(D, D) Σ_ww."""
        return self.spread[: self.dim, : self.dim]

    @property
    def has_ties(self) -> bool:
        """Whether η is a parameter."""
        return len(self.location) > self.dim * (1 + self.num_annotators)

    def belief(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Means and standard deviations (B,) of rewards."""
        factor = torch.linalg.cholesky(self.covariance)
        return features @ self.mean, (features @ factor).norm(dim=1)

    def log_predictive(self, delta: Tensor, annotator: Tensor) -> Tensor:
        """(N, 3) log P of each outcome: by quadrature over u, or over (u, η) where there are ties.

        E σ(u) is right to about 1e-12 of its value; with ties the error is that of 24 nodes over η, about 1e-10 of it
        for a standard deviation of 1 and 1e-7 for 1.5, that of the prior.
        """
        mean, variance, with_eta = self._advantages(delta, annotator)
        deviation = variance.sqrt()
        if not self.has_ties:
            first, second = log_mean_sigmoid(mean, deviation), log_mean_sigmoid(-mean, deviation)
            if self.noise:
                first, second = flipped(first, second, self.noise)
            return torch.stack([first, second, torch.full_like(first, -math.inf)], -1)
        eta, eta_variance = self.location[-1], self.spread[-1, -1]
        slope = torch.where(variance > 0, with_eta / variance, 0.0)  # u of two equal texts is 0 for sure
        rest = (eta_variance - with_eta * slope).clamp_min(0.0).sqrt()  # rounding alone makes it negative
        (x, log_x), (z, log_z) = _trapezium(mean, deviation), _hermite(NODES_TIE)
        found = []
        for rows in torch.arange(len(mean)).split(max(1, CELLS // (len(x) * len(z)))):
            away = deviation[rows, None] * x
            etas = (eta + slope[rows, None] * away)[..., None] + rest[rows, None, None] * z
            log_p = log_outcomes((mean[rows, None] + away)[..., None], etas, self.noise)
            found.append((log_p + log_x[:, None, None] + log_z[:, None]).logsumexp((1, 2)))
        return torch.cat(found)

    def draws(self, num_draws: int, generator: torch.Generator) -> HeadDraws:
        """Draws of N(θ̂, Σ)."""
        noise = torch.randn(num_draws, len(self.location), dtype=torch.float64, generator=generator)
        theta = self.location + noise @ torch.linalg.cholesky(self.spread).T
        d, j = self.dim, self.num_annotators
        new = torch.randn(num_draws, d, dtype=torch.float64, generator=generator) * self.annotator_scale
        return HeadDraws(
            weights=theta[:, :d],
            deviations=theta[:, d : d * (1 + j)].view(num_draws, j, d) if j else None,
            unknown=new if j else None,
            eta=theta[:, -1] if self.has_ties else None,
        )

    def _advantages(self, delta: Tensor, annotator: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N,) mean and variance of u, and its covariance with η."""
        d = self.dim
        mean, variance, with_eta = (torch.zeros(len(delta), dtype=torch.float64) for _ in range(3))
        for j in sorted(set(annotator.tolist())):
            rows, part = torch.nonzero(annotator == j)[:, 0], delta[annotator == j]
            places = [slice(0, d)]
            if self.num_annotators and j >= 0:
                places.append(slice(d * (1 + j), d * (2 + j)))
            head = torch.stack([self.location[one] for one in places]).sum(0)
            spread = torch.stack([self.spread[one, other] for one in places for other in places]).sum(0)
            if self.num_annotators and j < 0:
                spread = spread + self.annotator_scale**2 * torch.eye(d, dtype=torch.float64)
            mean[rows] = part @ head
            variance[rows] = ((part @ spread) * part).sum(1)
            if self.has_ties:
                with_eta[rows] = part @ torch.stack([self.spread[one, -1] for one in places]).sum(0)
        return mean, variance, with_eta


@dataclass(frozen=True, eq=False)
class DrawnHead:
    """θ by M draws, equally likely: r(x) has the members w_mᵀf.

    Parameters
    ----------
    sample : HeadDraws
        M ≥ 2 draws.
    noise : float
    """

    sample: HeadDraws
    noise: float

    @property
    def mean(self) -> Tensor:
        """(D,) mean of the draws."""
        return self.sample.weights.mean(0)

    @property
    def covariance(self) -> Tensor:
        """(D, D) of the draws, divisor M − 1."""
        return torch.cov(self.sample.weights.T).reshape(len(self.mean), -1)

    def belief(self, features: Tensor) -> Tensor:
        """Members (B, M)."""
        return features @ self.sample.weights.T

    def log_predictive(self, delta: Tensor, annotator: Tensor) -> Tensor:
        """(N, 3) log P of each outcome, averaged over the draws."""
        eta = self.sample.eta
        found = []
        for rows in torch.arange(len(delta)).split(CHUNK):
            u = self.sample.advantages(delta[rows], annotator[rows])
            log_p = log_outcomes(u, None if eta is None else eta[:, None], self.noise)
            found.append(log_p.logsumexp(0) - math.log(len(u)))
        return torch.cat(found)

    def draws(self, num_draws: int, generator: torch.Generator) -> HeadDraws:
        """Of the M draws, `num_draws` in random order; again from the first where there are too few."""
        index = torch.randperm(len(self.sample.weights), generator=generator)
        index = index.repeat(-(-num_draws // len(index)))[:num_draws]
        return self.sample.select(index)


def _trapezium(mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes of N(0, 1) and the logarithms of their weights, for outcomes at u = `mean` + `deviation`·z.

    P(outcome | u) has no pole nearer to the real line than ±iπ, so that the error of steps h falls as
    e^{−2π²/(h·deviation)}, and that of the Gaussian as e^{−2π²/h²}. Of their product the peak is at |z| ≤
    min(deviation, |mean|/deviation) ≤ √|mean|.
    """
    step = STEP**2 / max(STEP, float(deviation.max()))
    peak = torch.minimum(deviation, mean.abs().sqrt()).max()
    count = math.ceil((TAIL + float(peak)) / step)
    nodes = step * torch.arange(-count, count + 1, dtype=torch.float64)
    return nodes, -0.5 * nodes**2 + math.log(step) - 0.5 * math.log(2 * math.pi)


def _hermite(count: int) -> tuple[Tensor, Tensor]:
    """Nodes of N(0, 1) and the logarithms of their weights."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return torch.from_numpy(nodes), torch.from_numpy(weights).log() - 0.5 * math.log(2 * math.pi)
