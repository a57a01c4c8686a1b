"""A reward learned from preferences, with a posterior over its weights: evidence by an attitude."""

from __future__ import annotations

import copy
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from lmppl.errors import ModelError
from lmppl.lm.base import LanguageModel
from lmppl.modeling.evidence.attitudes import Attitude, Mean
from lmppl.modeling.evidence.cut_mixture import CutMixture
from lmppl.modeling.evidence.preference.agreement import Agreement, compare_heads
from lmppl.modeling.evidence.preference.evaluation import NUM_REPLICATES, Evaluation, evaluate_predictions
from lmppl.modeling.evidence.preference.features import Featuriser, differences, standardise
from lmppl.modeling.evidence.preference.head_belief import CentredHeadBelief, HeadBelief
from lmppl.modeling.evidence.preference.heads import HeadProblem
from lmppl.modeling.evidence.preference.laplace import best_scales
from lmppl.modeling.evidence.preference.learned_reward import LearnedReward
from lmppl.modeling.evidence.preference.likelihood import log_outcomes
from lmppl.modeling.evidence.preference.pairs import Pairs, check_for_fit, read_pairs
from lmppl.modeling.evidence.preference.posteriors import DrawnHead, GaussianHead, HeadPosterior
from lmppl.modeling.evidence.preference.sampling import SAMPLERS
from lmppl.modeling.evidence.preference.writing import read_belief_data, write_belief_data
from lmppl.modeling.evidence.uncertain import UncertainReward
from lmppl.modeling.factors import Factor, Feature

__all__ = ["BayesianRewardModel"]

WHO = "BayesianRewardModel"
POSTERIORS = ("laplace", *SAMPLERS)


class BayesianRewardModel(LearnedReward):
    """A reward r(x) = wᵀf(x) learned from preference pairs, known up to a posterior over w; made by `fit`.

    Bradley and Terry: P(a ≻ b | w) = σ(r(a) − r(b)), with ties by Davidson, a share of choices that are the wrong way
    round, and heads w + δ_j of annotators. What the posterior says of r(x) is a belief, which an attitude turns into
    log φ(x), in nats, as in `UncertainReward`. Source: `bradley1952`, `davidson1970`.

    Parameters
    ----------
    learned : HeadBelief
        What `fit` makes.
    beta, attitude, num_references, name
        As in `UncertainReward`. A reward learned from pairs has a free constant in each context: every attitude but
        `Mean` and `CutMixture` needs `num_references`, which centres the features over draws of the prior, and with
        them each head; 0 leaves them as they are.
    on : {"text", "full"}
        Whether features read the completion or context + completion.
    fingerprint : str, optional
        As in `Reward`.

    Raises
    ------
    ModelError
        As `UncertainReward`.
    FactorError, ShapeError
        When evaluated: features that are not finite, or of another shape than when fitted.

    Examples
    --------
    >>> def shape(texts): return [[len(t), t.count("!")] for t in texts]
    >>> pairs = [("Good.", "Bad!"), ("Fine, thanks.", "What!!"), ("No.", "Never!"), ("So!", "It is so."), ("A.", "B!")]
    >>> BayesianRewardModel.fit(pairs, shape, prior_scale=1.0).facts["num_pairs"]
    5
    """

    kind_of_learned = HeadBelief

    @property
    def belief(self) -> HeadBelief:
        """What `fit` made."""
        found: HeadBelief = self.learned
        return found

    @classmethod
    def fit(
        cls,
        pairs: Iterable[Any],
        features: Featuriser,
        *,
        posterior: str = "laplace",
        prior_scale: float | None = None,
        noise: float = 0.0,
        beta: float = 1.0,
        attitude: Attitude | None = None,
        num_references: int | None = None,
        name: str | None = None,
        on: Literal["text", "full"] = "text",
        num_draws: int = 500,
        seed: int = 0,
        fingerprint: str | None = None,
    ) -> Self:
        """The posterior of w given preference pairs.

        Ties and annotators are found in the pairs. With ties P(tie) ∝ ν, η = log ν ~ N(0, 1.5²). Annotator j has the
        head w + δ_j with δ_j ~ N(0, τ²I), τ ~ HalfNormal(1), and w is what the population shares.

        Parameters
        ----------
        pairs : iterable
            `Preference`s, tuples (chosen, rejected), or dicts with "chosen" and "rejected" (and "prompt", "annotator",
            "tie"). A tie has the two texts in any order.
        features : callable
            list of B texts → (B, D): a function of yours, `EncoderFeatures` or `LMFeatures`. They are standardised by
            the training texts.
        posterior : {"laplace", "nuts", "autoguide"}
            A Gaussian at the mode, in closed form; draws of Pyro's NUTS; draws of Pyro's AutoMultivariateNormal. They
            agree where there are many pairs a weight. With annotators Laplace takes τ at its most probable value,
            whose uncertainty it leaves out: with two annotators its spread is about three quarters of the right one.
        prior_scale : float, optional
            σ of the prior w ~ N(0, σ²I), for standardised features; by default it maximises the Laplace evidence, for
            all three posteriors, between e^−5 and e^3.
        noise : float
            0 ≤ ε < ½, the share of choices that are the wrong way round, whatever the texts.
        beta, attitude, num_references, name, on, fingerprint
            As in the class.
        num_draws : int
            Of "nuts" and "autoguide": members of the belief.
        seed : int
            Of the same; torch's own generator stays as it is.

        Raises
        ------
        ModelError
            Where the pairs determine no reward: none, a single one, equal sides, ties alone, one annotator, choices
            that do not depend on the features, a feature that is constant; where an option is unknown, Newton's method
            does not converge, or NUTS has R̂ > 1.1.
        FactorError, ShapeError
            For features that are not finite, or that are no matrix.
        """
        _check_options(posterior, prior_scale, noise, num_draws)
        # What declares the factor is refused before the fit, which may take minutes.
        cls.check_centre(attitude, num_references)
        UncertainReward(_no_belief, beta, attitude, num_references=num_references or None, name=name, on=on)
        known = read_pairs(pairs, WHO, on)
        check_for_fit(known, WHO)
        scaled, delta = standardise(features, known, WHO)
        problem = HeadProblem(delta, known.tie, known.annotator, len(known.annotators), float(noise))
        fit = best_scales(problem, prior_scale)
        facts: dict[str, Any] = {
            "posterior": posterior,
            "num_pairs": len(known),
            "has_ties": problem.has_ties,
            "prior_scale": fit.scales.weights,
            "annotator_scale": fit.scales.annotators if known.annotators else None,
            "log_evidence": fit.log_evidence,
        }
        head: HeadPosterior
        if posterior == "laplace":
            head = GaussianHead(
                fit.mode, fit.covariance, problem.dim, problem.num_annotators, fit.scales.annotators, float(noise)
            )
        else:
            sample, said = SAMPLERS[posterior](problem, fit, num_draws, seed)
            head, facts = DrawnHead(sample, float(noise)), facts | said
        belief = HeadBelief(scaled, head, known.annotators, facts, name=name or "preference")
        return cls(belief, beta, attitude, num_references=num_references, name=name, on=on, fingerprint=fingerprint)

    @classmethod
    def is_indifferent(cls, attitude: Attitude) -> bool:
        """As `LearnedReward.is_indifferent`: each head has a constant; they cancel in a mean and in a cut mixture."""
        return isinstance(attitude, Mean | CutMixture)

    @property
    def posterior(self) -> HeadPosterior:
        """The law of the head; `.mean` (D,) and `.covariance` (D, D) of w, on standardised features."""
        return self.belief.posterior

    @property
    def facts(self) -> dict[str, Any]:
        """How it was fitted: posterior, σ, τ, the Laplace evidence in nats, what a sampler says of itself."""
        return dict(self.belief.facts)

    def log_predictive(self, pairs: Iterable[Any]) -> Tensor:
        """(N, 3) log P of "chosen is better", "rejected is better" and "tie", in nats, averaged over the posterior.

        Annotators that the model knows have their own heads; others are drawn from the population of annotators.
        """
        known = read_pairs(pairs, WHO, self._on)
        return self.posterior.log_predictive(differences(self.belief.features, known, WHO), self._annotator(known))

    def evaluate(self, pairs: Iterable[Any], *, seed: int = 0) -> Evaluation:
        """Held-out log-likelihood, accuracy, calibration and posterior predictive checks, by `log_predictive`.

        Figures are compared with those of 1000 replicates, in which draws of the posterior make the choices again;
        annotators that the model does not know share one deviation in each. `seed` is the replicates'.

        Raises
        ------
        ModelError
            As `fit` for pairs; where all are ties, or some are and the model was fitted to pairs without.
        """
        known = read_pairs(pairs, WHO, self._on)
        delta, annotator = differences(self.belief.features, known, WHO), self._annotator(known)
        if bool(known.tie.any()) and not self.belief.facts.get("has_ties"):
            raise ModelError(f"{WHO}.evaluate: got ties, and the model was fitted to pairs without; leave them out")
        if bool(known.tie.all()):
            raise ModelError(f"{WHO}.evaluate: all {len(known)} pairs are ties, expected some choices")
        log_p = self.posterior.log_predictive(delta, annotator)
        draws = self.posterior.draws(NUM_REPLICATES, torch.Generator().manual_seed(seed + 1))

        def replicate(numbers: Tensor) -> Tensor:
            some = draws.select(numbers)
            eta = None if some.eta is None else some.eta[:, None]
            return log_outcomes(some.advantages(delta, annotator), eta, self.posterior.noise).exp()

        return evaluate_predictions(log_p, known, replicate, seed)

    def agreement(self, other: BayesianRewardModel) -> Agreement:
        """Where two posteriors of the same head agree, and where not: shifts and spreads of each weight.

        Raises
        ------
        ModelError
            Where the heads differ in size, or features were standardised by other texts, so that weights differ in
            their units.
        """
        if not isinstance(other, BayesianRewardModel):
            raise ModelError(f"{WHO}.agreement: got {type(other).__name__}, expected a {WHO}")
        own, others = self.belief.features.scale, other.belief.features.scale
        if own.shape == others.shape and not torch.allclose(own, others, rtol=1e-9, atol=0.0):
            raise ModelError(
                f"{WHO}.agreement: the features were standardised by other texts, so that the weights are in other "
                "units; fit both to the same pairs"
            )
        return compare_heads(self.posterior, other.posterior, self.facts, other.facts)

    def _centred(self, lm: LanguageModel, num_references: int) -> Factor:
        """As `UncertainReward._centred`: features are centred, so that the spread is that of the difference."""
        feature, *others = self.features
        centred = CentredHeadBelief(self.belief, self._on, lm, num_references)
        bound = copy.copy(self)
        object.__setattr__(bound, "features", (replace(feature, fn=centred, on="ids"), *others))
        return bound

    def describe(self) -> dict[str, Any]:
        """As `UncertainReward.describe`, with the posterior and the scale of the features."""
        return super().describe() | {"belief": write_belief_data(self.belief)}

    @classmethod
    def read_learned(cls, data: Mapping[str, Any], feature: Feature) -> HeadBelief:
        """As `LearnedReward.read_learned`."""
        fn: Any = feature.fn
        if isinstance(fn, HeadBelief):
            fn = fn.features.fn
        return HeadBelief(*read_belief_data(data["belief"], fn), name=feature.name)

    def _annotator(self, pairs: Pairs) -> Tensor:
        """(N,) the index of each pair's annotator among those that the posterior knows, −1 for others."""
        number = {name: j for j, name in enumerate(self.belief.annotators)}
        index = torch.tensor([number.get(name, -1) for name in pairs.annotators] + [-1])
        return index[pairs.annotator]


def _no_belief(texts: list[str]) -> list[list[float]]:
    """What stands for a belief that is still to be fitted."""
    return [[0.0, 0.0] for _ in texts]


def _check_options(posterior: object, prior_scale: object, noise: object, num_draws: object) -> None:
    if posterior not in POSTERIORS:
        raise ModelError(f"{WHO}: got posterior={posterior!r}, expected one of {', '.join(map(repr, POSTERIORS))}")
    if prior_scale is not None and not (_is_number(prior_scale) and 0 < prior_scale < float("inf")):  # type: ignore[operator]
        raise ModelError(f"{WHO}: got prior_scale={prior_scale!r}, expected a positive number, or None")
    if not (_is_number(noise) and 0 <= noise < 0.5):  # type: ignore[operator]
        raise ModelError(f"{WHO}: got noise={noise!r}, expected a share of choices, at least 0 and below 0.5")
    if isinstance(num_draws, bool) or not isinstance(num_draws, int) or num_draws < 2:
        raise ModelError(f"{WHO}: got num_draws={num_draws!r}, expected a number of draws, at least 2")


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
