"""Quasi-rejection sampling: rejection without a bound that holds everywhere, at a measured distance from π*."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmppl.diagnostics.intervals import binomial_upper
from lmppl.diagnostics.normalizers import log_acceptance, log_mean_weight, stack
from lmppl.diagnostics.quasi_rejection import QuasiRejectionCurve, log_quasi_acceptance
from lmppl.diagnostics.weights import pareto_khat
from lmppl.errors import InfeasibleModel, ModelError, UnsupportedModel
from lmppl.inference.approximation import LEVEL, Approximation, Sampler
from lmppl.inference.coverage import coverage_note, tell_coverage, with_coverage
from lmppl.inference.engine import Engine, Guarantee, Part, Request, Shard, make_shard
from lmppl.inference.importance import importance_log_weights
from lmppl.inference.proposal_rounds import ProposalShard, ending, next_round, shortfall, tally
from lmppl.inference.proposals import (
    as_proposal,
    check_bounds,
    check_outcomes,
    densities,
    draw_from,
    evaluate_inside,
)
from lmppl.inference.quasi_rejection_bound import (
    DISTANCES_NOTE,
    bounds_of_rate,
    curve_of_weights,
    distances,
    refuse_zero,
    variation_bound,
    weights_by_context,
)
from lmppl.inference.refusals import count_zeros, first_context
from lmppl.lm.base import LanguageModel
from lmppl.lm.randomness import Source
from lmppl.modeling.model import Model
from lmppl.modeling.target import Target, log_evidence
from lmppl.sequences import Draws, concatenate

__all__ = ["QuasiRejection", "QuasiRejectionShard"]

ACCEPTANCE = 0.1  # where neither a bound nor a rate is given


@dataclass(frozen=True)
class QuasiRejectionShard(ProposalShard):
    """A round of proposals.

    Parameters
    ----------
    log_bounds : tuple of float
        log M_q of each context; empty in the shard that only weighs proposals, to choose it.
    """

    log_bounds: tuple[float, ...] = ()


@dataclass(frozen=True)
class QuasiRejection(Engine):
    """Propose x from q and accept it with probability min(1, γ/(M_q q)): the law is ∝ γ_q = min(γ, M_q q).

    Where M_q ≥ sup γ/q this is rejection sampling, and exact. A smaller M_q accepts more often, and its price is
    known: TV(law, π*) ≤ 1 − Z_q/Z ≤ Pr_π*(γ/q ≥ M_q), with Z_q = Σ γ_q and acceptance rate Z_q/M_q. All of these, and
    the divergences both ways, are estimated from the proposals of the run, accepted or not; `curve` gives them for
    many bounds before anything is sampled. Draws are independent and equally weighted; weighting them by e^excess
    (column `excess`, (log γ/q − log M_q)₊) makes expectations consistent for π* itself.

    A run for `num_draws` ends, for each context, at its `num_draws`-th acceptance, as `Rejection` does.

    Parameters
    ----------
    num_draws : int
        Accepted draws per context, where `infer` is not told.
    bound : float, optional
        log M_q, in nats, for every context.
    acceptance : float, optional
        The acceptance rate to aim at, in (0, 1), 0.1 where neither is given: a first shard of `pilot` proposals, which
        are used for nothing else, sets M_q for each context. A bound that the factors declare is never exceeded: the
        rate is then higher, and the law is π*.
    proposal : LanguageModel or Approximation, optional
        q, on the same tokens, contexts, cap and EOS as the prior. None: the prior.
    pilot : int
        Proposals per context that set M_q.
    max_tries : int
        Proposals per context at most. A context that has some draws by then keeps them (`info["shortfall"]` names
        it); one that has none raises.
    batch : int
        Proposals of one shard at most, all contexts together.

    Raises
    ------
    ModelError
        Where the configuration makes no sense, or the proposal does not fit the prior.
    InfeasibleModel
        Where a context has no accepted draw, or the acceptance rate is out of reach.

    Notes
    -----
    `info`, each (C,): `log_bound`, `proposals`, `accepted`, `acceptance_rate`, `exceeding` (proposals with γ/q > M_q:
    none is the sign of an exact law), `total_variation`, `total_variation_bound`, `kl` (KL(π*‖law)), `reverse_kl`,
    each with a standard error `..._error`; `distances_note` where q may not cover π*: all four are then lower bounds;
    `khat` of the proposals' weights, above 0.7 a sign that these figures are too small; `shortfall`. `log_normalizer`:
    log Ẑ from the weights of the proposals, then log Ẑ_q ≤ log Z from the acceptances. Columns of the draws: `shard`,
    `proposal`, `excess`.

    References
    ----------
    eikema2022, girshick1946
    """

    num_draws: int = 1000
    bound: float | None = field(default=None, kw_only=True)
    acceptance: float | None = field(default=None, kw_only=True)
    proposal: LanguageModel | Approximation | None = field(default=None, repr=False, kw_only=True)
    pilot: int = field(default=1024, kw_only=True)
    max_tries: int = field(default=1_000_000, kw_only=True)
    batch: int = field(default=1024, kw_only=True)

    name: ClassVar[str] = "quasi_rejection"
    guarantee: ClassVar[Guarantee] = Guarantee.APPROXIMATE
    surplus: ClassVar[bool] = True
    references: ClassVar[tuple[str, ...]] = ("eikema2022", "girshick1946")

    def curve(
        self,
        model: Model | LanguageModel,
        num_proposals: int = 4096,
        *,
        log_bounds: Sequence[float] | Tensor | None = None,
        seed: int = 0,
    ) -> tuple[QuasiRejectionCurve, ...]:
        """The trade-off between acceptance and distance for each context, from `num_proposals` draws of q each.

        Parameters
        ----------
        model : Model or LanguageModel
        num_proposals : int
            Per context.
        log_bounds : sequence of float, optional
            log M_q, in nats. By default those at which 90, 70, 50, 30, 20, 10, 5, 2 and 1 % are accepted, as far as
            they can be reached.
        seed : int

        Raises
        ------
        ModelError
            Where an argument or the configuration makes no sense, or the proposal does not fit the prior.
        UnsupportedModel
            For stochastic factors.
        InfeasibleModel
            Where no proposal of a context has γ > 0, or too few for any of the default rates.
        """
        self.check_fields()
        self._check()
        Request(None, None, seed).check()
        if type(num_proposals) is not int or num_proposals < 1:
            raise ModelError(
                f"QuasiRejection.curve: got num_proposals={num_proposals!r}, expected an integer of at least 1"
            )
        target = Target(model if isinstance(model, Model) else Model(model))
        reason = self.unsupported_reason(target.form)
        if reason is not None:
            raise UnsupportedModel(reason)
        contexts = tuple(range(target.form.num_contexts))
        base = make_shard(target, 0, num_proposals, seed, contexts)
        shard = QuasiRejectionShard(base.id, base.num_draws, base.seed, base.contexts, base.batch_size)
        part = self.run_shard(target, shard)
        weights = weights_by_context([part], len(contexts))
        refuse_zero(target.contexts, weights, [part])
        return tuple(curve_of_weights(w, log_bounds, covers=not part.info["coverage"]) for w in weights)

    def plan(self, target: Target, request: Request) -> list[Shard]:
        self._check()
        self._proposal(target)
        contexts, wanted = tuple(range(target.form.num_contexts)), self.wanted(request)
        if self.bound is not None:
            zeros = torch.zeros(len(contexts), dtype=torch.int64)
            return self._next(target, 0, request.seed, wanted, (self.bound,) * len(contexts), zeros, zeros)
        base = make_shard(target, 0, self.pilot, request.seed, contexts)
        return [QuasiRejectionShard(base.id, base.num_draws, base.seed, base.contexts, base.batch_size, wanted)]

    def replan(self, target: Target, request: Request, parts: Sequence[Part]) -> list[Shard]:
        last = _shard(parts[-1])
        tried, accepted = tally(_rounds(parts), target.form.num_contexts)
        log_bounds = last.log_bounds or self._log_bounds(target, parts[0])
        return self._next(target, last.id + 1, last.seed, last.wanted, log_bounds, tried, accepted)

    def simulate(self, target: Target, shard: Shard, source: Source, *, state: Any = None) -> Part:
        assert isinstance(shard, QuasiRejectionShard)
        context = torch.tensor(shard.contexts, dtype=torch.int64).repeat_interleave(shard.num_draws)
        batches = context.split(shard.batch_size)
        made = []
        for done, rows in enumerate(batches):
            target.report(done / len(batches), {"proposals": f"{sum(map(len, batches[:done])):,}"})
            made.append(self._proposed(target, rows, source))
        proposals = concatenate(made, pad_id=target.prior.pad_id)
        log_w = proposals.log_weight
        assert log_w is not None
        names = [f.name for f in target.factors]
        info: dict[str, Any] = {"log_weights": log_w, "factors": names, "zeros": count_zeros(proposals, names)}
        if shard.id == 0:
            lm = self._proposal(target)
            info["coverage"] = "" if lm is None else coverage_note(lm, target.prior)
        if not shard.log_bounds:
            chosen = torch.zeros(0, dtype=torch.int64)
            columns = {"shard": chosen, "proposal": chosen, "excess": chosen.double()}
        else:
            log_bound = torch.tensor(shard.log_bounds, dtype=torch.float64)[context]
            accepted = source.accept(log_quasi_acceptance(log_w, log_bound))
            chosen = torch.nonzero(accepted).squeeze(1)
            columns = {
                "shard": torch.full_like(chosen, shard.id),
                "proposal": chosen % shard.num_draws,
                "excess": (log_w - log_bound)[chosen].clamp_min(0.0),
            }
        draws = proposals.select(chosen)
        info["accepted"] = torch.bincount(draws.context, minlength=target.form.num_contexts)
        # The law of an accepted draw is known only up to Z_q.
        return Part(shard, draws.with_columns(log_weight=None, log_q=None, columns=columns), info=info)

    def merge(self, parts: Sequence[Part]) -> Sampler:
        rounds = _rounds(parts)
        whole = concatenate([p.draws for p in parts])
        contexts = whole.num_contexts
        if not rounds:
            raise InfeasibleModel(
                "quasi_rejection: the run ended after the proposals that set its bound, before any draw; give it a "
                "larger budget"
            )
        wanted, log_bounds = _shard(rounds[0]).wanted, torch.tensor(_shard(rounds[0]).log_bounds, dtype=torch.float64)
        weights = weights_by_context(rounds, contexts)
        refuse_zero(whole.prompts, weights, rounds)
        end = ending(whole, rounds, wanted)
        tried, accepted, stopped = end.tried, end.accepted, end.stopped
        self._refuse_empty(whole.prompts, tried, accepted, log_bounds)
        # Of a context that stopped at its last acceptance the proposals before that one are a fair sample of q:
        # given N they hold k − 1 accepted and N − k refused ones, and E[(k−1)/(N−1)] is the acceptance rate.
        fair = torch.where(stopped & (accepted > 1), tried - 1, tried).tolist()
        weights = [w[:n] for w, n in zip(weights, fair, strict=True)]
        info: dict[str, Any] = {
            "log_bound": log_bounds,
            "proposals": tried,
            "accepted": accepted,
            "acceptance_rate": accepted / tried,
            "exceeding": torch.tensor([int((w > m).sum()) for w, m in zip(weights, log_bounds, strict=True)]),
            "khat": torch.tensor([pareto_khat(w).value for w in weights], dtype=torch.float64),
            **distances(weights, log_bounds),
        }
        if wanted is not None and not bool(stopped.all()):
            advice = "raise max_tries or ask for a higher acceptance="
            info["shortfall"] = shortfall(self.name, whole.prompts, end, wanted, self.max_tries, advice)
        estimates = [stack([log_mean_weight(w, LEVEL) for w in weights])]
        coverage = str(parts[0].info["coverage"])
        if coverage:
            info |= {"distances_note": DISTANCES_NOTE, "coverage": coverage}
            tell_coverage(self.name, coverage)
        if bool((stopped & (accepted == 1)).any()):
            note = f"{estimates[0].note}; biased where a run stops at its first acceptance: ask for two draws or more"
            estimates[0] = replace(estimates[0], kind="consistent", note=note)
        estimates = list(with_coverage(tuple(estimates), coverage))
        lower = log_acceptance(accepted, tried, 0.0, stopped=stopped, level=LEVEL)
        if lower.kind == "unbiased_Z" and lower.interval is not None:
            estimates.append(
                replace(
                    lower,
                    value=lower.value + log_bounds,
                    interval=lower.interval + log_bounds[:, None],
                    kind="lower_bound",
                    note=f"log Z_q ≤ log Z; {lower.note}",
                )
            )
        return Sampler(end.draws, tuple(estimates), self.guarantee, info)

    def live(self, parts: Sequence[Part]) -> dict[str, str]:
        rounds = _rounds(parts)
        if not rounds:
            return {"pilot": f"{parts[0].shard.num_draws:,}"}
        tried, accepted = tally(rounds, parts[0].draws.num_contexts)
        figures = {"draws": f"{int(accepted.sum()):,}", "acceptance": f"{float(accepted.sum() / tried.sum()):.2%}"}
        bound = variation_bound(weights_by_context(rounds, len(tried)), _shard(rounds[0]).log_bounds)
        if not math.isnan(bound):
            figures["TV ≤"] = f"{bound:.3f}"
        return figures

    def _check(self) -> None:
        if self.bound is not None and self.acceptance is not None:
            raise ModelError("QuasiRejection: got bound and acceptance, expected one: each determines the other")
        if self.bound is not None and not math.isfinite(self.bound):
            raise ModelError(f"QuasiRejection: got bound={self.bound}, expected a finite number of nats")
        if self.acceptance is not None and not 0.0 < self.acceptance < 1.0:
            raise ModelError(f"QuasiRejection: got acceptance={self.acceptance}, expected a rate between 0 and 1")
        for name in ("pilot", "max_tries", "batch"):
            if getattr(self, name) < 1:
                raise ModelError(f"QuasiRejection: got {name}={getattr(self, name)}, expected at least 1")

    def _proposal(self, target: Target) -> LanguageModel | None:
        """q as an LM that fits the prior; None where draws come from the prior itself."""
        if self.proposal is None or self.proposal is target.prior:
            return None
        return as_proposal(self.proposal, target.prior)

    def _proposed(self, target: Target, context: Tensor, source: Source) -> Draws:
        """A draw of q for each entry of `context`, evaluated, with log w = log γ − log q."""
        lm = self._proposal(target)
        if lm is None:
            draws = target.evaluate(draw_from(target.prior, context, source, cost=target.cost))
            check_bounds(draws, target.factors)
            return draws.with_columns(log_weight=log_evidence(draws))
        drawn = replace(draw_from(lm, context, source, cost=target.cost), decoder=target.prior.decode)
        check_outcomes(drawn, target.prior)
        draws = evaluate_inside(target, replace(drawn, log_prior=target.log_prior(drawn)))
        check_bounds(draws, target.factors)
        log_prior, log_q = densities(draws)
        log_gamma = torch.where(log_prior > -math.inf, log_prior.double() + log_evidence(draws), -math.inf)
        return draws.with_columns(log_weight=importance_log_weights(log_gamma, log_q))

    def _log_bounds(self, target: Target, pilot: Part) -> tuple[float, ...]:
        """log M_q of each context, from the weights of the pilot's proposals."""
        rate = ACCEPTANCE if self.acceptance is None else self.acceptance
        weights = weights_by_context([pilot], target.form.num_contexts)
        refuse_zero(target.contexts, weights, [pilot])
        upper = target.form.log_upper if self._proposal(target) is None else math.inf
        return bounds_of_rate(rate, target.contexts, weights, upper)

    def _next(
        self,
        target: Target,
        number: int,
        seed: int,
        wanted: int | None,
        log_bounds: tuple[float, ...],
        tried: Tensor,
        accepted: Tensor,
    ) -> list[Shard]:
        shard = next_round(target, number, seed, wanted, tried, accepted, batch=self.batch, max_tries=self.max_tries)
        if shard is None:
            return []
        return [
            QuasiRejectionShard(
                shard.id, shard.num_draws, shard.seed, shard.contexts, shard.batch_size, wanted, log_bounds
            )
        ]

    def _refuse_empty(self, prompts: Sequence[str], tried: Tensor, accepted: Tensor, log_bounds: Tensor) -> None:
        """Raise where a context has no accepted draw."""
        found = first_context(accepted == 0)
        if found is None:
            return
        c, also = found
        rate = float(binomial_upper(accepted[c], tried[c], LEVEL))
        raise InfeasibleModel(
            f"quasi_rejection: 0 of {int(tried[c]):,} proposals accepted for context {prompts[c]!r}{also}: Z_q < "
            f"{rate:.1e}·M_q, log M_q = {float(log_bounds[c]):.4g}, with {LEVEL:.0%} confidence; lower bound=, ask for "
            "an acceptance= instead, raise max_tries, or use a proposal that steers"
        )


def _shard(part: Part) -> QuasiRejectionShard:
    if not isinstance(part.shard, QuasiRejectionShard):
        got = type(part.shard).__name__
        raise ModelError(f"quasi_rejection: got a {got}, expected shards planned by QuasiRejection")
    return part.shard


def _rounds(parts: Sequence[Part]) -> list[Part]:
    """Without the pilot, which accepts nothing."""
    return [p for p in parts if _shard(p).log_bounds]
