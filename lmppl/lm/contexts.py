"""Contexts as the user gives them, and as token ids: strings, chats, the empty context, or several of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmppl.errors import ContextError

__all__ = ["Context", "check_frequencies", "check_window", "encode_context", "list_contexts"]

Context = str | list[dict[str, str]] | None


@dataclass(frozen=True)
class Encoded:
    """One context: its text, its ids, and whether it holds any text that is not a special token."""

    text: str
    ids: tuple[int, ...]
    blank: bool


def list_contexts(context: Any) -> list[Context]:
    """The C contexts: a string is one, a list of turns ({"role", "content"}) is one, a list of these is as many.

    Raises
    ------
    ContextError
        For an empty list, an empty chat, and for anything else.
    """
    if context is None or isinstance(context, str):
        return [context]
    if isinstance(context, Mapping) or not isinstance(context, Sequence):
        raise ContextError(
            f"context: got {type(context).__name__}, expected a string, a list of strings, or chat turns "
            '[{"role": "user", "content": "..."}]'
        )
    if len(context) == 0:
        raise ContextError("context: got an empty list, expected at least one context (use '' for the empty one)")
    if all(isinstance(item, Mapping) for item in context):
        return [_checked_chat(context, "context")]
    return [_checked(item, f"context {i}") for i, item in enumerate(context)]


def encode_context(context: Context, tokenizer: Any, *, chat_template: str | None = None) -> Encoded:
    """One context as token ids, special tokens as the tokenizer adds them.

    The empty context is BOS, or EOS where the tokenizer has no BOS.

    Raises
    ------
    ContextError
        Where a chat is given and the tokenizer has no template, or the empty context and neither BOS nor EOS exists.
    """
    if isinstance(context, list):
        text = _render(context, tokenizer, chat_template)
        ids = list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    else:
        text = context or ""
        ids = _without_closing(tokenizer, text)
    if not ids:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise ContextError(
                "context: the empty context needs a token to start from, and this tokenizer has neither BOS nor EOS; "
                "give a context with text"
            )
        ids = [start]
    special = set(tokenizer.all_special_ids)
    return Encoded(text, tuple(ids), all(i in special for i in ids))


def _without_closing(tokenizer: Any, text: str) -> list[int]:
    """The ids of `text` with what the tokenizer puts before it, and without what it puts after it.

    An EOS there would say that the text is over.
    """
    bare = list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    ids = list(tokenizer(text, verbose=False).input_ids)
    eos = tokenizer.eos_token_id
    if eos is None or tokenizer.bos_token_id == eos:
        return ids
    extra = len(ids) - len(bare)
    while extra > 0 and ids and ids[-1] == eos:
        ids.pop()
        extra -= 1
    return ids


def _render(turns: list[dict[str, str]], tokenizer: Any, chat_template: str | None) -> str:
    if chat_template is None and not getattr(tokenizer, "chat_template", None):
        raise ContextError(
            "context: got chat turns, but this tokenizer has no chat template; pass chat_template=, or a string context"
        )
    text = tokenizer.apply_chat_template(turns, chat_template=chat_template, add_generation_prompt=True, tokenize=False)
    return str(text)


def _checked(item: Any, where: str) -> Context:
    if item is None or isinstance(item, str):
        return item
    if isinstance(item, Sequence) and all(isinstance(turn, Mapping) for turn in item):
        return _checked_chat(item, where)
    raise ContextError(f"{where}: got {type(item).__name__}, expected a string or a list of chat turns")


def _checked_chat(turns: Sequence[Any], where: str) -> list[dict[str, str]]:
    if len(turns) == 0:
        raise ContextError(f"{where}: got a chat without turns, expected at least one")
    for i, turn in enumerate(turns):
        if "role" not in turn or "content" not in turn:
            raise ContextError(f"{where}, turn {i}: got keys {sorted(turn)}, expected 'role' and 'content'")
    return [dict(turn) for turn in turns]


def check_window(encoded: Sequence[Encoded], max_new_tokens: int, window: int | None) -> None:
    """Raise `ContextError` where a row may outgrow the model's window."""
    for i, e in enumerate(encoded):
        if window is not None and len(e.ids) + max_new_tokens > window:
            raise ContextError(
                f"context {i} ({e.text[:60]!r}): {len(e.ids)} tokens and max_new_tokens={max_new_tokens} exceed the "
                f"model's window of {window}; shorten the context or lower max_new_tokens"
            )


def check_frequencies(encoded: Sequence[Encoded], max_new_tokens: int, change: int | None) -> None:
    """Raise `ContextError` where some rows are shorter and some longer than where rotary frequencies change.

    Rows of one batch share their frequencies, and cached keys keep those that they were made with.
    """
    if change is None:
        return
    lengths = [len(e.ids) for e in encoded]
    first, last = min(lengths), max(lengths) + max_new_tokens
    if first < change < last:
        i = lengths.index(first)
        raise ContextError(
            f"context {i} ({encoded[i].text[:60]!r}) has {first} tokens and rows may reach {last}: this model changes "
            f"its rotary frequencies at {change} tokens, so that the scores of a row would depend on the others; keep "
            "all contexts and completions on one side of it"
        )
