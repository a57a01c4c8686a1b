"""Words that several engines use where nothing with γ > 0 was found."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmppl.diagnostics.intervals import binomial_upper
from lmppl.sequences import Draws

__all__ = ["blame", "count_zeros", "first_context", "z_below", "z_below_of_sweeps"]


def first_context(bad: Tensor) -> tuple[int, str] | None:
    """The first context of `bad` (C,) bool, and how many more there are in words; None where there is none."""
    found = torch.nonzero(bad).squeeze(1).tolist()
    if not found:
        return None
    return found[0], f" (and for {len(found) - 1} more)" if len(found) > 1 else ""


def count_zeros(draws: Draws, names: Sequence[str]) -> Tensor:
    """(C, K) how many draws of each context have φ = 0 by each of the factors called `names`."""
    zeros = torch.zeros(draws.num_contexts, len(names), dtype=torch.int64)
    for k, name in enumerate(names):
        zero = (draws.log_factors[name] == -torch.inf).cpu()
        zeros[:, k] = torch.bincount(draws.context.cpu()[zero], minlength=draws.num_contexts)
    return zeros


def blame(names: Sequence[str], zeros: Tensor) -> str:
    """How many draws each factor excludes, `zeros` (K,) of one context, most first, in brackets; "" where none does."""
    order = torch.argsort(zeros, descending=True, stable=True).tolist()
    found = [f"factor {names[k]!r} is 0 on {int(zeros[k]):,}" for k in order if int(zeros[k])]
    return f" ({', '.join(found)})" if found else ""


def z_below(rate: float, log_bound: float) -> str:
    """What follows about Z where the share of what is accepted is below `rate`, of a bound log M in nats."""
    return f"Z < {rate:.1e}" + (f"·M, log M = {log_bound:.4g}," if log_bound != 0.0 else "")


def z_below_of_sweeps(sweeps: int, log_bound: float, level: float) -> str:
    """What follows where all of several independent sweeps have Ẑ = 0, unbiased and at most M.

    Z = E Ẑ ≤ M·Pr(Ẑ > 0); with M = ∞ nothing follows about Z.
    """
    rate = float(binomial_upper(torch.tensor(0), torch.tensor(sweeps), level))
    if log_bound == torch.inf:
        return (
            f"Pr(Ẑ > 0) < {rate:.2g} with {level:.0%} confidence, and no bound on Z follows without upper=... on every "
            "factor"
        )
    bound, times, where = ("1", "", "") if log_bound == 0.0 else ("M", "·M", f", log M = {log_bound:.4g},")
    return (
        f"Ẑ ≤ {bound} is unbiased, so that Z ≤ Pr(Ẑ > 0){times} < {rate:.2g}{times}{where} with {level:.0%} confidence"
    )
