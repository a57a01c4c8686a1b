"""Calling one member of several: what it does wrong names it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lmppl.errors import FactorError, ShapeError
from lmppl.modeling.evidence.belief_reading import read_finite
from lmppl.modeling.returned_values import Batch
from lmppl.modeling.user_functions import OUT_OF_MEMORY

__all__ = ["rewards_of"]


def rewards_of(who: str, call: Callable[[], Any], texts: list[str]) -> Tensor:
    """(B,) the rewards that `call` returns for B texts, float64.

    Raises
    ------
    FactorError, ShapeError
        nan, ±inf, what is no number; another shape than (B,).
    RuntimeError
        Where the call raises: whoever evaluates the feature then looks for the text.
    """
    try:
        values = call()
    except OUT_OF_MEMORY:
        raise
    except (FactorError, ShapeError) as error:
        raise type(error)(f"{who}: {error}") from error
    except Exception as error:
        raise RuntimeError(f"{who} raised {type(error).__name__}: {error}") from error
    column = read_finite(values, Batch(who, len(texts), lambda: texts))
    if column.dim() != 1:
        raise ShapeError(f"{who} returned shape {tuple(column.shape)}, expected ({len(texts)},): one number a text")
    return column.cpu()
