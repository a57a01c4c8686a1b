"""From names to engines: what is read, what is refused, and that every engine file is in `ENGINES`."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

import lmppl.inference
from lmppl.errors import ModelError, UnsupportedModel
from lmppl.inference import ENGINES, BestOfN, Exact, Importance, Rejection, parse_engine, resolve_engine, split_engines
from lmppl.inference.engine import Engine, Guarantee
from lmppl.lm import TabularLM
from lmppl.modeling import Model, Reward, TargetForm

SMALL = TabularLM.random(3, 3, seed=0)
LARGE = TabularLM.random(20, 30, seed=0)


@dataclass(frozen=True)
class Mine(Engine):
    """An engine of somebody else's, with a field that must be given."""

    k: int
    flag: bool = False
    name: ClassVar[str] = "mine"
    guarantee: ClassVar[Guarantee] = Guarantee.CONSISTENT

    def run_shard(self, target: Any, shard: Any, *, state: Any = None) -> Any:
        raise NotImplementedError

    def merge(self, parts: Any) -> Any:
        raise NotImplementedError


READY = Mine(3)
NO_ENGINE = 7


def test_every_engine_of_the_package_is_in_engines() -> None:
    found = set()
    for module in pkgutil.walk_packages(lmppl.inference.__path__, "lmppl.inference."):
        members = vars(importlib.import_module(module.name)).values()
        found |= {m for m in members if inspect.isclass(m) and issubclass(m, Engine) and m.__module__ == module.name}
    assert {kind for kind in found if not inspect.isabstract(kind)} == set(ENGINES)


def test_names_are_distinct_and_exact_comes_first() -> None:
    assert len({kind.name for kind in ENGINES}) == len(ENGINES)
    order = list(Guarantee)
    ranks = [order.index(kind.guarantee) for kind in ENGINES]
    assert ranks == sorted(ranks)
    assert all(kind.references for kind in ENGINES)


@pytest.mark.parametrize(
    ("text", "engine"),
    [
        ("exact", Exact()),
        (" rejection ", Rejection()),
        ("rejection()", Rejection()),
        ("importance(4096)", Importance(4096)),
        ("importance(num_draws=4096)", Importance(4096)),
        ("importance( 10, defensive = 0.5 )", Importance(10, defensive=0.5)),
        ("best-of-n(n=4)", BestOfN(4)),
        ("BestOfN(4, score='r')", BestOfN(4, score="r")),
        ("rejection(log_upper=-1.5)", Rejection(log_upper=-1.5)),
        (f"{__name__}:READY", READY),
        (f"{__name__}:Mine(4, flag=True)", Mine(4, True)),
    ],
)
def test_text_becomes_an_engine(text: str, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, __name__, inspect.getmodule(test_text_becomes_an_engine))
    found = parse_engine(text)
    assert repr(found) == repr(engine)
    assert str(found) == str(engine)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("importence", "did you mean 'importance'"),
        ("zzz", "there are exact, rejection, importance, .*best_of_n.*; one of your own is package.module:MyEngine"),
        ("", "cannot read"),
        ("importance(", "cannot read"),
        ("importance(4)(5)", "cannot read the arguments"),
        ("importance(4))(", "cannot read"),
        ("importance(num_particles=3)", "no argument is called 'num_particles'; it has num_draws, proposal"),
        ("importance(num_draw=3)", "did you mean 'num_draws'"),
        ("importance(3, num_draws=3)", "given twice"),
        ("importance(num_draws=3, num_draws=4)", "name each once"),
        ("importance(**{'num_draws': 3})", "name each once"),
        ("importance(1, 2, 3, 4, 5)", "got 5 arguments without a name; it has num_draws"),
        ("importance(open('x'))", "is no literal"),
        ("importance(num_draws=lm)", "'lm' in .* is no literal"),
        ("mcmc(kernel=LocalEdit())", "'LocalEdit\\(\\)' in .* a list `engines` of the spec.* package.module:NAME"),
        ("importance(__import__('os').getpid())", "is no literal"),
        ("no.such.module:Engine", "cannot import no.such.module"),
        ("lmppl.inference:Nothing", "has no 'Nothing'"),
        ("lmppl.inference:ENGINES", "expected a subclass of lmppl.Engine"),
        ("lmppl.inference.engine:Budget", "expected a subclass"),
    ],
)
def test_bad_text_is_refused_with_the_reason(text: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        parse_engine(text)


def test_engines_from_elsewhere_say_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, __name__, inspect.getmodule(test_text_becomes_an_engine))
    with pytest.raises(ModelError, match="missing k"):
        parse_engine(f"{__name__}:Mine")
    with pytest.raises(ModelError, match="is an engine already"):
        parse_engine(f"{__name__}:READY(3)")
    with pytest.raises(ModelError, match="expected a subclass"):
        parse_engine(f"{__name__}:NO_ENGINE")


def test_none_takes_the_first_that_can_run_and_never_a_heuristic(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = Reward(lambda texts: [0.5] * len(texts), name="r")
    bounded = Reward(lambda texts: [0.5] * len(texts), upper=1, name="r")
    assert resolve_engine(None, TargetForm.of(Model(SMALL, [reward]))) == Exact()
    form = TargetForm.of(Model(LARGE, [reward]))
    large = TargetForm(**{**vars(form), "tabular": False})
    assert resolve_engine(None, large) == Importance()
    bounded_form = TargetForm.of(Model(LARGE, [bounded]))
    assert resolve_engine(None, TargetForm(**{**vars(bounded_form), "tabular": False})) == Rejection()
    monkeypatch.setattr("lmppl.inference.resolve.ENGINES", (Rejection, BestOfN))
    with pytest.raises(UnsupportedModel, match=r"no engine can run on this model:\n  rejection: .*upper"):
        resolve_engine(None, large)


def test_instances_pass_and_classes_are_refused() -> None:
    form = TargetForm.of(Model(SMALL))
    engine = Importance(7)
    assert resolve_engine(engine, form) is engine
    assert resolve_engine("importance(7)", form) == engine
    with pytest.raises(ModelError, match=r"got the class Importance, expected an instance: Importance\(\)"):
        resolve_engine(Importance, form)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="got int, expected an Engine"):
        resolve_engine(3, form)  # type: ignore[arg-type]


def test_lists_of_engines_keep_commas_inside() -> None:
    text = "exact, importance(num_draws=4, defensive=0.5),best_of_n(score='a,b'), m.x:Y([1, 2])"
    pieces = ["exact", "importance(num_draws=4, defensive=0.5)", "best_of_n(score='a,b')", "m.x:Y([1, 2])"]
    assert split_engines(text) == pieces
    for bad in ("", "exact,", "exact,,rejection", "importance(4", "best_of_n(score='a)"):
        with pytest.raises(ModelError, match="cannot read"):
            split_engines(bad)


def test_every_engine_file_stands_in_the_paper_index() -> None:
    index = Path(__file__).resolve().parents[2] / "docs" / "paper_index.md"
    text = index.read_text(encoding="utf-8")
    assert [kind.__name__ for kind in ENGINES if f"`{kind.__name__}`" not in text] == []
