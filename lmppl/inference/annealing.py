"""Annealing: importance sampling and a tempered SMC sampler along π0·φ^λ, λ from 0 to 1."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmppl.diagnostics.intervals import binomial_upper
from lmppl.diagnostics.normalizers import log_mean_sweeps, log_mean_weight, stack
from lmppl.diagnostics.weights import KHAT_LIMIT, effective_sample_size, pareto_khat
from lmppl.errors import InfeasibleModel, ModelError
from lmppl.inference.annealed_sweep import AnnealedSweep, AnnealingSchedule
from lmppl.inference.approximation import LEVEL, Particles
from lmppl.inference.engine import Engine, Guarantee, Part, Request, Shard
from lmppl.inference.mcmc import Kernel, Mixture
from lmppl.inference.resampling import RESAMPLING
from lmppl.lm.randomness import Source
from lmppl.modeling.target import Target
from lmppl.sequences import Draws, Estimate, concatenate

__all__ = ["AIS", "AnnealingShard", "TemperedSMC", "check_ladder"]


@dataclass(frozen=True)
class AnnealingShard(Shard):
    """A sweep of N particles per context; without a `ladder` it is a pilot, which finds one and gives no draws."""

    ladder: tuple[float, ...] = ()
    pilot: bool = False


class _Annealed:
    """What both engines share: a shard is a sweep."""

    name: ClassVar[str]
    guarantee: ClassVar[Guarantee]
    num_particles: int
    num_sweeps: int
    num_moves: int
    kernel: Kernel | tuple[Kernel, ...]

    def schedule(self, ladder: tuple[float, ...]) -> AnnealingSchedule:
        """How a sweep of this engine goes, on a given ladder."""
        raise NotImplementedError

    def fixed_ladder(self) -> tuple[float, ...] | None:
        """λ_0..λ_K, () where each sweep finds its own, None where a pilot finds it."""
        raise NotImplementedError

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
        estimate = self._estimate(weights, log_z)
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

    def _estimate(self, weights: Sequence[Tensor], log_z: Tensor) -> Estimate:
        raise NotImplementedError

    def _sweeps(self, request: Request) -> int:
        assert isinstance(self, Engine)
        wanted = self.wanted(request)
        return 1 if wanted is None else -(-wanted // self.num_particles)

    def _refuse_all_dead(self, prompts: Sequence[str], log_z: Tensor, parts: Sequence[Part]) -> None:
        """Raise where every sweep of a context has Ẑ = 0."""
        empty = torch.nonzero((log_z == -math.inf).all(-1)).squeeze(1).tolist()
        if not empty:
            return
        c, also = empty[0], f" (and for {len(empty) - 1} more)" if len(empty) > 1 else ""
        deaths = torch.stack([p.info["deaths"][c] for p in parts]).sum(0)
        names = parts[0].info["factors"]
        worst = names[int(deaths.argmax())]
        shares = ", ".join(f"{n!r} {int(k)}" for n, k in zip(names, deaths.tolist(), strict=True) if k > 0)
        trials = self.num_particles * len(parts)
        rate = float(binomial_upper(torch.tensor(0), torch.tensor(trials), LEVEL))
        log_upper = float(parts[0].info["log_upper"])
        if math.isfinite(log_upper):
            bound = f"Z < {rate:.1e}" + (f"·M, log M = {log_upper:.4g}," if log_upper else "")
        else:
            bound = f"Pr_π0(γ > 0) < {rate:.1e}"
        first = float(parts[0].info["ladder"][1])
        raise InfeasibleModel(
            f"{self.name}: all {trials:,} particles for context {prompts[c]!r}{also} died at the first "
            f"temperature, λ = {first:.3g}: factor {worst!r} gave most of them weight zero ({shares}); {bound} with "
            f"{LEVEL:.0%} confidence; a hard factor is in force as soon as λ > 0, so use more particles, an engine "
            "that steers (SMC), or Splitting with a graded score of it"
        )


@dataclass(frozen=True)
class AIS(_Annealed, Engine):
    """Annealed importance sampling: draws of π0, moved by MCMC along π0·φ^λ, and weighted on the way.

    x_0 ~ π0; x_k comes from x_{k−1} by the kernels at λ_k, which leave π0·φ^{λ_k} invariant. With the weight

        W = ∏_{k=1..K} φ(x_{k−1})^{λ_k − λ_{k−1}},   E[W] = Z   and   E[W f(x_{K−1})] = Z E_π*[f],

    for any ladder and any invariant kernels, mixing or not; the better they mix, the less W varies. Particles are
    independent, as in importance sampling, and so are the errors.

    A row with φ = 0 has weight zero from the first step on, and is moved no more: a hard constraint is in force as
    soon as λ > 0, so AIS helps rewards, and does nothing for a rare constraint (`Splitting` does).

    Parameters
    ----------
    num_particles : int
        N per context and sweep: the batch that moves together.
    num_temperatures : int
        K, where no ladder is given: λ_k = (k/K)², with the shortest steps where weights change most.
    ladder : tuple of float, optional
        0 = λ_0 < … < λ_K = 1.
    kernel : Kernel or tuple of Kernel
        Of `lmppl.inference.mcmc`. A tuple is one kernel after the other, which is invariant but not reversible though
        each of them is; reverse runs take them in the opposite order.
    num_moves : int
        How often, at each temperature.
    num_sweeps : int
        Sweeps where `infer` is not told a number of draws; of n draws it makes ⌈n/N⌉ sweeps.

    Raises
    ------
    InfeasibleModel
        Where all particles of a context have weight zero: which factor did it, and what follows about Z.

    Notes
    -----
    `log_normalizer`: log of the mean weight, by the delta method. `info`: `ladder` (K+1,); `acceptance` (K−1, C), the
    share of proposals accepted at each temperature; `ess_history` (K, C), mean ESS of a sweep after each reweighting;
    `ess`, `khat`, `zero_sweeps` (C,); `log_z_sweeps` (C, S); `distinct_ancestors` (C,). Columns: `shard`, `parent`.

    References
    ----------
    neal2001
    """

    num_particles: int = 512
    num_temperatures: int = 8
    ladder: tuple[float, ...] | None = field(default=None, kw_only=True)
    kernel: Kernel | tuple[Kernel, ...] = field(default=Mixture(), repr=False, kw_only=True)
    num_moves: int = field(default=1, kw_only=True)
    num_sweeps: int = field(default=2, kw_only=True)

    name: ClassVar[str] = "ais"
    guarantee: ClassVar[Guarantee] = Guarantee.CONSISTENT
    references: ClassVar[tuple[str, ...]] = ("neal2001",)

    def check(self, target: Target) -> None:
        """As `_Annealed.check`."""
        super().check(target)
        if self.ladder is None and self.num_temperatures < 1:
            raise ModelError(f"AIS: got num_temperatures={self.num_temperatures}, expected at least 1")
        check_ladder("AIS", self.fixed_ladder())

    def fixed_ladder(self) -> tuple[float, ...]:
        """λ_0..λ_K."""
        if self.ladder is not None:
            return self.ladder
        return tuple((k / self.num_temperatures) ** 2 for k in range(self.num_temperatures + 1))

    def schedule(self, ladder: tuple[float, ...]) -> AnnealingSchedule:
        """Without resampling."""
        return AnnealingSchedule(self.num_particles, ladder, 0.5, self.moves)

    def simulate(self, target: Target, shard: Shard, source: Source, *, state: Any = None) -> Part:
        """As `_Annealed.simulate`; particles are independent, so that no column `sweep` ties them together."""
        part = super().simulate(target, shard, source)
        columns = {name: column for name, column in part.draws.columns.items() if name != "sweep"}
        return replace(part, draws=part.draws.with_columns(columns=columns))

    def _estimate(self, weights: Sequence[Tensor], log_z: Tensor) -> Estimate:
        return stack([log_mean_weight(w, LEVEL) for w in weights])


@dataclass(frozen=True)
class TemperedSMC(_Annealed, Engine):
    """A tempered SMC sampler: as AIS along π0·φ^λ, and particles are resampled between the temperatures.

    Ẑ, the product of the temperatures' mean weights, is unbiased on a ladder that is fixed before the sweep, for
    every invariant kernel and every resampling scheme, triggered by ESS or not, waste-free or not. What adaptivity
    does to that:

    - `ladder="pilot"` (the default): one sweep, which is then thrown away, chooses the ladder; the sweeps that count
      use it as it stands, so that **Ẑ is unbiased**, given the ladder and hence at all.
    - `ladder="online"`: each sweep chooses its own λ's from its own particles. Ẑ and expectations are then
      **consistent as N grows but biased**, and no bound on log Z follows from them (`beskos2016`).

    Parameters
    ----------
    num_particles : int
        N per context and sweep.
    ladder : "pilot", "online" or tuple of float
        How the temperatures are chosen; a tuple is 0 = λ_0 < … < λ_K = 1. One ladder serves all contexts.
    ess_target : float
        In (0, 1): the next λ is the largest at which the conditional ESS of the living particles is this share of
        their number, in every context.
    ess_threshold : float
        Resample a context when ESS < `ess_threshold`·N: 1 at every temperature, 0 never, which is AIS.
    resampling : {"systematic", "stratified", "multinomial", "residual", "ssp"}
    kernel, num_moves
        As in `AIS`.
    chain_length : int
        P > 1 is the waste-free sampler: at each temperature N/P ancestors are resampled (systematically), and all P
        states of each one's chain of P − 1 moves are the new particles; `num_moves` is then 1 and nothing is thrown
        away. It pays with P well above 1 and N/P of at least some dozens.
    num_sweeps : int
        Independent sweeps where `infer` is not told a number of draws; their spread is the error.

    Raises
    ------
    InfeasibleModel
        Where all particles of a context died in every sweep: at which temperature, which factor did it, and what
        follows about Z.

    Notes
    -----
    `log_normalizer`: log of the mean of Ẑ over sweeps, by the delta method with Student's t. `info` is that of `AIS`;
    with `ladder="online"` `ladders` has that of each sweep, and histories are means over the sweeps that went as far.
    `distinct_ancestors` (C,): initial particles, of all sweeps, from which draws with positive weight descend.
    Columns: `sweep`, `shard`, `parent`.

    References
    ----------
    delmoral2006, zhou2016, beskos2016, dau2022
    """

    num_particles: int = 64
    ladder: str | tuple[float, ...] = field(default="pilot", kw_only=True)
    ess_target: float = field(default=0.5, kw_only=True)
    ess_threshold: float = field(default=1.0, kw_only=True)
    resampling: str = field(default="systematic", kw_only=True)
    kernel: Kernel | tuple[Kernel, ...] = field(default=Mixture(), repr=False, kw_only=True)
    num_moves: int = field(default=1, kw_only=True)
    chain_length: int = field(default=1, kw_only=True)
    num_sweeps: int = field(default=8, kw_only=True)

    name: ClassVar[str] = "tempered_smc"
    guarantee: ClassVar[Guarantee] = Guarantee.CONSISTENT
    references: ClassVar[tuple[str, ...]] = ("delmoral2006", "zhou2016", "beskos2016", "dau2022")

    def check(self, target: Target) -> None:
        """As `_Annealed.check`."""
        super().check(target)
        if isinstance(self.ladder, str) and self.ladder not in ("pilot", "online"):
            raise ModelError(
                f"TemperedSMC: got ladder={self.ladder!r}, expected 'pilot', 'online' or a tuple of numbers"
            )
        check_ladder("TemperedSMC", self.fixed_ladder())
        if not 0.0 < self.ess_target < 1.0:
            raise ModelError(f"TemperedSMC: got ess_target={self.ess_target}, expected a share in (0, 1)")
        if not 0.0 <= self.ess_threshold <= 1.0:
            raise ModelError(f"TemperedSMC: got ess_threshold={self.ess_threshold}, expected a share of N in [0, 1]")
        if self.resampling not in RESAMPLING:
            raise ModelError(
                f"TemperedSMC: no resampling is called {self.resampling!r}; there are {', '.join(RESAMPLING)}"
            )
        if self.chain_length < 1 or self.num_particles % self.chain_length:
            raise ModelError(
                f"TemperedSMC: got chain_length={self.chain_length}, expected a divisor of num_particles="
                f"{self.num_particles}"
            )
        if self.chain_length > 1 and (self.num_moves, self.resampling, self.ess_threshold) != (1, "systematic", 1.0):
            raise ModelError(
                "TemperedSMC: waste-free sweeps (chain_length > 1) resample systematically at every temperature and "
                "keep every move: leave num_moves, resampling and ess_threshold as they are"
            )

    def fixed_ladder(self) -> tuple[float, ...] | None:
        """λ_0..λ_K; () online, None from a pilot."""
        if isinstance(self.ladder, str):
            return None if self.ladder == "pilot" else ()
        return self.ladder

    def schedule(self, ladder: tuple[float, ...]) -> AnnealingSchedule:
        """With resampling."""
        return AnnealingSchedule(
            self.num_particles,
            ladder,
            self.ess_target,
            self.moves,
            self.ess_threshold,
            self.resampling,
            self.chain_length,
        )

    def _estimate(self, weights: Sequence[Tensor], log_z: Tensor) -> Estimate:
        estimate = stack([log_mean_sweeps(z, LEVEL) for z in log_z])
        if self.ladder == "online":
            note = (
                f"{estimate.note}; each sweep chose its ladder from its own particles, so Ẑ is consistent, not unbiased"
            )
            return replace(estimate, kind="consistent", note=note)
        return estimate


def check_ladder(who: str, ladder: tuple[float, ...] | None) -> None:
    """Raise `ModelError` where a ladder that is given does not rise from 0 to 1."""
    if not ladder:
        return
    rising = all(a < b for a, b in itertools.pairwise(ladder))
    if len(ladder) < 2 or ladder[0] != 0.0 or ladder[-1] != 1.0 or not rising:
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
