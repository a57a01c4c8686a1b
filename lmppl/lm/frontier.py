"""Frontier: completions in the making, one token at a time, on one decoder state.

What a sampler that steps needs of a language model: the law of the next token of each row, append, select. Equal
prefixes are read once: rows that resampling has made equal share one row of the decoder until they part. Rows that have
ended are dropped from the forward and stay in the frontier.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmppl.lm.base import LanguageModel
from lmppl.lm.decoder import State, Step
from lmppl.lm.decoding import CountingDecoder
from lmppl.sequences import Cost, Sequences

__all__ = ["Frontier"]


class Frontier:
    """B completions of one LM; a row is *live* until it ends by EOS, a stop string or the cap.

    A token is read by the network when the next one is asked for, not when it is appended: rows that `select` drops in
    between cost nothing.

    Parameters
    ----------
    lm : LanguageModel
    context : Tensor (B,), int64
        The context of each row.
    cost : Cost, optional
        Counter that forwards are added to.

    Attributes
    ----------
    ids : Tensor (B, T), int64
        Tokens so far, on the LM's device; the pad id after them.
    lengths : Tensor (B,), int64
    finished : Tensor (B,), bool
        Ended by EOS or a stop string.
    live : Tensor (L,), int64
        The rows that go on, in ascending order.
    """

    def __init__(self, lm: LanguageModel, context: Tensor, *, cost: Cost | None = None) -> None:
        self.lm = lm
        self.decoder = CountingDecoder(lm, Cost() if cost is None else cost)
        self.context = context.to(lm.device)
        batch = len(context)
        self.ids = torch.full((batch, lm.max_new_tokens), lm.pad_id, dtype=torch.int64, device=lm.device)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=lm.device)
        self.finished = torch.zeros(batch, dtype=torch.bool, device=lm.device)
        self.live = torch.arange(batch, device=lm.device)
        distinct, self._row_of = torch.unique(self.context, return_inverse=True)  # decoder row of each row
        with torch.no_grad():
            step, state = self.decoder.prefill(distinct)
        self._step: Step = step
        self._state: State = state
        self._unread = False
        self._rebuild = False
        self._parted = False  # each live row has a row of the decoder to itself

    def __len__(self) -> int:
        return len(self.context)

    @property
    def step(self) -> Step:
        """What the network says next, for its distinct rows; `row_of` maps the live rows to them."""
        if self._unread:
            self._read()
        return self._step

    @property
    def row_of(self) -> Tensor:
        """(L,) the row of `step` that each live row has."""
        if self._unread:
            self._read()
        rows: Tensor = self._row_of[self.live]
        return rows

    def logits(self) -> Tensor:
        """(L, V) unnormalised log-probabilities of the next token of each live row."""
        with torch.no_grad():
            scores: Tensor = self.step.logits[:, -1][self.row_of]
        return scores

    def hidden(self) -> Tensor:
        """(L, H) hidden states that the next token is predicted from, of the live rows."""
        states: Tensor = self.step.hidden[:, -1][self.row_of]
        return states

    def append(self, tokens: Tensor) -> Tensor:
        """Give each live row its next token; (L,) bool says which rows have ended with it, and are live no more."""
        live = self.live
        if self._unread:
            self._read()
        at = self.lengths[live]
        self.ids[live, at] = tokens
        self.lengths[live] = at + 1
        over = self._ended(live, at)
        self.finished[live[over]] = True
        stopped = over | (at + 1 == self.lm.max_new_tokens)
        self.live = live[~stopped]
        self._unread = True
        return stopped

    def select(self, index: Tensor) -> None:
        """Make row i the former row `index[i]` (B',), int64."""
        index = index.to(self.ids.device)
        alive = torch.zeros(len(self), dtype=torch.bool, device=self.ids.device)
        alive[self.live] = True
        self.ids, self.lengths, self.finished = self.ids[index], self.lengths[index], self.finished[index]
        self.context, self._row_of = self.context[index], self._row_of[index]
        self._parted = False
        self.live = torch.nonzero(alive[index]).squeeze(1)

    def drop(self, keep: Tensor) -> None:
        """Go on with the live rows of `keep` (L,) bool alone; the others stay as they are and are read no more."""
        self.live = self.live[keep]

    def resume(self, rows: Tensor) -> None:
        """Make `rows` (L,) the live ones, of any lengths from 1; their distinct prefixes are read anew, in one forward.

        For rows that have waited while others were read: their places in the cache are gone.
        """
        self.live = rows
        self._unread = self._rebuild = True

    def sequences(self) -> Sequences:
        """All B rows as they are now, on the CPU; rows that are still live are prefixes, not outcomes."""
        lm = self.lm
        ids, lengths, finished = (x.to("cpu", copy=True) for x in (self.ids, self.lengths, self.finished))
        return Sequences(ids, lengths, finished, self.context.cpu(), lm.prompts, lm.decode)

    def _ended(self, live: Tensor, at: Tensor) -> Tensor:
        first = int(at[0]) if len(at) else 0
        if bool((at == first).all()):
            rows = self.ids if len(live) == len(self.ids) else self.ids[live]
            return self.lm.ended(rows[:, : first + 1], first)
        over = torch.zeros(len(live), dtype=torch.bool, device=live.device)
        for length in at.unique().tolist():
            same = at == length
            over[same] = self.lm.ended(self.ids[live[same], : length + 1], int(length))
        return over

    def _read(self) -> None:
        """One forward of the last tokens of the distinct live rows."""
        self._unread = False
        live = self.live
        if len(live) == 0:
            return
        if self._rebuild:
            self._read_anew(live)
            return
        last = self.ids[live, self.lengths[live] - 1]
        if self._parted and len(live) == len(self._step.hidden):  # each row goes on where it is
            tokens = torch.empty_like(last)
            tokens[self._row_of[live]] = last
            with torch.no_grad():
                self._step, self._state = self.decoder.extend(self._state, tokens[:, None])
            return
        known, row_of = torch.unique(self._row_of[live] * self.lm.vocab_size + last, return_inverse=True)
        parent, token = known // self.lm.vocab_size, known % self.lm.vocab_size
        rows = torch.arange(len(parent), device=parent.device)
        with torch.no_grad():
            if len(parent) != len(self._step.hidden) or not parent.equal(rows):
                place = _places(parent)
                index, tokens = torch.empty_like(parent), torch.empty_like(token)
                index[place], tokens[place] = parent, token
                token, row_of = tokens, place[row_of]
                if len(index) != len(self._step.hidden) or not index.equal(rows):
                    self._state = self.decoder.select(self._state, index)
            self._step, self._state = self.decoder.extend(self._state, token[:, None])
        self._row_of[live] = row_of
        self._parted = len(known) == len(live)

    def _read_anew(self, live: Tensor) -> None:
        """One forward of the whole prefixes of the distinct live rows."""
        self._rebuild = False
        width = int(self.lengths[live].max())
        rows = torch.cat([self.context[live, None], self.lengths[live, None], self.ids[live, :width]], 1)
        distinct, row_of = torch.unique(rows, dim=0, return_inverse=True)
        with torch.no_grad():
            self._step, self._state = self.decoder.prefill(distinct[:, 0], distinct[:, 2:], distinct[:, 1])
        self._row_of[live] = row_of
        self._parted = len(distinct) == len(live)


def _places(parent: Tensor) -> Tensor:
    """Where the rows that continue `parent` (M,), ascending, are put: the first child stays at its parent's place.

    A cache then copies only the further children, into places that nobody needs any more.
    """
    count = len(parent)
    first = torch.ones_like(parent, dtype=torch.bool)
    first[1:] = parent[1:] != parent[:-1]
    stays = first & (parent < count)
    place = torch.empty_like(parent)
    place[stays] = parent[stays]
    free = torch.ones(count, dtype=torch.bool, device=parent.device)
    free[parent[stays]] = False
    place[~stays] = torch.nonzero(free).squeeze(1)
    return place
