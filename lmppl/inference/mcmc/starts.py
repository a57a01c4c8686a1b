"""Where chains start: draws of the prior with γ > 0, given draws, or another engine's."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lmppl.diagnostics.intervals import binomial_upper
from lmppl.errors import InfeasibleModel, ModelError
from lmppl.inference.approximation import LEVEL, Approximation
from lmppl.inference.engine import Engine
from lmppl.inference.proposals import draw_from
from lmppl.inference.refusals import blame, count_zeros
from lmppl.inference.run import infer
from lmppl.lm.randomness import Source
from lmppl.modeling.target import Target, log_evidence
from lmppl.sequences import Draws, Sequences, concatenate

__all__ = ["Start", "Starts", "start_draws"]

Start = str | Sequences | Approximation | Engine


class Starts(NamedTuple):
    """One row a chain, and how many of each context's (C,) are draws of their own."""

    draws: Draws
    distinct: Tensor


def start_draws(
    start: Start, target: Target, context: Tensor, source: Source, *, max_tries: int, seed: int, who: str = "mcmc"
) -> Starts:
    """A row with γ > 0 for each of B chains of `context` (B,).

    Parameters
    ----------
    start : "prior", Sequences, Approximation or Engine
        "prior": each chain takes a draw of π0 with γ > 0; where a context has fewer than chains after `max_tries`
        draws, chains share them. Draws (or an engine's, run with `seed`): sampled by their weights for each context,
        or taken as they are where there is one for each chain.
    who : str
        The engine, for messages.

    Raises
    ------
    InfeasibleModel
        Where a context has no row with γ > 0.
    ModelError
        Where given draws are no outcomes of the prior.
    """
    if isinstance(start, str) and start == "prior":
        return _from_prior(target, context, source, max_tries, who)
    if isinstance(start, str | Engine):
        result = infer(target.model, start, int(torch.bincount(context).max()), seed=seed, progress=False)
        target.cost.add(replace(result.cost, seconds=0.0))  # the run that asks for the start counts its own
        start = result
    given = start.draws if isinstance(start, Approximation) else start
    if not isinstance(given, Sequences):
        raise ModelError(f"start: got {type(start).__name__}, expected 'prior', draws, an approximation or an engine")
    return _from_draws(target, given, context, source, who)


def _from_prior(target: Target, context: Tensor, source: Source, max_tries: int, who: str) -> Starts:
    contexts, wanted = torch.unique(context, return_counts=True)
    found: dict[int, list[Draws]] = {c: [] for c in contexts.tolist()}
    have = torch.zeros_like(wanted)
    names = [f.name for f in target.factors]
    excluded = torch.zeros(target.form.num_contexts, len(names), dtype=torch.int64)
    tried = 0
    while bool((have < wanted).any()) and tried < max_tries:
        short = contexts[have < wanted]
        size = min(int(wanted.max()), max_tries - tried)
        draws = target.evaluate(draw_from(target.prior, short.repeat_interleave(size), source, cost=target.cost))
        tried += size
        alive = log_evidence(draws) > -torch.inf
        excluded += count_zeros(draws, names)
        for c in short.tolist():
            rows = torch.nonzero(alive & (draws.context == c)).squeeze(1)
            if len(rows):
                found[c].append(draws.select(rows))
                have[contexts == c] += len(rows)
    empty = contexts[have == 0].tolist()
    if empty:
        also = f" (and for {len(empty) - 1} more)" if len(empty) > 1 else ""
        rate = float(binomial_upper(torch.tensor(0), torch.tensor(tried), LEVEL))
        raise InfeasibleModel(
            f"{who}: none of {tried:,} draws of the prior for context {target.contexts[empty[0]]!r}{also} has "
            f"γ > 0{blame(names, excluded[empty[0]])}: Pr_π0(γ > 0) < {rate:.1e} with {LEVEL:.0%} confidence; raise "
            "max_tries, loosen the hard factors, or start from draws that satisfy them (start=draws, or start=an "
            "engine that steers)"
        )
    chosen = []
    for c, count in zip(contexts.tolist(), wanted.tolist(), strict=True):
        pool = concatenate(found[c], pad_id=target.prior.pad_id)
        chosen.append(pool.select(torch.arange(count) % len(pool)))
    whole = concatenate(chosen, pad_id=target.prior.pad_id)
    return Starts(whole, torch.minimum(have, wanted))


def _from_draws(target: Target, given: Sequences, context: Tensor, source: Source, who: str) -> Starts:
    if given.prompts != target.contexts:
        raise ModelError(f"start: got draws for contexts {given.prompts!r}, expected {target.contexts!r}")
    ids = torch.nn.functional.pad(
        given.ids, (0, max(0, target.prior.max_new_tokens - given.ids.shape[1])), value=target.prior.pad_id
    )
    given = given.with_columns(ids=ids)
    outcome = target.prior.is_outcome(given)
    if not bool(outcome.all()):
        row = int(torch.nonzero(~outcome)[0, 0])
        raise ModelError(
            f"start: row {row}, {given.text[row]!r}, is no outcome of the prior; draw starts with the same cap, EOS "
            "ids and stop strings"
        )
    log_weight = getattr(given, "log_weight", None)
    rows = torch.empty_like(context)
    distinct = []
    for c in torch.unique(context).tolist():
        chains, there = torch.nonzero(context == c).squeeze(1), torch.nonzero(given.context == c).squeeze(1)
        if len(there) == 0:
            raise InfeasibleModel(f"{who}: start has no row for context {target.contexts[c]!r}; give one or more")
        if log_weight is None and len(there) == len(chains):
            rows[chains] = there
        else:
            log_w = torch.zeros(len(there), dtype=torch.float64) if log_weight is None else log_weight[there].double()
            if not bool((log_w > -torch.inf).any()):
                raise InfeasibleModel(f"{who}: all starting draws for context {target.contexts[c]!r} have weight zero")
            picked, _ = source.tokens(log_w.expand(len(chains), -1))
            rows[chains] = there[picked]
        distinct.append(len(rows[chains].unique()))
    s = given.select(rows)
    draws = Draws(s.ids, s.lengths, s.finished, s.context, target.contexts, target.prior.decode)
    return Starts(draws.with_columns(log_prior=target.log_prior(draws)), torch.tensor(distinct))
