"""The contract of an inference engine, and `infer`, the one way to run one.

An engine is a frozen dataclass of plain configuration. It says whether it can run (`unsupported_reason`), cuts the work
into shards (`plan`), computes each from its own seed (`run_shard`) and puts whole shards together (`merge`). A shard is
the unit of progress, of budgets and of Ctrl-C: an unfinished one is dropped, because its finished rows lean to short
texts.
"""

from __future__ import annotations

import hashlib
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_args, get_type_hints

import torch

from lmppl.errors import InfeasibleModel, InterruptedRun, ModelError, UnsupportedModel
from lmppl.lm.randomness import Source
from lmppl.modeling.model import Model
from lmppl.modeling.target import Target, TargetForm
from lmppl.sequences import Cost, Draws

if TYPE_CHECKING:
    from lmppl.inference.approximation import Approximation
    from lmppl.inference.checkpoint import Checkpoint
    from lmppl.lm.base import LanguageModel

__all__ = ["Budget", "Engine", "Guarantee", "Part", "Request", "Shard", "infer", "shard_generator", "stream"]

log = logging.getLogger(__name__)

PLAIN_TYPES = {int, float, bool, str, type(None)}
SHARD_DRAWS = 1024  # draws of one shard, all contexts together, unless the engine says otherwise


class Guarantee(Enum):
    """What the draws of an engine are."""

    EXACT = "exact"
    """Draws from π* itself."""
    CONSISTENT = "consistent"
    """Weighted draws whose expectations converge to those under π* as the work grows."""
    APPROXIMATE = "approximate"
    """Draws from a law that is close to π*, with a measured distance."""
    HEURISTIC = "heuristic"
    """Draws from another law, which the engine's docstring names."""


@dataclass(frozen=True)
class Budget:
    """When to stop; the first limit that is reached ends the run, after the shard that reaches it.

    Parameters
    ----------
    lm_tokens : int, optional
        Positions sent through the LM.
    seconds : float, optional
        Wall-clock time.
    """

    lm_tokens: int | None = None
    seconds: float | None = None

    def spent(self, cost: Cost) -> bool:
        """Whether `cost` has reached a limit."""
        over_tokens = self.lm_tokens is not None and cost.lm_tokens >= self.lm_tokens
        return over_tokens or (self.seconds is not None and cost.seconds >= self.seconds)


@dataclass(frozen=True)
class Request:
    """What a run was asked for: draws per context, or a budget, or both; and its seed."""

    num_draws: int | None
    budget: Budget | None
    seed: int

    def check(self) -> None:
        """Raise `ModelError` on a wrong argument, before anything runs."""
        if self.num_draws is not None and not (_is_integer(self.num_draws) and self.num_draws >= 1):
            raise ModelError(f"num_draws: got {self.num_draws!r}, expected at least 1, an integer")
        if not (_is_integer(self.seed) and -(2**63) <= self.seed < 2**63):
            raise ModelError(f"seed: got {self.seed!r}, expected an integer of 64 bits")
        if self.budget is None:
            return
        if not isinstance(self.budget, Budget):
            raise ModelError(f"budget: got {self.budget!r}, expected lmppl.Budget(lm_tokens=...) or (seconds=...)")
        limits = (self.budget.lm_tokens, self.budget.seconds)
        if all(limit is None for limit in limits):
            raise ModelError("budget: Budget() has no limit; give lm_tokens= or seconds=")
        for name, limit in zip(("lm_tokens", "seconds"), limits, strict=True):
            if limit is not None and not (isinstance(limit, int | float) and limit > 0):
                raise ModelError(f"budget: got {name}={limit!r}, expected a positive number")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Shard:
    """A unit of work, repeatable from (`seed`, `id`) alone.

    Parameters
    ----------
    id : int
        Position in the plan.
    num_draws : int
        Draws (or proposals) per context.
    seed : int
        The run's seed.
    contexts : tuple of int
        The contexts that this shard works on.
    batch_size : int
        Rows of one micro-batch, fixed here.
    """

    id: int
    num_draws: int
    seed: int
    contexts: tuple[int, ...]
    batch_size: int


@dataclass(frozen=True, eq=False)
class Part:
    """The result of one shard: its draws, what it cost, and what the engine needs to merge it.

    `info` holds plain data and tensors, so that a part can be stored.
    """

    shard: Shard
    draws: Draws
    cost: Cost = field(default_factory=Cost)
    info: Mapping[str, Any] = field(default_factory=dict)


def shard_generator(shard: Shard) -> torch.Generator:
    """A CPU generator seeded by (shard.seed, shard.id) through a hash, so that neighbouring seeds share nothing."""
    digest = hashlib.sha256(f"{shard.seed}:{shard.id}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@dataclass(frozen=True)
class Engine(ABC):
    """Base of every engine: configuration only; validated when planned.

    A new engine subclasses this as a frozen dataclass and gives `name`, `guarantee`, `run_shard` (or `simulate`) and
    `merge`; the default plan cuts `num_draws` into equal shards, and goes on shard by shard while a budget lasts.
    """

    name: ClassVar[str]
    guarantee: ClassVar[Guarantee]
    references: ClassVar[tuple[str, ...]] = ()
    surplus: ClassVar[bool] = False
    """Shards may hold more draws of a context than were asked for; the first ones count."""
    sequential: ClassVar[bool] = False
    """A shard starts where the one before ended, which leaves its state in `Part.info["state"]`."""

    def cite(self) -> str:
        """BibTeX of the papers that this engine implements."""
        from lmppl.inference.citations import bibtex

        return bibtex(self.references)

    def unsupported_reason(self, form: TargetForm) -> str | None:
        """One sentence that says what is missing, on which factor, and how to fix it; None where the engine can run."""
        if form.stochastic:
            return (
                f"{self.name} needs exact factor values: factor {form.stochastic[0]!r} is declared stochastic=True; "
                "use its expectation"
            )
        return None

    @property
    def default_draws(self) -> int:
        """Draws per context where neither `infer` nor a budget says."""
        draws: int = getattr(self, "num_draws", 1000)
        return draws

    def wanted(self, request: Request) -> int | None:
        """Draws per context that the run is to end with; None where only a budget ends it."""
        wanted = request.num_draws
        if wanted is None and request.budget is None:
            wanted = self.default_draws
        if wanted is not None and not (_is_integer(wanted) and wanted >= 1):
            raise ModelError(f"num_draws: got {wanted!r}, expected at least 1, an integer")
        return wanted

    def plan(self, target: Target, request: Request) -> list[Shard]:
        """The first shards; `replan` may add more once these are done."""
        contexts = tuple(range(target.form.num_contexts))
        wanted = self.wanted(request)
        size = max(1, SHARD_DRAWS // len(contexts))
        if wanted is None:
            return [make_shard(target, 0, size, request.seed, contexts)]
        counts = [min(size, wanted - start) for start in range(0, wanted, size)]
        return [make_shard(target, i, n, request.seed, contexts) for i, n in enumerate(counts)]

    def replan(self, target: Target, request: Request, parts: Sequence[Part]) -> list[Shard]:
        """Shards that follow `parts`; empty where the request is met. A function of the parts alone."""
        if request.num_draws is not None or request.budget is None:
            return []
        last = parts[-1].shard
        return [replace(last, id=last.id + 1)]

    def run_shard(self, target: Target, shard: Shard, *, state: Any = None) -> Part:
        """Compute one shard, from `shard_generator(shard)` alone.

        `state` is where the shard before ended, for `sequential` engines.
        """
        return self.simulate(target, shard, Source(shard_generator(shard)), state=state)

    def simulate(self, target: Target, shard: Shard, source: Source, *, state: Any = None) -> Part:
        """Compute one shard with the choices of `source`; what an engine gives whose choices can be enumerated."""
        raise NotImplementedError(f"{type(self).__name__} defines neither run_shard nor simulate")

    @abstractmethod
    def merge(self, parts: Sequence[Part]) -> Approximation:
        """One approximation from whole shards, in the order of their ids."""

    def live(self, parts: Sequence[Part]) -> dict[str, str]:
        """Figures that a person wants to see while the engine runs."""
        return {"draws": f"{sum(len(p.draws) for p in parts):,}"}

    def check_fields(self) -> None:
        """Raise `ModelError` where a field of a plain type (int, float, bool, str, or None beside one) has another."""
        hints = get_type_hints(type(self))
        for item in fields(self):
            allowed = get_args(hints[item.name]) or (hints[item.name],)
            if not set(allowed) <= PLAIN_TYPES:
                continue
            value = getattr(self, item.name)
            fits = type(value) in allowed or (float in allowed and type(value) is int)
            if not fits:
                expected = " or ".join("None" if t is type(None) else t.__name__ for t in allowed)
                raise ModelError(f"{self.name}: got {item.name}={value!r}, expected {expected}")

    def __str__(self) -> str:
        changed = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if f.repr and getattr(self, f.name) != f.default and f.name != "proposal"
        ]
        return f"{self.name}({', '.join(changed)})" if changed else self.name


def make_shard(target: Target, number: int, num_draws: int, seed: int, contexts: tuple[int, ...]) -> Shard:
    """A shard whose micro-batch size comes from the memory plan of the prior."""
    from lmppl.lm.decoding import plan_rows

    return Shard(number, num_draws, seed, contexts, plan_rows(target.prior, num_draws * len(contexts)))


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
    """
    from lmppl.inference.progress import progress_bar

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
        except KeyboardInterrupt:
            interrupted, run.complete = True, False
            if not run.done:
                message = f"{run.engine.name}: stopped before its first shard was whole; nothing is kept"
                raise InterruptedRun(message) from None
            log.warning(
                "%s: interrupted; %d whole shard(s) with %d draws are kept, the unfinished shard is dropped",
                run.engine.name,
                len(run.done),
                sum(len(p.draws) for p in run.done),
            )
    try:
        return _finish(run)
    except InfeasibleModel as error:
        if interrupted:
            message = f"{run.engine.name}: stopped before any draw was accepted; nothing is kept"
            raise InterruptedRun(message) from error
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
        target = Target(model if isinstance(model, Model) else Model(model))
        chosen = resolve_engine(engine, target.form)
        chosen.check_fields()
        reason = chosen.unsupported_reason(target.form)
        if reason is not None:
            raise UnsupportedModel(reason)
        kept = None if checkpoint is None else Checkpoint(checkpoint, chosen, target, request.seed)
        return cls(chosen, target, request, kept)

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
        if part is not None:
            self.target.cost.add(part.cost)
        return part


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


def require_instance(value: object) -> Engine:
    """`value` if it is an engine instance; else a `ModelError` that says how to make one."""
    if isinstance(value, Engine):
        return value
    if isinstance(value, type) and issubclass(value, Engine):
        raise ModelError(f"engine: got the class {value.__name__}, expected an instance: {value.__name__}()")
    raise ModelError(f"engine: got {type(value).__name__}, expected an Engine, a name, or None")
