"""What a run of chains shows: convergence figures of each scalar, acceptance, chains that do not move."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
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
    tail_ess,
)
from lmppl.inference.mcmc.chains import StepInfo
from lmppl.sequences import Draws

__all__ = ["Moves", "Tally", "chain_figures", "scalars", "stuck", "stuck_note"]

BY_CHANCE = 1e-3  # chains that stand still, as chance would have them in one of a thousand runs
SETTLED = 5  # steps without a change, after which a chain has come to rest
FEW_STEPS = 10  # without any move of any chain, below which nothing is said

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


def chain_figures(draws: Draws, predicates: Collection[str] = ()) -> dict[str, Any]:
    """R̂, nested R̂, bulk and tail ESS and MCSE of each scalar, (C,) by figure and scalar; and their notes.

    Factors that are `predicates` are left out: log φ = 0 on all rows of a chain, which says nothing of mixing.
    Nested R̂ compares groups of about √chains chains. Figures that need more steps than there are are nan, and the note
    says so.
    """
    contexts = range(draws.num_contexts)
    result: dict[str, Any] = {name: {} for name in (*FIGURES, "nested_rhat")}
    notes: list[str] = []
    for label, values in scalars(draws).items():
        if label in predicates:
            continue
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


class Moves:
    """How often, and when last, the row of each chain changed: over all steps of a segment, warm-up included.

    And how many steps began after `SETTLED` others without a change, and in how many of these there was one.

    Parameters
    ----------
    rows : Draws
        The B rows that the segment starts from.
    """

    def __init__(self, rows: Draws) -> None:
        self.rows, self.steps = rows, 0
        self.count = torch.zeros(len(rows), dtype=torch.int64)
        self.last, self.settled, self.woken = (torch.zeros_like(self.count) for _ in range(3))

    def see(self, rows: Draws) -> None:
        """Count the rows after one more step."""
        settled = self.steps - self.last >= SETTLED
        self.steps += 1
        width = min(self.rows.ids.shape[1], rows.ids.shape[1])
        inside = torch.arange(width) < rows.lengths[:, None]
        changed = ((self.rows.ids[:, :width] != rows.ids[:, :width]) & inside).any(1)
        changed |= self.rows.lengths != rows.lengths
        self.count += changed
        self.settled += settled
        self.woken += settled & changed
        self.last[changed] = self.steps
        self.rows = rows

    def plain(self) -> dict[str, Any]:
        """What is kept of it."""
        tensors = {name: getattr(self, name) for name in ("count", "last", "settled", "woken")}
        return {**tensors, "steps": self.steps}


def stuck(segments: Sequence[Mapping[str, Any]], num_contexts: int, num_kept: int) -> dict[int, tuple[int, ...]]:
    """Chains of each context that did not move in their last `num_kept` steps, where chance does not explain it.

    A chain stands still for m steps by chance as long as (1 − r)^m times the number of chains is above `BY_CHANCE`: a
    few kept steps say nothing, and neither does a law that is mostly one text. r is the share of steps in which chains
    move that had come to rest, of those that ever move: moves come in bursts, away from a likely text and back, and
    their mere frequency would be too high. Steps of the warm-up count. Where no chain ever moves there is no such rate,
    and ten steps of it are enough.

    Parameters
    ----------
    segments : sequence of mapping
        `Moves.plain` of the segments, in order.
    num_contexts : int
        Chains are grouped by context.
    num_kept : int
        Kept steps, times `thin`.
    """
    count, settled, woken = (torch.stack([s[k] for s in segments]).sum(0) for k in ("count", "settled", "woken"))
    total, last = 0, torch.zeros_like(count)
    for segment in segments:
        last = torch.where(segment["last"] > 0, total + segment["last"], last)
        total += int(segment["steps"])
    found = {}
    for c, chains in enumerate(torch.arange(len(count)).chunk(num_contexts)):
        moves, still = count[chains], total - last[chains]
        moving = chains[moves > 0]
        if len(moving):
            often = float(count[moving].double().mean()) / total
            rate = (float(woken[moving].sum()) + often) / (float(settled[moving].sum()) + 1.0)
            odd = (still >= num_kept) & (len(moves) * (1.0 - rate) ** still.double() < BY_CHANCE)
        else:
            odd = torch.full_like(moves, total >= FEW_STEPS, dtype=torch.bool)
        if bool(odd.any()):
            found[c] = tuple(torch.nonzero(odd).squeeze(1).tolist())
    return found


def stuck_note(found: Mapping[int, Sequence[int]], num_chains: int, prompts: Sequence[str]) -> str:
    """One sentence about the chains of all contexts that do not move; "" where there are none."""
    if not found:
        return ""
    c, chains = next(iter(found.items()))
    more = f", and in {len(found) - 1} more" if len(found) > 1 else ""
    return (
        f"{len(chains)} of {num_chains} chains never moved for context {prompts[c]!r}{more} (info['stuck']): copies of "
        "one text each; where π* has more, run longer, with smaller moves or other starts"
    )
