"""One language model that reads prefixes token by token, with a cache of its own, for factors that are made of LMs."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lmppl.lm.base import LanguageModel
from lmppl.lm.decoder import State, Step
from lmppl.lm.decoding import CountingDecoder
from lmppl.sequences import Cost, Sequences

__all__ = ["CachedPrefixes", "PrefixRows", "Reading"]


class Reading:
    """D distinct prefixes of one LM: their tokens, and what the LM says after them once it has read them.

    A decoder's state can be gone on with once. Where it is asked for again (rows that were cut back, or that part after
    others have gone on), the prefixes are prefilled anew.

    Parameters
    ----------
    decoder : CountingDecoder
    place : Tensor (C,), int64
        The context of the LM for each context of the prior.
    context : Tensor (D,), int64
        Contexts of the prior.
    ids : Tensor (D, t), int64
        Right-padded to `lengths` (D,).
    """

    def __init__(self, decoder: CountingDecoder, place: Tensor, context: Tensor, ids: Tensor, lengths: Tensor) -> None:
        self.decoder, self.place = decoder, place
        self.context, self.ids, self.lengths = context, ids, lengths
        self.totals: Tensor | None = None  # (D,) log p of the prefixes, in nats, where it is known
        self.ahead: tuple[Tensor, State] | None = None  # rows and tokens (M,) as `pairs`, and a state that read them
        self._step: Step | None = None
        self._state: State | None = None
        self._log_probs: Tensor | None = None

    def __len__(self) -> int:
        return len(self.context)

    @property
    def log_probs(self) -> Tensor:
        """(D, V) log-probabilities of the next token, in nats, float64."""
        if self._log_probs is None:
            if self._step is None:
                self._prefill()
            assert self._step is not None  # as the prefill found it
            with torch.no_grad():
                self._log_probs = self._step.log_probs[:, -1].double()
            self._step = None
        return self._log_probs

    @cached_property
    def places(self) -> dict[tuple[int, tuple[int, ...]], int]:
        """The row of each prefix, by context and tokens."""
        rows = zip(self.context.tolist(), self.ids.tolist(), self.lengths.tolist(), strict=True)
        return {(context, tuple(row[:n])): i for i, (context, row, n) in enumerate(rows)}

    def take(self) -> State:
        """The decoder's state; whoever takes it may consume it."""
        if self._state is None:
            self._prefill()
        state, self._state = self._state, None
        return state

    def lend(self, rows: Tensor) -> State:
        """A copy of the decoder's state with rows `rows` (M,); the state itself stays."""
        if self._state is None:
            self._prefill()
        return self.decoder.select(copy.deepcopy(self._state), rows)

    def give(self, state: State, step: Step | None = None) -> None:
        """The decoder's state after these prefixes, and what it says next, found out by somebody else."""
        self._state, self._step = state, step

    def _prefill(self) -> None:
        context = self.place[self.context]
        with torch.no_grad():
            if self.ids.shape[1] == 0:
                self._step, self._state = self.decoder.prefill(context)
            else:
                self._step, self._state = self.decoder.prefill(context, self.ids, self.lengths)


class PrefixRows(NamedTuple):
    """B prefixes: which of the distinct ones each is (B,), its tokens (B, t), its context (B,), its length (B,)."""

    reading: Reading
    row_of: Tensor
    ids: Tensor
    context: Tensor
    lengths: Tensor


class CachedPrefixes:
    """Prefixes of one LM. Equal ones are read once, and nothing is read before it is asked about.

    Rows are never changed: `select` only says which of them are meant, and the cache goes with the rows that go on.

    Parameters
    ----------
    lm : LanguageModel
    place : Tensor (C,), int64
        Its context for each context of the prior.
    """

    def __init__(self, lm: LanguageModel, place: Tensor) -> None:
        self.lm, self.place = lm, place.to(lm.device)
        self._decoder: CountingDecoder | None = None
        self._lately: Reading | None = None
        self.cost = Cost()

    @property
    def decoder(self) -> CountingDecoder:
        """The LM's decoder, made on first use: to know what an architecture's cache can do takes a few forwards."""
        if self._decoder is None:
            self._decoder = CountingDecoder(self.lm, self.cost)
        return self._decoder

    @property
    def fingerprint(self) -> str:
        """The LM, and which context it reads for which of the prior's."""
        return f"{self.lm.fingerprint}:{self.place.tolist()}"

    def count_into(self, cost: Cost) -> None:
        """Count forwards into `cost`."""
        self.cost, self._decoder = cost, None

    def start(self, context: Tensor) -> PrefixRows:
        """B empty completions of contexts (B,) of the prior."""
        context = context.to(self.lm.device)
        distinct, row_of = torch.unique(context, return_inverse=True)
        none = torch.zeros_like(distinct)
        reading = self._reading(distinct, distinct.new_zeros(len(distinct), 0), none)
        reading.totals = torch.zeros(len(distinct), dtype=torch.float64, device=distinct.device)
        return PrefixRows(reading, row_of, context.new_zeros(len(context), 0), context, torch.zeros_like(context))

    def log_probs(self, rows: PrefixRows, candidates: Tensor | None) -> Tensor:
        """(B, V) log-probabilities of the next token, or (B, k) of candidates (B, k), in nats, float64."""
        every = rows.reading.log_probs
        self._lately = rows.reading
        if candidates is None:
            return every[rows.row_of]
        return every[rows.row_of[:, None], candidates.to(every.device)]

    def recall(self, sequences: Sequences) -> Tensor:
        """(B,) log p of rows that are one token longer than the prefixes asked about last, float64; nan of all others.

        What a sampler that goes on token by token has just ended is scored so, from the law of the next token that it
        was weighed by.
        """
        values = torch.full((len(sequences),), torch.nan, dtype=torch.float64)
        reading = self._lately
        if reading is None or reading.totals is None:
            return values
        rows = zip(sequences.context.tolist(), sequences.token_lists(), strict=True)
        found = [(i, reading.places.get((c, tuple(row[:-1])), -1), row[-1]) for i, (c, row) in enumerate(rows) if row]
        known = torch.tensor([f for f in found if f[1] >= 0], dtype=torch.int64).view(-1, 3)
        at, token = (column.to(reading.totals.device) for column in (known[:, 1], known[:, 2]))
        values[known[:, 0]] = (reading.totals[at] + reading.log_probs[at, token]).cpu()
        return values

    def append(self, rows: PrefixRows, tokens: Tensor) -> PrefixRows:
        """The rows with one more token (B,) each: one forward of the distinct ones."""
        tokens = tokens.to(self.lm.device)
        ids, lengths = appended(rows.ids, rows.lengths, tokens), rows.lengths + 1
        distinct, row_of = torch.unique(self.pairs(rows, tokens), return_inverse=True)
        parent, token = distinct // self.lm.vocab_size, distinct % self.lm.vocab_size
        old = rows.reading
        after = old.lengths[parent] + 1
        new = self._reading(old.context[parent], appended(old.ids[parent], old.lengths[parent], token), after)
        if old.totals is not None and old is self._lately:
            new.totals = old.totals[parent] + old.log_probs[parent, token]
        with torch.no_grad():
            cut = self._cut(old, distinct, after)
            if cut is not None:
                new.give(cut)
            else:
                state = old.take()
                if len(parent) != len(old) or not parent.equal(torch.arange(len(old), device=parent.device)):
                    state = self.decoder.select(state, parent)
                step, state = self.decoder.extend(state, token[:, None])
                new.give(state, step)
        return PrefixRows(new, row_of, ids, rows.context, lengths)

    def pairs(self, rows: PrefixRows, tokens: Tensor) -> Tensor:
        """One number for each row's distinct prefix and its next token (B, ...), row by row."""
        row_of = rows.row_of.view(-1, *[1] * (tokens.dim() - 1))
        return row_of * self.lm.vocab_size + tokens.to(self.lm.device)

    def _reading(self, context: Tensor, ids: Tensor, lengths: Tensor) -> Reading:
        return Reading(self.decoder, self.place, context, ids, lengths)

    def _cut(self, old: Reading, pairs: Tensor, lengths: Tensor) -> State | None:
        """The state after `pairs`, cut out of one that has read further; None where there is none, or no cutting."""
        if old.ahead is None or "crop" not in self.decoder.capabilities:
            return None
        known, state = old.ahead
        index = torch.searchsorted(known, pairs).clamp_max(len(known) - 1)
        if not known[index].equal(pairs):
            return None
        old.ahead = None
        return self.decoder.crop(self.decoder.select(state, index), lengths)

    def select(self, rows: PrefixRows, index: Tensor) -> PrefixRows:
        """Rows `index`; nothing is read."""
        index = index.to(self.lm.device)
        return PrefixRows(rows.reading, *(column[index] for column in rows[1:]))

    def crop(self, rows: PrefixRows, lengths: Tensor) -> PrefixRows:
        """Rows cut back to `lengths`: prefilled anew when they are asked about, since a cut cache says nothing."""
        lengths = lengths.to(self.lm.device)
        width = int(lengths.max()) if len(lengths) else 0
        after = torch.arange(width, device=lengths.device) >= lengths[:, None]
        ids = rows.ids[:, :width].masked_fill(after, 0)
        whole = torch.cat([rows.context[:, None], lengths[:, None], ids], 1)
        distinct, row_of = torch.unique(whole, dim=0, return_inverse=True)
        reading = self._reading(distinct[:, 0], distinct[:, 2:], distinct[:, 1])
        return PrefixRows(reading, row_of, ids, rows.context, lengths)


def appended(ids: Tensor, lengths: Tensor, tokens: Tensor) -> Tensor:
    """`ids` (B, t), right-padded, with one more token behind each row."""
    width = int(lengths.max()) + 1 if len(lengths) else ids.shape[1] + 1
    wide = torch.nn.functional.pad(ids, (0, max(0, width - ids.shape[1])))
    return wide.scatter(1, lengths[:, None], tokens[:, None])
