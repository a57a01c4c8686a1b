"""BlockResample: a block inside the row is written anew, and what follows it is read again in one forward."""

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
    eos_mask,
    metropolis_hastings,
    possible_ratio,
    present_log_prior,
    same_outcome,
)
from lmppl.inference.mcmc.kernels import Regenerating
from lmppl.lm.base import LanguageModel
from lmppl.lm.randomness import Source
from lmppl.lm.shelf import Pending, Shelf
from lmppl.modeling.target import Target, log_evidence

__all__ = ["BlockResample", "block_log_ratio"]


def block_log_ratio(log_prior_change: Tensor, log_q_new: Tensor, log_q_old: Tensor) -> Tensor:
    """(M,) log [π0(new) k(old|new)] − log [π0(old) k(new|old)] of a block inside a row, in nats.

    Δ log π0 of the whole row, less the change of log q over the block; the length stays, and so does the
    position's law.
    """
    return log_prior_change - (log_q_new - log_q_old)


@dataclass(frozen=True)
class BlockResample(Regenerating):
    """q writes `size` tokens anew from a random position on, and what follows them stays.

    The position i is uniform on 1..|x|. A block inside the row (|x| ≥ i + size) holds no token that ends a row, before
    and after: q is renormalised without them, and the length stays. A block that reaches the row's end is written
    until the row ends; the way back needs the new row to end within the block too, and else the proposal is refused.

    Parameters
    ----------
    size : int
        Tokens of a block.
    proposal : LanguageModel or Approximation, optional
        q; by default the prior.

    References
    ----------
    hastings1970
    """

    size: int = 8
    proposal: LanguageModel | Approximation | None = field(default=None, repr=False)

    name: ClassVar[str] = "block"
    references: ClassVar[tuple[str, ...]] = ("hastings1970",)

    def check(self, target: Target) -> None:
        """As `Kernel.check`."""
        super().check(target)
        if type(self.size) is not int or self.size < 1:
            raise ModelError(f"BlockResample: got size={self.size!r}, expected an integer of at least 1")

    def step(
        self, state: ChainState, source: Source, power: float | Tensor = 1.0, *, evidence: Evidence = log_evidence
    ) -> tuple[ChainState, StepInfo]:
        """As `Kernel.step`."""
        keep = source.integers(state.draws.lengths)
        inside = state.draws.lengths > keep + self.size
        infos = []
        for group in (inside, ~inside):
            rows = torch.nonzero(group).squeeze(1)
            if len(rows):
                write = self._inside if group is inside else self._at_the_end
                proposal = write(state, rows, keep[rows], source)
                state, info = metropolis_hastings(self.name, state, proposal, source, power, evidence)
                infos.append(info)
        if len(infos) == 1:
            return state, infos[0]
        mine = [torch.where(inside, a, b) for a, b in zip(infos[0][1:], infos[1][1:], strict=True)]
        return state, StepInfo(self.name, *mine)

    def _inside(self, state: ChainState, rows: Tensor, keep: Tensor, source: Source) -> Proposal:
        prior, draws = state.target.prior, state.draws
        lm = self.lm(state.target)
        lengths, until = draws.lengths[rows], keep + self.size
        shelf = state.caught_up(lm, rows, until)
        barred = eos_mask(lm)
        old_q = _barred_log_q(shelf, rows, keep, until, draws.ids[rows], barred)
        where = [x.to(shelf.slot.device) for x in (rows, keep, until)]
        new = shelf.regenerate(where[0], where[1], draws.ids[rows], source, until=where[2], barred=barred)
        whole = torch.where(torch.arange(draws.ids.shape[1]) < until[:, None], new.ids.cpu(), draws.ids[rows])
        broken = new.finished.cpu()  # it ended within the block: by a stop string, or for want of another token
        pending: tuple[tuple[Shelf, Pending], ...]
        if lm is prior:
            # The block's last token is the first that is read: it was drawn, not yet read.
            forced = shelf.force(where[0], where[2] - 1, whole, lengths.to(shelf.slot.device), pending=new.pending)
            ground, pending = shelf, ((shelf, forced),)
        else:
            ground = state.caught_up(prior, rows, lengths)
            forced = ground.force(*(x.to(ground.slot.device) for x in (rows, keep, whole, lengths)))
            pending = ((ground, forced),)
        log_prior = ground.pending_log_probs(forced).cpu().sum(1)
        ratio = block_log_ratio(log_prior - present_log_prior(state, rows), new.log_q.cpu().sum(1), old_q)
        ratio = ratio.masked_fill(broken | ~same_outcome(prior, whole, draws, rows), -torch.inf)
        return Proposal(
            rows, whole, lengths, draws.finished[rows], keep, log_prior, possible_ratio(ratio, log_prior), pending
        )

    def _at_the_end(self, state: ChainState, rows: Tensor, keep: Tensor, source: Source) -> Proposal:
        proposal = self.suffix(state, rows, keep, source)
        ratio = proposal.log_ratio + state.draws.lengths[rows].double().log() - proposal.lengths.double().log()
        return proposal._replace(log_ratio=ratio.masked_fill(proposal.lengths > keep + self.size, -torch.inf))


def _barred_log_q(shelf: Shelf, rows: Tensor, keep: Tensor, until: Tensor, ids: Tensor, barred: Tensor) -> Tensor:
    """(M,) log q of the present tokens keep+1..until, q renormalised without the barred tokens."""
    total = torch.zeros(len(rows), dtype=torch.float64)
    for offset in range(int((until - keep).max())):
        at = keep + offset
        logits = shelf.logits(rows.to(shelf.slot.device), at.to(shelf.slot.device)).masked_fill(barred, -torch.inf)
        token = ids.gather(1, at[:, None]).to(logits.device)
        total += torch.log_softmax(logits, -1).gather(1, token)[:, 0].double().cpu()
    return total
