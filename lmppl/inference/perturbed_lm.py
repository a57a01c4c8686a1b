"""The law that PPLM decodes: before each token the past is moved along the gradient of soft factors."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lmppl.errors import ModelError, UnsupportedModel
from lmppl.inference.coverage import truncates
from lmppl.inference.steered_decoding import SteeredLM, steered_step
from lmppl.lm.base import LanguageModel
from lmppl.lm.decoder import Decoder, State, Step
from lmppl.lm.derived import count_base
from lmppl.lm.perturbation import context_ends, has_open_past, past_of, read_again, zeros_like_past
from lmppl.lm.transformers import TransformersDecoder
from lmppl.modeling.factors import Factor
from lmppl.modeling.function_contents import content_digest
from lmppl.modeling.soft import SoftForm, SoftStep
from lmppl.sequences import Cost

if TYPE_CHECKING:
    from lmppl.inference.pplm import PPLM

__all__ = ["PerturbedDecoder", "PerturbedLM", "place_of"]


def place_of(perturb: str, prior: LanguageModel) -> str:
    """What can be moved in `prior`, "cache" or "hidden", as far as `perturb` allows."""
    if perturb != "hidden" and has_open_past(prior):
        return "cache"
    if perturb == "cache":
        raise UnsupportedModel(
            f"pplm: the cache of {type(prior).__name__} is no plain keys and values; use perturb='hidden'"
        )
    if not {"hidden", "grad"} <= prior.decoder().capabilities:
        raise UnsupportedModel(f"pplm: {type(prior).__name__} has no hidden states to move; use weighted_decoding")
    return "hidden"


class PerturbedLM(SteeredLM):
    """The law that `PPLM` decodes.

    Parameters
    ----------
    prior : LanguageModel
        π0, whose network is differentiated and never changed.
    factors : sequence of Factor
        With soft forms.
    settings : PPLM
    """

    def __init__(self, prior: LanguageModel, factors: Sequence[Factor], settings: PPLM) -> None:
        super().__init__(prior)
        if truncates(prior):
            raise UnsupportedModel("pplm: the prior is declared truncated; declare it without top_k and top_p")
        without = [f.name for f in factors if f.soft is None]
        if without or not factors:
            raise ModelError(
                f"PPLM: factor {without[0] if without else None!r} has no soft form; pass Factor(soft=...)"
            )
        self.factors, self.settings = tuple(factors), settings
        self.place = place_of(settings.perturb, prior)
        self.forms: tuple[SoftForm, ...] = tuple(f.soft(prior) for f in factors if f.soft is not None)

    def decoder(self) -> PerturbedDecoder:
        """As `LanguageModel.decoder`."""
        return PerturbedDecoder(self)

    def with_contexts(self, contexts: Sequence[Any]) -> PerturbedLM:
        """The same steering of the same prior for other contexts."""
        return PerturbedLM(self.base.with_contexts(contexts), self.factors, self.settings)

    def bytes_per_row(self, num_tokens: int) -> int:
        """As `LanguageModel.bytes_per_row`: the cache, its changes, their gradients, and what autograd keeps."""
        return super().bytes_per_row(num_tokens) + 4 * self.base.bytes_per_row(num_tokens)

    def objective(self, step: SoftStep, prior: Tensor) -> Tensor:
        """(B,) Σ_k log φ̃_k − κ KL(p̃‖p), in nats; `prior` (B, V) is log p."""
        total = torch.zeros_like(step.log_probs[:, 0])
        for factor, form in zip(self.factors, self.forms, strict=True):
            value = form(step)
            if value.shape != total.shape or not bool(torch.isfinite(value).all()):
                raise ModelError(
                    f"factor {factor.name!r}: its soft form gave shape {tuple(value.shape)} with values that are not "
                    f"all finite, or not {tuple(total.shape)}; a gradient needs finite numbers, one a row"
                )
            total = total + value.to(total.dtype)
        divergence = (step.log_probs.exp() * (step.log_probs - prior)).sum(-1)
        return total - self.settings.kl_scale * divergence

    @property
    def fingerprint(self) -> str:
        """As `LanguageModel.fingerprint`; of the factors as much as `Model.spec_hash` sees."""
        described = [(f.describe(), content_digest(f.log_factor), [content_digest(x.fn) for x in f.features])
                     for f in self.factors]  # fmt: skip
        parts = (self.base.fingerprint, described, repr(self.settings), self.place)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


class PerturbedRows(NamedTuple):
    """The prior's rows, the last token of each (B,), the sum (B, H) of hidden states after all `lengths` tokens."""

    base: State
    last: Tensor
    total: Tensor
    lengths: Tensor


class PerturbedDecoder:
    """The `Decoder` of a `PerturbedLM`: rows can be extended and selected; tokens are read one by one."""

    def __init__(self, lm: PerturbedLM) -> None:
        self.lm = lm
        self.base: Decoder = lm.base.decoder()
        self.capabilities = frozenset({"chunk"}) & self.base.capabilities
        self.cost = Cost()

    def count_into(self, cost: Cost) -> None:
        """Count the passes of the gradient steps into `cost`."""
        self.cost = cost
        count_base(self.base, cost)

    def prefill(
        self, context: Tensor, prefix: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Step, PerturbedRows]:
        """As `Decoder.prefill`."""
        with torch.no_grad():
            step, state = self.base.prefill(context)
            last = context_ends(self.lm.base, context) if self.lm.place == "cache" else torch.zeros_like(context)
            before = torch.zeros_like(step.hidden[:, -1])
            count = torch.zeros_like(context)
            if prefix is not None and prefix.shape[1] > 0:
                width = prefix.shape[1]
                count = torch.full_like(count, width) if lengths is None else lengths.to(count.device)
                read, _ = self.base.extend(state, prefix)
                earlier = torch.arange(width, device=count.device) < (count - 1)[:, None]
                before = (read.hidden * earlier[:, :, None]).sum(1)
                there = prefix.gather(1, (count - 1).clamp_min(0)[:, None])[:, 0]
                last = torch.where(count > 0, there, last)
                step, state = self.base.prefill(context, prefix, lengths)
            total = before + torch.where(count[:, None] > 0, step.hidden[:, -1], 0.0)
            rows = PerturbedRows(state, last, total, count)
            return self._steered(step, rows, before), rows

    def extend(self, state: PerturbedRows, tokens: Tensor, *, grad: bool = False) -> tuple[Step, PerturbedRows]:
        """As `Decoder.extend`, without gradients for the caller."""
        steps: list[Step] = []
        with torch.no_grad():
            for token in tokens.unbind(1):
                step, base = self.base.extend(state.base, token[:, None])
                before = state.total
                state = PerturbedRows(base, token, before + step.hidden[:, -1], state.lengths + 1)
                steps.append(self._steered(step, state, before))
        return Step(steps[0].project, torch.cat([one.hidden for one in steps], 1)), state

    def crop(self, state: PerturbedRows, lengths: Tensor) -> PerturbedRows:
        """Not among the capabilities: prefill the shorter rows."""
        raise UnsupportedModel("pplm: its rows cannot be cut back; prefill the shorter rows again")

    def select(self, state: PerturbedRows, index: Tensor) -> PerturbedRows:
        """As `Decoder.select`."""
        base = self.base.select(state.base, index)
        return PerturbedRows(base, state.last[index], state.total[index], state.lengths[index])

    def _steered(self, step: Step, rows: PerturbedRows, before: Tensor) -> Step:
        """(B, 1, ·) scores of q ∝ p̃^s p^{1−s}; `before` (B, H) is the sum of hidden states without the last token's."""
        settings = self.lm.settings
        prior = step.log_probs[:, -1]
        scores = prior
        if settings.num_steps > 0 and settings.step_size > 0.0 and settings.fusion > 0.0:
            hidden = step.hidden[:, -1].detach()
            move = self._by_cache if self.lm.place == "cache" else self._by_hidden
            moved = move(step, rows, before, prior)
            if moved is not None and not moved.equal(hidden):
                changed = torch.log_softmax(step.project(moved), -1)
                scores = settings.fusion * changed + (1.0 - settings.fusion) * prior
        dead = torch.zeros_like(scores[:, :1], dtype=torch.bool)
        return steered_step(scores[:, None], prior[:, None], dead)

    def _by_cache(self, step: Step, rows: PerturbedRows, before: Tensor, prior: Tensor) -> Tensor | None:
        """(B, H) the last hidden state over the moved past; None where there is no past."""
        assert isinstance(self.base, TransformersDecoder)
        decoder, past = self.base, past_of(rows.base)
        if not past or past[0][0].shape[2] == 0:
            return None
        deltas = zeros_like_past(past)

        def hidden_of(changes: Sequence[Tensor]) -> Tensor:
            self._count(len(rows.last))
            pairs = [(k + changes[2 * i], v + changes[2 * i + 1]) for i, (k, v) in enumerate(past)]
            return read_again(decoder, rows.base, rows.last, pairs)

        for _ in range(self.lm.settings.num_steps):
            with torch.enable_grad():
                value = self._objective(step, hidden_of(deltas), rows, before, prior)
                gradients = torch.autograd.grad(value.sum(), deltas)
            self.cost.backward_tokens += len(rows.last)
            deltas = [
                moved.requires_grad_()
                for i in range(0, len(deltas), 2)
                for moved in self._moved(deltas[i : i + 2], gradients[i : i + 2])
            ]
        return hidden_of([delta.detach() for delta in deltas])

    def _by_hidden(self, step: Step, rows: PerturbedRows, before: Tensor, prior: Tensor) -> Tensor:
        """(B, H) the last hidden state, moved itself."""
        start = step.hidden[:, -1].detach()
        delta = torch.zeros_like(start).requires_grad_()
        for _ in range(self.lm.settings.num_steps):
            with torch.enable_grad():
                value = self._objective(step, start + delta, rows, before, prior)
                gradients = torch.autograd.grad(value.sum(), [delta])
            self.cost.backward_tokens += len(delta)
            (moved,) = self._moved([delta], gradients)
            delta = moved.requires_grad_()
        return start + delta.detach()

    def _objective(self, step: Step, hidden: Tensor, rows: PerturbedRows, before: Tensor, prior: Tensor) -> Tensor:
        log_probs = torch.log_softmax(step.project(hidden), -1)
        lengths = rows.lengths[:, None]
        mean = torch.where(lengths > 0, (before + hidden) / lengths.clamp_min(1), hidden)
        return self.lm.objective(SoftStep(log_probs, hidden, mean), prior)

    def _moved(self, deltas: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
        """ΔH + α g/‖g‖^ν, the norm over these tensors together, row by row; a gradient of 0 moves nothing."""
        settings = self.lm.settings
        squares = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0)
        norm = squares.sqrt()
        scale = torch.where(norm > 0, settings.step_size / norm**settings.norm_power, 0.0)
        return [
            (delta + scale.view(-1, *[1] * (g.dim() - 1)) * g).detach()
            for delta, g in zip(deltas, gradients, strict=True)
        ]

    def _count(self, rows: int) -> None:
        self.cost.lm_forwards += 1
        self.cost.lm_tokens += rows
