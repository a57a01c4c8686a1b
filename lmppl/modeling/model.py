"""Model: the declaration prior * factor * factor, with its algebra. It never mentions an algorithm."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lmppl.errors import ModelError
from lmppl.lm.base import LanguageModel
from lmppl.modeling.factors import Factor, Feature
from lmppl.modeling.function_contents import content_digest

if TYPE_CHECKING:
    from lmppl.modeling.graph import FactorGraph

__all__ = ["Model", "model_of"]


class Model:
    """A posterior π*(x|c) = π0(x|c) ∏_k φ_k(x, c) / Z(c), declared.

    Built by multiplication: `prior * Reward(f, beta=0.5) * Constraint(g)`; `model | context` asks the same of other
    contexts. A prior alone, `Model(prior)`, is the model with no evidence.

    Parameters
    ----------
    prior : LanguageModel
        π0, with its contexts.
    factors : sequence of Factor
        Evidence; names are made unique (`reward`, `reward_2`) where the user chose none.

    Raises
    ------
    ModelError
        Where two factors were given the same name, or something is no factor.
    """

    def __init__(self, prior: LanguageModel, factors: Sequence[Factor] = ()) -> None:
        if not isinstance(prior, LanguageModel):
            raise ModelError(f"prior: got {type(prior).__name__}, expected a language model such as lmppl.LM('tiny')")
        for factor in factors:
            if not isinstance(factor, Factor):
                raise ModelError(
                    f"factor: got {type(factor).__name__}, expected a factor such as lmppl.Reward(fn, beta=...)"
                )
        self.prior = prior
        self.factors = tuple(factor.bind(prior) for factor in _with_unique_names(factors))
        self.features, self._columns = _merge_features(self.factors)

    def feature_names(self, factor: Factor) -> tuple[str, ...]:
        """Column names of the factor's features, in its own order; shared features have one column."""
        return self._columns[factor.name]

    def __mul__(self, other: object) -> Model:
        if isinstance(other, Factor):
            return Model(self.prior, (*self.factors, other))
        if isinstance(other, Model | LanguageModel):
            raise ModelError(
                f"got Model * {type(other).__name__}: a model has one prior; multiply by factors, and use an LM as "
                "evidence through a factor"
            )
        raise ModelError(f"got Model * {type(other).__name__}, expected a factor such as lmppl.Reward(fn, beta=...)")

    def __pow__(self, exponent: object) -> Model:
        """None: a power belongs to the prior, or to a factor by its own temperature."""
        raise ModelError(
            f"got Model ** {exponent!r}: `**` belongs on the prior, as in prior ** {exponent!r} * factor, which leaves "
            "the evidence as it is; a factor has a strength of its own, such as Reward(fn, beta=...)"
        )

    def __or__(self, contexts: Any) -> Model:
        """The same declaration for other contexts: one, or a list of them."""
        return Model(self.prior | contexts, self.factors)

    def without(self, name: str) -> Model:
        """The model with the factor called `name` left out."""
        self[name]
        return Model(self.prior, [f for f in self.factors if f.name != name])

    def __getitem__(self, name: str) -> Factor:
        """The factor called `name`."""
        for factor in self.factors:
            if factor.name == name:
                return factor
        raise ModelError(f"no factor is called {name!r}; this model has {[f.name for f in self.factors]}")

    @property
    def graph(self) -> FactorGraph:
        """The declaration as a networkx graph: for dependencies, serialisation and drawing."""
        from lmppl.modeling.graph import FactorGraph

        return FactorGraph.from_model(self)

    @property
    def spec_hash(self) -> str:
        """A content hash of the declaration: prior (weights, contexts, options), factors, and their functions.

        Of a function its code counts, with its defaults, bound arguments and the plain values, arrays, networks and
        functions that it closes over; of a callable object also its attributes; of pipelines, fitted classifiers and
        judges over HTTP the weights, what was learned, and the address. Not seen are global variables, the
        bodies of functions that it calls by a global name, and the insides of other objects: `Feature.fingerprint`
        tells those apart, and stands in place of the function's content where it is given. A function that changes
        such values while it runs changes its hash. Compiled code differs between versions of Python. Source of what is
        seen: `lmppl.modeling.function_contents`.
        """
        functions = [content_digest(f.fn) for f in self.features.values() if f.fingerprint is None]
        functions += [content_digest(factor.log_factor) for factor in self.factors]  # closes over β, bounds and where=
        parts = (self.graph.content_hash(), functions)  # the graph names the prior by its fingerprint
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    @property
    def formula(self) -> str:
        """π*(x|c) ∝ π0(x|c) · φ_1(x) · φ_2(x), with each factor as it was declared, and powers of π0 as one."""
        exponent = 1.0 + sum(f.prior_exponent for f in self.factors)
        prior = "π0(x|c)" if exponent == 1.0 else f"π0(x|c)^{exponent:g}" if exponent > 0 else f"π0(x|c)^({exponent:g})"
        shown = [f.formula or f"{f.name}(x)" for f in self.factors if f.prior_exponent == 0.0]
        return " · ".join([f"π*(x|c) ∝ {prior}", *shown])

    def __repr__(self) -> str:
        lines = [self.formula, f"  π0 = {self.prior!r}"]
        contexts = self.prior.prompts
        shown = ", ".join(repr(c) for c in contexts[:3]) + (", ..." if len(contexts) > 3 else "")
        lines.append(f"  c ∈ {{{shown}}}")
        lines += [f"  {f.name}: {f.kind}, φ = {f.formula or f.name + '(x)'}" for f in self.factors]
        return "\n".join(lines)


def model_of(model: Model | LanguageModel) -> Model:
    """The declaration; a bare LM is the model without evidence."""
    return model if isinstance(model, Model) else Model(model)


def _with_unique_names(factors: Sequence[Factor]) -> tuple[Factor, ...]:
    taken: set[str] = set()
    for factor in factors:
        if factor.named and factor.name in taken:
            raise ModelError(f"two factors are called {factor.name!r}; give one another name=")
        if factor.named:
            taken.add(factor.name)
    unique = []
    for factor in factors:
        if not factor.named:
            name = _free_name(factor.name, taken)
            taken.add(name)
            factor = factor if name == factor.name else _renamed(factor, name)
        unique.append(factor)
    return tuple(unique)


def _renamed(factor: Factor, name: str) -> Factor:
    other = copy.copy(factor)
    object.__setattr__(other, "name", name)
    return other


def _free_name(name: str, taken: set[str]) -> str:
    if name not in taken:
        return name
    number = 2
    while f"{name}_{number}" in taken:
        number += 1
    return f"{name}_{number}"


def _merge_features(factors: Sequence[Factor]) -> tuple[dict[str, Feature], dict[str, tuple[str, ...]]]:
    features: dict[str, Feature] = {}
    name_of: dict[tuple[Any, ...], str] = {}
    columns: dict[str, tuple[str, ...]] = {}
    for factor in factors:
        names: list[str] = []
        own = [f.name for f in factor.features]
        if len(set(own)) != len(own):
            raise ModelError(f"factor {factor.name!r}: its features are called {own}, expected distinct names")
        for feature in factor.features:
            if feature.identity not in name_of:
                name = _free_name(feature.name, set(features))
                name_of[feature.identity] = name
                features[name] = replace(feature, name=name)
            names.append(name_of[feature.identity])
        columns[factor.name] = tuple(names)
    return features, columns
