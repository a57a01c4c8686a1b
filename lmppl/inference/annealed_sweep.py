"""One sweep along π0·φ^λ, λ from 0 to 1: whole rows of each of G groups, weighted, resampled, and moved by MCMC.

Without resampling this is annealed importance sampling, with it a tempered SMC sampler. A group is a context, or in
conditional runs a given exact draw; groups share forwards and never mix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmppl.errors import ModelError
from lmppl.inference.annealing_ladder import next_level
from lmppl.inference.mcmc.chains import ChainState, Kernel
from lmppl.inference.moved_rows import MoveCount, bare, overwrite
from lmppl.inference.proposals import check_bounds, draw_from
from lmppl.inference.resampling import effective_sizes, resample, resample_conditionally, resample_to
from lmppl.lm.randomness import Source
from lmppl.modeling.target import Target, log_evidence
from lmppl.sequences import Draws, concatenate

__all__ = [
    "AnnealedSweep",
    "AnnealedSweepResult",
    "AnnealingSchedule",
    "backward_path",
]

MAX_TEMPERATURES = 500


class AnnealingSchedule(NamedTuple):
    """How a sweep goes from π0 to π*.

    Parameters
    ----------
    num_particles : int
        N of each group.
    ladder : tuple of float
        0 = λ_0 < … < λ_K = 1; empty where it is chosen on the way.
    ess_target : float
        On the way: the next λ is the largest at which the conditional ESS is this share of the living particles.
    kernels : tuple of Kernel
        One move after the other, at each temperature.
    ess_threshold : float
        Resample a group when ESS < `ess_threshold`·N.
    resampling : str
        A key of `RESAMPLING`.
    chain_length : int
        P > 1 is waste-free: N/P ancestors are resampled at each temperature, and all P states of each one's chain
        of P − 1 moves are particles.
    """

    num_particles: int
    ladder: tuple[float, ...]
    ess_target: float
    kernels: tuple[Kernel, ...]
    ess_threshold: float = 0.0
    resampling: str = "systematic"
    chain_length: int = 1


class AnnealedSweepResult(NamedTuple):
    """What a sweep has found.

    Parameters
    ----------
    draws : Draws
        G·N rows, group by group, with log π0, features, log-factors, `log_weight` = log(Ẑ W̄_i N), and the column
        `parent`, the initial particle that each row descends from.
    log_z : Tensor (G,), float64
        log Ẑ, in nats.
    ladder : tuple of float
        λ_0..λ_K as used.
    slots : Tensor (G,) or None
        Where the retained rows are.
    info : dict
        `ess` (K, G) after each reweighting; `acceptance` (K−1, G), the share of proposals that each temperature's
        moves accepted, nan where nothing moved; `resampled` (K−1, G); `deaths` (G, number of factors), particles that
        each factor gave weight zero.
    """

    draws: Draws
    log_z: Tensor
    ladder: tuple[float, ...]
    slots: Tensor | None
    info: dict[str, Any]


def backward_path(
    target: Target, rows: Draws, ladder: Sequence[float], kernels: Sequence[Kernel], source: Source
) -> list[Draws]:
    """x_0, …, x_{K−1} of the reverse process that starts at x_{K−1} = `rows`: a move at each of λ_{K−1}, …, λ_1.

    Parameters
    ----------
    rows : Draws (G,)
        Exact draws of π*, with `log_prior` and factors evaluated.
    ladder : sequence of float
        λ_0..λ_K.
    kernels : sequence of Kernel
        The time reversal of the forward moves: kernels that are reversible one by one, in the opposite order.
    """
    path, state = [rows], None
    for level in reversed(ladder[1:-1]):
        state = kernels[0].start(target, rows, power=level) if state is None else state
        for kernel in kernels:
            state, _ = kernel.step(state, source, level)
        path.append(state.draws)
    return path[::-1]


class AnnealedSweep:
    """A sweep that is to be run once.

    Parameters
    ----------
    target : Target
    context : Tensor (G,), int64
        The context of each group.
    schedule : AnnealingSchedule
    source : Source
    path : list of Draws, optional
        `backward_path` of one retained row in each group, which makes the sweep conditional: `schedule.ladder` must
        be the path's.
    """

    def __init__(
        self,
        target: Target,
        context: Tensor,
        schedule: AnnealingSchedule,
        source: Source,
        *,
        path: Sequence[Draws] | None = None,
    ) -> None:
        self.target, self.schedule, self.source, self.path = target, schedule, source, path
        self.groups, self.count = len(context), schedule.num_particles
        rows = self.groups * self.count
        self.first = torch.arange(self.groups) * self.count
        self.slots: Tensor | None = None
        self.log_w = torch.zeros(self.groups, self.count, dtype=torch.float64)  # since the last resampling
        self.log_z = torch.zeros(self.groups, dtype=torch.float64)  # up to it
        self.parent = torch.arange(self.count).repeat(self.groups)
        self.state: ChainState | None = None  # of the rows `moving`
        self.moving = torch.arange(rows)
        self.history: dict[str, list[Tensor]] = {"ess": [], "acceptance": [], "resampled": []}
        self.deaths = torch.zeros(self.groups, len(target.factors), dtype=torch.int64)
        self.draws = self._started(context.repeat_interleave(self.count))

    def run(self) -> AnnealedSweepResult:
        """Reweight, resample and move, from λ = 0 to 1."""
        ladder = [0.0]
        while ladder[-1] < 1.0:
            level = self._next(ladder)
            self._reweight(level - ladder[-1])
            ladder.append(level)
            if level < 1.0:
                if self.schedule.chain_length > 1:
                    self._resample_into_chains(level)
                else:
                    self._resample()
                    self._move(level, len(ladder) - 1)
            if self.target.watcher is not None:
                self._report(ladder)
        log_weight = (self.log_z[:, None] + self.log_w).view(-1)
        log_z = self.log_z + torch.logsumexp(self.log_w, 1) - math.log(self.count)
        info: dict[str, Any] = {name: _stacked(values, self.groups) for name, values in self.history.items()}
        info["deaths"] = self.deaths
        draws = self.draws.with_columns(log_weight=log_weight, columns={"parent": self.parent})
        return AnnealedSweepResult(draws, log_z, tuple(ladder), self.slots, info)

    # The steps.

    def _started(self, context: Tensor) -> Draws:
        """Draws of π0, but for the retained row of each group, which is the first of its path."""
        if self.path is None:
            draws = draw_from(self.target.prior, context, self.source, cost=self.target.cost)
        else:
            self.slots = self.source.integers(torch.full((self.groups,), self.count))
            fresh = torch.ones(len(context), dtype=torch.bool)
            fresh[self.first + self.slots] = False
            retained = bare(self.target, self.path[0])
            parts = [retained]
            if bool(fresh.any()):
                drawn = draw_from(self.target.prior, context[fresh], self.source, cost=self.target.cost)
                parts.append(bare(self.target, drawn))
            index = torch.empty(len(context), dtype=torch.int64)
            index[~fresh] = torch.arange(self.groups)
            index[fresh] = self.groups + torch.arange(len(context) - self.groups)
            draws = concatenate(parts, pad_id=self.target.prior.pad_id).select(index)
        draws = bare(self.target, draws)
        check_bounds(draws, self.target.factors)
        context_group = torch.arange(len(context)) // self.count
        for k, factor in enumerate(self.target.factors):
            dead = draws.log_factors[factor.name] == -math.inf
            self.deaths[:, k] = torch.bincount(context_group[dead], minlength=self.groups)
        return draws

    def _next(self, ladder: list[float]) -> float:
        if self.schedule.ladder:
            return self.schedule.ladder[len(ladder)]
        if len(ladder) > MAX_TEMPERATURES:
            raise ModelError(
                f"annealing: λ is {ladder[-1]:.3g} after {MAX_TEMPERATURES} temperatures; lower ess_target "
                f"({self.schedule.ess_target}), or use more particles"
            )
        log_phi = log_evidence(self.draws).view(self.groups, self.count)
        return next_level(self.log_w, log_phi, ladder[-1], self.schedule.ess_target)

    def _reweight(self, step: float) -> None:
        """w ← w·φ^step; step > 0, so that a particle with φ = 0 has weight zero from the first step on."""
        self.log_w += step * log_evidence(self.draws).view(self.groups, self.count)
        self.history["ess"].append(effective_sizes(self.log_w))

    def _resample(self) -> None:
        ess = self.history["ess"][-1]
        chosen = (ess < self.schedule.ess_threshold * self.count * (1 - 1e-9)) & (ess > 0)
        self.history["resampled"].append(chosen)
        if not bool(chosen.any()):
            return
        ancestors = torch.arange(self.count).repeat(self.groups, 1)
        if self.slots is None:
            ancestors[chosen] = resample(self.schedule.resampling, self.log_w[chosen], self.source)
        else:
            ancestors[chosen], self.slots[chosen] = resample_conditionally(
                self.schedule.resampling, self.log_w[chosen], self.slots[chosen], self.source
            )
        self._collect(chosen)
        index = (ancestors + self.first[:, None]).view(-1)
        self.draws, self.parent = self.draws.select(index), self.parent[index]
        if self.state is not None:
            place = torch.full((len(index),), -1)
            place[self.moving] = torch.arange(len(self.moving))
            moving = torch.nonzero(place[index] >= 0).squeeze(1)
            self.state = self.schedule.kernels[0].select(self.state, place[index[moving]])
            self.moving = moving

    def _collect(self, chosen: Tensor) -> None:
        """Move the mean weight of the groups `chosen` into Ẑ."""
        self.log_z[chosen] += torch.logsumexp(self.log_w[chosen], 1) - math.log(self.count)
        self.log_w[chosen] = 0.0

    def _move(self, level: float, number: int) -> None:
        """One step of every kernel at λ = `level` for all living rows but the retained ones, which follow their path.

        Caches live from one temperature to the next where nothing is retained.
        """
        if self.state is None:
            moves = (self.log_w > -math.inf).view(-1)
            if self.slots is not None:
                moves[self.first + self.slots] = False
            self.moving = torch.nonzero(moves).squeeze(1)
        count = MoveCount(self.groups)
        if len(self.moving):
            if self.state is None:
                self.state = self.schedule.kernels[0].start(self.target, self.draws.select(self.moving), power=level)
            self.state = self._stepped(self.state, level, self.moving // self.count, count)
            self._write(self.moving, self.state.draws)
        if self.path is not None and self.slots is not None:
            self._write(self.first + self.slots, self.path[number])
            self.state = None
        self.history["acceptance"].append(count.rate)

    def _stepped(self, state: ChainState, level: float, group: Tensor, count: MoveCount) -> ChainState:
        for kernel in self.schedule.kernels:
            state, info = kernel.step(state, self.source, level)
            count.add(info, group)
        return state

    def _resample_into_chains(self, level: float) -> None:
        """Waste-free: N/P ancestors, of each of which all P states of a chain are the next particles."""
        length = self.schedule.chain_length
        ess = self.history["ess"][-1]
        chosen = ess > 0
        self.history["resampled"].append(chosen)
        count = MoveCount(self.groups)
        if bool(chosen.any()):
            few = self.count // length
            ancestors = resample_to(self.log_w[chosen], few, self.source)
            self._collect(chosen)
            groups = torch.nonzero(chosen).squeeze(1)
            rows = (ancestors + self.first[groups][:, None]).view(-1)
            state = self.schedule.kernels[0].start(self.target, self.draws.select(rows), power=level)
            found = [state.draws]
            for _ in range(length - 1):
                state = self._stepped(state, level, rows // self.count, count)
                found.append(state.draws)
            # Found is ordered by step, then group, then ancestor; particles are ordered by group.
            order = torch.arange(length * len(rows)).view(length, len(groups), few).transpose(0, 1).reshape(-1)
            new = (self.first[groups][:, None] + torch.arange(self.count)).view(-1)
            self.parent[new] = self.parent[rows].repeat(length)[order]
            self._write(new, concatenate(found, pad_id=self.target.prior.pad_id).select(order))
        self.history["acceptance"].append(count.rate)

    def _write(self, rows: Tensor, draws: Draws) -> None:
        self.draws = overwrite(self.draws, rows, bare(self.target, draws), self.target.prior)

    def _report(self, ladder: list[float]) -> None:
        log_z = self.log_z + torch.logsumexp(self.log_w, 1) - math.log(self.count)
        figures = {
            "λ": f"{ladder[-1]:.3f}",
            "ESS": f"{float(self.history['ess'][-1].min()):.1f}",
            "log Ẑ": f"{float(log_z[0]):.3f}",
        }
        if self.history["acceptance"]:
            figures["acceptance"] = f"{float(self.history['acceptance'][-1].nanmean()):.0%}"
        planned = len(self.schedule.ladder)
        self.target.report((len(ladder) - 1) / (planned - 1) if planned else ladder[-1], figures)


def _stacked(values: list[Tensor], groups: int) -> Tensor:
    return torch.stack(values) if values else torch.zeros(0, groups)
