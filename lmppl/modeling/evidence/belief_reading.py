"""Reading the belief that a user function returned: an ensemble, means with standard deviations, or a distribution.

Nothing is repaired: what is no belief is told with its text.
"""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from lmppl.errors import ShapeError
from lmppl.modeling.evidence.beliefs import Belief, Distributed, Gaussian, Members
from lmppl.modeling.returned_values import Batch, read_column

__all__ = ["read_belief", "read_finite"]


def read_belief(values: Any, batch: Batch) -> Belief:
    """The belief that a function returned about B texts.

    Raises
    ------
    FactorError
        nan, ±inf, a negative spread, and what is no belief.
    ShapeError
        One number a text, an ensemble of one, another number of rows.
    """
    if isinstance(values, Distribution):
        if (tuple(values.batch_shape), tuple(values.event_shape)) != ((batch.size,), ()):
            raise ShapeError(
                f"{batch.head} returned a {type(values).__name__} of batch shape {tuple(values.batch_shape)} and event "
                f"shape {tuple(values.event_shape)}, expected ({batch.size},) and (): one law for each text"
            )
        return Distributed(values)
    if isinstance(values, tuple):
        return _read_moments(values, batch)
    return Members(_read_members(values, batch))


def _read_moments(values: tuple[Any, ...], batch: Batch) -> Gaussian:
    if len(values) != 2:
        raise ShapeError(
            f"{batch.head} returned a tuple of {len(values)}, expected two: means and standard deviations; "
            "an ensemble is a list, an array or a tensor (B, M)"
        )
    mean, spread = (
        read_finite(one, replace(batch, head=f"{batch.head}, {what},"))
        for one, what in zip(values, ("means", "standard deviations"), strict=True)
    )
    for what, column in (("means", mean), ("standard deviations", spread)):
        if column.dim() != 1:
            raise ShapeError(f"{batch.head} returned {what} of shape {tuple(column.shape)}, expected ({batch.size},)")
    negative = torch.nonzero(spread < 0)
    if len(negative):
        row = int(negative[0, 0])
        batch.refuse(row, f"the standard deviation {float(spread[row]):g}", "one that is not negative")
    return Gaussian(mean, spread)


def _read_members(values: Any, batch: Batch) -> Tensor:
    shape = tuple(getattr(values, "shape", ()))
    if shape == (batch.size, 1) or (isinstance(values, list) and all(_is_single(one) for one in values)):
        raise ShapeError(
            f"{batch.head} returned an ensemble of one, which has no spread; declare it as Reward, or return (B, M) "
            "with M ≥ 2"
        )
    if len(shape) >= 2 and (len(shape) > 2 or shape[0] != batch.size):
        turned = "; it looks transposed" if shape[1:] == (batch.size,) else ""
        raise ShapeError(f"{batch.head} returned shape {shape}, expected an ensemble ({batch.size}, M){turned}")
    members = read_finite(values, batch)
    if members.dim() != 2:
        raise ShapeError(
            f"{batch.head} returned one number for each text, expected a belief: an ensemble (B, M), a tuple (means, "
            "standard deviations) or a distribution; a reward without uncertainty is a Reward"
        )
    return members


def _is_single(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 1


def read_finite(values: Any, batch: Batch) -> Tensor:
    """As `read_column`, of finite numbers: −inf is an error too."""
    column = read_column(values, batch)
    infinite = torch.nonzero(column == -inf)
    if len(infinite):
        batch.refuse(int(infinite[0, 0]), "-inf", "a finite number")
    return column
