"""What forms of prefixes share: columns that are read at each row's length, and whether a token ends a row."""

from __future__ import annotations

import torch
from torch import Tensor

from lmppl.lm.base import LanguageModel

__all__ = ["at_lengths", "ended_with"]


def at_lengths(columns: Tensor, lengths: Tensor) -> Tensor:
    """(B,) the entry of each row of `columns` (B, t) at its length."""
    return columns.gather(1, lengths[:, None])[:, 0]


def ended_with(lm: LanguageModel, ids: Tensor, lengths: Tensor, tokens: Tensor) -> Tensor:
    """(B, k) bool: whether `lm` ends rows `ids` (B, t) of `lengths` (B,) with `tokens` (B, k); the cap aside."""
    over = torch.zeros(tokens.shape, dtype=torch.bool, device=ids.device)
    for length in lengths.unique().tolist():
        same = torch.nonzero(lengths == length).squeeze(1)
        some = tokens.to(ids.device)[same]
        before = ids[same, :length].repeat_interleave(some.shape[1], 0)
        rows = torch.cat([before, some.reshape(-1, 1)], 1)
        over[same] = lm.ended(rows, int(length)).view(some.shape)
    return over.to(tokens.device)
