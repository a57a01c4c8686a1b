"""Draws on disk, whole or not at all: `.jsonl` for people, `.safetensors` to the bit, `.parquet` for tables.

There is no pickle. Texts are stored as they were decoded, so that loading needs no language model.
"""

from lmppl.storage.digests import hash_content, hash_tensors, tensor_bytes
from lmppl.storage.files import atomic_write, versions
from lmppl.storage.formats import load_draws, save_draws
from lmppl.storage.frames import to_arrow, to_dataset, to_pandas
from lmppl.storage.plain import pack, unpack

__all__ = [
    "atomic_write",
    "hash_content",
    "hash_tensors",
    "load_draws",
    "pack",
    "save_draws",
    "tensor_bytes",
    "to_arrow",
    "to_dataset",
    "to_pandas",
    "unpack",
    "versions",
]
