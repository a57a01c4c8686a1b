"""What a twist is learned from: outcomes with their evidence, and the LM's hidden state before each of their tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lmppl.errors import ModelError
from lmppl.inference.twists.head import TwistHead
from lmppl.inference.twists.losses import Rollouts
from lmppl.lm.base import LanguageModel
from lmppl.lm.decoding import SCORED_POSITIONS, CountingDecoder, plan_rows
from lmppl.lm.frontier import Frontier
from lmppl.lm.randomness import Source
from lmppl.modeling.target import Target, log_evidence
from lmppl.sequences import Cost, Draws, Sequences, concatenate

__all__ = ["TrainingSet", "draw_training_set", "evaluate_rollouts", "states_before"]

DRAWN_ROWS = 1024  # of one micro-batch
SCORES = 1 << 24  # next-token values that are held at once where no gradient keeps them


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """N outcomes on the CPU; weights and log Z as in `Rollouts`.

    Parameters
    ----------
    sequences : Sequences
    hidden : Tensor (N, T, H)
        The state that predicts each token, the first one included; anything after the end of a row.
    log_phi, log_prior_weight, log_posterior_weight : Tensor (N,), float64
    project : callable
        The LM's `Step.project`.
    """

    sequences: Sequences
    hidden: Tensor
    log_phi: Tensor
    log_prior_weight: Tensor
    log_posterior_weight: Tensor
    project: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.sequences)

    def log_z(self) -> Tensor:
        """(C,) log Σ w̄ φ over the rows that stand for π0; −inf where no row has φ > 0."""
        values = []
        for c in range(self.sequences.num_contexts):
            rows = self.sequences.context == c
            weight = self.log_prior_weight[rows]
            values.append(torch.logsumexp(weight + self.log_phi[rows], 0) - torch.logsumexp(weight, 0))
        return torch.stack(values)

    def joined(self, other: TrainingSet) -> TrainingSet:
        """The rows of both."""
        width = max(self.hidden.shape[1], other.hidden.shape[1])
        hidden = [torch.nn.functional.pad(x.hidden, (0, 0, 0, width - x.hidden.shape[1])) for x in (self, other)]
        return TrainingSet(
            concatenate([self.sequences, other.sequences]),
            torch.cat(hidden),
            torch.cat([self.log_phi, other.log_phi]),
            torch.cat([self.log_prior_weight, other.log_prior_weight]),
            torch.cat([self.log_posterior_weight, other.log_posterior_weight]),
            self.project,
        )


def draw_training_set(target: Target, num_draws: int, generator: torch.Generator) -> TrainingSet:
    """`num_draws` draws of the prior for each context, with evidence and states from the same forwards."""
    lm = target.prior
    context = torch.arange(lm.num_contexts).repeat_interleave(num_draws)
    source = Source(generator)
    parts: list[tuple[Sequences, Tensor, Tensor]] = []
    project: Callable[[Tensor], Tensor] | None = None
    for rows in context.split(min(DRAWN_ROWS, plan_rows(lm, len(context)))):
        frontier = Frontier(lm, rows, cost=target.cost)
        states, log_prior = [], torch.zeros(len(rows), dtype=torch.float64)
        while len(frontier.live):
            now = frontier.hidden()
            state = now.new_zeros(len(rows), now.shape[1])
            state[frontier.live] = now
            states.append(state.cpu())
            live = frontier.live.cpu()
            tokens, log_p = source.tokens(frontier.logits())
            log_prior[live] += log_p.double().cpu()
            frontier.append(tokens)
        project = frontier.step.project
        states += [torch.zeros_like(states[0])] * (lm.max_new_tokens - len(states))
        parts.append((frontier.sequences(), torch.stack(states, 1), log_prior))
    drawn = concatenate([p[0] for p in parts], pad_id=lm.pad_id)
    log_prior = torch.cat([p[2] for p in parts]).to(lm.dtype)
    draws = Draws(
        drawn.ids,
        drawn.lengths,
        drawn.finished,
        drawn.context,
        lm.prompts,
        lm.decode,
        log_prior=log_prior,
        log_q=log_prior,
    )
    hidden = torch.cat([p[1] for p in parts])[:, : int(draws.lengths.max())]
    assert project is not None
    return _training_set(target.evaluate(draws), hidden, project, None)


def given_training_set(target: Target, draws: Draws, *, positives: bool = False) -> TrainingSet:
    """Draws of any proposal with `log_prior` and `log_q`; or weighted draws of π*, which stand for nothing else."""
    lm = target.prior
    if draws.prompts != lm.prompts or draws.ids.shape[1] != lm.max_new_tokens:
        raise ModelError(
            f"draws: got contexts {list(draws.prompts)} and T = {draws.ids.shape[1]}, expected those of the model's "
            f"prior, {list(lm.prompts)} and T = {lm.max_new_tokens}"
        )
    if not positives and (draws.log_prior is None or draws.log_q is None):
        raise ModelError(
            "draws: got draws without log_prior or log_q, expected both: their ratio makes them stand for the prior; "
            "draws of the posterior alone are given as positives="
        )
    if not positives and any(f.name not in draws.log_factors for f in target.factors):
        draws = target.evaluate(replace(draws, decoder=draws.decoder or lm.decode))
    hidden, project = states_before(lm, draws, cost=target.cost)
    weight = draws.log_weight if draws.log_weight is not None else torch.zeros(len(draws))
    return _training_set(draws, hidden, project, weight.double() if positives else None)


def _training_set(
    draws: Draws, hidden: Tensor, project: Callable[[Tensor], Tensor], posterior: Tensor | None
) -> TrainingSet:
    """A training set whose rows stand for π0 by their densities, or, with `posterior` weights, for π* alone."""
    log_phi = log_evidence(draws)
    if posterior is None:
        assert draws.log_prior is not None
        assert draws.log_q is not None
        prior = (draws.log_prior - draws.log_q).double()
        posterior = prior + log_phi
    else:
        prior, log_phi = torch.full_like(posterior, -torch.inf), torch.zeros_like(posterior)
    return TrainingSet(draws.sequences, hidden, log_phi, prior, posterior, project)


@torch.no_grad()
def states_before(lm: LanguageModel, sequences: Sequences, *, cost: Cost) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(N, T, H) hidden states that predict each token, teacher-forced, on the CPU; and the LM's `Step.project`."""
    ids, lengths, context = (x.to(lm.device) for x in (sequences.ids, sequences.lengths, sequences.context))
    longest = max(1, int(lengths.max()))
    order = torch.argsort(lengths * lm.num_contexts + context, stable=True)
    size = min(plan_rows(lm, len(order)), max(1, SCORED_POSITIONS // longest))
    result: Tensor | None = None
    project: Callable[[Tensor], Tensor] | None = None
    for rows in order.split(size):
        width = max(1, int(lengths[rows].max()))
        decoder = CountingDecoder(lm, cost)
        distinct, row_of = torch.unique(context[rows], return_inverse=True)
        step, state = decoder.prefill(distinct)
        if result is None or project is None:
            result, project = step.hidden.new_zeros(len(ids), longest, step.hidden.shape[-1]).cpu(), step.project
        where = rows.cpu()
        result[where, 0] = step.hidden[:, -1][row_of].cpu()
        if width > 1:
            state = decoder.select(state, row_of)
            read = int((lengths[rows] - 1).clamp_min(0).sum())
            step, _ = decoder.extend(state, ids[rows, : width - 1], count=read)
            result[where, 1:width] = step.hidden.cpu()
    if result is None or project is None:
        raise ModelError("draws: got no rows, expected at least one")
    return result, project


def evaluate_rollouts(head: TwistHead, data: TrainingSet, rows: Tensor, log_z: Tensor) -> Rollouts:
    """The head's values at all prefixes of `rows` (B,) of `data`, on the head's device; differentiable."""
    device, chosen = head.bias.device, data.sequences.select(rows).to(head.bias.device)
    width = max(1, int(chosen.lengths.max()))
    ids, mask = chosen.ids[:, :width], chosen.mask[:, :width]
    step = torch.arange(width, device=device).expand(len(ids), -1)[mask]
    context = chosen.context[:, None].expand(-1, width)[mask]
    hidden = data.hidden[rows, :width].to(device)[mask]
    z = head.features(hidden, head.memory_before(ids)[mask], step)

    def spread(values: Tensor) -> Tensor:
        whole = values.new_zeros(mask.shape)
        whole[mask] = values
        return whole

    def expect() -> Tensor:
        size = max(1, SCORES // head.shape.vocab_size)
        parts = []
        for some in torch.arange(len(step), device=device).split(size):
            with torch.no_grad():
                log_p = torch.log_softmax(data.project(hidden[some]), -1)
            parts.append(torch.logsumexp(log_p + head.values(z[some], context[some], step[some]), -1))
        return spread(torch.cat(parts))

    columns = (data.log_phi, data.log_prior_weight, data.log_posterior_weight)
    phi, prior, posterior = (x[rows].to(head.bias.dtype).to(device) for x in columns)
    log_psi = spread(head.values_at(z, context, step, ids[mask]))
    unit = log_z.to(log_psi)[chosen.context]
    return Rollouts(log_psi, phi, prior, posterior, unit, chosen.lengths, chosen.context, expect)
