"""Rewards: log φ(x) = r(x)/β, and optimality, where the reward is itself a log-probability."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Any, Self

import torch
from torch import Tensor

from lmppl.errors import ModelError, ShapeError
from lmppl.modeling.declared_functions import to_feature
from lmppl.modeling.evidence.sequence_classifier import SequenceClassifier
from lmppl.modeling.factors import Factor, Feature, FeatureInput
from lmppl.modeling.label_scores import Label, is_log_probability
from lmppl.modeling.user_functions import RowError

__all__ = ["Optimality", "Reward"]


class Reward(Factor):
    """A reward r at temperature β: log φ(x) = r(x)/β, in nats, so that π*(x|c) ∝ π0(x|c) exp(r(x)/β).

    With this factor alone, π* is the optimum of KL-regularised RL, E_πθ[r] − β KL(πθ‖π0); β divides the
    reward and nothing else. Source: `korbak2022bayesian`, `levine2018`.

    Parameters
    ----------
    fn : callable or Feature
        The reward r, in its own units: see `Feature.fn`. A `transformers` text-classification pipeline needs
        `label`, and so does a fitted classifier of texts with `predict_log_proba`, as scikit-learn has them.
    beta : float
        β > 0, in the units of r.
    name : str, optional
        How errors and tables call the factor; by default the function's name.
    upper : float
        sup r, in the units of r, so that sup log φ = upper/β: enables rejection and certificates. A reward
        above it is an error, never clipped.
    on : {"text", "full", "ids", "hidden"}
        What `fn` reads: see `Feature`.
    stochastic : bool
        Values differ from call to call: never cached.
    fingerprint : str, optional
        Names the function's content, for the spec hash: another fingerprint is another declaration.
    label : str or int, optional
        For a text-classification pipeline: the label whose score is the reward. For a fitted classifier: the class
        whose log-probability is, in nats, which 0 bounds.
    log_prob : bool
        For a pipeline: the log of the score, in nats, which 0 bounds.

    Raises
    ------
    ModelError
        Where β is not a positive finite number, `upper` is nan or −inf, or `fn` is no function of a list of
        texts.
    FactorError, ShapeError
        When evaluated: nan, ±inf, a value above `upper`, a vector for each text.

    Examples
    --------
    >>> Reward(len, beta=0.5).formula
    'exp(len(x)/0.5)'
    """

    beta: float
    reward_upper: float

    def __init__(
        self,
        fn: Callable[..., Any] | Feature,
        beta: float = 1.0,
        *,
        name: str | None = None,
        upper: float = inf,
        on: FeatureInput = "text",
        stochastic: bool = False,
        fingerprint: str | None = None,
        label: Label | None = None,
        log_prob: bool = False,
    ) -> None:
        if log_prob and label is None:
            raise ModelError("Reward: got log_prob=True without label=; it is the log of a pipeline's score of a label")
        feature = to_feature(
            fn,
            kind="Reward",
            name=name,
            on=on,
            stochastic=stochastic,
            fingerprint=fingerprint,
            label=label,
            log_prob=log_prob,
        )
        beta, upper = _number("beta", beta), _number("upper", upper)
        if is_log_probability(feature.fn):
            upper = min(upper, 0.0)
        if not 0 < beta < inf:
            raise ModelError(f"Reward: got beta={beta:g}, expected a positive number: log φ(x) = r(x)/β")
        if upper == -inf:
            raise ModelError("Reward: got upper=-inf, expected the largest reward, or inf where there is no bound")

        def log_factor(columns: dict[str, Tensor]) -> Tensor:
            reward = single_column(columns)
            _refuse_above(
                reward,
                upper,
                "Reward: got {value:g} for",
                f", above the declared upper={upper:g}; a bound is never clipped",
            )
            return reward / beta

        super().__init__(
            name=name or feature.name,
            features=(feature,),
            log_factor=log_factor,
            upper=upper / beta,
            hard=False,
            formula=f"exp({applied(feature)}{'' if beta == 1 else f'/{beta:g}'})",
            named=name is not None,
        )
        object.__setattr__(self, "beta", beta)
        object.__setattr__(self, "reward_upper", upper)

    def with_beta(self, beta: float) -> Reward:
        """The same reward, bound and name at another temperature."""
        other = Reward(self.features[0], beta, name=self.name, upper=self.reward_upper)
        object.__setattr__(other, "named", self.named)
        return other

    def describe(self) -> dict[str, Any]:
        """As `Factor.describe`, with β and the bound in the units of the reward."""
        return super().describe() | {"beta": self.beta, "reward_upper": self.reward_upper}

    @classmethod
    def from_description(
        cls, data: Mapping[str, Any], features: Sequence[Feature], functions: Mapping[str, Any]
    ) -> Self:
        """The factor that `describe` described, from its features."""
        return cls(features[0], float(data["beta"]), name=data["name"], upper=float(data["reward_upper"]))

    @classmethod
    def from_pretrained(
        cls,
        model: Any,
        tokenizer: Any = None,
        *,
        beta: float = 1.0,
        label: str | None = None,
        log_prob: bool = False,
        name: str | None = None,
        upper: float | None = None,
        on: FeatureInput = "text",
        batch_size: int = 32,
        max_length: int | None = None,
        dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None,
        fingerprint: str | None = None,
    ) -> Self:
        """A sequence-classification model as reward: a reward model, a sentiment or toxicity classifier.

        r(x) is the logit where the model has one output (log σ(logit) with `log_prob`), otherwise the
        log-probability of `label`. Log-probabilities are at most 0, which is declared as `upper`.

        Parameters
        ----------
        model : str or transformers model
            A name or a path, or a loaded `...ForSequenceClassification` in evaluation mode; yours is never
            changed.
        tokenizer : str or transformers tokenizer, optional
            By default the one at the same name or path.
        beta, name, upper, on, fingerprint
            As in `Reward`; `upper` is by default 0 for log-probabilities, else inf.
        label : str, optional
            The output that is meant; needed where there are several.
        log_prob : bool
            Of a single output: log σ(logit) in place of the logit.
        batch_size : int
            Texts in one forward. A row's value does not depend on its companions, but for rounding.
        max_length : int, optional
            Cut texts to this many tokens; by default a text that is too long for the model is an error.
        dtype : torch.dtype or str, optional
            Of the weights of a model that is loaded here: by default float32 on the CPU, as stored elsewhere.
        device : str or torch.device, optional
            Where a model that is loaded here runs; by default the CPU.

        Raises
        ------
        ModelError
            Where the model has no such label, no padding token or another one than its tokenizer, is in training mode,
            or is no classifier.
        """
        if isinstance(model, str):
            from transformers import AutoModelForSequenceClassification, AutoTokenizer

            tokenizer = model if tokenizer is None else tokenizer
            name = name or model.rstrip("/").rsplit("/", 1)[-1]
            place = torch.device(device or "cpu")
            weights = _weights(dtype) or (torch.float32 if place.type == "cpu" else "auto")
            path = model
            try:
                model, found = AutoModelForSequenceClassification.from_pretrained(
                    path, dtype=weights, output_loading_info=True
                )
            except OSError as error:
                raise ModelError(f"Reward.from_pretrained: {path!r} cannot be loaded: {error}") from error
            if found["missing_keys"]:
                missing = ", ".join(sorted(found["missing_keys"])[:3])
                raise ModelError(
                    f"Reward.from_pretrained: {path!r} has no weights for {missing}: it is no trained sequence "
                    "classifier, and its scores would be random"
                )
            model = model.to(place).eval()
        elif (dtype, device) != (None, None):
            raise ModelError(
                "Reward.from_pretrained: got dtype= or device= with a loaded model; move it yourself: "
                "model.to(device, dtype)"
            )
        if isinstance(tokenizer, str):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        score = SequenceClassifier(model, tokenizer, label, log_prob, batch_size, max_length)
        if upper is None:
            upper = 0.0 if score.is_log_prob else inf
        return cls(score, beta, name=name, upper=upper, on=on, fingerprint=fingerprint)


class Optimality(Factor):
    """A reward r ≤ 0 read as the probability of optimality: log φ(x) = r(x) = log p(O=1|x), in nats.

    Then φ ≤ 1, log Z is the log of the average probability of O=1 under the prior, and rejection works. −inf
    is allowed. Source: `levine2018`.

    Parameters
    ----------
    fn : callable or Feature
        log p(O=1|x) for each text, in nats: see `Feature.fn`. Of a `transformers` text-classification pipeline the log
        of the score of `label`, and of a fitted classifier of texts log p(label|x).
    name, on, stochastic, fingerprint
        As in `Reward`.
    label : str or int, optional
        For a pipeline or a fitted classifier: O=1 is that the text has this label.

    Raises
    ------
    FactorError
        When evaluated: nan, or a positive value.

    Examples
    --------
    >>> Optimality(Feature("log_clean", lambda texts: [-float(len(t)) for t in texts])).formula
    'exp(log_clean(x))'
    """

    def __init__(
        self,
        fn: Callable[..., Any] | Feature,
        *,
        name: str | None = None,
        on: FeatureInput = "text",
        stochastic: bool = False,
        fingerprint: str | None = None,
        label: Label | None = None,
    ) -> None:
        feature = to_feature(
            fn,
            kind="Optimality",
            name=name,
            on=on,
            stochastic=stochastic,
            fingerprint=fingerprint,
            label=label,
            log_prob=True,
        )

        def log_factor(columns: dict[str, Tensor]) -> Tensor:
            value = single_column(columns)
            _refuse_above(
                value,
                0.0,
                "a log-probability cannot be positive: got {value:g} for",
                "; use Reward for unbounded scores",
            )
            return value

        super().__init__(
            name=name or feature.name,
            features=(feature,),
            log_factor=log_factor,
            upper=0.0,
            hard=None,
            formula=f"exp({applied(feature)})",
            named=name is not None,
        )

    @classmethod
    def from_description(
        cls, data: Mapping[str, Any], features: Sequence[Feature], functions: Mapping[str, Any]
    ) -> Self:
        """The factor that `describe` described, from its features."""
        return cls(features[0], name=data["name"])


def single_column(columns: dict[str, Tensor]) -> Tensor:
    """The one column (B,) of a factor with one feature."""
    (column,) = columns.values()
    if column.dim() != 1:
        raise ShapeError(
            f"got values of shape {tuple(column.shape)}, expected ({len(column)},): one number for each text"
        )
    return column


def applied(feature: Feature) -> str:
    """`name(x)`, or `name(c, x)` where the function reads the context too."""
    return f"{feature.name}({'c, x' if feature.on == 'full' or feature.reads_prompts else 'x'})"


def _refuse_above(values: Tensor, upper: float, before: str, after: str) -> None:
    above = torch.nonzero(values > upper)
    if len(above):
        row = int(above[0, 0])
        raise RowError(row, before.format(value=float(values[row])), after)


def _weights(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ModelError(f"Reward.from_pretrained: got dtype={dtype!r}, expected float32, bfloat16, float16 or float64")
    return found


def _number(what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or math.isnan(value):
        raise ModelError(f"Reward: got {what}={value!r}, expected a number")
    return float(value)
