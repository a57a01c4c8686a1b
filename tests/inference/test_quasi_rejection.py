"""Quasi-rejection: the law of the engine by brute force, and what a run says about itself."""

from __future__ import annotations

import math

import pytest
import torch

from lmppl.diagnostics.quasi_rejection import quasi_rejection_curve
from lmppl.errors import FactorError, InfeasibleModel, ModelError, UnsupportedModel
from lmppl.inference.approximation import Sampler
from lmppl.inference.engine import Budget, Guarantee
from lmppl.inference.quasi_rejection import QuasiRejection, QuasiRejectionShard
from lmppl.inference.run import infer, stream
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence import Constraint, Reward
from lmppl.modeling.model import Model
from lmppl.modeling.target import Target
from lmppl.testing.enumeration import every_outcome
from tests.inference.whole_runs import check_that_a_stopped_run_goes_on, every_run, run_parts
from tests.models import (
    ENUMERABLE,
    TOLERANCE,
    brute_force,
    count_of,
    enumerable_lm,
    goodness_of_fit,
    has_no,
    wavy,
)
from tests.quasi_rejection_cases import HARD, SOFT, model_of, weights_of

BOUNDED = (Reward(wavy, beta=0.5, upper=1.0, name="wavy"), Constraint(has_no("b"), name="no b"))


# The law, exactly.


@pytest.mark.parametrize("kind", ENUMERABLE)
def test_the_whole_engine_has_the_law_it_says(kind) -> None:
    """One shard by enumeration: each accepted draw has the law γ_q/Z_q in each context, whatever came before it.

    Weighted by e^excess it has that of γ.
    """
    model = Model(enumerable_lm(kind), HARD)
    engine, log_bounds = QuasiRejection(bound=-0.3), (-0.3, -0.1)
    for c in (0, 1):
        target, shard = Target(model), QuasiRejectionShard(0, 1, 0, (c,), 1, 1, log_bounds)
        found: dict = {}
        weighted: dict = {}
        total = 0.0
        for probability, part in every_outcome(lambda source, t=target, s=shard: engine.simulate(t, s, source)):
            total += probability
            for key, excess in zip(part.draws.keys(), part.draws.columns["excess"].exp().tolist(), strict=True):
                found[key] = found.get(key, 0.0) + probability
                weighted[key] = weighted.get(key, 0.0) + probability * excess
        assert total == pytest.approx(1.0, abs=TOLERANCE)
        table = brute_force(model, c)
        law = torch.minimum(table.log_gamma, log_bounds[c] + table.log_prior).exp() / math.exp(log_bounds[c])
        for key, value in zip(table.sequences.keys(), law.tolist(), strict=True):
            assert found.get(key, 0.0) == pytest.approx(value, abs=TOLERANCE)
        gamma = (table.log_gamma - log_bounds[c]).exp()
        for key, value in zip(table.sequences.keys(), gamma.tolist(), strict=True):
            assert weighted.get(key, 0.0) == pytest.approx(value, abs=TOLERANCE)
        assert not torch.allclose(gamma, law, atol=1e-3, rtol=0)


@pytest.mark.parametrize("max_tries", [3, 4])
def test_over_all_runs_the_estimate_from_weights_is_unbiased(max_tries) -> None:
    """A bound below every weight accepts all that weigh, so that a run without a draw has Ẑ = 0."""
    lm = TabularLM([[0.5, 0.5], [0.3, 0.7], [0.6, 0.4]], ["a", "b"], eos=None, max_new_tokens=1)
    model = lm * Reward(lambda texts: [2.0 * (t == "a") for t in texts], name="a") * Constraint(has_no("b"), name="b")
    z = float(brute_force(model, 0).log_z.exp())
    engine = QuasiRejection(bound=-5.0, max_tries=max_tries, batch=1)
    total, mean, naive = 0.0, 0.0, 0.0
    for probability, result in every_run(engine, model, 2):
        total += probability
        if result is None:
            continue
        assert result.log_normalizer[0].kind == "unbiased_Z"
        mean += probability * float(result.log_normalizer[0].value[0].exp())
        accepted, tried = int(result.info["accepted"][0]), int(result.info["proposals"][0])
        naive += probability * math.exp(2.0) * accepted / tried
    assert total == pytest.approx(1.0, abs=TOLERANCE)
    assert mean == pytest.approx(z, abs=TOLERANCE)
    assert abs(naive - z) > 1e-3  # mutant: the last acceptance counted, although the run ends at it


# Runs.


@pytest.mark.parametrize("kind", ENUMERABLE)
def test_a_run_gives_its_draws_and_figures_that_agree_with_enumeration(kind) -> None:
    model = model_of(kind, HARD)
    # The random networks are so sharp that another one's draws miss most of their mass, and no figure would see it.
    other = kind == "tabular"
    proposal = enumerable_lm(kind, seed=3) if other else None
    result = infer(model, QuasiRejection(acceptance=0.25, proposal=proposal), 600, seed=1)
    assert isinstance(result, Sampler)
    assert result.guarantee is Guarantee.APPROXIMATE
    draws = result.draws
    assert draws.context.tolist() == [0] * 600 + [1] * 600
    assert draws.log_weight is None
    assert set(draws.columns) == {"shard", "proposal", "excess"}
    for c in (0, 1):
        table = brute_force(model, c)
        log_q, log_w = weights_of(kind, table, other)
        bound = result.info["log_bound"][c]
        law = torch.minimum(table.log_gamma, bound + log_q)
        rate = math.exp(float(torch.logsumexp(law, 0) - bound))
        law = law - torch.logsumexp(law, 0)
        mine = draws.select(draws.context == c)
        assert goodness_of_fit(mine, table, law) > 1e-4
        assert rate == pytest.approx(0.25, abs=0.08)
        assert float(result.info["acceptance_rate"][c]) == pytest.approx(rate, abs=0.08)
        possible = log_q > -math.inf
        exact = quasi_rejection_curve(log_w[possible], bound[None], log_masses=log_q[possible])
        for name in ("total_variation", "total_variation_bound", "kl", "reverse_kl"):
            value, error = float(result.info[name][c]), float(result.info[f"{name}_error"][c])
            assert abs(value - float(getattr(exact, name).value)) < 4.5 * error + 2e-3, name
        best, lower = result.log_normalizer
        assert float(best.interval[c, 0]) - 0.05 < float(table.log_z) < float(best.interval[c, 1]) + 0.05
        assert lower.kind == "lower_bound"
        log_zq = float(torch.logsumexp(torch.minimum(table.log_gamma, bound + log_q), 0))
        assert float(lower.interval[c, 0]) - 0.05 < log_zq < float(lower.interval[c, 1]) + 0.05


def test_the_pilot_counts_for_nothing_but_the_bound() -> None:
    parts = run_parts(QuasiRejection(acceptance=0.3, pilot=200), model_of("tabular", HARD), 30)
    assert parts[0].shard.log_bounds == ()
    assert len(parts[0].draws) == 0
    result = QuasiRejection(acceptance=0.3, pilot=200).merge(parts)
    assert int(result.info["proposals"].max()) <= sum(p.shard.num_draws for p in parts[1:])
    assert len({p.shard.log_bounds for p in parts[1:]}) == 1


def test_a_declared_bound_is_never_exceeded_and_makes_the_law_exact() -> None:
    model = model_of("tabular", BOUNDED)
    result = infer(model, QuasiRejection(acceptance=0.001), 300)
    assert result.info["log_bound"].tolist() == [2.0, 2.0]
    assert result.info["total_variation"].tolist() == pytest.approx([0.0, 0.0], abs=1e-12)
    assert result.info["exceeding"].tolist() == [0, 0]
    assert float(result.info["acceptance_rate"].min()) > 0.05


def test_equal_seeds_give_equal_draws_also_as_a_stream() -> None:
    model, engine = model_of("tabular", HARD), QuasiRejection(acceptance=0.3)
    first, again, other = (infer(model, engine, 40, seed=s).draws for s in (0, 0, 1))
    assert first.keys() == again.keys() != other.keys()
    streamed = [key for draws in stream(model, engine, 40) for key in draws.keys()]  # noqa: SIM118
    assert sorted(streamed) == sorted(first.keys())


def test_a_run_that_stops_at_its_first_acceptance_claims_no_unbiased_estimate() -> None:
    first, second = (infer(model_of("tabular"), QuasiRejection(bound=1.0), n).log_normalizer[0] for n in (1, 2))
    assert (first.kind, second.kind) == ("consistent", "unbiased_Z")
    assert "ask for two draws or more" in first.note


def test_a_sampler_draws_more() -> None:
    posterior = infer(model_of("tabular", HARD), QuasiRejection(bound=1.0), 20)
    more = posterior.draw(15, generator=torch.Generator().manual_seed(3))
    assert torch.bincount(more.context).tolist() == [15, 15]


def test_a_budget_ends_the_run() -> None:
    result = infer(model_of("tabular", HARD), QuasiRejection(bound=0.5, batch=32), budget=Budget(lm_tokens=2000))
    assert result.cost.lm_tokens >= 2000
    assert "shortfall" not in result.info


def test_a_run_that_was_stopped_goes_on_to_the_same_draws(tmp_path) -> None:
    check_that_a_stopped_run_goes_on(model_of("tabular", HARD), QuasiRejection(acceptance=0.3, batch=32), 60, tmp_path)


def test_a_curve_before_sampling_predicts_the_run() -> None:
    model = model_of("llama", HARD)
    curves = QuasiRejection().curve(model, 3000, seed=4)
    assert len(curves) == 2
    for curve in curves:
        assert curve.acceptance.value.tolist() == sorted(curve.acceptance.value.tolist(), reverse=True)
        assert curve.total_variation.value.tolist() == sorted(curve.total_variation.value.tolist(), reverse=True)
    chosen = float(curves[0].log_bound[1])
    given = QuasiRejection().curve(model, 3000, seed=4, log_bounds=[chosen])
    assert float(given[0].acceptance.value) == pytest.approx(float(curves[0].acceptance.value[1]))
    result = infer(model, QuasiRejection(bound=chosen), 800)
    expected = float(curves[0].acceptance.value[1])
    assert float(result.info["acceptance_rate"][0]) == pytest.approx(expected, abs=0.06)


def test_a_curve_of_a_constraint_that_is_rarer_than_every_rate_says_so() -> None:
    rare = TabularLM.random(4, 5, seed=0) * Constraint(lambda texts: [t == "bbaaa" for t in texts], name="bbaaa")
    with pytest.raises(InfeasibleModel, match=r"of 4,096 proposals have γ > 0.*log_bounds="):
        QuasiRejection().curve(rare)


def test_a_curve_checks_its_arguments() -> None:
    model = model_of("tabular", HARD)
    for count in (0, -5, 2.5):
        with pytest.raises(ModelError, match=f"curve: got num_proposals={count}, expected an integer"):
            QuasiRejection().curve(model, count)
    with pytest.raises(ModelError, match="got bound and acceptance"):
        QuasiRejection(bound=1.0, acceptance=0.5).curve(model)
    with pytest.raises(ModelError, match="seed: got 'x'"):
        QuasiRejection().curve(model, seed="x")
    with pytest.raises(UnsupportedModel, match="needs exact factor values"):
        QuasiRejection().curve(model.prior * Reward(lambda texts: [0.0] * len(texts), stochastic=True))


def test_live_figures() -> None:
    engine = QuasiRejection(acceptance=0.3)
    parts = run_parts(engine, model_of("tabular", HARD), 30)
    assert engine.live(parts[:1]) == {"pilot": "1,024"}
    assert set(engine.live(parts)) == {"draws", "acceptance", "TV ≤"}


# What goes wrong.


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        (QuasiRejection(bound=0.0, acceptance=0.5), "got bound and acceptance"),
        (QuasiRejection(bound=math.inf), "got bound=inf"),
        (QuasiRejection(acceptance=1.0), "got acceptance=1.0"),
        (QuasiRejection(max_tries=0), "max_tries=0"),
        (QuasiRejection(pilot=0), "pilot=0"),
    ],
)
def test_nonsense_is_refused_when_planned(engine, words) -> None:
    with pytest.raises(ModelError, match=words):
        infer(enumerable_lm("tabular"), engine)


def test_an_acceptance_rate_out_of_reach_says_what_to_do() -> None:
    rare = enumerable_lm("tabular") * Constraint(lambda texts: [t == "aaa" for t in texts], name="aaa")
    with pytest.raises(InfeasibleModel, match=r"for context '' an acceptance rate of 0.9 .* lower acceptance="):
        infer(rare, QuasiRejection(acceptance=0.9), 10)


def test_nothing_accepted_bounds_the_rate() -> None:
    with pytest.raises(InfeasibleModel, match=r"0 of 200 proposals accepted for context ''.*log M_q = 40"):
        infer(model_of("tabular"), QuasiRejection(bound=40.0, max_tries=200), 10)
    never = enumerable_lm("tabular") * Constraint(lambda texts: [False] * len(texts), name="never")
    with pytest.raises(
        InfeasibleModel, match=r"for context '' \(and for 1 more\) have γ = 0 \(factor 'never' is 0 on "
    ):
        infer(never, QuasiRejection(), 10)


def test_too_few_draws_are_returned_and_said(caplog) -> None:
    with caplog.at_level("WARNING", logger="lmppl"):
        result = infer(model_of("tabular", HARD), QuasiRejection(bound=2.0, max_tries=300), 290)
    assert result.info["shortfall"] == ["", "ab"]
    assert "raise max_tries" in caplog.text


def test_a_value_above_a_declared_bound_is_an_error() -> None:
    broken = enumerable_lm("tabular") * Reward(count_of("a"), beta=1.0, upper=1.0, name="a")
    with pytest.raises(FactorError, match="above the declared upper"):
        infer(broken, QuasiRejection(bound=0.0), 100)


def test_a_proposal_that_may_not_cover_is_noted() -> None:
    from tests.lm.random_models import random_lm

    prior, narrow = enumerable_lm("llama"), random_lm("llama", top_k=2)
    model = Model(prior, SOFT)
    result = infer(model, QuasiRejection(bound=1.0, proposal=narrow), 50)
    estimate, lower = result.log_normalizer
    assert "may not cover π*: then E Ẑ < Z" in estimate.note
    assert lower.kind == "lower_bound"
    assert "distances are lower bounds" in result.info["distances_note"]
    curve = QuasiRejection(proposal=narrow).curve(model, 500)[0]
    assert all("lower bounds" in getattr(curve, name).note for name in ("total_variation", "kl", "reverse_kl", "tail"))
    table = brute_force(model, 0)
    log_q = narrow.score(table.sequences)
    log_q = log_q[table.sequences.context == 0] if len(log_q) != len(table.log_gamma) else log_q
    reached = log_q > -math.inf
    assert not bool(reached.all()), "the proposal covers everything after all"
    bound = torch.tensor([1.0], dtype=torch.float64)
    exact = quasi_rejection_curve(table.log_gamma[reached] - log_q[reached], bound, log_masses=log_q[reached])
    law = torch.where(reached, torch.minimum(table.log_gamma, 1.0 + log_q), -math.inf)
    law = (law - torch.logsumexp(law, 0)).exp()
    true = 0.5 * float((law - table.log_posterior.exp()).abs().sum())
    assert float(exact.total_variation.value) < true
    covering = infer(model, QuasiRejection(bound=1.0, proposal=random_lm("llama")), 50)
    assert "distances_note" not in covering.info
    assert "may not cover" not in covering.log_normalizer[0].note


def test_a_proposal_must_fit_the_prior() -> None:
    with pytest.raises(ModelError, match="proposal: got"):
        infer(model_of("tabular"), QuasiRejection(bound=0.0, proposal=TabularLM.random(4, 3, seed=0)))
