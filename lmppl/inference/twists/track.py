"""TwistTrack: the twist's state, in step with the live rows of a frontier.

`advance` and `select` wait until the twist is asked again, so that rows which resampling drops are never advanced, and
a twist that reads hidden states gets those of the forward that is due anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lmppl.inference.twists.product import ProductTwist
from lmppl.lm.base import LanguageModel
from lmppl.lm.decoder import Step
from lmppl.lm.decoding import CountingDecoder
from lmppl.lm.frontier import Frontier
from lmppl.modeling.factors import Incremental, start_incremental
from lmppl.modeling.named_forms import FormRowError, NamedForm
from lmppl.sequences import Cost

__all__ = ["TwistTrack", "replay"]


@dataclass(eq=False)
class _Chunk:
    """States of rows of one length: live row `position[i]` has state `index[i]`, once that has read its token."""

    state: Any
    position: Tensor
    index: Tensor | None  # None: row i of the state, for every i
    tokens: Tensor | None  # of the state's rows; None where they have been read


class TwistTrack:
    """One twist on the live rows of one frontier.

    Parameters
    ----------
    twist : Incremental
    frontier : Frontier
        All of its rows empty completions.
    """

    def __init__(self, twist: Incremental, frontier: Frontier) -> None:
        self.twist, self.frontier = twist, frontier
        self._form = checked(twist, frontier.lm)
        self.hidden = "hidden" in twist.needs
        step = frontier.step
        first = Step(step.project, step.hidden[:, -1:][frontier.row_of])
        state = self._form.start(frontier.context, first)
        self._chunks = [_Chunk(state, torch.arange(len(frontier.live), device=frontier.ids.device), None, None)]
        self.start_potential: Tensor = self._asked(frontier.live, lambda: self._form.potential(state))

    def weigh(self, candidates: Tensor | None, rows: Tensor | None = None) -> Tensor:
        """(L, k) or (L, V) increments of the live rows; (M, k) of those at positions `rows` (M,)."""
        self.settle()
        form = self._form
        if len(self._chunks) == 1:
            state = self._chunks[0].state
            if rows is None:
                return self._asked(self._chunks[0].position, lambda: form.weigh(state, candidates))
            return self._asked(rows, lambda: form.weigh(form.select(state, rows), candidates))
        if rows is not None and candidates is not None:
            spread = candidates.new_zeros(len(self.frontier.live), candidates.shape[1])
            spread[rows] = candidates
            return self.weigh(spread)[rows]
        result: Tensor | None = None
        for chunk in self._chunks:
            some = None if candidates is None else candidates[chunk.position]
            part = self._asked(chunk.position, partial(form.weigh, chunk.state, some))
            if result is None:
                result = part.new_zeros(len(self.frontier.live), part.shape[1])
            result[chunk.position] = part
        assert result is not None
        return result

    def potential(self) -> Tensor:
        """(L,) log ψ of the live rows."""
        self.settle()
        parts = [self._asked(c.position, partial(self._form.potential, c.state)) for c in self._chunks]
        if len(parts) == 1:
            return parts[0]
        together = torch.cat(parts)
        result = torch.empty_like(together)
        result[torch.cat([c.position for c in self._chunks])] = together
        return result

    def _asked(self, positions: Tensor, call: Callable[[], Tensor]) -> Tensor:
        """What the twist answers about the live rows at `positions`; an error quotes the text of its row."""
        try:
            return call()
        except FormRowError as error:
            row = int(self.frontier.live[positions[error.row]])
            raise error.told(self.frontier.sequences().select([row]).text[0]) from error

    def terms(self, rows: Tensor, tokens: Tensor) -> list[Tensor]:
        """The increments of each twist of a product, at the live rows' positions `rows`, of tokens not appended yet."""
        chunk = self._chunks[0]
        state = self._form.select(chunk.state, rows)
        return [t[:, 0] for t in self._form.terms(state, tokens[:, None])]  # type: ignore[attr-defined]

    def append(self, tokens: Tensor, keep: Tensor) -> None:
        """The live rows (L,) have read `tokens`; those of `keep` (L,) bool go on."""
        self.settle()
        moved = torch.cumsum(keep, 0) - 1
        every = bool(keep.all())
        for chunk in self._chunks:
            chunk.tokens = tokens[chunk.position]
            if not every:
                chunk.index = torch.nonzero(keep[chunk.position]).squeeze(1)
                chunk.position = moved[chunk.position[chunk.index]]
        self._chunks = [c for c in self._chunks if len(c.position)]

    def drop(self, keep: Tensor) -> None:
        """Live rows outside `keep` (L,) bool wait; `rebuild` brings them back."""
        moved = torch.cumsum(keep, 0) - 1
        for chunk in self._chunks:
            kept = torch.nonzero(keep[chunk.position]).squeeze(1)
            chunk.index = kept if chunk.index is None else chunk.index[kept]
            chunk.position = moved[chunk.position[kept]]
        self._chunks = [c for c in self._chunks if len(c.position)]

    def select(self, source: Tensor) -> None:
        """Live row i is now the former live row `source[i]`; for rows of one length."""
        if not self._chunks:
            return
        (chunk,) = self._chunks
        chunk.index = source if chunk.index is None else chunk.index[source]
        chunk.position = torch.arange(len(source), device=source.device)

    def rebuild(self) -> None:
        """Read the live rows of the frontier anew, of any lengths."""
        frontier = self.frontier
        live = frontier.live
        lengths = frontier.lengths[live]
        self._chunks = []
        for length in lengths.unique().tolist():
            position = torch.nonzero(lengths == length).squeeze(1)
            rows = live[position]
            context, ids = frontier.context[rows], frontier.ids[rows, :length]
            state = replay(self._form, frontier.lm, context, ids, frontier.decoder.cost)
            self._chunks.append(_Chunk(state, position, None, None))

    def settle(self) -> None:
        """Bring the states up to date: select, then advance."""
        for chunk in self._chunks:
            if chunk.index is not None:
                chunk.state = self._form.select(chunk.state, chunk.index)
                chunk.tokens = None if chunk.tokens is None else chunk.tokens[chunk.index]
                chunk.index = None
            if chunk.tokens is not None:
                step = self._step(chunk.position)
                chunk.state = self._form.advance(chunk.state, chunk.tokens, step)  # type: ignore[arg-type]
                chunk.tokens = None

    def _step(self, position: Tensor) -> Step | None:
        if not self.hidden:
            return None
        step = self.frontier.step
        return Step(step.project, step.hidden[:, -1:][self.frontier.row_of[position]])


def checked(twist: Incremental, lm: LanguageModel) -> Incremental:
    """The twist with each of its calls checked; a product checks those of its parts."""
    if isinstance(twist, ProductTwist | NamedForm):
        return twist
    return NamedForm(twist, "twist", lm.vocab_size)


def replay(twist: Incremental, lm: LanguageModel, context: Tensor, tokens: Tensor, cost: Cost) -> Any:
    """The twist's state after `tokens` (B, k) of contexts (B,), forwards counted into `cost`.

    The LM reads the contexts, and the tokens where the twist needs hidden states.
    """
    reads = "hidden" in twist.needs
    with torch.no_grad():
        decoder = CountingDecoder(lm, cost)
        step, cache = decoder.prefill(context)
        state = start_incremental(twist, context, step)
        for column in tokens.unbind(1):
            if reads:
                step, cache = decoder.extend(cache, column[:, None])
            state = twist.advance(state, column, step if reads else None)  # type: ignore[arg-type]
    return state
