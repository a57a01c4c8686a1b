"""Rejection sampling from the prior: exact, independent draws of π*, as long as the evidence has an upper bound."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmppl.diagnostics.intervals import binomial_upper
from lmppl.diagnostics.normalizers import log_acceptance
from lmppl.errors import InfeasibleModel, ModelError
from lmppl.inference.approximation import LEVEL, Sampler
from lmppl.inference.engine import Engine, Guarantee, Part, Request, Shard
from lmppl.inference.proposal_rounds import ProposalShard, ending, next_round, shortfall, tally
from lmppl.inference.proposals import check_bounds, draw_from, propose
from lmppl.inference.refusals import first_context, z_below
from lmppl.lm.randomness import Source
from lmppl.modeling.target import Target, TargetForm, log_evidence
from lmppl.sequences import Draws, concatenate

__all__ = ["Rejection", "accepts", "log_acceptance_probability"]

log = logging.getLogger(__name__)

MANY_PROPOSALS = 100_000  # per context, beyond which a run announces its length


def log_acceptance_probability(log_phi: Tensor, log_bound: float) -> Tensor:
    """(N,) log Pr(accept x) = Σ_k log φ_k(x) − log M, in nats: at most 0 where M ≥ sup φ, −inf where φ = 0.

    π0(x)·Pr(accept x) = γ(x)/M, so that an accepted draw has the law π* and Pr(accept) = Z/M.
    """
    return log_phi.double() - log_bound


def accepts(log_probability: Tensor, uniforms: Tensor) -> Tensor:
    """(N,) bool: u < Pr(accept), with u uniform in [0, 1), drawn without a look at the text."""
    return uniforms < log_probability.exp()


@dataclass(frozen=True)
class Rejection(Engine):
    """Propose x from the prior and accept it with probability φ(x)/M, M ≥ sup φ: accepted draws have the law π*.

    The acceptance rate is Z/M, so that log Ẑ = log M + log p̂. A run for `num_draws` ends, for each context, at its
    `num_draws`-th acceptance: later proposals are cut off, so that N does not depend on how shards were cut, p̂ =
    (k−1)/(N−1) is unbiased, and the Clopper–Pearson interval holds (`lmppl.diagnostics.log_acceptance` says why). At
    the cap `max_tries` N is fixed, and p̂ = k/N. Costs M/Z proposals a draw: with several rewards or a rare
    constraint that grows exponentially, and an engine that steers (SMC) is due.

    Parameters
    ----------
    num_draws : int
        Accepted draws per context, where `infer` is not told.
    log_upper : float, optional
        log M, a bound on Σ_k log φ_k in nats; by default Σ_k of the bounds that the factors declare. A draw above it
        is an error, never clipped, but a bound that is too low and never exceeded by a draw goes unseen.
    max_tries : int
        Proposals per context at most. A context that has some draws by then keeps them (`info["shortfall"]` names
        it); one that has none raises.
    batch : int
        Proposals of one shard at most, all contexts together: the grain of progress, budgets and Ctrl-C. Contexts
        that are done are left out of later shards.

    Raises
    ------
    UnsupportedModel
        Where a factor declares no finite bound and `log_upper` is not given.
    FactorError
        Where a draw exceeds a bound.
    InfeasibleModel
        Where a context has no accepted draw; with the upper confidence bound on Z that follows.

    Notes
    -----
    `info`: `proposals`, `accepted`, `acceptance_rate` (C,), `log_upper`, `factor_acceptance` (the share of proposals
    that each factor alone would accept, (C,) by name), `shortfall`. The draws carry columns `shard` and `proposal`
    (the number of the proposal within its shard and context). A run that ends on a budget or on Ctrl-C has an N that
    was not fixed in advance, which the note of `log_normalizer` says.

    References
    ----------
    vonneumann1951, clopper1934, girshick1946
    """

    num_draws: int = 1000
    log_upper: float | None = field(default=None, kw_only=True)
    max_tries: int = field(default=1_000_000, kw_only=True)
    batch: int = field(default=1024, kw_only=True)

    name: ClassVar[str] = "rejection"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    surplus: ClassVar[bool] = True
    references: ClassVar[tuple[str, ...]] = ("vonneumann1951", "clopper1934", "girshick1946")

    def unsupported_reason(self, form: TargetForm) -> str | None:
        if form.unbounded and self.log_upper is None:
            names = ", ".join(repr(n) for n in form.unbounded)
            subject = f"factor {names} declares" if len(form.unbounded) == 1 else f"factors {names} declare"
            return (
                f"rejection needs an upper bound: {subject} none; pass upper=... to it where it takes one, or "
                "Rejection(log_upper=...), a bound on the sum of all log-factors"
            )
        return super().unsupported_reason(form)

    def plan(self, target: Target, request: Request) -> list[Shard]:
        for name in ("max_tries", "batch"):
            if getattr(self, name) < 1:
                raise ModelError(f"Rejection: got {name}={getattr(self, name)}, expected at least 1")
        if self.log_upper is not None and not math.isfinite(self.log_upper):
            raise ModelError(f"Rejection: got log_upper={self.log_upper}, expected a finite number of nats")
        zeros = torch.zeros(target.form.num_contexts, dtype=torch.int64)
        return self._next(target, 0, request.seed, self.wanted(request), zeros, zeros)

    def replan(self, target: Target, request: Request, parts: Sequence[Part]) -> list[Shard]:
        last, contexts = _shard(parts[-1]), target.form.num_contexts
        tried, accepted = tally(parts, contexts)
        if last.wanted is not None:
            lately = tally(parts[-1:], contexts)
            before = 0.0 if len(parts) == 1 else _proposals_needed(last.wanted, tried - lately[0], accepted - lately[1])
            if before <= MANY_PROPOSALS < _proposals_needed(last.wanted, tried, accepted):
                engine = "smc" if target.form.incremental else "importance"  # a form steers particles
                _announce(last.wanted, tried, accepted, float(parts[0].info["log_upper"]), engine)
        return self._next(target, last.id + 1, last.seed, last.wanted, tried, accepted)

    def _next(
        self, target: Target, number: int, seed: int, wanted: int | None, tried: Tensor, accepted: Tensor
    ) -> list[Shard]:
        shard = next_round(target, number, seed, wanted, tried, accepted, batch=self.batch, max_tries=self.max_tries)
        return [] if shard is None else [shard]

    def simulate(self, target: Target, shard: Shard, source: Source, *, state: Any = None) -> Part:
        """Propose and accept, one shard."""
        context = torch.tensor(shard.contexts, dtype=torch.int64).repeat_interleave(shard.num_draws)
        if source.walked:
            proposals = target.evaluate(draw_from(target.prior, context, source, cost=target.cost))
            log_probability = self._log_probability(target, proposals)
            accepted = source.accept(log_probability)
        else:  # the same law from numbers that are all drawn ahead, which is what the decode loop takes
            uniforms = source.uniforms(len(context))
            drawn = propose(target.prior, shard, shard.num_draws, source=source, cost=target.cost)
            proposals = target.evaluate(drawn)
            log_probability = self._log_probability(target, proposals)
            accepted = accepts(log_probability, uniforms)
        chosen = torch.nonzero(accepted).squeeze(1)
        draws = proposals.select(chosen)
        columns = {"shard": torch.full_like(chosen, shard.id), "proposal": chosen % shard.num_draws}
        count = torch.bincount(draws.context.cpu(), minlength=target.form.num_contexts)
        info = {"log_upper": self._log_bound(target), "accepted": count, "passed": _passed(target, proposals)}
        # Accepted draws are equally weighted, and log π* is known only up to log Z.
        return Part(shard, draws.with_columns(log_weight=None, log_q=None, columns=columns), info=info)

    def _log_bound(self, target: Target) -> float:
        return target.form.log_upper if self.log_upper is None else self.log_upper

    def _log_probability(self, target: Target, proposals: Draws) -> Tensor:
        check_bounds(proposals, target.factors, self.log_upper)
        return log_acceptance_probability(log_evidence(proposals), self._log_bound(target))

    def merge(self, parts: Sequence[Part]) -> Sampler:
        log_bound, wanted = float(parts[0].info["log_upper"]), _shard(parts[0]).wanted
        whole = concatenate([p.draws for p in parts])
        offered, _ = tally(parts, whole.num_contexts)
        end = ending(whole, parts, wanted)
        passed = {name: sum(p.info["passed"][name] for p in parts) / offered for name in parts[0].info["passed"]}
        self._refuse_empty(whole.prompts, end.tried, end.accepted, log_bound, passed)
        info: dict[str, Any] = {
            "proposals": end.tried,
            "accepted": end.accepted,
            "acceptance_rate": end.accepted / end.tried,
            "log_upper": log_bound,
            "factor_acceptance": passed,
        }
        if wanted is not None and not bool(end.stopped.all()):
            advice = "raise max_tries or loosen the evidence"
            info["shortfall"] = shortfall(self.name, whole.prompts, end, wanted, self.max_tries, advice)
        estimate = log_acceptance(end.accepted, end.tried, log_bound, stopped=end.stopped, level=LEVEL)
        if bool((~end.stopped & (end.tried < self.max_tries)).any()):
            estimate = replace(estimate, note=f"{estimate.note}; ended by a budget or an interrupt, so N was not fixed")
        return Sampler(end.draws, (estimate,), self.guarantee, info)

    def live(self, parts: Sequence[Part]) -> dict[str, str]:
        tried, accepted = tally(parts, parts[0].draws.num_contexts)
        rate = float(accepted.sum() / tried.sum())
        log_z = float((accepted[0] / tried[0]).log()) + float(parts[0].info["log_upper"])
        shown = {"draws": f"{int(accepted.sum()):,}", "tried": f"{int(tried.sum()):,}", "acceptance": f"{rate:.2%}"}
        return {**shown, "log Ẑ": f"{log_z:.3f}"}

    def _refuse_empty(
        self,
        prompts: Sequence[str],
        tried: Tensor,
        accepted: Tensor,
        log_bound: float,
        passed: Mapping[str, Tensor],
    ) -> None:
        """Raise where a context has no accepted draw."""
        found = first_context(accepted == 0)
        if found is None:
            return
        c, also = found
        bound = z_below(float(binomial_upper(accepted[c], tried[c], LEVEL)), log_bound)
        blame = "no factor is to blame, so log_upper is far too high"
        if passed:
            worst = min(passed, key=lambda name: float(passed[name][c]))
            blame = f"factor {worst!r} rejected most (alone it accepts {float(passed[worst][c]):.2%}); loosen it"
        raise InfeasibleModel(
            f"rejection: 0 of {int(tried[c]):,} draws accepted for context {prompts[c]!r}{also}: {bound} with "
            f"{LEVEL:.0%} confidence; {blame}, raise max_tries, or use an engine that steers the draws"
        )


def _shard(part: Part) -> ProposalShard:
    if not isinstance(part.shard, ProposalShard):
        raise ModelError(f"rejection: got a {type(part.shard).__name__}, expected shards planned by Rejection")
    return part.shard


def _proposals_needed(wanted: int, tried: Tensor, accepted: Tensor) -> float:
    """Proposals that `wanted` draws of the slowest context will have taken, at the acceptance rate so far.

    Where none was accepted yet it is what they take at least: fewer than one in as many as were tried is accepted.
    """
    return wanted * float((tried / accepted.clamp_min(1)).max())


def _announce(wanted: int, tried: Tensor, accepted: Tensor, log_bound: float, engine: str) -> None:
    """Say how long the run will be."""
    c = int((tried / accepted.clamp_min(1)).argmax())
    needed = _proposals_needed(wanted, tried, accepted)
    seen = int(accepted[c]) > 0
    log.warning(
        "rejection: %s 1 in %s proposals is accepted (%s of %s so far), so that %s draws need %s %s proposals; "
        "%sfewer draws, or the engine '%s' takes less",
        "about" if seen else "fewer than",
        f"{needed / wanted:,.0f}",
        f"{int(accepted[c]):,}" if seen else "none",
        f"{int(tried[c]):,}",
        f"{wanted:,}",
        "some" if seen else "more than",
        f"{needed:,.0f}",
        "a tighter upper=, " if log_bound != 0.0 else "",
        engine,
    )


def _passed(target: Target, proposals: Draws) -> dict[str, Tensor]:
    """(C,) Σ over proposals of the probability that each factor alone accepts: φ_k over its bound, else 1[φ_k > 0]."""
    context = proposals.context.cpu()
    result = {}
    for factor in target.factors:
        value = proposals.log_factors[factor.name].cpu()
        share = (value > -math.inf).double() if math.isinf(factor.upper) else torch.exp(value - factor.upper)
        result[factor.name] = torch.zeros(target.form.num_contexts, dtype=torch.float64).index_add_(0, context, share)
    return result
