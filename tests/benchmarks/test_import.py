"""`import lmppl` costs at most half a second of CPU time over `import torch, pyro`."""

import subprocess
import sys
from pathlib import Path

from pytest_benchmark.fixture import BenchmarkFixture

PROJECT = Path(__file__).resolve().parents[2]
SCRIPT = """
import time, torch, pyro
start = time.process_time()
import lmppl
print(time.process_time() - start)
"""


def cpu_seconds_of_import() -> float:
    run = subprocess.run([sys.executable, "-c", SCRIPT], cwd=PROJECT, capture_output=True, check=True)
    return float(run.stdout)


def test_import_costs_half_a_second_at_most(benchmark: BenchmarkFixture) -> None:
    seconds: list[float] = []
    benchmark.pedantic(lambda: seconds.append(cpu_seconds_of_import()), rounds=3)
    benchmark.extra_info["cpu_seconds"] = min(seconds)
    assert min(seconds) <= 0.5
