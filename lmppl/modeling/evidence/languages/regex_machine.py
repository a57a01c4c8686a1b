"""Regular expressions as finite automata, with the meaning that Python's `re` gives them.

The expression is parsed by `re`; what it matches as a whole becomes a nondeterministic machine (`thompson1968`), which
is then made deterministic (`lmppl.modeling.evidence.languages.machines`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch

from lmppl.errors import ModelError
from lmppl.modeling.evidence.automata import Automaton
from lmppl.modeling.evidence.character_sets import ANY_CHARACTER, CharacterSet
from lmppl.modeling.evidence.languages.machines import Assertion, Machine, deterministic
from lmppl.modeling.evidence.languages.regex_sets import item_set

__all__ = ["containing_automaton", "regex_automaton"]

NOT_REGULAR = {
    "GROUPREF": "a back-reference",
    "GROUPREF_EXISTS": "a condition on a group",
    "ATOMIC_GROUP": "an atomic group (?>...)",
    "POSSESSIVE_REPEAT": "a possessive quantifier such as *+",
}
ANYTHING = ("MAX_REPEAT", (0, "MAXREPEAT", [("IN", [("NEGATE", None)])]))  # every character, any number of times
LETTER = [("IN", [("CATEGORY", "CATEGORY_WORD")])]
EMPTY_TEXT = Automaton.length(0, 0)


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
    return deterministic(machine, start, end)


def _compiled(items: Iterable[tuple[Any, Any]], flags: int, blind: frozenset[str] = frozenset()) -> Automaton:
    machine = Machine(blind=blind)
    start = machine.node()
    machine.initial.add(start)
    end = _add(machine, start, items, flags)
    return deterministic(machine, start, end)


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
    return deterministic(copy, first, end)
