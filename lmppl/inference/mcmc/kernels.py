"""Kernels that let a language model write the rest of a row anew: `Restart` and `SuffixResample`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lmppl.errors import ModelError
from lmppl.inference.approximation import Approximation
from lmppl.inference.coverage import without_reach
from lmppl.inference.mcmc.chains import (
    ChainState,
    Evidence,
    Kernel,
    Proposal,
    StepInfo,
    Walked,
    metropolis_hastings,
)
from lmppl.inference.mcmc.rolling import rolled
from lmppl.inference.proposals import as_proposal
from lmppl.lm.base import LanguageModel
from lmppl.lm.randomness import Source
from lmppl.lm.shelf import Regenerated, Shelf
from lmppl.modeling.target import Target, log_evidence

__all__ = [
    "Regenerating",
    "Restart",
    "Scores",
    "SuffixResample",
    "conditioned_log_ratio",
    "marginalised_log_ratio",
]

IndexLaw = Literal["length", "horizon", "entropy"]
Ratio = Literal["conditioned", "marginalised"]


class Scores(NamedTuple):
    """A batch of rows as an acceptance sees them: tokens and per-token log-probabilities, all (M, T), 0 after the end.

    `log_index` is log p(i|x) of the position i from which the row is regenerated, −inf where that cannot be.
    """

    ids: Tensor
    lengths: Tensor
    log_prior: Tensor
    log_q: Tensor
    log_index: Tensor


def conditioned_log_ratio(old: Scores, new: Scores, keep: Tensor) -> Tensor:
    """(M,) log [π0(new) p(i|new) q(old)] − log [π0(old) p(i|old) q(new)], over the tokens after the first `keep`.

    Given the position i = keep + 1: Δ(log π0 − log q) of each row to its own end, + log p(i|new) − log p(i|old).
    """
    at = keep[:, None]
    part = torch.arange(old.ids.shape[1]) >= at
    gain = torch.where(part, new.log_prior - new.log_q, 0.0).sum(1)
    loss = torch.where(part, old.log_prior - old.log_q, 0.0).sum(1)
    index = new.log_index.gather(1, at) - old.log_index.gather(1, at)
    return gain - loss + index[:, 0]


def marginalised_log_ratio(old: Scores, new: Scores, keep: Tensor) -> Tensor:
    """(M,) as `conditioned_log_ratio`, whatever position the new row came from: Σ_i p(i|x) q(·|x_<i) on both sides.

    The sum runs over the positions up to the first token in which the rows differ.
    """
    same = (old.ids == new.ids).cumprod(1).sum(1)
    shared = torch.minimum(same, torch.minimum(old.lengths, new.lengths) - 1)
    reachable = torch.arange(old.ids.shape[1]) <= shared[:, None]

    def from_each(log_q: Tensor) -> Tensor:
        return log_q.flip(1).cumsum(1).flip(1)

    forward = (old.log_index + from_each(new.log_q)).masked_fill(~reachable, -torch.inf)
    backward = (new.log_index + from_each(old.log_q)).masked_fill(~reachable, -torch.inf)
    change = new.log_prior.sum(1) - old.log_prior.sum(1)
    return change + torch.logsumexp(backward, 1) - torch.logsumexp(forward, 1)


@dataclass(frozen=True)
class Regenerating(Kernel):
    """What kernels share in which q, the prior by default, writes tokens."""

    def lm(self, target: Target) -> LanguageModel:
        """q."""
        given: LanguageModel | Approximation | None = getattr(self, "proposal", None)
        return target.prior if given is None or given is target.prior else as_proposal(given, target.prior)

    def check(self, target: Target) -> None:
        """As `Kernel.check`: the proposal must fit the prior."""
        self.lm(target)

    def coverage(self, target: Target) -> str:
        """As `Kernel.coverage`: of the proposal."""
        return without_reach(self.lm(target), target.prior)

    def suffix(self, state: ChainState, rows: Tensor, keep: Tensor, source: Source) -> Proposal:
        """q writes `rows` (M,) anew after their first `keep` (M,) tokens; the law of `keep` is not in the ratio."""
        return _regenerated(state, self.lm(state.target), rows, keep, source, None)


@dataclass(frozen=True)
class Restart(Regenerating):
    """Independence Metropolis–Hastings: a whole new row from q; α = min(1, φ(x')π0(x')q(x) / φ(x)π0(x)q(x')).

    From the prior with φ ≤ M the distance to π* after n steps is at most (1 − Z/M)^n.

    Parameters
    ----------
    proposal : LanguageModel or Approximation, optional
        q; by default the prior. Where q = 0 and π* > 0 the chain can neither arrive nor leave.

    References
    ----------
    hastings1970, mengersen1996
    """

    proposal: LanguageModel | Approximation | None = field(default=None, repr=False)

    name: ClassVar[str] = "restart"
    references: ClassVar[tuple[str, ...]] = ("hastings1970", "mengersen1996")

    def step(
        self, state: ChainState, source: Source, power: float | Tensor = 1.0, *, evidence: Evidence = log_evidence
    ) -> tuple[ChainState, StepInfo]:
        """As `Kernel.step`."""
        rows = torch.arange(len(state))
        keep = torch.zeros_like(rows)
        proposal = self.suffix(state, rows, keep, source)
        return metropolis_hastings(self.name, state, proposal, source, power, evidence)


@dataclass(frozen=True)
class SuffixResample(Regenerating):
    """q writes the row anew from a random position i; α = min(1, φ'/φ · π0'q/π0 q' · p(i|x')/p(i|x)).

    Rows have different lengths, so the law of i counts. The cap is on the whole row.

    Parameters
    ----------
    index : {"length", "horizon", "entropy"}
        The law of i. "length": uniform on 1..|x|, p(i|x')/p(i|x) = |x|/|x'|. "horizon": uniform on 1..T, the same for
        all chains, and nothing happens to rows with |x| < i: no length term. "entropy": p(i|x) ∝ the entropy of
        q(·|x_<i), where there is something to choose (uniform where there is nothing anywhere).
    proposal : LanguageModel or Approximation, optional
        q; by default the prior.
    ratio : {"conditioned", "marginalised"}
        α given i, or summed over all i from which the new row could have been written; both are exact.
    block : int
        Positions begin blocks of this many tokens: 1, 1 + block, 1 + 2·block, ...

    References
    ----------
    hastings1970, karan2025
    """

    index: IndexLaw = "length"
    proposal: LanguageModel | Approximation | None = field(default=None, repr=False)
    ratio: Ratio = "conditioned"
    block: int = 1

    name: ClassVar[str] = "suffix"
    references: ClassVar[tuple[str, ...]] = ("hastings1970", "karan2025")

    def check(self, target: Target) -> None:
        """As `Kernel.check`."""
        super().check(target)
        for label, value, kind in (("index", self.index, IndexLaw), ("ratio", self.ratio, Ratio)):
            if value not in get_args(kind):
                raise ModelError(f"SuffixResample: got {label}={value!r}, expected one of {get_args(kind)}")
        if type(self.block) is not int or not 1 <= self.block <= target.form.horizon:
            raise ModelError(
                f"SuffixResample: got block={self.block!r}, expected an integer of 1 to max_new_tokens="
                f"{target.form.horizon}"
            )

    def log_index_law(self, lengths: Tensor, horizon: int, entropies: Tensor | None = None) -> Tensor:
        """(M, T) log p(i|x) at column i − 1; −inf where no block begins, or beyond the row's `lengths` (M,).

        `entropies` (M, T) in nats, for index="entropy".
        """
        columns = torch.arange(horizon)
        begins = columns % self.block == 0
        inside = begins & (columns < lengths[:, None])
        if self.index == "horizon":
            uniform = torch.zeros(len(lengths), horizon, dtype=torch.float64) - math.log(int(begins.sum()))
            return uniform.masked_fill(~inside, -torch.inf)
        weight = inside.double()
        if self.index == "entropy":
            assert entropies is not None
            weight = entropies * weight
            weight = torch.where(weight.sum(1, keepdim=True) > 0, weight, inside.double())
        return weight.log() - weight.sum(1, keepdim=True).log()

    def log_ratio(self, old: Scores, new: Scores, keep: Tensor) -> Tensor:
        """(M,) the part of log α that does not depend on the evidence."""
        form = marginalised_log_ratio if self.ratio == "marginalised" else conditioned_log_ratio
        return form(old, new, keep)

    def step(
        self, state: ChainState, source: Source, power: float | Tensor = 1.0, *, evidence: Evidence = log_evidence
    ) -> tuple[ChainState, StepInfo]:
        """As `Kernel.step`."""
        lm, horizon = self.lm(state.target), state.target.form.horizon
        rows, lengths = torch.arange(len(state)), state.draws.lengths
        if self.index == "horizon":
            starts = torch.tensor([-(-horizon // self.block)])
            keep = (source.integers(starts) * self.block).expand(len(rows))
            rows = torch.nonzero(lengths > keep).squeeze(1)
            keep = keep[rows]
        elif self.index == "length":
            keep = source.integers(-(-lengths // self.block)) * self.block
        else:
            shelf = state.caught_up(lm, rows, lengths)
            law = self.log_index_law(lengths, horizon, _entropies(shelf, shelf.slot, lengths))
            keep, _ = source.tokens(law)
        proposal = _regenerated(state, lm, rows, keep, source, self)
        return metropolis_hastings(self.name, state, proposal, source, power, evidence)

    def walk(self, state: ChainState, source: Source, num_steps: int) -> Iterator[Walked]:
        """As `Kernel.walk`; with the index law "length" of the prior's own suffixes, no chain waits for another."""
        lm = self.lm(state.target)
        own = lm is state.target.prior and self.index == "length" and self.ratio == "conditioned"
        if not own or state.shelf(lm).store is None:
            yield from super().walk(state, source, num_steps)
            return
        every = torch.arange(len(state))
        shelf = state.caught_up(lm, every, state.draws.lengths)

        def positions(lengths: Tensor) -> Tensor:
            return source.integers(-(-lengths // self.block)) * self.block

        yield from rolled(self.name, state, shelf, source, num_steps, positions, partial(_own_proposal, kernel=self))


def _entropies(shelf: Shelf, slots: Tensor, lengths: Tensor) -> Tensor:
    return shelf.entropies(slots, lengths.to(slots.device)).cpu()


def _regenerated(
    state: ChainState, lm: LanguageModel, rows: Tensor, keep: Tensor, source: Source, kernel: SuffixResample | None
) -> Proposal:
    """New rows by `lm` after the first `keep` tokens; `kernel` None is a restart, which has no law of positions."""
    draws, prior = state.draws, state.target.prior
    lengths = draws.lengths[rows]
    if len(rows) == 0:
        return Proposal(rows, draws.ids[rows], lengths, draws.finished[rows], keep, keep.double(), keep.double())
    own = lm is prior
    # What the acceptance reads of the old row: nothing but its prefix where q = π0 and positions are known from |x|.
    simple = own and (kernel is None or (kernel.index != "entropy" and kernel.ratio == "conditioned"))
    shelf = state.caught_up(lm, rows, keep if simple else lengths)
    device = shelf.slot.device
    there, kept = rows.to(device), keep.to(device)
    old_q = None if simple else shelf.log_probs(there, lengths.to(device)).cpu()
    old_slots = shelf.slot[there]
    new = shelf.regenerate(there, kept, draws.ids[rows], source)
    if simple:
        return _own_proposal(state, shelf, rows, keep, new, kernel)
    pending = [(shelf, new.pending)]
    new_q = shelf.pending_log_probs(new.pending).cpu()
    if own:
        old_prior, new_prior = old_q, new_q
    else:
        _check_outcomes(state, rows, new)
        ground = state.caught_up(prior, rows, lengths)
        old_prior = ground.log_probs(there.to(ground.slot.device), lengths.to(ground.slot.device)).cpu()
        scored = ground.force(
            rows.to(ground.slot.device), keep.to(ground.slot.device), new.ids, new.lengths.to(ground.slot.device)
        )
        new_prior = ground.pending_log_probs(scored).cpu()
        pending.append((ground, scored))
    ids, new_lengths = new.ids.cpu(), new.lengths.cpu()
    assert old_q is not None
    assert old_prior is not None
    entropies: list[Tensor | None] = [None, None]
    if kernel is not None and kernel.index == "entropy":
        entropies = [_entropies(shelf, old_slots, lengths), _entropies(shelf, new.pending.slots, new_lengths)]
    horizon = state.target.form.horizon
    log_index = [torch.zeros(len(rows), horizon, dtype=torch.float64)] * 2
    if kernel is not None:
        log_index = [
            kernel.log_index_law(n, horizon, e) for n, e in zip((lengths, new_lengths), entropies, strict=True)
        ]
    before = Scores(draws.ids[rows], lengths, old_prior, old_q, log_index[0])
    after = Scores(ids, new_lengths, new_prior, new_q, log_index[1])
    form = conditioned_log_ratio if kernel is None else kernel.log_ratio
    ratio = form(before, after, keep)
    log_prior = new_prior.sum(1)
    ratio = torch.where(log_prior > -torch.inf, ratio, -torch.inf)
    return Proposal(rows, ids, new_lengths, new.finished.cpu(), keep, log_prior, ratio, tuple(pending))


def _own_proposal(
    state: ChainState, shelf: Shelf, rows: Tensor, keep: Tensor, new: Regenerated, kernel: SuffixResample | None
) -> Proposal:
    """What π0 itself has written: its density cancels, and the law of positions, known from |x|, is left."""
    lengths, horizon = new.lengths.cpu(), state.target.form.horizon
    log_prior = shelf.pending_log_probs(new.pending).cpu().sum(1)
    ratio = torch.zeros(len(rows), dtype=torch.float64)
    if kernel is not None:
        both = (state.draws.lengths[rows], lengths)
        laws = [kernel.log_index_law(n, horizon).gather(1, keep[:, None])[:, 0] for n in both]
        ratio = laws[1] - laws[0]
    ratio = torch.where(log_prior > -torch.inf, ratio, -torch.inf)
    return Proposal(rows, new.ids.cpu(), lengths, new.finished.cpu(), keep, log_prior, ratio, ((shelf, new.pending),))


def _check_outcomes(state: ChainState, rows: Tensor, new: Regenerated) -> None:
    """Refuse rows that end where the prior would not: another stop string makes q a law over other outcomes."""
    prior = state.target.prior
    parsed = prior.parse(new.ids.cpu(), state.draws.context[rows])
    wrong = torch.nonzero((parsed.lengths != new.lengths.cpu()) | (parsed.finished != new.finished.cpu()))
    if len(wrong):
        text = parsed.text[int(wrong[0, 0])]
        raise ModelError(
            f"proposal: {text!r} is no outcome of the prior, which would end it elsewhere; give both the same EOS ids "
            "and stop strings"
        )
