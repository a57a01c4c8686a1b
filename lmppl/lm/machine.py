"""The decoder of a language model that is a finite machine: a forward is one look-up of each row's state."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lmppl.lm.decoder import Step

__all__ = ["MachineDecoder", "MachineRows", "MachineShelf"]


class MachineRows(NamedTuple):
    """B rows: the machine's states before and after each token, and `lengths` (B,), which counts the tokens.

    Rows are right-aligned in the first `width` columns of `states`; columns further left than a row's start repeat its
    start state, and columns from `width` on are room to grow.
    """

    states: Tensor
    width: int
    lengths: Tensor

    @property
    def history(self) -> Tensor:
        """(B, width) the states, the last one at the right."""
        return self.states[:, : self.width]

    def append(self, new: Tensor) -> MachineRows:
        """The rows with states `new` (B, k) after them; written in place where there is room, so `self` is consumed."""
        width = self.width + new.shape[1]
        states = self.states
        if width > states.shape[1]:
            room = states.new_empty(len(states), 2 * width)
            room[:, : self.width] = self.history
            states = room
        states[:, self.width : width] = new
        return MachineRows(states, width, self.lengths + new.shape[1])


class MachineDecoder:
    """The `Decoder` of a machine; its rows keep all the states they went through, so that they can be cropped.

    Parameters
    ----------
    initial : Tensor (C,), int64
        The state of each context before its first token.
    advance : callable
        States (M,) and tokens (M,) to the states after them (M,).
    scores : callable
        States (M,) to unnormalised log-probabilities (M, V) of the next token.
    """

    capabilities = frozenset({"crop", "ragged", "chunk"})

    def __init__(
        self,
        initial: Tensor,
        advance: Callable[[Tensor, Tensor], Tensor],
        scores: Callable[[Tensor], Tensor],
    ) -> None:
        self.initial, self.advance, self.scores = initial, advance, scores

    def _project(self, hidden: Tensor) -> Tensor:
        return self.scores(hidden[:, 0])

    def prefill(
        self, context: Tensor, prefix: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Step, MachineRows]:
        """As `Decoder.prefill`."""
        rows = MachineRows(self.initial[context][:, None], 1, torch.zeros_like(context))
        if prefix is not None and prefix.shape[1] > 0:
            _, rows = self.extend(rows, prefix)
            if lengths is not None:
                rows = self.crop(rows, lengths)
        return Step(self._project, rows.history[:, -1:, None]), rows

    def extend(self, state: MachineRows, tokens: Tensor, *, grad: bool = False) -> tuple[Step, MachineRows]:
        """As `Decoder.extend`; tables have no gradient."""
        states = [state.history[:, -1]]
        for column in tokens.unbind(1):
            states.append(self.advance(states[-1], column))
        new = torch.stack(states[1:], 1)
        return Step(self._project, new[:, :, None]), state.append(new)

    def crop(self, state: MachineRows, lengths: Tensor) -> MachineRows:
        """As `Decoder.crop`."""
        width = int(lengths.max()) + 1
        # Column w of the new history is the state after lengths − (width − 1 − w) tokens, at the latest the start.
        tokens = (lengths[:, None] + 1 - width + torch.arange(width, device=lengths.device)).clamp_min(0)
        columns = state.width - 1 - state.lengths[:, None] + tokens
        return MachineRows(state.history.gather(1, columns), width, lengths.clone())

    def select(self, state: MachineRows, index: Tensor) -> MachineRows:
        """As `Decoder.select`."""
        return MachineRows(state.history[index], state.width, state.lengths[index])

    def shelve(self, num_slots: int) -> MachineShelf:
        """Room for rows that outlive a state."""
        return MachineShelf(num_slots)


class MachineShelf:
    """As `lmppl.lm.shelf.RowStore`: the states that each row went through, by slot."""

    def __init__(self, num_slots: int) -> None:
        self.states = torch.zeros(num_slots, 1, dtype=torch.int64)

    def flush(self) -> None:
        """As `RowStore.flush`: nothing waits."""

    def put(self, state: MachineRows, rows: Tensor, slots: Tensor, lengths: Tensor, *, later: bool = False) -> None:
        """As `RowStore.put`."""
        width = int(lengths.max()) + 1
        if width > self.states.shape[1]:
            room = self.states.new_zeros(len(self.states), width)
            room[:, : self.states.shape[1]] = self.states
            self.states = room
        first = state.width - 1 - state.lengths[rows]
        columns = (first[:, None] + torch.arange(width)).clamp_max(state.width - 1)
        self.states[slots, :width] = state.history[rows].gather(1, columns)

    def take(self, slots: Tensor, context: Tensor, lengths: Tensor) -> MachineRows:
        """As `RowStore.take`."""
        width = int(lengths.max()) + 1
        columns = (torch.arange(width) - (width - 1 - lengths)[:, None]).clamp_min(0)
        return MachineRows(self.states[slots].gather(1, columns), width, lengths.clone())

    def open(self, num_rows: int) -> MachineRows:
        """As `RowStore.open`."""
        return MachineRows(self.states[:0, :1], 1, torch.zeros(0, dtype=torch.int64))

    def join(self, state: MachineRows, slots: Tensor, context: Tensor, lengths: Tensor) -> MachineRows:
        """As `RowStore.join`."""
        joining = self.take(slots, context, lengths)
        width = max(joining.width, int(state.lengths.max()) + 1 if len(state.lengths) else 1)
        whole = torch.cat([_of_width(state.history, width), _of_width(joining.history, width)])
        return MachineRows(whole, width, torch.cat([state.lengths, joining.lengths]))

    def close(self, state: MachineRows) -> None:
        """As `RowStore.close`: there is nothing to take back."""

    def copy(self, source: Tensor, target: Tensor) -> None:
        """As `RowStore.copy`."""
        self.states[target] = self.states[source]


def _of_width(history: Tensor, width: int) -> Tensor:
    """Right-aligned states (B, ·) in `width` columns; those further left repeat the first."""
    columns = torch.arange(width) + history.shape[1] - width
    return history[:, columns.clamp_min(0)]
