"""Log-probabilities written out token by token, from tables and from uncached forwards, for the tests of LM factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmppl.lm.base import LanguageModel
from lmppl.lm.tabular import TabularLM
from lmppl.lm.transformers import TransformersLM
from lmppl.modeling.factors import Incremental, start_incremental
from tests.lm.random_models import uncached_logits


def next_log_probs(lm: LanguageModel, context: int, row: Sequence[int]) -> Tensor:
    """(L + 1, V) log p of the next token before and after each token of `row`, which may be longer than the cap."""
    if isinstance(lm, TabularLM):
        state = int(lm.initial[context])
        tables = [lm.log_table[state]]
        for token in row:
            state = int(lm.next_state[state, token])
            tables.append(lm.log_table[state])
        return torch.stack(tables)
    assert isinstance(lm, TransformersLM)
    return torch.log_softmax(uncached_logits(lm, context, list(row)), -1)


def token_log_probs(lm: LanguageModel, context: int, row: Sequence[int]) -> list[float]:
    """log p of each token of `row` given those before it."""
    return [float(p[token]) for p, token in zip(next_log_probs(lm, context, row), row, strict=False)]


def log_prob(lm: LanguageModel, context: int, row: Sequence[int]) -> float:
    """Σ_t log p(x_t|c, x_<t)."""
    return sum(token_log_probs(lm, context, row))


def walk(form: Incremental, lm: LanguageModel, context: Tensor, rows: Tensor) -> object:
    """The form's state after `rows` (B, t) of the LM, read token by token through the decoder."""
    decoder = lm.decoder()
    with torch.no_grad():
        step, cache = decoder.prefill(context)
        state = start_incremental(form, context, step)
        for token in rows.unbind(1):
            step, cache = decoder.extend(cache, token[:, None])
            state = form.advance(state, token, step)
    return state


def states_agree(form: Incremental, lm: LanguageModel, context: Tensor, rows: Tensor, tolerance: float) -> None:
    """States are never changed: old ones, selected and cut ones answer as those that are made anew."""
    old = walk(form, lm, context, rows[:, :1])
    before = form.weigh(old, None)
    step = lm.decoder().prefill(context, rows)[0]
    new = form.advance(old, rows[:, 1], lm.decoder().prefill(context, rows[:, :2])[0])
    other = form.advance(old, rows[:, 0], lm.decoder().prefill(context, rows[:, [0, 0]])[0])
    assert step is not None
    assert float((form.weigh(old, None) - before).abs().max()) < tolerance
    for state, tokens in ((new, rows[:, :2]), (other, rows[:, [0, 0]])):
        fresh = walk(form, lm, context, tokens)
        _same(form, state, fresh, tolerance)
    index, lengths = torch.tensor([2, 0, 1, 1]), torch.tensor([1, 2, 0, 1])
    cut = form.crop(form.select(walk(form, lm, context, rows), index), lengths)
    for i, (row, n) in enumerate(zip(index.tolist(), lengths.tolist(), strict=True)):
        fresh = walk(form, lm, context[row : row + 1], rows[row : row + 1, :n])
        _same(form, form.select(cut, torch.tensor([i])), fresh, tolerance)


def _same(form: Incremental, state: object, fresh: object, tolerance: float) -> None:
    assert float((form.potential(state) - form.potential(fresh)).abs().max()) < tolerance
    assert float((form.weigh(state, None) - form.weigh(fresh, None)).abs().max()) < tolerance
