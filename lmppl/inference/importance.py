"""Importance sampling: draws of a proposal, weighted by γ/q."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmppl.diagnostics.intervals import binomial_upper
from lmppl.diagnostics.normalizers import log_acceptance, log_mean_weight, log_mean_weight_bounded, stack
from lmppl.diagnostics.weights import (
    KHAT_LIMIT,
    TailShape,
    effective_sample_size,
    entropy_effective_sample_size,
    max_weight_share,
    pareto_smooth,
    zero_weight_share,
)
from lmppl.errors import InfeasibleModel, ModelError
from lmppl.inference.approximation import LEVEL, Approximation, Particles
from lmppl.inference.coverage import coverage_note, tell_coverage, with_coverage
from lmppl.inference.engine import Engine, Guarantee, Part, Request, Shard
from lmppl.inference.proposals import (
    as_proposal,
    check_bounds,
    check_outcomes,
    densities,
    evaluate_inside,
    propose,
)
from lmppl.inference.refusals import blame, count_zeros, first_context, z_below
from lmppl.inference.twists.exclusions import steering_factors, try_exclusions
from lmppl.lm.base import LanguageModel
from lmppl.lm.randomness import Source
from lmppl.modeling.evidence.constraint import Constraint
from lmppl.modeling.target import Target, log_evidence
from lmppl.sequences import Draws, Estimate, concatenate

__all__ = ["Importance", "importance_log_weights", "log_mixture"]

ROUNDING = 1e-9  # nats; far above the float64 rounding of log γ − log q


def importance_log_weights(log_gamma: Tensor, log_q: Tensor) -> Tensor:
    """(N,) log w = log γ − log q, in nats and float64; −inf where γ = 0.

    The mean of w over draws of q is unbiased for Z where q covers π*.

    Raises
    ------
    ModelError
        Where q is 0, or no number, at a draw: q cannot have drawn it, so its density is not what was sampled.
    """
    impossible = ~torch.isfinite(log_q)
    if bool(impossible.any()):
        row = int(torch.nonzero(impossible)[0, 0])
        raise ModelError(f"importance: the proposal gives log q = {float(log_q[row])} to its own draw {row}")
    return log_gamma.double() - log_q.double()


def log_mixture(log_prior: Tensor, log_proposal: Tensor, share: float) -> Tensor:
    """(N,) log q_α = log(α π0 + (1−α) q), in nats: the density of the whole mixture, whichever part made the draw.

    Dividing by the density of the part instead would leave the weights unbounded where q is small, and with α =
    `share` the bound γ/q_α ≤ ∏φ/α is the point of a defensive mixture.
    """
    parts = torch.stack([log_prior.double() + math.log(share), log_proposal.double() + math.log1p(-share)])
    return torch.logsumexp(parts, 0)


@dataclass(frozen=True)
class Importance(Engine):
    """Draw x from q and weight it by w = γ(x)/q(x): E_q[w] = Z, and Σ w̄ f → E_π*[f], where q covers π*.

    From the prior w = ∏ φ_k(x), and log π0 comes with the draw, so that no further pass is needed; from a proposal
    the prior scores each draw once. Weights are kept as they are: −inf is a weight, and dropping such draws would
    change Ẑ.

    A proposal that does not cover π* (top-k, top-p, masks, a policy that lost modes) gives E Ẑ < Z, and **no figure
    that is computed from weights shows it**; exact draws do (`lmppl.diagnostics.eubo`), and `defensive` prevents it.

    Parameters
    ----------
    num_draws : int
        Draws per context, where `infer` is not told.
    proposal : LanguageModel or Approximation, optional
        q, on the same tokens, contexts, cap and EOS as the prior: another LM, a policy, an exact table. None: the
        prior.
    defensive : float
        α in [0, 1): draw from q_α = α π0 + (1−α) q, which covers π* and bounds the weights by ∏φ/α. The draws are
        stratified: ⌈α n⌉ of the n of each shard and context come from the prior, and the weights use that very share,
        so that Ẑ stays unbiased. Each draw is scored once, by the LM that did not make it.
    pareto_smoothing : bool
        Put Pareto-smoothed weights into the draws, for expectations of lower variance and a bias that vanishes with
        N. log Ẑ and the figures in `info` come from the raw weights, which stay in the column `raw_log_weight`.

    Raises
    ------
    ModelError
        Where the proposal does not fit the prior, or a draw is no outcome of it.
    InfeasibleModel
        Where all draws of a context have weight zero; with what follows about Z.

    Notes
    -----
    `log_normalizer`: log Ẑ by the delta method. From the prior (or a defensive mixture), with a bound on every
    factor, a second estimate has the finite-sample empirical Bernstein interval; if all evidence is hard constraints
    and q = π0, the first one has Clopper–Pearson's. `info`, each (C,): `ess`, `entropy_ess`, `khat` (nan where
    undefined: `khat_note`), `max_weight_share`, `zero_weight_share`. A proposal that is known not to cover, or
    declared truncated, is warned about and named in `coverage`; log Ẑ is then a lower bound.

    References
    ----------
    hesterberg1995, owen2000, vehtari2024, agapiou2017
    """

    num_draws: int = 1000
    proposal: LanguageModel | Approximation | None = field(default=None, repr=False)
    defensive: float = 0.0
    pareto_smoothing: bool = False

    name: ClassVar[str] = "importance"
    guarantee: ClassVar[Guarantee] = Guarantee.CONSISTENT
    references: ClassVar[tuple[str, ...]] = ("hesterberg1995", "owen2000", "vehtari2024", "agapiou2017")

    def plan(self, target: Target, request: Request) -> list[Shard]:
        if not 0.0 <= self.defensive < 1.0:
            raise ModelError(f"Importance: got defensive={self.defensive}, expected a share in [0, 1)")
        if self.defensive and self.proposal is None:
            raise ModelError("Importance: got defensive without a proposal; the prior needs no defence against itself")
        self._proposal(target)
        return super().plan(target, request)

    def simulate(self, target: Target, shard: Shard, source: Source, *, state: Any = None) -> Part:
        lm = self._proposal(target)
        if lm is None:
            draws = propose(target.prior, shard, shard.num_draws, source=source, cost=target.cost)
            draws = target.evaluate(draws)
            log_w = log_evidence(draws)
        else:
            draws = evaluate_inside(target, self._proposed(target, lm, shard, source))
            log_prior, log_q = densities(draws)
            log_gamma = torch.where(log_prior > -math.inf, log_prior.double() + log_evidence(draws), -math.inf)
            log_w = importance_log_weights(log_gamma, log_q)
        check_bounds(draws, target.factors)
        if lm is not None and shard.id == 0:
            try_exclusions(target, steering_factors(target, lm), draws, shard.seed)
        columns = {"shard": torch.full_like(draws.context, shard.id)}
        return Part(shard, draws.with_columns(log_weight=log_w, columns=columns), info=self._facts(target, lm))

    def merge(self, parts: Sequence[Part]) -> Particles:
        draws = concatenate([p.draws for p in parts])
        assert draws.log_weight is not None
        facts = parts[0].info
        raw = draws.log_weight
        rows = [torch.nonzero(draws.context == c).squeeze(1) for c in range(draws.num_contexts)]
        weights = [raw[r].cpu() for r in rows]
        _refuse_all_zero(draws, weights, float(facts["log_bound"]))
        smoothed = [pareto_smooth(w) for w in weights]
        shapes = [shape for _, shape in smoothed]
        estimates = _normalizers(weights, shapes, facts)
        info: dict[str, Any] = {
            "ess": _each(effective_sample_size, weights),
            "entropy_ess": _each(entropy_effective_sample_size, weights),
            "khat": torch.tensor([s.value for s in shapes], dtype=torch.float64),
            "khat_note": tuple(s.note for s in shapes),
            "max_weight_share": _each(max_weight_share, weights),
            "zero_weight_share": _each(zero_weight_share, weights),
        }
        if facts["coverage"]:
            info["coverage"] = facts["coverage"]
            tell_coverage(self.name, facts["coverage"])
        order = torch.cat(rows)
        sorted_draws = draws.select(order)
        if self.pareto_smoothing:
            columns = {**sorted_draws.columns, "raw_log_weight": raw[order]}
            new = torch.cat([w for w, _ in smoothed])
            sorted_draws = sorted_draws.with_columns(log_weight=new, columns=columns)
        return Particles(sorted_draws, estimates, self.guarantee, info)

    def live(self, parts: Sequence[Part]) -> dict[str, str]:
        log_w = torch.cat([p.draws.log_weight for p in parts if p.draws.log_weight is not None])
        context = torch.cat([p.draws.context for p in parts])
        shares, first = [], log_w[context == 0]
        for c in range(parts[0].draws.num_contexts):
            own = log_w[context == c]
            possible = bool((own > -math.inf).any())
            shares.append(float(effective_sample_size(own)) / len(own) if possible else 0.0)
        log_z = float(torch.logsumexp(first, 0)) - math.log(len(first))
        return {"draws": f"{len(log_w):,}", "lowest ESS/N": f"{min(shares):.1%}", "log Ẑ": f"{log_z:.3f}"}

    def _proposal(self, target: Target) -> LanguageModel | None:
        """q as an LM that fits the prior; None where draws come from the prior itself."""
        if self.proposal is None or self.proposal is target.prior:
            return None
        return as_proposal(self.proposal, target.prior)

    def _proposed(self, target: Target, lm: LanguageModel, shard: Shard, source: Source) -> Draws:
        """Draws of q or of the defensive mixture, with log π0 and log q; each LM scores what it did not draw."""
        count, cost = shard.num_draws, target.cost
        from_prior = math.ceil(self.defensive * count)
        parts = []
        if from_prior < count:
            drawn = propose(lm, shard, count - from_prior, source=source, cost=cost)
            # γ is a function of the ids: another vocabulary of equal size must not change what the factors read.
            drawn = replace(drawn, decoder=target.prior.decode)
            check_outcomes(drawn, target.prior)
            parts.append(replace(drawn, log_prior=target.log_prior(drawn)))
        if from_prior > 0:
            drawn = propose(target.prior, shard, from_prior, source=source, cost=cost)
            parts.append(replace(drawn, log_q=lm.score(drawn, cost=cost)))
        draws = concatenate(parts, pad_id=target.prior.pad_id)
        if from_prior == 0:
            return draws
        log_prior, log_q = densities(draws)
        share = from_prior / count
        return replace(draws, log_q=log_prior.double() if share == 1.0 else log_mixture(log_prior, log_q, share))

    def _facts(self, target: Target, lm: LanguageModel | None) -> dict[str, Any]:
        """What `merge` needs to know: a bound of the weights, whether they are 0 or 1, whether q may not cover."""
        log_bound = math.inf
        if lm is None:
            log_bound = target.form.log_upper
        elif self.defensive > 0.0:
            # A bound that is a hair larger is a bound too; rounding of the densities never exceeds it.
            log_bound = target.form.log_upper - math.log(self.defensive) + ROUNDING
        coverage = ""
        if lm is not None and self.defensive == 0.0:
            coverage = coverage_note(lm, target.prior)
        binary = lm is None and all(isinstance(f, Constraint) for f in target.factors)
        return {"log_bound": log_bound, "binary": binary, "coverage": coverage}


def _refuse_all_zero(draws: Draws, weights: Sequence[Tensor], log_bound: float) -> None:
    """Raise where every weight of a context is zero."""
    found = first_context(torch.tensor([not bool((w > -math.inf).any()) for w in weights]))
    if found is None:
        return
    c, also = found
    n, names = len(weights[c]), list(draws.log_factors)
    rate = float(binomial_upper(torch.tensor(0), torch.tensor(n), LEVEL))
    if math.isfinite(log_bound):
        follows = f"{z_below(rate, log_bound)} with {LEVEL:.0%} confidence"
    else:
        follows = (
            f"Pr_q(γ > 0) < {rate:.1e} with {LEVEL:.0%} confidence, and no bound on Z follows without a bound on the "
            "weights (upper=... on every factor, and draws from the prior)"
        )
    raise InfeasibleModel(
        f"importance: all {n:,} draws for context {draws.prompts[c]!r}{also} have weight "
        f"zero{blame(names, count_zeros(draws, names)[c])}: {follows}; draw more, loosen the hard factors, or use a "
        "proposal or an engine that steers"
    )


def _normalizers(
    weights: Sequence[Tensor], shapes: Sequence[TailShape], facts: Mapping[str, Any]
) -> tuple[Estimate, ...]:
    """Estimates of log Z, the best interval first."""
    log_bound, counts = float(facts["log_bound"]), torch.tensor([len(w) for w in weights])
    delta = stack([log_mean_weight(w, LEVEL) for w in weights])
    heavy = [f"k̂ = {s.value:.2f} in context {c}" for c, s in enumerate(shapes) if s.value > KHAT_LIMIT]
    if heavy:
        delta = replace(delta, note=f"{delta.note}; not to be trusted: {', '.join(heavy)}, above {KHAT_LIMIT}")
    estimates: tuple[Estimate, ...] = (delta,)
    if facts["binary"]:
        satisfied = torch.tensor([int((w > -math.inf).sum()) for w in weights])
        estimates = (log_acceptance(satisfied, counts, 0.0, level=LEVEL), delta)
    elif math.isfinite(log_bound) and int(counts.min()) > 1:
        estimates = (delta, stack([log_mean_weight_bounded(w, log_bound, LEVEL) for w in weights]))
    return with_coverage(estimates, str(facts["coverage"]))


def _each(figure: Callable[[Tensor], Tensor], weights: Sequence[Tensor]) -> Tensor:
    return torch.stack([figure(w) for w in weights])
