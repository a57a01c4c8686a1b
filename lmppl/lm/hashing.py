"""A content hash of a network's weights."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lmppl.storage import hash_tensors

__all__ = ["hash_weights"]

WHOLE = 1 << 30  # bytes of weights up to which every byte is hashed
SAMPLES = 1024  # entries that stand for a tensor beyond that, next to its sums

_known: weakref.WeakKeyDictionary[nn.Module, tuple[Any, str]] = weakref.WeakKeyDictionary()


def hash_weights(model: nn.Module) -> str:
    """Equal for equal weights, whatever object holds them.

    Up to 1 GiB every byte counts; beyond it each tensor counts with its sum, its sum of squares and 1,024 evenly spaced
    entries. Remembered per model until a tensor is replaced or written to: its version counter tells, or, for what goes
    past it (`weight.data += x`, NumPy views), one of 65 evenly spaced entries. Such a write that changes none of
    these entries is not noticed.
    """
    tensors = {name: t for name, t in sorted(model.state_dict(keep_vars=True).items()) if isinstance(t, Tensor)}
    stamp = (tuple((t.data_ptr(), t._version) for t in tensors.values()), _probe(list(tensors.values())))
    known = _known.get(model)
    if known is not None and known[0] == stamp:
        return known[1]
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    digest = hash_tensors(tensors if size <= WHOLE else _summaries(tensors))
    _known[model] = (stamp, digest)
    return digest


def _probe(tensors: list[Tensor]) -> bytes:
    """At most 64 evenly spaced entries of each tensor, and its last one: one small copy from the device."""
    parts = []
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        sample = torch.cat([flat[:: max(1, -(-len(flat) // 64))], flat[-1:]])
        parts.append(sample.view(torch.uint8).to(tensors[0].device))
    return hashlib.sha256(torch.cat(parts).cpu().numpy().data).digest() if parts else b""


def _summaries(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().reshape(-1)
        wide = flat.float()
        places = torch.linspace(0, max(0, len(flat) - 1), min(SAMPLES, len(flat)), device=flat.device).long()
        what = f"{name} {tuple(tensor.shape)}"
        found |= {f"{what} sums": torch.stack([wide.sum(), wide.square().sum()]), f"{what} entries": flat[places]}
    return found
