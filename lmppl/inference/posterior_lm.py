"""PosteriorLM: π* as a language model over the prior's own tokens, run by a deterministic machine of states.

`Exact` computes π* in two ways, as a tree of prefixes and by dynamic programming over a finite machine. Both are a
start state for each context, a rule that reads a token, and next-token log-probabilities in each state.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from lmppl.errors import ContextError
from lmppl.lm.base import LanguageModel
from lmppl.lm.derived import DerivedLM
from lmppl.lm.machine import MachineDecoder

__all__ = ["PosteriorLM"]


class PosteriorLM(DerivedLM):
    """π*(x|c) of one model, for the contexts it was computed for.

    Ids, texts, ends of rows and contexts are the prior's. After a prefix of posterior probability zero every token is
    equally likely: a conditional has no other meaning there, and the row as a whole keeps log π*(x|c) = −inf.

    Parameters
    ----------
    prior : LanguageModel
        π0, which decodes texts and ends rows.
    initial : Tensor (C,), int64
        The start state of each context.
    """

    def __init__(self, prior: LanguageModel, initial: Tensor) -> None:
        super().__init__(prior)
        self.initial = initial

    @property
    def prior(self) -> LanguageModel:
        """π0."""
        return self.base

    @abstractmethod
    def advance(self, states: Tensor, tokens: Tensor) -> Tensor:
        """(M,) states after reading `tokens` (M,) in `states` (M,)."""

    @abstractmethod
    def next_log_probs(self, states: Tensor) -> Tensor:
        """(M, V) log π*(x_t|c, x_<t) in `states` (M,), in nats."""

    def decoder(self) -> MachineDecoder:
        """As `LanguageModel.decoder`."""
        return MachineDecoder(self.initial, self.advance, self.next_log_probs)

    def with_contexts(self, contexts: Sequence[Any]) -> NoReturn:
        """A posterior belongs to its contexts: its normalisers Z(c) were computed for them.

        Raises
        ------
        ContextError
            Always.
        """
        raise ContextError(
            f"{type(self).__name__} was computed for {self.num_contexts} context(s) and has no others; declare "
            "`model | contexts` and run Exact on that"
        )

    @property
    def dtype(self) -> torch.dtype:
        """float64."""
        return torch.float64

    def bytes_per_row(self, num_tokens: int) -> int:
        """As `LanguageModel.bytes_per_row`: history of states, and float64 scores with what sampling makes of them."""
        return 8 * (2 * num_tokens + 6 * max(self.vocab_size, 256))
