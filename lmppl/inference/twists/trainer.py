"""The trainer of a twist's head: steps of an optimiser on batches of rollouts, and looks at the rows held out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import cos, inf, isinf, isnan, nan, pi

import torch
from torch import Tensor

from lmppl.errors import ModelError
from lmppl.inference.twists.head import TwistHead
from lmppl.inference.twists.losses import TwistLoss
from lmppl.inference.twists.rollouts import TrainingSet, evaluate_rollouts

__all__ = ["Trainer", "set_scale"]

CHECKS = 12  # looks at the draws held out; the best state of the head is kept
CHECKED_ROWS = 512  # of a context, at most, in such a look
CLIP = 1.0  # norm of the gradient
WARM_UP = 20  # steps
EXPECTED_SCORES = 1 << 25  # next-token values in one step of a loss that asks for all of them


class Trainer:
    """One head in training; its best state so far, by KL(π*‖q) on the rows held out, is what `kept` gives."""

    def __init__(
        self, head: TwistHead, loss: TwistLoss, data: TrainingSet, log_z: Tensor, num_steps: int, batch_size: int,
        learning_rate: float, weight_decay: float, holdout: float, generator: torch.Generator,
    ) -> None:  # fmt: skip
        self.head, self.loss, self.log_z = head, loss, log_z
        self.base = self.data = data  # what stands for π0; and that with the positive rows, once there are any
        self.num_steps, self.learning_rate, self.generator = num_steps, learning_rate, generator
        self.done = 0
        by_context = [rows[torch.randperm(len(rows), generator=generator)] for rows in _rows_of(data) if len(rows)]
        counts = [min(CHECKED_ROWS, max(1, round(holdout * len(rows)))) if holdout else 0 for rows in by_context]
        self.held = torch.cat([rows[:n] for rows, n in zip(by_context, counts, strict=True)])
        size = max(1, batch_size // len(by_context))
        if loss.uses_expected:
            scores = head.shape.vocab_size * float(data.sequences.lengths.double().mean())
            size = max(1, min(size, int(EXPECTED_SCORES / scores) // len(by_context)))
        self.size = size
        self.batches = _batches([rows[n:] for rows, n in zip(by_context, counts, strict=True)], size, generator)
        self.positives: Iterator[Tensor] | None = None
        matrices = [p for n, p in head.named_parameters() if p.dim() == 2]
        vectors = [p for n, p in head.named_parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate)
        self.best = inf
        self.state = {name: value.clone() for name, value in head.state_dict().items()}

    def set_positives(self, positives: TrainingSet) -> None:
        """Take positive samples from `positives`, and none from the weighted draws, from here on."""
        nothing = torch.full_like(self.base.log_posterior_weight, -inf)
        self.data = replace(self.base, log_posterior_weight=nothing).joined(positives)
        rows = [len(self.base) + own for own in _rows_of(positives) if len(own)]
        self.positives = _batches(rows, self.size, self.generator)

    def run(self, until: int, show: Callable[[int, dict[str, str]], None]) -> None:
        """Steps up to number `until`."""
        every = max(1, self.num_steps // CHECKS)
        while self.done < until:
            rows = next(self.batches)
            if self.positives is not None:
                rows = torch.cat([rows, next(self.positives)])
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate * self._schedule()
            self.optimizer.zero_grad(set_to_none=True)
            with torch.enable_grad():
                value = self.loss(evaluate_rollouts(self.head, self.data, rows, self.log_z))
                value.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.head.parameters(), CLIP)
            if not bool(torch.isfinite(norm)):
                raise ModelError(
                    f"learn_twist: the loss {self.loss.name!r} or its gradient is not finite at step {self.done}; "
                    "lower learning_rate"
                )
            self.optimizer.step()
            self.done += 1
            if self.done % every == 0 or self.done == until:
                self._look()
            figures = {"loss": f"{float(value.detach()):.4g}"}
            show(self.done, figures if isinf(self.best) else {**figures, "KL held out": f"{self.best:.4g}"})

    def _schedule(self) -> float:
        warm = min(1.0, (self.done + 1) / WARM_UP)
        return warm * 0.5 * (1.0 + cos(pi * self.done / self.num_steps))

    def _look(self) -> None:
        known = [x for x in self._measure().get("kl", []) if not isnan(x)]
        kl = sum(known) / len(known) if known else inf
        if kl < self.best or self.best == inf:
            self.best = kl
            self.state = {name: value.clone() for name, value in self.head.state_dict().items()}

    @torch.no_grad()
    def _measure(self) -> dict[str, list[float]]:
        """The figures of `TwistRecord`, on the rows held out; none without such rows."""
        if len(self.held) == 0:
            return {}
        r = evaluate_rollouts(self.head, self.base, self.held, self.log_z)
        steered = (r.log_psi - r.log_expected).masked_fill(~r.mask, 0.0).double().sum(1)  # log q − log π0
        prior = r.log_prior_weight.double()
        phi = r.log_phi.double()
        figures: dict[str, list[float]] = {"kl": [], "variance": [], "prior_variance": []}
        for c in range(self.head.shape.num_contexts):
            rows = r.context == c
            log_p = prior[rows] + phi[rows]
            possible = log_p > -inf
            if not bool(possible.any()):
                for values in figures.values():
                    values.append(nan)
                continue
            log_z = torch.logsumexp(log_p, 0) - torch.logsumexp(prior[rows], 0)
            p = torch.softmax(log_p[possible], 0)
            excess = phi[rows][possible] - log_z
            gap = excess - steered[rows][possible]
            figures["kl"].append(float((p * gap).sum()))
            figures["variance"].append(float((p * gap.exp()).sum() - 1.0))
            figures["prior_variance"].append(float((p * excess.exp()).sum() - 1.0))
        return figures

    @torch.no_grad()
    def kept(self) -> TwistHead:
        """A copy of the head in its best state, with the scale that its loss leaves open."""
        head = copy.deepcopy(self.head)
        head.load_state_dict(self.state)
        if self.loss.free_scale:
            set_scale(head, self.base, self.log_z)
        return head

    @torch.no_grad()
    def figures(self) -> dict[str, list[float]]:
        """`_measure` of the state that is kept."""
        now = {name: value.clone() for name, value in self.head.state_dict().items()}
        self.head.load_state_dict(self.state)
        found = self._measure()
        self.head.load_state_dict(now)
        return found


@torch.no_grad()
def set_scale(head: TwistHead, data: TrainingSet, log_z: Tensor) -> None:
    """Make E_π0[ψ_t] = E_π0[φ] over the outcomes that have a token t, for each context and t.

    That is so for ψ = e^V, and moves no next-token law. Where no such draw has φ > 0, the factor of the step before
    stays.
    """
    sums = torch.full((2, *head.scale.shape), -inf, dtype=torch.float64)
    for rows in torch.arange(len(data)).split(2048):
        r = evaluate_rollouts(head, data, rows, log_z)
        prior, phi = r.log_prior_weight.double()[:, None], r.log_phi.double()[:, None]
        for c in range(len(head.scale)):
            here = r.mask & (r.context == c)[:, None]
            for i, value in enumerate((prior + phi, prior + r.log_psi.double())):
                total = torch.logsumexp(torch.where(here, value, -inf), 0).cpu()
                sums[i, c, : len(total)] = torch.logaddexp(sums[i, c, : len(total)], total)
    shift = torch.zeros(head.scale.shape, dtype=torch.float64)
    known = (sums > -inf).all(0)
    for t in range(shift.shape[1]):
        before = shift[:, t - 1] if t else torch.zeros(len(shift), dtype=torch.float64)
        shift[:, t] = torch.where(known[:, t], sums[0, :, t] - sums[1, :, t], before)
    head.scale += shift.to(head.scale)


def _rows_of(data: TrainingSet) -> list[Tensor]:
    context = data.sequences.context
    return [torch.nonzero(context == c).squeeze(1) for c in range(data.sequences.num_contexts)]


def _batches(by_context: list[Tensor], size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of `size` rows of each context, without end; each row comes once before any comes again."""
    waiting = [rows[:0] for rows in by_context]
    while True:
        batch = []
        for i, rows in enumerate(by_context):
            wanted = min(size, len(rows))
            if len(waiting[i]) < wanted:
                waiting[i] = rows[torch.randperm(len(rows), generator=generator)]
            batch.append(waiting[i][:wanted])
            waiting[i] = waiting[i][wanted:]
        yield torch.cat(batch)
