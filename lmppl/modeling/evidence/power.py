"""The power prior: π0^α in place of π0, over whole sequences."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from math import inf
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from lmppl.errors import ModelError
from lmppl.lm.base import LanguageModel
from lmppl.lm.decoder import Step
from lmppl.modeling.factors import Factor, Feature

if TYPE_CHECKING:
    from lmppl.modeling.model import Model

__all__ = ["PowerPrior"]


def log_prior_of(log_prior: Tensor) -> Tensor:
    """(B,) log π0(x|c), as the draws carry it."""
    return log_prior


class PowerPrior(Factor):
    """A power of the prior: log φ(x) = (α − 1)·log π0(x|c), in nats, so that π* ∝ π0^α; also written `prior ** alpha`.

    Over whole sequences, and not the law of sampling at temperature 1/α token by token (`prior.at_temperature`), which
    is a good proposal for it: π0^α weighs each token by what can follow it. α > 1 sharpens, α < 1 flattens. log π0
    comes with every draw, so that the factor costs no forward of its own.

    φ is a function on the support of π0; off it γ = 0 whatever φ says, and log φ is given as 0 there.

    Parameters
    ----------
    alpha : float
        α > 0.
    name : str, optional
        How errors and tables call the factor.

    Raises
    ------
    ModelError
        Where α is not a positive number.

    Notes
    -----
    Bound: log φ ≤ 0 for α ≥ 1; none is known for α < 1. The incremental form has potential (α − 1)·log π0(x_≤t|c), from
    the log-probabilities of the step that the LM makes anyway. Source: `karan2025`.

    Examples
    --------
    >>> PowerPrior(4).formula
    'π0(x|c)^3'
    """

    alpha: float

    def __init__(self, alpha: float, *, name: str | None = None) -> None:
        alpha = _checked_exponent(alpha)
        super().__init__(
            name=name or "power_prior",
            features=(Feature("log_prior", log_prior_of, on="log_prior"),),
            log_factor=_log_power(alpha),
            upper=0.0 if alpha >= 1.0 else inf,
            hard=False,
            incremental=PowerPotential(alpha),
            formula=f"π0(x|c)^{alpha - 1:g}" if alpha >= 1 else f"π0(x|c)^({alpha - 1:g})",
            named=name is not None,
        )
        object.__setattr__(self, "alpha", alpha)

    @property
    def prior_exponent(self) -> float:
        """α − 1."""
        return self.alpha - 1.0

    def describe(self) -> dict[str, Any]:
        """As `Factor.describe`, with α."""
        return super().describe() | {"alpha": self.alpha, "owns_features": True}

    @classmethod
    def from_description(
        cls, data: Mapping[str, Any], features: Sequence[Feature], functions: Mapping[str, Any]
    ) -> Self:
        """The factor that `describe` described."""
        return cls(float(data["alpha"]), name=data["name"])


class PowerState(NamedTuple):
    """B prefixes: the steps of the LM at each position so far (the last one says what comes next), and log π0 (B,).

    `totals[t]` is log π0 of the first t tokens. Steps are kept, and not their (B, V) scores, so that rows can be cut
    back.
    """

    steps: tuple[Step, ...]
    totals: tuple[Tensor, ...]
    lengths: Tensor


class PowerPotential:
    """log ψ(x_≤t) = (α − 1)·log π0(x_≤t|c): the `Incremental` form of a power prior.

    Parameters
    ----------
    alpha : float
        α > 0.
    """

    needs: Collection[Literal["text", "ids", "hidden"]] = frozenset({"hidden"})

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha

    def start(self, contexts: Tensor, step: Step | None = None) -> PowerState:
        """As `Incremental.start`; the step after the context is needed."""
        if step is None:
            raise ModelError("power prior: its incremental form reads the LM's next-token law; start it with a step")
        zero = torch.zeros(len(contexts), dtype=torch.float64, device=contexts.device)
        return PowerState((_last(step),), (zero,), torch.zeros_like(contexts))

    def weigh(self, state: PowerState, candidates: Tensor | None) -> Tensor:
        """As `Incremental.weigh`: (α − 1)·log π0(v|c, x_≤t); 0 where π0 excludes v."""
        log_probs = self._log_probs(state)
        if candidates is not None:
            log_probs = log_probs.gather(1, candidates)
        return torch.where(log_probs > -inf, (self.alpha - 1.0) * log_probs, 0.0)

    def advance(self, state: PowerState, tokens: Tensor, step: Step) -> PowerState:
        """As `Incremental.advance`."""
        gained = self._log_probs(state).gather(1, tokens[:, None])[:, 0].double()
        at = state.lengths
        total = _at(torch.stack(state.totals), at) + gained
        if bool((at + 1 == len(state.totals)).all()):  # rows of one length, the ordinary case
            return PowerState((*map(_bare, state.steps), _last(step)), (*state.totals, total), at + 1)
        width = int(at.max()) + 2
        totals = _put(torch.stack(state.totals)[: width - 1], at + 1, total, width)
        hidden = _put(torch.stack([s.hidden for s in state.steps])[: width - 1], at + 1, _last(step).hidden, width)
        steps = tuple(Step(step.project, h) for h in hidden)
        return PowerState(steps, tuple(totals), at + 1)

    def potential(self, state: PowerState) -> Tensor:
        """As `Incremental.potential`; 0 off the support of π0."""
        total = _at(torch.stack(state.totals), state.lengths)
        return torch.where(total > -inf, (self.alpha - 1.0) * total, 0.0)

    def select(self, state: PowerState, index: Tensor) -> PowerState:
        """As `Incremental.select`."""
        steps = tuple(Step(s.project, s.hidden[index]) for s in state.steps)
        return PowerState(steps, tuple(t[index] for t in state.totals), state.lengths[index])

    def crop(self, state: PowerState, lengths: Tensor) -> PowerState:
        """As `Incremental.crop`."""
        lengths = lengths.to(state.lengths.device)
        width = int(lengths.max()) + 1
        return PowerState(state.steps[:width], state.totals[:width], lengths)

    def _log_probs(self, state: PowerState) -> Tensor:
        """(B, V) log π0(·|c, x_≤t)."""
        step = state.steps[-1]
        if not bool((state.lengths + 1 == len(state.steps)).all()):
            step = Step(step.project, _at(torch.stack([s.hidden for s in state.steps]), state.lengths))
        with torch.no_grad():
            return step.log_probs[:, -1]


def _last(step: Step) -> Step:
    """The step's last position."""
    return step if step.hidden.shape[1] == 1 else Step(step.project, step.hidden[:, -1:])


def _bare(step: Step) -> Step:
    """The step without the scores that it may have computed."""
    return Step(step.project, step.hidden) if "logits" in step.__dict__ else step


def _at(columns: Tensor, lengths: Tensor) -> Tensor:
    """Row i of `columns` (t, B, ...) at `lengths[i]`."""
    return columns[lengths, torch.arange(len(lengths), device=lengths.device)]


def _put(columns: Tensor, at: Tensor, values: Tensor, width: int) -> Tensor:
    """`columns` (t, B, ...) with room for `width` and row i of `values` at `at[i]`."""
    wider = torch.cat([columns, columns.new_zeros(width - len(columns), *columns.shape[1:])])
    wider[at, torch.arange(len(at), device=at.device)] = values
    return wider


def _log_power(alpha: float) -> Callable[[dict[str, Tensor]], Tensor]:
    def log_factor(columns: dict[str, Tensor]) -> Tensor:
        (log_prior,) = columns.values()
        return torch.where(log_prior > -inf, (alpha - 1.0) * log_prior, 0.0)

    return log_factor


def _checked_exponent(alpha: Any) -> float:
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0.0 < alpha < math.inf:
        raise ModelError(f"power prior: got alpha={alpha!r}, expected a positive number: π* ∝ π0^alpha")
    return float(alpha)


def power_prior(prior: LanguageModel, alpha: float) -> Model:
    """π* ∝ π0^α: what `prior ** alpha` declares."""
    return prior * PowerPrior(alpha)


# A language model knows no factors: lmppl.lm lies below lmppl.modeling. The meaning of `**` is therefore handed down to
# it, when the declarations are imported.
LanguageModel.to_power = staticmethod(power_prior)
