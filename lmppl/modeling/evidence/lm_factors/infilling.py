"""Conditioning on the future: the likelihood of a given continuation of the completion."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Any, Self

from torch import Tensor

from lmppl.errors import ContextError, ModelError
from lmppl.lm.base import LanguageModel
from lmppl.modeling.evidence.lm_factors.future import FuturePotential
from lmppl.modeling.evidence.lm_factors.lm_factor import checked_weight, declared_lm, powered, reads_text
from lmppl.modeling.evidence.lm_factors.prefixes import CachedPrefixes
from lmppl.modeling.evidence.lm_factors.scores import FutureScore
from lmppl.modeling.evidence.lm_factors.tokens import contexts_of, encoded, never_zero, with_room
from lmppl.modeling.evidence.reward import single_column
from lmppl.modeling.factors import Factor, Feature
from lmppl.modeling.returned_values import quote
from lmppl.sequences import Sequences

__all__ = ["InfillingFactor"]


class InfillingFactor(Factor):
    """A text that is to follow the completion: log φ(x) = a·log p_lm(future|c, x), so that x leads there.

    The future's tokens follow those of x, whose EOS is left out: with the prior as the LM and a = 1,
    π*(x|c) ∝ π0(x|c)·p(future|c, x) is the prior's law of what stands before the future, at most T tokens of it.

    Parameters
    ----------
    future : str or sequence of str
        One text, or one for each context; not empty. It reads as the continuation of a completion, so that it begins
        with a space where a word does.
    lm : LanguageModel, optional
        By default the prior. Another one brings its contexts; where it has other tokens than the prior, it reads the
        text of x and whole completions alone are scored, as for an `LMFactor`.
    weight : float
        a, not 0. a < 0 steers away, has no bound, and makes it an error that p(future|c, x) = 0 where π0(x) > 0.
    name : str, optional
        How errors and tables call the factor; by default "infilling".

    Raises
    ------
    ModelError
        For an empty future; when the factor meets its prior, where the LM cannot write the future or cannot go on
        behind the prior's cap.
    ContextError
        For another number of futures, or of the LM's contexts, than the prior has contexts.
    FactorError
        When evaluated: φ is infinite.

    Notes
    -----
    Bound: log φ ≤ 0 for a > 0. The form for prefixes is log ψ(x_≤t) = a·log p_lm(future|c, x_≤t): SMC reads the future
    behind each particle's own token, from the particle's cache, and never behind all V. Where a prefix that goes on has
    p(future|c, x_≤t) = 0, ψ keeps its last positive value, 1 if it had none: a later prefix may lead to the future yet.
    At the end ψ is φ, so that this cancels. Source: `qin2020` (a given future, by gradients), `lew2023` (by SMC).

    Examples
    --------
    >>> InfillingFactor(" The end.").formula
    "p(' The end.'|c, x)"
    """

    futures: tuple[str, ...]
    lm: LanguageModel | None
    weight: float

    def __init__(
        self,
        future: str | Sequence[str],
        lm: LanguageModel | None = None,
        weight: float = 1.0,
        *,
        name: str | None = None,
    ) -> None:
        futures = (future,) if isinstance(future, str) else tuple(future)
        if not futures or not all(isinstance(text, str) and text for text in futures):
            raise ModelError(f"InfillingFactor: got future={future!r}, expected a text that is not empty, or a list")
        if lm is not None:
            declared_lm("InfillingFactor", "lm", lm)
        weight = checked_weight("InfillingFactor", weight)
        label = name or "infilling"

        def log_factor(columns: dict[str, Tensor]) -> Tensor:
            return weight * single_column(columns)

        shown = quote(futures[0], 24) if len(futures) == 1 else "future"
        super().__init__(
            name=label,
            features=(Feature(label, _unbound(lm), on="ids"),),
            log_factor=log_factor,
            upper=0.0 if weight > 0 else inf,
            hard=None,
            formula=powered(f"p({shown}|c, x)" if lm is None else f"{label}({shown}|c', x)", weight),
            named=name is not None,
        )
        object.__setattr__(self, "futures", futures)
        object.__setattr__(self, "lm", lm)
        object.__setattr__(self, "weight", weight)

    def bind(self, lm: LanguageModel, log_factor: Callable[[Sequences], Tensor] | None = None) -> Factor:
        """As `Factor.bind`: the future in the LM's tokens, and the form for prefixes where they are the prior's."""
        who, reader = f"factor {self.name!r}", lm if self.lm is None else self.lm
        places = contexts_of(reader, lm, who)
        if len(self.futures) not in (1, lm.num_contexts):
            raise ContextError(
                f"{who}: it has {len(self.futures)} futures and the prior has {lm.num_contexts} contexts; give it one "
                "future for all of them, or one for each"
            )
        futures = self.futures * lm.num_contexts if len(self.futures) == 1 else self.futures
        tokens = [_tokens(reader, text, c, who) for text, c in zip(futures, places.tolist(), strict=True)]
        form: FuturePotential | None = None
        if self.lm is not None and reads_text(reader, lm, who):
            score = FutureScore(reader, lm, self.weight < 0, True, futures=futures)
        else:
            behind = f"{who}: the future is read behind the prior's cap"
            reader = with_room(reader, lm.max_new_tokens + max(map(len, tokens)), behind)
            form = FuturePotential(CachedPrefixes(reader, places), tuple(tokens), self.weight, lm)
            # A run reads every row once; outside of a run form and score can be compared.
            shared = None if log_factor is None else form
            score = FutureScore(reader, lm, self.weight < 0, futures=tuple(tokens), form=shared)
        bound = copy.copy(self)
        object.__setattr__(bound, "incremental", form)
        object.__setattr__(bound, "hard", False if form is not None and never_zero([reader]) else None)
        object.__setattr__(bound, "features", (Feature(self.name, score, on="ids"),))
        return bound

    def describe(self) -> dict[str, Any]:
        """As `Factor.describe`, with the futures, a, and the LM by its fingerprint."""
        return super().describe() | {
            "futures": list(self.futures),
            "weight": self.weight,
            "lm": None if self.lm is None else self.lm.fingerprint,
            "owns_features": self.lm is None,
        }

    @classmethod
    def from_description(
        cls, data: Mapping[str, Any], features: Sequence[Feature], functions: Mapping[str, Any]
    ) -> Self:
        """The factor that `describe` described; what stands for its feature is the LM, where it has one."""
        lm: Any = features[0].fn if features else None
        return cls(data["futures"], lm, float(data["weight"]), name=data["name"])


def _unbound(lm: LanguageModel | None) -> Callable[..., Any]:
    """The score before the factor has met a prior, which is what it reads."""

    def unbound(sequences: Sequences) -> Tensor:
        raise ModelError("it reads a prior's tokens; multiply a prior by it first: prior * factor")

    return unbound if lm is None else FutureScore(lm)


def _tokens(lm: LanguageModel, text: str, context: int, who: str) -> tuple[int, ...]:
    ids = encoded(lm, text, context, who)
    if not ids:
        raise ModelError(f"{who}: {type(lm).__name__} cannot write the future {quote(text)}: it has no tokens for it")
    return tuple(ids)
