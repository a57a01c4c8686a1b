"""Finite automata over characters or tokens: evidence in which engines can look ahead and sum exactly.

A word is read symbol by symbol; what the alphabet does not name is "any other symbol", so that an automaton
over a few characters reads every text. A symbol may be a set of characters that all act alike.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from lmppl.errors import ModelError, ShapeError
from lmppl.modeling.evidence import automaton_algebra
from lmppl.modeling.evidence.character_sets import CharacterSet, Columns, columns_of
from lmppl.sequences import Sequences

__all__ = ["Automaton"]

Over = Literal["characters", "tokens"]
Symbol = str | int | CharacterSet
Word = str | Sequence[int]


@dataclass(frozen=True, eq=False)
class Automaton:
    """A deterministic finite automaton of Q states over A symbols; every state reads every symbol.

    Parameters
    ----------
    transitions : Tensor (Q, A+1), int64
        `transitions[q, a]` is the state after reading `alphabet[a]` in state q; the last column is any other
        symbol.
    alphabet : tuple of str, of CharacterSet, or of int
        A single characters or sets of them, none of which is in two; or A token ids.
    start : int
        The state before the first symbol.
    accept : Tensor (Q,), bool
        Where a word may end.
    over : {"characters", "tokens"}
        What a symbol is. Over tokens, EOS is a token like any other.

    Raises
    ------
    ShapeError, ModelError
        Where tables do not fit together.

    Examples
    --------
    >>> paris = Automaton.containing("Paris") & ~Automaton.containing("London")
    >>> paris.accepts("I love Paris"), paris.accepts("Paris or London")
    (True, False)
    """

    transitions: Tensor
    alphabet: tuple[Symbol, ...]
    start: int
    accept: Tensor
    over: Over = "characters"

    def __post_init__(self) -> None:
        if self.over not in ("characters", "tokens"):
            raise ModelError(f"Automaton: got over={self.over!r}, expected 'characters' or 'tokens'")
        kind = str | CharacterSet if self.over == "characters" else int
        for symbol in self.alphabet:
            if not isinstance(symbol, kind) or (isinstance(symbol, str) and len(symbol) != 1):
                expected = "single characters, or sets of them" if self.over == "characters" else "token ids"
                raise ModelError(f"Automaton: got the symbol {symbol!r}, expected {expected}")
        if len(set(self.alphabet)) != len(self.alphabet):
            raise ModelError(f"Automaton: the alphabet names a symbol twice: {self.alphabet}")
        if self.over == "characters":
            self._check_overlap()
        size = len(self.accept)
        if self.transitions.shape != (size, len(self.alphabet) + 1) or self.accept.dtype != torch.bool:
            raise ShapeError(
                f"Automaton: got transitions {tuple(self.transitions.shape)} and accept {tuple(self.accept.shape)} of "
                f"{self.accept.dtype}, expected (Q, {len(self.alphabet) + 1}) and (Q,) of torch.bool"
            )
        if not bool(((self.transitions >= 0) & (self.transitions < size)).all()) or not 0 <= self.start < size:
            raise ModelError(f"Automaton: a state is outside 0..{size - 1}")

    def _check_overlap(self) -> None:
        try:
            columns_of(self._characters)
        except ValueError as error:
            raise ModelError(f"Automaton: the alphabet names the character {str(error)!r} twice") from error

    @property
    def _characters(self) -> list[str | CharacterSet]:
        return [s for s in self.alphabet if not isinstance(s, int)]

    @cached_property
    def columns(self) -> Columns:
        """Which symbol each character is, over characters."""
        return columns_of(self._characters)

    @property
    def num_states(self) -> int:
        """Q."""
        return len(self.accept)

    def __repr__(self) -> str:
        return f"Automaton({self.num_states} states, {len(self.alphabet)} {self.over})"

    # Construction.

    @classmethod
    def from_edges(
        cls,
        edges: Mapping[Hashable, Mapping[Symbol | None, Hashable]],
        *,
        start: Hashable,
        accept: Collection[Hashable],
        over: Over = "characters",
    ) -> Automaton:
        """From state → {symbol: next state}; the symbol None is any other one; a missing edge rejects the word.

        Raises
        ------
        ModelError
            Where `start` or `accept` names a state that no edge mentions.
        """
        states = dict.fromkeys([start, *edges, *(to for row in edges.values() for to in row.values())])
        number = {state: i for i, state in enumerate(states)}
        unknown = [state for state in accept if state not in number]
        if unknown:
            raise ModelError(f"Automaton.from_edges: accept names {unknown[0]!r}, which no edge mentions")
        alphabet = tuple(dict.fromkeys(s for row in edges.values() for s in row if s is not None))
        column: dict[Symbol | None, int] = {s: i for i, s in enumerate(alphabet)} | {None: len(alphabet)}
        dead = len(number)
        transitions = torch.full((dead + 1, len(alphabet) + 1), dead)
        for state, row in edges.items():
            transitions[number[state]] = number[row[None]] if None in row else dead
            for symbol, to in row.items():
                transitions[number[state], column[symbol]] = number[to]
        accepting = torch.zeros(dead + 1, dtype=torch.bool)
        accepting[[number[state] for state in accept]] = True
        return cls(transitions, alphabet, number[start], accepting, over).minimize()

    @classmethod
    def containing(cls, pattern: Word) -> Automaton:
        """Words with `pattern` (a text, or token ids) somewhere in them. Source: `knuth1977`."""
        if not isinstance(pattern, Sequence):
            raise ModelError(f"Automaton: got the pattern {pattern!r}, expected a text or token ids")
        symbols: list[Symbol] = list(pattern)
        alphabet = tuple(dict.fromkeys(symbols))
        size = len(symbols)
        transitions = torch.zeros(size + 1, len(alphabet) + 1, dtype=torch.int64)
        border = 0  # the state after the longest proper border of what has been read: it fails as this state fails
        for state, symbol in enumerate(symbols):
            transitions[state] = transitions[border]
            transitions[state, alphabet.index(symbol)] = state + 1
            if state > 0:
                border = int(transitions[border, alphabet.index(symbol)])
        transitions[size] = size
        accept = torch.arange(size + 1) == size
        return cls(transitions, alphabet, 0, accept, _over(pattern))

    @classmethod
    def avoiding(cls, pattern: Word) -> Automaton:
        """Words without `pattern` (a text, or token ids) anywhere in them."""
        return ~cls.containing(pattern)

    @classmethod
    def characters(cls, allowed: Iterable[str] | None = None, *, forbidden: Iterable[str] | None = None) -> Automaton:
        """Texts of `allowed` characters only, or without any of the `forbidden` ones."""
        if (allowed is None) == (forbidden is None):
            raise ModelError("Automaton.characters: expected either allowed= or forbidden=")
        named = list(dict.fromkeys(allowed or forbidden or ()))
        wrong = next((c for c in named if not (isinstance(c, str) and len(c) == 1)), None)
        if wrong is not None or not named:
            got = repr(wrong) if named else "none"
            raise ModelError(f"Automaton.characters: got {got}, expected single characters")
        inside: dict[Symbol | None, Hashable] = dict.fromkeys(named, "in" if forbidden is None else "out")
        if forbidden is not None:
            inside[None] = "in"
        return cls.from_edges({"in": inside}, start="in", accept=["in"])

    @classmethod
    def length(cls, minimum: int = 0, maximum: int | None = None, *, over: Over = "characters") -> Automaton:
        """Words of `minimum` to `maximum` symbols (both included; None for no maximum)."""
        if minimum < 0 or (maximum is not None and maximum < minimum):
            raise ModelError(f"Automaton.length: got {minimum} to {maximum}, expected 0 ≤ minimum ≤ maximum")
        last = minimum if maximum is None else maximum + 1
        states = torch.arange(last + 1)
        accept = (states >= minimum) & (states <= (last if maximum is None else maximum))
        return cls((states + 1).clamp_max(last)[:, None], (), 0, accept, over)

    @classmethod
    def exactly(cls, words: Collection[Word]) -> Automaton:
        """The words that are listed, and no other; minimal."""
        listed = [words] if isinstance(words, str) else list(words)
        if not listed:
            raise ModelError("Automaton.exactly: got no words, expected at least one")
        edges: dict[Hashable, dict[Symbol | None, Hashable]] = {(): {}}
        for word in listed:
            prefix: tuple[Symbol, ...] = ()
            for symbol in word:
                longer = (*prefix, symbol)
                edges[prefix][symbol] = longer
                edges.setdefault(longer, {})
                prefix = longer
        kinds = {_over(word) for word in listed}
        if len(kinds) > 1:
            raise ModelError("Automaton.exactly: got texts and token ids together, expected one kind")
        return cls.from_edges(edges, start=(), accept=[tuple(word) for word in listed], over=kinds.pop())

    # Reading.

    def run(self, words: Sequence[Word], start: Tensor | None = None) -> Tensor:
        """(B,) the state after each of B words, from the start or from the states `start` (B,)."""
        codes, lengths = self._encode(words)
        states = torch.full((len(words),), self.start) if start is None else start.clone()
        for t in range(codes.shape[1]):
            alive = lengths > t
            states[alive] = self.transitions[states[alive], codes[alive, t]]
        return states

    def accepts(self, word: Word) -> bool:
        """Whether one text (or list of token ids) is a word of the language."""
        return bool(self.accept[self.run([word])[0]])

    def accepts_texts(self, texts: Sequence[str]) -> Tensor:
        """(B,) bool, for B texts."""
        return self.accept[self.run(texts)]

    def accepts_sequences(self, sequences: Sequences) -> Tensor:
        """(B,) bool, for the tokens of B sequences, EOS among them."""
        return self.accept[self.run(sequences.token_lists())]

    def lift(self, symbols: Sequence[str], states: Tensor | None = None) -> Tensor:
        """(Q, V) the state after each token of an LM, whose V tokens are the texts `symbols`; (S, V) from S `states`.

        Over characters, each token is read character by character, so that special tokens, as the empty text,
        leave the state as it is. Over tokens, token v is the symbol v. Source: `koo2024`.
        """
        if self.over == "tokens":
            column = {symbol: i for i, symbol in enumerate(self.alphabet)}
            rows = self.transitions if states is None else self.transitions[states]
            return rows[:, [column.get(v, len(self.alphabet)) for v in range(len(symbols))]]
        codes, lengths = self._encode(symbols)
        start = torch.arange(self.num_states) if states is None else states
        table = start[:, None].repeat(1, len(symbols))
        # Tokens share beginnings, and read alike where they differ in unnamed characters: each beginning is read once.
        columns, radix = codes.new_zeros(len(symbols)), self.transitions.shape[1]
        states = start[:, None]
        for t in range(codes.shape[1]):
            longer = torch.nonzero(lengths > t).squeeze(1)
            beginnings, columns[longer] = torch.unique(columns[longer] * radix + codes[longer, t], return_inverse=True)
            states = self.transitions[states[:, beginnings // radix], beginnings % radix]
            ending = longer[lengths[longer] == t + 1]
            table[:, ending] = states[:, columns[ending]]
        return table

    def _encode(self, words: Sequence[Word]) -> tuple[Tensor, Tensor]:
        """(B, L) columns of `transitions`, and (B,) lengths."""
        if isinstance(words, str):
            raise ModelError(f"Automaton: got the single text {words!r}, expected a list of texts")
        for word in words:
            if isinstance(word, str) != (self.over == "characters"):
                raise ModelError(f"Automaton over {self.over}: cannot read {word!r}")
        lengths = torch.tensor([len(word) for word in words], dtype=torch.int64)
        if self.over == "characters":
            symbols = torch.from_numpy(self.columns.of_text("".join(str(word) for word in words)))
        else:
            column: dict[Any, int] = {symbol: i for i, symbol in enumerate(self.alphabet)}
            read = [column.get(symbol, len(self.alphabet)) for word in words for symbol in word]
            symbols = torch.tensor(read, dtype=torch.int64)
        width = int(lengths.max()) if len(words) else 0
        codes = torch.full((len(words), width), len(self.alphabet))
        codes[torch.arange(width) < lengths[:, None]] = symbols
        return codes, lengths

    # What can still happen.

    def live(self) -> Tensor:
        """(Q,) bool: the states from which some word is accepted."""
        alive = self.accept
        while True:
            wider = alive | alive[self.transitions].any(1)
            if bool((wider == alive).all()):
                return alive
            alive = wider

    def shortest(self) -> Word | None:
        """A shortest word of the language (a text, or token ids), or None where the language is empty.

        "Any other symbol" appears as a symbol that the alphabet does not name.
        """
        return automaton_algebra.shortest(self)

    def is_empty(self, horizon: int | None = None) -> bool:
        """Whether no word (of at most `horizon` symbols) is accepted."""
        word = self.shortest()
        return word is None or (horizon is not None and len(word) > horizon)

    # Algebra.

    def __invert__(self) -> Automaton:
        """The words that this one rejects."""
        return Automaton(self.transitions, self.alphabet, self.start, ~self.accept, self.over)

    def __and__(self, other: Automaton) -> Automaton:
        """The words that both accept; minimal."""
        return automaton_algebra.product(self, other, torch.logical_and)

    def __or__(self, other: Automaton) -> Automaton:
        """The words that one of them accepts; minimal."""
        return automaton_algebra.product(self, other, torch.logical_or)

    def trim(self) -> Automaton:
        """Without the states that no word reaches; the others are numbered as a breadth-first walk meets them."""
        return automaton_algebra.trim(self)

    def minimize(self) -> Automaton:
        """The smallest automaton of the same language; equal languages give equal tables.

        States are told apart by partition refinement; a symbol that acts as any other one is dropped, and the
        alphabet is sorted. Source: `moore1956`.
        """
        return automaton_algebra.minimize(self)

    # Plain data.

    def to_dict(self) -> dict[str, Any]:
        """The automaton as JSON data."""
        return {
            "transitions": self.transitions.tolist(),
            "alphabet": [[list(r) for r in s.ranges] if isinstance(s, CharacterSet) else s for s in self.alphabet],
            "start": self.start,
            "accept": self.accept.tolist(),
            "over": self.over,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Automaton:
        """What `to_dict` wrote."""
        transitions = torch.tensor(data["transitions"], dtype=torch.int64)
        accept = torch.tensor(data["accept"], dtype=torch.bool)
        alphabet = (CharacterSet.of_ranges(map(tuple, s)) if isinstance(s, list) else s for s in data["alphabet"])
        return cls(transitions, tuple(alphabet), int(data["start"]), accept, data["over"])


def _over(word: Word) -> Over:
    return "characters" if isinstance(word, str) else "tokens"
