"""Losses that make a head's log ψ the soft value V(x_≤t) = log E_π0[∏φ | x_≤t]; each says what its minimiser is.

A loss is a function of `Rollouts`: draws with the head's values at their prefixes. Draws need not come from the prior:
two weights say how far a row stands for π0 and for π*. On all outcomes with their probabilities as weights, every loss
below is exactly the population's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from lmppl.errors import ModelError

__all__ = ["LOSSES", "Consistency", "Contrastive", "Rollouts", "SoftValue", "TwistLoss", "resolve_loss"]


@dataclass(frozen=True, eq=False)
class Rollouts:
    """B outcomes with a head's values at all their prefixes; entries after the end of a row mean nothing.

    Parameters
    ----------
    log_psi : Tensor (B, T)
        log ψ(x_≤t) of the drawn tokens, in nats, the last one included: entry t belongs to x_1..x_{t+1}.
    log_phi : Tensor (B,)
        Σ_k log φ_k(x) of the outcomes; −inf is a value.
    log_prior_weight, log_posterior_weight : Tensor (B,)
        With these weights the rows of a context stand for π0 and for π*; −inf where a row stands for one of them only.
    log_z : Tensor (B,)
        An estimate of log Z of the row's context, the unit in which losses measure ψ.
    lengths, context : Tensor (B,), int64
    expect : callable, optional
        Gives (B, T) log Σ_v π0(v|x_≤t) ψ(x_≤t, v): entry t is the value of the prefix *before* x_{t+1}, expected
        one token ahead over all V tokens. Asked for only by losses that need it.
    """

    log_psi: Tensor
    log_phi: Tensor
    log_prior_weight: Tensor
    log_posterior_weight: Tensor
    log_z: Tensor
    lengths: Tensor
    context: Tensor
    expect: Callable[[], Tensor] | None = None

    @cached_property
    def mask(self) -> Tensor:
        """(B, T) bool: True at the tokens of a row."""
        return torch.arange(self.log_psi.shape[1], device=self.lengths.device) < self.lengths[:, None]

    @cached_property
    def log_expected(self) -> Tensor:
        """What `expect` gives, computed once."""
        if self.expect is None:
            raise ModelError("this loss needs the values of all next tokens: Rollouts(expect=...)")
        return self.expect()


@dataclass(frozen=True)
class TwistLoss(ABC):
    """Base of the losses: a frozen dataclass of configuration that is called with `Rollouts` and gives a scalar.

    An own loss subclasses this. `free_scale` says that ψ_t is determined only up to a factor of each context and t,
    which training then sets.
    """

    name: ClassVar[str]
    free_scale: ClassVar[bool] = False
    uses_positives: ClassVar[bool] = False
    """Rows that stand for π* alone are of use."""
    uses_expected: ClassVar[bool] = False
    """`Rollouts.log_expected` is asked for: the values of all V next tokens at every prefix."""
    references: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def __call__(self, rollouts: Rollouts) -> Tensor:
        """The loss, to be minimised over what `log_psi` depends on."""


@dataclass(frozen=True)
class Contrastive(TwistLoss):
    """Contrastive twist learning: Σ_t KL(σ_t‖π_t^ψ), up to a constant, summed over contexts.

    σ_t is the posterior's marginal of x_≤t, π_t^ψ(x_≤t) ∝ π0(x_≤t) ψ(x_≤t); an outcome that ended before t stands in
    both with φ. Gradient: −E_{σ_t}[∇ log ψ] + E_{π_t^ψ}[∇ log ψ]. Both expectations are self-normalised over the
    rows: positives weighted by w·φ (or draws of π* given as such), negatives by w·ψ.

    Minimiser: ψ_t ∝ e^V for each context and t. The factor is determined where an outcome can have ended before t
    with φ > 0, and left open elsewhere.

    References
    ----------
    zhao2024
    """

    name: ClassVar[str] = "contrastive"
    free_scale: ClassVar[bool] = True
    uses_positives: ClassVar[bool] = True
    references: ClassVar[tuple[str, ...]] = ("zhao2024",)

    def __call__(self, rollouts: Rollouts) -> Tensor:
        """See `TwistLoss`."""
        r = rollouts
        total = 0.0 * r.log_psi.sum()
        for c in torch.unique(r.context).tolist():
            rows = r.context == c
            prior, posterior = r.log_prior_weight[rows], r.log_posterior_weight[rows]
            if not bool((posterior > -torch.inf).any()) or not bool((prior > -torch.inf).any()):
                continue  # a small batch may hold none of them: it says nothing about this context
            mask, phi = r.mask[rows], r.log_phi[rows, None].to(r.log_psi)
            inside = r.log_psi[rows].masked_fill(~mask, 0.0)
            value = torch.where(mask, inside, phi)
            reach = int(mask[prior > -torch.inf].any(0).sum())  # beyond it no row of π0 is left to contrast with
            positive = torch.softmax(posterior, 0).to(r.log_psi)
            attracted = (positive[:, None] * inside)[:, :reach].sum()
            repelled = torch.logsumexp((prior[:, None].to(value) + value)[:, :reach], 0)
            total = total + repelled.sum() - attracted
        return total


@dataclass(frozen=True)
class SoftValue(TwistLoss):
    """Soft-value regression: E_π0 Σ_t [ψ(x_≤t) − φ(x) log ψ(x_≤t)]/Z, a Bregman (Poisson) loss of φ given the prefix.

    Its expectation given x_≤t is ψ − e^V log ψ, so that the minimiser is ψ = e^V, scale included: the *logarithm of
    the mean* of φ. Squared error on log φ learns the mean of the logarithm instead, which is at most that
    (Jensen) and does not give π*; squared error on φ has the same minimiser as this loss, and a gradient that vanishes
    where ψ is small. φ = 0 is a value like any other.

    References
    ----------
    banerjee2005 (Bregman losses are the ones whose minimiser is the mean), levine2018 (soft values)
    """

    name: ClassVar[str] = "soft_value"
    references: ClassVar[tuple[str, ...]] = ("banerjee2005", "levine2018")

    def __call__(self, rollouts: Rollouts) -> Tensor:
        """See `TwistLoss`."""
        r = rollouts
        weight = _prior_weights(r)
        unit = r.log_z[:, None].to(r.log_psi)
        return (weight[:, None] * _poisson(r.log_psi - unit, r.log_phi[:, None] - unit, r.mask)).sum()


@dataclass(frozen=True)
class Consistency(TwistLoss):
    """Soft Bellman consistency, as in RL: V(x_≤t) = log Σ_v π0(v|x_≤t) e^{V(x_≤t, v)}, and V = log φ at the end.

    E_q[Σ_{t<L} (log ψ(x_≤t) − log Σ_v π0(v|x_≤t) ψ(x_≤t, v))²/2 + (ψ(x) − φ(x) log ψ(x))/Z] over any law q of the
    rows. The sum over all V next tokens is exact, so that squaring has no bias of sampling. The boundary is not
    squared, because log φ may be −inf.

    Minimiser: ψ = e^V wherever rows come, as both terms are least there. The loss learns from one token ahead: it
    needs more steps than the regression on whole rollouts, and has less variance.

    Parameters
    ----------
    bootstrap : bool
        Take the value ahead as a constant, as temporal-difference learning does. The fixed point is the same;
        the steps are no gradient of the loss.

    References
    ----------
    nachum2017 (path consistency), levine2018, zhao2024 (as a twist loss)
    """

    bootstrap: bool = True

    name: ClassVar[str] = "consistency"
    uses_expected: ClassVar[bool] = True
    references: ClassVar[tuple[str, ...]] = ("nachum2017", "levine2018", "zhao2024")

    def __call__(self, rollouts: Rollouts) -> Tensor:
        """See `TwistLoss`."""
        r = rollouts
        weight = _prior_weights(r)
        ahead = r.log_expected[:, 1:]
        inner = r.mask[:, 1:]  # the prefix is followed by a token
        gap = r.log_psi[:, :-1] - (ahead.detach() if self.bootstrap else ahead)
        squares = 0.5 * gap.masked_fill(~inner, 0.0).square().sum(1)
        last = (r.lengths - 1)[:, None]
        unit = r.log_z[:, None].to(r.log_psi)
        end = _poisson(r.log_psi.gather(1, last) - unit, r.log_phi[:, None] - unit, torch.ones_like(last) > 0)
        return (weight * (squares + end[:, 0])).sum()


LOSSES: dict[str, TwistLoss] = {
    "ctl": Contrastive(),
    "contrastive": Contrastive(),
    "soft_value": SoftValue(),
    "consistency": Consistency(),
}


def resolve_loss(loss: str | TwistLoss) -> TwistLoss:
    """A loss by its name, or the instance itself."""
    if isinstance(loss, TwistLoss):
        return loss
    if isinstance(loss, str) and loss in LOSSES:
        return LOSSES[loss]
    names = ", ".join(repr(n) for n in LOSSES)
    raise ModelError(f"loss: got {loss!r}, expected one of {names}, or an instance of TwistLoss")


def _prior_weights(r: Rollouts) -> Tensor:
    """(B,) weights of the rows for π0, which sum to 1 in each context."""
    weight = torch.zeros_like(r.log_psi[:, 0])
    for c in torch.unique(r.context).tolist():
        rows = r.context == c
        if bool((r.log_prior_weight[rows] > -torch.inf).any()):
            weight[rows] = torch.softmax(r.log_prior_weight[rows], 0).to(weight)
    return weight


def _poisson(value: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """e^v − e^target·v, 0 outside `mask`."""
    inside = value.masked_fill(~mask, 0.0)
    return torch.where(mask, inside.exp() - target.to(inside).exp() * inside, 0.0)
