"""Algorithms on whole automata: product, minimisation, a shortest word."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lmppl.errors import ModelError

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
    alphabet = tuple(dict.fromkeys([*left.alphabet, *right.alphabet]))
    table, other, size = _columns(left, alphabet), _columns(right, alphabet), right.num_states

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


def _columns(machine: Automaton, alphabet: Sequence[Symbol]) -> Tensor:
    """(Q, len(alphabet) + 1) the transitions on a larger alphabet."""
    column = {symbol: i for i, symbol in enumerate(machine.alphabet)}
    other = len(machine.alphabet)
    return machine.transitions[:, [*(column.get(s, other) for s in alphabet), other]]


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
    """Without the symbols that act as any other one; the alphabet sorted."""
    table, alphabet = machine.transitions, machine.alphabet
    acting = (table[:, :-1] != table[:, -1:]).any(0).tolist()
    kept = sorted((i for i, acts in enumerate(acting) if acts), key=lambda i: alphabet[i])
    names = tuple(alphabet[i] for i in kept)
    return type(machine)(table[:, [*kept, -1]], names, machine.start, machine.accept, machine.over)


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
    known = set(machine.alphabet)
    if machine.over == "characters":
        stranger = next(chr(c) for c in range(ord("!"), 0x110000) if chr(c) not in known)
        return "".join(str(s) for s in ([*machine.alphabet, stranger][c] for c in columns))
    number = next(i for i in range(len(known) + 1) if i not in known)
    return tuple(int(s) for s in ([*machine.alphabet, number][c] for c in columns))
