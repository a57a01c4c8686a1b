"""Products of language models: another LM, or the ratio of two, to a power."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Any, Self

from torch import Tensor

from lmppl.errors import ModelError
from lmppl.lm.base import LanguageModel
from lmppl.modeling.evidence.lm_factors.potential import ProductPotential
from lmppl.modeling.evidence.lm_factors.prefixes import CachedPrefixes
from lmppl.modeling.evidence.lm_factors.scores import CompletionScore, LMScore
from lmppl.modeling.evidence.lm_factors.tokens import contexts_of, difference, encoded, never_zero, with_room
from lmppl.modeling.factors import Factor, Feature
from lmppl.sequences import Sequences

__all__ = ["LMFactor", "checked_weight", "declared_lm"]


class LMFactor(Factor):
    """Another language model as evidence: log φ(x) = a·log p_lm(x|c'), or a·(log p_lm(x|c') − log p_over(x|c'')).

    With a > 0 a product of experts, π* ∝ π0·p_lm^a; with `over` a contrast, such as a persona's LM over the plain one,
    or a fine-tuned LM over its base. The other LMs bring contexts of their own: c' is another text than c.

    Where they have the prior's tokens and EOS, log p_lm is the sum over the tokens of x, EOS among them where x ends by
    it; a row that is cut by the cap has no such term, and the other LM's cap and stop strings are not asked. The factor
    then has a form for prefixes, with caches of its own. Where their tokens are others, they read the text of x: log p
    of the tokens that their tokenizer gives it, one of several spellings, and of the end behind it where x ended. Then
    whole completions are scored and nothing else, and a text that they cannot write has probability 0.

    Parameters
    ----------
    lm : LanguageModel
        With one context for all of the prior's, or one for each.
    weight : float
        a, not 0. a < 0 steers away, has no bound, and makes it an error that p_lm(x) = 0 where π0(x) > 0.
    over : LanguageModel, optional
        Divides; p_over(x) = 0 where π0(x) > 0 is an error for a > 0.
    name : str, optional
        How errors and tables call the factor; by default "lm_factor".

    Raises
    ------
    ModelError
        Where `weight` is 0 or no number; when the factor meets its prior, where an LM has other tokens and cannot read
        text, or reads it and declares stop strings, or where it has no cap as large as the prior's.
    ContextError
        Where an LM has neither one context nor as many as the prior, or no room for the prior's completions.
    FactorError
        When evaluated: φ is infinite, or a text has more tokens than the other LM's cap.

    Notes
    -----
    Bound: log φ ≤ 0 for a > 0 without `over`; none otherwise. Costs one forward of each LM a token while SMC goes on,
    and no other for a text that it completes. Source: `hinton2002` (products of experts), `li2023` (contrastive
    decoding), `liu2021` (an expert over an anti-expert).

    Examples
    --------
    >>> from lmppl import TabularLM
    >>> LMFactor(TabularLM.random(3, 4), 0.5, name="other").formula
    "other(x|c')^0.5"
    """

    lm: LanguageModel
    over: LanguageModel | None
    weight: float

    def __init__(
        self,
        lm: LanguageModel,
        weight: float = 1.0,
        *,
        over: LanguageModel | None = None,
        name: str | None = None,
    ) -> None:
        declared_lm("LMFactor", "lm", lm)
        if over is not None:
            declared_lm("LMFactor", "over", over)
        weight = checked_weight("LMFactor", weight)
        label = name or "lm_factor"

        def log_factor(columns: dict[str, Tensor]) -> Tensor:
            first, *rest = columns.values()
            return weight * (first - rest[0]) if rest else weight * first

        shown = f"{label}(x|c')" if over is None else f"({label}(x|c')/{label}_over(x|c''))"
        super().__init__(
            name=label,
            features=_features(label, [CompletionScore(one) for one in (lm, over) if one is not None]),
            log_factor=log_factor,
            upper=0.0 if weight > 0 and over is None else inf,
            hard=None,
            formula=powered(shown, weight),
            named=name is not None,
        )
        object.__setattr__(self, "lm", lm)
        object.__setattr__(self, "over", over)
        object.__setattr__(self, "weight", weight)

    def bind(self, lm: LanguageModel, log_factor: Callable[[Sequences], Tensor] | None = None) -> Factor:
        """As `Factor.bind`: scores of the prior's completions, and the form for prefixes where the tokens are its."""
        who = f"factor {self.name!r}"
        lms = [self.lm] if self.over is None else [self.lm, self.over]
        contexts = [contexts_of(one, lm, who) for one in lms]
        by_text = [reads_text(one, lm, who) for one in lms]
        rooms = [
            one if text else with_room(one, lm.max_new_tokens, who) for one, text in zip(lms, by_text, strict=True)
        ]
        parts = [CachedPrefixes(one, places) for one, places in zip(rooms, contexts, strict=True)]
        form = None if any(by_text) else ProductPotential(*_sides(parts, self.weight), abs(self.weight))
        # A run reads every row once; outside of a run form and score know nothing of each other, and can be compared.
        shared = parts if log_factor is not None and form is not None else [None] * len(parts)
        divides = [self.weight < 0, self.weight > 0]
        scores = [
            CompletionScore(one, lm, divide, text, prefixes=part)
            for one, divide, text, part in zip(rooms, divides, by_text, shared, strict=False)
        ]
        bound = copy.copy(self)
        object.__setattr__(bound, "features", _features(self.name, scores))
        object.__setattr__(bound, "hard", False if form is not None and never_zero(lms) else None)
        object.__setattr__(bound, "incremental", form)
        return bound

    def describe(self) -> dict[str, Any]:
        """As `Factor.describe`, with a, and the LMs by their fingerprints."""
        return super().describe() | {
            "weight": self.weight,
            "lm": self.lm.fingerprint,
            "over": None if self.over is None else self.over.fingerprint,
        }

    @classmethod
    def from_description(
        cls, data: Mapping[str, Any], features: Sequence[Feature], functions: Mapping[str, Any]
    ) -> Self:
        """The factor that `describe` described; what stands for its features are the LMs themselves."""
        lm, *over = [one.fn for one in features]
        return cls(lm, float(data["weight"]), over=over[0] if over else None, name=data["name"])  # type: ignore[arg-type]


def _sides(parts: list[CachedPrefixes], weight: float) -> tuple[CachedPrefixes | None, CachedPrefixes | None]:
    """What stands above and below in φ = (above/below)^|a|."""
    lm, over = parts[0], parts[1] if len(parts) > 1 else None
    return (lm, over) if weight > 0 else (over, lm)


def _features(name: str, scores: Sequence[LMScore]) -> tuple[Feature, ...]:
    names = (name, f"{name}_over")
    return tuple(Feature(one, score, on="ids") for one, score in zip(names, scores, strict=False))


def declared_lm(kind: str, argument: str, lm: object) -> None:
    """Raise `ModelError` for what is no language model."""
    if not isinstance(lm, LanguageModel):
        raise ModelError(f"{kind}: got {argument}={type(lm).__name__}, expected a language model such as lmppl.LM(...)")


def checked_weight(kind: str, weight: Any) -> float:
    """`weight` as a float; `ModelError` unless it is finite and not 0."""
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight) or weight == 0:
        raise ModelError(f"{kind}: got weight={weight!r}, expected a finite number that is not 0: log φ = weight·log p")
    return float(weight)


def powered(shown: str, weight: float) -> str:
    """The formula to the power `weight`."""
    return shown if weight == 1 else f"{shown}^{weight:g}" if weight > 0 else f"{shown}^({weight:g})"


def reads_text(lm: LanguageModel, prior: LanguageModel, who: str) -> bool:
    """Whether `lm` has other tokens than the prior, and reads its texts.

    Raises
    ------
    ModelError
        Where it cannot.
    """
    why = difference(lm, prior)
    if not why:
        return False
    try:
        encoded(lm, "", 0, who)
    except ModelError as error:
        raise ModelError(f"{error}; the prior's tokens are not its own: {why}") from error
    stop = tuple(getattr(lm, "stop", ()))
    if stop:
        raise ModelError(
            f"{who}: its LM has other tokens than the prior ({why}) and reads texts, whose end its stop strings "
            f"{list(stop)} would move; declare it without stop="
        )
    return True
