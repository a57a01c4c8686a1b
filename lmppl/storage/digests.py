"""Content hashes of tensors: what checksums of files and fingerprints of models are made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["hash_content", "hash_tensors", "tensor_bytes"]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The entries of a dense tensor in row-major order, on whatever device and in whatever strides they lie."""
    dense = tensor.detach().cpu().contiguous()
    # A dimension of one entry may keep any stride, also in a contiguous tensor, and `view` would refuse it.
    flat = dense.as_strided((dense.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data


def hash_content(header: object, tensors: Mapping[str, Tensor]) -> str:
    """sha256 of plain data and of dense tensors, in hexadecimal."""
    plain = json.dumps(json.loads(json.dumps(header)), sort_keys=True)  # as it will be read: keys are texts
    return hashlib.sha256(f"{plain}{hash_tensors(tensors)}".encode()).hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of the names, shapes, dtypes and entries of dense tensors, in hexadecimal; their order does not count."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
