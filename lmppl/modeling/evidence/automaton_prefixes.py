"""A constraint's automaton, prefix by prefix: which next tokens can still lead to a text that it accepts, as a table.

The automaton is lifted from characters to the LM's tokens once; after that a prefix is one state, and the question
which of V tokens may follow is one row of a table. What is left of the horizon counts: a prefix is dead as soon as no
number of the tokens that still fit can lead to acceptance. For very large automata that is judged by the number of
characters that still fit, and rows of the table are made when a prefix gets there.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lmppl.lm.base import LanguageModel
from lmppl.lm.decoder import Step
from lmppl.lm.spelling import PARTIAL
from lmppl.modeling.evidence.automata import Automaton
from lmppl.modeling.evidence.character_sets import as_set

__all__ = ["MASK", "AutomatonPrefixes", "AutomatonRows"]

RUNS_KEPT = 1024  # runs of open tokens whose increments are remembered
EXACT_CELLS = 20_000_000  # states × tokens up to which it is computed what the remaining tokens can still reach


MASK = torch.float16  # 0 and −inf are exact in it
DEAD, OVER, BEGINNING = 1, 2, 4
RUN, RUN_BITS = 3, 16  # tokens of the open run, from bit 3
STATE = RUN + RUN_BITS
UNUSUAL = BEGINNING | ((1 << STATE) - (1 << RUN))  # what a table alone cannot answer


class AutomatonRows(NamedTuple):
    """B prefixes.

    Parameters
    ----------
    ids : Tensor (B, T), int64
        Their tokens.
    lengths : Tensor (B,), int64
    trail : Tensor (B, T+1), int64
        What was so after each number of tokens, in one number: the automaton's state after the settled text, the length
        of the run of tokens whose text is not settled, whether a text is still to begin, the row is dead, has ended.
    uniform : int
        The length of all rows; −1 where they differ.
    """

    ids: Tensor
    lengths: Tensor
    trail: Tensor
    uniform: int


class AutomatonPrefixes:
    """The `Incremental` form of 1[automaton accepts x]: log ψ(x_≤t) = 0 while acceptance can be reached, else −inf.

    "Can be reached" is over all tokens that still fit, whatever their probability under the LM (over as many characters
    as still fit, where states × tokens are more than 20 million). At the end of a row, by EOS or at the cap, the
    potential is log φ. Tokens of the LM must add up to text (`Spelling.additive`) and rows must
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
        batch = len(contexts)
        first = self.automaton.start
        code = (first << STATE) | (0 if bool(tables.alive[self.horizon, first]) else DEAD)
        trail = contexts.new_full((batch, self.horizon + 1), code)
        if tables.begins_differently:
            trail[:, 0] |= tables.begins[contexts] * BEGINNING
        return AutomatonRows(contexts.new_zeros(batch, self.horizon), contexts.new_zeros(batch), trail, 0)

    def weigh(self, state: AutomatonRows, candidates: Tensor | None) -> Tensor:
        """As `Incremental.weigh`: 0 or −inf; −inf for a row that is dead or has ended.

        In float16, which both numbers are exact in: writing (B, V) numbers is what a mask costs. Where all rows are in
        one state, the rows share their memory.
        """
        tables, codes = self._on(state.ids.device), self._now(state)
        left = self.horizon - state.uniform
        if state.uniform < 0 or left == 0 or bool((codes & UNUSUAL).any()):
            return self._weigh_each(state, codes, candidates)
        states = codes >> STATE
        mask = tables.mask(left, False, states)
        if candidates is not None:
            result = mask[states[:, None], candidates]
        elif len(states) and bool((states == states[0]).all()):
            result = mask[states[0]].expand(len(states), -1)
        else:
            result = mask.index_select(0, states)
        return self._without_dead(result, codes)

    def advance(self, state: AutomatonRows, tokens: Tensor, step: Any = None) -> AutomatonRows:
        """As `Incremental.advance`; every row has room for the token."""
        tables, codes = self._on(state.ids.device), self._now(state)
        ids, trail = state.ids.clone(), state.trail.clone()
        simple = state.uniform >= 0 and not bool(((codes & UNUSUAL) | tables.unusual[tokens]).any())
        if simple:
            states, at = codes >> STATE, state.uniform
            dead = tables.mask(self.horizon - at, False, states)[states, tokens] == -torch.inf
            moved = tables.rows(states)[states, tokens].long()
            new = (moved << STATE) | (codes & DEAD) | dead | tables.over[tokens]
            ids[:, at] = tokens
            trail[:, at + 1] = new
            return AutomatonRows(ids, state.lengths + 1, trail, at + 1)
        rows = torch.arange(len(tokens), device=tokens.device)
        ids[rows, state.lengths] = tokens
        trail[rows, state.lengths + 1] = self._advance_each(state, codes, tokens)
        uniform = state.uniform if state.uniform < 0 else state.uniform + 1
        return AutomatonRows(ids, state.lengths + 1, trail, uniform)

    def potential(self, state: AutomatonRows) -> Tensor:
        """As `Incremental.potential`."""
        codes = self._now(state)
        return torch.zeros(len(codes), dtype=torch.float64, device=codes.device).masked_fill_(
            (codes & DEAD) > 0, -torch.inf
        )

    def select(self, state: AutomatonRows, index: Tensor) -> AutomatonRows:
        """As `Incremental.select`."""
        return AutomatonRows(state.ids[index], state.lengths[index], state.trail[index], state.uniform)

    def crop(self, state: AutomatonRows, lengths: Tensor) -> AutomatonRows:
        """As `Incremental.crop`."""
        lengths = lengths.to(state.lengths)
        same = len(lengths) > 0 and bool((lengths == lengths[0]).all())
        return state._replace(lengths=lengths, uniform=int(lengths[0]) if same else -1)

    def __repr__(self) -> str:
        return f"AutomatonPrefixes({self.automaton!r})"

    def _on(self, device: torch.device) -> _Tables:
        if self._tables is None or self._tables.device != device:
            self._tables = _Tables(self.automaton, self.lm, device)
        return self._tables

    @staticmethod
    def _now(state: AutomatonRows) -> Tensor:
        """(B,) the numbers of the trail that hold now."""
        if state.uniform >= 0:
            return state.trail[:, state.uniform]
        return state.trail.gather(1, state.lengths[:, None])[:, 0]

    @staticmethod
    def _without_dead(weights: Tensor, codes: Tensor) -> Tensor:
        dead = (codes & (DEAD | OVER)) > 0
        return weights.masked_fill(dead[:, None], -torch.inf) if bool(dead.any()) else weights

    def _weigh_each(self, state: AutomatonRows, codes: Tensor, candidates: Tensor | None) -> Tensor:
        """`weigh` of rows of different lengths, at the beginning of a text, or with an open run."""
        tables = self._on(codes.device)
        states, begun, left = codes >> STATE, (codes & BEGINNING) == 0, self.horizon - state.lengths
        shape = (len(codes), self.lm.vocab_size)
        every = torch.full(shape, -torch.inf, dtype=MASK, device=codes.device)
        for number, inside in torch.stack([left, begun.long()], 1)[left > 0].unique(dim=0).tolist():
            rows = torch.nonzero((left == number) & (begun == bool(inside))).squeeze(1)
            every[rows] = tables.mask(number, not inside, states[rows])[states[rows]]
        for row in torch.nonzero((_run(codes) > 0) & (left > 0)).squeeze(1).tolist():
            every[row] = tables.after_run(
                self._tokens(state, codes, row), int(states[row]), bool(begun[row]), int(left[row])
            )
        every = self._without_dead(every, codes)
        return every if candidates is None else every.gather(1, candidates)

    def _advance_each(self, state: AutomatonRows, codes: Tensor, tokens: Tensor) -> Tensor:
        """The numbers of the trail after `tokens`."""
        tables = self._on(codes.device)
        states, begun, left = codes >> STATE, (codes & BEGINNING) == 0, self.horizon - state.lengths
        moved = tables.rows(states)[states, tokens].long()
        if tables.begins_differently:
            moved = torch.where(begun, moved, tables.rows(states, True)[states, tokens].long())
        opens = tables.open[tokens]
        after, longer = torch.where(opens, states, moved), opens.long()
        dead = tables.mask_value(states, tokens, begun, left) == -torch.inf
        for row in torch.nonzero(_run(codes) > 0).squeeze(1).tolist():  # no table knows what an open run becomes
            run, token = self._tokens(state, codes, row), int(tokens[row])
            now, inside = int(states[row]), bool(begun[row])
            dead[row] = tables.after_run(run, now, inside, int(left[row]))[token] == -torch.inf
            if tables.settles[token]:
                after[row] = tables.row(tables.close(run, now, inside))[token]
            else:
                after[row], longer[row] = now, len(run) + 1
        settled = (longer == 0) & ~tables.silent[tokens]
        beginning = ~(begun | settled) * BEGINNING
        return (after << STATE) | (longer << RUN) | beginning | (codes & DEAD) | dead | tables.over[tokens]

    def _tokens(self, state: AutomatonRows, codes: Tensor, row: int) -> list[int]:
        """The open tokens at the end of a row."""
        length = int(state.lengths[row])
        return state.ids[row, length - int(_run(codes[row])) : length].tolist()


def _run(codes: Tensor) -> Tensor:
    """How many open tokens there are at the end of each row."""
    return (codes >> RUN) & ((1 << RUN_BITS) - 1)


class _Tables:
    """What the automaton does on each token of the LM: Q states, V tokens."""

    def __init__(self, automaton: Automaton, lm: LanguageModel, device: torch.device) -> None:
        self.automaton, self.device, self.horizon = automaton, device, lm.max_new_tokens
        vocab, size = lm.vocab_size, automaton.num_states
        self.spelling = lm.spelling if automaton.over == "characters" else None
        self.pieces = [[""] * vocab]  # of tokens behind others, and at the beginning of a text if that differs
        if self.spelling is None:
            self.open = self.partial = self.silent = torch.zeros(vocab, dtype=torch.bool, device=device)
            self.settles = torch.ones_like(self.open)
        else:
            spelling = self.spelling
            self.pieces = [spelling.pieces, spelling.first] if spelling.begins_differently else [spelling.pieces]
            self.open, self.partial = spelling.open.to(device), spelling.partial.to(device)
            self.silent, self.settles = spelling.silent.to(device), spelling.clean.to(device)
        self.begins_differently = len(self.pieces) == 2
        self._following = [torch.empty(size, vocab, dtype=torch.int32, device=device) for _ in self.pieces]
        self._followed = [torch.zeros(size, dtype=torch.bool, device=device) for _ in self.pieces]
        self.begins = torch.tensor(lm.begins_text, dtype=torch.bool, device=device)
        self.accept = automaton.accept.to(device)
        self.ends = torch.isin(
            torch.arange(vocab, device=device), torch.tensor(lm.eos_ids, dtype=torch.int64, device=device)
        )
        self.over = self.ends.long() * OVER
        self.unusual = self.open.long()
        self.live = automaton.live().to(device)
        self.live_beyond = _live_beyond_ascii(automaton).to(device)
        self.goes_beyond = _goes_beyond_ascii(automaton).to(device)
        self.opening = self._openings()
        self.alive = self._alive() if size * vocab <= EXACT_CELLS else self._alive_by_characters()
        self._like = self.alive.unique(dim=0, return_inverse=True)[1].tolist()  # horizons with equal rows share masks
        self._masks: dict[tuple[bool, int, bool], tuple[Tensor, Tensor]] = {}
        self._runs: dict[tuple[tuple[int, ...], int, bool, int], Tensor] = {}

    def _openings(self) -> list[tuple[Tensor, list[str]]] | None:
        """Open tokens, and what of their text is settled: behind it stands a character outside ASCII."""
        opening = torch.nonzero(self.open).squeeze(1)
        if len(opening) == 0:
            return None
        listed = opening.tolist()
        return [(opening, [pieces[v].partition(PARTIAL)[0] for v in listed]) for pieces in self.pieces]

    def rows(self, states: Tensor, beginning: bool = False) -> Tensor:
        """(Q, V) int32 the next states, of which the rows `states` are there."""
        kind = int(beginning and self.begins_differently)
        table, known = self._following[kind], self._followed[kind]
        if not bool(known[states].all()):
            fresh = states[~known[states]].unique()
            table[fresh] = self.automaton.lift(self.pieces[kind], fresh.cpu()).to(table)
            known[fresh] = True
        return table

    def row(self, state: int, beginning: bool = False) -> Tensor:
        """(V,) the next states of one state."""
        found: Tensor = self.rows(torch.tensor([state], device=self.device), beginning)[state].long()
        return found

    def mask(self, left: int, beginning: bool, states: Tensor) -> Tensor:
        """(Q, V) increments of the next of `left` tokens, from a prefix without a run; the rows `states` are there."""
        key = (left == 1, self._like[left - 1], beginning)
        if key not in self._masks:
            shape = self._following[0].shape
            known = torch.zeros(shape[0], dtype=torch.bool, device=self.device)
            self._masks[key] = torch.empty(shape, dtype=MASK, device=self.device), known
        table, known = self._masks[key]
        if not bool(known[states].all()):
            fresh = states[~known[states]].unique()
            allowed = self._allowed(left, beginning, fresh)
            table[fresh] = torch.zeros(allowed.shape, dtype=MASK, device=self.device).masked_fill_(~allowed, -torch.inf)
            known[fresh] = True
        return table

    def mask_value(self, states: Tensor, tokens: Tensor, begun: Tensor, left: Tensor) -> Tensor:
        """(B,) entries of `mask`."""
        result = torch.empty(len(states), dtype=MASK, device=states.device)
        for number, inside in torch.stack([left, begun.long()], 1).unique(dim=0).tolist():
            rows = (left == number) & (begun == bool(inside))
            beginning = not inside and self.begins_differently
            result[rows] = self.mask(number, beginning, states[rows])[states[rows], tokens[rows]]
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
        allowed = self.alive[left - 1][self.row(closed)]
        beyond = bool(self.partial[run].any())
        joins = ~self.settles
        if left == 1:
            for token in torch.nonzero(joins & ~self.ends).squeeze(1).tolist():
                allowed[token] = self.accept[self.close([*run, token], state, begun)]
        else:
            before = self.live_beyond[state] if beyond else self.live[state]
            allowed = torch.where(joins, torch.where(self.partial, self.live_beyond[state], before), allowed)
        allowed = torch.where(self.ends, self.accept[closed], allowed)
        zeros = torch.zeros(allowed.shape, dtype=MASK, device=allowed.device)
        return zeros.masked_fill_(~allowed, -torch.inf)

    def close(self, run: list[int], state: int, begun: bool) -> int:
        """The state once a run of open tokens has become text."""
        assert self.spelling is not None
        text = self.spelling.text_of(run, not begun)
        return int(self.automaton.run([text], torch.tensor([state]))[0])

    def _allowed(self, left: int, beginning: bool, states: Tensor) -> Tensor:
        """(S, V) bool."""
        allowed = self.alive[left - 1][self.rows(states, beginning)[states].long()]
        if left > 1 and self.opening is not None:
            opening, leads = self.opening[beginning and self.begins_differently]
            before = self.automaton.lift(leads, states.cpu()).to(self.device)
            good = torch.where(self.partial[opening], self.goes_beyond[before], self.live[states][:, None])
            allowed[:, opening] = good
        # EOS adds no text, or is a symbol of its own.
        ends = torch.nonzero(self.ends).squeeze(1)
        allowed[:, ends] = self.accept[self.rows(states)[states][:, ends].long()]
        return allowed

    def _alive(self) -> Tensor:
        """(T+1, Q) bool: whether acceptance can be reached with so many tokens to come."""
        goes_on = ~self.ends & ~self.open
        size = len(self.accept)
        every = torch.arange(size, device=self.device)
        leads = torch.zeros(size, size, dtype=torch.bool, device=self.device)
        closes = leads.clone()
        for beginning in (False, True)[: len(self.pieces)]:
            table = self.rows(every, beginning)
            for q in range(size):
                leads[q, table[q, goes_on].long()] = True
                closes[q, table[q, self.open].long()] = True
        stops = self.accept[self.rows(every)[:, self.ends].long()].any(1)
        partial = self.live_beyond if bool(self.partial.any()) else torch.zeros_like(self.live)
        runs_on = self.live if bool((self.open & ~self.partial).any()) else partial
        rows = [self.accept]
        for left in range(1, self.horizon + 1):
            by_run = (closes & self.accept).any(1) if left == 1 else runs_on
            rows.append(stops | (leads & rows[-1]).any(1) | by_run)
        return torch.stack(rows)

    def _alive_by_characters(self) -> Tensor:
        """(T+1, Q) bool: whether so many tokens have as many characters as acceptance needs."""
        distance = torch.where(self.accept, 0, -1)
        table, steps = self.automaton.transitions.to(self.device), 0
        while True:
            steps += 1
            nearer = (distance < 0) & (distance[table] == steps - 1).any(1)
            if not bool(nearer.any()):
                break
            distance[nearer] = steps
        longest = max(len(piece) for pieces in self.pieces for piece in pieces)
        reach = torch.arange(self.horizon + 1, device=self.device) * longest
        return (distance >= 0) & (distance <= reach[:, None])


def _goes_beyond_ascii(automaton: Automaton) -> Tensor:
    """(Q,) bool: the states from which a word that begins with a character outside ASCII is accepted."""
    beyond = [not isinstance(s, int) and as_set(s).ranges[-1][1] > 127 for s in automaton.alphabet]
    columns = torch.tensor([*beyond, True])  # any other symbol: some character outside ASCII is always among them
    return automaton.live()[automaton.transitions[:, columns]].any(1)


def _live_beyond_ascii(automaton: Automaton) -> Tensor:
    """(Q,) bool: the states from which a word with some character outside ASCII is accepted."""
    found = _goes_beyond_ascii(automaton)
    while True:
        wider = found | found[automaton.transitions].any(1)
        if bool((wider == found).all()):
            return found
        found = wider
