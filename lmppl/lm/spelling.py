"""Spelling: how an LM's tokens spell text, so that the text of a prefix grows token by token.

Decoding is not a sum of token texts in general. Bytes that are no character yet decode to "�" and change when the next
token completes them; special tokens leave no text; the first token of a text can lose its leading space. What is left
is regular: *clean* tokens decode alike whatever stands beside them, so that everything up to the last clean token is
settled; the tokens after it, a run of *open* ones, are decoded together. This is found by decoding, not assumed, and a
tokenizer that does not follow it is reported as not additive.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from lmppl.sequences import Sequences

if TYPE_CHECKING:
    from lmppl.lm.base import LanguageModel

__all__ = ["Spelled", "Spelling", "spelling_of"]

Decode = Callable[[Sequence[Sequence[int]], bool], list[str]]

PARTIAL = "\ufffd"  # what decoders show for bytes that are no character
PROBES = 256
PROBE_LENGTH = 6


class Spelled(NamedTuple):
    """The text of a prefix.

    Parameters
    ----------
    text : str
        What is settled: every continuation's text begins with it.
    begun : bool
        Whether a further token stands inside a text, and not at its beginning.
    run : tuple of int
        Open tokens at the end, whose text may still change.
    """

    text: str
    begun: bool
    run: tuple[int, ...]


class Spelling:
    """What each of V tokens adds to a text.

    Parameters
    ----------
    decode : callable
        (rows of token ids, whether they begin a text) → their texts, special tokens left out, stop strings left in.
    vocab_size : int
        V.
    eos_ids : collection of int
        They end a row and have no text.

    Attributes
    ----------
    pieces, first : list of str
        The text of each token behind others, and at the beginning of a text.
    clean, open, partial : Tensor (V,), bool
        Tokens that settle the text, tokens that a neighbour can change, and those of the latter with bytes of a
        character outside ASCII. A token that is neither clean nor open has no text.
    silent : Tensor (V,), bool
        Tokens without text after which a text still begins.
    additive : bool
        Whether random rows read as `read` and `whole` say.
    """

    def __init__(self, decode: Decode, vocab_size: int, eos_ids: Collection[int]) -> None:
        self._decode = decode
        self.eos_ids = frozenset(eos_ids)
        every = [v for v in range(vocab_size) if v not in self.eos_ids]
        self.pieces, self.first = [""] * vocab_size, [""] * vocab_size
        for v, inside, beginning in zip(every, self._behind(every), decode([[v] for v in every], True), strict=True):
            self.pieces[v], self.first[v] = inside, beginning
        partial = [PARTIAL in piece for piece in self.pieces]
        clean = [bool(self.pieces[v]) and not partial[v] for v in range(vocab_size)]
        broken = [v for v in every if partial[v]]
        if broken:  # between pieces of characters, what is clean stays what it is and leaves them as they are
            before, after = broken[0], broken[-1]
            whole = [v for v in every if clean[v]]
            for v, text in zip(whole, self._inside([(before, v, after) for v in whole]), strict=True):
                clean[v] = text == self.pieces[before] + self.pieces[v] + self.pieces[after]
        self.clean, self.partial = torch.tensor(clean), torch.tensor(partial)
        self.open = torch.tensor([bool(piece) for piece in self.pieces]) & ~self.clean
        self.silent = torch.tensor(self._silent(every))
        self._kinds = [2 if c else 1 if o else 0 for c, o in zip(clean, self.open.tolist(), strict=True)]
        self._is_silent = self.silent.tolist()
        self.additive = self._holds(every)

    @property
    def begins_differently(self) -> bool:
        """Whether some token reads differently at the beginning of a text."""
        return self.first != self.pieces

    def start(self, begins: bool) -> Spelled:
        """The empty prefix, at the beginning of a text or inside one."""
        return Spelled("", not begins, ())

    def read(self, prefix: Spelled, token: int) -> Spelled:
        """The prefix after one more token, which is no EOS."""
        kind = self._kinds[token]
        if kind == 2:
            if prefix.run:
                return Spelled(self.whole(prefix) + self.pieces[token], True, ())
            piece = self.pieces[token] if prefix.begun else self.first[token]
            return Spelled(prefix.text + piece, True, ())
        if kind == 1 or prefix.run:
            return Spelled(prefix.text, prefix.begun, (*prefix.run, token))
        return prefix if prefix.begun or self._is_silent[token] else Spelled(prefix.text, True, ())

    def whole(self, prefix: Spelled) -> str:
        """The text if the row ends here."""
        return prefix.text + self.text_of(prefix.run, not prefix.begun) if prefix.run else prefix.text

    def text_of(self, run: Sequence[int], begins: bool) -> str:
        """The text of tokens that no other joins."""
        return self._decode([list(run)], begins)[0]

    def _behind(self, tokens: Sequence[int]) -> list[str]:
        return self._inside([(v,) for v in tokens])

    def _inside(self, rows: Sequence[tuple[int, ...]]) -> list[str]:
        return self._decode([list(row) for row in rows], False)

    def _silent(self, every: Sequence[int]) -> list[bool]:
        silent = [not inside and not first for inside, first in zip(self.pieces, self.first, strict=True)]
        witness = next((v for v in every if self.first[v] != self.pieces[v]), None)
        if witness is not None:
            mute = [v for v in every if silent[v]]
            for v, text in zip(mute, self._decode([[v, witness] for v in mute], True), strict=True):
                silent[v] = text == self.first[witness]
        return silent

    def _holds(self, every: Sequence[int]) -> bool:
        """Whether decoding random rows gives what is read token by token."""
        generator = torch.Generator().manual_seed(0)
        troubled = [v for v in every if self._kinds[v] != 2] or list(every)
        for pool, begins in ((every, True), (every, False), (troubled, True), (troubled, False)):
            if not pool:
                continue
            picks = torch.randint(len(pool), (PROBES, PROBE_LENGTH), generator=generator)
            mixed = torch.randint(len(every), (PROBES, PROBE_LENGTH), generator=generator)
            swap = torch.rand(PROBES, PROBE_LENGTH, generator=generator) < 0.3
            rows = [
                [every[m] if s else pool[p] for p, m, s in zip(*row, strict=True)]
                for row in zip(picks.tolist(), mixed.tolist(), swap.tolist(), strict=True)
            ]
            for row, text in zip(rows, self._decode(rows, begins), strict=True):
                prefix = self.start(begins)
                for token in row:
                    prefix = self.read(prefix, token)
                if self.whole(prefix) != text:
                    return False
        return True


def spelling_of(lm: LanguageModel) -> Spelling:
    """The spelling of an LM by its own `decode`; not additive where contexts decode differently or stop strings cut."""
    eos = set(lm.eos_ids)
    words = [v for v in range(lm.vocab_size) if v not in eos]

    def decode(rows: Sequence[Sequence[int]], context: int = 0) -> list[str]:
        width = max((len(row) for row in rows), default=0)
        ids = torch.full((len(rows), max(1, width)), lm.pad_id, dtype=torch.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(list(row), dtype=torch.int64)
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        where = torch.full((len(rows),), context)
        return lm.decode(Sequences(ids, lengths, torch.zeros(len(rows), dtype=torch.bool), where, lm.prompts))

    anchor = next((v for v in words if _leads(decode, v)), None)
    own = "" if anchor is None else decode([[anchor]])[0]

    def read(rows: Sequence[Sequence[int]], begins: bool) -> list[str]:
        if begins or anchor is None:
            return decode(rows)
        return [text[len(own) :] for text in decode([[anchor, *row] for row in rows])]

    spelling = Spelling(read, lm.vocab_size, lm.eos_ids)
    some = [[v] for v in words[:PROBES]]
    alike = all(decode(some, c) == decode(some) for c in range(1, lm.num_contexts))
    spelling.additive &= alike and anchor is not None and lm.ends_by_eos_alone
    return spelling


def _leads(decode: Callable[[Sequence[Sequence[int]]], list[str]], token: int) -> bool:
    """Whether other tokens can be read behind this one."""
    one, two = decode([[token], [token, token]])
    return bool(one) and PARTIAL not in one and two.startswith(one) and len(two) > len(one)
