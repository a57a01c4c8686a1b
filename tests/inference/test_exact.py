"""Exact: enumeration and dynamic programming against brute force, its law as a language model, its refusals."""

import math

import pytest
import torch

from lmppl.errors import ContextError, FactorError, InfeasibleModel, ModelError, SupportTooLarge, UnsupportedModel
from lmppl.inference.approximation import ExactTable
from lmppl.inference.dynamic_programming import AutomatonLM, product_machine, soft_values
from lmppl.inference.engine import Guarantee
from lmppl.inference.exact import Exact
from lmppl.inference.importance import Importance
from lmppl.inference.run import infer
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence.automata import Automaton
from lmppl.modeling.evidence.constraint import Constraint
from lmppl.modeling.evidence.reward import Reward
from lmppl.modeling.model import Model
from lmppl.modeling.target import Target
from tests.models import ENUMERABLE, TOLERANCE, brute_force, count_of, enumerable_lm, goodness_of_fit, has_no, wavy


def exact(model, num_draws=200, **options) -> ExactTable:
    return infer(model, Exact(**options), num_draws, progress=False)


def random_automaton(symbols, *, states, seed, over="characters") -> Automaton:
    generator = torch.Generator().manual_seed(seed)
    transitions = torch.randint(states, (states, len(symbols) + 1), generator=generator)
    accept = torch.rand(states, generator=generator) < 0.5
    accept[0] = True
    return Automaton(transitions, tuple(symbols), 0, accept, over)


def assert_law(table: ExactTable, model: Model) -> None:
    """log Z, and log π* of every outcome of every context."""
    for context in range(model.prior.num_contexts):
        brute = brute_force(model, context)
        assert table.log_normalizer[0].value[context] == pytest.approx(float(brute.log_z), abs=TOLERANCE)
        got, expected = table.log_prob(brute.sequences), brute.log_posterior
        assert torch.equal(got == -math.inf, expected == -math.inf)
        possible = expected > -math.inf
        torch.testing.assert_close(got[possible], expected[possible], rtol=0, atol=TOLERANCE)


# Dynamic programming.


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("over", ["characters", "tokens"])
@pytest.mark.parametrize("eos", [-1, 1, None])
def test_dynamic_programming_is_brute_force(seed, over, eos):
    prior = TabularLM.random(3, 5, order=seed % 3, seed=seed, eos=eos, context=["", "a"])
    symbols = {"characters": "ab", "tokens": (0, 2)}[over]
    automata = [random_automaton(symbols, states=3 + k, seed=10 * seed + k, over=over) for k in range(1 + seed % 2)]
    model = Model(prior, [Constraint(a) for a in automata])
    table = exact(model)
    assert table.info["route"] == "dynamic programming"
    assert_law(table, model)


def test_symbols_of_many_characters_are_read_character_by_character():
    prior = TabularLM.random(4, 4, order=1, seed=3)
    prior = TabularLM(prior.log_table.exp(), ["ab", "ba", "c", "<eos>"], max_new_tokens=4)
    model = prior * Constraint(Automaton.containing("bb")) * Constraint(Automaton.avoiding("ac"))
    assert_law(exact(model), model)


def test_a_prior_alone_and_a_prior_of_prefixes():
    prior = TabularLM.random(3, 4, order=2, seed=2, context=["", "ab"])
    table = exact(prior)
    torch.testing.assert_close(
        table.log_normalizer[0].value, torch.zeros(2, dtype=torch.float64), atol=TOLERANCE, rtol=0
    )
    assert_law(table, Model(prior))
    prefixes = {"": [0.5, 0.25, 0.25], "a": [0, 0.5, 0.5], "b": [1, 0, 0]}
    sparse = TabularLM.from_prefixes(prefixes, ["a", "b", "<eos>"], max_new_tokens=2)
    model = sparse * Constraint(Automaton.avoiding("ab"))
    assert_law(exact(model), model)
    assert exact(model).log_normalizer[0].value.exp() == pytest.approx(0.75)


def test_rows_that_sum_to_one_within_tolerance_are_normalised_as_the_prior_does():
    off = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.6, 0.3], [0, 0, 1], [0.6, 0.4, 0]], dtype=torch.float64)
    prior = TabularLM(off * (1 + torch.tensor([[5e-7], [-5e-7], [0], [3e-7]])), max_new_tokens=4)
    model = prior * Constraint(Automaton.containing("b"))
    assert_law(exact(model), model)


def test_soft_values_are_the_log_mean_evidence_after_each_prefix():
    prior = TabularLM.random(3, 4, order=1, seed=5)
    automaton = Automaton.containing("ab")
    machine = product_machine(prior, [automaton])
    values = soft_values(machine, 4)
    expected = brute_force(prior * Constraint(automaton), 0).soft_values()
    for prefix, value in expected.items():
        if prior.eos_index in prefix:
            continue
        state = machine.initial[0]
        for token in prefix:
            state = machine.following[state, token]
        assert float(values[len(prefix), state]) == pytest.approx(value, abs=TOLERANCE)


def test_only_reachable_product_states_are_kept():
    prior = TabularLM([[0.5, 0.0, 0.5], [0.5, 0.0, 0.5], [0, 0, 1], [1.0, 0, 0]], max_new_tokens=6)  # never "b"
    machine = product_machine(prior, [Automaton.length(0, 3), Automaton.containing("b")])
    assert len(machine.log_accept) == 5  # start; then after 1, 2, 3 and more letters a


def test_a_thousand_tokens_have_a_known_normaliser():
    """No two a's in a row among T independent tokens: f_T = (1−p) f_{T−1} + p (1−p) f_{T−2}."""
    p, horizon = 0.3, 1000
    prior = TabularLM([p, 1 - p], ["a", "b"], eos=None, max_new_tokens=horizon)
    table = exact(prior * Constraint(Automaton.avoiding("aa")), num_draws=50)
    ratio, log_f = 1.0, 0.0  # f_t / f_{t−1} and log f_t
    for _ in range(horizon - 1):
        ratio = (1 - p) + p * (1 - p) / ratio
        log_f += math.log(ratio)
    assert table.log_normalizer[0].value == pytest.approx(log_f, rel=1e-12)
    assert table.draws.lengths.tolist() == [horizon] * 50
    assert not any("aa" in text for text in table.draws.text)
    torch.testing.assert_close(table.draws.log_q, table.draws.log_prior - log_f, rtol=0, atol=1e-8)


def test_drawn_sequences_carry_weights_densities_and_checked_factors():
    prior = TabularLM.random(4, 6, seed=4, context=["", "b"])
    table = exact(prior * Constraint(Automaton.containing("a"), name="has_a"), num_draws=64)
    draws = table.draws
    assert len(draws) == 2 * 64
    assert not table.enumerated
    assert draws.context.tolist() == [0] * 64 + [1] * 64
    assert all("a" in text for text in draws.text)
    assert torch.equal(draws.log_factors["has_a"], torch.zeros(128, dtype=torch.float64))
    assert draws.log_weight is None  # equally weighted
    torch.testing.assert_close(draws.log_prior, prior.score(draws))
    torch.testing.assert_close(draws.log_q, draws.log_prior - table.log_normalizer[0].value[draws.context])
    share = table.expectation(lambda texts: [t.startswith("a") for t in texts])
    assert share.kind == "unbiased"  # of draws, not of the whole table


def test_an_automaton_that_rejects_what_its_predicate_allows_is_found_out():
    """Draws of the law never visit what is wrongly rejected; draws of the prior do."""
    prior = TabularLM([0.5, 0.3, 0.2], ["a", "b", "<eos>"], max_new_tokens=3)
    begins = Constraint(lambda texts: [t.startswith("a") for t in texts], automaton=Automaton.exactly(["aa"]))
    with pytest.raises(FactorError, match=r"log φ = 0 .* which its automaton rejects"):
        exact(prior * begins, num_draws=64)


def test_an_automaton_that_contradicts_its_predicate_is_found_out():
    prior = TabularLM.random(3, 4, seed=1)
    wrong = Constraint(has_no("a"), automaton=Automaton.avoiding("b"), name="no_a")
    with pytest.raises(FactorError, match=r"'no_a': log φ = -inf for the text '.*a.*', which its automaton"):
        exact(prior * wrong)


def test_product_machines_that_are_too_large_are_refused(monkeypatch):
    prior = TabularLM.random(3, 50, seed=1)
    monkeypatch.setattr("lmppl.inference.dynamic_programming.MAX_CODES", 10)
    with pytest.raises(SupportTooLarge, match=r"4 × 3 product states exceed 10"):
        AutomatonLM(prior, [Automaton.containing("ab")])
    monkeypatch.undo()
    monkeypatch.setattr("lmppl.inference.dynamic_programming.MEMORY", 1000)
    with pytest.raises(SupportTooLarge, match=r"50 steps\) need .* GiB"):
        AutomatonLM(prior, [Automaton.containing("ab")])


# Enumeration.


@pytest.mark.parametrize("kind", ENUMERABLE)
def test_the_table_holds_every_outcome_with_its_posterior_probability(kind):
    lm = enumerable_lm(kind)
    model = lm * Reward(wavy, beta=0.5) * Constraint(has_no("b"), name="no_b")
    table = exact(model, num_draws=1)  # not used here
    draws = table.draws
    assert table.guarantee is Guarantee.EXACT
    assert table.enumerated
    assert table.info["route"] == "enumeration"
    assert torch.equal(draws.context, draws.context.sort().values)
    assert table.info["outcomes"].tolist() == [len(brute_force(lm, c).log_prior) for c in (0, 1)]
    torch.testing.assert_close(
        draws.log_weight, draws.log_prior + draws.log_factors["wavy"] + draws.log_factors["no_b"]
    )
    torch.testing.assert_close(draws.features["wavy"], draws.log_factors["wavy"] * 0.5)
    assert bool((draws.log_weight == -math.inf).any())
    assert table.setup.lm_forwards == 2 * lm.max_new_tokens == table.cost.lm_forwards
    assert table.setup.factor_calls == table.cost.factor_calls > 0
    estimate = table.log_normalizer[0]
    assert estimate.kind == "exact"
    assert torch.equal(estimate.interval, estimate.value[:, None].expand(2, 2))


def test_both_routes_agree():
    prior = TabularLM.random(4, 5, order=2, seed=1, context=["", "ab"])
    automata = Automaton.containing("ab"), Automaton.avoiding("cc")
    summed = exact(Model(prior, [Constraint(a) for a in automata]))
    listed = exact(Model(prior, [Constraint(a.accepts_texts, name=f"c{i}") for i, a in enumerate(automata)]))
    assert (summed.info["route"], listed.info["route"]) == ("dynamic programming", "enumeration")
    torch.testing.assert_close(summed.log_normalizer[0].value, listed.log_normalizer[0].value, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(summed.log_prob(listed.draws), listed.draws.log_q, rtol=0, atol=TOLERANCE)


def test_expectations_over_the_table_are_exact():
    model = TabularLM.random(4, 4, seed=1) * Reward(count_of("a"), beta=0.5, name="a")
    brute = brute_force(model, 0)
    estimate = exact(model).expectation("a")
    assert estimate.kind == "exact"
    assert float(estimate.value) == pytest.approx(float((brute.log_posterior.exp() * brute.log_phi * 0.5).sum()))


def test_factors_are_never_asked_about_what_the_prior_excludes():
    def reward(texts):
        assert not any("b" in text for text in texts)
        return [float(len(text)) for text in texts]

    prior = TabularLM([[0.5, 0.0, 0.5], [0.5, 0.0, 0.5], [0, 0, 1], [1.0, 0, 0]], max_new_tokens=3)
    table = exact(prior * Reward(reward))
    assert table.draws.text == ["a", "aa", "aaa"]
    assert table.draws.finished.tolist() == [True, True, False]


def test_stop_strings_end_the_rows_of_the_law():
    from tests.lm.random_models import random_lm

    lm = random_lm("llama", stop="ab")
    table = exact(lm * Reward(wavy, beta=0.5))
    law = table.as_language_model()
    torch.testing.assert_close(law.score(table.draws), table.draws.log_q, rtol=0, atol=TOLERANCE)
    drawn = law.draw(200, generator=torch.Generator().manual_seed(0))
    assert bool(lm.is_outcome(drawn).all())
    by_stop = drawn.finished & ~torch.isin(drawn.ids, torch.tensor(lm.eos_ids)).any(1)
    assert bool(by_stop.any())


def test_a_sparse_table_is_enumerated_whatever_its_horizon():
    prior = TabularLM([[0.0, 0.5, 0.5], [0.5, 0.0, 0.5], [0, 0, 1], [0.5, 0.5, 0]], max_new_tokens=30)
    table = exact(prior * Reward(count_of("a")))
    assert table.info["outcomes"].tolist() == [60]


# The law as a language model.


@pytest.mark.parametrize("kind", ENUMERABLE)
def test_the_law_is_a_language_model(kind):
    lm = enumerable_lm(kind)
    law = exact(lm * Reward(wavy, beta=0.3) * Constraint(has_no("b"))).as_language_model()
    support = law.enumerate_sequences(1)
    assert float(support.log_prior.exp().sum()) == pytest.approx(1.0, abs=TOLERANCE)
    assert not any("b" in text for text in support.text)
    ids = law.sample((7,))
    assert ids.shape == (7, 2, lm.max_new_tokens)
    assert law.log_prob(ids).shape == (7, 2)
    assert (law.pad_id, law.eos_ids, law.prompts) == (lm.pad_id, lm.eos_ids, lm.prompts)
    drawn = law.draw(20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.log_q, law.score(drawn), rtol=0, atol=TOLERANCE)
    assert drawn.text == lm.decode(drawn)


@pytest.mark.parametrize("kind", ENUMERABLE)
def test_its_decoder_can_crop_and_select(kind):
    lm = enumerable_lm(kind)
    decoder = exact(lm * Reward(wavy)).as_language_model().decoder()
    tokens = torch.tensor([[0, 1], [1, 0]])
    _, state = decoder.prefill(torch.tensor([0, 1]))
    first, state = decoder.extend(state, tokens)
    state = decoder.crop(state, torch.tensor([0, 1]))
    state = decoder.select(state, torch.tensor([1, 0]))
    again, _ = decoder.extend(state, torch.tensor([[0], [0]]))
    torch.testing.assert_close(again.log_probs[0, -1], first.log_probs[1, 1])
    torch.testing.assert_close(again.log_probs[1, -1], first.log_probs[0, 0])


def test_the_law_as_a_proposal_has_weights_without_variance():
    for factor in (Reward(wavy, beta=0.3), Constraint(Automaton.containing("ab"))):
        model = enumerable_lm("tabular") * factor
        table = exact(model)
        particles = infer(model, Importance(50, proposal=table), progress=False)
        log_z = table.log_normalizer[0].value[particles.draws.context]
        torch.testing.assert_close(particles.draws.log_weight, log_z, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ENUMERABLE)
def test_yesterdays_posterior_is_todays_prior(kind):
    lm = enumerable_lm(kind)
    first, second = Reward(wavy, beta=0.5), Reward(count_of("a"), name="a")
    both = exact(lm * first * second)
    one_by_one = exact(exact(lm * first).as_language_model() * second)
    torch.testing.assert_close(one_by_one.log_prob(both.draws), both.draws.log_q, rtol=0, atol=TOLERANCE)


def test_the_law_belongs_to_its_contexts():
    law = exact(enumerable_lm("tabular") * Reward(wavy)).as_language_model()
    with pytest.raises(ContextError, match=r"computed for 2 context\(s\).*`model \| contexts`"):
        law | "b"


@pytest.mark.parametrize("stop", [None, "ab"])
def test_a_law_ends_rows_as_its_prior_does(stop):
    from tests.lm.random_models import random_lm

    lm = random_lm("llama", stop=stop)
    law = exact(lm * Reward(wavy)).as_language_model()
    assert law.ends_by_eos_alone == lm.ends_by_eos_alone == (stop is None)


def test_fingerprints_tell_laws_apart():
    lm = enumerable_lm("tabular")
    tables = [exact(lm * Reward(wavy, beta=beta)).law.fingerprint for beta in (0.5, 0.5, 0.6)]
    assert tables[0] == tables[1] != tables[2]
    machines = [exact(lm * Constraint(Automaton.containing(w))).law.fingerprint for w in ("a", "a", "b")]
    assert machines[0] == machines[1] != machines[2]


def test_fresh_draws_are_scored():
    lm = enumerable_lm("llama")
    table = exact(lm * Reward(wavy, beta=0.5))
    draws = table.draw(5, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(draws.log_prior, lm.score(draws))
    log_z = table.log_normalizer[0].value[draws.context]
    torch.testing.assert_close(draws.log_q, draws.log_prior + draws.log_factors["wavy"] - log_z)


# Statistics: each p-value is uniform (or larger) where the sampler is right; 4 tests, 1 in 1,000 each.


@pytest.mark.parametrize("factor", [Reward(wavy, beta=0.3), Constraint(Automaton.containing("ab"))])
def test_draws_of_the_law_have_the_law(factor):
    model = enumerable_lm("tabular") * factor
    table = exact(model)
    draws = table.draw(3000, generator=torch.Generator().manual_seed(11))
    for context in (0, 1):
        brute = brute_force(model, context)
        own = draws.select(draws.context == context)
        assert goodness_of_fit(own, brute, brute.log_posterior) > 1e-3
        assert goodness_of_fit(own, brute, brute.log_prior) < 1e-6  # the test has power


def test_the_same_seed_repeats_the_draws():
    model = TabularLM.random(4, 8, seed=1) * Constraint(Automaton.containing("ab"))
    first, second, other = (infer(model, Exact(), 30, seed=s, progress=False).draws for s in (1, 1, 2))
    assert torch.equal(first.ids, second.ids)
    assert not torch.equal(first.ids, other.ids)


# Refusals.


@pytest.mark.parametrize("route", ["dynamic programming", "enumeration"])
def test_infeasible_models_name_the_context_and_the_factor(route):
    def constraint(name: str, automaton: Automaton) -> Constraint:
        given = automaton if route == "dynamic programming" else automaton.accepts_texts
        return Constraint(given, name=name)

    prior = TabularLM.random(3, 3, seed=1, context=["", "a"])
    short, long = constraint("short", Automaton.length(0, 1)), constraint("long", Automaton.length(2))
    with pytest.raises(InfeasibleModel, match=r"context '' \(and for 1 more\): factor 'z' alone excludes every out"):
        exact(prior * short * constraint("z", Automaton.containing("z")))
    with pytest.raises(InfeasibleModel, match="no factor alone excludes"):
        exact(prior * short * long)
    after_a = TabularLM(
        [[1.0, 0.0], [0.5, 0.5], [0.5, 0.5]], ["a", "b"], eos=None, max_new_tokens=2, context=["b", "a"]
    )
    with pytest.raises(InfeasibleModel, match=r"context 'a': factor 'b'"):
        exact(after_a * constraint("b", Automaton.containing("b")))


def test_too_many_outcomes():
    model = TabularLM.random(5, 30, seed=1) * Reward(wavy)
    with pytest.raises(UnsupportedModel, match=r"about 2e\+18 outcomes, more than max_sequences = 1,000"):
        exact(model, max_sequences=1000)
    llama = enumerable_lm("llama") * Reward(wavy)
    target = Target(llama)
    reason = Exact(max_sequences=50).unsupported_reason(target.form)
    assert reason.count("\n") == 0
    assert "5 tokens and a horizon of 3" in reason
    assert "'rejection'" in reason
    with pytest.raises(UnsupportedModel, match="max_sequences = 50"):
        exact(llama, max_sequences=50)
    assert target.cost.lm_forwards == 0


def test_bad_arguments_are_refused_when_planned():
    lm = enumerable_lm("tabular")
    with pytest.raises(ModelError, match="max_sequences = 0"):
        exact(lm * Reward(wavy), max_sequences=0)
    with pytest.raises(ModelError, match="num_draws: got 0"):
        exact(lm * Reward(wavy), num_draws=0)
    with pytest.raises(UnsupportedModel, match="exact needs exact factor values"):
        exact(lm * Reward(wavy, stochastic=True))
