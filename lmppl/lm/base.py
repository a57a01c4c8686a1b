"""The contract of a language model: a Pyro distribution over token sequences, stepped by a `Decoder`.

A `LanguageModel` is the law of an outcome x = (x_1..x_L) given a context c: tokens are appended until EOS (or a stop
string), or until the cap T = `max_new_tokens`. Truncation at T is part of the model, so Σ_x p(x|c) = 1.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from lmppl.errors import ContextError, ModelError, ShapeError, SupportTooLarge, UnsupportedModel
from lmppl.lm.decoder import Decoder
from lmppl.sequences import Cost, Draws, Sequences

if TYPE_CHECKING:
    from lmppl.lm.spelling import Spelling

__all__ = ["ENUMERATION_GUARD", "LanguageModel", "guard_support"]

ENUMERATION_GUARD = 200_000


class _Outcomes(constraints.Constraint):
    """Canonical outcomes of one LM: they end at EOS or the cap, with pad ids after the end."""

    is_discrete = True
    event_dim = 1

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        rows = value.reshape(-1, value.shape[-1])
        good = (rows >= 0).all(-1) & (rows < self.lm.vocab_size).all(-1) & (rows.shape[-1] == self.lm.max_new_tokens)
        result: Tensor = good.view(value.shape[:-1])
        return result


class LanguageModel(TorchDistribution):
    """A law over token sequences, one for each of C contexts: batch shape (C,), event shape (T,).

    Usable under `pyro.sample`, `pyro.plate` and `pyro.condition`; values are int64 ids of shape sample_shape + (C, T),
    with `pad_id` after the end of a row. Subclasses give the attributes below, `decoder`, and `decode`.

    Parameters
    ----------
    prompts : sequence of str
        Text of the C contexts.
    vocab_size, max_new_tokens, pad_id : int
        V, T, and the id that fills a row after its end (it may equal an EOS id, or a token that can also be drawn).
    eos_ids : sequence of int
        Tokens that end a row; may be empty (then every row runs to the cap).

    Notes
    -----
    Weight of an outcome: log p(x|c) = Σ_t log p(x_t|c, x_<t) over its tokens, EOS included when it ended.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 - torch's own name and kind
    has_rsample = False
    has_enumerate_support = True

    def __init__(
        self,
        prompts: Sequence[str],
        *,
        vocab_size: int,
        max_new_tokens: int,
        eos_ids: Sequence[int],
        pad_id: int,
    ) -> None:
        if len(prompts) == 0:
            raise ContextError("contexts: got an empty list, expected at least one context (use '' for the empty one)")
        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ModelError(f"max_new_tokens: got {max_new_tokens!r}, expected an integer of at least 1")
        self.prompts = tuple(prompts)
        self.vocab_size = vocab_size
        self.max_new_tokens = max_new_tokens
        self.eos_ids = tuple(sorted(set(eos_ids)))
        self.pad_id = pad_id
        self._eos_on: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}
        super().__init__(torch.Size((len(prompts),)), torch.Size((max_new_tokens,)), validate_args=False)

    # What a subclass gives.

    @abstractmethod
    def decoder(self) -> Decoder:
        """A fresh decoder; it holds no rows."""

    @abstractmethod
    def decode(self, sequences: Sequences) -> list[str]:
        """The N completion texts, special tokens removed."""

    @abstractmethod
    def with_contexts(self, contexts: Sequence[Any]) -> LanguageModel:
        """The same LM for other contexts, weights shared."""

    def with_max_new_tokens(self, max_new_tokens: int) -> LanguageModel:
        """The same LM, contexts and next-token law, with another cap T.

        Raises
        ------
        UnsupportedModel
            Where the LM does not say how.
        """
        raise UnsupportedModel(
            f"{type(self).__name__}: its cap is {self.max_new_tokens}, and it has no other; declare it with "
            f"max_new_tokens={max_new_tokens}, or give it the method with_max_new_tokens(max_new_tokens)"
        )

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A content hash of weights, contexts and options: equal laws have equal fingerprints."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of log-probabilities."""
        return torch.float32

    @property
    def context_lengths(self) -> Tensor:
        """(C,) tokens of each context, as the network reads them: what a prefill costs."""
        return torch.ones(self.num_contexts, dtype=torch.int64)

    @property
    def device(self) -> torch.device:
        """Where forwards run; draws live on the CPU."""
        return torch.device("cpu")

    def bytes_per_row(self, num_tokens: int) -> int:
        """Memory that one decoding row of `num_tokens` completion tokens needs: cache and next-token scores."""
        return 8 * num_tokens + 4 * 8 * self.vocab_size

    def ended(self, ids: Tensor, step: int) -> Tensor:
        """(B,) whether the rows `ids` (B, ≥ step+1), alive before, end with the token at `step`.

        By EOS here, by stop strings in LMs that have them; the cap is not asked.
        """
        return self._is_eos(ids[:, step])

    @cached_property
    def spelling(self) -> Spelling:
        """How the V tokens spell text, found by decoding."""
        from lmppl.lm.spelling import spelling_of

        return spelling_of(self)

    @property
    def begins_text(self) -> Sequence[bool]:
        """Whether a completion is the beginning of a text, for each of the C contexts: its first token can read so."""
        return [True] * self.num_contexts

    @property
    def ends_by_eos_alone(self) -> bool:
        """Whether `ended` asks only if the token at `step` is an EOS: then rows are parsed at once, not step by step.

        False for a subclass with its own `ended`, unless it says otherwise.
        """
        return type(self).ended is LanguageModel.ended

    # What every LM has.

    @property
    def num_contexts(self) -> int:
        """C."""
        return len(self.prompts)

    @property
    def branching(self) -> int:
        """Tokens that can follow a prefix at most: V, or fewer where the prior is declared truncated."""
        return self.vocab_size

    def max_outcomes(self) -> float:
        """An upper bound of the number of outcomes of one context; inf where it overflows.

        With b = `branching`, E EOS tokens and g = min(b, V − E) that go on: Σ_{t<T−1} min(E, b) g^t + b g^{T−1}.
        """
        ending, width = min(len(self.eos_ids), self.branching), self.branching
        going = min(width, self.vocab_size - len(self.eos_ids))
        if going > 1 and self.max_new_tokens * math.log(going) > 200:
            return math.inf
        before = sum(ending * going**t for t in range(self.max_new_tokens - 1))
        return float(before + width * going ** (self.max_new_tokens - 1))

    def draw(self, num_draws: int, *, generator: torch.Generator | None = None, cost: Cost | None = None) -> Draws:
        """`num_draws` exact draws per context with their log-probabilities, from the same forwards.

        Rows are ordered by context, on the CPU, equally weighted. `log_prior` and `log_q` both hold log p(x|c).

        Parameters
        ----------
        num_draws : int
            Rows per context.
        generator : torch.Generator, optional
            Source of randomness; torch's global one if None.
        cost : Cost, optional
            Counter that the forwards are added to.
        """
        from lmppl.lm.decoding import draw

        return draw(self, num_draws, generator=generator, cost=cost)

    def token_log_probs(self, sequences: Sequences, *, cost: Cost | None = None) -> Tensor:
        """(N, T) log p(x_t|c, x_<t) of each token, 0 after the end of a row.

        Sums to `score` where the row is an outcome; the outcome's form (ends at EOS or cap) is checked there, not here.
        """
        from lmppl.lm.decoding import token_log_probs

        return token_log_probs(self, sequences, cost=cost)

    def score(self, sequences: Sequences, *, cost: Cost | None = None) -> Tensor:
        """(N,) log p(x|c), in nats; −inf for rows that are no outcome of this LM (see `is_outcome`)."""
        total = self.token_log_probs(sequences, cost=cost).sum(-1)
        return total.masked_fill(~self.is_outcome(sequences), -torch.inf)

    def is_outcome(self, sequences: Sequences) -> Tensor:
        """(N,) bool: the row ends exactly where this LM would end it, by EOS or at the cap."""
        parsed = self.parse(sequences.ids, sequences.context)
        cap = self.max_new_tokens
        whole = sequences.lengths.eq(cap) | (sequences.finished & sequences.lengths.le(cap))
        return parsed.lengths.eq(sequences.lengths) & parsed.finished.eq(sequences.finished) & whole

    def parse(self, ids: Tensor, context: Tensor) -> Sequences:
        """Rows of ids (N, T) as sequences: each ends at its first terminal token, or at the cap."""
        width = ids.shape[1]
        if self.ends_by_eos_alone:
            before = self._is_eos(ids).cumsum(1) == 0
            finished = ~before.all(1)
            lengths = before.sum(1) + finished
        else:
            lengths, finished = self._parse_by_steps(ids)
        after = torch.arange(width, device=ids.device) >= lengths[:, None]
        clean = ids.masked_fill(after, self.pad_id)
        return Sequences(clean, lengths, finished, context, self.prompts, self.decode)

    def _is_eos(self, tokens: Tensor) -> Tensor:
        key = (tuple(self.eos_ids), tokens.device)
        if key not in self._eos_on:
            self._eos_on[key] = torch.tensor(self.eos_ids, dtype=torch.int64, device=tokens.device)
        return torch.isin(tokens, self._eos_on[key])

    def _parse_by_steps(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        width = ids.shape[1]
        lengths = torch.full((len(ids),), width, dtype=torch.int64, device=ids.device)
        finished = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for step in range(width):
            alive = torch.nonzero(~finished).squeeze(1)
            if len(alive) == 0:
                break
            over = alive[self.ended(ids[alive], step)]
            finished[over] = True
            lengths[over] = step + 1
        return lengths, finished

    def sequences(self, rows: Sequence[Sequence[int]], context: Sequence[int] | None = None) -> Sequences:
        """Token lists as `Sequences` of this LM, `context` (default 0) for each."""
        ids = torch.full((len(rows), self.max_new_tokens), self.pad_id, dtype=torch.int64)
        for i, row in enumerate(rows):
            if len(row) > self.max_new_tokens:
                raise ShapeError(f"sequences: row {i} has {len(row)} tokens, expected at most {self.max_new_tokens}")
            if any(not 0 <= token < self.vocab_size for token in row):
                raise ShapeError(f"sequences: row {i} is {list(row)}, expected ids of 0 to {self.vocab_size - 1}")
            ids[i, : len(row)] = torch.tensor(list(row), dtype=torch.int64)
        lengths = torch.tensor([len(r) for r in rows], dtype=torch.int64)
        where = torch.tensor([0] * len(rows) if context is None else list(context), dtype=torch.int64)
        parsed = self.parse(ids, where)
        finished = parsed.finished & parsed.lengths.eq(lengths)
        return Sequences(ids, lengths, finished, where, self.prompts, self.decode)

    # torch.distributions and Pyro.

    @property
    def support(self) -> constraints.Constraint:
        """Outcomes as ids of shape (T,)."""
        return _Outcomes(self)

    def sample(self, sample_shape: Sequence[int] | torch.Size = torch.Size()) -> Tensor:
        """Ids of shape sample_shape + (C, T), drawn with torch's global generator."""
        shape = torch.Size(sample_shape)
        draws = self.draw(shape.numel())
        by_context = draws.ids.view(self.num_contexts, shape.numel(), self.max_new_tokens)
        return by_context.transpose(0, 1).reshape(shape + self.batch_shape + self.event_shape).to(self.device)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(x|c) of ids with shape sample_shape + (C, T): shape sample_shape + (C,), in nats.

        −inf where a row does not hold `pad_id` after its end: each outcome has one canonical form, so that the
        probabilities of all ids sum to 1.
        """
        if value.shape[-1:] != self.event_shape:
            got, expected = tuple(value.shape[-1:]), tuple(self.event_shape)
            raise ShapeError(f"log_prob: got last dimension {got}, expected {expected}")
        if value.is_floating_point():
            raise ShapeError(f"log_prob: got ids of dtype {value.dtype}, expected int64")
        if bool(((value < 0) | (value >= self.vocab_size)).any()):
            raise ShapeError(f"log_prob: got ids outside the vocabulary, expected 0 to {self.vocab_size - 1}")
        lead = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        ids = value.expand(lead + self.event_shape).reshape(-1, self.max_new_tokens)
        context = torch.arange(self.num_contexts, device=ids.device).expand(lead).reshape(-1)
        parsed = self.parse(ids, context)
        canonical = (parsed.ids == ids).all(-1)
        total = self.token_log_probs(parsed).sum(-1)
        return total.masked_fill(~canonical, -torch.inf).view(lead)

    def enumerate_sequences(
        self, context: int = 0, *, max_sequences: int = ENUMERATION_GUARD, cost: Cost | None = None
    ) -> Draws:
        """Every outcome of positive probability for one context, with its log-probability, prefix by prefix.

        Raises
        ------
        SupportTooLarge
            As soon as more than `max_sequences` prefixes are alive or finished.
        """
        from lmppl.lm.decoding import enumerate_outcomes

        return enumerate_outcomes(self, context, max_sequences=max_sequences, cost=cost)

    def expand(self, batch_shape: Sequence[int] | torch.Size, _instance: Any = None) -> TorchDistribution:
        """The LM itself where the shape is its own, which is what a `pyro.plate` of size C asks for.

        Pyro's general wrapper, used for other shapes, cannot enumerate values of more than zero dimensions.
        """
        if torch.Size(batch_shape) == self.batch_shape:
            return self
        return super().expand(torch.Size(batch_shape), _instance)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """(S, C, T) ids of every outcome of any context; (S, 1, T) if not `expand`.

        An outcome that one context excludes has log-probability −inf there.

        Raises
        ------
        SupportTooLarge
            Where there are more than 200,000 outcomes.
        """
        rows = torch.cat([self.enumerate_sequences(c).ids for c in range(self.num_contexts)])
        values: Tensor = torch.unique(rows, dim=0).unsqueeze(1)
        return values.expand(-1, self.num_contexts, -1) if expand else values

    if not TYPE_CHECKING:  # a factor's __rmul__ makes the model, and has its type

        def __mul__(self, other: object) -> Any:
            if hasattr(other, "log_factor") and not isinstance(other, type):
                return NotImplemented  # a factor, which makes the model
            what = other.__name__ if isinstance(other, type) else type(other).__name__
            hint = "wrap a function of texts: prior * lmppl.Reward(fn, beta=...) or lmppl.Constraint(fn)"
            if isinstance(other, type):
                hint = f"pass an instance: prior * {what}(fn)"
            raise ModelError(f"got {type(self).__name__} * {what}, expected a factor; {hint}")

    to_power: ClassVar[Callable[[LanguageModel, float], Any] | None] = None
    """How π0^α is declared; the modeling layer, which stands above this one, says it."""

    def __pow__(self, alpha: float) -> Any:
        """The power prior as a model: π* ∝ π0^α, over whole sequences; see `lmppl.PowerPrior`."""
        if LanguageModel.to_power is None:
            raise ModelError("prior ** alpha: import lmppl, whose PowerPrior this is")
        return LanguageModel.to_power(self, alpha)

    def at_temperature(self, temperature: float) -> LanguageModel:
        """The same LM with each next-token law tempered: p(x_t|c, x_<t)^{1/τ}, normalised; weights are shared.

        Its law over sequences is not π0^{1/τ}: that is the posterior of `prior ** (1 / temperature)`, for which this
        LM is a proposal.

        Parameters
        ----------
        temperature : float
            τ > 0; on top of the temperature that the LM already has.
        """
        from lmppl.lm.derived import TemperedLM

        return TemperedLM(self, temperature)

    def __or__(self, contexts: Any) -> LanguageModel:
        """The same LM for other contexts: one, or a list of them."""
        return self.with_contexts(contexts if isinstance(contexts, list) else [contexts])

    def __repr__(self) -> str:
        shown = repr(self.prompts[0]) if self.num_contexts == 1 else f"{self.num_contexts} contexts"
        return f"{type(self).__name__}({shown}, max_new_tokens={self.max_new_tokens})"


def guard_support(count: int, limit: int) -> None:
    """Raise `SupportTooLarge` where `count` exceeds `limit`."""
    if count > limit:
        raise SupportTooLarge(
            f"enumeration: more than {limit:,} outcomes; lower max_new_tokens or the vocabulary, raise "
            "max_sequences, or use an engine that samples (rejection, importance)"
        )
