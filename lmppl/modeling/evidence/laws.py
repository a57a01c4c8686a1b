"""What an attitude asks of a distribution of rewards: moments, log E[e^{tr}], quantiles, log E[σ(r/β)].

Closed forms, and sums over finite supports. A law that has none is refused; its draws, as an ensemble, are a belief.
"""

from __future__ import annotations

import math
from functools import singledispatch
from math import inf
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributions import (
    Beta,
    Cauchy,
    Distribution,
    Exponential,
    Gamma,
    Gumbel,
    HalfCauchy,
    HalfNormal,
    Laplace,
    LogNormal,
    MixtureSameFamily,
    Normal,
    Poisson,
    StudentT,
    TransformedDistribution,
    Uniform,
)
from torch.distributions.transforms import AffineTransform
from torch.nn.functional import logsigmoid

from lmppl.errors import FactorError
from lmppl.modeling.evidence import logistic_normal

__all__ = ["log_mean_sigmoid", "log_mgf", "moment", "quantile"]

EXACT = 1e-6  # a support whose probabilities do not sum to one within it is not the whole support


def moment(law: Distribution, name: str) -> Tensor:
    """(B,) `mean` or `stddev` of a law that has it."""
    try:
        value: Tensor = getattr(law, name).double()
    except NotImplementedError:
        if not isinstance(law, TransformedDistribution):
            refuse(law, f"its {name}")
        base, scale, shift = _affine(law, f"its {name}")
        inner = moment(base, name)
        return inner * scale + shift if name == "mean" else (inner * scale).abs()
    if not bool(torch.isfinite(value).all()):
        raise FactorError(f"{_called(law)} has no finite {name} for some texts; give a law with lighter tails")
    return value


# log E[e^{tr}].


@singledispatch
def log_mgf(law: Distribution, t: Tensor) -> Tensor:
    """(B,) log E[e^{tr}], in nats; +inf where the tail is too heavy. `t` is a float64 scalar, or (B,)."""
    values, log_weight = _atoms(law, "log E[exp(t·r)]")
    return (t * values + log_weight).logsumexp(0)


@log_mgf.register
def _(law: Normal, t: Tensor) -> Tensor:
    return t * law.loc + (t * law.scale) ** 2 / 2


@log_mgf.register
def _(law: Laplace, t: Tensor) -> Tensor:
    return t * law.loc - _log_or_minus_inf(1 - (t * law.scale) ** 2)


@log_mgf.register
def _(law: Gamma, t: Tensor) -> Tensor:
    return -law.concentration * _log_or_minus_inf(1 - t / law.rate)


@log_mgf.register
def _(law: Exponential, t: Tensor) -> Tensor:
    return -_log_or_minus_inf(1 - t / law.rate)


@log_mgf.register
def _(law: Gumbel, t: Tensor) -> Tensor:
    room = 1 - t * law.scale
    return t * law.loc + torch.where(room > 0, torch.lgamma(torch.where(room > 0, room, 1.0)), inf)


@log_mgf.register
def _(law: HalfNormal, t: Tensor) -> Tensor:
    half: Tensor = torch.special.log_ndtr(t * law.scale)
    return math.log(2) + half + (t * law.scale) ** 2 / 2


@log_mgf.register
def _(law: Poisson, t: Tensor) -> Tensor:
    return law.rate * torch.expm1(t)


@log_mgf.register
def _(law: Uniform, t: Tensor) -> Tensor:
    size = (t * (law.high - law.low)).abs() / 2
    small = size**2 / 6 - size**4 / 180  # log sinh(a)/a, where the next term is below 1e-16
    safe = size.clamp_min(1e-2)
    large = safe + torch.log(-torch.expm1(-2 * safe)) - torch.log(2 * safe)
    return t * (law.high + law.low) / 2 + torch.where(size < 1e-2, small, large)


@log_mgf.register(StudentT)
@log_mgf.register(Cauchy)
def _(law: Any, t: Tensor) -> Tensor:
    return torch.full(law.batch_shape, inf, dtype=torch.float64)


@log_mgf.register(HalfCauchy)
@log_mgf.register(LogNormal)
def _(law: Any, t: Tensor) -> Tensor:
    if bool((t < 0).any()):
        refuse(law, "log E[exp(t·r)] at t < 0")
    return torch.full(law.batch_shape, inf, dtype=torch.float64)


@log_mgf.register
def _(law: MixtureSameFamily, t: Tensor) -> Tensor:
    each = log_mgf(law.component_distribution, t if t.dim() == 0 else t[:, None])
    return (law.mixture_distribution.logits + each).logsumexp(-1)


@log_mgf.register
def _(law: TransformedDistribution, t: Tensor) -> Tensor:
    base, scale, shift = _affine(law, "log E[exp(t·r)]")
    return t * shift + log_mgf(base, t * scale)


# Quantiles.


def quantile(law: Distribution, level: float) -> Tensor:
    """(B,) the smallest r that is not exceeded with probability `level`."""
    try:
        return law.icdf(torch.tensor(level, dtype=torch.float64)).double()
    except NotImplementedError:
        values, log_weight = _atoms(law, "a quantile")
    order = values.argsort(0)
    reached = log_weight.gather(0, order).exp().cumsum(0) >= level * (1 - EXACT**2)
    return values.gather(0, order).gather(0, reached.long().argmax(0, keepdim=True))[0]


# log E[σ(r/β)].


@singledispatch
def log_mean_sigmoid(law: Distribution, shift: Tensor, beta: float) -> Tensor:
    """(B,) log E[σ((r + shift)/β)], in nats."""
    values, log_weight = _atoms(law, "log E[σ(r/β)]")
    return (logsigmoid((values + shift) / beta) + log_weight).logsumexp(0)


@log_mean_sigmoid.register
def _(law: Normal, shift: Tensor, beta: float) -> Tensor:
    return logistic_normal.log_mean_sigmoid((law.loc + shift) / beta, law.scale / beta)


@log_mean_sigmoid.register
def _(law: MixtureSameFamily, shift: Tensor, beta: float) -> Tensor:
    inner = law.component_distribution
    each = log_mean_sigmoid(inner, shift[:, None], beta)
    return (law.mixture_distribution.logits + each).logsumexp(-1)


# What laws are made of.


def _atoms(law: Distribution, what: str) -> tuple[Tensor, Tensor]:
    """Values (K, B) and their log-probabilities (K, B): of a finite support, or nodes of a quadrature."""
    if isinstance(law, Beta):
        return _beta_nodes(law)
    if not law.has_enumerate_support:
        refuse(law, what)
    values = law.enumerate_support()
    log_weight = law.log_prob(values).double()
    if bool((log_weight.logsumexp(0).abs() > EXACT).any()):
        refuse(law, what)
    return values.double(), log_weight


def _beta_nodes(law: Beta) -> tuple[Tensor, Tensor]:
    """tanh-sinh nodes of (0, 1), which singularities at the ends do not disturb."""
    step = 2.0**-5
    at = torch.arange(-192, 193, dtype=torch.float64) * step
    bent = math.pi * torch.sinh(at)
    log_x, log_rest = logsigmoid(bent), logsigmoid(-bent)
    log_jacobian = log_x + log_rest + math.log(math.pi * step) + torch.log(torch.cosh(at))
    a, b = law.concentration1.double(), law.concentration0.double()
    log_beta = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
    shape = (-1, *(1,) * a.dim())
    log_x, log_rest, log_jacobian = (v.view(shape) for v in (log_x, log_rest, log_jacobian))
    return log_x.exp().expand(-1, *a.shape), (a - 1) * log_x + (b - 1) * log_rest + log_jacobian - log_beta


def _affine(law: TransformedDistribution, what: str) -> tuple[Distribution, Tensor | float, Tensor | float]:
    """r = scale · base + shift."""
    scale: Tensor | float = 1.0
    shift: Tensor | float = 0.0
    for transform in law.transforms:
        if not isinstance(transform, AffineTransform):
            refuse(law, what)
        scale, shift = scale * transform.scale, shift * transform.scale + transform.loc
    return law.base_dist, scale, shift


def refuse(law: Distribution, what: str) -> NoReturn:
    """Raise for a law that cannot say `what`."""
    raise FactorError(
        f"{what} is not known in closed form for {_called(law)}; return draws from it as an ensemble (B, M), "
        "or choose another attitude"
    )


def _called(law: Distribution) -> str:
    name = type(law).__name__
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def _log_or_minus_inf(value: Tensor) -> Tensor:
    """log of a positive value, −inf of any other: where a moment generating function ends, it is infinite."""
    return torch.where(value > 0, torch.log(torch.where(value > 0, value, 1.0)), -inf)
