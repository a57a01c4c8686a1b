"""MATH.md's exact identities of posterior, KL-RL, control and importance, on enumerable models in float64.

Each runs through the engines' own functions against brute force, for an explicit table, a Llama and a sliding-window
Mistral, two contexts each. A *mutant* is a wrong variant in circulation: the same check must fail on it.
"""

import math

import pytest
import torch
from torch import Tensor

from lmppl.diagnostics.divergences import kl_divergence, total_variation, total_variation_from_weights
from lmppl.diagnostics.normalizers import log_mean_weight
from lmppl.inference.approximation import ExactTable
from lmppl.inference.exact import Exact
from lmppl.inference.importance import importance_log_weights
from lmppl.inference.rejection import log_acceptance_probability
from lmppl.inference.run import infer
from lmppl.lm.base import LanguageModel
from lmppl.modeling.evidence.constraint import Constraint
from lmppl.modeling.evidence.reward import Reward
from lmppl.modeling.factors import Feature
from lmppl.modeling.model import Model
from lmppl.sequences import Sequences
from tests.models import ENUMERABLE, TOLERANCE, BruteForce, brute_force, count_of, enumerable_lm, has_no, wavy

BETA = 0.4
VISIBLE = 1e-3  # a mutant must be wrong by this much

pytestmark = [pytest.mark.parametrize("kind", ENUMERABLE), pytest.mark.parametrize("context", [0, 1])]


def soft_model(kind: str, beta: float = BETA) -> Model:
    return enumerable_lm(kind) * Reward(wavy, beta=beta)


def hard_model(kind: str) -> Model:
    return soft_model(kind) * Constraint(has_no("b"))


def exact(model: Model | LanguageModel) -> ExactTable:
    result = infer(model, Exact(), progress=False)
    assert isinstance(result, ExactTable)
    return result


def law_of(table: ExactTable | LanguageModel, brute: BruteForce) -> Tensor:
    """(S,) log-probabilities of the brute-force outcomes."""
    lm = table.as_language_model() if isinstance(table, ExactTable) else table
    return lm.score(brute.sequences)


def close(got: Tensor | float, expected: Tensor | float) -> bool:
    got, expected = (torch.as_tensor(v, dtype=torch.float64) for v in (got, expected))
    return torch.allclose(got, expected, rtol=0, atol=TOLERANCE)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return kl_divergence(log_p, log_q)


def mean(log_p: Tensor, values: Tensor) -> Tensor:
    inside = log_p > -math.inf
    return (log_p[inside].exp() * values[inside]).sum()


def conditionals(lm: LanguageModel, context: int, prefix: tuple[int, ...]) -> Tensor:
    """(V,) next-token log-probabilities after a prefix, through the decoder."""
    given = torch.tensor([prefix], dtype=torch.int64) if prefix else None
    with torch.no_grad():
        step, _ = lm.decoder().prefill(torch.tensor([context]), given)
        return step.log_probs[0, -1]


def prefixes(lm: LanguageModel, brute: BruteForce) -> list[tuple[int, ...]]:
    """Prefixes of positive posterior probability that go on."""
    values = brute.soft_values()
    return [
        u for u, v in values.items() if v > -math.inf and len(u) < lm.max_new_tokens and not set(u) & set(lm.eos_ids)
    ]


def after(prefix: tuple[int, ...], values: dict[tuple[int, ...], float], vocab_size: int) -> Tensor:
    """(V,) values of the prefixes that are one token longer."""
    return torch.tensor([values.get((*prefix, v), -math.inf) for v in range(vocab_size)], dtype=torch.float64)


# The posterior.


def test_the_prior_sums_to_one_because_the_cap_is_part_of_it(kind, context):
    lm = enumerable_lm(kind)
    assert close(brute_force(lm, context).log_prior.exp().sum(), 1.0)
    assert close(lm.enumerate_sequences(context).log_prior.exp().sum(), 1.0)
    assert close(exact(lm).log_normalizer[0].value[context], 0.0)


@pytest.mark.parametrize("model_of", [soft_model, hard_model])
def test_exact_is_gamma_over_z(kind, context, model_of):
    model = model_of(kind)
    brute, table = brute_force(model, context), exact(model)
    assert close(table.log_normalizer[0].value[context], brute.log_z)
    law = law_of(table, brute)
    assert close(law.exp(), brute.log_posterior.exp())
    possible = brute.log_posterior > -math.inf
    assert torch.equal(law > -math.inf, possible)
    assert close(law[possible], brute.log_posterior[possible])
    rows = table.draws.select(table.draws.context == context)
    assert close(rows.weights.sum(), 1.0)
    assert close(rows.weights, rows.log_q.exp())


def test_power_prior_is_not_temperature_per_token(kind, context):
    lm, alpha = enumerable_lm(kind), 1.7
    log_prior = Feature("log_prior", lm.score, on="ids")
    brute = brute_force(lm, context)
    law = law_of(exact(lm * Reward(log_prior, beta=1 / (alpha - 1))), brute)
    power = alpha * brute.log_prior
    power = power - torch.logsumexp(power, 0)
    assert close(law, power)
    per_token = brute_force(enumerable_lm(kind, temperature=1 / alpha), context).log_prior
    assert float(total_variation(law, per_token)) > VISIBLE  # mutant


def test_a_multiplier_solves_the_moment_problem(kind, context):
    """π0 e^{λf}/Z is the law nearest to π0 (in KL) among those with its mean of f; λ is the slope of that distance."""
    model, slope = soft_model(kind), 1 / BETA
    brute = brute_force(model, context)
    reward = brute.log_phi * BETA
    star = law_of(exact(model), brute)
    basis = torch.linalg.qr(torch.stack([torch.ones_like(reward), reward], 1)).Q
    nudge = torch.randn(len(reward), generator=torch.Generator().manual_seed(1), dtype=torch.float64) * star.exp()
    nudge = nudge - basis @ (basis.T @ nudge)
    other = (star.exp() + nudge * 0.5 * (star.exp() / nudge.abs()).min()).log()
    assert close(mean(other, reward), mean(star, reward))
    assert close(kl(other, brute.log_prior), kl(other, star) + kl(star, brute.log_prior))
    assert kl(other, star) > 0

    def at(multiplier: float) -> tuple[Tensor, Tensor]:
        law = law_of(exact(soft_model(kind, beta=1 / multiplier)), brute)
        return mean(law, reward), kl(law, brute.log_prior)

    (low, kl_low), (high, kl_high) = at(slope - 1e-5), at(slope + 1e-5)
    assert float((kl_high - kl_low) / (high - low)) == pytest.approx(slope, abs=1e-5)


# KL-regularised RL is variational inference.


def test_kl_rl_objective_is_minus_kl_to_the_posterior(kind, context):
    model = soft_model(kind)
    brute, table = brute_force(model, context), exact(model)
    star, log_z = law_of(table, brute), table.log_normalizer[0].value[context]
    reward = brute.log_phi * BETA
    for seed in (1, 2):
        policy = law_of(enumerable_lm(kind, seed=seed), brute)
        objective = mean(policy, reward) - BETA * kl(policy, brute.log_prior)
        assert close(objective, -BETA * kl(policy, star) + BETA * log_z)
        elbo = mean(policy, importance_log_weights(brute.log_gamma, policy))
        assert close(elbo, log_z - kl(policy, star))
        assert close(elbo, objective / BETA)
        shaped = reward + BETA * (brute.log_prior - policy)
        assert close(mean(policy, shaped), objective)
        assert close(BETA * log_z - objective, BETA * kl(policy, star))  # the frontier gap
        assert not math.isclose(objective, -BETA * kl(star, policy) + BETA * log_z, abs_tol=VISIBLE)  # mutant


def test_slope_of_log_z_is_the_posterior_mean_reward(kind, context):
    """d log Z / d(1/β) = E_π*[r], another factor fixed; the derivative by a seven-point stencil."""
    fixed, step = Constraint(has_no("c")), 3e-3
    lm = enumerable_lm(kind)

    def log_z(inverse: float) -> Tensor:
        return exact(lm * Reward(wavy, beta=1 / inverse) * fixed).log_normalizer[0].value[context]

    weights = {1: 3 / 4, 2: -3 / 20, 3: 1 / 60}
    at = 1 / BETA
    slope = sum(w * (log_z(at + k * step) - log_z(at - k * step)) for k, w in weights.items()) / step
    table = exact(lm * Reward(wavy, beta=BETA) * fixed)
    expected = table.expectation("wavy")
    assert expected.kind == "exact"
    assert close(slope, expected.value[context])
    prior_mean = mean(brute_force(lm, context).log_prior, brute_force(lm * Reward(wavy), context).log_phi)
    assert abs(float(slope - prior_mean)) > VISIBLE  # mutant: the mean under the prior


# Control as inference.


@pytest.mark.parametrize("model_of", [soft_model, hard_model])
def test_soft_values_steer_the_prior_to_the_posterior(kind, context, model_of):
    model = model_of(kind)
    prior, table, brute = model.prior, exact(model), brute_force(model, context)
    values, law = brute.soft_values(), table.as_language_model()
    assert close(values[()], table.log_normalizer[0].value[context])
    for prefix in prefixes(prior, brute):
        ahead = after(prefix, values, prior.vocab_size)
        steered = conditionals(prior, context, prefix) + ahead - values[prefix]
        assert close(steered.exp(), conditionals(law, context, prefix).exp())


def test_mean_values_do_not_steer_to_the_posterior(kind, context):
    """Mutant: E[r|prefix]/β in place of log E[e^{r/β}|prefix]. It is right at the last step only."""
    model = soft_model(kind)
    prior, brute = model.prior, brute_force(model, context)
    means, law = brute.mean_values(brute.log_phi), exact(model).as_language_model()
    worst = {True: 0.0, False: 0.0}
    for prefix in prefixes(prior, brute):
        ahead = after(prefix, means, prior.vocab_size)
        steered = torch.log_softmax(conditionals(prior, context, prefix) + ahead, -1)
        off = float((steered.exp() - conditionals(law, context, prefix).exp()).abs().max())
        last = len(prefix) + 1 == prior.max_new_tokens
        worst[last] = max(worst[last], off)
    assert worst[True] < TOLERANCE
    assert worst[False] > VISIBLE


# Samplers, by the exact law of their randomness.


def proposal(brute: BruteForce, other: Tensor, covers: bool) -> Tensor:
    """log q: another law of the same family; not covering, without the outcomes that π* likes best."""
    if covers:
        return other
    best = brute.log_posterior.topk(3).indices
    cut = other.clone()
    cut[best] = -math.inf
    return cut - torch.logsumexp(cut, 0)


@pytest.mark.parametrize("covers", [True, False])
@pytest.mark.parametrize("model_of", [soft_model, hard_model])
def test_total_variation_from_weights(kind, context, model_of, covers):
    model = model_of(kind)
    brute = brute_force(model, context)
    log_z = float(exact(model).log_normalizer[0].value[context])
    log_q = proposal(brute, law_of(enumerable_lm(kind, seed=1), brute), covers)
    drawn = torch.nonzero(log_q > -math.inf).squeeze(1)
    log_w = importance_log_weights(brute.log_gamma[drawn], log_q[drawn])
    shortfall = torch.stack([total_variation_from_weights(w.repeat(2), log_z).value for w in log_w])
    expected = total_variation(log_q, brute.log_posterior)
    assert close(mean(log_q[drawn], shortfall), expected)
    mutant = 0.5 * mean(log_q[drawn], ((log_w - log_z).exp() - 1).abs())
    assert close(mutant, expected) if covers else abs(float(mutant - expected)) > VISIBLE


def test_rejection_accepts_at_rate_z_over_m(kind, context):
    model = enumerable_lm(kind) * Reward(wavy, beta=BETA, upper=1.0) * Constraint(has_no("b"))
    brute, log_bound = brute_force(model, context), 1.0 / BETA
    accept = log_acceptance_probability(brute.log_phi, log_bound)
    assert bool((accept <= 0).all())
    joint = brute.log_prior + accept
    log_z = exact(model).log_normalizer[0].value[context]
    assert close(torch.logsumexp(joint, 0), log_z - log_bound)
    assert close((joint - torch.logsumexp(joint, 0)).exp(), law_of(exact(model), brute).exp())


def pairs(brute: BruteForce, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All N = 2 samples of q: log-probabilities (S, S) of the two independent draws, log Ẑ, and log w of the first."""
    log_w = importance_log_weights(brute.log_gamma, log_q)
    first, second = torch.triu_indices(len(log_w), len(log_w))
    samples = torch.stack([log_w[first], log_w[second]], 1)
    estimate = torch.zeros(len(log_w), len(log_w), dtype=torch.float64)
    estimate[first, second] = torch.stack([log_mean_weight(sample).value for sample in samples])
    estimate[second, first] = estimate[first, second]
    return log_q[:, None] + log_q[None, :], estimate, log_w


@pytest.mark.parametrize("zero_weights", [False, True])
def test_importance_estimates_of_z(kind, context, zero_weights):
    model = hard_model(kind) if zero_weights else soft_model(kind)
    brute, log_z = brute_force(model, context), exact(model).log_normalizer[0].value[context]
    log_q = law_of(enumerable_lm(kind, seed=1), brute)
    log_p, log_estimate, log_w = pairs(brute, log_q)
    positive = log_estimate > -math.inf
    chance = mean(log_p, positive.double())
    assert close(mean(log_p, log_estimate.exp()), log_z.exp())
    assert bool(positive.all()) is not zero_weights
    if not zero_weights:
        assert mean(log_p, log_estimate) < log_z - 1e-6
    for d in (0.1, 0.5, 1.0):  # Markov
        assert mean(log_p, (log_estimate >= log_z + d).double()) <= math.exp(-d)

    # One exact draw, one of q, the average over both.
    conditional = brute.log_posterior[:, None] + log_q[None, :]
    assert mean(conditional, log_estimate) > log_z + 1e-6
    inverse = mean(conditional, (-log_estimate).exp())
    assert close(inverse, chance / log_z.exp())
    assert math.isclose(inverse, (-log_z).exp(), abs_tol=TOLERANCE) is not zero_weights  # mutant: 1/Z always
    # Mutant: the exact draw left out of the average gives a lower bound, not an upper one.
    if not zero_weights:
        assert mean(log_q, log_w) < log_z


def test_counting_rewards_have_ties_that_exact_keeps(kind, context):
    """Outcomes of equal γ/π0 keep the prior's ratio: π*(x)/π*(y) = π0(x)/π0(y) where φ(x) = φ(y)."""
    model = enumerable_lm(kind) * Reward(count_of("a"), beta=BETA)
    brute = brute_force(model, context)
    law = law_of(exact(model), brute)
    for level in brute.log_phi.unique():
        rows = brute.log_phi == level
        ratio = (law - brute.log_prior)[rows]
        assert close(ratio, ratio[0].expand_as(ratio))


def test_a_sequence_off_the_support_has_no_posterior(kind, context):
    table = exact(hard_model(kind))
    lm = enumerable_lm(kind)
    rows: Sequences = lm.sequences([[1] * lm.max_new_tokens, [0] * lm.max_new_tokens], [context] * 2)
    assert torch.equal(table.log_prob(rows) == -math.inf, torch.tensor([True, False]))
