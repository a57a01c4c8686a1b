"""Greedy and beam search: the most probable outcomes that a narrow search finds; baselines, not samplers."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmppl.errors import InfeasibleModel, ModelError
from lmppl.inference.approximation import Particles
from lmppl.inference.engine import Engine, Guarantee, Part, Request, Shard, make_shard
from lmppl.inference.guided import GuidedLM
from lmppl.inference.refusals import first_context
from lmppl.inference.twists.exclusions import try_exclusions
from lmppl.lm.base import LanguageModel
from lmppl.lm.frontier import Frontier
from lmppl.lm.randomness import Source
from lmppl.lm.truncation import keep_top_k
from lmppl.modeling.model import Model
from lmppl.modeling.target import Target, log_evidence
from lmppl.sequences import Cost, Draws, Estimate, concatenate

__all__ = ["Beam", "Greedy", "search"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Beam(Engine):
    """Beam search: a heuristic for the modes of γ, deterministic, with no law to sample from.

    A beam is a prefix with the score log π0(x_≤t|c) + Σ_k log ψ_k(x_≤t), over the factors that have an incremental form
    (without one, or with `guided=False`: log π0 alone). At each step the `num_beams` best of all extensions go on;
    beams that have ended compete with their score as it is, without a correction for length. Ties go to the lower beam
    and token, so that the result is a function of the model.

    The draws are the beams of each context, at most `num_beams` different outcomes, best score first (column `rank`),
    however many draws were asked for and whatever the seed: a search has no more. They are equally weighted: a list,
    not a sample, whose expectations are means over the list. Texts of high probability are short and repeat
    themselves; that is the mode, not a fault of the search.

    Parameters
    ----------
    num_beams : int
        Beams of each context.
    guided : bool
        Whether incremental forms take part in the score.

    Notes
    -----
    log Z: Σ γ(x) over the different outcomes found is a lower bound of Z, which holds for certain. `info`:
    `violating_share` (C,), the share of beams with γ = 0, which a warning tells where there are any; `searched`, the
    names of the factors in the score.

    References
    ----------
    lowerre1976
    """

    num_beams: int = 4
    guided: bool = True

    name: ClassVar[str] = "beam"
    guarantee: ClassVar[Guarantee] = Guarantee.HEURISTIC
    references: ClassVar[tuple[str, ...]] = ("lowerre1976",)
    deterministic: ClassVar[bool] = True
    """The seed changes nothing."""

    @property
    def default_draws(self) -> int:
        """All the beams."""
        return self.num_beams

    def plan(self, target: Target, request: Request) -> list[Shard]:
        """One shard: the whole search."""
        if self.num_beams < 1:
            raise ModelError(f"Beam: got num_beams={self.num_beams!r}, expected at least 1")
        self.wanted(request)
        contexts = tuple(range(target.form.num_contexts))
        return [make_shard(target, 0, self.num_beams, request.seed, contexts)]

    def replan(self, target: Target, request: Request, parts: Sequence[Part]) -> list[Shard]:
        """None: the search is done."""
        return []

    def simulate(self, target: Target, shard: Shard, source: Source, *, state: Any = None) -> Part:
        """As `Engine.simulate`; no choice is random."""
        lm, names = self._law(target.model)
        at_once = max(1, shard.batch_size // self.num_beams)
        parts = []
        for contexts in torch.tensor(shard.contexts).split(at_once):
            parts.append(search(lm, contexts, self.num_beams, cost=target.cost))
            target.report(sum(len(p) for p in parts) / (self.num_beams * len(shard.contexts)), {})
        found = concatenate(parts, pad_id=lm.pad_id)
        lost = first_context(torch.bincount(found.context, minlength=target.form.num_contexts) == 0)
        if lost is not None:
            c, also = lost
            raise InfeasibleModel(
                f"{self.name}: every beam for context {target.contexts[c]!r}{also} ran into prefixes that "
                f"{', '.join(map(repr, names)) or 'the prior'} excludes; raise num_beams, or use an engine that samples"
            )
        if lm is not target.prior:
            found = found.with_columns(log_prior=target.log_prior(found))
        found = target.evaluate(found)
        try_exclusions(target, [f for f in target.factors if f.name in names], found, shard.seed)
        return Part(shard, found, info={"searched": names})

    def merge(self, parts: Sequence[Part]) -> Particles:
        """As `Engine.merge`."""
        draws = concatenate([p.draws for p in parts])
        assert draws.log_prior is not None
        log_phi = log_evidence(draws)
        log_gamma = draws.log_prior.double() + log_phi
        rows = [torch.nonzero(draws.context == c).squeeze(1) for c in range(draws.num_contexts)]
        bound = torch.stack([torch.logsumexp(log_gamma[r], 0) for r in rows])
        share = torch.stack([(log_phi[r] == -math.inf).double().mean() for r in rows])
        self._tell_violations(draws, rows, share)
        note = "Σ γ over the outcomes that were found; holds for certain"
        interval = torch.stack([bound, torch.full_like(bound, math.inf)], -1)
        estimate = Estimate(bound, interval, 1.0, "lower_bound", None, 1, note)
        info = {"violating_share": share, "searched": parts[0].info["searched"]}
        return Particles(draws, (estimate,), self.guarantee, info)

    def _tell_violations(self, draws: Draws, rows: Sequence[Tensor], share: Tensor) -> None:
        """Warn where beams have γ = 0: of a context of which all have, by the factors that no beam satisfies."""
        found = first_context(share == 1.0)
        if found is not None:
            c, also = found
            zero = {name: values[rows[c]] == -math.inf for name, values in draws.log_factors.items()}
            names = [n for n, z in zero.items() if bool(z.all())] or [n for n, z in zero.items() if bool(z.any())]
            log.warning(
                "%s: γ = 0 for all that was found (%d) for context %r%s, by %s: nothing follows about log Z; steer the "
                "search with a factor that has an incremental form, search wider (Beam), or use an engine that samples",
                self.name, len(rows[c]), draws.prompts[c], also, ", ".join(f"factor {name!r}" for name in names),
            )  # fmt: skip
        elif bool((share > 0).any()):
            log.warning("%s: %.1f %% of the beams violate a hard constraint", self.name, 100 * float(share.mean()))

    def _law(self, model: Model) -> tuple[LanguageModel, tuple[str, ...]]:
        """What is searched, and the names of the factors in its score."""
        factors = [f for f in model.factors if f.incremental is not None and self.guided]
        names = tuple(f.name for f in factors)
        return (GuidedLM(model.prior, factors) if factors else model.prior), names


@dataclass(frozen=True)
class Greedy(Beam):
    """Greedy decoding: at each step the most probable token, a heuristic that is deterministic.

    `Beam` with one beam: the token with the largest log π0(x_t|c, x_<t) + Σ_k weigh_k(x_<t, x_t), ties to the lower id.
    One outcome for each context, however many draws were asked for.

    Parameters
    ----------
    guided : bool
        Whether incremental forms take part in the score.

    References
    ----------
    lowerre1976
    """

    num_beams: int = field(default=1, init=False, repr=False)

    name: ClassVar[str] = "greedy"


def search(lm: LanguageModel, contexts: Tensor, num_beams: int, *, cost: Cost | None = None) -> Draws:
    """The beams of each context (C',), best score first; column `rank` counts them, `score` is log π0 + Σ log ψ.

    `lm` is a prior, or a `GuidedLM`, whose scores before normalisation are those of γ's prefix form. `log_prior` is
    filled in for a prior only.
    """
    count = len(contexts)
    frontier = Frontier(lm, contexts.repeat_interleave(num_beams), cost=cost)
    vocab = lm.vocab_size
    scores = torch.full((count, num_beams), -math.inf, dtype=lm.dtype, device=lm.device)
    scores[:, 0] = 0.0  # all beams begin as one
    while len(frontier.live):
        live = frontier.live
        ahead = scores.new_full((count * num_beams, vocab + 1), -math.inf)
        ahead[live, :vocab] = scores.view(-1)[live, None] + _gains(lm, frontier)
        over = torch.ones(count * num_beams, dtype=torch.bool, device=lm.device)
        over[live] = False
        ahead[over, vocab] = scores.view(-1)[over]  # an ended beam goes on as it is
        best, chosen = _best(ahead.view(count, -1), num_beams)
        parent, token = chosen // (vocab + 1), chosen % (vocab + 1)
        offset = torch.arange(count, device=lm.device)[:, None] * num_beams
        frontier.select((parent + offset).view(-1))
        scores = best
        tokens = token.view(-1)[frontier.live]
        # A row that no extension of positive probability is left for is dropped at the end; any token will do.
        frontier.append(tokens.masked_fill(tokens == vocab, 0))
    rows = frontier.sequences()
    found = torch.nonzero(scores.view(-1) > -math.inf).squeeze(1).cpu()
    rank = torch.arange(num_beams).repeat(count)
    draws = Draws(
        rows.ids, rows.lengths, rows.finished, rows.context, rows.prompts, rows.decoder,
        log_prior=None if isinstance(lm, GuidedLM) else scores.view(-1).cpu(),
        columns={"rank": rank, "score": scores.view(-1).cpu()},
    )  # fmt: skip
    return draws.select(found)


def _gains(lm: LanguageModel, frontier: Frontier) -> Tensor:
    """(L, V) log π0(v|c, x_<t) + Σ_k weigh_k(x_<t, v) of the live rows."""
    if not isinstance(lm, GuidedLM):
        return torch.log_softmax(frontier.logits(), -1)
    hidden, vocab = frontier.hidden(), lm.vocab_size
    steered, prior, dead = hidden[:, :vocab], hidden[:, vocab : 2 * vocab], hidden[:, -1:] > 0
    gains = steered - torch.logsumexp(prior, -1, keepdim=True)
    return gains.masked_fill(dead, -math.inf)


def _best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row of `scores` (C, M), and where they stand; ties to the lower index."""
    kept = keep_top_k(scores, count) if count < scores.shape[1] else scores
    where = torch.nonzero(_exactly(kept, count))[:, 1].view(len(scores), count)
    values = scores.gather(1, where)
    order = torch.sort(values, dim=1, descending=True, stable=True).indices
    return values.gather(1, order), where.gather(1, order)


def _exactly(kept: Tensor, count: int) -> Tensor:
    """(C, M) bool, `count` a row: the finite entries of `kept`, filled up with the first of the others."""
    finite = kept > -math.inf
    rest = ~finite & ((~finite).cumsum(1) <= count - finite.sum(1, keepdim=True))
    return finite | rest
