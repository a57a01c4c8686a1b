"""Centred beliefs: each member less its own mean over draws of the prior, in each context.

Rewards learned from comparisons have a free constant per context and member. The draws are fixed, so that the centre is
a constant and not a property of the batch.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lmppl.errors import ShapeError
from lmppl.lm.base import LanguageModel
from lmppl.modeling.evidence.belief_reading import read_belief
from lmppl.modeling.evidence.beliefs import Belief, Members
from lmppl.modeling.factors import Factor, Feature, FeatureInput
from lmppl.modeling.user_functions import returned
from lmppl.sequences import Sequences

__all__ = ["CentredBeliefs", "centred", "unwrapped"]

_CENTRES: weakref.WeakKeyDictionary[LanguageModel, dict[Any, Tensor]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class CentredBeliefs:
    """`fn`'s beliefs about sequences, less their means over draws of the prior in the same context.

    Parameters
    ----------
    fn, on, name
        As in `Feature`.
    lm : LanguageModel
        The prior.
    num_references : int
        Draws in each context.
    """

    fn: Callable[..., Any]
    on: FeatureInput
    name: str
    lm: LanguageModel
    num_references: int

    def __call__(self, sequences: Sequences) -> Belief:
        belief = self._raw(sequences)
        return belief.shifted(-self._centres(belief)[sequences.context.to("cpu")])

    def _raw(self, sequences: Sequences) -> Belief:
        values, batch = returned(Feature(self.name, self.fn, self.on), sequences)
        return read_belief(values, batch)

    def _centres(self, like: Belief) -> Tensor:
        """(C, M) or (C,): the mean of each member, or of the belief's mean, over the references of each context."""
        known = _CENTRES.setdefault(self.lm, {})
        key = (self.fn, self.on, self.num_references)
        if key not in known:
            draws = self.lm.draw(self.num_references, generator=torch.Generator().manual_seed(0))
            belief = self._raw(draws)
            values = belief.values if isinstance(belief, Members) else belief.mean
            total = values.new_zeros(self.lm.num_contexts, *values.shape[1:])
            known[key] = total.index_add_(0, draws.context.to(values.device), values) / self.num_references
        centres = known[key]
        if isinstance(like, Members) and centres.shape[1:] != like.values.shape[1:]:
            raise ShapeError(
                f"{self.name} returned ensembles of {centres.shape[-1]} and of {like.values.shape[1]} members, "
                "expected one number of them"
            )
        return centres


def unwrapped(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The user's function, where `fn` centres it."""
    return fn.fn if isinstance(fn, CentredBeliefs) else fn


def centred(factor: Factor, lm: LanguageModel, num_references: int) -> Factor:
    """The factor whose first feature is centred over draws of `lm`."""
    feature, *others = factor.features
    inner = feature.fn
    if isinstance(inner, CentredBeliefs):
        if inner.lm is lm:
            return factor
        feature = replace(feature, fn=inner.fn, on=inner.on)
    beliefs = CentredBeliefs(feature.fn, feature.on, feature.name, lm, num_references)
    bound = copy.copy(factor)
    object.__setattr__(bound, "features", (replace(feature, fn=beliefs, on="ids"), *others))
    return bound
