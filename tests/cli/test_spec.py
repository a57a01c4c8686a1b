"""Spec files: what is found in them, and what each mistake says."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lmppl.cli.spec import load_spec
from lmppl.errors import SpecError

HEAD = """
from lmppl import Constraint, Importance, Reward, TabularLM

prior = TabularLM.random(3, 3, seed=0)
"""
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Iterator[Write]:
    before, modules = list(sys.path), set(sys.modules)

    def written(body: str) -> Path:
        path = tmp_path / "spec.py"
        path.write_text(HEAD + body)
        return path

    yield written
    sys.path[:] = before
    for name in set(sys.modules) - modules:
        if name in ("lmppl_spec", "helper"):
            del sys.modules[name]


def test_the_variable_model_is_found(write: Write) -> None:
    spec = load_spec(str(write("model = prior * Reward(len_of := lambda xs: [len(x) for x in xs])\nother = model")))
    assert spec.name == "model"
    assert spec.engines == ()


def test_the_only_model_is_found_and_a_named_one(write: Write) -> None:
    path = write("a = prior * Reward(lambda xs: [0.0] * len(xs), name='r')\n_hidden = a")
    assert load_spec(str(path)).name == "a"
    assert load_spec(f"{path}:a").model.factors[0].name == "r"
    assert load_spec(f"{path}:prior").model.factors == ()


def test_engines_are_read(write: Write) -> None:
    spec = load_spec(str(write("model = prior\nengines = ['exact', Importance(3)]")))
    assert [str(e) for e in spec.engines] == ["exact", "importance(num_draws=3)"]
    with pytest.raises(SpecError, match="`engines` is of type str, expected a list"):
        load_spec(str(write("model = prior\nengines = 'exact'")))


def test_a_spec_may_import_its_neighbours_and_know_its_file(write: Write, tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("def score(texts):\n    return [1.0] * len(texts)\n")
    body = "from helper import score\nfrom pathlib import Path\nassert Path(__file__).name == 'spec.py'\n"
    body += "from dataclasses import dataclass\n@dataclass\nclass D:\n    x: 'int'\nmodel = prior * Reward(score)"
    assert load_spec(str(write(body))).model.factors[0].name == "score"


def test_what_it_prints_goes_to_stderr(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    load_spec(str(write("print('hello')\nmodel = prior")))
    assert capsys.readouterr() == ("", "hello\n")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("x = 3", r"looked for a variable `model`, .*only the language model prior: write SPEC.py:prior"),
        ("del prior", "it has none; write model = prior"),
        ("a = prior * Reward(len)\nb = prior * Reward(len)", r"it has a, b: write SPEC.py:a"),
        ("model = 3", "model is of type int, expected a model"),
        ("x = (", r"line 5\n    x = \(\nSyntaxError: '\(' was never closed"),
        ("def f():\n    return 1 / 0\nf()", r"line 6, in f\n    return 1 / 0\nZeroDivisionError: division by zero"),
        ("Reward(len, beta=0)", r"line 5, in <module>\n    Reward\(len, beta=0\)\nModelError: Reward: got beta=0"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise SystemExit(3)", r"called sys.exit\(3\)"),
        ("assert False, 'why'", "AssertionError: why"),
    ],
)
def test_mistakes_are_shown_at_their_own_line(write: Write, body: str, message: str) -> None:
    path = write(body)
    with pytest.raises(SpecError, match=message) as caught:
        load_spec(str(path))
    assert str(caught.value).startswith(str(path))
    assert "site-packages" not in str(caught.value)


def test_a_wrong_name_suggests_the_near_one(write: Write) -> None:
    path = write("happy = prior * Reward(len)")
    with pytest.raises(SpecError, match=r"no variable 'hapy' \(did you mean 'happy'\?\)"):
        load_spec(f"{path}:hapy")


def test_a_missing_file_suggests_the_near_one(write: Write, tmp_path: Path) -> None:
    write("model = prior")
    with pytest.raises(SpecError, match=r"there is no such file; did you mean .*spec\.py"):
        load_spec(str(tmp_path / "spce.py"))
    with pytest.raises(SpecError, match="there is no such file"):
        load_spec(str(tmp_path / "nowhere" / "x.py:model"))
    with pytest.raises(SpecError, match="is a folder"):
        load_spec(str(tmp_path))


def test_ctrl_c_in_a_spec_is_no_spec_error(write: Write) -> None:
    with pytest.raises(KeyboardInterrupt):
        load_spec(str(write("raise KeyboardInterrupt")))
