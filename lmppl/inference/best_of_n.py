"""BestOfN: of n draws from the prior, keep the best, or one in proportion to exp(score/τ); and the exact laws."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmppl.diagnostics.intervals import binomial_upper
from lmppl.errors import InfeasibleModel, ModelError, SupportTooLarge
from lmppl.inference.approximation import Sampler
from lmppl.inference.engine import (
    SHARD_DRAWS,
    Engine,
    Guarantee,
    Part,
    Request,
    Shard,
    make_shard,
)
from lmppl.inference.proposals import propose
from lmppl.inference.refusals import blame, count_zeros, first_context
from lmppl.lm.randomness import Source
from lmppl.modeling.target import Target, TargetForm, log_evidence
from lmppl.sequences import Draws, concatenate

__all__ = ["BestOfN", "best_of_n_law", "choose_of_each", "soft_best_of_n_law"]

log = logging.getLogger(__name__)

COMPOSITIONS = 2_000_000  # ways for n − 1 proposals to have scores, that an exact law may sum over


@dataclass(frozen=True)
class BestOfN(Engine):
    """The best of n independent draws from π0, ties broken at random: a heuristic, whose law is known but is not π*.

    With score s(x) = Σ_k log φ_k(x), or the column named by `score`, and F(v) = π0(s ≤ v), F(v⁻) = π0(s < v):

        P(s = v) = F(v)^n − F(v⁻)^n,   within a level ∝ π0,   KL(BoN‖π0) ≤ log n − (n−1)/n nats   (`beirami2024`).

    Only the order of scores matters: the β of a single reward changes nothing, n alone sets how strongly it pulls.
    There is no estimate of log Z, and `log_q` is not known draw by draw; `best_of_n_law` computes it where the outcomes
    can be enumerated.

    A violated hard constraint is a level of its own (−∞), kept as the law says: where all n proposals violate it, so
    does the draw. `info["violating_share"]` (C,) is the share of draws with γ = 0, and a warning is logged where it is
    positive. Raise n, or use rejection, to be rid of them.
    `info["kl_bound"]` is the bound of KL(BoN‖π0) above, in nats.

    The soft variant draws one of the n with probability ∝ exp(s/τ), τ = `soft`: sampling-importance-resampling towards
    π0·e^{s/τ}, which it reaches as n grows, with a KL of order 1/n (`verdun2025`). With s = Σ_k log φ_k and τ = 1 that
    is π* itself; τ → 0 gives the hard variant, τ → ∞ the prior among the proposals with s > −∞. Its law for finite n is
    neither; `soft_best_of_n_law` computes it.

    Parameters
    ----------
    n : int
        Proposals for each draw, all fresh.
    score : str, optional
        Name of a factor (its log φ) or of a feature (one number a text), higher is better; by default Σ_k log φ_k.
    num_draws : int
        Draws per context where `infer` does not say.
    soft : float, optional
        τ > 0, in the units of the score; None for the hard variant.

    Raises
    ------
    ModelError
        Where n < 1, τ ≤ 0, or `score` names no factor or feature, or a feature of several columns.
    InfeasibleModel
        Where all proposals of a context had γ = 0: naming it, with a 95 % upper bound of their prior probability.

    References
    ----------
    `stiennon2020` for the method, `beirami2024` for its law, `verdun2025` for the soft variant.
    """

    n: int = 16
    score: str | None = None
    num_draws: int = 64
    soft: float | None = None

    name: ClassVar[str] = "best_of_n"
    guarantee: ClassVar[Guarantee] = Guarantee.HEURISTIC
    references: ClassVar[tuple[str, ...]] = ("stiennon2020", "beirami2024", "verdun2025")

    def unsupported_reason(self, form: TargetForm) -> str | None:
        """As `Engine.unsupported_reason`."""
        if not form.factor_names:
            return (
                "best_of_n needs a score: this model has no factor; multiply the prior by one, such as lmppl.Reward(fn)"
            )
        return super().unsupported_reason(form)

    def plan(self, target: Target, request: Request) -> list[Shard]:
        """Shards of about 1,024 proposals, so that progress and budgets see the forwards that are really made."""
        if not isinstance(self.n, int) or self.n < 1:
            raise ModelError(f"BestOfN: got n = {self.n!r}, expected at least 1, an integer")
        if self.soft is not None and not 0.0 < self.soft < math.inf:
            raise ModelError(f"BestOfN: got soft={self.soft!r}, expected a positive temperature, or None for the best")
        known = (*target.form.factor_names, *target.model.features)
        if self.score is not None and self.score not in known:
            raise ModelError(f"BestOfN: score {self.score!r} names no factor or feature; there are {sorted({*known})}")
        contexts = tuple(range(target.form.num_contexts))
        wanted = self.wanted(request)
        size = max(1, SHARD_DRAWS // (len(contexts) * self.n))
        counts = [size] if wanted is None else [min(size, wanted - start) for start in range(0, wanted, size)]
        shards = [make_shard(target, i, count, request.seed, contexts) for i, count in enumerate(counts)]
        batch = make_shard(target, 0, size * self.n, request.seed, contexts).batch_size
        return [replace(shard, batch_size=batch) for shard in shards]

    def simulate(self, target: Target, shard: Shard, source: Source, *, state: Any = None) -> Part:
        """As `Engine.simulate`; the part's info holds `possible` (C,), the proposals with γ > 0 of each context."""
        proposals = propose(target.prior, shard, shard.num_draws * self.n, source=source, cost=target.cost)
        proposals = target.evaluate(proposals)
        possible = log_evidence(proposals) > -torch.inf
        chosen = choose_of_each(self._scores(proposals).view(-1, self.n), source, self.soft)
        draws = proposals.select(chosen).with_columns(log_q=None)
        count = torch.bincount(proposals.context[possible].cpu(), minlength=target.form.num_contexts)
        return Part(shard, draws, info={"possible": count, "zeros": count_zeros(proposals, list(draws.log_factors))})

    def merge(self, parts: Sequence[Part]) -> Sampler:
        """As `Engine.merge`."""
        draws = concatenate([p.draws for p in parts])
        possible = torch.stack([p.info["possible"] for p in parts]).sum(0)
        num_draws = sum(p.shard.num_draws for p in parts)
        found = first_context(possible == 0)
        if found is not None:
            c, also = found
            tried = num_draws * self.n
            bound = float(binomial_upper(possible[c], torch.tensor(tried)))
            zeros = torch.stack([p.info["zeros"][c] for p in parts]).sum(0)
            raise InfeasibleModel(
                f"best_of_n: none of {tried:,} proposals for context {draws.prompts[c]!r}{also} has "
                f"γ > 0{blame(list(draws.log_factors), zeros)}: Pr_π0(γ > 0) < {bound:.2g} with 95% confidence; raise "
                "n or num_draws, or declare a weaker constraint"
            )
        violating = draws.context[log_evidence(draws) == -torch.inf].cpu()
        share = torch.bincount(violating, minlength=draws.num_contexts).double() / num_draws
        if bool((share > 0).any()):
            log.warning(
                "best_of_n: %.1f %% of the draws violate a hard constraint; raise n",
                100 * float(share.mean()),
            )
        info = {"violating_share": share, "kl_bound": math.log(self.n) - (self.n - 1) / self.n}
        return Sampler(draws, (), self.guarantee, info)

    def _scores(self, proposals: Draws) -> Tensor:
        if self.score is None:
            return log_evidence(proposals)
        known = {**proposals.features, **proposals.log_factors}
        values = known[self.score]
        if values.dim() != 1:
            raise ModelError(
                f"BestOfN: score {self.score!r} has {values.shape[1]} values a text, expected one; name a factor"
            )
        return values.double()


def best_of_n_law(log_prior: Tensor, log_phi: Tensor, n: int) -> Tensor:
    """(S,) log-probability that each of S outcomes is the best of n draws, in nats.

    P(x) = [F(v)^n − F(v⁻)^n] · π0(x)/π0(s = v) at v = s(x), evaluated without cancellation as
    F(v)^n · (1 − (1 − π0(s = v)/F(v))^n)   (`beirami2024`).

    Parameters
    ----------
    log_prior : Tensor (S,)
        log π0(x) of *all* outcomes of one context, in nats.
    log_phi : Tensor (S,)
        The score s(x): finite or −inf, which is a level like any other.
    n : int
        Proposals.

    Raises
    ------
    ModelError
        Where n is no integer of at least 1, or no outcome is possible.
    """
    if type(n) is not int or n < 1:
        raise ModelError(f"best_of_n_law: got n = {n!r}, expected an integer of at least 1")
    if not bool((log_prior > -torch.inf).any()):
        raise ModelError("best_of_n_law: got log_prior = −inf for all outcomes, expected the law of the prior")
    result = torch.full_like(log_prior, -torch.inf, dtype=torch.float64)
    possible, prior, _, level, at_level = _by_level(log_prior, log_phi)
    up_to = torch.logcumsumexp(at_level, 0)
    share = (at_level - up_to).exp()  # π0(s = v)/F(v), exactly 1 at the lowest level
    log_level = n * up_to + torch.log(-torch.expm1(n * torch.log1p(-share)))
    result[possible] = (log_level - at_level)[level] + prior
    return result


def soft_best_of_n_law(log_prior: Tensor, scores: Tensor, n: int, temperature: float) -> Tensor:
    """(S,) log-probability that each of S outcomes is the one drawn ∝ exp(s/τ) among n draws of π0, in nats.

        P(x) = n π0(x) E[ e^{s(x)/τ} / (e^{s(x)/τ} + Σ_{j<n} e^{s(x_j)/τ}) ],   x_1..x_{n−1} ~ π0,

    summed over all ways in which n − 1 draws can fall on the levels of s; where all n have s = −∞, each is drawn with
    probability 1/n. Within a level ∝ π0 (`verdun2025`).

    Parameters
    ----------
    log_prior : Tensor (S,)
        log π0(x) of *all* outcomes of one context, in nats.
    scores : Tensor (S,)
        s(x): finite or −inf.
    n : int
        Proposals.
    temperature : float
        τ > 0.

    Raises
    ------
    SupportTooLarge
        Where there are more than two million such ways.
    """
    if n < 1 or not 0.0 < temperature < math.inf:
        raise ModelError(f"soft_best_of_n_law: got n = {n} and τ = {temperature}, expected n ≥ 1 and τ > 0")
    result = torch.full_like(log_prior, -torch.inf, dtype=torch.float64)
    possible, prior, levels, level, log_level = _by_level(log_prior, scores)
    ways = math.comb(n - 1 + len(levels) - 1, n - 1)
    if ways > COMPOSITIONS:
        raise SupportTooLarge(
            f"soft_best_of_n_law: {n - 1} draws on {len(levels)} levels fall in {ways:,} ways, more than "
            f"{COMPOSITIONS:,}; lower n, or use scores with fewer levels"
        )
    log_weight = levels / temperature
    # log E over the others, for a draw on each level, one composition after another.
    terms: list[Tensor] = []
    for others in itertools.combinations_with_replacement(range(len(levels)), n - 1):
        counts = torch.bincount(torch.tensor(others, dtype=torch.int64), minlength=len(levels)).double()
        multiplicity = math.lgamma(n) - float(torch.lgamma(counts + 1).sum())
        log_chance = multiplicity + float((counts * log_level).sum())
        rest = torch.logsumexp(torch.where(counts > 0, log_weight + counts.log(), -torch.inf), 0)
        total = torch.logaddexp(log_weight, rest)
        share = torch.where(total > -torch.inf, log_weight - total, -math.log(n))
        terms.append(log_chance + share)
    log_expected = torch.logsumexp(torch.stack(terms), 0)
    result[possible] = math.log(n) + prior + log_expected[level]
    return result


def _by_level(log_prior: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of the R possible rows: their numbers, log π0, the levels (K,) of s, each row's level, log π0(s = level) (K,)."""
    possible = torch.nonzero(log_prior > -torch.inf).squeeze(1)
    prior = log_prior[possible].double()
    levels, level = torch.unique(scores[possible].double(), return_inverse=True)
    log_level = torch.stack([torch.logsumexp(prior[level == i], 0) for i in range(len(levels))])
    return possible, prior, levels, level, log_level


def choose_of_each(scores: Tensor, source: Source, soft: float | None = None) -> Tensor:
    """(G,) row numbers: one of each group of `scores` (G, n), the highest (ties at random), or ∝ exp(score/`soft`).

    Where all scores of a group are −∞, each of it is as likely.
    """
    top = scores.amax(-1, keepdim=True)
    if soft is None:
        logits = torch.where(scores == top, 0.0, -math.inf)
    else:
        logits = torch.where(top > -math.inf, scores / soft, 0.0)
    winner, _ = source.tokens(logits.double())
    return torch.arange(len(scores), device=scores.device) * scores.shape[1] + winner
