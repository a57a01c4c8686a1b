"""Dynamic programming: log Z and the soft values of 50 tokens × 200 steps × a ten-state automaton within a second."""

import json
import math
import os
import platform
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from lmppl.inference.dynamic_programming import AutomatonLM
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence.automata import Automaton
from lmppl.storage import versions

RESULTS = Path(__file__).parent / "results"
STATES = 10


def counting(letter: str) -> Automaton:
    """Texts in which the number of times that `letter` occurs is 3 modulo ten."""
    ring = torch.arange(STATES)
    return Automaton(torch.stack([(ring + 1) % STATES, ring], 1), (letter,), 0, ring == 3)


@pytest.mark.parametrize("horizon", [200, 1000])
def test_log_z_and_messages(benchmark: BenchmarkFixture, horizon: int) -> None:
    prior = TabularLM.random(50, horizon, order=1, seed=1, eos=None)
    law = benchmark.pedantic(AutomatonLM, (prior, [counting("a")]), rounds=5, warmup_rounds=1)
    seconds = benchmark.stats.stats.min
    figure = {
        "what": "seconds for log Z and all soft values, lifting and product machine included",
        "vocabulary": 50,
        "horizon": horizon,
        "automaton_states": STATES,
        "product_states": law.num_states,
        "log_normalizer": float(law.log_normalizer[0]),
        "seconds_min": seconds,
        "seconds_median": benchmark.stats.stats.median,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "versions": versions(),
    }
    benchmark.extra_info.update(figure)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"exact_{horizon}.json").write_text(json.dumps(figure, indent=2) + "\n", encoding="utf-8")
    assert math.isfinite(figure["log_normalizer"])
    if horizon == 200:
        assert seconds < 1.0
