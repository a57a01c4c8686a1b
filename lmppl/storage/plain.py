"""Plain data with tensors in it, as JSON and a table of tensors, and back: what a checkpoint is made of. No pickle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lmppl.errors import StorageError

__all__ = ["pack", "unpack"]

TENSOR, TUPLE, PAIRS, FLOAT = "$tensor", "$tuple", "$dict", "$float"


def pack(value: Any, tensors: dict[str, Tensor], where: str = "") -> Any:
    """`value` as JSON data; tensors are put into `tensors` under names that the data refers to.

    Parameters
    ----------
    value
        Numbers, strings, booleans, None, tensors, and lists, tuples and dicts of these.
    tensors : dict
        Filled here.
    where : str
        The path to `value`, which names its tensors and stands in errors.

    Raises
    ------
    StorageError
        Naming the path to something that is no plain data.
    """
    if isinstance(value, Tensor):
        tensors[where] = value.detach().cpu().clone().contiguous()
        return {TENSOR: where}
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {FLOAT: str(value)}
    if isinstance(value, tuple):
        return {TUPLE: [pack(one, tensors, f"{where}/{i}") for i, one in enumerate(value)]}
    if isinstance(value, list):
        return [pack(one, tensors, f"{where}/{i}") for i, one in enumerate(value)]
    if isinstance(value, Mapping):
        pairs = [
            [pack(key, tensors, f"{where}/key {i}"), pack(one, tensors, f"{where}/{key}")]
            for i, (key, one) in enumerate(value.items())
        ]
        return {PAIRS: pairs}
    raise StorageError(
        f"{where or 'value'}: got {type(value).__name__}, expected plain data: numbers, strings, tensors, and lists, "
        "tuples and dicts of them"
    )


def unpack(data: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `pack` was given.

    Raises
    ------
    KeyError, ValueError
        Where `data` is not what `pack` made.
    """
    if isinstance(data, list):
        return [unpack(one, tensors) for one in data]
    if not isinstance(data, dict):
        return data
    ((kind, content),) = data.items()
    if kind == TENSOR:
        return torch.as_tensor(tensors[content])
    if kind == FLOAT:
        return float(content)
    if kind == TUPLE:
        return tuple(unpack(one, tensors) for one in content)
    if kind == PAIRS:
        return {unpack(key, tensors): unpack(one, tensors) for key, one in content}
    raise ValueError(f"unknown kind {kind!r}")
