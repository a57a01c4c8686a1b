"""Proposals: language models that draw for an engine, and the checks that make γ/q a weight."""

from __future__ import annotations

import torch
from torch import Tensor

from lmppl.errors import FactorError, ModelError
from lmppl.inference.approximation import Approximation
from lmppl.inference.engine import Shard
from lmppl.lm.base import LanguageModel
from lmppl.lm.decoding import draw_rows
from lmppl.modeling.factors import Factor
from lmppl.sequences import Cost, Draws, concatenate

__all__ = ["as_proposal", "check_bounds", "propose"]

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
    return lm


def propose(
    lm: LanguageModel, shard: Shard, num_draws: int, *, generator: torch.Generator, cost: Cost | None = None
) -> Draws:
    """`num_draws` draws of `lm` for each context of the shard, in its micro-batches, rows ordered by its contexts."""
    context = torch.tensor(shard.contexts, dtype=torch.int64).repeat_interleave(num_draws)
    rows = context.split(shard.batch_size)
    return concatenate([draw_rows(lm, r, generator=generator, cost=cost) for r in rows], pad_id=lm.pad_id)


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


def _refuse(above: Tensor, draws: Draws, value: Tensor, what: str, bound: str) -> None:
    if bool(above.any()):
        row = int(torch.nonzero(above)[0, 0])
        raise FactorError(
            f"{what} is {float(value[row]):.9g} for the text {draws.text[row]!r}, above {bound}; a bound is never "
            "clipped: declare a larger one"
        )
