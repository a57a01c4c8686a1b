"""Prefix scores: what a user has (a classifier, a value function, LMs of classes) as potentials of prefixes.

Each is a declaration that becomes an `Incremental` form when the LM is known that it is to steer: `score(lm)`. All have
ψ(∅) = 1, so that they are twists that leave Ẑ as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from lmppl.errors import ModelError, ShapeError
from lmppl.lm.base import Decoder, LanguageModel, State, Step
from lmppl.lm.decoding import CountingDecoder
from lmppl.modeling.factors import Feature, FeatureInput, Incremental
from lmppl.modeling.function_contents import content_digest
from lmppl.modeling.user_functions import evaluate
from lmppl.sequences import Cost, Sequences, concatenate

__all__ = ["ClassConditional", "HiddenScore", "PrefixScore"]

Needs = Collection[Literal["text", "ids", "hidden"]]
CACHED_VALUES = 200_000


@dataclass(frozen=True)
class PrefixScore:
    """log ψ(x_≤t) = f(x_≤t)/β for a user function f of what has been written so far, and log ψ(∅) = 0.

    With β log E_π0[∏φ|x_≤t] (soft values) as f it steers to π*; with mean values E[r|x_≤t] it does not.

    Parameters
    ----------
    fn : callable or Feature
        f: as a feature's function, but called on prefixes, unfinished texts among them.
    on : {"text", "full", "ids"}
        What f reads; see `Feature`.
    beta : float
        β > 0, which divides f.
    probability : bool
        f returns p(a|x_≤t) in [0, 1], and log f is meant.
    """

    fn: Callable[..., Any] | Feature
    on: FeatureInput = "text"
    beta: float = 1.0
    probability: bool = False

    @property
    def feature(self) -> Feature:
        """f and what it reads."""
        if isinstance(self.fn, Feature):
            return self.fn
        return Feature(getattr(self.fn, "__name__", "prefix_score"), self.fn, self.on)

    @property
    def fingerprint(self) -> str:
        """Content of f and its scale: what a checkpoint recognises it by."""
        content = self.feature.fingerprint or content_digest(self.feature.fn)
        return f"{content}:{self.feature.on}:{self.beta!r}:{self.probability}"

    def __call__(self, lm: LanguageModel) -> Incremental:
        """The incremental form for prefixes of `lm`."""
        if not self.beta > 0.0:
            raise ModelError(f"PrefixScore: got beta={self.beta!r}, expected a positive number that divides the score")
        feature = self.feature
        return cast(Incremental, PrefixScoreForm(lm, feature, self.beta, self.probability))


class PrefixRows(NamedTuple):
    """B prefixes: tokens (B, T), their number and log ψ at each length (B, T + 1), and which have ended."""

    context: Tensor
    ids: Tensor
    lengths: Tensor
    values: Tensor
    over: Tensor


class PrefixScoreForm:
    """The `Incremental` form of a `PrefixScore`: f is called on each candidate, once on each distinct prefix."""

    needs: Needs = frozenset({"text", "ids"})

    def __init__(self, lm: LanguageModel, feature: Feature, beta: float, probability: bool) -> None:
        self.lm, self.feature, self.beta, self.probability = lm, feature, beta, probability
        self.cost = Cost()
        self._prefixes: dict[tuple[int, ...], int] = {}
        self._known: dict[int, float] = {}  # by prefix · V + token

    def count_into(self, cost: Cost) -> None:
        """Count calls of f into `cost`."""
        self.cost = cost

    @property
    def fingerprint(self) -> str:
        """Content of f and its scale."""
        content = self.feature.fingerprint or content_digest(self.feature.fn)
        return f"{content}:{self.feature.on}:{self.beta!r}:{self.probability}"

    def start(self, contexts: Tensor) -> PrefixRows:
        """As `Incremental.start`."""
        count, cap, device = len(contexts), self.lm.max_new_tokens, contexts.device
        ids = torch.full((count, cap), self.lm.pad_id, dtype=torch.int64, device=device)
        values = torch.zeros(count, cap + 1, dtype=torch.float64, device=device)
        return PrefixRows(contexts, ids, torch.zeros_like(contexts), values, torch.zeros_like(contexts).bool())

    def weigh(self, state: PrefixRows, candidates: Tensor | None) -> Tensor:
        """As `Incremental.weigh`; 0 after the end of a row."""
        if candidates is None:
            every = torch.arange(self.lm.vocab_size, device=state.ids.device)
            candidates = every.expand(len(state.ids), -1)
        before = self.potential(state)
        weights = torch.zeros(candidates.shape, dtype=torch.float64, device=state.ids.device)
        going = torch.nonzero(~state.over & (before > -math.inf)).squeeze(1)
        if len(going):
            width = candidates.shape[1]
            rows = going.repeat_interleave(width)
            after = self._values(state, rows, candidates[going].reshape(-1)).view(len(going), width)
            weights[going] = after - before[going, None]
        return torch.where((before == -math.inf)[:, None], -math.inf, weights)

    def advance(self, state: PrefixRows, tokens: Tensor, step: Step | None) -> PrefixRows:
        """As `Incremental.advance`; a row that has ended stays as it is."""
        going = torch.nonzero(~state.over).squeeze(1)
        if len(going) == 0:
            return state
        ids, values, over = state.ids.clone(), state.values.clone(), state.over.clone()
        at = state.lengths[going]
        dead = self.potential(state)[going] == -math.inf
        value = torch.full((len(going),), -math.inf, dtype=torch.float64, device=ids.device)
        alive = torch.nonzero(~dead).squeeze(1)
        if len(alive):
            value[alive] = self._values(state, going[alive], tokens[going[alive]])
        ids[going, at] = tokens[going]
        values[going, at + 1] = value
        lengths = state.lengths.clone()
        lengths[going] = at + 1
        over[going] = self._ended(ids[going], lengths[going])
        return PrefixRows(state.context, ids, lengths, values, over)

    def potential(self, state: PrefixRows) -> Tensor:
        """As `Incremental.potential`."""
        return state.values.gather(1, state.lengths[:, None])[:, 0]

    def select(self, state: PrefixRows, index: Tensor) -> PrefixRows:
        """As `Incremental.select`."""
        return PrefixRows(*(column[index] for column in state))

    def crop(self, state: PrefixRows, lengths: Tensor) -> PrefixRows:
        """As `Incremental.crop`."""
        lengths = torch.minimum(lengths.to(state.lengths.device), state.lengths)
        shorter = lengths < state.lengths
        return state._replace(lengths=lengths, over=state.over & ~shorter)

    def _ended(self, ids: Tensor, lengths: Tensor) -> Tensor:
        over = lengths >= self.lm.max_new_tokens
        for length in lengths.unique().tolist():
            same = torch.nonzero(lengths == length).squeeze(1)
            over[same] |= self.lm.ended(ids[same][:, :length], length - 1)
        return over

    def _values(self, state: PrefixRows, rows: Tensor, tokens: Tensor) -> Tensor:
        """(M,) log ψ of the prefixes `rows` with one more token; f sees each distinct prefix once."""
        vocab, device = self.lm.vocab_size, tokens.device
        if len(self._known) > CACHED_VALUES:
            self._known.clear()
            self._prefixes.clear()
        parents, parent_of = torch.unique(rows, return_inverse=True)
        names = [
            self._prefixes.setdefault((c, *row[:n]), len(self._prefixes))
            for c, row, n in zip(
                state.context[parents].tolist(), state.ids[parents].tolist(), state.lengths[parents].tolist(),
                strict=True,
            )
        ]  # fmt: skip
        codes = torch.tensor(names, device=device)[parent_of] * vocab + tokens
        distinct, which = torch.unique(codes, return_inverse=True)
        keys = distinct.tolist()
        missing = [i for i, key in enumerate(keys) if key not in self._known]
        self.cost.cache_hits += len(codes) - len(missing)
        if missing:
            shown = torch.empty_like(distinct)
            shown[which] = torch.arange(len(codes), device=device)  # any row that shows this prefix
            fresh = shown[missing]
            at = state.lengths[rows[fresh]]
            ids = state.ids[rows[fresh]]
            ids[torch.arange(len(fresh), device=device), at] = tokens[fresh]
            values = self._evaluate(state.context[rows[fresh]], ids, at + 1)
            self._known.update(zip([keys[i] for i in missing], values.tolist(), strict=True))
        found = torch.tensor([self._known[key] for key in keys], dtype=torch.float64, device=device)
        return found[which]

    def _evaluate(self, context: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
        """(M,) log ψ of prefixes, checked."""
        self.cost.factor_calls += len(ids)
        lm, parts, order = self.lm, [], []
        for length in lengths.unique().tolist():
            same = torch.nonzero(lengths == length).squeeze(1)
            finished = lm.ended(ids[same][:, :length], length - 1)
            rows = Sequences(ids[same], lengths[same], finished, context[same], lm.prompts, lm.decode)
            parts.append(rows.to("cpu"))
            order.append(same)
        back = torch.argsort(torch.cat(order))
        sequences = concatenate(parts, pad_id=lm.pad_id).select(back.cpu())
        values = evaluate(self.feature, sequences, factor="prefix score").double()
        name = self.feature.name
        if values.dim() != 1:
            raise ShapeError(f"prefix score {name!r}: got shape {tuple(values.shape)}, expected ({len(ids)},)")
        if self.probability:
            wrong = ~((values >= 0) & (values <= 1))
            if bool(wrong.any()):
                row = int(torch.nonzero(wrong)[0, 0])
                raise ModelError(
                    f"prefix score {name!r}: got {float(values[row]):g} for {sequences.text[row]!r}, expected a "
                    "probability in [0, 1]; for log-probabilities leave out probability=True"
                )
            values = values.log()
        return values / self.beta


@dataclass(frozen=True)
class HiddenScore:
    """log ψ(x_≤t) = head(h)[x_t]/β, h the LM's hidden state before x_t: one head scores all V next tokens at once.

    A head of one output judges the prefix that was read, not the tokens that could follow; to score candidates with it
    takes a forward for each, which is why a head here has V outputs.

    Parameters
    ----------
    head : callable
        (B, H) → (B, V), in nats; run without gradients.
    beta : float
        β > 0, which divides the score.
    """

    head: Callable[[Tensor], Tensor]
    beta: float = 1.0

    @property
    def fingerprint(self) -> str:
        """Content of the head and its scale."""
        return f"{content_digest(self.head)}:{self.beta!r}"

    def __call__(self, lm: LanguageModel) -> Incremental:
        """The incremental form for `lm`."""
        if not self.beta > 0.0:
            raise ModelError(f"HiddenScore: got beta={self.beta!r}, expected a positive number that divides the score")
        if "hidden" not in lm.decoder().capabilities:
            raise ModelError(
                f"HiddenScore: {type(lm).__name__} gives no hidden states; use a Hugging Face LM, or PrefixScore(fn)"
            )
        return HiddenScoreForm(self.head, self.beta, lm.vocab_size)


class HiddenRows(NamedTuple):
    """B prefixes: hidden states (B, t + 1, H) and log ψ (B, t + 1) at each length, and their lengths."""

    hidden: Tensor
    values: Tensor
    lengths: Tensor


class HiddenScoreForm:
    """The `Incremental` form of a `HiddenScore`."""

    needs: Needs = frozenset({"hidden"})

    def __init__(self, head: Callable[[Tensor], Tensor], beta: float, vocab_size: int) -> None:
        self.head, self.beta, self.vocab_size = head, beta, vocab_size

    def start(self, contexts: Tensor, step: Step | None = None) -> HiddenRows:
        """As `Incremental.start`."""
        if step is None:
            raise ModelError("HiddenScore: it reads hidden states; start it with the step after the context")
        values = torch.zeros(len(contexts), 1, dtype=torch.float64, device=contexts.device)
        return HiddenRows(step.hidden[:, -1:], values, torch.zeros_like(contexts))

    def weigh(self, state: HiddenRows, candidates: Tensor | None) -> Tensor:
        """As `Incremental.weigh`."""
        scores = self._scores(state)
        if candidates is not None:
            scores = scores.gather(1, candidates)
        return scores - self.potential(state)[:, None]

    def advance(self, state: HiddenRows, tokens: Tensor, step: Step) -> HiddenRows:
        """As `Incremental.advance`."""
        value = self._scores(state).gather(1, tokens[:, None])
        width = int(state.lengths.max()) + 2
        at = (state.lengths + 1)[:, None]
        hidden = _widened(state.hidden, width)
        hidden = hidden.scatter(1, at[:, :, None].expand(-1, 1, hidden.shape[2]), step.hidden[:, -1:])
        return HiddenRows(hidden, _widened(state.values, width).scatter(1, at, value), state.lengths + 1)

    def potential(self, state: HiddenRows) -> Tensor:
        """As `Incremental.potential`."""
        return state.values.gather(1, state.lengths[:, None])[:, 0]

    def select(self, state: HiddenRows, index: Tensor) -> HiddenRows:
        """As `Incremental.select`."""
        return HiddenRows(*(column[index] for column in state))

    def crop(self, state: HiddenRows, lengths: Tensor) -> HiddenRows:
        """As `Incremental.crop`."""
        return state._replace(lengths=lengths.to(state.lengths.device))

    def _scores(self, state: HiddenRows) -> Tensor:
        rows = torch.arange(len(state.lengths), device=state.lengths.device)
        with torch.no_grad():
            scores = self.head(state.hidden[rows, state.lengths])
        expected = (len(rows), self.vocab_size)
        if tuple(scores.shape) != expected:
            raise ShapeError(
                f"HiddenScore: the head gave shape {tuple(scores.shape)}, expected {expected}: a score of each next "
                "token"
            )
        return scores.double() / self.beta


def _widened(columns: Tensor, width: int) -> Tensor:
    """`columns` (B, t, ...) with `width` columns, cut or filled with zeros."""
    room = columns.new_zeros(len(columns), width, *columns.shape[2:])
    kept = min(width, columns.shape[1])
    room[:, :kept] = columns[:, :kept]
    return room


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

    needs: Needs = frozenset({"ids"})

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
        totals = _widened(state.totals, width + 1)
        totals = totals.scatter(1, (at + 1)[:, :, None].expand(-1, 1, len(self.lms)), now)
        ids = _widened(state.ids, width).scatter(1, at, tokens[:, None])
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
