"""The decode loop: draws in law, in number of forwards, and in what they cost."""

import math

import pytest
import torch
from scipy import stats

from lmppl.errors import ModelError, SupportTooLarge
from lmppl.lm import LM, TabularLM, decoding
from lmppl.lm.decoding import compacting_index, draw, draw_rows, plan_rows, sample_tokens, token_log_probs
from lmppl.sequences import Cost
from tests.lm.random_models import network, random_lm, tokenizer
from tests.models import ENUMERABLE, enumerable_lm

ERROR_RATE = 1e-4  # of each statistical test here, with its fixed seed


def without_eos(max_new_tokens, context="ab"):
    """Every row runs to the cap."""
    return LM(network("llama"), tokenizer=tokenizer(5, eos=None), context=context, max_new_tokens=max_new_tokens)


# One token.


@pytest.mark.parametrize("one_level", [0, 1 << 30])
@pytest.mark.parametrize("vocab", [1, 2, 5, 16, 17, 300, 1024, 5000])
def test_tokens_invert_the_distribution_function(vocab, one_level, monkeypatch):
    monkeypatch.setattr(decoding, "ONE_LEVEL", one_level)
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(200, vocab, generator=generator, dtype=torch.float64) * 3
    logits[torch.rand(200, vocab, generator=generator) < 0.3] = -torch.inf
    logits[:, 0] = 0.0
    uniforms = torch.rand(200, generator=generator, dtype=torch.float64)
    tokens, log_probs = sample_tokens(logits, uniforms)
    law = torch.softmax(logits, -1)
    upper = law.cumsum(-1).gather(1, tokens[:, None])[:, 0]
    mass = law.gather(1, tokens[:, None])[:, 0]
    assert bool((mass > 0).all())
    assert bool((uniforms <= upper + 1e-12).all())
    assert bool((uniforms >= upper - mass - 1e-12).all())
    torch.testing.assert_close(log_probs, law.log().gather(1, tokens[:, None])[:, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("one_level", [0, 1 << 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_uniform_draws_an_excluded_token(dtype, one_level, monkeypatch):
    monkeypatch.setattr(decoding, "ONE_LEVEL", one_level)
    logits = torch.full((4, 100), -torch.inf, dtype=dtype)
    logits[:, [3, 40, 77]] = torch.tensor([0.0, -5.0, 1.0], dtype=dtype)
    uniforms = torch.tensor([0.0, math.nextafter(1.0, 0.0), 0.27, 0.5], dtype=torch.float64)
    tokens, log_probs = sample_tokens(logits, uniforms)
    assert set(tokens.tolist()) <= {3, 40, 77}
    assert tokens[:2].tolist() == [3, 77]
    assert bool(torch.isfinite(log_probs).all())


@pytest.mark.parametrize("one_level", [0, 1 << 30])
def test_rare_tokens_keep_their_probability_in_float32(one_level, monkeypatch):
    """One token of mass e^-12 among 50,000: a float32 running sum would give it a mass off by percents."""
    monkeypatch.setattr(decoding, "ONE_LEVEL", one_level)
    logits = torch.zeros(1, 50_000)
    logits[0, 49_999] = 10.82 - 12.0
    mass = float(torch.softmax(logits.double(), -1)[0, -1])
    edge = torch.tensor([1.0 - mass * 1.01, 1.0 - mass * 0.99], dtype=torch.float64)
    tokens, _ = sample_tokens(logits.expand(2, -1), edge)
    assert tokens.tolist() == [49_998, 49_999]


# Draws.


def chi_square(lm, num_draws, seed):
    """The p-value of the drawn outcomes of the last context against their probabilities."""
    context = lm.num_contexts - 1
    listed = lm.enumerate_sequences(context)
    place = {key: i for i, key in enumerate(listed.keys())}
    draws = lm.draw(num_draws, generator=torch.Generator().manual_seed(seed))
    rows = draws.select(draws.context == context)
    counts = torch.zeros(len(listed))
    keys = rows.keys()  # of sequences, not of a dictionary
    for key in keys:
        counts[place[key]] += 1
    expected = listed.log_prior.exp() * num_draws
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]]).double()
    wanted = torch.cat([expected[common], expected[~common].sum()[None]]).double()
    keep = wanted > 0
    statistic = float(((observed - wanted)[keep].square() / wanted[keep]).sum())
    return float(stats.chi2.sf(statistic, int(keep.sum()) - 1))


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.7}, {"top_k": 3}, {"top_p": 0.8}, {"stop": "ca"}],
    ids=["plain", "hot", "top_k", "top_p", "stop"],
)
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_outcomes_are_drawn_with_their_probabilities(kind, options):
    assert chi_square(random_lm(kind, **options), 4000, seed=5) > ERROR_RATE


def test_outcomes_of_a_table_are_drawn_with_their_probabilities():
    assert chi_square(TabularLM.random(4, 3, seed=1, context=["a", "bc"]), 4000, seed=5) > ERROR_RATE


def test_a_biased_sampler_would_be_noticed():
    """The mutant of the chi-square test: draws at temperature 1.2 against the law at 1."""
    lm = random_lm("llama")
    listed = lm.enumerate_sequences(1)
    hot = random_lm("llama", temperature=1.2)
    lm.draw = hot.draw
    lm.enumerate_sequences = lambda context: listed
    assert chi_square(lm, 4000, seed=5) < ERROR_RATE


def test_the_same_generator_gives_the_same_draws():
    lm = random_lm("llama", max_new_tokens=6)
    first, second = (lm.draw(20, generator=torch.Generator().manual_seed(9)) for _ in range(2))
    assert torch.equal(first.ids, second.ids)
    assert torch.equal(first.log_prior, second.log_prior)
    other = lm.draw(20, generator=torch.Generator().manual_seed(10))
    assert not torch.equal(first.ids, other.ids)


def test_the_global_generator_is_used_where_none_is_given():
    lm = random_lm("llama")
    torch.manual_seed(3)
    first = lm.draw(5)
    torch.manual_seed(3)
    assert torch.equal(first.ids, lm.draw(5).ids)
    state = torch.get_rng_state()
    lm.draw(5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(state, torch.get_rng_state())


def test_rows_are_ordered_by_context_and_padded_after_their_end():
    lm = random_lm("llama", max_new_tokens=6)
    draws = lm.draw(30, generator=torch.Generator().manual_seed(0))
    assert draws.context.tolist() == [0] * 30 + [1] * 30
    assert bool((draws.ids[~draws.mask] == lm.pad_id).all())
    last = draws.ids.gather(1, draws.lengths[:, None] - 1)[:, 0]
    assert torch.equal(last.eq(4), draws.finished)
    assert bool((draws.finished | draws.lengths.eq(6)).all())
    assert 0 < int(draws.finished.sum()) < 60


def test_no_draws_is_an_error():
    with pytest.raises(ModelError, match="num_draws: got 0"):
        random_lm("llama").draw(0)


# Forwards.


@pytest.mark.parametrize(("num_draws", "batches"), [(8, 1), (16, 2), (20, 3)])
def test_drawing_costs_one_forward_a_token_and_micro_batch(num_draws, batches):
    lm, cost = without_eos(7), Cost()
    draw(lm, num_draws, cost=cost, batch_size=8)
    assert cost.lm_forwards == 7 * batches
    assert cost.lm_tokens == 2 * batches + num_draws * 6  # the context once a micro-batch, the last token never


def test_finished_rows_cost_nothing_more():
    lm, cost = random_lm("llama", max_new_tokens=12), Cost()
    draws = draw_rows(lm, torch.zeros(50, dtype=torch.int64), generator=torch.Generator().manual_seed(0), cost=cost)
    assert int(draws.lengths.max()) > int(draws.lengths.min())
    assert cost.lm_tokens == 2 + int(draws.lengths.sum()) - 50
    assert cost.lm_forwards == int(draws.lengths.max())


def test_a_context_is_read_once_a_micro_batch():
    lm, cost = without_eos(2, context=["ab", "bacab"]), Cost()
    draw(lm, 10, cost=cost)
    assert cost.lm_tokens == 2 + 5 + 20


def test_scoring_costs_two_forwards_a_micro_batch():
    lm = without_eos(7)
    draws, cost = lm.draw(9), Cost()
    lm.score(draws)
    token_log_probs(lm, draws, cost=cost, batch_size=3)
    assert cost.lm_forwards == 6
    assert cost.lm_tokens == 3 * 2 + 9 * 6


def test_scoring_counts_no_padding():
    lm, cost = LM(network("llama"), tokenizer=tokenizer(5), context="ab", max_new_tokens=7), Cost()
    eos = lm.eos_ids[0]
    rows = lm.sequences([[eos], [0, 0, eos], [0] * 7])
    token_log_probs(lm, rows, cost=cost, batch_size=3)
    assert cost.lm_tokens == 2 + (0 + 2 + 6)


def test_micro_batches_depend_on_the_model_and_the_budget_alone():
    lm = without_eos(7)
    row = lm.bytes_per_row(7)
    assert plan_rows(lm, 100, budget=10 * row) == 10
    assert plan_rows(lm, 5, budget=10 * row) == 5
    assert plan_rows(lm, 100, budget=1) == 1


def test_micro_batches_are_of_even_size(monkeypatch):
    from lmppl.lm import decoding

    lm, sizes = without_eos(2), []
    whole = decoding.draw_rows
    monkeypatch.setattr(decoding, "plan_rows", lambda *_: 8)
    monkeypatch.setattr(decoding, "draw_rows", lambda lm, rows, **kw: sizes.append(len(rows)) or whole(lm, rows, **kw))
    assert len(draw(lm, 9)) == 9
    assert sizes == [5, 4]


def test_scoring_never_holds_the_scores_of_all_positions():
    """The head is asked for at most `chunk` scores at a time."""
    lm = without_eos(7)
    draws = lm.draw(40)
    decoder = lm.decoder()
    _, state = decoder.prefill(torch.zeros(40, dtype=torch.int64))
    step, _ = decoder.extend(state, draws.ids[:, :-1])
    asked = []
    counted = type(step)(lambda rows: asked.append(len(rows)) or lm.project(rows), step.hidden)
    got = counted.log_prob_of(draws.ids[:, 1:], chunk=50)
    assert max(asked) <= 10
    torch.testing.assert_close(got, step.log_probs.gather(2, draws.ids[:, 1:, None])[..., 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_scores_can_be_differentiated(kind):
    lm = random_lm(kind)
    draws = lm.draw(6, generator=torch.Generator().manual_seed(0))
    weight = lm.network.model.model.layers[0].self_attn.v_proj.weight
    (got,) = torch.autograd.grad(token_log_probs(lm, draws, grad=True).sum(), weight)
    want = torch.zeros_like(weight)
    for context, row in zip(draws.context.tolist(), draws.token_lists(), strict=True):
        start = int(lm.context_lengths[context])
        ids = torch.tensor([[*lm.context_ids[context, -start:].tolist(), *row]])
        law = torch.log_softmax(lm.network.model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1], -1)
        want += torch.autograd.grad(law.gather(1, ids[0, start:, None]).sum(), weight)[0]
    # Their norms are computed in float32, so that gradients summed in another order differ by float32's rounding.
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert not token_log_probs(lm, draws).requires_grad


# Helpers.


def test_compaction_moves_the_tail_into_the_holes():
    over = torch.tensor([False, True, False, True, False, True, False])
    index = compacting_index(over)
    assert sorted(index.tolist()) == [0, 2, 4, 6]
    assert index.tolist() == [0, 4, 2, 6]
    assert compacting_index(torch.zeros(3, dtype=torch.bool)).tolist() == [0, 1, 2]
    assert compacting_index(torch.ones(3, dtype=torch.bool)).tolist() == []


def test_enumeration_is_guarded():
    with pytest.raises(SupportTooLarge, match="more than 20 outcomes"):
        random_lm("llama").enumerate_sequences(max_sequences=20)


def test_scoring_nothing_gives_nothing():
    lm = random_lm("llama")
    assert lm.score(lm.draw(3).select([])).shape == (0,)


@pytest.mark.parametrize("kind", ENUMERABLE)
def test_enumeration_in_chunks_finds_what_one_batch_finds(kind, monkeypatch):
    lm = enumerable_lm(kind)
    whole = lm.enumerate_sequences(1)
    monkeypatch.setattr(decoding, "plan_rows", lambda lm, rows, **options: 3)
    chunked = lm.enumerate_sequences(1)
    order = {key: row for row, key in enumerate(chunked.keys())}
    assert len(order) == len(whole)
    rows = list(map(order.__getitem__, whole.keys()))
    torch.testing.assert_close(chunked.log_prior[rows], whole.log_prior, rtol=0, atol=1e-10)
