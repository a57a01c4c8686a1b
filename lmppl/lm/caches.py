"""Key-value caches that a decoder can extend, select and crop without copying what stays.

A cache of `BufferedLayer`s keeps every position of every layer, rows right-aligned: the last token of each row is in
the last column, and a row that is shorter than the widest one starts further right. Masks that models derive from
column distances (sliding windows, relative biases) are then right for every row, which masked holes in the middle are
not. Architectures with recurrent state need the cache that transformers builds from the config; rows of that one can
be selected, but not cut back.

Imports transformers, so it is imported when a model is loaded, not with lmppl.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

__all__ = ["BufferedCache", "BufferedLayer", "CacheKind", "make_cache", "select_rows"]

CacheKind = Literal["buffer", "config", "none"]


class BufferedLayer(DynamicLayer):
    """Keys and values of one layer in buffers (rows, heads, capacity, size) that are written in place.

    Parameters
    ----------
    capacity : int
        Columns to allocate first; a full buffer grows to twice its columns.

    Notes
    -----
    Under autograd nothing is written in place: the new columns are concatenated, so that gradients reach them.
    """

    def __init__(self, capacity: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity = capacity
        self.start = 0  # columns before it are padding of all rows, and out of sight
        self.end = 0
        self.rows = 0
        self.key_buffer: Tensor | None = None
        self.value_buffer: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append columns; returns views of all columns so far."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.rows, before = key_states.shape[0], self.end
        self.end += key_states.shape[2]
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad or self.tracked):
            for name, states in (("key_buffer", key_states), ("value_buffer", value_states)):
                buffer = getattr(self, name)
                whole = states if before == 0 else torch.cat([buffer[: self.rows, :, self.start : before], states], 2)
                setattr(self, name, whole)
            self.start, self.end = 0, self.end - self.start
        else:
            self.key_buffer = self._written(self.key_buffer, key_states, before)
            self.value_buffer = self._written(self.value_buffer, value_states, before)
        self._view()
        assert self.keys is not None  # as `_view` found them
        assert self.values is not None
        return self.keys, self.values

    def hold(self, keys: Tensor, values: Tensor, end: int, start: int = 0) -> None:
        """Take over buffers (rows, heads, capacity, size) whose columns from `start` to before `end` are written."""
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.key_buffer, self.value_buffer = keys, values
        self.rows, self.start, self.end = len(keys), start, end
        self._view()

    def fits(self, rows: int, columns: int) -> bool:
        """Whether the buffers have room for as much, and can be written in place."""
        assert self.key_buffer is not None  # asked of layers that hold something
        return self.key_buffer.shape[0] >= rows and self.key_buffer.shape[2] >= columns and not self.tracked

    def empty(self, column: int) -> None:
        """No rows; the next column to write is `column`."""
        self.rows, self.start, self.end = 0, column, column

    def get_seq_length(self) -> int:
        """Columns in sight."""
        return self.end - self.start

    def hide(self, columns: int) -> None:
        """Leave out the first `columns`, which hold nothing of any row; nothing is moved."""
        self.start += columns
        self._view()

    def shift(self, columns: int) -> None:
        """Move what is in sight to the left by `columns` of the buffers."""
        for buffer in (self.key_buffer, self.value_buffer):
            if buffer is not None:
                seen = buffer[: self.rows, :, self.start : self.end]
                buffer[: self.rows, :, self.start - columns : self.end - columns] = seen.clone()
        self.start, self.end = self.start - columns, self.end - columns
        self._view()

    def select_in_place(self, target: Tensor, source: Tensor, rows: int) -> None:
        """Copy rows `source` over rows `target`, then keep the first `rows` rows."""
        for buffer in (self.key_buffer, self.value_buffer):
            if buffer is not None and len(target):
                buffer[target, :, self.start : self.end] = buffer[source, :, self.start : self.end]
        self.rows = rows
        self._view()

    def select_copy(self, index: Tensor) -> None:
        """Rows `index`, into fresh buffers."""
        self.key_buffer = self._copied(self.key_buffer, index)
        self.value_buffer = self._copied(self.value_buffer, index)
        self.rows = len(index)
        self._view()

    def truncate(self, length: int) -> None:
        """Keep the first `length` columns."""
        self.end = self.start + length
        self._view()

    def gather_columns(self, columns: Tensor) -> None:
        """Row i's new columns are its old columns `columns[i]` (rows, width)."""
        index = self.start + columns[:, None, :, None]
        for name in ("key_buffer", "value_buffer"):
            buffer = getattr(self, name)
            if buffer is not None:
                _, heads, _, size = buffer.shape
                moved = buffer[: self.rows].gather(2, index.expand(-1, heads, -1, size))
                setattr(self, name, moved)
        self.start, self.end = 0, columns.shape[1]
        self._view()

    @property
    def room(self) -> int:
        """Rows that the buffers have; those beyond `rows` hold nothing."""
        return 0 if self.key_buffer is None else len(self.key_buffer)

    @property
    def tracked(self) -> bool:
        """Whether autograd follows what is held."""
        return self.key_buffer is not None and self.key_buffer.requires_grad

    def _written(self, buffer: Tensor | None, states: Tensor, before: int) -> Tensor:
        rows, heads, _, size = states.shape
        if buffer is None or buffer.shape[2] < self.end or buffer.requires_grad:
            columns = max(self.capacity, self.end if buffer is None else 2 * buffer.shape[2], self.end)
            with torch.inference_mode(False):  # to be written in place in any mode
                grown = states.new_empty(rows, heads, columns, size)
            if buffer is not None:
                grown[:, :, :before] = buffer[:rows, :, :before]
            buffer = grown
        buffer[:rows, :, before : self.end] = states
        return buffer

    def _copied(self, buffer: Tensor | None, index: Tensor) -> Tensor | None:
        if buffer is None or buffer.requires_grad:
            return buffer if buffer is None else buffer[:, :, : self.end].index_select(0, index)
        _, heads, columns, size = buffer.shape
        fresh = buffer.new_empty(len(index), heads, max(columns, self.capacity), size)
        fresh[:, :, self.start : self.end] = buffer[:, :, self.start : self.end].index_select(0, index)
        return fresh

    def _view(self) -> None:
        if self.key_buffer is not None and self.value_buffer is not None:
            self.keys = self.key_buffer[: self.rows, :, self.start : self.end]
            self.values = self.value_buffer[: self.rows, :, self.start : self.end]


class BufferedCache(Cache):
    """One `BufferedLayer` for each layer that the model writes; rows are selected and cut back here.

    Parameters
    ----------
    capacity : int
        Columns that each layer allocates first.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(layers=[])
        self.capacity = capacity

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As `Cache.update`; a layer appears when it is first written."""
        while len(self.layers) <= layer_idx:
            self.layers.append(BufferedLayer(self.capacity))
        layer = self.layers[layer_idx]
        assert isinstance(layer, BufferedLayer)  # nothing else is ever appended
        return layer.update(key_states, value_states)

    @property
    def buffers(self) -> list[BufferedLayer]:
        """The layers that hold something; a model whose layers share keys leaves some empty."""
        return [layer for layer in self.layers if isinstance(layer, BufferedLayer) and layer.key_buffer is not None]

    def select(self, index: Tensor) -> None:
        """Keep rows `index` (M,).

        In place where the buffers have room and no row that is copied is written to as well. That holds for the index
        that compaction makes, and for a resampling that leaves each survivor where it was.
        """
        layers, count = self.buffers, len(index)
        if not layers:
            return
        target = torch.nonzero(index != torch.arange(count, device=index.device)).squeeze(1)
        source = index[target]
        still = (source >= count) | (index[source.clamp_max(count - 1)] == source)
        shared = any(layer.tracked for layer in layers)
        if count <= layers[0].room and not shared and bool(still.all()):
            for layer in layers:
                layer.select_in_place(target, source, count)
        else:
            for layer in layers:
                layer.select_copy(index)

    @property
    def start(self) -> int:
        """Columns of the buffers that are out of sight, on the left."""
        layers = self.buffers
        return layers[0].start if layers else 0

    def hide(self, columns: int) -> None:
        """Leave out the first `columns`, which are padding of every row."""
        for layer in self.buffers:
            layer.hide(columns)

    def cut(self, width: int, columns: Tensor | None) -> None:
        """Keep the first `width` columns, or `columns` (rows, width) where rows are cut to different lengths."""
        for layer in self.buffers:
            if columns is None:
                layer.truncate(width)
            else:
                layer.gather_columns(columns)


def make_cache(kind: CacheKind, config: Any, capacity: int) -> Cache | None:
    """An empty cache: `buffer` (right-aligned, croppable), `config` (as transformers builds it), or none at all."""
    if kind == "buffer":
        return BufferedCache(capacity)
    return DynamicCache(config=config) if kind == "config" else None


def select_rows(cache: Any, index: Tensor) -> None:
    """Keep rows `index` (M,) of any cache."""
    if isinstance(cache, BufferedCache):
        cache.select(index)
    else:
        cache.reorder_cache(index)  # the only row selection that every layer type of transformers has
