"""A Bayesian reward model of 2000 pairs by Laplace within ten seconds, features known: the prior's scale included."""

import json
import os
import platform
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import lmppl
from lmppl.storage import versions
from tests.modeling.preference.cases import world

RESULTS = Path(__file__).parent / "results"
PAIRS = 2000


@pytest.mark.parametrize(("dim", "annotators"), [(64, 0), (384, 0), (64, 10)])
def test_laplace(benchmark: BenchmarkFixture, one_thread: None, dim: int, annotators: int) -> None:
    options = {"annotators": (annotators, 0.2), "eta": -1.0} if annotators else {}
    one = world(dim, num_texts=1000, weight_scale=2.0 / dim**0.5, **options)
    pairs = one.pairs(PAIRS, seed=0)
    model = benchmark.pedantic(lmppl.BayesianRewardModel.fit, (pairs, one.features), rounds=3, warmup_rounds=1)
    seconds = benchmark.stats.stats.min
    figure = {
        "what": "seconds of BayesianRewardModel.fit by Laplace, choice of prior_scale included, features from a table",
        "pairs": PAIRS,
        "features": dim,
        "annotators": annotators,
        "ties": int(sum(pair.tie for pair in pairs)),
        "prior_scale": model.facts["prior_scale"],
        "seconds_min": seconds,
        "seconds_median": benchmark.stats.stats.median,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "versions": versions(),
    }
    benchmark.extra_info.update(figure)
    RESULTS.mkdir(exist_ok=True)
    name = f"preferences-laplace-{dim}" + (f"-{annotators}-annotators" if annotators else "")
    (RESULTS / f"{name}.json").write_text(json.dumps(figure, indent=2) + "\n", encoding="utf-8")
    if not annotators:
        assert seconds < 10.0
