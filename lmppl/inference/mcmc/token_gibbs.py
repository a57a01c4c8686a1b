"""TokenGibbs: one token of the row from its exact conditional over candidates; what follows it is read again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lmppl.errors import ModelError
from lmppl.inference.approximation import Approximation
from lmppl.inference.mcmc.chains import (
    ChainState,
    Evidence,
    Proposal,
    StepInfo,
    evaluated,
    present_log_prior,
    replaced,
    tempered,
)
from lmppl.inference.mcmc.kernels import Regenerating
from lmppl.lm.base import LanguageModel
from lmppl.lm.decoding import plan_rows
from lmppl.lm.randomness import Source
from lmppl.lm.shelf import Shelf
from lmppl.modeling.target import Target, log_evidence

__all__ = ["TokenGibbs"]


@dataclass(frozen=True)
class TokenGibbs(Regenerating):
    """One token of the row is drawn from its exact conditional under π*, over a set of candidates.

    The position is uniform on 1..|x|, which no candidate changes: a candidate must leave the row an outcome of its
    length, so that EOS competes at the last position only, and at the cap with all tokens. The set depends on what
    stands before the position, never on the token there; a row whose token is not among the candidates stays.

    Parameters
    ----------
    num_candidates : int, optional
        The tokens that q gives most to, after what stands before. None: all tokens.
    candidates : tuple of int, optional
        These tokens instead, at every position.
    proposal : LanguageModel or Approximation, optional
        q; by default the prior.

    References
    ----------
    geman1984
    """

    num_candidates: int | None = 16
    candidates: tuple[int, ...] | None = None
    proposal: LanguageModel | Approximation | None = field(default=None, repr=False)

    name: ClassVar[str] = "token_gibbs"
    references: ClassVar[tuple[str, ...]] = ("geman1984",)

    def check(self, target: Target) -> None:
        """As `Kernel.check`."""
        super().check(target)
        vocab = target.form.vocab_size
        tokens, count = self.candidates, self.num_candidates
        if tokens is None:
            if count is not None and (type(count) is not int or count < 2):
                raise ModelError(f"TokenGibbs: got num_candidates={count!r}, expected at least 2, an integer, or None")
            return
        ids = isinstance(tokens, tuple | list) and all(type(t) is int and 0 <= t < vocab for t in tokens)
        if not ids or len(tokens) < 2 or len(set(tokens)) != len(tokens):
            raise ModelError(
                f"TokenGibbs: got candidates={tokens!r}, expected at least 2 different ids of 0 to {vocab - 1}"
            )

    def candidate_set(self, logits: Tensor) -> Tensor:
        """(B, k) candidates where q says `logits` (B, V)."""
        if self.candidates is not None:
            return torch.tensor(self.candidates, device=logits.device).expand(len(logits), -1)
        size = logits.shape[1] if self.num_candidates is None else min(self.num_candidates, logits.shape[1])
        return logits.topk(size).indices

    def step(
        self, state: ChainState, source: Source, power: float | Tensor = 1.0, *, evidence: Evidence = log_evidence
    ) -> tuple[ChainState, StepInfo]:
        """As `Kernel.step`."""
        prior, draws = state.target.prior, state.draws
        rows, lengths = torch.arange(len(draws)), draws.lengths
        keep = source.integers(lengths)
        shelf = state.caught_up(self.lm(state.target), rows, keep)
        tokens = self.candidate_set(shelf.logits(*(x.to(shelf.slot.device) for x in (rows, keep)))).cpu()
        present = draws.ids.gather(1, keep[:, None])
        member = (tokens == present).any(1)
        # The others compete with the present token, whose score and evidence are known.
        row, column = torch.nonzero((tokens != present) & member[:, None], as_tuple=True)
        ids = draws.ids[row]
        ids[torch.arange(len(row)), keep[row]] = tokens[row, column]
        parsed = prior.parse(ids, draws.context[row])
        whole = parsed.lengths.eq(lengths[row]) & (parsed.finished | lengths[row].eq(prior.max_new_tokens))
        row, column, ids, finished = row[whole], column[whole], ids[whole], parsed.finished[whole]
        ground = state.caught_up(prior, rows, lengths)
        change = self._tail_changes(ground, row, keep, ids, lengths)
        log_prior = present_log_prior(state, row) + change
        offers = Proposal(row, ids, lengths[row], finished, keep[row], log_prior, change)
        possible = torch.nonzero(log_prior > -torch.inf).squeeze(1)
        new = evaluated(state.target, offers, possible, draws)
        scale = torch.as_tensor(power, dtype=torch.float64).expand(len(draws))
        logits = torch.full(tokens.shape, -torch.inf, dtype=torch.float64)
        if len(possible):
            at = row[possible]
            logits[at, column[possible]] = change[possible] + tempered(evidence(new), scale[at])
        own = torch.nonzero(tokens == present)
        logits[own[:, 0], own[:, 1]] = tempered(evidence(draws), scale)[own[:, 0]]
        movable = torch.nonzero(member & (logits > -torch.inf).any(1)).squeeze(1)
        chosen, _ = source.tokens(logits[movable])
        place = torch.full(tokens.shape, -1)
        place[row[possible], column[possible]] = torch.arange(len(possible))
        picked = place[movable, chosen]
        moved = picked >= 0
        state = replaced(state, new, movable[moved], picked[moved], keep[movable[moved]])
        return state, self._info(len(draws), movable, keep)

    def _tail_changes(self, shelf: Shelf, row: Tensor, keep: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
        """(M,) log π0 of the candidates' rows less that of their present rows."""
        if len(row) == 0:
            return torch.zeros(0, dtype=torch.float64)
        device = shelf.slot.device
        parts = []
        for chunk in torch.arange(len(row)).split(plan_rows(shelf.lm, len(row))):
            r = row[chunk]
            parts.append(shelf.score_tails(*(x.to(device) for x in (r, keep[r], ids[chunk], lengths[r]))).cpu())
        every = torch.arange(len(keep))
        log_probs = shelf.log_probs(every.to(device), lengths.to(device)).cpu()
        present = torch.where(torch.arange(log_probs.shape[1]) >= keep[:, None], log_probs, 0.0).sum(1)
        return torch.cat(parts) - present[row]

    def _info(self, count: int, movable: Tensor, keep: Tensor) -> StepInfo:
        accepted = torch.zeros(count, dtype=torch.bool)
        accepted[movable] = True
        chance = torch.full((count,), torch.nan, dtype=torch.float64)
        chance[movable] = 0.0
        return StepInfo(
            self.name, accepted, chance, torch.where(accepted, keep, -1), torch.full_like(chance, torch.nan)
        )
