"""What a posterior over a head believes of texts, and of texts less the prior's reference draws in the same context."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmppl.lm.base import LanguageModel
from lmppl.modeling.evidence.preference.features import Standardised
from lmppl.modeling.evidence.preference.posteriors import HeadPosterior
from lmppl.modeling.factors import FeatureInput
from lmppl.sequences import Sequences

__all__ = ["CentredHeadBelief", "HeadBelief"]

_CENTRES: weakref.WeakKeyDictionary[LanguageModel, dict[Any, Tensor]] = weakref.WeakKeyDictionary()


class HeadBelief:
    """texts → the belief about r(x) = wᵀf(x): means and standard deviations (B,), or members (B, M).

    Parameters
    ----------
    features : Standardised
    posterior : HeadPosterior
    annotators : tuple of str
        Whom the posterior knows, in the order of its deviations.
    facts : dict
        How it was fitted, as plain data.
    name : str
    """

    def __init__(
        self,
        features: Standardised,
        posterior: HeadPosterior,
        annotators: tuple[str, ...] = (),
        facts: Mapping[str, Any] | None = None,
        *,
        name: str = "preference",
    ) -> None:
        self.features, self.posterior, self.annotators = features, posterior, annotators
        self.facts = dict(facts or {})
        self.__name__ = name

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor] | Tensor:
        return self.posterior.belief(self.features(texts, self.__name__))


@dataclass(frozen=True)
class CentredHeadBelief:
    """The belief about r(x) − r̄_c, with r̄_c the mean reward of the prior's reference draws in the same context.

    r(x) − r̄_c = wᵀ(f(x) − f̄_c): the features are centred, so that every head loses its own constant and the Gaussian's
    spread is that of the difference, s² = (f − f̄_c)ᵀ Σ (f − f̄_c).

    Parameters
    ----------
    belief : HeadBelief
    on : {"text", "full"}
    lm : LanguageModel
        The prior.
    num_references : int
        Draws in each context.
    """

    belief: HeadBelief
    on: FeatureInput
    lm: LanguageModel
    num_references: int

    @property
    def __name__(self) -> str:
        return self.belief.__name__

    def __call__(self, sequences: Sequences) -> tuple[Tensor, Tensor] | Tensor:
        centred = self._features(sequences) - self._centres()[sequences.context.to("cpu")]
        return self.belief.posterior.belief(centred)

    def _features(self, sequences: Sequences) -> Tensor:
        texts = sequences.full_text if self.on == "full" else sequences.text
        return self.belief.features(list(texts), self.belief.__name__)

    def _centres(self) -> Tensor:
        """(C, D) the mean features of the references, made once for a prior."""
        known = _CENTRES.setdefault(self.lm, {})
        key = (self.belief, self.on, self.num_references)
        if key not in known:
            draws = self.lm.draw(self.num_references, generator=torch.Generator().manual_seed(0))
            features = self._features(draws)
            total = features.new_zeros(self.lm.num_contexts, features.shape[1])
            known[key] = total.index_add_(0, draws.context.to("cpu"), features) / self.num_references
        return known[key]
