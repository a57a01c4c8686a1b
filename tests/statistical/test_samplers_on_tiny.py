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
    ParticleGibbs,
    Restart,
    SuffixResample,
    Tempered,
    TokenGibbs,
)
from lmppl.inference.mcmc.tempering import swap
from lmppl.inference.smc import SMC
from lmppl.lm.randomness import Source
from lmppl.modeling.target import Target, log_evidence
from lmppl.sequences import Draws, concatenate
from lmppl.testing.statistics import too_many_misses

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
    "particle gibbs": ParticleGibbs(SMC(8)),
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


def p_values(kernel: Kernel, seed: int) -> dict[str, float]:
    """Of exchangeability, for each scalar, with exact draws as starts."""
    draws = exact().draws
    source, generator = Source(torch.Generator().manual_seed(seed)), torch.Generator().manual_seed(seed)
    state: ChainState = kernel.start(Target(model()), draws)
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


GROUPS, SIZE, LEVEL = 50, 20, 0.05  # independent repetitions of a test, exact draws of each, and its size
SIZED = ("suffix, length", "block", "mixture", "particle gibbs", "swap")


@cache
def many(power: float = 1.0) -> Draws:
    """Exact draws of π0·φ^power for all repetitions; a constraint is what it is at any power."""
    m = model()
    if power != 1.0:
        m = m.prior * lmppl.Reward(sentiment, beta=0.5 / power, upper=1.0) * lmppl.Constraint(is_impersonal)
    return lmppl.infer(m, lmppl.Rejection(SIZE * GROUPS), seed=31 + int(10 * power), progress=False).draws


def stepped(kernel: Kernel) -> tuple[Draws, Draws]:
    """Exact draws, and each after one step."""
    state = kernel.start(Target(model()), many())
    return many(), kernel.step(state, Source(torch.Generator().manual_seed(37)))[0].draws


def swapped(sign: float) -> tuple[Draws, Draws]:
    """Exact draws at λ = 1, and what stands there after one swap with exact draws at λ = 0.3; `sign` −1 is wrong."""
    powers, kernel = torch.tensor([0.3, 1.0], dtype=torch.float64), Restart()
    rows = torch.arange(2 * SIZE * GROUPS).view(2, -1).T.flatten()  # a row of each power in turn
    both = concatenate([many(0.3).with_columns(columns={}), many().with_columns(columns={})]).select(rows)
    both = both.with_columns(features={}, log_factors={}, columns={})
    every = powers.repeat(SIZE * GROUPS)
    state = kernel.start(Target(model()), both, power=every)
    before = state.draws
    pairs = torch.arange(2 * SIZE * GROUPS).view(-1, 2)
    source = Source(torch.Generator().manual_seed(3))
    state, _, _ = swap(kernel, state, every if sign > 0 else 1.3 - every, pairs, source)
    return before.select(pairs[:, 1]), state.draws.select(pairs[:, 1])


def rejections(before: Draws, after: Draws, size: int) -> dict[str, int]:
    """How many of the groups of `size` rows are rejected at `LEVEL`, by scalar."""
    generator, found = torch.Generator().manual_seed(41), {}
    old, new = scalars(before), scalars(after)
    for name in old:
        finite = [torch.where(x[name] > -torch.inf, x[name], -10.0) for x in (old, new)]
        pairs = zip(*(x.split(size) for x in finite), strict=True)
        found[name] = sum(exchangeability(a, b, num_flips=999, generator=generator) <= LEVEL for a, b in pairs)
    return found


@pytest.mark.parametrize("name", SIZED)
def test_the_test_has_its_size_on_right_kernels(name: str) -> None:
    """Binomial(50, 5 %) at most, each with error 1e-4; where few rows of a group move it rejects less often."""
    found = rejections(*(swapped(1.0) if name == "swap" else stepped(KERNELS[name])), size=SIZE)
    for scalar, rejected in found.items():
        assert too_many_misses(rejected, GROUPS, 1 - LEVEL) > 1e-4, scalar
    assert sum(found.values()) > 0


@pytest.mark.parametrize("mutant", ["suffix", "swap"])
def test_the_test_rejects_wrong_kernels_nearly_always(mutant: str) -> None:
    found = rejections(*(swapped(-1.0) if mutant == "swap" else stepped(Careless())), size=50)
    assert found["evidence"] >= 0.9 * (SIZE * GROUPS / 50)


@cache
def result(name: str) -> lmppl.Approximation:
    return lmppl.infer(model(), ENGINES[name], seed=5, progress=False)


@pytest.mark.parametrize("name", ENGINES)
def test_engines_agree_with_rejection_within_their_stated_errors(name: str) -> None:
    other, (known,) = result(name).log_normalizer[0], exact().log_normalizer
    gap = abs(float(other.value[0] - known.value[0]))
    assert gap < STANDARD_ERRORS * math.hypot(float(other.standard_error[0]), float(known.standard_error[0]))
    if name in OTHER_LAW:
        return
    for fn in ("sentiment", lmppl.Feature("length", lambda rows: rows.lengths.double(), on="ids")):
        mine, truth = result(name).expectation(fn), exact().expectation(fn)
        gap = abs(float(mine.value[0] - truth.value[0]))
        assert gap < STANDARD_ERRORS * math.hypot(float(mine.standard_error[0]), float(truth.standard_error[0]))


@pytest.mark.parametrize(
    "engine",
    [
        SMC(32, resampling="ssp"),
        MCMC(270, num_steps=1, warmup=25),
        Tempered(270, num_temperatures=2, num_steps=1, warmup=15),
        lmppl.AIS(24, ladder=(0.0, 1.0)),
        lmppl.TemperedSMC(16, ladder=(0.0, 0.5, 1.0)),
    ],
    ids=lambda e: e.name,
)
def test_exact_draws_rank_uniformly_among_the_draws_of_sweeps(engine: Engine) -> None:
    """Nine sweeps (or chains) for each exact draw, one draw by weight from each.

    What bias a sweep of so many particles, or a chain of so many steps, has is far below what shows.
    """
    groups, n = 30, 9
    size = getattr(engine, "num_particles", 1)
    run = lmppl.infer(model(), engine, groups * n * size, seed=23, progress=False)
    generator = torch.Generator().manual_seed(29)
    chosen = [torch.arange(len(run.draws))] if "chain" in run.draws.columns else []
    apart = torch.arange(len(run.draws)) // size  # of AIS, whose particles do not meet
    sweeps = run.draws.columns.get("sweep", apart)
    for sweep in range(0 if chosen else groups * n):
        rows = torch.nonzero(sweeps == sweep).squeeze(1)
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
