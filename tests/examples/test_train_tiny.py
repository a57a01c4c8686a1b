"""The script that trained the embedded language model runs and writes a model that loads and scores."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
STEPS = 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model trained for three steps on 200 generated sentences."""
    folder = tmp_path_factory.mktemp("tiny")
    rng = random.Random(0)
    subjects, verbs, objects = (
        ["The dog", "A cat", "My aunt", "Paris"],
        ["saw", "liked", "forgot"],
        ["the sea", "a café", "old films"],
    )
    lines = [f"{rng.choice(subjects)} {rng.choice(verbs)} {rng.choice(objects)} {n} times." for n in range(200)]
    data = folder / "sentences.txt"
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    out = folder / "out"
    subprocess.run(
        [
            sys.executable,
            EXAMPLES / "train_tiny.py",
            "--data",
            data,
            "--steps",
            str(STEPS),
            "--out",
            out,
            "--context",
            "64",
        ],
        check=True,
        capture_output=True,
        timeout=300,
    )
    return out


def test_saved_model_scores_a_sentence(trained: Path) -> None:
    torch.set_num_threads(1)
    tokenizer, model = (
        AutoTokenizer.from_pretrained(trained),
        LlamaForCausalLM.from_pretrained(trained, dtype=torch.float32),
    )
    batch = tokenizer("My aunt liked the sea 7 times.", return_tensors="pt")
    loss = model.eval()(**batch, labels=batch.input_ids).loss
    assert 0 < loss.item() < 2 * math.log(model.config.vocab_size)


@pytest.mark.parametrize(
    "text",
    ["The dog saw a café.", " leading space", "two  spaces\nand a line", "naïve 東京 🙂", "it 's , odd"],
)
def test_tokenizer_round_trips(trained: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained)
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


def test_report_states_bits_per_byte(trained: Path) -> None:
    report = json.loads((trained / "report.json").read_text())
    assert set(report) == {"sentences", "all"}
    assert report["sentences"]["documents"] == 5
    assert all(figures["bits_per_byte"] > 0 and figures["5-gram"] > 0 for figures in report.values())


def test_documents_in_one_row_are_scored_as_if_alone(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import train_tiny

    tokenizer, model = (
        AutoTokenizer.from_pretrained(trained),
        LlamaForCausalLM.from_pretrained(trained, dtype=torch.float64),
    )
    first, second = train_tiny.encode(tokenizer, ["The dog saw the sea.", "Paris forgot old films."], 64)
    apart = [train_tiny.loss_sum(model, torch.tensor([ids])) for ids in (first, second)]
    packed, count = train_tiny.loss_sum(model, torch.tensor([first + second + [train_tiny.PAD] * 3]))
    assert count == sum(number for _, number in apart)
    torch.testing.assert_close(packed, sum(loss for loss, _ in apart), rtol=1e-5, atol=0)


def test_kneser_ney_is_a_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from tiny_ngram import KneserNey

    bos, eos = 1, 2
    rng = random.Random(0)
    documents = [[bos, *(rng.choice([3, 3, 4, 5]) for _ in range(rng.randrange(1, 6))), eos] for _ in range(600)]
    model = KneserNey(documents, vocab_size=6, order=3)
    for context in ([bos], [bos, 3], [bos, 5, 5], [bos, 4, 3, 3]):
        before = model.bits([context])
        assert sum(2 ** (before - model.bits([[*context, token]])) for token in range(6)) == pytest.approx(1)
