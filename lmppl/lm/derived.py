"""Language models that are made from another one: the same tokens, contexts and ends, another next-token law."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lmppl.errors import ModelError
from lmppl.lm.base import LanguageModel
from lmppl.lm.decoder import Decoder, State, Step
from lmppl.sequences import Cost, Sequences

if TYPE_CHECKING:
    from lmppl.lm.spelling import Spelling

__all__ = ["DerivedLM", "ReweighedLM", "TemperedLM", "check_temperature", "count_base"]


class DerivedLM(LanguageModel):
    """Base of LMs with the outcomes of another LM: its tokens, texts, contexts and ends of rows, under another law.

    Parameters
    ----------
    base : LanguageModel
        Decodes texts and ends rows.
    """

    def __init__(self, base: LanguageModel) -> None:
        super().__init__(
            base.prompts,
            vocab_size=base.vocab_size,
            max_new_tokens=base.max_new_tokens,
            eos_ids=base.eos_ids,
            pad_id=base.pad_id,
        )
        self.base = base

    def decode(self, sequences: Sequences) -> list[str]:
        """As the base LM does."""
        return self.base.decode(sequences)

    def ended(self, ids: Tensor, step: int) -> Tensor:
        """As the base LM says."""
        return self.base.ended(ids, step)

    @property
    def ends_by_eos_alone(self) -> bool:
        """As the base LM says."""
        return self.base.ends_by_eos_alone and type(self).ended is DerivedLM.ended

    @property
    def stop(self) -> tuple[str, ...]:
        """The base LM's stop strings, which end a row; () where it has none."""
        return tuple(getattr(self.base, "stop", ()))

    @cached_property
    def spelling(self) -> Spelling:
        """The base LM's."""
        return self.base.spelling

    @property
    def begins_text(self) -> Sequence[bool]:
        """As the base LM says."""
        return self.base.begins_text


class ReweighedLM(DerivedLM):
    """Base of LMs whose next-token law is made from that of the base LM, step by step with its decoder."""

    @property
    def dtype(self) -> torch.dtype:
        """As the base LM's."""
        return self.base.dtype

    @property
    def device(self) -> torch.device:
        """As the base LM's."""
        return self.base.device

    @property
    def context_lengths(self) -> Tensor:
        """As the base LM's."""
        return self.base.context_lengths

    @property
    def branching(self) -> int:
        """As the base LM's."""
        return self.base.branching

    def max_outcomes(self) -> float:
        """As the base LM's, of which these outcomes are a part."""
        return self.base.max_outcomes()

    def bytes_per_row(self, num_tokens: int) -> int:
        """As the base LM's, and one more row of scores."""
        return self.base.bytes_per_row(num_tokens) + 8 * self.vocab_size


class TemperedLM(ReweighedLM):
    """p_τ(x_t|c, x_<t) ∝ p(x_t|c, x_<t)^{1/τ}, token by token.

    Parameters
    ----------
    base : LanguageModel
        p, with any truncation it declares: what it cuts stays cut.
    temperature : float
        τ > 0: below 1 sharper, above 1 flatter.
    """

    def __init__(self, base: LanguageModel, temperature: float) -> None:
        super().__init__(base)
        self.temperature = check_temperature(temperature)
        self.top_k, self.top_p = getattr(base, "top_k", None), getattr(base, "top_p", None)
        self.truncated = bool(getattr(base, "truncated", False))

    def decoder(self) -> Decoder:
        """As `LanguageModel.decoder`."""
        return _TemperedDecoder(self.base.decoder(), self.temperature)

    def with_contexts(self, contexts: Sequence[Any]) -> TemperedLM:
        """The same LM for other contexts, weights shared."""
        return TemperedLM(self.base.with_contexts(contexts), self.temperature)

    def with_max_new_tokens(self, max_new_tokens: int) -> TemperedLM:
        """As `LanguageModel.with_max_new_tokens`."""
        return TemperedLM(self.base.with_max_new_tokens(max_new_tokens), self.temperature)

    @property
    def fingerprint(self) -> str:
        """As `LanguageModel.fingerprint`."""
        return hashlib.sha256(f"tempered:{self.base.fingerprint}:{self.temperature!r}".encode()).hexdigest()[:16]


class _TemperedDecoder:
    """The base decoder with its scores divided by τ."""

    def __init__(self, base: Decoder, temperature: float) -> None:
        self.base, self.temperature = base, temperature
        self.capabilities = base.capabilities

    def count_into(self, cost: Cost) -> None:
        """What the base decoder counts beside its calls."""
        count_base(self.base, cost)

    def _tempered(self, step: Step) -> Step:
        project = step.project
        return Step(lambda hidden: project(hidden) / self.temperature, step.hidden)

    def prefill(
        self, context: Tensor, prefix: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Step, State]:
        """As `Decoder.prefill`."""
        step, state = self.base.prefill(context, prefix, lengths)
        return self._tempered(step), state

    def extend(self, state: State, tokens: Tensor, *, grad: bool = False) -> tuple[Step, State]:
        """As `Decoder.extend`."""
        step, state = self.base.extend(state, tokens, grad=grad)
        return self._tempered(step), state

    def crop(self, state: State, lengths: Tensor) -> State:
        """As `Decoder.crop`."""
        return self.base.crop(state, lengths)

    def select(self, state: State, index: Tensor) -> State:
        """As `Decoder.select`."""
        return self.base.select(state, index)

    def shelve(self, num_slots: int) -> Any:
        """The base decoder's room for rows, where it has any: states are the same."""
        shelve = getattr(self.base, "shelve", None)
        return None if shelve is None else shelve(num_slots)


def count_base(base: object, cost: Cost) -> None:
    """Let a decoder that is wrapped, or a form, count into `cost` what it does beside its own calls."""
    count_into = getattr(base, "count_into", None)
    if count_into is not None:
        count_into(cost)


def check_temperature(temperature: Any) -> float:
    """`temperature` as a float; `ModelError` unless it is positive and finite."""
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0.0 < temperature < math.inf:
        raise ModelError(f"temperature: got {temperature!r}, expected a positive number (it divides the logits)")
    return float(temperature)
