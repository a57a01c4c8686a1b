"""Sets of characters as ranges of code points: the symbols of automata over text.

"Every letter" is some 140,000 characters in Unicode and a few hundred ranges.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["ANY_CHARACTER", "LAST", "CharacterSet", "Columns", "as_set", "columns_of", "refine"]

LAST = 0x10FFFF
Range = tuple[int, int]


@dataclass(frozen=True)
class CharacterSet:
    """A set of characters.

    Parameters
    ----------
    ranges : tuple of (int, int)
        First and last code point of each range: sorted, apart from each other. `of_ranges` makes them so.
    """

    ranges: tuple[Range, ...]

    @classmethod
    def of(cls, characters: Iterable[str]) -> CharacterSet:
        """The characters that are listed."""
        return cls.of_ranges((ord(c), ord(c)) for c in characters)

    @classmethod
    def of_ranges(cls, ranges: Iterable[Range]) -> CharacterSet:
        """The union of ranges, in any order."""
        merged: list[Range] = []
        for low, high in sorted(ranges):
            if merged and low <= merged[-1][1] + 1:
                merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
            else:
                merged.append((low, high))
        return cls(tuple(merged))

    def __bool__(self) -> bool:
        return bool(self.ranges)

    def __len__(self) -> int:
        return sum(high - low + 1 for low, high in self.ranges)

    def __contains__(self, character: str) -> bool:
        at = int(np.searchsorted(self.bounds[:, 0], ord(character), side="right")) - 1
        return at >= 0 and ord(character) <= self.ranges[at][1]

    def __invert__(self) -> CharacterSet:
        gaps, at = [], 0
        for low, high in self.ranges:
            if at < low:
                gaps.append((at, low - 1))
            at = high + 1
        if at <= LAST:
            gaps.append((at, LAST))
        return CharacterSet(tuple(gaps))

    def __or__(self, other: CharacterSet) -> CharacterSet:
        return CharacterSet.of_ranges([*self.ranges, *other.ranges])

    def __and__(self, other: CharacterSet) -> CharacterSet:
        return ~(~self | ~other)

    @property
    def example(self) -> str:
        """A member that a person can read, if there is one."""
        first = [chr(c) for low, high in self.ranges for c in range(low, min(high, low + 127) + 1)]
        return min(first, key=lambda c: (not c.isalnum(), not c.isprintable(), c))

    @cached_property
    def bounds(self) -> NDArray[np.int64]:
        """(R, 2) the ranges."""
        return np.array(self.ranges, dtype=np.int64).reshape(-1, 2)


ANY_CHARACTER = CharacterSet(((0, LAST),))


class Columns(NamedTuple):
    """Which of A disjoint symbols each code point is; A for none of them.

    Parameters
    ----------
    starts, column : ndarray (R,), int64
        From code point `starts[r]` on, characters are the symbol `column[r]`.
    """

    starts: NDArray[np.int64]
    column: NDArray[np.int64]

    def of_text(self, text: str) -> NDArray[np.int64]:
        """(len(text),) the symbol of each character."""
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.int64)
        return self.at(points)

    def at(self, points: NDArray[np.int64]) -> NDArray[np.int64]:
        """The symbol of each code point."""
        return self.column[np.searchsorted(self.starts, points, side="right") - 1]


def as_set(symbol: str | CharacterSet) -> CharacterSet:
    """A single character as the set of it."""
    return CharacterSet.of(symbol) if isinstance(symbol, str) else symbol


def columns_of(symbols: Sequence[str | CharacterSet]) -> Columns:
    """The columns of A symbols, single characters or sets.

    Raises
    ------
    ValueError
        Where two symbols have a character in common; the message is that character.
    """
    bounds = [as_set(symbol).bounds for symbol in symbols]
    low, high = np.concatenate([np.zeros((0, 2), dtype=np.int64), *bounds]).T
    number = np.repeat(np.arange(len(symbols)), [len(one) for one in bounds])
    order = np.argsort(low)
    low, high, number = low[order], high[order], number[order]
    twice = np.flatnonzero(low[1:] <= high[:-1])
    if len(twice):
        raise ValueError(chr(low[twice[0] + 1]))
    # A range begins at `low`, and no symbol behind it, unless the next one follows at once.
    starts = np.concatenate([low, [0], high + 1])
    column = np.concatenate([number, np.full(len(high) + 1, len(symbols))])
    starts, first = np.unique(starts, return_index=True)
    inside = starts <= LAST
    return Columns(starts[inside], column[first][inside])


def refine(alphabets: Sequence[Columns]) -> tuple[list[CharacterSet], NDArray[np.int64]]:
    """The coarsest sets of characters on which every one of K alphabets is constant.

    Returns
    -------
    sets : list of CharacterSet
        G sets, which together are all characters.
    column : ndarray (G, K), int64
        The symbol that each set is in each alphabet.
    """
    starts = np.unique(np.concatenate([one.starts for one in alphabets]))
    ends = np.append(starts[1:] - 1, LAST)
    keys, group = np.unique(np.stack([one.at(starts) for one in alphabets], 1), axis=0, return_inverse=True)
    group = group.reshape(-1)
    ranges: list[list[Range]] = [[] for _ in range(len(keys))]
    for low, high, g in zip(starts.tolist(), ends.tolist(), group.tolist(), strict=True):
        ranges[g].append((low, high))
    return [CharacterSet.of_ranges(one) for one in ranges], keys
