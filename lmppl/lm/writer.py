"""Writer: rows of a shelf that one language model writes anew, in a batch that they join and leave when they may.

Rows that begin later, at prefixes of any length, share the forwards of those that are being written: a sampler whose
rows are independent need not wait for its longest one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lmppl.errors import ModelError
from lmppl.lm.decoder import State, Step
from lmppl.lm.decoding import compacting_index
from lmppl.lm.randomness import Source

if TYPE_CHECKING:
    from lmppl.lm.shelf import Shelf

__all__ = ["Pending", "Regenerated", "Writer"]


class Pending(NamedTuple):
    """New versions of `rows` (M,), of `lengths` (M,) tokens, in `slots` (M,) that nobody else uses."""

    rows: Tensor
    slots: Tensor
    lengths: Tensor


class Regenerated(NamedTuple):
    """What was written: `ids` (M, T), `lengths` (M,), `finished` (M,), and the new rows.

    `log_q` (M, T) holds the log-probability of each new token under the law that it was drawn from, 0 elsewhere.
    """

    ids: Tensor
    lengths: Tensor
    finished: Tensor
    log_q: Tensor
    pending: Pending


class Live(NamedTuple):
    """Rows that go on, (L,) each: `rows` of the shelf, `slots`, tokens `at` so far, `tokens` unread, `cap`."""

    rows: Tensor
    slots: Tensor
    at: Tensor
    tokens: Tensor
    cap: Tensor

    def pick(self, index: Tensor) -> Live:
        """Rows `index`."""
        return Live(*(column[index] for column in self))

    def after(self, other: Live) -> Live:
        """The other's rows, then these."""
        return Live(*(torch.cat(pair) for pair in zip(other, self, strict=True)))


class Writer:
    """The batch of rows being written; each of the shelf's rows at most once at a time.

    Parameters
    ----------
    shelf : Shelf
    source : Source
    barred : Tensor (V,), bool, optional
        Tokens that are not drawn; the law is renormalised without them. A row to which nothing else can happen stops
        there, as if it had ended.
    """

    def __init__(self, shelf: Shelf, source: Source, *, barred: Tensor | None = None) -> None:
        self.shelf, self.source, self.barred = shelf, source, barred
        lm, batch = shelf.lm, len(shelf)
        self._columns = torch.arange(shelf.horizon, device=lm.device)
        self.ids = torch.full((batch, shelf.horizon), lm.pad_id, dtype=torch.int64, device=lm.device)
        self.keep = torch.zeros(batch, dtype=torch.int64, device=lm.device)
        self.lengths, self.slots = torch.zeros_like(self.keep), torch.zeros_like(self.keep)
        self.finished = torch.zeros(batch, dtype=torch.bool, device=lm.device)
        self.busy = torch.zeros_like(self.finished)
        self._scores = torch.zeros(batch, shelf.horizon, dtype=lm.dtype, device=lm.device)
        self._barred_scores = torch.zeros_like(self._scores)
        none = self.keep[:0]
        self._live = self._entering = Live(none, none, none, none, none)
        self._state: State = None
        self._done: list[Tensor] = []

    @property
    def num_live(self) -> int:
        """Rows that go on."""
        return len(self._live.rows) + len(self._entering.rows)

    @property
    def num_done(self) -> int:
        """Rows that have ended and wait to be collected."""
        return sum(len(rows) for rows in self._done)

    @torch.no_grad()
    def begin(self, rows: Tensor, keep: Tensor, ids: Tensor, *, until: Tensor | None = None) -> None:
        """Write `rows` (M,) of the shelf anew after their first `keep` (M,) tokens of `ids` (M, T).

        The first new token is drawn here: its law is known. `until` (M,) stops a row at that length, ended or not; by
        default the cap does. `keep` is at most what the shelf knows of the row.
        """
        shelf = self.shelf
        old, slots = shelf.slot[rows], shelf.free_slots(len(rows), self.slots[self.busy])
        shelf.copy_laws(old, slots, keep)
        self.ids[rows] = ids.masked_fill(self._columns >= keep[:, None], shelf.lm.pad_id)
        self.keep[rows], self.slots[rows], self.busy[rows] = keep, slots, True
        self._scores[rows] = self._barred_scores[rows] = 0.0
        cap = torch.full_like(keep, shelf.horizon) if until is None else until
        fresh, stop = self._drawn(Live(rows, slots, keep, keep, cap), shelf.laws(old, keep))
        gone = torch.nonzero(stop).squeeze(1)
        if len(gone):
            self._done.append(rows[gone])
            if shelf.store is not None:
                shelf.store.copy(old[gone], slots[gone])
            fresh = fresh.pick(torch.nonzero(~stop).squeeze(1))
        self._entering = fresh.after(self._entering)

    @torch.no_grad()
    def advance(self) -> None:
        """One forward of the last token of each row that goes on, and the next token of each."""
        shelf = self.shelf
        if len(self._entering.rows):
            step = self._join()
        else:
            step, self._state = shelf.decoder.extend(self._state, self._live.tokens[:, None])
        hidden = step.hidden[:, -1]
        shelf.learn(self._live.slots, self._live.at, hidden)
        live, stop = self._drawn(self._live, shelf.project(hidden))
        gone = torch.nonzero(stop).squeeze(1)
        if len(gone) == 0:
            self._live = live
            return
        on, ended = compacting_index(stop), live.pick(gone)
        self._done.append(ended.rows)
        if shelf.store is not None:
            # Rows that stood after all others stay where they are, and can be put away with the last ones.
            later = bool((gone >= len(on)).all())
            shelf.store.put(self._state, gone, ended.slots, ended.at - 1, later=later)
        self._live = live.pick(on)
        if len(on):
            self._state = shelf.decoder.select(self._state, on)
        else:
            self._flush()
            if shelf.store is not None:
                shelf.store.close(self._state)
            self._state = None

    def collect(self, rows: Tensor | None = None) -> Regenerated:
        """The rows that have ended since the last call, by default in ascending order.

        Their new versions stay where they are until something else is written.

        Raises
        ------
        ModelError
            Where the LM gave scores that are nan or +inf.
        """
        shelf = self.shelf
        if rows is None:
            rows = torch.cat(self._done).sort().values
        self._done = []
        self._flush()
        self.busy[rows] = False
        keep, lengths, slots, scores = (x[rows] for x in (self.keep, self.lengths, self.slots, self._scores))
        written = (self._columns >= keep[:, None]) & (self._columns < lengths[:, None])
        if self.barred is None and not bool(torch.isfinite(scores[written]).all()):
            raise ModelError(
                f"{shelf.lm!r} gave next-token scores that are nan or +inf: its weights or dtype are broken"
            )
        shelf.learn_scores(slots, scores.double(), written)
        log_q = (scores if self.barred is None else self._barred_scores[rows]).double()
        return Regenerated(self.ids[rows], lengths, self.finished[rows], log_q, Pending(rows, slots, lengths))

    def _drawn(self, live: Live, logits: Tensor) -> tuple[Live, Tensor]:
        """The rows with one more token each, and (L,) which of them stop with it."""
        rows, _, at, _, cap = live
        if self.barred is None:
            tokens, chosen = self.source.tokens(logits)
            over = self._ended(rows, at, tokens)
        else:
            tokens, self._barred_scores[rows, at], chosen, stuck = _choose_among(logits, self.source, self.barred)
            over = self._ended(rows, at, tokens) | stuck
        self._scores[rows, at] = chosen
        live = live._replace(at=at + 1, tokens=tokens)
        stop = over | (live.at == cap)
        if bool(stop.any()):
            self.lengths[rows[stop]], self.finished[rows[stop]] = live.at[stop], over[stop]
        return live, stop

    def _ended(self, rows: Tensor, at: Tensor, tokens: Tensor) -> Tensor:
        """(L,) whether rows that had `at` tokens end with the next one, which is written into `ids`."""
        lm = self.shelf.lm
        self.ids[rows, at] = tokens
        if lm.ends_by_eos_alone:
            return lm._is_eos(tokens)
        over = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        for before in at.unique().tolist():
            same = at == before
            over[same] = lm.ended(self.ids[rows[same], : before + 1], int(before))
        return over

    def _join(self) -> Step:
        """Take in the rows that have begun, and read the last token of all rows."""
        shelf, fresh = self.shelf, self._entering
        self._live = live = fresh.after(self._live)
        self._entering = fresh.pick(fresh.rows[:0])
        if shelf.store is None:
            step, self._state = shelf.decoder.prefill(
                shelf.context[live.rows], self.ids[live.rows, : int(live.at.max())], live.at
            )
            return step
        if self._state is None:
            self._state = shelf.store.open(len(shelf))
        slots, context = shelf.slot[fresh.rows], shelf.context[fresh.rows]
        self._state = shelf.store.join(self._state, slots, context, fresh.at - 1)
        step, self._state = shelf.decoder.extend(self._state, live.tokens[:, None])
        return step

    def _flush(self) -> None:
        if self.shelf.store is not None:
            self.shelf.store.flush()


def _choose_among(logits: Tensor, source: Source, barred: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens (L,) that are not `barred` (V,), their log-probability with and without the bar, and rows without any."""
    allowed = logits.masked_fill(barred, -torch.inf)
    stuck = (allowed == -torch.inf).all(-1)
    tokens, log_law = source.tokens(torch.where(stuck[:, None], 0.0, allowed))
    log_prob = torch.log_softmax(logits, -1).gather(1, tokens[:, None])[:, 0]
    return tokens, log_law, log_prob, stuck
