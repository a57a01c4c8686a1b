"""A grammar prefix by prefix: which next tokens can still lead to a text of it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lmppl.lm.base import LanguageModel
from lmppl.lm.decoder import Step
from lmppl.modeling.evidence.automaton_tables import MASK
from lmppl.modeling.evidence.languages.grammar_engine import TokenMasks
from lmppl.modeling.evidence.prefix_columns import at_lengths
from lmppl.modeling.evidence.token_bytes import TokenBytes

__all__ = ["GrammarPrefixes", "GrammarRows"]

MASKS_KEPT = 1024  # prefixes whose masks are remembered


class GrammarRows(NamedTuple):
    """B prefixes.

    Parameters
    ----------
    ids : Tensor (B, T), int64
    lengths, context : Tensor (B,), int64
    dead, over : Tensor (B, T+1), bool
        After each number of tokens: no text of the grammar begins so; the row has ended.
    """

    ids: Tensor
    lengths: Tensor
    context: Tensor
    dead: Tensor
    over: Tensor


class GrammarPrefixes:
    """The `Incremental` form of 1[x ∈ grammar]: log ψ(x_≤t) = 0 while a text of the grammar can begin so, else −inf.

    That it also fits before the cap is not asked of a prefix. At the end of a row, by EOS or at the cap, the potential
    is log φ. The masks are llguidance's.

    Parameters
    ----------
    grammar : str
    tokens : TokenBytes
        Of `lm`.
    lm : LanguageModel
        Whose rows end by EOS or the cap alone.
    """

    needs: Collection[Literal["text", "ids", "hidden"]] = frozenset({"ids"})

    def __init__(self, grammar: str, tokens: TokenBytes, lm: LanguageModel) -> None:
        self.lm, self.horizon, self.differs = lm, lm.max_new_tokens, tokens.differs
        self.grammar = grammar
        self.masks = TokenMasks(grammar, tokens)
        ends = torch.zeros(lm.vocab_size, dtype=torch.bool)
        ends[list(lm.eos_ids)] = True
        self.ends = ends
        # Tokens without text, behind others and at the beginning of a text.
        self.mute = [~ends & torch.tensor([not one for one in listed]) for listed in (tokens.inside, tokens.first)]
        self._is_mute, self._is_silent = [one.tolist() for one in self.mute], lm.spelling.silent.tolist()
        self._known: dict[tuple[tuple[int, ...], bool, bool], Tensor] = {}

    def start(self, contexts: Tensor, step: Step | None = None) -> GrammarRows:
        """As `Incremental.start`."""
        batch, cap = len(contexts), self.horizon
        none = torch.zeros(batch, cap + 1, dtype=torch.bool, device=contexts.device)
        rows = GrammarRows(contexts.new_zeros(batch, cap), torch.zeros_like(contexts), contexts, none, none.clone())
        begins = self._increments(rows, torch.arange(batch, device=contexts.device)) > -torch.inf
        rows.dead[:, 0] = ~begins.any(1).to(contexts.device)
        return rows

    def weigh(self, state: GrammarRows, candidates: Tensor | None) -> Tensor:
        """As `Incremental.weigh`: 0 or −inf; −inf for a row that is dead or has ended."""
        going = ~(at_lengths(state.dead, state.lengths) | at_lengths(state.over, state.lengths))
        device = state.ids.device
        rows = torch.nonzero(going & (state.lengths < self.horizon)).squeeze(1)
        if len(rows) == len(going) > 0:
            result = self._increments(state, rows).to(device)
        else:
            result = torch.full((len(going), self.lm.vocab_size), -torch.inf, dtype=MASK, device=device)
            if len(rows):
                result[rows] = self._increments(state, rows).to(device)
        return result if candidates is None else result.gather(1, candidates)

    def advance(self, state: GrammarRows, tokens: Tensor, step: Any = None) -> GrammarRows:
        """As `Incremental.advance`; every row has room for the token."""
        rows = torch.arange(len(tokens), device=tokens.device)
        weight = self.weigh(state, tokens[:, None])[:, 0]
        ids, dead, over = state.ids.clone(), state.dead.clone(), state.over.clone()
        lengths = state.lengths + 1
        ids[rows, state.lengths] = tokens
        dead[rows, lengths] = weight == -torch.inf
        over[rows, lengths] = self.ends.to(tokens.device)[tokens] | at_lengths(state.over, state.lengths)
        return GrammarRows(ids, lengths, state.context, dead, over)

    def potential(self, state: GrammarRows) -> Tensor:
        """As `Incremental.potential`."""
        dead = at_lengths(state.dead, state.lengths)
        return torch.zeros(len(dead), dtype=torch.float64, device=dead.device).masked_fill_(dead, -torch.inf)

    def select(self, state: GrammarRows, index: Tensor) -> GrammarRows:
        """As `Incremental.select`."""
        return GrammarRows(*(column[index] for column in state))

    def crop(self, state: GrammarRows, lengths: Tensor) -> GrammarRows:
        """As `Incremental.crop`."""
        return state._replace(lengths=lengths.to(state.lengths))

    def __repr__(self) -> str:
        return f"GrammarPrefixes({self.grammar[:40]}...)"

    def _increments(self, state: GrammarRows, rows: Tensor) -> Tensor:
        """(R, V) increments of rows that go on."""
        columns = (state.ids[rows], state.lengths[rows], state.context[rows])
        keys = [self._key(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
        fresh = [key for key in dict.fromkeys(keys) if key not in self._known]
        if len(self._known) + len(fresh) > MASKS_KEPT:
            self._known = {}
            fresh = list(dict.fromkeys(keys))
        for last in (False, True):
            some = [key for key in fresh if key[2] == last]
            if some:
                self._known |= zip(some, self._computed(some, last), strict=True)
        return torch.stack([self._known[key] for key in keys])

    def _key(self, ids: list[int], length: int, context: int) -> tuple[tuple[int, ...], bool, bool]:
        """What the mask of a row depends on: its tokens with text, whether its text has begun, whether one is left."""
        begun = not (self.differs and self.lm.begins_text[context])
        prefix = []
        for token in ids[:length]:
            if not self._is_mute[not begun][token]:
                prefix.append(token if begun else token + self.lm.vocab_size)
            begun = begun or not self._is_silent[token]
        return tuple(prefix), begun, length + 1 == self.horizon

    def _computed(self, keys: list[tuple[tuple[int, ...], bool, bool]], last: bool) -> Tensor:
        """(U, V) increments after prefixes, all with one token left, or all with more."""
        vocab = self.lm.vocab_size
        prefixes = [prefix for prefix, _, _ in keys]
        allowed, accepting = self.masks.allowed(prefixes)
        if last:
            allowed = self.masks.completing(prefixes)
        here, mute = allowed[:, :vocab], self.mute[0]
        if self.differs:
            begun = torch.tensor([[one] for _, one, _ in keys])
            here = torch.where(begun, here, allowed[:, vocab:])
            mute = torch.where(begun, self.mute[0], self.mute[1])
        may_stay = accepting if last else torch.ones_like(accepting)
        here = torch.where(self.ends, accepting[:, None], torch.where(mute, may_stay[:, None], here))
        return torch.zeros(here.shape, dtype=MASK).masked_fill_(~here, -torch.inf)
