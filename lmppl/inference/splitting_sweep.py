"""One sweep of adaptive multilevel splitting: kill the lowest scores, branch the others, level by level."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmppl.errors import ModelError
from lmppl.inference.mcmc import Kernel
from lmppl.inference.moved_rows import MoveCount, bare, overwrite
from lmppl.inference.proposals import check_bounds, draw_from
from lmppl.inference.resampling import effective_sizes
from lmppl.lm.randomness import Source
from lmppl.modeling.factors import Feature
from lmppl.modeling.target import Target, log_evidence
from lmppl.modeling.user_functions import evaluate
from lmppl.sequences import Draws, concatenate

__all__ = ["SplittingSchedule", "SplittingSweep", "killed", "log_share_left", "rounds_of"]

MAX_LEVELS = 2000


class SplittingSchedule(NamedTuple):
    """How a sweep climbs.

    Parameters
    ----------
    num_particles : int
        N of each context.
    kill_share : float
        k/N, at least, in each round.
    score : str, callable, Feature or None
        S; None is the log evidence.
    kernels : tuple of Kernel
        The moves of a copy, one after the other.
    """

    num_particles: int
    kill_share: float
    score: str | Callable[..., Any] | Feature | None
    kernels: tuple[Kernel, ...]


def killed(scores: Tensor, share: float) -> Tensor:
    """(N,) bool: the particles at or below the level, which is the k-th lowest score, k = ⌈share·N⌉.

    **All** particles at the level are killed, the ties too: then K/N, K ≥ k, is the mass at or below the level, and
    1 − K/N is an unbiased factor of Ẑ. Killing k of several tied particles would not be (`brehier2016`).
    """
    k = max(1, math.ceil(share * len(scores) - 1e-9))
    return scores <= torch.kthvalue(scores, k).values


def log_share_left(masks: Tensor) -> Tensor:
    """(G,) log(1 − K/N), with K = number of particles killed in each group, by `masks` (G, N); −inf where all are."""
    return torch.log1p(-masks.double().mean(1))


class Score:
    """S (B,) of evaluated draws; a function of the user's runs once on each distinct text."""

    def __init__(self, score: str | Callable[..., Any] | Feature | None, target: Target) -> None:
        self.target, self.score = target, score
        self.feature: Feature | None = None
        if self.score is not None and not isinstance(self.score, str):
            given = self.score
            named = getattr(given, "__name__", "score")
            self.feature = given if isinstance(given, Feature) else Feature(named, given)
        self.known: dict[Hashable, float] = {}

    def __call__(self, draws: Draws) -> Tensor:
        if self.score is None:
            values = log_evidence(draws)
        elif isinstance(self.score, str):
            values = {**draws.features, **draws.log_factors}[self.score]
        else:
            values = self._of_function(draws)
        if values.dim() != 1:
            raise ModelError(f"Splitting: the score has {values.shape[1]} values a text, expected one number")
        values = values.double().cpu()
        bad = torch.nonzero(values.isnan() | (values == math.inf))
        if len(bad):
            row = int(bad[0, 0])
            raise ModelError(f"Splitting: the score is {float(values[row])} for the text {draws.text[row]!r}")
        return values

    def _of_function(self, draws: Draws) -> Tensor:
        assert self.feature is not None
        keys = draws.keys()
        fresh = {key: row for row, key in reversed(list(enumerate(keys))) if key not in self.known}
        if fresh:
            rows = list(fresh.values())
            values = evaluate(self.feature, draws.select(rows), who="splitting, score")
            if values.dim() != 1:
                return values
            self.known.update(zip(fresh, values.tolist(), strict=True))
        self.target.cost.factor_calls += len(fresh)
        self.target.cost.cache_hits += len(keys) - len(fresh)
        return torch.tensor([self.known[key] for key in keys], dtype=torch.float64)


class SplittingSweep:
    """One sweep of every context; a group is a context.

    Parameters
    ----------
    target : Target
    schedule : SplittingSchedule
    contexts : tuple of int
    tops : tuple of float
        For each context the score at which it ends; empty in a pilot, which finds them.
    source : Source
    """

    def __init__(
        self,
        target: Target,
        schedule: SplittingSchedule,
        contexts: tuple[int, ...],
        tops: tuple[float, ...],
        source: Source,
    ) -> None:
        self.target, self.schedule, self.source = target, schedule, source
        self.contexts, self.count = torch.tensor(contexts), schedule.num_particles
        self.groups = len(contexts)
        self.pilot = not tops
        self.tops = [math.inf] * self.groups if self.pilot else list(tops)
        self.score = Score(schedule.score, target)
        drawn = draw_from(target.prior, self.contexts.repeat_interleave(self.count), source, cost=target.cost)
        self.draws = bare(target, drawn)
        check_bounds(self.draws, target.factors)
        self.scores = self.score(self.draws).view(self.groups, self.count)
        self.flat = self.scores.amin(1) == self.scores.amax(1)  # (G,) the prior's draws all have one score
        self.first_score = self.scores[:, 0]
        self.parent = torch.arange(self.count).repeat(self.groups)
        self.log_p = torch.zeros(self.groups, dtype=torch.float64)  # log weight of a particle that is left
        self.retired: list[Draws] = []
        self.left = torch.ones(self.groups, dtype=torch.bool)  # groups with particles left
        self.history: dict[str, list[Tensor]] = {"levels": [], "killed": [], "acceptance": []}

    def run(self) -> None:
        """Round after round, until every context has ended."""
        active = torch.ones(self.groups, dtype=torch.bool)
        number = 0
        while True:
            masks = torch.stack([killed(s, self.schedule.kill_share) for s in self.scores])
            levels = torch.where(masks, self.scores, -math.inf).amax(1)
            active &= self.left
            if self.pilot:
                self._end_pilot(active, levels)
            active &= levels < torch.tensor(self.tops, dtype=torch.float64)
            if not bool(active.any()):
                return
            if number == MAX_LEVELS:
                raise ModelError(
                    f"splitting: no end after {MAX_LEVELS} rounds, at score {float(levels[active][0]):.4g}; give top=, "
                    "or raise kill_share"
                )
            self._round(active, masks & active[:, None], levels, number)
            number += 1

    def _end_pilot(self, active: Tensor, levels: Tensor) -> None:
        """A context's pilot ends where the weights φ of its particles are even: its level is the top of the others."""
        log_phi = log_evidence(self.draws).view(self.groups, self.count)
        even = (effective_sizes(log_phi) >= 0.5 * self.count) | (self.scores.amin(1) == self.scores.amax(1))
        for g in torch.nonzero(active & even).squeeze(1).tolist():
            self.tops[g] = float(levels[g])

    def _round(self, active: Tensor, masks: Tensor, levels: Tensor, number: int) -> None:
        self._retire(masks, number)
        deaths = masks.sum(1)
        self.log_p += torch.where(active, log_share_left(masks), 0.0)
        self.left &= deaths < self.count
        replaced = masks & self.left[:, None]
        rows = torch.nonzero(replaced.view(-1)).squeeze(1)
        count = MoveCount(self.groups)
        if len(rows):
            group = rows // self.count
            survivors = [torch.nonzero(~mask).squeeze(1) for mask in masks]
            chosen = self.source.integers(torch.tensor([len(survivors[g]) for g in group.tolist()]))
            parents = torch.stack(
                [survivors[g][i] + g * self.count for g, i in zip(group.tolist(), chosen.tolist(), strict=True)]
            )
            moved = self._moved(parents, levels, group, count)
            self.parent[rows] = self.parent[parents]
            self.draws = overwrite(self.draws, rows, moved, self.target.prior)
            self.scores.view(-1)[rows] = self.score(moved)
        self.history["levels"].append(torch.where(active, levels, math.nan))
        self.history["killed"].append(torch.where(active, deaths.double(), math.nan))
        self.history["acceptance"].append(count.rate)
        if self.target.watcher is not None:
            self._report(levels, active)

    def _moved(self, parents: Tensor, levels: Tensor, group: Tensor, count: MoveCount) -> Draws:
        """Copies of `parents`, moved by kernels that leave π0(·|S > level) invariant."""
        of_context = torch.full((self.target.form.num_contexts,), math.inf, dtype=torch.float64)
        of_context[self.contexts] = levels

        def above(draws: Draws) -> Tensor:
            inside = self.score(draws) > of_context[draws.context]
            return torch.where(inside, 0.0, -math.inf).double()

        kernels = self.schedule.kernels
        state = kernels[0].start(self.target, self.draws.select(parents), evidence=above)
        for kernel in kernels:
            state, info = kernel.step(state, self.source, evidence=above)
            count.add(info, group)
        return bare(self.target, state.draws)

    def _retire(self, masks: Tensor, number: int) -> None:
        """Keep the killed with φ > 0, at the weight that they have; the others have weight zero."""
        rows = torch.nonzero(masks.view(-1)).squeeze(1)
        rows = rows[log_evidence(self.draws.select(rows)) > -math.inf]
        if len(rows):
            self.retired.append(self._labelled(rows, number))

    def _labelled(self, rows: Tensor, number: int) -> Draws:
        """Particles `rows` with log w = log p + log φ and their columns."""
        draws = self.draws.select(rows)
        columns = {
            "parent": self.parent[rows],
            "score": self.scores.view(-1)[rows],
            "round": torch.full_like(rows, number),
        }
        log_weight = self.log_p[rows // self.count] + log_evidence(draws)
        return draws.with_columns(log_weight=log_weight, columns=columns)

    def weighted(self) -> Draws:
        """All retired particles and those that are left: Σ w = N·Ẑ in each context."""
        rows = torch.nonzero(self.left.repeat_interleave(self.count)).squeeze(1)
        parts = [*self.retired, self._labelled(rows, -1)]
        return concatenate(parts, pad_id=self.target.prior.pad_id)

    def log_z(self, draws: Draws) -> Tensor:
        """(G,) log Ẑ, in nats, from the `weighted` draws."""
        assert draws.log_weight is not None
        sums = [torch.logsumexp(draws.log_weight[draws.context == c], 0) for c in self.contexts.tolist()]
        return torch.stack(sums) - math.log(self.count)

    def highest(self) -> Tensor:
        """(G,) the highest score among the last particles."""
        return self.scores.amax(1)

    def dead(self) -> Tensor:
        """(G, number of factors) how many of the last particles each factor gives weight zero."""
        columns = [(self.draws.log_factors[f.name] == -math.inf).view(self.groups, -1) for f in self.target.factors]
        return torch.stack([c.sum(1) for c in columns], -1) if columns else torch.zeros(self.groups, 0)

    def _report(self, levels: Tensor, active: Tensor) -> None:
        g = int(torch.nonzero(active)[0, 0])
        figures = {"level": f"{float(levels[g]):.4g}", "log p": f"{float(self.log_p[g]):.2f}"}
        top = self.tops[g]
        start = float(self.history["levels"][0][g])
        known = math.isfinite(top) and math.isfinite(start) and top > start
        share = (float(levels[g]) - start) / (top - start) if known else 0.0
        self.target.report(min(1.0, max(0.0, share)), figures)


def rounds_of(rows: list[Tensor], groups: int) -> Tensor:
    """(R, G) one figure a round, from the history of a sweep."""
    return torch.stack(rows) if rows else torch.zeros(0, groups, dtype=torch.float64)
