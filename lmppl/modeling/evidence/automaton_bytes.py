"""Automata inside a character: where the bytes of an LM's tokens, which are no character yet, can lead.

Byte-level tokens can end in the middle of a character. What stands there so far bounds which characters it can become,
and an automaton that names characters outside ASCII can tell those that are lost.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

import torch
from torch import Tensor

from lmppl.lm.spelling import PARTIAL
from lmppl.modeling.evidence.automata import Automaton
from lmppl.modeling.evidence.character_sets import as_set

__all__ = ["ByteLookahead", "tells_characters_apart"]

LEAST = (0x80, 0x800, 0x10000)  # the first code point of two, three and four bytes


def tells_characters_apart(automaton: Automaton) -> bool:
    """Whether some character outside ASCII acts otherwise than another one."""
    return any(not isinstance(s, int) and as_set(s).ranges[-1][1] > 127 for s in automaton.alphabet)


class ByteLookahead:
    """Whether a run of bytes behind a settled text can still become text that an automaton accepts.

    A decoder writes U+FFFD for bytes that are no character: for each of them, or for all that were read together. Both
    are followed, so that what is refused is lost.

    Parameters
    ----------
    automaton : Automaton
        Over characters.
    tokens : sequence of bytes
        The bytes of each token.
    """

    def __init__(self, automaton: Automaton, tokens: Sequence[bytes]) -> None:
        self.automaton, self.tokens = automaton, tokens
        self.live = automaton.live().tolist()
        self.moves = automaton.transitions.tolist()
        self._reached: dict[tuple[int, bytes], bool] = {}
        replaced = int(automaton.columns.of_text(PARTIAL)[0])
        self.replaced = [row[replaced] for row in self.moves]

    def allowed(self, state: int, run: bytes, tokens: Sequence[int]) -> Tensor:
        """(K,) bool: which of K tokens may follow `run`, when more tokens fit behind them."""
        return torch.tensor([self._may_become(state, run + self.tokens[token]) for token in tokens], dtype=torch.bool)

    def _may_become(self, state: int, data: bytes) -> bool:
        key = (state, data)
        if key not in self._reached:
            self._reached[key] = self._by_bytes(state, data) or self._all_replaced(state, data)
        return self._reached[key]

    def _by_bytes(self, state: int, data: bytes) -> bool:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        text = decoder.decode(data)
        pending = decoder.getstate()[0]
        state = int(self.automaton.run([text], torch.tensor([state]))[0])
        if not pending:
            return bool(self.live[state])
        return self.live[self.replaced[state]] or any(self.live[self.moves[state][c]] for c in self._columns(pending))

    def _all_replaced(self, state: int, data: bytes) -> bool:
        """Whether one U+FFFD can go on behind the settled text, or behind the letters that the bytes begin with.

        Where bytes fall back (sentencepiece), letters too are replaced when bytes behind them are no character.
        """
        lead = data[: next((i for i, byte in enumerate(data) if byte > 127), len(data))].decode("ascii")
        after = [int(self.automaton.run([text], torch.tensor([state]))[0]) for text in ("", lead)]
        return any(self.live[self.replaced[q]] for q in after)

    def _columns(self, pending: bytes) -> set[int]:
        """The symbols among which is the character that begins with the bytes `pending`."""
        size = 2 if pending[0] < 0xE0 else 3 if pending[0] < 0xF0 else 4
        point = pending[0] & (0xFF >> (size + 1))
        for byte in pending[1:]:
            point = (point << 6) | (byte & 0x3F)
        missing = 6 * (size - len(pending))
        low, high = max(point << missing, LEAST[size - 2]), min(((point + 1) << missing) - 1, 0x10FFFF)
        columns = self.automaton.columns
        inside = (columns.starts > low) & (columns.starts <= high)
        return {int(columns.at(torch.tensor([low]).numpy())[0]), *columns.column[inside].tolist()}
