"""Model: the algebra of declarations, names, shared features, and what is refused."""

import dataclasses
import functools

import pytest
import torch

from lmppl.errors import ContextError, ModelError
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence import Automaton, Constraint, Reward
from lmppl.modeling.factors import Factor, Feature
from lmppl.modeling.model import Model


def score(texts):
    return [float(len(t)) for t in texts]


def clean(texts):
    return ["b" not in t for t in texts]


@pytest.fixture
def prior() -> TabularLM:
    return TabularLM.random(3, 3, context=["", "ab"])


# Algebra.


def test_a_model_is_a_prior_times_factors(prior):
    reward, constraint = Reward(score, beta=0.5), Constraint(clean)
    model = prior * reward * constraint
    assert isinstance(model, Model)
    assert model.prior is prior
    assert model.factors == (reward, constraint)
    assert (Model(prior, (reward,)) * constraint).factors == (reward, constraint)
    assert Model(prior).factors == ()


def test_multiplication_makes_new_models(prior):
    base = prior * Reward(score)
    longer = base * Constraint(clean)
    assert len(base.factors) == 1
    assert len(longer.factors) == 2


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p: Reward(score) * Reward(score), "a model begins with its prior"),
        (lambda p: Reward(score) * p, "a model begins with its prior"),
        (lambda p: 3 * Reward(score), r"got int \* Reward, expected a language model or a model on the left"),
        (lambda p: p * Reward(score) * 3, r"got Model \* int, expected a factor such as lmppl.Reward"),
        (lambda p: p * Reward(score) * score, r"got Model \* function"),
        (lambda p: p * Reward(score) * p, r"got Model \* TabularLM: a model has one prior"),
        (lambda p: (p * Reward(score)) * (p * Constraint(clean)), r"got Model \* Model: a model has one prior"),
        (lambda p: (p * Reward(score)) ** 2, r"got Model \*\* 2: `\*\*` belongs on the prior, as in prior \*\* 2"),
        (lambda p: Model(score), "prior: got function, expected a language model"),
        (lambda p: Model(p, (score,)), "factor: got function, expected a factor"),
    ],
)
def test_what_is_no_product_is_refused(prior, build, message):
    with pytest.raises(ModelError, match=message):
        build(prior)


def test_other_contexts(prior):
    model = prior * Reward(score)
    assert (model | "b").prior.prompts == ("b",)
    assert (model | ["a", "b"]).prior.prompts == ("a", "b")
    assert (model | "b").factors == model.factors
    assert model.prior.prompts == ("", "ab")
    with pytest.raises(ContextError):
        _ = model | "z"


def test_without_and_by_name(prior):
    model = prior * Reward(score) * Constraint(clean)
    assert [f.name for f in model.without("score").factors] == ["clean"]
    assert model["clean"].kind == "Constraint"
    for ask in (model.without, model.__getitem__):
        with pytest.raises(ModelError, match=r"no factor is called 'tidy'; this model has \['score', 'clean'\]"):
            ask("tidy")


# Names.


def test_names_that_nobody_chose_are_numbered(prior):
    model = prior * Reward(score) * Reward(score, beta=2) * Reward(score, beta=3)
    assert [f.name for f in model.factors] == ["score", "score_2", "score_3"]
    assert [f.beta for f in model.factors] == [1, 2, 3]
    shorter = model.without("score_2") * Reward(score, beta=4)
    assert [f.name for f in shorter.factors] == ["score", "score_3", "score_2"]


def test_a_chosen_name_is_kept_and_the_others_give_way(prior):
    model = prior * Reward(score) * Reward(score, beta=2, name="score")
    assert [(f.name, f.beta) for f in model.factors] == [("score_2", 1), ("score", 2)]
    with pytest.raises(ModelError, match="two factors are called 'score'; give one another name="):
        _ = prior * Reward(score, name="score") * Constraint(clean, name="score")


def test_renaming_leaves_the_users_factor_alone(prior):
    reward = Reward(score, beta=2)
    model = prior * reward * reward
    assert reward.name == "score"
    assert isinstance(model.factors[1], Reward)


# Features.


def test_a_shared_function_is_one_feature(prior):
    model = prior * Reward(score) * Constraint(score, where=lambda s: s > 1)
    assert list(model.features) == ["score"]
    assert model.feature_names(model.factors[0]) == model.feature_names(model.factors[1]) == ("score",)


def test_functions_that_differ_have_columns_of_their_own(prior):
    def other(texts):
        return [1.0] * len(texts)

    other.__name__ = "score"
    model = prior * Reward(score) * Reward(other) * Reward(score, on="full")
    assert list(model.features) == ["score", "score_2", "score_3"]
    assert [model.feature_names(f) for f in model.factors] == [("score",), ("score_2",), ("score_3",)]


def test_equal_functions_of_an_object_are_one_feature(prior):
    class Scorer:
        def rate(self, texts):
            return [0.0] * len(texts)

    one, two = Scorer(), Scorer()
    model = prior * Reward(one.rate) * Reward(one.rate, beta=2) * Reward(two.rate)
    assert list(model.features) == ["rate", "rate_2"]
    partial = functools.partial(score)
    assert list((prior * Reward(partial) * Reward(partial)).features) == ["score"]


def test_a_callable_that_cannot_be_hashed_is_itself_only():
    @dataclasses.dataclass
    class Scorer:
        weight: float

        def __call__(self, texts):
            return [self.weight] * len(texts)

    one = Scorer(1.0)
    assert Feature("f", one).identity == Feature("g", one).identity
    assert Feature("f", one).identity != Feature("f", Scorer(1.0)).identity


def test_features_of_one_factor_have_distinct_names(prior):
    def total(columns):
        return sum(columns.values())

    features = (Feature("f", score), Feature("f", clean))
    with pytest.raises(ModelError, match=r"factor 'both': its features are called \['f', 'f'\]"):
        _ = prior * Factor("both", features, total)


# What people and files see.


def test_the_formula_is_the_declaration(prior):
    model = prior * Reward(score, beta=0.5) * Constraint(clean)
    assert model.formula == "π*(x|c) ∝ π0(x|c) · exp(score(x)/0.5) · 1[clean(x)]"
    assert Model(prior).formula == "π*(x|c) ∝ π0(x|c)"
    own = Factor("mine", (Feature("f", score),), lambda columns: columns["f"])
    assert (prior * own).formula.endswith("· mine(x)")


def test_repr_shows_prior_contexts_and_factors(prior):
    shown = repr(prior * Reward(score, beta=0.5) | ["", "a", "b", "ab"])
    assert shown.splitlines() == [
        "π*(x|c) ∝ π0(x|c) · exp(score(x)/0.5)",
        "  π0 = TabularLM(4 contexts, max_new_tokens=3)",
        "  c ∈ {'', 'a', 'b', ...}",
        "  score: Reward, φ = exp(score(x)/0.5)",
    ]


def test_equal_declarations_have_equal_hashes_and_others_do_not(prior):
    automaton = Automaton.avoiding("aa")
    variants = [
        Model(prior),
        prior * Reward(score),
        prior * Reward(score, beta=0.5),
        prior * Reward(score, upper=3),
        prior * Reward(score, name="length"),
        prior * Constraint(clean),
        prior * Constraint(automaton),
        prior * Reward(score) * Constraint(clean),
        (prior * Reward(score)) | "b",
        TabularLM.random(3, 3, seed=5) * Reward(score),
    ]
    hashes = [m.spec_hash for m in variants]
    assert len(set(hashes)) == len(variants)
    assert (prior * Reward(score)).spec_hash == hashes[1]


def test_a_changed_function_is_another_declaration(prior):
    def make(weight):
        return lambda texts: [weight * len(t) for t in texts]

    def above(threshold):
        return Constraint(score, where=lambda s: s > threshold)

    def own(scale):
        return Factor("own", (Feature("f", score),), lambda columns: scale * columns["f"])

    for declare in (lambda v: Reward(make(v)), above, own):
        assert (prior * declare(1)).spec_hash == (prior * declare(1)).spec_hash
        assert (prior * declare(1)).spec_hash != (prior * declare(2)).spec_hash
    # A fingerprint stands in place of the content.
    named = [(prior * Reward(make(v), fingerprint=f)).spec_hash for v, f in [(1, "a"), (2, "a"), (1, "b")]]
    assert named[0] == named[1] != named[2]


def test_log_factor_sees_its_own_names_for_shared_features(prior):
    """A factor calls a feature "f"; the model may have another name for that column."""
    from lmppl.modeling.target import Target

    own = Factor("mine", (Feature("f", score),), lambda columns: -columns["f"], hard=False)
    model = prior * Reward(score) * own
    draws = prior.draw(5)
    values = Target(model).log_factors(draws)
    assert values["mine"].equal(-values["score"])
    assert bool((values["score"] == torch.tensor(score(draws.text)).double()).all())
