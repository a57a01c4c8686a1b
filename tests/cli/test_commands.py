"""The commands: what they print where, and their exit codes."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import lmppl
from lmppl.cli import app
from lmppl.cli.demo import _agreement
from lmppl.cli.exits import say
from lmppl.cli.sentiment import is_impersonal, sentiment
from lmppl.comparison import Comparison, Figure
from lmppl.sequences import Draws

SPEC = """
from lmppl import Constraint, Importance, Reward, TabularLM
print("a spec that prints")

def count_a(texts):
    print("a reward that prints")
    return [t.count("a") for t in texts]

def never(texts):
    return [False] * len(texts)

prior = TabularLM.random(3, 4, seed=0, context=["", "a"])
model = prior * Reward(count_a, beta=1) * Constraint(lambda texts: ["bb" not in t for t in texts], name="no bb")
impossible = prior * Constraint(never)
impossible_unbounded = impossible * Reward(count_a, beta=1)
broken = prior * Reward(lambda texts: [1.0], name="one")
bounded = prior * Reward(count_a, beta=1, upper=4)
even = TabularLM.random(3, 4, seed=0) * Reward(lambda texts: [0.5] * len(texts), name="even")
pressed = prior * Reward(lambda texts: (_ for _ in ()).throw(KeyboardInterrupt), name="pressed")
engines = ["exact", Importance(40)]
"""

OWN_ENGINE = """
from lmppl import Engine, Guarantee

class Mine(Engine):
    name = "mine"
    guarantee = Guarantee.CONSISTENT

    def run_shard(self, target, shard, *, state=None):
        return 1 / 0

    def merge(self, parts):
        return parts[0]
"""


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "spec.py").write_text(SPEC)
    yield "spec.py"
    sys.modules.pop("lmppl_spec", None)


def call(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "100", "TERM": "dumb"}).invoke(app, list(arguments))


def test_version_and_help() -> None:
    assert call("--version").output == f"lmppl {lmppl.__version__}\n"
    assert call("--help").exit_code == 0
    for command in ("demo", "check", "infer", "compare"):
        result = call(command, "--help")
        assert result.exit_code == 0
        assert "Exit codes" in result.output


def test_check_says_what_is_declared_and_what_can_run(spec: str) -> None:
    result = call("check", spec)
    assert result.exit_code == 0
    for text in (
        "exp(count_a(x)) · 1[no bb(x)]",
        "no upper bound",
        "2 contexts",
        "log φ of each factor",
        "✓ runs",
        "✗",
    ):
        assert text in result.stdout
    assert "rejection needs an upper bound" in result.stdout


def test_check_as_json(spec: str) -> None:
    result = call("check", spec, "--json", "--draws", "2")
    data = json.loads(result.stdout)
    runs = {engine["name"]: engine["runs"] for engine in data["engines"]}
    assert list(runs) == [kind.name for kind in lmppl.ENGINES]
    assert (runs["exact"], runs["rejection"], runs["smc"], runs["weighted_decoding"]) == (True, False, True, False)
    assert [len(data["tried"]), data["mermaid"].startswith("flowchart")] == [4, True]
    assert data["factors"][1]["hard"] is True
    assert "a reward that prints" in result.stderr


def test_check_finds_a_factor_that_fails(spec: str) -> None:
    result = call("check", f"{spec}:broken")
    assert result.exit_code == 2
    assert "factor 'one'" in result.stderr


def test_infer_saves_draws_and_tells(spec: str, tmp_path: Path) -> None:
    out = tmp_path / "draws.jsonl"
    result = call("infer", spec, "--engine", "importance", "--num-draws", "30", "--seed", "3", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "log Z" in result.stdout
    draws = Draws.load(out)
    assert len(draws) == 60
    assert draws.meta["seed"] == 3
    assert draws.meta["engine"] == "importance"


def test_infer_as_json_keeps_stdout_clean(spec: str, tmp_path: Path) -> None:
    result = call("infer", spec, "-e", "importance(20)", "--json")
    data = json.loads(result.stdout)
    assert len(data["draws"]) == 40
    assert data["engine"] == "importance(num_draws=20)"
    assert len(data["log_z"]) == 2
    assert "a spec that prints" in result.stderr
    out = tmp_path / "x.safetensors"
    data = json.loads(call("infer", spec, "-n", "5", "-e", "importance(20)", "--json", "-o", str(out)).stdout)
    assert data["out"] == str(out)
    assert "draws" not in data


def test_an_interval_that_does_not_exist_is_null(spec: str) -> None:
    (estimate,) = json.loads(call("infer", f"{spec}:even", "-e", "importance(20)", "--json").stdout)["log_z"]
    assert estimate["value"] == pytest.approx(0.5)
    assert (estimate["low"], estimate["high"]) == (None, None)
    assert "weights are equal" in estimate["note"]
    assert "(no interval)" in call("infer", f"{spec}:even", "-e", "importance(20)").stdout


def test_draws_are_called_what_they_are(spec: str) -> None:
    assert "draws of the posterior" in call("infer", f"{spec}:bounded", "-e", "rejection", "-n", "5").stdout
    assert "draws of the engine's own law" in call("infer", f"{spec}:bounded", "-e", "best_of_n(2)", "-n", "5").stdout


def test_a_certain_bound_is_said_once_and_what_was_asked_for_stands_beside_what_came(spec: str) -> None:
    text = call("infer", f"{spec}:bounded", "-e", "greedy").stdout
    assert "≥ " in text
    assert ", for certain" in text
    assert "inf" not in text
    text = call("infer", f"{spec}:bounded", "-e", "smc(32)", "-n", "20").stdout
    assert "(32 a context, 20 asked for)" in text
    assert "-n 256 makes 8 sweeps of 32 particles" in text
    assert "asked for" not in call("infer", f"{spec}:bounded", "-e", "smc(32)", "-n", "256").stdout
    assert "makes" not in call("infer", f"{spec}:bounded", "-e", "smc(32)", "-n", "64").stdout


def test_infer_without_an_engine_takes_the_first_that_can_run(spec: str) -> None:
    assert json.loads(call("infer", spec, "--json").stdout)["engine"] == "exact"


def test_a_budget_that_ends_first_is_told_and_is_no_failure(spec: str) -> None:
    result = call("infer", spec, "-e", "importance", "-n", "5000", "--budget-tokens", "10")
    assert result.exit_code == 0
    assert result.stderr.splitlines()[-1] == "note: the budget ended first: 1,024 draws"


def test_compare_uses_the_engines_of_the_spec(spec: str, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    result = call("compare", spec, "--num-draws", "30", "--out", str(out))
    assert result.exit_code == 0, result.output
    labels = [row["label"] for row in json.loads(out.read_text())["rows"]]
    assert labels == ["prior", "exact", "importance"]
    assert "How close one draw is" in result.stdout
    assert "note: saved to" in result.stderr


def test_compare_takes_engines_with_commas_inside(spec: str) -> None:
    engines = "exact, importance(num_draws=30, defensive=0.0),rejection"
    result = call("compare", spec, "--engines", engines, "--json", "--repeats", "2")
    data = json.loads(result.stdout)
    assert [row["repeats"] for row in data["rows"]] == [2, 1, 2, 0]
    assert "upper bound" in data["rows"][3]["reason"]


def test_compare_without_a_list_takes_every_engine(spec: str, tmp_path: Path) -> None:
    text = (tmp_path / "spec.py").read_text().replace("engines =", "others =")
    (tmp_path / "plain.py").write_text(text)
    data = json.loads(call("compare", "plain.py", "--json", "-n", "10").stdout)
    assert [row["label"] for row in data["rows"]] == ["prior", *(kind.name for kind in lmppl.ENGINES)]


def test_engines_of_ones_own_are_found_beside_the_spec(spec: str, tmp_path: Path) -> None:
    (tmp_path / "house_engines.py").write_text("from lmppl import Importance\nREADY = Importance(7)\n")
    data = json.loads(call("infer", spec, "-e", "house_engines:READY", "--json").stdout)
    assert data["num_draws"] == 14


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["infer", "nowhere.py"], 2, "there is no such file"),
        (["infer", "spec.py:nothing"], 2, "has no variable 'nothing'"),
        (["infer", "spec.py", "-e", "importence"], 2, "did you mean 'importance'"),
        (["infer", "spec.py", "-e", "importance(k=1)"], 2, "no argument is called 'k'"),
        (["infer", "spec.py", "-e", "importance(0)"], 2, "expected at least 1"),
        (["infer", "spec.py:broken", "-e", "importance"], 2, "factor 'one'"),
        (["infer", "spec.py", "-n", "0"], 2, "greater than or equal to 1"),
        (["infer", "spec.py", "-o", "x.txt"], 2, "the suffix must be one of .jsonl"),
        (["infer", "spec.py", "-o", "no/where.jsonl"], 2, "there is no folder"),
        (
            ["infer", "spec.py", "-o", "/proc/x.jsonl"],
            1,
            "error: --out /proc/x.jsonl: cannot write in the folder /proc",
        ),
        (["infer", "spec.py", "-o", "folder.jsonl"], 1, "is no regular file"),
        (["infer"], 2, "Missing argument"),
        (["compare", "spec.py", "--engines", "exact,,"], 2, "cannot read"),
        (["compare", "spec.py", "-o", "x.html"], 2, "the suffix must be one of .json"),
        (["infer", "spec.py", "-e", "rejection"], 3, "pass upper="),
        (["infer", "spec.py:impossible", "-e", "importance"], 4, "weight zero"),
        (["infer", "spec.py:impossible", "-e", "rejection(max_tries=50)"], 4, "0 of 50 draws accepted"),
        (["infer", "spec.py:impossible"], 4, "Z"),
        (["infer", "spec.py:pressed", "-e", "importance"], 5, "interrupted: importance: stopped before its first"),
        (
            ["compare", "spec.py:pressed"],
            5,
            "interrupted: the rows are those that were finished; not run: prior, exact, importance",
        ),
    ],
)
def test_exit_codes(spec: str, arguments: list[str], code: int, message: str) -> None:
    result = call(*arguments)
    assert result.exit_code == code, result.output
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.output


def test_a_full_disk_leaves_the_old_file(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "draws.jsonl"
    out.write_text("old")

    def full(self: Path, *arguments: object) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    result = call("infer", spec, "-e", "importance(10)", "--out", str(out))
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert out.read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} <= {"spec.py", "draws.jsonl", "folder.jsonl", "__pycache__"}


def test_parquet_without_its_package_is_refused_before_the_run(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = call("infer", spec, "-o", "x.parquet")
    assert result.exit_code == 1
    assert "lmppl[data]" in result.stderr
    assert "a spec that prints" not in result.stderr


def test_warnings_are_plain_lines_on_stderr(spec: str) -> None:
    result = call("compare", spec, "--engines", "best_of_n(n=1)", "-n", "50")
    assert result.exit_code == 0
    assert "note: best_of_n:" in result.stderr


def test_messages_wrap_at_words_in_a_terminal_and_are_one_line_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    message = " ".join(["forty-two"] * 12)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    say("note", message)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 2
    assert all(set(re.sub(r"\x1b\[[0-9;]*m", "", line).split()) <= {"note:", "forty-two"} for line in lines)
    monkeypatch.delenv("FORCE_COLOR")
    say("note", message)
    assert capsys.readouterr().err == f"note: {message}\n"


def test_what_user_functions_print_never_meets_the_results(spec: str) -> None:
    for arguments in (["check"], ["infer", "-e", "importance(10)"], ["compare", "-n", "10"]):
        result = call(arguments[0], spec, *arguments[1:])
        assert result.exit_code == 0
        assert "a reward that prints" in result.stderr
        assert "that prints" not in result.stdout
        assert all(line == line.rstrip() for line in result.stdout.splitlines())


def test_a_budget_that_the_engine_tells_of_is_told_once(spec: str) -> None:
    result = call("infer", f"{spec}:bounded", "-e", "rejection", "-n", "5000", "--budget-tokens", "10")
    told = [line for line in result.stderr.splitlines() if line.startswith("note:")]
    assert result.exit_code == 0
    assert len(told) == len([line for line in told if "rejection: context" in line]) > 0


def test_shown_draws_are_different_ones(spec: str) -> None:
    for engine in ("rejection", "importance", "best_of_n(2)", "exact"):
        for n in (3, 200):
            lines = call("infer", f"{spec}:bounded", "-e", engine, "-n", str(n)).stdout.splitlines()
            shown = lines[next(i for i, line in enumerate(lines) if line.startswith("Some draws")) + 1 :]
            if n == 200 or engine == "exact":
                assert [len(set(shown[:5])), len(set(shown[5:]))] == [5, 5]  # one context, then the other
            else:
                assert 2 <= len(shown) <= 2 * n


@pytest.mark.parametrize(
    ("name", "engines", "code", "messages"),
    [
        ("model", "rejection", 3, ["error: rejection needs an upper bound"]),
        ("impossible", "importance,rejection(max_tries=50)", 4, ["error: importance: all", "error: rejection: 0 of"]),
        ("broken", "importance,best_of_n", 2, ["error: importance: factor 'one'", "error: best_of_n: factor 'one'"]),
        ("broken", "rejection,importance", 2, ["error: rejection needs", "error: importance: factor 'one'"]),
        ("impossible_unbounded", "importance,rejection", 1, ["error: importance: all", "error: rejection needs"]),
        ("model", "rejection,importance", 0, []),
    ],
)
def test_a_comparison_without_results_fails(spec: str, name: str, engines: str, code: int, messages: list[str]) -> None:
    for options in ([], ["--json"]):
        result = call("compare", f"{spec}:{name}", "--engines", engines, "-n", "20", *options)
        assert result.exit_code == code, result.output
        told = [line for line in result.stderr.splitlines() if line.startswith("error:")]
        assert len(told) == len(messages)
        assert all(line.startswith(message) for line, message in zip(told, messages, strict=True))
        assert "prior" in result.stdout


def test_an_engine_of_ones_own_that_raises_is_shown_at_its_line(spec: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN_ENGINE)
    for command in (["infer", spec, "-e", "mine:Mine()"], ["compare", spec, "--engines", "mine:Mine()", "-n", "10"]):
        result = call(*command)
        assert result.exit_code == 2, result.output
        assert result.stderr.splitlines()[-1].endswith("mine.py:9, in run_shard: ZeroDivisionError: division by zero")


def test_a_fault_of_lmppl_keeps_its_traceback(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmppl.cli.reporting._promise", lambda guarantee: {}[guarantee.value])
    monkeypatch.setattr("lmppl.cli.exits.PACKAGE", Path(__file__).resolve().parent)
    assert isinstance(call("infer", spec).exception, KeyError)


def test_sentiment_is_bounded_and_hears_negations() -> None:
    texts = ["wonderful", "not wonderful", "bad and boring", "good but bad", "a table", "", "didn't enjoy it"]
    assert sentiment(texts) == [1.0, -1.0, -1.0, 0.0, 0.0, 0.0, -1.0]
    assert is_impersonal(["a good film.", "I liked it", "it's for us", "mystery", "I'm glad"]) == [1, 0, 0, 1, 0]


def test_estimates_that_are_far_apart_are_not_said_to_agree() -> None:
    one = Figure(0.0, 0.3)
    assert _agreement(one, Figure(0.5, 0.4)) == "agree on log Z within 1.0 standard errors"
    assert _agreement(one, Figure(1.0, 0.4)) == "agree on log Z within 2.0 standard errors"
    assert _agreement(one, Figure(1.4, 0.4)) == "differ on log Z by 2.8 standard errors (by chance once in 196 runs)"
    assert _agreement(one, Figure(9.0, 0.4)) == "differ on log Z by 18.0 standard errors"


def test_the_demonstration_runs_its_engines_and_shows_what_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Comparison] = []
    compare = lmppl.compare

    def kept(*arguments: object, **options: object) -> Comparison:
        seen.append(compare(*arguments, **options))
        return seen[-1]

    monkeypatch.setattr("lmppl.cli.demo.compare", kept)
    monkeypatch.setattr("lmppl.cli.demo.NUM_DRAWS", 40)
    result = call("demo", "--no-progress")
    assert result.exit_code == 0
    shown = result.stdout
    for text in (
        "num_draws=40, seed=1)",
        "π*(x|c) ∝ π0(x|c)",
        "draws of the posterior",
        "best_of_n(n=8)",
        "no result",
        "Seen: the evidence moved",
    ):
        assert text in shown
    assert shown.rstrip().splitlines()[-1].endswith(".")
    assert all(line == line.rstrip() for line in shown.splitlines())
    (table,) = seen
    ran = [row.label for row in table.rows if row.figures]
    assert ran == ["prior", "rejection", "importance", "smc", "mcmc(warmup=20)", "best_of_n(n=8)"]
    assert "exact enumeration" in table["exact"].reason
    assert table["rejection"]["mean:sentiment"].value > table["prior"]["mean:sentiment"].value + 0.4
