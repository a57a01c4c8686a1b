"""Sequences, draws and their weights: plain data that must never lose a row, a text or a weight."""

import dataclasses
import itertools
import math

import pytest
import torch

from lmppl.errors import ModelError, ShapeError
from lmppl.sequences import Cost, Draws, Estimate, Sequences, concatenate

INF = math.inf


def sequences(**changes) -> Sequences:
    base = {
        "ids": torch.tensor([[0, 1, 9], [2, 9, 9], [0, 0, 1], [1, 2, 9]]),
        "lengths": torch.tensor([2, 1, 3, 2]),
        "finished": torch.tensor([True, True, False, True]),
        "context": torch.tensor([0, 0, 1, 1]),
        "prompts": ("Hello ", "Bye "),
    }
    return Sequences(**{**base, **changes})


def draws(log_weight=None, context=None, **changes) -> Draws:
    n = len(log_weight)
    return Draws(
        torch.arange(n)[:, None],
        torch.ones(n, dtype=torch.int64),
        torch.zeros(n, dtype=torch.bool),
        torch.zeros(n, dtype=torch.int64) if context is None else torch.tensor(context),
        ("",) if context is None else tuple("xyz"[: max(context) + 1]),
        log_weight=torch.tensor(log_weight, dtype=torch.float64),
        **changes,
    )


class CountingDecoder:
    def __init__(self):
        self.calls = 0

    def __call__(self, rows):
        self.calls += 1
        return ["".join("abc"[t] for t in row) for row in rows.token_lists()]


# Sequences.


def test_shapes_are_checked():
    with pytest.raises(ShapeError, match=r"Sequences.ids: got shape \(3,\), expected \(N, T\)"):
        sequences(ids=torch.zeros(3))
    with pytest.raises(ShapeError, match=r"Sequences.lengths: got shape \(3,\), expected \(4,\)"):
        sequences(lengths=torch.ones(3))


def test_mask_and_lists_leave_padding_out():
    rows = sequences()
    assert rows.token_lists() == [[0, 1], [2], [0, 0, 1], [1, 2]]
    assert rows.mask.tolist() == [[True, True, False], [True, False, False], [True, True, True], [True, True, False]]


def test_keys_tell_context_and_ending_apart():
    rows = sequences(ids=torch.tensor([[0, 1, 9], [0, 1, 7], [0, 1, 9], [0, 1, 9]]), lengths=torch.tensor([2, 2, 2, 2]))
    keys = rows.keys()
    assert keys[0] == keys[1], "what stands after the end is no part of a row"
    assert keys[0] != keys[2], "finished or not"
    assert keys[0] != keys[3], "another context"


def test_text_is_decoded_once_and_lazily():
    decoder = CountingDecoder()
    rows = sequences(decoder=decoder)
    assert decoder.calls == 0
    assert rows.text == ["ab", "c", "aab", "bc"]
    assert rows.full_text == ["Hello ab", "Hello c", "Bye aab", "Bye bc"]
    chosen = rows.select([2, 0])
    assert chosen.text == ["aab", "ab"]
    assert rows.select(torch.tensor([False, True, False, True])).text == ["c", "bc"]
    assert rows.select(slice(1, None, 2)).text == ["c", "bc"]
    assert rows.to("cpu").text == rows.text
    assert decoder.calls == 1


def test_text_without_a_decoder_is_the_ids():
    assert sequences().text == ["0 1", "2", "0 0 1", "1 2"]


@pytest.mark.parametrize("index", [[3, 1, 1], torch.tensor([3, 1, 1]), torch.tensor([3, 1, 1], dtype=torch.int32)])
def test_select_takes_every_column(index):
    table = Draws(
        **{f.name: getattr(sequences(), f.name) for f in dataclasses.fields(Sequences)},
        log_weight=torch.arange(4.0),
        features={"f": torch.arange(8.0).view(4, 2)},
        columns={"chain": torch.arange(4)},
        meta={"seed": 3},
    )
    chosen = table.select(index)
    assert chosen.token_lists() == [[1, 2], [2], [2]]
    assert chosen.log_weight.tolist() == [3, 1, 1]
    assert chosen.features["f"].tolist() == [[6, 7], [2, 3], [2, 3]]
    assert chosen.columns["chain"].tolist() == [3, 1, 1]
    assert chosen.log_prior is None
    assert chosen.meta == {"seed": 3}


def test_select_nothing():
    none = sequences().select([])
    assert len(none) == 0
    assert none.ids.shape == (0, 3)
    assert none.text == []
    assert len(sequences().select(torch.zeros(4, dtype=torch.bool))) == 0


# Concatenation.


def test_concatenate_pads_and_keeps_texts():
    decoder = CountingDecoder()
    rows = sequences(decoder=decoder)
    narrow = dataclasses.replace(rows.select([1, 3]), ids=rows.ids[[1, 3], :2])
    assert rows.text
    assert narrow.text == ["c", "bc"]
    calls = decoder.calls
    whole = concatenate([narrow, rows], pad_id=9)
    assert whole.token_lists() == [[2], [1, 2], [0, 1], [2], [0, 0, 1], [1, 2]]
    assert whole.ids[0].tolist() == [2, 9, 9]
    assert whole.text == ["c", "bc", "ab", "c", "aab", "bc"]
    assert decoder.calls == calls


def test_concatenate_keeps_stored_texts_where_no_decoder_can_make_them():
    loaded = sequences()
    loaded.__dict__["text"] = ["w", "x", "y", "z"]
    whole = concatenate([loaded, sequences().select([1])])
    assert whole.text == ["w", "x", "y", "z", "2"]


def test_concatenate_refuses_parts_that_do_not_fit():
    with pytest.raises(ModelError, match="got no parts"):
        concatenate([])
    with pytest.raises(ModelError, match="'log_weight' is missing in some parts"):
        concatenate([draws([0.0]), dataclasses.replace(draws([0.0]), log_weight=None)])
    with pytest.raises(ModelError, match=r"differ in their features: \['f'\]"):
        concatenate([draws([0.0]), draws([0.0], features={"f": torch.zeros(1)})])
    with pytest.raises(ModelError, match="differ in their prompts"):
        concatenate([sequences(), sequences(prompts=("Hello ", "Good bye "))])


# Weights.


def test_weights_are_normalised_within_each_context():
    weights = draws([0.0, math.log(3), -INF, 1000.0, 1000.0], context=[0, 0, 1, 1, 1]).weights
    torch.testing.assert_close(weights, torch.tensor([0.25, 0.75, 0.0, 0.5, 0.5]).double())


def test_weights_of_a_context_without_mass_or_rows_are_zero():
    assert draws([-INF, -INF, 0.0], context=[0, 0, 2]).weights.tolist() == [0, 0, 1]


def test_no_weights_means_equal_weights():
    table = dataclasses.replace(draws([0.0] * 4, context=[0, 0, 0, 1]), log_weight=None)
    torch.testing.assert_close(table.weights, torch.tensor([1 / 3, 1 / 3, 1 / 3, 1]).double())


def test_weights_of_many_contexts_are_those_of_each_alone():
    rng = torch.Generator().manual_seed(0)
    log_w = 3 * torch.randn(5000, generator=rng).double()
    log_w[::7] = -INF
    context = torch.randint(40, (5000,), generator=rng)
    log_w[context == 11] = -INF
    expected = torch.zeros_like(log_w)
    for c in set(range(40)) - {11}:
        expected[context == c] = torch.softmax(log_w[context == c], 0)
    table = dataclasses.replace(draws(log_w.tolist()), context=context, prompts=("",) * 40)
    torch.testing.assert_close(table.weights, expected, atol=1e-15, rtol=1e-13)


@pytest.mark.parametrize("broken", [math.nan, INF])
def test_a_broken_weight_is_an_error(broken):
    with pytest.raises(ModelError, match=r"log_weight\[1\] is (nan|inf)"):
        _ = draws([0.0, broken]).weights


# Resampling: E[#offspring_i] = n·w̄_i, by integrating over the one uniform number that systematic resampling uses.


def offspring_over_the_uniform(table, n, monkeypatch, grid=4000):
    total = torch.zeros(len(table), dtype=torch.float64)
    for u in (torch.arange(grid, dtype=torch.float64) + 0.5) / grid:
        monkeypatch.setattr(torch, "rand", lambda *args, u=u, **kwargs: u.clone())
        chosen = table.resample(n)
        total += torch.bincount(chosen.ids[:, 0], minlength=len(table)).double()
    return total / grid


def test_resampling_is_unbiased(monkeypatch):
    table = draws([-1.0, -INF, 0.3, -2.0, 1.0, -INF])
    mean = offspring_over_the_uniform(table, 5, monkeypatch, grid=2000)
    torch.testing.assert_close(mean, 5 * table.weights, atol=5e-3, rtol=0)
    assert mean[1] == mean[5] == 0


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_rows_of_weight_zero_are_never_chosen(u, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: torch.tensor(u, dtype=torch.float64))
    for pattern in itertools.product([-INF, 0.0], repeat=5):
        if max(pattern) == -INF:
            continue
        table = draws(list(pattern))
        chosen = table.resample(7)
        assert len(chosen) == 7
        assert bool((table.log_weight[chosen.ids[:, 0]] == 0).all())


def test_resampling_keeps_contexts_texts_and_columns():
    table = draws([0.0, -INF, 5.0, 5.0], context=[0, 0, 1, 1], columns={"chain": torch.arange(4)})
    table.__dict__["text"] = ["p", "q", "r", "s"]
    chosen = table.resample(6, generator=torch.Generator().manual_seed(1))
    assert chosen.context.tolist() == [0] * 6 + [1] * 6
    assert chosen.text[:6] == ["p"] * 6
    assert sorted(chosen.text[6:]) == ["r"] * 3 + ["s"] * 3
    assert chosen.log_weight is None
    assert chosen.columns["chain"].tolist() == chosen.ids[:, 0].tolist()
    assert len(table.resample()) == 4


def test_resampling_finds_the_rows_of_a_context_wherever_they_stand():
    table = draws([0.0, 0.0, -INF, 0.0, 0.0], context=[2, 0, 1, 1, 0])
    assert table.resample().ids[:, 0].tolist() == [1, 4, 3, 3, 0]


def test_resampling_refuses_what_it_cannot_do():
    with pytest.raises(ModelError, match="context 0 has no draw of positive weight"):
        draws([-INF, -INF]).resample()
    with pytest.raises(ModelError, match="context 1 has no draw"):
        draws([0.0, 0.0], context=[0, 2]).resample()
    with pytest.raises(ModelError, match="num_draws=0"):
        draws([0.0]).resample(0)


# Views.


def test_bare_sequences_keep_the_text():
    table = draws([0.0, 1.0])
    table.__dict__["text"] = ["p", "q"]
    assert type(table.sequences) is Sequences
    assert table.sequences.text == ["p", "q"]
    assert table.with_columns(log_weight=None).text == ["p", "q"]


def test_costs_add_and_subtract():
    a, b = Cost(lm_tokens=3, seconds=0.5), Cost(lm_tokens=2, cache_hits=1)
    assert (a + b).lm_tokens == 5
    assert ((a + b) - b) == a
    assert (a + b).as_dict()["cache_hits"] == 1
    snapshot = a.copy()
    a.lm_tokens += 1
    assert snapshot.lm_tokens == 3


def test_an_estimate_shows_its_interval():
    value = torch.tensor([-1.25, 2.0])
    interval = torch.stack([value - 1, value + 1], -1)
    shown = repr(Estimate(value, interval, kind="unbiased_Z"))
    assert shown == "Estimate(-1.2500 [-2.2500, -0.2500]; 2.0000 [1.0000, 3.0000], kind=unbiased_Z, level=0.95)"
    assert repr(Estimate(value[:1], None, kind="exact")) == "Estimate(-1.2500, kind=exact)"


def test_draws_are_one_line_in_a_notebook():
    n = 1200
    zeros, ids = torch.zeros(n), torch.zeros(n, 5, dtype=torch.int64)
    ended, lengths = torch.ones(n, dtype=torch.bool), torch.full((n,), 5)
    draws = Draws(ids, lengths, ended, ids[:, 0], ("", "a"), log_weight=zeros, log_factors={"r": zeros})
    assert repr(draws) == "Draws(1,200 rows of 2 contexts, up to 5 tokens; log_weight, r)"
    assert repr(draws.sequences) == "Sequences(1,200 rows of 2 contexts, up to 5 tokens)"
