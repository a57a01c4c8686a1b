"""Rejection: its law by enumeration, its stopping rule, its refusals, and what it costs."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re

import pytest
import torch
from torch import Tensor

from lmppl.errors import BudgetExhausted, FactorError, InfeasibleModel, ModelError, UnsupportedModel
from lmppl.inference.approximation import Sampler
from lmppl.inference.engine import Budget, Guarantee
from lmppl.inference.rejection import Rejection, accepts, log_acceptance_probability
from lmppl.inference.run import infer
from lmppl.lm.base import LanguageModel
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence import Constraint, Optimality, Reward
from lmppl.modeling.factors import Factor, Feature
from lmppl.modeling.model import Model
from lmppl.modeling.target import Target
from tests.inference.whole_runs import every_run, run_parts
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


# The engine, choice by choice.


LAWS = {
    "reward": (Reward(wavy, beta=0.6, upper=2.0, name="wavy"),),
    "constraint": (Constraint(has_no("aa"), name="no aa"),),
    "product": (Reward(wavy, beta=0.6, upper=2.0, name="wavy"), Constraint(has_no("aa"), name="no aa")),
}


def small(kind: str) -> LanguageModel:
    """An LM with so few outcomes that a run can be enumerated on it: 3 on the table, 7 on the networks."""
    if kind == "tabular":
        return TabularLM([[0.7, 0.3], [0.0, 1.0], [0.45, 0.55]], ["a", "<eos>"], max_new_tokens=2)
    from lmppl.lm.transformers import TransformersLM
    from tests.lm.random_models import build, tokenizer

    return TransformersLM(build(kind, 3, seed=1), tokenizer=tokenizer(3), context="a", max_new_tokens=2)


RUNS = [
    *(("tabular", factors, Rejection(batch=batch, max_tries=3), 2) for factors in LAWS for batch in (1, 2, 3)),
    ("llama", "reward", Rejection(batch=2, max_tries=2), 2),
    ("mistral", "product", Rejection(batch=1, max_tries=2), 2),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "factors", "engine", "num_draws"), RUNS, ids=range(len(RUNS)))
def test_over_all_runs_accepted_draws_have_the_posterior_and_the_estimate_is_unbiased(
    kind, factors, engine, num_draws
) -> None:
    """Each draw of a run that has k of them has the law π*, for every k; E Ẑ = Z, ended by an acceptance or the cap."""
    model = Model(small(kind), LAWS[factors])
    table = brute_force(model, 0)
    total, mean, naive, masses = 0.0, 0.0, 0.0, {}
    for probability, result in every_run(engine, model, num_draws):
        total += probability
        if result is None:
            continue
        mean += probability * math.exp(float(result.log_normalizer[0].value))
        naive += probability * math.exp(float(result.info["acceptance_rate"].log() + result.info["log_upper"]))
        k = len(result.draws)
        for place, key in enumerate(result.draws.keys()):
            masses.setdefault((k, place), {}).setdefault(key, []).append(probability)
    assert total == pytest.approx(1.0, abs=TOLERANCE)
    assert mean == pytest.approx(float(table.log_z.exp()), abs=TOLERANCE)
    if num_draws < engine.max_tries:
        assert abs(naive - mean) > 1e-3, "the mutant k/N, although the run stops at its k-th acceptance, is biased"
    assert len(masses) == num_draws * (num_draws + 1) // 2
    for law in masses.values():
        reached = sum(sum(p) for p in law.values())
        for key, posterior in zip(table.sequences.keys(), table.log_posterior.exp().tolist(), strict=True):
            assert sum(law.get(key, [])) / reached == pytest.approx(posterior, abs=TOLERANCE)


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
    assert set(live) == {"draws", "tried", "acceptance", "log Ẑ"}
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


def announcements(caplog: pytest.LogCaptureFixture, model: Model, engine: Rejection, num_draws: int) -> list[str]:
    caplog.clear()
    with caplog.at_level("WARNING"), contextlib.suppress(InfeasibleModel):
        infer(model, engine, num_draws)
    return [r.getMessage() for r in caplog.records if "proposals is accepted" in r.getMessage()]


def test_a_long_run_is_announced(caplog):
    prior = TabularLM.random(4, 3, seed=0)
    rare = prior * Reward(lambda texts: [0.0] * len(texts), upper=9, name="rare")
    (message,) = announcements(caplog, rare, Rejection(max_tries=40_000, batch=4096), 300)
    assert "a tighter upper=, fewer draws, or the engine 'importance'" in message
    caplog.clear()
    with caplog.at_level("WARNING"):
        infer(prior * Reward(lambda texts: [0.0] * len(texts), upper=1, name="common"), Rejection(), 30)
    assert not caplog.records


def test_a_forecast_says_what_was_seen(caplog):
    prior = TabularLM.random(4, 3, seed=0)
    never = prior * Constraint(lambda texts: [False] * len(texts), name="never")
    (message,) = announcements(caplog, never, Rejection(max_tries=1200, batch=400), 100)
    assert "fewer than 1 in 1,200 proposals is accepted (none of 1,200 so far)" in message
    assert "100 draws need more than 120,000 proposals; fewer draws, or" in message
    assert "upper=" not in message
    seen = []

    def third(texts: list[str]) -> list[bool]:
        seen.extend(texts)
        return [len(seen) - len(texts) < 1000 <= len(seen) and i == 0 for i in range(len(texts))]

    once = prior * Constraint(Feature("third", third, stochastic=False), name="once")
    (message,) = announcements(caplog, once, Rejection(max_tries=1200, batch=400), 100)
    assert re.search(r"(about|fewer than) 1 in 1,200 proposals is accepted", message)


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
