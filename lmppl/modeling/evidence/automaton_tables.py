"""Tables of what an automaton does on an LM's tokens: where each leads, and which may follow.

The automaton is lifted from characters to tokens, state by state as prefixes get there. A mask says which tokens can
still lead to acceptance with what is left of the horizon; of very large automata that is judged by the number of
characters that still fit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmppl.lm.base import LanguageModel
from lmppl.lm.spelling import PARTIAL
from lmppl.modeling.evidence.automata import Automaton
from lmppl.modeling.evidence.automaton_bytes import ByteLookahead, tells_characters_apart
from lmppl.modeling.evidence.character_sets import as_set
from lmppl.modeling.evidence.token_bytes import token_bytes

__all__ = ["MASK", "AutomatonTables"]

RUNS_KEPT = 1024  # runs of open tokens whose increments are remembered
EXACT_CELLS = 20_000_000  # states × tokens up to which it is computed what the remaining tokens can still reach
MASK = torch.float16  # 0 and −inf are exact in it


class AutomatonTables:
    """What an automaton does on each token of an LM: Q states, V tokens.

    Parameters
    ----------
    automaton : Automaton
    lm : LanguageModel
    device : torch.device
        Where the tables are; rows are made when they are asked for.
    """

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
        self.unusual = self.open.long()
        self.live = automaton.live().to(device)
        self.live_beyond = _live_beyond_ascii(automaton).to(device)
        self.goes_beyond = _goes_beyond_ascii(automaton).to(device)
        self.opening = self._openings()
        self.lookahead = self._lookahead(lm)
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

    def _lookahead(self, lm: LanguageModel) -> ByteLookahead | None:
        """What bytes can become, where the automaton asks and the LM shows them."""
        if self.opening is None or not bool(self.partial.any()) or not tells_characters_apart(self.automaton):
            return None
        tokens = token_bytes(lm)
        return None if tokens is None else ByteLookahead(self.automaton, tokens.inside)

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
            if self.lookahead is not None and self.opening is not None:
                opening = self.opening[0][0]
                read = b"".join(self.lookahead.tokens[token] for token in run)
                allowed[opening] &= self.lookahead.allowed(state, read, opening.tolist()).to(self.device)
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
            if self.lookahead is not None:
                listed = opening.tolist()
                good &= torch.stack([self.lookahead.allowed(q, b"", listed) for q in states.tolist()]).to(self.device)
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
        return torch.stack(rows) & self._alive_by_characters()  # no run has more characters than its tokens

    def _alive_by_characters(self) -> Tensor:
        """(T+1, Q) bool: whether so many tokens have as many symbols as acceptance needs."""
        distance = torch.where(self.accept, 0, -1)
        table, steps = self.automaton.transitions.to(self.device), 0
        while True:
            steps += 1
            nearer = (distance < 0) & (distance[table] == steps - 1).any(1)
            if not bool(nearer.any()):
                break
            distance[nearer] = steps
        # Over tokens, each is a symbol of its own.
        longest = 1 if self.spelling is None else max(len(piece) for pieces in self.pieces for piece in pieces)
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
