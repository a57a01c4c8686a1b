"""Regular expressions as finite automata, with the meaning that Python's `re` gives them.

The expression is parsed by `re`; what it matches as a whole becomes a nondeterministic machine (`thompson1968`), which
is then made deterministic set by set. Assertions look at the text before or after a place: the text before is watched
by automata that run along, the text after by automata that begin there and must accept when the text ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from lmppl.errors import ModelError
from lmppl.modeling.evidence.automata import Automaton
from lmppl.modeling.evidence.character_sets import ANY_CHARACTER, CharacterSet, columns_of, refine
from lmppl.modeling.evidence.languages.regex_sets import item_set

__all__ = ["containing_automaton", "regex_automaton"]

MAX_NODES = 50_000  # of the nondeterministic machine
MAX_STATES = 10_000

NOT_REGULAR = {
    "GROUPREF": "a back-reference",
    "GROUPREF_EXISTS": "a condition on a group",
    "ATOMIC_GROUP": "an atomic group (?>...)",
    "POSSESSIVE_REPEAT": "a possessive quantifier such as *+",
}
ANYTHING = ("MAX_REPEAT", (0, "MAXREPEAT", [("IN", [("NEGATE", None)])]))  # every character, any number of times
LETTER = [("IN", [("CATEGORY", "CATEGORY_WORD")])]
EMPTY_TEXT = Automaton.length(0, 0)


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
                f"Regex: the expression needs more than {MAX_NODES:,} steps; shorten repeats such as {{1,1000}}"
            )
        self.reads.append([])
        self.jumps.append([])
        return len(self.reads) - 1

    def jump(self, source: int, to: int, assertion: Assertion | None = None) -> None:
        """An edge that reads nothing."""
        self.jumps[source].append((assertion or Assertion(), to))


def regex_automaton(pattern: str, flags: int = 0) -> Automaton:
    """The minimal automaton of the texts that `re.fullmatch(pattern, text, flags)` matches.

    Raises
    ------
    ModelError
        Where `re` cannot parse the pattern, it is not regular (back-references, atomic groups, possessive quantifiers,
        assertions inside assertions that need them), or it needs too many states.
    """
    parser: Any = re._parser  # type: ignore[attr-defined]  # what `re` itself parses with
    try:
        parsed = parser.parse(pattern, flags)
        flags = int(parsed.state.flags)
    except (re.error, ValueError, OverflowError) as error:
        raise ModelError(f"Regex: {pattern!r} is no regular expression: {error}") from error
    return _compiled(parsed, flags)


def containing_automaton(words: Iterable[str], *, whole_words: bool = False, ignore_case: bool = False) -> Automaton:
    r"""The minimal automaton of the texts in which one of the words occurs: `.*(?:word|word).*` by a tree of the words.

    Parameters
    ----------
    words : iterable of str
    whole_words : bool
        Neither a letter, a digit nor an underscore (`\w`) before the word or after it.
    ignore_case : bool
        As `re.IGNORECASE`.
    """
    flags = int(re.IGNORECASE if ignore_case else 0)
    machine = Machine()
    start, root, found, end = (machine.node() for _ in range(4))
    machine.reads[start].append((ANY_CHARACTER, start))
    machine.reads[end].append((ANY_CHARACTER, end))
    nothing = [("ASSERT_NOT", (-1, LETTER)), ("ASSERT_NOT", (1, LETTER))] if whole_words else [None, None]
    for place, source, to in zip(nothing, (start, found), (root, end), strict=True):
        for assertion in [Assertion()] if place is None else _assertions(*place, flags):
            machine.jump(source, to, assertion)
    tree: dict[tuple[int, CharacterSet], int] = {}
    for word in words:
        at = root
        for character in word:
            characters = item_set("LITERAL", ord(character), flags)
            key = (at, characters)
            if key not in tree:
                tree[key] = machine.node()
                machine.reads[at].append((characters, tree[key]))
            at = tree[key]
        machine.jump(at, found)
    return _deterministic(machine, start, end)


def _compiled(items: Iterable[tuple[Any, Any]], flags: int, blind: frozenset[str] = frozenset()) -> Automaton:
    machine = Machine(blind=blind)
    start = machine.node()
    machine.initial.add(start)
    end = _add(machine, start, items, flags)
    return _deterministic(machine, start, end)


def _add(machine: Machine, at: int, items: Iterable[tuple[Any, Any]], flags: int) -> int:
    """Add a sequence of items that begins at node `at`; the node where it ends."""
    for op, argument in items:
        at = _add_item(machine, at, str(op), argument, flags)
    return at


def _add_item(machine: Machine, at: int, op: str, argument: Any, flags: int) -> int:
    if op in NOT_REGULAR:
        raise ModelError(f"Regex: {NOT_REGULAR[op]} is not regular; use Constraint(fn) with re.fullmatch")
    if op in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
        end = machine.node()
        characters = item_set(op, argument, flags)
        if characters:
            machine.reads[at].append((characters, end))
        return end
    if op == "BRANCH":
        end = machine.node()
        for branch in argument[1]:
            machine.jump(_add(machine, at, branch, flags), end)
        return end
    if op == "SUBPATTERN":
        _, added, removed, inner = argument
        return _add(machine, at, inner, (flags | added) & ~removed)
    if op in ("MAX_REPEAT", "MIN_REPEAT"):
        least, most, inner = argument
        return _add_repeat(machine, at, least, most, inner, flags)
    end = machine.node()
    if at in machine.initial:
        machine.initial.add(end)
    for assertion in _assertions(op, argument, flags, at_start=at in machine.initial):
        if ("before" in machine.blind and assertion.before) or ("after" in machine.blind and assertion.after):
            raise ModelError(
                "Regex: an assertion inside a look-ahead or look-behind looks beyond it, which is supported only in "
                "look-aheads at the beginning; use Constraint(fn) with re.fullmatch"
            )
        machine.jump(at, end, assertion)
    return end


def _add_repeat(machine: Machine, at: int, least: int, most: Any, items: Any, flags: int) -> int:
    for _ in range(least):
        at = _add(machine, at, items, flags)
    if str(most) == "MAXREPEAT":
        loop, end = machine.node(), machine.node()
        machine.jump(at, loop)
        machine.jump(_add(machine, loop, items, flags), loop)
        machine.jump(loop, end)
        return end
    end = machine.node()
    machine.jump(at, end)
    for _ in range(int(most) - least):
        at = _add(machine, at, items, flags)
        machine.jump(at, end)
    return end


def _assertions(op: str, argument: Any, flags: int, *, at_start: bool = False) -> list[Assertion]:
    """The ways in which an assertion can hold."""
    if op == "FAILURE":  # (?!) never holds
        return []
    if op in ("ASSERT", "ASSERT_NOT"):
        direction, items = argument
        if direction > 0:
            seen = _compiled([*items, ANYTHING], flags, frozenset(() if at_start else ("before",)))
        else:
            seen = _compiled([ANYTHING, *items], flags, frozenset(("after",)))
        wanted = (~seen if op == "ASSERT_NOT" else seen).minimize()
        return [Assertion(after=(wanted,)) if direction > 0 else Assertion(before=(wanted,))]
    line = Automaton.exactly(["\n"])
    match str(argument):
        case "AT_BEGINNING" if flags & re.MULTILINE:
            return [Assertion(before=(EMPTY_TEXT,)), Assertion(before=(_preceded_by_any(line),))]
        case "AT_BEGINNING" | "AT_BEGINNING_STRING":
            return [Assertion(before=(EMPTY_TEXT,))]
        case "AT_END" if flags & re.MULTILINE:
            return [Assertion(after=(EMPTY_TEXT,)), Assertion(after=(_followed_by_any(line),))]
        case "AT_END":
            return [Assertion(after=(EMPTY_TEXT,)), Assertion(after=(line,))]
        case "AT_END_STRING":
            return [Assertion(after=(EMPTY_TEXT,))]
        case "AT_BOUNDARY" | "AT_NON_BOUNDARY":
            word = _compiled(LETTER, flags)
            behind, ahead = _preceded_by_any(word), _followed_by_any(word)
            differ = str(argument) == "AT_BOUNDARY"
            return [
                Assertion((behind,), (~ahead if differ else ahead,)),
                Assertion((~behind,), (ahead if differ else ~ahead,)),
            ]
    raise ModelError(f"Regex: {str(argument).lower()} is not supported; use Constraint(fn) with re.fullmatch")


def _followed_by_any(machine: Automaton) -> Automaton:
    """The texts that a word of the language begins: its accepting states keep accepting."""
    transitions = machine.transitions.clone()
    accepting = torch.nonzero(machine.accept).squeeze(1)
    transitions[accepting] = accepting[:, None].expand(-1, transitions.shape[1])
    return Automaton(transitions, machine.alphabet, machine.start, machine.accept).minimize()


def _preceded_by_any(machine: Automaton) -> Automaton:
    """The texts that a word of the language ends."""
    copy = Machine()
    first = copy.node()
    copy.reads[first].append((ANY_CHARACTER, first))
    inner = [copy.node() for _ in range(machine.num_states)]
    end = copy.node()
    copy.jump(first, inner[machine.start])
    named = [CharacterSet.of(s) if isinstance(s, str) else s for s in machine.alphabet if not isinstance(s, int)]
    unnamed = ~CharacterSet.of_ranges(r for one in named for r in one.ranges)
    for state, row in enumerate(machine.transitions.tolist()):
        copy.reads[inner[state]] = [(s, inner[to]) for s, to in zip([*named, unnamed], row, strict=True) if s]
        if bool(machine.accept[state]):
            copy.jump(inner[state], end)
    return _deterministic(copy, first, end)


Demand = tuple[int, int]  # an automaton that must accept the rest of the text, and its state
Place = tuple[int, frozenset[Demand]]  # a node, and what the rest of the text must do
State = tuple[tuple[int, ...], frozenset[Place]]  # states of the automata that watch the text so far; places
NO_DEMANDS: frozenset[Demand] = frozenset()


def _deterministic(machine: Machine, start: int, end: int) -> Automaton:
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
                            f"Regex: the expression needs more than {MAX_STATES:,} states; shorten repeats such as "
                            "{1,1000}, or use Constraint(fn) with re.fullmatch"
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
