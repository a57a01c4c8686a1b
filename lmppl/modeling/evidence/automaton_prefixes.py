"""A constraint's automaton, prefix by prefix: which next tokens can still lead to a text that it accepts, as a table.

A prefix is one state of the automaton, and the question which of V tokens may follow is one row of a table
(`lmppl.modeling.evidence.automaton_tables`). What is left of the horizon counts: a prefix is dead as soon as no number
of the tokens that still fit can lead to acceptance.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lmppl.lm.base import LanguageModel
from lmppl.lm.decoder import Step
from lmppl.modeling.evidence.automata import Automaton
from lmppl.modeling.evidence.automaton_tables import MASK, AutomatonTables
from lmppl.modeling.evidence.prefix_columns import at_lengths

__all__ = ["AutomatonPrefixes", "AutomatonRows"]

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
        self._tables: AutomatonTables | None = None

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
            new = (moved << STATE) | (codes & DEAD) | dead | tables.ends[tokens] * OVER
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

    def _on(self, device: torch.device) -> AutomatonTables:
        if self._tables is None or self._tables.device != device:
            self._tables = AutomatonTables(self.automaton, self.lm, device)
        return self._tables

    @staticmethod
    def _now(state: AutomatonRows) -> Tensor:
        """(B,) the numbers of the trail that hold now."""
        if state.uniform >= 0:
            return state.trail[:, state.uniform]
        return at_lengths(state.trail, state.lengths)

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
        return (after << STATE) | (longer << RUN) | beginning | (codes & DEAD) | dead | tables.ends[tokens] * OVER

    def _tokens(self, state: AutomatonRows, codes: Tensor, row: int) -> list[int]:
        """The open tokens at the end of a row."""
        length = int(state.lengths[row])
        return state.ids[row, length - int(_run(codes[row])) : length].tolist()


def _run(codes: Tensor) -> Tensor:
    """How many open tokens there are at the end of each row."""
    return (codes >> RUN) & ((1 << RUN_BITS) - 1)
