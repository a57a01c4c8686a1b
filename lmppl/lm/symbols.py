"""The symbols of a table: their names, the end among them, and texts as rows of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from lmppl.errors import ContextError, ModelError, ShapeError

__all__ = ["encode", "line_symbols", "named_symbols", "resolve_eos"]


def resolve_eos(eos: int | str | None, vocabulary: Sequence[str] | None, size: int) -> int | None:
    """The index of EOS among V = `size` symbols; None where there is none.

    Raises
    ------
    ModelError
        Where it is not among them.
    """
    if eos is None:
        return None
    if isinstance(eos, str):
        if vocabulary is None or eos not in vocabulary:
            raise ModelError(f"TabularLM: eos {eos!r} is not in the vocabulary")
        return list(vocabulary).index(eos)
    if not -size <= eos < size:
        raise ModelError(f"TabularLM: eos index {eos} is outside the vocabulary of {size} symbols")
    return eos % size


def named_symbols(vocabulary: Sequence[str] | None, eos_index: int | None, size: int) -> tuple[str, ...]:
    """The V symbols; by default letters, and "<eos>".

    Raises
    ------
    ShapeError
        Where there are not V distinct ones.
    """
    if vocabulary is None:
        return tuple("<eos>" if i == eos_index else _letters(i) for i in range(size))
    if len(vocabulary) != size or len(set(vocabulary)) != size:
        raise ShapeError(f"TabularLM: got {len(set(vocabulary))} distinct symbols, expected V = {size}")
    return tuple(vocabulary)


def encode(row: Any, vocabulary: Sequence[str]) -> list[int]:
    """Token ids of a string of symbols, or of a sequence of symbols and ids.

    A string is read from the left by the longest symbol behind which the rest is a row of symbols.

    Raises
    ------
    ContextError
        Where it holds something else.
    """
    if not isinstance(row, Iterable):
        raise ContextError(f"TabularLM: got the context {row!r}, expected a string, or a list of symbols and ids")
    parts = _split(row, vocabulary) if isinstance(row, str) else list(row)
    ids = []
    for part in parts:
        known = part in vocabulary if isinstance(part, str) else 0 <= part < len(vocabulary)
        if not known:
            raise ContextError(f"TabularLM: {part!r} in {row!r} is not in the vocabulary {tuple(vocabulary)}")
        ids.append(vocabulary.index(part) if isinstance(part, str) else int(part))
    return ids


def line_symbols(line: str, level: str) -> list[str]:
    """A line as characters, or as words with the space before them.

    Raises
    ------
    ModelError
        For another level than "character" and "word".
    """
    if level == "character":
        return list(line)
    if level == "word":
        words = line.split()
        return [w if i == 0 else " " + w for i, w in enumerate(words)]
    raise ModelError(f"TabularLM.from_counts: got level {level!r}, expected 'character' or 'word'")


def _letters(i: int) -> str:
    name = ""
    for _ in itertools.count():
        name = chr(ord("a") + i % 26) + name
        i = i // 26 - 1
        if i < 0:
            break
    return name


def _split(text: str, vocabulary: Sequence[str]) -> list[str]:
    by_length = sorted((s for s in vocabulary if s), key=len, reverse=True)
    end = len(text)
    following: dict[int, str] = {end: ""}  # where a row of symbols up to the end begins, and its first one
    for at in range(end - 1, -1, -1):
        found = (s for s in by_length if text.startswith(s, at) and at + len(s) in following)
        symbol = next(found, None)
        if symbol is not None:
            following[at] = symbol
    if 0 not in following:
        reached = {0}
        for at in range(end):
            if at in reached:
                reached |= {at + len(s) for s in by_length if text.startswith(s, at)}
        raise ContextError(f"TabularLM: {text!r} at {text[max(reached) :]!r} starts with no symbol of the vocabulary")
    parts: list[str] = []
    at = 0
    while at < end:
        parts.append(following[at])
        at += len(following[at])
    return parts
