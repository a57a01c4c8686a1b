"""FactorGraph: the declaration as a networkx graph, to ask about its structure, to store and to draw it.

It holds plain data and names only; it is never on the path of a draw or a step.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx as nx

from lmppl.errors import ModelError
from lmppl.modeling.declared_functions import qualified_name
from lmppl.modeling.factors import Factor, Feature

if TYPE_CHECKING:
    from lmppl.lm.base import LanguageModel
    from lmppl.modeling.model import Model

__all__ = ["FactorGraph"]

FORMAT = "lmppl.FactorGraph/1"


class FactorGraph:
    """The structure of a model π*(x|c) ∝ π0(x|c) ∏_k φ_k(x, c): who reads what.

    Nodes have string keys: "c" (the contexts), "prior", "x" (the sequence), "feature:NAME" and "factor:NAME";
    edges point from what is read to what reads it. A feature that several factors share is one node.

    Parameters
    ----------
    data : mapping
        The declaration as `to_dict` gives it.

    Raises
    ------
    ModelError
        Where the declaration is not valid: see `validate`.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._data = _plain(data)
        self.validate()

    @classmethod
    def from_model(cls, model: Model) -> FactorGraph:
        """The graph of a model; functions are kept by their qualified names."""
        prior = model.prior
        features = [
            {
                "name": name,
                "function": qualified_name(feature.fn),
                "on": feature.on,
                "stochastic": feature.stochastic,
                "fingerprint": feature.fingerprint,
                # Only the plain form provably does not see the context.
                "reads": ["x"] if feature.on == "text" and not feature.reads_prompts else ["c", "x"],
            }
            for name, feature in model.features.items()
        ]
        factors = [f.describe() | {"name": f.name, "features": list(model.feature_names(f))} for f in model.factors]
        for factor, data in zip(model.factors, factors, strict=True):
            # Evidence without features reads the sequence itself.
            data["reads"] = [] if factor.features else ["x"]
            data["has_automaton"] = factor.automaton is not None
            data["has_incremental"] = factor.incremental is not None
        described = {
            "kind": type(prior).__name__,
            "fingerprint": prior.fingerprint,
            "prompts": list(prior.prompts),
            "max_new_tokens": prior.max_new_tokens,
        }
        return cls({"format": FORMAT, "prior": described, "features": features, "factors": factors})

    # Structure.

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the features, in the order of the declaration."""
        return tuple(one["name"] for one in self._data["features"])

    @property
    def factor_names(self) -> tuple[str, ...]:
        """Names of the factors, in the order of the declaration."""
        return tuple(one["name"] for one in self._data["factors"])

    @property
    def num_contexts(self) -> int:
        """C."""
        return len(self._data["prior"]["prompts"])

    @cached_property
    def network(self) -> nx.DiGraph:
        """The graph; nodes have the attributes `kind`, `label` and `layer` (0 for "c" to 4 for factors)."""
        graph = nx.DiGraph()
        graph.add_node("c", kind="context", layer=0, label="c")
        graph.add_node("prior", kind="prior", layer=1, label="π0(x|c)")
        graph.add_node("x", kind="sequence", layer=2, label="x")
        graph.add_edges_from([("c", "prior"), ("prior", "x")])
        for feature in self._data["features"]:
            key = f"feature:{feature['name']}"
            graph.add_node(key, kind="feature", layer=3, label=feature["name"])
            graph.add_edges_from((r if r in ("c", "x") else f"feature:{r}", key) for r in feature["reads"])
        for factor in self._data["factors"]:
            key, formula = f"factor:{factor['name']}", factor["formula"] or f"{factor['name']}(x)"
            label = (
                formula if re.search(rf"\b{re.escape(factor['name'])}\(", formula) else f"{factor['name']}\n{formula}"
            )
            graph.add_node(key, kind="factor", layer=4, label=label)
            graph.add_edges_from((read, key) for read in factor["reads"])
            graph.add_edges_from((f"feature:{name}", key) for name in factor["features"])
        return graph

    def validate(self) -> None:
        """Check the declaration.

        Raises
        ------
        ModelError
            Naming the node: a name that occurs twice, a reference to nothing, a factor without evidence, a
            cycle.
        """
        data = self._data
        if data.get("format") != FORMAT:
            raise ModelError(f"FactorGraph: got format {data.get('format')!r}, expected {FORMAT!r}")
        for what in ("features", "factors"):
            repeated = [name for name, n in Counter(one["name"] for one in data[what]).items() if n > 1]
            if repeated:
                raise ModelError(f"FactorGraph: two {what} are called {repeated[0]!r}")
        for feature in data["features"]:
            _check_known(f"feature {feature['name']!r}", feature["reads"], ["c", "x", *self.feature_names])
        for factor in data["factors"]:
            who = f"factor {factor['name']!r}"
            _check_known(who, factor["features"], self.feature_names)
            _check_known(who, factor["reads"], ["c", "x"])
            if not (factor["features"] or factor["has_automaton"] or factor["has_incremental"]):
                raise ModelError(f"FactorGraph: {who} has neither a feature, nor an automaton, nor an incremental form")
        if not nx.is_directed_acyclic_graph(self.network):
            cycle = " → ".join(source for source, _ in nx.find_cycle(self.network))
            raise ModelError(f"FactorGraph: features read each other in a circle: {cycle}")

    def dependencies(self, name: str) -> tuple[str, ...]:
        """Everything that a node reads, directly or not, in the order of reading.

        Parameters
        ----------
        name : str
            A node key, or the bare name of a factor or feature (the factor where both have the name).
        """
        above = nx.ancestors(self.network, self._key(name))
        return tuple(key for key in nx.lexicographical_topological_sort(self.network, self._rank) if key in above)

    def shared_features(self) -> dict[str, tuple[str, ...]]:
        """Features that more than one factor reads, each with these factors' names."""
        readers = {
            name: tuple(one["name"] for one in self._data["factors"] if name in one["features"])
            for name in self.feature_names
        }
        return {name: factors for name, factors in readers.items() if len(factors) > 1}

    def d_separated(self, a: str, b: str, given: str | Collection[str] = ()) -> bool:
        """Whether a ⟂ b | given follows from the structure alone, on c → x → features → factors.

        The prior is the arrow from c to x there, not a variable; a factor is the event that its evidence is true. A
        feature that is not stochastic is known as soon as all that it reads is. Source: `geiger1990`.

        Parameters
        ----------
        a, b : str
            Node keys or bare names, as in `dependencies`.
        given : str or collection of str
            What is observed.
        """
        directed = self.network.copy()
        directed.remove_node("prior")
        directed.add_edge("c", "x")
        observed = {self._key(name) for name in ([given] if isinstance(given, str) else given)}
        first, second = self._key(a), self._key(b)
        if "prior" in (first, second, *observed):
            raise ModelError(
                "FactorGraph.d_separated: the prior is the arrow c → x, not a variable; ask about 'c' or 'x'"
            )
        if first == second or {first, second} & observed:
            raise ModelError(
                f"FactorGraph.d_separated: got {a!r} and {b!r} given {sorted(observed)}, expected distinct nodes"
            )
        settled = {f"feature:{one['name']}" for one in self._data["features"] if not one["stochastic"]}
        for key in nx.topological_sort(directed):
            if key in settled and set(directed.predecessors(key)) <= observed:
                observed.add(key)
        if {first, second} & observed:
            return True  # a known value is independent of everything
        return bool(nx.is_d_separator(directed, {first}, {second}, observed))

    def _key(self, name: str) -> str:
        for key in (name, f"factor:{name}", f"feature:{name}"):
            if key in self.network:
                return key
        raise ModelError(f"FactorGraph: no node is called {name!r}{_suggestion(name, self.network)}")

    def _rank(self, key: str) -> tuple[int, int]:
        return self.network.nodes[key]["layer"], list(self.network).index(key)

    # Plain data.

    def to_dict(self) -> dict[str, Any]:
        """The declaration as JSON data: functions by qualified name, ±inf as "inf" and "-inf"."""
        copied: dict[str, Any] = json.loads(json.dumps(self._data))
        return copied

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FactorGraph:
        """What `to_dict` wrote, validated."""
        return cls(data)

    def content_hash(self) -> str:
        """sha256 of `to_dict`: equal declarations, equal hashes, on every machine."""
        text = json.dumps(self._data, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def required_functions(self) -> tuple[str, ...]:
        """The keys that `to_model` needs in `functions`."""
        features = {n for one in self._data["factors"] for n in _users_features(one)}
        wheres = [f"{one['name']}.where" for one in self._data["factors"] if one.get("where")]
        return (*(name for name in self.feature_names if name in features), *wheres)

    def to_model(self, prior: LanguageModel, functions: Mapping[str, Any]) -> Model:
        """The model again.

        Parameters
        ----------
        prior : LanguageModel
            π0; another one than was declared is allowed.
        functions : mapping
            Feature name → function (see `required_functions`); "NAME.where" → the `where` of constraint NAME;
            "factor:NAME" → a ready `Factor`, for kinds that lmppl does not know.

        Raises
        ------
        ModelError
            Where a function is missing, or a kind of factor is unknown.
        """
        from lmppl.modeling.model import Model

        return Model(prior, [self._factor(one, functions) for one in self._data["factors"]])

    def _factor(self, data: Mapping[str, Any], functions: Mapping[str, Any]) -> Factor:
        from lmppl.modeling import evidence

        ready = functions.get(f"factor:{data['name']}")
        if isinstance(ready, Factor):
            return ready
        build: Callable[..., Factor] | None = getattr(getattr(evidence, data["kind"], None), "from_description", None)
        if build is None:
            raise ModelError(
                f"FactorGraph.to_model: factor {data['name']!r} is a {data['kind']}, which cannot be rebuilt "
                f"from data; pass the factor as functions['factor:{data['name']}']"
            )
        return build(data, [self._feature(name, functions) for name in _users_features(data)], functions)

    def _feature(self, name: str, functions: Mapping[str, Any]) -> Feature:
        data = next(one for one in self._data["features"] if one["name"] == name)
        if name not in functions:
            raise ModelError(
                f"FactorGraph.to_model: functions lacks {name!r} (it was {data['function']}); "
                f"this graph needs {list(self.required_functions())}"
            )
        return Feature(name, functions[name], data["on"], data["stochastic"], data["fingerprint"])

    # Pictures.

    def to_mermaid(self) -> str:
        """The graph as a Mermaid flow chart, which GitHub and most documentation tools draw."""
        from lmppl.modeling.graph_drawing import mermaid

        return mermaid(self)

    def draw_png(self, path: str | Path) -> Path:
        """Draw from left to right, c → π0 → x → features → factors, into the file `path`.

        Raises
        ------
        MissingDependency
            Without matplotlib, which the extra `draw` installs.
        """
        from lmppl.modeling.graph_drawing import draw_png

        return draw_png(self, Path(path))

    def __repr__(self) -> str:
        return f"FactorGraph(features={list(self.feature_names)}, factors={list(self.factor_names)})"


def _users_features(factor: Mapping[str, Any]) -> list[str]:
    """The features whose functions are the user's, and are needed to rebuild the factor; others it makes itself."""
    names: list[str] = list(factor["features"])
    if factor.get("is_automaton") or factor.get("owns_features"):
        return []
    return names[: factor.get("users_features", len(names))]


def _check_known(who: str, references: Iterable[str], known: Collection[str]) -> None:
    for name in references:
        if name not in known:
            raise ModelError(f"FactorGraph: {who} reads {name!r}, which does not exist{_suggestion(name, known)}")


def _suggestion(name: str, known: Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {names}"


def _plain(value: Any) -> Any:
    """`value` as JSON data."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise ModelError(
        f"FactorGraph: {type(value).__name__} is no plain data; a factor's describe() must return only such"
    )
