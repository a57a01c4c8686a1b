"""Relative variance of Ẑ at equal LM tokens on the reviews example: how much evidence a token of each engine buys.

Every engine that estimates Z is here. The relative variance of Ẑ falls as 1/tokens for each of them, so that
Var(Ẑ)/Z² · tokens is what compares; engines are given budgets that are about equal all the same. The ladder of
annealing, the top of splitting and the bound of quasi-rejection, which a pilot would find, are given. What a twist cost
to learn is shown amortised (it serves many runs) and included (it serves these runs alone).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lmppl
from lmppl.inference import LearnedTwist, Restart, learn_twist
from tests.benchmarks.measuring import record

EXAMPLES = Path(__file__).parents[2] / "examples"
REPEATS = 50
FEW, MANY = 2048, 16384  # draws that a twist is learned from
BUDGET = 560  # LM tokens of one run, about


@dataclass(frozen=True)
class Contender:
    """An engine that spends about `BUDGET` LM tokens on the example, by itself or with a twist."""

    name: str
    engine: Callable[[LearnedTwist | None], lmppl.Engine]
    training_draws: int = 0


def steered(twist: LearnedTwist | None) -> lmppl.Engine:
    return lmppl.SMC(64, twist=twist, num_sweeps=1)


def alone(engine: lmppl.Engine) -> Callable[[LearnedTwist | None], lmppl.Engine]:
    return lambda twist: engine


CONTENDERS = [
    Contender("importance", alone(lmppl.Importance(58))),
    Contender("rejection", alone(lmppl.Rejection(15, batch=16))),
    Contender("quasi-rejection", alone(lmppl.QuasiRejection(19, bound=1.5, batch=16))),
    Contender("mcmc, restarts", alone(lmppl.MCMC(13, num_steps=3, warmup=0, kernel=Restart()))),
    Contender("ais", alone(lmppl.AIS(16, ladder=(0.0, 0.25, 0.5, 0.75, 1.0), num_sweeps=1))),
    Contender("tempered smc", alone(lmppl.TemperedSMC(24, ladder=(0.0, 0.5, 1.0), num_sweeps=1))),
    Contender("splitting", alone(lmppl.Splitting(20, top=1.0, num_moves=2, num_sweeps=1))),
    Contender("smc without a twist", steered),
    Contender("smc, twist of few draws", steered, FEW),
    Contender("smc, twist of many draws", steered, MANY),
]


@dataclass(frozen=True, eq=False)
class Runs:
    """Ẑ of each repeat, and LM tokens and seconds of one repeat on average."""

    z: Tensor
    tokens: float
    seconds: float

    def cost_of_precision(self, chosen: Tensor | None = None) -> float:
        """Var(Ẑ)/Z² · LM tokens of the repeats, or of those chosen."""
        z = self.z if chosen is None else self.z[chosen]
        return float(z.var() / z.mean() ** 2) * self.tokens


def repeat(model: lmppl.Model, engine: lmppl.Engine) -> Runs:
    values, tokens, start = [], 0, time.process_time()
    for seed in range(REPEATS):
        found = lmppl.infer(model, engine, seed=seed, progress=False)
        values.append(float(found.log_normalizer[0].value[0]))
        tokens += found.cost.lm_tokens
    seconds = (time.process_time() - start) / REPEATS
    return Runs(torch.tensor(values, dtype=torch.float64).exp(), tokens / REPEATS, seconds)


def times_better(mine: Runs, baseline: Runs) -> tuple[float, float]:
    """How many times fewer tokens the same precision takes, and the lower end of its 95 % bootstrap interval."""
    generator = torch.Generator().manual_seed(0)

    def resampled(runs: Runs) -> float:
        return runs.cost_of_precision(torch.randint(REPEATS, (REPEATS,), generator=generator))

    ratios = torch.tensor([resampled(baseline) / resampled(mine) for _ in range(4000)], dtype=torch.float64)
    return baseline.cost_of_precision() / mine.cost_of_precision(), float(ratios.quantile(0.025))


def test_a_learned_twist_makes_each_token_worth_three(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("profanity_check", "vaderSentiment"):
        pytest.importorskip(module, reason=f"the example needs {module}: pip install 'lmppl[examples]'")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "reviews", raising=False)
    from reviews import model  # type: ignore[import-not-found]

    twists = {n: learn_twist(model, num_draws=n, progress=False) for n in (FEW, MANY)}
    runs = {c.name: repeat(model, c.engine(twists.get(c.training_draws))) for c in CONTENDERS}
    baseline = runs["importance"]
    figures: dict[str, Any] = {}
    for contender in CONTENDERS:
        mine = runs[contender.name]
        ratio, low = times_better(mine, baseline)
        figures[contender.name] = {
            "lm_tokens": mine.tokens,
            "relative_variance": mine.cost_of_precision() / mine.tokens,
            "log_z": float(mine.z.mean().log()),
            "cpu_seconds": mine.seconds,
            "times_better_per_token": ratio,
            "bootstrap_2.5%": low,
        }
        if contender.training_draws:
            twist = twists[contender.training_draws]
            spent = twist.training_cost
            whole = mine.cost_of_precision() / mine.tokens * (mine.tokens + spent.lm_tokens / REPEATS)
            figures[contender.name] |= {
                "training": {
                    "draws": contender.training_draws,
                    "lm_tokens": spent.lm_tokens,
                    "seconds": spent.seconds,
                    "held_out": twist.record.figures,
                },
                "times_better_with_training_shared_by_the_repeats": baseline.cost_of_precision() / whole,
                # x tokens in all, at which v/(x − training) equals the baseline's v'/x
                "lm_tokens_beyond_which_it_pays": spent.lm_tokens / (1.0 - 1.0 / ratio) if ratio > 1.0 else None,
            }
    record("efficiency-reviews", {"repeats": REPEATS, "engines": figures})

    best = figures["smc, twist of many draws"]
    assert best["times_better_per_token"] >= 3.0
    assert best["bootstrap_2.5%"] > 1.5
    for name, other in runs.items():
        assert 0.7 * BUDGET < other.tokens < 1.4 * BUDGET, name
        error = (other.z.var() / REPEATS + baseline.z.var() / REPEATS).sqrt()
        assert abs(float(other.z.mean() - baseline.z.mean())) < 4.0 * float(error), name
