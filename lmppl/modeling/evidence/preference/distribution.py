"""A distribution of human preference for one text: people differ in what they like, and a comparison asks two of them.

Source: `siththaranjan2024` (distributional preference learning: what a plain reward averages away).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self

import torch
from torch import Tensor

from lmppl.errors import ModelError
from lmppl.modeling.evidence.attitudes import Attitude, Moderated, check_number
from lmppl.modeling.evidence.preference.evaluation import Evaluation, evaluate_predictions
from lmppl.modeling.evidence.preference.features import Featuriser, Standardised, standardise
from lmppl.modeling.evidence.preference.learned_reward import LearnedReward
from lmppl.modeling.evidence.preference.pairs import Pairs, check_for_fit, read_pairs
from lmppl.modeling.evidence.preference.preference_heads import Levels, PreferenceHeads, fit_heads
from lmppl.modeling.evidence.preference.writing import read_tensor, write_tensor
from lmppl.modeling.factors import Feature

__all__ = ["PreferenceDistribution"]

WHO = "PreferenceDistribution"


class HeadsOfTexts:
    """texts → the laws of r.

    Parameters
    ----------
    features : Standardised
    heads : PreferenceHeads
    name : str
    """

    def __init__(self, features: Standardised, heads: PreferenceHeads, name: str) -> None:
        self.features, self.heads = features, heads
        self.__name__ = name

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor] | Levels:
        return self.heads.belief(self.features(texts, self.__name__))


class PreferenceDistribution(LearnedReward):
    """How people differ in liking a text x: a law of r(x), learned from pairs; made by `fit`.

    A comparison asks somebody about a and somebody about b: P(a ≻ b) = P(r(a) > r(b)) with r(a), r(b) independent. Its
    spread is what people disagree about, and no ignorance of the model's: more pairs do not shrink it. `Quantile(t)`
    of it is what all but a share t of people grant the text, `Mean()` the average. Source: `siththaranjan2024`.

    Parameters
    ----------
    learned : HeadsOfTexts
        What `fit` makes.
    beta, attitude, num_references, name, fingerprint
        As in `UncertainReward`. `num_references` centres the means: r has a free constant in each context.
    on : {"text", "full"}
        Whether features read the completion or context + completion.

    Raises
    ------
    ModelError
        As `UncertainReward`.
    """

    kind_of_learned = HeadsOfTexts

    @property
    def texts(self) -> HeadsOfTexts:
        """What `fit` made."""
        found: HeadsOfTexts = self.learned
        return found

    @classmethod
    def fit(
        cls,
        pairs: Iterable[Any],
        features: Featuriser,
        *,
        kind: Literal["normal", "categorical"] = "normal",
        num_levels: int = 5,
        prior_scale: float = 0.3,
        beta: float = 1.0,
        attitude: Attitude | None = None,
        num_references: int | None = None,
        name: str | None = None,
        on: Literal["text", "full"] = "text",
        fingerprint: str | None = None,
    ) -> Self:
        """The heads of greatest posterior density, with priors N(0, `prior_scale`²), on standardised features.

        Parameters
        ----------
        pairs, features, on
            As in `BayesianRewardModel.fit`. Annotators are not read: their differences are what the law is about.
        kind : {"normal", "categorical"}
            r(x) ~ N(wᵀf, e^{2vᵀf}/2), in units in which two texts of features nought differ with variance 1; or a level
            0, …, K−1 with logits A f + b, in levels.
        num_levels : int
            K ≥ 2, for "categorical".
        prior_scale : float
            Of every weight, those of the spread and the biases of levels among them.
        beta, attitude, num_references, name, fingerprint
            As in the class.

        Raises
        ------
        ModelError
            As `BayesianRewardModel.fit`, and for ties.
        """
        if kind not in ("normal", "categorical"):
            raise ModelError(f"{WHO}: got kind={kind!r}, expected 'normal' or 'categorical'")
        if isinstance(num_levels, bool) or not isinstance(num_levels, int) or num_levels < 2:
            raise ModelError(f"{WHO}: got num_levels={num_levels!r}, expected at least 2")
        check_number(prior_scale, WHO, "prior_scale", 0.0, math.inf, "a positive number")
        known = read_pairs(pairs, WHO, on)
        check_for_fit(Pairs(known.chosen, known.rejected, known.tie, (), known.annotator), WHO)
        _refuse_ties(known)
        scaled, _ = standardise(features, known, WHO)
        first, second = scaled([*known.chosen, *known.rejected], WHO).split(len(known))
        heads = fit_heads(kind, num_levels if kind == "categorical" else 2, float(prior_scale), first, second)
        texts = HeadsOfTexts(scaled, heads, name or "preference")
        return cls(texts, beta, attitude, num_references=num_references, name=name, on=on, fingerprint=fingerprint)

    @classmethod
    def is_indifferent(cls, attitude: Attitude) -> bool:
        """As `LearnedReward.is_indifferent`: one constant for the whole law, which moves all but `Moderated` alike."""
        return not isinstance(attitude, Moderated)

    def log_predictive(self, pairs: Iterable[Any]) -> Tensor:
        """(N, 3) log P of "chosen is better", "rejected is better" and "tie" (−inf), in nats."""
        return self._predict(read_pairs(pairs, WHO, self._on))

    def evaluate(self, pairs: Iterable[Any], *, seed: int = 0) -> Evaluation:
        """As `BayesianRewardModel.evaluate`; replicates are of the fitted heads, whose own error they leave out."""
        known = read_pairs(pairs, WHO, self._on)
        _refuse_ties(known)
        log_p = self._predict(known)
        return evaluate_predictions(log_p, known, lambda numbers: log_p.exp().expand(len(numbers), -1, -1), seed)

    def describe(self) -> dict[str, Any]:
        """As `UncertainReward.describe`, with the heads and the scale of the features."""
        scaled, heads = self.texts.features, self.texts.heads
        return super().describe() | {
            "heads": heads.kind,
            "weights": write_tensor(heads.weights),
            "bias": write_tensor(heads.bias),
            "centre": write_tensor(scaled.centre),
            "scale": write_tensor(scaled.scale),
        }

    @classmethod
    def read_learned(cls, data: Mapping[str, Any], feature: Feature) -> HeadsOfTexts:
        """As `LearnedReward.read_learned`."""
        fn: Any = feature.fn
        if isinstance(fn, HeadsOfTexts):
            fn = fn.features.fn
        scaled = Standardised(fn, read_tensor(data["centre"]), read_tensor(data["scale"]))
        heads = PreferenceHeads(data["heads"], read_tensor(data["weights"]), read_tensor(data["bias"]))
        return HeadsOfTexts(scaled, heads, feature.name)

    def _predict(self, known: Pairs) -> Tensor:
        first, second = self.texts.features([*known.chosen, *known.rejected], WHO).split(len(known))
        heads = self.texts.heads
        pair = [heads.log_first(first, second), heads.log_first(second, first)]
        return torch.stack([*pair, torch.full_like(pair[0], -math.inf)], -1)


def _refuse_ties(pairs: Pairs) -> None:
    if bool(pairs.tie.any()):
        raise ModelError(
            f"{WHO}: {int(pairs.tie.sum())} of {len(pairs)} pairs are ties, which it has no probability for; leave "
            "them out, or fit a BayesianRewardModel"
        )
