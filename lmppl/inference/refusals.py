"""Words that several engines use where nothing with γ > 0 was found."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["first_context", "z_below"]


def first_context(bad: Tensor) -> tuple[int, str] | None:
    """The first context of `bad` (C,) bool, and how many more there are in words; None where there is none."""
    found = torch.nonzero(bad).squeeze(1).tolist()
    if not found:
        return None
    return found[0], f" (and for {len(found) - 1} more)" if len(found) > 1 else ""


def z_below(rate: float, log_bound: float) -> str:
    """What follows about Z where the share of what is accepted is below `rate`, of a bound log M in nats."""
    return f"Z < {rate:.1e}" + (f"·M, log M = {log_bound:.4g}," if log_bound != 0.0 else "")
