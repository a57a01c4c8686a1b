"""Samplers on a real, if small, language model, against exact draws by rejection.

Rejection is the oracle: its draws are exact. Each kernel must leave their law as it is (exchangeability of a draw and
the draw after one step), each engine must agree with their log Z and means, and ranks of exact draws among an engine's
must be uniform. Seeds are fixed; each test fails by chance with the probability that stands beside it.
"""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch

import lmppl
from lmppl.cli.sentiment import is_impersonal, sentiment
from lmppl.diagnostics.calibration import exchangeability, holm, rank_calibration
from lmppl.inference import Engine
from lmppl.inference.mcmc import (
    MCMC,
    BlockResample,
    ChainState,
    Kernel,
    LocalEdit,
    Mixture,
    Restart,
    SuffixResample,
    Tempered,
    TokenGibbs,
)
from lmppl.inference.smc import SMC
from lmppl.lm.randomness import Source
from lmppl.modeling.target import Target, log_evidence
from lmppl.sequences import Draws

ALPHA = 1e-3  # of each family of tests, over all its hypotheses (Holm)
STANDARD_ERRORS = 4.0  # two-sided 6e-5
EXACT_DRAWS = 400
KERNELS: dict[str, Kernel] = {
    "restart": Restart(),
    "suffix, length": SuffixResample(),
    "suffix, horizon": SuffixResample(index="horizon"),
    "suffix, entropy": SuffixResample(index="entropy"),
    "suffix, entropy, marginalised": SuffixResample(index="entropy", ratio="marginalised"),
    "block": BlockResample(3),
    "token": TokenGibbs(8),
    "edit": LocalEdit(),
    "mixture": Mixture(),
}
ENGINES: dict[str, Engine] = {
    "importance": lmppl.Importance(2000),
    "smc": SMC(64, num_sweeps=12),
    "smc, multinomial": SMC(64, resampling="multinomial", num_sweeps=12),
    "smc, by words": SMC(64, every="word", num_sweeps=12),
    "mcmc": MCMC(64, num_steps=32),
    "tempered": Tempered(32, num_temperatures=4, num_steps=32, warmup=32),
    "ais": lmppl.AIS(64, num_sweeps=8),
    "tempered smc": lmppl.TemperedSMC(64, num_sweeps=8),
    "splitting": lmppl.Splitting(64, num_sweeps=8),
    "quasi-rejection": lmppl.QuasiRejection(400, acceptance=0.5),
}
OTHER_LAW = ("quasi-rejection",)  # its means are not those of π*


@cache
def model() -> lmppl.Model:
    prior = lmppl.LM("tiny", context="The film was", max_new_tokens=16)
    return prior * lmppl.Reward(sentiment, beta=0.5, upper=1.0) * lmppl.Constraint(is_impersonal)


@cache
def exact() -> lmppl.Approximation:
    return lmppl.infer(model(), lmppl.Rejection(EXACT_DRAWS), seed=17, progress=False)


def scalars(draws: Draws) -> dict[str, torch.Tensor]:
    assert draws.log_prior is not None
    return {
        "length": draws.lengths.double(),
        "log prior": draws.log_prior.double(),
        "evidence": log_evidence(draws),
        "first token": draws.ids[:, 0].double(),
    }


def p_values(kernel: Kernel, seed: int, steps: int = 1) -> dict[str, float]:
    """Of exchangeability, for each scalar, with exact draws as starts."""
    draws = exact().draws
    source, generator = Source(torch.Generator().manual_seed(seed)), torch.Generator().manual_seed(seed)
    state: ChainState = kernel.start(Target(model()), draws)
    for _ in range(steps):
        state, _ = kernel.step(state, source)
    before, after = scalars(draws), scalars(state.draws)
    return {name: exchangeability(before[name], after[name], generator=generator) for name in before}


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_leaves_exact_draws_exact(name: str) -> None:
    assert holm(p_values(KERNELS[name], seed=len(name)), ALPHA) == []


class Careless(SuffixResample):
    """A mutant: the suffix kernel that accepts every possible proposal."""

    def step(self, state, source, power=1.0, **options):
        return super().step(state, source, power=0.0, **options)


def test_a_kernel_that_forgets_the_evidence_is_seen() -> None:
    assert "evidence" in holm(p_values(Careless(), seed=1), ALPHA)


@cache
def result(name: str) -> lmppl.Approximation:
    return lmppl.infer(model(), ENGINES[name], seed=5, progress=False)


@pytest.mark.parametrize("name", ENGINES)
def test_engines_agree_with_rejection_within_their_stated_errors(name: str) -> None:
    for other in result(name).log_normalizer[:1]:
        (known,) = exact().log_normalizer
        gap = abs(float(other.value[0] - known.value[0]))
        assert gap < STANDARD_ERRORS * math.hypot(float(other.standard_error[0]), float(known.standard_error[0]))
    if name in OTHER_LAW:
        return
    for fn in ("sentiment", lmppl.Feature("length", lambda rows: rows.lengths.double(), on="ids")):
        mine, truth = result(name).expectation(fn), exact().expectation(fn)
        gap = abs(float(mine.value[0] - truth.value[0]))
        assert gap < STANDARD_ERRORS * math.hypot(float(mine.standard_error[0]), float(truth.standard_error[0]))


def test_exact_draws_rank_uniformly_among_the_draws_of_sweeps() -> None:
    """Nine sweeps for each exact draw, one draw by weight from each; 32 particles leave a bias far below what shows."""
    groups, n, engine = 30, 9, SMC(32, resampling="ssp")
    run = lmppl.infer(model(), engine, groups * n * engine.num_particles, seed=23, progress=False)
    generator = torch.Generator().manual_seed(29)
    chosen = []
    for sweep in range(groups * n):
        rows = torch.nonzero(run.draws.columns["sweep"] == sweep).squeeze(1)
        weights = torch.softmax(run.draws.log_weight[rows], 0)
        chosen.append(rows[torch.multinomial(weights, 1, generator=generator)])
    ours, truth = scalars(run.draws.select(torch.cat(chosen))), scalars(exact().draws.select(slice(groups)))
    found = {h: rank_calibration(truth[h], ours[h].view(groups, n), generator=generator) for h in truth}
    assert holm(found, ALPHA) == []


def test_rank_calibration_sees_draws_of_the_prior() -> None:
    groups, n = 40, 9
    target = Target(model())
    draws = target.evaluate(model().prior.draw(groups * n, generator=torch.Generator().manual_seed(3)))
    values = torch.where(log_evidence(draws) > -torch.inf, log_evidence(draws), -10.0)
    p = rank_calibration(scalars(exact().draws.select(slice(groups)))["evidence"], values.view(groups, n))
    assert p < ALPHA
