"""Importance: unbiasedness by enumeration of the engine's own weights, proposals, refusals, and what it costs."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lmppl.diagnostics import log_mean_weight
from lmppl.errors import FactorError, InfeasibleModel, ModelError, UnsupportedModel
from lmppl.inference.approximation import Particles
from lmppl.inference.engine import Guarantee, Part
from lmppl.inference.exact import Exact
from lmppl.inference.importance import Importance, importance_log_weights, log_mixture
from lmppl.inference.run import infer
from lmppl.lm.base import LanguageModel
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence import Constraint, Optimality, Reward
from lmppl.modeling.factors import Factor, Feature
from lmppl.modeling.model import Model
from lmppl.modeling.target import Target, log_evidence
from lmppl.sequences import Sequences
from tests.models import ENUMERABLE, TOLERANCE, BruteForce, brute_force, enumerable_lm, has_no, wavy

FACTORS = {
    "reward": (Reward(wavy, beta=0.5, name="wavy"),),
    "constraint": (Constraint(has_no("b"), name="no b"),),
    "optimality": (Optimality(lambda texts: [-math.inf if "aa" in t else -0.5 * len(t) for t in texts], name="o"),),
}


def with_zeros(table: Tensor, dropped: Tensor) -> Tensor:
    """log q with some outcomes taken out and the rest renormalised."""
    log_q = table.masked_fill(dropped, -math.inf)
    return log_q - torch.logsumexp(log_q, 0)


def two_draw_moments(log_gamma: Tensor, first: Tensor, second: Tensor, log_q: Tensor) -> tuple[float, float, float]:
    """E Ẑ, E[log Ẑ | Ẑ > 0] and Pr(Ẑ > 0) of two draws, the first from law `first`, the second from law `second`, both
    weighted by the engine's own function with the density `log_q`: every pair is written out."""
    drawn = (first > -math.inf) | (second > -math.inf)
    log_gamma, first, second, log_q = (t[drawn] for t in (log_gamma, first, second, log_q))
    log_w = importance_log_weights(log_gamma, log_q)
    mass = first.exp()[:, None] * second.exp()[None, :]
    log_z = torch.logaddexp(log_w[:, None], log_w[None, :]) - math.log(2)
    positive = log_z > -math.inf
    share = float(mass[positive].sum())
    return float((mass * log_z.exp()).sum()), float((mass[positive] * log_z[positive]).sum()) / share, share


@pytest.fixture(params=list(itertools.product(ENUMERABLE, FACTORS, (0, 1))), ids=lambda p: "-".join(map(str, p)))
def tables(request) -> tuple[BruteForce, Tensor]:
    """A written-out model and log q of another LM on the same outcomes."""
    kind, factors, context = request.param
    table = brute_force(Model(enumerable_lm(kind), FACTORS[factors]), context)
    return table, brute_force(enumerable_lm(kind, seed=1), context).log_prior


# Exact identities.


def test_the_mean_weight_is_unbiased_and_its_log_is_low(tables) -> None:
    table, log_q = tables
    z = float(table.log_z.exp())
    for q in (log_q, table.log_prior):
        mean, mean_log, positive = two_draw_moments(table.log_gamma, q, q, q)
        assert mean == pytest.approx(z, abs=TOLERANCE)
        assert mean_log <= math.log(z / positive)


def test_dropping_zero_weights_would_bias_the_estimate() -> None:
    table = brute_force(Model(enumerable_lm("tabular"), FACTORS["constraint"]), 0)
    log_w = importance_log_weights(table.log_gamma, table.log_prior)
    kept = log_w > -math.inf
    mutant = float((table.log_prior.exp()[kept] * log_w[kept].exp()).sum() / table.log_prior.exp()[kept].sum())
    assert mutant > float(table.log_z.exp()) + 0.05


def test_mean_log_probabilities_in_place_of_sums_would_bias_the_estimate(tables) -> None:
    table, log_q = tables
    per_token = log_q / table.sequences.lengths
    mean, _, _ = two_draw_moments(table.log_gamma, log_q, log_q, per_token)
    assert abs(mean - float(table.log_z.exp())) > 1e-3


def test_a_proposal_that_does_not_cover_is_too_low_and_the_defensive_mixture_is_not(tables) -> None:
    table, log_q = tables
    z = float(table.log_z.exp())
    short = with_zeros(log_q, table.log_posterior >= table.log_posterior.max() - 1e-12)
    mean, _, _ = two_draw_moments(table.log_gamma, short, short, short)
    assert mean < z - 1e-3

    mixed = log_mixture(table.log_prior, short, 0.5)
    stratified, _, _ = two_draw_moments(table.log_gamma, table.log_prior, short, mixed)
    assert stratified == pytest.approx(z, abs=TOLERANCE)
    random, _, _ = two_draw_moments(table.log_gamma, mixed, mixed, mixed)
    assert random == pytest.approx(z, abs=TOLERANCE)


def test_dividing_by_the_component_density_would_bias_the_mixture() -> None:
    table = brute_force(Model(enumerable_lm("tabular"), FACTORS["reward"]), 0)
    short = with_zeros(table.log_prior, table.log_posterior == table.log_posterior.max())
    components = [(table.log_prior, 0.5), (short, 0.5)]
    mutant = 0.0
    for log_part, share in components:
        drawn = log_part > -math.inf
        log_w = importance_log_weights(table.log_gamma[drawn], log_part[drawn])
        mutant += share * float((log_part[drawn].exp() * log_w.exp()).sum())
    assert mutant < float(table.log_z.exp()) - 1e-3


def test_the_mixture_bounds_the_weights(tables) -> None:
    table, log_q = tables
    inside = table.log_prior > -math.inf
    log_w = importance_log_weights(table.log_gamma, log_mixture(table.log_prior, log_q, 0.1))[inside]
    assert bool((log_w <= table.log_phi[inside] - math.log(0.1) + TOLERANCE).all())


def test_a_density_of_zero_at_a_draw_is_an_error() -> None:
    with pytest.raises(ModelError, match="log q = -inf to its own draw 1"):
        importance_log_weights(torch.zeros(2), torch.tensor([0.0, -math.inf]))


# The run's weights are those of the identities.


def proposals(kind: str) -> dict[str, Importance]:
    other = enumerable_lm(kind, seed=1)
    return {
        "prior": Importance(60),
        "proposal": Importance(60, other),
        "defensive": Importance(60, other, defensive=0.25),
    }


@pytest.mark.parametrize("kind", ENUMERABLE)
@pytest.mark.parametrize("way", ["prior", "proposal", "defensive"])
@pytest.mark.parametrize("factors", FACTORS)
def test_weights_are_gamma_over_q(kind, way, factors) -> None:
    model = Model(enumerable_lm(kind), FACTORS[factors])
    result = infer(model, proposals(kind)[way])
    draws = result.draws
    log_prior, log_q = model.prior.score(draws), enumerable_lm(kind, seed=1).score(draws)
    expected = {"prior": log_prior, "proposal": log_q, "defensive": log_mixture(log_prior, log_q, 0.25)}[way]
    assert torch.allclose(draws.log_q, expected, rtol=0, atol=TOLERANCE)
    assert torch.allclose(draws.log_prior, log_prior, rtol=0, atol=TOLERANCE)
    target = Target(model)
    assert torch.allclose(
        draws.log_weight, target.log_prob_unnormalized(draws) - expected, rtol=0, atol=TOLERANCE, equal_nan=False
    )
    for c in (0, 1):
        own = draws.log_weight[draws.context == c]
        assert len(own) == 60
        assert float(result.log_normalizer[-1].value[c]) == pytest.approx(
            float(torch.logsumexp(own, 0)) - math.log(60), abs=TOLERANCE
        )


def test_from_the_prior_the_weight_is_the_evidence_exactly() -> None:
    model = Model(enumerable_lm("llama"), FACTORS["optimality"])
    draws = infer(model, Importance(100)).draws
    assert torch.equal(draws.log_weight, log_evidence(draws))
    assert bool((draws.log_weight == -math.inf).any())


def test_a_run_returns_weighted_draws_and_figures() -> None:
    model = Model(enumerable_lm("tabular"), FACTORS["reward"])
    result = infer(model, Importance(), 700)
    assert isinstance(result, Particles)
    assert result.guarantee is Guarantee.CONSISTENT
    assert result.draws.context.tolist() == [0] * 700 + [1] * 700
    assert len(torch.unique(result.draws.columns["shard"])) == 2
    for name in ("ess", "entropy_ess", "khat", "max_weight_share", "zero_weight_share"):
        assert result.info[name].shape == (2,)
    assert len(result.info["khat_note"]) == 2
    assert infer(model, Importance(17)).draws.context.tolist() == [0] * 17 + [1] * 17


def test_the_same_seed_repeats_the_draws_and_another_does_not() -> None:
    model = Model(enumerable_lm("tabular"), FACTORS["reward"])
    engine = Importance(40, enumerable_lm("tabular", seed=1), defensive=0.3)
    first, again, other = (infer(model, engine, seed=s).draws for s in (5, 5, 6))
    assert torch.equal(first.ids, again.ids)
    assert torch.equal(first.log_weight, again.log_weight)
    assert not torch.equal(first.ids, other.ids)


def test_the_exact_posterior_as_proposal_gives_equal_weights() -> None:
    model = Model(enumerable_lm("tabular"), FACTORS["reward"])
    exact = infer(model, Exact())
    result = infer(model, Importance(50, exact))
    for c in (0, 1):
        log_z = float(brute_force(model, c).log_z)
        own = result.draws.log_weight[result.draws.context == c]
        assert torch.allclose(own, torch.full_like(own, log_z), rtol=0, atol=TOLERANCE)
    assert result.info["ess"].tolist() == pytest.approx([50.0, 50.0])


def test_the_stratum_of_the_prior_is_at_least_its_share() -> None:
    """One draw a shard: all of it comes from the prior, and its weight says so."""
    prior = TabularLM([0.5, 0.5, 0.0], max_new_tokens=1)
    only_a = TabularLM([1.0, 0.0, 0.0], max_new_tokens=1)
    draws = infer(Model(prior), Importance(1, only_a, defensive=0.01)).draws
    assert torch.equal(draws.log_q.double(), draws.log_prior.double())
    whole = infer(Model(prior), Importance(1000, only_a, defensive=0.01)).draws
    assert math.exp(float(torch.logsumexp(whole.log_weight, 0))) / 1000 == pytest.approx(1.0, abs=0.5)
    assert bool(whole.log_weight.max() <= math.log(100.0) + 1e-12)


# Outcomes off the support of the prior.


def test_draws_off_the_priors_support_have_weight_zero_and_factors_never_see_them() -> None:
    prior = TabularLM([[0.5, 0.0, 0.5]] * 4, ["a", "b", "<eos>"], max_new_tokens=2)
    wide = TabularLM([[0.4, 0.3, 0.3]] * 4, ["a", "b", "<eos>"], max_new_tokens=2)

    def strict(texts: list[str]) -> list[float]:
        assert all("b" not in t for t in texts)
        return [float(len(t)) for t in texts]

    result = infer(Model(prior, (Reward(strict, name="strict"),)), Importance(200, wide))
    outside = result.draws.log_prior == -math.inf
    assert bool(outside.any())
    assert bool((result.draws.log_weight[outside] == -math.inf).all())
    assert bool(result.draws.features["strict"][outside].isnan().all())
    assert float(result.info["zero_weight_share"][0]) == pytest.approx(float(outside.double().mean()))
    assert math.isfinite(float(result.expectation("strict").value))


# Estimates.


def test_hard_constraints_from_the_prior_have_the_clopper_pearson_interval() -> None:
    model = Model(enumerable_lm("tabular"), FACTORS["constraint"])
    binary, delta = infer(model, Importance(400)).log_normalizer
    assert "Clopper–Pearson" in binary.note
    assert "delta" in delta.note
    assert torch.allclose(binary.value, delta.value, rtol=0, atol=TOLERANCE)
    easy = Model(enumerable_lm("tabular"), (Constraint(lambda texts: [True] * len(texts)),))
    binary, delta = infer(easy, Importance(400)).log_normalizer
    assert bool((binary.interval[:, 0] < 0).all()), "400 of 400 does not prove that Z = 1"
    assert bool(delta.interval.isnan().all())


def test_bounded_evidence_adds_a_finite_sample_interval() -> None:
    bounded = Model(enumerable_lm("tabular"), (Reward(wavy, upper=1.0),))
    delta, bernstein = infer(bounded, Importance(500)).log_normalizer
    assert "empirical Bernstein" in bernstein.note
    assert bool((bernstein.interval.diff(dim=1) > delta.interval.diff(dim=1)).all())
    other = enumerable_lm("tabular", seed=1)
    assert len(infer(bounded, Importance(500, other)).log_normalizer) == 1, "γ/q has no known bound"
    assert len(infer(bounded, Importance(500, other, defensive=0.5)).log_normalizer) == 2
    assert len(infer(Model(enumerable_lm("tabular"), FACTORS["reward"]), Importance(500)).log_normalizer) == 1


def test_heavy_tails_make_the_interval_say_so() -> None:
    heavy = Reward(lambda rows: heavy_tail(rows.ids), on="ids", name="heavy")
    prior = TabularLM(torch.full((64,), 1 / 64), eos=None, max_new_tokens=2)
    result = infer(Model(prior, (heavy,)), Importance(1000))
    assert float(result.info["khat"][0]) > 0.7
    assert "not to be trusted" in result.log_normalizer[0].note
    smoothed = infer(Model(prior, (heavy,)), Importance(1000, pareto_smoothing=True))
    assert torch.equal(smoothed.draws.columns["raw_log_weight"], result.draws.log_weight)
    assert not torch.equal(smoothed.draws.log_weight, result.draws.log_weight)
    assert torch.equal(smoothed.log_normalizer[0].value, result.log_normalizer[0].value)
    assert torch.equal(smoothed.info["ess"], result.info["ess"])


def heavy_tail(ids: Tensor) -> list[float]:
    """Rewards whose exponentials have a Pareto tail with k = 1.5 over 4096 equally likely texts."""
    rank = ids[:, 0] * 64 + ids[:, 1]
    return (-1.5 * ((rank + 0.5) / 4096).log()).tolist()


def test_tied_weights_leave_khat_undefined_with_a_reason() -> None:
    result = infer(Model(enumerable_lm("tabular"), FACTORS["constraint"]), Importance(400))
    assert bool(result.info["khat"].isnan().all())
    assert all(note.startswith("k̂ undefined") for note in result.info["khat_note"])


def test_weights_at_their_bound_survive_rounding() -> None:
    """All evidence holds and q is negligible at the prior's draws, so that w = 1/α up to rounding."""
    prior = TabularLM([0.55, 0.3, 0.15], ["a", "b", "<eos>"], max_new_tokens=12)
    elsewhere = TabularLM([1e-9, 1 - 2e-9, 1e-9], ["a", "b", "<eos>"], max_new_tokens=12)
    model = prior * Constraint(lambda texts: [True] * len(texts), name="always")
    for share, seed in itertools.product((0.1, 0.3, 0.7), range(3)):
        estimates = infer(model, Importance(200, proposal=elsewhere, defensive=share), seed=seed).log_normalizer
        low, high = estimates[1].interval[0].tolist()
        assert low <= 0.0 <= high


def test_factors_read_the_priors_text_whatever_the_proposal_calls_its_tokens() -> None:
    """γ is a function of the ids, which only the prior may decode."""

    class Shouts(TabularLM):
        def decode(self, sequences: Sequences) -> list[str]:
            return [text.upper() for text in super().decode(sequences)]

    prior = TabularLM([0.5, 0.3, 0.2], ["a", "b", "<eos>"], max_new_tokens=3)
    renamed = Shouts([0.5, 0.3, 0.2], ["a", "b", "<eos>"], max_new_tokens=3)
    model = prior * Reward(lambda texts: [float(t.count("a")) for t in texts], name="a")
    draws = infer(model, Importance(200, proposal=renamed)).draws
    assert draws.text == prior.decode(draws)
    assert draws.features["a"].tolist() == [text.count("a") for text in draws.text]


def test_a_truncated_proposal_is_noted() -> None:
    prior = enumerable_lm("llama")
    from tests.lm.random_models import random_lm

    narrow = random_lm("llama", top_k=2)
    result = infer(Model(prior, FACTORS["reward"]), Importance(100, narrow))
    assert "may not cover" in result.log_normalizer[0].note
    safe = infer(Model(prior, FACTORS["reward"]), Importance(100, narrow, defensive=0.1))
    assert "may not cover" not in safe.log_normalizer[0].note


# Refusals.


NEVER = Constraint(lambda texts: [False] * len(texts), name="never")


def test_all_zero_weights_bound_z_where_the_weights_are_bounded() -> None:
    model = Model(enumerable_lm("tabular"), (Reward(wavy, upper=2.0), NEVER))
    told = r"all 300 draws .* \(and for 1 more\) .*zero \(factor 'never' is 0 on 300\): Z < 9\.9e-03·M, log M = 2,"
    with pytest.raises(InfeasibleModel, match=told):
        infer(model, Importance(300))
    unbounded = Model(enumerable_lm("tabular"), (Reward(wavy), NEVER))
    with pytest.raises(InfeasibleModel, match=r"Pr_q\(γ > 0\) < 9\.9e-03 .* no bound on Z follows"):
        infer(unbounded, Importance(300))


MISFITS = {
    "vocabulary": (TabularLM.random(5, 4, context=["", "ab"]), "got vocab_size 5, expected the prior's 4"),
    "contexts": (
        TabularLM.random(4, 4),
        r"got prompts \('',\), expected .*'ab'\).*proposal \| contexts",
    ),
    "cap": (TabularLM.random(4, 3, context=["", "ab"]), "got max_new_tokens 3, expected the prior's 4"),
    "eos": (TabularLM.random(4, 4, eos=None, context=["", "ab"]), r"got eos_ids \(\), expected the prior's \(3,\)"),
    "no lm": ("gpt2", "got str, expected a language model"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_proposal_that_does_not_fit_is_refused(case) -> None:
    proposal, words = MISFITS[case]
    with pytest.raises(ModelError, match=words):
        infer(enumerable_lm("tabular"), Importance(10, proposal))


def test_a_proposal_that_ends_elsewhere_is_refused() -> None:
    from tests.lm.random_models import random_lm

    with pytest.raises(ModelError, match="no outcome of the prior"):
        infer(random_lm("llama"), Importance(50, random_lm("llama", stop="a")))


def test_draws_without_a_density_are_no_proposal() -> None:
    model = Model(enumerable_lm("tabular"), FACTORS["reward"])
    with pytest.raises(UnsupportedModel, match="no language model"):
        infer(model, Importance(10, infer(model, Importance(20))))


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        (Importance(10, defensive=0.1), "without a proposal"),
        (Importance(10, enumerable_lm("tabular", seed=1), defensive=1.0), r"expected a share in \[0, 1\)"),
        (Importance(10, enumerable_lm("tabular", seed=1), defensive=-0.1), r"expected a share in \[0, 1\)"),
        (Importance(0), "num_draws"),
    ],
)
def test_nonsense_configuration_is_refused_when_planned(engine, words) -> None:
    with pytest.raises(ModelError, match=words):
        infer(enumerable_lm("tabular"), engine)


def test_a_lie_about_the_bound_is_an_error() -> None:
    feature = Feature("length", lambda texts: [float(len(t)) for t in texts])
    liar = Factor("liar", (feature,), lambda columns: columns["length"], upper=1.5)
    with pytest.raises(FactorError, match="above its declared upper"):
        infer(enumerable_lm("tabular") * liar, Importance(200))


# Cost.


def cost_of(model: Model, engine: Importance) -> int:
    return infer(model, engine).cost.lm_forwards


def test_the_prior_as_proposal_costs_no_scoring_pass() -> None:
    model = Model(enumerable_lm("llama"), FACTORS["reward"])
    horizon = model.prior.max_new_tokens
    plain = cost_of(model, Importance(64))
    assert plain <= horizon
    assert cost_of(model, Importance(64, model.prior)) == plain
    other: LanguageModel = enumerable_lm("llama", seed=1)
    assert plain < cost_of(model, Importance(64, other)) <= horizon + 2


def test_a_part_keeps_whole_draws_so_that_merging_is_stacking() -> None:
    engine, model = Importance(300), Model(enumerable_lm("tabular"), FACTORS["reward"])
    parts: list[Part] = []
    whole = infer(model, engine, 1500, on_part=parts.append)
    assert len(parts) > 1
    again = engine.merge([replace(p) for p in parts])
    assert torch.equal(whole.draws.log_weight, again.draws.log_weight)
    estimate = log_mean_weight(whole.draws.log_weight[whole.draws.context == 1])
    assert float(whole.log_normalizer[0].value[1]) == pytest.approx(float(estimate.value))
    assert set(engine.live(parts)) == {"draws", "lowest ESS/N", "log Ẑ"}
