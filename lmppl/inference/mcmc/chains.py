"""The state of a batch of chains, and the Metropolis–Hastings step that every proposal of new rows ends in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lmppl.errors import ModelError
from lmppl.inference.proposals import check_bounds
from lmppl.lm.base import LanguageModel
from lmppl.lm.randomness import Source
from lmppl.lm.shelf import Pending, Shelf
from lmppl.modeling.target import Target, log_evidence
from lmppl.sequences import Cost, Draws, concatenate

__all__ = [
    "ChainState",
    "Evidence",
    "Kernel",
    "Proposal",
    "StepInfo",
    "Walked",
    "eos_mask",
    "evaluated",
    "log_acceptance",
    "metropolis_hastings",
    "possible_ratio",
    "present_log_prior",
    "replaced",
    "same_outcome",
    "tempered",
]

Evidence = Callable[[Draws], Tensor]
"""(B,) log φ of draws with features and log-factors; by default `log_evidence`, their sum. Splitting uses levels."""


class StepInfo(NamedTuple):
    """What one step did to each of B chains.

    Parameters
    ----------
    kernel : str
        Name of the kernel that stepped.
    accepted : Tensor (B,), bool
        The proposal became the row (it may equal the old one).
    log_acceptance : Tensor (B,)
        Log-probability of that, in nats; nan where nothing was proposed.
    position : Tensor (B,), int64
        Tokens of the row that the proposal left alone, before the first it may have changed; −1 where there was none.
    log_phi : Tensor (B,)
        log φ of the proposed row, in nats; −inf where its evidence was not asked for, nan where nothing was proposed.
    """

    kernel: str
    accepted: Tensor
    log_acceptance: Tensor
    position: Tensor
    log_phi: Tensor


class Walked(NamedTuple):
    """Where a step has taken B chains: their rows, and what it did."""

    draws: Draws
    info: StepInfo


@dataclass(eq=False)
class ChainState:
    """B chains: their rows, and for each LM in use what is known of them. Consumed by being passed to a step.

    Parameters
    ----------
    target : Target
    draws : Draws
        One row a chain, with log π0, raw features and log φ_k; estimates of stochastic factors stay until their row
        goes.
    cost : Cost
        Counter that forwards are added to.
    """

    target: Target
    draws: Draws
    cost: Cost
    shelves: dict[int, tuple[LanguageModel, Shelf]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.draws)

    def shelf(self, lm: LanguageModel) -> Shelf:
        """The chains' rows under `lm`."""
        if id(lm) not in self.shelves:
            self.shelves[id(lm)] = (lm, Shelf(lm, self.draws.context, cost=self.cost))
        return self.shelves[id(lm)][1]

    def caught_up(self, lm: LanguageModel, rows: Tensor, need: Tensor) -> Shelf:
        """The same, with at least the first `need` (M,) tokens of `rows` (M,) known."""
        shelf = self.shelf(lm)
        device = shelf.slot.device
        ids, lengths = self.draws.ids[rows], self.draws.lengths[rows]
        shelf.catch_up(rows.to(device), need.to(device), ids, lengths.to(device))
        return shelf


class Proposal(NamedTuple):
    """New rows for some chains, with everything that their acceptance needs but the evidence.

    Parameters
    ----------
    rows : Tensor (M,), int64
        The chains they are for; the others stay as they are.
    ids, lengths, finished : Tensor (M, T), (M,), (M,)
        The new rows, each an outcome of the prior wherever `log_ratio` > −inf.
    keep : Tensor (M,), int64
        Leading tokens that old and new row have in common for certain.
    log_prior : Tensor (M,)
        log π0 of the new rows.
    log_ratio : Tensor (M,)
        log [π0(new) k(old|new)] − log [π0(old) k(new|old)], k the proposal's density, in nats; −inf refuses.
    pending : tuple of (Shelf, Pending)
        What to adopt where the new row is accepted.
    """

    rows: Tensor
    ids: Tensor
    lengths: Tensor
    finished: Tensor
    keep: Tensor
    log_prior: Tensor
    log_ratio: Tensor
    pending: tuple[tuple[Shelf, Pending], ...] = ()


def log_acceptance(log_ratio: Tensor, log_phi_new: Tensor, log_phi_old: Tensor, power: Tensor | float = 1.0) -> Tensor:
    """(M,) log α = min(0, log_ratio + λ (log φ(new) − log φ(old))), in nats, for the target π0·φ^λ.

    A factor at power 0 is absent: 0·(−inf) = 0. A row with φ = 0 is left for any row with φ > 0, and else kept: it has
    no mass under the target.
    """
    change = tempered(log_phi_new, power) - tempered(log_phi_old, power)
    total = log_ratio.double() + change
    refused = (log_ratio == -torch.inf) | total.isnan()
    return torch.where(refused, -torch.inf, total.clamp_max(0.0))


def tempered(log_phi: Tensor, power: Tensor | float) -> Tensor:
    """λ·log φ with 0·(−inf) = 0."""
    scale = torch.as_tensor(power, dtype=torch.float64, device=log_phi.device)
    return torch.where(scale == 0.0, 0.0, scale * log_phi.double())


def metropolis_hastings(
    kernel: str,
    state: ChainState,
    proposal: Proposal,
    source: Source,
    power: float | Tensor = 1.0,
    evidence: Evidence = log_evidence,
) -> tuple[ChainState, StepInfo]:
    """Accept each new row with probability α and keep the old one otherwise: leaves π0·φ^power invariant.

    Evidence is computed for the new rows only; that of the present ones is kept, so that an unbiased non-negative
    estimate of φ in its place targets its expectation exactly (pseudo-marginal, `andrieu2009`).
    """
    draws, rows = state.draws, proposal.rows
    possible = torch.nonzero(proposal.log_ratio > -torch.inf).squeeze(1)
    new = evaluated(state.target, proposal, possible, draws)
    log_alpha = torch.full((len(rows),), -torch.inf, dtype=torch.float64)
    log_phi = torch.full_like(log_alpha, -torch.inf)
    if len(possible):
        old = evidence(draws.select(rows[possible]))
        scale = power[rows[possible]] if isinstance(power, Tensor) and power.dim() else power
        log_phi[possible] = evidence(new)
        log_alpha[possible] = log_acceptance(proposal.log_ratio[possible], log_phi[possible], old, scale)
    accepted = source.accept(log_alpha)
    place = torch.full((len(rows),), -1)
    place[possible] = torch.arange(len(possible))
    for shelf, pending in proposal.pending:
        shelf.adopt(pending, accepted.to(shelf.slot.device))
    written = tuple(shelf for shelf, _ in proposal.pending)
    state = replaced(state, new, rows[accepted], place[accepted], proposal.keep[accepted], written)
    info = StepInfo(
        kernel,
        _spread(accepted, rows, len(draws), False),
        _spread(log_alpha, rows, len(draws), torch.nan),
        _spread(proposal.keep, rows, len(draws), -1),
        _spread(log_phi, rows, len(draws), torch.nan),
    )
    return state, info


def evaluated(target: Target, proposal: Proposal, possible: Tensor, like: Draws) -> Draws:
    """The new rows `possible` with their evidence, bounds checked."""
    new = Draws(
        proposal.ids[possible],
        proposal.lengths[possible],
        proposal.finished[possible],
        like.context[proposal.rows[possible]],
        like.prompts,
        like.decoder,
        log_prior=proposal.log_prior[possible],
    )
    if len(possible) == 0:
        return new
    new = target.evaluate(new)
    check_bounds(new, target.factors)
    return new


def replaced(
    state: ChainState, new: Draws, rows: Tensor, place: Tensor, keep: Tensor, written: tuple[Shelf, ...] = ()
) -> ChainState:
    """Chains `rows` (M,) have the rows `place` (M,) of `new`; all shelves but those `written` know `keep` tokens."""
    if len(rows) == 0:
        return state
    draws = state.draws
    index = torch.arange(len(draws))
    index[rows] = len(draws) + place
    for _, shelf in state.shelves.values():
        if not any(shelf is w for w in written):
            shelf.forget(rows.to(shelf.slot.device), keep.to(shelf.slot.device))
    whole = concatenate([draws, new], pad_id=state.target.prior.pad_id)
    return replace(state, draws=whole.select(index))


def present_log_prior(state: ChainState, rows: Tensor) -> Tensor:
    """(M,) log π0 of the present rows, in nats."""
    assert state.draws.log_prior is not None  # chains start with it
    return state.draws.log_prior[rows]


def same_outcome(prior: LanguageModel, ids: Tensor, draws: Draws, rows: Tensor) -> Tensor:
    """(M,) bool: new rows end where the old ones do."""
    parsed = prior.parse(ids, draws.context[rows])
    return parsed.lengths.eq(draws.lengths[rows]) & parsed.finished.eq(draws.finished[rows])


def eos_mask(lm: LanguageModel) -> Tensor:
    """(V,) bool: the EOS tokens."""
    mask = torch.zeros(lm.vocab_size, dtype=torch.bool, device=lm.device)
    mask[list(lm.eos_ids)] = True
    return mask


def possible_ratio(ratio: Tensor, log_prior: Tensor) -> Tensor:
    """`ratio` (M,), −inf where the new row is none of the prior's."""
    return torch.where((log_prior > -torch.inf) & ~ratio.isnan(), ratio, -torch.inf)


def _spread(values: Tensor, rows: Tensor, count: int, rest: float) -> Tensor:
    """`values` (M,) of `rows` (M,) among `count` chains, `rest` for the others."""
    whole = torch.full((count,), rest, dtype=values.dtype)
    whole[rows] = values
    return whole


@dataclass(frozen=True)
class Kernel(ABC):
    """A Markov kernel that leaves π0·φ^λ invariant, for a batch of chains; plain configuration only."""

    name: ClassVar[str]
    references: ClassVar[tuple[str, ...]] = ()

    def start(
        self,
        target: Target,
        draws: Draws,
        cost: Cost | None = None,
        *,
        power: float | Tensor = 1.0,
        evidence: Evidence = log_evidence,
        who: str | None = None,
    ) -> ChainState:
        """Chains at `draws` (one row a chain, with log π0; evidence is computed where it is missing).

        `who` is the engine that starts them, for messages; by default the kernel.

        Raises
        ------
        ModelError
            Where a row has π0·φ^power = 0: the chain would not be where its target is.
        """
        self.check(target)
        if draws.log_prior is None:
            draws = replace(draws, log_prior=target.log_prior(draws))
        if {f.name for f in target.factors} != set(draws.log_factors):
            draws = target.evaluate(draws)
        assert draws.log_prior is not None
        log_prior = draws.log_prior.double()
        dead = ~(log_prior + tempered(evidence(draws), power) > -torch.inf)
        if bool(dead.any()):
            row = int(torch.nonzero(dead)[0, 0])
            prompt = draws.prompts[int(draws.context[row])]
            raise ModelError(
                f"{who or self.name}: chain {row} starts at {draws.text[row]!r} (context {prompt!r}), where the target "
                "is 0; start from draws with γ > 0"
            )
        rows = draws.with_columns(log_weight=None, log_q=None, log_prior=log_prior, columns={}, meta={})
        return ChainState(target, rows, target.cost if cost is None else cost)

    @abstractmethod
    def step(
        self,
        state: ChainState,
        source: Source,
        power: float | Tensor = 1.0,
        *,
        evidence: Evidence = log_evidence,
    ) -> tuple[ChainState, StepInfo]:
        """One step of every chain; leaves π0·φ^power invariant, `power` a number or (B,)."""

    def walk(self, state: ChainState, source: Source, num_steps: int) -> Iterator[Walked]:
        """`num_steps` steps of every chain at power 1, in order; the chains end where the last of them says.

        A kernel may let chains go on by themselves, so that what it yields has happened earlier for some.
        """
        for _ in range(num_steps):
            state, info = self.step(state, source)
            yield Walked(state.draws, info)

    def select(self, state: ChainState, index: Tensor) -> ChainState:
        """Chain i becomes a copy of the former chain `index[i]` (B,), of the same context; no cache is copied."""
        for _, shelf in state.shelves.values():
            shelf.select(index)
        return replace(state, draws=state.draws.select(index))

    def coverage(self, target: Target) -> str:
        """What speaks against chains that reach every text with γ > 0; "" where nothing is known against it."""
        return ""

    def check(self, target: Target) -> None:  # noqa: B027 - nothing to check is the common case
        """Raise `ModelError` where the configuration is wrong or does not fit the target."""
