"""Step proposals: how sequential Monte Carlo draws the next token of each live row, and weights it.

A step proposal gives tokens v with *properly weighted* increments W (`naesseth2019`): for every function f,

    E[W f(v)] = Σ_v π0(v|x_<t) e^{weigh(v)} f(v),    weigh(v) = log ψ(x_<t v) − log ψ(x_<t),

given what was drawn before. For a q with a density, W = π0(v|x_<t) e^{weigh(v)} / q(v); a proposal without one, such as
adaptive weighted rejection, gives an unbiased random W. Z stays unbiased for either, as long as q covers π0 e^{weigh}.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from lmppl.errors import FactorError, ModelError
from lmppl.lm.base import LanguageModel
from lmppl.lm.frontier import Frontier
from lmppl.lm.randomness import Source
from lmppl.modeling.target import Target

__all__ = [
    "DensitySampler",
    "LanguageModelProposal",
    "OptimalProposal",
    "PriorProposal",
    "Proposed",
    "StepProposal",
    "StepRows",
    "StepSampler",
]


class Proposed(NamedTuple):
    """One next token for each of L rows.

    Parameters
    ----------
    tokens : Tensor (L,), int64
    log_increment : Tensor (L,)
        log W, properly weighted for π0 e^{weigh}; −inf is a weight like any other, +inf and nan are errors.
    log_prior : Tensor (L,)
        log π0(v|x_<t) of the tokens, in nats.
    weigh : Tensor (L,)
        log ψ(x_≤t) − log ψ(x_<t) of the tokens; 0 without a twist.
    """

    tokens: Tensor
    log_increment: Tensor
    log_prior: Tensor
    weigh: Tensor


class StepRows:
    """The L rows that are to be given a token: what a proposal may look at.

    Parameters
    ----------
    frontier : Frontier
        The prior's; `frontier.live` (L,) are these rows, `frontier.ids` and `frontier.lengths` their tokens so far.
    weigh : callable or None
        As `weigh`, with `rows` left out or not; None without a twist.
    given : Tensor (L,), int64, or None
        Conditional SMC: the token that a retained row must take, −1 where the row is free. None: all rows are free.
    """

    def __init__(
        self, frontier: Frontier, weigh: Callable[..., Tensor] | None = None, given: Tensor | None = None
    ) -> None:
        self.frontier = frontier
        self.given = given
        self._weigh = weigh

    def __len__(self) -> int:
        return len(self.frontier.live)

    @property
    def twisted(self) -> bool:
        """Whether there is a twist; without one `weigh` is 0."""
        return self._weigh is not None

    @cached_property
    def logits(self) -> Tensor:
        """(L, V) unnormalised log π0 of the next token."""
        return self.frontier.logits()

    @cached_property
    def log_prior(self) -> Tensor:
        """(L, V) log π0(v|x_<t), in nats."""
        return torch.log_softmax(self.logits, -1)

    def weigh(self, candidates: Tensor | None, rows: Tensor | None = None) -> Tensor:
        """log ψ(x_<t v) − log ψ(x_<t): (L, k) for candidates (L, k), (L, V) for None.

        With `rows` (M,), positions among the L rows: (M, k) for their candidates (M, k); the others are not looked at.

        Raises
        ------
        FactorError
            On nan or +inf.
        """
        expected = (
            len(self) if rows is None else len(rows),
            self.frontier.lm.vocab_size if candidates is None else candidates.shape[1],
        )
        if self._weigh is None:
            return torch.zeros(expected, dtype=self.frontier.lm.dtype, device=self.frontier.ids.device)
        values = self._weigh(candidates) if rows is None else self._weigh(candidates, rows)
        if tuple(values.shape) != expected:
            raise FactorError(f"twist: weigh has shape {tuple(values.shape)}, expected {expected}")
        if not bool((values < torch.inf).all()):  # false for nan too
            row, column = torch.nonzero(~(values < torch.inf))[0].tolist()
            token, value = column if candidates is None else int(candidates[row, column]), float(values[row, column])
            row = row if rows is None else int(rows[row])
            text = self.frontier.sequences().select([int(self.frontier.live[row])]).text[0]
            raise FactorError(
                f"twist: weigh is {value} for token {token} after the text {text!r}, expected a "
                "finite number of nats or −inf"
            )
        return values


class StepSampler(Protocol):
    """A step proposal at work on one sweep; state of its own keeps step with the frontier's rows."""

    def propose(self, rows: StepRows, source: Source) -> Proposed:
        """A token for each row; rows with a given token (`rows.given` ≥ 0) take it.

        For those, W is drawn from its law given that the token was drawn; a proposal that cannot do that refuses given
        tokens with `UnsupportedModel`.
        """
        ...

    def append(self, tokens: Tensor) -> None:
        """The live rows were given these tokens (L,); called before rows that end leave `frontier.live`."""
        ...

    def select(self, index: Tensor) -> None:
        """Row i of the frontier is now the former row `index[i]` (B,)."""
        ...

    def resume(self) -> None:
        """All rows that have not ended are live again, of different lengths, after some have waited at a boundary."""
        ...


@runtime_checkable
class StepProposal(Protocol):
    """How next tokens are proposed: plain configuration, as an engine is."""

    def start(self, target: Target, frontier: Frontier) -> StepSampler:
        """A sampler for the rows of `frontier`, all of them empty completions."""
        ...


class _Stateless:
    """A sampler that keeps nothing from token to token."""

    def append(self, tokens: Tensor) -> None:
        pass

    def select(self, index: Tensor) -> None:
        pass

    def resume(self) -> None:
        pass


class DensitySampler(_Stateless, ABC):
    """A sampler whose q has next-token scores: W = π0 e^{weigh} / q. Subclasses give `scores`."""

    @abstractmethod
    def scores(self, rows: StepRows) -> Tensor:
        """(L, V) unnormalised log q; a row that is all −inf has no token to give, and draws from π0 with W = 0."""

    def propose(self, rows: StepRows, source: Source) -> Proposed:
        scores = self.scores(rows)
        log_total = torch.logsumexp(scores.double(), -1)
        stuck = log_total == -torch.inf
        if bool(stuck.any()):
            scores = torch.where(stuck[:, None], rows.logits.to(scores.dtype), scores)
            log_total = torch.where(stuck, torch.logsumexp(rows.logits.double(), -1), log_total)
        tokens = draw_free(scores, rows.given, source)
        at = tokens[:, None]
        log_q = scores.gather(1, at)[:, 0].double() - log_total
        log_prior = rows.log_prior.gather(1, at)[:, 0].double()
        weigh = rows.weigh(at)[:, 0].double()
        increment = log_prior + weigh - log_q
        if bool(stuck.any()):
            weigh, increment = (x.masked_fill(stuck, -torch.inf) for x in (weigh, increment))
        check_given(rows, log_q, increment)
        return Proposed(tokens, increment, log_prior, weigh)


def draw_free(scores: Tensor, given: Tensor | None, source: Source) -> Tensor:
    """(L,) tokens of softmax(scores) for the free rows, and the given ones for the others."""
    if given is None:
        return source.tokens(scores)[0]
    tokens = given.clone()
    free = torch.nonzero(given < 0).squeeze(1)
    if len(free):
        tokens[free] = source.tokens(scores[free])[0]
    return tokens


def check_given(rows: StepRows, log_q: Tensor, increment: Tensor) -> None:
    """Refuse a retained token that q cannot draw: its weight would be infinite."""
    if rows.given is None:
        return
    bad = (rows.given >= 0) & (log_q == -torch.inf) & ~(increment == -torch.inf)
    if bool(bad.any()):
        row = int(torch.nonzero(bad)[0, 0])
        text = rows.frontier.sequences().select([int(rows.frontier.live[row])]).text[0]
        raise ModelError(
            f"proposal: q = 0 for the token {int(rows.given[row])} after the text {text!r}, which π* can continue so: "
            "the weight γ/q is infinite there, because the proposal does not cover π*; mix it with the prior, or "
            "propose from the prior"
        )


class PriorProposal:
    """q = π0, the bootstrap proposal (`gordon1993`): W = e^{weigh(v)}; the twist looks at the drawn tokens alone."""

    def start(self, target: Target, frontier: Frontier) -> StepSampler:
        """As `StepProposal.start`."""
        return _PriorSampler()

    def __repr__(self) -> str:
        return "PriorProposal()"


class _PriorSampler(_Stateless):
    def propose(self, rows: StepRows, source: Source) -> Proposed:
        if rows.given is None:
            tokens, log_prior = source.tokens(rows.logits)
            log_prior = log_prior.double()
        else:
            tokens = draw_free(rows.logits, rows.given, source)
            log_prior = rows.log_prior.gather(1, tokens[:, None])[:, 0].double()
        if not rows.twisted:
            none = torch.zeros_like(log_prior)
            return Proposed(tokens, none, log_prior, none)
        weigh = rows.weigh(tokens[:, None])[:, 0].double()
        return Proposed(tokens, weigh, log_prior, weigh)


class OptimalProposal:
    """q(v) ∝ π0(v|x_<t) e^{weigh(v)}, the locally optimal proposal: W = Σ_v π0(v|x_<t) e^{weigh(v)}, whatever v.

    The twist weighs all V next tokens of each row (`doucet2000`). Where the twist is the exact soft value, W = 1.
    """

    def start(self, target: Target, frontier: Frontier) -> StepSampler:
        """As `StepProposal.start`."""
        return _OptimalSampler()

    def __repr__(self) -> str:
        return "OptimalProposal()"


class _OptimalSampler(_Stateless):
    def propose(self, rows: StepRows, source: Source) -> Proposed:
        every = rows.weigh(None)
        scores = rows.logits + every.to(rows.logits.dtype)
        log_base = torch.logsumexp(rows.logits, -1).double()
        stuck = scores.amax(-1) == -torch.inf
        any_stuck = bool(stuck.any())
        if any_stuck:
            scores = torch.where(stuck[:, None], rows.logits, scores)
        if rows.given is None:
            tokens, log_q = source.tokens(scores)
            log_total = scores.gather(1, tokens[:, None])[:, 0].double() - log_q.double()
        else:
            tokens = draw_free(scores, rows.given, source)
            log_total = torch.logsumexp(scores, -1).double()
        at = tokens[:, None]
        log_prior = rows.logits.gather(1, at)[:, 0].double() - log_base
        weigh = every.gather(1, at)[:, 0].double()
        increment = log_total - log_base
        if any_stuck:
            weigh, increment = (x.masked_fill(stuck, -torch.inf) for x in (weigh, increment))
        return Proposed(tokens, increment, log_prior, weigh)


class LanguageModelProposal:
    """q is another language model on the prior's tokens: a policy, a guided law, an exact table.

    It keeps a frontier of its own, whose rows are selected in step with the prior's; it need not end rows where the
    prior does, since only its next-token law is used.

    Parameters
    ----------
    lm : LanguageModel
        As from `lmppl.inference.proposals.as_proposal`.
    """

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm

    def start(self, target: Target, frontier: Frontier) -> StepSampler:
        """As `StepProposal.start`."""
        return _LanguageModelSampler(Frontier(self.lm, frontier.context, cost=target.cost), frontier)

    def __repr__(self) -> str:
        return f"LanguageModelProposal({self.lm!r})"


class _LanguageModelSampler(DensitySampler):
    def __init__(self, own: Frontier, prior: Frontier) -> None:
        self.own, self.prior = own, prior

    def scores(self, rows: StepRows) -> Tensor:
        own = self.own
        if len(own.live) != len(self.prior.live) or not own.live.equal(self.prior.live.to(own.live.device)):
            own.live = self.prior.live.to(own.ids.device)  # the prior says which rows go on
        return own.logits().to(rows.logits.device)

    def append(self, tokens: Tensor) -> None:
        self.own.append(tokens.to(self.own.ids.device))

    def select(self, index: Tensor) -> None:
        self.own.select(index)

    def resume(self) -> None:
        self.own.resume(self.prior.live.to(self.own.ids.device))
