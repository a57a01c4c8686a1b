"""What the engines share whose shards are sweeps of particles that kernels move: plans, pilots, and the gathering.

What a sweep needs to know beforehand (temperatures, the score at which it ends) must not depend on its own particles,
or nothing guarantees E Ẑ = Z. A pilot finds it: a first sweep, which is then thrown away.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lmppl.diagnostics.weights import effective_sample_size
from lmppl.errors import InfeasibleModel, ModelError
from lmppl.inference.engine import Engine, Part, Request, Shard
from lmppl.inference.mcmc import Kernel
from lmppl.inference.refusals import first_context
from lmppl.modeling.target import Target
from lmppl.sequences import Draws, concatenate

__all__ = ["GatheredSweeps", "PilotedSweeps", "SweepShard"]


@dataclass(frozen=True)
class SweepShard(Shard):
    """A sweep of N particles per context, or the pilot, which gives no draws."""

    pilot: bool = field(default=False, kw_only=True)


class GatheredSweeps(NamedTuple):
    """The sweeps that count.

    Parameters
    ----------
    parts : list of Part
        Without the pilot.
    draws : Draws
        Of all of them, ordered by context, each with its log-weight.
    log_z : Tensor (C, S)
        log Ẑ of each sweep, in nats.
    """

    parts: list[Part]
    draws: Draws
    log_z: Tensor

    def weights(self, log_weight: Tensor) -> list[Tensor]:
        """`log_weight` of the draws, context by context."""
        return [log_weight[self.draws.context == c] for c in range(len(self.log_z))]

    def info(self, log_weight: Tensor) -> dict[str, Any]:
        """What every such engine says: `log_z_sweeps` (C, S); `ess`, `zero_sweeps`, `distinct_ancestors` (C,).

        `distinct_ancestors` are initial particles, of all sweeps, from which draws with positive weight descend.
        """
        found = torch.stack([self.draws.context, self.draws.columns["shard"], self.draws.columns["parent"]], -1)
        origins = torch.unique(found[log_weight > -math.inf], dim=0)
        return {
            "log_z_sweeps": self.log_z,
            "ess": torch.stack([effective_sample_size(w) for w in self.weights(log_weight)]),
            "zero_sweeps": (self.log_z == -math.inf).sum(-1),
            "distinct_ancestors": torch.bincount(origins[:, 0], minlength=len(self.log_z)),
        }


class PilotedSweeps(Engine):
    """Base of the engines that run independent sweeps of N moved particles per context, after a pilot or without."""

    num_particles: int
    num_sweeps: int
    num_moves: int
    kernel: Kernel | tuple[Kernel, ...]

    min_particles: ClassVar[int] = 1
    steps_name: ClassVar[str]
    """What the steps of a sweep are called."""

    @abstractmethod
    def first_shard(self, shard: Shard) -> SweepShard:
        """`shard` as the first of a run: the pilot, where the engine needs one."""

    @abstractmethod
    def informed(self, shard: SweepShard, pilot: Part) -> SweepShard:
        """`shard` with what the pilot has found."""

    @abstractmethod
    def num_steps(self, part: Part) -> int:
        """How many steps a sweep had."""

    @abstractmethod
    def all_dead(self, prompt: str, c: int, parts: Sequence[Part]) -> str:
        """What is said where every sweep of context `c` has Ẑ = 0; `prompt` quotes it, and counts others like it."""

    @property
    def moves(self) -> tuple[Kernel, ...]:
        """The kernels of one step, in their order."""
        kernels = self.kernel if isinstance(self.kernel, tuple) else (self.kernel,)
        return kernels * self.num_moves

    @property
    def default_draws(self) -> int:
        """N draws of each of the sweeps."""
        return self.num_particles * self.num_sweeps

    def check(self, target: Target) -> None:
        """Raise `ModelError` where a field is wrong, or a kernel does not fit the target."""
        who = type(self).__name__
        for name in ("num_particles", "num_sweeps", "num_moves"):
            least = self.min_particles if name == "num_particles" else 1
            if getattr(self, name) < least:
                raise ModelError(f"{who}: got {name}={getattr(self, name)}, expected at least {least}")
        if not self.moves or not all(isinstance(k, Kernel) for k in self.moves):
            raise ModelError(f"{who}: got kernel={self.kernel!r}, expected a kernel, or a tuple of them")
        for kernel in self.moves:
            kernel.check(target)

    def plan(self, target: Target, request: Request) -> list[Shard]:
        """One shard a sweep; before them the pilot, where there is one."""
        self.check(target)
        contexts = tuple(range(target.form.num_contexts))
        rows = self.num_particles * len(contexts)
        first = self.first_shard(Shard(0, self.num_particles, request.seed, contexts, rows))
        return [first] if first.pilot else self._sweeps(first, request)

    def replan(self, target: Target, request: Request, parts: Sequence[Part]) -> list[Shard]:
        """After the pilot the sweeps with what it found; then one more while a budget lasts."""
        last = parts[-1].shard
        assert isinstance(last, SweepShard)
        following = replace(last, id=last.id + 1)
        if last.pilot:
            return self._sweeps(self.informed(replace(following, pilot=False), parts[-1]), request)
        return [following] if request.num_draws is None and request.budget is not None else []

    def _sweeps(self, first: SweepShard, request: Request) -> list[Shard]:
        wanted = self.wanted(request)
        count = 1 if wanted is None else -(-wanted // self.num_particles)
        return [replace(first, id=first.id + i) for i in range(count)]

    def gather(self, parts: Sequence[Part]) -> GatheredSweeps:
        """The sweeps that count.

        Raises
        ------
        InfeasibleModel
            Where there is none yet, or all of them have Ẑ = 0 for a context.
        """
        sweeps = _that_count(parts)
        if not sweeps:
            raise InfeasibleModel(
                f"{self.name}: the run ended after its pilot, before any draw; give it a larger budget"
            )
        draws = concatenate([p.draws for p in sweeps])
        log_z = torch.stack([p.info["log_z"] for p in sweeps], -1)
        found = first_context((log_z == -math.inf).all(-1))
        if found is not None:
            c, also = found
            raise InfeasibleModel(f"{self.name}: {self.all_dead(f'{draws.prompts[c]!r}{also}', c, sweeps)}")
        return GatheredSweeps(sweeps, draws.select(torch.argsort(draws.context, stable=True)), log_z)

    def live(self, parts: Sequence[Part]) -> dict[str, str]:
        """Sweeps, log Ẑ of the first context, and the share of moves accepted."""
        sweeps = _that_count(parts)
        steps = {self.steps_name: f"{self.num_steps(parts[-1])}"}
        if not sweeps:
            return {"pilot": "1", **steps}
        log_z = torch.stack([p.info["log_z"] for p in sweeps], -1)[0]
        value = float(torch.logsumexp(log_z, 0)) - math.log(len(log_z))
        figures = {"sweeps": f"{len(sweeps)}", "log Ẑ": f"{value:.3f}", **steps}
        acceptance = sweeps[-1].info["acceptance"]
        if acceptance.numel() and not bool(acceptance.isnan().all()):
            figures["acceptance"] = f"{float(acceptance.nanmean()):.0%}"
        return figures


def _that_count(parts: Sequence[Part]) -> list[Part]:
    return [p for p in parts if isinstance(p.shard, SweepShard) and not p.shard.pilot]
