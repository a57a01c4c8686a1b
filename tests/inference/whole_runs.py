"""Whole runs of an engine for tests: their parts one by one, and runs that are stopped and go on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from lmppl.errors import InfeasibleModel
from lmppl.inference.approximation import Approximation
from lmppl.inference.engine import Budget, Engine, Part, Request
from lmppl.inference.run import infer
from lmppl.lm.randomness import Source
from lmppl.modeling.model import Model
from lmppl.modeling.target import Target
from lmppl.testing.enumeration import every_outcome

__all__ = ["check_that_a_stopped_run_goes_on", "every_run", "run_parts", "same_run"]


def run_parts(
    engine: Engine, model: Model, num_draws: int | None, *, seed: int = 0, source: Source | None = None
) -> list[Part]:
    """The parts of a run to its end, each from its own seed, or all of them by the choices of one `source`."""
    target, request, parts = Target(model), Request(num_draws, None, seed), []
    shards = engine.plan(target, request)
    while shards:
        parts += [engine.run_shard(target, s) if source is None else engine.simulate(target, s, source) for s in shards]
        shards = engine.replan(target, request, parts)
    return parts


def every_run(engine: Engine, model: Model, num_draws: int) -> Iterator[tuple[float, Approximation | None]]:
    """(probability, result) of every run to its end; None where it ends in an `InfeasibleModel`."""

    def run(source: Source) -> Approximation | None:
        try:
            return engine.merge(run_parts(engine, model, num_draws, source=source))
        except InfeasibleModel:
            return None

    return every_outcome(run)


def same_run(a: Approximation, b: Approximation) -> bool:
    """Whether two runs have equal draws, weights, densities and estimates, to the bit."""
    left, right = a.draws, b.draws
    columns = [(left.log_weight, right.log_weight), (left.log_prior, right.log_prior)]
    columns += [(left.log_factors[name], right.log_factors[name]) for name in left.log_factors]
    columns += [(e.value, f.value) for e, f in zip(a.log_normalizer, b.log_normalizer, strict=True)]
    return (
        torch.equal(left.ids, right.ids)
        and left.text == right.text
        and all((x is None and y is None) or torch.equal(x, y) for x, y in columns)
    )


def check_that_a_stopped_run_goes_on(model: Model, engine: Engine, num_draws: int, folder: Path) -> None:
    """A run that half its LM tokens end, and that goes on from its checkpoint, has the draws of one never stopped."""
    whole = infer(model, engine, num_draws)
    first = infer(model, engine, num_draws, budget=Budget(lm_tokens=whole.cost.lm_tokens // 2), checkpoint=folder)
    again = infer(model, engine, num_draws, checkpoint=folder)
    assert (first.status, again.status) == ("interrupted", "complete")
    assert len(first.draws) < len(whole.draws)
    assert same_run(again, whole)
