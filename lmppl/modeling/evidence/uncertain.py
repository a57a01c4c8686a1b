"""Uncertain rewards: evidence from a reward that is known only up to a belief, by a stated attitude."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any, Self

import torch
from torch import Tensor

from lmppl.errors import FactorError, ModelError
from lmppl.lm.base import LanguageModel
from lmppl.modeling.declared_functions import to_feature
from lmppl.modeling.evidence.attitudes import Attitude, Mean, check_number
from lmppl.modeling.evidence.belief_reading import read_belief
from lmppl.modeling.evidence.beliefs import Distributed, Gaussian, Members
from lmppl.modeling.evidence.centring import CentredBeliefs, centred, unwrapped
from lmppl.modeling.evidence.moments import context_of
from lmppl.modeling.evidence.reward import applied
from lmppl.modeling.factors import Factor, Feature, FeatureInput
from lmppl.modeling.returned_values import Batch
from lmppl.modeling.user_functions import RowError
from lmppl.sequences import Sequences

__all__ = ["SpreadGate", "UncertainReward"]

MEAN, SPREAD, JUDGED = range(3)  # columns of the feature; the attitude's own are the last ones


class UncertainReward(Factor):
    """A reward r that is known up to a belief p(r|x), at temperature β: log φ(x) is what an attitude makes of it.

    `Mean()` E[r]/β; `Marginal()` log E[e^{r/β}]; `Robust(κ)` −κ log E[e^{−r/κβ}]; `LowerBound(k)` (m − k·s)/β;
    `Quantile(t)` Q_t(r)/β; `Moderated()` log E[σ(r/β)]; `CutMixture()` the mixture of the members' posteriors; see
    `lmppl.modeling.evidence.attitudes`. In nats. To tread lightly where the reward is uncertain, choose `Robust`,
    `LowerBound` or `Quantile` with t < ½: they penalise spread at every mean. Source: `coste2024` for ensembles of
    reward models.

    Parameters
    ----------
    fn : callable or Feature
        Of a list of texts (see `Feature.fn`), gives the belief about each: an ensemble's rewards (B, M); a tuple of
        means (B,) and standard deviations (B,), read as Gaussian; or a distribution of torch or Pyro of batch shape
        (B,). `DeepEnsemble`, `MCDropout`, `LaplaceLastLayer` and `PosteriorDraws` make such functions. It must be a
        function of the text, unless `stochastic`.
    beta : float
        β > 0, in the units of r.
    attitude : Attitude, optional
        What the belief is worth; by default `Mean()`, which ignores uncertainty.
    num_references : int, optional
        Centre the members: from member m, its mean over this many draws of the prior is subtracted, in each context.
        Rewards learned from comparisons (Bradley and Terry) have a free constant per context and member, so that every
        attitude but `Mean` needs this; a reward with a meaning of its own needs it not. The draws are fixed (seed 0):
        the centre is a constant, and φ a function of x. They are made when the factor is first evaluated, once for a
        prior, and no run is charged for them.
    name, on, fingerprint
        As in `Reward`.
    upper : float
        sup r over all beliefs, in the units of r; not together with `num_references`. log φ above its bound is an
        error, never clipped.
    stochastic : bool
        `fn` gives fresh samples (B, M) of r at each call: φ is then estimated, without bias for `Marginal` and
        `Moderated`, and engines that can use estimates run. Other attitudes refuse.

    Raises
    ------
    ModelError
        Where β, `upper` or `num_references` is out of range, or the attitude cannot be estimated.
    FactorError, ShapeError
        When evaluated: one number a text, an ensemble of one, a negative spread, nan; a law without the moment, or the
        closed form, that the attitude asks for; infinite evidence.

    Examples
    --------
    >>> from lmppl import Robust
    >>> UncertainReward(lambda texts: [[1.0, 2.0]] * len(texts), beta=0.5, attitude=Robust(2), name="r").formula
    'E[exp(-r(x))]^-2'
    """

    beta: float
    attitude: Attitude
    reward_upper: float
    num_references: int | None

    def __init__(
        self,
        fn: Callable[..., Any] | Feature,
        beta: float = 1.0,
        attitude: Attitude | None = None,
        *,
        num_references: int | None = None,
        name: str | None = None,
        upper: float = inf,
        on: FeatureInput = "text",
        stochastic: bool = False,
        fingerprint: str | None = None,
    ) -> None:
        attitude = Mean() if attitude is None else attitude
        _check_attitude(attitude)
        check_number(beta, "UncertainReward", "beta", 0.0, inf, "a positive number")
        if upper != inf:
            check_number(upper, "UncertainReward", "upper", -inf, inf, "the largest reward, or inf for no bound")
        beta, upper = float(beta), float(upper)
        feature = to_feature(
            fn, kind="UncertainReward", name=name, on=on, stochastic=stochastic, fingerprint=fingerprint
        )
        if feature.stochastic and not attitude.estimable:
            raise ModelError(
                f"UncertainReward: got stochastic=True with {attitude!r}, whose φ fresh samples do not estimate "
                "without bias; choose Marginal() or Moderated(), or give a fixed ensemble"
            )
        if num_references is not None:
            _check_references(num_references, upper, feature)
        bound = attitude.upper(upper, beta)
        judgement = replace(feature, read=Judgement(attitude.unfitted, beta, feature.stochastic))
        context = (Feature(f"{feature.name}_context", context_of, on="ids"),) if attitude.reads_context else ()
        super().__init__(
            name=name or feature.name,
            features=(judgement, *context),
            log_factor=_log_factor(attitude, bound, upper),
            upper=bound,
            hard=False,
            formula=attitude.formula(applied(feature), beta),
            named=name is not None,
        )
        object.__setattr__(self, "beta", beta)
        object.__setattr__(self, "attitude", attitude)
        object.__setattr__(self, "reward_upper", upper)
        object.__setattr__(self, "num_references", num_references)

    def with_attitude(self, attitude: Attitude) -> Self:
        """The same reward and name, judged by another attitude."""
        other = type(self)(
            replace(self.features[0], fn=unwrapped(self.features[0].fn), on=self._on),
            self.beta,
            attitude,
            num_references=self.num_references,
            name=self.name,
            upper=self.reward_upper,
        )
        object.__setattr__(other, "named", self.named)
        return other

    def gate(self, max_spread: float, *, name: str | None = None) -> SpreadGate:
        """The constraint that r is known well enough: s(x) ≤ `max_spread`; `fn` still runs once on each text."""
        return SpreadGate(self, max_spread, name=name)

    def bind(self, lm: LanguageModel, log_factor: Callable[[Sequences], Tensor] | None = None) -> Factor:
        """As `Factor.bind`: centred members know the prior whose draws they are centred over; a run needs a fit."""
        refusal = self.attitude.refusal(lm.num_contexts) if log_factor is not None else ""
        if refusal:
            raise ModelError(f"factor {self.name!r}: {refusal}")
        return self._centred(lm, self.num_references) if self.num_references else self

    def _centred(self, lm: LanguageModel, num_references: int) -> Factor:
        """The factor whose beliefs are less their means over draws of `lm`."""
        return centred(self, lm, num_references)

    def describe(self) -> dict[str, Any]:
        """As `Factor.describe`, with β, the attitude, the bound in the units of the reward, and the references."""
        return super().describe() | {
            "users_features": 1,
            "beta": self.beta,
            "attitude": type(self.attitude).__name__,
            "options": dict(vars(self.attitude)),
            "reward_upper": self.reward_upper,
            "num_references": self.num_references,
            "on": self._on,
        }

    @property
    def _on(self) -> FeatureInput:
        """What the user's function reads, which is inside where members are centred."""
        fn = self.features[0].fn
        return fn.on if isinstance(fn, CentredBeliefs) else self.features[0].on

    @classmethod
    def from_description(
        cls, data: Mapping[str, Any], features: Sequence[Feature], functions: Mapping[str, Any]
    ) -> Self:
        """The factor that `describe` described, from its features; the attitude is one of lmppl's."""
        return cls(
            replace(features[0], on=data["on"]),
            float(data["beta"]),
            attitude_of(data),
            num_references=data["num_references"],
            name=data["name"],
            upper=float(data["reward_upper"]),
        )


class SpreadGate(Factor):
    """A gate against texts that the reward does not know: log φ(x) = 0 where s(x) ≤ `max_spread`, else −inf.

    Parameters
    ----------
    reward : UncertainReward
        Whose spread s is meant; its function is shared, and runs once on each text. Of an ensemble s has divisor M − 1.
    max_spread : float
        Above 0, in the units of r.
    name : str, optional
        By default "<reward>_known".

    Raises
    ------
    ModelError
        Where `reward` is no `UncertainReward`, or `max_spread` is out of range.
    FactorError, ShapeError
        When evaluated: as `UncertainReward`.
    """

    reward: UncertainReward
    max_spread: float

    def __init__(self, reward: UncertainReward, max_spread: float, *, name: str | None = None) -> None:
        if not isinstance(reward, UncertainReward):
            raise ModelError(f"SpreadGate: got {type(reward).__name__}, expected an UncertainReward")
        check_number(max_spread, "SpreadGate", "max_spread", 0.0, inf, "a positive number")
        limit = float(max_spread)

        def log_factor(columns: dict[str, Tensor]) -> Tensor:
            (column,) = columns.values()
            return torch.zeros(len(column), dtype=torch.float64, device=column.device).masked_fill(
                column[:, SPREAD] > limit, -inf
            )

        feature = reward.features[0]
        super().__init__(
            name=name or f"{reward.name}_known",
            features=(feature,),
            log_factor=log_factor,
            upper=0.0,
            hard=True,
            formula=f"1[sd[{applied(feature)}] ≤ {limit:g}]",
            named=name is not None,
        )
        object.__setattr__(self, "reward", reward)
        object.__setattr__(self, "max_spread", limit)

    @property
    def is_predicate(self) -> bool:
        """As `Factor.is_predicate`."""
        return True

    def bind(self, lm: LanguageModel, log_factor: Callable[[Sequences], Tensor] | None = None) -> Factor:
        """As `Factor.bind`, with the features of the bound reward."""
        if not self.reward.num_references:
            return self
        bound = copy.copy(self)
        # The first one has the spread; an attitude that reads the context has another.
        object.__setattr__(bound, "features", self.reward.bind(lm).features[:1])
        return bound

    def describe(self) -> dict[str, Any]:
        """As `Factor.describe`, with the reward and the limit."""
        return super().describe() | {"reward": self.reward.describe(), "max_spread": self.max_spread}

    @classmethod
    def from_description(
        cls, data: Mapping[str, Any], features: Sequence[Feature], functions: Mapping[str, Any]
    ) -> Self:
        """The factor that `describe` described, from its features."""
        from lmppl.modeling import evidence

        kind: type[UncertainReward] = getattr(evidence, data["reward"]["kind"])
        reward = kind.from_description(data["reward"], features, functions)
        return cls(reward, float(data["max_spread"]), name=data["name"])


@dataclass(frozen=True)
class Judgement:
    """Reads what a function said as columns (B, 2 + K): the mean m, the spread s, and what an attitude keeps of it.

    That is log φ, K = 1; of `CutMixture` it is r_m/β of each member, K = M.

    Parameters
    ----------
    attitude : Attitude
    beta : float
    stochastic : bool
        What comes back must be samples.
    """

    attitude: Attitude
    beta: float
    stochastic: bool

    def __call__(self, values: Any, batch: Batch) -> Tensor:
        belief = values if isinstance(values, Members | Gaussian | Distributed) else read_belief(values, batch)
        if self.stochastic and not isinstance(belief, Members):
            raise FactorError(
                f"{batch.head} returned {type(values).__name__}, expected samples (B, M): stochastic=True"
            )
        try:
            judged = self.attitude.judged(belief, self.beta)
            return torch.cat([belief.mean[:, None], belief.spread[:, None], judged], 1)
        except RowError as error:
            text = batch.text(error.row)
            raise FactorError(f"{batch.head}: {error.before} the text {text}{error.after}") from error
        except FactorError as error:
            raise FactorError(f"{batch.head}: {error}") from error


def attitude_of(data: Mapping[str, Any]) -> Attitude:
    """The attitude, one of lmppl's, of a factor that `UncertainReward.describe` described."""
    from lmppl.modeling import evidence

    attitude: Attitude = getattr(evidence, data["attitude"])(**data["options"])
    return attitude


def _log_factor(attitude: Attitude, bound: float, upper: float) -> Callable[[dict[str, Tensor]], Tensor]:
    """log φ from the factor's columns; above its bound it is an error."""

    def log_factor(columns: dict[str, Tensor]) -> Tensor:
        column, *context = columns.values()
        value = attitude.log_factor_of(column[:, JUDGED:], context[0] if context else None)
        above = torch.nonzero(value > bound)
        if len(above):
            row = int(above[0, 0])
            raise RowError(
                row,
                f"got log φ = {float(value[row]):g} for",
                f", above {bound:g}, which the declared upper={upper:g} allows; a bound is never clipped",
            )
        return value

    return log_factor


def _check_attitude(attitude: object) -> None:
    if not isinstance(attitude, Attitude):
        fix = f": write {attitude.__name__}(...)" if isinstance(attitude, type) else ""
        raise ModelError(
            f"UncertainReward: got attitude={attitude!r}, expected Mean(), Marginal(), Robust(kappa), LowerBound(k), "
            f"Quantile(level), Moderated() or CutMixture(){fix}"
        )


def _check_references(num_references: object, upper: float, feature: Feature) -> None:
    if isinstance(num_references, bool) or not isinstance(num_references, int) or num_references < 1:
        raise ModelError(f"UncertainReward: got num_references={num_references!r}, expected a number of draws, or None")
    if upper != inf:
        raise ModelError(
            f"UncertainReward: got upper={upper:g} with num_references={num_references}; centring moves the reward, so "
            "that its bound says nothing; leave upper= out"
        )
    if feature.stochastic:
        raise ModelError("UncertainReward: got num_references= with stochastic=True, whose samples have no members")
    if feature.on not in ("text", "full", "ids"):
        raise ModelError(
            f"UncertainReward: got num_references= with on={feature.on!r}, expected 'text', 'full' or 'ids'"
        )
