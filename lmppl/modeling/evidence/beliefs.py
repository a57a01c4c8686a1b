"""Beliefs: what is known of an uncertain reward r(x): members of an ensemble, mean and spread, or a distribution.

Attitudes ask a belief for means, for log E[e^{tr}], for quantiles. Each is exact, or refused with the reason; nothing
is approximated by draws that nobody asked for.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.nn.functional import logsigmoid

from lmppl.modeling.evidence import laws
from lmppl.modeling.evidence.logistic_normal import log_mean_sigmoid

__all__ = ["Belief", "Distributed", "Gaussian", "Members"]


class Belief(Protocol):
    """Laws of B rewards, one for each text, in the units of r."""

    @property
    def mean(self) -> Tensor:
        """(B,) m = E[r]."""
        ...

    @property
    def spread(self) -> Tensor:
        """(B,) s, the standard deviation of r."""
        ...

    def log_mgf(self, t: float) -> Tensor:
        """(B,) log E[e^{tr}], in nats; +inf where the tail is too heavy."""
        ...

    def quantile(self, level: float) -> Tensor:
        """(B,) the smallest r that is not exceeded with probability `level`."""
        ...

    def log_mean_sigmoid(self, beta: float) -> Tensor:
        """(B,) log E[σ(r/β)], in nats."""
        ...

    def shifted(self, by: Tensor) -> Belief:
        """The law of r + `by`, of shape (B,), or (B, M) for M members."""
        ...


class Members:
    """M equally likely values for each text: an ensemble, or draws from a posterior over reward models.

    Parameters
    ----------
    values : Tensor (B, M)
        M ≥ 2.

    Notes
    -----
    The spread divides by M − 1; a quantile lies between two members, linearly (type 7 of Hyndman and Fan). Means over
    the members are exact: they are the belief, not a sample of it.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values.double()

    @property
    def mean(self) -> Tensor:
        """(B,) m."""
        return self.values.mean(1)

    @property
    def spread(self) -> Tensor:
        """(B,) s, with divisor M − 1."""
        return self.values.std(1)

    def log_mgf(self, t: float) -> Tensor:
        """(B,) log (1/M) Σ_m e^{t r_m}; about the mean, so that small t lose no digits."""
        centre = self.mean
        away = t * (self.values - centre[:, None])
        small = torch.log1p(torch.expm1(away).mean(1))
        large = away.logsumexp(1) - math.log(self.values.shape[1])
        return t * centre + torch.where(away.abs().amax(1) < 1, small, large)

    def quantile(self, level: float) -> Tensor:
        """(B,) the quantile of the members."""
        return self.values.quantile(level, dim=1)

    def log_mean_sigmoid(self, beta: float) -> Tensor:
        """(B,) log (1/M) Σ_m σ(r_m/β)."""
        return logsigmoid(self.values / beta).logsumexp(1) - math.log(self.values.shape[1])

    def shifted(self, by: Tensor) -> Members:
        """Each member's values plus its own shift (B, M), or one for all (B,)."""
        return Members(self.values + (by if by.dim() == 2 else by[:, None]))


class Gaussian:
    """r ~ N(m, s²) for each text.

    Parameters
    ----------
    mean, spread : Tensor (B,)
        m, and s ≥ 0.
    """

    def __init__(self, mean: Tensor, spread: Tensor) -> None:
        self._mean, self._spread = mean.double(), spread.double()

    @property
    def mean(self) -> Tensor:
        """(B,) m."""
        return self._mean

    @property
    def spread(self) -> Tensor:
        """(B,) s."""
        return self._spread

    def log_mgf(self, t: float) -> Tensor:
        """(B,) t·m + t²s²/2."""
        return t * self.mean + (t * self.spread) ** 2 / 2

    def quantile(self, level: float) -> Tensor:
        """(B,) m + s·Φ⁻¹(level)."""
        at: Tensor = torch.special.ndtri(torch.tensor(level, dtype=torch.float64))
        return self.mean + self.spread * at

    def log_mean_sigmoid(self, beta: float) -> Tensor:
        """(B,) by quadrature; see `lmppl.modeling.evidence.logistic_normal`."""
        return log_mean_sigmoid(self.mean / beta, self.spread / beta)

    def shifted(self, by: Tensor) -> Gaussian:
        """N(m + by, s²)."""
        return Gaussian(self.mean + by, self.spread)


class Distributed:
    """r follows a distribution of batch shape (B,), of torch or of Pyro.

    Parameters
    ----------
    law : Distribution
        Batch shape (B,), event shape ().
    shift : Tensor (B,), optional
        Added to r.
    """

    def __init__(self, law: Distribution, shift: Tensor | None = None) -> None:
        self.law, self.shift = law, shift

    @property
    def mean(self) -> Tensor:
        """(B,) m; an error where the law has none."""
        return laws.moment(self.law, "mean") + self._shift

    @property
    def spread(self) -> Tensor:
        """(B,) s; an error where the law has none."""
        return laws.moment(self.law, "stddev")

    def log_mgf(self, t: float) -> Tensor:
        """(B,) in closed form, or over a finite support."""
        return laws.log_mgf(self.law, torch.tensor(t, dtype=torch.float64)) + t * self._shift

    def quantile(self, level: float) -> Tensor:
        """(B,) by the law's inverse distribution function, or over a finite support."""
        return laws.quantile(self.law, level) + self._shift

    def log_mean_sigmoid(self, beta: float) -> Tensor:
        """(B,) of Gaussians, of finite supports, and of their mixtures."""
        return laws.log_mean_sigmoid(self.law, self._shift, beta)

    def shifted(self, by: Tensor) -> Distributed:
        """The law of r + by."""
        return Distributed(self.law, self._shift + by)

    @property
    def _shift(self) -> Tensor:
        return torch.zeros(self.law.batch_shape, dtype=torch.float64) if self.shift is None else self.shift
