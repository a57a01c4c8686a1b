"""Draws as plain values and back: a header that describes them, and a table of one list a column."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmppl.errors import StorageError
from lmppl.sequences import Draws

__all__ = ["FORMAT", "Header", "Table"]

FORMAT, FORMAT_VERSION = "lmppl.draws", 1
SCALARS = ("log_weight", "log_prior", "log_q")
GROUPS = ("features", "log_factors", "columns")

Header = dict[str, Any]
Table = dict[str, list[Any]]  # flat column name to N values; grouped columns are called "group.name"


def tensors_of(draws: Draws) -> dict[str, Tensor]:
    """Every column of `draws` that is there, beside the sequences themselves, under its flat name."""
    found = {name: getattr(draws, name) for name in SCALARS if getattr(draws, name) is not None}
    for group in GROUPS:
        found |= {f"{group}.{name}": value for name, value in getattr(draws, group).items()}
    return found


def header_of(draws: Draws) -> Header:
    """What a reader needs beside the rows: prompts, dtypes, shapes, and `meta`.

    Raises
    ------
    StorageError
        Where `meta` holds something that JSON cannot.
    """
    padding = draws.ids[~draws.mask]
    columns = tensors_of(draws).items()
    header = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "num_draws": len(draws),
        "horizon": draws.ids.shape[1],
        "pad_id": int(padding[0]) if len(padding) else 0,
        "prompts": list(draws.prompts),
        "columns": {k: [str(v.dtype).removeprefix("torch."), *v.shape[1:]] for k, v in columns},
        "meta": spelled(draws.meta),
    }
    try:
        json.dumps(header, allow_nan=False)
    except (TypeError, ValueError) as error:
        fix = "keep numbers, strings, lists and dicts"
        raise StorageError(f"draws.meta cannot be saved as JSON: {error}; {fix}") from error
    return header


def check_header(header: Any, path: Path) -> Header:
    """`header` if it is one that this version can read, else a `StorageError`."""
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise StorageError(f"cannot read {path}: it does not begin with the header of a file of lmppl draws")
    if header["version"] > FORMAT_VERSION:
        raise StorageError(
            f"cannot read {path}: got format version {header['version']}, expected at most {FORMAT_VERSION}; "
            "update lmppl"
        )
    return header


def table_of(draws: Draws) -> Table:
    """Every column as a list; `prompt` and `weight` are there for people and are not read back."""
    context = draws.context.tolist()
    table: Table = {
        "context": context,
        "prompt": [draws.prompts[c] for c in context],
        "text": list(draws.text),
        "ids": draws.token_lists(),
        "finished": draws.finished.tolist(),
        "weight": draws.weights.tolist(),
    }
    return table | {name: value.tolist() for name, value in tensors_of(draws).items()}


def draws_of(header: Header, table: Mapping[str, list[Any]], path: Path) -> Draws:
    """The draws that `header_of` and `table_of` describe."""
    count, width = header["num_draws"], header["horizon"]
    rows = table["ids"]
    if len(rows) != count:
        raise StorageError(f"cannot read {path}: got {len(rows)} draws, expected {count}: the file was cut")
    ids = [[*row, *[header["pad_id"]] * (width - len(row))] for row in rows]
    columns = {}
    for name, (dtype, *shape) in header["columns"].items():
        columns[name] = torch.tensor(table[name], dtype=getattr(torch, dtype)).reshape(count, *shape)
    draws = Draws(
        torch.tensor(ids, dtype=torch.int64).reshape(count, width),
        torch.tensor([len(row) for row in rows], dtype=torch.int64),
        torch.tensor(table["finished"], dtype=torch.bool),
        torch.tensor(table["context"], dtype=torch.int64),
        tuple(header["prompts"]),
        **by_group(columns),
        meta=header["meta"],
    )
    return with_text(draws, table["text"])


def by_group(columns: Mapping[str, Tensor]) -> dict[str, Any]:
    """Flat column names as the fields of `Draws`."""
    found: dict[str, Any] = {group: {} for group in GROUPS}
    for name, value in columns.items():
        group, dot, rest = name.partition(".")
        if dot:
            found[group][rest] = value
        else:
            found[name] = value
    return found


def with_text(draws: Draws, text: list[str]) -> Draws:
    """`draws` with texts that no decoder needs to make."""
    draws.__dict__["text"] = list(text)
    return draws


def spelled(value: Any) -> Any:
    """JSON has no infinities and no nan: they become the strings "inf", "-inf" and "nan"."""
    match value:
        case float() if not math.isfinite(value):
            return str(value)
        case list() | tuple():
            return [spelled(v) for v in value]
        case Mapping():
            return {k: spelled(v) for k, v in value.items()}
    return value


def numbers(value: Any) -> Any:
    """The inverse of `spelled` in a column of numbers."""
    if isinstance(value, list):
        return [numbers(v) for v in value]
    return float(value) if isinstance(value, str) else value
