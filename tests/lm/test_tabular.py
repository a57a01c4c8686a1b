"""TabularLM: the law that its tables say, at every order, for every context, and at horizons nobody can enumerate."""

import itertools
import math

import pytest
import torch

from lmppl.errors import ContextError, ModelError, ShapeError, SupportTooLarge
from lmppl.lm.base import LanguageModel
from lmppl.lm.tabular import TabularLM
from lmppl.testing import check_language_model
from lmppl.testing.brute_force import outcomes

TABLE = [[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0, 0, 1], [0.6, 0.4, 0]]
SYMBOLS = ["a", "b", "<eos>"]
TREE = {"": (0.5, 0.5, 0.0), "a": (0.0, 0.4, 0.6), "b": (0.7, 0.0, 0.3), "ab": (0.2, 0.3, 0.5), "ba": (0.0, 0.9, 0.1)}


def by_hand(lm, order, context=()):
    """Probabilities of all outcomes of an order-k table, by multiplication along paths."""
    table = lm.log_table.exp().view((lm.vocab_size + 1,) * order + (lm.vocab_size,))

    def conditional(prefix):
        history = ([lm.vocab_size] * order + list(prefix))[len(prefix) :] if order else []
        return table[tuple(history)].tolist()

    eos = lm.eos_index
    table_of = outcomes(conditional, lm.vocabulary, eos=eos, cap=lm.max_new_tokens, context=tuple(context))
    return {(x.finished, x.ids): x.log_prior for x in table_of}, {x.ids: x.text for x in table_of}


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("eos", [-1, 0, None])
def test_every_order_is_the_product_of_its_conditionals(order, eos):
    lm = TabularLM.random(3, 4, order=order, seed=order, eos=eos, context=["", [1], [2, 1, 1]])
    for c, context in enumerate([(), (1,), (2, 1, 1)]):
        table = lm.enumerate_sequences(c)
        expected, texts = by_hand(lm, order, context)
        keys = table.keys()
        assert {(finished, tokens) for _, finished, tokens in keys} == set(expected)
        for (_, finished, tokens), value, text in zip(keys, table.log_prior.tolist(), table.text, strict=True):
            assert value == pytest.approx(expected[finished, tokens], abs=1e-12)
            assert text == texts[tokens]


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_every_order_keeps_the_laws_of_a_language_model(order):
    check_language_model(TabularLM.random(3, 4, order=order, seed=order, context=["", [1, 0]]))


def test_an_lm_given_prefix_by_prefix():
    lm = TabularLM.from_prefixes(TREE, SYMBOLS, max_new_tokens=3)
    keys = {(): "", (0,): "a", (1,): "b", (0, 1): "ab", (1, 0): "ba"}
    expected = outcomes(lambda ids: TREE[keys[ids]], SYMBOLS, eos=2, cap=3)
    table = lm.enumerate_sequences()
    assert sorted(zip(table.text, table.finished.tolist(), table.log_prior.exp().tolist(), strict=True)) == [
        (text, finished, pytest.approx(p))
        for text, finished, p in sorted((x.text, x.finished, math.exp(x.log_prior)) for x in expected)
    ]
    check_language_model(lm)


def test_prefixes_may_be_tuples_of_symbols_or_ids():
    by_symbol = {("a", "b") if k == "ab" else tuple(k): v for k, v in TREE.items()}
    by_id = {tuple("ab".index(s) for s in k): v for k, v in TREE.items()}
    lms = [TabularLM.from_prefixes(t, SYMBOLS, max_new_tokens=3) for t in (TREE, by_symbol, by_id)]
    assert len({lm.fingerprint for lm in lms}) == 1
    assert TabularLM.from_prefixes(by_id, max_new_tokens=3).vocabulary == ("a", "b", "<eos>")


def test_a_prefix_lm_continues_a_context_as_far_as_its_entries_reach():
    lm = TabularLM.from_prefixes(TREE, SYMBOLS, max_new_tokens=2, context="b")
    assert sorted(lm.enumerate_sequences().text) == ["", "a", "ab"]
    with pytest.raises(ModelError, match=r"prefix \('b', 'a', 'b'\) can be reached but has no entry"):
        TabularLM.from_prefixes(TREE, SYMBOLS, max_new_tokens=3, context="b")
    with pytest.raises(ContextError, match="the context 'bb' has no entry"):
        _ = lm | "bb"


def test_what_a_prefix_lm_cannot_say_has_probability_zero_and_is_no_nan():
    lm = TabularLM.from_prefixes(TREE, SYMBOLS, max_new_tokens=3)
    rows = lm.sequences([[0, 0, 0], [1, 1, 2], [2], [0, 1, 2]])
    scores = lm.score(rows)
    assert scores[:3].tolist() == [-math.inf] * 3
    assert float(scores[3].exp()) == pytest.approx(0.5 * 0.4 * 0.5)


def test_counts_become_conditionals():
    lm = TabularLM.from_counts("ab\nabb\nb", order=1, max_new_tokens=5)
    assert lm.vocabulary == ("a", "b", "<eos>")
    scores = lm.score(lm.sequences([[0, 1, 2], [1, 2], [2]]))
    assert scores.exp().tolist() == pytest.approx([2 / 3 * 1 * 3 / 4, 1 / 3 * 3 / 4, 0.0])
    smooth = TabularLM.from_counts("ab\nabb\nb", order=1, smoothing=0.5, max_new_tokens=5)
    assert float(smooth.score(smooth.sequences([[2]])).exp()) == pytest.approx(0.5 / (3 + 1.5))


def test_counts_of_words():
    lm = TabularLM.from_counts("the film was good\nthe film was bad", order=2, level="word", max_new_tokens=8)
    table = lm.enumerate_sequences()
    assert sorted(table.text) == ["the film was bad", "the film was good"]
    assert table.log_prior.exp().tolist() == pytest.approx([0.5, 0.5])
    continued = lm | "the film"
    assert sorted(continued.enumerate_sequences().full_text) == ["the film was bad", "the film was good"]


def test_order_zero_counts():
    lm = TabularLM.from_counts("ab", order=0, max_new_tokens=2)
    assert lm.log_table.exp().tolist() == [pytest.approx([1 / 3] * 3)]


def test_contexts_of_different_length_in_one_batch():
    both = TabularLM(TABLE, SYMBOLS, max_new_tokens=4, context=["", "ab", "b"])
    assert both.prompts == ("", "ab", "b")
    for c, context in enumerate(both.prompts):
        alone = TabularLM(TABLE, SYMBOLS, max_new_tokens=4, context=context)
        torch.testing.assert_close(both.enumerate_sequences(c).log_prior, alone.enumerate_sequences().log_prior)
    torch.testing.assert_close((both | "ab").enumerate_sequences().log_prior, both.enumerate_sequences(1).log_prior)
    assert (both | ["a", "b"]).num_contexts == 2


def test_contexts_may_be_symbols_or_ids():
    lms = [TabularLM(TABLE, SYMBOLS, max_new_tokens=2, context=c) for c in ("ab", ("a", "b"), [("a", 1)], [[0, 1]])]
    assert {lm.prompts for lm in lms} == {("ab",)}
    assert len({lm.fingerprint for lm in lms}) == 1


def test_symbols_are_read_longest_first():
    lm = TabularLM(TABLE, ["a", "ab", "."], max_new_tokens=2, context="aab")
    assert lm.initial.tolist() == [1]


def test_a_long_horizon_is_drawn_and_scored():
    lm = TabularLM.random(5, 1000, order=1, eos=None, seed=4)
    draws = lm.draw(3, generator=torch.Generator().manual_seed(0))
    assert draws.lengths.tolist() == [1000] * 3
    torch.testing.assert_close(lm.score(draws), draws.log_prior)
    rare_end = TabularLM([[0.5, 0.499, 0.001]] * 4, SYMBOLS, max_new_tokens=1000)
    lengths = rare_end.draw(400, generator=torch.Generator().manual_seed(0)).lengths.double()
    exact = sum(0.999**t for t in range(1000))
    assert float(lengths.mean()) == pytest.approx(exact, abs=4.5 * float(lengths.std()) / 20)
    with pytest.raises(SupportTooLarge, match="more than 200,000 outcomes"):
        rare_end.enumerate_sequences()


def test_equal_laws_have_equal_fingerprints_and_others_do_not():
    def lm(**changes):
        return TabularLM(**{"table": TABLE, "vocabulary": SYMBOLS, "max_new_tokens": 4, "context": "a", **changes})

    variants = [
        lm(),
        lm(table=[[0.5, 0.2, 0.3], *TABLE[1:]]),
        lm(vocabulary=["a", "c", "<eos>"]),
        lm(max_new_tokens=5),
        lm(context="b"),
        lm(context=["a", "a"]),
        lm(eos="b"),
        lm(eos=None),
    ]
    assert len({v.fingerprint for v in variants}) == len(variants)
    assert lm().fingerprint == lm().fingerprint == (lm(context="b") | "a").fingerprint
    assert TabularLM.random(3, 4, seed=1).fingerprint == TabularLM.random(3, 4, seed=1).fingerprint
    assert TabularLM.random(3, 4, seed=1).fingerprint != TabularLM.random(3, 4, seed=2).fingerprint


def test_default_names_of_symbols():
    assert TabularLM.random(4, 2).vocabulary == ("a", "b", "c", "<eos>")
    assert TabularLM.random(3, 2, eos=0).vocabulary == ("<eos>", "b", "c")
    assert TabularLM.random(28, 2, order=0, eos=None).vocabulary[24:] == ("y", "z", "aa", "ab")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"table": [[0.5, 0.5]]}, ShapeError, r"got a table of shape \(1, 2\), expected \(V\+1,\) \* k \+ \(V,\)"),
        ({"table": 0.5}, ShapeError, "got a table of shape"),
        ({"table": [0.5, 0.4]}, ModelError, "sums to 0.900000, expected 1"),
        ({"table": [1.5, -0.5]}, ModelError, "negative or nan"),
        ({"table": [math.nan, 0.5]}, ModelError, "negative or nan"),
        ({"table": [[0.5, 0.5], [0.2, 0.7], [1, 0]]}, ModelError, r"conditional \(1,\) sums to 0.900000"),
        ({"vocabulary": ["a"]}, ShapeError, "got 1 distinct symbols, expected V = 2"),
        ({"vocabulary": ["a", "a"]}, ShapeError, "got 1 distinct symbols"),
        ({"eos": "."}, ModelError, "eos '.' is not in the vocabulary"),
        ({"eos": 2}, ModelError, "eos index 2 is outside the vocabulary of 2 symbols"),
        ({"max_new_tokens": 0}, ModelError, "max_new_tokens: got 0"),
        ({"context": "x"}, ContextError, "'x' at 'x' starts with no symbol of the vocabulary"),
        ({"context": ["a", ("y",)]}, ContextError, "'y' in .* is not in the vocabulary"),
        ({"context": [(0, 5)]}, ContextError, r"5 in \(0, 5\) is not in the vocabulary"),
        ({"context": [(-1,)]}, ContextError, "-1 in"),
        ({"context": []}, ContextError, "expected at least one context"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        TabularLM(**{"table": [0.5, 0.5], "max_new_tokens": 2, **arguments})


@pytest.mark.parametrize(
    ("prefixes", "error", "message"),
    [
        ({}, ModelError, "got no prefixes"),
        ({"a": (1, 0, 0)}, ModelError, r"the empty prefix \(\) has no entry"),
        ({"": (0.5, 0.5, 0.0), "a": (0.5, 0.5)}, ShapeError, "'a' has 2 entries, expected 3"),
        ({"": (0.5, 0.5, 0.0), "a": (0, 0, 1)}, ModelError, r"prefix \('b',\) can be reached but has no entry"),
        ({"": (0.0, 0.0, 1.0), (): (0.0, 0.0, 1.0)}, ModelError, r"prefix \(\) is there twice"),
        ({"": (0.0, 0.0, 1.0), "x": (0.0, 0.0, 1.0)}, ContextError, "starts with no symbol"),
        ({"": (0.0, 0.5, 0.6)}, ModelError, "sums to 1.1"),
    ],
)
def test_errors_of_prefixes(prefixes, error, message):
    with pytest.raises(error, match=message):
        TabularLM.from_prefixes(prefixes, SYMBOLS, max_new_tokens=2)


def test_entries_that_no_path_reaches_need_no_children():
    lm = TabularLM.from_prefixes({"": (0, 0, 1), "b": (0.5, 0.5, 0)}, SYMBOLS, max_new_tokens=3)
    assert lm.enumerate_sequences().text == [""]


def test_errors_of_counts():
    with pytest.raises(ModelError, match="got an empty text"):
        TabularLM.from_counts("\n\n", max_new_tokens=2)
    with pytest.raises(ModelError, match="got level 'line'"):
        TabularLM.from_counts("ab", level="line", max_new_tokens=2)
    with pytest.raises(ModelError, match="lower the order"):
        TabularLM.from_counts("abcdefghij", order=6, max_new_tokens=2)


def test_rows_cropped_twice_are_the_rows_themselves():
    """Ragged crop, extend, crop again: rows must know where they start."""
    lm = TabularLM.random(4, 8, order=2, eos=None, seed=5)
    rows = torch.tensor(list(itertools.product(range(4), repeat=3))[::7])
    context = torch.zeros(len(rows), dtype=torch.int64)
    decoder = lm.decoder()
    _, state = decoder.prefill(context, rows)
    lengths = 1 + torch.arange(len(rows)) % 3
    state = decoder.crop(state, lengths)
    _, state = decoder.extend(state, torch.ones(len(rows), 2, dtype=torch.int64))
    state = decoder.crop(state, lengths)
    step, _ = decoder.extend(state, torch.full((len(rows), 1), 2))
    for i, n in enumerate(lengths.tolist()):
        fresh, _ = decoder.prefill(context[:1], torch.cat([rows[i, :n], torch.tensor([2])])[None])
        torch.testing.assert_close(step.log_probs[i], fresh.log_probs[0])


def test_outcomes_are_counted_without_listing_them():
    sparse = TabularLM(
        [[0.5, 0.3, 0.2], [0.2, 0.8, 0], [0, 0, 1], [0.6, 0.4, 0]],
        ["a", "b", "<eos>"],
        max_new_tokens=5,
        context=["", "b"],
    )
    most = max(len(sparse.enumerate_sequences(c)) for c in range(2))
    assert sparse.max_outcomes() == most
    full = TabularLM.random(4, 4, order=2, seed=1)
    assert full.max_outcomes() == len(full.enumerate_sequences()) == LanguageModel.max_outcomes(full)
    assert LanguageModel.max_outcomes(sparse) > most
