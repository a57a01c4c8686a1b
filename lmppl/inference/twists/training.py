"""Learning a twist: one batch of draws, hidden states computed once, and steps on a small head."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from math import cos, inf, isinf, isnan, nan, pi
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lmppl.errors import InfeasibleModel, ModelError
from lmppl.inference.twists.head import HeadShape, TwistHead
from lmppl.inference.twists.learned import LearnedTwist, TwistRecord, model_of, require_hidden, shown
from lmppl.inference.twists.losses import TwistLoss, resolve_loss
from lmppl.inference.twists.rollouts import TrainingSet, draw_training_set, evaluate_rollouts, given_training_set
from lmppl.lm.base import LanguageModel
from lmppl.modeling.model import Model
from lmppl.modeling.target import Target
from lmppl.sequences import Draws
from lmppl.storage import versions

if TYPE_CHECKING:
    from lmppl.inference.engine import Engine

__all__ = ["learn_twist"]

DRAWS = 4096  # of all contexts together, unless told otherwise
CHECKS = 12  # looks at the draws held out; the best state of the head is kept
CHECKED_ROWS = 512  # of a context, at most, in such a look
CLIP = 1.0  # norm of the gradient
WARM_UP = 20  # steps
EXPECTED_SCORES = 1 << 25  # next-token values in one step of a loss that asks for all of them


def learn_twist(
    model: Model | LanguageModel,
    loss: str | TwistLoss = "contrastive",
    *,
    num_steps: int = 240,
    num_draws: int | None = None,
    batch_size: int = 512,
    learning_rate: float = 3e-3,
    weight_decay: float = 0.3,
    holdout: float = 0.1,
    draws: Draws | None = None,
    positives: Draws | Engine | str | None = None,
    num_rounds: int = 3,
    width: int = 128,
    rank: int = 32,
    memory: int = 32,
    seed: int = 0,
    progress: bool | None = None,
) -> LearnedTwist:
    """Learn log ψ(x_≤t) ≈ V(x_≤t) = log E_π0[∏φ | x_≤t] for `model`, to be used by `SMC(twist=...)` on it.

    Draws of the prior are made once, with their evidence and the LM's hidden states; the head is then trained on them
    without another forward. Every cost is counted, and kept with the twist as `training_cost`.

    A twist never makes Ẑ biased; a bad one makes it noisy. How good this one is on draws that were held out is in
    `record.figures`. Training sees what its draws show: where φ > 0 is so rare that hardly a draw has it, give
    `positives`.

    Parameters
    ----------
    model : Model or LanguageModel
        The declaration; the prior must give hidden states.
    loss : str or TwistLoss
        "contrastive" (also "ctl"), "soft_value", "consistency", or an instance; see `lmppl.inference.twists.losses`.
    num_steps : int
        Optimiser steps (AdamW, warm-up and cosine).
    num_draws : int, optional
        Draws of the prior per context; by default 4,096 for all contexts together, at least 256 for each.
    batch_size : int
        Rows of one step, all contexts together; less where a loss asks for all V values and V is large.
    learning_rate, weight_decay : float
    holdout : float
        Share of the draws of each context that is not learned from; it chooses the state of the head that is kept,
        by its estimate of KL(π*‖q), and gives `record.figures`. 0: the last state is kept, and there are no figures.
    draws : Draws, optional
        In place of draws of the prior: those of any proposal, with `log_prior` and `log_q`.
    positives : Draws, Engine or str, optional
        Where a contrastive loss takes its positive samples from, instead of the draws weighted by φ: exact or weighted
        draws of π* (`log_weight`), or an engine that makes them, such as "rejection". An engine with a field `twist` is
        run with the twist as learned so far, `num_rounds` times.
    num_rounds : int
        How often such an engine is run.
    width, rank, memory : int
        See `HeadShape`.
    seed : int
    progress : bool, optional
        Show a progress bar on stderr; by default where stderr is a terminal.

    Returns
    -------
    LearnedTwist

    Raises
    ------
    UnsupportedModel
        For an LM without hidden states.
    InfeasibleModel
        Where no draw of some context has φ > 0.
    ModelError
        For arguments out of range.

    References
    ----------
    zhao2024, loshchilov2019
    """
    model, loss = model_of(model), resolve_loss(loss)
    counts = {"num_steps": num_steps, "batch_size": batch_size, "num_rounds": num_rounds, "width": width, "rank": rank}
    counts |= {"memory": memory} | ({} if num_draws is None else {"num_draws": num_draws})
    _check(counts, learning_rate, weight_decay, holdout)
    if positives is not None and not loss.uses_positives:
        raise ModelError(f"positives: the loss {loss.name!r} learns from draws of the prior alone; leave it out")
    if draws is not None and num_draws is not None:
        raise ModelError("learn_twist: got draws and num_draws, expected one of them")
    lm = model.prior
    require_hidden(lm)
    start, target = time.perf_counter(), Target(model)
    generator = torch.Generator().manual_seed(seed)
    if draws is None:
        wanted = num_draws or max(256, DRAWS // lm.num_contexts)
        data = draw_training_set(target, wanted, generator)
    else:
        data = given_training_set(target, draws)
    log_z = data.log_z()
    if bool((log_z == -inf).any()) and positives is None:
        c = int(torch.nonzero(log_z == -inf)[0, 0])
        count = int((data.sequences.context == c).sum())
        raise InfeasibleModel(
            f"learn_twist: none of {count:,} draws for context {lm.prompts[c]!r} has φ > 0, so that there is "
            "nothing to learn; give more draws, draws of a proposal that reaches it, or positives="
        )
    log_z = log_z.masked_fill(log_z == -inf, 0.0)

    shape = HeadShape(
        lm.num_contexts, lm.max_new_tokens, lm.vocab_size, data.hidden.shape[-1], width=width, rank=rank, memory=memory
    )
    head = TwistHead(shape, generator=generator, dtype=lm.dtype)
    torch.nn.init.constant_(head.base.bias, float(log_z.mean()))
    head = head.to(lm.device)
    trainer = _Trainer(head, loss, data, log_z, num_steps, batch_size, learning_rate, weight_decay, holdout, generator)

    def record() -> TwistRecord:
        cost = target.cost.copy()
        cost.seconds = time.perf_counter() - start
        count = len(data) // lm.num_contexts
        return TwistRecord(
            **shown(lm), formula=model.formula, spec_hash=model.spec_hash, loss=loss.name, num_steps=trainer.done,
            num_draws=count, seed=seed, cost=cost, figures=trainer.figures(), versions=versions(),
        )  # fmt: skip

    with _bar(f"learn_twist({loss.name})", num_steps, progress) as bar:
        for until in _rounds(num_steps, positives, num_rounds):
            if positives is not None:
                twist = LearnedTwist(trainer.kept(), record())
                trainer.set_positives(_positives(target, model, positives, twist, seed, trainer.done))
            trainer.run(until, bar)
    return LearnedTwist(trainer.kept(), record())


def _check(counts: dict[str, Any], learning_rate: float, weight_decay: float, holdout: float) -> None:
    for name, value in counts.items():
        least = 0 if name == "memory" else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ModelError(f"{name}: got {value!r}, expected an integer of at least {least}")
    if not learning_rate > 0.0:
        raise ModelError(f"learning_rate: got {learning_rate!r}, expected a positive number")
    if not weight_decay >= 0.0:
        raise ModelError(f"weight_decay: got {weight_decay!r}, expected a number of at least 0")
    if not 0.0 <= holdout < 1.0:
        raise ModelError(f"holdout: got {holdout!r}, expected a share of at least 0 and below 1")


def _rounds(num_steps: int, positives: Draws | Engine | str | None, num_rounds: int) -> list[int]:
    """The steps at which a round ends; positives are made anew at the start of each."""
    changing = positives is not None and not isinstance(positives, Draws)
    count = min(num_rounds, num_steps) if changing else 1
    return [num_steps * (i + 1) // count for i in range(count)]


def _positives(
    target: Target, model: Model, source: Draws | Engine | str, twist: LearnedTwist, seed: int, done: int
) -> TrainingSet:
    """Draws of π*, from an engine or as they were given, with their hidden states; their cost is the target's."""
    from lmppl.inference.resolve import resolve_engine
    from lmppl.inference.run import infer

    if isinstance(source, Draws):
        return given_training_set(target, source, positives=True)
    engine = resolve_engine(source, target.form)
    if any(f.name == "twist" for f in fields(engine)):
        engine = replace(engine, twist=twist)  # type: ignore[call-arg]
    found = infer(model, engine, seed=seed + done, progress=False)
    target.cost.add(found.cost)
    return given_training_set(target, found.draws, positives=True)


class _Trainer:
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


@contextmanager
def _bar(name: str, total: int, show: bool | None) -> Iterator[Callable[[int, dict[str, str]], None]]:
    """A progress bar on stderr that disappears at the end; silent where nobody watches."""
    if not (sys.stderr.isatty() if show is None else show):
        yield lambda done, figures: None
        return

    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns: tuple[Any, ...] = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[figures]}[/dim]"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=4) as bar:
        task = bar.add_task(name, total=total, figures="")

        def update(done: int, figures: dict[str, str]) -> None:
            bar.update(task, completed=done, figures=" · ".join(f"{k} {v}" for k, v in figures.items()))

        yield update
