"""Rounds of proposals: what the engines share that accept some of what they propose, until enough are accepted.

A context is done with its last wanted acceptance, or at a cap of proposals. Later proposals are cut off, so that the
number of proposals does not depend on how rounds were cut.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lmppl.inference.engine import Part, Shard, make_shard
from lmppl.modeling.target import Target
from lmppl.sequences import Draws

__all__ = ["Ending", "ProposalShard", "ending", "next_round", "shortfall", "tally"]

log = logging.getLogger(__name__)

SAFETY = 1.2  # proposals of the next round, over what the acceptance rate so far asks for


@dataclass(frozen=True)
class ProposalShard(Shard):
    """A round of proposals; the run is met at `wanted` accepted draws per context (None: a budget ends it)."""

    wanted: int | None = None


def tally(rounds: Sequence[Part], num_contexts: int) -> tuple[Tensor, Tensor]:
    """Proposals and acceptances (C,) int64 of whole rounds, each of which has its acceptances (C,) in its `info`."""
    if not rounds:  # asked again after each of many rounds: one operation on all of them
        return torch.zeros(num_contexts, dtype=torch.int64), torch.zeros(num_contexts, dtype=torch.int64)
    tried = [0] * num_contexts
    for part in rounds:
        for context in part.shard.contexts:
            tried[context] += part.shard.num_draws
    return torch.tensor(tried), torch.stack([part.info["accepted"] for part in rounds]).sum(0)


def next_round(
    target: Target,
    number: int,
    seed: int,
    wanted: int | None,
    tried: Tensor,
    accepted: Tensor,
    *,
    batch: int,
    max_tries: int,
) -> ProposalShard | None:
    """The round after `tried` proposals and `accepted` draws per context; None where every context is done.

    Parameters
    ----------
    target : Target
    number, seed : int
        Of the shard.
    wanted : int or None
        Accepted draws per context that end the run.
    tried, accepted : Tensor (C,) int64
    batch : int
        Proposals of a round at most, all contexts together.
    max_tries : int
        Proposals per context at most, all rounds together.
    """
    pending = tried < max_tries
    if wanted is not None:
        pending &= accepted < wanted
    contexts = tuple(torch.nonzero(pending).squeeze(1).tolist())
    if not contexts:
        return None
    size = max(1, batch // len(contexts))
    if wanted is not None:
        # (k+1)/(n+1) starts at 1: the first round proposes about as often as is wanted.
        rate = (accepted[pending] + 1.0) / (tried[pending] + 1.0)
        needed = SAFETY * (wanted - accepted[pending]) / rate
        size = min(size, math.ceil(float(needed.max())))
    size = min(size, max_tries - int(tried[pending].max()))
    base = make_shard(target, number, size, seed, contexts)
    return ProposalShard(base.id, base.num_draws, base.seed, base.contexts, base.batch_size, wanted)


class Ending(NamedTuple):
    """What counts of all rounds.

    Parameters
    ----------
    draws : Draws
        The accepted ones, context by context, none after the last wanted one.
    tried, accepted : Tensor (C,) int64
        N and k; N counts up to and including the k-th acceptance where `stopped`.
    stopped : Tensor (C,) bool
        Where the last wanted acceptance ended the sampling, and not the cap or the end of the run.
    """

    draws: Draws
    tried: Tensor
    accepted: Tensor
    stopped: Tensor


def ending(whole: Draws, rounds: Sequence[Part], wanted: int | None) -> Ending:
    """Cut each context at its `wanted`-th acceptance.

    Parameters
    ----------
    whole : Draws
        The accepted draws of all rounds, in their order, with columns `shard` and `proposal` (the number of the
        proposal within its shard and context).
    rounds : sequence of Part
    wanted : int or None
    """
    tried, accepted = tally(rounds, whole.num_contexts)
    kept = []
    for c in range(whole.num_contexts):
        rows = torch.nonzero(whole.context == c).squeeze(1)
        if wanted is not None and len(rows) >= wanted:
            rows = rows[:wanted]
            last = rows[-1]
            earlier = (p.shard for p in rounds if p.shard.id < int(whole.columns["shard"][last]))
            tried[c] = sum(s.num_draws for s in earlier if c in s.contexts)
            tried[c] += int(whole.columns["proposal"][last]) + 1
            accepted[c] = wanted
        kept.append(rows)
    stopped = torch.zeros_like(tried, dtype=torch.bool) if wanted is None else accepted == wanted
    return Ending(whole.select(torch.cat(kept)), tried, accepted, stopped)


def shortfall(who: str, prompts: Sequence[str], end: Ending, wanted: int, max_tries: int, advice: str) -> list[str]:
    """The contexts with fewer draws than `wanted`, each with a warning, which gives `advice` where the cap ended it."""
    short = torch.nonzero(end.accepted < wanted).squeeze(1).tolist()
    for c in short:
        capped = int(end.tried[c]) >= max_tries
        log.warning(
            "%s: context %r has %d of %d draws after %s proposals; %s",
            who, prompts[c], int(end.accepted[c]), wanted, f"{int(end.tried[c]):,}",
            advice if capped else "the run ended first",
        )  # fmt: skip
    return [prompts[c] for c in short]
