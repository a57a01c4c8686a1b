"""Adaptive multilevel splitting: rare evidence, reached by killing the lowest scores level by level."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
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
from lmppl.inference.proposals import check_bounds, draw_from
from lmppl.inference.resampling import effective_sizes
from lmppl.lm.randomness import Source
from lmppl.modeling.factors import Feature
from lmppl.modeling.target import Target, TargetForm, log_evidence
from lmppl.modeling.user_functions import evaluate
from lmppl.sequences import Draws, concatenate

__all__ = ["Splitting", "SplittingShard", "killed", "log_share_left"]

MAX_LEVELS = 2000


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
        sweep = _Sweep(self, target, shard, source)
        sweep.run()
        draws = sweep.weighted()
        if not shard.tops:
            draws = draws.select([])
        number = torch.full_like(draws.context, shard.id)
        columns = {"sweep": number, "shard": number, **draws.columns}
        info = {
            "log_z": sweep.log_z(),
            "tops": torch.tensor(sweep.tops, dtype=torch.float64),
            "highest": sweep.highest(),
            "dead": sweep.dead(),
            "factors": [f.name for f in target.factors],
            **{name: _rounds(rows, sweep.groups) for name, rows in sweep.history.items()},
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
        known = (*target.form.factor_names, *target.model.features)
        if isinstance(self.score, str) and self.score not in known:
            raise ModelError(f"Splitting: score {self.score!r} names no factor or feature; there are {sorted(known)}")
        if self.score is not None and not isinstance(self.score, str | Feature) and not callable(self.score):
            raise ModelError(f"Splitting: got score={self.score!r}, expected a name, a feature or a function of texts")

    def _sweeps(self, request: Request) -> int:
        wanted = self.wanted(request)
        return 1 if wanted is None else -(-wanted // self.num_particles)

    def _refuse_all_dead(self, prompts: Sequence[str], log_z: Tensor, parts: Sequence[Part]) -> None:
        """Raise where every sweep of a context has Ẑ = 0."""
        empty = torch.nonzero((log_z == -math.inf).all(-1)).squeeze(1).tolist()
        if not empty:
            return
        c, also = empty[0], f" (and for {len(empty) - 1} more)" if len(empty) > 1 else ""
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


class _Score:
    """S (B,) of evaluated draws; a function of the user's runs once on each distinct text."""

    def __init__(self, engine: Splitting, target: Target) -> None:
        self.target, self.score = target, engine.score
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
            values = evaluate(self.feature, draws.select(rows), factor=f"score {self.feature.name}")
            if values.dim() != 1:
                return values
            self.known.update(zip(fresh, values.tolist(), strict=True))
        self.target.cost.factor_calls += len(fresh)
        self.target.cost.cache_hits += len(keys) - len(fresh)
        return torch.tensor([self.known[key] for key in keys], dtype=torch.float64)


class _Sweep:
    """One sweep of every context of a shard; a group is a context."""

    def __init__(self, engine: Splitting, target: Target, shard: SplittingShard, source: Source) -> None:
        self.engine, self.target, self.source = engine, target, source
        self.contexts, self.count = torch.tensor(shard.contexts), engine.num_particles
        self.groups = len(shard.contexts)
        self.pilot = not shard.tops
        self.tops = [math.inf] * self.groups if self.pilot else list(shard.tops)
        self.score = _Score(engine, target)
        drawn = draw_from(target.prior, self.contexts.repeat_interleave(self.count), source, cost=target.cost)
        self.draws = self._bare(target.evaluate(drawn))
        check_bounds(self.draws, target.factors)
        self.scores = self.score(self.draws).view(self.groups, self.count)
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
            masks = torch.stack([killed(s, self.engine.kill_share) for s in self.scores])
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
        accepted, proposed = torch.zeros(2, self.groups, dtype=torch.float64)
        if len(rows):
            group = rows // self.count
            survivors = [torch.nonzero(~mask).squeeze(1) for mask in masks]
            chosen = self.source.integers(torch.tensor([len(survivors[g]) for g in group.tolist()]))
            parents = torch.stack(
                [survivors[g][i] + g * self.count for g, i in zip(group.tolist(), chosen.tolist(), strict=True)]
            )
            moved = self._moved(parents, levels, group, accepted, proposed)
            self.parent[rows] = self.parent[parents]
            index = torch.arange(len(self.draws))
            index[rows] = len(self.draws) + torch.arange(len(rows))
            self.draws = concatenate([self.draws, moved], pad_id=self.target.prior.pad_id).select(index)
            self.scores.view(-1)[rows] = self.score(moved)
        self.history["levels"].append(torch.where(active, levels, math.nan))
        self.history["killed"].append(torch.where(active, deaths.double(), math.nan))
        self.history["acceptance"].append(accepted / proposed)
        if self.target.watcher is not None:
            self._report(levels, active)

    def _moved(self, parents: Tensor, levels: Tensor, group: Tensor, accepted: Tensor, proposed: Tensor) -> Draws:
        """Copies of `parents`, moved by kernels that leave π0(·|S > level) invariant."""
        of_context = torch.full((self.target.form.num_contexts,), math.inf, dtype=torch.float64)
        of_context[self.contexts] = levels

        def above(draws: Draws) -> Tensor:
            inside = self.score(draws) > of_context[draws.context]
            return torch.where(inside, 0.0, -math.inf).double()

        kernels = self.engine.moves
        state = kernels[0].start(self.target, self.draws.select(parents), evidence=above)
        for kernel in kernels:
            state, info = kernel.step(state, self.source, evidence=above)
            asked = ~info.log_acceptance.isnan()
            accepted += torch.bincount(group[asked & info.accepted], minlength=self.groups)
            proposed += torch.bincount(group[asked], minlength=self.groups)
        return self._bare(state.draws)

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

    def log_z(self) -> Tensor:
        """(G,) log Ẑ, in nats."""
        draws = self.weighted()
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

    def _bare(self, draws: Draws) -> Draws:
        assert draws.log_prior is not None
        return draws.with_columns(log_weight=None, log_q=None, log_prior=draws.log_prior.double(), columns={}, meta={})

    def _report(self, levels: Tensor, active: Tensor) -> None:
        g = int(torch.nonzero(active)[0, 0])
        figures = {"level": f"{float(levels[g]):.4g}", "log p": f"{float(self.log_p[g]):.2f}"}
        top = self.tops[g]
        start = float(self.history["levels"][0][g])
        known = math.isfinite(top) and math.isfinite(start) and top > start
        share = (float(levels[g]) - start) / (top - start) if known else 0.0
        self.target.report(min(1.0, max(0.0, share)), figures)


def _rounds(rows: list[Tensor], groups: int) -> Tensor:
    return torch.stack(rows) if rows else torch.zeros(0, groups, dtype=torch.float64)
