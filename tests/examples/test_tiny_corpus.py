"""The corpus script: what it keeps, what its grammar writes, and that its sampler is the teacher."""

import random
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def corpus(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import tiny_corpus

    return tiny_corpus


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("The film was dull and far too long", None),
        ("The film was dull. I left. My wife stayed until the end.", "The film was dull. I left."),
        ("The film was dull and  far too long. And then", "The film was dull and far too long."),
        ("The film was a wonderful, wonderful film.", None),
        ("The film got 3 stars from me.", None),
        ("I left early.", None),
    ],
)
def test_clean_keeps_one_or_two_plain_sentences(corpus: ModuleType, text: str, kept: str | None) -> None:
    assert corpus.clean(text) == kept


def test_grammar_expands_every_rule(corpus: ModuleType) -> None:
    rng = random.Random(0)
    sentences = [corpus.grammar_sentence(rng) for _ in range(500)]
    assert not any(mark in sentence for sentence in sentences for mark in "{}|")
    assert len(set(sentences)) > 450


def test_prompts_end_with_their_stem(corpus: ModuleType) -> None:
    rng = random.Random(0)
    for prompt, stem in [make(rng) for make in (corpus.review_prompt, corpus.travel_prompt) for _ in range(50)]:
        assert prompt.endswith(f"\n- {stem}")


def test_sampler_follows_the_teacher(corpus: ModuleType) -> None:
    """With ``min_p`` 1 only the teacher's best token survives, so every row is the greedy continuation."""
    torch.set_num_threads(1)
    folder = ROOT / "lmppl" / "lm" / "tiny_weights"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sampler = corpus.SharedPrefixSampler(model, tokenizer, min_p=1.0)
    drawn = sampler("The film was good.\nThe film was", 3, 6, torch.Generator().manual_seed(0))
    prompt = tokenizer("The film was good.\nThe film was", return_tensors="pt", add_special_tokens=False).input_ids
    ids = prompt
    for _ in range(6):
        with torch.inference_mode():
            best = model(ids).logits[0, -1, sampler.vocabulary].argmax()
        ids = torch.cat([ids, sampler.vocabulary[best].view(1, 1)], 1)
    assert drawn == [tokenizer.decode(ids[0, prompt.shape[1] :]).split("\n")[0]] * 3
