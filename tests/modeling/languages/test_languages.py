"""Languages of words, their algebra, and what they are as factors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lmppl
from lmppl.errors import InfeasibleModel, ModelError
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence import (
    Automaton,
    Banned,
    Constraint,
    Contains,
    Finished,
    Grammar,
    JsonSchema,
    Language,
    MaxWords,
    OneOf,
    Regex,
    Reward,
)
from lmppl.modeling.graph import FactorGraph
from lmppl.testing import check_factor
from tests.models import TOLERANCE, enumerable_lm

texts = st.lists(st.text("abAB \t\n_é", max_size=8), min_size=1, max_size=30)
word_lists = st.lists(st.text("abAé", min_size=1, max_size=3), min_size=1, max_size=4, unique=True)


@settings(max_examples=40)
@given(texts, word_lists, st.booleans())
def test_words_occur_as_python_finds_them(some: list[str], words: list[str], ignore: bool) -> None:
    def found(text: str) -> list[bool]:
        return [w.lower() in text.lower() if ignore else w in text for w in words]

    options = {"ignore_case": ignore}
    assert Contains(words, **options).accepts(some).tolist() == [any(found(t)) for t in some]
    assert Contains(words, "all", **options).accepts(some).tolist() == [all(found(t)) for t in some]
    assert Banned(words, **options).accepts(some).tolist() == [not any(found(t)) for t in some]
    assert Contains(words, all, **options).arguments == Contains(words, "all", **options).arguments


def test_a_word_is_part_of_another_one_unless_whole_words_are_meant() -> None:
    some = ["a classic", "an ass", "ass_1", "ass.", "Ass"]
    assert Contains("ass").accepts(some).tolist() == [True, True, True, True, False]
    assert Contains("ass", whole_words=True).accepts(some).tolist() == [False, True, False, True, False]
    assert Banned("ass", whole_words=True, ignore_case=True).accepts(some).tolist() == [True, False, True, False, False]


@given(st.lists(st.text("ab \t\u2003é", max_size=9), min_size=1, max_size=30), st.integers(0, 3))
def test_max_words_counts_as_split_does(some: list[str], most: int) -> None:
    assert MaxWords(most).accepts(some).tolist() == [len(t.split()) <= most for t in some]


@given(
    st.sets(st.text("ab (+", max_size=3), min_size=1, max_size=4), st.lists(st.text("ab (+", max_size=5), min_size=1)
)
def test_one_of(listed: set[str], some: list[str]) -> None:
    assert OneOf(listed).accepts(some).tolist() == [t in listed for t in some]
    stripped = {one.strip() for one in listed}
    assert OneOf(listed, strip=True).accepts(some).tolist() == [t.strip() in stripped for t in some]


LANGUAGES = [
    Regex("a*b*"),
    Contains(["ab", "b"], "all"),
    Banned(["aa"]),
    OneOf(["a", "ab", "ba"]),
    MaxWords(0),
    Grammar('start: "a" start "b" | "ab"'),
    Finished(),
]


@pytest.mark.parametrize("i", range(len(LANGUAGES)))
@pytest.mark.parametrize("j", range(len(LANGUAGES)))
def test_the_algebra_is_that_of_sets(i: int, j: int) -> None:
    lm = TabularLM.random(3, 4, seed=3)
    rows = lm.enumerate_sequences(0)
    one, other = LANGUAGES[i], LANGUAGES[j]
    a, b = one.accepts_sequences(rows), other.accepts_sequences(rows)
    for language, expected in ((one | other, a | b), (~one, ~a), (~(~one & ~other), a | b)):
        assert torch.equal(language.accepts_sequences(rows), expected)
        value = lmppl.Target(lm * language).log_factors(rows)[language.name]
        assert torch.equal(value == 0, expected)
    if bool((a & b).any()):
        check_factor(one & other, lm, num_sequences=16)


@pytest.mark.parametrize("kind", ["tabular", "llama", "mistral"])
@pytest.mark.parametrize("language", [*LANGUAGES, Regex("a.*") & ~Finished()], ids=lambda one: one.name)
def test_exact_agrees_with_enumeration_of_the_predicate(kind: str, language: Language) -> None:
    lm = enumerable_lm(kind)
    if language.name == "max_words":
        language = Regex("[ab]+")
    posterior = lmppl.infer(lm * language, "exact")
    predicate = Constraint(lambda rows: language.accepts_sequences(rows), on="ids", name="predicate")
    direct = lmppl.infer(lm * predicate, "exact")
    gap = posterior.log_normalizer[0].log_value - direct.log_normalizer[0].log_value
    assert float(gap.abs().max()) < TOLERANCE
    grammars = isinstance(language, Grammar)
    expected = "dynamic programming" if kind == "tabular" and not grammars else "enumeration"
    assert posterior.info["route"] == expected


def test_sums_over_a_table_are_exact_at_any_horizon() -> None:
    """P(no two heads in a row in n tosses) = F(n+2)/2^n, with Fibonacci's numbers."""
    coin = TabularLM([0.5, 0.5], ["h", "t"], eos=None, max_new_tokens=200)
    posterior = lmppl.infer(coin * Banned(["hh"]) * Regex("[ht]*"), "exact", num_draws=4)
    a, b = 1, 1
    for _ in range(200):
        a, b = b, a + b
    expected = torch.tensor(float(b), dtype=torch.float64).log() - 200 * torch.tensor(2.0, dtype=torch.float64).log()
    assert float(posterior.log_normalizer[0].log_value - expected) == pytest.approx(0.0, abs=1e-9)
    assert not any("hh" in text for text in posterior.draws.text)


def test_masked_decoding_is_not_the_posterior_and_weights_make_it_so() -> None:
    """The prior of "ab" is 0.09, of "ba" 0.09, of "bb" 0.01: the mask draws "ab" 9 times in 10, π* 9 in 19."""
    lm = TabularLM([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1]], ["a", "b"], eos=None, max_new_tokens=2)
    model = lm * OneOf(["ab", "ba", "bb"])
    exact = lmppl.infer(model, "exact")
    truth = {t: float(w.exp()) for t, w in zip(exact.draws.text, exact.draws.log_q, strict=True)}
    masked = lmppl.infer(model, lmppl.WeightedDecoding(), num_draws=2000, seed=1)
    share = sum(text == "ab" for text in masked.draws.text) / 2000
    assert abs(share - 0.9) < 0.03
    assert truth["ab"] == pytest.approx(0.09 / 0.19)
    corrected = lmppl.infer(model, lmppl.Importance(4000, proposal=masked), seed=2)
    low, high = corrected.expectation(lambda texts: [float(t == "ab") for t in texts]).interval[0].tolist()
    assert low < truth["ab"] < high
    for engine in (lmppl.SMC(64), lmppl.MCMC(num_steps=200)):
        found = lmppl.infer(model, engine, num_draws=400, seed=2)
        estimate = found.expectation(lambda texts: [float(t == "ab") for t in texts])
        assert abs(float(estimate.value[0]) - truth["ab"]) < 0.1


def test_more_characters_than_the_tokens_have_are_found_before_a_run() -> None:
    lm = lmppl.LM("tiny", context="Once upon a time", max_new_tokens=12)
    with pytest.raises(InfeasibleModel, match="alone excludes every outcome of at most 12 tokens"):
        lmppl.infer(lm * Regex("(?s).{400,500}"), num_draws=4)


def test_words_outside_ascii_are_written_token_by_token() -> None:
    """Bytes of an unfinished character are followed to the characters that they can become."""
    lm = lmppl.LM("tiny", context="Once upon a time", max_new_tokens=12)
    for words in (["é"], [" café."], ["’s"], ["日本"], [" girl.", " café."]):
        posterior = lmppl.infer(lm * OneOf(words), lmppl.SMC(16, num_sweeps=1), seed=1)
        assert set(posterior.draw(8).text) <= set(words)


def test_a_factor_may_be_called_as_the_graph_calls_its_own_nodes() -> None:
    lm = TabularLM.random(3, 3, seed=1)
    for name in ("x", "c", "prior", "context"):
        assert lmppl.infer(lm * Reward(len_of, name=name) * Regex("[ab]*", name=f"{name}_2"), "exact")
        feature = lmppl.Feature(name, len_of)
        assert (lm * lmppl.Moment(feature, 1.0, name="m")).graph.to_dict()


def len_of(texts: list[str]) -> list[float]:
    return [float(len(t)) for t in texts]


def test_words_of_python_do_not_combine_languages() -> None:
    with pytest.raises(ModelError, match="do not combine languages"):
        _ = Regex("a") and Regex("b")


def test_by_default_what_knows_prefixes_is_steered() -> None:
    lm = lmppl.LM("tiny", context="Once upon a time", max_new_tokens=12)
    posterior = lmppl.infer(lm * OneOf([", there was a girl.", ", there was a boy."]), num_draws=20)
    assert posterior.engine.name == "smc"
    assert set(posterior.draw(5).text) <= {", there was a girl.", ", there was a boy."}


def test_declarations_come_back_from_plain_data() -> None:
    lm = TabularLM.random(3, 3, seed=1)
    languages = [
        Regex("a+", flags=2, name="r"),
        Contains(["a"], whole_words=True),
        Banned(["b"]),
        OneOf(["a"], strip=True),
        MaxWords(2),
        Finished(),
        Grammar('start: "a"'),
        JsonSchema({"type": "integer"}),
        Language(Automaton.containing("a"), name="plain"),
        Regex("a") | (Finished() & ~Grammar('start: "a"')),
    ]
    model = lm
    for language in languages:
        model = model * language
    again = FactorGraph.from_dict(model.graph.to_dict()).to_model(lm, {})
    assert again.graph.to_dict() == model.graph.to_dict()
    assert again.spec_hash == model.spec_hash
    assert (lm * Regex("a")).spec_hash != (lm * Regex("b")).spec_hash
    assert (lm * JsonSchema({"type": "integer"})).spec_hash != (lm * JsonSchema({"type": "null"})).spec_hash


@pytest.mark.parametrize(
    ("declare", "message"),
    [
        (lambda: Contains([]), "Contains: got no word"),
        (lambda: Contains(["a", ""]), "got '', expected words"),
        (lambda: Contains(["a"], "some"), "got how='some', expected 'any' or 'all'"),
        (lambda: Contains([chr(97 + i) for i in range(13)], "all"), "expected at most 8"),
        (lambda: Banned([3]), "got 3, expected words"),
        (lambda: OneOf("yes"), "OneOf: got the single text 'yes'"),
        (lambda: OneOf([]), "OneOf: got no text"),
        (lambda: MaxWords(-1), "MaxWords: got -1"),
        (lambda: Regex("a+") & Regex("b+"), "the language is empty"),
        (lambda: Regex("a") & Reward(len), "got Regex & Reward, expected a language"),
        (lambda: Regex("a").accepts("a"), "got the single text 'a'"),
        (lambda: Finished().accepts(["a"]), "a text does not show whether it is finished"),
        (lambda: Language(len), "got builtin_function_or_method, expected an Automaton"),
    ],
)
def test_what_is_refused(declare, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        declare()


@pytest.mark.parametrize("engine", ["importance", "rejection", "smc", "mcmc", None])
def test_what_cannot_be_met_is_found_before_anything_is_drawn(engine: str | None) -> None:
    class Counted(TabularLM):
        def decoder(self):
            raise AssertionError("something was drawn")

    lm = Counted([0.5, 0.3, 0.2], ["a", "b", "<eos>"], max_new_tokens=4, context=["", "ab"])
    with pytest.raises(
        InfeasibleModel,
        match="context '' \\(and for 1 more\\): factor 'long' alone excludes every outcome of at most 4",
    ):
        lmppl.infer(lm * Regex("a{9}", name="long"), engine, num_draws=4)
    with pytest.raises(InfeasibleModel, match="factor 'regex' alone excludes every"):
        lmppl.infer(lm * Regex("é"), engine, num_draws=4)
    with pytest.raises(InfeasibleModel, match="factor 'json_schema' alone excludes every"):
        lmppl.infer(lm * JsonSchema({"type": "object"}), engine, num_draws=4)
    with pytest.raises(InfeasibleModel, match="'regex' and 'regex_2' together allow no text"):
        lmppl.infer(lm * Regex("a+") * Regex("b+"), engine, num_draws=4)
    with pytest.raises(InfeasibleModel, match="allow together has 6 characters"):
        lmppl.infer(lm * Regex("(aaa)*") * Regex("(ab|aa)+") * Regex(".{1,9}") * Regex("a{4,}"), engine, num_draws=4)
