"""The decode loop: the only place that generates or teacher-forces tokens, for every language model.

Drawing keeps log p(x_t|c, x_<t) of the token it draws, from the same forward. Rows of one micro-batch share one decoder
state; finished rows are compacted out of it; a context is prefilled once in a micro-batch and expanded. Micro-batches
have a size that is fixed before the first forward, so that the same seed repeats the same draws.

Forwards run on the LM's device. What comes out of here lives on the CPU: evidence, weights and diagnostics are float64,
which some accelerators lack, and cost nothing beside a forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmppl.errors import ModelError, UnsupportedModel
from lmppl.lm.base import LanguageModel, guard_support
from lmppl.lm.decoder import Decoder, State, Step
from lmppl.sequences import Cost, Draws, Sequences, concatenate

__all__ = [
    "CountingDecoder",
    "draw",
    "draw_rows",
    "enumerate_outcomes",
    "hidden_states",
    "plan_rows",
    "sample_tokens",
    "token_log_probs",
]

MEMORY_BUDGET = 1 << 30  # bytes that one micro-batch may take
ONE_LEVEL = 1 << 16  # next-token scores up to which summing all of them at once is faster than in blocks
SCORED_POSITIONS = 2048  # tokens in one teacher-forced micro-batch; twice as many: twice the memory, 3 % less time


class CountingDecoder:
    """A decoder that adds what it does to a `Cost`: one forward a call, its positions without padding as tokens."""

    def __init__(self, lm: LanguageModel, cost: Cost) -> None:
        self.decoder: Decoder = lm.decoder()
        self.capabilities = self.decoder.capabilities
        self.cost = cost
        self._context_lengths = lm.context_lengths
        # A decoder that runs more networks than the one that a call counts (a guide, gradient steps) counts those.
        count_into = getattr(self.decoder, "count_into", None)
        if count_into is not None:
            count_into(cost)

    def prefill(
        self, context: Tensor, prefix: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Step, State]:
        """As `Decoder.prefill`."""
        self.cost.lm_forwards += 1
        self.cost.lm_tokens += int(self._context_lengths[context.cpu()].sum())
        if prefix is not None:
            self.cost.lm_tokens += prefix.numel() if lengths is None else int(lengths.sum())
        return self.decoder.prefill(context, prefix, lengths)

    def extend(
        self, state: State, tokens: Tensor, *, grad: bool = False, count: int | None = None
    ) -> tuple[Step, State]:
        """As `Decoder.extend`; `count` of the tokens are no padding, by default all."""
        self.cost.lm_forwards += 1
        self.cost.lm_tokens += tokens.numel() if count is None else count
        return self.decoder.extend(state, tokens, grad=grad)

    def crop(self, state: State, lengths: Tensor) -> State:
        """As `Decoder.crop`."""
        return self.decoder.crop(state, lengths)

    def select(self, state: State, index: Tensor) -> State:
        """As `Decoder.select`."""
        return self.decoder.select(state, index)


def plan_rows(lm: LanguageModel, num_rows: int, *, budget: int = MEMORY_BUDGET) -> int:
    """Rows in one micro-batch: as many as `budget` bytes hold, at least 1, at most `num_rows`.

    Depends on the LM's shape and the budget alone, never on the memory that happens to be free.
    """
    return max(1, min(num_rows, budget // lm.bytes_per_row(lm.max_new_tokens)))


def _even(num_rows: int, size: int) -> int:
    """A micro-batch of at most `size` rows with which the last one is about as large as the others."""
    batches = -(-num_rows // size)
    return -(-num_rows // batches)


def sample_tokens(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token a row from softmax(logits) by inverting its distribution function, and score it.

    The distribution function is summed in two levels of about √V entries, blocks first and then inside one block, or at
    once where there are few scores; in float64 (float32 on devices without it): one pass of exponentials, and tail
    tokens keep their probability to float32's relative, not absolute, precision.

    Parameters
    ----------
    logits : Tensor (B, V)
        Unnormalised log-probabilities; −inf excludes a token.
    uniforms : Tensor (B,), float64
        In [0, 1), one a row.

    Returns
    -------
    tokens : Tensor (B,), int64
    log_probs : Tensor (B,)
        log softmax(logits) at the tokens, in nats.
    """
    rows, vocab = logits.shape
    wide = _wide(logits.device)
    if rows * vocab <= ONE_LEVEL:
        return _sample_in_one_level(logits, uniforms.to(wide))
    size = 1 << max(4, (vocab.bit_length() + 1) // 2)
    blocks = -(-vocab // size)
    top = logits.amax(-1, keepdim=True)
    mass = logits.new_empty(rows, blocks * size)
    torch.sub(logits, top, out=mass[:, :vocab])
    mass[:, :vocab].exp_()
    mass[:, vocab:] = 0.0
    mass = mass.view(rows, blocks, size)
    edges = mass.sum(-1).to(wide).cumsum(-1)
    total = edges[:, -1:]
    target = uniforms.to(wide)[:, None] * total
    block = _invert(edges, target)
    below = torch.where(block > 0, edges.gather(1, (block - 1).clamp_min(0)), 0.0)
    inner = mass[torch.arange(rows, device=logits.device), block[:, 0]].to(wide).cumsum(-1)
    share = (target - below) / (edges.gather(1, block) - below)
    token = block * size + _invert(inner, share * inner[:, -1:])
    log_probs = (logits.gather(1, token) - top).to(wide) - total.log()
    return token[:, 0], log_probs[:, 0].to(logits.dtype)


def _sample_in_one_level(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """As `sample_tokens`, with one sum over the vocabulary: a third of the operations, each on more numbers."""
    top = logits.amax(-1, keepdim=True)
    edges = (logits - top).exp_().cumsum(-1, dtype=uniforms.dtype)
    total = edges[:, -1:]
    token = _invert(edges, uniforms[:, None] * total)
    log_probs = (logits.gather(1, token) - top).to(uniforms.dtype) - total.log()
    return token[:, 0], log_probs[:, 0].to(logits.dtype)


def _wide(device: torch.device) -> torch.dtype:
    """The widest floating dtype that the device has."""
    return torch.float32 if device.type == "mps" else torch.float64


def _invert(edges: Tensor, target: Tensor) -> Tensor:
    """First index whose edge exceeds the target.

    Rounding can lift a target to the last edge, which then stands for the last index of positive mass.
    """
    index = torch.searchsorted(edges, target, right=True)
    if bool((index == edges.shape[1]).any()):
        last = (edges < edges[:, -1:]).sum(-1, keepdim=True)
        return torch.minimum(index, last)
    return index


def draw(
    lm: LanguageModel,
    num_draws: int,
    *,
    generator: torch.Generator | None = None,
    cost: Cost | None = None,
    batch_size: int | None = None,
) -> Draws:
    """`num_draws` exact draws for each context of `lm`, rows ordered by context. See `LanguageModel.draw`."""
    if num_draws < 1:
        raise ModelError(f"num_draws: got {num_draws}, expected at least 1")
    context = torch.arange(lm.num_contexts).repeat_interleave(num_draws)
    size = batch_size or _even(len(context), plan_rows(lm, len(context)))
    parts = [draw_rows(lm, rows, generator=generator, cost=cost) for rows in context.split(size)]
    return concatenate(parts, pad_id=lm.pad_id)


def draw_rows(
    lm: LanguageModel, context: Tensor, *, generator: torch.Generator | None = None, cost: Cost | None = None
) -> Draws:
    """One micro-batch: a draw for each entry of `context` (B,), with its log-probability.

    Costs one forward for the prefill of the distinct contexts and one for each further token, until the last row ends.
    """
    decoder = CountingDecoder(lm, Cost() if cost is None else cost)
    batch, horizon, device = len(context), lm.max_new_tokens, lm.device
    where = generator.device if generator is not None else torch.device("cpu")
    uniforms = (
        torch.rand(horizon, batch, dtype=_wide(where), generator=generator, device=where).to(_wide(device)).to(device)
    )
    context = context.to(device)
    ids = torch.full((batch, horizon), lm.pad_id, dtype=torch.int64, device=device)
    lengths = torch.full((batch,), horizon, dtype=torch.int64, device=device)
    finished = torch.zeros(batch, dtype=torch.bool, device=device)
    log_p = torch.zeros(batch, dtype=lm.dtype, device=device)

    with torch.no_grad():
        distinct, row_of = torch.unique(context, return_inverse=True)
        step, state = decoder.prefill(distinct)
        logits = step.logits[:, -1][row_of]
        state = decoder.select(state, row_of)
        live = torch.arange(batch, device=device)
        for t in range(horizon):
            tokens, token_log_p = sample_tokens(logits, uniforms[t, live])
            ids[live, t] = tokens
            log_p[live] += token_log_p
            so_far = ids[:, : t + 1] if len(live) == batch else ids[live, : t + 1]  # the first is no copy
            over = lm.ended(so_far, t)
            if t + 1 < horizon and bool(over.any()):
                keep = compacting_index(over)
                lengths[live[over]] = t + 1
                finished[live[over]] = True
                live, tokens = live[keep], tokens[keep]
                if len(live) == 0:
                    break
                state = decoder.select(state, keep)
            elif t + 1 == horizon:
                finished[live[over]] = True
                break
            step, state = decoder.extend(state, tokens[:, None])
            logits = step.logits[:, -1]

    if not bool(torch.isfinite(log_p).all()):
        raise ModelError(f"{lm!r} gave next-token scores that are nan or +inf: its weights or dtype are broken")
    rows = Draws(ids, lengths, finished, context, lm.prompts, lm.decode, log_prior=log_p, log_q=log_p)
    return rows.to("cpu")


def compacting_index(over: Tensor) -> Tensor:
    """Live rows, in an order that moves as few as possible: the tail's live rows fill the holes of the head."""
    count = int((~over).sum())
    index = torch.arange(count, device=over.device)
    holes = torch.nonzero(over[:count]).squeeze(1)
    index[holes] = count + torch.nonzero(~over[count:]).squeeze(1)
    return index


def token_log_probs(
    lm: LanguageModel,
    sequences: Sequences,
    *,
    cost: Cost | None = None,
    batch_size: int | None = None,
    grad: bool = False,
) -> Tensor:
    """(N, T) log p(x_t|c, x_<t), teacher-forced in length-sorted micro-batches; 0 after the end of a row.

    On the device of `sequences`, wherever the LM lives. With `grad` the result can be differentiated (decoders with
    the capability "grad"); autograd then keeps the scores of all positions.
    """
    counter = Cost() if cost is None else cost
    result = torch.zeros(sequences.ids.shape, dtype=lm.dtype, device=lm.device)
    if len(sequences) == 0:
        return result
    ids, lengths, context = (x.to(lm.device) for x in (sequences.ids, sequences.lengths, sequences.context))
    order = torch.argsort(lengths * lm.num_contexts + context, stable=True)
    size = batch_size or min(plan_rows(lm, len(order)), max(1, SCORED_POSITIONS // max(1, int(lengths.max()))))
    with torch.set_grad_enabled(grad):
        for rows in order.split(size):
            width = max(1, int(lengths[rows].max()))
            tokens = ids[rows, :width]
            decoder = CountingDecoder(lm, counter)
            distinct, row_of = torch.unique(context[rows], return_inverse=True)
            step, state = decoder.prefill(distinct)
            result[rows, 0] = torch.log_softmax(step.logits[:, -1], -1)[row_of, tokens[:, 0]]
            if width > 1:
                state = decoder.select(state, row_of)
                read = int((lengths[rows] - 1).clamp_min(0).sum())
                step, _ = decoder.extend(state, tokens[:, :-1], grad=grad, count=read)
                result[rows, 1:width] = step.log_prob_of(tokens[:, 1:])
    after = torch.arange(result.shape[1], device=lm.device) >= lengths[:, None]
    return result.masked_fill_(after, 0.0).to(sequences.ids.device)


def hidden_states(lm: LanguageModel, sequences: Sequences, *, cost: Cost | None = None) -> tuple[Tensor, Tensor]:
    """The LM's hidden states (N, T, H) after each token of `sequences`, and the mask (N, T) of the tokens.

    On the device of `sequences`; 0 after the end of a row.

    Raises
    ------
    UnsupportedModel
        Where the decoder has no hidden states that mean anything: its capabilities lack "hidden".
    """
    counter = Cost() if cost is None else cost
    decoder = CountingDecoder(lm, counter)
    if "hidden" not in decoder.capabilities:
        raise UnsupportedModel(
            f"{lm!r} gives no hidden states; use a Hugging Face LM whose head can be split off, or a factor of texts"
        )
    ids, lengths, context = (x.to(lm.device) for x in (sequences.ids, sequences.lengths, sequences.context))
    width = max(1, int(lengths.max())) if len(ids) else 1
    size = min(plan_rows(lm, max(1, len(ids))), max(1, SCORED_POSITIONS // width))
    parts = []
    with torch.no_grad():
        for rows in torch.arange(len(ids), device=lm.device).split(size):
            distinct, row_of = torch.unique(context[rows], return_inverse=True)
            _, state = decoder.prefill(distinct)
            state = decoder.select(state, row_of)
            step, _ = decoder.extend(state, ids[rows, :width], count=int(lengths[rows].sum()))
            parts.append(step.hidden)
    hidden = torch.cat(parts)
    mask = torch.arange(width, device=lm.device) < lengths[:, None]
    hidden = torch.where(mask[:, :, None], hidden, 0.0)
    device = sequences.ids.device
    return hidden.to(device), mask.to(device)


def enumerate_outcomes(lm: LanguageModel, context: int = 0, *, max_sequences: int, cost: Cost | None = None) -> Draws:
    """Every outcome of positive probability for one context; see `LanguageModel.enumerate_sequences`.

    Breadth first while the prefixes of one length fit into a micro-batch; beyond that, chunk by chunk, each of which
    prefills its prefixes anew.
    """
    decoder = CountingDecoder(lm, Cost() if cost is None else cost)
    horizon, size = lm.max_new_tokens, plan_rows(lm, max_sequences)
    found: list[tuple[Tensor, Tensor, bool]] = []
    count = 0
    empty = torch.full((1, horizon), lm.pad_id, dtype=torch.int64, device=lm.device)
    waiting = [(empty, torch.zeros(1, dtype=lm.dtype, device=lm.device), 0)]
    with torch.no_grad():
        while waiting:
            prefixes, log_p, start = waiting.pop()
            rows = torch.full((len(prefixes),), context, device=lm.device)
            lengths = torch.full_like(rows, start)
            step, state = decoder.prefill(rows, prefixes[:, :start], lengths) if start else decoder.prefill(rows)
            for t in range(start, horizon):
                scores = log_p[:, None] + step.log_probs[:, -1]
                parent, token = torch.nonzero(scores > -torch.inf, as_tuple=True)
                guard_support(count + len(parent) + sum(len(w[0]) for w in waiting), max_sequences)
                prefixes = prefixes[parent]
                prefixes[:, t] = token
                log_p = scores[parent, token]
                over = lm.ended(prefixes[:, : t + 1], t)
                found.append((prefixes[over], log_p[over], True))
                if t + 1 == horizon:
                    found.append((prefixes[~over], log_p[~over], False))
                    count += len(prefixes)
                    break
                count += int(over.sum())
                alive = torch.nonzero(~over).squeeze(1)
                prefixes, log_p = prefixes[alive], log_p[alive]
                if len(alive) > size:
                    chunks = zip(prefixes.split(size), log_p.split(size), strict=True)
                    waiting += [(chunk, chunk_log_p, t + 1) for chunk, chunk_log_p in chunks]
                if len(alive) == 0 or len(alive) > size:
                    break
                state = decoder.select(state, parent[alive])
                step, state = decoder.extend(state, token[alive][:, None])
    return _outcomes_as_draws(lm, context, found)


def _outcomes_as_draws(lm: LanguageModel, context: int, done: list[tuple[Tensor, Tensor, bool]]) -> Draws:
    ids = torch.cat([d[0] for d in done])
    log_p = torch.cat([d[1] for d in done])
    finished = torch.cat([torch.full((len(d[0]),), d[2], device=ids.device) for d in done])
    where = torch.full((len(ids),), context, dtype=torch.int64, device=ids.device)
    lengths = lm.parse(ids, where).lengths
    columns: dict[str, Any] = {"log_prior": log_p, "log_q": log_p, "log_weight": log_p}
    return Draws(ids, lengths, finished, where, lm.prompts, lm.decode, **columns).to("cpu")
