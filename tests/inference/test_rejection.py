"""Rejection: its law by enumeration, its stopping rule, its refusals, and what it costs."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from lmppl.errors import BudgetExhausted, FactorError, InfeasibleModel, ModelError, UnsupportedModel
from lmppl.inference.approximation import Sampler
from lmppl.inference.engine import Budget, Guarantee, Request
from lmppl.inference.rejection import Rejection, accepts, log_acceptance_probability
from lmppl.inference.run import infer
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence import Constraint, Optimality, Reward
from lmppl.modeling.factors import Factor, Feature
from lmppl.modeling.model import Model
from lmppl.modeling.target import Target
from tests.models import ENUMERABLE, TOLERANCE, brute_force, count_of, enumerable_lm, has_no, wavy

KINDS = ENUMERABLE
FACTORS = {
    "reward": (Reward(wavy, beta=0.5, upper=1.0, name="wavy"),),
    "constraint": (Constraint(has_no("b"), name="no b"),),
    "optimality": (Optimality(lambda texts: [-math.inf if "aa" in t else -0.5 * len(t) for t in texts], name="o"),),
    "product": (Reward(count_of("a"), beta=2.0, upper=4.0, name="a"), Constraint(has_no("b"), name="no b")),
}


def model_of(kind: str, factors: str) -> Model:
    return Model(enumerable_lm(kind), FACTORS[factors])


def accepted_law(log_prior: Tensor, log_probability: Tensor) -> Tensor:
    """The law of an accepted proposal, π0 · Pr(accept), normalised."""
    mass = log_prior.exp() * log_probability.exp()
    return mass / mass.sum()


# Exact identities.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("context", [0, 1])
def test_the_acceptance_rate_is_z_over_m_and_accepted_draws_have_the_posterior(kind, factors, context) -> None:
    model = model_of(kind, factors)
    table, log_bound = brute_force(model, context), Target(model).form.log_upper
    log_probability = log_acceptance_probability(table.log_phi, log_bound)
    assert float(log_probability.max()) <= 0.0
    rate = float((table.log_prior.exp() * log_probability.exp()).sum())
    assert rate == pytest.approx(math.exp(float(table.log_z) - log_bound), abs=TOLERANCE)
    law = accepted_law(table.log_prior, log_probability)
    assert torch.allclose(law, table.log_posterior.exp(), rtol=0, atol=TOLERANCE)


def test_clipping_a_value_above_the_bound_would_change_the_law() -> None:
    table = brute_force(model_of("tabular", "reward"), 0)
    clipped = log_acceptance_probability(table.log_phi, 1.0).clamp_max(0.0)  # sup log φ is 2
    law = accepted_law(table.log_prior, clipped)
    assert not torch.allclose(law, table.log_posterior.exp(), rtol=0, atol=1e-3)


def test_a_uniform_below_the_probability_accepts() -> None:
    log_p = torch.tensor([0.0, math.log(0.5), math.log(0.5), -math.inf], dtype=torch.float64)
    uniforms = torch.tensor([1.0 - 2**-53, 0.4999, 0.5, 0.0], dtype=torch.float64)
    assert accepts(log_p, uniforms).tolist() == [True, True, False, False]


# The run.


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_returns_what_was_asked_for(kind) -> None:
    model = model_of(kind, "product")
    result = infer(model, Rejection(), 50)
    assert isinstance(result, Sampler)
    assert result.guarantee is Guarantee.EXACT
    assert result.status == "complete"
    draws = result.draws
    assert draws.context.tolist() == [0] * 50 + [1] * 50
    assert all("b" not in text for text in draws.text)
    assert draws.log_weight is None
    assert torch.allclose(draws.weights, torch.full((100,), 1 / 50, dtype=torch.float64))
    assert torch.allclose(draws.log_prior, model.prior.score(draws), rtol=0, atol=TOLERANCE)
    assert set(draws.log_factors) == {"a", "no b"}
    assert set(draws.columns) == {"shard", "proposal"}
    assert "shortfall" not in result.info


def test_the_estimate_follows_from_the_acceptances() -> None:
    result = infer(model_of("tabular", "product"), Rejection(), 40)
    info, estimate = result.info, result.log_normalizer[0]
    assert info["accepted"].tolist() == [40, 40]
    rate = 39 / (info["proposals"].double() - 1)
    assert torch.allclose(estimate.value, rate.log() + info["log_upper"])
    assert estimate.kind == "unbiased_Z"
    for c in (0, 1):
        log_z = float(brute_force(result.model, c).log_z)
        assert float(estimate.interval[c, 0]) <= log_z <= float(estimate.interval[c, 1])


def test_the_count_of_proposals_does_not_depend_on_how_shards_are_cut() -> None:
    """N ends with the k-th acceptance: it is the position of the last draw among all proposals of its context."""
    engine, model = Rejection(batch=7), model_of("tabular", "product")
    parts = run_parts(engine, model, 20)
    result = engine.merge(parts)
    for c in (0, 1):
        last = result.draws.select(result.draws.context == c)
        shard, proposal = int(last.columns["shard"][-1]), int(last.columns["proposal"][-1])
        before = sum(p.shard.num_draws for p in parts if p.shard.id < shard and c in p.shard.contexts)
        assert int(result.info["proposals"][c]) == before + proposal + 1
    assert len({p.shard.contexts for p in parts}) == 2, "the context that is done first is left out of later shards"


def run_parts(engine: Rejection, model: Model, num_draws: int | None, seed: int = 0) -> list:
    target, parts = Target(model), []
    request = Request(num_draws, None, seed)
    shards = engine.plan(target, request)
    while shards:
        parts += [engine.run_shard(target, s) for s in shards]
        shards = engine.replan(target, request, parts)
    return parts


def test_shards_never_hold_more_than_the_batch_and_never_pass_the_cap() -> None:
    parts = run_parts(Rejection(batch=16, max_tries=100), model_of("tabular", "product"), 1000)
    assert all(p.shard.num_draws * len(p.shard.contexts) <= 16 for p in parts)
    assert sum(p.shard.num_draws for p in parts) == 100


def test_a_few_draws_of_an_easy_model_cost_a_few_proposals() -> None:
    result = infer(enumerable_lm("tabular"), Rejection(), 3)
    assert result.info["proposals"].tolist() == [3, 3]
    assert result.cost.lm_tokens <= 2 * 2 * 4 * 4


def test_the_same_seed_repeats_the_draws_and_another_does_not() -> None:
    model = model_of("tabular", "reward")
    first, again, other = (infer(model, Rejection(), 30, seed=s).draws for s in (5, 5, 6))
    assert torch.equal(first.ids, again.ids)
    assert not torch.equal(first.ids, other.ids)


def test_shards_have_their_own_draws() -> None:
    first, second = run_parts(Rejection(batch=64), enumerable_lm_model(), 64)[:2]
    assert not torch.equal(first.draws.ids, second.draws.ids)


def enumerable_lm_model() -> Model:
    return Model(enumerable_lm("tabular"))


def test_more_draws_come_fresh() -> None:
    result = infer(model_of("tabular", "product"), Rejection(), 5)
    more = result.draw(30, generator=torch.Generator().manual_seed(1))
    assert len(more) == 60
    assert all("b" not in text for text in more.text)


def test_proposals_are_drawn_once_and_never_scored_again() -> None:
    model = model_of("llama", "constraint")
    parts = run_parts(Rejection(batch=64), model, 10)
    counted = infer(model, Rejection(batch=64), 10)
    assert counted.cost.lm_forwards <= len(parts) * model.prior.max_new_tokens


# Limits.


def test_a_factor_without_a_bound_is_refused_with_the_fix() -> None:
    model = enumerable_lm("tabular") * Reward(wavy, name="sentiment")
    with pytest.raises(UnsupportedModel) as error:
        infer(model, Rejection())
    assert str(error.value).startswith(
        "rejection needs an upper bound: factor 'sentiment' declares none; pass upper=... to it"
    )
    result = infer(model, Rejection(log_upper=1.0), 200)
    assert result.info["log_upper"] == 1.0


def test_a_draw_above_the_users_bound_is_an_error_that_names_it() -> None:
    model = enumerable_lm("tabular") * Reward(wavy, name="sentiment")
    words = r"'sentiment': Σ log φ is .* for the text '.*', above the bound log_upper=0\.1"
    with pytest.raises(FactorError, match=words):
        infer(model, Rejection(log_upper=0.1), 500)


def test_a_draw_above_a_declared_bound_is_an_error_that_names_the_factor() -> None:
    feature = Feature("length", lambda texts: [float(len(t)) for t in texts])
    liar = Factor("liar", (feature,), lambda columns: columns["length"], upper=1.5)
    words = r"factor 'liar': log φ is [234] for the text '\w+', above its declared upper 1\.5"
    with pytest.raises(FactorError, match=words):
        infer(enumerable_lm("tabular") * liar, Rejection(), 500)


def test_nothing_accepted_is_infeasible_with_a_bound_on_z() -> None:
    factors = (Reward(count_of("a"), upper=4.0, name="a"), Constraint(lambda texts: [False] * len(texts), name="never"))
    model = Model(enumerable_lm("tabular"), factors)
    with pytest.raises(InfeasibleModel) as error:
        infer(model, Rejection(max_tries=2000), 10)
    message = str(error.value)
    assert "0 of 2,000 draws accepted for context ''" in message
    assert "(and for 1 more)" in message
    assert "Z < 1.5e-03·M, log M = 4, with 95% confidence" in message
    assert "factor 'never' rejected most" in message


def test_a_hopeless_bound_is_blamed_where_there_is_no_factor() -> None:
    with pytest.raises(InfeasibleModel, match="log_upper is far too high"):
        infer(enumerable_lm("tabular"), Rejection(log_upper=40.0, max_tries=100), 10)


def test_too_few_accepted_draws_are_returned_and_said(caplog) -> None:
    model = enumerable_lm("tabular") * Constraint(lambda texts: [t == "aaaa" for t in texts], name="rare")
    with caplog.at_level("WARNING", logger="lmppl"):
        result = infer(model, Rejection(max_tries=3000), 2900)
    assert 0 < int(result.info["accepted"].min()) < 2900
    assert result.info["proposals"].tolist() == [3000, 3000]
    assert result.info["shortfall"] == ["", "ab"]
    assert "raise max_tries" in caplog.text
    fixed = result.info["accepted"].double() / 3000
    assert torch.allclose(result.log_normalizer[0].value, fixed.log())
    assert "not fixed" not in result.log_normalizer[0].note


def test_one_impossible_context_is_an_error_although_the_other_has_draws() -> None:
    lm = enumerable_lm("tabular")
    feature = Feature("first", lambda rows: [float(c == 0) for c in rows.context.tolist()], on="ids")
    model = lm * Factor("first", (feature,), lambda f: torch.where(f["first"] > 0, 0.0, -math.inf), upper=0.0)
    with pytest.raises(InfeasibleModel, match="0 of 500 draws accepted for context 'ab'"):
        infer(model, Rejection(max_tries=500), 10)


def test_a_budget_ends_the_run_at_a_whole_shard() -> None:
    result = infer(model_of("tabular", "product"), Rejection(batch=32), budget=Budget(lm_tokens=500))
    assert result.cost.lm_tokens >= 500
    assert result.info["proposals"].tolist() == [result.info["proposals"][0]] * 2
    assert int(result.info["proposals"][0]) % 16 == 0
    assert "not fixed" in result.log_normalizer[0].note


def test_live_figures_tell_the_acceptance_rate() -> None:
    engine = Rejection(batch=256)
    parts = run_parts(engine, model_of("tabular", "product"), 30)
    live = engine.live(parts)
    assert set(live) == {"draws", "tried", "acceptance"}
    assert live["acceptance"].endswith("%")


@pytest.mark.parametrize("engine", [Rejection(max_tries=0), Rejection(batch=0), Rejection(log_upper=math.inf)])
def test_nonsense_configuration_is_refused_when_planned(engine) -> None:
    with pytest.raises(ModelError, match="Rejection: got"):
        infer(enumerable_lm("tabular"), engine)


def test_the_engine_is_plain_configuration() -> None:
    assert dataclasses.is_dataclass(Rejection)
    assert str(Rejection()) == "rejection"
    assert str(Rejection(log_upper=2.0)) == "rejection(log_upper=2.0)"
    assert "neumann" in Rejection().cite().lower()


def test_a_long_run_is_announced(caplog):
    prior = TabularLM.random(4, 3, seed=0)
    rare = prior * Reward(lambda texts: [0.0] * len(texts), upper=9, name="rare")
    with caplog.at_level("WARNING"):
        infer(rare, Rejection(max_tries=40_000, batch=4096), 300)
    (record,) = [r for r in caplog.records if "proposals is accepted" in r.getMessage()]
    assert "importance" in record.getMessage()
    caplog.clear()
    with caplog.at_level("WARNING"):
        infer(prior * Reward(lambda texts: [0.0] * len(texts), upper=1, name="common"), Rejection(), 30)
    assert not caplog.records


def test_fresh_draws_are_all_there_or_an_error():
    rare = TabularLM.random(4, 3, seed=0) * Reward(lambda texts: [0.0] * len(texts), upper=4, name="rare")
    posterior = infer(rare, Rejection(max_tries=2000), 5)
    with pytest.raises(BudgetExhausted, match="of 500 draws; raise its max_tries"):
        posterior.draw(500)


def test_an_event_that_no_draw_shows_has_no_interval():
    posterior = infer(TabularLM.random(4, 3, seed=0), Rejection(), 20)
    unseen = posterior.expectation(lambda texts: [0.0] * len(texts))
    assert unseen.value.item() == 0.0
    assert bool(unseen.interval.isnan().all())
    assert "no interval" in unseen.note
