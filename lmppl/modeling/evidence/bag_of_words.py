"""A bag of words: how often a text says one of them, with the soft form that gradients follow."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from math import inf
from typing import Any, Self

import torch
from torch import Tensor

from lmppl.errors import ModelError
from lmppl.lm.base import LanguageModel
from lmppl.modeling.evidence.reward import single_column
from lmppl.modeling.factors import Factor, Feature
from lmppl.modeling.soft import SoftForm, SoftStep

__all__ = ["BagOfWords"]

_WORD = re.compile(r"\w+(?:['’-]\w+)*")


class WordCount:
    """list of texts → how many of each text's words are in the bag; case does not matter.

    Parameters
    ----------
    words : sequence of str
        The bag, in lower case.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = tuple(words)

    def __call__(self, texts: list[str]) -> list[int]:
        """One number a text."""
        bag = frozenset(self.words)
        return [sum(word.casefold() in bag for word in _WORD.findall(text)) for text in texts]


class BagOfWords(Factor):
    """A topic as a list of words: log φ(x) = w · (number of the text's words that are in the bag).

    The soft form is another function, the one that plug-and-play LMs follow: w · log Σ_{v in bag} p(v), the
    log-probability that the next token is a word of the bag. Only words that are one token of the LM take part in it.
    Source: `dathathri2020`.

    Parameters
    ----------
    words : sequence of str
        The bag; case does not matter.
    weight : float
        w, in nats for each word; negative to avoid the words.
    name : str, optional
        How errors and tables call the factor; by default "bag_of_words".

    Raises
    ------
    ModelError
        For an empty bag, something that is no word, or a weight that is no number.

    Examples
    --------
    >>> BagOfWords(["river", "lake"]).formula
    'exp(bag_of_words(x))'
    """

    words: tuple[str, ...]
    weight: float

    def __init__(self, words: Sequence[str], weight: float = 1.0, *, name: str | None = None) -> None:
        if isinstance(words, str) or not words:
            raise ModelError(f"BagOfWords: got {words!r}, expected a list of words")
        for word in words:
            if not isinstance(word, str) or not _WORD.fullmatch(word.strip()):
                raise ModelError(f"BagOfWords: got {word!r}, expected one word of letters")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ModelError(f"BagOfWords: got weight={weight!r}, expected a finite number of nats for each word")
        bag = tuple(sorted({word.strip().casefold() for word in words}))
        label = name or "bag_of_words"
        scale = float(weight)

        def log_factor(columns: dict[str, Tensor]) -> Tensor:
            return scale * single_column(columns)

        super().__init__(
            name=label,
            features=(Feature(label, WordCount(bag)),),
            log_factor=log_factor,
            upper=inf if weight > 0 else 0.0,
            hard=False,
            soft=self.soft_form,
            formula=f"exp({'' if weight == 1 else f'{weight:g}·'}{label}(x))",
            named=name is not None,
        )
        object.__setattr__(self, "words", bag)
        object.__setattr__(self, "weight", scale)

    def soft_form(self, lm: LanguageModel) -> SoftForm:
        """w · log p(the next token is in the bag) for `lm`.

        Raises
        ------
        ModelError
            Where none of the words is a single token of the LM.
        """
        tokens, weight = self.tokens(lm), self.weight

        def log_mass(step: SoftStep) -> Tensor:
            return weight * torch.logsumexp(step.log_probs[:, tokens.to(step.log_probs.device)], -1)

        return log_mass

    def tokens(self, lm: LanguageModel) -> Tensor:
        """(K,) the tokens of `lm` whose text is a word of the bag, spaces around it left out."""
        bag = frozenset(self.words)
        every = lm.sequences([[v] for v in range(lm.vocab_size)])
        found = [v for v, text in enumerate(lm.decode(every)) if text.strip().casefold() in bag]
        if not found:
            raise ModelError(
                f"factor {self.name!r}: none of its {len(bag)} words is a single token of {type(lm).__name__}; add "
                "shorter or more frequent words"
            )
        return torch.tensor(found)

    def describe(self) -> dict[str, Any]:
        """As `Factor.describe`, with the words and their weight."""
        return super().describe() | {"words": list(self.words), "weight": self.weight, "owns_features": True}

    @classmethod
    def from_description(
        cls, data: Mapping[str, Any], features: Sequence[Feature], functions: Mapping[str, Any]
    ) -> Self:
        """The factor that `describe` described."""
        return cls(data["words"], float(data["weight"]), name=data["name"])
