"""Adaptive weighted rejection sampling: one allowed token and an unbiased estimate of the allowed mass, in few checks.

For a hard constraint that is costly to check, the next token is drawn from π0(·|x_<t) until one is allowed, so that the
constraint is asked about a few tokens and not about all V of them. The token then has the law π0 restricted to the
allowed ones, and its proper weight is their mass p, which nobody has computed: an unbiased, non-negative estimate Ŵ
takes its place. What makes a weighted token proper is one identity,

    E[Ŵ · 1[x = v]] = π0(v) · 1[v allowed]   for every v.

Source: `lipkin2025`; the estimate of the adaptive variant is that of `desraj1956` for sampling without replacement.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lmppl.errors import ModelError, ShapeError, UnsupportedModel
from lmppl.inference.step_proposals import Proposed, StepRows, StepSampler
from lmppl.lm.frontier import Frontier
from lmppl.lm.randomness import Source
from lmppl.modeling.target import Target

__all__ = ["AWRS", "Allowed", "WeightedTokens", "awrs"]

Allowed = Callable[[Tensor, Tensor], Tensor]


class WeightedTokens(NamedTuple):
    """Properly weighted tokens of B rows: E[exp(`log_weights`) · 1[tokens = v]] = π0(v) · 1[v allowed].

    Parameters
    ----------
    tokens : Tensor (B,), int64
        Allowed where the weight is positive.
    log_weights : Tensor (B,), float64
        log Ŵ, an estimate of the allowed mass, in nats; −inf where no allowed token was found.
    checks : Tensor (B,), int64
        Tokens that the constraint was asked about.
    """

    tokens: Tensor
    log_weights: Tensor
    checks: Tensor


def awrs(
    log_probs: Tensor,
    allowed: Allowed,
    source: Source,
    *,
    max_checks: int | None = None,
    extra: int = 1,
    replacement: bool = False,
) -> WeightedTokens:
    """Draw one allowed token a row with an unbiased estimate of the allowed mass.

    **Without replacement** (adaptive; the default). A rejected token is never drawn again. Let x be the first allowed
    token, m the mass of the rejected ones, y the next draw, x left out too. Then
    Ŵ = π0(x) + 1[y allowed]·(1 − m − π0(x)), whose mean given x and the rejected tokens is the allowed mass p. It lies
    in [π0(x), 1 − m], so that no row dies where anything is allowed. With `extra` further draws, all without
    replacement, Ŵ is the mean of the estimates after each of them.

    **With replacement** (geometric). Tokens are drawn until the second allowed one, at draw n; x is the first, and
    Ŵ = 1/(n − 1), the unbiased estimate of inverse sampling (1/n at the first allowed token is not unbiased).

    Where nothing is allowed, the adaptive variant knows it after at most V checks: Ŵ = 0.

    Parameters
    ----------
    log_probs : Tensor (B, V)
        Log-probabilities of the next token, normalised, in nats; −inf excludes a token.
    allowed : callable
        (rows (M,), tokens (M,)) → (M,) bool: whether token i may follow row i. Called once a round, for the rows that
        are still at work.
    source : Source
    max_checks : int, optional
        K, checks a row at most; by default V without and 4V with replacement. A budget costs no bias: without
        replacement, the K-th token after K − 1 rejected ones weighs (1 − m)·1[allowed]; with replacement, one allowed
        token among K weighs 1/K (`girshick1946`). What it costs is variance: rows of weight zero although something is
        allowed. K = 1 is importance sampling from π0.
    extra : int
        Checks after the first allowed token, without replacement; at least 1. More lower the variance of Ŵ.
    replacement : bool
        Draw with replacement.

    Raises
    ------
    ShapeError, ModelError
        Where shapes or arguments are others.

    References
    ----------
    lipkin2025, desraj1956, girshick1946
    """
    if log_probs.dim() != 2:
        raise ShapeError(f"awrs: got log_probs of shape {tuple(log_probs.shape)}, expected (B, V)")
    if extra < 1:
        raise ModelError(f"awrs: got extra={extra}, expected at least 1 check after the first allowed token")
    if max_checks is not None and max_checks < 1:
        raise ModelError(f"awrs: got max_checks={max_checks}, expected at least 1")
    if replacement:
        limit = 4 * log_probs.shape[1] if max_checks is None else max_checks
        return _with_replacement(log_probs, allowed, source, limit)
    return _without_replacement(log_probs, allowed, source, max_checks or log_probs.shape[1], extra)


@dataclass(frozen=True)
class AWRS:
    """Adaptive weighted rejection as a step proposal: `SMC(proposal=AWRS())`, for constraints that are costly to check.

    A token is allowed where the twist of the prefix that it makes is not zero; x is the first allowed draw of
    π0(·|x_<t), and its increment is W = Ŵ · ψ(x_≤t)/ψ(x_<t), properly weighted for π0 ψ(x_≤t)/ψ(x_<t), so that E Ẑ = Z.
    The twist is evaluated on the drawn tokens alone, never on all V. Without a twist this is the prior's own law.

    Parameters
    ----------
    max_checks, extra, replacement
        As in `awrs`.

    References
    ----------
    lipkin2025
    """

    max_checks: int | None = None
    extra: int = 1
    replacement: bool = False

    def start(self, target: Target, frontier: Frontier) -> StepSampler:
        """As `StepProposal.start`."""
        return _Sampler(self)


class _Sampler:
    def __init__(self, options: AWRS) -> None:
        self.options = options

    def propose(self, rows: StepRows, source: Source) -> Proposed:
        """As `StepSampler.propose`.

        Raises
        ------
        UnsupportedModel
            For given tokens: a retained particle would need Ŵ from its size-biased law, which has no short form.
        """
        if rows.given is not None and bool((rows.given >= 0).any()):
            raise UnsupportedModel(
                "AWRS: the weight of a token that is given (conditional SMC) cannot be drawn; use PriorProposal or "
                "OptimalProposal there"
            )
        log_probs = rows.log_prior
        if not rows.twisted:
            tokens, log_prior = source.tokens(log_probs)
            none = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
            return Proposed(tokens, none, log_prior.double(), none)
        weigh = torch.full((len(rows),), -torch.inf, dtype=torch.float64, device=log_probs.device)
        found = torch.zeros(len(rows), dtype=torch.bool, device=log_probs.device)

        def allowed(index: Tensor, tokens: Tensor) -> Tensor:
            values = rows.weigh(tokens[:, None], index)[:, 0].double()
            good = values > -torch.inf
            first = good & ~found[index]
            weigh[index[first]] = values[first]
            found[index[first]] = True
            return good

        o = self.options
        drawn = awrs(log_probs, allowed, source, max_checks=o.max_checks, extra=o.extra, replacement=o.replacement)
        log_prior = log_probs.gather(1, drawn.tokens[:, None])[:, 0].double()
        return Proposed(drawn.tokens, drawn.log_weights + weigh, log_prior, weigh)

    def append(self, tokens: Tensor) -> None:
        """As `StepSampler.append`: nothing is kept."""

    def select(self, index: Tensor) -> None:
        """As `StepSampler.select`."""

    def resume(self) -> None:
        """As `StepSampler.resume`."""


def _without_replacement(log_probs: Tensor, allowed: Allowed, source: Source, limit: int, extra: int) -> WeightedTokens:
    batch, device = len(log_probs), log_probs.device
    left = log_probs.clone()  # the law of the next draw, unnormalised: what has been drawn is −inf
    tokens = left.argmax(1)
    found = torch.zeros(batch, dtype=torch.bool, device=device)
    known = torch.zeros(batch, dtype=torch.float64, device=device)  # mass of the allowed tokens that have been drawn
    total = torch.zeros_like(known)  # of the estimates after each further draw
    further, checks = (torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(2))
    active = torch.arange(batch, device=device)
    while len(active):
        drawn, conditional = source.tokens(left[active])
        log_prob = log_probs[active, drawn].double()
        remaining = (log_prob - conditional.double()).exp()  # mass that had not been drawn yet
        good = _ask(allowed, active, drawn)
        checks[active] += 1
        left[active, drawn] = -torch.inf
        first = ~found[active]
        last = checks[active] == limit
        later = active[~first]
        further[later] += 1
        total[later] += known[later] + torch.where(good[~first], remaining[~first], 0.0)
        new = active[first]
        tokens[new] = drawn[first]
        found[new] = good[first]
        known[active] += torch.where(good, log_prob.exp(), 0.0)
        # The token that uses up the budget has the weight of an importance draw, as no check is left for an estimate.
        spent = first & last
        total[active[spent]] = torch.where(good[spent], remaining[spent], 0.0)
        further[active[spent]] = 1
        exhausted = (left[active] == -torch.inf).all(1)
        # Everything has been drawn: what is allowed is known.
        certain = active[exhausted & found[active] & ~spent & (further[active] < extra)]
        total[certain] += known[certain] * (extra - further[certain])
        further[certain] = extra
        active = active[~(last | exhausted | (further[active] >= extra))]
    estimate = torch.where(found, total / further.clamp_min(1), 0.0)
    return WeightedTokens(tokens, estimate.log(), checks)


def _with_replacement(log_probs: Tensor, allowed: Allowed, source: Source, limit: int) -> WeightedTokens:
    batch, device = len(log_probs), log_probs.device
    tokens = log_probs.argmax(1)
    successes, checks = (torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(2))
    active = torch.arange(batch, device=device)
    while len(active):
        drawn, _ = source.tokens(log_probs[active])
        good = _ask(allowed, active, drawn)
        checks[active] += 1
        first = good & (successes[active] == 0)
        tokens[active[first]] = drawn[first]
        successes[active] += good.long()
        active = active[(successes[active] < 2) & (checks[active] < limit)]
    tries = torch.where(successes == 2, checks - 1, checks).double()
    return WeightedTokens(tokens, torch.where(successes > 0, -tries.log(), -torch.inf), checks)


def _ask(allowed: Allowed, rows: Tensor, tokens: Tensor) -> Tensor:
    good = allowed(rows, tokens)
    if good.shape != rows.shape or good.dtype != torch.bool:
        raise ShapeError(
            f"awrs: allowed returned {tuple(good.shape)} of {good.dtype}, expected ({len(rows)},) of torch.bool"
        )
    return good
