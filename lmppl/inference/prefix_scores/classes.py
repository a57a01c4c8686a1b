"""Bayes' rule over language models of classes, as a potential of prefixes."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from lmppl.errors import ModelError
from lmppl.inference.prefix_scores.columns import widened
from lmppl.lm.base import LanguageModel
from lmppl.lm.decoder import Decoder, State, Step
from lmppl.lm.decoding import CountingDecoder
from lmppl.modeling.factors import Incremental
from lmppl.sequences import Cost

__all__ = ["ClassConditional", "ClassConditionalForm"]


@dataclass(frozen=True)
class ClassConditional:
    """log ψ(x_≤t) = log p(a|c, x_≤t) − log p(a), by Bayes' rule from LMs of classes.

    p(a|x_≤t) = p(a) p_a(x_≤t) / Σ_b p(b) p_b(x_≤t). With `length_normalized` the likelihoods enter as p_b(x_≤t)^{1/t},
    which is what GeDi does: a score that no longer is a posterior probability of the class, since it weighs a long
    prefix like one token. Source: `krause2021`.

    Parameters
    ----------
    lms : sequence of LanguageModel
        One LM for each class, on the tokens, ends and cap of the LM that is to be steered, with as many contexts:
        other weights, or the same weights with a control code in the context.
    target : int
        Index of the class a that is wanted.
    prior : sequence of float, optional
        p(b) of each class; uniform by default.
    length_normalized : bool
        See above.
    """

    lms: Sequence[LanguageModel]
    target: int = 0
    prior: Sequence[float] | None = None
    length_normalized: bool = False

    @property
    def fingerprint(self) -> str:
        """The LMs and how they are combined."""
        prior = None if self.prior is None else list(self.prior)
        return repr(([lm.fingerprint for lm in self.lms], self.target, prior, self.length_normalized))

    def __call__(self, lm: LanguageModel) -> Incremental:
        """The incremental form for `lm`."""
        classes = tuple(self.lms)
        if len(classes) < 2 or not 0 <= self.target < len(classes):
            raise ModelError(f"ClassConditional: got {len(classes)} LMs and target={self.target}, expected one of ≥ 2")
        for i, one in enumerate(classes):
            for name in ("vocab_size", "num_contexts", "max_new_tokens", "eos_ids"):
                got, expected = getattr(one, name), getattr(lm, name)
                if got != expected:
                    raise ModelError(
                        f"ClassConditional: the LM of class {i} has {name} {got!r}, expected {expected!r}, as the LM "
                        "that it steers"
                    )
        shares = [1.0] * len(classes) if self.prior is None else list(self.prior)
        masses = torch.tensor(shares, dtype=torch.float64)
        if masses.shape != (len(classes),) or not bool((masses > 0).all()):
            raise ModelError(f"ClassConditional: got prior={self.prior!r}, expected {len(classes)} positive numbers")
        log_prior = (masses / masses.sum()).log()
        form = ClassConditionalForm(classes, self.target, log_prior, self.length_normalized)
        return cast(Incremental, form)  # its `start` needs no step, and may leave that argument out


class ClassRows(NamedTuple):
    """B prefixes under K LMs: state and next-token log-probs (B, V) of each LM, log p_k(x_≤s) (B, t + 1, K), tokens."""

    states: tuple[State, ...]
    log_probs: tuple[Tensor, ...]
    totals: Tensor
    ids: Tensor
    context: Tensor
    lengths: Tensor


class ClassConditionalForm:
    """The `Incremental` form of a `ClassConditional`: one forward of each class's LM a token."""

    needs: Collection[Literal["text", "ids", "hidden"]] = frozenset({"ids"})

    def __init__(self, lms: tuple[LanguageModel, ...], target: int, log_prior: Tensor, length_normalized: bool) -> None:
        self.lms, self.target, self.log_prior, self.length_normalized = lms, target, log_prior, length_normalized
        self.cost = Cost()
        self._make_decoders()

    def _make_decoders(self) -> None:
        self.decoders: tuple[Decoder, ...] = tuple(CountingDecoder(lm, self.cost) for lm in self.lms)

    def count_into(self, cost: Cost) -> None:
        """Count the forwards of the classes' LMs into `cost`."""
        self.cost = cost
        self._make_decoders()

    @property
    def fingerprint(self) -> str:
        """The LMs and how they are combined."""
        prints = [lm.fingerprint for lm in self.lms]
        return repr((prints, self.target, self.log_prior.tolist(), self.length_normalized))

    def start(self, contexts: Tensor) -> ClassRows:
        """As `Incremental.start`."""
        with torch.no_grad():
            begun = [decoder.prefill(contexts) for decoder in self.decoders]
            log_probs = tuple(step.log_probs[:, -1].double() for step, _ in begun)
        totals = torch.zeros(len(contexts), 1, len(self.lms), dtype=torch.float64, device=contexts.device)
        ids = torch.zeros(len(contexts), 0, dtype=torch.int64, device=contexts.device)
        states = tuple(state for _, state in begun)
        return ClassRows(states, log_probs, totals, ids, contexts, torch.zeros_like(contexts))

    def weigh(self, state: ClassRows, candidates: Tensor | None) -> Tensor:
        """As `Incremental.weigh`."""
        following = torch.stack(state.log_probs, -1)  # (B, V, K)
        if candidates is not None:
            following = following.gather(1, candidates[:, :, None].expand(-1, -1, len(self.lms)))
        after = self._score(self._now(state)[:, None] + following, (state.lengths + 1)[:, None, None])
        return after - self.potential(state)[:, None]

    def advance(self, state: ClassRows, tokens: Tensor, step: Step | None) -> ClassRows:
        """As `Incremental.advance`."""
        gained = torch.stack([one.gather(1, tokens[:, None])[:, 0] for one in state.log_probs], -1)
        with torch.no_grad():
            begun = [d.extend(s, tokens[:, None]) for d, s in zip(self.decoders, state.states, strict=True)]
            log_probs = tuple(one.log_probs[:, -1].double() for one, _ in begun)
        width = int(state.lengths.max()) + 1
        at = state.lengths[:, None]
        now = (self._now(state) + gained)[:, None]
        totals = widened(state.totals, width + 1)
        totals = totals.scatter(1, (at + 1)[:, :, None].expand(-1, 1, len(self.lms)), now)
        ids = widened(state.ids, width).scatter(1, at, tokens[:, None])
        return ClassRows(tuple(s for _, s in begun), log_probs, totals, ids, state.context, state.lengths + 1)

    def potential(self, state: ClassRows) -> Tensor:
        """As `Incremental.potential`."""
        return self._score(self._now(state), state.lengths[:, None])

    def select(self, state: ClassRows, index: Tensor) -> ClassRows:
        """As `Incremental.select`."""
        states = tuple(d.select(s, index) for d, s in zip(self.decoders, state.states, strict=True))
        log_probs = tuple(one[index] for one in state.log_probs)
        return ClassRows(states, log_probs, *(column[index] for column in state[2:]))

    def crop(self, state: ClassRows, lengths: Tensor) -> ClassRows:
        """As `Incremental.crop`; the shorter rows are read anew, since a cut cache does not say what comes next."""
        lengths = lengths.to(state.lengths.device)
        width = int(lengths.max())
        with torch.no_grad():
            prefix = state.ids[:, :width] if width else None
            begun = [d.prefill(state.context, prefix, lengths if width else None) for d in self.decoders]
            log_probs = tuple(one.log_probs[:, -1].double() for one, _ in begun)
        totals, ids = state.totals[:, : width + 1], state.ids[:, :width]
        return ClassRows(tuple(s for _, s in begun), log_probs, totals, ids, state.context, lengths)

    def _now(self, state: ClassRows) -> Tensor:
        """(B, K) log p_k(x_≤t)."""
        rows = torch.arange(len(state.lengths), device=state.lengths.device)
        return state.totals[rows, state.lengths]

    def _score(self, totals: Tensor, lengths: Tensor) -> Tensor:
        """log ψ from log p_k(x) (..., K) of prefixes of `lengths` tokens."""
        if self.length_normalized:
            totals = totals / lengths.clamp_min(1)
        joint = totals + self.log_prior.to(totals.device)
        # A prefix that no class can write says nothing about the class.
        posterior = torch.where(
            (joint == -math.inf).all(-1, keepdim=True),
            self.log_prior.to(totals.device),
            torch.log_softmax(joint, -1),
        )
        return posterior[..., self.target] - self.log_prior[self.target].to(totals.device)
