"""Regex against Python's `re`, on random expressions and on texts that almost match."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmppl.errors import ModelError
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence import Constraint, Regex
from lmppl.modeling.evidence.languages.regex_machine import containing_automaton, regex_automaton
from lmppl.testing import check_factor
from lmppl.testing.text_laws import random_texts

NUM_TEXTS = 10_000

PATTERNS = [
    (r"a*b", 0),
    (r"(?i)straße|K\+", 0),
    (r"\d{3}-\d{4}", 0),
    (r"(?!.*bad).*", re.DOTALL),
    (r"(?=.*\d)(?=.*[a-z])[a-z\d]{2,6}", 0),
    (r"\w+@\w+\.(?:com|org)", 0),
    (r".*\bcat\b.*", 0),
    (r".*\Bat\b.*", 0),
    (r"^a|b$", 0),
    (r"a$\n?", 0),
    (r"(?m:^a$\n?)+", 0),
    (r"(a|b)*?c(?=d)d", 0),
    (r"(?:x(?<=x)y|(?<!y)z)+", 0),
    (r"[^\W\d_]+", 0),
    (r"(?a)\w+\s*", 0),
    (r"[^a-c]+", re.IGNORECASE),
    (r"[k-s]+ſ?", re.IGNORECASE),
    (r"(?:(?=a)\w\w)*", 0),
    (r"\A\s*\S+\s*\Z", 0),
    (r"[\s\S]{2}", 0),
    (r".", 0),
    (r"(?s:.)", 0),
    ("", 0),
    (r"(?P<year>\d{4})-(?:0[1-9]|1[0-2])", 0),
    (r"(ab){2,}c{0,3}d?e+?", 0),
]
LETTERS = "abcdefxyzkK ßſ\n\tKé_0189-@.+comérgtS İı٣"


@pytest.mark.parametrize(("pattern", "flags"), PATTERNS, ids=range(len(PATTERNS)))
def test_what_it_accepts_is_what_python_matches(pattern: str, flags: int) -> None:
    machine = regex_automaton(pattern, flags)
    source = random.Random(1)
    texts = random_texts(machine, NUM_TEXTS // 2, seed=2)
    texts += ["".join(source.choices(LETTERS, k=source.randrange(8))) for _ in range(NUM_TEXTS // 2)]
    compiled = re.compile(pattern, flags)
    matched = [compiled.fullmatch(text) is not None for text in texts]
    assert machine.accepts_texts(texts).tolist() == matched
    assert sum(matched) > 10


items = st.sampled_from(
    ["a", "b", "c", ".", "[ab]", "[^a]", r"\w", r"\b", "^", "$", "(?=a)", "(?!b)", "(?<=a)", "(?<!b)"]
)
expressions = st.recursive(
    items,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"(?:{two[0]}|{two[1]})"),
        inner.map(lambda one: f"(?:{one})*"),
        inner.map(lambda one: f"(?:{one})?"),
        inner.map(lambda one: f"(?:{one}){{1,2}}"),
        inner.map(lambda one: f"(?={one}).*"),
    ),
    max_leaves=6,
)


@given(expressions, st.lists(st.text("abc \n", max_size=5), min_size=20, max_size=20))
def test_random_expressions(pattern: str, texts: list[str]) -> None:
    try:
        machine = regex_automaton(pattern)
    except ModelError as error:
        assert "inside a look-ahead" in str(error)  # noqa: PT017 - the expressions are random
        return
    assert machine.accepts_texts(texts).tolist() == [re.fullmatch(pattern, text) is not None for text in texts]


@settings(max_examples=40)
@given(st.sets(st.text("abA.", min_size=1, max_size=4), min_size=1, max_size=5), st.booleans(), st.booleans())
def test_a_tree_of_words_is_the_expression_of_them(words: set[str], whole: bool, ignore: bool) -> None:
    machine = containing_automaton(sorted(words), whole_words=whole, ignore_case=ignore)
    listed = "|".join(map(re.escape, sorted(words)))
    pattern = rf".*(?<!\w)(?:{listed})(?!\w).*" if whole else f".*(?:{listed}).*"
    other = regex_automaton(pattern, re.DOTALL | (re.IGNORECASE if ignore else 0))
    assert machine.to_dict() == other.to_dict()  # both are minimal


def test_equal_languages_are_equal_automata() -> None:
    assert regex_automaton("a|b|c").to_dict() == regex_automaton("[a-c]").to_dict()
    assert regex_automaton("(a*)*").to_dict() == regex_automaton("a*").to_dict()
    assert regex_automaton(r"[^\U0010ffff]").to_dict() == regex_automaton(r"[\x00-\U0010fffe]").to_dict()


def test_a_factor_of_it_obeys_the_laws() -> None:
    lm = TabularLM.random(4, 4, seed=1)
    regex = Regex(r"a+[bc]?")
    assert "potential(start) + Σ weigh = potential(final) = log φ" in check_factor(regex, lm).held
    spelled = Constraint(
        lambda texts: [re.fullmatch(r"a+[bc]?", t) is not None for t in texts], automaton=regex.automaton, name="own"
    )
    assert "the automaton agrees with the predicate on random texts" in check_factor(spelled, lm).held


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"(a)\1", "a back-reference is not regular"),
        (r"(?>a)b", "an atomic group"),
        (r"a*+b", "a possessive quantifier"),
        (r"(a)?(?(1)b|c)", "a condition on a group"),
        (r"(a", "is no regular expression: missing \\)"),
        (r"(?!)", "no text is allowed by 1\\[x matches"),
        (r"a(?=b)", "the language is empty"),
        (r"(a|b)*a(a|b){20}", "more than 10,000 states"),
        (r"(?:.{1,300}){1,300}", "more than 50,000 steps"),
        (3, "got 3, expected a pattern as text"),
    ],
)
def test_what_it_refuses(pattern: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Regex(pattern)
