"""`infer`, the one way to run an engine: shards one after the other, with progress, budgets, Ctrl-C and checkpoints.

A shard is the unit of all of these: an unfinished one is dropped, because its finished rows lean to short texts.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmppl.errors import FactorError, InfeasibleModel, InterruptedRun, ModelError, UnsupportedModel
from lmppl.inference.engine import Budget, Engine, Part, Request, Shard
from lmppl.inference.progress import progress_bar
from lmppl.modeling.feasibility import refuse_infeasible
from lmppl.modeling.model import Model
from lmppl.modeling.target import Target
from lmppl.sequences import Cost, Draws

if TYPE_CHECKING:
    from lmppl.inference.approximation import Approximation
    from lmppl.inference.checkpoint import Checkpoint
    from lmppl.lm.base import LanguageModel

__all__ = ["infer", "stream"]

log = logging.getLogger(__name__)


def infer(
    model: Model | LanguageModel,
    engine: Engine | str | None = None,
    num_draws: int | None = None,
    *,
    budget: Budget | None = None,
    seed: int = 0,
    progress: bool | None = None,
    on_part: Callable[[Part], None] | None = None,
    checkpoint: str | Path | None = None,
) -> Approximation:
    """Run an engine on a declaration.

    Parameters
    ----------
    model : Model or LanguageModel
        What is wanted; a bare LM is the model without evidence.
    engine : Engine, str or None
        An instance; a name such as "rejection" or "importance(num_draws=4096)"; or None for the first in `ENGINES` that
        can run, exact ones first.
    num_draws : int, optional
        Draws per context; the engine's own default if neither this nor a budget is given.
    budget : Budget, optional
        LM tokens or seconds after which the run stops, at the end of a shard.
    seed : int
        The same seed and plan give the same draws on the same machine.
    progress : bool, optional
        Show a progress bar on stderr; by default where stderr is a terminal.
    on_part : callable, optional
        Called with each finished part, for logging.
    checkpoint : str or Path, optional
        A folder that keeps the finished shards. A run that was stopped (Ctrl-C, a budget, a crash) goes on from there
        when it is asked for again, and gives the draws that it would have given unstopped, to the bit.

    Returns
    -------
    Approximation
        Draws with weights, log Ẑ with its interval, cost, guarantee; `status` is "interrupted" where Ctrl-C or a budget
        ended the run first: whole shards only.

    Raises
    ------
    UnsupportedModel
        With the engine's one-sentence reason.
    InfeasibleModel
        Where nothing with γ > 0 was found.
    InterruptedRun
        Where the run was stopped before its first shard was whole.
    StorageError
        Where the checkpoint is of another run, or cannot be written.
    FactorError
        Where a function of the model fails, a judge that is down among them; a note says what the checkpoint holds.
    """
    if not (progress is None or isinstance(progress, bool)):
        raise ModelError(f"progress: got {progress!r}, expected True, False or None")
    if on_part is not None and not callable(on_part):
        raise ModelError(f"on_part: got {on_part!r}, expected a function of a Part")
    run = _Run.of(model, engine, Request(num_draws, budget, seed), checkpoint)
    interrupted = False
    with progress_bar(run.engine, run.request, progress) as bar:
        if bar.looks_within:
            run.target.watcher = lambda share, figures: bar.within(run.shard, share, figures, run.target.cost)
        try:
            for part in run.parts():
                bar.parts(run.done)
                if on_part is not None:
                    on_part(part)
        except FactorError as error:
            if run.checkpoint is not None:
                error.add_note(run.kept)
            raise
        except KeyboardInterrupt:
            interrupted, run.complete = True, False
            if not run.done:
                message = f"{run.engine.name}: stopped before its first shard was whole; {run.kept}"
                raise InterruptedRun(message) from None
            log.warning(
                "%s: interrupted; %d whole shard(s) with %d draws are kept, the unfinished shard is dropped%s",
                run.engine.name,
                len(run.done),
                sum(len(p.draws) for p in run.done),
                "" if run.checkpoint is None else f"; {run.how_to_go_on}",
            )
    try:
        return _finish(run)
    except InfeasibleModel as error:
        if interrupted:
            made = "any draw was accepted" if run.engine.surplus else "a draw with γ > 0 was made"
            raise InterruptedRun(f"{run.engine.name}: stopped before {made}; {run.kept}") from error
        raise


def stream(
    model: Model | LanguageModel,
    engine: Engine | str | None = None,
    num_draws: int | None = None,
    *,
    budget: Budget | None = None,
    seed: int = 0,
) -> Iterator[Draws]:
    """The draws of `infer` as they come, shard by shard: for long runs whose draws are used or saved on the way.

    The same draws as `infer(...).draws` with the same arguments, in the order of the shards; weights are raw and on one
    scale. Closing the iterator stops the run.

    Parameters
    ----------
    model, engine, num_draws, budget, seed
        As in `infer`.

    Yields
    ------
    Draws
        The draws of one whole shard; never empty.

    Raises
    ------
    UnsupportedModel
        With the engine's one-sentence reason.
    InfeasibleModel
        At the end, where a context had no draw at all.
    """
    run = _Run.of(model, engine, Request(num_draws, budget, seed))
    seen = [0] * run.target.form.num_contexts
    wanted = run.engine.wanted(run.request) if run.engine.surplus else None
    meta = run.meta
    for part in run.parts():
        keep = []
        for row, c in enumerate(part.draws.context.tolist()):
            seen[c] += 1
            if wanted is None or seen[c] <= wanted:
                keep.append(row)
        # What follows asks how many there were, never which: a long run must not fill the memory.
        run.done[-1] = replace(part, draws=part.draws.select([]))
        if keep:
            yield part.draws.select(keep).with_columns(meta=meta)
    if min(seen) == 0:
        run.engine.merge(run.done)  # raises, with what follows about Z


class _Run:
    """One engine at work on one target: the parts so far, and whether the request was met."""

    def __init__(self, engine: Engine, target: Target, request: Request, checkpoint: Checkpoint | None = None) -> None:
        self.engine, self.target, self.request, self.checkpoint = engine, target, request, checkpoint
        self.done: list[Part] = []
        self.shard: Shard | None = None  # at work
        self.complete = False

    @classmethod
    def of(
        cls,
        model: Model | LanguageModel,
        engine: Engine | str | None,
        request: Request,
        checkpoint: str | Path | None = None,
    ) -> _Run:
        """Compile the declaration and choose the engine; refuse what it cannot do."""
        from lmppl.inference.checkpoint import Checkpoint
        from lmppl.inference.resolve import resolve_engine

        request.check()
        if not (checkpoint is None or isinstance(checkpoint, str | os.PathLike)):
            raise ModelError(f"checkpoint: got {checkpoint!r}, expected the path of a folder")
        target = Target(model if isinstance(model, Model) else Model(model))
        chosen = resolve_engine(engine, target.form)
        chosen.check_fields()
        reason = chosen.unsupported_reason(target.form)
        if reason is not None:
            raise UnsupportedModel(reason)
        refuse_infeasible(target.prior, target.factors)
        kept = None if checkpoint is None else Checkpoint(checkpoint, chosen, target, request.seed)
        return cls(chosen, target, request, kept)

    @property
    def how_to_go_on(self) -> str:
        """What to do with the checkpoint of a run that was stopped."""
        assert self.checkpoint is not None
        return f"to go on, run the same call again with checkpoint={str(self.checkpoint.folder)!r}"

    @property
    def kept(self) -> str:
        """What is left of a run that was stopped before it had a result."""
        parts = 0 if self.checkpoint is None else self.checkpoint.num_parts
        if not parts:
            return "nothing is kept"
        return f"its checkpoint holds {parts} whole shard(s); {self.how_to_go_on}"

    @property
    def meta(self) -> dict[str, Any]:
        """What the draws of this run carry: where they come from."""
        from lmppl.storage import versions

        return {
            "engine": str(self.engine),
            "guarantee": self.engine.guarantee.value,
            "seed": self.request.seed,
            "spec_hash": self.target.model.spec_hash,
            "formula": self.target.model.formula,
            "versions": versions(),
        }

    def parts(self) -> Iterator[Part]:
        """Run shards until the request is met, or the budget is spent first."""
        engine, target, request = self.engine, self.target, self.request
        shards = engine.plan(target, request)
        spent = Cost()
        while shards:
            for position, shard in enumerate(shards):
                part = self._stored(shard) or self._computed(shard)
                self.done.append(part)
                spent = spent + part.cost
                yield part
                if request.budget is not None and request.budget.spent(spent):
                    rest = len(shards) - position - 1
                    met = request.num_draws is None or not engine.replan(target, request, self.done)
                    self.complete = rest == 0 and met
                    return
            shards = engine.replan(target, request, self.done)
        self.complete = True

    def _computed(self, shard: Shard) -> Part:
        engine, target = self.engine, self.target
        self.shard = shard
        before, start = target.cost.copy(), time.perf_counter()
        state = self.done[-1].info["state"] if engine.sequential and self.done else None
        part = engine.run_shard(target, shard, state=state)
        if not isinstance(part, Part):
            raise ModelError(f"{engine.name}: run_shard returned {type(part).__name__}, expected a Part")
        target.cost.seconds += time.perf_counter() - start
        part = replace(part, cost=target.cost - before)
        if self.checkpoint is not None:
            self.checkpoint.save(part)
        return part

    def _stored(self, shard: Shard) -> Part | None:
        """The part of a shard that an earlier run has finished; its cost counts here too."""
        part = None if self.checkpoint is None else self.checkpoint.load(shard)
        if part is None:
            return None
        self.target.cost.add(part.cost)
        return self.engine.restored(self.target, part)


def _finish(run: _Run) -> Approximation:
    approximation = run.engine.merge(run.done)
    draws = approximation.draws
    return replace(
        approximation,
        draws=draws.with_columns(meta={**draws.meta, **run.meta}),
        cost=run.target.cost.copy(),
        status="complete" if run.complete else "interrupted",
        engine=run.engine,
        model=run.target.model,
        seed=run.request.seed,
    )
