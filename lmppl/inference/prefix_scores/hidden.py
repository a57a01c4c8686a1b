"""A head on the LM's hidden states, which scores all V next tokens at once, as a potential of prefixes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lmppl.errors import ModelError, ShapeError
from lmppl.inference.prefix_scores.columns import widened
from lmppl.lm.base import LanguageModel
from lmppl.lm.decoder import Step
from lmppl.modeling.factors import Incremental
from lmppl.modeling.function_contents import content_digest

__all__ = ["HiddenScore", "HiddenScoreForm"]


@dataclass(frozen=True)
class HiddenScore:
    """log ψ(x_≤t) = head(h)[x_t]/β, h the LM's hidden state before x_t: one head scores all V next tokens at once.

    A head of one output judges the prefix that was read, not the tokens that could follow; to score candidates with it
    takes a forward for each, which is why a head here has V outputs.

    Parameters
    ----------
    head : callable
        (B, H) → (B, V), in nats; run without gradients.
    beta : float
        β > 0, which divides the score.
    """

    head: Callable[[Tensor], Tensor]
    beta: float = 1.0

    @property
    def fingerprint(self) -> str:
        """Content of the head and its scale."""
        return f"{content_digest(self.head)}:{self.beta!r}"

    def __call__(self, lm: LanguageModel) -> Incremental:
        """The incremental form for `lm`."""
        if not self.beta > 0.0:
            raise ModelError(f"HiddenScore: got beta={self.beta!r}, expected a positive number that divides the score")
        if "hidden" not in lm.decoder().capabilities:
            raise ModelError(
                f"HiddenScore: {type(lm).__name__} gives no hidden states; use a Hugging Face LM, or PrefixScore(fn)"
            )
        return HiddenScoreForm(self.head, self.beta, lm.vocab_size)


class HiddenRows(NamedTuple):
    """B prefixes: hidden states (B, t + 1, H) and log ψ (B, t + 1) at each length, and their lengths."""

    hidden: Tensor
    values: Tensor
    lengths: Tensor


class HiddenScoreForm:
    """The `Incremental` form of a `HiddenScore`."""

    needs: Collection[Literal["text", "ids", "hidden"]] = frozenset({"hidden"})

    def __init__(self, head: Callable[[Tensor], Tensor], beta: float, vocab_size: int) -> None:
        self.head, self.beta, self.vocab_size = head, beta, vocab_size

    def start(self, contexts: Tensor, step: Step | None = None) -> HiddenRows:
        """As `Incremental.start`."""
        if step is None:
            raise ModelError("HiddenScore: it reads hidden states; start it with the step after the context")
        values = torch.zeros(len(contexts), 1, dtype=torch.float64, device=contexts.device)
        return HiddenRows(step.hidden[:, -1:], values, torch.zeros_like(contexts))

    def weigh(self, state: HiddenRows, candidates: Tensor | None) -> Tensor:
        """As `Incremental.weigh`."""
        scores = self._scores(state)
        if candidates is not None:
            scores = scores.gather(1, candidates)
        return scores - self.potential(state)[:, None]

    def advance(self, state: HiddenRows, tokens: Tensor, step: Step) -> HiddenRows:
        """As `Incremental.advance`."""
        value = self._scores(state).gather(1, tokens[:, None])
        width = int(state.lengths.max()) + 2
        at = (state.lengths + 1)[:, None]
        hidden = widened(state.hidden, width)
        hidden = hidden.scatter(1, at[:, :, None].expand(-1, 1, hidden.shape[2]), step.hidden[:, -1:])
        return HiddenRows(hidden, widened(state.values, width).scatter(1, at, value), state.lengths + 1)

    def potential(self, state: HiddenRows) -> Tensor:
        """As `Incremental.potential`."""
        return state.values.gather(1, state.lengths[:, None])[:, 0]

    def select(self, state: HiddenRows, index: Tensor) -> HiddenRows:
        """As `Incremental.select`."""
        return HiddenRows(*(column[index] for column in state))

    def crop(self, state: HiddenRows, lengths: Tensor) -> HiddenRows:
        """As `Incremental.crop`."""
        return state._replace(lengths=lengths.to(state.lengths.device))

    def _scores(self, state: HiddenRows) -> Tensor:
        rows = torch.arange(len(state.lengths), device=state.lengths.device)
        with torch.no_grad():
            scores = self.head(state.hidden[rows, state.lengths])
        expected = (len(rows), self.vocab_size)
        if tuple(scores.shape) != expected:
            raise ShapeError(
                f"HiddenScore: the head gave shape {tuple(scores.shape)}, expected {expected}: a score of each next "
                "token"
            )
        return scores.double() / self.beta
