"""every_outcome: probabilities are those of the choices, and every path is taken once."""

import math
from collections import Counter, defaultdict

import pytest
import torch

from lmppl.lm.randomness import Source
from lmppl.testing.enumeration import every_outcome


def a_procedure(source: Source) -> tuple[int, ...]:
    """Tokens, then as many acceptances as the first token says, then an integer, then a uniform with two pieces."""
    tokens, _ = source.tokens(torch.tensor([[0.0, math.log(3.0), -math.inf], [0.0, 0.0, 0.0]], dtype=torch.float64))
    accepted = source.accept(torch.full((int(tokens[0]),), math.log(0.25), dtype=torch.float64))
    whole = source.integers(torch.tensor([3]))
    high = source.uniforms(1, breaks=lambda: [torch.tensor([0.3])])[0] > 0.3
    return (*tokens.tolist(), *accepted.tolist(), *whole.tolist(), bool(high))


def test_paths_are_distinct_and_their_probabilities_sum_to_one():
    found = list(every_outcome(a_procedure))
    results = [result for _, result in found]
    assert len(set(results)) == len(results) == (3 + 3 * 2) * 3 * 2
    assert math.isclose(sum(p for p, _ in found), 1.0, abs_tol=1e-12)


def test_the_law_is_that_of_the_ordinary_source():
    law: dict[tuple[int, ...], float] = defaultdict(float)
    for probability, result in every_outcome(a_procedure):
        law[result] += probability
    source = Source(torch.Generator().manual_seed(0))
    draws = Counter(a_procedure(source) for _ in range(4000))
    for result, probability in law.items():
        error = math.sqrt(probability * (1 - probability) / 4000)
        assert abs(draws[result] / 4000 - probability) < 5 * error  # 54 cells at 5 standard errors: 3e-5


def test_impossible_branches_are_not_taken():
    found = list(every_outcome(lambda source: source.accept(torch.tensor([0.0, -math.inf])).tolist()))
    assert found == [(1.0, [True, False])]


def test_a_procedure_that_cannot_be_enumerated_says_so():
    with pytest.raises(AssertionError, match="without breaks"):
        list(every_outcome(lambda source: source.uniforms(1)))
    with pytest.raises(AssertionError, match="more than 3 paths"):
        list(every_outcome(lambda source: source.integers(torch.tensor([10])), limit=3))
