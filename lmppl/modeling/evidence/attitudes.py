"""Attitudes: what an uncertain reward r is worth as evidence.

The choice changes the target, so the declaration names it.

Of a Gaussian belief N(m, s²) at temperature β:

| attitude | log φ | Gaussian | as s grows |
|---|---|---|---|
| `Mean()` | E[r]/β | m/β | the same |
| `Marginal()` | log E[e^{r/β}] | m/β + s²/2β² | rises: it seeks uncertainty |
| `Robust(κ)` | −κ log E[e^{−r/κβ}] | m/β − s²/2κβ² | falls |
| `LowerBound(k)` | (m − k·s)/β | the same | falls |
| `Quantile(t)` | Q_t(r)/β | (m + s·Φ⁻¹(t))/β | falls for t < ½ |
| `Moderated()` | log E[σ(r/β)] | by quadrature | falls for m > 0, rises for m < 0 |
| `CutMixture()` | log mean_m e^{r_m/β − log Z_m(c)} | – (of an ensemble) | each member has the same share |
"""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import inf
from typing import ClassVar

import torch
from torch import Tensor

from lmppl.errors import ModelError
from lmppl.modeling.evidence.beliefs import Belief
from lmppl.modeling.user_functions import RowError

__all__ = [
    "Attitude",
    "LowerBound",
    "Marginal",
    "Mean",
    "Moderated",
    "Quantile",
    "Robust",
    "check_number",
    "over",
]


class Attitude(ABC):
    """What a belief about r is worth; one of yours is a frozen dataclass that defines `log_factor` and `formula`."""

    estimable: ClassVar[bool] = False  # whether the mean over fresh samples of r estimates φ without bias
    reads_context: ClassVar[bool] = False  # whether one belief is worth more in one context than in another

    @property
    def unfitted(self) -> Attitude:
        """The attitude as it reads beliefs, without what is fitted later: so that a gate still shares the feature."""
        return self

    def judged(self, belief: Belief, beta: float) -> Tensor:
        """(B, K) what is kept of beliefs, beside mean and spread; by default log φ, K = 1."""
        return self.log_factor(belief, beta)[:, None]

    def log_factor_of(self, judged: Tensor, context: Tensor | None) -> Tensor:
        """(B,) log φ of what `judged` kept (B, K), and of the contexts (B,) of an attitude that reads them."""
        return judged[:, 0]

    def refusal(self, num_contexts: int) -> str:
        """Why no run can begin yet with a prior of `num_contexts` contexts; "" where it can."""
        return ""

    @abstractmethod
    def log_factor(self, belief: Belief, beta: float) -> Tensor:
        """(B,) log φ, in nats."""

    @abstractmethod
    def formula(self, reward: str, beta: float) -> str:
        """φ as a formula of `reward`, which is r(x)."""

    def upper(self, reward_upper: float, beta: float) -> float:
        """sup log φ, in nats, of rewards that are at most `reward_upper`: sup r/β, where φ is no more than that."""
        return reward_upper / beta


@dataclass(frozen=True)
class Mean(Attitude):
    """log φ = E[r]/β: uncertainty is ignored."""

    def log_factor(self, belief: Belief, beta: float) -> Tensor:
        """(B,) m/β."""
        return belief.mean / beta

    def formula(self, reward: str, beta: float) -> str:
        """exp(E[r]/β)."""
        return f"exp(E[{reward}]{over(beta)})"


@dataclass(frozen=True)
class Marginal(Attitude):
    """log φ = log E[e^{r/β}]: r is marginalised as a latent variable, which seeks uncertainty.

    With r ≤ 0 read as log p(O=1|x, r), this is Bayes' rule for O. A right tail that is too heavy makes it infinite: an
    error. Source: `levine2018` for the reading of e^{r/β} as a probability.
    """

    estimable: ClassVar[bool] = True

    def log_factor(self, belief: Belief, beta: float) -> Tensor:
        """(B,) log E[e^{r/β}]."""
        value = belief.log_mgf(1 / beta)
        _refuse_infinite(value, beta, "right", "E[exp(r/β)]", "raise beta, or choose Mean() or Robust(κ)")
        return value

    def formula(self, reward: str, beta: float) -> str:
        """E[exp(r/β)]."""
        return f"E[exp({reward}{over(beta)})]"


@dataclass(frozen=True)
class Robust(Attitude):
    """log φ = −κ log E[e^{−r/κβ}] = min_Q E_Q[r]/β + κ KL(Q‖p): the least that any belief Q near p would say.

    κ → ∞ is `Mean`, κ → 0 the worst member. A left tail that is too heavy makes it −∞: an error. Source: `hansen2001`.

    Parameters
    ----------
    kappa : float
        κ > 0, in nats: what it costs to move the belief by one nat.
    """

    kappa: float

    def __post_init__(self) -> None:
        check_number(self.kappa, "Robust", "kappa", 0.0, inf, "a positive number")

    def log_factor(self, belief: Belief, beta: float) -> Tensor:
        """(B,) −κ log E[e^{−r/κβ}]."""
        value = -self.kappa * belief.log_mgf(-1 / (self.kappa * beta))
        _refuse_infinite(value, beta, "left", "E[exp(−r/κβ)]", "raise kappa, or choose LowerBound(k)")
        return value

    def formula(self, reward: str, beta: float) -> str:
        """E[exp(−r/κβ)]^−κ."""
        return f"E[exp(-{reward}{over(self.kappa * beta)})]^-{self.kappa:g}"


@dataclass(frozen=True)
class LowerBound(Attitude):
    """log φ = (m − k·s)/β: a confidence bound, which is a heuristic.

    Source: `coste2024` (with the variance in place of s).

    Parameters
    ----------
    k : float
        Standard deviations to subtract; s of an ensemble has divisor M − 1.
    """

    k: float = 1.0

    def __post_init__(self) -> None:
        check_number(self.k, "LowerBound", "k", -inf, inf, "a finite number")

    def log_factor(self, belief: Belief, beta: float) -> Tensor:
        """(B,) (m − k·s)/β."""
        return (belief.mean - self.k * belief.spread) / beta

    def upper(self, reward_upper: float, beta: float) -> float:
        """sup r / β for k ≥ 0, else inf."""
        return reward_upper / beta if self.k >= 0 else inf

    def formula(self, reward: str, beta: float) -> str:
        """exp((m − k·s)/β)."""
        return f"exp((E[{reward}] - {self.k:g} sd[{reward}]){over(beta)})"


@dataclass(frozen=True)
class Quantile(Attitude):
    """log φ = Q_t(r)/β: the reward that is not exceeded with probability t, for distributions of preferences.

    Parameters
    ----------
    level : float
        t in (0, 1); between two members of an ensemble the quantile is linear (type 7 of Hyndman and Fan).
    """

    level: float

    def __post_init__(self) -> None:
        check_number(self.level, "Quantile", "level", 0.0, 1.0, "a probability between 0 and 1")

    def log_factor(self, belief: Belief, beta: float) -> Tensor:
        """(B,) Q_t(r)/β."""
        return belief.quantile(self.level) / beta

    def formula(self, reward: str, beta: float) -> str:
        """exp(Q_t[r]/β)."""
        return f"exp(Q{self.level:g}[{reward}]{over(beta)})"


@dataclass(frozen=True)
class Moderated(Attitude):
    """log φ = log E[σ(r/β)]: the probability of O = 1 when its log-odds are uncertain; φ ≤ 1, so that rejection works.

    It draws p(O=1|x) towards ½ where r is unknown: it penalises spread where m > 0 and rewards it where m < 0, and for
    m → −∞ it becomes `Marginal`. Source: `mackay1992`.
    """

    estimable: ClassVar[bool] = True

    def log_factor(self, belief: Belief, beta: float) -> Tensor:
        """(B,) log E[σ(r/β)]."""
        return belief.log_mean_sigmoid(beta)

    def upper(self, reward_upper: float, beta: float) -> float:
        """log σ(sup r / β) ≤ 0."""
        return float(torch.nn.functional.logsigmoid(torch.tensor(reward_upper / beta, dtype=torch.float64)))

    def formula(self, reward: str, beta: float) -> str:
        """E[σ(r/β)]."""
        return f"E[σ({reward}{over(beta)})]"


def over(beta: float) -> str:
    """What stands after a reward that is divided by β."""
    return "" if beta == 1 else f"/{beta:g}"


def _refuse_infinite(value: Tensor, beta: float, side: str, what: str, fix: str) -> None:
    bad = torch.nonzero(~torch.isfinite(value))
    if len(bad):
        before = f"{what} is infinite at beta={beta:g} (the reward's {side} tail is too heavy) for"
        raise RowError(int(bad[0, 0]), before, f"; {fix}")


def check_number(value: object, owner: str, name: str, above: float, below: float, expected: str) -> None:
    """Raise `ModelError` where `value` is no number strictly between `above` and `below`."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isnan(value)
    if not real or not above < float(value) < below:  # type: ignore[arg-type]
        raise ModelError(f"{owner}: got {name}={value!r}, expected {expected}")
