"""LocalEdit: a token is replaced, inserted or deleted; what follows it is read again, in one forward of the tail."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lmppl.inference.approximation import Approximation
from lmppl.inference.mcmc.chains import (
    ChainState,
    Evidence,
    Proposal,
    StepInfo,
    eos_mask,
    metropolis_hastings,
    possible_ratio,
    present_log_prior,
)
from lmppl.inference.mcmc.kernels import Regenerating
from lmppl.lm.base import LanguageModel
from lmppl.lm.randomness import Source
from lmppl.modeling.target import log_evidence

__all__ = ["LocalEdit", "edit_log_ratio"]

REPLACE, INSERT, DELETE = 0, 1, 2


def edit_log_ratio(
    kind: Tensor, log_prior_change: Tensor, log_q_new: Tensor, log_q_old: Tensor, appended: Tensor, num_eos: int
) -> Tensor:
    """(M,) log [π0(new) k(old|new)] − log [π0(old) k(new|old)] of a replacement, insertion or deletion, in nats.

    log q of the token that comes (replace, insert) and of the one that goes (replace, delete). The laws of the
    positions cancel: an insertion has one place more than the row has tokens, and so has the deletion that undoes it.
    `appended` is 1 where an EOS, one of `num_eos`, is drawn for a row that the cap had cut, −1 where such a row is made
    by an insertion that pushes the EOS over the cap, else 0.
    """
    comes = torch.where(kind == DELETE, 0.0, log_q_new)
    goes = torch.where(kind == INSERT, 0.0, log_q_old)
    return log_prior_change - comes + goes + appended * math.log(max(1, num_eos))


@dataclass(frozen=True)
class LocalEdit(Regenerating):
    """A token is replaced, inserted or deleted, each with probability 1/3, anywhere before the row's end.

    New tokens come from q(·|what stands before), renormalised without EOS. Rows grow and shrink by one: at the cap, an
    insertion pushes the EOS out, and a deletion from a row that the cap had cut draws one. What cannot be done to a
    row leaves it as it is.

    Parameters
    ----------
    proposal : LanguageModel or Approximation, optional
        q; by default the prior.

    References
    ----------
    hastings1970, miao2019
    """

    proposal: LanguageModel | Approximation | None = field(default=None, repr=False)

    name: ClassVar[str] = "edit"
    references: ClassVar[tuple[str, ...]] = ("hastings1970", "miao2019")

    def step(
        self, state: ChainState, source: Source, power: float | Tensor = 1.0, *, evidence: Evidence = log_evidence
    ) -> tuple[ChainState, StepInfo]:
        """As `Kernel.step`."""
        prior, draws = state.target.prior, state.draws
        every, cap, num_eos = torch.arange(len(draws)), prior.max_new_tokens, len(prior.eos_ids)
        body = draws.lengths - draws.finished.long()
        kind = source.integers(torch.full_like(body, 3))
        keep = source.integers(torch.where(kind == INSERT, body + 1, body).clamp_min(1))
        keep = torch.minimum(keep, draws.lengths - 1)  # a row that the cap has cut: nothing can be inserted there
        last = draws.ids.gather(1, draws.lengths[:, None] - 1)[:, 0]
        by_eos = draws.finished & torch.isin(last, torch.tensor(prior.eos_ids, dtype=torch.int64))
        can = torch.where(kind == INSERT, draws.finished & ((body < cap - 1) | by_eos), body > 0)
        can &= (kind != DELETE) | draws.finished | (num_eos > 0)
        shelf = state.caught_up(self.lm(state.target), every, keep)
        logits = shelf.logits(*(x.to(shelf.slot.device) for x in (every, keep)))
        logits = logits.masked_fill(eos_mask(shelf.lm), -torch.inf)
        can &= (kind == DELETE) | (logits > -torch.inf).any(1).cpu()
        rows = torch.nonzero(can).squeeze(1)
        kind, keep, body = kind[rows], keep[rows], body[rows]
        log_q = torch.log_softmax(logits, -1).cpu()[rows]
        token = draws.ids[rows].gather(1, keep[:, None])[:, 0]
        new_token, log_q_new = token.clone(), torch.zeros(len(rows), dtype=torch.float64)
        comes = torch.nonzero(kind != DELETE).squeeze(1)
        new_token[comes], drawn = source.tokens(log_q[comes])
        log_q_new[comes] = drawn.double()
        cut = (kind == DELETE) & ~draws.finished[rows]
        eos = self._eos(prior, cut, source)
        ids, lengths = _edited(draws.ids[rows], draws.lengths[rows], kind, keep, new_token, eos, cut, prior.pad_id, cap)
        full = (kind == INSERT) & (body + 1 == cap)
        finished = torch.where(full, False, draws.finished[rows] | cut)
        proposal = self._scored(state, rows, ids, lengths, finished, keep)
        ratio = edit_log_ratio(
            kind,
            proposal.log_ratio,
            log_q_new,
            log_q.gather(1, token[:, None])[:, 0].double(),
            cut.double() - full.double(),
            num_eos,
        )
        parsed = prior.parse(ids, draws.context[rows])
        same = parsed.lengths.eq(lengths) & parsed.finished.eq(finished)
        ratio = possible_ratio(ratio.masked_fill(~same, -torch.inf), proposal.log_prior)
        return metropolis_hastings(self.name, state, proposal._replace(log_ratio=ratio), source, power, evidence)

    def _eos(self, prior: LanguageModel, cut: Tensor, source: Source) -> Tensor:
        """(M,) the EOS that each cut row gets."""
        eos = torch.zeros(len(cut), dtype=torch.int64)
        if bool(cut.any()):
            which = source.integers(torch.full((int(cut.sum()),), len(prior.eos_ids)))
            eos[cut] = torch.tensor(prior.eos_ids)[which]
        return eos

    def _scored(
        self, state: ChainState, rows: Tensor, ids: Tensor, lengths: Tensor, finished: Tensor, keep: Tensor
    ) -> Proposal:
        """New rows with log π0, and its change in the place of `log_ratio`."""
        if len(rows) == 0:
            none = torch.zeros(0, dtype=torch.float64)
            return Proposal(rows, ids, lengths, finished, keep, none, none)
        ground = state.caught_up(state.target.prior, rows, keep)
        forced = ground.force(*(x.to(ground.slot.device) for x in (rows, keep, ids, lengths)))
        log_prior = ground.pending_log_probs(forced).cpu().sum(1)
        change = log_prior - present_log_prior(state, rows)
        return Proposal(rows, ids, lengths, finished, keep, log_prior, change, ((ground, forced),))


def _edited(
    ids: Tensor,
    lengths: Tensor,
    kind: Tensor,
    keep: Tensor,
    token: Tensor,
    eos: Tensor,
    cut: Tensor,
    pad: int,
    cap: int,
) -> tuple[Tensor, Tensor]:
    """Rows after their edits, and their lengths."""
    columns = torch.arange(ids.shape[1])
    shift = (kind == DELETE).long() - (kind == INSERT).long()
    source = torch.where(columns >= keep[:, None], columns + shift[:, None], columns).clamp(0, ids.shape[1] - 1)
    moved = ids.gather(1, source)
    at = keep[:, None]
    moved.scatter_(1, at, torch.where(kind == DELETE, moved.gather(1, at)[:, 0], token)[:, None])
    lengths = (lengths - shift).clamp_max(cap)
    moved = moved.masked_fill(columns >= lengths[:, None], pad)
    last = torch.nonzero(cut).squeeze(1)
    moved[last, cap - 1] = eos[last]
    lengths = lengths + cut.long()
    return moved, lengths
