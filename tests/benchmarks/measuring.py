"""What the sampling benchmarks share: contenders in turns, peers in their own process, and results as JSON files."""

from __future__ import annotations

import gc
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from lmppl.storage import versions

__all__ = [
    "Found",
    "Peer",
    "ResidentMemory",
    "cpu_seconds",
    "in_turns",
    "log_mean_exp",
    "peers_python",
    "ratio",
    "record",
    "resident_memory",
    "run_apart",
    "single_thread",
]

Found = dict[str, list[dict[str, Any]]]
"""What each contender did in each round; `cpu_seconds` among the figures."""

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def peers_python() -> str:
    """The Python of the peers' own environment, from $LMPPL_PEERS; `peers/requirements.txt` says how to make it."""
    python = os.environ.get("LMPPL_PEERS")
    if not python:
        pytest.skip("needs $LMPPL_PEERS, the Python of an environment with tests/benchmarks/peers/requirements.txt")
    return python


class Peer:
    """A script of `peers/` at work in its own process: one line of JSON in, one out, from then on.

    Parameters
    ----------
    script : str
    setup : dict
        The first line that the script reads; its answer holds the peer's versions.
    """

    def __init__(self, script: str, setup: dict[str, Any]) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        self.process = subprocess.Popen(
            [peers_python(), str(HERE / "peers" / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.versions = self.ask(setup)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request, wait for its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer has ended with status {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


@contextmanager
def single_thread() -> Iterator[None]:
    """One thread for torch, as the peers have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def cpu_seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """CPU time of one call, and what it returned."""
    gc.collect()
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


@dataclass
class ResidentMemory:
    """Bytes that the process held before some work, and at most while it ran."""

    before: int
    peak: int


@contextmanager
def resident_memory() -> Iterator[ResidentMemory]:
    """Watch this process while the body runs; its own record would hold what came before, such as loading a model."""
    import psutil

    process, over = psutil.Process(), threading.Event()
    resident = process.memory_info().rss
    memory = ResidentMemory(resident, resident)

    def watch() -> None:
        while not over.wait(0.002):
            memory.peak = max(memory.peak, process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield memory
    finally:
        over.set()
        thread.join()


def in_turns(contenders: dict[str, Callable[[int], dict[str, Any]]], rounds: int, *, warm_up: bool = True) -> Found:
    """Every contender once in each round; each gets the round's number.

    A contender returns figures, `cpu_seconds` among them. With `warm_up` a first round does not count.
    """
    if warm_up:
        for contender in contenders.values():
            contender(-1)
    found: Found = {name: [] for name in contenders}
    for number in range(rounds):
        for name, contender in contenders.items():
            found[name].append(contender(number))
    return found


def ratio(found: Found, above: str, below: str) -> float:
    """The median over rounds of the CPU seconds of one contender over those of another in the same round."""
    pairs = zip(found[above], found[below], strict=True)
    return median(a["cpu_seconds"] / b["cpu_seconds"] for a, b in pairs)


def log_mean_exp(values: torch.Tensor) -> float:
    """log of the mean of e^values."""
    return float(torch.logsumexp(values, 0) - torch.tensor(float(len(values))).log())


def record(name: str, figures: dict[str, Any]) -> None:
    """Write `results/<name>.json`, with versions and machine."""
    whole = {
        **figures,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": versions(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def run_apart(script: str, *arguments: str) -> dict[str, Any]:
    """Run a Python script in a process of its own, single-threaded; the last line that it prints, as JSON."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parents[1], check=False)
    if run.returncode != 0:
        raise RuntimeError(run.stderr)
    answer: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return answer
