"""Learned twists: soft values read off the language model's own hidden states by a small head."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lmppl.errors import ModelError, UnsupportedModel
from lmppl.inference.twists.head import TwistHead
from lmppl.lm.base import LanguageModel
from lmppl.lm.decoder import Step
from lmppl.modeling.model import Model
from lmppl.sequences import Cost
from lmppl.storage import hash_tensors

__all__ = ["LearnedState", "LearnedTwist", "TwistRecord", "require_hidden"]


@dataclass(frozen=True)
class TwistRecord:
    """Where a learned twist comes from; stored with it.

    Parameters
    ----------
    lm, fingerprint : str
        The prior, shown and as a content hash of weights, contexts and options.
    formula, spec_hash : str
        The declaration.
    loss : str
    num_steps, num_draws, seed : int
        Optimiser steps, and draws per context that were learned from.
    cost : Cost
        Everything that learning took: draws, evidence and hidden states.
    figures : dict
        On draws that were held out, if any, each a list of C numbers, nan where none of them has φ > 0: `kl` estimates
        KL(π*‖q) of the law q ∝ π0 ψ token by token, in nats; `variance` and `prior_variance` the relative
        variance of the weights γ/q and of γ/π0. All three are blind to what no draw has shown.
    versions : dict
    """

    lm: str
    fingerprint: str
    formula: str
    spec_hash: str
    loss: str
    num_steps: int
    num_draws: int
    seed: int
    cost: Cost = field(default_factory=Cost)
    figures: dict[str, list[float]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


class LearnedState(NamedTuple):
    """B prefixes: what the head reads, log ψ so far, and the state that each row was continued from."""

    hidden: Tensor
    memory: Tensor
    context: Tensor
    length: Tensor
    value: Tensor
    parent: LearnedState | None
    row: Tensor  # of `parent`


def _tensors(state: LearnedState) -> tuple[Tensor, ...]:
    return state.hidden, state.memory, state.context, state.length, state.value


class LearnedTwist:
    """log ψ(x_≤t) of all V next tokens at once, from the hidden state that predicts them (`zhao2024`).

    An `Incremental` in everything but its end: ψ approximates E_π0[∏φ | x_≤t], and ψ of an outcome approximates its φ,
    which sequential Monte Carlo puts in its place. ψ(∅) = 1, and 0 < ψ < ∞ everywhere, so that Ẑ stays unbiased however
    badly ψ was learned. No forward beyond the LM's own is needed, for any number of candidates.

    Made by `learn_twist`, or by `LearnedTwist.load`. It belongs to one LM, with its contexts and its cap; with another
    declaration on that LM it stays valid, and steers as well as its soft values still fit.

    Parameters
    ----------
    head : TwistHead
    record : TwistRecord
    """

    needs: Collection[Literal["text", "ids", "hidden"]] = frozenset({"hidden"})

    def __init__(self, head: TwistHead, record: TwistRecord) -> None:
        self.head = head.requires_grad_(False).eval()
        self.record = record

    @property
    def training_cost(self) -> Cost:
        """What learning took: add it to a run's cost where the twist serves that run alone."""
        return self.record.cost

    @property
    def fingerprint(self) -> str:
        """A content hash of the head and of the LM that it reads."""
        head = hash_tensors(self.head.state_dict())
        return hashlib.sha256(f"{self.record.fingerprint}{head}".encode()).hexdigest()[:16]

    def unsupported_reason(self, lm: LanguageModel) -> str | None:
        """Why the twist cannot serve `lm`, in one sentence; None where it can."""
        shape = self.head.shape
        if (lm.vocab_size, lm.max_new_tokens, lm.num_contexts) != (shape.vocab_size, shape.horizon, shape.num_contexts):
            got = f"{lm!r} has V = {lm.vocab_size}, T = {lm.max_new_tokens}, C = {lm.num_contexts}"
            expected = f"V = {shape.vocab_size}, T = {shape.horizon}, C = {shape.num_contexts}"
            return f"the twist was learned on {self.record.lm} with {expected}, and {got}; learn one for it"
        if lm.fingerprint != self.record.fingerprint:
            return (
                f"the twist was learned on {self.record.lm} (fingerprint {self.record.fingerprint}), and this is "
                f"{lm!r} (fingerprint {lm.fingerprint}): other weights, contexts or options; learn one for it"
            )
        return None

    # The prefix-by-prefix form.

    def start(self, contexts: Tensor, step: Step | None = None) -> LearnedState:
        """As `Incremental.start`; `step` is the LM's (B, 1, ·) after the contexts."""
        if step is None:
            raise ModelError("LearnedTwist.start: got step=None, expected the LM's Step after the context")
        hidden = self._hidden(step)
        zero = torch.zeros(len(contexts), dtype=self.head.bias.dtype, device=hidden.device)
        memory = zero[:, None].expand(-1, self.head.shape.memory)
        none = torch.zeros_like(contexts)
        return LearnedState(hidden, memory, contexts, none, zero, None, none)

    @torch.no_grad()
    def weigh(self, state: LearnedState, candidates: Tensor | None = None) -> Tensor:
        """As `Incremental.weigh`: log ψ(x_≤t) − log ψ(x_<t), (B, V) or for candidates (B, k); always finite."""
        z = self.head.features(state.hidden, state.memory, state.length)
        if candidates is None:
            values = self.head.values(z, state.context, state.length)
        else:
            values = self.head.values_at(z, state.context, state.length, candidates)
        return values - state.value[:, None]

    @torch.no_grad()
    def advance(self, state: LearnedState, tokens: Tensor, step: Step) -> LearnedState:
        """As `Incremental.advance`; `step` is the LM's (B, 1, ·) after the tokens."""
        z = self.head.features(state.hidden, state.memory, state.length)
        value = self.head.values_at(z, state.context, state.length, tokens)
        memory = state.memory + self.head.memories[tokens]
        every = torch.arange(len(tokens), device=tokens.device)
        return LearnedState(self._hidden(step), memory, state.context, state.length + 1, value, state, every)

    def potential(self, state: LearnedState) -> Tensor:
        """As `Incremental.potential`: log ψ(x_≤t), 0 for the empty prefix."""
        return state.value

    def select(self, state: LearnedState, index: Tensor) -> LearnedState:
        """As `Incremental.select`."""
        hidden, memory, context, length, value = (x[index] for x in _tensors(state))
        return LearnedState(hidden, memory, context, length, value, state.parent, state.row[index])

    def crop(self, state: LearnedState, lengths: Tensor) -> LearnedState:
        """As `Incremental.crop`: each row cut back to its own length.

        Raises
        ------
        ModelError
            Where a length exceeds what the row has.
        """
        if bool((lengths > state.length).any()):
            row = int(torch.nonzero(lengths > state.length)[0, 0])
            got, there = int(lengths[row]), int(state.length[row])
            raise ModelError(f"LearnedTwist.crop: got length {got} for row {row}, which has {there} tokens")
        path = [state]  # of the present rows, from the last token to the first
        while path[-1].parent is not None:
            path.append(self.select(path[-1].parent, path[-1].row))
        every = torch.arange(len(lengths), device=lengths.device)
        before: LearnedState | None = None
        # Forward again; a row that has reached its length stays as it is, in this state and in those that follow.
        for then in reversed(path):
            if before is None:
                before = then._replace(parent=None)
                continue
            grows = then.length <= lengths
            if not bool(grows.any()):
                break
            hidden, memory, context, length, value = (
                torch.where(grows.view(-1, *[1] * (new.dim() - 1)), new, old)
                for new, old in zip(_tensors(then), _tensors(before), strict=True)
            )
            before = LearnedState(hidden, memory, context, length, value, before, every)
        assert before is not None
        return before

    def _hidden(self, step: Step) -> Tensor:
        hidden = step.hidden[:, -1]
        if hidden.shape[-1] != self.head.shape.hidden_size:
            raise ModelError(
                f"LearnedTwist: got hidden states of size {hidden.shape[-1]}, expected {self.head.shape.hidden_size}: "
                f"it was learned on {self.record.lm}"
            )
        return hidden

    # On disk.

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, in one step, and return `path`; see `lmppl.inference.twists.files`."""
        from lmppl.inference.twists.files import save_twist

        return save_twist(self, path)

    @staticmethod
    def load(path: str | Path, model: Model | LanguageModel) -> LearnedTwist:
        """Read what `save` wrote, for use with `model`.

        Parameters
        ----------
        path : str or Path
        model : Model or LanguageModel
            The declaration that the twist was learned for; or an LM, if it is to serve other declarations on it.

        Raises
        ------
        StorageError
            Where there is no such file, or it is cut, damaged or no twist.
        ModelError
            Where it was learned for another LM or declaration; the message names both.
        """
        from lmppl.inference.twists.files import load_twist

        return load_twist(path, model)

    def __repr__(self) -> str:
        r = self.record
        return f"LearnedTwist({r.loss!r}, {r.num_steps} steps on {r.num_draws} draws of {r.lm})"


def require_hidden(lm: LanguageModel) -> None:
    """Raise where the LM's `Step.hidden` is no representation that a head could read."""
    if "hidden" not in lm.decoder().capabilities:
        fix = (
            "a table has exact soft values (engine Exact, exact twists)"
            if not hasattr(lm, "network")
            else "use a model whose head can be split off, or the twist of a factor's incremental form"
        )
        raise UnsupportedModel(f"a learned twist reads the LM's hidden states, and {lm!r} gives none; {fix}")


def shown(lm: LanguageModel) -> dict[str, Any]:
    """How a record names an LM."""
    return {"lm": repr(lm), "fingerprint": lm.fingerprint}
