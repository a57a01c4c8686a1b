"""Shelf: whole rows of one language model kept from one MCMC step to the next, so that only new tokens are read.

Each row has a slot with its keys and values, the hidden state before each of its tokens, and the log-probability of
each token. A row can be taken back to any of its prefixes at no cost: the law of its token i is known already, and
regenerating n tokens reads n − 1. A new row is written to a free slot; whether it becomes the row is decided later, by
`adopt`, without a copy.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lmppl.lm.base import LanguageModel
from lmppl.lm.decoder import State
from lmppl.lm.decoding import CountingDecoder
from lmppl.lm.randomness import Source
from lmppl.lm.writer import Pending, Regenerated, Writer
from lmppl.sequences import Cost

__all__ = ["Pending", "Regenerated", "RowStore", "Shelf"]


class RowStore(Protocol):
    """What a decoder's `shelve(num_slots)` gives, where it can keep rows beyond a state."""

    def put(self, state: State, rows: Tensor, slots: Tensor, lengths: Tensor, *, later: bool = False) -> None:
        """Copy the first `lengths` (M,) tokens of `rows` (M,) of a state into `slots` (M,).

        With `later` the copy may wait for `flush`: the rows are the last ones, which `select` drops without a move.
        """
        ...

    def flush(self) -> None:
        """Copy what waits."""
        ...

    def take(self, slots: Tensor, context: Tensor, lengths: Tensor) -> State:
        """A fresh state of the rows in `slots` (M,), of `context` (M,), cut to `lengths` (M,) tokens."""
        ...

    def open(self, num_rows: int) -> State:
        """A state without rows, which at most `num_rows` may `join`."""
        ...

    def join(self, state: State, slots: Tensor, context: Tensor, lengths: Tensor) -> State:
        """The rows of `take`, after those of a state that came from `open`, which is consumed."""
        ...

    def close(self, state: State) -> None:
        """Take back a state that came from `open`, all of whose rows have ended and are put away."""
        ...

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy slots `source` (M,) over slots `target` (M,)."""
        ...


class Shelf:
    """The present rows of B chains under one LM.

    Parameters
    ----------
    lm : LanguageModel
    context : Tensor (B,), int64
        The context of each row; a row starts empty.
    cost : Cost, optional
        Counter that forwards are added to.

    Attributes
    ----------
    known : Tensor (B,), int64
        Leading tokens of the row that are scored; the law of the next one is known too.

    Notes
    -----
    A decoder that cannot keep rows (recurrent and windowed caches, rows grouped by length, an own decoder without
    `shelve`) reads the prefix again: the results are the same, the cost is not.
    """

    def __init__(self, lm: LanguageModel, context: Tensor, *, cost: Cost | None = None) -> None:
        self.lm, self.horizon = lm, lm.max_new_tokens
        self.decoder = CountingDecoder(lm, Cost() if cost is None else cost)
        self.context = context.to(lm.device)
        batch = len(context)
        shelve = getattr(self.decoder.decoder, "shelve", None)
        self.store: RowStore | None = None if shelve is None else shelve(2 * batch)
        self.slot = torch.arange(batch, device=lm.device)
        self.known = torch.zeros_like(self.slot)
        distinct, row_of = torch.unique(self.context, return_inverse=True)
        with torch.no_grad():
            step, state = self.decoder.prefill(distinct)
        self._project = step.project
        hidden = step.hidden[:, -1]
        # Law k of a slot is that of its token k + 1.
        self._hidden = hidden.new_zeros(2 * batch, self.horizon, hidden.shape[1])
        self._hidden[:batch, 0] = hidden[row_of]
        self._log_probs = torch.zeros(2 * batch, self.horizon, dtype=torch.float64, device=lm.device)
        self._entropy: Tensor | None = None  # (2B, T), nan where not computed yet
        if self.store is not None:
            self.store.put(state, row_of, self.slot, torch.zeros_like(self.slot))

    def __len__(self) -> int:
        return len(self.slot)

    # The present rows.

    def log_probs(self, rows: Tensor, lengths: Tensor) -> Tensor:
        """(M, T) log p(x_t|c, x_<t) of the present `rows`, 0 after `lengths`, at most those known."""
        return self._within(self._log_probs[self.slot[rows]], lengths)

    def pending_log_probs(self, pending: Pending) -> Tensor:
        """(M, T) log p(x_t|c, x_<t) of new rows, 0 after the last one known."""
        return self._within(self._log_probs[pending.slots], pending.lengths)

    def logits(self, rows: Tensor, position: Tensor) -> Tensor:
        """(M, V) unnormalised log-probabilities of the token after the first `position` (M,) tokens of `rows`."""
        with torch.no_grad():
            return self._project(self._hidden[self.slot[rows], position])

    def entropies(self, slots: Tensor, lengths: Tensor) -> Tensor:
        """(M, T) entropy of the law of each token of the rows in `slots`, in nats; 0 after `lengths` (M,)."""
        if self._entropy is None:
            self._entropy = torch.full_like(self._log_probs, torch.nan)
        there = torch.arange(self.horizon, device=slots.device) < lengths[:, None]
        row, law = torch.nonzero(there & self._entropy[slots].isnan(), as_tuple=True)
        with torch.no_grad():
            for r, k in zip(row.split(1024), law.split(1024), strict=True):
                log_p = torch.log_softmax(self._project(self._hidden[slots[r], k]), -1)
                terms = torch.where(log_p > -torch.inf, log_p.exp() * log_p, 0.0)
                self._entropy[slots[r], k] = -terms.sum(-1).double()
        return torch.where(there, self._entropy[slots], 0.0)

    # New rows.

    def regenerate(
        self,
        rows: Tensor,
        keep: Tensor,
        ids: Tensor,
        source: Source,
        *,
        until: Tensor | None = None,
        barred: Tensor | None = None,
    ) -> Regenerated:
        """Draw the tokens of `rows` (M,) after the first `keep` (M,) anew, until they end.

        Parameters
        ----------
        rows, keep : Tensor (M,), int64
            keep ≤ known of each row.
        ids : Tensor (M, T), int64
            The rows' tokens.
        source : Source
        until : Tensor (M,), int64, optional
            Stop at this length, ended or not: the cap T by default.
        barred : Tensor (V,), bool, optional
            Tokens that are not drawn; the law is renormalised without them. A row to which nothing else can happen
            stops there, as if it had ended.

        Returns
        -------
        Regenerated
        """
        writer = Writer(self, source, barred=barred)
        # Rows with the least to write come last, and so leave a batch from its end, where nothing must be moved.
        order = torch.argsort(keep, stable=True)
        writer.begin(
            rows[order],
            keep[order],
            ids.to(self.lm.device)[order],
            until=None if until is None else until[order],
        )
        while writer.num_live:
            writer.advance()
        return writer.collect(rows)

    def force(
        self, rows: Tensor, keep: Tensor, ids: Tensor, lengths: Tensor, *, pending: Pending | None = None
    ) -> Pending:
        """Read given tokens after the first `keep` of `rows`, in one forward, and know their laws.

        Parameters
        ----------
        rows, keep : Tensor (M,), int64
            keep ≤ known of each row.
        ids : Tensor (M, T), int64
            Rows that agree with the present ones in the first `keep` tokens.
        lengths : Tensor (M,), int64
            More than `keep`.
        pending : Pending, optional
            Go on from these new rows in place of the present ones, in their slots.
        """
        source = self.slot[rows] if pending is None else pending.slots
        slots = self.free_slots(len(rows)) if pending is None else pending.slots
        self.copy_laws(source, slots, keep)
        state, known = self._read_tails(source, slots, rows, keep, ids.to(self.lm.device), lengths)
        if self.store is not None and state is None:  # nothing was read: the old prefix is all there is
            self.store.copy(source, slots)
        elif self.store is not None:
            self.store.put(state, torch.arange(len(rows), device=slots.device), slots, lengths - 1)
        hidden, log_prob, mask = known
        row, law = torch.nonzero(mask, as_tuple=True)
        self._log_probs[slots[row], law] = log_prob[mask]
        row, law = torch.nonzero(hidden[1], as_tuple=True)
        self._hidden[slots[row], law] = hidden[0][hidden[1]]
        return Pending(rows, slots, lengths)

    def score_tails(self, rows: Tensor, keep: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
        """(M,) Σ_{t > keep} log p(x_t|c, x_<t) of given tokens after the first `keep` of `rows`; nothing is kept.

        A row may stand there several times, with other tokens.
        """
        slots = self.slot[rows]
        _, (_, log_prob, mask) = self._read_tails(slots, slots, rows, keep, ids.to(self.lm.device), lengths)
        return torch.where(mask, log_prob, 0.0).sum(1)

    def catch_up(self, rows: Tensor, need: Tensor, ids: Tensor, lengths: Tensor) -> None:
        """Know at least `need` (M,) tokens of the present `rows`, which are `ids` (M, T), `lengths` (M,)."""
        behind = torch.nonzero(self.known[rows] < need).squeeze(1)
        if len(behind):
            late = rows[behind]
            pending = self.force(late, self.known[late], ids[behind.to(ids.device)], lengths[behind])
            self.adopt(pending, torch.ones_like(late, dtype=torch.bool))

    def adopt(self, pending: Pending, accepted: Tensor) -> None:
        """Make the new rows where `accepted` (M,) the present ones."""
        chosen = pending.rows[accepted]
        self.slot[chosen] = pending.slots[accepted]
        self.known[chosen] = pending.lengths[accepted]

    def forget(self, rows: Tensor, keep: Tensor) -> None:
        """Of `rows` (M,) only the first `keep` (M,) tokens are the same as before."""
        self.known[rows] = torch.minimum(self.known[rows], keep)

    def select(self, index: Tensor) -> None:
        """Make row i the former row `index[i]` (B,), of the same context; nothing is copied."""
        index = index.to(self.slot.device)
        self.slot, self.known = self.slot[index], self.known[index]

    # What a writer needs.

    def free_slots(self, count: int, held: Tensor | None = None) -> Tensor:
        """(count,) slots of no present row, and none of those `held` (H,)."""
        used = torch.zeros(len(self._hidden), dtype=torch.bool, device=self.slot.device)
        used[self.slot] = True
        if held is not None:
            used[held] = True
        return torch.nonzero(~used).squeeze(1)[:count]

    def laws(self, slots: Tensor, position: Tensor) -> Tensor:
        """(M, V) scores of the token after the first `position` (M,) tokens of `slots` (M,)."""
        return self.project(self._hidden[slots, position])

    def project(self, hidden: Tensor) -> Tensor:
        """(M, H) hidden states to (M, V) unnormalised log-probabilities."""
        return self._project(hidden)

    def learn(self, slots: Tensor, position: Tensor, hidden: Tensor) -> None:
        """Keep the hidden states (M, H) after the first `position` (M,) tokens of `slots` (M,)."""
        self._hidden[slots, position] = hidden

    def learn_scores(self, slots: Tensor, log_probs: Tensor, where: Tensor) -> None:
        """Keep the log-probabilities (M, T) of the tokens `where` (M, T) of `slots` (M,)."""
        self._log_probs[slots] = torch.where(where, log_probs, self._log_probs[slots])

    def copy_laws(self, source: Tensor, slots: Tensor, keep: Tensor) -> None:
        """The laws of a prefix of `keep` tokens, from slot to slot."""
        width = int(keep.max()) + 1
        if source is not slots:
            self._hidden[slots, :width] = self._hidden[source, :width]
            self._log_probs[slots, :width] = self._log_probs[source, :width]
        if self._entropy is not None:
            later = torch.arange(self.horizon, device=slots.device) > keep[:, None]
            self._entropy[slots] = self._entropy[source].masked_fill(later, torch.nan)

    # Inside.

    def _within(self, values: Tensor, lengths: Tensor) -> Tensor:
        return torch.where(torch.arange(self.horizon, device=values.device) < lengths[:, None], values, 0.0)

    def _read_tails(
        self, source: Tensor, slots: Tensor, rows: Tensor, keep: Tensor, ids: Tensor, lengths: Tensor
    ) -> tuple[State, tuple[tuple[Tensor, Tensor], Tensor, Tensor]]:
        """One forward of the tokens keep+1..length−1; gives the state, hidden states and log-probabilities.

        Hidden states (M, T, H) with the mask of those that are new; log-probabilities (M, T) with theirs. Rows with a
        short tail begin earlier, so that none runs over the cap.
        """
        count, device = len(rows), slots.device
        columns = torch.arange(self.horizon, device=device)
        mask = (columns >= keep[:, None]) & (columns < lengths[:, None])
        log_prob = torch.zeros(count, self.horizon, dtype=torch.float64, device=device)
        with torch.no_grad():
            first = torch.log_softmax(self._project(self._hidden[source, keep]), -1)
            log_prob.scatter_(1, keep[:, None], first.gather(1, ids.gather(1, keep[:, None])).double())
            new = (columns > keep[:, None]) & (columns < lengths[:, None])
            width = int((lengths - 1 - keep).max())
            if width == 0:
                return None, ((self._hidden[slots], new), log_prob, mask)
            start = torch.minimum(keep, (lengths - 1 - width).clamp_min(0))
            read = start[:, None] + torch.arange(width, device=device)
            tokens = ids.gather(1, read)
            context = self.context[rows]
            if self.store is not None:
                state = self.store.take(source, context, start)
            else:
                _, state = self.decoder.prefill(context, ids[:, : int(start.max())], start)
            step, state = self.decoder.extend(state, tokens, count=int((lengths - 1 - keep).sum()))
            following = read + 1
            hidden = step.hidden.new_zeros(count, self.horizon, step.hidden.shape[2])
            hidden.scatter_(1, following[:, :, None].expand(-1, -1, hidden.shape[2]), step.hidden)
            scored = step.log_prob_of(ids.gather(1, following)).double()
            later = torch.zeros_like(log_prob).scatter_(1, following, scored)
            log_prob = torch.where(new, later, log_prob)
        return state, ((hidden, new), log_prob, mask)
