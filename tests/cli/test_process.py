"""The command line as a process: Ctrl-C is a real signal, `import lmppl.cli` is light, `python -m lmppl` works."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmppl.sequences import Draws

PROJECT = Path(__file__).resolve().parents[2]
SLOW = """
import time
from pathlib import Path
from lmppl import Reward, TabularLM

def slow(sequences):
    with Path("called").open("a") as file:
        file.write("x")
    time.sleep(0.1)
    return [0.0] * len(sequences)

model = TabularLM.random(3, 4, seed=0) * Reward(slow, on="ids")
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT to a process")
def test_ctrl_c_saves_whole_shards_and_exits_with_5(tmp_path: Path) -> None:
    (tmp_path / "spec.py").write_text(SLOW)
    command = [sys.executable, "-m", "lmppl", "infer", "spec.py", "-e", "importance", "-n", "10000000", "-o", "x.jsonl"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    marker, deadline = tmp_path / "called", time.monotonic() + 60
    while not (marker.exists() and len(marker.read_text()) >= 3) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 5, messages
    assert "Traceback" not in messages
    draws = Draws.load(tmp_path / "x.jsonl")
    assert len(draws) >= 2048
    assert len(draws) % 1024 == 0
    assert f"interrupted: {len(draws):,} draws of whole shards are saved to x.jsonl" in messages
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.is_file()) == ["", ".jsonl", ".py"]


def test_the_command_line_is_light_until_a_command_runs() -> None:
    script = "import sys, lmppl; before = set(sys.modules); import lmppl.cli; print(*sorted(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in run.stdout.split()}
    assert loaded.isdisjoint({"transformers", "pandas", "matplotlib", "arviz_stats", "datasets"})
    assert "lmppl.cli.demo" not in run.stdout


def test_a_pipe_that_closes_early_is_no_crash_of_the_spec(tmp_path: Path) -> None:
    (tmp_path / "spec.py").write_text("from lmppl import TabularLM\nmodel = TabularLM.random(3, 3, seed=0)\n")
    command = f"{sys.executable} -m lmppl check spec.py | head -1"
    run = subprocess.run(
        command, shell=True, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert run.stdout.startswith("π*(x|c)")
    assert "Traceback" not in run.stderr
