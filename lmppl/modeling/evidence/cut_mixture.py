"""The cut mixture: each member of an ensemble has the same share of the posterior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import ClassVar

import torch
from torch import Tensor

from lmppl.errors import FactorError, ModelError
from lmppl.modeling.evidence.attitudes import Attitude, over
from lmppl.modeling.evidence.beliefs import Belief, Members

__all__ = ["CutMixture"]

ROUNDING = 1e-9  # nats


@dataclass(frozen=True)
class CutMixture(Attitude):
    """The mixture of the members' own posteriors: each member of an ensemble has the same share of the posterior.

    π_cut(x|c) = (1/M) Σ_m π*_m(x|c), π*_m ∝ p0(x|c) e^{r_m(x)/β}, p0 the prior with the other factors. What flows back
    from x to the belief is cut: under `Marginal` a member of large Z_m(c) = E_p0[e^{r_m/β}] has a larger share. A
    member's free constant, in any context, cancels. As a factor

        log φ(x, c) = log (1/M) Σ_m exp(r_m(x)/β − log Z_m(c)), in nats, with E_p0[φ] = 1.

    `lmppl.fit_cut_mixture(model)` finds the log Z_m; until then no engine runs. Source: `plummer2015`, `jacob2017`.

    Parameters
    ----------
    log_normalizers : sequence of C rows of M floats, optional
        log Z_m(c), in nats, up to a constant in each context; what `fit_cut_mixture` gives.

    Raises
    ------
    ModelError
        Where they are no C rows of M finite numbers.
    FactorError
        When evaluated: a belief that is no ensemble, or of another number of members.
    """

    log_normalizers: Sequence[Sequence[float]] | None = None

    reads_context: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.log_normalizers is not None:
            object.__setattr__(self, "log_normalizers", _as_rows(self.log_normalizers))

    @property
    def unfitted(self) -> Attitude:
        """`CutMixture()`."""
        return CutMixture()

    def judged(self, belief: Belief, beta: float) -> Tensor:
        """(B, M) r_m/β."""
        if not isinstance(belief, Members):
            kind = type(belief).__name__
            raise FactorError(f"CutMixture() mixes the posteriors of members, expected an ensemble (B, M), got {kind}")
        return belief.values / beta

    def log_factor(self, belief: Belief, beta: float) -> Tensor:
        """(B,) log φ, where the log Z_m are those of one context."""
        return self.log_factor_of(self.judged(belief, beta), torch.zeros(len(belief.mean), dtype=torch.int64))

    def log_factor_of(self, judged: Tensor, context: Tensor | None) -> Tensor:
        """(B,) log φ of r_m/β (B, M) in contexts (B,)."""
        assert self.log_normalizers is not None  # as `refusal` made sure
        assert context is not None
        log_z = torch.tensor(self.log_normalizers, dtype=torch.float64, device=judged.device)
        if log_z.shape[1] != judged.shape[1]:
            raise FactorError(
                f"CutMixture was fitted for {log_z.shape[1]} members, got {judged.shape[1]}; fit it again"
            )
        away = judged - log_z[context.long().to(judged.device)]
        return away.logsumexp(1) - math.log(away.shape[1])

    def upper(self, reward_upper: float, beta: float) -> float:
        """sup r/β − min log Z_m, once fitted; a little more, so that a sum's rounding is not above it."""
        if self.log_normalizers is None:
            return inf
        return reward_upper / beta - min(min(row) for row in self.log_normalizers) + ROUNDING

    def formula(self, reward: str, beta: float) -> str:
        """mean_m exp(r_m/β)/Z_m."""
        return f"mean_m exp({reward}{over(beta)})/Z_m"

    def refusal(self, num_contexts: int) -> str:
        """Unfitted, or fitted for other contexts."""
        if self.log_normalizers is None:
            return "its members' log Z_m are not fitted yet; fit them with lmppl.fit_cut_mixture(model).model"
        if len(self.log_normalizers) != num_contexts:
            return (
                f"its log Z_m are fitted for {len(self.log_normalizers)} contexts, and the prior has {num_contexts}; "
                "fit them again"
            )
        return ""


def _as_rows(values: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    try:
        rows = tuple(tuple(float(value) for value in row) for row in values)
    except (TypeError, ValueError) as error:
        raise ModelError(f"CutMixture: got log_normalizers={values!r}, expected C rows of M numbers") from error
    widths = {len(row) for row in rows}
    if len(widths) != 1 or min(widths) < 2 or not all(math.isfinite(value) for row in rows for value in row):
        raise ModelError(f"CutMixture: got log_normalizers={values!r}, expected C rows of M ≥ 2 finite numbers")
    return rows
