"""What the engines share that anneal along π0·φ^λ, λ from 0 to 1: shards that are sweeps, pilots, and the merge."""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lmppl.diagnostics.intervals import binomial_upper
from lmppl.diagnostics.weights import KHAT_LIMIT, effective_sample_size, pareto_khat
from lmppl.errors import InfeasibleModel, ModelError
from lmppl.inference.annealed_sweep import AnnealedSweep, AnnealingSchedule
from lmppl.inference.approximation import LEVEL, Particles
from lmppl.inference.engine import Engine, Part, Request, Shard
from lmppl.inference.mcmc import Kernel
from lmppl.inference.refusals import first_context, z_below
from lmppl.lm.randomness import Source
from lmppl.modeling.target import Target
from lmppl.sequences import Draws, Estimate, concatenate

__all__ = ["Annealed", "AnnealingShard", "check_ladder"]


@dataclass(frozen=True)
class AnnealingShard(Shard):
    """A sweep of N particles per context; without a `ladder` it is a pilot, which finds one and gives no draws."""

    ladder: tuple[float, ...] = ()
    pilot: bool = False


class Annealed(Engine):
    """Base of the engines that anneal: a shard is a sweep on a ladder that is given, or that a pilot finds."""

    num_particles: int
    num_sweeps: int
    num_moves: int
    kernel: Kernel | tuple[Kernel, ...]

    @abstractmethod
    def schedule(self, ladder: tuple[float, ...]) -> AnnealingSchedule:
        """How a sweep of this engine goes, on a given ladder."""

    @abstractmethod
    def fixed_ladder(self) -> tuple[float, ...] | None:
        """λ_0..λ_K, () where each sweep finds its own, None where a pilot finds it."""

    @abstractmethod
    def estimate(self, weights: Sequence[Tensor], log_z: Tensor) -> Estimate:
        """log Ẑ (C,) from the log-weights of each context's draws, or from log Ẑ (C, S) of the sweeps."""

    @property
    def moves(self) -> tuple[Kernel, ...]:
        """The kernels of one temperature, in their order."""
        kernels = self.kernel if isinstance(self.kernel, tuple) else (self.kernel,)
        return kernels * self.num_moves

    @property
    def default_draws(self) -> int:
        """N draws of each of the sweeps."""
        return self.num_particles * self.num_sweeps

    def check(self, target: Target) -> None:
        """Raise `ModelError` where a field is wrong, or a kernel does not fit the target."""
        for name in ("num_particles", "num_sweeps", "num_moves"):
            if getattr(self, name) < 1:
                raise ModelError(f"{type(self).__name__}: got {name}={getattr(self, name)}, expected at least 1")
        if not self.moves or not all(isinstance(k, Kernel) for k in self.moves):
            raise ModelError(
                f"{type(self).__name__}: got kernel={self.kernel!r}, expected a kernel, or a tuple of them"
            )
        for kernel in self.moves:
            kernel.check(target)

    def plan(self, target: Target, request: Request) -> list[Shard]:
        """One shard a sweep; before them the pilot, where there is one."""
        self.check(target)
        ladder = self.fixed_ladder()
        contexts = tuple(range(target.form.num_contexts))
        first = AnnealingShard(
            0,
            self.num_particles,
            request.seed,
            contexts,
            self.num_particles * len(contexts),
            ladder or (),
            ladder is None,
        )
        if first.pilot:
            return [first]
        return [replace(first, id=i) for i in range(self._sweeps(request))]

    def replan(self, target: Target, request: Request, parts: Sequence[Part]) -> list[Shard]:
        """After the pilot the sweeps on its ladder; then one more while a budget lasts."""
        last = parts[-1].shard
        assert isinstance(last, AnnealingShard)
        if last.pilot:
            base = replace(last, ladder=tuple(parts[-1].info["ladder"].tolist()), pilot=False)
            return [replace(base, id=last.id + 1 + i) for i in range(self._sweeps(request))]
        if request.num_draws is not None or request.budget is None:
            return []
        return [replace(last, id=last.id + 1)]

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
        sweeps = _sweeps_of(parts)
        if not sweeps:
            raise InfeasibleModel(
                f"{self.name}: the run ended after its pilot, before any draw; give it a larger budget"
            )
        draws = concatenate([p.draws for p in sweeps])
        log_z = torch.stack([p.info["log_z"] for p in sweeps], -1)
        self._refuse_all_dead(draws.prompts, log_z, sweeps)
        draws = draws.select(torch.argsort(draws.context, stable=True))
        assert draws.log_weight is not None
        weights = [draws.log_weight[draws.context == c] for c in range(len(log_z))]
        shapes = [pareto_khat(w) for w in weights]
        ladders = tuple(p.info["ladder"] for p in sweeps)
        info: dict[str, Any] = {
            "log_z_sweeps": log_z,
            "ess": torch.stack([effective_sample_size(w) for w in weights]),
            "khat": torch.tensor([s.value for s in shapes], dtype=torch.float64),
            "khat_note": tuple(s.note for s in shapes),
            "ladder": ladders[0],
            "acceptance": _mean_history([p.info["acceptance"] for p in sweeps]),
            "ess_history": _mean_history([p.info["ess"] for p in sweeps]),
            "zero_sweeps": (log_z == -math.inf).sum(-1),
            "distinct_ancestors": _distinct(draws, len(log_z)),
        }
        if any(len(ladder) != len(ladders[0]) or not bool((ladder == ladders[0]).all()) for ladder in ladders):
            info["ladders"] = ladders
        estimate = self.estimate(weights, log_z)
        heavy = [f"k̂ = {s.value:.2f} in context {c}" for c, s in enumerate(shapes) if s.value > KHAT_LIMIT]
        if heavy:
            note = f"{estimate.note}; the weights are heavy-tailed: {', '.join(heavy)}, above {KHAT_LIMIT}"
            estimate = replace(estimate, note=note)
        return Particles(draws, (estimate,), self.guarantee, info)

    def live(self, parts: Sequence[Part]) -> dict[str, str]:
        """Sweeps, log Ẑ of the first context, and the share of moves accepted."""
        sweeps = _sweeps_of(parts)
        steps = {"temperatures": f"{len(parts[-1].info['ladder']) - 1}"}
        if not sweeps:
            return {"pilot": "1", **steps}
        log_z = torch.stack([p.info["log_z"] for p in sweeps], -1)[0]
        value = float(torch.logsumexp(log_z, 0)) - math.log(len(log_z))
        figures = {"sweeps": f"{len(sweeps)}", "log Ẑ": f"{value:.3f}", **steps}
        acceptance = sweeps[-1].info["acceptance"]
        if acceptance.numel() and not bool(acceptance.isnan().all()):
            figures["acceptance"] = f"{float(acceptance.nanmean()):.0%}"
        return figures

    def _sweeps(self, request: Request) -> int:
        wanted = self.wanted(request)
        return 1 if wanted is None else -(-wanted // self.num_particles)

    def _refuse_all_dead(self, prompts: Sequence[str], log_z: Tensor, parts: Sequence[Part]) -> None:
        """Raise where every sweep of a context has Ẑ = 0."""
        found = first_context((log_z == -math.inf).all(-1))
        if found is None:
            return
        c, also = found
        deaths = torch.stack([p.info["deaths"][c] for p in parts]).sum(0)
        names = parts[0].info["factors"]
        worst = names[int(deaths.argmax())]
        shares = ", ".join(f"{n!r} {int(k)}" for n, k in zip(names, deaths.tolist(), strict=True) if k > 0)
        trials = self.num_particles * len(parts)
        rate = float(binomial_upper(torch.tensor(0), torch.tensor(trials), LEVEL))
        log_upper = float(parts[0].info["log_upper"])
        bound = z_below(rate, log_upper) if math.isfinite(log_upper) else f"Pr_π0(γ > 0) < {rate:.1e}"
        first = float(parts[0].info["ladder"][1])
        raise InfeasibleModel(
            f"{self.name}: all {trials:,} particles for context {prompts[c]!r}{also} died at the first "
            f"temperature, λ = {first:.3g}: factor {worst!r} gave most of them weight zero ({shares}); {bound} with "
            f"{LEVEL:.0%} confidence; a hard factor is in force as soon as λ > 0, so use more particles, an engine "
            "that steers (SMC), or Splitting with a graded score of it"
        )


def check_ladder(who: str, ladder: tuple[float, ...]) -> None:
    """Raise `ModelError` where a ladder that is given does not rise from 0 to 1."""
    numbers = all(isinstance(step, int | float) for step in ladder)
    rising = numbers and all(a < b for a, b in itertools.pairwise(ladder))
    if not rising or len(ladder) < 2 or ladder[0] != 0.0 or ladder[-1] != 1.0:
        raise ModelError(f"{who}: got ladder={ladder}, expected rising numbers from 0.0 to 1.0")


def _sweeps_of(parts: Sequence[Part]) -> list[Part]:
    return [p for p in parts if isinstance(p.shard, AnnealingShard) and not p.shard.pilot]


def _mean_history(histories: Sequence[Tensor]) -> Tensor:
    """(R, C) means of S histories (R_s, C), each over the sweeps that went as far; nan where none has a figure."""
    longest = max(len(h) for h in histories)
    whole = torch.full((len(histories), longest, histories[0].shape[1]), math.nan, dtype=torch.float64)
    for s, history in enumerate(histories):
        whole[s, : len(history)] = history
    return whole.nanmean(0)


def _distinct(draws: Draws, num_contexts: int) -> Tensor:
    """(C,) initial particles of all sweeps from which draws with positive weight descend."""
    assert draws.log_weight is not None
    found = torch.stack([draws.context, draws.columns["shard"], draws.columns["parent"]], -1)
    found = torch.unique(found[draws.log_weight > -math.inf], dim=0)
    return torch.bincount(found[:, 0], minlength=num_contexts)
