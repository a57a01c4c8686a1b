"""The heads of a distribution of preference: the law of r(x) from features, what pairs say of it, and the fit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Categorical, constraints
from torch.nn.functional import log_softmax

from lmppl.errors import ModelError

__all__ = ["Levels", "PreferenceHeads", "fit_heads", "log_first"]

LOG_SPREAD = -0.5 * math.log(2)  # of a text with features of nought: two such differ with variance 1


class Levels(Categorical):
    """A law on the levels 0, …, K−1, with the mean and the variance of the level."""

    arg_constraints = {"logits": constraints.independent(constraints.real, 1)}  # noqa: RUF012 - torch's own form

    @property
    def mean(self) -> Tensor:
        """(B,) Σ_k k·p_k."""
        return (self.probs * self._levels).sum(-1)

    @property
    def variance(self) -> Tensor:
        """(B,) Σ_k (k − mean)²·p_k."""
        return (self.probs * (self._levels - self.mean[..., None]) ** 2).sum(-1)

    @property
    def _levels(self) -> Tensor:
        return torch.arange(self._num_events, dtype=self.probs.dtype, device=self.probs.device)


@dataclass(frozen=True, eq=False)
class PreferenceHeads:
    """The heads of a distribution of preference.

    Parameters
    ----------
    kind : {"normal", "categorical"}
    weights : Tensor (D, 2) or (D, K)
        Of mean and log-spread; of the logits of K levels.
    bias : Tensor (2,) or (K,)
        Fixed at (0, −½ log 2) for "normal".
    """

    kind: Literal["normal", "categorical"]
    weights: Tensor
    bias: Tensor

    def outputs(self, features: Tensor) -> Tensor:
        """(B, 2) or (B, K) of features (B, D)."""
        return features @ self.weights + self.bias

    def belief(self, features: Tensor) -> tuple[Tensor, Tensor] | Levels:
        """The laws of r of B texts."""
        outputs = self.outputs(features)
        if self.kind == "normal":
            return outputs[:, 0], outputs[:, 1].exp()
        return Levels(logits=outputs)

    def log_first(self, first: Tensor, second: Tensor) -> Tensor:
        """(N,) log P(r(a) > r(b)) + ½ P(r(a) = r(b)) as one logarithm, of features (N, D) of both sides."""
        return log_first(self.kind, self.outputs(first), self.outputs(second))


def log_first(kind: str, first: Tensor, second: Tensor) -> Tensor:
    """(N,) log P(a ≻ b), in nats, of the heads' outputs for both sides, when each is liked by a person of its own.

    Normal: Φ((μ_a − μ_b)/√(σ_a² + σ_b²)). Categorical: Σ_ij p_a(i) p_b(j) (1[i > j] + ½ 1[i = j]).
    """
    if kind == "normal":
        scale = torch.logaddexp(2 * first[:, 1], 2 * second[:, 1]).mul(0.5).exp()
        normal: Tensor = torch.special.log_ndtr((first[:, 0] - second[:, 0]) / scale)
        return normal
    levels = torch.arange(first.shape[1])
    order = (levels[:, None] - levels).sign().to(first.dtype)
    log_win = ((1 + order) / 2).log()
    pairs = log_softmax(first, -1)[:, :, None] + log_softmax(second, -1)[:, None, :]
    # Impossible orders are left out: −inf among the summands has no gradient.
    possible = log_win > -math.inf
    return (pairs[:, possible] + log_win[possible]).logsumexp(-1)


def fit_heads(
    kind: Literal["normal", "categorical"], width: int, prior_scale: float, first: Tensor, second: Tensor
) -> PreferenceHeads:
    """The heads of greatest posterior density, by L-BFGS from weights of nought.

    Parameters
    ----------
    kind : {"normal", "categorical"}
    width : int
        2, or K.
    prior_scale : float
        Standard deviation of each weight, and of each bias of "categorical".
    first, second : Tensor (N, D)
        Features of the chosen and of the rejected texts.

    Raises
    ------
    ModelError
        Where a gradient above 10⁻³·√(1 + N), in nats a unit of a weight, is left.
    """
    from scipy.optimize import minimize

    size = first.shape[1]
    bias = torch.tensor([0.0, LOG_SPREAD], dtype=torch.float64)

    def heads(theta: Tensor) -> tuple[Tensor, Tensor]:
        weights = theta[: size * width].view(size, width)
        return weights, bias if kind == "normal" else theta[size * width :]

    def loss(at: np.ndarray[Any, Any]) -> tuple[float, np.ndarray[Any, Any]]:
        with torch.enable_grad():
            theta = torch.tensor(at, dtype=torch.float64, requires_grad=True)
            weights, offset = heads(theta)
            said = log_first(kind, first @ weights + offset, second @ weights + offset)
            value = -said.sum() + (theta / prior_scale).square().sum() / 2
            (slope,) = torch.autograd.grad(value, theta)
        return float(value.detach()), slope.numpy()

    start = np.zeros(size * width + (width if kind == "categorical" else 0))
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 2000, "ftol": 1e-14, "gtol": 1e-8})
    largest = float(np.abs(found.jac).max())
    if not largest < 1e-3 * (1 + len(first)) ** 0.5:
        raise ModelError(
            f"PreferenceDistribution: the fit has not converged: a gradient of {largest:.2g} is left; choose a smaller "
            "prior_scale="
        )
    weights, offset = heads(torch.from_numpy(found.x))
    return PreferenceHeads(kind, weights, offset)
