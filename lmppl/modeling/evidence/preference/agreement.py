"""Where two posteriors of one head agree: the shift of each weight, and the ratio of its spreads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmppl.errors import ModelError
from lmppl.modeling.evidence.preference.posteriors import DrawnHead, HeadPosterior

__all__ = ["Agreement", "compare_heads"]

MAX_SHIFT, MAX_RATIO = 0.3, 1.25


@dataclass(frozen=True, eq=False)
class Agreement:
    """Two posteriors A and B of the same weights.

    Parameters
    ----------
    shift : Tensor (D,)
        (E_A[w_d] − E_B[w_d]) / sd_B[w_d].
    ratio : Tensor (D,)
        sd_A[w_d] / sd_B[w_d].
    shift_error, ratio_error : float
        Monte Carlo standard errors, from the effective numbers n of draws, for spreads that are equal: of the shift
        √(1/n_A + 1/n_B), in spreads; of the ratio √(1/2n_A + 1/2n_B), as a share of it. n = ∞ of a closed form.
    """

    shift: Tensor
    ratio: Tensor
    shift_error: float
    ratio_error: float

    @property
    def apart(self) -> list[int]:
        """The columns in which they differ by more than three errors beyond 0.3 of a spread, or a factor of 1.25."""
        far = self.shift.abs() > MAX_SHIFT + 3 * self.shift_error
        limit = MAX_RATIO * (1 + 3 * self.ratio_error)
        wide = torch.maximum(self.ratio, 1 / self.ratio) > limit
        return [int(d) for d in torch.nonzero(far | wide)[:, 0]]

    def __repr__(self) -> str:
        apart = self.apart
        head = f"they differ in columns {apart}" if apart else "they agree"
        worst = int(self.shift.abs().argmax())
        return (
            f"{head}: the largest shift is {float(self.shift[worst]):.2f} spreads (column {worst}), with error "
            f"{self.shift_error:.2f}; ratios of spreads {float(self.ratio.min()):.2f} to {float(self.ratio.max()):.2f}"
        )


def compare_heads(
    first: HeadPosterior, second: HeadPosterior, first_facts: Mapping[str, Any], second_facts: Mapping[str, Any]
) -> Agreement:
    """`Agreement` of two posteriors of D weights each."""
    if len(first.mean) != len(second.mean):
        raise ModelError(
            f"BayesianRewardModel.agreement: got heads of {len(first.mean)} and {len(second.mean)} weights, "
            "expected the same features"
        )
    spreads = [one.covariance.diagonal().sqrt() for one in (first, second)]
    counts = [_effective(one, facts) for one, facts in ((first, first_facts), (second, second_facts))]
    inverse = sum(1 / n for n in counts)
    return Agreement(
        shift=(first.mean - second.mean) / spreads[1],
        ratio=spreads[0] / spreads[1],
        shift_error=inverse**0.5,
        ratio_error=(inverse / 2) ** 0.5,
    )


def _effective(posterior: HeadPosterior, facts: Mapping[str, Any]) -> float:
    if not isinstance(posterior, DrawnHead):
        return float("inf")
    count = len(posterior.sample.weights)
    return min(float(facts.get("n_eff", count)), count)
