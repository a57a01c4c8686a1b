"""The last token read again over a changed past: what gradient steps on a key-value cache need of a decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmppl.lm.base import LanguageModel
from lmppl.lm.rows import CachedRows, RowState
from lmppl.lm.transformers import DecoderState, TransformersDecoder, TransformersLM

__all__ = ["Past", "has_open_past", "past_of", "read_again"]

Past = list[tuple[Tensor, Tensor]]
"""Keys and values (B, heads, columns, size) of each layer that has some."""


def has_open_past(lm: LanguageModel) -> bool:
    """Whether the keys and values of `lm`'s cache are plain tensors, one for each position: no recurrent state."""
    return isinstance(lm, TransformersLM) and lm.abilities.cache == "buffer" and lm.abilities.padded


def past_of(state: DecoderState) -> Past:
    """Keys and values of every position but the last one of each row; views of the cache."""
    rows: RowState = state.rows
    width = rows.width - 1
    return [(layer.keys[:, :, :width], layer.values[:, :, :width]) for layer in rows.cache.buffers]


def read_again(
    decoder: TransformersDecoder, state: DecoderState, tokens: Tensor, past: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """(B, H) hidden states of `tokens` (B,), the last of each row, over `past` in place of what the cache holds.

    The cache is not touched. Differentiable in `past` where gradients are on; padded columns are masked out.
    """
    from lmppl.lm.caches import BufferedCache, BufferedLayer

    assert isinstance(decoder.rows, CachedRows)  # that of an open past
    rows: RowState = state.rows
    cache, given = BufferedCache(0), iter(past)
    for layer in rows.cache.layers:
        fresh = BufferedLayer()
        if layer.key_buffer is not None:
            keys, values = next(given)
            fresh.hold(keys, values, keys.shape[2])
        cache.layers.append(fresh)
    before = RowState(cache, None, rows.pads, rows.width - 1, rows.padded)
    hidden, _ = decoder.rows.append(before, tokens[:, None])
    return hidden[:, -1]


def context_ends(lm: LanguageModel, context: Tensor) -> Tensor:
    """(B,) the last token of each context."""
    assert isinstance(lm, TransformersLM)
    last: Tensor = lm.context_ids[context, -1]
    return last


def zeros_like_past(past: Past) -> list[Tensor]:
    """Changes of the past, all zero and differentiable: keys and values of each layer in turn."""
    return [torch.zeros_like(part).requires_grad_() for pair in past for part in pair]
