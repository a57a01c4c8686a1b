"""What the engines share that anneal along π0·φ^λ, λ from 0 to 1: sweeps on a ladder, and what they say together."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmppl.diagnostics.intervals import binomial_upper
from lmppl.diagnostics.weights import KHAT_LIMIT, pareto_khat
from lmppl.inference.annealed_sweep import AnnealedSweep, AnnealingSchedule
from lmppl.inference.approximation import LEVEL, Particles
from lmppl.inference.engine import Part, Shard
from lmppl.inference.piloted_sweeps import PilotedSweeps, SweepShard
from lmppl.inference.refusals import z_below
from lmppl.lm.randomness import Source
from lmppl.modeling.target import Target
from lmppl.sequences import Estimate

__all__ = ["Annealed", "AnnealingShard"]


@dataclass(frozen=True)
class AnnealingShard(SweepShard):
    """A sweep on a `ladder` λ_0..λ_K; without one the pilot, which finds it, or a sweep that finds its own."""

    ladder: tuple[float, ...] = ()


class Annealed(PilotedSweeps):
    """Base of the engines that anneal: a shard is a sweep on a ladder that is given, or that a pilot finds."""

    steps_name: ClassVar[str] = "temperatures"

    @abstractmethod
    def schedule(self, ladder: tuple[float, ...]) -> AnnealingSchedule:
        """How a sweep of this engine goes, on a given ladder."""

    @abstractmethod
    def fixed_ladder(self) -> tuple[float, ...] | None:
        """λ_0..λ_K, () where each sweep finds its own, None where a pilot finds it."""

    @abstractmethod
    def estimate(self, weights: Sequence[Tensor], log_z: Tensor) -> Estimate:
        """log Ẑ (C,) from the log-weights of each context's draws, or from log Ẑ (C, S) of the sweeps."""

    def first_shard(self, shard: Shard) -> SweepShard:
        """As `PilotedSweeps.first_shard`: a pilot where there is no ladder."""
        ladder = self.fixed_ladder()
        return AnnealingShard(**vars(shard), ladder=ladder or (), pilot=ladder is None)

    def informed(self, shard: SweepShard, pilot: Part) -> SweepShard:
        """As `PilotedSweeps.informed`: with the pilot's ladder."""
        assert isinstance(shard, AnnealingShard)
        return replace(shard, ladder=tuple(pilot.info["ladder"].tolist()))

    def num_steps(self, part: Part) -> int:
        """As `PilotedSweeps.num_steps`: K."""
        return len(part.info["ladder"]) - 1

    def simulate(self, target: Target, shard: Shard, source: Source, *, state: Any = None) -> Part:
        """One sweep of every context."""
        assert isinstance(shard, AnnealingShard)
        schedule = self.schedule(shard.ladder)
        result = AnnealedSweep(target, torch.tensor(shard.contexts), schedule, source).run()
        draws = result.draws.select([]) if shard.pilot else result.draws
        number = torch.full_like(draws.context, shard.id)
        columns = {"shard": number, "sweep": number, **draws.columns}
        info = {
            **result.info,
            "log_z": result.log_z,
            "ladder": torch.tensor(result.ladder, dtype=torch.float64),
            "factors": [f.name for f in target.factors],
            "log_upper": target.form.log_upper,
        }
        return Part(shard, draws.with_columns(columns=columns), info=info)

    def merge(self, parts: Sequence[Part]) -> Particles:
        """Weights stay on one scale: the mean of w over the draws of a context is the mean of Ẑ over the sweeps."""
        gathered = self.gather(parts)
        log_weight = gathered.draws.log_weight
        assert log_weight is not None
        weights = gathered.weights(log_weight)
        shapes = [pareto_khat(w) for w in weights]
        ladders = tuple(p.info["ladder"] for p in gathered.parts)
        info: dict[str, Any] = {
            **gathered.info(log_weight),
            "khat": torch.tensor([s.value for s in shapes], dtype=torch.float64),
            "khat_note": tuple(s.note for s in shapes),
            "ladder": ladders[0],
            "acceptance": _mean_history([p.info["acceptance"] for p in gathered.parts]),
            "ess_history": _mean_history([p.info["ess"] for p in gathered.parts]),
        }
        if any(len(ladder) != len(ladders[0]) or not bool((ladder == ladders[0]).all()) for ladder in ladders):
            info["ladders"] = ladders
        estimate = self.estimate(weights, gathered.log_z)
        heavy = [f"k̂ = {s.value:.2f} in context {c}" for c, s in enumerate(shapes) if s.value > KHAT_LIMIT]
        if heavy:
            note = f"{estimate.note}; the weights are heavy-tailed: {', '.join(heavy)}, above {KHAT_LIMIT}"
            estimate = replace(estimate, note=note)
        return Particles(gathered.draws, (estimate,), self.guarantee, info)

    def all_dead(self, prompt: str, c: int, parts: Sequence[Part]) -> str:
        """As `PilotedSweeps.all_dead`: which factor did it, and what follows about Z."""
        deaths = torch.stack([p.info["deaths"][c] for p in parts]).sum(0)
        names = parts[0].info["factors"]
        worst = names[int(deaths.argmax())]
        shares = ", ".join(f"{n!r} {int(k)}" for n, k in zip(names, deaths.tolist(), strict=True) if k > 0)
        trials = self.num_particles * len(parts)
        rate = float(binomial_upper(torch.tensor(0), torch.tensor(trials), LEVEL))
        log_upper = float(parts[0].info["log_upper"])
        bound = z_below(rate, log_upper) if math.isfinite(log_upper) else f"Pr_π0(γ > 0) < {rate:.1e}"
        first = float(parts[0].info["ladder"][1])
        return (
            f"all {trials:,} particles for context {prompt} died at the first temperature, λ = {first:.3g}: factor "
            f"{worst!r} gave most of them weight zero ({shares}); {bound} with {LEVEL:.0%} confidence; a hard factor "
            "is in force as soon as λ > 0, so use more particles, an engine that steers (SMC), or Splitting with a "
            "graded score of it"
        )


def _mean_history(histories: Sequence[Tensor]) -> Tensor:
    """(R, C) means of S histories (R_s, C), each over the sweeps that went as far; nan where none has a figure."""
    longest = max(len(h) for h in histories)
    whole = torch.full((len(histories), longest, histories[0].shape[1]), math.nan, dtype=torch.float64)
    for s, history in enumerate(histories):
        whole[s, : len(history)] = history
    return whole.nanmean(0)
