"""A constraint's automaton, prefix by prefix: which next tokens can still lead to a text that it accepts, as a table.

The automaton is lifted from characters to the LM's tokens once; after that a prefix is one state, and the question
which of V tokens may follow is one row of a table. What is left of the horizon counts: a prefix is dead as soon as no
number of the tokens that still fit can lead to acceptance.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lmppl.lm.base import LanguageModel, Step
from lmppl.modeling.evidence.automata import Automaton

__all__ = ["AutomatonPrefixes", "AutomatonRows"]

RUNS_KEPT = 1024  # runs of open tokens whose increments are remembered


class AutomatonRows(NamedTuple):
    """B prefixes; column t is what was so after t tokens.

    Parameters
    ----------
    ids : Tensor (B, T), int64
        Their tokens.
    lengths : Tensor (B,), int64
    states : Tensor (B, T+1), int64
        The automaton's state after the settled text.
    runs : Tensor (B, T+1), int64
        Tokens at the end whose text is not settled yet.
    begun : Tensor (B, T+1), bool
        Whether the next token stands inside a text.
    values : Tensor (B, T+1), float64
        The potential.
    """

    ids: Tensor
    lengths: Tensor
    states: Tensor
    runs: Tensor
    begun: Tensor
    values: Tensor


class AutomatonPrefixes:
    """The `Incremental` form of 1[automaton accepts x]: log ψ(x_≤t) = 0 while acceptance can be reached, else −inf.

    "Can be reached" is over all tokens that still fit, whatever their probability under the LM. At the end of a row, by
    EOS or at the cap, the potential is log φ. Tokens of the LM must add up to text (`Spelling.additive`) and rows must
    end by EOS or the cap alone, unless the automaton reads token ids, EOS among them.

    Parameters
    ----------
    automaton : Automaton
    lm : LanguageModel
        Whose prefixes are read.

    References
    ----------
    koo2024
    """

    needs: Collection[Literal["text", "ids", "hidden"]] = frozenset({"ids"})

    def __init__(self, automaton: Automaton, lm: LanguageModel) -> None:
        self.automaton, self.lm = automaton, lm
        self.horizon = lm.max_new_tokens
        self._tables: _Tables | None = None

    def start(self, contexts: Tensor, step: Step | None = None) -> AutomatonRows:
        """As `Incremental.start`."""
        tables = self._on(contexts.device)
        batch, width = len(contexts), self.horizon + 1
        begun = ~tables.begins[contexts][:, None].expand(batch, width) if tables.first is not None else None
        states = contexts.new_full((batch, width), self.automaton.start)
        return AutomatonRows(
            contexts.new_zeros(batch, self.horizon),
            contexts.new_zeros(batch),
            states,
            torch.zeros_like(states),
            torch.ones_like(states, dtype=torch.bool) if begun is None else begun.clone(),
            tables.values(self.horizon)[states],
        )

    def weigh(self, state: AutomatonRows, candidates: Tensor | None) -> Tensor:
        """As `Incremental.weigh`: 0 or −inf; −inf for a row that is dead or has ended."""
        tables = self._on(state.ids.device)
        now = state.lengths[:, None]
        states, runs, begun = (x.gather(1, now)[:, 0] for x in (state.states, state.runs, state.begun))
        dead = (state.values.gather(1, now)[:, 0] == -torch.inf) | self._over(state)
        left = self.horizon - state.lengths
        if len(left) and bool((left == left[0]).all()) and bool(begun.all()) and int(left[0]) > 0:
            every = tables.mask(int(left[0]), False)[states]
        else:
            every = torch.full((len(states), self.lm.vocab_size), -torch.inf, dtype=self.lm.dtype, device=now.device)
            for number, inside in torch.stack([left, begun.long()], 1)[left > 0].unique(dim=0).tolist():
                rows = torch.nonzero((left == number) & (begun == bool(inside))).squeeze(1)
                every[rows] = tables.mask(number, not inside)[states[rows]]
        for row in torch.nonzero((runs > 0) & ~dead).squeeze(1).tolist():
            every[row] = tables.after_run(self._run(state, row), int(states[row]), bool(begun[row]), int(left[row]))
        if bool(dead.any()):
            every = every.masked_fill(dead[:, None], -torch.inf)
        return every if candidates is None else every.gather(1, candidates)

    def advance(self, state: AutomatonRows, tokens: Tensor, step: Any = None) -> AutomatonRows:
        """As `Incremental.advance`; every row has room for the token."""
        tables = self._on(state.ids.device)
        rows = torch.arange(len(tokens), device=tokens.device)
        at = state.lengths
        states, runs, begun, values = (x[rows, at] for x in (state.states, state.runs, state.begun, state.values))
        moved = tables.following[states, tokens]
        if tables.first is not None:
            moved = torch.where(begun, moved, tables.first[states, tokens])
        opens = tables.open[tokens]
        after = torch.where(opens, states, moved)
        left = self.horizon - at - 1
        value = tables.mask_value(states, tokens, begun, left + 1)
        longer = torch.where(opens, 1, 0)
        for row in torch.nonzero(runs > 0).squeeze(1).tolist():  # a table cannot know what an open run becomes
            run, token = self._run(state, row), int(tokens[row])
            every = tables.after_run(run, int(states[row]), bool(begun[row]), int(left[row]) + 1)
            value[row] = every[token]
            if tables.settles[token]:
                closed = tables.close(run, int(states[row]), bool(begun[row]))
                after[row] = tables.following[closed, token]
            else:
                after[row], longer[row] = states[row], runs[row] + 1
        settled = (longer == 0) & ~tables.silent[tokens]
        value = torch.where(values == -torch.inf, values, value.to(values.dtype))
        new = [x.clone() for x in (state.ids, state.states, state.runs, state.begun, state.values)]
        new[0][rows, at] = tokens
        for whole, column in zip(new[1:], (after, longer, begun | settled, value), strict=True):
            whole[rows, at + 1] = column
        return AutomatonRows(new[0], at + 1, *new[1:])

    def potential(self, state: AutomatonRows) -> Tensor:
        """As `Incremental.potential`."""
        return state.values.gather(1, state.lengths[:, None])[:, 0]

    def select(self, state: AutomatonRows, index: Tensor) -> AutomatonRows:
        """As `Incremental.select`."""
        return AutomatonRows(*(x[index] for x in state))

    def crop(self, state: AutomatonRows, lengths: Tensor) -> AutomatonRows:
        """As `Incremental.crop`."""
        return state._replace(lengths=lengths.to(state.lengths))

    def __repr__(self) -> str:
        return f"AutomatonPrefixes({self.automaton!r})"

    def _on(self, device: torch.device) -> _Tables:
        if self._tables is None or self._tables.following.device != device:
            self._tables = _Tables(self.automaton, self.lm, device)
        return self._tables

    def _over(self, state: AutomatonRows) -> Tensor:
        last = state.ids.gather(1, (state.lengths - 1).clamp_min(0)[:, None])[:, 0]
        ended = self._on(state.ids.device).ends[last] & (state.lengths > 0)
        return ended | (state.lengths == self.horizon)

    def _run(self, state: AutomatonRows, row: int) -> list[int]:
        """The open tokens at the end of a row."""
        length = int(state.lengths[row])
        return state.ids[row, length - int(state.runs[row, length]) : length].tolist()


class _Tables:
    """What the automaton does on each token of the LM: Q states, V tokens."""

    def __init__(self, automaton: Automaton, lm: LanguageModel, device: torch.device) -> None:
        self.automaton, self.dtype, self.horizon = automaton, lm.dtype, lm.max_new_tokens
        vocab = lm.vocab_size
        self.spelling = lm.spelling if automaton.over == "characters" else None
        first = None
        if self.spelling is None:
            following = automaton.lift([""] * vocab)
            self.open = self.partial = self.silent = torch.zeros(vocab, dtype=torch.bool, device=device)
            self.settles = torch.ones_like(self.open)
        else:
            spelling = self.spelling
            following = automaton.lift(spelling.pieces)
            first = automaton.lift(spelling.first) if spelling.begins_differently else None
            self.open, self.partial = spelling.open.to(device), spelling.partial.to(device)
            self.silent, self.settles = spelling.silent.to(device), spelling.clean.to(device)
        self.following = following.to(device)
        self.first = None if first is None else first.to(device)
        self.begins = torch.tensor(lm.begins_text, dtype=torch.bool, device=device)
        self.accept = automaton.accept.to(device)
        self.ends = torch.isin(
            torch.arange(vocab, device=device), torch.tensor(lm.eos_ids, dtype=torch.int64, device=device)
        )
        self.live = automaton.live().to(device)
        self.live_beyond = _live_beyond_ascii(automaton).to(device)
        self.alive = self._alive()
        self._values = torch.zeros(self.alive.shape, dtype=torch.float64, device=device)
        self._values.masked_fill_(~self.alive, -torch.inf)
        self._masks: dict[tuple[bool, bytes, bool], Tensor] = {}
        self._runs: dict[tuple[tuple[int, ...], int, bool, int], Tensor] = {}

    def values(self, left: int) -> Tensor:
        """(Q,) potential of a prefix with `left` tokens to come, by the state of its settled text."""
        return self._values[left]

    def mask(self, left: int, beginning: bool) -> Tensor:
        """(Q, V) increments of the next of `left` tokens, from a prefix without a run."""
        key = (left == 1, self.alive[left - 1].cpu().numpy().tobytes(), beginning)
        if key not in self._masks:
            allowed = self._allowed(left, beginning)
            self._masks[key] = torch.zeros(allowed.shape, dtype=self.dtype, device=allowed.device).masked_fill_(
                ~allowed, -torch.inf
            )
        return self._masks[key]

    def mask_value(self, states: Tensor, tokens: Tensor, begun: Tensor, left: Tensor) -> Tensor:
        """(B,) entries of `mask`."""
        result = torch.empty(len(states), dtype=self.dtype, device=states.device)
        for number, inside in torch.stack([left, begun.long()], 1).unique(dim=0).tolist():
            rows = (left == number) & (begun == bool(inside))
            result[rows] = self.mask(number, not inside and self.first is not None)[states[rows], tokens[rows]]
        return result

    def after_run(self, run: list[int], state: int, begun: bool, left: int) -> Tensor:
        """(V,) increments after a run of open tokens behind the settled text that led to `state`."""
        key = (tuple(run), state, begun, left)
        if key not in self._runs:
            if len(self._runs) == RUNS_KEPT:
                self._runs.clear()
            self._runs[key] = self._after_run(run, state, begun, left)
        return self._runs[key]

    def _after_run(self, run: list[int], state: int, begun: bool, left: int) -> Tensor:
        closed = self.close(run, state, begun)
        allowed = self.alive[left - 1][self.following[closed]]
        beyond = bool(self.partial[run].any())
        joins = ~self.settles
        if left == 1:
            for token in torch.nonzero(joins & ~self.ends).squeeze(1).tolist():
                allowed[token] = self.accept[self.close([*run, token], state, begun)]
        else:
            before = self.live_beyond[state] if beyond else self.live[state]
            allowed = torch.where(joins, torch.where(self.partial, self.live_beyond[state], before), allowed)
        allowed = torch.where(self.ends, self.accept[closed], allowed)
        zeros = torch.zeros(allowed.shape, dtype=self.dtype, device=allowed.device)
        return zeros.masked_fill_(~allowed, -torch.inf)

    def close(self, run: list[int], state: int, begun: bool) -> int:
        """The state once a run of open tokens has become text."""
        assert self.spelling is not None
        text = self.spelling.text_of(run, not begun)
        return int(self.automaton.run([text], torch.tensor([state]))[0])

    def _allowed(self, left: int, beginning: bool) -> Tensor:
        """(Q, V) bool."""
        table = self.following if self.first is None or not beginning else self.first
        allowed = self.alive[left - 1][table]
        if left > 1:
            after = torch.where(self.partial, self.live_beyond[:, None], self.live[:, None])
            allowed = torch.where(self.open, after, allowed)
        at_end = self.accept[self.following]  # EOS adds no text, or is a symbol of its own
        return torch.where(self.ends, at_end, allowed)

    def _alive(self) -> Tensor:
        """(T+1, Q) bool: whether acceptance can be reached with so many tokens to come."""
        goes_on = ~self.ends & ~self.open
        tables = [self.following] if self.first is None else [self.following, self.first]
        size = len(self.accept)
        leads = torch.zeros(size, size, dtype=torch.bool, device=self.accept.device)
        closes = leads.clone()
        for table in tables:
            for q in range(size):
                leads[q, table[q, goes_on]] = True
                closes[q, table[q, self.open]] = True
        stops = self.accept[self.following[:, self.ends]].any(1)
        partial = self.live_beyond if bool(self.partial.any()) else torch.zeros_like(self.live)
        runs_on = self.live if bool((self.open & ~self.partial).any()) else partial
        rows = [self.accept]
        for left in range(1, self.horizon + 1):
            by_run = (closes & self.accept).any(1) if left == 1 else runs_on
            rows.append(stops | (leads & rows[-1]).any(1) | by_run)
        return torch.stack(rows)


def _live_beyond_ascii(automaton: Automaton) -> Tensor:
    """(Q,) bool: the states from which a word with some character outside ASCII is accepted."""
    beyond = [isinstance(s, str) and not s.isascii() for s in automaton.alphabet]
    columns = torch.tensor([*beyond, True])  # any other symbol: some character outside ASCII is always among them
    found = automaton.live()[automaton.transitions[:, columns]].any(1)
    while True:
        wider = found | found[automaton.transitions].any(1)
        if bool((wider == found).all()):
            return found
        found = wider
