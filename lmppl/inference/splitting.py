"""Adaptive multilevel splitting: rare evidence, reached by killing the lowest scores level by level."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmppl.diagnostics.normalizers import log_mean_sweeps, stack
from lmppl.diagnostics.weights import effective_sample_size
from lmppl.errors import InfeasibleModel, ModelError
from lmppl.inference.approximation import LEVEL, Particles
from lmppl.inference.engine import Engine, Guarantee, Part, Request, Shard
from lmppl.inference.mcmc import Kernel, SuffixResample
from lmppl.inference.refusals import first_context
from lmppl.inference.splitting_sweep import SplittingSchedule, SplittingSweep, rounds_of
from lmppl.lm.randomness import Source
from lmppl.modeling.factors import Feature
from lmppl.modeling.target import Target, TargetForm
from lmppl.sequences import concatenate

__all__ = ["Splitting", "SplittingShard"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SplittingShard(Shard):
    """A sweep of N particles per context; without `tops` it is a pilot, which finds them and gives no draws.

    Parameters
    ----------
    tops : tuple of float
        For each context the score at which a sweep ends: nothing at or above it is killed.
    """

    tops: tuple[float, ...] = ()


@dataclass(frozen=True)
class Splitting(Engine):
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

    @property
    def moves(self) -> tuple[Kernel, ...]:
        """The kernels of one round, in their order."""
        kernels = self.kernel if isinstance(self.kernel, tuple) else (self.kernel,)
        return kernels * self.num_moves

    @property
    def default_draws(self) -> int:
        """N draws of each of the sweeps."""
        return self.num_particles * self.num_sweeps

    def plan(self, target: Target, request: Request) -> list[Shard]:
        """One shard a sweep; before them the pilot, where no `top` is given."""
        self._check(target)
        contexts = tuple(range(target.form.num_contexts))
        tops = () if self.top is None else (float(self.top),) * len(contexts)
        first = SplittingShard(0, self.num_particles, request.seed, contexts, self.num_particles * len(contexts), tops)
        return [replace(first, id=i) for i in range(self._sweeps(request))] if tops else [first]

    def replan(self, target: Target, request: Request, parts: Sequence[Part]) -> list[Shard]:
        """After the pilot the sweeps with its tops; then one more while a budget lasts."""
        last = parts[-1].shard
        assert isinstance(last, SplittingShard)
        if not last.tops:
            base = replace(last, tops=tuple(parts[-1].info["tops"].tolist()))
            return [replace(base, id=last.id + 1 + i) for i in range(self._sweeps(request))]
        if request.num_draws is not None or request.budget is None:
            return []
        return [replace(last, id=last.id + 1)]

    def simulate(self, target: Target, shard: Shard, source: Source, *, state: Any = None) -> Part:
        """One sweep of every context."""
        assert isinstance(shard, SplittingShard)
        schedule = SplittingSchedule(self.num_particles, self.kill_share, self.score, self.moves)
        sweep = SplittingSweep(target, schedule, shard.contexts, shard.tops, source)
        sweep.run()
        draws = sweep.weighted()
        log_z = sweep.log_z(draws)
        if not shard.tops:
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
            **{name: rounds_of(rows, sweep.groups) for name, rows in sweep.history.items()},
        }
        return Part(shard, draws.with_columns(columns=columns), info=info)

    def merge(self, parts: Sequence[Part]) -> Particles:
        """Weights are put on one scale: the mean of w over the draws of a context is the mean of Ẑ over the sweeps."""
        sweeps = [p for p in parts if isinstance(p.shard, SplittingShard) and p.shard.tops]
        if not sweeps:
            raise InfeasibleModel("splitting: the run ended after its pilot, before any draw; give it a larger budget")
        draws = concatenate([p.draws for p in sweeps])
        log_z = torch.stack([p.info["log_z"] for p in sweeps], -1)
        self._refuse_all_dead(draws.prompts, log_z, sweeps)
        _warn_of_first_scores(draws.prompts, parts)
        draws = draws.select(torch.argsort(draws.context, stable=True))
        assert draws.log_weight is not None
        rows = torch.bincount(draws.context, minlength=len(log_z)).double()
        scale = (rows / (len(sweeps) * self.num_particles)).log()
        draws = draws.with_columns(log_weight=draws.log_weight + scale[draws.context])
        assert draws.log_weight is not None
        positive = draws.log_weight > -math.inf
        found = torch.stack([draws.context, draws.columns["sweep"], draws.columns["parent"]], -1)
        origins = torch.unique(found[positive], dim=0)
        weights = [draws.log_weight[draws.context == c] for c in range(len(log_z))]
        info: dict[str, Any] = {
            "log_z_sweeps": log_z,
            "tops": sweeps[0].info["tops"],
            "ess": torch.stack([effective_sample_size(w) for w in weights]),
            "zero_sweeps": (log_z == -math.inf).sum(-1),
            "distinct_ancestors": torch.bincount(origins[:, 0], minlength=len(log_z)),
            "rounds": torch.stack([(~p.info["levels"].isnan()).sum(0) for p in sweeps], -1),
            **{name: tuple(p.info[name] for p in sweeps) for name in ("levels", "killed", "acceptance")},
        }
        estimate = stack([log_mean_sweeps(z, LEVEL) for z in log_z])
        return Particles(draws, (estimate,), self.guarantee, info)

    def live(self, parts: Sequence[Part]) -> dict[str, str]:
        sweeps = [p for p in parts if isinstance(p.shard, SplittingShard) and p.shard.tops]
        rounds = {"rounds": f"{len(parts[-1].info['levels'])}"}
        if not sweeps:
            return {"pilot": "1", **rounds}
        log_z = torch.stack([p.info["log_z"] for p in sweeps], -1)[0]
        value = float(torch.logsumexp(log_z, 0)) - math.log(len(log_z))
        figures = {"sweeps": f"{len(sweeps)}", "log Ẑ": f"{value:.3f}", **rounds}
        acceptance = sweeps[-1].info["acceptance"]
        if acceptance.numel() and not bool(acceptance.isnan().all()):
            figures["acceptance"] = f"{float(acceptance.nanmean()):.0%}"
        return figures

    def _check(self, target: Target) -> None:
        for name in ("num_particles", "num_moves", "num_sweeps"):
            least = 2 if name == "num_particles" else 1
            if getattr(self, name) < least:
                raise ModelError(f"Splitting: got {name}={getattr(self, name)}, expected at least {least}")
        if not 0.0 < self.kill_share < 1.0:
            raise ModelError(f"Splitting: got kill_share={self.kill_share}, expected a share of N in (0, 1)")
        if self.top is not None and math.isnan(self.top):
            raise ModelError("Splitting: got top=nan, expected a score")
        if not self.moves or not all(isinstance(k, Kernel) for k in self.moves):
            raise ModelError(f"Splitting: got kernel={self.kernel!r}, expected a kernel, or a tuple of them")
        for kernel in self.moves:
            kernel.check(target)
        known = {*target.form.factor_names, *target.model.features}
        if isinstance(self.score, str) and self.score not in known:
            raise ModelError(f"Splitting: score {self.score!r} names no factor or feature; there are {sorted(known)}")
        if self.score is not None and not isinstance(self.score, str | Feature) and not callable(self.score):
            raise ModelError(f"Splitting: got score={self.score!r}, expected a name, a feature or a function of texts")

    def _sweeps(self, request: Request) -> int:
        wanted = self.wanted(request)
        return 1 if wanted is None else -(-wanted // self.num_particles)

    def _refuse_all_dead(self, prompts: Sequence[str], log_z: Tensor, parts: Sequence[Part]) -> None:
        """Raise where every sweep of a context has Ẑ = 0."""
        found = first_context((log_z == -math.inf).all(-1))
        if found is None:
            return
        c, also = found
        highest = max(float(p.info["highest"][c]) for p in parts)
        dead = torch.stack([p.info["dead"][c] for p in parts]).sum(0)
        worst = parts[0].info["factors"][int(dead.argmax())]
        rounds = max(int((~p.info["levels"][:, c].isnan()).sum()) for p in parts)
        raise InfeasibleModel(
            f"splitting: no particle of {len(parts)} sweep(s) has γ > 0 for context {prompts[c]!r}{also}: after up to "
            f"{rounds} rounds the highest score is {highest:.4g} and factor {worst!r} is still zero "
            f"there (a sweep ends at {float(parts[0].info['tops'][c]):.4g}); use more particles or moves, a score that "
            "grows towards that factor, or a higher top="
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
