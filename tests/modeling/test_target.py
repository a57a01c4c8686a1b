"""Target: γ, computed in batches, with every user function called once on each distinct text, and counted."""

import dataclasses
import math

import pytest
import torch

from lmppl.errors import FactorError, ShapeError
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence import Automaton, Constraint, Optimality, Reward
from lmppl.modeling.factors import Factor, Feature
from lmppl.modeling.model import Model
from lmppl.modeling.target import Target, TargetForm, log_evidence
from lmppl.sequences import Cost

EOS = 2


class Counted:
    """A user function that remembers what it was asked."""

    def __init__(self, fn=len):
        self.fn, self.asked = fn, []

    def __call__(self, texts):
        self.asked.append(list(texts))
        return [float(self.fn(t)) for t in texts]


@pytest.fixture
def prior() -> TabularLM:
    return TabularLM.random(3, 3, order=1, seed=3, context=["", "ab"])


# γ.


def test_gamma_is_prior_times_evidence(prior):
    model = prior * Reward(Counted(), beta=0.5) * Constraint(lambda texts: ["bb" not in t for t in texts])
    target = Target(model)
    for c in (0, 1):
        table = prior.enumerate_sequences(c)
        rows = zip(table.log_prior.tolist(), table.text, strict=True)
        expected = [p + len(t) / 0.5 if "bb" not in t else -math.inf for p, t in rows]
        gamma = target.log_prob_unnormalized(table)
        assert gamma.dtype == torch.float64
        assert gamma.tolist() == pytest.approx(expected, abs=1e-12)


def test_gamma_is_zero_off_the_support_of_the_prior_whatever_the_factors_say():
    sure = TabularLM.from_prefixes({"": (1, 0, 0), "a": (0, 0, 1)}, ["a", "b", "<eos>"], max_new_tokens=2)
    scorer = Counted()
    target = Target(sure * Reward(scorer, beta=0.001) * Optimality(lambda texts: [-math.inf] * len(texts)))
    outside = sure.sequences([[1, EOS], [0, 1], [0], [EOS, EOS]])
    assert target.log_prob_unnormalized(outside).tolist() == [-math.inf] * 4
    assert scorer.asked == [], "user functions are not asked about what cannot be"
    assert Target(Model(sure)).log_prob_unnormalized(sure.sequences([[0, EOS], [1, EOS]])).tolist() == [0, -math.inf]


def test_gamma_does_not_change_the_priors_numbers(prior):
    target = Target(prior * Reward(Counted()))
    table = prior.enumerate_sequences()
    before = table.log_prior.clone()
    target.log_prob_unnormalized(table)
    assert table.log_prior.equal(before)


def test_evaluate_fills_the_columns(prior):
    model = prior * Reward(Counted(), beta=2.0, name="long") * Constraint(lambda texts: ["b" not in t for t in texts])
    draws = prior.draw(10, generator=torch.Generator().manual_seed(0))
    texts = draws.text
    filled = Target(model).evaluate(draws)
    assert filled.text is texts
    assert filled.features["Counted"].tolist() == [len(t) for t in texts]
    assert filled.log_factors["long"].tolist() == [len(t) / 2 for t in texts]
    expected = [len(t) / 2 + (0 if "b" not in t else -math.inf) for t in texts]
    assert log_evidence(filled).tolist() == expected
    assert log_evidence(Target(Model(prior)).evaluate(draws)).tolist() == [0] * len(draws)


@pytest.mark.parametrize("width", [None, 2])
def test_nothing_asked_nothing_done(prior, width):
    def fn(texts):
        return torch.zeros(len(texts), width) if width else [0.0] * len(texts)

    def log_factor(columns):
        return columns["f"][:, 0] if width else columns["f"]

    target = Target(prior * Factor("own", (Feature("f", fn),), log_factor))
    none = prior.draw(2).select([])
    assert target.log_factors(none)["own"].shape == (0,)
    assert len(target.evaluate(none)) == 0
    assert target.log_prob_unnormalized(none).shape == (0,)


# Calls are counted, and made once.


def test_each_distinct_text_is_asked_once(prior):
    scorer = Counted()
    target = Target(prior * Reward(scorer) * Constraint(scorer, where=lambda s: s > 0))
    rows = prior.sequences([[0, EOS], [1, EOS], [0, EOS], [0, 0, EOS]], [0, 0, 1, 0])
    target.log_factors(rows)
    assert scorer.asked == [["a", "b", "aa"]], "the same text under another context is the same text"
    assert (target.cost.factor_calls, target.cost.cache_hits) == (3, 1)
    again = target.features(rows.select([3, 0]))
    assert again["Counted"].tolist() == [2, 1]
    assert len(scorer.asked) == 1
    assert (target.cost.factor_calls, target.cost.cache_hits) == (3, 3)


def test_the_cache_belongs_to_one_run(prior):
    scorer = Counted()
    model = prior * Reward(scorer)
    rows = prior.sequences([[0, EOS]])
    first, second = Target(model), Target(model)
    first.log_prob_unnormalized(rows)
    second.log_prob_unnormalized(rows)
    assert len(scorer.asked) == 2
    assert first.cost == second.cost
    assert first.cost.lm_forwards > 0
    assert first.cost.factor_calls == 1
    assert Target(model).cost == Cost()


def test_what_reads_the_context_is_asked_for_each_context(prior):
    full = Counted()
    target = Target(prior * Reward(full, on="full"))
    rows = prior.sequences([[0, EOS], [0, EOS]], [0, 1])
    assert target.features(rows)["Counted"].tolist() == [1, 3]
    assert full.asked == [["a", "aba"]]

    def agrees(prompts, completions):
        return [float(p.endswith(c)) for p, c in zip(prompts, completions, strict=True)]

    rows = prior.sequences([[1, EOS], [1, EOS]], [0, 1])
    assert Target(prior * Reward(agrees)).features(rows)["agrees"].tolist() == [0, 1]


def test_what_reads_ids_tells_equal_texts_apart(prior):
    target = Target(prior * Constraint(Feature("ended", lambda rows: rows.finished, on="ids")))
    rows = prior.sequences([[0, 0, EOS], [0, 0, 0], [0, 0, EOS]])
    assert target.log_factors(rows)["ended"].tolist() == [0, -math.inf, 0]
    assert (target.cost.factor_calls, target.cost.cache_hits) == (2, 1)


def test_functions_of_prompts_may_read_token_ids():
    """Two tokenisations of one text: what reads token ids must see both."""
    lm = TabularLM([0.25] * 4, ["a", "aa", "b", "<eos>"], max_new_tokens=3)

    def tokens(prompts, completions, completion_ids):
        return [float(len(ids)) for ids in completion_ids]

    rows = lm.sequences([[0, 0, 3], [1, 3]])
    assert rows.text == ["aa", "aa"]
    assert Target(lm * Reward(tokens)).features(rows)["tokens"].tolist() == [3, 2]


def test_stochastic_features_are_never_cached(prior):
    calls = []

    def noisy(texts):
        calls.append(len(texts))
        return torch.rand(len(texts))

    target = Target(prior * Reward(noisy, stochastic=True))
    rows = prior.sequences([[0, EOS], [0, EOS]])
    first, second = target.features(rows)["noisy"], target.features(rows)["noisy"]
    assert calls == [2, 2]
    assert len({*first.tolist(), *second.tolist()}) == 4
    assert (target.cost.factor_calls, target.cost.cache_hits) == (4, 0)


def test_a_stochastic_feature_is_drawn_once_a_batch_for_all_its_factors(prior):
    noisy = Feature("noisy", lambda texts: torch.rand(len(texts)), stochastic=True)
    model = prior * Reward(noisy) * Reward(noisy, beta=2.0)
    values = Target(model).log_factors(prior.sequences([[0, EOS], [1, EOS]]))
    torch.testing.assert_close(values["noisy"], 2 * values["noisy_2"])


def test_vectors_are_features_too(prior):
    def both(texts):
        return [[float(len(t)), float(t.count("a"))] for t in texts]

    own = Factor("own", (Feature("both", both),), lambda columns: columns["both"].sum(-1), hard=False)
    target = Target(prior * own)
    rows = prior.sequences([[0, EOS], [1, 0, EOS], [0, EOS]])
    assert target.features(rows)["both"].tolist() == [[1, 1], [2, 1], [1, 1]]
    assert target.log_factors(rows)["own"].tolist() == [2, 3, 2]


@pytest.mark.parametrize("stochastic", [False, True])
def test_no_rows_of_a_vector_are_as_wide_as_the_others(prior, stochastic):
    def both(texts):
        return [[float(len(t)), 1.0] for t in texts]

    own = Factor("own", (Feature("both", both, stochastic=stochastic),), lambda columns: columns["both"].sum(-1))
    target = Target(prior * own)
    rows = prior.sequences([[0, EOS], [1, 0, EOS]])
    some = target.features(rows)["both"]
    none = target.features(rows.select([]))["both"]
    assert none.shape == (0, 2)
    assert torch.cat([none, some]).equal(some)


def test_a_shape_that_changes_from_batch_to_batch_is_an_error(prior):
    def fn(texts):
        return torch.zeros(len(texts), 2) if len(texts) > 1 else torch.zeros(len(texts))

    target = Target(prior * Factor("own", (Feature("f", fn),), lambda columns: columns["f"].reshape(-1)))
    target.features(prior.sequences([[0, EOS]]))
    with pytest.raises(ShapeError, match=r"factor 'own': feature 'f' has values of shape \(\) .* and \(2,\)"):
        target.features(prior.sequences([[1, EOS], [0, 0, EOS]]))


# Errors name the factor and the text.


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_of_a_function(prior, value):
    target = Target(prior * Reward(lambda texts: [value if t == "b" else 0.0 for t in texts], name="odd"))
    with pytest.raises(FactorError, match=r"factor 'odd'.*'b'"):
        target.log_factors(prior.sequences([[0, EOS], [1, EOS]]))


def test_minus_infinity_of_a_soft_factor(prior):
    target = Target(prior * Reward(lambda texts: [-math.inf if t == "b" else 0.0 for t in texts], name="odd"))
    with pytest.raises(FactorError, match=r"factor 'odd': log φ is −inf, although .* hard=False.*'b'"):
        target.log_factors(prior.sequences([[0, EOS], [1, EOS]]))


@pytest.mark.parametrize(
    ("log_factor", "message"),
    [
        (lambda columns: columns["f"] * math.nan, r"factor 'own': log φ is nan or \+inf for the text 'a'"),
        (lambda columns: columns["f"] + math.inf, r"factor 'own': log φ is nan or \+inf for the text 'a'"),
        (lambda columns: columns["f"][:, None], r"factor 'own': log φ has shape \(2, 1\), expected \(2,\)"),
        (lambda columns: columns["f"].sum(), r"factor 'own': log φ has shape \(\), expected \(2,\)"),
        (lambda columns: columns["f"].tolist(), r"factor 'own': log φ is a list, expected a tensor"),
        (lambda columns: columns["g"], r"factor 'own': log_factor raised KeyError"),
    ],
)
def test_a_broken_log_factor(prior, log_factor, message):
    target = Target(prior * Factor("own", (Feature("f", Counted()),), log_factor))
    with pytest.raises(FactorError, match=message):
        target.log_factors(prior.sequences([[0, EOS], [1, EOS]]))


def test_a_function_that_fails(prior):
    def fn(texts):
        return [1 / (len(t) - 2) for t in texts]

    with pytest.raises(FactorError, match=r"factor 'fn'.*ZeroDivisionError.*'aa'"):
        Target(prior * Reward(fn)).log_factors(prior.sequences([[0, EOS], [0, 0, EOS]]))


# The form that engines read.


def test_the_form(prior):
    free = Factor("free", (Feature("f", Counted()),), lambda columns: columns["f"])
    noisy = Feature("noise", lambda texts: torch.rand(len(texts)), stochastic=True)
    model = (
        prior
        * Reward(Counted(), beta=0.5, upper=3, name="bounded")
        * Constraint(Automaton.avoiding("aa"), name="dfa")
        * free
        * Reward(noisy)
    )
    form = TargetForm.of(model)
    assert form == Target(model).form
    assert (form.num_contexts, form.horizon, form.vocab_size, form.tabular) == (2, 3, 3, True)
    assert form.factor_names == ("bounded", "dfa", "free", "noise")
    assert form.unbounded == ("free", "noise")
    assert form.without_automaton == ("bounded", "free", "noise")
    assert form.hard == ("dfa", "free")
    assert form.stochastic == ("noise",)
    assert form.log_upper == math.inf
    bounded = TargetForm.of(prior * Reward(Counted(), beta=0.5, upper=3) * Constraint(Automaton.avoiding("aa")))
    assert bounded.log_upper == 6
    assert TargetForm.of(Model(prior)).log_upper == 0


@pytest.mark.parametrize(("vocab", "cap", "eos"), [(3, 4, -1), (2, 10, -1), (3, 4, None), (1, 3, None), (1, 3, -1)])
def test_the_number_of_outcomes_is_bounded(vocab, cap, eos):
    lm = TabularLM.random(vocab, cap, eos=eos)
    assert TargetForm.of(Model(lm)).max_outcomes >= len(lm.enumerate_sequences())


def test_too_many_outcomes_to_count():
    assert TargetForm.of(Model(TabularLM.random(3, 5000))).max_outcomes == math.inf
    linear = TargetForm.of(Model(TabularLM.random(2, 1000)))
    assert linear.max_outcomes == 1001


def test_a_form_is_plain_data(prior):
    assert dataclasses.asdict(TargetForm.of(Model(prior)))["horizon"] == 3
