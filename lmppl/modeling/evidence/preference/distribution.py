"""A distribution of human preference for one text: people differ in what they like, and a comparison asks two of them.

Source: `siththaranjan2024` (distributional preference learning: what a plain reward averages away).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Categorical, constraints
from torch.nn.functional import log_softmax

from lmppl.errors import ModelError
from lmppl.modeling.evidence.attitudes import Attitude, check_number
from lmppl.modeling.evidence.preference.evaluation import Evaluation, evaluate_predictions
from lmppl.modeling.evidence.preference.features import Featuriser, Standardised, standardise
from lmppl.modeling.evidence.preference.pairs import Pairs, check_for_fit, read_pairs
from lmppl.modeling.evidence.preference.writing import read_tensor, write_tensor
from lmppl.modeling.evidence.uncertain import UncertainReward, attitude_of
from lmppl.modeling.factors import Feature

__all__ = ["Levels", "PreferenceDistribution", "PreferenceHeads"]

WHO = "PreferenceDistribution"
LOG_SPREAD = -0.5 * math.log(2)  # of a text with features of nought: two such differ with variance 1


class Levels(Categorical):
    """A law on the levels 0, …, K−1, with the mean and the variance of the level."""

    arg_constraints = {"logits": constraints.independent(constraints.real, 1)}  # noqa: RUF012 - torch's own form

    @property
    def mean(self) -> Tensor:
        """(B,) Σ_k k·p_k."""
        return (self.probs * self._levels).sum(-1)

    @property
    def variance(self) -> Tensor:
        """(B,) Σ_k (k − mean)²·p_k."""
        return (self.probs * (self._levels - self.mean[..., None]) ** 2).sum(-1)

    @property
    def _levels(self) -> Tensor:
        return torch.arange(self._num_events, dtype=self.probs.dtype, device=self.probs.device)


@dataclass(frozen=True, eq=False)
class PreferenceHeads:
    """The heads of a distribution of preference.

    Parameters
    ----------
    kind : {"normal", "categorical"}
    weights : Tensor (D, 2) or (D, K)
        Of mean and log-spread; of the logits of K levels.
    bias : Tensor (2,) or (K,)
        Fixed at (0, −½ log 2) for "normal".
    """

    kind: Literal["normal", "categorical"]
    weights: Tensor
    bias: Tensor

    def outputs(self, features: Tensor) -> Tensor:
        """(B, 2) or (B, K) of features (B, D)."""
        return features @ self.weights + self.bias

    def belief(self, features: Tensor) -> tuple[Tensor, Tensor] | Levels:
        """The laws of r of B texts."""
        outputs = self.outputs(features)
        if self.kind == "normal":
            return outputs[:, 0], outputs[:, 1].exp()
        return Levels(logits=outputs)

    def log_first(self, first: Tensor, second: Tensor) -> Tensor:
        """(N,) log P(r(a) > r(b)) + ½ P(r(a) = r(b)) as one logarithm, of features (N, D) of both sides."""
        return log_first(self.kind, self.outputs(first), self.outputs(second))


def log_first(kind: str, first: Tensor, second: Tensor) -> Tensor:
    """(N,) log P(a ≻ b), in nats, of the heads' outputs for both sides, when each is liked by a person of its own.

    Normal: Φ((μ_a − μ_b)/√(σ_a² + σ_b²)). Categorical: Σ_ij p_a(i) p_b(j) (1[i > j] + ½ 1[i = j]).
    """
    if kind == "normal":
        scale = torch.logaddexp(2 * first[:, 1], 2 * second[:, 1]).mul(0.5).exp()
        normal: Tensor = torch.special.log_ndtr((first[:, 0] - second[:, 0]) / scale)
        return normal
    levels = torch.arange(first.shape[1])
    order = (levels[:, None] - levels).sign().to(first.dtype)
    log_win = ((1 + order) / 2).log()
    pairs = log_softmax(first, -1)[:, :, None] + log_softmax(second, -1)[:, None, :]
    # Impossible orders are left out: −inf among the summands has no gradient.
    possible = log_win > -math.inf
    return (pairs[:, possible] + log_win[possible]).logsumexp(-1)


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


class PreferenceDistribution(UncertainReward):
    """How people differ in liking a text x: a law of r(x), learned from pairs; made by `fit`.

    A comparison asks somebody about a and somebody about b: P(a ≻ b) = P(r(a) > r(b)) with r(a), r(b) independent. Its
    spread is what people disagree about, and no ignorance of the model's: more pairs do not shrink it. `Quantile(t)`
    of it is what all but a share t of people grant the text, `Mean()` the average. Source: `siththaranjan2024`.

    Parameters
    ----------
    texts : HeadsOfTexts
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

    texts: HeadsOfTexts

    def __init__(
        self,
        texts: HeadsOfTexts,
        beta: float = 1.0,
        attitude: Attitude | None = None,
        *,
        num_references: int | None = None,
        name: str | None = None,
        on: Literal["text", "full"] = "text",
        fingerprint: str | None = None,
    ) -> None:
        if not isinstance(texts, HeadsOfTexts):
            raise ModelError(f"{WHO}: got {type(texts).__name__}, expected what {WHO}.fit(pairs, features) makes")
        super().__init__(
            texts, beta, attitude, num_references=num_references, name=name, on=on, fingerprint=fingerprint
        )
        object.__setattr__(self, "texts", texts)

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
        heads = _fit(kind, num_levels if kind == "categorical" else 2, float(prior_scale), first, second)
        texts = HeadsOfTexts(scaled, heads, name or "preference")
        return cls(texts, beta, attitude, num_references=num_references, name=name, on=on, fingerprint=fingerprint)

    def with_attitude(
        self,
        attitude: Attitude,
        *,
        beta: float | None = None,
        num_references: int | None = None,
        name: str | None = None,
    ) -> Self:
        """The same laws in another declaration; what is not given stays."""
        return type(self)(
            self.texts,
            self.beta if beta is None else beta,
            attitude,
            num_references=self.num_references if num_references is None else num_references,
            name=name or (self.name if self.named else None),
            on=self._on,
            fingerprint=self.features[0].fingerprint,
        )

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
    def from_description(
        cls, data: Mapping[str, Any], features: Sequence[Feature], functions: Mapping[str, Any]
    ) -> Self:
        """The factor that `describe` described; the feature's function is the featuriser, or what was fitted."""
        fn: Any = features[0].fn
        if isinstance(fn, HeadsOfTexts):
            fn = fn.features.fn
        scaled = Standardised(fn, read_tensor(data["centre"]), read_tensor(data["scale"]))
        heads = PreferenceHeads(data["heads"], read_tensor(data["weights"]), read_tensor(data["bias"]))
        return cls(
            HeadsOfTexts(scaled, heads, features[0].name),
            float(data["beta"]),
            attitude_of(data),
            num_references=data["num_references"],
            name=data["name"],
            on=data["on"],
            fingerprint=features[0].fingerprint,
        )

    @property
    def _on(self) -> Literal["text", "full"]:
        on: Any = getattr(self.features[0].fn, "on", self.features[0].on)
        return on  # type: ignore[no-any-return]

    def _predict(self, known: Pairs) -> Tensor:
        first, second = self.texts.features([*known.chosen, *known.rejected], WHO).split(len(known))
        heads = self.texts.heads
        pair = [heads.log_first(first, second), heads.log_first(second, first)]
        return torch.stack([*pair, torch.full_like(pair[0], -math.inf)], -1)


def _fit(
    kind: Literal["normal", "categorical"], width: int, prior_scale: float, first: Tensor, second: Tensor
) -> PreferenceHeads:
    """Maximum posterior density by L-BFGS, from weights of nought."""
    from scipy.optimize import minimize

    size = first.shape[1]
    bias = torch.tensor([0.0, LOG_SPREAD], dtype=torch.float64)

    def heads(theta: Tensor) -> tuple[Tensor, Tensor]:
        weights = theta[: size * width].view(size, width)
        return weights, bias if kind == "normal" else theta[size * width :]

    def loss(at: np.ndarray[Any, Any]) -> tuple[float, np.ndarray[Any, Any]]:
        with torch.enable_grad():
            theta = torch.tensor(at, dtype=torch.float64, requires_grad=True)
            weights, offset = heads(theta)
            said = log_first(kind, first @ weights + offset, second @ weights + offset)
            value = -said.sum() + (theta / prior_scale).square().sum() / 2
            (slope,) = torch.autograd.grad(value, theta)
        return float(value.detach()), slope.numpy()

    start = np.zeros(size * width + (width if kind == "categorical" else 0))
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 2000, "ftol": 1e-14, "gtol": 1e-8})
    largest = float(np.abs(found.jac).max())
    if not largest < 1e-3 * (1 + len(first)) ** 0.5:
        raise ModelError(
            f"{WHO}: the fit has not converged: a gradient of {largest:.2g} is left; choose a smaller prior_scale="
        )
    weights, offset = heads(torch.from_numpy(found.x))
    return PreferenceHeads(kind, weights, offset)


def _refuse_ties(pairs: Pairs) -> None:
    if bool(pairs.tie.any()):
        raise ModelError(
            f"{WHO}: {int(pairs.tie.sum())} of {len(pairs)} pairs are ties, which it has no probability for; leave "
            "them out, or fit a BayesianRewardModel"
        )
