"""Draws from a posterior over reward functions, as of Pyro or NumPyro: each draw is a member."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmppl.errors import ModelError, ShapeError
from lmppl.modeling.evidence.reward_sources.members import rewards_of

__all__ = ["PosteriorDraws"]


class PosteriorDraws:
    """M draws of a reward function's parameters as one belief: texts → (B, M).

    The draws are fixed, so that the belief is a function of the text; posterior means over them have their Monte Carlo
    error, of order s/√M for independent draws.

    Parameters
    ----------
    fn : callable
        fn(texts, **draw) → (B,) rewards, where `draw` has the value of each site in one draw.
    samples : mapping of str to tensor or array (M, ...)
        Sites with M ≥ 2 draws, such as `pyro.infer.MCMC.get_samples()` or the values of a `Predictive`; an array of JAX
        is given to `fn` as NumPy's.
    vectorized : bool
        `fn` gets all M draws at once and returns (B, M): for functions that would do costly work on the texts M times.

    Raises
    ------
    ModelError
        Where no site is given, sites have other numbers of draws, or there is one draw.
    FactorError, ShapeError
        When called: nan, ±inf, another shape; the error names the draw, unless `vectorized`.

    Examples
    --------
    >>> slope = torch.tensor([1.0, 1.5])
    >>> PosteriorDraws(lambda texts, slope: [len(t) * slope for t in texts], {"slope": slope})(["ab", "a"])
    tensor([[2.0000, 3.0000],
            [1.0000, 1.5000]], dtype=torch.float64)
    """

    def __init__(self, fn: Callable[..., Any], samples: Mapping[str, Any], *, vectorized: bool = False) -> None:
        if not callable(fn):
            raise ModelError(f"PosteriorDraws: got {type(fn).__name__}, expected a function fn(texts, **draw)")
        if not samples:
            raise ModelError("PosteriorDraws: got no samples, expected site → (M, ...) draws")
        self.fn = functools.partial(fn)  # in a partial `content_digest` counts its attributes, too
        self.samples = {
            str(name): value.detach() if isinstance(value, Tensor) else np.asarray(value)
            for name, value in samples.items()
        }
        self.vectorized = vectorized
        sizes = {name: value.shape[0] if value.ndim else 0 for name, value in self.samples.items()}
        if len(set(sizes.values())) != 1:
            raise ModelError(f"PosteriorDraws: sites have other numbers of draws: {sizes}; expected M of each")
        self.num_draws = next(iter(sizes.values()))
        if self.num_draws < 2:
            raise ModelError(
                f"PosteriorDraws: got {self.num_draws} draw(s), expected two or more along the first axis of each site"
            )
        self.__name__ = getattr(fn, "__name__", type(self).__name__)
        if self.__name__ == "<lambda>":
            self.__name__ = type(self).__name__

    def __call__(self, texts: list[str]) -> Tensor:
        """(B, M) rewards, float64."""
        if self.vectorized:
            return self._all_at_once(texts)
        columns = []
        for m in range(self.num_draws):
            draw = {name: value[m] for name, value in self.samples.items()}
            columns.append(rewards_of(f"draw {m}", functools.partial(self.fn, texts, **draw), texts))
        return torch.stack(columns, 1)

    def _all_at_once(self, texts: list[str]) -> Tensor:
        values = self.fn(texts, **self.samples)
        shape = tuple(getattr(values, "shape", ()))
        if shape != (len(texts), self.num_draws):
            raise ShapeError(
                f"{self.__name__} returned {f'shape {shape}' if shape else type(values).__name__}, expected "
                f"({len(texts)}, {self.num_draws}): a row for each text, a column for each draw"
            )
        return torch.as_tensor(values).detach().double()
