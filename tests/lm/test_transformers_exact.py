"""Exact identities by brute force over all V^T rows, on tables and tiny random networks, through the real decoder."""

import itertools
import math

import pytest
import torch

from lmppl.lm import TabularLM, TransformersLM
from lmppl.lm.decoding import draw, token_log_probs
from tests.lm.random_models import KINDS, build, random_lm, tokenizer, uncached_logits

OPTIONS = {
    "pad equals eos": {},
    "pad of its own": {"pad": "<pad>"},
    "cold": {"temperature": 0.4},
    "hot": {"temperature": 2.5},
    "stop": {"stop": ["ca", "d"]},
    "top_k": {"top_k": 2},
    "top_p": {"top_p": 0.6},
    "everything": {"temperature": 0.7, "top_k": 4, "top_p": 0.9, "stop": "bb"},
    "one context": {"context": "dab"},
}
# Parts that these compute in float32 whatever their weights: the recurrence, or the softmax of their attention.
TOLERANCE = {"qwen3_next": 1e-4, "gemma2": 1e-5, "granite": 1e-5}


def all_rows(lm):
    rows = itertools.product(range(lm.vocab_size), repeat=lm.max_new_tokens)
    return torch.tensor(list(rows))[:, None].expand(-1, lm.num_contexts, -1)


def reference_law(logits, temperature=1.0, top_k=None, top_p=None):
    """log p of each token by plain arithmetic, ties to the lower id."""
    scores = [value / temperature for value in logits.tolist()]
    top = max(scores)
    mass = [math.exp(value - top) for value in scores]
    order = sorted(range(len(mass)), key=lambda i: (-mass[i], i))[:top_k]
    if top_p is not None:
        total, before, kept = sum(mass[i] for i in order), 0.0, []
        for i in order:
            if kept and before >= top_p * total:
                break
            kept.append(i)
            before += mass[i]
        order = kept
    total = sum(mass[i] for i in order)
    return [math.log(mass[i] / total) if i in order else -math.inf for i in range(len(mass))]


def reference(lm, context, row, stop=(), **law):
    """log p of one padded row: −inf unless it is an outcome in its one form."""
    total, text = 0.0, ""
    logits = uncached_logits(lm, context, row)
    for step, token in enumerate(row):
        total += reference_law(logits[step], **law)[token]
        text += lm.tokenizer.decode([token], skip_special_tokens=True)
        if token in lm.eos_ids or any(s in text for s in stop):
            return total if all(t == lm.pad_id for t in row[step + 1 :]) else -math.inf
    return total


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_every_row_has_the_probability_that_the_declaration_says(kind, options):
    lm = random_lm(kind, **options)
    rows = all_rows(lm)
    got = lm.log_prob(rows)
    law = {k: v for k, v in options.items() if k in ("temperature", "top_k", "top_p")}
    stop = options.get("stop", ())
    stop = (stop,) if isinstance(stop, str) else stop
    for context in range(lm.num_contexts):
        want = [reference(lm, context, row, stop, **law) for row in rows[:, context].tolist()]
        torch.testing.assert_close(got[:, context], torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(got.exp().sum(0), torch.ones(lm.num_contexts).double(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["gpt2", "gemma3", "gemma2", "granite", "qwen3_next"])
def test_probabilities_sum_to_one_on_other_architectures(kind):
    lm = random_lm(kind)
    rows = all_rows(lm)
    got = lm.log_prob(rows)
    torch.testing.assert_close(got.exp().sum(0), torch.ones(2).double(), rtol=0, atol=1e-10)
    for context in (0, 1):
        want = torch.tensor([reference(lm, context, row) for row in rows[::7, context].tolist()], dtype=torch.float64)
        torch.testing.assert_close(got[::7, context], want, rtol=0, atol=TOLERANCE.get(kind, 1e-10))


def test_several_eos_ids_are_united():
    model = build("llama")
    model.generation_config.eos_token_id = [2]
    model.config.eos_token_id = 3
    lm = TransformersLM(model, tokenizer=tokenizer(), context=["ab", "bacab"], max_new_tokens=3)
    assert lm.eos_ids == (2, 3, 4)
    rows = all_rows(lm)
    got = lm.log_prob(rows)
    want = torch.tensor([reference(lm, 1, row) for row in rows[:, 1].tolist()], dtype=torch.float64)
    torch.testing.assert_close(got[:, 1], want, rtol=0, atol=1e-10)
    torch.testing.assert_close(got.exp().sum(0), torch.ones(2).double(), rtol=0, atol=1e-10)


def test_without_any_eos_every_row_runs_to_the_cap():
    letters = tokenizer(5, eos=None)
    lm = TransformersLM(build("llama"), tokenizer=letters, context=["ab", "c"], max_new_tokens=3)
    assert lm.eos_ids == ()
    got = lm.log_prob(all_rows(lm))
    assert bool(torch.isfinite(got).all())
    torch.testing.assert_close(got.exp().sum(0), torch.ones(2).double(), rtol=0, atol=1e-10)


def test_nothing_of_the_generation_config_but_eos_counts():
    model = build("llama")
    lm = TransformersLM(model, tokenizer=tokenizer(), context=["ab"], max_new_tokens=2)
    before = lm.log_prob(all_rows(lm))
    changes = {"temperature": 0.1, "top_k": 1, "top_p": 0.2, "repetition_penalty": 3.0, "min_new_tokens": 2}
    for name, value in changes.items():
        setattr(model.generation_config, name, value)
    again = TransformersLM(model, tokenizer=tokenizer(), context=["ab"], max_new_tokens=2)
    assert torch.equal(again.log_prob(all_rows(again)), before)


@pytest.fixture(params=["tabular", *KINDS, "mistral, truncated and stopped"])
def lm(request):
    if request.param == "tabular":
        return TabularLM.random(4, 3, order=2, seed=3, context=["a", "bca"])
    if request.param in KINDS:
        return random_lm(request.param)
    return random_lm("mistral", stop="ca", top_k=4, temperature=1.3)


def tolerance(lm):
    return 1e-4 if isinstance(lm, TransformersLM) and lm.abilities.cache == "config" else 1e-10


def test_enumeration_lists_exactly_the_rows_of_positive_probability(lm):
    rows = all_rows(lm)
    scores = lm.log_prob(rows)
    for context in range(lm.num_contexts):
        listed = lm.enumerate_sequences(context)
        found = dict(zip(map(tuple, listed.ids.tolist()), listed.log_prior.tolist(), strict=True))
        assert len(found) == len(listed)
        positive = torch.isfinite(scores[:, context])
        want = dict(zip(map(tuple, rows[positive, context].tolist()), scores[positive, context].tolist(), strict=True))
        assert found == pytest.approx(want, abs=tolerance(lm))


def test_what_is_drawn_is_what_is_scored(lm):
    draws = lm.draw(40, generator=torch.Generator().manual_seed(1))
    assert draws.context.tolist() == [0] * 40 + [1] * 40
    torch.testing.assert_close(lm.score(draws), draws.log_prior, rtol=0, atol=tolerance(lm))
    assert bool(lm.is_outcome(draws).all())
    by_context = draws.ids.view(lm.num_contexts, 40, -1).transpose(0, 1)
    got = lm.log_prob(by_context).T.reshape(-1)
    torch.testing.assert_close(got, draws.log_prior, rtol=0, atol=tolerance(lm))


def test_batches_of_one_give_what_large_batches_give(lm):
    draws = lm.draw(6, generator=torch.Generator().manual_seed(2))
    one, many = (token_log_probs(lm, draws, batch_size=size) for size in (1, 100))
    torch.testing.assert_close(one, many, rtol=0, atol=tolerance(lm))
    seeded = [torch.Generator().manual_seed(3) for _ in range(2)]
    torch.testing.assert_close(
        draw(lm, 1, generator=seeded[0]).log_prior, draw(lm, 1, generator=seeded[1]).log_prior, rtol=0, atol=0
    )


def test_other_contexts_share_everything_else(lm):
    swapped = lm.with_contexts(["bca", "a", "bca"])
    assert swapped.num_contexts == 3
    rows = all_rows(swapped)
    scores = swapped.log_prob(rows)
    torch.testing.assert_close(scores[:, 0], scores[:, 2], rtol=0, atol=tolerance(lm))
    alone = lm.with_contexts(["a"])
    torch.testing.assert_close(scores[:, 1], alone.log_prob(rows[:, :1])[:, 0], rtol=0, atol=tolerance(lm))
    assert lm.num_contexts == 2
