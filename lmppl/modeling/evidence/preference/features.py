"""Features of texts, on the scale of the training pairs; a column that cannot bear a weight is named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmppl.errors import FactorError, ModelError, ShapeError
from lmppl.modeling.evidence.preference.pairs import Pairs
from lmppl.modeling.returned_values import quote

__all__ = ["Featuriser", "Standardised", "differences", "standardise"]

Featuriser = Callable[[list[str]], Any]

FLAT = 1e-10  # a column whose spread is below this share of its size is constant but for rounding


@dataclass(frozen=True, eq=False)
class Standardised:
    """f(x) = (raw(x) − centre) / scale, with the training texts' mean and standard deviation.

    The texts are both sides of all N pairs; the divisor of the variance is 2N − 1.

    Parameters
    ----------
    fn : callable
        list of B texts → (B, D): array, tensor or nested list.
    centre, scale : Tensor (D,)
    """

    fn: Featuriser
    centre: Tensor
    scale: Tensor

    def __call__(self, texts: Sequence[str], who: str) -> Tensor:
        """(B, D) of B texts, float64, on the CPU."""
        raw = raw_features(self.fn, texts, who)
        if raw.shape[1] != len(self.centre):
            raise ShapeError(
                f"{who}: the features have {raw.shape[1]} columns, expected {len(self.centre)}, as when the head was "
                "fitted"
            )
        return (raw - self.centre) / self.scale


def raw_features(fn: Featuriser, texts: Sequence[str], who: str) -> Tensor:
    """(B, D) of B texts, float64; each distinct text is read once.

    Raises
    ------
    ShapeError
        Where the result is no matrix with one row for each text.
    FactorError
        For what is not finite; the message has the column and the text.
    """
    distinct = list(dict.fromkeys(texts))
    with torch.no_grad():
        values = fn(distinct)
    matrix = values.detach() if isinstance(values, Tensor) else _as_array(values, len(distinct), who)
    if matrix.dim() != 2 or len(matrix) != len(distinct) or matrix.shape[1] == 0:
        raise ShapeError(
            f"{who}: features returned shape {tuple(matrix.shape)}, expected ({len(distinct)}, D): a row of "
            "numbers for each text"
        )
    matrix = matrix.to("cpu", torch.float64)
    bad = torch.nonzero(~torch.isfinite(matrix))
    if len(bad):
        row, column = bad[0].tolist()
        raise FactorError(
            f"{who}: feature column {column} is {float(matrix[row, column]):g}, expected a finite number, for the text "
            f"{quote(distinct[row])}"
        )
    index = {text: i for i, text in enumerate(distinct)}
    rows: Tensor = matrix[[index[text] for text in texts]]
    return rows


def _as_array(values: Any, count: int, who: str) -> Tensor:
    try:
        return torch.from_numpy(np.array(values, dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise ShapeError(
            f"{who}: features returned a {type(values).__name__} that is no matrix of numbers ({error}), expected "
            f"({count}, D): a row of numbers for each text"
        ) from error


def standardise(fn: Featuriser, pairs: Pairs, who: str) -> tuple[Standardised, Tensor]:
    """The scale of the training texts, and (N, D) the differences f(chosen) − f(rejected).

    Raises
    ------
    ModelError
        Where a column is constant over the texts, or equal on the two sides of every pair; with its number.
    """
    if not callable(fn):
        raise ModelError(f"{who}: got features={type(fn).__name__}, expected a function of a list of texts")
    raw = raw_features(fn, [*pairs.chosen, *pairs.rejected], who)
    size = raw.abs().amax(0)
    _refuse_columns(
        raw.amax(0) - raw.amin(0) <= FLAT * size,
        f"{who}: feature column {{}} is constant over the training texts; leave it out, a reward needs no intercept",
    )
    first, second = raw.split(len(pairs))
    _refuse_columns(
        (first - second).abs().amax(0) <= FLAT * size,
        f"{who}: feature column {{}} is the same on both sides of every pair, so that no choice tells its weight; "
        "leave it out",
    )
    scaled = Standardised(fn, raw.mean(0), raw.std(0))
    return scaled, (first - second) / scaled.scale


def differences(features: Standardised, pairs: Pairs, who: str) -> Tensor:
    """(N, D) f(chosen) − f(rejected)."""
    both = features([*pairs.chosen, *pairs.rejected], who)
    return both[: len(pairs)] - both[len(pairs) :]


def _refuse_columns(bad: Tensor, message: str) -> None:
    columns = torch.nonzero(bad)[:, 0].tolist()
    if columns:
        shown = ", ".join(map(str, columns[:5])) + (f" and {len(columns) - 5} more" if len(columns) > 5 else "")
        raise ModelError(message.format(shown))
