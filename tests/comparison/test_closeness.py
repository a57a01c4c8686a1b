"""The figures of a row: against brute force where π* is a table, and from draws where it is not."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lmppl.comparison import Figure, Reference, compare
from lmppl.comparison.closeness import closeness as divergences
from lmppl.comparison.laws import Law, law_of, weights_are_ratios
from lmppl.comparison.worth import expected_total_variation, worth
from lmppl.inference import (
    AIS,
    SMC,
    Beam,
    BestOfN,
    Exact,
    Greedy,
    Importance,
    QuasiRejection,
    Rejection,
    Splitting,
    TemperedSMC,
    WeightedDecoding,
    best_of_n_law,
    infer,
    soft_best_of_n_law,
)
from lmppl.inference.mcmc import MCMC
from lmppl.lm import TabularLM
from lmppl.modeling import Constraint, Model, Reward
from tests.models import ENUMERABLE, BruteForce, brute_force, count_of, enumerable_lm, has_no, wavy

HARD = Constraint(has_no("b"), name="no b")


def closeness(law: Law, reference: Reference | None, context: int) -> dict[str, Figure]:
    """All figures about draws: of their law, and of what they are worth."""
    return divergences(law, reference, context) | worth(law, reference, context)


def soft_model(kind: str) -> Model:
    return enumerable_lm(kind) * Reward(wavy, beta=0.5, upper=1, name="wavy")


def log_prob_of(lm, brute: BruteForce) -> torch.Tensor:
    return lm.score(brute.sequences).double()


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> float:
    inside = log_p > -math.inf
    return float((log_p[inside].exp() * (log_p[inside] - log_q[inside])).sum())


@pytest.mark.parametrize("kind", ENUMERABLE)
def test_divergences_of_a_policy_are_those_of_the_written_out_laws(kind: str) -> None:
    model, policy = soft_model(kind), enumerable_lm(kind, seed=1)
    table = compare(model, {"policy": policy}, num_draws=50)
    for c in range(model.prior.num_contexts):
        brute = brute_force(model, c)
        log_q = log_prob_of(policy, brute)
        (row,) = [r for r in table.per_context if r.label == "policy" and r.context == c]
        assert row["kl_reverse"].value == pytest.approx(kl(log_q, brute.log_posterior), abs=1e-9)
        assert row["kl_forward"].value == pytest.approx(kl(brute.log_posterior, log_q), abs=1e-9)
        assert row["tv"].value == pytest.approx(
            float((log_q.exp() - brute.log_posterior.exp()).abs().sum()) / 2, abs=1e-9
        )
        # Mutants: the two directions, and a figure of the prior in place of the policy's.
        assert row["kl_reverse"].value != pytest.approx(row["kl_forward"].value, abs=1e-3)
        assert row["kl_reverse"].value != pytest.approx(kl(brute.log_prior, brute.log_posterior), abs=1e-3)


def test_a_policy_may_leave_the_priors_support_unseen() -> None:
    prior = TabularLM([0.5, 0.5, 0.0, 0.0], ["a", "b", "c", "<eos>"], max_new_tokens=20)
    policy = TabularLM([0.4995, 0.5, 0.0005, 0.0], ["a", "b", "c", "<eos>"], max_new_tokens=20)
    model = prior * Reward(count_of("a"), beta=10, name="a")
    table = compare(model, {"policy": policy}, num_draws=50, seed=3)
    assert (table["policy"]["zero"].relation, table["policy"]["kl_reverse"].relation) == ("≤", "≥")
    assert table["policy"]["zero"].value > 1 - 0.9995**20
    assert table["prior"]["zero"].value == 0.0
    assert table["prior"]["zero"].relation == "="


def test_little_mass_off_the_priors_support_is_no_rounding_in_float64() -> None:
    prior = TabularLM([0.5, 0.5, 0.0], ["a", "b", "<eos>"], max_new_tokens=2)
    policy = TabularLM([0.5, 0.49998, 0.00002], ["a", "b", "<eos>"], max_new_tokens=2)
    row = compare(prior * Reward(count_of("a"), name="a"), {"policy": policy}, num_draws=20)["policy"]
    assert row["zero"].value == pytest.approx(1 - 0.99998**2, rel=1e-6)
    assert row["kl_reverse"].value == math.inf


@pytest.mark.parametrize("kind", ENUMERABLE)
def test_best_of_n_on_a_table_has_its_exact_law(kind: str) -> None:
    model = soft_model(kind) * HARD
    row = compare(model, [BestOfN(n=3)], num_draws=20)["best_of_n(n=3)"]
    expected = []
    for c in range(model.prior.num_contexts):
        brute = brute_force(model, c)
        log_q = best_of_n_law(brute.log_prior, brute.log_phi, 3)
        expected.append((kl(brute.log_posterior, log_q), float(log_q[brute.log_phi == -math.inf].exp().sum())))
    assert row["kl_forward"].value == pytest.approx(sum(e[0] for e in expected) / len(expected), abs=1e-9)
    assert row["zero"].value == pytest.approx(sum(e[1] for e in expected) / len(expected), abs=1e-9)
    assert row["kl_reverse"].value == math.inf
    assert row["kl_to_prior"].relation == "≤"


def test_exact_rows_are_exact_and_say_so() -> None:
    model = soft_model("tabular") * HARD
    table = compare(model, ["exact", "rejection"], num_draws=300)
    brute = [brute_force(model, c) for c in range(2)]
    exact = table["exact"]
    assert exact["log_z"].value == pytest.approx(sum(float(b.log_z) for b in brute) / 2, abs=1e-10)
    expected = [float((b.log_posterior.exp() * b.log_phi.nan_to_num(neginf=0.0)).sum() - b.log_z) for b in brute]
    assert exact["kl_to_prior"].value == pytest.approx(sum(expected) / 2, abs=1e-10)
    assert exact["kl_to_prior"].error == 0.0
    rewards = [torch.tensor(wavy(b.sequences.text), dtype=torch.float64) for b in brute]
    means = [float((b.log_posterior.exp() * r).sum()) for b, r in zip(brute, rewards, strict=True)]
    assert exact["mean:wavy"].value == pytest.approx(sum(means) / 2, abs=1e-10)
    for label in ("exact", "rejection"):
        assert [table[label][k].value for k in ("kl_reverse", "kl_forward", "tv", "zero")] == [0.0] * 4
        assert table[label]["satisfied:no b"].value == 1.0
    assert exact["ess"].value is None
    assert table["rejection"]["ess"].value == 300.0
    assert 0.3 < table["rejection"]["tv_draws"].value / table["rejection"]["tv_draws_exact"].value < 2.0


def test_the_row_of_importance_speaks_of_its_proposal_and_weights_correct_the_rest() -> None:
    model = soft_model("tabular")
    policy = enumerable_lm("tabular", seed=1)
    table = compare(model, {"as is": policy, "weighted": Importance(proposal=policy)}, num_draws=2000)
    as_is, weighted = table["as is"], table["weighted"]
    for name in ("kl_reverse", "kl_forward", "tv", "ess", "log_z"):
        assert weighted[name].value == as_is[name].value
    exact = compare(model, ["exact"])["exact"]
    assert weighted["mean:wavy"].value == pytest.approx(exact["mean:wavy"].value, abs=5 * weighted["mean:wavy"].error)
    assert abs(as_is["mean:wavy"].value - exact["mean:wavy"].value) > 5 * as_is["mean:wavy"].error
    noise = weighted["kl_to_prior"].error
    assert weighted["kl_to_prior"].value == pytest.approx(exact["kl_to_prior"].value, abs=5 * noise)
    assert weighted["tv_draws"].value < as_is["tv_draws"].value


def test_figures_from_draws_agree_with_the_table() -> None:
    """With exact draws in place of the table: z-tests with the figures' own errors (4.5 errors: 1e-5 a test)."""
    model = soft_model("tabular")
    policy = enumerable_lm("tabular", seed=1)
    exact = infer(model, Exact())
    sampled = infer(model, Rejection(), 3000)
    approximation = infer(model, Importance(proposal=policy), 3000)
    law = law_of(approximation, policy)
    by_table = [closeness(law, Reference.of(exact, model), c) for c in range(2)]
    by_draws = [closeness(law, Reference.of(sampled, model), c) for c in range(2)]
    for c, name in itertools.product(range(2), ("kl_reverse", "kl_forward", "tv")):
        truth, found = by_table[c][name], by_draws[c][name]
        assert truth.error == 0.0
        assert found.error > 0.0
        assert abs(found.value - truth.value) < 4.5 * found.error, name
    assert by_draws[0]["tv_draws"].value is None


def test_without_a_reference_the_figures_say_that_they_are_biased() -> None:
    model = soft_model("tabular")
    approximation = infer(model, Importance(), 500)
    figures = closeness(law_of(approximation), None, 0)
    assert {figures[name].relation for name in ("kl_reverse", "kl_forward", "tv")} == {"≈"}
    assert "log N" in figures["kl_forward"].note
    assert figures["kl_forward"].value <= math.log(500)


def test_a_proposal_that_misses_a_mode_shows_only_in_the_forward_divergence() -> None:
    """The teaching case: ESS and KL(q‖π*) look fine, exact draws see that 80 % of the posterior is missing."""
    prior = TabularLM([0.5, 0.5, 0.0], ["a", "b", "<eos>"], max_new_tokens=1)
    narrow = TabularLM([1.0, 0.0, 0.0], ["a", "b", "<eos>"], max_new_tokens=1)
    model = prior * Reward(count_of("b"), beta=1 / math.log(4), upper=1, name="b")  # π*(b) = 0.8
    blind = closeness(law_of(infer(model, Importance(proposal=narrow), 100)), None, 0)
    assert blind["kl_reverse"].value == pytest.approx(0.0)
    assert blind["kl_forward"].value == pytest.approx(0.0)
    exact = infer(model, Rejection(), 200)
    row = compare(model, {"importance": Importance(proposal=narrow)}, exact, num_draws=100)["importance"]
    assert row["ess"].value == pytest.approx(100.0)
    assert row["kl_forward"].value == math.inf
    assert row["log_z"].value == pytest.approx(math.log(0.5))  # too small by log 5, and no weight shows it


def test_policies_that_leave_the_prior_or_violate_constraints_are_infinitely_far() -> None:
    prior = TabularLM([0.5, 0.0, 0.5], ["a", "b", "<eos>"], max_new_tokens=2)
    wide = TabularLM([0.25, 0.25, 0.5], ["a", "b", "<eos>"], max_new_tokens=2)
    model = prior * Reward(count_of("a"), beta=1, upper=2, name="a")
    row = compare(model, {"wide": wide}, num_draws=200)["wide"]
    off = 1 - (0.5 + 0.25 * 0.5 + 0.25 * 0.25)
    assert row["kl_reverse"].value == math.inf
    assert row["zero"].value == pytest.approx(off)
    assert row["kl_to_prior"].value == math.inf
    assert row["mean:a"].value is None
    assert "support" in row["mean:a"].note


def test_what_no_draw_shows_is_bounded_not_zero() -> None:
    """A constraint that q breaks with probability 0.01: 20 draws see nothing, so figures are bounds."""
    prior = TabularLM([0.99, 0.01, 0.0], ["a", "b", "<eos>"], max_new_tokens=1)
    model = prior * Constraint(has_no("b"), name="no b") * Reward(count_of("c"), upper=1, name="c")
    unseen = infer(model, Importance(), 20)
    figures = closeness(law_of(unseen), Reference.of(infer(model, Rejection(), 20), model), 0)
    assert (figures["kl_reverse"].relation, figures["zero"].relation) == ("≥", "≤")
    assert figures["zero"].value == pytest.approx(1 - 0.05 ** (1 / 20))
    best = infer(model, BestOfN(2), 20)
    assert closeness(law_of(best), Reference.of(infer(model, Rejection(), 20), model), 0)["kl_reverse"].value is None
    table = compare(model, {"policy": prior, "best": best}, num_draws=20)
    assert table["policy"]["kl_reverse"].value == math.inf
    assert table["policy"]["zero"].value == pytest.approx(0.01)
    holds = table["best"]["satisfied:no b"]
    assert (holds.value, holds.relation) == (pytest.approx(1 - 0.01**2), "=")  # by the table
    holds = compare(model, {"best": best}, infer(model, Rejection(), 20), num_draws=20)["best"]["satisfied:no b"]
    assert (holds.value, holds.relation) == (pytest.approx(0.05 ** (1 / 20)), "≥")


def test_expected_total_variation_is_that_of_the_multinomial() -> None:
    p = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64)
    n, expected = 5, 0.0
    for counts in itertools.product(range(n + 1), repeat=3):
        if sum(counts) == n:
            weight = math.factorial(n) / math.prod(math.factorial(k) for k in counts)
            weight *= math.prod(float(p[i]) ** k for i, k in enumerate(counts))
            expected += weight * 0.5 * sum(abs(k / n - float(p[i])) for i, k in enumerate(counts))
    assert expected_total_variation(p, n) == pytest.approx(expected, abs=1e-12)
    assert expected_total_variation(torch.tensor([1.0]), 3) == 0.0
    assert expected_total_variation(p, 1) == pytest.approx(float((p * (1 - p)).sum()))


def test_smoothed_weights_are_measured_by_the_raw_ones() -> None:
    model = enumerable_lm("tabular") * Reward(wavy, beta=0.05, upper=1, name="wavy")
    smoothed = infer(model, Importance(pareto_smoothing=True), 400)
    assert weights_are_ratios(smoothed.draws)
    assert law_of(smoothed).kind == "proposal"
    assert not weights_are_ratios(infer(model, BestOfN(2), 20).draws)


@pytest.mark.parametrize("kind", ["tabular", "llama"])
def test_sweeps_and_chains_speak_of_the_posterior_with_their_own_errors(kind: str) -> None:
    model = soft_model(kind) * HARD
    table = compare(model, {"sweeps": SMC(32), "chains": MCMC(32)}, num_draws=1600, seed=4)
    for row in [r for r in table.per_context if r.label in ("sweeps", "chains")]:
        brute = brute_force(model, row.context)
        posterior = brute.log_posterior.exp()
        rewards = torch.tensor(wavy(brute.sequences.text), dtype=torch.float64)
        mean = row["mean:wavy"]
        assert abs(mean.value - float((posterior * rewards).sum())) < 4.5 * mean.error
        # As many independent draws of π* would leave the same error of some scalar.
        variance = float((posterior * (rewards - mean.value) ** 2).sum())
        assert row["ess"].value <= variance / mean.error**2 * 1.2
        assert row["satisfied:no b"].value == 1.0
        assert row["zero"].value == 0.0
    (sweeps,) = [r for r in table.rows if r.label == "sweeps"]
    assert sweeps["kl_reverse"].relation == "≤"
    assert 0 <= sweeps["kl_reverse"].value < 0.3
    assert sweeps["tv"].value <= math.sqrt(sweeps["kl_reverse"].value / 2) + 1e-9
    (chains,) = [r for r in table.rows if r.label == "chains"]
    assert chains["kl_reverse"].value is None


def test_one_sweep_states_no_effective_size_and_no_bound() -> None:
    model = soft_model("tabular")
    law = law_of(infer(model, SMC(16), 16, seed=0))
    assert law.kind == "weighted"
    figures = closeness(law, Reference.of(infer(model, Exact()), model), 0)
    assert figures["ess"].value is None
    assert "no error" in figures["ess"].note
    assert (figures["kl_reverse"].value, figures["tv"].value) == (None, None)
    assert "1 sweep with" in figures["tv"].note


@pytest.mark.parametrize("engine", [SMC(16), TemperedSMC(16), Splitting(16)], ids=lambda e: e.name)
def test_the_spread_of_few_sweeps_states_no_effective_size(engine) -> None:
    """1/s² of fewer than four sweeps has no mean: nothing is shown, LM tokens per effective draw included."""
    model = soft_model("tabular")
    for sweeps in (2, 3):
        row = compare(model, [engine], num_draws=16 * sweeps)[str(engine)]
        assert row["ess"].value is None
        assert f"{sweeps} sweeps: too few" in row["ess"].note
        assert (row["tokens_per_draw"].value, row["tv_draws_exact"].value) == (None, None)
        assert row["tv_draws"].value is not None


@pytest.mark.parametrize("engine", [AIS(64), SMC(16), TemperedSMC(16), Splitting(16)], ids=lambda e: e.name)
@pytest.mark.parametrize("seed", range(4))
def test_no_row_is_worth_more_than_its_weights(engine, seed) -> None:
    result = infer(soft_model("tabular"), engine, 64, seed=seed)
    for c in range(2):
        own = result.draws.log_weight[result.draws.context == c].double()
        kish = float(torch.exp(2 * torch.logsumexp(own, 0) - torch.logsumexp(2 * own, 0)))
        figure = worth(law_of(result), None, c)["ess"]
        assert figure.value <= kish * (1 + 1e-9)
        assert figure.value <= len(own)


def test_errors_of_few_sweeps_are_widened_by_student() -> None:
    """s of two sweeps: ± is t/z = 6.48 times what a normal law would say, and the interval of `expectation` too."""
    model = soft_model("tabular")
    result = infer(model, SMC(16), 32, seed=1)
    mean = result.expectation("wavy")
    half = float(mean.interval[0, 1] - mean.interval[0, 0]) / 2
    assert half == pytest.approx(12.7062 * float(mean.standard_error[0]), rel=1e-5)
    row = compare(model, {"sweeps": result}).per_context[2]
    assert (row.label, row.context) == ("sweeps", 0)
    assert row["mean:wavy"].error == pytest.approx(12.7062 / 1.95996 * float(mean.standard_error[0]), rel=1e-4)


def test_bounds_of_sweeps_hold_in_spite_of_noise() -> None:
    """Where log Ẑ of few sweeps lies around log Z by chance, the bounds of KL and TV come from the interval's end."""
    model = soft_model("tabular") * HARD
    exact = Reference.of(infer(model, Exact()), model)
    gaps = []
    for seed in range(12):
        law = law_of(infer(model, SMC(8), 32, seed=seed))
        found = law.approximation.info["log_z_sweeps"][0]
        figures = divergences(law, exact, 0)
        gap = float(exact.log_z[0] - found.mean())
        half = 3.18245 * float(found.std()) / 2  # Student's t of four sweeps
        gaps.append(gap)
        if gap + half < 0:
            assert figures["tv"].value is None
            assert "noise" in figures["tv"].note
            continue
        assert figures["kl_reverse"].value == pytest.approx(gap + half, rel=1e-4)
        assert figures["tv"].value == pytest.approx(math.sqrt((gap + half) / 2), rel=1e-4)
        assert figures["kl_reverse"].relation == figures["tv"].relation == "≤"
    assert min(gaps) < 0  # a mutant that clips the gap itself would bound TV by 0


def test_quasi_rejection_shows_its_distances_and_never_violates() -> None:
    """Against the law min(γ, M π0)/Z_q written out, on the table; as measured where there is none."""
    model = soft_model("tabular") * HARD
    result = infer(model, QuasiRejection(bound=1.0), 400, seed=1)
    law, exact = law_of(result), Reference.of(infer(model, Exact()), model)
    sampled = Reference.of(infer(model, Rejection(), 50), model)
    for c in range(2):
        brute = brute_force(model, c)
        capped = brute.log_prior + torch.minimum(brute.log_phi, result.info["log_bound"][c])
        log_q = capped - torch.logsumexp(capped, 0)
        figures, measured = divergences(law, exact, c), divergences(law, sampled, c)
        tv = float((log_q.exp() - brute.log_posterior.exp()).abs().sum()) / 2
        assert tv > 0.01
        assert figures["tv"].value == pytest.approx(tv, abs=1e-9)
        assert figures["kl_reverse"].value == pytest.approx(kl(log_q, brute.log_posterior), abs=1e-9)
        assert figures["kl_forward"].value == pytest.approx(kl(brute.log_posterior, log_q), abs=1e-9)
        for name in ("tv", "kl_reverse", "kl_forward"):
            assert abs(measured[name].value - figures[name].value) < 4.5 * measured[name].error, name
            assert measured[name].relation == "≈"
        assert (figures["zero"].value, measured["zero"].value) == (0.0, 0.0)
    assert measured["tv"].value == float(result.info["total_variation"][1])
    for reference in (None, infer(model, Rejection(), 50)):
        row = compare(model, {"quasi": result}, reference)["quasi"]
        assert (row.guarantee, row["satisfied:no b"].value, row["satisfied:no b"].relation) == ("approximate", 1.0, "=")
        assert "heuristic" not in row["ess"].note
    expected = []
    for c in range(2):
        brute = brute_force(model, c)
        capped = brute.log_prior + torch.minimum(brute.log_phi, result.info["log_bound"][c])
        log_q = capped - torch.logsumexp(capped, 0)
        expected.append(kl(log_q, brute.log_prior))
    exactly = compare(model, {"quasi": result})["quasi"]["kl_to_prior"]
    assert (exactly.value, exactly.error) == (pytest.approx(sum(expected) / 2, abs=1e-9), 0.0)
    assert abs(row["kl_to_prior"].value - exactly.value) < 4.5 * row["kl_to_prior"].error


def test_a_proposal_that_may_not_cover_leaves_lower_bounds_of_the_distances() -> None:
    prior = TabularLM([0.4, 0.4, 0.2], ["a", "b", "<eos>"], max_new_tokens=3)
    narrow = TabularLM([0.8, 0.0, 0.2], ["a", "b", "<eos>"], max_new_tokens=3)
    model = prior * Reward(count_of("a"), beta=1, upper=3, name="a")
    result = infer(model, QuasiRejection(proposal=narrow), 50)
    figures = divergences(law_of(result), None, 0)
    assert figures["tv"].relation == "≥"
    assert "may not cover" in figures["tv"].note


def test_a_bound_that_nothing_exceeded_is_told_beside_the_distance() -> None:
    model = soft_model("tabular")
    loose = divergences(law_of(infer(model, QuasiRejection(bound=9.0), 20, seed=1)), None, 0)
    assert loose["tv"].value == pytest.approx(0.0, abs=1e-12)
    assert "no proposal exceeded its bound" in loose["tv"].note
    tight = divergences(law_of(infer(model, QuasiRejection(bound=1.0), 20, seed=1)), None, 0)
    assert tight["tv"].value > 0
    assert "exceeded" not in tight["tv"].note


def test_a_decoded_law_is_measured_by_the_log_q_that_it_keeps() -> None:
    """The row of `WeightedDecoding` has the figures of the LM that it decodes, passed as it is."""
    model = soft_model("tabular") * Constraint(has_no("bb"), prefix_closed=True, name="no bb")
    result = infer(model, WeightedDecoding(), 200, seed=3)
    table = compare(model, {"engine": result, "lm": result.as_language_model()}, num_draws=200, seed=3)
    engine, lm = table["engine"], table["lm"]
    for name in ("kl_reverse", "kl_forward", "tv", "zero"):
        assert engine[name].value == pytest.approx(lm[name].value, abs=1e-9)
        assert engine[name].error == 0.0
    assert (engine.guarantee, lm.guarantee) == ("heuristic", "as is")
    for c in range(2):
        brute = brute_force(model, c)
        log_q = log_prob_of(result.as_language_model(), brute)
        figures = divergences(law_of(result), Reference.of(infer(model, Exact()), model), c)
        assert figures["kl_forward"].value == pytest.approx(kl(brute.log_posterior, log_q), abs=1e-9)
        rows = result.draws.context == c
        log_w = law_of(result).log_ratios(c)
        log_gamma = result.draws.log_prior[rows].double() + sum(v[rows] for v in result.draws.log_factors.values())
        assert torch.allclose(log_w, log_gamma - result.draws.log_q[rows].double())
        found = float(torch.logsumexp(log_w, 0)) - math.log(len(log_w))
        (row,) = [r for r in table.per_context if r.label == "engine" and r.context == c]
        assert row["log_z"].value == pytest.approx(found)
        assert row["ess"].value <= 200
    assert engine["kl_to_prior"].error > 0


def test_a_decoded_law_that_is_truncated_says_so_beside_its_log_z() -> None:
    prior = enumerable_lm("tabular")
    model = prior * Constraint(has_no("bb"), prefix_closed=True, name="no bb")
    row = compare(model, [WeightedDecoding(top_k=2)], num_draws=50)["weighted_decoding(top_k=2)"]
    assert "may not cover" in row["log_z"].note


@pytest.mark.parametrize("engine", [Greedy(), Beam(3)], ids=lambda e: e.name)
def test_a_search_is_no_sample(engine) -> None:
    """What it found has the share that it has: no bounds as of draws, no errors, and a bound of log Z said once."""
    model = soft_model("tabular") * HARD
    result = infer(model, engine)
    row = compare(model, {"found": result})["found"]
    zero = [
        float((result.draws.log_factors["no b"][result.draws.context == c] == -math.inf).double().mean())
        for c in range(2)
    ]
    assert (row["zero"].value, row["zero"].relation, row["zero"].error) == (sum(zero) / 2, "=", 0.0)
    assert (row["satisfied:no b"].value, row["satisfied:no b"].relation) == (1 - sum(zero) / 2, "=")
    assert (row["mean:wavy"].error, row["mean:wavy"].note) == (0.0, "")
    assert (row["log_z"].relation, row["log_z"].interval) == ("≥", None)
    assert "search" in row["tv"].note


def test_soft_best_of_n_on_a_table_has_its_own_law() -> None:
    model = soft_model("tabular")
    row = compare(model, {"soft": BestOfN(3, soft=1.0), "hard": BestOfN(3)}, num_draws=20)
    expected = []
    for c in range(2):
        brute = brute_force(model, c)
        expected.append(kl(soft_best_of_n_law(brute.log_prior, brute.log_phi, 3, 1.0), brute.log_posterior))
    assert row["soft"]["kl_reverse"].value == pytest.approx(sum(expected) / 2, abs=1e-9)
    assert row["hard"]["kl_reverse"].value != pytest.approx(sum(expected) / 2, abs=1e-3)


def test_particles_that_branch_are_not_called_chains() -> None:
    model = soft_model("tabular")
    notes = [worth(law_of(infer(model, e, 64)), None, 0)["k_hat"].note for e in (Splitting(16), MCMC(16))]
    assert "branch" in notes[0]
    assert notes[1] == "chains have no weights"
