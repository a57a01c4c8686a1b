"""Decoding-time laws that are made from a prior's own next-token law, and the engines that decode them."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmppl.diagnostics.intervals import binomial_upper
from lmppl.errors import InfeasibleModel, ModelError, UnsupportedModel
from lmppl.inference.approximation import Sampler
from lmppl.inference.engine import Engine, Guarantee, Part, Shard
from lmppl.inference.refusals import blame, count_zeros, first_context
from lmppl.lm.base import LanguageModel
from lmppl.lm.decoder import Step
from lmppl.lm.decoding import plan_rows
from lmppl.lm.derived import ReweighedLM
from lmppl.lm.frontier import Frontier
from lmppl.lm.randomness import Source
from lmppl.modeling.model import Model
from lmppl.modeling.target import Target, log_evidence
from lmppl.sequences import Cost, Draws, concatenate

__all__ = ["DecodingEngine", "SteeredLM", "SteeredSampler", "draw_steered", "log_prior_of", "steered_step"]

log = logging.getLogger(__name__)


class SteeredLM(ReweighedLM):
    """Base of decoding-time laws q(x_t|c, x_<t) that are computed from a prior's own next-token law.

    Their steps carry, beside the scores of q, those of π0, so that one pass gives log q and log π0: `hidden` is
    (B, k, 2V + 1), the unnormalised log q and log π0, and whether the row could only be dead.
    """

    @property
    def prior(self) -> LanguageModel:
        """π0."""
        return self.base

    def bytes_per_row(self, num_tokens: int) -> int:
        """As `LanguageModel.bytes_per_row`: scores of q and of π0 at each position of a teacher-forced row."""
        return self.base.bytes_per_row(num_tokens) + 3 * 8 * (num_tokens + 1) * self.vocab_size


def steered_step(scores: Tensor, prior: Tensor, dead: Tensor) -> Step:
    """The step of a `SteeredLM` from (B, k, V) scores of q and π0 and (B, k) dead rows."""
    vocab = scores.shape[-1]
    hidden = torch.cat([scores, prior, dead[..., None].to(scores.dtype)], -1)
    return Step(lambda rows: rows[:, :vocab], hidden)


def log_prior_of(hidden: Tensor) -> Tensor:
    """(L, V) log π0 of the next token, in nats, from rows (L, 2V + 1) of a steered step."""
    vocab = hidden.shape[-1] // 2
    return torch.log_softmax(hidden[:, vocab : 2 * vocab], -1)


def draw_steered(lm: SteeredLM, context: Tensor, source: Source, *, cost: Cost | None = None) -> Draws:
    """A draw of q for each entry of `context` (B,), with log q and log π0 from the same forwards.

    Rows in the order of `context`, on the CPU. The column `unsteered` (B,) bool is True where all that could follow
    some prefix of the row was forbidden, so that π0 decoded it from there.
    """
    frontier = Frontier(lm, context, cost=cost)
    log_q = torch.zeros(len(context), dtype=lm.dtype, device=lm.device)
    log_prior = torch.zeros_like(log_q)
    unsteered = torch.zeros(len(context), dtype=torch.bool, device=lm.device)
    while len(frontier.live):
        live = frontier.live
        hidden = frontier.hidden()
        prior = log_prior_of(hidden)
        unsteered[live] |= hidden[:, -1] > 0
        tokens, token_log_q = source.tokens(frontier.logits())
        log_q[live] += token_log_q
        log_prior[live] += prior.gather(1, tokens[:, None])[:, 0]
        frontier.append(tokens)
    if not bool(torch.isfinite(log_q).all()):
        raise ModelError(f"{lm!r} gave next-token scores that are nan or +inf: its weights or dtype are broken")
    rows = frontier.sequences()
    densities: dict[str, Any] = {"log_prior": log_prior.cpu(), "log_q": log_q.cpu()}
    densities["columns"] = {"unsteered": unsteered.cpu()}
    return Draws(rows.ids, rows.lengths, rows.finished, rows.context, rows.prompts, rows.decoder, **densities)


@dataclass(frozen=True, eq=False, repr=False)
class SteeredSampler(Sampler):
    """Independent draws of a decoding-time law, which is a language model: as a proposal, its weights correct it."""

    def as_language_model(self) -> LanguageModel:
        """q as a `LanguageModel`, for `Importance(proposal=...)`, or as the next model's prior."""
        if not isinstance(self.engine, DecodingEngine) or self.model is None:
            raise UnsupportedModel("this approximation was not made by lmppl.infer, so its law is not known")
        return self.engine.language_model(self.model)


@dataclass(frozen=True)
class DecodingEngine(Engine):
    """Base of engines that decode a steered law: a heuristic that says its law, and keeps log q of each draw."""

    guarantee = Guarantee.HEURISTIC

    @abstractmethod
    def language_model(self, model: Model) -> SteeredLM:
        """The law that this engine decodes for `model`."""

    def simulate(self, target: Target, shard: Shard, source: Source, *, state: Any = None) -> Part:
        """As `Engine.simulate`."""
        lm = self.language_model(target.model)
        context = torch.tensor(shard.contexts, dtype=torch.int64).repeat_interleave(shard.num_draws)
        size = min(shard.batch_size, plan_rows(lm, len(context)))
        parts = []
        for rows in context.split(size):
            parts.append(draw_steered(lm, rows, source, cost=target.cost))
            done = sum(len(p) for p in parts)
            target.report(done / len(context), {"draws": f"{done:,}"})
        draws = target.evaluate(concatenate(parts, pad_id=lm.pad_id))
        lost = draws.context[draws.columns["unsteered"] & (log_evidence(draws) > -math.inf)]
        info = {"unsteered": torch.bincount(lost, minlength=target.form.num_contexts)}
        columns = {"shard": torch.full_like(draws.context, shard.id)}
        return Part(shard, draws.with_columns(columns=columns), info={**info, "facts": self.facts(target)})

    def facts(self, target: Target) -> dict[str, Any]:
        """What `info` says beside the figures of the draws; plain data."""
        return {}

    def merge(self, parts: Sequence[Part]) -> SteeredSampler:
        """As `Engine.merge`."""
        draws = concatenate([p.draws for p in parts])
        violating = (log_evidence(draws) == -math.inf).double()
        counts = torch.bincount(draws.context, minlength=draws.num_contexts)
        share = torch.bincount(draws.context, weights=violating, minlength=draws.num_contexts) / counts
        self._tell_violations(draws, share, counts)
        self._tell_unsteered(draws, torch.stack([p.info["unsteered"] for p in parts]).sum(0), counts)
        order = torch.argsort(draws.context, stable=True)
        info = {"violating_share": share, **parts[0].info["facts"]}
        return SteeredSampler(draws.select(order), (), self.guarantee, info)

    def _tell_unsteered(self, draws: Draws, unsteered: Tensor, counts: Tensor) -> None:
        """Raise where scores forbade all that could follow in every draw of a context, and γ > 0; warn of some."""
        found = first_context(unsteered == counts)
        what = "the scores forbid every token after some prefix, though what follows there has γ > 0"
        if found is not None:
            c, also = found
            raise ModelError(
                f"{self.name}: {what}, in all {int(counts[c]):,} draws for context {draws.prompts[c]!r}{also}: they "
                "are the prior's from there on; give −inf only to what no text with γ > 0 begins with"
            )
        if bool((unsteered > 0).any()):
            share = 100 * float((unsteered / counts).mean())
            log.warning("%s: %s, in %.1f %% of the draws, which are the prior's from there on", self.name, what, share)

    def _tell_violations(self, draws: Draws, share: Tensor, counts: Tensor) -> None:
        """Raise where all draws of a context have γ = 0, and warn where some have."""
        found = first_context(share == 1.0)
        if found is not None:
            c, also = found
            bound = float(binomial_upper(torch.tensor(0), counts[c]))
            names = list(draws.log_factors)
            raise InfeasibleModel(
                f"{self.name}: none of {int(counts[c]):,} draws for context {draws.prompts[c]!r}{also} has "
                f"γ > 0{blame(names, count_zeros(draws, names)[c])}: Pr_q(γ > 0) < {bound:.2g} with 95% confidence, q "
                "the law that is decoded; decode more draws, use scores that look ahead or an engine that weighs and "
                "resamples (SMC), or declare a weaker constraint"
            )
        if bool((share > 0).any()):
            log.warning(
                "%s: %.1f %% of the draws violate a hard constraint; weights correct them: "
                "Importance(proposal=...) or SMC(proposal=...)",
                self.name,
                100 * float(share.mean()),
            )
