"""The shelf: what it says of rows that were kept, cut back and regenerated is what uncached forwards say."""

import pytest
import torch

from lmppl.lm.derived import TemperedLM
from lmppl.lm.randomness import Source
from lmppl.lm.shelf import Shelf
from lmppl.sequences import Cost
from tests.lm.random_models import KINDS, random_lm, uncached_logits
from tests.models import enumerable_lm

ROWS = 12


def tolerance(kind):
    return 1e-4 if kind == "qwen3_next" else 1e-9


def started(lm, seed=0, cost=None):
    """A shelf with a whole row each, two contexts in turn; its rows, and the source."""
    source = Source(torch.Generator().manual_seed(seed))
    shelf = Shelf(lm, torch.tensor([0, 1] * (ROWS // 2)), cost=cost)
    rows = torch.arange(ROWS)
    empty = torch.zeros(ROWS, lm.max_new_tokens, dtype=torch.int64)
    new = shelf.regenerate(rows, torch.zeros_like(rows), empty, source)
    shelf.adopt(new.pending, torch.ones(ROWS, dtype=torch.bool))
    return shelf, new.ids, new.lengths, source


def uncached(lm, context, ids, lengths):
    """(B, T) log-probabilities, each row by a forward of its own without cache or padding."""
    result = torch.zeros(ids.shape, dtype=torch.float64)
    for row, (c, n) in enumerate(zip(context.tolist(), lengths.tolist(), strict=True)):
        tokens = ids[row, :n].tolist()
        log_p = torch.log_softmax(uncached_logits(lm, c, tokens), -1)
        result[row, :n] = log_p[torch.arange(n), ids[row, :n]].double()
    return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(2))
def test_a_random_history_scores_as_uncached_forwards_do(kind, seed):
    """Regenerate from anywhere, force tails, accept some, resample chains: laws and scores stay those of the rows."""
    lm = random_lm(kind, max_new_tokens=5)
    shelf, ids, lengths, source = started(lm, seed)
    generator = torch.Generator().manual_seed(seed)
    rows, T = torch.arange(ROWS), lm.max_new_tokens
    for round_ in range(8):
        keep = source.integers(lengths)
        new = shelf.regenerate(rows, keep, ids, source)
        parsed = lm.parse(new.ids, shelf.context)
        assert torch.equal(parsed.lengths, new.lengths)
        assert torch.equal(parsed.finished, new.finished)
        same = (new.ids == ids) | (torch.arange(T) >= keep[:, None])
        assert bool(same.all())
        expected = uncached(lm, shelf.context, new.ids, new.lengths)
        assert torch.allclose(shelf.pending_log_probs(new.pending), expected, atol=tolerance(kind), rtol=0)
        forced = shelf.force(rows, keep, new.ids, new.lengths) if round_ % 2 else new.pending
        assert torch.allclose(shelf.pending_log_probs(forced), expected, atol=tolerance(kind), rtol=0)
        scored = shelf.score_tails(rows, keep, ids, lengths)
        before = shelf.log_probs(rows, lengths)
        tail = torch.where(torch.arange(T) >= keep[:, None], before, 0.0).sum(1)
        assert torch.allclose(scored, tail, atol=10 * tolerance(kind), rtol=0)
        accepted = torch.rand(ROWS, generator=generator) < 0.6
        shelf.adopt(forced, accepted)
        ids = torch.where(accepted[:, None], new.ids, ids)
        lengths = torch.where(accepted, new.lengths, lengths)
        index = torch.randint(ROWS // 2, (ROWS,), generator=generator) * 2 + torch.arange(ROWS) % 2
        shelf.select(index)
        ids, lengths = ids[index], lengths[index]
        at = source.integers(lengths)
        for row in range(ROWS):
            wanted = uncached_logits(lm, int(shelf.context[row]), ids[row, : int(at[row])].tolist())[-1]
            assert torch.allclose(shelf.logits(rows[row : row + 1], at[row : row + 1])[0], wanted, atol=tolerance(kind))


@pytest.mark.parametrize("kind", ["tabular", *KINDS])
def test_what_it_keeps_and_what_it_reads_again(kind):
    lm = enumerable_lm("tabular") if kind == "tabular" else random_lm(kind)
    kept = Shelf(lm, torch.tensor([0])).store is not None
    assert kept is (kind != "qwen3_next")


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_equal_continuations_of_different_contexts_stay_apart(kind):
    lm = random_lm(kind, max_new_tokens=4)
    shelf = Shelf(lm, torch.tensor([0, 1, 0, 1]))
    rows, keep = torch.arange(4), torch.zeros(4, dtype=torch.int64)
    ids, lengths = torch.tensor([[1, 0, 2, 3]] * 4), torch.full((4,), 4)
    forced = shelf.force(rows, keep, ids, lengths)
    expected = uncached(lm, shelf.context, ids, lengths)
    assert torch.allclose(shelf.pending_log_probs(forced), expected, atol=1e-9)
    assert float((expected[0] - expected[1]).abs().max()) > 0.1


def test_forgotten_tails_are_read_again():
    lm = random_lm("llama", max_new_tokens=5)
    shelf, _, _, _ = started(lm)
    rows, other = torch.arange(ROWS), lm.draw(ROWS // 2, generator=torch.Generator().manual_seed(9))
    order = torch.argsort(torch.arange(ROWS) % (ROWS // 2), stable=True)  # contexts in turn
    other = other.select(order)
    assert torch.equal(other.context, shelf.context)
    shelf.forget(rows, torch.zeros_like(rows))
    shelf.catch_up(rows, other.lengths, other.ids, other.lengths)
    expected = uncached(lm, shelf.context, other.ids, other.lengths)
    assert torch.allclose(shelf.log_probs(rows, other.lengths), expected, atol=1e-9)


def test_regenerating_n_tokens_reads_n_minus_one():
    lm, cost = random_lm("llama", max_new_tokens=6), Cost()
    shelf, ids, lengths, source = started(lm, cost=cost)
    keep = (lengths - 2).clamp_min(0)
    before = cost.copy()
    new = shelf.regenerate(torch.arange(ROWS), keep, ids, source)
    spent = cost - before
    assert spent.lm_tokens == int((new.lengths - keep - 1).sum())
    assert spent.lm_forwards == int((new.lengths - keep - 1).max())
    before = cost.copy()
    shelf.force(torch.arange(ROWS), keep, new.ids, new.lengths)
    assert (cost - before).lm_forwards == 1
    assert (cost - before).lm_tokens == int((new.lengths - keep - 1).sum())


def test_entropies_are_those_of_the_laws():
    lm = random_lm("mistral", max_new_tokens=4)
    shelf, ids, lengths, _ = started(lm)
    got = shelf.entropies(shelf.slot, lengths)
    for row in range(ROWS):
        tokens = ids[row, : int(lengths[row])].tolist()
        log_p = torch.log_softmax(uncached_logits(lm, int(shelf.context[row]), tokens), -1)[:-1]
        wanted = -(log_p.exp() * log_p).sum(1)
        assert torch.allclose(got[row, : len(tokens)], wanted.double(), atol=1e-9)
        assert bool((got[row, len(tokens) :] == 0).all())


def test_barred_tokens_are_not_drawn_and_the_law_is_renormalised():
    lm = random_lm("llama", max_new_tokens=6)
    shelf, ids, lengths, source = started(lm)
    rows, keep = torch.arange(ROWS), torch.zeros(ROWS, dtype=torch.int64)
    barred = torch.zeros(lm.vocab_size, dtype=torch.bool)
    barred[list(lm.eos_ids)] = True
    new = shelf.regenerate(rows, keep, ids, source, until=torch.full_like(keep, 4), barred=barred)
    assert bool((new.lengths == 4).all())
    assert not bool(new.finished.any())
    for row in range(ROWS):
        tokens = new.ids[row, :4].tolist()
        raw = uncached_logits(lm, int(shelf.context[row]), tokens)[:4]
        law = torch.log_softmax(raw.masked_fill(barred, -torch.inf), -1)[torch.arange(4), tokens]
        assert torch.allclose(new.log_q[row, :4], law.double(), atol=1e-9)
    assert float((shelf.pending_log_probs(new.pending) - new.log_q).abs().max()) > 1e-3
    assert len(lengths) == ROWS


def test_a_tempered_lm_keeps_its_rows_too():
    base = random_lm("llama", max_new_tokens=4)
    lm = TemperedLM(base, 0.5)
    shelf, ids, lengths, _ = started(lm)
    assert shelf.store is not None
    rows = lm.parse(ids, shelf.context)
    assert torch.equal(rows.lengths, lengths)
    assert torch.allclose(shelf.log_probs(torch.arange(ROWS), lengths), lm.token_log_probs(rows), atol=1e-9)
