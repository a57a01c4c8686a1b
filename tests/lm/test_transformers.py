"""The contract of `TransformersLM`: contexts, special tokens, options, errors, text; the user's model left alone."""

import copy

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

from lmppl.errors import ContextError, ModelError, ShapeError, UnsupportedModel
from lmppl.lm import LM, TransformersLM
from lmppl.lm.decoding import token_log_probs
from tests.lm.random_models import build, network, random_lm, tokenizer, uncached_logits

CHAT = "{% for m in messages %}{{ m['content'] }}d{% endfor %}{% if add_generation_prompt %}c{% endif %}"


def lm_of(model=None, letters=None, **options):
    options = {"context": "ab", "max_new_tokens": 3} | options
    return LM(model or network("llama"), tokenizer=letters or tokenizer(), **options)


# Contexts.


def test_one_string_is_one_context():
    lm = lm_of()
    assert lm.batch_shape == (1,)
    assert lm.event_shape == (3,)
    assert lm.prompts == ("ab",)
    assert lm.context_ids.tolist() == [[0, 1]]


def test_a_list_of_strings_is_as_many_contexts():
    lm = lm_of(context=["ab", "bacab", ""])
    assert lm.prompts == ("ab", "bacab", "")
    assert lm.context_lengths.tolist() == [2, 5, 1]
    assert lm.context_ids[:, -1].tolist() == [1, 1, 4]  # the empty one is EOS: there is no BOS


def test_a_list_of_turns_is_one_chat():
    turns = [{"role": "system", "content": "a"}, {"role": "user", "content": "bb"}]
    lm = lm_of(context=turns, chat_template=CHAT)
    assert lm.prompts == ("adbbdc",)
    assert lm.context_ids.tolist() == [[0, 3, 1, 1, 3, 2]]
    several = lm_of(context=[turns, turns[1:], "ab"], chat_template=CHAT)
    assert several.prompts == ("adbbdc", "bbdc", "ab")


@pytest.mark.parametrize("empty", ["", None])
def test_the_empty_context_is_bos_where_there_is_one(empty):
    letters = copy.deepcopy(tokenizer())
    letters.bos_token = "d"
    assert lm_of(letters=letters, context=empty).context_ids.tolist() == [[3]]
    assert lm_of(context=empty).context_ids.tolist() == [[4]]
    with pytest.raises(ContextError, match="neither BOS nor EOS"):
        lm_of(letters=tokenizer(5, eos=None), context=empty)


@pytest.mark.parametrize(
    ("context", "message"),
    [
        ([], "empty list"),
        ([[]], "without turns"),
        ({"role": "user", "content": "a"}, "got dict"),
        (3, "got int"),
        (["ab", 3], "context 1: got int"),
        ([{"role": "user"}], "turn 0"),
        ([{"role": "user", "content": "a"}], "no chat template"),
    ],
)
def test_wrong_contexts_are_refused(context, message):
    with pytest.raises(ContextError, match=message):
        lm_of(context=context)


def test_a_context_that_leaves_no_room_is_named():
    assert lm_of(context="a" * 61).context_lengths.tolist() == [61]
    with pytest.raises(ContextError, match=r"context 1 \('aaaa.*window of 64"):
        lm_of(context=["b", "a" * 62])


def test_what_the_tokenizer_appends_is_no_part_of_the_context():
    from tokenizers.processors import TemplateProcessing

    letters = copy.deepcopy(tokenizer())
    letters.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 4)])
    assert letters("ab").input_ids == [0, 1, 4]
    assert lm_of(letters=letters).context_ids.tolist() == [[0, 1]]
    assert lm_of(letters=letters, context="").context_ids.tolist() == [[4]]


def test_left_padding_does_not_reach_the_law():
    """Prompts full of the pad id, which equals EOS, beside a longer one."""
    short = lm_of(context=["</s>a", "bacabac"], letters=spelled())
    rows = short.enumerate_sequences(0)
    want = torch.log_softmax(uncached_logits(short, 0, []), -1)[0]
    ended = torch.nonzero(rows.lengths.eq(1) & rows.finished).squeeze(1)
    assert float(rows.log_prior[ended[0]]) == pytest.approx(float(want[4]), abs=1e-10)


def spelled():
    """A tokenizer that reads the EOS token where it is written out."""
    letters = copy.deepcopy(tokenizer())
    letters.pad_token = "</s>"
    return letters


# Special tokens.


def test_pad_is_the_declared_token_else_eos_else_zero():
    assert lm_of().pad_id == 4
    assert lm_of(letters=tokenizer(5, pad="<pad>")).pad_id == 3
    assert lm_of(letters=tokenizer(5, eos=None)).pad_id == 0
    outside = copy.deepcopy(tokenizer())
    outside.add_special_tokens({"pad_token": "<new>"})
    assert outside.pad_token_id == 5  # the network has five tokens
    assert lm_of(letters=outside).pad_id == 4


def test_eos_in_the_middle_of_a_row_has_no_probability():
    lm = lm_of()
    eos = 4
    value = torch.tensor([[[0, eos, eos]], [[0, eos, 1]], [[eos, eos, eos]]])
    scores = lm.log_prob(value)[:, 0]
    assert torch.isfinite(scores).tolist() == [True, False, True]


# Options.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens: got 0"),
        ({"top_k": 0}, "top_k: got 0"),
        ({"top_p": 0.0}, "top_p: got 0.0"),
        ({"top_p": 1.5}, "top_p: got 1.5"),
        ({"stop": ""}, "stop: got ''"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ModelError, match=message):
        lm_of(**options)


def test_text_ends_before_the_stop_string_and_ids_hold_it():
    lm = lm_of(stop=["ca"], max_new_tokens=4)
    rows = lm.sequences([[0, 2, 0], [2, 0], [1, 4], [0, 0, 0, 0], [2, 2, 1, 2]])
    assert rows.text == ["a", "", "b", "aaaa", "ccbc"]
    assert rows.finished.tolist() == [True, True, True, False, False]
    assert torch.isfinite(lm.score(rows)).all()
    with pytest.raises(ShapeError, match="at most 4"):
        lm.sequences([[0, 0, 0, 0, 0]])


def test_a_declared_truncation_has_no_mass_outside():
    lm = lm_of(top_k=2, max_new_tokens=1)
    scores = lm.log_prob(torch.arange(5)[:, None, None])[:, 0]
    assert int(torch.isfinite(scores).sum()) == 2
    assert set(lm.draw(200).ids[:, 0].tolist()) == set(torch.nonzero(torch.isfinite(scores)).squeeze(1).tolist())


def test_ties_at_the_edge_of_a_truncation_go_to_the_lower_id():
    from lmppl.lm.truncation import keep_top_k, keep_top_p

    tied = torch.tensor([[1.0, 2.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    first_three = [True, True, True, False, False]
    assert torch.isfinite(keep_top_k(tied, 3)).tolist() == [first_three, first_three]
    assert torch.isfinite(keep_top_p(torch.zeros(1, 5, dtype=torch.float64), 0.5)).tolist() == [first_three]
    assert torch.isfinite(keep_top_p(tied, 1e-9)).sum(-1).tolist() == [1, 1]
    assert torch.equal(keep_top_p(tied, 1.0), tied)
    assert torch.equal(keep_top_k(tied, 5), tied)


# The model.


def test_the_users_model_is_left_as_it_was():
    model = build("gpt2")  # has dropout
    model.train()
    model.transformer.h[0].eval()
    before = copy.deepcopy(model.state_dict())
    config, generation = model.config.to_dict(), model.generation_config.to_dict()
    modes = [module.training for module in model.modules()]
    lm = lm_of(model, context=["ab", "bacab"])
    first, second = (lm.draw(5, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(first.log_prior, second.log_prior)  # no dropout in our forwards
    torch.testing.assert_close(lm.score(first), first.log_prior, rtol=0, atol=1e-10)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.config.to_dict() == config
    assert model.generation_config.to_dict() == generation


def test_sequence_to_sequence_models_are_refused_by_name():
    model = BartForConditionalGeneration(
        BartConfig(vocab_size=5, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=1,
                   decoder_attention_heads=1, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=16)
    )  # fmt: skip
    with pytest.raises(UnsupportedModel, match="BartForConditionalGeneration is a sequence-to-sequence model"):
        lm_of(model)


def test_what_is_no_language_model_is_refused():
    with pytest.raises(UnsupportedModel, match="Linear: not a Hugging Face"):
        lm_of(torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedModel, match="LlamaModel has no output embedding"):
        lm_of(network("llama").model)
    with pytest.raises(ModelError, match="without its tokenizer"):
        LM(network("llama"), max_new_tokens=2)
    with pytest.raises(ModelError, match="got int"):
        LM(3, max_new_tokens=2)


def test_model_and_tokenizer_can_come_as_a_pair():
    lm = LM((network("llama"), tokenizer()), context="ab", max_new_tokens=2)
    assert lm.fingerprint == lm_of(max_new_tokens=2).fingerprint


def test_broken_weights_are_an_error():
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[0] = torch.nan
    with pytest.raises(ModelError, match="nan or infinite"):
        lm_of(model).draw(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_log_probabilities_are_float32_below_float64(dtype):
    exact = random_lm("llama")
    lm = LM(network("llama", 5, dtype), tokenizer=tokenizer(), context=["ab", "bacab"], max_new_tokens=3)
    assert lm.dtype == torch.float32
    assert exact.dtype == torch.float64
    draws = lm.draw(50, generator=torch.Generator().manual_seed(0))
    assert draws.log_prior.dtype == torch.float32
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.4, torch.float16: 0.05}[dtype]
    torch.testing.assert_close(lm.score(draws), draws.log_prior, rtol=0, atol=tolerance)
    total = lm.enumerate_sequences(1).log_prior.exp().sum()
    assert float(total) == pytest.approx(1.0, abs=1e-5)


def test_float32_scores_agree_with_the_draws_to_a_ten_thousandth_per_token():
    lm = LM(network("mistral", 5, torch.float32), tokenizer=tokenizer(), context=["ab", "bacab"], max_new_tokens=40)
    draws = lm.draw(64, generator=torch.Generator().manual_seed(0))
    per_token = token_log_probs(lm, draws).sum(-1)
    worst = ((per_token - draws.log_prior).abs() / draws.lengths).max()
    assert float(worst) < 1e-4


# Identity.


def test_equal_laws_have_equal_fingerprints():
    model = build("llama")
    lm = lm_of(model)
    assert lm.fingerprint == lm_of(copy.deepcopy(model)).fingerprint
    others = [lm_of(model, **o) for o in ({"temperature": 2.0}, {"top_k": 2}, {"stop": "a"}, {"context": "b"})]
    assert len({lm.fingerprint, *(o.fingerprint for o in others)}) == 5
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1.0
    assert lm.fingerprint != lm_of(build("llama")).fingerprint


def test_writes_past_the_version_counter_are_noticed():
    model = build("llama")
    lm = lm_of(model)
    seen = [lm.fingerprint]
    model.lm_head.weight.data += 1e-3
    seen.append(lm.fingerprint)
    model.lm_head.weight.data.view(-1)[-1] += 1e-3
    seen.append(lm.fingerprint)
    assert len(set(seen)) == 3
    assert lm.fingerprint == lm_of(copy.deepcopy(model)).fingerprint


def test_rows_end_by_eos_alone_without_stop_strings():
    assert lm_of(build("llama")).ends_by_eos_alone
    assert not lm_of(build("llama"), stop="a").ends_by_eos_alone


def test_large_models_are_hashed_by_sums_and_samples(monkeypatch):
    from lmppl.lm import hashing

    monkeypatch.setattr(hashing, "WHOLE", 0)
    model = build("llama", seed=7)
    first = hashing.hash_weights(model)
    assert first == hashing.hash_weights(copy.deepcopy(model))
    with torch.no_grad():
        model.lm_head.weight[2, 3] += 1e-6
    assert hashing.hash_weights(model) != first


def test_weights_without_dimensions_are_hashed():
    from lmppl.lm.hashing import hash_weights

    assert hash_weights(torch.nn.BatchNorm1d(2)) == hash_weights(torch.nn.BatchNorm1d(2))


def test_a_row_takes_its_cache_and_its_scores():
    lm = lm_of(context=["ab", "bacab"])
    per_token = 2 * 2 * 2 * 4 * 8  # keys and values, 2 layers, 2 heads of 4, float64
    assert lm.bytes_per_row(3) >= 8 * per_token
    assert lm.bytes_per_row(13) - lm.bytes_per_row(3) >= 10 * per_token


# Text.


def spaced_tokenizer():
    """A word tokenizer of the sentencepiece kind: `▁` begins a word, and a leading space is dropped when decoding."""
    words = ["▁the", "▁cat", "s", "▁sat", "</s>"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="▁the"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def test_context_and_completion_join_into_the_text():
    words = spaced_tokenizer()
    assert words.decode([1, 2]) == "cats"
    lm = lm_of(letters=words, context=["the cat", "the", ""])
    rows = lm.sequences([[2, 3, 4], [1, 2, 3], [1, 2, 3]], [0, 1, 2])
    assert rows.text == ["s sat", " cats sat", "cats sat"]
    assert rows.full_text == ["the cats sat", "the cats sat", "cats sat"]


def byte_tokenizer():
    """One token a byte, as byte-level BPE has before its merges; EOS is 256."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({s: i for i, s in enumerate([*symbols, "</s>"])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def test_a_stop_string_may_span_tokens_and_parts_of_a_character():
    letters = byte_tokenizer()
    lm = lm_of(network("llama", 257, torch.float32), letters, stop=["né"], max_new_tokens=6)
    ids = letters("anée", add_special_tokens=False).input_ids
    assert len(ids) == 5
    parsed = lm.parse(torch.tensor([[*ids, 256], [*ids[:2], 256, *ids[:3]], [*ids[3:4], *ids]]), torch.zeros(3).long())
    assert parsed.lengths.tolist() == [4, 3, 5]
    assert parsed.finished.tolist() == [True, True, True]
    assert parsed.text == ["a", "an", "\ufffda"]
    assert lm.with_contexts(["b"])._text is lm._text


def test_the_name_lm_is_the_class():
    assert LM is TransformersLM
