"""A user's function of prefixes, such as a classifier or a value function, as a potential of prefixes."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from lmppl.errors import ModelError, ShapeError
from lmppl.lm.base import LanguageModel
from lmppl.lm.decoder import Step
from lmppl.modeling.factors import Feature, FeatureInput, Incremental
from lmppl.modeling.function_contents import content_digest
from lmppl.modeling.user_functions import evaluate
from lmppl.sequences import Cost, Sequences, concatenate

__all__ = ["PrefixScore", "PrefixScoreForm"]

CACHED_VALUES = 200_000  # of one form; all are forgotten where there are more


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
        return cast(Incremental, PrefixScoreForm(lm, self))


class PrefixRows(NamedTuple):
    """B prefixes: tokens (B, T), their number and log ψ at each length (B, T + 1), and which have ended."""

    context: Tensor
    ids: Tensor
    lengths: Tensor
    values: Tensor
    over: Tensor


class PrefixScoreForm:
    """The `Incremental` form of a `PrefixScore`: f is called on each candidate, once on each distinct prefix."""

    needs: Collection[Literal["text", "ids", "hidden"]] = frozenset({"text", "ids"})

    def __init__(self, lm: LanguageModel, score: PrefixScore) -> None:
        self.lm, self.score, self.feature = lm, score, score.feature
        self.cost = Cost()
        self._prefixes: dict[tuple[int, ...], int] = {}
        self._known: dict[int, float] = {}  # by prefix · V + token

    def count_into(self, cost: Cost) -> None:
        """Count calls of f into `cost`."""
        self.cost = cost

    @property
    def fingerprint(self) -> str:
        """As `PrefixScore.fingerprint`."""
        return self.score.fingerprint

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
        values = evaluate(self.feature, sequences, who="prefix score").double()
        name = self.feature.name
        if values.dim() != 1:
            raise ShapeError(f"prefix score {name!r}: got shape {tuple(values.shape)}, expected ({len(ids)},)")
        if self.score.probability:
            wrong = ~((values >= 0) & (values <= 1))
            if bool(wrong.any()):
                row = int(torch.nonzero(wrong)[0, 0])
                raise ModelError(
                    f"prefix score {name!r}: got {float(values[row]):g} for {sequences.text[row]!r}, expected a "
                    "probability in [0, 1]; for log-probabilities leave out probability=True"
                )
            values = values.log()
        return values / self.score.beta
