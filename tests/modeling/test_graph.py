"""The declared graph: structure, d-separation, validation, round trips through data, pictures."""

import builtins
import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lmppl.errors import MissingDependency, ModelError
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence import Automaton, Constraint, Optimality, Reward
from lmppl.modeling.factors import Factor, Feature
from lmppl.modeling.graph import FactorGraph
from lmppl.modeling.model import Model
from lmppl.modeling.target import Target

LM = TabularLM.random(3, 3, context=["", "b"])


def sentiment(texts: list[str]) -> list[float]:
    return [t.count("a") / 3 for t in texts]


def relevance(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(c.startswith(p)) for p, c in zip(prompts, completions, strict=True)]


def log_clean(texts: list[str]) -> list[float]:
    return [-0.5 * len(t) for t in texts]


def is_positive(column: torch.Tensor) -> torch.Tensor:
    return column > 0.2


FUNCTIONS = {"sentiment": sentiment, "relevance": relevance, "log_clean": log_clean, "positive.where": is_positive}
MODEL = (
    LM
    * Reward(sentiment, beta=0.5, upper=1)
    * Constraint(sentiment, where=is_positive, name="positive")
    * Reward(relevance, beta=1 / 3)
    * Constraint(Automaton.avoiding("bb"), name="no_bb")
    * Optimality(log_clean)
)
GRAPH = MODEL.graph


def changed(**changes: Any) -> dict[str, Any]:
    """The data of GRAPH with one entry, written as a path, replaced."""
    data: Any = copy.deepcopy(GRAPH.to_dict())
    for path, value in changes.items():
        *way, last = path.split("__")
        place = data
        for step in way:
            place = place[int(step) if step.isdigit() else step]
        place[int(last) if last.isdigit() else last] = value
    return data  # type: ignore[no-any-return]


# Structure.


def test_nodes_and_edges() -> None:
    network = GRAPH.network
    assert all(isinstance(key, str) for key in network)
    assert set(network) == {
        *("c", "prior", "x"),
        *(f"feature:{name}" for name in ("sentiment", "relevance", "no_bb", "log_clean")),
        *(f"factor:{name}" for name in ("sentiment", "positive", "relevance", "no_bb", "log_clean")),
    }
    assert set(network.edges) == {
        ("c", "prior"),
        ("prior", "x"),
        *(("x", f"feature:{name}") for name in ("sentiment", "relevance", "no_bb", "log_clean")),
        ("c", "feature:relevance"),
        ("feature:sentiment", "factor:sentiment"),
        ("feature:sentiment", "factor:positive"),
        ("feature:relevance", "factor:relevance"),
        ("feature:no_bb", "factor:no_bb"),
        ("feature:log_clean", "factor:log_clean"),
    }


def test_dependencies() -> None:
    assert GRAPH.dependencies("positive") == ("c", "prior", "x", "feature:sentiment")
    assert GRAPH.dependencies("factor:relevance") == ("c", "prior", "x", "feature:relevance")
    assert GRAPH.dependencies("feature:log_clean") == ("c", "prior", "x")
    assert GRAPH.dependencies("x") == ("c", "prior")
    assert GRAPH.dependencies("c") == ()
    with pytest.raises(ModelError, match="no node is called 'sentimant'; did you mean 'factor:sentiment'"):
        GRAPH.dependencies("sentimant")


def test_shared_features() -> None:
    assert GRAPH.shared_features() == {"sentiment": ("sentiment", "positive")}
    assert (LM * Reward(sentiment)).graph.shared_features() == {}


@pytest.mark.parametrize(
    ("a", "b", "given", "separated"),
    [
        ("c", "log_clean", (), False),
        ("c", "log_clean", "x", True),
        ("c", "relevance", "x", False),  # it reads the prompt itself
        ("sentiment", "positive", "x", True),
        ("sentiment", "positive", (), False),
        ("sentiment", "positive", "feature:sentiment", True),
        ("sentiment", "log_clean", "feature:sentiment", True),
        ("feature:sentiment", "positive", "x", True),
        ("relevance", "log_clean", "c", False),
        ("relevance", "log_clean", "x", True),
        ("relevance", "log_clean", (), False),
        ("c", "x", "factor:positive", False),
    ],
)
def test_d_separation(a: str, b: str, given: Any, separated: bool) -> None:
    assert GRAPH.d_separated(a, b, given) is separated
    assert GRAPH.d_separated(b, a, [given] if isinstance(given, str) else given) is separated


def test_a_stochastic_feature_is_not_known_from_the_text() -> None:
    graph = (
        LM * Reward(sentiment, stochastic=True) * Optimality(Feature("sentiment", sentiment, stochastic=True))
    ).graph
    assert graph.shared_features() == {"sentiment": ("sentiment", "sentiment_2")}
    assert not graph.d_separated("sentiment", "sentiment_2", "x")
    assert graph.d_separated("sentiment", "sentiment_2", "feature:sentiment")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("prior", "x"), "the prior is the arrow"),
        (("c", "x", "prior"), "the prior is the arrow"),
        (("c", "c"), "distinct"),
        (("c", "x", "c"), "distinct"),
        (("c", "y"), "no node is called 'y'"),
    ],
)
def test_questions_without_an_answer(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        GRAPH.d_separated(*arguments)


def test_a_prior_alone_and_evidence_without_features() -> None:
    assert list(Model(LM).graph.network) == ["c", "prior", "x"]
    machine = Automaton.containing("a")
    bare = Factor("bare", (), lambda columns: torch.zeros(0), automaton=machine)
    assert ("x", "factor:bare") in (LM * bare).graph.network.edges


# Validation.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "other/2"}, "format 'other/2'"),
        ({"features__1__name": "sentiment"}, "two features are called 'sentiment'"),
        ({"factors__1__name": "sentiment"}, "two factors are called 'sentiment'"),
        ({"factors__0__features": ["sentimant"]}, "factor 'sentiment' reads 'sentimant'.*did you mean 'sentiment'"),
        ({"features__0__reads": ["y"]}, "feature 'sentiment' reads 'y'"),
        ({"factors__0__reads": ["y"]}, "factor 'sentiment' reads 'y'"),
        ({"factors__0__features": []}, "factor 'sentiment' has neither a feature, nor an automaton"),
        (
            {"features__0__reads": ["log_clean"], "features__3__reads": ["sentiment"]},
            "in a circle: feature:(sentiment → feature:log_clean|log_clean → feature:sentiment)",
        ),
        ({"features__0__reads": ["sentiment"]}, "in a circle: feature:sentiment"),
    ],
)
def test_wrong_declarations(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        FactorGraph.from_dict(changed(**changes))


def test_a_factor_must_describe_itself_in_plain_data() -> None:
    class Odd(Factor):
        def describe(self) -> dict[str, Any]:
            return super().describe() | {"tensor": torch.zeros(1)}

    with pytest.raises(ModelError, match="Tensor is no plain data"):
        FactorGraph.from_model(LM * Odd("odd", (Feature("sentiment", sentiment),), lambda c: c["sentiment"]))


# Plain data.


def test_round_trip_as_json() -> None:
    text = json.dumps(GRAPH.to_dict(), allow_nan=False)
    again = FactorGraph.from_dict(json.loads(text))
    assert again.to_dict() == GRAPH.to_dict()
    assert again.content_hash() == GRAPH.content_hash()
    assert dict(again.network.nodes(data=True)) == dict(GRAPH.network.nodes(data=True))
    assert list(again.network.edges) == list(GRAPH.network.edges)


def test_to_dict_is_a_copy() -> None:
    GRAPH.to_dict()["factors"].clear()
    assert len(GRAPH.to_dict()["factors"]) == 5


def test_round_trip_as_a_model() -> None:
    assert set(GRAPH.required_functions()) == set(FUNCTIONS)
    again = FactorGraph.from_dict(GRAPH.to_dict()).to_model(LM, FUNCTIONS)
    assert again.graph.to_dict() == GRAPH.to_dict()
    for context in range(2):
        rows = LM.enumerate_sequences(context).sequences
        expected, values = Target(MODEL).log_factors(rows), Target(again).log_factors(rows)
        assert list(values) == list(expected)
        assert all(torch.equal(values[name], expected[name]) for name in expected)


def test_a_constraint_with_predicate_and_automaton_comes_back() -> None:
    def has_a(texts: list[str]) -> list[bool]:
        return ["a" in t for t in texts]

    model = LM * Constraint(has_a, automaton=Automaton.containing("a"))
    again = model.graph.to_model(LM, {"has_a": has_a})
    assert again.graph.content_hash() == model.graph.content_hash()
    assert again.factors[0].automaton is not None


def test_missing_functions_and_unknown_kinds() -> None:
    for name in FUNCTIONS:
        with pytest.raises(ModelError, match=re.escape(repr(name))):
            GRAPH.to_model(LM, {key: fn for key, fn in FUNCTIONS.items() if key != name})
    own = Factor("own", (Feature("sentiment", sentiment),), lambda columns: columns["sentiment"])
    graph = (LM * own).graph
    with pytest.raises(ModelError, match=r"factor 'own' is a Factor.*functions\['factor:own'\]"):
        graph.to_model(LM, {"sentiment": sentiment})
    assert graph.to_model(LM, {"factor:own": own}).factors == (own,)


def test_the_hash_tells_declarations_apart() -> None:
    models = [
        MODEL,
        MODEL.without("positive"),
        LM.with_contexts(["", "a"]) * Reward(sentiment),
        LM * Reward(sentiment),
        LM * Reward(sentiment, beta=1 + 1e-12),
        LM * Reward(sentiment, upper=1),
        LM * Reward(sentiment, on="full"),
        LM * Reward(sentiment, stochastic=True),
        LM * Reward(sentiment, fingerprint="v2"),
        LM * Reward(log_clean, name="sentiment"),
        LM * Optimality(sentiment),
        LM * Constraint(sentiment, where=is_positive),
        LM * Constraint(sentiment, where=lambda s: s > 0.2),
        LM * Constraint(sentiment, where=lambda s: s > 0.3),
        LM * Constraint(Automaton.containing("a"), name="sentiment"),
        LM * Constraint(Automaton.containing("b"), name="sentiment"),
    ]
    assert len({m.graph.content_hash() for m in models}) == len(models)
    assert re.fullmatch("[0-9a-f]{64}", GRAPH.content_hash())


def test_the_hash_is_the_same_everywhere() -> None:
    data = {
        "format": "lmppl.FactorGraph/1",
        "prior": {"kind": "TabularLM", "fingerprint": "0", "prompts": ["é"], "max_new_tokens": 2},
        "features": [],
        "factors": [],
    }
    known = "a9e0f2cd2df273a3a3dfc9f06c0a9174674239111103443ec7eac36377cd32c1"
    assert FactorGraph(data).content_hash() == known
    assert FactorGraph(dict(reversed(list(data.items())))).content_hash() == known


# Pictures.


def test_mermaid() -> None:
    lines = GRAPH.to_mermaid().splitlines()
    assert lines[0] == "flowchart LR"
    assert '    n0(("c<br>2 contexts"))' in lines
    assert any('["exp(sentiment(x)/0.5)"]' in line for line in lines)
    assert any('["positive<br>1[is_positive(sentiment(x))]"]' in line for line in lines)
    assert sum("-->" in line for line in lines) == GRAPH.network.number_of_edges()
    quoted = (LM * Reward(sentiment, name='a "b" <c>')).graph.to_mermaid()
    assert "a #quot;b#quot; #lt;c#gt;" in quoted


@pytest.mark.parametrize("model", [MODEL, Model(LM), LM * Reward(sentiment, on="full")])
def test_png(model: Model, tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image", reason="needs the extra draw")
    path = model.graph.draw_png(tmp_path / "graph.png")
    pixels = image.imread(path)
    assert pixels.shape[0] > 100
    assert pixels.shape[1] > 300
    # Nothing is cut off: the border stays white.
    border = [pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]
    assert all(bool((edge == 1).all()) for edge in border)


def test_drawing_leaves_pyplot_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra draw")
    real = builtins.__import__

    def guarded(name: str, *rest: Any) -> Any:
        assert name != "matplotlib.pyplot"
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", guarded)
    GRAPH.draw_png(tmp_path / "graph.png")


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(MissingDependency, match=r"lmppl\[draw\]"):
        GRAPH.draw_png(tmp_path / "graph.png")
    assert not (tmp_path / "graph.png").exists()
