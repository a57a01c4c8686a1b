"""The bytes of an LM's tokens, as far as they are text."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from lmppl.lm.base import LanguageModel

__all__ = ["TokenBytes", "token_bytes"]

NEVER = b"\xff"  # a byte of no character, which llguidance does not show


class TokenBytes(NamedTuple):
    """The V tokens of an LM as bytes.

    Parameters
    ----------
    inside, first : list of bytes
        Behind other tokens, and at the beginning of a text; b"" for tokens without text.
    differs : bool
        Whether the two differ.
    """

    inside: list[bytes]
    first: list[bytes]
    differs: bool


def token_bytes(lm: LanguageModel) -> TokenBytes | None:
    """The bytes of the tokens of `lm`; None where its tokens do not add up to text, or hide their bytes."""
    spelling = lm.spelling
    if not spelling.additive:
        return None
    inside = [piece.encode(errors="surrogatepass") for piece in spelling.pieces]
    first = [piece.encode(errors="surrogatepass") for piece in spelling.first]
    unsettled = torch.nonzero(spelling.open).squeeze(1).tolist()
    if unsettled:
        tokenizer: Any = getattr(lm, "tokenizer", None)
        if not hasattr(tokenizer, "backend_tokenizer"):
            return None
        from llguidance.hf import from_tokenizer

        read = from_tokenizer(tokenizer, n_vocab=lm.vocab_size, slices=[])
        for v in unsettled:
            own = read.decode_bytes([v]) or NEVER
            if not bool(spelling.partial[v]) and own != inside[v]:
                return None
            inside[v] = first[v] = own
    return TokenBytes(inside, first, spelling.begins_differently)
