"""Whether two language models read the same tokens, and how one reads the other's texts where they do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lmppl.errors import ContextError, ModelError, UnsupportedModel
from lmppl.lm.base import LanguageModel
from lmppl.lm.derived import DerivedLM, TemperedLM
from lmppl.lm.tabular import TabularLM
from lmppl.lm.transformers import TransformersLM

__all__ = ["contexts_of", "difference", "encoded", "never_zero", "with_room"]


def difference(lm: LanguageModel, other: LanguageModel) -> str:
    """What keeps a token of `lm` from being the same token of `other`, as the end of a sentence; "" where none does.

    The tokens and the EOS ids must be the same. Caps and stop strings may differ.
    """
    if lm.vocab_size != other.vocab_size:
        return f"it has {lm.vocab_size} tokens, and the prior has {other.vocab_size}"
    if lm.eos_ids != other.eos_ids:
        return f"its texts end by {list(lm.eos_ids)}, and the prior's by {list(other.eos_ids)}"
    own, others = origin(lm), origin(other)
    same = own is others or _symbols(own) == _symbols(others)
    return "" if same else "token for token, its texts are others than the prior's"


def origin(lm: LanguageModel) -> LanguageModel:
    """The LM whose tokens these are: what a derived LM is made from."""
    while isinstance(lm, DerivedLM):
        lm = lm.base
    return lm


def _symbols(lm: LanguageModel) -> list[str]:
    """The V tokens, in the order of their ids, as text."""
    if isinstance(lm, TabularLM):
        return list(lm.vocabulary)
    if isinstance(lm, TransformersLM):
        known: list[str | None] = lm.tokenizer.convert_ids_to_tokens(range(lm.vocab_size))
        return [str(symbol) for symbol in known]
    return lm.decode(lm.sequences([[token] for token in range(lm.vocab_size)]))


def encoded(lm: LanguageModel, text: str, context: int, who: str) -> list[int] | None:
    """The tokens of `lm` for the text of a completion of its context, EOS left out; None where it cannot write it.

    Parameters
    ----------
    lm : LanguageModel
        With a method `encode(text, context)`, as a `TransformersLM` and a `TabularLM` have.
    text : str
    context : int
        Index among the contexts of `lm`.
    who : str
        Names the factor, in the error.

    Raises
    ------
    ModelError
        Where `lm` has no such method.
    """
    encode: Any = getattr(origin(lm), "encode", None)
    if encode is None:
        raise ModelError(
            f"{who}: {type(origin(lm)).__name__} cannot read text: it has no tokenizer and no method "
            "encode(text, context) that gives its tokens"
        )
    ids: list[int] | None = encode(text, context)
    if ids is None or any(token in lm.eos_ids for token in ids):
        return None
    return list(ids)


def contexts_of(lm: LanguageModel, prior: LanguageModel, who: str) -> Tensor:
    """(C,) the context of `lm` for each context of the prior: its only one, or the one in the same place.

    Raises
    ------
    ContextError
        Where it has another number of contexts.
    """
    if lm.num_contexts not in (1, prior.num_contexts):
        raise ContextError(
            f"{who}: its LM has {lm.num_contexts} contexts and the prior has {prior.num_contexts}; give it one context "
            "for all of them, or one for each"
        )
    return torch.arange(prior.num_contexts) if lm.num_contexts > 1 else torch.zeros(prior.num_contexts).long()


def with_room(lm: LanguageModel, num_tokens: int, who: str) -> LanguageModel:
    """`lm`, with a larger cap where `num_tokens` exceed its own: rows of so many tokens have room in its caches.

    Raises
    ------
    ModelError
        Where it has no larger cap; the message names `who`.
    ContextError
        Where a context has no room for so many tokens.
    """
    if num_tokens <= lm.max_new_tokens:
        return lm
    try:
        return lm.with_max_new_tokens(num_tokens)
    except UnsupportedModel as error:
        raise ModelError(f"{who}: {error}") from error


def never_zero(lms: Sequence[LanguageModel]) -> bool:
    """Whether every next token of every one of the LMs is known to have positive probability."""
    return all(map(_never_zero, lms))


def _never_zero(lm: LanguageModel) -> bool:
    if isinstance(lm, TemperedLM):
        return _never_zero(lm.base)
    if isinstance(lm, TabularLM):
        return bool((lm.log_table > -torch.inf).all())
    return isinstance(lm, TransformersLM) and lm.top_k is None and lm.top_p is None
