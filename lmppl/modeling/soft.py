"""Soft forms: factors as differentiable functions of one step of the LM, for methods that follow gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

__all__ = ["SoftForm", "SoftStep"]


@dataclass(frozen=True, eq=False)
class SoftStep:
    """What an LM is about to say after each of B prefixes, as tensors through which gradients flow.

    Parameters
    ----------
    log_probs : Tensor (B, V)
        Log-probabilities of the next token, in nats.
    hidden : Tensor (B, H)
        The hidden state that the next token is predicted from.
    mean_hidden : Tensor (B, H)
        The mean of the hidden states after the completion's tokens so far, `hidden` the last of them; before the first
        token, `hidden` itself.
    """

    log_probs: Tensor
    hidden: Tensor
    mean_hidden: Tensor


class SoftForm(Protocol):
    """A differentiable surrogate of log φ for one step; `Factor.soft(lm)` gives the one for an LM's tokens."""

    def __call__(self, step: SoftStep) -> Tensor:
        """(B,) in nats; finite."""
        ...
