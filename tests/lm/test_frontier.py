"""Frontier: it says next what a fresh, uncached forward says, whatever was selected; equal prefixes are read once."""

import pytest
import torch

from lmppl.lm.frontier import Frontier
from lmppl.sequences import Cost
from tests.lm.random_models import random_lm, uncached_logits
from tests.models import ENUMERABLE, enumerable_lm

KINDS = ("llama", "mistral", "gpt2", "gemma3", "qwen3_next")


def random_walk(lm, *, seed, rows=7):
    """Steps and random selections; yields the frontier wherever some row is live."""
    generator = torch.Generator().manual_seed(seed)
    context = torch.arange(lm.num_contexts).repeat_interleave(rows)
    frontier = Frontier(lm, context)
    while len(frontier.live):
        yield frontier
        tokens = torch.randint(lm.vocab_size, (len(frontier.live),), generator=generator)
        frontier.append(tokens)
        frontier.select(torch.randint(len(frontier), (len(frontier),), generator=generator))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_logits_are_those_of_an_uncached_forward(kind, seed):
    lm = random_lm(kind, max_new_tokens=5)
    tolerance = 1e-4 if kind == "qwen3_next" else 1e-9
    for frontier in random_walk(lm, seed=seed):
        logits = frontier.logits()
        for row, got in zip(frontier.live.tolist(), logits, strict=True):
            tokens = frontier.ids[row, : int(frontier.lengths[row])].tolist()
            wanted = uncached_logits(lm, int(frontier.context[row]), tokens)[-1]
            assert torch.allclose(got, wanted, atol=tolerance, rtol=0)


@pytest.mark.parametrize("kind", ENUMERABLE)
def test_scores_along_the_way_add_up_to_the_score_of_the_row(kind):
    lm = enumerable_lm(kind)
    generator = torch.Generator().manual_seed(3)
    frontier = Frontier(lm, torch.tensor([0, 1] * 20))
    total = torch.zeros(40, dtype=lm.dtype)
    while len(live := frontier.live):
        logits = torch.log_softmax(frontier.logits(), -1)
        tokens = torch.randint(lm.vocab_size, (len(live),), generator=generator)
        total[live] += logits.gather(1, tokens[:, None])[:, 0]
        frontier.append(tokens)
    rows = frontier.sequences()
    assert bool(lm.is_outcome(rows).all())
    assert torch.allclose(lm.score(rows), total, atol=1e-10, rtol=0)


def test_equal_prefixes_are_read_once_and_ended_rows_not_at_all():
    lm, cost = random_lm("llama", max_new_tokens=4), Cost()
    frontier = Frontier(lm, torch.tensor([0, 0, 0, 0, 1]), cost=cost)
    assert (cost.lm_forwards, cost.lm_tokens) == (1, int(lm.context_lengths.sum()))
    frontier.logits()
    assert cost.lm_forwards == 1
    frontier.append(torch.tensor([1, 1, 2, 4, 1]))  # token 4 is EOS
    assert frontier.live.tolist() == [0, 1, 2, 4]
    before = cost.copy()
    frontier.logits()
    assert (cost - before).lm_tokens == 3  # 0 and 1 are one row
    assert (cost - before).lm_forwards == 1
    frontier.append(torch.tensor([1, 2, 3, 1]))
    frontier.select(torch.tensor([2, 2, 2, 3, 3]))
    before = cost.copy()
    frontier.logits()
    assert (cost - before).lm_tokens == 1  # only copies of row 2 are live
    assert frontier.live.tolist() == [0, 1, 2]


def test_what_is_dropped_before_the_next_look_costs_nothing():
    lm, cost = random_lm("llama", max_new_tokens=2), Cost()
    frontier = Frontier(lm, torch.tensor([0, 1]), cost=cost)
    frontier.append(torch.tensor([0, 1]))
    frontier.append(torch.tensor([2, 3]))
    assert cost.lm_forwards == 2  # the last token is never read
    assert frontier.sequences().ids.tolist() == [[0, 2], [1, 3]]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_waited_go_on_from_where_they_were(kind):
    lm = random_lm(kind, max_new_tokens=5)
    tolerance = 1e-4 if kind == "qwen3_next" else 1e-9
    generator = torch.Generator().manual_seed(5)
    frontier = Frontier(lm, torch.arange(2).repeat_interleave(6))
    while len(frontier.live):
        for _ in range(2):  # half of the rows wait, then all go on
            frontier.append(torch.randint(lm.vocab_size, (len(frontier.live),), generator=generator))
            everyone = frontier.live.clone()
            frontier.drop(torch.rand(len(everyone), generator=generator) < 0.5)
            if len(frontier.live):
                frontier.append(torch.randint(lm.vocab_size, (len(frontier.live),), generator=generator))
            frontier.select(torch.randint(len(frontier), (len(frontier),), generator=generator))
            open_rows = ~frontier.finished & (frontier.lengths < lm.max_new_tokens)
            frontier.resume(torch.nonzero(open_rows).squeeze(1))
            for row, got in zip(frontier.live.tolist(), frontier.logits(), strict=True):
                tokens = frontier.ids[row, : int(frontier.lengths[row])].tolist()
                wanted = uncached_logits(lm, int(frontier.context[row]), tokens)[-1]
                assert torch.allclose(got, wanted, atol=tolerance, rtol=0)
