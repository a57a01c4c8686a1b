"""Hard constraints: log φ(x) = 0 where b(x) holds, else −inf."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf
from typing import Any, Self

import torch
from torch import Tensor

from lmppl.errors import ModelError, ShapeError
from lmppl.lm.base import LanguageModel
from lmppl.modeling.declared_functions import function_name, qualified_name, to_feature
from lmppl.modeling.evidence.automata import Automaton
from lmppl.modeling.evidence.prefix_reader import LogFactor
from lmppl.modeling.evidence.prefixes import FormShelf, automaton_form, prefix_closed_form
from lmppl.modeling.evidence.reward import applied, single_column
from lmppl.modeling.factors import Factor, Feature, FeatureInput, Incremental
from lmppl.modeling.label_scores import Label
from lmppl.modeling.user_functions import RowError

__all__ = ["Constraint"]


class Constraint(Factor):
    """A hard constraint b: log φ(x) = 0 if b(x) else −inf, so that π*(x|c) ∝ π0(x|c) 1[b(x)].

    b(x) = 1 means that x is **allowed**. Source: `khalifa2021` (pointwise constraints).

    Parameters
    ----------
    predicate : callable, Feature or Automaton
        b: list of texts → one bool (or 0/1) for each; see `Feature.fn`. An `Automaton` allows what it
        accepts, and lets engines mask tokens and sum exactly.
    where : callable, optional
        Maps the column (B,) or (B, K) of raw values to bools (B,), so that a scorer shared with a reward runs
        once: `Constraint(sentiment, where=lambda s: s > 0.2)`.
    name : str, optional
        How errors and tables call the factor; by default the function's name.
    on : {"text", "full", "ids", "hidden"}
        What `predicate` reads: see `Feature`. For an automaton it follows from what the automaton reads.
    automaton : Automaton, optional
        Accepts exactly what `predicate` (with `where`) allows.
    label : str or int, optional
        With `where`: the label whose score a text-classification pipeline gives, or whose log-probability a fitted
        classifier gives.
    prefix_closed : bool
        A text that violates b cannot be mended by what follows: b(xy) implies b(x), as for "no banned word" or "ASCII
        only". Engines that go token by token then ask about prefixes; `predicate` must allow the empty text.

    Raises
    ------
    ModelError
        Where `predicate` is neither a function of a list of texts nor an automaton.
    FactorError, ShapeError
        When evaluated: a value that is neither true nor false, or not one for each text.

    Examples
    --------
    >>> Constraint(lambda texts: [t.endswith(".") for t in texts], name="sentence").formula
    '1[sentence(x)]'
    """

    where: Callable[[Tensor], Any] | None
    prefix_closed: bool
    forms: FormShelf

    def __init__(
        self,
        predicate: Callable[..., Any] | Feature | Automaton,
        *,
        where: Callable[[Tensor], Any] | None = None,
        name: str | None = None,
        on: FeatureInput = "text",
        automaton: Automaton | None = None,
        label: Label | None = None,
        prefix_closed: bool = False,
    ) -> None:
        if isinstance(predicate, Automaton):
            if (where, automaton, on, label, prefix_closed) != (None, None, "text", None, False):
                raise ModelError(
                    "Constraint: got an automaton together with where=, automaton=, on=, label= or prefix_closed=, "
                    "of which it needs none"
                )
            automaton = predicate
            feature = automaton_feature(automaton, name or "automaton")
        else:
            feature = to_feature(predicate, kind="Constraint", name=name, on=on, label=label)
        if prefix_closed and (feature.stochastic or feature.on not in ("text", "full", "ids")):
            what = "stochastic" if feature.stochastic else f"on={feature.on!r}"
            raise ModelError(f"Constraint: prefix_closed=True asks about prefixes, which {what} cannot answer")
        if where is not None and not callable(where):
            raise ModelError(f"Constraint: got where={where!r}, expected a function of the column of values")
        if automaton is not None and not isinstance(automaton, Automaton):
            raise ModelError(f"Constraint: got automaton={type(automaton).__name__}, expected an Automaton")

        def log_factor(columns: dict[str, Tensor]) -> Tensor:
            if where is None:
                column = single_column(columns)
                allowed = _as_bools(column, "; to threshold a score use where=lambda s: s > 0.5")
            else:
                (column,) = columns.values()
                allowed = _as_bools(_where_values(where, column), " from where=")
            return torch.zeros(len(column), dtype=torch.float64, device=column.device).masked_fill(~allowed, -inf)

        inner = applied(feature)
        if where is not None:
            inner = f"{function_name(where) or name or 'where'}({inner})"
        super().__init__(
            name=name or feature.name,
            features=(feature,),
            log_factor=log_factor,
            upper=0.0,
            hard=True,
            automaton=automaton,
            formula=f"1[{inner}]",
            named=name is not None,
        )
        object.__setattr__(self, "where", where)
        object.__setattr__(self, "prefix_closed", prefix_closed)
        object.__setattr__(self, "forms", FormShelf())

    @classmethod
    def characters(
        cls, allowed: Iterable[str] | None = None, *, forbidden: Iterable[str] | None = None, name: str | None = None
    ) -> Constraint:
        """Texts of `allowed` characters only, or without any of the `forbidden` ones; an automaton, hence a token mask.

        Parameters
        ----------
        allowed, forbidden : str or collection of single characters
            One of the two.
        name : str, optional
            By default "characters".

        Examples
        --------
        >>> Constraint.characters(map(chr, range(128)), name="ascii").automaton.accepts("café")
        False
        """
        return cls(Automaton.characters(allowed, forbidden=forbidden), name=name or "characters")

    def bind(self, lm: LanguageModel, log_factor: LogFactor | None = None) -> Factor:
        """As `Factor.bind`: with the prefix-by-prefix form of the automaton, or of a prefix-closed function."""
        if self.automaton is None and not self.prefix_closed:
            return self
        bound, automaton = copy.copy(self), self.automaton
        if automaton is None:
            form: Incremental = prefix_closed_form(self, lm, log_factor)
        else:
            form = self.forms.get(lm, lambda: automaton_form(automaton, lm))
        object.__setattr__(bound, "incremental", form)
        return bound

    @property
    def is_predicate(self) -> bool:
        """As `Factor.is_predicate`."""
        return True

    @property
    def is_automaton(self) -> bool:
        """Whether the predicate is the automaton itself, and no function of the user's."""
        return self.automaton is not None and getattr(self.features[0].fn, "__self__", None) is self.automaton

    def describe(self) -> dict[str, Any]:
        """As `Factor.describe`, with the automaton as data and `where` by its name."""
        return super().describe() | {
            "where": None if self.where is None else qualified_name(self.where),
            "automaton": None if self.automaton is None else self.automaton.to_dict(),
            "is_automaton": self.is_automaton,
            "prefix_closed": self.prefix_closed,
        }

    @classmethod
    def from_description(
        cls, data: Mapping[str, Any], features: Sequence[Feature], functions: Mapping[str, Any]
    ) -> Self:
        """The factor that `describe` described; `where` is `functions["<factor name>.where"]`."""
        automaton = None if data["automaton"] is None else Automaton.from_dict(data["automaton"])
        if data["is_automaton"] and automaton is not None:
            return cls(automaton, name=data["name"])
        where = None
        if data["where"] is not None:
            key = f"{data['name']}.where"
            if key not in functions:
                raise ModelError(f"functions: {key!r} is missing (it was {data['where']})")
            where = functions[key]
        closed = bool(data.get("prefix_closed", False))
        return cls(features[0], where=where, name=data["name"], automaton=automaton, prefix_closed=closed)


def automaton_feature(automaton: Automaton, name: str) -> Feature:
    """Whether the automaton accepts a completion's text, or its tokens (EOS among them), as a feature."""
    if automaton.over == "characters":
        return Feature(name, automaton.accepts_texts, "text")
    return Feature(name, automaton.accepts_sequences, "ids")


def _where_values(where: Callable[[Tensor], Any], column: Tensor) -> Tensor:
    result = torch.as_tensor(where(column), device=column.device)
    if result.shape != column.shape[:1]:
        raise ShapeError(
            f"where= returned shape {tuple(result.shape)} for a column of shape {tuple(column.shape)}, "
            f"expected ({len(column)},): one bool for each text; combine conditions with & and |, not `and` and `or`"
        )
    return result


def _as_bools(values: Tensor, fix: str) -> Tensor:
    odd = torch.nonzero((values != 0) & (values != 1))
    if len(odd):
        row = int(odd[0, 0])
        raise RowError(row, f"got {float(values[row]):g} for", f", expected True or False{fix}")
    return values == 1
