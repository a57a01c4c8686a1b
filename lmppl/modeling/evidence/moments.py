"""Moments: constraints on what the posterior does on average, E_π*[f] = μ, and not on single texts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Any, Self

import torch
from torch import Tensor

from lmppl.errors import ModelError, ShapeError
from lmppl.lm.base import LanguageModel
from lmppl.modeling.declared_functions import to_feature
from lmppl.modeling.evidence.reward import applied
from lmppl.modeling.factors import Factor, Feature, FeatureInput
from lmppl.modeling.user_functions import RowError
from lmppl.sequences import Sequences

__all__ = ["Moment"]


def context_of(sequences: Sequences) -> Tensor:
    """(B,) the index of each row's context."""
    return sequences.context


class Moment(Factor):
    """A moment of the posterior: among all laws with E[f(x)] = μ, the one that is nearest to the model without it.

    argmin_p KL(p‖p0) subject to E_p[f] = μ is p ∝ p0 · exp(λ·f(x)), where p0 is the model's other factors on its prior.
    So log φ(x) = λ·f(x), in nats; the multipliers λ follow from μ, and `lmppl.fit_moments(model)` finds them. Until
    then no engine runs. Source: `khalifa2021` (distributional constraints), `csiszar1975` (the I-projection).

    Parameters
    ----------
    f : callable or Feature
        A list of texts → one number (or truth value, or vector of K ≥ 2 numbers) for each; see `Feature.fn`.
    target : float or sequence of K floats
        μ, in the units of f; in the relative interior of what f can reach.
    range : tuple of two floats, optional
        The least and the largest value of each number of f. log φ then has a bound, which rejection needs; a value
        outside is an error.
    name, on, fingerprint, label
        As in `Reward`.

    Raises
    ------
    ModelError
        Where μ is no number, or lies outside `range`; when a run begins before λ is fitted.
    FactorError, ShapeError
        When evaluated: a value outside `range`, vectors of another length than μ.

    Examples
    --------
    >>> Moment(lambda texts: ["she" in t for t in texts], 0.5, name="she").formula
    'exp(λ·she(x)), E[she(x)] = 0.5'
    """

    target: Tensor
    range: tuple[float, float] | None
    multipliers: Tensor | None

    def __init__(
        self,
        f: Callable[..., Any] | Feature,
        target: float | Sequence[float],
        *,
        range: tuple[float, float] | None = None,
        name: str | None = None,
        on: FeatureInput = "text",
        fingerprint: str | None = None,
        label: str | None = None,
    ) -> None:
        feature = to_feature(f, kind="Moment", name=name, on=on, fingerprint=fingerprint, label=label)
        if feature.stochastic:
            raise ModelError("Moment: got a stochastic feature, expected a function of the text")
        self._set(target=_as_target(target), range=_as_range(range), multipliers=None)
        low, high = self.range or (-inf, inf)
        if bool(((self.target <= low) | (self.target >= high)).any()):
            between = f"strictly between {low:g} and {high:g}"
            raise ModelError(f"Moment: got target={_shown(self.target)}, expected a value {between}")
        super().__init__(
            name=name or feature.name,
            features=(feature, Feature(f"{feature.name}_context", context_of, on="ids")),
            log_factor=self._log_factor,
            hard=False,
            formula="",
            named=name is not None,
        )
        self._describe_formula()

    def with_multipliers(self, multipliers: Tensor) -> Self:
        """The same moment at multipliers λ (C, K), one row for each context, or (K,) for all."""
        size = len(self.target)
        fits = multipliers.dim() in (1, 2) and multipliers.shape[-1] == size
        if not fits or not bool(torch.isfinite(multipliers).all()):
            got = tuple(multipliers.shape)
            raise ModelError(f"Moment: got multipliers {got}, expected finite ones of shape ({size},) or (C, {size})")
        fitted = copy.copy(self)
        fitted._set(multipliers=multipliers.detach().double().cpu(), log_factor=fitted._log_factor)
        if self.range is not None:
            low, high = self.range
            fitted._set(upper=float(torch.maximum(multipliers * low, multipliers * high).sum(-1).max()))
        fitted._describe_formula()
        return fitted

    def values(self, columns: Mapping[str, Tensor]) -> Tensor:
        """(B, K) f of each row, from its feature columns."""
        column, _ = columns.values()
        values = column[:, None] if column.dim() == 1 else column
        if values.shape[1] != len(self.target):
            raise ShapeError(
                f"got {values.shape[1]} numbers for each text, expected {len(self.target)}, as many as in target="
            )
        if self.range is not None:
            outside = torch.nonzero((values < self.range[0]) | (values > self.range[1]))
            if len(outside):
                row, k = outside[0].tolist()
                raise RowError(row, f"got {float(values[row, k]):g} for", f", outside range={self.range}")
        return values

    def bind(self, lm: LanguageModel, log_factor: Callable[[Sequences], Tensor] | None = None) -> Factor:
        """As `Factor.bind`; a run needs multipliers."""
        if log_factor is not None and self.multipliers is None:
            raise ModelError(
                f"factor {self.name!r}: its multiplier is not fitted yet; fit it with lmppl.fit_moments(model).model"
            )
        if self.multipliers is not None and self.multipliers.dim() == 2 and len(self.multipliers) != lm.num_contexts:
            raise ModelError(
                f"factor {self.name!r}: its multipliers are fitted for {len(self.multipliers)} contexts, and the prior "
                f"has {lm.num_contexts}; fit them again, or with shared=True"
            )
        return self

    def describe(self) -> dict[str, Any]:
        """As `Factor.describe`, with μ, the range and the multipliers."""
        return super().describe() | {
            "users_features": 1,
            "target": self.target.tolist(),
            "range": self.range,
            "multipliers": None if self.multipliers is None else self.multipliers.tolist(),
        }

    @classmethod
    def from_description(
        cls, data: Mapping[str, Any], features: Sequence[Feature], functions: Mapping[str, Any]
    ) -> Self:
        """The factor that `describe` described, from its features."""
        limits = None if data["range"] is None else (float(data["range"][0]), float(data["range"][1]))
        moment = cls(features[0], data["target"], range=limits, name=data["name"])
        if data["multipliers"] is None:
            return moment
        return moment.with_multipliers(torch.tensor(data["multipliers"], dtype=torch.float64))

    def _log_factor(self, columns: dict[str, Tensor]) -> Tensor:
        assert self.multipliers is not None  # as `bind` made sure
        values = self.values(columns)
        _, context = columns.values()
        context = context.long().to(self.multipliers.device)
        multipliers = (self.multipliers if self.multipliers.dim() == 1 else self.multipliers[context]).to(values.device)
        return (values * multipliers).sum(1)

    def _describe_formula(self) -> None:
        f = applied(self.features[0])
        shown = "λ" if self.multipliers is None else _shown(self.multipliers)
        # λ is what makes the mean the target in the model that was fitted, and in no other.
        wanted = f", E[{f}] = {_shown(self.target)}" if self.multipliers is None else ""
        self._set(formula=f"exp({shown}·{f}){wanted}")

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)


def _as_target(target: Any) -> Tensor:
    try:
        value = torch.as_tensor(target, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"Moment: got target={target!r}, expected a number, or a list of numbers") from error
    if value.dim() > 1 or value.numel() == 0 or not bool(torch.isfinite(value).all()):
        raise ModelError(f"Moment: got target={target!r}, expected a finite number, or a list of them")
    return value.reshape(-1)


def _as_range(range: Any) -> tuple[float, float] | None:
    if range is None:
        return None
    try:
        low, high = (float(end) for end in range)
    except (TypeError, ValueError) as error:
        raise ModelError(f"Moment: got range={range!r}, expected the least and the largest value of f") from error
    if not -inf < low < high < inf:
        raise ModelError(f"Moment: got range={range!r}, expected two finite numbers, the smaller one first")
    return low, high


def _shown(values: Tensor) -> str:
    flat = [f"{v:.4g}" for v in values.reshape(-1).tolist()]
    return flat[0] if len(flat) == 1 else f"({', '.join(flat[:4])}{', ...' * (len(flat) > 4)})"
