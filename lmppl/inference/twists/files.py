"""Learned twists on disk: one safetensors file, whose header says what it was learned for."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lmppl.errors import ModelError, StorageError
from lmppl.inference.twists.head import HeadShape, TwistHead
from lmppl.inference.twists.learned import LearnedTwist, TwistRecord
from lmppl.lm.base import LanguageModel
from lmppl.modeling.model import Model
from lmppl.sequences import Cost
from lmppl.storage import atomic_write, hash_content

__all__ = ["load_twist", "save_twist"]

FORMAT, FORMAT_VERSION = "lmppl.twist", 2


def save_twist(twist: LearnedTwist, path: str | Path) -> Path:
    """Write `twist` to `path`, which is replaced as a whole or not at all.

    Raises
    ------
    StorageError
        With the path and the system's reason.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in twist.head.state_dict().items()}
    header = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "shape": twist.head.shape.as_dict(),
        "record": asdict(twist.record),
    }
    header = {**header, "sha256": hash_content(header, tensors)}
    content = safetensors.torch.save(tensors, {FORMAT: json.dumps(header)})
    return atomic_write(path, lambda temporary: temporary.write_bytes(content))


def load_twist(path: str | Path, model: Model | LanguageModel) -> LearnedTwist:
    """See `LearnedTwist.load`."""
    path = Path(path)
    if not path.is_file():
        what = "it is a folder, expected the file of a twist" if path.is_dir() else "there is no such file"
        raise StorageError(f"cannot read {path}: {what}")
    header, tensors = _read(path)
    lm = model.prior if isinstance(model, Model) else model
    try:
        record = TwistRecord(**{**header["record"], "cost": Cost(**header["record"]["cost"])})
        bias = tensors["bias"]
        head = TwistHead(HeadShape(**header["shape"]), generator=torch.Generator(), dtype=bias.dtype)
        head.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError) as error:
        raise StorageError(f"cannot read {path}: damaged, or written by another version of lmppl: {error}") from error
    twist = LearnedTwist(head.to(lm.device), record)
    reason = twist.unsupported_reason(lm)
    if reason is not None:
        raise ModelError(f"{path}: {reason}")
    if isinstance(model, Model) and model.spec_hash != record.spec_hash:
        raise ModelError(
            f"{path}: the twist was learned for {record.formula} (spec {record.spec_hash}), and this is "
            f"{model.formula} (spec {model.spec_hash}); learn one for it, or load the file for the LM alone, "
            "model.prior, to use it as an approximation"
        )
    return twist


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        header = json.loads(metadata.get(FORMAT, "null"))
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise StorageError(f"cannot read {path}: no safetensors file, or a damaged one: {error}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise StorageError(f"cannot read {path}: it holds no learned twist (a file of LearnedTwist.save)")
    if header.get("version") != FORMAT_VERSION:
        got = header.get("version")
        raise StorageError(f"cannot read {path}: format version {got}, this lmppl reads {FORMAT_VERSION}")
    if header.pop("sha256", None) != hash_content(header, tensors):
        raise StorageError(f"cannot read {path}: its content does not match its checksum; the file is damaged")
    return header, tensors
