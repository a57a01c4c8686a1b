"""Reading what a user function returned: a list, an array or a tensor, one number (or vector) for each text.

Nothing is repaired: a wrong shape is never reshaped and a wrong value never clipped; the error quotes the
text.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from lmppl.errors import FactorError, ShapeError

__all__ = ["Batch", "quote", "read_column"]


def quote(text: str, limit: int = 80) -> str:
    """`repr(text)`, cut to `limit` characters."""
    shown = repr(text)
    return shown if len(shown) <= limit else f"{shown[: limit - 4]}...{shown[0]}"


@dataclass(frozen=True)
class Batch:
    """What errors say about a call.

    Parameters
    ----------
    head : str
        Who was called: "factor 'r': sentiment".
    size : int
        B, the number of texts.
    texts : callable
        Gives the B texts; asked only when an error quotes one.
    labels : tuple of str
        Labels that the function is known to have, if it is a text-classification pipeline.
    """

    head: str
    size: int
    texts: Callable[[], list[str]]
    labels: tuple[str, ...] = ()

    def text(self, row: int) -> str:
        """The text of a row, as errors show it."""
        return quote(self.texts()[row])

    def refuse(self, row: int, got: str, expected: str) -> NoReturn:
        """Raise for the value of one row."""
        raise FactorError(f"{self.head} returned {got}, expected {expected}, for the text {self.text(row)}")


def read_column(values: Any, batch: Batch) -> Tensor:
    """The values of B texts as a tensor (B,) or (B, K), float64, on the device where they were.

    Parameters
    ----------
    values : list, tuple, array or tensor
        Numbers or booleans, or vectors of K ≥ 2 of them.
    batch : Batch
        For the messages.

    Raises
    ------
    FactorError
        For what is no number: nan, +inf, None, a string, a label; −inf is a number here.
    ShapeError
        For any other shape, (B, 1) included.
    """
    if hasattr(values, "__array__") and not isinstance(values, Tensor | np.generic):
        array = np.asarray(values)
        values = torch.from_numpy(array.copy()) if array.dtype.kind in "biuf" else array.tolist()
    if isinstance(values, numbers.Real | np.generic) or (isinstance(values, Tensor) and values.dim() == 0):
        _refuse_scalar(float(values), batch)
    column = values.detach() if isinstance(values, Tensor) else _from_items(values, batch)
    if column.is_complex():
        raise FactorError(f"{batch.head} returned complex numbers, expected real ones")
    _check_shape(tuple(column.shape), batch)
    column = column.to(torch.float64)
    bad = torch.isnan(column) | (column == torch.inf)
    if bool(bad.any()):
        where = torch.nonzero(bad)[0]
        batch.refuse(int(where[0]), f"{float(column[tuple(where)])}", "a finite number")
    return column


def _from_items(values: Any, batch: Batch) -> Tensor:
    if not isinstance(values, list | tuple):
        raise FactorError(
            f"{batch.head} returned {_with_article(type(values).__name__)}, expected a list, an array or a tensor "
            f"of {batch.size} numbers"
        )
    if len(values) != batch.size:
        _check_shape((len(values),), batch)
    rows = [_item(row, value, batch) for row, value in enumerate(values)]
    widths = [len(value) if isinstance(value, list) else None for value in rows]
    for row, width in enumerate(widths):
        if width != widths[0]:
            raise ShapeError(
                f"{batch.head} returned {_count(widths[0])} for the first text but {_count(width)} for "
                f"{batch.text(row)}"
            )
    return torch.tensor(rows, dtype=torch.float64)


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _count(width: int | None) -> str:
    return "a number" if width is None else f"a list of {width}"


def _item(row: int, value: Any, batch: Batch) -> float | list[float]:
    if isinstance(value, Tensor | np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple) and not _labels(value):
        return [_number(row, one, batch) for one in value]
    return _number(row, value, batch)


def _number(row: int, value: Any, batch: Batch) -> float:
    if isinstance(value, numbers.Real | np.bool_):
        try:
            return float(value)
        except OverflowError:  # an integer beyond the largest float
            batch.refuse(row, "an integer too large for a float", "a number")
    if labels := _labels(value):
        raise FactorError(
            f"{batch.head} returned labels with scores, expected numbers; choose the score that is meant with "
            f"label=, one of {list(batch.labels or labels)}"
        )
    batch.refuse(row, quote(value) if isinstance(value, str) else repr(value), "a number")


def _labels(value: Any) -> list[str]:
    """The labels of a pipeline's answer for one text; empty where it is none."""
    items = value if isinstance(value, list | tuple) else [value]
    return [str(one["label"]) for one in items if isinstance(one, Mapping) and {"label", "score"} <= set(one)]


def _check_shape(shape: tuple[int, ...], batch: Batch) -> None:
    count = batch.size
    if shape[0] == count and (len(shape) == 1 or (len(shape) == 2 and shape[1] > 1)):
        return
    fix = ""
    if shape == (count, 1):
        fix = "; return values.squeeze(-1)"
    elif shape == (1, count):
        fix = "; return values.squeeze(0)"
    raise ShapeError(
        f"{batch.head} returned: got shape {shape}, expected ({count},), one number for each text{fix}; "
        f"the first text is {batch.text(0)}"
    )


def _refuse_scalar(value: float, batch: Batch) -> NoReturn:
    fix = "the function gets a list of texts and returns one number for each"
    if batch.size == 1:
        fix = "return a list of one number ([value], or values.squeeze(-1) in place of values.squeeze())"
    raise ShapeError(
        f"{batch.head} returned: got the single number {value:g}, expected ({batch.size},); {fix}; "
        f"the first text is {batch.text(0)}"
    )
