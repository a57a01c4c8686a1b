"""The bound of quasi-rejection: how the weights of proposals choose it, and how far from π* the law then is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lmppl.diagnostics.intervals import binomial_upper
from lmppl.diagnostics.quasi_rejection import (
    DISTANCES,
    QuasiRejectionCurve,
    log_bound_of_acceptance,
    quasi_rejection_curve,
)
from lmppl.errors import InfeasibleModel
from lmppl.inference.approximation import LEVEL
from lmppl.inference.engine import Part
from lmppl.inference.refusals import blame, first_context

__all__ = [
    "DISTANCES_NOTE",
    "bounds_of_rate",
    "curve_of_weights",
    "distances",
    "refuse_zero",
    "variation_bound",
    "weights_by_context",
]

DISTANCES_NOTE = "the proposal may not cover π*: distances are lower bounds, of what q reaches alone"
RATES = (0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01)  # of the curve, where no bounds are given


def weights_by_context(parts: Sequence[Part], num_contexts: int) -> list[Tensor]:
    """log w of every proposal of each context, in the order of the shards."""
    found: list[list[Tensor]] = [[torch.zeros(0, dtype=torch.float64)] for _ in range(num_contexts)]
    for part in parts:
        rows = part.info["log_weights"].split(part.shard.num_draws)
        for c, log_w in zip(part.shard.contexts, rows, strict=True):
            found[c].append(log_w)
    return [torch.cat(log_w) for log_w in found]


def refuse_zero(prompts: Sequence[str], weights: Sequence[Tensor], parts: Sequence[Part]) -> None:
    """Raise `InfeasibleModel` where every proposal of a context, which `parts` counted, has weight zero."""
    found = first_context(torch.tensor([len(w) > 0 and not bool((w > -math.inf).any()) for w in weights]))
    if found is None:
        return
    c, also = found
    count, zeros = len(weights[c]), torch.stack([p.info["zeros"][c] for p in parts]).sum(0)
    rate = float(binomial_upper(torch.tensor(0), torch.tensor(count), LEVEL))
    raise InfeasibleModel(
        f"quasi_rejection: all {count:,} proposals for context {prompts[c]!r}{also} have "
        f"γ = 0{blame(parts[0].info['factors'], zeros)}: Pr_q(γ > 0) < {rate:.1e} with {LEVEL:.0%} confidence; loosen "
        "the hard factors, or use a proposal that steers"
    )


def bounds_of_rate(
    rate: float, prompts: Sequence[str], weights: Sequence[Tensor], log_upper: float
) -> tuple[float, ...]:
    """log M_q of each context at which proposals are accepted at `rate`, at most `log_upper` = sup log γ/q, in nats."""
    bounds = []
    for prompt, log_w in zip(prompts, weights, strict=True):
        if math.isfinite(log_upper) and float(torch.exp(log_w - log_upper).mean()) >= rate:
            bounds.append(log_upper)  # exact rejection accepts that often already
            continue
        try:
            bounds.append(log_bound_of_acceptance(log_w, rate))
        except InfeasibleModel as error:
            raise InfeasibleModel(
                f"quasi_rejection: for context {prompt!r} {error}; ask for a lower acceptance=, give bound=, or a "
                "proposal that satisfies the hard factors more often"
            ) from error
    return tuple(bounds)


def distances(weights: Sequence[Tensor], log_bounds: Tensor) -> dict[str, Tensor]:
    """Divergences and their standard errors, (C,) each."""
    curves = [quasi_rejection_curve(w, m[None], level=LEVEL) for w, m in zip(weights, log_bounds, strict=True)]
    found: dict[str, Tensor] = {}
    for name in DISTANCES:
        estimates = [getattr(curve, name) for curve in curves]
        found[name] = torch.cat([e.value for e in estimates])
        found[f"{name}_error"] = torch.cat([e.standard_error for e in estimates])
    return found


def variation_bound(weights: Sequence[Tensor], log_bounds: Sequence[float]) -> float:
    """1 − Z_q/Z of the worst context, a bound of TV(law, π*); nan where nothing is known."""
    bounds = []
    for log_w, log_bound in zip(weights, log_bounds, strict=True):
        kept = torch.logsumexp(log_w.clamp_max(log_bound), 0) - torch.logsumexp(log_w, 0)
        bounds.append(float(-torch.expm1(kept)))
    return math.nan if any(math.isnan(b) for b in bounds) else max(bounds)


def curve_of_weights(
    log_w: Tensor, log_bounds: Sequence[float] | Tensor | None, *, covers: bool
) -> QuasiRejectionCurve:
    """The curve of one context at `log_bounds`, or at those of nine acceptance rates as far as they can be reached.

    Parameters
    ----------
    log_w : Tensor (n,)
        log γ − log q of the proposals, in nats.
    log_bounds : sequence of float, optional
    covers : bool
        False notes that distances are lower bounds.
    """
    if log_bounds is None:
        share = float((log_w > -math.inf).double().mean())
        bounds = [log_bound_of_acceptance(log_w, rate) for rate in RATES if rate <= share]
        if not bounds:
            raise InfeasibleModel(
                f"quasi_rejection: {share:.2%} of {len(log_w):,} proposals have γ > 0, so that no rate of "
                f"{', '.join(f'{rate:g}' for rate in RATES)} is in reach; give log_bounds=, or a proposal that "
                "satisfies the hard factors more often"
            )
    else:
        bounds = [float(b) for b in log_bounds]
    curve = quasi_rejection_curve(log_w, torch.tensor(bounds, dtype=torch.float64), level=LEVEL)
    if covers:
        return curve
    figures = {name: getattr(curve, name) for name in (*DISTANCES, "tail")}
    return replace(curve, **{name: replace(e, note=f"{e.note}; {DISTANCES_NOTE}") for name, e in figures.items()})
