"""Kernels that change a row in one place and keep what follows: `BlockResample`, `TokenGibbs`, `LocalEdit`.

What follows a change is read again by the prior, in one forward of the tail.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lmppl.errors import ModelError
from lmppl.inference.approximation import Approximation
from lmppl.inference.mcmc.chains import (
    ChainState,
    Evidence,
    Proposal,
    StepInfo,
    evaluated,
    metropolis_hastings,
    replaced,
    tempered,
)
from lmppl.inference.mcmc.kernels import Regenerating
from lmppl.lm.base import LanguageModel
from lmppl.lm.decoding import plan_rows
from lmppl.lm.randomness import Source
from lmppl.lm.shelf import Pending, Shelf
from lmppl.modeling.target import Target, log_evidence
from lmppl.sequences import Draws

__all__ = ["BlockResample", "LocalEdit", "TokenGibbs", "block_log_ratio", "edit_log_ratio"]


def block_log_ratio(
    log_prior_change: Tensor, log_q_new: Tensor, log_q_old: Tensor, ends: Tensor, old_lengths: Tensor, lengths: Tensor
) -> Tensor:
    """(M,) log [π0(new) k(old|new)] − log [π0(old) k(new|old)] of a block, in nats.

    Δ log π0 of the whole row, less the change of log q over the block. A block that `ends` the row may change its
    length: the position's law adds log|old| − log|new|.
    """
    index = torch.where(ends, old_lengths.double().log() - lengths.double().log(), 0.0)
    return log_prior_change - (log_q_new - log_q_old) + index


@dataclass(frozen=True)
class BlockResample(Regenerating):
    """q writes `size` tokens anew from a random position on, and what follows them stays.

    The position i is uniform on 1..|x|. A block inside the row (|x| ≥ i + size) holds no token that ends a row, before
    and after: q is renormalised without them, and the length stays. A block that reaches the row's end is written
    until the row ends; the way back needs the new row to end within the block too, and else the proposal is refused.

    Parameters
    ----------
    size : int
        Tokens of a block.
    proposal : LanguageModel or Approximation, optional
        q; by default the prior.

    References
    ----------
    hastings1970
    """

    size: int = 8
    proposal: LanguageModel | Approximation | None = field(default=None, repr=False)

    name: ClassVar[str] = "block"
    references: ClassVar[tuple[str, ...]] = ("hastings1970",)

    def check(self, target: Target) -> None:
        """As `Kernel.check`."""
        super().check(target)
        if not isinstance(self.size, int) or self.size < 1:
            raise ModelError(f"BlockResample: got size={self.size!r}, expected an integer of at least 1")

    def step(
        self, state: ChainState, source: Source, power: float | Tensor = 1.0, *, evidence: Evidence = log_evidence
    ) -> tuple[ChainState, StepInfo]:
        """As `Kernel.step`."""
        keep = source.integers(state.draws.lengths)
        inside = state.draws.lengths > keep + self.size
        infos = []
        for group in (inside, ~inside):
            rows = torch.nonzero(group).squeeze(1)
            if len(rows):
                write = self._inside if group is inside else self._at_the_end
                proposal = write(state, rows, keep[rows], source)
                state, info = metropolis_hastings(self.name, state, proposal, source, power, evidence)
                infos.append(info)
        if len(infos) == 1:
            return state, infos[0]
        mine = [torch.where(inside, a, b) for a, b in zip(infos[0][1:], infos[1][1:], strict=True)]
        return state, StepInfo(self.name, *mine)

    def _inside(self, state: ChainState, rows: Tensor, keep: Tensor, source: Source) -> Proposal:
        prior, draws = state.target.prior, state.draws
        lm = self.lm(state.target)
        lengths, until = draws.lengths[rows], keep + self.size
        shelf = state.caught_up(lm, rows, until)
        barred = _eos_mask(lm)
        old_q = _barred_log_q(shelf, rows, keep, until, draws.ids[rows], barred)
        where = [x.to(shelf.slot.device) for x in (rows, keep, until)]
        new = shelf.regenerate(where[0], where[1], draws.ids[rows], source, until=where[2], barred=barred)
        whole = torch.where(torch.arange(draws.ids.shape[1]) < until[:, None], new.ids.cpu(), draws.ids[rows])
        broken = new.finished.cpu()  # it ended within the block: by a stop string, or for want of another token
        pending: tuple[tuple[Shelf, Pending], ...]
        if lm is prior:
            # The block's last token is the first that is read: it was drawn, not yet read.
            forced = shelf.force(where[0], where[2] - 1, whole, lengths.to(shelf.slot.device), pending=new.pending)
            ground, pending = shelf, ((shelf, forced),)
        else:
            ground = state.caught_up(prior, rows, lengths)
            forced = ground.force(*(x.to(ground.slot.device) for x in (rows, keep, whole, lengths)))
            pending = ((ground, forced),)
        log_prior = ground.pending_log_probs(forced).cpu().sum(1)
        ratio = block_log_ratio(
            log_prior - _log_prior(state, rows),
            new.log_q.cpu().sum(1),
            old_q,
            torch.zeros_like(broken),
            lengths,
            lengths,
        )
        ratio = ratio.masked_fill(broken | ~_same_outcome(prior, whole, draws, rows), -torch.inf)
        return Proposal(
            rows, whole, lengths, draws.finished[rows], keep, log_prior, _possible(ratio, log_prior), pending
        )

    def _at_the_end(self, state: ChainState, rows: Tensor, keep: Tensor, source: Source) -> Proposal:
        proposal = self.suffix(state, rows, keep, source)
        ratio = proposal.log_ratio + state.draws.lengths[rows].double().log() - proposal.lengths.double().log()
        return proposal._replace(log_ratio=ratio.masked_fill(proposal.lengths > keep + self.size, -torch.inf))


def _barred_log_q(shelf: Shelf, rows: Tensor, keep: Tensor, until: Tensor, ids: Tensor, barred: Tensor) -> Tensor:
    """(M,) log q of the present tokens keep+1..until, q renormalised without the barred tokens."""
    total = torch.zeros(len(rows), dtype=torch.float64)
    for offset in range(int((until - keep).max())):
        at = keep + offset
        logits = shelf.logits(rows.to(shelf.slot.device), at.to(shelf.slot.device)).masked_fill(barred, -torch.inf)
        token = ids.gather(1, at[:, None]).to(logits.device)
        total += torch.log_softmax(logits, -1).gather(1, token)[:, 0].double().cpu()
    return total


def _log_prior(state: ChainState, rows: Tensor) -> Tensor:
    assert state.draws.log_prior is not None  # chains start with it
    return state.draws.log_prior[rows]


def _same_outcome(prior: LanguageModel, ids: Tensor, draws: Draws, rows: Tensor) -> Tensor:
    """(M,) bool: new rows end where the old ones do."""
    parsed = prior.parse(ids, draws.context[rows])
    return parsed.lengths.eq(draws.lengths[rows]) & parsed.finished.eq(draws.finished[rows])


def _eos_mask(lm: LanguageModel) -> Tensor:
    """(V,) bool: the EOS tokens."""
    mask = torch.zeros(lm.vocab_size, dtype=torch.bool, device=lm.device)
    mask[list(lm.eos_ids)] = True
    return mask


def _possible(ratio: Tensor, log_prior: Tensor) -> Tensor:
    return torch.where((log_prior > -torch.inf) & ~ratio.isnan(), ratio, -torch.inf)


@dataclass(frozen=True)
class TokenGibbs(Regenerating):
    """One token of the row is drawn from its exact conditional under π*, over a set of candidates.

    The position is uniform on 1..|x|, which no candidate changes: a candidate must leave the row an outcome of its
    length, so that EOS competes at the last position only, and at the cap with all tokens. The set depends on what
    stands before the position, never on the token there; a row whose token is not among the candidates stays.

    Parameters
    ----------
    num_candidates : int, optional
        The tokens that q gives most to, after what stands before. None: all tokens.
    candidates : tuple of int, optional
        These tokens instead, at every position.
    proposal : LanguageModel or Approximation, optional
        q; by default the prior.

    References
    ----------
    geman1984
    """

    num_candidates: int | None = 16
    candidates: tuple[int, ...] | None = None
    proposal: LanguageModel | Approximation | None = field(default=None, repr=False)

    name: ClassVar[str] = "token_gibbs"
    references: ClassVar[tuple[str, ...]] = ("geman1984",)

    def check(self, target: Target) -> None:
        """As `Kernel.check`."""
        super().check(target)
        vocab = target.form.vocab_size
        if self.num_candidates is not None and self.num_candidates < 2 and self.candidates is None:
            raise ModelError(f"TokenGibbs: got num_candidates={self.num_candidates}, expected at least 2")
        tokens = self.candidates
        if tokens is not None and (len(set(tokens)) != len(tokens) or not all(0 <= t < vocab for t in tokens)):
            raise ModelError(f"TokenGibbs: got candidates={tokens}, expected different ids of 0 to {vocab - 1}")

    def candidate_set(self, logits: Tensor) -> Tensor:
        """(B, k) candidates where q says `logits` (B, V)."""
        if self.candidates is not None:
            return torch.tensor(self.candidates, device=logits.device).expand(len(logits), -1)
        size = logits.shape[1] if self.num_candidates is None else min(self.num_candidates, logits.shape[1])
        return logits.topk(size).indices

    def step(
        self, state: ChainState, source: Source, power: float | Tensor = 1.0, *, evidence: Evidence = log_evidence
    ) -> tuple[ChainState, StepInfo]:
        """As `Kernel.step`."""
        prior, draws = state.target.prior, state.draws
        rows, lengths = torch.arange(len(draws)), draws.lengths
        keep = source.integers(lengths)
        shelf = state.caught_up(self.lm(state.target), rows, keep)
        tokens = self.candidate_set(shelf.logits(*(x.to(shelf.slot.device) for x in (rows, keep)))).cpu()
        present = draws.ids.gather(1, keep[:, None])
        member = (tokens == present).any(1)
        # The others compete with the present token, whose score and evidence are known.
        row, column = torch.nonzero((tokens != present) & member[:, None], as_tuple=True)
        ids = draws.ids[row]
        ids[torch.arange(len(row)), keep[row]] = tokens[row, column]
        parsed = prior.parse(ids, draws.context[row])
        whole = parsed.lengths.eq(lengths[row]) & (parsed.finished | lengths[row].eq(prior.max_new_tokens))
        row, column, ids, finished = row[whole], column[whole], ids[whole], parsed.finished[whole]
        ground = state.caught_up(prior, rows, lengths)
        change = self._tail_changes(ground, row, keep, ids, lengths)
        log_prior = _log_prior(state, row) + change
        offers = Proposal(row, ids, lengths[row], finished, keep[row], log_prior, change)
        possible = torch.nonzero(log_prior > -torch.inf).squeeze(1)
        new = evaluated(state.target, offers, possible, draws)
        scale = torch.as_tensor(power, dtype=torch.float64).expand(len(draws))
        logits = torch.full(tokens.shape, -torch.inf, dtype=torch.float64)
        if len(possible):
            at = row[possible]
            logits[at, column[possible]] = change[possible] + tempered(evidence(new), scale[at])
        own = torch.nonzero(tokens == present)
        logits[own[:, 0], own[:, 1]] = tempered(evidence(draws), scale)[own[:, 0]]
        movable = torch.nonzero(member & (logits > -torch.inf).any(1)).squeeze(1)
        chosen, _ = source.tokens(logits[movable])
        place = torch.full(tokens.shape, -1)
        place[row[possible], column[possible]] = torch.arange(len(possible))
        picked = place[movable, chosen]
        moved = picked >= 0
        state = replaced(state, new, movable[moved], picked[moved], keep[movable[moved]])
        return state, self._info(len(draws), movable, keep)

    def _tail_changes(self, shelf: Shelf, row: Tensor, keep: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
        """(M,) log π0 of the candidates' rows less that of their present rows."""
        if len(row) == 0:
            return torch.zeros(0, dtype=torch.float64)
        device = shelf.slot.device
        parts = []
        for chunk in torch.arange(len(row)).split(plan_rows(shelf.lm, len(row))):
            r = row[chunk]
            parts.append(shelf.score_tails(*(x.to(device) for x in (r, keep[r], ids[chunk], lengths[r]))).cpu())
        every = torch.arange(len(keep))
        log_probs = shelf.log_probs(every.to(device), lengths.to(device)).cpu()
        present = torch.where(torch.arange(log_probs.shape[1]) >= keep[:, None], log_probs, 0.0).sum(1)
        return torch.cat(parts) - present[row]

    def _info(self, count: int, movable: Tensor, keep: Tensor) -> StepInfo:
        accepted = torch.zeros(count, dtype=torch.bool)
        accepted[movable] = True
        chance = torch.full((count,), torch.nan, dtype=torch.float64)
        chance[movable] = 0.0
        return StepInfo(
            self.name, accepted, chance, torch.where(accepted, keep, -1), torch.full_like(chance, torch.nan)
        )


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
        logits = logits.masked_fill(_eos_mask(shelf.lm), -torch.inf)
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
        ratio = _possible(ratio.masked_fill(~same, -torch.inf), proposal.log_prior)
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
        change = log_prior - _log_prior(state, rows)
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
