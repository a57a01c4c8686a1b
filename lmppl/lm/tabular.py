"""TabularLM: a language model given by explicit tables, exact at any horizon.

A deterministic machine reads the tokens: state s has next-token log-probabilities `log_table[s]` and moves to
`next_state[s, token]`. Order-k conditionals and dictionaries of prefixes are both such machines. Because the machine is
finite, dynamic programming over it (`Exact`) stays exact at horizons that nobody can enumerate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lmppl.errors import ContextError, ModelError, ShapeError
from lmppl.lm.base import LanguageModel
from lmppl.lm.machine import MachineDecoder
from lmppl.lm.symbols import encode, line_symbols, named_symbols, resolve_eos
from lmppl.sequences import Sequences
from lmppl.storage import hash_tensors

__all__ = ["TabularLM"]

MAX_STATES = 1_000_000
COUNTING_LIMIT = 100_000_000  # state × token × step visits that counting outcomes may take


class TabularLM(LanguageModel):
    """An LM of explicit conditional tables over a small vocabulary.

    Parameters
    ----------
    table : array-like, shape (V+1,) * k + (V,)
        Order-k conditionals p(x_t | x_{t−k}..x_{t−1}): probabilities whose last axis sums to 1. Each history axis has
        one entry a token and, last, one for "before the start". k = 0 is a shape of (V,).
    vocabulary : sequence of str, optional
        The symbols; by default "a", "b", ... with "<eos>" at index `eos`.
    eos : int or str or None
        The symbol that ends a row; None means that every row runs to the cap.
    max_new_tokens : int
        The cap T.
    context : str, sequence of symbols, or a list of these
        What comes before: strings are read symbol by symbol (greedily, longest first). The empty string is the start.

    Raises
    ------
    ShapeError, ModelError
        Where the table has the wrong shape, is negative, or its rows do not sum to 1 (within 1e-6).
    ContextError
        Where a context holds something that is no symbol.

    Examples
    --------
    >>> after = [[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0, 0, 1], [0.6, 0.4, 0]]  # a, b, <eos>, the start
    >>> lm = TabularLM(after, ["a", "b", "<eos>"], max_new_tokens=4)
    >>> float(lm.enumerate_sequences().log_prior.exp().sum())
    1.0
    """

    def __init__(
        self,
        table: Any,
        vocabulary: Sequence[str] | None = None,
        *,
        eos: int | str | None = -1,
        max_new_tokens: int,
        context: Any = "",
    ) -> None:
        probs = torch.as_tensor(table, dtype=torch.float64)
        size = probs.shape[-1] if probs.dim() else 0
        order = probs.dim() - 1
        if size == 0 or probs.shape[:-1] != (size + 1,) * order:
            raise ShapeError(
                f"TabularLM: got a table of shape {tuple(probs.shape)}, expected (V+1,) * k + (V,): each history axis "
                "has one entry a symbol and a last one for 'before the start'"
            )
        _check_conditionals(probs)
        self.order = order
        self._prefixes: dict[int, tuple[int, ...]] | None = None
        states = torch.arange((size + 1) ** order)
        following = (states[:, None] * (size + 1) + torch.arange(size)) % max(1, (size + 1) ** order)
        start = (size + 1) ** order - 1  # every digit of the history is "before the start"
        self._setup(probs.reshape(-1, size).log(), following, start, vocabulary, eos, max_new_tokens, context)

    def _setup(
        self,
        log_table: Tensor,
        next_state: Tensor,
        start: int,
        vocabulary: Sequence[str] | None,
        eos: int | str | None,
        max_new_tokens: int,
        context: Any,
    ) -> None:
        size = log_table.shape[1]
        self.log_table, self.next_state, self.start = log_table, next_state, start
        self.eos_index = eos_index = resolve_eos(eos, vocabulary, size)
        self.vocabulary = named_symbols(vocabulary, eos_index, size)
        contexts = context if isinstance(context, list) else [context]
        rows = [encode(c, self.vocabulary) for c in contexts]
        super().__init__(
            ["".join(self.vocabulary[t] for t in row) for row in rows],
            vocab_size=size,
            max_new_tokens=max_new_tokens,
            eos_ids=[] if eos_index is None else [eos_index],
            pad_id=0 if eos_index is None else eos_index,
        )
        self.initial = torch.tensor([self._walk(row) for row in rows])
        self._check_reach()

    # Other ways to make one.

    @classmethod
    def from_prefixes(
        cls,
        prefixes: Mapping[Any, Sequence[float]],
        vocabulary: Sequence[str] | None = None,
        *,
        eos: int | str | None = -1,
        max_new_tokens: int,
        context: Any = "",
    ) -> TabularLM:
        """From a dictionary: prefix (a tuple of token ids or of symbols, or a string of symbols) → probabilities (V,).

        Every prefix that can be reached with positive probability below the cap must be there.

        Raises
        ------
        ModelError
            Naming the first reachable prefix that is missing.
        """
        if not prefixes:
            raise ModelError("TabularLM.from_prefixes: got no prefixes, expected at least the empty one, ()")
        size = len(next(iter(prefixes.values())))
        eos_index = resolve_eos(eos, vocabulary, size)
        symbols = named_symbols(vocabulary, eos_index, size)
        index: dict[tuple[int, ...], int] = {}
        for key, conditional in prefixes.items():
            row = tuple(encode(key, symbols))
            if len(conditional) != size:
                raise ShapeError(f"TabularLM.from_prefixes: {key!r} has {len(conditional)} entries, expected {size}")
            if row in index:
                raise ModelError(f"TabularLM.from_prefixes: prefix {key!r} is there twice")
            index[row] = len(index)
        if () not in index:
            raise ModelError("TabularLM.from_prefixes: the empty prefix () has no entry")
        probs = torch.tensor([list(p) for p in prefixes.values()], dtype=torch.float64)
        _check_conditionals(probs)
        dead = len(index)
        following = torch.full((dead + 1, size), dead)
        for row, i in index.items():
            for token in range(size):
                following[i, token] = index.get((*row, token), dead)
        # Prefixes without an entry have no probability; a proper conditional there keeps log 0 + log p from being nan.
        log_table = torch.cat([probs, torch.full((1, size), 1 / size, dtype=torch.float64)]).log()
        self = cls.__new__(cls)
        self.order = max(len(r) for r in index)
        self._prefixes = {i: row for row, i in index.items()}
        self._setup(log_table, following, index[()], symbols, eos_index, max_new_tokens, context)
        return self

    @classmethod
    def random(
        cls,
        vocab_size: int,
        max_new_tokens: int,
        *,
        order: int = 1,
        seed: int = 0,
        concentration: float = 1.0,
        eos: int | str | None = -1,
        context: Any = "",
    ) -> TabularLM:
        """From a seed: each conditional is a symmetric Dirichlet(`concentration`) draw."""
        generator = torch.Generator().manual_seed(seed)
        shape = (vocab_size + 1,) * order + (vocab_size,)
        alpha = torch.full(shape, concentration, dtype=torch.float64)
        gammas = torch._standard_gamma(alpha, generator=generator)
        return cls(gammas / gammas.sum(-1, keepdim=True), eos=eos, max_new_tokens=max_new_tokens, context=context)

    @classmethod
    def from_counts(
        cls,
        text: str | Sequence[str],
        *,
        order: int = 1,
        smoothing: float = 0.0,
        level: Literal["character", "word"] = "character",
        max_new_tokens: int,
        context: Any = "",
    ) -> TabularLM:
        """From the n-gram counts of a text; each line is one document, ended by "<eos>".

        p(x_t|history) = (count + `smoothing`) / (Σ count + V·`smoothing`); a history that never occurs is uniform.
        """
        lines = text.splitlines() if isinstance(text, str) else list(text)
        documents = [line_symbols(line, level) for line in lines if line]
        if not documents:
            raise ModelError("TabularLM.from_counts: got an empty text")
        vocabulary = [*sorted({s for d in documents for s in d}), "<eos>"]
        size = len(vocabulary)
        if (size + 1) ** order > MAX_STATES:
            raise ModelError(
                f"TabularLM.from_counts: {size + 1}^{order} histories exceed {MAX_STATES:,}; lower the order"
            )
        code = {s: i for i, s in enumerate(vocabulary)}
        counts = torch.full((size + 1,) * order + (size,), smoothing, dtype=torch.float64)
        for document in documents:
            ids = [size] * order + [code[s] for s in document] + [size - 1]
            for t in range(order, len(ids)):
                counts[tuple(ids[t - order : t + 1])] += 1
        totals = counts.sum(-1, keepdim=True)
        probs = torch.where(totals > 0, counts / totals.clamp_min(1e-300), 1.0 / size)
        return cls(probs, vocabulary, max_new_tokens=max_new_tokens, context=context)

    # The contract.

    @property
    def dtype(self) -> torch.dtype:
        """float64: a table costs nothing more."""
        return torch.float64

    @property
    def context_lengths(self) -> Tensor:
        """(C,) ones: to start a row is one look-up."""
        return torch.ones(self.num_contexts, dtype=torch.int64)

    def decoder(self) -> MachineDecoder:
        """As `LanguageModel.decoder`."""
        return MachineDecoder(self.initial, self._advance, self._scores)

    def _advance(self, states: Tensor, tokens: Tensor) -> Tensor:
        return self.next_state[states, tokens]

    def _scores(self, states: Tensor) -> Tensor:
        return self.log_table[states]

    def decode(self, sequences: Sequences) -> list[str]:
        """Symbols joined, EOS left out."""
        skip = self.eos_index
        return ["".join(self.vocabulary[t] for t in row if t != skip) for row in sequences.token_lists()]

    def with_contexts(self, contexts: Sequence[Any]) -> TabularLM:
        """The same tables for other contexts."""
        other = TabularLM.__new__(TabularLM)
        other.order, other._prefixes = self.order, self._prefixes
        eos, cap = self.eos_index, self.max_new_tokens
        other._setup(self.log_table, self.next_state, self.start, self.vocabulary, eos, cap, list(contexts))
        return other

    def with_max_new_tokens(self, max_new_tokens: int) -> TabularLM:
        """As `LanguageModel.with_max_new_tokens`; prefixes that it reaches then need entries."""
        other = TabularLM.__new__(TabularLM)
        other.__dict__.update({k: v for k, v in self.__dict__.items() if k != "_batch_shape"})
        LanguageModel.__init__(
            other,
            self.prompts,
            vocab_size=self.vocab_size,
            max_new_tokens=max_new_tokens,
            eos_ids=self.eos_ids,
            pad_id=self.pad_id,
        )
        other._check_reach()
        return other

    def encode(self, text: str, context: int = 0) -> list[int] | None:
        """The symbols of a completion's text, the longest first; None where it is no row of symbols."""
        try:
            return encode(text, self.vocabulary)
        except ContextError:
            return None

    def max_outcomes(self) -> float:
        """The number of outcomes of positive probability, for the context that has most.

        Counted backwards over the machine; the bound of `LanguageModel.max_outcomes` where counting would take longer
        than enumerating.
        """
        states, size = self.log_table.shape
        if states * size * self.max_new_tokens > COUNTING_LIMIT:
            return super().max_outcomes()
        possible = (self.log_table > -torch.inf).double()
        ends = torch.zeros(size, dtype=torch.float64)
        ends[list(self.eos_ids)] = 1.0
        counts = possible.sum(1)
        for _ in range(self.max_new_tokens - 1):
            counts = (possible * torch.where(ends > 0, 1.0, counts[self.next_state])).sum(1)
        return float(counts[self.initial].max())

    @property
    def fingerprint(self) -> str:
        """As `LanguageModel.fingerprint`."""
        names = ("log_table", "next_state", "initial")
        tables = hash_tensors({name: getattr(self, name) for name in names})
        options = (self.vocabulary, self.eos_index, self.max_new_tokens, self.prompts)
        return hashlib.sha256(repr((tables, options)).encode()).hexdigest()[:16]

    def bytes_per_row(self, num_tokens: int) -> int:
        """As `LanguageModel.bytes_per_row`."""
        return 8 * (2 * num_tokens + 6 * max(self.vocab_size, 256))

    def _walk(self, row: Sequence[int]) -> int:
        state = self.start
        for token in row:
            state = int(self.next_state[state, token])
        return state

    def _check_reach(self) -> None:
        """Every prefix that a context can be continued to, below the cap, must have an entry."""
        if self._prefixes is None:
            return
        for prompt, start in zip(self.prompts, self.initial.tolist(), strict=True):
            if start not in self._prefixes:
                raise ContextError(f"TabularLM.from_prefixes: the context {prompt!r} has no entry")
            frontier = [start]
            for _ in range(self.max_new_tokens - 1):
                frontier = [new for state in frontier for new in self._successors(state)]

    def _successors(self, state: int) -> list[int]:
        assert self._prefixes is not None
        found = []
        for token in range(self.vocab_size):
            if token == self.eos_index or self.log_table[state, token] == -torch.inf:
                continue
            new = int(self.next_state[state, token])
            if new not in self._prefixes:
                prefix = tuple(self.vocabulary[t] for t in (*self._prefixes[state], token))
                raise ModelError(f"TabularLM.from_prefixes: prefix {prefix} can be reached but has no entry")
            found.append(new)
        return found


def _check_conditionals(probs: Tensor) -> None:
    if not bool((probs >= 0).all()):
        raise ModelError("TabularLM: got negative or nan probabilities")
    off = (probs.sum(-1) - 1).abs()
    if float(off.max()) > 1e-6:
        worst = tuple(int(i) for i in torch.unravel_index(off.argmax(), off.shape)) if off.dim() else ()
        raise ModelError(f"TabularLM: conditional {worst} sums to {float(probs.sum(-1)[worst]):.6f}, expected 1")
