"""How tokens spell text: prefixes read token by token give what decoding the whole row gives."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lmppl.lm import LM, TransformersLM
from lmppl.lm.spelling import Spelling
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence import Constraint
from lmppl.testing import check_factor
from tests.lm.random_models import build
from tests.models import ENUMERABLE, enumerable_lm

BYTES = pre_tokenizers.ByteLevel.alphabet()


def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE: é and € take two and three tokens."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letter = bytes_to_unicode()
    units = [letter[b] for b in [*b"ab ", *"é".encode(), *"€".encode()]]
    backend = Tokenizer(models.WordLevel({u: i for i, u in enumerate([*units, "<s>", "</s>"])}, unk_token="a"))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def sentencepiece() -> PreTrainedTokenizerFast:
    """Pieces with ▁ for a space, bytes that fall back, and a first space that is cut."""
    units = ["a", "b", "▁a", "▁", "<0xC3>", "<0xA9>", "<0x41>", "<s>", "</s>"]
    backend = Tokenizer(models.WordLevel({u: i for i, u in enumerate(units)}, unk_token="a"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def lm_with(tokenizer, context="a", **options) -> TransformersLM:
    vocab = len(tokenizer)
    return TransformersLM(build("llama", vocab), tokenizer=tokenizer, context=context, max_new_tokens=4, **options)


def check_reading(lm, spelling: Spelling, context: int, count: int = 300) -> None:
    generator = torch.Generator().manual_seed(1)
    words = [v for v in range(lm.vocab_size) if v not in lm.eos_ids]
    width = min(4, lm.max_new_tokens)
    rows = [[words[i] for i in torch.randint(len(words), (width,), generator=generator)] for _ in range(count)]
    texts = lm.decode(lm.sequences(rows, [context] * count))
    for row, text in zip(rows, texts, strict=True):
        prefix, settled = spelling.start(lm.begins_text[context]), ""
        for token in row:
            prefix = spelling.read(prefix, token)
            assert prefix.text.startswith(settled)
            settled = prefix.text
        assert spelling.whole(prefix) == text
        assert text.startswith(settled)


@pytest.mark.parametrize("kind", ENUMERABLE)
def test_letters_add_up(kind: str) -> None:
    lm = enumerable_lm(kind)
    assert lm.spelling.additive
    assert not lm.spelling.begins_differently
    assert lm.spelling.clean.sum() == lm.vocab_size - len(lm.eos_ids)
    check_reading(lm, lm.spelling, 1)


def test_bytes_wait_for_their_character() -> None:
    lm = lm_with(byte_level())
    spelling = lm.spelling
    assert spelling.additive
    assert spelling.open.tolist() == [False] * 3 + [True] * 5 + [False] * 2
    assert spelling.partial.equal(spelling.open)
    prefix = spelling.start(False)
    for token in (0, 3):
        prefix = spelling.read(prefix, token)
    assert (prefix.text, spelling.whole(prefix)) == ("a", "a�")
    prefix = spelling.read(prefix, 4)
    assert (prefix.text, spelling.whole(prefix)) == ("a", "aé")
    assert spelling.read(prefix, 1).text == "aéb"
    check_reading(lm, spelling, 0)


@pytest.mark.parametrize("context", ["a", ""])
def test_pieces_know_where_a_text_begins(context: str) -> None:
    lm = lm_with(sentencepiece(), context=context)
    spelling = lm.spelling
    assert spelling.additive
    assert lm.begins_text == [context == ""]
    assert (spelling.pieces[2], spelling.first[2]) == (" a", "a")
    assert spelling.open.tolist()[4:7] == [True] * 3  # a byte that is ASCII joins runs of bytes, so it is not settled
    assert spelling.partial.tolist()[4:7] == [True, True, False]
    assert spelling.silent.tolist()[7]
    check_reading(lm, spelling, 0, 600)


def test_other_contexts_share_what_was_found() -> None:
    lm = lm_with(sentencepiece())
    assert (lm | "b").spelling is lm.spelling


def test_an_lm_of_the_same_outcomes_spells_as_its_base_does() -> None:
    """Contexts that begin texts and that do not, stop strings: by its own decoding it would not be additive."""
    base = lm_with(sentencepiece(), context=["a", ""], stop="ab")
    tempered = base.at_temperature(0.5)
    assert tempered.spelling is base.spelling
    assert tempered.begins_text == [False, True]
    factor = Constraint(lambda texts: ["bb" not in text for text in texts], prefix_closed=True)
    report = check_factor(factor, tempered)
    assert "potential(start) + Σ weigh = potential(final) = log φ" in report.held


def test_stop_strings_are_left_in() -> None:
    lm = lm_with(byte_level(), stop="ab")
    assert lm.spelling.additive
    prefix = lm.spelling.start(False)
    for token in (0, 1, 0):
        prefix = lm.spelling.read(prefix, token)
    assert prefix.text == "aba"


def test_the_embedded_lm_adds_up() -> None:
    lm = LM("tiny", context="The", max_new_tokens=4)
    assert lm.spelling.additive
    check_reading(lm, lm.spelling, 0)


@pytest.mark.shared
def test_a_real_sentencepiece_vocabulary_adds_up(shared) -> None:
    lm = LM(shared / "models" / "stories260K", context=["Once", ""], max_new_tokens=4)
    assert lm.spelling.additive
    for context in (0, 1):
        check_reading(lm, lm.spelling, context)


class Capitals(TabularLM):
    """A decoder that looks at neighbours: the last letter is a capital."""

    def decode(self, sequences):
        return [text[:-1] + text[-1:].upper() for text in super().decode(sequences)]


class ByContext(TabularLM):
    def decode(self, sequences):
        shifts = sequences.context.tolist()
        return [text if c == 0 else text.upper() for c, text in zip(shifts, super().decode(sequences), strict=True)]


@pytest.mark.parametrize("kind", [Capitals, ByContext])
def test_a_decoder_that_does_not_add_up_is_found(kind: type) -> None:
    lm = TabularLM.random(4, 4, context=["", "ab"])
    assert lm.spelling.additive
    other = kind.__new__(kind)
    other.__dict__.update({k: v for k, v in lm.__dict__.items() if k != "spelling"})
    assert not other.spelling.additive
