"""The prefix-by-prefix form of a future: how probable it is behind each prefix."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lmppl.lm.base import LanguageModel
from lmppl.lm.decoding import plan_rows
from lmppl.modeling.evidence.lm_factors.prefixes import CachedPrefixes, PrefixRows, Reading
from lmppl.modeling.evidence.prefix_columns import at_lengths, ended_with
from lmppl.sequences import Cost, Sequences

__all__ = ["FuturePotential", "FutureRows"]


class FutureRows(NamedTuple):
    """B prefixes: their tokens (B, t) and caches, a·log p(future|x_≤s) and log ψ (B, t + 1), and whether they ended."""

    prefixes: PrefixRows
    exact: Tensor
    values: Tensor
    over: Tensor
    known: Known


class Known:
    """log p(future|x) that has been computed of next tokens of one reading, by `CachedPrefixes.pairs`.

    Parameters
    ----------
    here : Tensor (D,), optional
        That of the reading's own prefixes; nan where it is not known.
    """

    def __init__(self, here: Tensor | None = None) -> None:
        self.here = here
        self.pairs = torch.zeros(0, dtype=torch.int64)
        self.values = torch.zeros(0, dtype=torch.float64)

    def missing(self, pairs: Tensor) -> Tensor:
        """Those of the distinct `pairs` without a value."""
        return pairs[~torch.isin(pairs, self.pairs)]

    def add(self, pairs: Tensor, values: Tensor) -> None:
        """Keep values of new pairs."""
        together = torch.cat([self.pairs.to(pairs.device), pairs])
        order = torch.argsort(together)
        self.pairs = together[order]
        self.values = torch.cat([self.values.to(values.device), values])[order]

    def get(self, pairs: Tensor) -> Tensor:
        """Values of pairs, of any shape; nan where they are not known."""
        if len(self.pairs) == 0:
            return torch.full(pairs.shape, torch.nan, dtype=torch.float64, device=pairs.device)
        at = torch.searchsorted(self.pairs, pairs).clamp_max(len(self.pairs) - 1)
        return torch.where(self.pairs[at] == pairs, self.values[at], torch.nan)


class FuturePotential:
    """log ψ(x_≤t) = a·log p(future|c, x_≤t): the `Incremental` form of an `InfillingFactor`.

    ψ of a prefix that goes on, with p(future|c, x_≤t) = 0, is that of the prefix before it, and 1 at the start: only a
    row's end may be 0. A candidate takes one forward of itself and the future, from a copy of the prefix's cache; the
    row that goes on with it keeps the cache, cut back by the future where the architecture allows that. So engines are
    told that it reads text, and ask about the tokens they have drawn.

    Parameters
    ----------
    prefixes : CachedPrefixes
        Of the LM that reads the future, on the prior's tokens.
    futures : sequence of tuple of int
        Its tokens, for each context of the prior.
    weight : float
        a.
    prior : LanguageModel
        Says where a row ends.
    """

    needs: Collection[Literal["text", "ids", "hidden"]] = frozenset({"ids", "text"})

    def __init__(
        self, prefixes: CachedPrefixes, futures: Sequence[Sequence[int]], weight: float, prior: LanguageModel
    ) -> None:
        self.prefixes, self.weight, self.prior = prefixes, weight, prior
        width = max(map(len, futures))
        device = prefixes.lm.device
        self.futures = torch.tensor([[*f, *[0] * (width - len(f))] for f in futures], device=device)  # (C, F)
        self.counts = torch.tensor([len(f) for f in futures], device=device)
        self._lately: tuple[Reading, Known] | None = None

    def count_into(self, cost: Cost) -> None:
        """Count the LM's forwards into `cost`."""
        self.prefixes.count_into(cost)

    @property
    def fingerprint(self) -> str:
        """The LM, the futures and their weight."""
        return repr((self.prefixes.fingerprint, self.futures.tolist(), self.counts.tolist(), self.weight))

    def start(self, contexts: Tensor, step: Any = None) -> FutureRows:
        """As `Incremental.start`."""
        prefixes = self.prefixes.start(contexts)
        here = self._here(prefixes.reading)
        exact = self.weight * here[prefixes.row_of].to(contexts.device)
        values = torch.where(exact.isfinite(), exact, 0.0)
        none = torch.zeros(len(contexts), dtype=torch.bool, device=contexts.device)
        return FutureRows(prefixes, exact[:, None], values[:, None], none, Known(here))

    def weigh(self, state: FutureRows, candidates: Tensor | None) -> Tensor:
        """As `Incremental.weigh`: −inf for a row that has ended."""
        device = state.values.device
        if candidates is None:
            candidates = torch.arange(self.prior.vocab_size, device=device).expand(len(state.over), -1)
        result = torch.full(candidates.shape, -torch.inf, dtype=torch.float64, device=device)
        going = torch.nonzero(~state.over).squeeze(1)
        if len(going):
            some = self.select(state, going)
            _, values, _ = self._after(some, candidates[going])
            result[going] = values - self.potential(some)[:, None]
        return result

    def advance(self, state: FutureRows, tokens: Tensor, step: Any = None) -> FutureRows:
        """As `Incremental.advance`."""
        exact, values = (at_lengths(column, self._lengths(state)) for column in (state.exact, state.values))
        over = state.over.clone()
        going = torch.nonzero(~state.over).squeeze(1)
        if len(going):
            own = self._after(self.select(state, going), tokens[going, None])
            exact[going], values[going], over[going] = (column[:, 0] for column in own)
        at = self._lengths(state)
        prefixes = self.prefixes.append(state.prefixes, tokens)
        exact, values = (_put(c, at + 1, v) for c, v in ((state.exact, exact), (state.values, values)))
        here = state.known.get(torch.unique(self.prefixes.pairs(state.prefixes, tokens)))  # in the order of the reading
        return FutureRows(prefixes, exact, values, over, Known(here))

    def recall(self, sequences: Sequences) -> Tensor:
        """(B,) log p(future|c, x) of rows one token longer than the prefixes asked about last; nan of others."""
        values = torch.full((len(sequences),), torch.nan, dtype=torch.float64)
        if self._lately is None:
            return values
        reading, known = self._lately
        for i, (context, row) in enumerate(zip(sequences.context.tolist(), sequences.token_lists(), strict=True)):
            place = reading.places.get((context, tuple(row[:-1])))
            if not row or place is None:
                continue
            if row[-1] not in self.prior.eos_ids:
                values[i] = known.get(reading.context.new_tensor(place * self.prior.vocab_size + row[-1]))
            elif known.here is not None:
                values[i] = known.here[place]
        return values

    def potential(self, state: FutureRows) -> Tensor:
        """As `Incremental.potential`."""
        return at_lengths(state.values, self._lengths(state))

    def select(self, state: FutureRows, index: Tensor) -> FutureRows:
        """As `Incremental.select`."""
        prefixes = self.prefixes.select(state.prefixes, index)
        return FutureRows(prefixes, state.exact[index], state.values[index], state.over[index], state.known)

    def crop(self, state: FutureRows, lengths: Tensor) -> FutureRows:
        """As `Incremental.crop`; the shorter rows are read anew when they are asked about."""
        shorter = lengths.to(state.over.device) < self._lengths(state)
        prefixes = self.prefixes.crop(state.prefixes, lengths)
        return FutureRows(prefixes, state.exact, state.values, state.over & ~shorter, Known())

    def _lengths(self, state: FutureRows) -> Tensor:
        return state.prefixes.lengths.to(state.over.device)

    def _after(self, state: FutureRows, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of rows that go on, with one of `tokens` (B, k) each: a·log p(future), log ψ and whether they end, (B, k)."""
        at, device = self._lengths(state), state.over.device
        ending = torch.isin(tokens, torch.tensor(self.prior.eos_ids, dtype=torch.int64, device=device))
        before, value = at_lengths(state.exact, at)[:, None], self.potential(state)[:, None]
        exact = before.expand(tokens.shape).clone()  # an EOS is left out of what the future follows
        self._lately = (state.prefixes.reading, state.known)
        pairs = self.prefixes.pairs(state.prefixes, tokens)
        asked = torch.unique(pairs[~ending.to(pairs.device)])
        missing = state.known.missing(asked)
        if len(missing):
            state.known.add(missing, self._behind(state.prefixes.reading, missing))
        if len(asked):
            exact = torch.where(ending, exact, self.weight * state.known.get(pairs).to(device))
        over = (
            ended_with(self.prior, state.prefixes.ids, state.prefixes.lengths, tokens)
            | (at + 1 == self.prior.max_new_tokens)[:, None]
        )
        kept = torch.where(over & (exact == -torch.inf), exact, value)
        return exact, torch.where(exact.isfinite(), exact, kept), over

    def _here(self, reading: Reading) -> Tensor:
        """(D,) log p(future|x) behind the prefixes themselves."""
        futures, counts = self.futures[reading.context], self.counts[reading.context]
        total = reading.log_probs.gather(1, futures[:, :1])[:, 0]
        if futures.shape[1] > 1:
            with torch.no_grad():
                state = reading.lend(torch.arange(len(reading), device=futures.device))
                step, _ = reading.decoder.extend(state, futures[:, :-1], count=int((counts - 1).sum()))
                rest = step.log_prob_of(futures[:, 1:]).double()
            within = torch.arange(1, futures.shape[1], device=futures.device) < counts[:, None]
            total = total + torch.where(within, rest, 0.0).sum(1)
        return total

    def _behind(self, reading: Reading, pairs: Tensor) -> Tensor:
        """(M,) log p(future|x v) behind prefixes with one more token, in one forward for as many as memory holds."""
        vocab, decoder = self.prior.vocab_size, reading.decoder
        parts = []
        chunks = pairs.split(plan_rows(self.prefixes.lm, len(pairs)))
        for some in chunks:
            parent, token = some // vocab, some % vocab
            futures, counts = self.futures[reading.context[parent]], self.counts[reading.context[parent]]
            read = torch.cat([token[:, None], futures[:, :-1]], 1)
            with torch.no_grad():
                step, state = decoder.extend(reading.lend(parent), read, count=int(counts.sum()))
                scores = step.log_prob_of(futures).double()
            within = torch.arange(futures.shape[1], device=futures.device) < counts[:, None]
            parts.append(torch.where(within, scores, 0.0).sum(1))
            if len(chunks) == 1:
                reading.ahead = (some, state)
        return torch.cat(parts)


def _put(columns: Tensor, at: Tensor, values: Tensor) -> Tensor:
    """`columns` (B, t) with room for `at`, and values (B,) there."""
    width = int(at.max()) + 1 if len(at) else columns.shape[1]
    wide = torch.nn.functional.pad(columns, (0, max(0, width - columns.shape[1])))
    return wide.scatter(1, at[:, None], values[:, None])
