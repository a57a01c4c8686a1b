"""Guided laws: language models that add prefix scores to the prior's next-token logits."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmppl.errors import FactorError, ModelError
from lmppl.inference.coverage import truncates
from lmppl.inference.steered_decoding import SteeredLM, steered_step
from lmppl.lm.base import LanguageModel
from lmppl.lm.decoder import Decoder, State, Step
from lmppl.lm.derived import count_base
from lmppl.lm.truncation import check_truncation, keep_top_k
from lmppl.modeling.factors import Factor, Incremental, missing_members
from lmppl.modeling.function_contents import content_digest
from lmppl.modeling.named_forms import FormRowError, NamedForm
from lmppl.sequences import Cost

__all__ = ["Guide", "GuidedDecoder", "GuidedLM"]

Guide = Incremental | Callable[[LanguageModel], Incremental]
"""Prefix scores, or what makes them once the LM is known that they are to steer."""


class GuidedLM(SteeredLM):
    """q(x_t|c, x_<t) ∝ π0(x_t|c, x_<t) · exp(λ · weigh(x_<t, x_t)): prefix scores added to the next-token logits.

    weigh(x_<t, x_t) = log ψ(x_≤t) − log ψ(x_<t), summed over the forms. With exact soft values as log ψ and λ = 1 this
    is π* itself; otherwise it is another law, whose draws have the weights γ/q, since `draw`, `score` and
    `token_log_probs` agree.

    Where every candidate has weigh = −inf, or a form's potential is −inf already, the row can only end with γ = 0
    (potential −inf means that every continuation is). A law must still say something there: it is π0's.

    Parameters
    ----------
    prior : LanguageModel
        π0.
    form : Incremental, factor, or sequence of these
        Prefix scores: objects of the `Incremental` protocol, factors that have such a form, or functions that make
        one from the LM that is to be steered (`lmppl.inference.prefix_scores`).
    strength : float
        λ ≥ 0; 0 is π0.
    top_k : int, optional
        Weigh only the `top_k` most probable tokens of π0, all others get probability 0: for scores that are costly to
        evaluate on all V. Then q does not cover (`truncated` is True), and weights cannot correct that.

    Raises
    ------
    ModelError
        Where the arguments are wrong, or, while decoding, where a form gives nan, +inf or another shape.
    """

    def __init__(
        self,
        prior: LanguageModel,
        form: Guide | Factor | Sequence[Guide | Factor],
        *,
        strength: float = 1.0,
        top_k: int | None = None,
    ) -> None:
        super().__init__(prior)
        if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0.0 <= strength < math.inf:
            raise ModelError(f"strength: got {strength!r}, expected a number of at least 0 that multiplies the scores")
        check_truncation(top_k, None)
        self.strength, self.top_k = float(strength), top_k
        self.guides = tuple(form) if isinstance(form, list | tuple) else (form,)
        self.forms = tuple(_bound(guide, prior) for guide in self.guides)
        for own in self.forms:
            refuse = getattr(own.form, "unsupported_reason", None)  # a learned twist belongs to one LM
            reason = None if refuse is None else refuse(prior)
            if reason is not None:
                raise ModelError(f"{own.who}: {reason}")
        self.truncated = top_k is not None or truncates(prior)

    def decoder(self) -> GuidedDecoder:
        """As `LanguageModel.decoder`."""
        return GuidedDecoder(self)

    def with_contexts(self, contexts: Sequence[Any]) -> GuidedLM:
        """The same guidance of the same prior for other contexts."""
        prior = self.base.with_contexts(contexts)
        return GuidedLM(prior, list(self.guides), strength=self.strength, top_k=self.top_k)

    @property
    def steered_by(self) -> tuple[str, ...]:
        """The factors among the guides."""
        return tuple(guide.name for guide in self.guides if isinstance(guide, Factor))

    @property
    def fingerprint(self) -> str:
        """As `LanguageModel.fingerprint`; of the forms as much as `Model.spec_hash` sees of a function."""
        forms: list[Any] = [own.form for own in self.forms]
        digests = [str(getattr(form, "fingerprint", None) or content_digest(form)) for form in forms]
        parts = (self.base.fingerprint, digests, self.strength, self.top_k)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _bound(guide: Guide | Factor, prior: LanguageModel) -> NamedForm:
    """The incremental form that `guide` stands for, each call checked."""
    if isinstance(guide, Factor):
        if guide.incremental is None:
            raise ModelError(
                f"guide: factor {guide.name!r} has no incremental form; give it one, or pass prefix scores such as "
                "PrefixScore(fn)"
            )
        return NamedForm.of(guide, prior.vocab_size)
    form: Any = guide
    if missing_members(guide) and callable(guide) and not isinstance(guide, type):
        form = guide(prior)
    missing = missing_members(form)
    if missing:
        also = "" if hasattr(form, "weigh") else ", a factor that has one, or a function that makes one from an LM"
        raise ModelError(f"guide{missing}{also}")
    return NamedForm(form, f"guide {type(form).__name__}", prior.vocab_size)


class GuidedRows(NamedTuple):
    """The state of the prior's decoder, and of each form."""

    base: State
    forms: tuple[Any, ...]


class GuidedDecoder:
    """The `Decoder` of a `GuidedLM`."""

    def __init__(self, lm: GuidedLM) -> None:
        self.lm = lm
        self.base: Decoder = lm.base.decoder()
        self.capabilities = self.base.capabilities - {"grad", "hidden"}
        self.forms = lm.forms
        self._reads_steps = any(
            "hidden" in form.needs or "step" in inspect.signature(form.form.start).parameters for form in self.forms
        )

    def count_into(self, cost: Cost) -> None:
        """Forms that run networks or functions of their own count them into `cost`."""
        count_base(self.base, cost)
        for form in self.forms:
            count_base(form.form, cost)

    def prefill(
        self, context: Tensor, prefix: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Step, GuidedRows]:
        """As `Decoder.prefill`."""
        with torch.no_grad():
            if prefix is None or prefix.shape[1] == 0:
                step, state = self.base.prefill(context)
                forms = tuple(form.start(context, step) for form in self.forms)
                return self._guided(step, forms), GuidedRows(state, forms)
            ragged = lengths is not None and bool((lengths != prefix.shape[1]).any())
            if self._reads_steps:
                step, state = self.base.prefill(context)
                forms = tuple(form.start(context, step) for form in self.forms)
                step, state = self.base.extend(state, prefix)
                for t, token in enumerate(prefix.unbind(1)):
                    forms = self._advance(forms, token, Step(step.project, step.hidden[:, t : t + 1]))
                if ragged:
                    step, state = self.base.prefill(context, prefix, lengths)
                else:
                    step = Step(step.project, step.hidden[:, -1:])
            else:
                step, state = self.base.prefill(context, prefix, lengths)
                forms = tuple(form.start(context, None) for form in self.forms)
                for token in prefix.unbind(1):
                    forms = self._advance(forms, token, None)
            if ragged:
                assert lengths is not None
                forms = self._crop(forms, lengths)
            return self._guided(step, forms), GuidedRows(state, forms)

    def extend(self, state: GuidedRows, tokens: Tensor, *, grad: bool = False) -> tuple[Step, GuidedRows]:
        """As `Decoder.extend`, without gradients."""
        with torch.no_grad():
            step, base = self.base.extend(state.base, tokens)
            forms, steps = state.forms, []
            for t, token in enumerate(tokens.unbind(1)):
                here = step if tokens.shape[1] == 1 else Step(step.project, step.hidden[:, t : t + 1])
                forms = self._advance(forms, token, here)
                steps.append(self._guided(here, forms))
            if len(steps) == 1:
                return steps[0], GuidedRows(base, forms)
            hidden = torch.cat([one.hidden for one in steps], 1)
            return Step(steps[0].project, hidden), GuidedRows(base, forms)

    def crop(self, state: GuidedRows, lengths: Tensor) -> GuidedRows:
        """As `Decoder.crop`."""
        return GuidedRows(self.base.crop(state.base, lengths), self._crop(state.forms, lengths))

    def select(self, state: GuidedRows, index: Tensor) -> GuidedRows:
        """As `Decoder.select`."""
        forms = tuple(form.select(s, index) for form, s in zip(self.forms, state.forms, strict=True))
        return GuidedRows(self.base.select(state.base, index), forms)

    def _advance(self, states: tuple[Any, ...], token: Tensor, step: Step | None) -> tuple[Any, ...]:
        return tuple(form.advance(s, token, step) for form, s in zip(self.forms, states, strict=True))

    def _crop(self, states: tuple[Any, ...], lengths: Tensor) -> tuple[Any, ...]:
        return tuple(form.crop(s, lengths) for form, s in zip(self.forms, states, strict=True))

    def _guided(self, step: Step, states: tuple[Any, ...]) -> Step:
        """(B, 1, ·) scores of q: those of π0 plus λ · weigh; those of π0 alone for dead rows."""
        prior = step.logits[:, -1]
        candidates = None if self.lm.top_k is None else _most_probable(prior, self.lm.top_k)
        some = prior if candidates is None else prior.gather(1, candidates)
        dead = torch.zeros(len(prior), dtype=torch.bool, device=prior.device)
        if self.lm.strength > 0.0:
            total = torch.zeros_like(some)
            for form, state in zip(self.forms, states, strict=True):
                own_dead = _asked(form.potential, state) == -math.inf
                weights = _asked(form.weigh, state, candidates).to(prior.dtype)
                total = total + torch.where(own_dead[:, None], 0.0, weights)  # increments of dead rows mean nothing
                dead = dead | own_dead
            some = some + self.lm.strength * total
        dead = dead | (some == -math.inf).all(-1)
        scores = some if candidates is None else torch.full_like(prior, -math.inf).scatter(1, candidates, some)
        scores = torch.where(dead[:, None], prior, scores)
        return steered_step(scores[:, None], prior[:, None], dead[:, None])


def _asked(call: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """What a form answers; rows of the decoder are nobody's, so that an error leaves their numbers out."""
    try:
        return call(*arguments)
    except FormRowError as error:
        raise FactorError(f"{error.before}{error.after}") from error


def _most_probable(logits: Tensor, top_k: int) -> Tensor:
    """(B, k) the most probable tokens, ties to the lower id."""
    count = min(top_k, logits.shape[-1])
    if count == logits.shape[-1]:
        return torch.arange(count, device=logits.device).expand(len(logits), count)
    return keep_top_k(logits, count).topk(count, -1).indices
