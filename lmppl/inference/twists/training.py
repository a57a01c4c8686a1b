"""Learning a twist: one batch of draws, hidden states computed once, and steps on a small head."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from math import inf
from typing import TYPE_CHECKING, Any

import torch

from lmppl.errors import InfeasibleModel, ModelError
from lmppl.inference.progress import in_a_row, rich_progress
from lmppl.inference.twists.head import HeadShape, TwistHead
from lmppl.inference.twists.learned import LearnedTwist, TwistRecord, require_hidden, shown
from lmppl.inference.twists.losses import TwistLoss, resolve_loss
from lmppl.inference.twists.rollouts import TrainingSet, draw_training_set, given_training_set
from lmppl.inference.twists.trainer import Trainer
from lmppl.lm.base import LanguageModel
from lmppl.modeling.model import Model, model_of
from lmppl.modeling.target import Target
from lmppl.sequences import Draws
from lmppl.storage import versions

if TYPE_CHECKING:
    from lmppl.inference.engine import Engine

__all__ = ["learn_twist"]

DRAWS = 4096  # of all contexts together, unless told otherwise


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
    trainer = Trainer(head, loss, data, log_z, num_steps, batch_size, learning_rate, weight_decay, holdout, generator)

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


@contextmanager
def _bar(name: str, total: int, show: bool | None) -> Iterator[Callable[[int, dict[str, str]], None]]:
    with rich_progress(show) as bar:
        if bar is None:
            yield lambda done, figures: None
            return
        task = bar.add_task(name, total=total, figures="")
        yield lambda done, figures: bar.update(task, completed=done, figures=in_a_row(figures))
