"""MCMC: batches of chains over sequences, run by a kernel that leaves π* invariant."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmppl.diagnostics.chains import MIN_STEPS, bulk_ess
from lmppl.diagnostics.normalizers import log_mean_weight, log_mean_weight_bounded, stack
from lmppl.errors import ModelError
from lmppl.inference.approximation import LEVEL, Chains
from lmppl.inference.coverage import tell_coverage
from lmppl.inference.engine import Engine, Guarantee, Part, Request, Shard, make_shard
from lmppl.inference.mcmc.chains import ChainState, Kernel, StepInfo, Walked
from lmppl.inference.mcmc.kernels import Restart
from lmppl.inference.mcmc.mixture import Mixture
from lmppl.inference.mcmc.starts import Start, start_draws
from lmppl.inference.mcmc.summary import Moves, Tally, chain_figures, stuck, stuck_note
from lmppl.lm.randomness import Source
from lmppl.modeling.target import Target, TargetForm
from lmppl.sequences import Draws, Estimate, concatenate

__all__ = ["MCMC", "ChainShard"]

log = logging.getLogger(__name__)

SEGMENT = 32  # kept steps of one shard


@dataclass(frozen=True)
class ChainShard(Shard):
    """A segment of steps of all chains: `warmup` steps, then `steps` kept ones, `thin` steps apart."""

    steps: int = 1
    warmup: int = 0


@dataclass(frozen=True)
class MCMC(Engine):
    """Chains over whole sequences: each step proposes new rows for all chains at once and accepts them by π*.

    Their draws have the law π* in the limit of many steps, whatever the kernel; the figures in `info` say whether the
    chains agree with each other and with their own past. **Chains that agree can all have missed a mode**: no figure
    of chains shows mass that none of them visited.

    All chains and contexts are one batch. Caches live across steps: a step costs the tokens that it writes.

    Parameters
    ----------
    num_chains : int
        Chains per context.
    num_steps : int
        Kept steps of each chain, where `infer` is not told; `infer(num_draws=n)` keeps ⌈n / num_chains⌉.
    warmup : int
        Steps before the first kept one, dropped.
    thin : int
        Keep every `thin`-th step.
    kernel : Kernel
        By default `Mixture()`: `Restart()` and `SuffixResample()` in turn, at random.
    start : "prior", Draws, Approximation, Engine or name of one
        Where chains start: at draws of the prior with γ > 0, at given draws (sampled by their weights), at another
        engine's.
    max_tries : int
        Draws of the prior per context that finding starts may take; chains share them where they are fewer.

    Raises
    ------
    InfeasibleModel
        Where no start with γ > 0 is found.
    ModelError
        Where a proposal does not fit the prior.

    Notes
    -----
    `info`: `rhat`, `nested_rhat`, `bulk_ess`, `tail_ess`, `mcse`, each (C,) by scalar (each factor's log φ,
    `log_prior`, `length`), `chain_notes`; `acceptance` (C,) and `acceptance_by_position` (T + 1,) by kernel; `stuck`
    chains by context, which stood still for longer than chance explains, and are warned about; `coverage`, of a kernel
    whose proposal is known not to cover π*, or is truncated; `starts` (C,), how many chains had a start of their own.
    The proposals of
    `Restart()` are independent draws of the prior, so that log Ẑ comes with them. With the kernel `Restart()`,
    `certificate` (C,) bounds the distance of the last draws to π*: TV ≤ (1 − Z/M)^n, Z at the
    lower end of its interval; nan where a factor declares none, which `chain_notes` names.

    With a factor declared `stochastic=True`, a non-negative unbiased estimate of φ takes its place: the estimate of the
    present row is kept until the row goes (pseudo-marginal MCMC), and π* has E[φ̂] in place of φ.

    References
    ----------
    hastings1970, tierney1994, mengersen1996, andrieu2009, vehtari2021, margossian2024; of the kernels: karan2025,
    geman1984, miao2019, andrieu2010, chopin2015
    """

    num_chains: int = 64
    num_steps: int = 64
    warmup: int = 50
    thin: int = 1
    kernel: Kernel = field(default=Mixture(), repr=False)
    start: Start = field(default="prior", repr=False)
    max_tries: int = 4096

    name: ClassVar[str] = "mcmc"
    guarantee: ClassVar[Guarantee] = Guarantee.CONSISTENT
    sequential: ClassVar[bool] = True
    references: ClassVar[tuple[str, ...]] = (
        "hastings1970", "tierney1994", "mengersen1996", "andrieu2009", "vehtari2021", "margossian2024",
        "karan2025", "geman1984", "miao2019", "andrieu2010", "chopin2015",
    )  # fmt: skip

    def unsupported_reason(self, form: TargetForm) -> str | None:
        """None: estimates of φ are as good as φ here, and nothing else is asked of a factor."""
        return None

    @property
    def default_draws(self) -> int:
        """Kept steps of all chains."""
        return self.num_chains * self.num_steps

    def plan(self, target: Target, request: Request) -> list[Shard]:
        self._check(target)
        wanted = self.wanted(request)
        steps = SEGMENT if wanted is None else -(-wanted // self.num_chains)
        counts = [min(SEGMENT, steps - done) for done in range(0, steps, SEGMENT)]
        return [
            self._shard(target, number, count, self.warmup if number == 0 else 0, request.seed)
            for number, count in enumerate(counts)
        ]

    def replan(self, target: Target, request: Request, parts: Sequence[Part]) -> list[Shard]:
        if request.num_draws is not None or request.budget is None:
            return []
        last = parts[-1].shard
        return [self._shard(target, last.id + 1, SEGMENT, 0, request.seed)]

    def simulate(self, target: Target, shard: Shard, source: Source, *, state: Any = None) -> Part:
        assert isinstance(shard, ChainShard)
        context = torch.tensor(shard.contexts).repeat_interleave(self.num_chains * self._replicas)
        if state is None:
            starts = start_draws(
                self.start, target, context, source, max_tries=self.max_tries, seed=shard.seed, who=self.name
            )
            draws, step, distinct = starts.draws, 0, starts.distinct
        else:
            draws, step, distinct = _restored(state, target), int(state["step"]), state["starts"]
        memory = self._begin(state)
        chains = self.kernel.start(target, draws, power=self._powers(memory, len(draws)), who=self.name)
        shown = torch.arange(len(draws)) % self._replicas == self._replicas - 1
        tally = Tally(context[shown], target.form.num_contexts, target.form.horizon)
        moves = Moves(draws.select(shown))
        proposed: list[Tensor] = []
        kept: list[Draws] = []
        total = shard.warmup + shard.steps * self.thin
        for number, (draws, info) in enumerate(self._walk(chains, source, memory, shard.warmup, total)):
            moves.see(draws.select(shown))
            if number >= shard.warmup:
                tally.add(StepInfo(info.kernel, *(x[shown] for x in info[1:])))
                if (number - shard.warmup + 1) % self.thin == 0:
                    kept.append(self._kept(draws.select(shown), step + len(kept), shard.id))
            proposed += _prior_evidence(self.kernel, info)
            target.report((number + 1) / total, _figures(number, shard, info))
        part = {
            "state": {**_plain(draws), **memory, "step": step + len(kept), "starts": distinct},
            "tally": tally.counts,
            "moves": moves.plain(),
            "log_phi": torch.stack(proposed) if proposed else torch.zeros(0, len(context), dtype=torch.float64),
            "log_upper": target.form.log_upper,
            "unbounded": target.form.unbounded,
            "steps": total,
            "coverage": self.kernel.coverage(target),
            "predicates": [f.name for f in target.factors if f.is_predicate],
        }
        return Part(shard, concatenate(kept, pad_id=target.prior.pad_id), info=part)

    # What tempering changes.

    @property
    def _replicas(self) -> int:
        """Rows of the batch for each chain; the last of them is the chain."""
        return 1

    def _begin(self, state: Mapping[str, Any] | None) -> dict[str, Any]:
        """What a segment remembers beside the rows: plain data, which the next one gets in its state."""
        return {}

    def _powers(self, memory: Mapping[str, Any], count: int) -> float | Tensor:
        """λ of all `count` rows."""
        return 1.0

    def _walk(
        self, chains: ChainState, source: Source, memory: dict[str, Any], warmup: int, total: int
    ) -> Iterator[Walked]:
        """`total` steps of all rows, of which the first `warmup` are not kept."""
        return self.kernel.walk(chains, source, total)

    def merge(self, parts: Sequence[Part]) -> Chains:
        draws = concatenate([p.draws for p in parts])
        draws = draws.select(torch.argsort(draws.context, stable=True))
        by_kernel, by_position = Tally.rates([p.info["tally"] for p in parts])
        kept = self.thin * len(draws) // (draws.num_contexts * self.num_chains)
        still = stuck([p.info["moves"] for p in parts], draws.num_contexts, kept)
        info = {
            **chain_figures(draws, parts[0].info["predicates"]),
            "acceptance": by_kernel,
            "acceptance_by_position": by_position,
            "stuck": still,
            "starts": parts[0].info["state"]["starts"],
        }
        note = stuck_note(still, self.num_chains, draws.prompts)
        if note:
            log.warning("%s: %s", self.name, note)
        coverage = str(parts[0].info["coverage"])
        if coverage:
            tell_coverage(self.name, coverage)
            info["coverage"] = coverage
            info["chain_notes"] = (*info["chain_notes"], coverage)
        normalizers = _normalizers(parts, draws.num_contexts)
        if normalizers and isinstance(self.kernel, Restart) and self._replicas == 1:
            info["certificate"], why = _certificate(parts, normalizers[-1])
            info["chain_notes"] = (*info["chain_notes"], *why)
        return Chains(draws, normalizers, self.guarantee, info)

    def live(self, parts: Sequence[Part]) -> dict[str, str]:
        by_kernel, _ = Tally.rates([p.info["tally"] for p in parts])
        accepted = {f"accepted ({name})": f"{float(rate.mean()):.0%}" for name, rate in by_kernel.items()}
        shown = {"draws": f"{sum(len(p.draws) for p in parts):,}", **accepted, **_lowest_ess(parts)}
        log_phi = torch.cat([p.info["log_phi"] for p in parts])
        if len(log_phi):
            first = log_phi.chunk(parts[0].draws.num_contexts, 1)[0].flatten()
            shown["log Ẑ"] = f"{float(torch.logsumexp(first, 0)) - math.log(len(first)):.3f}"
        return shown

    def _check(self, target: Target) -> None:
        for name, least in (("num_chains", 1), ("num_steps", 1), ("warmup", 0), ("thin", 1), ("max_tries", 1)):
            value = getattr(self, name)
            if value < least:
                raise ModelError(f"{type(self).__name__}: got {name}={value}, expected at least {least}")
        if not isinstance(self.kernel, Kernel):
            raise ModelError(
                f"{type(self).__name__}: got kernel={self.kernel!r}, expected a kernel such as SuffixResample(), an "
                "instance"
            )
        self.kernel.check(target)

    def _shard(self, target: Target, number: int, steps: int, warmup: int, seed: int) -> ChainShard:
        contexts = tuple(range(target.form.num_contexts))
        base = make_shard(target, number, steps * self.num_chains, seed, contexts)
        return ChainShard(base.id, base.num_draws, base.seed, base.contexts, base.batch_size, steps, warmup)

    def _kept(self, draws: Draws, step: int, shard: int) -> Draws:
        number = torch.arange(len(draws)) % self.num_chains
        columns = {
            "chain": number,
            "step": torch.full_like(number, step),
            "shard": torch.full_like(number, shard),
        }
        return draws.with_columns(columns=columns)


def _lowest_ess(parts: Sequence[Part]) -> dict[str, str]:
    """The bulk ESS of log π0 in the context where it is lowest; nothing while the chains are too short to tell."""
    contexts = parts[0].draws.num_contexts
    log_prior = [p.draws.log_prior for p in parts]
    steps = [x.double().view(-1, *_chains_of(p)) for x, p in zip(log_prior, parts, strict=True) if x is not None]
    by_context = torch.cat(steps).permute(1, 2, 0)
    if by_context.shape[2] < MIN_STEPS:
        return {}
    found = [bulk_ess(by_context[c]).value for c in range(contexts)]
    return {} if any(map(math.isnan, found)) else {"lowest ESS": f"{min(found):,.0f}"}


def _chains_of(part: Part) -> tuple[int, int]:
    """Contexts, and chains of each."""
    contexts = part.draws.num_contexts
    return contexts, int(part.draws.columns["chain"].max()) + 1


def _prior_evidence(kernel: Kernel, info: StepInfo) -> list[Tensor]:
    """log φ (B,) of independent draws of the prior, where the step proposed such."""
    if info.kernel != Restart.name or any(k.proposal is not None for k in _restarts(kernel)):
        return []
    return [info.log_phi]


def _restarts(kernel: Kernel) -> list[Restart]:
    """Every restart among the kernels that a mixture, or a mixture of mixtures, may step with."""
    if isinstance(kernel, Mixture):
        return [restart for part in kernel.kernels for restart in _restarts(part)]
    return [kernel] if isinstance(kernel, Restart) else []


def _normalizers(parts: Sequence[Part], num_contexts: int) -> tuple[Estimate, ...]:
    """log Ẑ from the restarts' proposals; with a bound, also with the interval that holds at every N."""
    log_phi = torch.cat([p.info["log_phi"] for p in parts])
    if len(log_phi) == 0:
        return ()
    columns = [log_phi[:, rows].flatten() for rows in torch.arange(log_phi.shape[1]).chunk(num_contexts)]
    log_bound = float(parts[0].info["log_upper"])
    delta = stack([log_mean_weight(w, LEVEL) for w in columns])
    if math.isfinite(log_bound) and len(columns[0]) > 1:
        return delta, stack([log_mean_weight_bounded(w, log_bound, LEVEL) for w in columns])
    return (delta,)


def _certificate(parts: Sequence[Part], normalizer: Estimate) -> tuple[Tensor, tuple[str, ...]]:
    """(C,) (1 − Z/M)^n after all n steps, with Z at the lower end of its interval: 1 where that is 0.

    nan where M is infinite; the note then names the factors that declare no bound.
    """
    assert normalizer.interval is not None
    unbounded = parts[0].info["unbounded"]
    if unbounded:
        names = ", ".join(map(repr, unbounded))
        return torch.full_like(normalizer.interval[:, 0], math.nan), (
            f"no certificate: factor{'s' * (len(unbounded) > 1)} {names} declares no bound; pass upper=...",
        )
    steps = sum(int(p.info["steps"]) for p in parts)
    share = torch.exp(normalizer.interval[:, 0] - float(parts[0].info["log_upper"])).clamp_max(1.0)
    return torch.exp(steps * torch.log1p(-share)), ()


def _figures(number: int, shard: ChainShard, info: StepInfo) -> dict[str, str]:
    moved = info.accepted[info.position >= 0]
    rate = f"{float(moved.double().mean()):.0%}" if len(moved) else "—"
    phase = "warm-up" if number < shard.warmup else "step"
    return {phase: f"{number + 1}", f"accepted ({info.kernel})": rate}


def _plain(draws: Draws) -> dict[str, Any]:
    """The rows as plain tensors: what the next segment starts from."""
    return {
        "ids": draws.ids,
        "lengths": draws.lengths,
        "finished": draws.finished,
        "context": draws.context,
        "log_prior": draws.log_prior,
        "features": dict(draws.features),
        "log_factors": dict(draws.log_factors),
    }


def _restored(state: Mapping[str, Any], target: Target) -> Draws:
    return Draws(
        state["ids"], state["lengths"], state["finished"], state["context"], target.contexts, target.prior.decode,
        log_prior=state["log_prior"], features=dict(state["features"]), log_factors=dict(state["log_factors"]),
    )  # fmt: skip
