"""Resampling schemes: unbiased offspring, and the conditional law given a survivor, by enumeration of every choice."""

import math
from collections import defaultdict

import pytest
import torch

from lmppl.inference.resampling import RESAMPLING, effective_sizes, resample, resample_conditionally
from lmppl.lm.randomness import Source
from lmppl.testing.enumeration import every_outcome

SCHEMES = tuple(RESAMPLING)
WEIGHTS = (
    [0.3, 0.7],
    [0.5, 0.5],
    [0.0, 1.0],
    [0.2, 0.5, 0.3],
    [0.0, 0.61, 0.39],
    [1 / 3, 1 / 3, 1 / 3],
    [0.9, 0.04, 0.06],
    [0.15, 0.35, 0.05, 0.45],
    [0.25, 0.0, 0.5, 0.25],
)


def log_weights(weights):
    return torch.tensor([weights], dtype=torch.float64).log() + 3.0


def law(scheme, weights):
    """Probability of each vector of ancestors."""
    found = defaultdict(float)
    for p, ancestors in every_outcome(lambda source: resample(scheme, log_weights(weights), source)):
        found[tuple(ancestors[0].tolist())] += p
    return found


def conditional_law(scheme, weights, retained):
    """Probability of each vector of ancestors with the survivor's slot."""
    found = defaultdict(float)
    b = torch.tensor([retained])
    for p, (ancestors, slot) in every_outcome(
        lambda source: resample_conditionally(scheme, log_weights(weights), b, source)
    ):
        found[tuple(ancestors[0].tolist()), int(slot)] += p
    return found


def wanted_conditional_law(scheme, weights, retained):
    """r(A) 1[A^k = b] / (N W_b), written out."""
    return {
        (ancestors, k): p / (len(weights) * weights[retained])
        for ancestors, p in law(scheme, weights).items()
        for k, a in enumerate(ancestors)
        if a == retained
    }


def differ(got, wanted):
    return max(abs(got.get(key, 0.0) - wanted.get(key, 0.0)) for key in {*got, *wanted})


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_offspring_are_unbiased(scheme, weights):
    expected = [0.0] * len(weights)
    for ancestors, p in law(scheme, weights).items():
        for a in ancestors:
            expected[a] += p
    for got, w in zip(expected, weights, strict=True):
        assert math.isclose(got, len(weights) * w, abs_tol=1e-10)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_conditional_law_is_that_of_the_scheme_given_a_survivor(scheme, weights):
    for retained, w in enumerate(weights):
        if w > 0:
            got = conditional_law(scheme, weights, retained)
            assert all(ancestors[k] == retained for ancestors, k in got)
            assert differ(got, wanted_conditional_law(scheme, weights, retained)) < 1e-10


@pytest.mark.parametrize("scheme", SCHEMES)
def test_keeping_a_slot_and_resampling_the_rest_is_right_for_multinomial_only(scheme):
    """Mutant, with the slot drawn uniformly, which is the kindest reading of it."""
    weights = [0.2, 0.5, 0.3]
    mutant = defaultdict(float)
    for ancestors, p in law(scheme, weights).items():
        for k in range(3):
            mutant[(*ancestors[:k], 0, *ancestors[k + 1 :]), k] += p / 3
    wanted = wanted_conditional_law(scheme, weights, 0)
    assert (differ(mutant, wanted) < 1e-10) is (scheme == "multinomial")


@pytest.mark.parametrize("scheme", ["stratified", "systematic", "residual", "ssp"])
def test_offspring_stay_near_their_mean(scheme):
    for weights in WEIGHTS:
        for ancestors in law(scheme, weights):
            for i, w in enumerate(weights):
                slack = {"stratified": 2.0, "residual": len(weights)}.get(scheme, 1.0)
                assert abs(ancestors.count(i) - len(weights) * w) < slack


@pytest.mark.parametrize("scheme", SCHEMES)
def test_groups_do_not_mix_and_many_particles_have_the_right_mean(scheme):
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(3, 50, generator=generator, dtype=torch.float64).pow(4)
    weights[1, ::2] = 0.0
    expected = 50 * weights / weights.sum(-1, keepdim=True)
    source, runs = Source(generator), 400
    counts = torch.zeros(3, 50, dtype=torch.float64)
    for _ in range(runs):
        ancestors = resample(scheme, weights.log(), source)
        assert ancestors.shape == (3, 50)
        for g in range(3):
            counts[g] += torch.bincount(ancestors[g], minlength=50)
    assert not counts[weights == 0].any()
    error = (expected / runs).sqrt() + 0.5 / math.sqrt(runs)
    assert bool(((counts / runs - expected).abs() < 5 * error).all())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_survivors_of_several_groups(scheme):
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(4, 20, generator=generator, dtype=torch.float64)
    retained = torch.tensor([0, 5, 19, 7])
    weights[torch.arange(4), retained] = 1e-3
    for _ in range(50):
        ancestors, slots = resample_conditionally(scheme, weights.log(), retained, Source(generator))
        assert ancestors.shape == (4, 20)
        assert ancestors[torch.arange(4), slots].equal(retained)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("gap", [29.0, 31.0, 40.0, 800.0])
def test_a_survivor_that_the_others_outweigh_by_far_has_a_slot(scheme, gap):
    source = Source(torch.Generator().manual_seed(3))
    log_w = torch.tensor([[0.0, 0.0, -gap, -gap], [0.0, -gap, -gap, -gap]], dtype=torch.float64)
    retained = torch.tensor([3, 1])
    ancestors, slots = resample_conditionally(scheme, log_w, retained, source)
    assert bool((slots >= 0).all())
    assert ancestors.gather(1, slots[:, None])[:, 0].equal(retained)
    others = [sorted(row[:k] + row[k + 1 :]) for row, k in zip(ancestors.tolist(), slots.tolist(), strict=True)]
    assert others[1] == [0, 0, 0]
    assert set(others[0]) <= {0, 1}


def test_effective_sizes():
    log_w = torch.tensor([[0.0, 0.0, 0.0], [5.0, -math.inf, -math.inf], [-math.inf] * 3], dtype=torch.float64)
    assert torch.allclose(effective_sizes(log_w), torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64))
