"""What a run of chains shows: convergence figures of each scalar, acceptance, chains that do not move."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lmppl.diagnostics.chains import (
    MIN_STEPS,
    ChainFigure,
    bulk_ess,
    mcse,
    nested_rhat,
    rhat,
    stuck_chains,
    tail_ess,
)
from lmppl.inference.mcmc.chains import StepInfo
from lmppl.sequences import Draws

__all__ = ["Tally", "chain_figures", "scalars", "stuck"]

FIGURES: dict[str, Callable[[Tensor], ChainFigure]] = {
    "rhat": rhat,
    "bulk_ess": bulk_ess,
    "tail_ess": tail_ess,
    "mcse": mcse,
}


class Tally:
    """Counts of proposals and acceptances, by kernel, and by kernel and position; plain tensors in and out.

    Parameters
    ----------
    context : Tensor (B,), int64
        The context of each chain.
    num_contexts, horizon : int
    """

    def __init__(self, context: Tensor, num_contexts: int, horizon: int) -> None:
        self.context, self.num_contexts, self.horizon = context, num_contexts, horizon
        self.counts: dict[str, Tensor] = {}

    def add(self, info: StepInfo) -> None:
        """Count one step."""
        if info.kernel not in self.counts:
            self.counts[info.kernel] = torch.zeros(2, self.num_contexts, self.horizon + 1, dtype=torch.float64)
        counts = self.counts[info.kernel]
        proposed = info.position >= 0
        where = self.context[proposed], info.position[proposed]
        ones = torch.ones(len(where[0]), dtype=torch.float64)
        counts[0].index_put_(where, ones, accumulate=True)
        counts[1].index_put_(where, info.accepted[proposed].double(), accumulate=True)

    @staticmethod
    def rates(parts: list[Mapping[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Acceptance of each kernel (C,), and of each kernel by position (T + 1,), nan where nothing was proposed."""
        total: dict[str, Tensor] = {}
        for part in parts:
            for name, counts in part.items():
                total[name] = total[name] + counts if name in total else counts
        by_kernel = {name: counts[1].sum(1) / counts[0].sum(1) for name, counts in total.items()}
        by_position = {name: counts[1].sum(0) / counts[0].sum(0) for name, counts in total.items()}
        return by_kernel, by_position


def scalars(draws: Draws) -> dict[str, Tensor]:
    """(N,) each factor's log φ, log π0 and the length."""
    found = {name: value.double() for name, value in draws.log_factors.items()}
    assert draws.log_prior is not None
    return {**found, "log_prior": draws.log_prior.double(), "length": draws.lengths.double()}


def by_chain(values: Tensor, draws: Draws, context: int) -> Tensor:
    """(chains, steps, ...) of one context."""
    rows = torch.nonzero(draws.context == context).squeeze(1)
    chain, step = draws.columns["chain"][rows], draws.columns["step"][rows]
    order = torch.argsort(chain * (int(step.max()) + 1) + step, stable=True)
    return values[rows[order]].view(len(chain.unique()), -1, *values.shape[1:])


def chain_figures(draws: Draws) -> dict[str, Any]:
    """R̂, nested R̂, bulk and tail ESS and MCSE of each scalar, (C,) by figure and scalar; and their notes.

    Nested R̂ compares groups of about √chains chains. Figures that need more steps than there are are nan, and the note
    says so.
    """
    contexts = range(draws.num_contexts)
    result: dict[str, Any] = {name: {} for name in (*FIGURES, "nested_rhat")}
    notes: list[str] = []
    for label, values in scalars(draws).items():
        columns = [by_chain(values, draws, c) for c in contexts]
        for name in result:
            found = [_figure(name, x) for x in columns]
            result[name][label] = torch.tensor([f.value for f in found], dtype=torch.float64)
            for c, f in enumerate(found):
                note = f"{label} in context {c}: {f.note}"
                if f.note and note not in notes:
                    notes.append(note)
    result["chain_notes"] = tuple(notes)
    return result


def _figure(name: str, x: Tensor) -> ChainFigure:
    chains, steps = x.shape
    if name == "nested_rhat":
        size = max((s for s in range(2, int(math.sqrt(chains)) + 1) if chains % s == 0), default=0)
        if size == 0:
            return ChainFigure(math.nan, f"nested R̂ needs groups of chains: {chains} cannot be cut into equal ones")
        return nested_rhat(x, torch.arange(chains) // size)
    if steps < MIN_STEPS:
        return ChainFigure(math.nan, f"{steps} steps a chain are too few for {', '.join(FIGURES)}: look at nested R̂")
    return FIGURES[name](x)


def stuck(draws: Draws) -> dict[int, tuple[int, ...]]:
    """Chains that never moved in the kept steps, by context; empty where there is one step only."""
    found = {}
    for c in range(draws.num_contexts):
        ids = by_chain(draws.ids, draws, c)
        if ids.shape[1] > 1:
            chains = stuck_chains(ids)
            if chains:
                found[c] = chains
    return found
