"""Log-probabilities that a language model gives to the completions of another one, as functions of `Sequences`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from lmppl.errors import FactorError, ModelError
from lmppl.lm.base import LanguageModel
from lmppl.lm.decoding import token_log_probs
from lmppl.modeling.evidence.lm_factors.future import FuturePotential
from lmppl.modeling.evidence.lm_factors.prefixes import CachedPrefixes
from lmppl.modeling.evidence.lm_factors.tokens import contexts_of, encoded
from lmppl.modeling.returned_values import quote
from lmppl.sequences import Cost, Sequences

__all__ = ["CompletionScore", "FutureScore", "LMScore", "without_end"]


@dataclass(frozen=True)
class LMScore(ABC):
    """Base of functions `Sequences` → log-probabilities (B,) under an LM, in nats, without gradients.

    Parameters
    ----------
    lm : LanguageModel
    prior : LanguageModel, optional
        Whose completions are scored; None until the factor meets its prior.
    divides : bool
        φ has this probability in a denominator, so that 0 is an error wherever π0(x) > 0.
    by_text : bool
        The LM reads the text of a completion, in tokens of its own.
    """

    lm: LanguageModel
    prior: LanguageModel | None = None
    divides: bool = False
    by_text: bool = False
    cost: Cost | None = field(default=None, compare=False, repr=False)

    def counting_into(self, cost: Cost) -> Self:
        """The same function, which counts the LM's forwards into `cost`."""
        return replace(self, cost=cost)

    def __call__(self, sequences: Sequences) -> Tensor:
        """(B,) log p; where the LM divides, 0 for rows that the prior cannot write either."""
        if self.prior is None:
            raise ModelError("it reads a prior's tokens; multiply a prior by it first: prior * factor")
        values = self.log_prob(sequences, contexts_of(self.lm, self.prior, "LM")[sequences.context.cpu()]).double()
        if self.divides and bool((values == -torch.inf).any()):
            zero = torch.nonzero(values == -torch.inf).squeeze(1)
            possible = self.prior.score(sequences.select(zero), cost=self.cost) > -torch.inf
            if bool(possible.any()):
                text = quote(sequences.text[int(zero[possible][0])])
                raise FactorError(
                    f"{self.what} is 0 for the text {text}, by which φ divides, and π0 is not: φ is infinite there; "
                    "what divides (over=, or lm= with a negative weight) must be able to write what the prior writes"
                )
            values = values.masked_fill(values == -torch.inf, 0.0)
        return values

    @property
    @abstractmethod
    def what(self) -> str:
        """The probability, in words."""

    @abstractmethod
    def log_prob(self, sequences: Sequences, context: Tensor) -> Tensor:
        """(B,) log p of the rows, whose contexts are `context` (B,) of the LM."""

    def _score(self, rows: Sequence[Sequence[int]], context: Tensor) -> Tensor:
        """(B, T') log-probabilities of tokens that are given as lists; 0 after the end of each."""
        width = max([1, *map(len, rows)])
        ids = torch.tensor([[*row, *[self.lm.pad_id] * (width - len(row))] for row in rows], dtype=torch.int64)
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        made = Sequences(ids, lengths, torch.zeros(len(rows), dtype=torch.bool), context.cpu(), self.lm.prompts)
        return token_log_probs(self.lm, made, cost=self.cost)

    def _encoded(self, text: str, context: int) -> list[int] | None:
        """The LM's tokens for a text; None where it cannot write it."""
        ids = encoded(self.lm, text, context, "LM")
        if ids is not None:
            self._check_room(text, len(ids) + 1)
        return ids

    def _check_room(self, text: str, num_tokens: int) -> None:
        """Raise where a row is longer than the LM's cap."""
        if num_tokens > self.lm.max_new_tokens:
            raise FactorError(
                f"the text {quote(text)} takes {num_tokens} tokens of the LM, which was declared with "
                f"max_new_tokens={self.lm.max_new_tokens}; give it {num_tokens} or more"
            )


@dataclass(frozen=True)
class CompletionScore(LMScore):
    """log p_lm(x|c'): the sum over the tokens of x, EOS among them where x ends by it.

    Parameters
    ----------
    prefixes : CachedPrefixes, optional
        The same LM in the form for prefixes of the same run, which knows the rows that it has just read.
    """

    prefixes: CachedPrefixes | None = field(default=None, compare=False, repr=False)

    @property
    def what(self) -> str:
        """As `LMScore.what`."""
        return f"p(x|c') of {type(self.lm).__name__}"

    def log_prob(self, sequences: Sequences, context: Tensor) -> Tensor:
        """As `LMScore.log_prob`."""
        if self.by_text:
            return self._of_texts(sequences, context)
        values = torch.full((len(sequences),), torch.nan, dtype=torch.float64)
        if self.prefixes is not None:
            values = self.prefixes.recall(sequences)
        rest = torch.nonzero(values.isnan()).squeeze(1)
        if len(rest):
            s = sequences.select(rest)
            rows = Sequences(s.ids, s.lengths, s.finished, context[rest].to(s.ids.device), self.lm.prompts)
            values[rest] = token_log_probs(self.lm, rows, cost=self.cost).double().sum(-1).cpu()
        return values

    def _of_texts(self, sequences: Sequences, context: Tensor) -> Tensor:
        """log p of the text in the LM's own tokens, and of the end behind it where the row ended."""
        values = torch.full((len(sequences),), -torch.inf, dtype=torch.float64)
        rows, owner = [], []
        for i, (text, c, over) in enumerate(
            zip(sequences.text, context.tolist(), sequences.finished.tolist(), strict=True)
        ):
            ids = self._encoded(text, c)
            if ids is not None:
                ends = [[eos] for eos in self.lm.eos_ids] if over else [[]]
                rows += [[*ids, *end] for end in ends]
                owner += [i] * len(ends)
        if rows:
            at = torch.tensor(owner)
            totals = self._score(rows, context.cpu()[at]).double().sum(-1).cpu()
            for i in dict.fromkeys(owner):
                values[i] = torch.logsumexp(totals[at == i], 0)
        return values


@dataclass(frozen=True)
class FutureScore(LMScore):
    """log p_lm(future|c', x): of the future's tokens behind those of x, whose EOS is left out.

    Parameters
    ----------
    futures : tuple of tuple of int, or of str
        One for each context of the prior: tokens of the LM, or texts where it reads text.
    form : FuturePotential, optional
        The form for prefixes of the same run, which knows the rows that it has just read.
    """

    futures: tuple[tuple[int, ...], ...] | tuple[str, ...] = ()
    form: FuturePotential | None = field(default=None, compare=False, repr=False)

    @property
    def what(self) -> str:
        """As `LMScore.what`."""
        return f"p(future|c', x) of {type(self.lm).__name__}"

    def log_prob(self, sequences: Sequences, context: Tensor) -> Tensor:
        """As `LMScore.log_prob`."""
        if self.form is None:
            return self._of_rows(sequences, context)
        values = self.form.recall(sequences)
        rest = torch.nonzero(values.isnan()).squeeze(1)
        if len(rest):
            values[rest] = self._of_rows(sequences.select(rest), context[rest])
        return values

    def _of_rows(self, sequences: Sequences, context: Tensor) -> Tensor:
        assert self.prior is not None  # as `__call__` made sure
        values = torch.full((len(sequences),), -torch.inf, dtype=torch.float64)
        own = without_end(sequences, self.prior) if not self.by_text else None
        rows, starts, ends, at = [], [], [], []
        for i, (c, source) in enumerate(zip(context.tolist(), sequences.context.tolist(), strict=True)):
            future = self.futures[source]
            before = self._encoded(sequences.text[i], c) if own is None else own[i]
            after = self._encoded_future(future, c) if isinstance(future, str) else list(future)
            if before is not None:
                if self.by_text:
                    self._check_room(sequences.text[i], len(before) + len(after))
                rows.append([*before, *after])
                starts.append(len(before))
                ends.append(len(before) + len(after))
                at.append(i)
        if rows:
            scores = self._score(rows, context.cpu()[at]).double().cpu()
            place = torch.arange(scores.shape[1])
            mine = (place >= torch.tensor(starts)[:, None]) & (place < torch.tensor(ends)[:, None])
            values[at] = torch.where(mine, scores, 0.0).sum(-1)
        return values

    def _encoded_future(self, text: str, context: int) -> list[int]:
        ids = self._encoded(text, context)
        assert ids is not None  # as the factor made sure when it met its prior
        return ids


def without_end(sequences: Sequences, lm: LanguageModel) -> list[list[int]]:
    """The tokens of each row, the EOS at its end left out."""
    return [row[:-1] if row and row[-1] in lm.eos_ids else row for row in sequences.token_lists()]
