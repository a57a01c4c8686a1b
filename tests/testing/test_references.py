"""The reference posteriors themselves: recorded answers, brute force and the target agree, three ways apart."""

import collections
import dataclasses
import itertools
import math
import random

import pytest
import torch

from lmppl.modeling.target import Target
from lmppl.testing import references
from lmppl.testing.brute_force import log_sum, outcomes
from lmppl.testing.problems import LONG, LONG_CAP, RECORDED
from lmppl.testing.reference import STATISTICS
from lmppl.testing.statistics import chi_square_p_value, too_many_misses

PROBLEMS = references()
ENUMERABLE = [r for r in PROBLEMS if r.posterior is not None]
by_name = pytest.mark.parametrize("reference", ENUMERABLE, ids=lambda r: r.name)


def test_there_is_one_of_each_kind():
    names = [r.name for r in PROBLEMS]
    assert len(set(names)) == len(names) == 12
    assert set(names) == set(RECORDED)
    assert any(len(r.log_normalizer) == 2 for r in PROBLEMS)
    assert any(r.rare and r.log_normalizer.exp() < 2e-3 for r in PROBLEMS)
    assert all(r.description and r.version for r in PROBLEMS)


@by_name
def test_the_target_gives_the_same_posterior(reference):
    target = Target(reference.model)
    for c, posterior in enumerate(reference.posterior):
        table = reference.model.prior.enumerate_sequences(c)
        log_gamma = target.log_prob_unnormalized(table)
        assert float(torch.logsumexp(log_gamma, 0)) == pytest.approx(float(reference.log_normalizer[c]), abs=1e-12)
        assert math.fsum(posterior.values()) == pytest.approx(1, abs=1e-12)
        weights = (log_gamma - torch.logsumexp(log_gamma, 0)).exp()
        for (_, finished, ids), weight in zip(table.keys(), weights.tolist(), strict=True):
            assert posterior.get((finished, ids), 0.0) == pytest.approx(weight, abs=1e-12)
        for name, fn in STATISTICS.items():
            assert float((weights * fn(table)).sum()) == pytest.approx(
                float(reference.expectations[name][c]), abs=1e-12
            )


def test_the_long_horizon_by_simulation():
    """Its answers come from a recursion; here is the law itself, token by token, in plain Python."""
    reference = next(r for r in PROBLEMS if r.posterior is None)
    rng, tries = random.Random(0), 6000
    kept = collections.defaultdict(list)
    for _ in range(tries):
        row = []
        while len(row) < LONG_CAP and (not row or row[-1] != 3):
            row.append(rng.choices(range(4), LONG[row[-1] if row else -1])[0])
        if not any(a == b == 0 for a, b in itertools.pairwise(row)):
            kept["length"].append(float(len(row)))
            kept["finished"].append(float(row[-1] == 3))
            kept["begins_with_a"].append(float(row[0] == 0))
    z, share = float(reference.log_normalizer[0].exp()), len(kept["length"]) / tries
    assert share == pytest.approx(z, abs=4.5 * math.sqrt(z * (1 - z) / tries))
    for name, values in kept.items():
        sample = torch.tensor(values).double()
        error = float(sample.std()) / math.sqrt(len(sample))
        assert float(sample.mean()) == pytest.approx(float(reference.expectations[name][0]), abs=4.5 * error)


def test_an_answer_that_differs_from_the_recorded_one_is_refused():
    wrong = dataclasses.replace(PROBLEMS[1], log_normalizer=PROBLEMS[1].log_normalizer + 1e-9)
    with pytest.raises(AssertionError, match=r"'bounded_reward': log Z is .*, recorded"):
        wrong.checked(RECORDED["bounded_reward"])


def test_brute_force_by_hand():
    table = outcomes(lambda ids: (0.25, 0.75) if len(ids) % 2 == 0 else (1.0, 0.0), "ab", eos=1, cap=3)
    assert [(x.ids, x.finished, x.text) for x in table] == [
        ((0, 0, 0), False, "aaa"),
        ((0, 0, 1), True, "aa"),
        ((1,), True, ""),
    ]
    assert [math.exp(x.log_prior) for x in table] == pytest.approx([0.0625, 0.1875, 0.75])
    assert log_sum([x.log_prior for x in table]) == pytest.approx(0, abs=1e-15)
    assert log_sum([-math.inf]) == log_sum([]) == -math.inf


# The statistics of the checks.


def test_chi_square_is_uniform_under_the_null():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.03, 0.009, 0.001]).double()
    p_values = []
    for _ in range(300):
        draws = torch.multinomial(probabilities, 400, replacement=True, generator=generator)
        p_values.append(chi_square_p_value(torch.bincount(draws, minlength=7).tolist(), probabilities.tolist()))
    below = sum(p < 0.1 for p in p_values)
    assert 300 * 0.1 - 4.5 * math.sqrt(27) < below < 300 * 0.1 + 4.5 * math.sqrt(27)


def test_chi_square_sees_what_is_wrong():
    assert chi_square_p_value([500, 500], [0.5, 0.5]) == 1
    assert chi_square_p_value([600, 400], [0.5, 0.5]) < 1e-9
    assert chi_square_p_value([999, 1], [1.0, 0.0]) == 0, "a draw where there is no probability"
    assert chi_square_p_value([1000], [1.0]) == 1
    assert chi_square_p_value([900, *[1] * 100], [0.99, *[0.0001] * 100]) < 1e-9, "small cells count together"


def test_misses_of_intervals():
    assert too_many_misses(0, 20, 0.95) == 1
    assert too_many_misses(1, 20, 0.95) == pytest.approx(1 - 0.95**20)
    assert too_many_misses(12, 20, 0.95) < 1e-8
