"""Texts as tokens, and other caps: what a language model does for another one whose texts it reads."""

from __future__ import annotations

from pathlib import Path

import pytest

import lmppl
from lmppl.errors import ContextError, ModelError, UnsupportedModel
from lmppl.lm.tabular import TabularLM
from lmppl.lm.transformers import TransformersLM
from tests.lm.random_models import random_lm
from tests.models import ENUMERABLE, TOLERANCE, enumerable_lm

TEXTS = ("", " great.", "great", " naïve café", "\nTwo  spaces", "!", "é")


@pytest.mark.parametrize("context", ["The film was", ""])
def test_tokens_read_like_their_text(context: str) -> None:
    lm = lmppl.LM("tiny", context=context, max_new_tokens=24)
    for text in TEXTS:
        ids = lm.encode(text)
        assert ids is not None
        assert lm.decode(lm.sequences([ids])) == [text]


@pytest.mark.shared
@pytest.mark.parametrize("name", ["stories260K", "glassllm-en"])
def test_a_continuation_gets_no_space_that_is_not_there(shared: Path, name: str) -> None:
    """A tokenizer that puts a space before a text must not put one into the middle of it."""
    lm = lmppl.LM(str(shared / "models" / name), context="Once upon a time", max_new_tokens=24)
    for text in (" there was", "less", ", she said."):
        ids = lm.encode(text)
        assert ids is not None
        assert lm.decode(lm.sequences([ids])) == [text]


def test_what_cannot_be_written_has_no_tokens() -> None:
    assert enumerable_lm("llama").encode("abz") is None
    table = TabularLM([0.5, 0.3, 0.2], ["a", "ab", "<eos>"], max_new_tokens=3)
    assert (table.encode("aab"), table.encode("b"), table.encode("")) == ([0, 1], None, [])


@pytest.mark.parametrize("kind", ENUMERABLE)
def test_another_cap_is_the_same_law_of_next_tokens(kind: str) -> None:
    lm = enumerable_lm(kind)
    for one in (lm, lm.at_temperature(0.7)):
        longer = one.with_max_new_tokens(6)
        assert (longer.max_new_tokens, longer.prompts, longer.eos_ids) == (6, lm.prompts, lm.eos_ids)
        rows = [[0, 1, 2], [1]]
        got, wanted = (m.token_log_probs(m.sequences(rows, [1, 0])).sum(1) for m in (longer, one))
        assert float((got - wanted).abs().max()) < TOLERANCE
        assert longer.draw(3).ids.shape == (6, 6)
    assert lm.max_new_tokens < 6


def test_caps_that_are_not_there() -> None:
    table = TabularLM.from_prefixes({(): [0.5, 0.5]}, ["a", "<eos>"], max_new_tokens=1)
    with pytest.raises(ModelError, match="can be reached but has no entry"):
        table.with_max_new_tokens(2)
    with pytest.raises(ContextError, match="window"):
        random_lm("llama").with_max_new_tokens(64)
    steered = lmppl.WeightedDecoding().language_model(enumerable_lm("tabular") * lmppl.PowerPrior(2.0))
    with pytest.raises(UnsupportedModel, match="GuidedLM: its cap is 4, and it has no other; declare it with"):
        steered.with_max_new_tokens(5)
    assert isinstance(enumerable_lm("llama").with_max_new_tokens(2), TransformersLM)


def test_a_table_reads_text_by_whatever_symbols_spell_it():
    """The longest symbol first would leave "c", which is none."""
    lm = TabularLM([0.2, 0.2, 0.2, 0.2, 0.2], ["a", "ab", "bc", "b", "<eos>"], max_new_tokens=4)
    assert lm.encode("abc") == [0, 2]
    assert lm.encode("abab") == [1, 1]
    assert lm.encode("abx") is None
