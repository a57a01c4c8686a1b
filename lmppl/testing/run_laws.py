"""What holds for every run of every engine, whatever it guarantees: columns, costs, seeds, shards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmppl.inference.approximation import Approximation
from lmppl.inference.engine import Engine, Part
from lmppl.inference.run import infer
from lmppl.modeling.target import Target
from lmppl.sequences import Draws
from lmppl.testing.reference import ReferencePosterior
from lmppl.testing.reports import Report

__all__ = ["check_contract", "check_repeats", "same_draws"]

EXACTLY = 1e-9


def check_contract(report: Report, reference: ReferencePosterior, run: Approximation) -> None:
    """The draws are outcomes with the columns that a fresh target gives; the run says what it was and what it cost."""
    draws, prior = run.draws, reference.model.prior
    target = Target(reference.model)
    report.require(run.status == "complete", "the run is complete", run.status, "complete")
    seen = set(draws.context.tolist())
    report.require(seen == set(range(prior.num_contexts)), "every context has draws", seen, prior.num_contexts)
    report.require(
        prior.is_outcome(draws).all(), "draws are outcomes of the prior", "others", "EOS or the cap at the end"
    )
    log_prior = target.log_prior(draws)
    if draws.log_prior is not None:
        report.require_close(draws.log_prior, log_prior, "log_prior is that of the prior", tolerance=EXACTLY)
    for kind, got, expected in (
        ("features", draws.features, target.features(draws)),
        ("log_factors", draws.log_factors, target.log_factors(draws)),
    ):
        report.require(set(got) == set(expected), f"draws have all {kind}", sorted(got), sorted(expected))
        for name, column in expected.items():
            report.require_close(got[name], column, f"{kind} are what the target computes", tolerance=EXACTLY)
    _check_weights(report, draws, target.log_prob_unnormalized(draws), weighted=run.guarantee.value != "heuristic")
    cost = run.cost
    counted = cost.lm_tokens > 0 and cost.lm_forwards > 0 and cost.seconds > 0
    report.require(counted, "LM tokens, forwards and seconds are counted", cost, "positive numbers")
    if reference.model.features:
        report.require(cost.factor_calls > 0, "calls of user functions are counted", cost, "positive numbers")
    known = {"engine", "seed", "spec_hash", "versions"} <= set(draws.meta)
    report.require(known, "draws say where they come from", sorted(draws.meta), "engine, seed, spec_hash, versions")


def _check_weights(report: Report, draws: Draws, log_gamma: Tensor, *, weighted: bool) -> None:
    log_weight = draws.log_weight
    if log_weight is None:
        log_weight = torch.zeros(len(draws))
    good = ~(log_weight.isnan() | (log_weight == torch.inf))
    report.require(good.all(), "log-weights are finite or −inf", "nan or +inf", "finite or −inf")
    if weighted:
        outside = log_weight[log_gamma == -torch.inf]
        report.require(
            (outside == -torch.inf).all(), "where γ = 0 the weight is 0", "a positive weight", "log w = −inf"
        )


def check_repeats(
    report: Report,
    engine: Engine,
    reference: ReferencePosterior,
    run: Approximation,
    parts: Sequence[Part],
    num_draws: int,
) -> None:
    """The seed repeats the run, and shards are computed from their seed alone, in any order, on a fresh target.

    Shards of a sequential engine depend on the state that the one before left as well, and on nothing else.
    """
    again = infer(reference.model, engine, num_draws, seed=run.seed, progress=False)
    report.require(same_draws(run.draws, again.draws), "equal seeds give equal draws", "other draws", "the same")
    shards = []
    for number, part in reversed(list(enumerate(parts))):
        state = parts[number - 1].info["state"] if engine.sequential and number else None
        shards.append(engine.run_shard(Target(reference.model), part.shard, state=state))
    merged = engine.merge(sorted(shards, key=lambda part: part.shard.id))
    law = "shards depend on seed and id alone"
    report.require(same_draws(run.draws, merged.draws), law, "other draws when run in reverse", "the same")


def same_draws(a: Draws, b: Draws) -> bool:
    """Whether two runs hold the same rows with bit-equal weights, in the same order."""
    if a.keys() != b.keys() or (a.log_weight is None) != (b.log_weight is None):
        return False
    return a.log_weight is None or b.log_weight is None or a.log_weight.equal(b.log_weight)
