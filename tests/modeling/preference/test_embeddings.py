"""Frozen embeddings: a mean over a text's own tokens, whatever else is in the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lmppl
from lmppl.errors import ModelError
from tests.lm.random_models import WINDOW, build, random_lm, tokenizer

TEXTS = ["a", "abcd", "ba", "ddccbbaa", "abcdabcd"]
KINDS = pytest.mark.parametrize("kind", ["llama", "mistral"])


def alone(model: Any, text: str) -> Tensor:
    """(H,) the mean of the hidden states of one text, without padding or mask."""
    ids = torch.tensor([tokenizer(5)(text)["input_ids"]])
    with torch.no_grad():
        hidden: Tensor = model(input_ids=ids).last_hidden_state[0].mean(0)
    return hidden


@KINDS
def test_an_embedding_is_the_texts_own(kind: str) -> None:
    """Texts of different length in one batch, longer than the window; padding in the mean is the mutant."""
    model = build(kind).model
    assert max(map(len, TEXTS)) > WINDOW
    for batch_size in (2, 32):
        found = lmppl.EncoderFeatures(model, tokenizer(5), batch_size=batch_size)(TEXTS)
        wanted = torch.stack([alone(model, text) for text in TEXTS])
        assert float((found - wanted).abs().max()) < 1e-10
    lengths = torch.tensor([len(t) for t in TEXTS])
    mutant = wanted * (lengths / lengths.max())[:, None]
    assert float((mutant - wanted).abs().max()) > 0.1


@KINDS
def test_the_lms_own_states(kind: str) -> None:
    lm = random_lm(kind)
    found = lmppl.LMFeatures(lm)(TEXTS)
    wanted = torch.stack([alone(lm.network.body, text) for text in TEXTS])
    assert float((found - wanted).abs().max()) < 1e-10


def test_long_texts_are_cut_or_refused() -> None:
    model = build("llama").model
    cut = lmppl.EncoderFeatures(model, tokenizer(5), max_length=2)(["abcd"])
    assert float((cut - alone(model, "cd")).abs().max()) < 1e-10
    with pytest.raises(
        ModelError, match=r"the text 'a+' has 65 tokens, more than the 64 that LlamaModel reads; cut texts"
    ):
        lmppl.EncoderFeatures(model, tokenizer(5))(["a" * 65])
    with pytest.raises(ModelError, match="LlamaModel reads the text '' as no token; use on='full'"):
        lmppl.EncoderFeatures(model, tokenizer(5))(["a", ""])


def test_a_folder_is_loaded(tmp_path: Any) -> None:
    model = build("llama").model
    model.save_pretrained(tmp_path)
    tokenizer(5).save_pretrained(tmp_path)
    features = lmppl.EncoderFeatures.from_pretrained(str(tmp_path))
    gap = features(["abc"]) - alone(model, "abc")
    assert float(gap.abs().max()) < 1e-5
    assert features.__name__ == "LlamaModel"


def test_what_is_no_encoder() -> None:
    model = build("llama").model
    with pytest.raises(ModelError, match="training mode"):
        lmppl.EncoderFeatures(build("llama").model.train(), tokenizer(5))
    with pytest.raises(ModelError, match="needs its tokenizer"):
        lmppl.EncoderFeatures(model, None)
    with pytest.raises(ModelError, match="got function, expected a transformers network"):
        lmppl.EncoderFeatures(lambda texts: texts, tokenizer(5))
    with pytest.raises(ModelError, match="got batch_size=0"):
        lmppl.EncoderFeatures(model, tokenizer(5), batch_size=0)


@KINDS
def test_a_reward_on_the_lms_own_states(kind: str) -> None:
    """End to end: fitted on the prior's states, with context, exact posterior over an enumerable LM."""
    lm = random_lm(kind)
    pairs = [lmppl.Preference(a, b, context="ab") for a, b in (("aa", "bb"), ("ab", "bc"), ("a", "d"), ("ca", "cb"))]
    reward = lmppl.BayesianRewardModel.fit(
        pairs, lmppl.LMFeatures(lm), prior_scale=0.5, on="full", attitude=lmppl.Robust(1.0), num_references=8
    )
    exact = lmppl.infer(lm * reward, lmppl.Exact())
    draws = lmppl.infer(lm * reward, lmppl.Importance(64)).draws
    assert bool(torch.isfinite(exact.log_normalizer[0].value).all())
    assert draws.features["preference"].shape == (128, 3)
