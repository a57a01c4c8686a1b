"""Conditional SMC: a sweep in which one given row of each group survives, and what it is good for.

If the given row is a draw of π*, so is a row drawn from the sweep by its weights (particle Gibbs), E[1/Ẑ] = Pr(Ẑ>0)/Z,
and E log Ẑ ≥ log Z: an upper bound that sees the modes which the particles would miss, because the given row is there.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lmppl.diagnostics.normalizers import mean_of_logs
from lmppl.errors import ModelError, UnsupportedModel
from lmppl.inference.approximation import LEVEL
from lmppl.inference.engine import Shard, shard_generator
from lmppl.inference.exact_draws import check_count, log_z_holding
from lmppl.inference.run import infer
from lmppl.inference.smc import SMC
from lmppl.inference.sweep import Retained, SweepResult
from lmppl.lm.randomness import Source
from lmppl.modeling.model import Model
from lmppl.modeling.target import Target, log_evidence
from lmppl.sequences import Draws, Estimate

__all__ = ["Sandwich", "conditional_smc", "particle_gibbs_step", "retained_rows", "sandwich"]

UPPER_STREAM = -1  # the id of the seed of the conditional sweeps, which no shard has


def conditional_smc(target: Target, smc: SMC, rows: Draws, source: Source) -> SweepResult:
    """One conditional sweep for each row of `rows` (G,), all in one batch.

    The particles of a group continue the context of its row; the row starts in a slot drawn uniformly, takes its own
    tokens, and survives each resampling by the law of the scheme given that it does.

    Parameters
    ----------
    target : Target
    smc : SMC
        N, twist, proposal, resampling; `num_sweeps` is not used.
    rows : Draws (G,)
        Outcomes with γ > 0, for the bound exact draws of π*.
    source : Source

    Returns
    -------
    SweepResult
        `draws` (G·N rows, group by group), `log_z` (G,), `slots` (G,): the row itself is draw g·N + slots[g].

    Raises
    ------
    ModelError
        Where a row has γ = 0 or is no outcome of the prior, or the proposal cannot make it.
    UnsupportedModel
        For stochastic factors, and for a proposal that cannot weigh a given token (`AWRS`).

    References
    ----------
    andrieu2010, chopin2015
    """
    smc.check(target)
    rows = retained_rows(target, rows, "conditional SMC")
    slots = source.integers(torch.full((len(rows),), smc.num_particles))
    return smc.sweep(target, rows.context, source, retained=Retained(rows.ids, rows.lengths, slots))


def particle_gibbs_step(target: Target, smc: SMC, rows: Draws, source: Source) -> Draws:
    """One step of iterated conditional SMC for each row: a draw of its sweep by weight; π* is invariant.

    Parameters
    ----------
    target, smc, source
        As in `conditional_smc`; all rows share forwards: G·N particles in one batch.
    rows : Draws (G,)
        One a chain, each of its own context, with γ > 0.

    Returns
    -------
    Draws (G,)
        In the order of `rows`, with `log_prior`, features and log-factors; equally weighted, columns as in `rows`.

    References
    ----------
    andrieu2010, chopin2015
    """
    result = conditional_smc(target, smc, rows, source)
    log_w = result.draws.log_weight
    assert log_w is not None
    chosen, _ = source.tokens(log_w.view(len(rows), smc.num_particles))
    index = torch.arange(len(rows)) * smc.num_particles + chosen
    return result.draws.select(index).with_columns(log_weight=None, columns=dict(rows.columns), meta=rows.meta)


class Sandwich(NamedTuple):
    """Bounds of log Z(c), each an `Estimate` (C,) with a confidence interval: E log Ẑ_N ≤ log Z ≤ E log Ẑ_cSMC."""

    lower: Estimate
    upper: Estimate


def sandwich(
    model: Model,
    engine: SMC,
    exact_draws: Draws,
    *,
    num_sweeps: int | None = None,
    seed: int = 0,
    level: float = LEVEL,
) -> Sandwich:
    """A lower bound of log Z from sweeps of `engine`, and an upper bound from one conditional sweep an exact draw.

    Both are means of log Ẑ, with Student's t intervals for their expectations. Their distance bounds how far the
    engine's law of a draw is from π*: KL(π*‖q) ≤ E_cSMC[log Ẑ] − log Z. The upper bound is one only if the draws are
    exact (`Rejection`, `Exact(...).draw`).

    Parameters
    ----------
    model : Model
    engine : SMC
        `SMC(ess_threshold=0, ...)` without a twist is importance sampling with N draws.
    exact_draws : Draws
        Equally weighted exact draws of π*, two or more of each context.
    num_sweeps : int, optional
        Sweeps for the lower bound; by default the engine's.
    seed : int
    level : float
        Coverage of the intervals.

    References
    ----------
    grosse2015, zhao2024
    """
    sweeps = engine.num_sweeps if num_sweeps is None else num_sweeps
    check_count("sandwich", "num_sweeps", sweeps)
    target = Target(model)
    engine.check(target)
    source = Source(shard_generator(Shard(UPPER_STREAM, 0, seed, (), 0)))

    def conditional(rows: Draws) -> Tensor:
        return conditional_smc(target, engine, rows, source).log_z

    high = log_z_holding(exact_draws, model, engine.num_particles, conditional, who="sandwich")
    run = infer(model, engine, sweeps * engine.num_particles, seed=seed, progress=False)
    low = list(run.info["log_z_sweeps"])
    what = f"mean of log Ẑ over {{}} {{}}, N = {engine.num_particles}, Student's t"
    fewest = min(map(len, high))
    return Sandwich(
        mean_of_logs(low, "lower_bound", what.format(sweeps, "independent sweeps"), level),
        mean_of_logs(high, "upper_bound", what.format(fewest, "conditional sweeps, one an exact draw"), level),
    )


def retained_rows(target: Target, rows: Draws, who: str) -> Draws:
    """The rows that a conditional run keeps, with log π0, features and log-factors, all outcomes with γ > 0.

    Raises
    ------
    ModelError
        For another row, by the name `who` of the run.
    UnsupportedModel
        For factors that are only estimated: the estimate of a row that is kept would have to be size-biased.
    """
    if target.form.stochastic:
        raise UnsupportedModel(
            f"{who} needs exact factor values: factor {target.form.stochastic[0]!r} is declared stochastic=True, and "
            "the estimate of a row that is kept would have to be size-biased; use its expectation"
        )
    rows = rows.to("cpu")
    whole = target.prior.is_outcome(rows)
    if not bool(whole.all()):
        bad = int(torch.nonzero(~whole)[0, 0])
        raise ModelError(f"{who}: row {bad}, {rows.text[bad]!r}, is no outcome of the prior")
    if rows.log_prior is None:
        rows = rows.with_columns(log_prior=target.log_prior(rows))
    rows = target.evaluate(rows)
    assert rows.log_prior is not None
    log_gamma = rows.log_prior.double() + log_evidence(rows)
    dead = torch.nonzero(~(log_gamma > -math.inf))
    if len(dead):
        bad = int(dead[0, 0])
        raise ModelError(
            f"{who}: row {bad}, {rows.text[bad]!r}, has γ = 0, so that it cannot survive; expected a row with γ > 0"
        )
    return rows
