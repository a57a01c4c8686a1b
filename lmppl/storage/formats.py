"""Saving and loading draws: the suffix of the path chooses the format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from lmppl.errors import StorageError
from lmppl.sequences import Draws
from lmppl.storage.files import atomic_write
from lmppl.storage.frames import require, to_arrow
from lmppl.storage.records import (
    FORMAT,
    Table,
    by_group,
    check_header,
    draws_of,
    header_of,
    numbers,
    spelled,
    table_of,
    tensors_of,
    with_text,
)

__all__ = ["load_draws", "save_draws"]

SUFFIXES = {
    ".jsonl": "for people",
    ".safetensors": "complete to the bit",
    ".parquet": "for tables, needs the extra 'data'",
}
SEQUENCES = ("ids", "lengths", "finished", "context")
ROW = ("context", "text", "ids", "finished")


def save_draws(draws: Draws, path: str | Path) -> Path:
    """Write `draws` to `path` in the format that its suffix names, and return `path`.

    `.safetensors` keeps every tensor to the bit; `.jsonl` and `.parquet` keep every value and dtype, and fill
    the ids after the end of a row with one pad id.

    Raises
    ------
    StorageError
        On an unknown suffix, on `meta` that JSON cannot hold, and where the file cannot be written.
    MissingDependency
        For `.parquet` without the extra `data`.
    """
    path = Path(path)
    write = {".jsonl": _write_jsonl, ".safetensors": _write_safetensors, ".parquet": _write_parquet}
    return write[_suffix(path)](draws, path)


def load_draws(path: str | Path) -> Draws:
    """Read what `save_draws` wrote; texts come back as they were, without the LM (`decoder` is None).

    Raises
    ------
    StorageError
        Where there is no such file, or it is cut, damaged, or no file of draws; the message says which.
    """
    path = Path(path)
    read = {".jsonl": _read_jsonl, ".safetensors": _read_safetensors, ".parquet": _read_parquet}
    reader = read[_suffix(path)]
    if not path.is_file():
        raise StorageError(f"cannot read {path}: there is no such file")
    try:
        return reader(path)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        what = f"no entry {error}" if isinstance(error, KeyError) else str(error)
        raise StorageError(f"cannot read {path}: damaged, or not written by lmppl: {what}") from error


def _suffix(path: Path) -> str:
    if path.suffix not in SUFFIXES:
        listed = ", ".join(f"{suffix} ({what})" for suffix, what in SUFFIXES.items())
        raise StorageError(f"{path}: got the suffix {path.suffix!r}, expected one of {listed}")
    return path.suffix


# One JSON object a line: the header, then the draws.


def _write_jsonl(draws: Draws, path: Path) -> Path:
    lines, table = [header_of(draws)], table_of(draws)
    for values in zip(*table.values(), strict=True):
        line: dict[str, Any] = {}
        for name, value in zip(table, values, strict=True):
            group, dot, rest = name.partition(".")
            if dot:
                line.setdefault(group, {})[rest] = spelled(value)
            else:
                line[name] = spelled(value)
        lines.append(line)
    text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
    # A lone surrogate is legal in a Python string and not in UTF-8; it is kept rather than lost.
    return atomic_write(path, lambda temporary: temporary.write_bytes(text.encode("utf-8", "surrogatepass")))


def _read_jsonl(path: Path) -> Draws:
    # Only "\n" ends a line: JSON strings may hold the other characters at which Python splits.
    lines = path.read_bytes().decode("utf-8", "surrogatepass").split("\n")
    header = check_header(_parsed(lines[0], 1, path), path)
    table: Table = {name: [] for name in (*ROW, *header["columns"])}
    for number, line in enumerate(lines[1:], 2):
        if not line:
            continue
        record = _parsed(line, number, path)
        for name, column in table.items():
            group, dot, rest = name.partition(".")
            try:
                value = record[group][rest] if dot else record[name]
            except (KeyError, TypeError) as error:
                raise StorageError(f"cannot read {path}: line {number} has no {name!r}") from error
            column.append(value if name in ROW else numbers(value))
    return draws_of(header, table, path)


def _parsed(line: str, number: int, path: Path) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise StorageError(f"cannot read {path}: line {number} is no JSON: {error}") from error


# Tensors to the bit; texts as one tensor of bytes, because the header of a safetensors file has a size limit.


def _write_safetensors(draws: Draws, path: Path) -> Path:
    tensors = {name: getattr(draws, name) for name in SEQUENCES} | tensors_of(draws)
    tensors["text"] = torch.frombuffer(bytearray(json.dumps(draws.text).encode()), dtype=torch.uint8)
    # Columns may share memory (log_prior and log_q of a prior's draws do), which the format cannot say.
    alone = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    content = safetensors.torch.save(alone, {FORMAT: json.dumps(header_of(draws))})
    return atomic_write(path, lambda temporary: temporary.write_bytes(content))


def _read_safetensors(path: Path) -> Draws:
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except safetensors.SafetensorError as error:
        raise StorageError(f"cannot read {path}: no safetensors file, or a damaged one: {error}") from error
    header = check_header(json.loads(metadata.get(FORMAT, "null")), path)
    columns = by_group({name: tensors[name] for name in header["columns"]})
    ids, lengths, finished, context = (tensors[name] for name in SEQUENCES)
    prompts, meta = tuple(header["prompts"]), header["meta"]
    draws = Draws(ids, lengths, finished, context, prompts, **columns, meta=meta)
    return with_text(draws, json.loads(bytes(tensors["text"].tolist())))


def _write_parquet(draws: Draws, path: Path) -> Path:
    table = to_arrow(draws)
    parquet = require("pyarrow.parquet", "a .parquet file")
    return atomic_write(path, lambda temporary: parquet.write_table(table, temporary))


def _read_parquet(path: Path) -> Draws:
    stored = require("pyarrow.parquet", "a .parquet file").read_table(path)
    metadata = stored.schema.metadata or {}
    header = check_header(json.loads(metadata.get(FORMAT.encode(), b"null")), path)
    table = {name: stored.column(name).to_pylist() for name in stored.column_names}
    return draws_of(header, table, path)
