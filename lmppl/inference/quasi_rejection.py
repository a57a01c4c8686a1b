"""Quasi-rejection sampling: rejection without a bound that holds everywhere, at a measured distance from π*."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmppl.diagnostics.intervals import binomial_upper
from lmppl.diagnostics.normalizers import log_acceptance, log_mean_weight, stack
from lmppl.diagnostics.weights import checked_log_weights, pareto_smooth
from lmppl.errors import InfeasibleModel, ModelError, ShapeError
from lmppl.inference.approximation import LEVEL, Approximation, Sampler
from lmppl.inference.engine import Engine, Guarantee, Part, Request, Shard, make_shard
from lmppl.inference.importance import importance_log_weights
from lmppl.inference.proposals import (
    as_proposal,
    check_bounds,
    check_outcomes,
    densities,
    draw_from,
    evaluate_inside,
)
from lmppl.lm.base import LanguageModel
from lmppl.lm.randomness import Source
from lmppl.modeling.model import Model
from lmppl.modeling.target import Target, log_evidence
from lmppl.sequences import Draws, Estimate, EstimateKind, concatenate

__all__ = [
    "QuasiRejection",
    "QuasiRejectionCurve",
    "QuasiRejectionShard",
    "log_bound_of_acceptance",
    "log_quasi_acceptance",
    "quasi_rejection_curve",
]

log = logging.getLogger(__name__)

ACCEPTANCE = 0.1  # where neither a bound nor a rate is given
RATES = (0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01)  # of the curve, where no bounds are given
SAFETY = 1.2  # proposals of the next shard, over what the acceptance rate so far asks for
FIGURES = ("total_variation", "total_variation_bound", "kl", "reverse_kl")


def log_quasi_acceptance(log_weights: Tensor, log_bound: Tensor | float) -> Tensor:
    """(N,) log Pr(accept x) = min(0, log w(x) − log M_q), w = γ/q, in nats; −inf where γ = 0.

    q(x)·Pr(accept x) = min(γ(x), M_q q(x))/M_q =: γ_q(x)/M_q, so that accepted draws have the law γ_q/Z_q, and
    Pr(accept) = Z_q/M_q.
    """
    return (log_weights.double() - log_bound).clamp_max(0.0)


@dataclass(frozen=True, eq=False)
class QuasiRejectionCurve:
    """The trade-off between acceptance and distance, at K bounds, for one context.

    Each figure is an `Estimate` of shape (K,) with a standard error: of the law γ_q/Z_q, γ_q = min(γ, M_q q).

    Parameters
    ----------
    log_bound : Tensor (K,)
        log M_q, in nats.
    acceptance : Estimate
        Z_q/M_q.
    total_variation : Estimate
        TV(law, π*).
    total_variation_bound : Estimate
        1 − Z_q/Z, which is at least TV(law, π*).
    tail : Estimate
        Pr_π*(γ/q ≥ M_q), which is at least 1 − Z_q/Z.
    kl, reverse_kl : Estimate
        KL(π*‖law) and KL(law‖π*), in nats.
    """

    log_bound: Tensor
    acceptance: Estimate
    total_variation: Estimate
    total_variation_bound: Estimate
    tail: Estimate
    kl: Estimate
    reverse_kl: Estimate

    def __str__(self) -> str:
        columns = {
            "log M_q": self.log_bound,
            "acceptance": self.acceptance.value,
            "TV": self.total_variation.value,
            "± TV": self.total_variation.standard_error,
            "TV ≤": self.total_variation_bound.value,
            "KL(π*‖law)": self.kl.value,
            "KL(law‖π*)": self.reverse_kl.value,
        }
        lines = ["  ".join(f"{name:>10}" for name in columns)]
        for k in range(len(self.log_bound)):
            row = [math.nan if values is None else float(values[k]) for values in columns.values()]
            lines.append("  ".join(f"{value:10.4f}" for value in row))
        return "\n".join(lines)


def quasi_rejection_curve(
    log_weights: Tensor, log_bounds: Tensor, *, log_masses: Tensor | None = None
) -> QuasiRejectionCurve:
    """Acceptance rate and divergences of quasi-rejection at each of K bounds, from one set of draws of q.

    With w = γ/q, w_M = min(w, M_q), Z = E_q[w], Z_q = E_q[w_M]:

        acceptance = Z_q/M_q;   TV(law, π*) = E_q[(w_M/Z_q − w/Z)₊] ≤ 1 − Z_q/Z ≤ Pr_π*(w ≥ M_q);
        KL(π*‖law) = E_π*[(log w − log M_q)₊] − log Z/Z_q;   KL(law‖π*) = log Z/Z_q − E_law[(log w − log M_q)₊].

    Z is estimated from the same draws: mass that none of them reached does not show, and heavy weights that were not
    drawn make every divergence too small. Standard errors are those of the delta method.

    Parameters
    ----------
    log_weights : Tensor (N,)
        log γ − log q of draws of q, in nats; −inf is a weight like any other.
    log_bounds : Tensor (K,)
        log M_q, in nats.
    log_masses : Tensor (N,), optional
        log q of each of N *enumerated* outcomes: the figures are then exact and have no error. None: independent
        draws, of mass 1/N each.

    Returns
    -------
    QuasiRejectionCurve

    Raises
    ------
    ModelError
        Where every weight is zero, or a bound is not finite.

    References
    ----------
    eikema2022
    """
    log_w = checked_log_weights(log_weights)
    bounds = torch.as_tensor(log_bounds, dtype=torch.float64, device=log_w.device)
    if bounds.dim() != 1 or not bool(torch.isfinite(bounds).all()):
        raise ModelError(f"quasi_rejection_curve: got log_bounds {log_bounds!r}, expected finite numbers of shape (K,)")
    if log_masses is not None and log_masses.shape != log_w.shape:
        got = tuple(log_masses.shape)
        raise ShapeError(f"quasi_rejection_curve: got log_masses of shape {got}, expected {tuple(log_w.shape)}")
    n = len(log_w)
    mass = torch.full_like(log_w, 1.0 / n) if log_masses is None else log_masses.double().exp()
    log_z = torch.logsumexp(log_w + mass.log(), 0)
    if float(log_z) == -math.inf:
        raise ModelError(f"quasi_rejection_curve: all {n} weights are zero, so that there is nothing to accept")
    figures: dict[str, list[tuple[Tensor, Tensor]]] = {
        name: [] for name in ("acceptance", *FIGURES, "tail")
    }  # value and influence (N,) of each
    star = torch.exp(log_w - log_z)  # w/Z, of mean 1
    for bound in bounds:
        capped = torch.minimum(log_w, bound)
        log_zq = torch.logsumexp(capped + mass.log(), 0)
        law = torch.exp(capped - log_zq)  # w_M/Z_q, of mean 1
        excess = (log_w - bound).clamp_min(0.0)
        acceptance = torch.exp(capped - bound)
        gain = law - star
        higher = gain > 0
        above = (log_w >= bound).double()
        total_variation = (mass * gain.clamp_min(0.0)).sum()
        slope_law, slope_star = (mass * higher * law).sum(), (mass * higher * star).sum()
        retained = torch.exp(log_zq - log_z)
        mean_star, mean_law = (mass * star * excess).sum(), (mass * law * excess).sum()
        tail = (mass * star * above).sum()
        rate = (mass * acceptance).sum()
        figures["acceptance"].append((rate, acceptance - rate))
        figures["total_variation"].append(
            (
                total_variation,
                gain.clamp_min(0.0) - total_variation - slope_law * (law - 1.0) + slope_star * (star - 1.0),
            )
        )
        figures["total_variation_bound"].append(((1.0 - retained).clamp_min(0.0), retained * (star - law)))
        figures["tail"].append((tail, star * (above - tail)))
        figures["kl"].append((mean_star + log_zq - log_z, star * (excess - mean_star) + law - star))
        figures["reverse_kl"].append((log_z - log_zq - mean_law, star - law - law * (excess - mean_law)))
    made = {}
    for name, found in figures.items():
        value = torch.stack([v for v, _ in found])
        if log_masses is not None:
            made[name] = Estimate(value, torch.stack([value, value], -1), 1.0, "exact", torch.zeros_like(value), n)
            continue
        kind: EstimateKind = "unbiased" if name == "acceptance" else "consistent"
        error = torch.stack([i.std() if n > 1 else i.new_tensor(math.nan) for _, i in found]) / math.sqrt(n)
        made[name] = Estimate(value, None, LEVEL, kind, error, n, "delta method; blind to mass that no draw reached")
    return QuasiRejectionCurve(bounds, **made)


def log_bound_of_acceptance(log_weights: Tensor, rate: float) -> float:
    """log M_q at which the draws' mean acceptance min(1, w/M_q) is `rate`, in nats.

    Exact for the given draws: with the m heaviest above M_q, (m + Σ_{others} w/M_q)/N = rate.

    Parameters
    ----------
    log_weights : Tensor (N,)
        log γ − log q of draws of q, in nats.
    rate : float
        In (0, 1).

    Raises
    ------
    InfeasibleModel
        Where no bound reaches the rate, because fewer draws than that have γ > 0.
    """
    log_w = torch.sort(checked_log_weights(log_weights), descending=True).values
    n = len(log_w)
    positive = int((log_w > -math.inf).sum())
    if positive < rate * n:
        raise InfeasibleModel(
            f"an acceptance rate of {rate:g} is out of reach: {positive:,} of {n:,} proposals have γ > 0"
        )
    log_w = log_w[:positive]
    # rest[m] = log Σ_{i ≥ m} w_i, of the weights that stay below the bound when m lie above it
    rest = torch.flip(torch.logcumsumexp(torch.flip(log_w, [0]), 0), [0])
    above = torch.arange(positive, dtype=torch.float64, device=log_w.device)
    at_weight = above + torch.exp(rest - log_w)  # N times the rate with M_q = w_m: it grows with m
    enough = torch.nonzero(at_weight >= rate * n).squeeze(1)
    if len(enough) == 0:  # every draw with γ > 0 is to be accepted
        return float(log_w[-1])
    m = int(enough[0])
    return float(rest[m]) - math.log(rate * n - m)


@dataclass(frozen=True)
class QuasiRejectionShard(Shard):
    """A shard of proposals.

    Parameters
    ----------
    wanted : int or None
        The run is met at so many accepted draws per context (None: a budget ends it).
    log_bounds : tuple of float
        log M_q of each context; empty in the shard that only weighs proposals, to choose it.
    """

    wanted: int | None = None
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
    each with a standard error `..._error`; `khat` of the proposals' weights, above 0.7 a sign that these figures are
    too small; `shortfall`. `log_normalizer`: log Ẑ from the weights of the proposals, then log Ẑ_q ≤ log Z from the
    acceptances. Columns of the draws: `shard`, `proposal`, `excess`.

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
        """
        target = Target(model if isinstance(model, Model) else Model(model))
        contexts = tuple(range(target.form.num_contexts))
        base = make_shard(target, 0, num_proposals, seed, contexts)
        shard = QuasiRejectionShard(base.id, base.num_draws, base.seed, base.contexts, base.batch_size)
        part = self.run_shard(target, shard)
        weights = _weights_by_context([part], len(contexts))
        _refuse_zero(target.contexts, weights)
        made = []
        for log_w in weights:
            if log_bounds is None:
                share = float((log_w > -math.inf).double().mean())
                bounds = [log_bound_of_acceptance(log_w, rate) for rate in RATES if rate <= share]
            else:
                bounds = [float(b) for b in log_bounds]
            made.append(quasi_rejection_curve(log_w, torch.tensor(bounds, dtype=torch.float64)))
        return tuple(made)

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
        tried, accepted = _tally(parts)
        log_bounds = last.log_bounds or self._log_bounds(target, parts[0])
        return self._next(target, last.id + 1, last.seed, last.wanted, log_bounds, tried, accepted)

    def simulate(self, target: Target, shard: Shard, source: Source, *, state: Any = None) -> Part:
        assert isinstance(shard, QuasiRejectionShard)
        context = torch.tensor(shard.contexts, dtype=torch.int64).repeat_interleave(shard.num_draws)
        batches = context.split(shard.batch_size)
        made = []
        for done, rows in enumerate(batches):
            target.report(done / len(batches), {})
            made.append(self._proposed(target, rows, source))
        proposals = concatenate(made, pad_id=target.prior.pad_id)
        log_w = proposals.log_weight
        assert log_w is not None
        info: dict[str, Any] = {"log_weights": log_w}
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
        rounds = [p for p in parts if _shard(p).log_bounds]
        whole = concatenate([p.draws for p in parts])
        contexts = whole.num_contexts
        if not rounds:
            raise InfeasibleModel(
                "quasi_rejection: the run ended after the proposals that set its bound, before any draw; give it a "
                "larger budget"
            )
        wanted, log_bounds = _shard(rounds[0]).wanted, torch.tensor(_shard(rounds[0]).log_bounds, dtype=torch.float64)
        tried, accepted = _tally(rounds)
        weights = _weights_by_context(rounds, contexts)
        _refuse_zero(whole.prompts, weights)
        kept = []
        for c in range(contexts):
            rows = torch.nonzero(whole.context == c).squeeze(1)
            if wanted is not None and len(rows) >= wanted:
                rows = rows[:wanted]
                last = rows[-1]
                tried[c] = _proposals_before(rounds, c, int(whole.columns["shard"][last]))
                tried[c] += int(whole.columns["proposal"][last]) + 1
                accepted[c] = wanted
            kept.append(rows)
        self._refuse_empty(whole.prompts, tried, accepted, log_bounds)
        stopped = torch.zeros_like(tried, dtype=torch.bool) if wanted is None else accepted == wanted
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
            "khat": torch.tensor([pareto_smooth(w)[1].value for w in weights], dtype=torch.float64),
            **_figures(weights, log_bounds),
        }
        if wanted is not None and not bool(stopped.all()):
            info["shortfall"] = self._shortfall(whole.prompts, tried, accepted, wanted)
        estimates = [stack([log_mean_weight(w, LEVEL) for w in weights])]
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
        return Sampler(whole.select(torch.cat(kept)), tuple(estimates), self.guarantee, info)

    def live(self, parts: Sequence[Part]) -> dict[str, str]:
        rounds = [p for p in parts if _shard(p).log_bounds]
        if not rounds:
            return {"pilot": f"{parts[0].shard.num_draws:,}"}
        tried, accepted = _tally(rounds)
        figures = {"draws": f"{int(accepted.sum()):,}", "acceptance": f"{float(accepted.sum() / tried.sum()):.2%}"}
        bounds = []
        log_bounds = _shard(rounds[0]).log_bounds
        for log_w, log_bound in zip(_weights_by_context(rounds, len(tried)), log_bounds, strict=True):
            kept = torch.logsumexp(log_w.clamp_max(log_bound), 0) - torch.logsumexp(log_w, 0)
            bounds.append(float(-torch.expm1(kept)))
        if not any(math.isnan(b) for b in bounds):
            figures["TV ≤"] = f"{max(bounds):.3f}"
        return figures

    def _check(self) -> None:
        if self.bound is not None and self.acceptance is not None:
            raise ModelError("QuasiRejection: got bound and acceptance, expected one: each determines the other")
        if self.bound is not None and not math.isfinite(self.bound):
            raise ModelError(f"QuasiRejection: got bound={self.bound}, expected a finite number of nats")
        if self.acceptance is not None and not 0.0 < self.acceptance < 1.0:
            raise ModelError(f"QuasiRejection: got acceptance={self.acceptance}, expected a rate between 0 and 1")
        if min(self.pilot, self.max_tries, self.batch) < 1:
            got = f"pilot={self.pilot}, max_tries={self.max_tries}, batch={self.batch}"
            raise ModelError(f"QuasiRejection: got {got}, expected at least 1")

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
        weights = _weights_by_context([pilot], target.form.num_contexts)
        _refuse_zero(target.contexts, weights)
        upper = target.form.log_upper if self._proposal(target) is None else math.inf
        bounds = []
        for prompt, log_w in zip(target.contexts, weights, strict=True):
            if math.isfinite(upper) and float(torch.exp(log_w - upper).mean()) >= rate:
                bounds.append(upper)  # exact rejection accepts that often already
                continue
            try:
                bounds.append(min(upper, log_bound_of_acceptance(log_w, rate)))
            except InfeasibleModel as error:
                raise InfeasibleModel(
                    f"quasi_rejection: for context {prompt!r} {error}; ask for a lower acceptance=, give bound=, or a "
                    "proposal that satisfies the hard factors more often"
                ) from error
        return tuple(bounds)

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
        return [
            QuasiRejectionShard(base.id, base.num_draws, base.seed, base.contexts, base.batch_size, wanted, log_bounds)
        ]

    def _refuse_empty(self, prompts: Sequence[str], tried: Tensor, accepted: Tensor, log_bounds: Tensor) -> None:
        """Raise where a context has no accepted draw."""
        empty = torch.nonzero(accepted == 0).squeeze(1).tolist()
        if not empty:
            return
        c = empty[0]
        also = f" (and for {len(empty) - 1} more)" if len(empty) > 1 else ""
        rate = float(binomial_upper(accepted[c], tried[c], LEVEL))
        raise InfeasibleModel(
            f"quasi_rejection: 0 of {int(tried[c]):,} proposals accepted for context {prompts[c]!r}{also}: Z_q < "
            f"{rate:.1e}·M_q, log M_q = {float(log_bounds[c]):.4g}, with {LEVEL:.0%} confidence; lower bound=, ask for "
            "an acceptance= instead, raise max_tries, or use a proposal that steers"
        )

    def _shortfall(self, prompts: Sequence[str], tried: Tensor, accepted: Tensor, wanted: int) -> list[str]:
        short = torch.nonzero(accepted < wanted).squeeze(1).tolist()
        for c in short:
            capped = int(tried[c]) >= self.max_tries
            log.warning(
                "quasi_rejection: context %r has %d of %d draws after %s proposals; %s",
                prompts[c], int(accepted[c]), wanted, f"{int(tried[c]):,}",
                "raise max_tries or ask for a higher acceptance=" if capped else "the run ended first",
            )  # fmt: skip
        return [prompts[c] for c in short]


def _figures(weights: Sequence[Tensor], log_bounds: Tensor) -> dict[str, Tensor]:
    """Divergences and their standard errors, (C,) each."""
    curves = [quasi_rejection_curve(w, m[None]) for w, m in zip(weights, log_bounds, strict=True)]
    found: dict[str, Tensor] = {}
    for name in FIGURES:
        estimates = [getattr(curve, name) for curve in curves]
        found[name] = torch.cat([e.value for e in estimates])
        found[f"{name}_error"] = torch.cat([e.standard_error for e in estimates])
    return found


def _shard(part: Part) -> QuasiRejectionShard:
    if not isinstance(part.shard, QuasiRejectionShard):
        got = type(part.shard).__name__
        raise ModelError(f"quasi_rejection: got a {got}, expected shards planned by QuasiRejection")
    return part.shard


def _weights_by_context(parts: Sequence[Part], num_contexts: int) -> list[Tensor]:
    """log w of every proposal of each context, in the order of the shards."""
    found: list[list[Tensor]] = [[torch.zeros(0, dtype=torch.float64)] for _ in range(num_contexts)]
    for part in parts:
        rows = part.info["log_weights"].split(part.shard.num_draws)
        for c, log_w in zip(part.shard.contexts, rows, strict=True):
            found[c].append(log_w)
    return [torch.cat(log_w) for log_w in found]


def _tally(parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    """Proposals and acceptances (C,) of whole shards that accept."""
    accepted = torch.stack([p.info["accepted"] for p in parts]).sum(0)
    tried = torch.zeros_like(accepted)
    for part in parts:
        if _shard(part).log_bounds:
            tried[list(part.shard.contexts)] += part.shard.num_draws
    return tried, accepted


def _proposals_before(parts: Sequence[Part], context: int, shard_id: int) -> int:
    earlier = (p.shard for p in parts if p.shard.id < shard_id)
    return sum(s.num_draws for s in earlier if context in s.contexts)


def _refuse_zero(prompts: Sequence[str], weights: Sequence[Tensor]) -> None:
    for prompt, log_w in zip(prompts, weights, strict=True):
        if len(log_w) and not bool((log_w > -math.inf).any()):
            rate = float(binomial_upper(torch.tensor(0), torch.tensor(len(log_w)), LEVEL))
            raise InfeasibleModel(
                f"quasi_rejection: all {len(log_w):,} proposals for context {prompt!r} have γ = 0: Pr_q(γ > 0) < "
                f"{rate:.1e} with {LEVEL:.0%} confidence; loosen the hard factors, or use a proposal that steers"
            )
