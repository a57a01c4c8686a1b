"""The contract of an inference engine: what it is asked for, what it plans, and what it gives back.

An engine is a frozen dataclass of plain configuration. It says whether it can run (`unsupported_reason`), cuts the work
into shards (`plan`), computes each from its own seed (`run_shard`) and puts whole shards together (`merge`). A shard is
the unit of progress, of budgets and of Ctrl-C: an unfinished one is dropped, because its finished rows lean to short
texts.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, get_args, get_type_hints

import torch

from lmppl.errors import ModelError
from lmppl.lm.randomness import Source
from lmppl.modeling.target import Target, TargetForm
from lmppl.sequences import Cost, Draws

if TYPE_CHECKING:
    from lmppl.inference.approximation import Approximation
    from lmppl.lm.base import LanguageModel

__all__ = [
    "Budget",
    "Engine",
    "Guarantee",
    "Part",
    "Request",
    "Shard",
    "make_shard",
    "require_instance",
    "shard_generator",
]

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

    `info` holds plain data and tensors, so that a part can be stored. `law`, π* itself, is there where the engine
    computes it; it is not stored, but made again by `Engine.restored`.
    """

    shard: Shard
    draws: Draws
    cost: Cost = field(default_factory=Cost)
    info: Mapping[str, Any] = field(default_factory=dict)
    law: LanguageModel | None = None


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
    """Shards may hold more draws of a context than were asked for, because the engine accepts some of what it proposes;
    the first ones count."""
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

    def restored(self, target: Target, part: Part) -> Part:
        """A part that was read from a checkpoint, with what is not stored there made again."""
        return part

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
                raise ModelError(f"{type(self).__name__}: got {item.name}={value!r}, expected {expected}")

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


def require_instance(value: object) -> Engine:
    """`value` if it is an engine instance; else a `ModelError` that says how to make one."""
    if isinstance(value, Engine):
        return value
    if isinstance(value, type) and issubclass(value, Engine):
        raise ModelError(f"engine: got the class {value.__name__}, expected an instance: {value.__name__}()")
    raise ModelError(f"engine: got {type(value).__name__}, expected an Engine, a name, or None")
