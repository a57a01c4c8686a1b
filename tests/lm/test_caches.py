"""What caches do, each measured with a fresh forward of one unpadded row without any cache."""

import inspect

import pytest
import torch
from transformers import LlamaForCausalLM, LlamaModel
from transformers.cache_utils import DynamicCache

from lmppl.errors import ContextError, UnsupportedModel
from lmppl.lm.caches import BufferedLayer, make_cache, select_rows
from lmppl.lm.network import Network
from lmppl.lm.probing import abilities_of
from lmppl.lm.transformers import TransformersLM
from tests.lm.random_models import KINDS, WINDOW, build, config, network, random_lm, tokenizer, uncached_logits

CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
CROPPABLE = ("llama", "mistral", "gpt2", "gemma3")
TOLERANCE = {"qwen3_next": 1e-4, "gemma2": 1e-5}  # parts that these compute in float32 whatever their weights


def assert_state(lm, step, prefixes, contexts):
    """The next-token law of each row is that of its own prefix."""
    logits = step.log_probs[:, -1]
    for row, (context, prefix) in enumerate(zip(contexts, prefixes, strict=True)):
        want = torch.log_softmax(uncached_logits(lm, context, prefix)[-1], -1)
        torch.testing.assert_close(logits[row], want, rtol=0, atol=TOLERANCE.get(kind_of(lm), 1e-10))


def kind_of(lm):
    return lm.network.config.model_type


# What each architecture declares.


@pytest.mark.parametrize("kind", CROPPABLE)
def test_attention_models_declare_everything(kind):
    assert random_lm(kind).decoder().capabilities == {"crop", "ragged", "chunk", "hidden", "grad"}


def test_recurrent_model_declares_no_crop():
    lm = random_lm("qwen3_next")
    assert lm.abilities.cache == "config"
    assert lm.decoder().capabilities == {"chunk", "hidden", "grad"}
    decoder = lm.decoder()
    _, state = decoder.prefill(torch.tensor([0, 1]))
    _, state = decoder.extend(state, torch.tensor([[0], [1]]))
    with pytest.raises(UnsupportedModel, match="cannot be cut back"):
        decoder.crop(state, torch.tensor([0, 0]))


def test_rows_longer_than_the_window_are_probed_beyond_it():
    model = build("mistral")
    model.config.sliding_window = 20
    assert abilities_of(Network(model), 15) == abilities_of(Network(model), 40)
    from lmppl.lm import probing

    assert sorted(probing._known[model]) == [9, 25]


@pytest.mark.parametrize(("kind", "head"), [("gemma2", "final_logit_softcapping"), ("granite", "logits_scaling")])
def test_what_follows_the_head_is_found(kind, head):
    lm = random_lm(kind)
    assert lm.abilities.head == head
    _, state = lm.decoder().prefill(torch.tensor([0]))
    step, _ = lm.decoder().extend(state, torch.tensor([[1, 2]]))
    assert_state(lm, step, [[1, 2]], [0])


def test_undeclared_postprocessing_leaves_the_head_whole():
    model = build("llama")
    forward = model.forward

    def doubled(input_ids=None, **kwargs):
        output = forward(input_ids=input_ids, **kwargs)
        output.logits = output.logits * 2.0
        return output

    model.forward = doubled
    lm = random_lm("llama")
    odd = type(lm)(model, tokenizer=lm.tokenizer, context=["ab", "bacab"], max_new_tokens=3)
    assert odd.abilities.head is None
    assert "hidden" not in odd.decoder().capabilities
    draws = odd.enumerate_sequences(1)
    torch.testing.assert_close(odd.score(draws), draws.log_prior, rtol=0, atol=1e-10)
    assert float(draws.log_prior.exp().sum()) == pytest.approx(1.0, abs=1e-10)


def test_model_without_a_usable_cache_is_read_again_each_step():
    model = build("llama")
    forward = model.model.forward

    def refusing(input_ids=None, past_key_values=None, cache=None, **kwargs):
        if past_key_values is not None or cache is not None:
            raise TypeError("no cache here")
        return forward(input_ids=input_ids, **kwargs)

    model.model.forward = refusing
    lm = random_lm("llama")
    plain = type(lm)(model, tokenizer=lm.tokenizer, context=["ab", "bacab"], max_new_tokens=3)
    assert plain.abilities.cache == "none"
    assert_operations(plain)


def test_where_padding_is_wrong_rows_are_grouped_by_length():
    lm = random_lm("gemma2")  # its float32 softmax makes nan of the fully masked rows of a float64 model
    assert not lm.abilities.padded
    assert lm.decoder().capabilities == {"crop", "ragged", "chunk", "hidden", "grad"}
    assert_operations(lm)


# The operations, mixed as engines mix them.


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_extend_and_select_are_exact(kind):
    lm = random_lm(kind)
    decoder = lm.decoder()
    step, state = decoder.prefill(torch.tensor([0, 1]))
    assert_state(lm, step, [[], []], [0, 1])
    state = decoder.select(state, torch.tensor([0, 1, 1, 0]))
    tokens = torch.tensor([[2], [2], [0], [1]])  # rows 0 and 1: equal continuations of different contexts
    step, state = decoder.extend(state, tokens)
    assert_state(lm, step, tokens.tolist(), [0, 1, 1, 0])
    state = decoder.select(state, torch.tensor([0, 3, 2]))  # compacting: the tail fills the hole
    chunk = torch.tensor([[1, 0], [3, 3], [2, 1]])
    step, state = decoder.extend(state, chunk)
    assert step.logits.shape == (3, 2, 5)
    assert_state(lm, step, [[2, 1, 0], [1, 3, 3], [0, 2, 1]], [0, 0, 1])


def assert_operations(lm):
    decoder = lm.decoder()
    prefix = torch.tensor([[0, 1, 2], [3, 0, 0], [1, 1, 0]])
    step, state = decoder.prefill(torch.tensor([1, 0, 1]), prefix, torch.tensor([3, 1, 2]))
    assert_state(lm, step, [[0, 1, 2], [3], [1, 1]], [1, 0, 1])
    step, state = decoder.extend(state, torch.tensor([[3, 3], [1, 2], [0, 0]]))
    state = decoder.crop(state, torch.tensor([4, 2, 1]))  # a length each
    step, state = decoder.extend(state, torch.tensor([[1], [0], [2]]))
    assert_state(lm, step, [[0, 1, 2, 3, 1], [3, 1, 0], [1, 2]], [1, 0, 1])
    state = decoder.select(state, torch.tensor([2, 2, 1]))
    step, state = decoder.extend(state, torch.tensor([[0, 1], [2, 2], [3, 1]]))
    assert_state(lm, step, [[1, 2, 0, 1], [1, 2, 2, 2], [3, 1, 0, 3, 1]], [1, 1, 0])
    state = decoder.crop(state, torch.tensor([0, 0, 0]))  # back to contexts of different length
    step, state = decoder.extend(state, torch.tensor([[2], [1], [0]]))
    assert_state(lm, step, [[2], [1], [0]], [1, 1, 0])


@pytest.mark.parametrize("kind", CROPPABLE)
def test_prefill_with_prefixes_and_ragged_crops_are_exact(kind):
    assert_operations(random_lm(kind))


@pytest.mark.parametrize("kind", CROPPABLE)
def test_uniform_crop_is_exact_and_copies_nothing(kind):
    lm = random_lm(kind)
    decoder = lm.decoder()
    _, state = decoder.prefill(torch.tensor([0, 1]))
    _, state = decoder.extend(state, torch.tensor([[0, 1, 2], [1, 3, 0]]))
    buffer = state.rows.cache.layers[0].key_buffer
    state = decoder.crop(state, torch.tensor([1, 1]))
    assert state.rows.cache.layers[0].key_buffer is buffer
    step, _ = decoder.extend(state, torch.tensor([[3], [2]]))
    assert_state(lm, step, [[0, 3], [1, 2]], [0, 1])


@torch.no_grad()
def test_masked_holes_are_wrong_on_a_sliding_window():
    """The mutant: rows cut back by masking columns where they stand, not by moving what is left to the right."""
    lm = random_lm("mistral", context=["abab"])
    network = lm.network
    decoder = lm.decoder()
    _, state = decoder.prefill(torch.tensor([0, 0]))
    _, state = decoder.extend(state, torch.tensor([[0, 1, 2], [1, 3, 0]]))
    width = state.rows.width
    mask = torch.ones(2, width + 1, dtype=torch.long)
    mask[1, width - 2 : width] = 0
    positions = torch.tensor([[width], [width - 2]])
    hidden = network.forward(
        torch.tensor([[3], [2]]), split=True, cache=state.rows.cache, mask=mask, positions=positions
    )
    got = torch.log_softmax(lm.project(hidden[:, -1]), -1)
    want = torch.log_softmax(uncached_logits(lm, 0, [1, 2])[-1], -1)
    assert float((got[1] - want).abs().max()) > 0.1
    torch.testing.assert_close(got[0], torch.log_softmax(uncached_logits(lm, 0, [0, 1, 2, 3])[-1], -1))


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_gradients_reach_the_weights_through_the_cache(kind):
    model = build(kind)
    lm = random_lm(kind)
    lm = type(lm)(model, tokenizer=lm.tokenizer, context=["ab", "bacab"], max_new_tokens=3)
    weight = model.model.layers[0].self_attn.k_proj.weight
    decoder = lm.decoder()
    tokens = torch.tensor([[0, 1], [2, 2]])
    step, state = decoder.prefill(torch.tensor([0, 1]))
    first = step.log_probs[:, -1].gather(1, tokens[:, :1])
    step, _ = decoder.extend(state, tokens[:, :1], grad=True)
    total = (first + step.log_probs[:, -1].gather(1, tokens[:, 1:])).sum()
    (got,) = torch.autograd.grad(total, weight)
    want = torch.zeros_like(weight)
    for context in (0, 1):
        length = int(lm.context_lengths[context])
        ids = torch.cat([lm.context_ids[context, -length:], tokens[context]])[None]
        scores = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, length - 1 : -1], -1)
        want += torch.autograd.grad(scores.gather(1, tokens[context][:, None]).sum(), weight)[0]
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3_next"])
def test_what_was_read_without_gradients_serves_a_forward_with_them(kind):
    model = build(kind)
    lm = random_lm(kind)
    lm = type(lm)(model, tokenizer=lm.tokenizer, context=["ab", "bacab"], max_new_tokens=4)
    weight = lm.network.head.weight
    decoder = lm.decoder()
    with torch.no_grad():
        _, state = decoder.prefill(torch.tensor([0, 1]))
        step, state = decoder.extend(state, torch.tensor([[0], [2]]))
    assert not step.hidden.is_inference()
    step.hidden.mul_(2.0)
    step, state = decoder.extend(state, torch.tensor([[1], [2]]), grad=True)
    (got,) = torch.autograd.grad(step.log_probs[:, -1, 0].sum(), weight)
    want = torch.zeros_like(weight)
    for context, added in ((0, [0, 1]), (1, [2, 2])):
        length = int(lm.context_lengths[context])
        ids = torch.cat([lm.context_ids[context, -length:], torch.tensor(added)])[None]
        scores = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, -1], -1)
        want += torch.autograd.grad(scores[0], weight)[0]
    tolerance = TOLERANCE.get(kind, 1e-9)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    assert all(not parameter.is_inference() for parameter in model.parameters())
    assert all(not buffer.is_inference() for buffer in model.buffers())


def test_buffers_that_a_model_replaces_stay_plain():
    """Rotary frequencies that follow the length are made anew in a forward, and may be written afterwards."""
    rotary = {"rope_type": "longrope", "factor": 2.0, "rope_theta": 10_000.0, "original_max_position_embeddings": 4}
    rotary |= {"short_factor": [1.0, 1.0], "long_factor": [2.0, 3.0]}
    model = LlamaForCausalLM(config("llama", 5, rope_parameters=rotary)).double().eval()
    lm = TransformersLM(model, tokenizer=tokenizer(5), context="bacab", max_new_tokens=4)
    before = model.model.rotary_emb.inv_freq.clone()
    lm.draw(3, generator=torch.Generator().manual_seed(0))
    after = model.model.rotary_emb.inv_freq
    assert not torch.equal(before, after)
    assert not after.is_inference()
    after.mul_(1.0)
    with pytest.raises(ContextError, match="changes its rotary frequencies at 4 tokens"):
        TransformersLM(model, tokenizer=tokenizer(5), context=["ab", "bacab"], max_new_tokens=4)


# The layer.


def filled(rows, columns, capacity=0):
    cache = make_cache("buffer", None, capacity)
    states = torch.randn(rows, 2, columns, 3, dtype=torch.float64)
    cache.update(states, -states, 0)
    return cache, states


def test_buffer_grows_by_doubling_and_keeps_what_was_written():
    cache, states = filled(3, 2)
    layer = cache.layers[0]
    grown = [states]
    capacities = set()
    for _ in range(7):
        more = torch.randn(3, 2, 1, 3, dtype=torch.float64)
        grown.append(more)
        keys, values = cache.update(more, -more, 0)
        capacities.add(layer.key_buffer.shape[2])
        assert torch.equal(keys, torch.cat(grown, 2))
        assert torch.equal(values, -torch.cat(grown, 2))
    assert capacities == {4, 8, 16}
    assert layer.get_seq_length() == 9


def test_capacity_is_allocated_once():
    cache, _ = filled(3, 2, capacity=8)
    buffer = cache.layers[0].key_buffer
    for _ in range(6):
        cache.update(torch.zeros(3, 2, 1, 3).double(), torch.zeros(3, 2, 1, 3).double(), 0)
    assert cache.layers[0].key_buffer is buffer


@pytest.mark.parametrize(
    ("index", "in_place"),
    [
        ([0, 3, 2], True),
        ([0, 1], True),
        ([0, 0, 2, 2], True),
        ([1, 0, 2], False),
        ([0, 1, 2, 3, 3], False),
        ([3, 3], True),
    ],
)
def test_selecting_rows(index, in_place):
    cache, states = filled(4, 2)
    (layer,) = cache.buffers
    before = layer.key_buffer.data_ptr()
    select_rows(cache, torch.tensor(index))
    assert torch.equal(layer.keys, states[index])
    assert torch.equal(layer.values, -states[index])
    assert (layer.key_buffer.data_ptr() == before) is in_place
    more = torch.randn(len(index), 2, 1, 3, dtype=torch.float64)
    keys, _ = cache.update(more, -more, 0)
    assert torch.equal(keys, torch.cat([states[index], more], 2))


def test_rows_that_come_back_take_the_room_that_is_left():
    cache, states = filled(4, 2, capacity=8)
    (layer,) = cache.buffers
    select_rows(cache, torch.tensor([0, 3]))
    more = torch.randn(2, 2, 1, 3, dtype=torch.float64)
    cache.update(more, -more, 0)
    before = layer.key_buffer.data_ptr()
    select_rows(cache, torch.tensor([0, 1, 1, 0]))
    want = torch.cat([states[[0, 3]], more], 2)[[0, 1, 1, 0]]
    assert torch.equal(layer.keys, want)
    assert torch.equal(layer.values, -want)
    assert layer.key_buffer.data_ptr() == before
    again = torch.randn(4, 2, 1, 3, dtype=torch.float64)
    keys, _ = cache.update(again, -again, 0)
    assert torch.equal(keys, torch.cat([want, again], 2))


def test_nothing_is_written_in_place_under_autograd():
    layer = BufferedLayer(8)
    first = torch.randn(2, 1, 2, 3, requires_grad=True)
    layer.update(first, first)
    keys, _ = layer.update(first[:, :, :1] * 2, first[:, :, :1])
    keys.sum().backward()
    assert torch.equal(first.grad, torch.tensor([3.0, 1.0])[None, None, :, None].expand(2, 1, 2, 3))


# Facts of transformers that the code rests on.


def test_transformers_refuses_a_positive_crop():
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2), 0)
    with pytest.raises(ValueError, match="positive"):
        cache.crop(2)


def test_a_cache_built_from_a_config_cannot_be_cropped_past_its_window():
    model = network("mistral")
    cache = DynamicCache(config=config("mistral", 5))
    with torch.no_grad():
        model(input_ids=torch.zeros(1, WINDOW + 2, dtype=torch.long), use_cache=True, **{CACHE: cache})
    with pytest.raises(RuntimeError, match="sliding window"):
        cache.crop(-1)


def test_hybrid_caches_select_by_reordering_alone():
    model = network("qwen3_next")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.zeros(2, 4, dtype=torch.long), use_cache=True, **{CACHE: cache})
    with pytest.raises(AttributeError):
        cache.batch_select_indices(torch.tensor([0]))
    cache.reorder_cache(torch.tensor([1, 0, 1]))
    assert cache.layers[1].keys.shape[0] == 3
