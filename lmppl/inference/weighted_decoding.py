"""Weighted decoding: prefix scores added to the next-token logits (FUDGE, GeDi, controlled decoding are instances)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from lmppl.errors import ModelError
from lmppl.inference.engine import Part, Request, Shard
from lmppl.inference.guided import Guide, GuidedLM
from lmppl.inference.prefix_scores import ClassConditional, HiddenScore, PrefixScore
from lmppl.inference.steered_decoding import DecodingEngine
from lmppl.inference.twists.exclusions import try_exclusions
from lmppl.lm.base import LanguageModel
from lmppl.lm.randomness import Source
from lmppl.modeling.factors import Feature, FeatureInput
from lmppl.modeling.model import Model
from lmppl.modeling.target import Target, TargetForm

__all__ = ["WeightedDecoding"]


@dataclass(frozen=True)
class WeightedDecoding(DecodingEngine):
    """Draw each token from q(x_t|c, x_<t) ∝ π0(x_t|c, x_<t) · (ψ(x_≤t)/ψ(x_<t))^λ: a heuristic whose law is known.

    ψ are prefix scores: the incremental forms of the model's factors, or a twist. With the exact soft values
    log ψ(x_≤t) = log E_π0[∏φ|x_≤t] and λ = 1 the law is π*; with any other scores it is not, since normalising token by
    token forgets how likely the evidence was before. Factors without such a form, and those that a twist stands for,
    are not looked at while decoding (`info["not_decoded"]`).

    Each draw carries log q and log π0 from the forwards that drew it, and `as_language_model()` of the result is q:
    `Importance(proposal=...)` and `SMC(proposal=...)` then correct it, if q covers π* (`top_k` prevents that).

    Parameters
    ----------
    twist : Incremental, or function of a language model, optional
        Prefix scores that stand for all factors: a learned or exact twist, or one of `lmppl.inference.prefix_scores`.
    factors : sequence of str, optional
        Names of the factors whose incremental forms are used; by default all that have one, or none beside a twist.
    strength : float
        λ ≥ 0.
    top_k : int, optional
        Score only the `top_k` most probable next tokens; the others get probability 0.
    num_draws : int
        Draws per context where `infer` does not say.

    Raises
    ------
    ModelError
        Where an argument is wrong, or a learned twist is that of another LM.
    FactorError
        Where a form gives nan or +inf, or excludes a token after which φ > 0, as far as 16 rows show it.
    InfeasibleModel
        Where all draws of a context have γ = 0; a warning is logged where some have.

    References
    ----------
    yang2021 (FUDGE), krause2021 (GeDi), mudgal2024 (controlled decoding)
    """

    twist: Guide | None = field(default=None, repr=False)
    factors: Sequence[str] | None = None
    strength: float = 1.0
    top_k: int | None = None
    num_draws: int = 64

    name: ClassVar[str] = "weighted_decoding"
    references: ClassVar[tuple[str, ...]] = ("yang2021", "krause2021", "mudgal2024")

    @classmethod
    def fudge(
        cls,
        classifier: Callable[..., Any] | Feature,
        *,
        on: FeatureInput = "text",
        probability: bool = False,
        strength: float = 1.0,
        top_k: int | None = 200,
        num_draws: int = 64,
    ) -> WeightedDecoding:
        """FUDGE: a classifier of prefixes, log ψ(x_≤t) = log p(a|x_≤t), trained on prefixes of labelled texts.

        Parameters
        ----------
        classifier : callable
            Prefix texts → log p(a|x_≤t) for each; with `on="hidden"` hidden states (B, H) → (B, V), for every next
            token.
        on : {"text", "full", "ids", "hidden"}
        probability : bool
            The classifier gives p, and not log p.
        top_k : int, optional
            Candidates that are classified at each step: a classifier of texts runs once for each.
        """
        if on == "hidden":
            score: Guide = HiddenScore(classifier)  # type: ignore[arg-type]
        else:
            score = PrefixScore(classifier, on, probability=probability)
        return cls(score, strength=strength, top_k=top_k, num_draws=num_draws)

    @classmethod
    def gedi(
        cls,
        lms: Sequence[LanguageModel],
        *,
        target: int = 0,
        prior: Sequence[float] | None = None,
        length_normalized: bool = True,
        strength: float = 30.0,
        top_k: int | None = None,
        num_draws: int = 64,
    ) -> WeightedDecoding:
        """GeDi: Bayes' rule over the whole prefix with one LM for each class; see `ClassConditional`.

        The defaults are the published ones: likelihoods to the power 1/t, and a strength that makes up for it. With
        `length_normalized=False` and `strength=1` the score is the posterior probability of the class.
        """
        if not isinstance(lms, list | tuple):
            raise ModelError(f"WeightedDecoding.gedi: got {lms!r}, expected a list of language models, one a class")
        score = ClassConditional(tuple(lms), target, prior, length_normalized)
        return cls(score, strength=strength, top_k=top_k, num_draws=num_draws)

    @classmethod
    def controlled(
        cls,
        value: Callable[..., Any] | Feature | Callable[[Tensor], Tensor],
        *,
        on: FeatureInput = "text",
        beta: float = 1.0,
        strength: float = 1.0,
        top_k: int | None = None,
        num_draws: int = 64,
    ) -> WeightedDecoding:
        """Controlled decoding: a value function, log ψ(x_≤t) = v(x_≤t)/β.

        Soft values v = β log E_π0[e^{r/β}|x_≤t] steer to π*. Mean values v = E_π0[r|x_≤t], which is what regression on
        rollouts or a Bellman update without the exponential learns, do not: they are right at the last token only.

        Parameters
        ----------
        value : callable
            Prefix texts → v, in units of the reward; with `on="hidden"` hidden states (B, H) → (B, V).
        on : {"text", "full", "ids", "hidden"}
        beta : float
            The temperature of the reward.
        """
        if on == "hidden":
            score: Guide = HiddenScore(value, beta)  # type: ignore[arg-type]
        else:
            score = PrefixScore(value, on, beta)
        return cls(score, strength=strength, top_k=top_k, num_draws=num_draws)

    def unsupported_reason(self, form: TargetForm) -> str | None:
        """As `Engine.unsupported_reason`."""
        if self.twist is None and not self.factors and not form.incremental:
            named = f"factor {form.factor_names[0]!r} has none" if form.factor_names else "this model has no factor"
            return (
                f"{self.name} needs scores of prefixes: {named}; pass Factor(incremental=...), or twist=, "
                "WeightedDecoding.fudge(classifier), .gedi(lms) or .controlled(value)"
            )
        return super().unsupported_reason(form)

    def plan(self, target: Target, request: Request) -> list[Shard]:
        """As `Engine.plan`, arguments checked."""
        self.language_model(target.model)
        return super().plan(target, request)

    def simulate(self, target: Target, shard: Shard, source: Source, *, state: Any = None) -> Part:
        """As `Engine.simulate`; 16 rows of the first shard try what the factors' forms exclude."""
        part = super().simulate(target, shard, source, state=state)
        if shard.id == 0:
            names = self._names(target.model)
            try_exclusions(target, [f for f in target.factors if f.name in names], part.draws, shard.seed)
        return part

    def language_model(self, model: Model) -> GuidedLM:
        """q for `model`."""
        guides: list[Any] = [] if self.twist is None else [self.twist]
        guides += [model[name] for name in self._names(model)]
        if not guides:
            raise ModelError("WeightedDecoding: got factors=(), expected names of factors, or a twist")
        return GuidedLM(model.prior, guides, strength=self.strength, top_k=self.top_k)

    def facts(self, target: Target) -> dict[str, Any]:
        """As `DecodingEngine.facts`."""
        used = () if self.twist is not None and self.factors is None else self._names(target.model)
        left = tuple(name for name in target.form.factor_names if name not in used)
        return {"not_decoded": left}

    def _names(self, model: Model) -> tuple[str, ...]:
        if self.factors is not None:
            names = not isinstance(self.factors, str) and isinstance(self.factors, Sequence)
            if not names or not all(isinstance(name, str) for name in self.factors):
                raise ModelError(f"WeightedDecoding: got factors={self.factors!r}, expected a list of names")
            return tuple(self.factors)
        if self.twist is not None:
            return ()
        return tuple(f.name for f in model.factors if f.incremental is not None)
