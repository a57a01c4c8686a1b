"""Automata against Python: the language of every construction and operation, on all short words and on random ones."""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmppl.errors import ModelError, ShapeError
from lmppl.modeling.evidence import Automaton

SYMBOLS = "abz"  # z is in no alphabet below
WORDS = ["".join(w) for n in range(5) for w in itertools.product(SYMBOLS, repeat=n)]

words = st.text(SYMBOLS, max_size=12)
patterns = st.text("ab", max_size=4)


@st.composite
def machines(draw: st.DrawFn, alphabet: str = "ab") -> Automaton:
    """Any automaton of up to five states: unreachable ones, idle symbols and empty languages among them."""
    size = draw(st.integers(1, 5))
    state = st.integers(0, size - 1)
    rows = draw(
        st.lists(st.lists(state, min_size=len(alphabet) + 1, max_size=len(alphabet) + 1), min_size=size, max_size=size)
    )
    accept = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    return Automaton(torch.tensor(rows), tuple(alphabet), draw(state), torch.tensor(accept))


def language(machine: Automaton) -> set[str]:
    accepted = machine.accepts_texts(WORDS).tolist()
    return {word for word, yes in zip(WORDS, accepted, strict=True) if yes}


def is_same(one: Automaton, other: Automaton) -> bool:
    return (
        one.alphabet == other.alphabet
        and one.start == other.start
        and torch.equal(one.transitions, other.transitions)
        and torch.equal(one.accept, other.accept)
    )


# Construction.


@given(patterns)
def test_containing_and_avoiding(pattern: str) -> None:
    inside = {w for w in WORDS if pattern in w}
    machine = Automaton.containing(pattern)
    assert language(machine) == inside
    assert language(Automaton.avoiding(pattern)) == set(WORDS) - inside
    assert machine.num_states == len(pattern) + 1
    assert machine.minimize().num_states == machine.num_states


@given(st.text("ab", min_size=1, max_size=8), st.text("abz", max_size=40))
def test_containing_in_long_words(pattern: str, word: str) -> None:
    machine = Automaton.containing(pattern)
    assert machine.accepts(word) == (pattern in word)
    assert machine.accepts(word + pattern)


@pytest.mark.parametrize(("minimum", "maximum"), [(0, 0), (0, 2), (2, 2), (1, 4), (0, None), (3, None)])
def test_length(minimum: int, maximum: int | None) -> None:
    machine = Automaton.length(minimum, maximum)
    assert language(machine) == {w for w in WORDS if minimum <= len(w) <= (99 if maximum is None else maximum)}


@given(st.sets(st.text("abz", max_size=4), min_size=1, max_size=6))
def test_exactly(listed: set[str]) -> None:
    machine = Automaton.exactly(sorted(listed))
    assert language(machine) == listed
    assert is_same(machine, machine.minimize())


def test_exactly_one_text_is_no_list_of_letters() -> None:
    assert language(Automaton.exactly("ab")) == {"ab"}


def test_from_edges() -> None:
    even = Automaton.from_edges({"even": {"a": "odd"}, "odd": {"a": "even", "b": "odd"}}, start="even", accept=["even"])
    assert {w for w in language(even) if len(w) < 4} == {"", "aa", "aba"}
    others = Automaton.from_edges({0: {"a": 1, None: 0}, 1: {None: 1}}, start=0, accept=[1])
    assert language(others) == {w for w in WORDS if "a" in w}
    assert Automaton.from_edges({0: {"a": 0}}, start=0, accept=[]).is_empty()


def test_over_tokens() -> None:
    machine = Automaton.containing([7, 7, 9]) & Automaton.length(0, 4, over="tokens")
    assert machine.over == "tokens"
    assert machine.accepts([7, 7, 7, 9])
    assert not machine.accepts([7, 7, 1, 9])
    assert not machine.accepts([1, 1, 7, 7, 9])
    assert machine.shortest() == (7, 7, 9)
    assert (~Automaton.containing([0]) & Automaton.length(1, over="tokens")).shortest() == (1,)
    assert Automaton.exactly([[1, 2], [3]]).accepts([3])


# Algebra.


@given(machines(), machines("bz"), words)
def test_product_union_and_complement(one: Automaton, other: Automaton, word: str) -> None:
    left, right = language(one), language(other)
    assert language(one & other) == left & right
    assert language(one | other) == left | right
    assert language(~one) == set(WORDS) - left
    assert (one & other).accepts(word) == (one.accepts(word) and other.accepts(word))
    assert (one | other).accepts(word) == (one.accepts(word) or other.accepts(word))
    assert (~one).accepts(word) != one.accepts(word)


@given(machines(), machines())
def test_laws_of_sets_hold_as_equal_tables(one: Automaton, other: Automaton) -> None:
    assert is_same(one & other, other & one)
    assert is_same((~(one | other)).minimize(), ~one & ~other)
    assert is_same(one & one, one.minimize())
    assert (one & ~one).is_empty()
    assert is_same(one | ~one, Automaton.length())


@given(machines())
def test_minimize_keeps_the_language(machine: Automaton) -> None:
    small = machine.minimize()
    assert language(small) == language(machine)
    assert small.num_states <= machine.trim().num_states <= machine.num_states
    assert is_same(small.minimize(), small)
    # Minimal: any two of its states are told apart by a word.
    later = [small.run(WORDS, torch.full((len(WORDS),), q)) for q in range(small.num_states)]
    residuals = {tuple(small.accept[states].tolist()) for states in later}
    assert len(residuals) == small.num_states


@given(machines())
def test_trim_keeps_the_language(machine: Automaton) -> None:
    trimmed = machine.trim()
    assert trimmed.start == 0
    assert language(trimmed) == language(machine)
    reached = {int(q) for q in trimmed.run(WORDS + [w + v for w in WORDS[:40] for v in WORDS[:40]])}
    assert reached == set(range(trimmed.num_states))


# Questions.


@given(machines())
def test_shortest_word_and_emptiness(machine: Automaton) -> None:
    accepted = sorted(language(machine), key=len)
    word = machine.shortest()
    # Five states: a shortest word has at most four symbols, so WORDS decide.
    assert (word is None) == (not accepted) == machine.is_empty()
    if word is not None:
        assert machine.accepts(word)
        assert len(word) == len(accepted[0])
        assert not machine.is_empty(horizon=len(word))
        assert len(word) == 0 or machine.is_empty(horizon=len(word) - 1)


def test_the_witness_names_symbols_of_the_alphabet_first() -> None:
    assert Automaton.containing("Paris").shortest() == "Paris"
    assert (Automaton.length(2, 2) & ~Automaton.containing("!")).shortest() == "00"
    assert (Automaton.containing("a") & Automaton.avoiding("a")).shortest() is None


@given(machines())
def test_live_states_have_an_accepting_continuation(machine: Automaton) -> None:
    for state, live in enumerate(machine.live().tolist()):
        ends = machine.run(WORDS, torch.full((len(WORDS),), state))
        assert live == bool(machine.accept[ends].any())


# Reading.


@given(machines(), st.lists(words, max_size=6))
def test_run_reads_symbol_by_symbol(machine: Automaton, batch: list[str]) -> None:
    expected = []
    for word in batch:
        state = machine.start
        for symbol in word:
            column = machine.alphabet.index(symbol) if symbol in machine.alphabet else -1
            state = int(machine.transitions[state, column])
        expected.append(state)
    assert machine.run(batch).tolist() == expected


@given(machines(), st.lists(st.text(SYMBOLS, max_size=4), min_size=1, max_size=5), st.data())
def test_lift_agrees_with_reading_the_text(machine: Automaton, symbols: list[str], data: st.DataObject) -> None:
    symbols = [*symbols, ""]  # a special token reads as nothing
    table = machine.lift(symbols)
    assert table.shape == (machine.num_states, len(symbols))
    assert table[:, -1].tolist() == list(range(machine.num_states))
    tokens = data.draw(st.lists(st.integers(0, len(symbols) - 1), max_size=8))
    for start in range(machine.num_states):
        state = start
        for token in tokens:
            state = int(table[state, token])
        text = "".join(symbols[t] for t in tokens)
        assert state == int(machine.run([text], torch.tensor([start]))[0])


def test_lift_over_tokens_is_the_table_itself() -> None:
    machine = Automaton.containing([2, 0])
    table = machine.lift(["x", "y", "z", ""])
    assert table.tolist() == [[0, 0, 1, 0], [2, 0, 1, 0], [2, 2, 2, 2]]


def test_a_large_vocabulary_is_lifted_at_once() -> None:
    machine = Automaton.avoiding("zz") & Automaton.containing("aba")
    symbols = ["".join(w) for n in range(9) for w in itertools.product(SYMBOLS, repeat=n)]
    table = machine.lift(symbols)
    index = list(range(0, len(symbols), 97))
    assert table[machine.start, index].tolist() == machine.run([symbols[i] for i in index]).tolist()


@given(machines())
def test_round_trip_as_data(machine: Automaton) -> None:
    assert is_same(Automaton.from_dict(machine.to_dict()), machine)


# Mistakes.


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Automaton(torch.zeros(2, 2).long(), (), 0, torch.ones(2).bool()), "got transitions"),
        (lambda: Automaton(torch.zeros(2, 1).long(), (), 0, torch.ones(2)), "of torch.float32"),
        (lambda: Automaton(torch.full((2, 1), 2), (), 0, torch.ones(2).bool()), r"outside 0\.\.1"),
        (lambda: Automaton(torch.zeros(2, 1).long(), (), 2, torch.ones(2).bool()), r"outside 0\.\.1"),
        (
            lambda: Automaton(torch.zeros(1, 2).long(), ("ab",), 0, torch.ones(1).bool()),
            "symbol 'ab'.*single characters",
        ),
        (lambda: Automaton(torch.zeros(1, 2).long(), (1,), 0, torch.ones(1).bool()), "symbol 1, expected single"),
        (lambda: Automaton(torch.zeros(1, 3).long(), ("a", "a"), 0, torch.ones(1).bool()), "twice"),
        (lambda: Automaton(torch.zeros(1, 1).long(), (), 0, torch.ones(1).bool(), "words"), "over='words'"),  # type: ignore[arg-type]
        (lambda: Automaton.from_edges({0: {"a": 1}}, start=0, accept=[2]), "accept names 2"),
        (lambda: Automaton.length(3, 2), "3 to 2"),
        (lambda: Automaton.exactly([]), "no words"),
        (lambda: Automaton.exactly(["a", [1]]), "texts and token ids together"),
        (lambda: Automaton.containing("a") & Automaton.containing([1]), "one over characters and one over tokens"),
        (lambda: Automaton.containing("a") | "b", "got str as the other operand"),
        (lambda: Automaton.containing("a").accepts([1]), "over characters: cannot read"),
        (lambda: Automaton.containing([1]).accepts("a"), "over tokens: cannot read 'a'"),
        (lambda: Automaton.containing("a").run("abc"), "single text 'abc'"),
    ],
)
def test_mistakes(make: Callable[[], object], words: str) -> None:
    with pytest.raises((ModelError, ShapeError), match=words):
        make()
