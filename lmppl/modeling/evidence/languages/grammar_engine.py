"""llguidance as the engine of grammars: texts judged byte by byte, and masks over the tokens of an LM.

llguidance knows tokens as bytes. Here they are made from how an LM spells (`lmppl.lm.spelling`), so that what is judged
is the text that users see: tokens without text are left out, and a token that reads differently at the beginning of a
text is there twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher, LLTokenizer, TokenizerWrapper
from torch import Tensor

from lmppl.modeling.evidence.token_bytes import TokenBytes

__all__ = ["GrammarText", "TokenMasks", "whole_grammar"]

CLOSING = b"\x00"  # a character that closes a text: see `TokenMasks.completing`
REPLACEMENT = "\ufffd".encode()  # what decoders write for bytes that are no character
WORD = 32  # bits


class GrammarText:
    """Whether texts belong to a grammar, byte by byte.

    A text with U+FFFD, which stands for bytes that are no character, belongs to none.

    Parameters
    ----------
    grammar : str
        As `whole_grammar` gives it.
    """

    def __init__(self, grammar: str) -> None:
        self.grammar = grammar

    @property
    def content(self) -> str:
        """What the grammar is, for hashing."""
        return self.grammar

    @cached_property
    def _matcher(self) -> LLMatcher:
        return LLMatcher(_tokenizer([bytes([b]) for b in range(256)]), self.grammar)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(B,) bool: which texts are whole texts of the grammar."""
        return torch.tensor([self._read(text) and self._matcher.is_accepting() for text in texts], dtype=torch.bool)

    def begins(self, texts: Sequence[str]) -> Tensor:
        """(B,) bool: which texts can begin one."""
        return torch.tensor([self._read(text) for text in texts], dtype=torch.bool)

    def _read(self, text: str) -> bool:
        data = text.encode(errors="surrogatepass")
        self._matcher.reset()
        return REPLACEMENT not in data and self._matcher.try_consume_tokens(list(data)) == len(data)

    def __getstate__(self) -> dict[str, Any]:
        return {"grammar": self.grammar}


class TokenMasks:
    """Which of V tokens may follow a prefix, in batch.

    Parameters
    ----------
    grammar : str
    tokens : TokenBytes
    """

    def __init__(self, grammar: str, tokens: TokenBytes) -> None:
        self.vocab_size = len(tokens.inside)
        self.listed = [*tokens.inside, *tokens.first] if tokens.differs else tokens.inside
        self.grammar = grammar
        self._stepping = _Matchers(grammar, self.listed)
        self._executor = LLExecutor(torch.get_num_threads())
        # Tokens that would complete U+FFFD, behind none, one or two of its bytes.
        parts = [REPLACEMENT[at:] for at in range(3)]
        self.forbidden = [
            torch.tensor([REPLACEMENT in one or (at > 0 and one.startswith(rest)) for one in self.listed])
            for at, rest in enumerate(parts)
        ]
        self._has_forbidden = [bool(one.any()) for one in self.forbidden]

    @cached_property
    def _closing(self) -> _Matchers:
        closing = [one + CLOSING if one else b"" for one in self.listed]
        return _Matchers(_closed(self.grammar), [*self.listed, *closing])

    def begins(self, prefix: Sequence[int]) -> bool:
        """Whether the tokens of `prefix` can begin a text of the grammar."""
        return self._stepping.at(0, prefix) is not None

    def accepts(self, prefix: Sequence[int]) -> bool:
        """Whether they are a text of it."""
        matcher = self._stepping.at(0, prefix)
        return matcher is not None and matcher.is_accepting()

    def allowed(self, prefixes: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """(U, N) bool: which of the N listed tokens may follow each prefix; (U,) bool: whether the text may end there.

        Prefixes must be such that begin a text of the grammar.
        """
        bits, accepting = self._masks(self._stepping, prefixes)
        result = _unpacked(bits, len(self.listed))
        for row, prefix in enumerate(prefixes):
            at = self._open_replacement(prefix)
            if self._has_forbidden[at]:
                result[row] &= ~self.forbidden[at]
        return result, accepting

    def completing(self, prefixes: Sequence[Sequence[int]]) -> Tensor:
        """(U, N) bool: which tokens make the text complete.

        A grammar of the same texts with one closing character behind them is asked which tokens may follow together
        with that character; those are then tried.
        """
        size = len(self.listed)
        bits, _ = self._masks(self._closing, prefixes)
        result = _unpacked(bits, 2 * size)[:, size:].clone()
        end = self._stepping.end
        for row, prefix in enumerate(prefixes):
            at = self._open_replacement(prefix)
            if self._has_forbidden[at]:
                result[row] &= ~self.forbidden[at]
            matcher = self._stepping.at(0, prefix)
            assert matcher is not None
            for token in torch.nonzero(result[row]).squeeze(1).tolist():
                result[row, token] = matcher.validate_tokens([token, end]) == 2
        return result

    def _masks(self, matchers: _Matchers, prefixes: Sequence[Sequence[int]]) -> tuple[np.ndarray, Tensor]:
        bits = np.zeros((len(prefixes), matchers.width), dtype=np.int32)
        found = [(matchers.at(i, prefix), i) for i, prefix in enumerate(prefixes)]
        accepting = torch.tensor([matcher is not None and matcher.is_accepting() for matcher, _ in found])
        jobs = [(matcher, i) for matcher, i in found if matcher is not None]
        if jobs:
            self._executor.unsafe_compute_mask_ptr(jobs, bits.ctypes.data, bits.shape[1] * 4, len(bits))
        return bits, accepting

    def _open_replacement(self, prefix: Sequence[int]) -> int:
        """How many bytes of U+FFFD the prefix ends with."""
        tail = b"".join(self.listed[token] for token in prefix[-2:])
        return 2 if tail.endswith(REPLACEMENT[:2]) else 1 if tail.endswith(REPLACEMENT[:1]) else 0


class _Matchers:
    """A matcher for each row of a batch, moved from where it is to the prefix that is asked about."""

    def __init__(self, grammar: str, tokens: Sequence[bytes]) -> None:
        self.end = len(tokens)
        self.width = (len(tokens) + 1 + WORD - 1) // WORD
        self._first = LLMatcher(_tokenizer(tokens), grammar)
        self._rows: list[tuple[LLMatcher, list[int]]] = []

    def at(self, row: int, prefix: Sequence[int]) -> LLMatcher | None:
        """The matcher of a row after `prefix`; None where that begins no text of the grammar."""
        while len(self._rows) <= row:
            self._rows.append((self._first.deep_copy(), []))
        if self._rows[row][0].is_stopped():  # an empty mask stops a matcher for good
            self._rows[row] = (self._first.deep_copy(), [])
        matcher, read = self._rows[row]
        common = 0
        for one, other in zip(read, prefix, strict=False):
            if one != other:
                break
            common += 1
        if common < len(read):
            matcher.rollback(len(read) - common)
            del read[common:]
        rest = list(prefix[common:])
        read += rest[: matcher.try_consume_tokens(rest)]
        return matcher if len(read) == len(prefix) else None


def _tokenizer(tokens: Sequence[bytes]) -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_Vocabulary(tokens)), slices=None if len(tokens) > 4096 else [])


class _Vocabulary:
    """What llguidance asks of a tokenizer: the bytes of each token, and an end."""

    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self.tokens = [*tokens, b"<end>"]
        self.eos_token_id = len(tokens)
        self.special_token_ids = [len(tokens)]

    def __call__(self, text: bytes) -> list[int]:
        return []  # llguidance encodes only where it forces tokens, which is not asked for


def whole_grammar(start: str, parts: Sequence[Mapping[str, Any]]) -> str:
    """One grammar for llguidance: the rule `start`, over named parts.

    With forcing, llguidance's mask would hold one spelling only of characters that cannot be otherwise.
    """
    top = f'%llguidance {{"no_forcing": true}}\nstart: {start}'
    return json.dumps({"grammars": [{"name": "whole", "lark_grammar": top}, *parts]})


def _closed(grammar: str) -> str:
    """The grammar of the same texts with the closing character behind them."""
    whole, *parts = json.loads(grammar)["grammars"]
    return json.dumps({"grammars": [whole | {"lark_grammar": whole["lark_grammar"] + ' "\\u0000"'}, *parts]})


def _unpacked(bits: np.ndarray, size: int) -> Tensor:
    """(U, size) bool from (U, W) int32, the lowest bit first."""
    return torch.from_numpy(np.unpackbits(bits.view(np.uint8), axis=1, count=size, bitorder="little").view(np.bool_))
