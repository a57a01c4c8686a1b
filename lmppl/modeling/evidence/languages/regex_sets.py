"""The characters that one item of a Python regular expression matches, asked of `re` itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from lmppl.modeling.evidence.character_sets import ANY_CHARACTER, LAST, CharacterSet

__all__ = ["item_set"]

# In a pattern of text, these flags change what a single character matches.
RELEVANT = re.IGNORECASE | re.ASCII | re.DOTALL
CATEGORIES = {
    "CATEGORY_DIGIT": r"\d",
    "CATEGORY_NOT_DIGIT": r"\D",
    "CATEGORY_SPACE": r"\s",
    "CATEGORY_NOT_SPACE": r"\S",
    "CATEGORY_WORD": r"\w",
    "CATEGORY_NOT_WORD": r"\W",
}


def item_set(op: str, argument: Any, flags: int) -> CharacterSet:
    """The set of a parsed item that matches one character.

    Parameters
    ----------
    op : str
        "LITERAL", "NOT_LITERAL", "ANY" or "IN", as `re` names them.
    argument
        What the parser put beside it.
    flags : int
        The flags that hold at this place.
    """
    if op == "ANY":
        return ANY_CHARACTER if flags & re.DOTALL else ~CharacterSet.of("\n")
    parts = [(op.removeprefix("NOT_"), argument)] if op != "IN" else [(str(o), a) for o, a in argument]
    is_negated = op == "NOT_LITERAL" or parts[0][0] == "NEGATE"
    matched = _union([one for one in parts if one[0] != "NEGATE"], flags & RELEVANT)
    return ~matched if is_negated else matched


def _union(parts: Sequence[tuple[str, Any]], flags: int) -> CharacterSet:
    ranges: list[tuple[int, int]] = []
    for op, argument in parts:
        if op == "LITERAL":
            ranges.append((argument, argument))
        elif op == "RANGE":
            ranges.append(tuple(argument))
        else:
            ranges += _category(CATEGORIES[str(argument)], flags & re.ASCII).ranges
    found = CharacterSet.of_ranges(ranges)
    if not found or not flags & re.IGNORECASE:
        return found
    named = "".join(f"{_escaped(low)}-{_escaped(high)}" for low, high in found.ranges)
    return found | CharacterSet.of(re.findall(f"[{named}]", _cased(), flags))


@cache
def _category(name: str, flags: int) -> CharacterSet:
    every = "".join(map(chr, range(LAST + 1)))
    return CharacterSet.of_ranges((m.start(), m.end() - 1) for m in re.finditer(f"{name}+", every, flags))


@cache
def _cased() -> str:
    """The characters that ignoring case can make equal to others; all other ones equal themselves only."""
    return "".join(c for c in map(chr, range(LAST + 1)) if not c.lower() == c.upper() == c)


def _escaped(point: int) -> str:
    return f"\\U{point:08x}"
