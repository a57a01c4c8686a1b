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
from lmppl.inference.engine import Engine, Guarantee, Part, Request, Shard, make_shard, shard_generator
from lmppl.inference.proposals import check_bounds, propose
from lmppl.modeling.target import Target, TargetForm, log_evidence
from lmppl.sequences import Draws, concatenate

__all__ = ["Rejection", "RejectionShard", "accepts", "log_acceptance_probability"]

log = logging.getLogger(__name__)

SAFETY = 1.2  # proposals of the next shard, over what the acceptance rate so far asks for
MANY_PROPOSALS = 100_000  # per context, beyond which a run announces its length


@dataclass(frozen=True)
class RejectionShard(Shard):
    """A shard of proposals; the run is met at `wanted` accepted draws per context (None: a budget ends it)."""

    wanted: int | None = None


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
                f"rejection needs an upper bound: {subject} none; pass upper=... to it, or Rejection(log_upper=...), a "
                "bound on the sum of all log-factors"
            )
        return super().unsupported_reason(form)

    def plan(self, target: Target, request: Request) -> list[Shard]:
        if self.max_tries < 1 or self.batch < 1:
            raise ModelError(f"Rejection: got max_tries={self.max_tries}, batch={self.batch}, expected at least 1")
        if self.log_upper is not None and not math.isfinite(self.log_upper):
            raise ModelError(f"Rejection: got log_upper={self.log_upper}, expected a finite number of nats")
        zeros = torch.zeros(target.form.num_contexts, dtype=torch.int64)
        return self._next(target, 0, request.seed, self.wanted(request), zeros, zeros)

    def replan(self, target: Target, request: Request, parts: Sequence[Part]) -> list[Shard]:
        last = _shard(parts[-1])
        tried, accepted = _tally(parts)
        if last.wanted is not None:
            before = 0.0 if len(parts) == 1 else _proposals_needed(last.wanted, *_tally(parts[:-1]))
            now = _proposals_needed(last.wanted, tried, accepted)
            if before <= MANY_PROPOSALS < now:
                log.warning(
                    "rejection: about 1 in %s proposals is accepted, so that %s draws need some %s proposals; a "
                    "tighter upper=, fewer draws, or the engine 'importance' takes less",
                    *(f"{x:,.0f}" for x in (now / last.wanted, last.wanted, now)),
                )
        return self._next(target, last.id + 1, last.seed, last.wanted, tried, accepted)

    def _next(
        self, target: Target, number: int, seed: int, wanted: int | None, tried: Tensor, accepted: Tensor
    ) -> list[Shard]:
        """The shard after `tried` proposals and `accepted` draws per context; none where every context is done."""
        pending = tried < self.max_tries
        if wanted is not None:
            pending &= accepted < wanted
        contexts = tuple(torch.nonzero(pending).squeeze(1).tolist())
        if not contexts:
            return []
        size = max(1, self.batch // len(contexts))
        if wanted is not None:
            # (k+1)/(n+1) starts at 1: the first shard proposes about as often as is wanted.
            rate = (accepted[pending] + 1.0) / (tried[pending] + 1.0)
            needed = SAFETY * (wanted - accepted[pending]) / rate
            size = min(size, math.ceil(float(needed.max())))
        size = min(size, self.max_tries - int(tried[pending].max()))
        base = make_shard(target, number, size, seed, contexts)
        return [RejectionShard(base.id, base.num_draws, base.seed, base.contexts, base.batch_size, wanted)]

    def run_shard(self, target: Target, shard: Shard, *, state: Any = None) -> Part:
        generator = shard_generator(shard)
        rows = shard.num_draws * len(shard.contexts)
        uniforms = torch.rand(rows, dtype=torch.float64, generator=generator)
        proposals = propose(target.prior, shard, shard.num_draws, generator=generator, cost=target.cost)
        proposals = target.evaluate(proposals)
        check_bounds(proposals, target.factors, self.log_upper)
        log_bound = target.form.log_upper if self.log_upper is None else self.log_upper
        log_probability = log_acceptance_probability(log_evidence(proposals), log_bound)
        chosen = torch.nonzero(accepts(log_probability, uniforms)).squeeze(1)
        draws = proposals.select(chosen)
        columns = {"shard": torch.full_like(chosen, shard.id), "proposal": chosen % shard.num_draws}
        accepted = torch.bincount(draws.context.cpu(), minlength=target.form.num_contexts)
        info = {"log_upper": log_bound, "accepted": accepted, "passed": _passed(target, proposals)}
        # Accepted draws are equally weighted, and log π* is known only up to log Z.
        return Part(shard, draws.with_columns(log_weight=None, log_q=None, columns=columns), info=info)

    def merge(self, parts: Sequence[Part]) -> Sampler:
        log_bound, wanted = float(parts[0].info["log_upper"]), _shard(parts[0]).wanted
        tried, accepted = _tally(parts)
        offered = tried.clone()
        whole = concatenate([p.draws for p in parts])
        kept = []
        for c in range(len(tried)):
            rows = torch.nonzero(whole.context == c).squeeze(1)
            if wanted is not None and len(rows) >= wanted:
                rows = rows[:wanted]
                last = rows[-1]
                tried[c] = _proposals_before(parts, c, int(whole.columns["shard"][last]))
                tried[c] += int(whole.columns["proposal"][last]) + 1
                accepted[c] = wanted
            kept.append(rows)
        passed = {name: sum(p.info["passed"][name] for p in parts) / offered for name in parts[0].info["passed"]}
        self._refuse_empty(whole.prompts, tried, accepted, log_bound, passed)
        stopped = torch.zeros_like(tried, dtype=torch.bool) if wanted is None else accepted == wanted
        info: dict[str, Any] = {
            "proposals": tried,
            "accepted": accepted,
            "acceptance_rate": accepted / tried,
            "log_upper": log_bound,
            "factor_acceptance": passed,
        }
        if wanted is not None and not bool(stopped.all()):
            info["shortfall"] = self._shortfall(whole.prompts, tried, accepted, wanted)
        estimate = log_acceptance(accepted, tried, log_bound, stopped=stopped, level=LEVEL)
        if bool((~stopped & (tried < self.max_tries)).any()):
            estimate = replace(estimate, note=f"{estimate.note}; ended by a budget or an interrupt, so N was not fixed")
        return Sampler(whole.select(torch.cat(kept)), (estimate,), self.guarantee, info)

    def live(self, parts: Sequence[Part]) -> dict[str, str]:
        tried, accepted = _tally(parts)
        rate = float(accepted.sum() / tried.sum())
        return {"draws": f"{int(accepted.sum()):,}", "tried": f"{int(tried.sum()):,}", "acceptance": f"{rate:.2%}"}

    def _refuse_empty(
        self,
        prompts: Sequence[str],
        tried: Tensor,
        accepted: Tensor,
        log_bound: float,
        passed: Mapping[str, Tensor],
    ) -> None:
        """Raise where a context has no accepted draw."""
        empty = torch.nonzero(accepted == 0).squeeze(1).tolist()
        if not empty:
            return
        c = empty[0]
        rate = float(binomial_upper(accepted[c], tried[c], LEVEL))
        bound = f"{rate:.1e}" + (f"·M, log M = {log_bound:.4g}," if log_bound != 0.0 else "")
        also = f" (and for {len(empty) - 1} more)" if len(empty) > 1 else ""
        blame = "no factor is to blame, so log_upper is far too high"
        if passed:
            worst = min(passed, key=lambda name: float(passed[name][c]))
            blame = f"factor {worst!r} rejected most (alone it accepts {float(passed[worst][c]):.2%}); loosen it"
        raise InfeasibleModel(
            f"rejection: 0 of {int(tried[c]):,} draws accepted for context {prompts[c]!r}{also}: Z < {bound} with "
            f"{LEVEL:.0%} confidence; {blame}, raise max_tries, or use an engine that steers the draws"
        )

    def _shortfall(self, prompts: Sequence[str], tried: Tensor, accepted: Tensor, wanted: int) -> list[str]:
        short = torch.nonzero(accepted < wanted).squeeze(1).tolist()
        for c in short:
            capped = int(tried[c]) >= self.max_tries
            log.warning(
                "rejection: context %r has %d of %d draws after %s proposals; %s",
                prompts[c], int(accepted[c]), wanted, f"{int(tried[c]):,}",
                "raise max_tries or loosen the evidence" if capped else "the run ended first",
            )  # fmt: skip
        return [prompts[c] for c in short]


def _shard(part: Part) -> RejectionShard:
    if not isinstance(part.shard, RejectionShard):
        raise ModelError(f"rejection: got a {type(part.shard).__name__}, expected shards planned by Rejection")
    return part.shard


def _proposals_needed(wanted: int, tried: Tensor, accepted: Tensor) -> float:
    """Proposals that `wanted` draws of the slowest context will have taken, at the acceptance rate so far."""
    return wanted / float(((accepted + 1) / (tried + 1)).min())


def _tally(parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    """Proposals and acceptances (C,) of whole shards."""
    accepted = torch.stack([p.info["accepted"] for p in parts]).sum(0)
    tried = torch.zeros_like(accepted)
    for part in parts:
        tried[list(part.shard.contexts)] += part.shard.num_draws
    return tried, accepted


def _proposals_before(parts: Sequence[Part], context: int, shard_id: int) -> int:
    earlier = (p.shard for p in parts if p.shard.id < shard_id)
    return sum(s.num_draws for s in earlier if context in s.contexts)


def _passed(target: Target, proposals: Draws) -> dict[str, Tensor]:
    """(C,) Σ over proposals of the probability that each factor alone accepts: φ_k over its bound, else 1[φ_k > 0]."""
    context = proposals.context.cpu()
    result = {}
    for factor in target.factors:
        value = proposals.log_factors[factor.name].cpu()
        share = (value > -math.inf).double() if math.isinf(factor.upper) else torch.exp(value - factor.upper)
        result[factor.name] = torch.zeros(target.form.num_contexts, dtype=torch.float64).index_add_(0, context, share)
    return result
