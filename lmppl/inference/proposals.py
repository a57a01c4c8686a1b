"""Proposals: language models that draw for an engine, and the checks that make γ/q a weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lmppl.errors import FactorError, ModelError
from lmppl.inference.approximation import Approximation
from lmppl.inference.engine import Shard
from lmppl.lm.base import LanguageModel
from lmppl.lm.decoding import draw_rows
from lmppl.lm.derived import DerivedLM
from lmppl.lm.frontier import Frontier
from lmppl.lm.randomness import Source
from lmppl.modeling.factors import Factor
from lmppl.modeling.target import Target
from lmppl.sequences import Cost, Draws, concatenate

__all__ = [
    "as_proposal",
    "check_bounds",
    "check_outcomes",
    "densities",
    "draw_from",
    "evaluate_inside",
    "propose",
]

ROUNDING = 1e-12  # relative; float64 rounding of a sum of log-factors


def as_proposal(proposal: LanguageModel | Approximation, prior: LanguageModel) -> LanguageModel:
    """`proposal` as an LM on the prior's outcomes: same tokens, contexts, cap and EOS.

    Raises
    ------
    ModelError
        Naming the first thing that differs: then log π0 and log q would be densities of different things.
    UnsupportedModel
        Where an approximation has draws but no log-probability.
    """
    lm = proposal.as_language_model() if isinstance(proposal, Approximation) else proposal
    if not isinstance(lm, LanguageModel):
        raise ModelError(
            f"proposal: got {type(lm).__name__}, expected a language model, or an approximation that can be one"
        )
    for name, fix in (
        ("vocab_size", "a proposal reads the same tokens as the prior"),
        ("prompts", "ask the proposal for the same contexts: proposal | contexts"),
        ("max_new_tokens", "an outcome ends at the same cap"),
        ("eos_ids", "an outcome ends at the same tokens"),
    ):
        got, expected = getattr(lm, name), getattr(prior, name)
        if got != expected:
            raise ModelError(f"proposal: got {name} {got!r}, expected the prior's {expected!r}; {fix}")
    symbols, expected = _symbols(lm), _symbols(prior)
    if symbols is not None and expected is not None and symbols != expected:
        raise ModelError(
            f"proposal: got vocabulary {symbols!r}, expected the prior's {expected!r}; a proposal reads the same "
            "tokens as the prior, in the same order"
        )
    return lm


def _symbols(lm: LanguageModel) -> tuple[str, ...] | None:
    """The symbols of a table, or of the table that an LM is derived from; None where there are none to compare."""
    while isinstance(lm, DerivedLM):
        lm = lm.base
    return getattr(lm, "vocabulary", None)


def propose(lm: LanguageModel, shard: Shard, num_draws: int, *, source: Source, cost: Cost | None = None) -> Draws:
    """`num_draws` draws of `lm` for each context of the shard, in its micro-batches, rows ordered by its contexts."""
    context = torch.tensor(shard.contexts, dtype=torch.int64).repeat_interleave(num_draws)
    rows = context.split(shard.batch_size)
    if source.walked:
        drawn = [draw_from(lm, r, source, cost=cost) for r in rows]
    else:  # the same law from numbers that are all drawn ahead, which is what the decode loop takes
        drawn = [draw_rows(lm, r, generator=source.generator, cost=cost) for r in rows]
    return concatenate(drawn, pad_id=lm.pad_id)


def draw_from(lm: LanguageModel, context: Tensor, source: Source, *, cost: Cost | None = None) -> Draws:
    """One draw of `lm` for each entry of `context` (B,), with its log-probability, by choices of `source`."""
    frontier = Frontier(lm, context, cost=cost)
    log_q = torch.zeros(len(context), dtype=lm.dtype, device=lm.device)
    while len(frontier.live):
        live = frontier.live
        tokens, token_log_q = source.tokens(frontier.logits())
        log_q[live] += token_log_q
        frontier.append(tokens)
    if not bool(torch.isfinite(log_q).all()):
        raise ModelError(f"{lm!r} gave next-token scores that are nan or +inf: its weights or dtype are broken")
    rows, log_q = frontier.sequences(), log_q.cpu()
    return Draws(
        rows.ids, rows.lengths, rows.finished, rows.context, rows.prompts, rows.decoder, log_prior=log_q, log_q=log_q
    )


def check_bounds(draws: Draws, factors: tuple[Factor, ...], log_bound: float | None = None) -> None:
    """Refuse draws above a declared bound: sup log φ_k of each factor, or `log_bound` on Σ_k log φ_k.

    Raises
    ------
    FactorError
        Naming the factor, the text, the value and the bound; nothing is ever clipped.
    """
    for factor in factors:
        value = draws.log_factors[factor.name]
        what = f"factor {factor.name!r}: log φ"
        _refuse(value > factor.upper, draws, value, what, f"its declared upper {factor.upper:g}")
    if log_bound is not None and factors:
        total = torch.stack([draws.log_factors[f.name] for f in factors]).sum(0)
        slack = ROUNDING * max(1.0, abs(log_bound))
        what = f"factors {', '.join(repr(f.name) for f in factors)}: Σ log φ"
        _refuse(total > log_bound + slack, draws, total, what, f"the bound log_upper={log_bound:g}")


def densities(draws: Draws) -> tuple[Tensor, Tensor]:
    """log π0 and log q of draws that carry both."""
    if draws.log_prior is None or draws.log_q is None:
        raise ModelError("draws without log_prior or log_q have no weight")
    return draws.log_prior, draws.log_q


def check_outcomes(draws: Draws, prior: LanguageModel) -> None:
    """Refuse draws that end where the prior would not: another stop string makes q a law over other outcomes."""
    whole = prior.is_outcome(draws)
    if not bool(whole.all()):
        row = int(torch.nonzero(~whole)[0, 0])
        raise ModelError(
            f"proposal: {draws.text[row]!r} is no outcome of the prior, which would end it elsewhere; give both the "
            "same EOS ids and stop strings"
        )


def evaluate_inside(target: Target, draws: Draws) -> Draws:
    """`draws` with features and log-factors, nan off the support of π0: γ = 0 there, whatever the factors would say."""
    if draws.log_prior is None:
        raise ModelError("draws without log_prior have no support to be evaluated on")
    inside = draws.log_prior > -math.inf
    if bool(inside.all()):
        return target.evaluate(draws)
    part = target.evaluate(draws.select(inside))

    def spread(column: Tensor) -> Tensor:
        whole = column.new_full((len(draws), *column.shape[1:]), math.nan)
        whole[inside] = column
        return whole

    return draws.with_columns(
        features={name: spread(column) for name, column in part.features.items()},
        log_factors={name: spread(column) for name, column in part.log_factors.items()},
    )


def _refuse(above: Tensor, draws: Draws, value: Tensor, what: str, bound: str) -> None:
    if bool(above.any()):
        row = int(torch.nonzero(above)[0, 0])
        raise FactorError(
            f"{what} is {float(value[row]):.9g} for the text {draws.text[row]!r}, above {bound}; a bound is never "
            "clipped: declare a larger one"
        )
