"""The contracts that all evidence meets: features, factors, and the optional forms that engines can use.

A factor is log φ(x, c) with φ ≥ 0. Its raw features are user functions of sequences; `log_factor` turns feature columns
into log φ. What a factor *can* do beyond that is stated, not guessed: a bound (`upper`), hardness, an automaton, an
incremental form.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from lmppl.errors import ModelError

if TYPE_CHECKING:
    from lmppl.lm.base import LanguageModel
    from lmppl.lm.decoder import Step
    from lmppl.modeling.evidence.automata import Automaton
    from lmppl.modeling.model import Model
    from lmppl.modeling.returned_values import Batch
    from lmppl.sequences import Sequences

__all__ = ["Factor", "Feature", "Incremental", "missing_members", "start_incremental"]

FeatureInput = Literal["text", "full", "ids", "hidden", "log_prior"]


@dataclass(frozen=True)
class Feature:
    """A user function of sequences, shared by the factors that name it and run once on each distinct text.

    Parameters
    ----------
    name : str
        Column name in `Draws.features`.
    fn : callable
        `on="text"`: list of completion texts → one number (or vector) a text; also the Hugging Face reward convention
        `fn(prompts, completions, **kwargs)`. `on="full"`: list of context + completion. `on="ids"`: a `Sequences`.
        `on="log_prior"`: the log π0(x|c) (B,) that the draws carry, in nats. `on="hidden"`: the prior's hidden states
        after each token (B, T, H), and the mask (B, T) of the tokens. Returns a list, numpy array or tensor of shape
        (B,) or (B, K).
    on : {"text", "full", "ids", "hidden", "log_prior"}
        What the function reads.
    stochastic : bool
        Values differ from call to call: never cached.
    fingerprint : str, optional
        Names the function's content, for the spec hash: another fingerprint is another declaration.
    read : callable, optional
        Makes the column (B,) or (B, K) of what `fn` returned and of the `Batch` that errors quote, where that is not
        numbers; hashable, equal where it does the same.
    """

    name: str
    fn: Callable[..., Any]
    on: FeatureInput = "text"
    stochastic: bool = False
    fingerprint: str | None = None
    read: Callable[[Any, Batch], Tensor] | None = None

    @property
    def reads_prompts(self) -> bool:
        """Whether `fn` follows the Hugging Face convention `fn(prompts, completions, completion_ids, **kwargs)`.

        It may name a part of these: `completions` beside another one or `**kwargs`, `prompts` beside `**kwargs`, or
        `**kwargs` alone. A function of `completions` alone is a function of a list of texts.
        """
        try:
            parameters = list(inspect.signature(self.fn).parameters.values())
        except (TypeError, ValueError):  # builtins have no signature
            return False
        names = {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        if takes_any and (len(parameters) == 1 or "prompts" in names):
            return True
        return "completions" in names and (takes_any or bool(names & {"prompts", "completion_ids"}))

    @property
    def identity(self) -> tuple[Any, ...]:
        """Two features with equal identity are one: the same function, given and read in the same way."""
        try:
            hash(self.fn)
        except TypeError:  # an unhashable callable, such as an instance of a dataclass: itself only
            return (id(self.fn), self.on, self.stochastic, self.read)
        return (self.fn, self.on, self.stochastic, self.read)


@runtime_checkable
class Incremental(Protocol):
    """log φ prefix by prefix.

    Law: potential(start) + Σ weigh = potential(final) = log φ; potential = −inf means that every continuation is −inf.
    `weigh` is the ratio log ψ(x_≤t) − log ψ(x_<t) for candidate tokens.

    An object of any class will do that has the six methods below, and `needs`, which says what it reads: a collection
    of "text", "ids" and "hidden", such as the class attribute `needs = ("ids",)`. With "hidden" `advance` gets the LM's
    `Step` after the token, and with "text" no engine asks about all V tokens unless it is told to. States are its own
    affair, and are never changed by the caller.
    """

    @property
    def needs(self) -> Collection[Literal["text", "ids", "hidden"]]:
        """What it reads; a class attribute will do. With "text" it reads texts one by one, slow for all V tokens."""
        ...

    def start(self, contexts: Tensor, step: Step | None = None) -> Any:
        """State of B empty completions of `contexts` (B,).

        A form whose signature has `step` also gets the LM's `Step` (B, 1, ·) after the context; others may leave it
        out.
        """
        ...

    def weigh(self, state: Any, candidates: Tensor | None) -> Tensor:
        """(B, k) increments for candidate tokens (B, k), or (B, V) for all tokens if None; in nats."""
        ...

    def advance(self, state: Any, tokens: Tensor, step: Step) -> Any:
        """State after appending `tokens` (B,)."""
        ...

    def potential(self, state: Any) -> Tensor:
        """(B,) log ψ(x_≤t)."""
        ...

    def select(self, state: Any, index: Tensor) -> Any:
        """Rows `index`."""
        ...

    def crop(self, state: Any, lengths: Tensor) -> Any:
        """Rows cut back to `lengths` tokens."""
        ...


FORM_MEMBERS = ("needs", "start", "weigh", "advance", "potential", "select", "crop")


def missing_members(form: object) -> str:
    """What `form` lacks to be an `Incremental`, as the end of a sentence that begins with its name; "" for nothing."""
    missing = [name for name in FORM_MEMBERS if not hasattr(form, name)]
    if isinstance(form, type) and set(missing) <= {"needs"}:
        return f": got the class {form.__name__}, expected an instance: {form.__name__}(...)"
    if not missing:
        return _unknown_needs(form)
    if missing == ["needs"]:
        return (
            f" has no `needs`, which says what it reads: give {type(form).__name__} a class attribute such as "
            'needs = ("ids",), of "text", "ids" and "hidden"'
        )
    return (
        f": got {type(form).__name__}, which has no {', '.join(missing)}; expected an object with needs, start, weigh, "
        "advance, potential, select and crop (see lmppl.Incremental)"
    )


def _unknown_needs(form: Any) -> str:
    """As `missing_members`, of what a whole form says that it reads."""
    known, needs = ("text", "ids", "hidden"), form.needs
    if isinstance(needs, Collection) and not isinstance(needs, str) and all(n in known for n in needs):
        return ""
    return f': got needs={needs!r}, expected some of {", ".join(map(repr, known))}, as in needs = ("ids",)'


def start_incremental(form: Incremental, contexts: Tensor, step: Step | None) -> Any:
    """`form.start`, with the `step` after the context where its signature asks for one."""
    if "step" in inspect.signature(form.start).parameters:
        return form.start(contexts, step)
    return form.start(contexts)


@dataclass(frozen=True, eq=False)
class Factor:
    """Evidence log φ(x, c), φ ≥ 0.

    Parameters
    ----------
    name : str
        How errors, tables and columns call it.
    features : tuple of Feature
        What is computed from a sequence, by user functions.
    log_factor : callable
        dict of feature name → column (B,) or (B, K), to log φ (B,): finite or −inf, in nats.
    upper : float
        sup log φ, in nats; finite values enable rejection and certificates.
    hard : bool or None
        Can log φ be −inf? None means unknown, treated as yes. Where False, a −inf is an error.
    automaton : Automaton, optional
        A finite automaton that accepts exactly the completions with φ > 0, where φ ∈ {0, 1}.
    incremental : Incremental, optional
        The prefix-by-prefix form.
    soft : callable, optional
        A differentiable form on soft tokens or hidden states.
    formula : str
        The factor as a formula in x, for `Model.__repr__`.
    named : bool
        The user chose the name, so that two equal names are an error; else later ones get a number.
    """

    name: str
    features: tuple[Feature, ...]
    log_factor: Callable[[dict[str, Tensor]], Tensor]
    upper: float = inf
    hard: bool | None = None
    automaton: Automaton | None = None
    incremental: Incremental | None = None
    soft: Callable[..., Any] | None = None
    formula: str = ""
    named: bool = field(default=True, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ModelError(f"factor: got name={self.name!r}, expected a string, not empty")
        if self.incremental is not None:
            missing = missing_members(self.incremental)
            if missing:
                raise ModelError(f"factor {self.name!r}: its incremental form{missing}")

    @property
    def stochastic(self) -> bool:
        """Whether any feature is: then log φ is an estimate."""
        return any(f.stochastic for f in self.features)

    @property
    def prior_exponent(self) -> float:
        """a where φ is π0(x|c)^a, which the formula of a model shows as a power of π0; 0 elsewhere."""
        return 0.0

    @property
    def is_predicate(self) -> bool:
        """Whether φ is 0 or 1 by declaration."""
        return False

    @property
    def kind(self) -> str:
        """The declaration's name: "Reward", "Constraint", ..."""
        return type(self).__name__

    def bind(self, lm: LanguageModel, log_factor: Callable[[Sequences], Tensor] | None = None) -> Factor:
        """The factor for sequences of `lm`: itself, or a copy with the prefix-by-prefix form that depends on the LM.

        Parameters
        ----------
        lm : LanguageModel
            The prior, whose tokens, end and horizon such a form must know.
        log_factor : callable, optional
            log φ of sequences (B,), cached and counted by the run that asks; by default the form evaluates by itself.
        """
        return self

    def describe(self) -> dict[str, Any]:
        """The declaration as plain data (functions by name), for hashing and serialisation."""
        return {
            "kind": self.kind,
            "name": self.name,
            "features": [f.name for f in self.features],
            "upper": self.upper,
            "hard": self.hard,
            "formula": self.formula,
        }

    def __rmul__(self, other: LanguageModel | Model) -> Model:
        from lmppl.lm.base import LanguageModel
        from lmppl.modeling.model import Model

        if isinstance(other, Model):
            return Model(other.prior, (*other.factors, self))
        if isinstance(other, LanguageModel):
            return Model(other, (self,))
        raise ModelError(
            f"got {type(other).__name__} * {self.kind}, expected a language model or a model on the left: "
            "prior * factor * factor"
        )

    def __pow__(self, exponent: object) -> Any:
        raise ModelError(
            f"got {self.kind} ** {exponent!r}: a factor has a strength of its own, such as Reward(fn, beta=...); "
            "prior ** alpha is a power of the prior"
        )

    def __add__(self, other: object) -> Any:
        raise ModelError(f"got {self.kind} + {type(other).__name__}: evidence is multiplied, as in prior * factor")

    def __radd__(self, other: object) -> Any:
        raise ModelError(f"got {type(other).__name__} + {self.kind}: evidence is multiplied, as in prior * factor")

    def __mul__(self, other: object) -> Any:
        raise ModelError(
            f"got {self.kind} * {type(other).__name__}: a model begins with its prior; write prior * factor * factor"
        )
