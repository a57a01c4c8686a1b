"""A reader of prefixes: the incremental form of what can be said of a prefix's text, rows read token by token.

What is read of a prefix is its settled text, with which every continuation's text begins (see `lmppl.lm.spelling`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lmppl.lm.base import LanguageModel
from lmppl.lm.decoder import Step
from lmppl.lm.spelling import Spelled
from lmppl.modeling.evidence.prefix_columns import at_lengths
from lmppl.sequences import Sequences

__all__ = ["LogFactor", "PrefixReader", "PrefixRows", "as_log", "no_verdict"]

LogFactor = Callable[[Sequences], Tensor]
"""(B,) log φ of B sequences, in nats."""

CHUNK = 1 << 14  # rows that are read at once


class PrefixRows(NamedTuple):
    """B prefixes.

    Parameters
    ----------
    ids : Tensor (B, T), int64
    lengths, context : Tensor (B,), int64
    over : Tensor (B,), bool
        Rows that have ended.
    values : Tensor (B, T+1), float64
        The potential after each number of tokens.
    spelled : list of Spelled
        Their texts.
    """

    ids: Tensor
    lengths: Tensor
    context: Tensor
    over: Tensor
    values: Tensor
    spelled: list[Spelled]


class PrefixReader:
    """An `Incremental` form that reads prefixes: log ψ(x_≤t) = `going(prefix)` while a row goes on, log φ at its end.

    Both functions return 0 or −inf; −inf of a prefix must mean that every continuation is −inf. Once a row is −inf it
    stays so, without being read again.

    Parameters
    ----------
    lm : LanguageModel
    going : callable
        (`Sequences` of prefixes, whose text is the settled one) → (B,) potentials.
    ending : callable
        (`Sequences` of outcomes) → (B,) log φ.
    content : callable
        Names the content of the two; called when it is asked for, since it may hash a network.
    """

    needs: Collection[Literal["text", "ids", "hidden"]] = frozenset({"ids", "text"})

    def __init__(self, lm: LanguageModel, going: LogFactor, ending: LogFactor, content: Callable[[], str]) -> None:
        self.lm, self._going, self._ending, self._content = lm, going, ending, content
        self.stop: tuple[str, ...] = tuple(getattr(lm, "stop", ()))

    @property
    def fingerprint(self) -> str:
        """A hash of what the form says."""
        return self._content()

    def start(self, contexts: Tensor, step: Step | None = None) -> PrefixRows:
        """As `Incremental.start`."""
        batch, cap = len(contexts), self.lm.max_new_tokens
        begins = self.lm.begins_text
        spelled = [self.lm.spelling.start(begins[c]) for c in contexts.tolist()]
        ids = contexts.new_full((batch, cap), self.lm.pad_id)
        none = torch.zeros_like(contexts)
        values = torch.zeros(batch, cap + 1, dtype=torch.float64, device=contexts.device)
        rows = PrefixRows(ids, none, contexts, none.bool(), values, spelled)
        rows.values[:, 0] = self._read(ids, none, contexts, spelled, none.bool(), none.bool())
        return rows

    def weigh(self, state: PrefixRows, candidates: Tensor | None) -> Tensor:
        """As `Incremental.weigh`: 0 or −inf; −inf for a row that is dead or has ended."""
        device, vocab = state.ids.device, self.lm.vocab_size
        width = vocab if candidates is None else candidates.shape[1]
        result = torch.full((len(state.ids), width), -torch.inf, dtype=torch.float64, device=device)
        going = torch.nonzero((self.potential(state) > -torch.inf) & ~state.over).squeeze(1)
        tokens = torch.arange(vocab, device=device).expand(len(state.ids), -1) if candidates is None else candidates
        for rows in going.split(max(1, CHUNK // width)):
            several = rows.repeat_interleave(width)
            value = self._after(state, several, tokens[rows].reshape(-1))[-1]
            result[rows] = value.view(len(rows), width)
        return result

    def advance(self, state: PrefixRows, tokens: Tensor, step: Any = None) -> PrefixRows:
        """As `Incremental.advance`; every row has room for the token."""
        index = torch.arange(len(tokens), device=tokens.device)
        ids, lengths, over, spelled, value = self._after(state, index, tokens, self.potential(state) == -torch.inf)
        values = state.values.clone()
        values[index, lengths] = value
        return PrefixRows(ids, lengths, state.context, over, values, spelled)

    def potential(self, state: PrefixRows) -> Tensor:
        """As `Incremental.potential`."""
        return at_lengths(state.values, state.lengths)

    def select(self, state: PrefixRows, index: Tensor) -> PrefixRows:
        """As `Incremental.select`."""
        s = state
        spelled = [s.spelled[i] for i in index.tolist()]
        return PrefixRows(s.ids[index], s.lengths[index], s.context[index], s.over[index], s.values[index], spelled)

    def crop(self, state: PrefixRows, lengths: Tensor) -> PrefixRows:
        """As `Incremental.crop`."""
        lengths = lengths.to(state.lengths)
        begins, spelling = self.lm.begins_text, self.lm.spelling
        spelled = []
        for row, n, c in zip(state.ids.tolist(), lengths.tolist(), state.context.tolist(), strict=True):
            prefix = spelling.start(begins[c])
            for token in row[:n]:
                prefix = prefix if token in spelling.eos_ids else spelling.read(prefix, token)
            spelled.append(prefix)
        return state._replace(lengths=lengths, over=state.over & (lengths == state.lengths), spelled=spelled)

    def _after(
        self, state: PrefixRows, rows: Tensor, tokens: Tensor, dead: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, list[Spelled], Tensor]:
        """Row `rows[i]` and one more token: ids, lengths, whether it has ended, text, potential."""
        lm, spelling = self.lm, self.lm.spelling
        ids, at = state.ids[rows], state.lengths[rows]
        each = torch.arange(len(rows), device=ids.device)
        ids[each, at] = tokens
        stopped = torch.zeros(len(rows), dtype=torch.bool, device=ids.device)
        for length in at.unique().tolist():
            same = torch.nonzero(at == length).squeeze(1)
            stopped[same] = lm.ended(ids[same, : length + 1], int(length))
        over = stopped | (at + 1 == lm.max_new_tokens)
        spelled = [
            state.spelled[r] if v in spelling.eos_ids else spelling.read(state.spelled[r], v)
            for r, v in zip(rows.tolist(), tokens.tolist(), strict=True)
        ]
        context = state.context[rows]
        value = torch.full((len(rows),), -torch.inf, dtype=torch.float64, device=ids.device)
        asked = torch.arange(len(rows), device=ids.device) if dead is None else torch.nonzero(~dead).squeeze(1)
        some = spelled if dead is None else [spelled[i] for i in asked.tolist()]
        value[asked] = self._read(ids[asked], at[asked] + 1, context[asked], some, over[asked], stopped[asked])
        return ids, at + 1, over, spelled, value

    def _read(
        self, ids: Tensor, lengths: Tensor, context: Tensor, spelled: list[Spelled], over: Tensor, stopped: Tensor
    ) -> Tensor:
        """(B,) potentials, of rows that go on and of rows that have ended."""
        value = torch.zeros(len(ids), dtype=torch.float64, device=ids.device)
        for ended, function in ((False, self._going), (True, self._ending)):
            index = torch.nonzero(over == ended).squeeze(1)
            if len(index) == 0:
                continue
            own, n, eos, where = (x[index].cpu() for x in (ids, lengths, stopped, context))
            rows = Sequences(own, n, eos, where, self.lm.prompts, self.lm.decode)
            if not ended or self.lm.spelling.additive:
                rows.__dict__["text"] = [self._text(spelled[i], ended) for i in index.tolist()]
            value[index] = function(rows).to(value)
        return value

    def _text(self, prefix: Spelled, ended: bool) -> str:
        """What is settled of a row that goes on; the text of one that has ended."""
        if ended:
            text = self.lm.spelling.whole(prefix)
            cuts = [at for at in (text.find(s) for s in self.stop) if at >= 0]
            return text[: min(cuts)] if cuts else text
        if not self.lm.spelling.additive:
            return ""
        return held_back(prefix.text, self.stop)


def as_log(allowed: Tensor) -> Tensor:
    """(B,) float64 the logarithm of an indicator: 0 where `allowed`, else −inf."""
    return torch.zeros(len(allowed), dtype=torch.float64).masked_fill_(~allowed, -torch.inf)


def no_verdict(prefixes: Sequences) -> Tensor:
    """(B,) 0: of prefixes that say nothing about their ends."""
    return torch.zeros(len(prefixes), dtype=torch.float64)


def held_back(text: str, stop: Sequence[str]) -> str:
    """`text` without the longest end that a stop string begins with: what stays if that string is completed."""
    longest = max((len(s) for s in stop), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(len(s) > size and s.startswith(text[-size:]) for s in stop):
            return text[:-size]
    return text
