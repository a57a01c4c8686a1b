"""Columns of what is known of each prefix, one for each number of tokens, that grow as rows do."""

from __future__ import annotations

from torch import Tensor

__all__ = ["widened"]


def widened(columns: Tensor, width: int) -> Tensor:
    """`columns` (B, t, ...) with `width` columns, cut or filled with zeros."""
    room = columns.new_zeros(len(columns), width, *columns.shape[2:])
    kept = min(width, columns.shape[1])
    room[:, :kept] = columns[:, :kept]
    return room
