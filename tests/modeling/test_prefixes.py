"""Constraints prefix by prefix, against every outcome of small models: of letters, of bytes, with stop strings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from lmppl.errors import FactorError, ModelError
from lmppl.inference.guided import GuidedLM
from lmppl.lm import LM
from lmppl.lm.base import LanguageModel
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence import (
    Automaton,
    Banned,
    Constraint,
    Finished,
    Grammar,
    MaxWords,
    OneOf,
    Regex,
    Reward,
    automaton_bytes,
    automaton_tables,
)
from lmppl.modeling.evidence.automaton_prefixes import AutomatonPrefixes
from lmppl.modeling.evidence.languages import grammar, grammar_engine, joint_form
from lmppl.modeling.evidence.prefix_reader import PrefixReader, held_back
from lmppl.modeling.evidence.prefixes import PROBES
from lmppl.modeling.factors import Factor
from lmppl.modeling.model import Model
from lmppl.modeling.target import Target
from lmppl.sequences import Sequences
from lmppl.testing import CheckFailed, check_factor
from tests.lm.test_spelling import byte_level, lm_with, sentencepiece
from tests.models import all_outcomes, enumerable_lm

LMS: dict[str, Callable[[], LanguageModel]] = {
    "tabular": lambda: enumerable_lm("tabular"),
    "llama": lambda: enumerable_lm("llama"),
    "mistral": lambda: enumerable_lm("mistral"),
    "no end but the cap": lambda: TabularLM.random(3, 3, eos=None, context=["", "ab"]),
    "bytes": lambda: short(lm_with(byte_level(), context=["a", "bab"])),
    "sentencepiece": lambda: short(lm_with(sentencepiece(), context=["a", ""])),
    "stop string": lambda: short(lm_with(byte_level(), context=["a", "bab"], stop=["b ", "aa"])),
}
EXACT = ("tabular", "llama", "mistral", "no end but the cap")  # each token is one letter
CONSTRAINTS: dict[str, Callable[[], Constraint]] = {
    "avoiding": lambda: Constraint(Automaton.avoiding("ab")),
    "containing": lambda: Constraint(Automaton.containing("ba")),
    "length": lambda: Constraint(Automaton.length(2, 2)),
    "characters": lambda: Constraint.characters("a "),
    "forbidden": lambda: Constraint.characters(forbidden="b"),
    "outside ascii": lambda: Constraint(Automaton.containing("é")),
    "tokens": lambda: Constraint(Automaton.containing((1, 0))),
    "with an end": lambda: Constraint(Automaton.exactly([(0, 3), (1, 3), (0, 1, 2)])),
    "function": lambda: Constraint(lambda texts: ["ab" not in t for t in texts], prefix_closed=True),
    "ascii": lambda: Constraint(lambda texts: [t.isascii() for t in texts], prefix_closed=True),
    "context": lambda: Constraint(lambda full: ["abab" not in t for t in full], on="full", prefix_closed=True),
    "ids": lambda: Constraint(
        lambda rows: [(1, 1) not in itertools.pairwise(t) for t in rows.token_lists()],
        on="ids",
        prefix_closed=True,
        name="ids",
    ),
    "regex": lambda: Regex(r"(?!b)\w*b? ?"),
    "banned": lambda: Banned(["ab"], whole_words=True, ignore_case=True),
    "max words": lambda: MaxWords(1),
    "finished": Finished,
    "text and end": lambda: Regex("a.*|b") & Finished(),
    "text or no end": lambda: Regex("a*") | ~Finished(),
    "accented words": lambda: OneOf(["é", "aé", "a", "bA", "é "]),
    "beyond ascii": lambda: Regex("[^é\\x00-\\x7f]{2}"),
    "four letters": lambda: Regex("[ab]{3} a|[ab]{2} a"),
    "forced": lambda: Grammar('start: "b" " a"'),
    "one accent": lambda: Regex("[^é]?é?\u2019?."),
    "grammar": lambda: Grammar('start: "a" start "b" | "a" | /[b ]+/'),
    "accents": lambda: Grammar("start: /[aé\\u0080-\\uFFFF]*/"),
    "grammar and regex": lambda: Grammar('start: ("a" | "b" | " ")+') & Regex("[^b]*b?"),
    "no grammar": lambda: ~Grammar('start: ("a" | "b")+'),
}


def short(lm: LanguageModel) -> LanguageModel:
    """The same LM with T = 3."""
    lm.__dict__["max_new_tokens"] = 3
    lm._event_shape = torch.Size((3,))
    return lm


@cache
def build(kind: str) -> LanguageModel:
    return LMS[kind]()


class Walked:
    """Potentials of every prefix of every outcome of a context, from one batch for each length."""

    def __init__(self, factor: Factor, lm: LanguageModel, context: int) -> None:
        rows = all_outcomes(lm, context)
        if not lm.ends_by_eos_alone:
            rows = rows.select(lm.is_outcome(rows))
        self.rows = rows
        self.log_phi = Target(Model(lm, (factor,))).log_factors(rows)[factor.name]
        self.prefixes: dict[tuple[int, ...], float] = {}
        form = factor.bind(lm).incremental
        assert form is not None
        for length in rows.lengths.unique().tolist():
            index = torch.nonzero(rows.lengths == length).squeeze(1)
            some = rows.select(index)
            state = form.start(some.context)
            self._note(some, 0, form.potential(state))
            for t in range(length):
                tokens = some.ids[:, t]
                before = form.potential(state)
                one = form.weigh(state, tokens[:, None])[:, 0].double()
                every = form.weigh(state, None).double()
                assert torch.equal(every.gather(1, tokens[:, None])[:, 0], one)
                assert bool(((every == 0) | (every == -math.inf)).all())
                state = form.advance(state, tokens, None)
                after = form.potential(state)
                assert torch.equal(torch.where(before == -math.inf, before, before + one), after)
                self._note(some, t + 1, after)
            assert torch.equal(form.potential(state), self.log_phi[index])

    def _note(self, rows: Sequences, length: int, values: Tensor) -> None:
        for row, value in zip(rows.ids[:, :length].tolist(), values.tolist(), strict=True):
            assert self.prefixes.setdefault(tuple(row), value) == value

    def best(self) -> dict[tuple[int, ...], float]:
        """The largest log φ among the outcomes that continue each prefix."""
        found: dict[tuple[int, ...], float] = dict.fromkeys(self.prefixes, -math.inf)
        for row, value in zip(self.rows.token_lists(), self.log_phi.tolist(), strict=True):
            for t in range(len(row) + 1):
                found[tuple(row[:t])] = max(found[tuple(row[:t])], value)
        return found


@pytest.mark.parametrize("kind", LMS)
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_potentials_are_right_at_the_end_and_never_condemn_what_can_be_allowed(kind: str, name: str) -> None:
    lm, factor = build(kind), CONSTRAINTS[name]()
    for context in range(lm.num_contexts) if kind in EXACT else (1,):
        walked = Walked(factor, lm, context)
        best = walked.best()
        wrong = [u for u, value in walked.prefixes.items() if value == -math.inf and best[u] == 0.0]
        assert wrong == []
        if factor.automaton is not None and kind in EXACT:
            # A table looks ahead over all tokens that still fit, so that it also knows every dead prefix.
            late = [u for u, value in walked.prefixes.items() if value == 0.0 and best[u] == -math.inf]
            assert late == []


def condemned(name: str, kind: str) -> bool:
    """Whether a form says −inf of a prefix that can be allowed, or is wrong at an end."""
    try:
        walked = Walked(CONSTRAINTS[name](), build(kind), 1)
    except AssertionError:
        return True
    best = walked.best()
    return any(value == -math.inf and best[u] == 0.0 for u, value in walked.prefixes.items())


def by_tokens(tables: automaton_tables.AutomatonTables, right: Callable[[Any], Tensor]) -> Tensor:
    """As if every token had one character."""
    spelling, tables.spelling = tables.spelling, None
    try:
        return right(tables)
    finally:
        tables.spelling = spelling


def smallest(form: joint_form.JointForm, state: tuple[Any, ...]) -> Tensor:
    return torch.stack([one.potential(s) for one, s in zip(form.forms, state, strict=True)]).amin(0)


BYTES, TABLES = automaton_bytes.ByteLookahead, automaton_tables.AutomatonTables
RIGHT = TABLES._alive_by_characters
MUTANTS: dict[str, tuple[str, str, Any, str, Any]] = {
    "a character is the first of its bytes": ("accented words", "bytes", BYTES, "_columns", lambda self, b: {0}),
    "bytes are no character one by one only": (
        "beyond ascii", "sentencepiece", BYTES, "_all_replaced", lambda self, state, data: False
    ),
    "one of them is all of them": ("text or no end", "llama", joint_form.JointForm, "potential", smallest),
    "the last token is any other": (
        "grammar", "tabular", grammar_engine.TokenMasks, "completing", lambda self, prefixes: self.allowed(prefixes)[0]
    ),
    "what is forced has one spelling": (
        "forced", "sentencepiece", grammar, "whole_grammar",
        lambda *parts: grammar_engine.whole_grammar(*parts).replace("true", "false"),
    ),
    "characters are counted in tokens": (
        "four letters", "sentencepiece", TABLES, "_alive_by_characters", lambda self: by_tokens(self, RIGHT)
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_of_the_forms_are_seen(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, kind, owner, attribute, wrong = MUTANTS[mutant]
    assert not condemned(name, kind)
    monkeypatch.setattr(owner, attribute, wrong)
    assert condemned(name, kind)


@pytest.mark.parametrize("kind", ["tabular", "bytes", "sentencepiece"])
@pytest.mark.parametrize("name", ["tokens", "with an end", "length", "regex", "accented words", "finished"])
def test_large_automata_condemn_nothing_either(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What remaining tokens can reach is judged by their number of symbols there."""
    monkeypatch.setattr(automaton_tables, "EXACT_CELLS", 0)
    walked = Walked(CONSTRAINTS[name](), build(kind), 1)
    best = walked.best()
    assert [u for u, value in walked.prefixes.items() if value == -math.inf and best[u] == 0.0] == []


@pytest.mark.parametrize("kind", ["tabular", "llama", "bytes", "sentencepiece", "stop string"])
@pytest.mark.parametrize("name", ["avoiding", "characters", "function", "ids", "grammar", "text and end"])
def test_rows_are_selected_and_cut_as_if_they_had_been_read_so(kind: str, name: str) -> None:
    lm, factor = build(kind), CONSTRAINTS[name]()
    form = factor.bind(lm).incremental
    rows = all_outcomes(lm, 1)
    rows = rows.select((rows.lengths == 3) & lm.is_outcome(rows))
    generator = torch.Generator().manual_seed(4)
    rows = rows.select(torch.randperm(len(rows), generator=generator)[:60])
    state = form.start(rows.context)
    for t in range(3):
        state = form.advance(state, rows.ids[:, t], None)
    index = torch.randint(len(rows), (40,), generator=generator)
    lengths = torch.randint(0, 4, (40,), generator=generator)
    cut = form.crop(form.select(state, index), lengths)
    for length in range(4):
        same = torch.nonzero(lengths == length).squeeze(1)
        some = rows.select(index[same])
        fresh = form.start(some.context)
        for t in range(length):
            fresh = form.advance(fresh, some.ids[:, t], None)
        picked = form.select(cut, same)
        assert torch.equal(form.potential(picked), form.potential(fresh))
        assert torch.equal(form.weigh(picked, None), form.weigh(fresh, None))
        if length < 3:
            tokens = torch.randint(lm.vocab_size, (len(same),), generator=generator)
            one, other = form.advance(picked, tokens, None), form.advance(fresh, tokens, None)
            assert torch.equal(form.potential(one), form.potential(other))


@pytest.mark.parametrize(
    "name", ["avoiding", "containing", "characters", "function", "context", "ids", "regex", "grammar", "text or no end"]
)
@pytest.mark.parametrize("kind", ["tabular", "llama"])
def test_the_form_obeys_its_law_on_draws(kind: str, name: str) -> None:
    report = check_factor(CONSTRAINTS[name](), build(kind))
    assert "potential(start) + Σ weigh = potential(final) = log φ" in report.held


@pytest.mark.parametrize(
    "factor",
    [
        Constraint.characters(map(chr, range(32, 127))),
        Constraint(Automaton.avoiding("the")),
        Constraint(lambda texts: ["the" not in t for t in texts], prefix_closed=True),
    ],
    ids=["characters", "avoiding", "function"],
)
def test_the_law_holds_on_the_embedded_lm(factor: Constraint) -> None:
    lm = LM("tiny", context=["The film", ""], max_new_tokens=5)
    assert "potential(start) + Σ weigh = potential(final) = log φ" in check_factor(factor, lm, num_sequences=4).held


@pytest.mark.shared
def test_the_law_holds_on_a_sentencepiece_vocabulary(shared) -> None:
    lm = LM(shared / "models" / "stories260K", context=["Once upon", ""], max_new_tokens=8, dtype=torch.float64)
    for factor in (
        Constraint.characters(map(chr, range(32, 127))),
        Constraint(Automaton.avoiding("there was")),
        Constraint(lambda texts: ["there was" not in t for t in texts], prefix_closed=True),
    ):
        check_factor(factor, lm, num_sequences=16)
        assert isinstance(factor.bind(lm).incremental, PrefixReader) or factor.automaton is not None


def test_a_mask_is_a_table_where_tokens_add_up_and_a_reading_elsewhere() -> None:
    factor = CONSTRAINTS["avoiding"]()
    assert isinstance(factor.bind(build("bytes")).incremental.form, AutomatonPrefixes)
    assert isinstance(factor.bind(build("stop string")).incremental.form, PrefixReader)
    assert "text" not in factor.bind(build("bytes")).incremental.needs
    assert "text" in factor.bind(build("stop string")).incremental.needs


class Joining(TabularLM):
    """A decoder that does not add up."""

    def decode(self, sequences: Sequences) -> list[str]:
        return [text[::-1] for text in super().decode(sequences)]


@pytest.mark.parametrize("name", ["avoiding", "function", "tokens"])
def test_decoders_that_do_not_add_up_are_read_at_the_end_alone(name: str) -> None:
    table = TabularLM.random(3, 3, context=["", "ab"])
    lm = Joining.__new__(Joining)
    lm.__dict__.update({k: v for k, v in table.__dict__.items() if k != "spelling"})
    assert not lm.spelling.additive
    walked = Walked(CONSTRAINTS[name](), lm, 1)
    best = walked.best()
    assert all(best[u] == -math.inf for u, value in walked.prefixes.items() if value == -math.inf)


def test_a_character_class_outside_ascii_is_refused_at_the_first_byte() -> None:
    lm, factor = build("bytes"), Constraint.characters("ab ")
    form = factor.bind(lm).incremental
    state = form.start(torch.tensor([0]))
    assert form.weigh(state, None)[0].tolist() == [0.0] * 3 + [-math.inf] * 5 + [0.0] * 2


# In a run.


def test_contexts_are_bound_anew() -> None:
    model = build("llama") * CONSTRAINTS["characters"]()
    other = model | ["b", "ab", "a"]
    assert other.factors[0].incremental.lm is other.prior
    assert model.factors[0].incremental is not None
    assert Target(model).factors[0].incremental.lm is model.prior


def test_evaluations_are_counted_and_shared_with_the_run() -> None:
    lm, called = build("tabular"), []

    def allowed(texts: list[str]) -> list[bool]:
        called.extend(texts)
        return ["bb" not in t for t in texts]

    target = Target(lm * Constraint(allowed, prefix_closed=True))
    form = target.factors[0].incremental
    state = form.start(torch.tensor([0, 0, 1]))
    assert called == [""]
    form.weigh(state, torch.tensor([[0], [1], [0]]))
    assert called == ["", "a", "b"]
    state = form.advance(state, torch.tensor([0, 1, 0]), None)
    assert called == ["", "a", "b"]
    assert target.cost.factor_calls == 3
    form.weigh(state, None)
    two_letters = {a + b for a in "ab" for b in "abc"}
    assert {"", "a", "b"} | two_letters <= set(called)
    assert target.cost.factor_calls == len(called) == len(set(called)) < 9 + PROBES


def test_other_factors_are_not_evaluated_on_prefixes() -> None:
    def whole(texts: list[str]) -> list[float]:
        raise AssertionError(texts)

    target = Target(build("tabular") * Reward(whole) * CONSTRAINTS["function"]())
    form = target.factors[1].incremental
    assert form.potential(form.start(torch.tensor([0]))).tolist() == [0.0]


@pytest.mark.parametrize("name", ["characters", "function"])
def test_a_guide_has_the_fingerprint_of_its_content(name: str) -> None:
    lm = build("llama")

    def guided(factor: Constraint) -> GuidedLM:
        return GuidedLM(lm, [(lm * factor).factors[0]])

    law = guided(CONSTRAINTS[name]())
    before = law.fingerprint
    law.draw(3, generator=torch.Generator().manual_seed(0))
    assert law.fingerprint == before == guided(CONSTRAINTS[name]()).fingerprint
    assert before not in {guided(CONSTRAINTS[other]()).fingerprint for other in ("avoiding", "ascii")}


# Functions that are not prefix-closed.


def ends_in_a(texts: list[str]) -> list[bool]:
    return [t.endswith("a") or not t for t in texts]


def test_a_function_that_needs_more_text_is_refused_at_once() -> None:
    form = (build("tabular") * Constraint(lambda texts: ["a" in t for t in texts], prefix_closed=True)).factors[0]
    with pytest.raises(FactorError, match="forbids the empty text"):
        form.incremental.start(torch.tensor([0]))


def test_a_function_that_can_be_mended_is_found_in_a_run() -> None:
    factor = (build("tabular") * Constraint(ends_in_a, prefix_closed=True)).factors[0]
    state = factor.incremental.start(torch.tensor([0, 0]))
    with pytest.raises(FactorError, match="forbids 'b' and allows 'ba', which begins with it; leave prefix_closed out"):
        factor.incremental.advance(state, torch.tensor([1, 0]), None)


@pytest.mark.parametrize("fn", [ends_in_a, lambda texts: ["a" in t for t in texts]])
def test_a_function_that_can_be_mended_fails_its_check(fn) -> None:
    with pytest.raises(CheckFailed, match="prefix_closed=True"):
        check_factor(Constraint(fn, prefix_closed=True, name="own"), build("tabular"))


def test_the_law_itself_finds_what_probes_do_not() -> None:
    """An odd length is mended by one more letter; of ids no text can be put together to try."""
    factor = Constraint(
        lambda rows: [len(t) % 2 == 0 for t in rows.token_lists()], on="ids", prefix_closed=True, name="even"
    )
    with pytest.raises(CheckFailed, match=r"potential\(final\) = log φ"):
        check_factor(factor, build("tabular"))


# Declarations.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predicate": Automaton.avoiding("a"), "prefix_closed": True}, "of which it needs none"),
        ({"predicate": lambda h: h, "on": "hidden", "prefix_closed": True}, "on='hidden' cannot answer"),
    ],
)
def test_contradictions_are_named(options: dict, message: str) -> None:
    predicate = options.pop("predicate")
    with pytest.raises(ModelError, match=message):
        Constraint(predicate, **options)


def test_character_classes_name_one_set_of_single_characters() -> None:
    assert Automaton.characters("ab").accepts_texts(["", "ab", "abc"]).tolist() == [True, True, False]
    assert Automaton.characters(forbidden="b").accepts_texts(["", "é€", "abc"]).tolist() == [True, True, False]
    for arguments in ({}, {"allowed": "a", "forbidden": "b"}):
        with pytest.raises(ModelError, match="either allowed= or forbidden="):
            Automaton.characters(**arguments)
    with pytest.raises(ModelError, match="got 'ab', expected single characters"):
        Automaton.characters(["ab"])
    with pytest.raises(ModelError, match="got none"):
        Automaton.characters("")


def test_a_prefix_closed_constraint_survives_its_description() -> None:
    model = build("tabular") * Constraint(ends_in_a, prefix_closed=True)
    again = model.graph.to_model(model.prior, {"ends_in_a": ends_in_a})
    assert again.factors[0].prefix_closed
    assert again.spec_hash == model.spec_hash
    assert (build("tabular") * Constraint(ends_in_a)).spec_hash != model.spec_hash


def test_what_may_become_a_stop_string_is_held_back() -> None:
    assert held_back("say EN", ["END", "\n"]) == "say "
    assert held_back("say END", ["END"]) == "say END"  # a whole one does not occur while a row goes on
    assert held_back("EEN", ["END", "EEL"]) == "E"
    assert held_back("EE", ["END", "EEL"]) == ""
    assert held_back("say", ["END"]) == held_back("say", []) == "say"
