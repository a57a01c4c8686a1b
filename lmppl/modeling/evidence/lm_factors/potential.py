"""The prefix-by-prefix form of a product of language models."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lmppl.modeling.evidence.lm_factors.prefixes import CachedPrefixes, PrefixRows
from lmppl.modeling.evidence.prefix_columns import at_lengths
from lmppl.sequences import Cost

__all__ = ["ProductPotential", "ProductRows"]


class ProductRows(NamedTuple):
    """B prefixes: rows of each LM, log ψ (B, t + 1) at each length so far, and the lengths (B,)."""

    above: PrefixRows | None
    below: PrefixRows | None
    values: Tensor
    lengths: Tensor


class ProductPotential:
    """log ψ(x_≤t) = a·(log p_above(x_≤t) − log p_below(x_≤t)), a > 0: the `Incremental` form of an `LMFactor`.

    One forward of each LM a token, for equal rows once; all V next tokens are weighed at no further cost. A token with
    p_below = 0 gets weight 1: a completed text with such a token is an error of the factor, unless π0 excludes it.

    Parameters
    ----------
    above, below : CachedPrefixes or None
        At least one; None is p = 1.
    scale : float
        a.
    """

    needs: Collection[Literal["text", "ids", "hidden"]] = frozenset({"ids"})

    def __init__(self, above: CachedPrefixes | None, below: CachedPrefixes | None, scale: float) -> None:
        self.above, self.below, self.scale = above, below, scale

    def count_into(self, cost: Cost) -> None:
        """Count the LMs' forwards into `cost`."""
        for lm in (self.above, self.below):
            if lm is not None:
                lm.count_into(cost)

    @property
    def fingerprint(self) -> str:
        """The LMs and how they are combined."""
        return repr(([None if one is None else one.fingerprint for one in (self.above, self.below)], self.scale))

    def start(self, contexts: Tensor, step: Any = None) -> ProductRows:
        """As `Incremental.start`."""
        return ProductRows(
            None if self.above is None else self.above.start(contexts),
            None if self.below is None else self.below.start(contexts),
            torch.zeros(len(contexts), 1, dtype=torch.float64, device=contexts.device),
            torch.zeros_like(contexts),
        )

    def weigh(self, state: ProductRows, candidates: Tensor | None) -> Tensor:
        """As `Incremental.weigh`."""
        total: Tensor | float = 0.0
        if self.above is not None and state.above is not None:
            total = self.above.log_probs(state.above, candidates).to(state.values.device)
        if self.below is not None and state.below is not None:
            below = self.below.log_probs(state.below, candidates).to(state.values.device)
            total = torch.where(below > -torch.inf, total - below, 0.0)
        assert isinstance(total, Tensor)  # one of the two is there
        return self.scale * total

    def advance(self, state: ProductRows, tokens: Tensor, step: Any) -> ProductRows:
        """As `Incremental.advance`."""
        value = self.potential(state) + self.weigh(state, tokens[:, None])[:, 0]
        at = (state.lengths + 1)[:, None]
        width = int(at.max()) + 1 if len(at) else state.values.shape[1]
        wide = torch.nn.functional.pad(state.values, (0, max(0, width - state.values.shape[1])))
        return ProductRows(
            None if self.above is None or state.above is None else self.above.append(state.above, tokens),
            None if self.below is None or state.below is None else self.below.append(state.below, tokens),
            wide.scatter(1, at, value[:, None]),
            state.lengths + 1,
        )

    def potential(self, state: ProductRows) -> Tensor:
        """As `Incremental.potential`."""
        return at_lengths(state.values, state.lengths)

    def select(self, state: ProductRows, index: Tensor) -> ProductRows:
        """As `Incremental.select`; caches move when the rows go on."""
        return ProductRows(
            None if self.above is None or state.above is None else self.above.select(state.above, index),
            None if self.below is None or state.below is None else self.below.select(state.below, index),
            state.values[index],
            state.lengths[index],
        )

    def crop(self, state: ProductRows, lengths: Tensor) -> ProductRows:
        """As `Incremental.crop`; the shorter rows are read anew when they are asked about."""
        lengths = lengths.to(state.lengths)
        return ProductRows(
            None if self.above is None or state.above is None else self.above.crop(state.above, lengths),
            None if self.below is None or state.below is None else self.below.crop(state.below, lengths),
            state.values,
            lengths,
        )
