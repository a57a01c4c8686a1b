"""Rows of key-value caches by slot, out of the way of forwards: what chains keep from one step to the next.

Imports transformers, as `lmppl.lm.caches` does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmppl.lm.caches import BufferedCache, BufferedLayer

__all__ = ["CacheShelf"]


class CacheShelf:
    """Rows of `BufferedCache`s by slot, each from its first token on, out of the way of forwards.

    Parameters
    ----------
    num_slots, num_columns : int
        Rows, and tokens of each (context included), that there is room for.
    """

    def __init__(self, num_slots: int, num_columns: int) -> None:
        self.num_slots, self.num_columns = num_slots, num_columns
        self.layers: list[tuple[Tensor, Tensor] | None] = []
        self._idle: BufferedCache | None = None  # given back; new buffers cost a page fault for each page

    def put(self, cache: BufferedCache, rows: Tensor, starts: Tensor, slots: Tensor, width: int) -> None:
        """Copy `width` columns of `rows` (M,), from column `starts` (M,) of the buffers on, into `slots` (M,)."""
        if not self.layers:
            self.layers = [self._room(layer) for layer in cache.layers]
        columns = torch.arange(width, device=rows.device)
        known: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        for shelved, layer in zip(self.layers, cache.layers, strict=True):
            if shelved is None:
                continue
            assert isinstance(layer, BufferedLayer)  # as `_room` found it
            for to, buffer in zip(shelved, (layer.key_buffer, layer.value_buffer), strict=True):
                assert buffer is not None
                _, heads, capacity, size = buffer.shape
                if (heads, capacity) not in known:
                    source = (starts[:, None] + columns).clamp_max(capacity - 1)
                    known[heads, capacity] = (
                        _flat(rows, source, heads, capacity),
                        _flat(slots, columns.expand(len(slots), -1), heads, self.num_columns),
                    )
                read, write = known[heads, capacity]
                to.view(-1, size).index_copy_(0, write, buffer.view(-1, size).index_select(0, read))

    def take(self, slots: Tensor, lengths: Tensor, width: int, room: int) -> BufferedCache:
        """A fresh cache of the rows in `slots` (M,), their first `lengths` (M,) tokens right-aligned in `width`.

        There is room for `room` more columns.
        """
        capacity = width + room
        cache = BufferedCache(capacity)
        columns = torch.arange(capacity, device=slots.device) - (width - lengths)[:, None]
        columns.clamp_(0, self.num_columns - 1)
        known: dict[int, Tensor] = {}
        for shelved in self.layers:
            layer = BufferedLayer(capacity)
            cache.layers.append(layer)
            if shelved is not None:
                heads = shelved[0].shape[1]
                if heads not in known:
                    known[heads] = _flat(slots, columns, heads, self.num_columns)
                fresh = [
                    x.view(-1, x.shape[3]).index_select(0, known[heads]).view(len(slots), heads, capacity, x.shape[3])
                    for x in shelved
                ]
                layer.hold(fresh[0], fresh[1], width)
        return cache

    def open(self, num_rows: int, room: int) -> BufferedCache:
        """An empty cache for `join`, with room for `num_rows` rows and for `room` columns after the longest row."""
        capacity = self.num_columns + room
        idle, self._idle = self._idle, None
        if idle is not None and all(layer.fits(num_rows, capacity) for layer in idle.buffers):
            for layer in idle.buffers:
                layer.empty(self.num_columns)
            return idle
        cache = BufferedCache(capacity)
        for shelved in self.layers:
            layer = BufferedLayer(capacity)
            cache.layers.append(layer)
            if shelved is not None:
                shapes = [(num_rows, x.shape[1], capacity, x.shape[3]) for x in shelved]
                fresh = [x.new_empty(shape) for x, shape in zip(shelved, shapes, strict=True)]
                layer.hold(fresh[0], fresh[1], self.num_columns, self.num_columns)
                layer.rows = 0
        return cache

    def close(self, cache: BufferedCache) -> None:
        """Take back a cache of `open` that nobody reads any more."""
        self._idle = cache

    def join(self, cache: BufferedCache, slots: Tensor, lengths: Tensor, room: int) -> None:
        """Put the rows in `slots` (M,), their first `lengths` (M,) tokens, after the rows of `cache`, right-aligned.

        In place: its buffers have rows to spare, and columns on the left for the longest row. Where fewer than `room`
        columns are left on the right, what is there is moved to the left first.
        """
        known: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        for shelved, layer in zip(self.layers, cache.layers, strict=True):
            if shelved is None:
                continue
            assert isinstance(layer, BufferedLayer)  # as `open` made it
            assert layer.key_buffer is not None
            rows, heads, capacity, _ = layer.key_buffer.shape
            if capacity - layer.end < room:
                layer.shift(layer.end - self.num_columns)
            layer.start = min(layer.start, layer.end - int(lengths.max()))
            if (heads, capacity, layer.start, layer.end) not in known:
                width = layer.end - layer.start
                columns = torch.arange(width, device=slots.device)
                source = (columns - (width - lengths)[:, None]).clamp_min(0)
                to = layer.rows + torch.arange(len(slots), device=slots.device)
                known[heads, capacity, layer.start, layer.end] = (
                    _flat(slots, source, heads, self.num_columns),
                    _flat(to, (layer.start + columns).expand(len(slots), -1), heads, capacity),
                )
            read, write = known[heads, capacity, layer.start, layer.end]
            for x, buffer in zip(shelved, (layer.key_buffer, layer.value_buffer), strict=True):
                assert buffer is not None
                buffer.view(-1, buffer.shape[3]).index_copy_(0, write, x.view(-1, x.shape[3]).index_select(0, read))
            layer.rows += len(slots)
            assert layer.rows <= rows
            layer._view()

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy whole slots `source` (M,) over slots `target` (M,)."""
        for shelved in self.layers:
            if shelved is not None:
                for x in shelved:
                    x[target] = x[source]

    def _room(self, layer: Any) -> tuple[Tensor, Tensor] | None:
        if not isinstance(layer, BufferedLayer) or layer.key_buffer is None or layer.value_buffer is None:
            return None
        keys, values = (
            x.new_zeros(self.num_slots, x.shape[1], self.num_columns, x.shape[3])
            for x in (layer.key_buffer, layer.value_buffer)
        )
        return keys, values


def _flat(rows: Tensor, columns: Tensor, heads: int, capacity: int) -> Tensor:
    """Positions of `columns` (M, k) of every head of `rows` (M,), in a buffer (·, heads, capacity, size) read flat."""
    head = rows[:, None] * heads + torch.arange(heads, device=rows.device)
    return (head[:, :, None] * capacity + columns[:, None]).reshape(-1)
