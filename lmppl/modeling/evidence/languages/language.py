"""Languages: sets of texts as hard constraints, with the algebra of sets."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lmppl.errors import ModelError
from lmppl.lm.base import LanguageModel
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence.automata import Automaton, Word
from lmppl.modeling.evidence.constraint import Constraint
from lmppl.modeling.evidence.languages.joint_form import JointForm
from lmppl.modeling.evidence.prefix_reader import LogFactor, PrefixReader, as_log, no_verdict
from lmppl.modeling.evidence.prefixes import automaton_form
from lmppl.modeling.factors import Factor, Feature, Incremental
from lmppl.sequences import Sequences

__all__ = ["Combination", "Language"]


class Language(Constraint):
    """A set of texts L as a hard constraint: log φ(x) = 0 if x ∈ L else −inf.

    A completion is read whole, special tokens left out and a leading space kept. `a & b` are the texts of both, `a | b`
    of one of them, `~a` those that are not in a. Languages see inside: engines that go token by token ask which tokens
    can still lead to a text of L (`AutomatonPrefixes`), an empty language is found before anything is drawn, and on a
    `TabularLM` sums over L are exact at any horizon. A mask on tokens alone does not draw from π*: it is a proposal,
    and weights correct it.

    Parameters
    ----------
    automaton : Automaton
        What accepts the texts of L. The subclasses make it.
    name : str, optional
        How errors and tables call the factor.

    Raises
    ------
    ModelError
        Where L is empty.

    Examples
    --------
    >>> short = Regex(r"[a-z ]+") & ~Contains(["bad"]) & MaxWords(3)
    >>> short.accepts(["a good day", "a bad day", "Not this"]).tolist()
    [True, False, False]
    """

    arguments: Mapping[str, Any]

    def __init__(self, automaton: Automaton, *, name: str | None = None) -> None:
        if not isinstance(automaton, Automaton):
            raise ModelError(f"Language: got {type(automaton).__name__}, expected an Automaton")
        self._declare(automaton, {"automaton": automaton.to_dict()}, name, "1[x ∈ L]")

    def _declare(
        self,
        automaton: Automaton,
        arguments: Mapping[str, Any],
        name: str | None,
        formula: str,
        label: str | None = None,
    ) -> None:
        """Be the constraint of an automaton; `arguments` are those of the class, as plain data."""
        kind = self.kind
        if automaton.shortest() is None:
            raise ModelError(f"{kind}: no text is allowed by {formula}: the language is empty")
        Constraint.__init__(self, automaton, name=name or label or snake_case(kind))
        self._set(arguments=dict(arguments), formula=formula, named=name is not None)

    def accepts(self, texts: Sequence[str]) -> Tensor:
        """(B,) bool: which of B texts are in L."""
        if isinstance(texts, str):
            raise ModelError(f"{self.kind}: got the single text {texts!r}, expected a list of texts")
        if self.automaton is None or self.automaton.over != "characters":
            raise ModelError(f"{self.kind}: it reads more than the text; evaluate it on sequences")
        return self.automaton.accepts_texts(texts)

    def accepts_sequences(self, sequences: Sequences) -> Tensor:
        """(B,) bool: which of B completions are in L."""
        if self.automaton is not None and self.automaton.over == "tokens":
            return self.automaton.accepts_sequences(sequences)
        return self.accepts(sequences.text)

    def shortest(self) -> Word | None:
        """A shortest text of L, where L is given by an automaton."""
        return None if self.automaton is None else self.automaton.shortest()

    def __bool__(self) -> bool:
        raise ModelError(f"{self.kind}: `and`, `or` and `not` do not combine languages; use &, | and ~")

    def __and__(self, other: Language | Automaton) -> Language:
        return _combined("and", self, other)

    def __or__(self, other: Language | Automaton) -> Language:
        return _combined("or", self, other)

    def __invert__(self) -> Language:
        return Combination("not", (self,))

    @property
    def is_automaton(self) -> bool:
        """As `Constraint.is_automaton`: function and automaton are made from the same."""
        return self.automaton is not None

    def describe(self) -> dict[str, Any]:
        """As `Factor.describe`, with the arguments of the class."""
        return Factor.describe(self) | {"arguments": dict(self.arguments), "owns_features": True}

    @classmethod
    def from_description(
        cls, data: Mapping[str, Any], features: Sequence[Feature], functions: Mapping[str, Any]
    ) -> Language:
        """The factor that `describe` described, from the arguments of the class."""
        kind = Combination if "operation" in data["arguments"] else cls
        return kind(**kind.read_arguments(data["arguments"]), name=data["name"])

    @classmethod
    def read_arguments(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Plain data as the arguments of the class."""
        if cls is Language:
            return {"automaton": Automaton.from_dict(arguments["automaton"])}
        return dict(arguments)

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)


Operation = Literal["and", "or", "not"]


class Combination(Language):
    """`a & b`, `a | b` or `~a` of languages: one automaton where all of them have one, else part by part.

    Parameters
    ----------
    operation : {"and", "or", "not"}
    parts : sequence of Language
    name : str, optional

    Raises
    ------
    ModelError
        Where the result is empty.
    """

    operation: Operation
    parts: tuple[Language, ...]

    @property
    def kind(self) -> str:
        """As `Factor.kind`: a language that was made from others."""
        return "Language"

    def __init__(self, operation: Operation, parts: Sequence[Language], *, name: str | None = None) -> None:
        parts = tuple(parts)
        arguments = {"operation": operation, "parts": [part.describe() for part in parts]}
        formula = _formula(operation, [part.formula for part in parts])
        automaton = _joined(operation, [part.automaton for part in parts])
        if automaton is not None:
            self._declare(automaton, arguments, name, formula, _NAMES[operation])
        else:
            member = _Membership(operation, parts)
            Constraint.__init__(self, Feature(_NAMES[operation], member, "ids"), name=name or _NAMES[operation])
            self._set(arguments=arguments, formula=formula, named=name is not None)
        self._set(operation=operation, parts=parts)

    def accepts(self, texts: Sequence[str]) -> Tensor:
        """As `Language.accepts`."""
        if self.automaton is not None:
            return super().accepts(texts)
        return _combine(self.operation, [part.accepts(texts) for part in self.parts])

    def accepts_sequences(self, sequences: Sequences) -> Tensor:
        """As `Language.accepts_sequences`."""
        return _combine(self.operation, [part.accepts_sequences(sequences) for part in self.parts])

    def bind(self, lm: LanguageModel, log_factor: LogFactor | None = None) -> Factor:
        """As `Factor.bind`: with the form of the one automaton, or of the parts together."""
        if self.automaton is not None and self.automaton.over == "characters":
            return super().bind(lm, log_factor)
        parts = [part.bind(lm) for part in self.parts]
        bound = copy.copy(self)
        automaton = _joined(self.operation, [_over_tokens(part, lm) for part in parts])

        def make() -> Incremental:
            if automaton is not None:
                return automaton_form(automaton, lm)
            if self.operation == "not":
                return PrefixReader(lm, no_verdict, self._verdict, lambda: repr(self.arguments))
            forms = [part.incremental for part in parts if part.incremental is not None]
            assert len(forms) == len(parts)  # every language has one once it has met its LM
            return JointForm(forms, self.operation)

        object.__setattr__(bound, "automaton", automaton)
        object.__setattr__(bound, "incremental", self.forms.get(lm, make))
        return bound

    def _verdict(self, sequences: Sequences) -> Tensor:
        return as_log(self.accepts_sequences(sequences))

    @classmethod
    def read_arguments(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """As `Language.read_arguments`."""
        from lmppl.modeling import evidence

        parts = [getattr(evidence, one["kind"]).from_description(one, (), {}) for one in arguments["parts"]]
        return {"operation": arguments["operation"], "parts": parts}


_NAMES: Mapping[str, str] = {"and": "intersection", "or": "union", "not": "complement"}


class _Membership:
    """Which completions are in the combination of languages, as a feature."""

    def __init__(self, operation: Operation, parts: Sequence[Language]) -> None:
        self.operation, self.parts = operation, tuple(parts)

    @property
    def fingerprint(self) -> str:
        """Of the languages, as they are declared."""
        content = repr((self.operation, [part.describe() for part in self.parts]))
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def __call__(self, sequences: Sequences) -> Tensor:
        return _combine(self.operation, [part.accepts_sequences(sequences) for part in self.parts])


def snake_case(kind: str) -> str:
    """`OneOf` as "one_of"."""
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in kind).lstrip("_")


def _combined(operation: Operation, left: Language, right: object) -> Language:
    if isinstance(right, Automaton):
        right = Language(right)
    if not isinstance(right, Language):
        raise ModelError(
            f"got {left.kind} {'&' if operation == 'and' else '|'} {type(right).__name__}, expected a language; other "
            "evidence is multiplied: prior * a * b"
        )
    parts: list[Language] = []
    for one in (left, right):
        same = isinstance(one, Combination) and one.operation == operation and not one.named
        parts += one.parts if same and isinstance(one, Combination) else [one]
    return Combination(operation, parts)


def _combine(operation: Operation, members: Sequence[Tensor]) -> Tensor:
    stacked = torch.stack(list(members))
    if operation == "not":
        return ~stacked[0]
    return stacked.all(0) if operation == "and" else stacked.any(0)


def _over_tokens(part: Factor, lm: LanguageModel) -> Automaton | None:
    """The part's automaton over the tokens of a `TabularLM`; of another LM as it is."""
    automaton = part.automaton
    if automaton is None or automaton.over == "tokens" or not isinstance(lm, TabularLM):
        return automaton
    symbols = ["" if v in lm.eos_ids else symbol for v, symbol in enumerate(lm.vocabulary)]
    table = automaton.lift(symbols)
    dead = torch.full((1, table.shape[1] + 1), len(table))  # no token is outside the vocabulary
    rows = torch.cat([torch.cat([table, table.new_full((len(table), 1), len(table))], 1), dead])
    accept = torch.cat([automaton.accept, torch.tensor([False])])
    return Automaton(rows, tuple(range(len(symbols))), automaton.start, accept, "tokens")


def _joined(operation: Operation, automata: Sequence[Automaton | None]) -> Automaton | None:
    """The one automaton of a combination, where all parts have one over the same symbols."""
    known = [one for one in automata if one is not None]
    if len(known) < len(automata) or len({one.over for one in known}) != 1:
        return None
    first, *others = known
    if operation == "not":
        return ~first
    for other in others:
        first = first & other if operation == "and" else first | other
    return first


def _formula(operation: Operation, parts: Sequence[str]) -> str:
    inner = [part.removeprefix("1[").removesuffix("]") for part in parts]
    if operation == "not":
        return f"1[not ({inner[0]})]"
    return f"1[{f' {operation} '.join(inner)}]"
