"""The contract of a decoder, which steps rows of a language model: `Decoder`, its `Step` and its `State`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = ["Decoder", "State", "Step"]

State = Any  # what a decoder needs to go on: KV cache, positions; opaque to everybody else


@dataclass(frozen=True, eq=False)
class Step:
    """What one forward says about the next token after each of B·k positions.

    Parameters
    ----------
    project : callable
        Maps rows of `hidden` (M, H) to unnormalised log-probabilities (M, V), in the dtype that the softmax runs in,
        temperature and declared truncation applied. Kept apart so that no (B, k, V) tensor is held unless asked for.
    hidden : Tensor (B, k, H)
        What `project` reads. A feature of the LM only where the decoder's capabilities include `hidden`.
    """

    project: Callable[[Tensor], Tensor]
    hidden: Tensor

    @cached_property
    def logits(self) -> Tensor:
        """(B, k, V) unnormalised log-probabilities."""
        b, k, h = self.hidden.shape
        return self.project(self.hidden.reshape(b * k, h)).view(b, k, -1)

    @property
    def log_probs(self) -> Tensor:
        """(B, k, V) log-probabilities of the next token, in nats."""
        return torch.log_softmax(self.logits, -1)

    def log_prob_of(self, tokens: Tensor, *, chunk: int = 1 << 22) -> Tensor:
        """(B, k) log-probability of `tokens` (B, k), projecting at most about `chunk` scores at a time."""
        b, k, h = self.hidden.shape
        rows, wanted = self.hidden.reshape(b * k, h), tokens.reshape(b * k, 1)
        first = self.project(rows[:1])
        size = max(1, chunk // first.shape[-1])
        parts = []
        for start in range(0, b * k, size):
            logits = self.project(rows[start : start + size])
            parts.append(logits.gather(1, wanted[start : start + size])[:, 0] - torch.logsumexp(logits, -1))
        return torch.cat(parts).view(b, k) if parts else first.new_zeros(b, k)


@runtime_checkable
class Decoder(Protocol):
    """Steps B rows of one LM; rows share one `State`.

    `capabilities` names what this architecture's cache can really do, found by test: "crop" (one length for the whole
    batch), "ragged" (a length for each row), "hidden" (`Step.hidden` is a real representation), "grad", "chunk"
    (several tokens in one forward after a prefill).
    """

    capabilities: frozenset[str]

    def prefill(
        self, context: Tensor, prefix: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Step, State]:
        """Start B rows; Step (B, 1, V) is the law of the next token of each.

        `context` (B,) indexes the LM's contexts; `prefix` (B, k) are completion tokens that are there already,
        right-padded to `lengths` (B,).
        """
        ...

    def extend(self, state: State, tokens: Tensor, *, grad: bool = False) -> tuple[Step, State]:
        """Append `tokens` (B, k); Step (B, k, V) is the law of the next token after each. Consumes the given state."""
        ...

    def crop(self, state: State, lengths: Tensor) -> State:
        """Cut each row back to `lengths` (B,) completion tokens."""
        ...

    def select(self, state: State, index: Tensor) -> State:
        """Rows `index` (M,): reorder, compact and expand in one."""
        ...
