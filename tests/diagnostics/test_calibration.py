"""Exchangeability and rank calibration: their size on right samplers, their power on wrong ones."""

import pytest
import torch

from lmppl.diagnostics.calibration import exchangeability, holm, rank_calibration
from lmppl.errors import ModelError, ShapeError
from lmppl.testing.statistics import too_many_misses

REPEATS, LEVEL = 300, 0.05


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def metropolis(x: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    """One reversible step of the standard normal law."""
    new = x + torch.randn(len(x), generator=source, dtype=torch.float64)
    accept = torch.rand(len(x), generator=source, dtype=torch.float64) < ((x**2 - new**2) / 2).exp()
    return torch.where(accept, new, x)


def p_of_kernel(seed: int, shift: float) -> float:
    source = generator(seed)
    x = torch.randn(60, generator=source, dtype=torch.float64) + shift
    return exchangeability(x, metropolis(x, source), num_flips=199, generator=source)


def test_exchangeability_has_its_size_and_sees_wrong_draws() -> None:
    rejected = sum(p_of_kernel(seed, 0.0) <= LEVEL for seed in range(REPEATS))
    assert too_many_misses(rejected, REPEATS, 1 - LEVEL) > 1e-4
    seen = sum(p_of_kernel(seed, 1.0) <= LEVEL for seed in range(100))
    assert seen > 50


def test_a_sweep_of_two_right_kernels_is_called_wrong() -> None:
    """Each swaps neighbours on a ring of ten states, of equal mass: reversible. One after the other they go round.

    The sum of the steps has mean 0 all the same; what is wrong is its sign, step by step.
    """
    states = torch.arange(10)
    first, second = states ^ 1, ((states + 1) ^ 1) - 1
    second = second % 10
    along = torch.where(states % 2 == 0, states // 2, 0).double()  # the even states, in the order they are visited
    rejected = {}
    for name, kernel in {"one": first, "other": second, "sweep": second[first]}.items():
        assert sorted(kernel.tolist()) == states.tolist()  # it leaves the uniform law as it is
        p = []
        for seed in range(200):
            x = torch.randint(10, (14,), generator=generator(seed))
            p.append(exchangeability(along[x], along[kernel[x]], num_flips=199, generator=generator(seed)))
        rejected[name] = sum(value <= LEVEL for value in p)
    for name in ("one", "other"):
        assert too_many_misses(rejected[name], 200, 1 - LEVEL) > 1e-4
    assert too_many_misses(rejected["sweep"], 200, 1 - LEVEL) < 1e-6


def test_nothing_moved_says_nothing() -> None:
    assert exchangeability(torch.ones(5), torch.ones(5)) == 1.0
    with pytest.raises(ShapeError):
        exchangeability(torch.ones(5), torch.ones(4))


def p_of_ranks(seed: int, scale: float, discrete: bool) -> float:
    source = generator(seed)
    exact = torch.randn(200, generator=source)
    draws = scale * torch.randn(200, 9, generator=source)
    if discrete:
        exact, draws = exact.round(), draws.round()
    return rank_calibration(exact, draws, generator=source)


@pytest.mark.parametrize("discrete", [False, True])
def test_rank_calibration_has_its_size_with_ties_and_sees_a_wrong_width(discrete: bool) -> None:
    rejected = sum(p_of_ranks(seed, 1.0, discrete) <= LEVEL for seed in range(REPEATS))
    assert too_many_misses(rejected, REPEATS, 1 - LEVEL) > 1e-4
    seen = sum(p_of_ranks(seed, 0.5, discrete) <= LEVEL for seed in range(50))
    assert seen > 45


def test_too_little_to_test_anything_is_refused() -> None:
    with pytest.raises(ModelError, match="n ≥ 9"):
        rank_calibration(torch.zeros(100), torch.zeros(100, 4))
    with pytest.raises(ShapeError):
        rank_calibration(torch.zeros(100), torch.zeros(90, 9))


def test_holm_rejects_in_order() -> None:
    assert holm({"a": 0.001, "b": 0.04, "c": 0.02}) == ["a", "c", "b"]
    assert holm({"a": 0.03, "b": 0.04}) == []


def test_without_a_generator_p_values_are_repeatable_and_leave_the_global_one_alone() -> None:
    x = torch.randn(60, generator=generator(1)).round()
    y, draws = torch.randn(60, generator=generator(2)).round(), torch.randn(60, 9, generator=generator(3)).round()
    before = torch.get_rng_state()
    found = [(exchangeability(x, y, num_flips=99), rank_calibration(x, draws)) for _ in range(2)]
    assert found[0] == found[1]
    assert found[0] == (
        exchangeability(x, y, num_flips=99, generator=generator(0)),
        rank_calibration(x, draws, generator=generator(0)),
    )
    assert torch.equal(torch.get_rng_state(), before)
