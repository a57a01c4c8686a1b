"""Algorithms on whole automata: product, minimisation, a shortest word."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lmppl.errors import ModelError
from lmppl.modeling.evidence.character_sets import CharacterSet, as_set, refine

if TYPE_CHECKING:
    from lmppl.modeling.evidence.automata import Automaton, Symbol, Word

__all__ = ["minimize", "product", "shortest", "trim"]


def product(left: Automaton, right: Any, combine: Callable[[Tensor, Tensor], Tensor]) -> Automaton:
    """The minimal automaton that reads with both, and accepts where `combine` of their acceptances is true.

    Raises
    ------
    ModelError
        Where `right` is no automaton, or one reads characters and the other tokens.
    """
    if not hasattr(right, "transitions"):
        raise ModelError(f"Automaton: got {type(right).__name__} as the other operand, expected an Automaton")
    if left.over != right.over:
        raise ModelError(f"Automaton: got one over {left.over} and one over {right.over}, expected one kind")
    alphabet, columns = _common_alphabet(left, right)
    table, other, size = left.transitions[:, columns[:, 0]], right.transitions[:, columns[:, 1]], right.num_states

    def following(pairs: Tensor) -> Tensor:
        codes: Tensor = table[pairs // size] * size + other[pairs % size]
        return codes

    # Pairs of states that can be reached, as codes q·Q' + q': seldom all of them.
    pairs = torch.tensor([left.start * size + right.start])
    successors = [following(pairs)]
    while True:
        found = torch.unique(successors[-1])
        fresh = found[~torch.isin(found, pairs)]
        if len(fresh) == 0:
            break
        pairs = torch.cat([pairs, fresh])
        successors.append(following(fresh))
    ordered, order = pairs.sort()
    transitions = torch.searchsorted(ordered, torch.cat(successors)[order])
    accept = combine(left.accept[ordered // size], right.accept[ordered % size])
    start = int(torch.searchsorted(ordered, pairs[0]))
    return minimize(type(left)(transitions, alphabet, start, accept, left.over))


def _common_alphabet(left: Automaton, right: Automaton) -> tuple[tuple[Symbol, ...], Tensor]:
    """An alphabet of A symbols that both can read, and (A+1, 2) their columns for each symbol and for any other."""
    others = [len(left.alphabet), len(right.alphabet)]
    if left.over == "tokens":
        alphabet = tuple(dict.fromkeys([*left.alphabet, *right.alphabet]))
        number = [{symbol: i for i, symbol in enumerate(one.alphabet)} for one in (left, right)]
        rows = [[n.get(s, other) for n, other in zip(number, others, strict=True)] for s in alphabet]
        return alphabet, torch.tensor([*rows, others])
    sets, columns = refine([left.columns, right.columns])
    named = [i for i, row in enumerate(columns.tolist()) if row != others]
    return tuple(_symbol(sets[i]) for i in named), torch.tensor([*(columns[i].tolist() for i in named), others])


def _token(symbol: Symbol) -> int:
    assert isinstance(symbol, int)
    return symbol


def _symbol(characters: CharacterSet) -> Symbol:
    return characters.example if len(characters) == 1 else characters


def trim(machine: Automaton) -> Automaton:
    """Without the states that no word reaches; the others are numbered as a breadth-first walk meets them."""
    rows = machine.transitions.tolist()
    number = {machine.start: 0}
    queue = [machine.start]
    for state in queue:
        for to in rows[state]:
            if to not in number:
                number[to] = len(number)
                queue.append(to)
    kept = torch.tensor(queue)
    new = torch.zeros(machine.num_states, dtype=torch.int64)
    new[kept] = torch.arange(len(kept))
    transitions, accept = new[machine.transitions[kept]], machine.accept[kept]
    return type(machine)(transitions, machine.alphabet, 0, accept, machine.over)


def minimize(machine: Automaton) -> Automaton:
    """The smallest automaton of the same language, by Moore's partition refinement. Source: `moore1956`."""
    machine = trim(_without_idle_symbols(trim(machine)))
    label, count = machine.accept.long(), 0
    while True:
        # Two states stay together while they agree in acceptance and in where every symbol leads.
        signature = torch.cat([label[:, None], label[machine.transitions]], 1)
        classes, label = torch.unique(signature, dim=0, return_inverse=True)
        if len(classes) == count:
            break
        count = len(classes)
    if count == machine.num_states:
        return machine
    member = torch.zeros(count, dtype=torch.int64)
    member[label] = torch.arange(machine.num_states)
    transitions, accept = label[machine.transitions[member]], machine.accept[member]
    merged = type(machine)(transitions, machine.alphabet, int(label[machine.start]), accept, machine.over)
    return minimize(merged)  # once more: among fewer states, more symbols act alike


def _without_idle_symbols(machine: Automaton) -> Automaton:
    """Without the symbols that act as any other one, and with those that act alike as one; the alphabet sorted."""
    if machine.over == "tokens":
        table, alphabet = machine.transitions, machine.alphabet
        acting = (table[:, :-1] != table[:, -1:]).any(0).tolist()
        kept = sorted((i for i, acts in enumerate(acting) if acts), key=lambda i: _token(alphabet[i]))
        names = tuple(alphabet[i] for i in kept)
        return type(machine)(table[:, [*kept, -1]], names, machine.start, machine.accept, machine.over)
    ways, way = machine.transitions.unique(dim=1, return_inverse=True)
    members: list[list[tuple[int, int]]] = [[] for _ in range(ways.shape[1])]
    for symbol, w in zip(machine.alphabet, way.tolist(), strict=False):
        assert not isinstance(symbol, int)
        members[w] += as_set(symbol).ranges
    unnamed = ~CharacterSet.of_ranges(r for ranges in members for r in ranges)
    members[int(way[-1])] += unnamed.ranges
    sets = [CharacterSet.of_ranges(ranges) for ranges in members]
    # "Any other" is what holds the last code point, whatever was called so before: then equal languages are equal.
    other = next(i for i, one in enumerate(sets) if "\U0010ffff" in one)
    kept = sorted((i for i, one in enumerate(sets) if one and i != other), key=lambda i: sets[i].ranges)
    names = tuple(_symbol(sets[i]) for i in kept)
    return type(machine)(ways[:, [*kept, other]], names, machine.start, machine.accept, machine.over)


def shortest(machine: Automaton) -> Word | None:
    """A shortest word of the language, the first in the order of the alphabet; None if there is no word."""
    rows, accept = machine.transitions.tolist(), machine.accept.tolist()
    arrival: dict[int, tuple[int, int] | None] = {machine.start: None}  # previous state, column read
    queue = [machine.start]
    for state in queue:
        if accept[state]:
            return _spell(machine, _path(arrival, state))
        for column, to in enumerate(rows[state]):
            if to not in arrival:
                arrival[to] = (state, column)
                queue.append(to)
    return None


def _path(arrival: dict[int, tuple[int, int] | None], state: int) -> list[int]:
    columns = []
    while (step := arrival[state]) is not None:
        state, column = step
        columns.append(column)
    return columns[::-1]


def _spell(machine: Automaton, columns: list[int]) -> Word:
    known = machine.alphabet
    if machine.over == "characters":
        named = [as_set(s) for s in known if not isinstance(s, int)]
        stranger = ~CharacterSet.of_ranges(r for one in named for r in one.ranges)
        return "".join([*named, stranger][c].example for c in columns)
    number = next(i for i in range(len(known) + 1) if i not in known)
    return tuple([*(s for s in known if isinstance(s, int)), number][c] for c in columns)
