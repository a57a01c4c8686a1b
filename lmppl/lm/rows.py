"""Rows of tokens in one network state: start, append, select, crop, whatever kind of cache the architecture has."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lmppl.errors import UnsupportedModel
from lmppl.lm.network import Network

if TYPE_CHECKING:
    from lmppl.lm.caches import CacheKind

__all__ = ["CachedRows", "RowState", "Rows"]


class Rows(Protocol):
    """What `CachedRows` and `GroupedRows` do alike; the state is opaque, and consumed by being passed on."""

    def start(self, tokens: Tensor, lengths: Tensor, *, capacity: int = 0) -> tuple[Tensor, Any]:
        """Read `tokens` (B, W), right-aligned, `lengths` (B,) of them in each row; gives (B, W, H)."""
        ...

    def append(self, state: Any, tokens: Tensor) -> tuple[Tensor, Any]:
        """Read `tokens` (B, k) after each row; gives (B, k, H)."""
        ...

    def select(self, state: Any, index: Tensor) -> Any:
        """Rows `index` (M,): reorder, compact and expand in one."""
        ...

    def crop(self, state: Any, lengths: Tensor) -> Any:
        """Cut each row to its first `lengths` (B,) tokens."""
        ...


@dataclass(frozen=True, eq=False)
class RowState:
    """B rows of tokens that the network has read, right-aligned in `width` columns.

    Parameters
    ----------
    cache : transformers cache or None
        Keys, values and recurrent states; written in place, so a state that has been passed on is consumed.
    history : Tensor (B, width) or None
        The tokens themselves, kept only where there is no cache that continues exactly.
    pads : Tensor (B,), int64
        Columns on the left of each row that hold nothing.
    padded : bool
        Whether any row has such columns.
    """

    cache: Any
    history: Tensor | None
    pads: Tensor
    width: int
    padded: bool

    @property
    def lengths(self) -> Tensor:
        """(B,) tokens of each row."""
        return self.width - self.pads


class CachedRows:
    """What one network can do with rows of tokens, by one kind of cache.

    Parameters
    ----------
    network : Network
    kind : str
        "buffer", "config" or "none"; see `lmppl.lm.caches`.
    split : bool
        Whether forwards stop before the head (hidden states) or give logits.
    """

    def __init__(self, network: Network, kind: CacheKind, *, split: bool) -> None:
        self.network, self.kind, self.split = network, kind, split

    def start(self, tokens: Tensor, lengths: Tensor, *, capacity: int = 0) -> tuple[Tensor, RowState]:
        """Read `tokens` (B, W), right-aligned, `lengths` (B,) of them in each row; gives (B, W, H)."""
        from lmppl.lm.caches import make_cache

        width = tokens.shape[1]
        pads = width - lengths
        cache = make_cache(self.kind, self.network.config, capacity)
        state = RowState(cache, None, pads, 0, bool((pads > 0).any()))
        return self.append(state, tokens)

    def append(self, state: RowState, tokens: Tensor) -> tuple[Tensor, RowState]:
        """Read `tokens` (B, k) after each row; gives (B, k, H). The given state is consumed."""
        k = tokens.shape[1]
        width, history = state.width + k, None
        read, first = tokens, state.width
        if self.kind == "none":
            read = history = tokens if state.history is None else torch.cat([state.history, tokens], 1)
            first = 0
        mask = positions = None
        if state.padded:
            columns = torch.arange(width, device=tokens.device)
            mask = (columns >= state.pads[:, None]).long()
            positions = (columns[first:] - state.pads[:, None]).clamp_min(0)
        hidden = self.network.forward(
            read, split=self.split, cache=state.cache, mask=mask, positions=positions, inference=self.kind == "buffer"
        )
        return hidden[:, -k:], replace(state, history=history, width=width)

    def select(self, state: RowState, index: Tensor) -> RowState:
        """Rows `index` (M,): reorder, compact and expand in one. The given state is consumed."""
        from lmppl.lm.caches import select_rows

        if state.cache is not None:
            select_rows(state.cache, index)
        pads = state.pads[index]
        history = None if state.history is None else state.history[index]
        return _trimmed(replace(state, history=history, pads=pads))

    def crop(self, state: RowState, lengths: Tensor) -> RowState:
        """Cut each row to its first `lengths` (B,) tokens; rows are moved so that each ends in the last column.

        Raises
        ------
        UnsupportedModel
            Where the architecture needs a cache that cannot be cut.
        """
        if self.kind == "config":
            raise UnsupportedModel(
                f"{self.network.name} keeps a recurrent or windowed state that cannot be cut back; "
                "prefill the shorter rows again (the decoder's capabilities say 'crop' where cutting works)"
            )
        width = int(lengths.max())
        pads = width - lengths
        removed = state.lengths - lengths
        uniform = bool((removed == removed[0]).all())
        if uniform and width + int(removed[0]) == state.width:
            columns, history = None, None if state.history is None else state.history[:, :width]
        else:
            shift = state.pads + lengths - width
            columns = (shift[:, None] + torch.arange(width, device=shift.device)).clamp_min(0)
            history = None if state.history is None else state.history.gather(1, columns)
        if state.cache is not None:
            state.cache.cut(width, columns)
        return RowState(state.cache, history, pads, width, bool((pads > 0).any()))


def _trimmed(state: RowState) -> RowState:
    """Without the columns that all rows have on their left: the longest rows have gone."""
    if not state.padded or len(state.pads) == 0:
        return state
    least, most = (int(x) for x in state.pads.aminmax())
    hide = getattr(state.cache, "hide", None)
    if least == 0 or hide is None:
        return replace(state, padded=most > 0)
    hide(least)
    history = None if state.history is None else state.history[:, least:]
    return replace(state, history=history, pads=state.pads - least, width=state.width - least, padded=most > least)
