"""Adaptive multilevel splitting: rare evidence, reached by killing the lowest scores level by level."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from lmppl.diagnostics.normalizers import log_mean_sweeps, stack
from lmppl.errors import ModelError
from lmppl.inference.approximation import LEVEL, Particles
from lmppl.inference.engine import Guarantee, Part, Shard
from lmppl.inference.mcmc import Kernel, SuffixResample
from lmppl.inference.piloted_sweeps import PilotedSweeps, SweepShard
from lmppl.inference.refusals import first_context, z_below_of_sweeps
from lmppl.inference.splitting_sweep import SplittingSchedule, SplittingSweep, rounds_of
from lmppl.lm.randomness import Source
from lmppl.modeling.factors import Feature
from lmppl.modeling.target import Target, TargetForm

__all__ = ["Splitting", "SplittingShard"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SplittingShard(SweepShard):
    """A sweep of N particles per context up to `tops`; without them it is the pilot, which finds them.

    Parameters
    ----------
    tops : tuple of float
        For each context the score at which a sweep ends: nothing at or above it is killed.
    """

    tops: tuple[float, ...] = ()


@dataclass(frozen=True)
class Splitting(PilotedSweeps):
    """Adaptive multilevel splitting: kill the particles with the lowest scores, branch the others, and go on higher.

    N draws of π0. Each round, in each context: the level z is the k-th lowest score S, k = ⌈kill_share·N⌉; all K
    particles with S ≤ z, ties included, are killed and *retire* with the weight p = ∏ (1 − K_r/N) of the rounds r
    before; each is replaced by a copy of a survivor, drawn uniformly and moved by a kernel that leaves π0(·|S > z)
    invariant. With φ evaluated on every particle,

        Ẑ = (1/N) [ Σ_retired p_r φ(x) + p Σ_left φ(x) ],   E Ẑ = Z,   E[(1/N) Σ p_x φ(x) f(x)] = Z E_π*[f],

    for **any** score and any such kernel, because a sweep is sequential Monte Carlo on all levels that there are, of
    which those with fewer than k deaths pass without a resampling. Where the score is graded towards the evidence, Z
    of e^{−20} takes some dozens of rounds in place of e^{20} draws.

    A sweep ends when its next level would be at `top` or above, or when all particles have one score. `top` must not
    depend on the sweep's own particles, or nothing guarantees E Ẑ = Z: one pilot sweep, which is then thrown away, ends
    when the weights φ of its particles are even (ESS ≥ N/2), and leaves its level for the sweeps that count.

    Parameters
    ----------
    num_particles : int
        N per context and sweep.
    kill_share : float
        In (0, 1): k/N. Small: fine levels, many rounds. More are killed where scores tie.
    score : str, callable or Feature, optional
        S, higher is nearer: the name of a feature (one number a text) or of a factor (its log φ), or a function of
        texts with the same contract as a feature, −inf allowed. None: Σ_k log φ_k, the log evidence.
    top : float, optional
        Where a sweep ends, for all contexts: 3.0 for a constraint that asks for a score above 3. By default a pilot
        finds it.
    kernel : Kernel or tuple of Kernel
        Of `lmppl.inference.mcmc`, restricted to S > z; a tuple is one kernel after the other. The default makes near
        moves: far ones are rarely accepted at a high level.
    num_moves : int
        How often each copy is moved.
    num_sweeps : int
        Independent sweeps where `infer` is not told a number of draws; their spread is the error. Of n draws it makes
        ⌈n/N⌉ sweeps.

    Raises
    ------
    UnsupportedModel
        Where there is nothing to split on: all factors are plain predicates and no score is given.
    InfeasibleModel
        Where no sweep of a context has reached γ > 0: how high the scores went, and which factor was still zero.

    Notes
    -----
    Draws: of each sweep the N particles that are left and those retired with φ > 0; columns `sweep`, `shard`,
    `parent` (initial particle), `score`, `round` (in which it retired; −1 for those that are left). `log_normalizer`:
    log of the mean of Ẑ over sweeps, by the delta method with Student's t. `info`: `log_z_sweeps` (C, S); `tops`
    (C,); for each sweep `levels`, `killed` and `acceptance` (R, C), nan after a context has ended; `rounds` (C, S);
    `ess`, `zero_sweeps`, `distinct_ancestors` (C,).

    References
    ----------
    cerou2007, brehier2016
    """

    num_particles: int = 128
    kill_share: float = 0.25
    score: str | Callable[..., Any] | Feature | None = field(default=None, kw_only=True)
    top: float | None = field(default=None, kw_only=True)
    kernel: Kernel | tuple[Kernel, ...] = field(default=SuffixResample(), repr=False, kw_only=True)
    num_moves: int = field(default=3, kw_only=True)
    num_sweeps: int = field(default=8, kw_only=True)

    name: ClassVar[str] = "splitting"
    guarantee: ClassVar[Guarantee] = Guarantee.CONSISTENT
    references: ClassVar[tuple[str, ...]] = ("cerou2007", "brehier2016")
    min_particles: ClassVar[int] = 2
    steps_name: ClassVar[str] = "rounds"

    def unsupported_reason(self, form: TargetForm) -> str | None:
        """As `Engine.unsupported_reason`."""
        if self.score is None and not form.graded:
            what = "all factors are plain predicates, of one level" if form.factor_names else "there is no factor"
            return (
                f"splitting needs a score with levels, but {what}; give score=, a feature or a function of texts that "
                "grows as a text comes nearer to what is wanted, such as how many of the wanted words it has"
            )
        return super().unsupported_reason(form)

    def __str__(self) -> str:
        if self.score is None or isinstance(self.score, str):
            return super().__str__()
        named = self.score.name if isinstance(self.score, Feature) else getattr(self.score, "__name__", "score")
        return replace(self, score=named).__str__()

    def first_shard(self, shard: Shard) -> SweepShard:
        """As `PilotedSweeps.first_shard`: a pilot where no `top` is given."""
        tops = () if self.top is None else (float(self.top),) * len(shard.contexts)
        return SplittingShard(**vars(shard), tops=tops, pilot=not tops)

    def informed(self, shard: SweepShard, pilot: Part) -> SweepShard:
        """As `PilotedSweeps.informed`: with the pilot's tops."""
        assert isinstance(shard, SplittingShard)
        return replace(shard, tops=tuple(pilot.info["tops"].tolist()))

    def num_steps(self, part: Part) -> int:
        """As `PilotedSweeps.num_steps`: rounds."""
        return len(part.info["levels"])

    def simulate(self, target: Target, shard: Shard, source: Source, *, state: Any = None) -> Part:
        """One sweep of every context."""
        assert isinstance(shard, SplittingShard)
        schedule = SplittingSchedule(self.num_particles, self.kill_share, self.score, self.moves)
        sweep = SplittingSweep(target, schedule, shard.contexts, shard.tops, source)
        sweep.run()
        draws = sweep.weighted()
        log_z = sweep.log_z(draws)
        if shard.pilot:
            draws = draws.select([])
        number = torch.full_like(draws.context, shard.id)
        columns = {"sweep": number, "shard": number, **draws.columns}
        info = {
            "log_z": log_z,
            "tops": torch.tensor(sweep.tops, dtype=torch.float64),
            "highest": sweep.highest(),
            "dead": sweep.dead(),
            "flat": sweep.flat,
            "first_score": sweep.first_score,
            "factors": [f.name for f in target.factors],
            "log_upper": target.form.log_upper,
            **{name: rounds_of(rows, sweep.groups) for name, rows in sweep.history.items()},
        }
        return Part(shard, draws.with_columns(columns=columns), info=info)

    def merge(self, parts: Sequence[Part]) -> Particles:
        """Weights are put on one scale: the mean of w over the draws of a context is the mean of Ẑ over the sweeps."""
        gathered = self.gather(parts)
        sweeps, draws, log_z = gathered
        _warn_of_first_scores(draws.prompts, parts)
        assert draws.log_weight is not None
        rows = torch.bincount(draws.context, minlength=len(log_z)).double()
        scale = (rows / (len(sweeps) * self.num_particles)).log()
        log_weight = draws.log_weight + scale[draws.context]
        info: dict[str, Any] = {
            **gathered.info(log_weight),
            "tops": sweeps[0].info["tops"],
            "rounds": torch.stack([(~p.info["levels"].isnan()).sum(0) for p in sweeps], -1),
            **{name: tuple(p.info[name] for p in sweeps) for name in ("levels", "killed", "acceptance")},
        }
        estimate = stack([log_mean_sweeps(z, LEVEL) for z in log_z])
        return Particles(draws.with_columns(log_weight=log_weight), (estimate,), self.guarantee, info)

    def check(self, target: Target) -> None:
        """As `PilotedSweeps.check`."""
        super().check(target)
        if not 0.0 < self.kill_share < 1.0:
            raise ModelError(f"Splitting: got kill_share={self.kill_share}, expected a share of N in (0, 1)")
        if self.top is not None and math.isnan(self.top):
            raise ModelError("Splitting: got top=nan, expected a score")
        known = {*target.form.factor_names, *target.model.features}
        if isinstance(self.score, str) and self.score not in known:
            raise ModelError(f"Splitting: score {self.score!r} names no factor or feature; there are {sorted(known)}")
        if self.score is not None and not isinstance(self.score, str | Feature) and not callable(self.score):
            raise ModelError(f"Splitting: got score={self.score!r}, expected a name, a feature or a function of texts")

    def all_dead(self, prompt: str, c: int, parts: Sequence[Part]) -> str:
        """As `PilotedSweeps.all_dead`: how high the scores went, and which factor was still zero."""
        highest = max(float(p.info["highest"][c]) for p in parts)
        dead = torch.stack([p.info["dead"][c] for p in parts]).sum(0)
        worst = parts[0].info["factors"][int(dead.argmax())]
        rounds = max(int((~p.info["levels"][:, c].isnan()).sum()) for p in parts)
        sweeps = "its only sweep" if len(parts) == 1 else f"{len(parts)} sweeps"
        follows = z_below_of_sweeps(len(parts), float(parts[0].info["log_upper"]), LEVEL)
        return (
            f"no particle of {sweeps} has γ > 0 for context {prompt}: after up to {rounds} rounds the "
            f"highest score is {highest:.4g} and factor {worst!r} is still zero there (a sweep ends at "
            f"{float(parts[0].info['tops'][c]):.4g}); {follows}; use more particles or moves, "
            "a score that grows towards that factor, or a higher top="
        )


def _warn_of_first_scores(prompts: Sequence[str], parts: Sequence[Part]) -> None:
    """Say where every draw of the prior, the pilot's too, had one score: there was no level to climb."""
    found = first_context(torch.stack([p.info["flat"] for p in parts]).all(0))
    if found is None:
        return
    c, also = found
    drawn = sum(p.shard.num_draws for p in parts)
    log.warning(
        "splitting: all %s draws of the prior for context %r%s have the score %.4g, so that nothing was split and this "
        "is plain importance sampling; give a score= that grows where those draws are, or more particles",
        f"{drawn:,}", prompts[c], also, float(parts[0].info["first_score"][c]),
    )  # fmt: skip
