"""GGUF files: converted once to a safetensors folder in the user's cache, then loaded like any other.

The cache is `$LMPPL_CACHE`, or `lmppl` under `$XDG_CACHE_HOME` or `~/.cache`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from lmppl.errors import MissingDependency, ModelError, StorageError
from lmppl.lm.sources import no_progress_bar

__all__ = ["cache_folder", "converted"]

logger = logging.getLogger(__name__)

RECEIPT = "lmppl.json"  # written last, so that a folder without it is no finished conversion


def cache_folder() -> Path:
    """Where lmppl keeps what takes long to make; it may not exist yet."""
    if os.environ.get("LMPPL_CACHE"):
        return Path(os.environ["LMPPL_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lmppl"


def converted(path: Path) -> Path:
    """The folder with the model of the GGUF file `path` in float32; made on first use.

    The folder is named by the file's content, and appears whole or not at all: it is written elsewhere, read back,
    compared with what was converted, and renamed.

    Raises
    ------
    ModelError
        Where the file is missing or holds no causal LM that transformers can convert.
    MissingDependency
        Where the package `gguf` is missing.
    StorageError
        Where the cache folder cannot be written, or what was written does not read back equal.
    """
    if not path.is_file():
        raise ModelError(f"{path}: no such GGUF file")
    folder = cache_folder() / f"{path.stem}-{_content_hash(path)}"
    if (folder / RECEIPT).is_file():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependency(f"{path.name}: reading GGUF needs the package `gguf`; run `pip install 'lmppl[gguf]'`")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    except OSError as error:
        raise StorageError(f"{folder.parent}: cannot be written ({error}); set LMPPL_CACHE") from error
    try:
        logger.info("converting %s to %s, once; 135 M weights take half a minute", path.name, folder)
        _convert(path, scratch)
        try:
            scratch.rename(folder)
        except OSError:
            # Another process was faster, and its folder is as good; anything else is an error.
            if not (folder / RECEIPT).is_file():
                raise
    except OSError as error:
        raise StorageError(f"{folder}: the converted model cannot be written: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _convert(path: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain, tokenizer = _read(path)
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)
    with no_progress_bar():
        again: Any = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, local_files_only=True)
    AutoTokenizer.from_pretrained(target, local_files_only=True)
    written = again.state_dict()
    for name, tensor in plain.state_dict().items():
        if name not in written or not torch.equal(written[name], tensor):
            raise StorageError(f"{target}: tensor {name!r} does not read back as it was converted")
    receipt = {"source": path.name, "bytes": path.stat().st_size, "sha256": _content_hash(path)}
    (target / RECEIPT).write_text(json.dumps(receipt, indent=1) + "\n")


def _read(path: Path) -> tuple[Any, Any]:
    """A plain model with the file's weights, and its tokenizer.

    A model that `from_pretrained` makes of a GGUF file refuses to be saved, and asks for accelerate without using it;
    one that is built from the config and filled here does neither.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        plain: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        read = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=plain, torch_dtype=torch.float32)
    except (ValueError, KeyError, RuntimeError, NotImplementedError, OSError) as error:
        raise ModelError(f"{path}: transformers cannot convert this GGUF file: {error}") from error
    result = plain.load_state_dict(read["tensors"], strict=False)
    plain.tie_weights()
    tied = set(getattr(plain, "_tied_weights_keys", None) or {}) if config.tie_word_embeddings else set()
    missing = sorted(set(result.missing_keys) - tied)
    if missing or result.unexpected_keys:
        raise ModelError(
            f"{path}: the GGUF file does not fill {type(plain).__name__}: missing {missing[:5]}, "
            f"unexpected {sorted(result.unexpected_keys)[:5]}"
        )
    return plain, tokenizer


def _content_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
