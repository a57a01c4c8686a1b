"""Nondeterministic machines over characters, made deterministic set by set.

An edge may read a character, or nothing; one that reads nothing may ask something of the text before or after its
place. The text before is watched by automata that run along; the text after by automata that begin there and must
accept when the text ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from lmppl.errors import ModelError
from lmppl.modeling.evidence.automata import Automaton
from lmppl.modeling.evidence.character_sets import CharacterSet, columns_of, refine

__all__ = ["Assertion", "Machine", "deterministic"]

MAX_NODES = 50_000  # of the nondeterministic machine
MAX_STATES = 10_000


class Assertion(NamedTuple):
    """What must hold at a place for an edge to be taken without reading.

    Parameters
    ----------
    before, after : tuple of Automaton
        Each must accept the text before the place, or after it.
    """

    before: tuple[Automaton, ...] = ()
    after: tuple[Automaton, ...] = ()


@dataclass
class Machine:
    """A nondeterministic machine: nodes 0, 1, ... with edges that read a character, and edges that do not."""

    reads: list[list[tuple[CharacterSet, int]]] = field(default_factory=list)
    jumps: list[list[tuple[Assertion, int]]] = field(default_factory=list)
    initial: set[int] = field(default_factory=set)  # nodes at the beginning of the text only
    blind: frozenset[str] = frozenset()  # what of the text, "before" or "after", an assertion cannot see here

    def node(self) -> int:
        """A new node."""
        if len(self.reads) == MAX_NODES:
            raise ModelError(
                f"Language: it needs more than {MAX_NODES:,} steps; shorten repeats such as {{1,1000}}, or give fewer "
                "words"
            )
        self.reads.append([])
        self.jumps.append([])
        return len(self.reads) - 1

    def jump(self, source: int, to: int, assertion: Assertion | None = None) -> None:
        """An edge that reads nothing."""
        self.jumps[source].append((assertion or Assertion(), to))


Demand = tuple[int, int]  # an automaton that must accept the rest of the text, and its state
Place = tuple[int, frozenset[Demand]]  # a node, and what the rest of the text must do
State = tuple[tuple[int, ...], frozenset[Place]]  # states of the automata that watch the text so far; places
NO_DEMANDS: frozenset[Demand] = frozenset()


def deterministic(machine: Machine, start: int, end: int) -> Automaton:
    """The minimal automaton, by the sets of places where the machine may be."""
    return _Subsets(machine, start, end).automaton()


class _Subsets:
    """Sets of places of a machine, and how a character moves them."""

    def __init__(self, machine: Machine, start: int, end: int) -> None:
        self.machine, self.end = machine, end
        assertions = [a for row in machine.jumps for a, _ in row]
        self.watchers, watcher = _numbered([a.before for a in assertions])
        self.demands, demand = _numbered([a.after for a in assertions])
        both = iter(zip(watcher, demand, strict=True))
        self.jumps = [[(*next(both), to) for _, to in row] for row in machine.jumps]
        self.watched = [one.accept.tolist() for one in self.watchers]
        self.met = [one.accept.tolist() for one in self.demands]
        self.live = [one.live().tolist() for one in self.demands]
        self.sure = [(~(~one).live()).tolist() for one in self.demands]  # nothing that follows can be refused
        labels = list(dict.fromkeys(s for row in machine.reads for s, _ in row))
        automata = [*self.watchers, *self.demands]
        alphabets = [columns_of([label]) for label in labels] + [one.columns for one in automata]
        self.sets, columns = refine(alphabets or [columns_of([])])
        number = {label: i for i, label in enumerate(labels)}
        inside = (columns[:, : len(labels)] == 0) if labels else columns[:, :0] == 0
        self.moves = [[([bool(x) for x in inside[:, number[s]]], to) for s, to in row] for row in machine.reads]
        offset, split = len(labels), len(labels) + len(self.watchers)
        self.watch_columns = columns[:, offset:split].tolist() if automata else [[] for _ in self.sets]
        self.demand_columns = columns[:, split:].tolist() if automata else [[] for _ in self.sets]
        self.watch_tables = [one.transitions.tolist() for one in self.watchers]
        self.demand_tables = [one.transitions.tolist() for one in self.demands]
        self.certain = self._certain()
        self.start: State = self._closed(tuple(one.start for one in self.watchers), [(start, NO_DEMANDS)])

    def automaton(self) -> Automaton:
        """Explore the states that can be reached, and minimise."""
        number: dict[State, int] = {self.start: 0}
        queue, rows = [self.start], []
        for state in queue:
            row = []
            for column in range(len(self.sets)):
                to = self._step(state, column)
                if to not in number:
                    if len(number) == MAX_STATES:
                        raise ModelError(
                            f"Language: it needs more than {MAX_STATES:,} states; shorten repeats such as {{1,1000}}, "
                            "give fewer words, or use Constraint(fn)"
                        )
                    number[to] = len(number)
                    queue.append(to)
                row.append(number[to])
            rows.append(row)
        accept = torch.tensor([self._accepts(state) for state in queue])
        # Symbols are all sets but the last, which is "any other".
        return Automaton(torch.tensor(rows), tuple(self.sets[:-1]), 0, accept).minimize()

    def _step(self, state: State, column: int) -> State:
        if self._is_certain(state):
            return state
        watching, places = state
        watched = tuple(
            table[q][c] for table, q, c in zip(self.watch_tables, watching, self.watch_columns[column], strict=True)
        )
        moved: list[Place] = []
        for node, demands in places:
            targets = [to for inside, to in self.moves[node] if inside[column]]
            if not targets:
                continue
            rest = self._read(demands, column)
            if rest is not None:
                moved += [(to, rest) for to in targets]
        return self._closed(watched, moved)

    def _read(self, demands: frozenset[Demand], column: int) -> frozenset[Demand] | None:
        """The demands after one character; None where one cannot be met any more."""
        rest = set()
        for k, q in demands:
            to = self.demand_tables[k][q][self.demand_columns[column][k]]
            if not self.live[k][to]:
                return None
            if not self.sure[k][to]:
                rest.add((k, to))
        return frozenset(rest)

    def _closed(self, watching: tuple[int, ...], places: Sequence[Place]) -> State:
        """With the places that are reached without reading; one from which every text is matched stands for all."""
        seen = set(places)
        queue = list(seen)
        for node, demands in queue:
            if node in self.certain and not demands:
                return (), frozenset({(min(self.certain), demands)})
            for before, after, to in self.jumps[node]:
                if not all(self.watched[k][watching[k]] for k in before):
                    continue
                new = [(k, self.demands[k].start) for k in after]
                if not all(self.live[k][q] for k, q in new):
                    continue
                place = (to, demands.union((k, q) for k, q in new if not self.sure[k][q]))
                if place not in seen:
                    seen.add(place)
                    queue.append(place)
        return watching, frozenset(seen)

    def _certain(self) -> frozenset[int]:
        """Nodes from which every text is matched: they reach the end, and read any character into such a node."""
        free = [{node} for node in range(len(self.jumps))]
        for node, reached in enumerate(free):
            queue = [node]
            for at in queue:
                fresh = {to for before, after, to in self.jumps[at] if not before and not after} - reached
                reached |= fresh
                queue += fresh
        able = {node for node, reached in enumerate(free) if self.end in reached}
        while True:
            into = [{to for inside, to in row if all(inside)} for row in self.moves]
            kept = {node for node in able if any(to in able for at in free[node] for to in into[at])}
            if kept == able:
                return frozenset(able)
            able = kept

    def _is_certain(self, state: State) -> bool:
        return any(node in self.certain and not demands for node, demands in state[1])

    def _accepts(self, state: State) -> bool:
        met = any(node == self.end and all(self.met[k][q] for k, q in demands) for node, demands in state[1])
        return met or self._is_certain(state)


def _numbered(groups: Sequence[Sequence[Automaton]]) -> tuple[list[Automaton], list[tuple[int, ...]]]:
    """The distinct automata of all groups, and each group as numbers of them."""
    number: dict[str, int] = {}
    distinct: list[Automaton] = []
    numbers = []
    for group in groups:
        row = []
        for one in group:
            key = repr(one.to_dict())
            if key not in number:
                number[key] = len(distinct)
                distinct.append(one)
            row.append(number[key])
        numbers.append(tuple(row))
    return distinct, numbers
