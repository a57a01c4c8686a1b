"""Every example is a spec that the command line can check, run and compare, and is short enough to read at once."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lmppl.cli import app
from lmppl.inference.resolve import ENGINES

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SPECS = sorted(path for path in EXAMPLES.glob("*.py") if "\nmodel = " in path.read_text(encoding="utf-8"))
NEEDS = {"reviews.py": ("profanity_check", "vaderSentiment")}
# Draws per context, small enough for what each declaration costs.
FEW = {
    "chains.py": 10,
    "enumerate.py": 50,
    "forms.py": 10,
    "guided.py": 8,
    "judges.py": 10,
    "paris.py": 1,
    "persona.py": 8,
    "rare.py": 10,
    "remote_judge.py": 10,
}


@pytest.fixture(params=SPECS, ids=lambda path: path.name)
def spec(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for module in NEEDS.get(request.param.name, ()):
        pytest.importorskip(module, reason=f"{request.param.name} needs {module}: pip install 'lmppl[examples]'")
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield request.param
    sys.modules.pop("lmppl_spec", None)


def call(*arguments: str) -> Result:
    result = CliRunner(env={"COLUMNS": "100", "TERM": "dumb"}).invoke(app, list(arguments))
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result


def test_there_are_specs() -> None:
    assert {"enumerate.py", "paris.py", "rare.py", "reviews.py"} <= {path.name for path in SPECS}


def test_a_spec_is_short_and_says_how_to_run_it(spec: Path) -> None:
    text = spec.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    assert f"lmppl compare examples/{spec.name}" in text


def test_check_infer_and_compare(spec: Path, tmp_path: Path) -> None:
    few = str(FEW.get(spec.name, 20))
    assert "Engines" in call("check", str(spec)).stdout
    out = tmp_path / "draws.jsonl"
    call("infer", str(spec), "--num-draws", few, "--out", str(out))
    assert out.is_file()
    own = call("compare", str(spec), "--num-draws", few).stdout
    for engine in runpy.run_path(str(spec))["engines"]:
        assert f"\n{engine.name}" in own
    table = call("compare", str(spec), "--engines", "rejection,best_of_n(n=2)", "--num-draws", few).stdout
    assert "rejection" in table
    assert "best_of_n" in table


def test_every_engine_is_in_an_example() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in SPECS)
    assert [kind.__name__ for kind in ENGINES if f"lmppl.{kind.__name__}" not in text] == []


def test_enumerate_runs_as_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "enumerate.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "log Z" in printed
    assert "bbbb" in printed


def test_balanced_runs_as_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    path = EXAMPLES / "balanced.py"
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60
    assert "KL(π*‖π0)" in printed
    assert "she  There was a bear" in printed
