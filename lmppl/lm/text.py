"""Token ids to text: completions as they read after their context, and where a stop string ends them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lmppl.errors import ModelError
from lmppl.lm.spelling import Spelling

__all__ = ["CompletionText"]

_ANCHORS = ("a", "A", "e", "0", ".", "\n")
_PARTIAL = "\ufffd"  # what decoders show for bytes that are no character yet


class CompletionText:
    """Decodes completions of one tokenizer.

    Parameters
    ----------
    tokenizer : transformers tokenizer
    eos_ids : sequence of int
        Left out at the end of a row, special in the tokenizer or not.
    stop : sequence of str
        Strings that end a completion; the text ends before the first of them.
    vocab_size : int
        V, tokens that can be drawn, which may be more than the tokenizer knows.

    Notes
    -----
    Tokenizers of the sentencepiece kind drop a leading space when a completion is decoded alone. Decoded behind an
    anchor token, whose own text is then cut off, the completion reads as it does in the middle of a text. After a
    context without text (BOS alone) it is the beginning of one, and is decoded alone.
    """

    def __init__(self, tokenizer: Any, eos_ids: Sequence[int], stop: Sequence[str], vocab_size: int) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.eos_ids, self.stop = frozenset(eos_ids), tuple(stop)

    def decode(self, rows: Sequence[Sequence[int]], blank: Sequence[bool]) -> list[str]:
        """Texts of `rows`, special tokens removed, cut before the first stop string.

        `blank[i]` says that row i follows a context without text.
        """
        trimmed = [list(row[:-1]) if row and row[-1] in self.eos_ids else list(row) for row in rows]
        texts = self._continued(trimmed)
        alone = [i for i, first in enumerate(blank) if first]
        for i, text in zip(alone, self._plain([trimmed[i] for i in alone]), strict=True):
            texts[i] = text
        return [self._cut(text) for text in texts] if self.stop else texts

    def encode(self, text: str, blank: bool) -> list[int] | None:
        """The tokenizer's tokens that `decode` reads as `text`; None where there are none.

        Behind a context with text, the tokens are those that the text has there: without the space that some
        tokenizers put before a text.
        """
        for anchor in (None, *reversed(_ANCHORS)):  # punctuation first, which begins no word
            ids = self._encoded(text, anchor)
            if ids is not None and self.decode([ids], [blank]) == [text]:
                return ids
        return None

    def _encoded(self, text: str, anchor: str | None) -> list[int] | None:
        """Ids of `text` behind `anchor`, whose own token is left out; None where it is no token of its own there."""
        ids = list(self.tokenizer((anchor or "") + text, add_special_tokens=False, verbose=False).input_ids)
        if anchor is None:
            return ids
        own = list(self.tokenizer(anchor, add_special_tokens=False, verbose=False).input_ids)
        return ids[len(own) :] if ids[: len(own)] == own else None

    @cached_property
    def spelling(self) -> Spelling:
        """How the tokens spell text, stop strings left in; found by decoding the vocabulary."""
        plain = CompletionText(self.tokenizer, tuple(self.eos_ids), (), self.vocab_size)
        return Spelling(lambda rows, begins: plain.decode(rows, [begins] * len(rows)), self.vocab_size, self.eos_ids)

    def stopped(self, ids: Tensor, step: int) -> Tensor:
        """(B,) whether rows `ids` (B, ≥ step+1), without a stop string so far, hold one with the token at `step`."""
        found = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        suspects = torch.nonzero(self._suspicious.to(ids.device)[ids[:, step]]).squeeze(1)
        if len(suspects):
            texts = self._continued(ids[suspects, : step + 1].tolist())
            found[suspects] = torch.tensor([any(s in t for s in self.stop) for t in texts], device=ids.device)
        return found

    @cached_property
    def _suspicious(self) -> Tensor:
        """(V,) tokens that can complete a stop string: those with one of its characters, or part of a character."""
        wanted = set("".join(self.stop)) | {_PARTIAL}
        texts = self._continued([[i] for i in range(self.vocab_size)])
        return torch.tensor([not wanted.isdisjoint(text) for text in texts])

    @cached_property
    def _anchor(self) -> tuple[int, str] | None:
        """A token, and its text, behind which others decode as they do in the middle of a text."""
        for text in _ANCHORS:
            ids = self.tokenizer(text, add_special_tokens=False).input_ids
            if len(ids) != 1:
                continue
            own = self._plain([ids])[0]
            if own and self._plain([[*ids, *ids]])[0].startswith(own):
                return ids[0], own
        return None

    def _continued(self, rows: list[list[int]]) -> list[str]:
        if self._anchor is None:
            return self._plain(rows)
        token, own = self._anchor
        texts = self._plain([[token, *row] for row in rows])
        strays = [i for i, text in enumerate(texts) if not text.startswith(own)]
        texts = [text[len(own) :] for text in texts]
        for i, text in zip(strays, self._plain([rows[i] for i in strays]), strict=True):
            texts[i] = text
        return texts

    def _plain(self, rows: list[list[int]]) -> list[str]:
        if not rows:
            return []
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None and hasattr(backend, "decode_batch"):
            return list(backend.decode_batch(rows, skip_special_tokens=True))
        decoded = self.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return list(decoded)

    def _cut(self, text: str) -> str:
        places = [at for at in (text.find(s) for s in self.stop) if at >= 0]
        return text[: min(places)] if places else text


def check_stop(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop strings as a tuple; raise `ModelError` where one is empty or no string."""
    if not isinstance(stop, str | Sequence | None):
        raise ModelError(f"stop: got {stop!r}, expected a string or a list of strings")
    strings = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    for s in strings:
        if not isinstance(s, str) or not s:
            raise ModelError(f"stop: got {s!r}, expected non-empty strings")
    return strings
