"""Source: where every random choice of an engine comes from, so that a test can walk all of them.

An engine asks for choices, not for numbers: a token of a law, an index, whether to accept. `Source` draws them from one
explicit generator; `lmppl.testing.enumeration` answers the same questions with every possible answer in turn, and so
computes the exact law of a whole engine on a small model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["Breaks", "Source"]

Breaks = Callable[[], Sequence[Tensor]]


class Source:
    """Independent random choices from one generator.

    Parameters
    ----------
    generator : torch.Generator
        On the CPU; what is drawn from it is moved to where it is needed.
    """

    walked: ClassVar[bool] = False
    """Each choice must be asked for by itself, because all of its outcomes are walked; else a decode loop may take
    its numbers from `generator` all at once."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def uniforms(self, count: int, breaks: Breaks | None = None) -> Tensor:
        """(count,) independent uniform numbers in [0, 1), float64, on the CPU.

        Parameters
        ----------
        count : int
        breaks : callable, optional
            Gives, for each number, the points of (0, 1) between which the caller's result does not change. Only a
            source that enumerates asks; a caller whose result is not piecewise constant has none.
        """
        return torch.rand(count, dtype=torch.float64, generator=self.generator)

    def tokens(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """One index a row from softmax(logits) (B, V), and its log-probability (B,), in nats; −inf excludes an index.

        The index has the law of `lmppl.lm.decoding.sample_tokens`, which inverts the distribution function in float64.
        """
        from lmppl.lm.decoding import sample_tokens

        return sample_tokens(logits, self.uniforms(len(logits)).to(logits.device))

    def accept(self, log_probability: Tensor) -> Tensor:
        """(B,) bool: True with probability exp(`log_probability`) (B,), which is at most 0."""
        uniforms = self.uniforms(len(log_probability)).to(log_probability.device)
        return uniforms < log_probability.double().exp()

    def integers(self, high: Tensor) -> Tensor:
        """(B,) int64, uniform on 0..high−1 for each entry of `high` (B,)."""
        drawn = (self.uniforms(len(high)).to(high.device) * high).floor().long()
        return torch.minimum(drawn, high - 1)  # u·high can round up to high
