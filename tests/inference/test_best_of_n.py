"""BestOfN: its exact law against brute force over all n-tuples, its bound, ties, hard constraints, costs, refusals."""

import itertools
import logging
import math

import pytest
import torch

from lmppl.diagnostics.divergences import kl_divergence, total_variation
from lmppl.errors import InfeasibleModel, ModelError, SupportTooLarge, UnsupportedModel
from lmppl.inference.approximation import Sampler
from lmppl.inference.best_of_n import BestOfN, best_of_n_law, choose_of_each, soft_best_of_n_law
from lmppl.inference.engine import Budget, Guarantee
from lmppl.inference.run import infer
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence.constraint import Constraint
from lmppl.modeling.evidence.reward import Reward
from lmppl.modeling.factors import Feature
from lmppl.testing.enumeration import every_outcome
from tests.models import ENUMERABLE, TOLERANCE, brute_force, count_of, enumerable_lm, goodness_of_fit, has_no, wavy


def best_of(model, engine, num_draws=None, **options) -> Sampler:
    return infer(model, engine, num_draws, progress=False, **options)


def law_by_tuples(log_prior: torch.Tensor, scores: torch.Tensor, n: int) -> torch.Tensor:
    """(S,) every n-tuple of outcomes shares its probability equally among its best members."""
    prior, law = log_prior.exp(), torch.zeros(len(log_prior), dtype=torch.float64)
    for members in itertools.product(range(len(prior)), repeat=n):
        rows = torch.tensor(members)
        best = rows[scores[rows] == scores[rows].max()]
        law.index_add_(0, best, (prior[rows].prod() / len(best)).expand(len(best)))
    return law.log()


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_the_law_is_that_of_all_tuples(n):
    prior = torch.tensor([0.3, 0.25, 0.2, 0.15, 0.1, 0.0], dtype=torch.float64).log()
    scores = torch.tensor([0.0, 1.0, 1.0, -math.inf, -math.inf, 7.0], dtype=torch.float64)
    law = best_of_n_law(prior, scores, n)
    torch.testing.assert_close(law.exp(), law_by_tuples(prior, scores, n).exp(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ENUMERABLE)
@pytest.mark.parametrize("context", [0, 1])
def test_levels_ties_and_the_kl_bound(kind, context):
    brute = brute_force(enumerable_lm(kind) * Reward(count_of("a")) * Constraint(has_no("b")), context)
    prior, scores = brute.log_prior, brute.log_phi
    for n in (1, 2, 5, 40):
        law = best_of_n_law(prior, scores, n)
        assert float(law.exp().sum()) == pytest.approx(1.0, abs=TOLERANCE)
        for level in scores.unique():
            below, up_to = (prior[rows].exp().sum() for rows in (scores < level, scores <= level))
            at = scores == level
            assert float(law[at].exp().sum()) == pytest.approx(float(up_to**n - below**n), abs=TOLERANCE)
            ratio = (law - prior)[at]  # within a level ∝ π0
            torch.testing.assert_close(ratio, ratio[0].expand_as(ratio), rtol=0, atol=TOLERANCE)
        assert kl_divergence(law, prior) <= math.log(n) - (n - 1) / n + TOLERANCE
    assert float(total_variation(best_of_n_law(prior, scores, 1), prior)) < TOLERANCE
    # Mutants: ties to the first outcome (by content); and the claim that the law is π*.
    order = scores + 1e-9 * torch.arange(len(scores), dtype=torch.float64)
    assert float(total_variation(best_of_n_law(prior, order, 5), best_of_n_law(prior, scores, 5))) > 1e-3
    assert float(total_variation(best_of_n_law(prior, scores, 5), brute.log_posterior)) > 1e-3


def test_rare_levels_keep_their_relative_precision():
    prior = torch.tensor([1e-30, 1.0], dtype=torch.float64).log()
    law = best_of_n_law(prior, torch.tensor([1.0, 0.0]), 8)
    assert float(law[0].exp()) == pytest.approx(8e-30, rel=1e-12)


# The choice, walked through, and the soft variant.


def law_of_the_choice(log_prior, scores, n, soft):
    """(S,) every n-tuple of outcomes, and every branch of the engine's own choice among them."""
    prior, law = log_prior.exp(), torch.zeros(len(log_prior), dtype=torch.float64)
    for members in itertools.product(range(len(prior)), repeat=n):
        rows = torch.tensor(members)
        chance = float(prior[rows].prod())
        if chance > 0:
            for share, (winner,) in every_outcome(
                lambda source, rows=rows: choose_of_each(scores[rows][None], source, soft)
            ):
                law[rows[winner]] += chance * share
    return law


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("soft", [None, 0.3, 1.0, 5.0])
def test_the_laws_are_those_of_the_engines_own_choice(n, soft):
    prior = torch.tensor([0.3, 0.25, 0.2, 0.15, 0.1, 0.0], dtype=torch.float64).log()
    scores = torch.tensor([0.0, 1.0, 1.0, -math.inf, -math.inf, 7.0], dtype=torch.float64)
    law = best_of_n_law(prior, scores, n) if soft is None else soft_best_of_n_law(prior, scores, n, soft)
    torch.testing.assert_close(law.exp(), law_of_the_choice(prior, scores, n, soft), rtol=0, atol=TOLERANCE)
    assert float(law.exp().sum()) == pytest.approx(1.0, abs=TOLERANCE)
    if soft == 0.3 and n == 3:  # mutant: one importance weight for the whole tuple, that is the target itself
        target = torch.log_softmax(torch.where(prior > -math.inf, prior + scores / soft, -math.inf), 0)
        assert float(total_variation(law, target)) > 1e-2


@pytest.mark.parametrize("kind", ENUMERABLE)
@pytest.mark.parametrize("context", [0, 1])
def test_the_soft_law_and_its_limits(kind, context):
    brute = brute_force(enumerable_lm(kind) * Reward(count_of("a")) * Constraint(has_no("b")), context)
    prior, scores = brute.log_prior, brute.log_phi
    for n in (1, 3, 6):
        cold, hot = (soft_best_of_n_law(prior, scores, n, t) for t in (1e-3, 1e6))
        assert float(total_variation(cold, best_of_n_law(prior, scores, n))) < TOLERANCE
        only_possible = soft_best_of_n_law(prior, torch.where(scores > -math.inf, 0.0, -math.inf), n, 1.0)
        assert float(total_variation(hot, only_possible)) < 1e-5
        law = soft_best_of_n_law(prior, scores, n, 0.7)
        for level in scores.unique():
            ratio = (law - prior)[scores == level]  # within a level ∝ π0
            torch.testing.assert_close(ratio, ratio[0].expand_as(ratio), rtol=0, atol=TOLERANCE)
    assert float(total_variation(soft_best_of_n_law(prior, scores, 1, 0.7), prior)) < TOLERANCE


@pytest.mark.parametrize("kind", ENUMERABLE)
def test_with_weights_phi_it_goes_to_the_posterior_like_one_over_n(kind):
    brute = brute_force(enumerable_lm(kind) * Reward(count_of("a"), beta=2.0), 0)
    gaps = {
        n: float(kl_divergence(soft_best_of_n_law(brute.log_prior, brute.log_phi, n, 1.0), brute.log_posterior))
        for n in (2, 4, 8, 16)
    }
    # A KL of order 1/n at most: doubling n at least halves it in the limit.
    assert gaps[2] > gaps[4] > gaps[8] > gaps[16]
    assert gaps[8] / gaps[16] > 1.9, gaps
    assert gaps[16] < 0.02
    # Mutant: the hard variant goes away from it.
    hard = [
        float(total_variation(best_of_n_law(brute.log_prior, brute.log_phi, n), brute.log_posterior)) for n in (8, 32)
    ]
    assert hard[1] > hard[0]


# Statistics: p-values below 1e-3 in 1 of 1,000 runs of each test; 8 tests with fixed seeds.


@pytest.mark.parametrize("kind", ["tabular", "llama"])
@pytest.mark.parametrize("n", [2, 6])
def test_draws_have_that_law(kind, n):
    model = enumerable_lm(kind) * Reward(count_of("a"), beta=0.5) * Constraint(has_no("b"))
    result = best_of(model, BestOfN(n), 2000, seed=5)
    for context in (0, 1):
        brute = brute_force(model, context)
        law = best_of_n_law(brute.log_prior, brute.log_phi, n)
        own = result.draws.select(result.draws.context == context)
        assert len(own) == 2000
        assert goodness_of_fit(own, brute, law) > 1e-3
        assert goodness_of_fit(own, brute, best_of_n_law(brute.log_prior, brute.log_phi, n + 2)) < 1e-6


@pytest.mark.parametrize("kind", ["tabular", "llama"])
def test_soft_draws_have_the_soft_law(kind):
    model = enumerable_lm(kind) * Reward(count_of("a"), beta=0.5) * Constraint(has_no("b"))
    result = best_of(model, BestOfN(3, soft=4.0), 2000, seed=6)
    for context in (0, 1):
        brute = brute_force(model, context)
        own = result.draws.select(result.draws.context == context)
        assert goodness_of_fit(own, brute, soft_best_of_n_law(brute.log_prior, brute.log_phi, 3, 4.0)) > 1e-3
        assert goodness_of_fit(own, brute, best_of_n_law(brute.log_prior, brute.log_phi, 3)) < 1e-6


def test_a_named_score_decides_alone():
    model = enumerable_lm("tabular") * Reward(count_of("a"), name="a") * Reward(wavy, name="wave")
    brute = brute_force(model.without("a"), 1)
    law = best_of_n_law(brute.log_prior, brute.log_phi, 4)
    draws = best_of(model, BestOfN(4, score="wave"), 1500, seed=2).draws
    assert goodness_of_fit(draws.select(draws.context == 1), brute, law) > 1e-3
    by_feature = best_of(model, BestOfN(4, score=model.feature_names(model["wave"])[0]), 1500, seed=2).draws
    assert torch.equal(by_feature.ids, draws.ids)


def test_beta_changes_nothing():
    lm = enumerable_lm("tabular")
    weak, strong = (best_of(lm * Reward(wavy, beta=b), BestOfN(8), 50, seed=1).draws for b in (10.0, 0.1))
    assert torch.equal(weak.ids, strong.ids)


# What it returns, and what it costs.


def test_the_result_is_a_heuristic_sampler_with_densities_it_knows():
    model = enumerable_lm("llama") * Reward(wavy, beta=0.5)
    result = best_of(model, BestOfN(4), 10)
    assert isinstance(result, Sampler)
    assert result.guarantee is Guarantee.HEURISTIC
    assert result.log_normalizer == ()
    assert result.info["kl_bound"] == pytest.approx(math.log(4) - 3 / 4)
    draws = result.draws
    assert draws.log_q is None
    assert draws.log_weight is None  # equally weighted
    torch.testing.assert_close(draws.log_prior, model.prior.score(draws))
    assert set(draws.log_factors) == {"wavy"}
    assert len(result.draw(3, generator=torch.Generator().manual_seed(1))) == 6


def test_every_proposal_is_counted():
    model = enumerable_lm("llama") * Reward(wavy, beta=0.5)
    result = best_of(model, BestOfN(7), 30)
    assert result.cost.factor_calls + result.cost.cache_hits == 7 * 30 * 2
    assert result.cost.lm_forwards >= 3
    again = best_of(model, BestOfN(7), 30)
    assert torch.equal(again.draws.ids, result.draws.ids)


def test_shards_hold_about_a_thousand_proposals():
    model = enumerable_lm("tabular") * Reward(wavy)
    seen = []
    best_of(model, BestOfN(100), 20, on_part=lambda part: seen.append(part.shard.num_draws))
    assert seen == [5, 5, 5, 5]
    assert len(best_of(model, BestOfN(100), budget=Budget(lm_tokens=1)).draws) == 5 * 2


@pytest.mark.parametrize(("num_draws", "status"), [(5, "complete"), (6, "interrupted")])
def test_a_budget_that_ends_with_the_last_draw_interrupts_nothing(num_draws, status):
    model = enumerable_lm("tabular") * Reward(wavy)
    result = best_of(model, BestOfN(100), num_draws, budget=Budget(lm_tokens=1))
    assert (result.status, len(result.draws)) == (status, 5 * 2)


# Hard constraints.


def test_violating_draws_are_kept_and_reported(caplog):
    prior = TabularLM([0.9, 0.1], ["a", "b"], eos=None, max_new_tokens=1)
    with caplog.at_level(logging.WARNING):
        result = best_of(prior * Constraint(has_no("a")), BestOfN(4), 500, seed=1)
    share = float(result.info["violating_share"][0])
    assert share == pytest.approx(0.9**4, abs=4 * math.sqrt(0.9**4 * 0.35 / 500))
    assert share == result.draws.text.count("a") / 500
    assert "violate a hard constraint" in caplog.text


def test_nothing_possible_is_an_error_with_a_bound():
    prior = TabularLM([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]], ["a", "b"], eos=None, max_new_tokens=2, context=["b", "a"])
    with pytest.raises(
        InfeasibleModel,
        match=r"none of 40 proposals for context 'a' has γ > 0 \(factor 'constraint' is 0 on 40\): .* < 0\.072",
    ):
        best_of(prior * Constraint(has_no("a")), BestOfN(4), 10)


# Refusals.


def test_refusals():
    lm = enumerable_lm("tabular")
    with pytest.raises(UnsupportedModel, match="this model has no factor"):
        best_of(lm, BestOfN(2))
    with pytest.raises(ModelError, match="got n = 0"):
        best_of(lm * Reward(wavy), BestOfN(0))
    with pytest.raises(ModelError, match=r"score 'nope' names no factor or feature; there are \['wavy'\]"):
        best_of(lm * Reward(wavy), BestOfN(2, score="nope"))
    for wrong in (0.0, -1.0, math.inf):
        with pytest.raises(ModelError, match="expected a positive temperature"):
            best_of(lm * Reward(wavy), BestOfN(2, soft=wrong))
    with pytest.raises(ModelError, match="expected n ≥ 1 and τ > 0"):
        soft_best_of_n_law(torch.zeros(1), torch.zeros(1), 2, 0.0)
    with pytest.raises(SupportTooLarge, match="fall in"):
        soft_best_of_n_law(torch.full((100,), math.log(0.01)), torch.arange(100.0), 20, 1.0)
    with pytest.raises(ModelError, match="num_draws: got 0"):
        best_of(lm * Reward(wavy), BestOfN(2), 0)
    with pytest.raises(ModelError, match="got n = 0"):
        best_of_n_law(torch.zeros(1), torch.zeros(1), 0)
    pair = Feature("pair", lambda texts: [[1.0, 2.0] for _ in texts])
    sums = Constraint(pair, where=lambda column: column.sum(-1) > 0, name="sums")
    with pytest.raises(ModelError, match=r"'pair' has 2 values a text"):
        best_of(lm * sums, BestOfN(2, score="pair"))
