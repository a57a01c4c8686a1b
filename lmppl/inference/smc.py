"""Sequential Monte Carlo: particles that are extended token by token, weighted by a twist, and resampled."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmppl.diagnostics.intervals import binomial_upper
from lmppl.diagnostics.normalizers import log_mean_sweeps, stack
from lmppl.diagnostics.weights import KHAT_LIMIT, TailShape, effective_sample_size, pareto_khat
from lmppl.errors import InfeasibleModel, ModelError
from lmppl.inference.approximation import LEVEL, Approximation, Particles
from lmppl.inference.coverage import coverage_note, tell_coverage, with_coverage
from lmppl.inference.engine import Engine, Guarantee, Part, Request, Shard
from lmppl.inference.genealogy import distinct_ancestors
from lmppl.inference.proposals import as_proposal
from lmppl.inference.resampling import RESAMPLING, effective_sizes
from lmppl.inference.step_proposals import LanguageModelProposal, OptimalProposal, PriorProposal, StepProposal
from lmppl.inference.sweep import BOUNDARIES, Retained, Schedule, Sweep, SweepResult
from lmppl.inference.twists.exclusions import steering_factors, try_exclusions
from lmppl.inference.twists.product import FactorTwist, ProductTwist
from lmppl.lm.base import LanguageModel
from lmppl.lm.randomness import Source
from lmppl.modeling.evidence.constraint import Constraint
from lmppl.modeling.factors import Factor, Incremental, missing_members
from lmppl.modeling.target import Target
from lmppl.sequences import Estimate, concatenate

__all__ = ["SMC"]


@dataclass(frozen=True)
class SMC(Engine):
    """Extend N particles token by token, weight each step, and resample where the weights have grown unequal.

    A token x_t of q_t has the weight

        π0(x_t|x_<t) ψ(x_≤t) / (q_t(x_t|x_<t) ψ(x_<t)).

    ψ(∅) is the first weight; when a row ends ψ is replaced by φ = ∏ φ_k, so that its whole product is γ/q; ended
    particles add 0 and stay in the pool. Ẑ, the product of the steps' mean weights, is unbiased for Z for every twist
    that is positive wherever γ can still become positive, every proposal that covers, and each of the resampling
    schemes, triggered by ESS or not.

    A run is several independent *sweeps* of N particles. Their Ẑ are averaged, and their spread is the error: an ESS
    near N after resampling says nothing. Particles of one sweep depend on each other.

    Rows that a twist or a proposal gives weight zero before their end are read no further. If some are left when a
    sweep is over, a last resampling replaces them.

    Parameters
    ----------
    num_particles : int
        N, per context and sweep.
    ess_threshold : float
        Resample a context when ESS < `ess_threshold`·N, in [0, 1]: 0 never (but for rows that died), 1 whenever the
        weights differ.
    resampling : {"systematic", "stratified", "multinomial", "residual", "ssp"}
    twist : Incremental, optional
        ψ. None: the product of the incremental forms of the factors that have one; the other factors enter at the end
        of a row. A twist of yours stands alone; `ProductTwist(FactorTwist.of(model), mine)` keeps the forms.
    proposal : str, LanguageModel, Approximation or StepProposal, optional
        q_t. "prior" (bootstrap); "optimal", ∝ π0·e^{weigh}, where the twist weighs all V next tokens; another LM on the
        same tokens, or an approximation that is one; or an object with `start` (see `StepProposal`). None: "optimal"
        where there is a twist that reads no text, since it then weighs all tokens in one tensor operation; "prior"
        otherwise.
    num_sweeps : int
        Sweeps where `infer` is not told a number of draws; of n draws it makes ⌈n/N⌉ sweeps.
    every : int, {"word", "sentence"}, or compiled pattern
        Resample (if ESS is low) after so many tokens, or when each row has come to the end of its next word or
        sentence, or to the next match of the pattern in its text. Rows that are there wait for the others, and are read
        anew, prefix and all, when they go on.

    Raises
    ------
    InfeasibleModel
        Where all particles of a context died in every sweep: which factor did it, when, and what follows about Z.
    FactorError
        Where an incremental form breaks its law, naming the factor. What a form excludes is never seen in a sweep, so
        16 rows of the first one are given an excluded token each (`lmppl.inference.twists.exclusions`).
    ModelError
        On wrong arguments; where a proposal cannot make a token that π* can, or a twist is 0 where γ > 0.

    Notes
    -----
    `log_normalizer`: log of the mean of Ẑ over sweeps, by the delta method with Student's t; no interval for one
    sweep. `info`: `log_z_sweeps` (C, S); `ess` (C,), of the final weights of all sweeps together; `khat` (C,) of the
    weights of all sweeps before resampling, at the round where they are worst; `distinct_ancestors` (C, S), particles
    of the first round that have descendants at the end; `resamplings` (C, S); `ess_history` (C, S, R), nan after the
    end of a sweep; `ancestors`, for each sweep (R, C, N) int32 (see `lmppl.inference.genealogy`); `zero_sweeps` (C,).
    A proposal that is known not to cover, or declared truncated, is warned about and named in `coverage`; log Ẑ is then
    a lower bound. Draws carry columns `sweep`, `shard` and `parent`.

    References
    ----------
    `gordon1993` (bootstrap), `kitagawa1996`, `liu1998`, `carpenter1999`, `gerber2019` (resampling), `doucet2000` (the
    optimal proposal, resampling by ESS), `delmoral2004` (Ẑ), `naesseth2019` (twists), `lew2023`, `zhao2024` (on LMs).
    """

    num_particles: int = 64
    ess_threshold: float = 0.5
    resampling: str = "systematic"
    twist: Incremental | None = field(default=None, repr=False, kw_only=True)
    proposal: LanguageModel | Approximation | StepProposal | str | None = field(default=None, repr=False, kw_only=True)
    num_sweeps: int = field(default=8, kw_only=True)
    every: int | str | re.Pattern[str] = field(default=1, kw_only=True)

    name: ClassVar[str] = "smc"
    guarantee: ClassVar[Guarantee] = Guarantee.CONSISTENT
    references: ClassVar[tuple[str, ...]] = (
        "gordon1993", "kitagawa1996", "liu1998", "carpenter1999", "doucet2000", "delmoral2004", "naesseth2019",
        "gerber2019", "lew2023", "zhao2024",
    )  # fmt: skip

    @property
    def default_draws(self) -> int:
        """N draws of each of the sweeps."""
        return self.num_particles * self.num_sweeps

    def plan(self, target: Target, request: Request) -> list[Shard]:
        """One shard a sweep."""
        self.check(target)
        wanted = self.wanted(request)
        sweeps = 1 if wanted is None else -(-wanted // self.num_particles)
        contexts = tuple(range(target.form.num_contexts))
        rows = self.num_particles * len(contexts)
        return [Shard(i, self.num_particles, request.seed, contexts, rows) for i in range(sweeps)]

    def check(self, target: Target) -> None:
        """Raise `ModelError` where a field is wrong, or the twist or the proposal does not fit the target."""
        for name in ("num_particles", "num_sweeps"):
            if getattr(self, name) < 1:
                raise ModelError(f"SMC: got {name}={getattr(self, name)}, expected at least 1")
        if not 0.0 <= self.ess_threshold <= 1.0:
            raise ModelError(f"SMC: got ess_threshold={self.ess_threshold}, expected a share of N in [0, 1]")
        if self.resampling not in RESAMPLING:
            close = difflib.get_close_matches(self.resampling, RESAMPLING, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ModelError(
                f"SMC: no resampling is called {self.resampling!r}{hint}; there are {', '.join(RESAMPLING)}"
            )
        every = self.every
        good = every in BOUNDARIES if isinstance(every, str) else isinstance(every, re.Pattern)
        good |= type(every) is int and every >= 1
        if not good:
            raise ModelError(
                f"SMC: got every={every!r}, expected a number of tokens of at least 1, one of "
                f"{', '.join(map(repr, BOUNDARIES))}, or a compiled pattern such as re.compile(',')"
            )
        self.twist_of(target)
        refuse = getattr(self.twist, "unsupported_reason", None)  # a learned twist belongs to one LM
        reason = None if refuse is None else refuse(target.prior)
        if reason is not None:
            raise ModelError(f"SMC: {reason}")
        self.step_proposal(target)

    def simulate(self, target: Target, shard: Shard, source: Source, *, state: Any = None) -> Part:
        """One sweep of every context."""
        result = self.sweep(target, torch.tensor(shard.contexts), source)
        if shard.id == 0:
            try_exclusions(target, self._steering(target), result.draws, shard.seed)
        number = torch.full_like(result.draws.context, shard.id)
        columns = {"sweep": number, "shard": number, **result.draws.columns}
        info = {**result.info, "log_z": result.log_z, **self._facts(target)}
        return Part(shard, result.draws.with_columns(columns=columns), info=info)

    def sweep(
        self, target: Target, context: Tensor, source: Source, *, retained: Retained | None = None
    ) -> SweepResult:
        """One sweep of N particles for each entry of `context` (G,), by choices of `source`; see `Sweep`."""
        schedule = Schedule(self.num_particles, self.ess_threshold, self.resampling, self.every)
        twist, proposal = self.twist_of(target), self.step_proposal(target)
        return Sweep(target, context, schedule, twist, proposal, source, retained=retained).run()

    def twist_of(self, target: Target) -> Incremental | None:
        """ψ on this target; None where it is 1."""
        if self.twist is None:
            forms = FactorTwist(target.factors, target.prior.vocab_size)
            return forms if len(forms) else None
        missing = missing_members(self.twist)
        if missing:
            file = f"; a file of a twist is read by LearnedTwist.load({self.twist!r}, model)"
            raise ModelError(f"SMC: twist{missing}{file if isinstance(self.twist, str) else ''}")
        return None if isinstance(self.twist, ProductTwist) and len(self.twist) == 0 else self.twist

    def step_proposal(self, target: Target) -> StepProposal:
        """q_t on this target."""
        given, twist = self.proposal, self.twist_of(target)
        if given is None:
            given = "optimal" if twist is not None and "text" not in twist.needs else "prior"
        if isinstance(given, str):
            if given not in ("prior", "optimal"):
                raise ModelError(f"SMC: got proposal={given!r}, expected 'prior', 'optimal', a language model or a "
                                 "step proposal")  # fmt: skip
            return OptimalProposal() if given == "optimal" and twist is not None else PriorProposal()
        if isinstance(given, LanguageModel | Approximation):
            lm = as_proposal(given, target.prior)
            return PriorProposal() if lm is target.prior else LanguageModelProposal(lm)
        if isinstance(given, type | Incremental) or not isinstance(given, StepProposal):
            raise ModelError(
                f"SMC: got proposal={given!r}, expected 'prior', 'optimal', a language model, an approximation that is "
                "one, or a step proposal"
            )
        return given

    def _steering(self, target: Target) -> list[Factor]:
        """The factors whose own forms say which tokens get weight zero."""
        twist, proposal = self.twist_of(target), self.step_proposal(target)
        products = [twist, *(twist.twists if isinstance(twist, ProductTwist) else ())]
        names = {name for t in products if isinstance(t, FactorTwist) for name in t.names}
        guides = steering_factors(target, proposal.lm) if isinstance(proposal, LanguageModelProposal) else []
        return [f for f in target.factors if f.name in names or f in guides]

    def merge(self, parts: Sequence[Part]) -> Particles:
        """Weights stay on one scale: the mean of w over the draws of a context is the mean of Ẑ over the sweeps."""
        draws = concatenate([p.draws for p in parts])
        log_z = torch.stack([p.info["log_z"] for p in parts], -1)
        self._refuse_all_dead(draws.prompts, log_z, parts)
        shapes = [_worst_shape(parts, c) for c in range(len(log_z))]
        estimate = stack([log_mean_sweeps(z, LEVEL) for z in log_z])
        heavy = [f"k̂ = {s.value:.2f} in context {c}" for c, s in enumerate(shapes) if s.value > KHAT_LIMIT]
        if heavy:
            note = f"the weights before resampling are heavy-tailed: {', '.join(heavy)}, above {KHAT_LIMIT}"
            estimate = _noted(estimate, note)
        coverage = str(parts[0].info["coverage"])
        tell_coverage(self.name, coverage)
        order = torch.argsort(draws.context, stable=True)
        draws = draws.select(order)
        assert draws.log_weight is not None
        weights = [draws.log_weight[draws.context == c] for c in range(len(log_z))]
        info: dict[str, Any] = {
            "log_z_sweeps": log_z,
            "ess": torch.stack([effective_sample_size(w) for w in weights]),
            "khat": torch.tensor([s.value for s in shapes], dtype=torch.float64),
            "khat_note": tuple(s.note for s in shapes),
            "distinct_ancestors": torch.stack([distinct_ancestors(p.info["ancestors"])[0] for p in parts], -1),
            "resamplings": torch.stack([p.info["resampled"].sum(0) for p in parts], -1),
            "zero_sweeps": (log_z == -math.inf).sum(-1),
            "ess_history": _padded([p.info["ess"] for p in parts]),
            "ancestors": tuple(p.info["ancestors"] for p in parts),
        }
        if coverage:
            info["coverage"] = coverage
        return Particles(draws, with_coverage((estimate,), coverage), self.guarantee, info)

    def live(self, parts: Sequence[Part]) -> dict[str, str]:
        log_z = torch.stack([p.info["log_z"] for p in parts], -1)[0]
        shown = {"sweeps": f"{len(parts)}", "log Ẑ": f"{float(torch.logsumexp(log_z, 0)) - math.log(len(log_z)):.3f}"}
        left = distinct_ancestors(parts[-1].info["ancestors"])[0].min()
        return {**shown, "ancestors": f"{int(left)}/{self.num_particles}"}

    def _facts(self, target: Target) -> dict[str, Any]:
        """What `merge` must know of the target: its factors, bounds on the weights, whether q may not cover."""
        twist, proposal = self.twist_of(target), self.step_proposal(target)
        forms = [f for f in target.factors if f.incremental is not None] if self.twist is None else []
        hard = all(isinstance(f, Constraint) for f in forms) and (self.twist is None or twist is None)
        coverage = ""
        if isinstance(proposal, LanguageModelProposal):
            coverage = coverage_note(proposal.lm, target.prior)
        ask = getattr(self.twist, "shortcoming", None)
        coverage = "; ".join(note for note in (coverage, "" if ask is None else ask(target.model)) if note)
        return {
            "factors": [f.name for f in target.factors],
            "log_upper": target.form.log_upper,
            "from_prior": isinstance(proposal, PriorProposal),
            "at_most_one": hard
            and isinstance(proposal, PriorProposal | OptimalProposal)
            and target.form.log_upper <= 0.0,
            "coverage": coverage,
        }

    def _refuse_all_dead(self, prompts: Sequence[str], log_z: Tensor, parts: Sequence[Part]) -> None:
        """Raise where every sweep of a context has Ẑ = 0."""
        empty = torch.nonzero((log_z == -math.inf).all(-1)).squeeze(1).tolist()
        if not empty:
            return
        c, also = empty[0], f" (and for {len(empty) - 1} more)" if len(empty) > 1 else ""
        deaths = torch.stack([p.info["deaths"][c] for p in parts]).sum(0)
        names = [f"factor {n!r}" for n in parts[0].info["factors"]] + ["the twist, or a zero of the proposal's weight,"]
        worst = int(deaths.argmax())
        shares = ", ".join(f"{n.rstrip(',')} {int(k):,}" for n, k in zip(names, deaths, strict=True) if k > 0)
        sweeps = "its only sweep" if len(parts) == 1 else f"each of {len(parts)} sweeps"
        last = max(int(p.info["dead_at"][c]) for p in parts)
        raise InfeasibleModel(
            f"smc: all {self.num_particles} particles died in {sweeps} for context {prompts[c]!r}{also}, the last of "
            f"them at token {last}: {names[worst]} gave most of them weight zero (deaths, of those too that replaced "
            f"others: {shares}); {self._bound(parts, c)}; use more particles, give the factor an incremental form or "
            "an automaton, a twist or a proposal that looks ahead, or loosen it"
        )

    def _bound(self, parts: Sequence[Part], context: int) -> str:
        """What follows about Z when nothing survived."""
        facts: Mapping[str, Any] = parts[0].info
        resampled = any(bool(p.info["resampled"][:, context].any()) for p in parts)
        log_upper = float(facts["log_upper"])

        def at_most(trials: int) -> float:
            return float(binomial_upper(torch.tensor(0), torch.tensor(trials), LEVEL))

        if facts["from_prior"] and not resampled:  # then they were independent draws of π0
            rate = at_most(self.num_particles * len(parts))
            if math.isfinite(log_upper):
                return (
                    f"Z < {rate:.1e}"
                    + (f"·M, log M = {log_upper:.4g}," if log_upper else "")
                    + f" with {LEVEL:.0%} confidence"
                )
            return (
                f"Pr_π0(γ > 0) < {rate:.1e} with {LEVEL:.0%} confidence, and Z has no bound without upper=... on every "
                "factor"
            )
        rate = at_most(len(parts))
        if facts["at_most_one"]:
            return f"Ẑ ≤ 1 is unbiased, so that Z ≤ Pr(Ẑ > 0) < {rate:.2g} with {LEVEL:.0%} confidence"
        return (
            f"Pr(Ẑ > 0) < {rate:.2g} with {LEVEL:.0%} confidence, and no bound on Z follows, because Ẑ itself has none"
        )


def _noted(estimate: Estimate, note: str) -> Estimate:
    return replace(estimate, note=f"{estimate.note}; {note}") if note else estimate


def _padded(histories: Sequence[Tensor]) -> Tensor:
    """(C, S, R) from S histories (R_s, C); nan after the end of a sweep."""
    longest = max(len(h) for h in histories)
    padded = [torch.nn.functional.pad(h, (0, 0, 0, longest - len(h)), value=math.nan) for h in histories]
    return torch.stack(padded).permute(2, 0, 1)


def _worst_shape(parts: Sequence[Part], context: int) -> TailShape:
    """k̂ of the weights of all sweeps before resampling, at the round where their common ESS is lowest."""
    histories = [p.info["log_weights"][:, context] for p in parts]
    rounds = max(len(h) for h in histories)
    weights = torch.cat([h[torch.arange(rounds).clamp_max(len(h) - 1)] for h in histories], 1)
    sizes = effective_sizes(weights)
    alive = sizes > 0
    if not bool(alive.any()):
        return TailShape(math.nan, "k̂ undefined: all weights are zero")
    lowest = alive & (sizes <= sizes[alive].min() + 1e-9)
    return pareto_khat(weights[int(lowest.int().argmax())])
