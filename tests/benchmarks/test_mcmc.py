"""`MCMC(SuffixResample)`: CPU seconds against the same algorithm on `generate`, and against its forwards alone.

64 chains of 32 steps on texts of 32 tokens. `generate` reads each kept prefix again; here caches live across steps. The
bare loop makes the forwards that the engine made, of as many rows, tokens and columns, and nothing else. Ratios are
medians over rounds in which each contender runs once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import lmppl
from lmppl.inference.mcmc import MCMC, SuffixResample
from lmppl.lm import LM
from lmppl.lm.caches import BufferedCache, BufferedLayer
from tests.benchmarks.measuring import Peer, cpu_seconds, in_turns, ratio, record
from tests.benchmarks.random_llama import CONTEXT

pytestmark = pytest.mark.usefixtures("one_thread")

CHAINS, STEPS, CAP = 64, 32, 32
LETTER, BETA = "a", 2.0
ROUNDS = {"1M": 2, "12M": 1}  # some three minutes of CPU time each
WANTED = {"1M": 2.3, "12M": 2.7}
LAWS = {"1M": ("horizon", "length"), "12M": ("horizon", "length")}


def reward(texts: list[str]) -> list[int]:
    return [text.count(LETTER) for text in texts]


class Call(NamedTuple):
    """One forward: tokens (B, k), columns of the cache before it, and the mask and positions of padded rows."""

    tokens: Tensor
    before: int
    mask: Tensor | None
    positions: Tensor | None


class Problem:
    """A model of `size` with a reward, for every contender."""

    def __init__(self, size: str, folder: Path) -> None:
        self.lm = LM(str(folder), context=CONTEXT, max_new_tokens=CAP, device="cpu")
        assert self.lm.abilities.cache == "buffer"  # probed before the clock runs
        self.model = self.lm * lmppl.Reward(reward, beta=BETA)
        self.calls: dict[str, list[Call]] = {}  # every forward of the last run of the engine, by law
        few = MCMC(num_chains=4, num_steps=4, warmup=0, kernel=SuffixResample())
        lmppl.infer(self.model, few, progress=False)  # what is imported on first use is, before the clock runs

    def ours(self, law: str, number: int) -> dict[str, float]:
        """The engine; `law` is that of the position to go on from."""
        engine = MCMC(num_chains=CHAINS, num_steps=STEPS, warmup=0, kernel=SuffixResample(index=law))
        with recorded_forwards(self, law):
            seconds, result = cpu_seconds(lambda: lmppl.infer(self.model, engine, seed=number, progress=False))
        assert len(result.draws) == CHAINS * STEPS
        return {
            "cpu_seconds": seconds,
            "mean_reward": float(torch.tensor(reward(result.draws.text)).double().mean()),
            "lm_tokens": result.cost.lm_tokens,
            "lm_forwards": result.cost.lm_forwards,
            "ess_per_cpu_second": min(float(result.info["bulk_ess"][name][0]) for name in ("reward", "log_prior"))
            / seconds,
        }

    def forwards_alone(self, law: str, draws: bool, number: int) -> dict[str, float]:
        """The forwards that `ours` has just made; with `draws`, a token of each row and its score after each."""
        seconds, _ = cpu_seconds(lambda: replay(self, self.calls[law], draws))
        return {"cpu_seconds": seconds, "lm_forwards": len(self.calls[law])}

    def on_generate(self, law: str, number: int) -> dict[str, float]:
        """The same algorithm on `model.generate`."""
        chains = {"horizon": on_generate_by_column, "length": on_generate_by_row}[law]
        torch.manual_seed(number + 1)
        seconds, rewards = cpu_seconds(lambda: chains(self))
        return {"cpu_seconds": seconds, "mean_reward": float(rewards.mean())}


def generate(problem: Problem, prompt: Tensor, mask: Tensor, count: int) -> Tensor:
    """(B, count) new tokens, as a user of transformers draws them."""
    ids: Tensor = problem.lm.network.model.generate(
        prompt, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=count,
        pad_token_id=problem.lm.pad_id,
    )  # fmt: skip
    return ids[:, prompt.shape[1] :]


def scores(problem: Problem, ids: Tensor) -> Tensor:
    return torch.tensor(reward(problem.lm.tokenizer.batch_decode(ids, skip_special_tokens=True))).double()


@torch.no_grad()
def on_generate_by_column(problem: Problem) -> Tensor:
    """All chains go on from one random position: prompts are equally long, and nothing is padded."""
    context = problem.lm.context_ids.expand(CHAINS, -1)
    ids = generate(problem, context, torch.ones_like(context), CAP)
    current, visited = scores(problem, ids), []
    for _ in range(STEPS):
        keep = int(torch.randint(CAP, ()))
        prompt = torch.cat([context, ids[:, :keep]], 1)
        new = torch.cat([ids[:, :keep], generate(problem, prompt, torch.ones_like(prompt), CAP - keep)], 1)
        proposed = scores(problem, new)
        accept = torch.rand(CHAINS, dtype=torch.float64).log() < (proposed - current) / BETA
        ids, current = torch.where(accept[:, None], new, ids), torch.where(accept, proposed, current)
        visited.append(current)
    return torch.stack(visited)


@torch.no_grad()
def on_generate_by_row(problem: Problem) -> Tensor:
    """Each chain goes on from its own position: prompts are padded on the left, and what is over the cap is cut."""
    context = problem.lm.context_ids.expand(CHAINS, -1)
    width = context.shape[1]
    ids = generate(problem, context, torch.ones_like(context), CAP)
    current, visited = scores(problem, ids), []
    columns = torch.arange(width + CAP)
    for _ in range(STEPS):
        keep = torch.randint(CAP, (CHAINS,))
        longest = int(keep.max())
        whole = torch.cat([context, ids], 1)
        source = columns[: width + longest] - (longest - keep)[:, None]
        prompt = whole.gather(1, source.clamp_min(0)).masked_fill(source < 0, problem.lm.pad_id)
        drawn = generate(problem, prompt, (source >= 0).long(), CAP - int(keep.min()))
        there = columns[:CAP] - keep[:, None]
        new = torch.where(there < 0, ids, drawn.gather(1, there.clamp(0, drawn.shape[1] - 1)))
        proposed = scores(problem, new)
        accept = torch.rand(CHAINS, dtype=torch.float64).log() < (proposed - current) / BETA
        ids, current = torch.where(accept[:, None], new, ids), torch.where(accept, proposed, current)
        visited.append(current)
    return torch.stack(visited)


@contextmanager
def recorded_forwards(problem: Problem, law: str) -> Iterator[None]:
    """Leaves in `problem.calls` what the network is given."""
    network, calls = problem.lm.network, []
    original = network.forward

    def recording(tokens: Tensor, **options: Any) -> Tensor:
        calls.append(Call(tokens, options["cache"].get_seq_length(), options["mask"], options["positions"]))
        return original(tokens, **options)

    network.forward = recording
    try:
        yield
    finally:
        network.forward = original
        problem.calls[law] = calls


@torch.no_grad()
def replay(problem: Problem, calls: list[Call], draws: bool) -> None:
    """The recorded forwards and the head's scores, on one cache whose columns are written in place."""
    network = problem.lm.network
    config = network.config
    rows = max(len(call.tokens) for call in calls)
    columns = max(call.before + call.tokens.shape[1] for call in calls)
    size = config.hidden_size // config.num_attention_heads
    shape = (rows, config.num_key_value_heads, columns, size)
    buffers = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_hidden_layers)]
    for call in calls:
        cache = BufferedCache(columns)
        for keys, values in buffers:
            layer = BufferedLayer(columns)
            layer.hold(keys[: len(call.tokens)], values[: len(call.tokens)], call.before)
            cache.layers.append(layer)
        options = {} if call.mask is None else {"attention_mask": call.mask, "position_ids": call.positions}
        hidden = network.body(input_ids=call.tokens, past_key_values=cache, use_cache=True, **options)[0]
        scores = network.head(hidden[:, -1])
        if draws:
            log_probs = torch.log_softmax(scores, -1)
            log_probs.gather(1, torch.multinomial(log_probs.exp(), 1))


@pytest.mark.parametrize("size", list(WANTED))
def test_suffix_resampling(folders: Callable[[str], Path], size: str) -> None:
    """All texts run to the cap here, so that the laws of the position agree but for being shared by the chains.

    quest-decoding and what is written after it let each chain go on from a position of its own, and then nearly every
    step on `generate` is as long as the longest suffix. Here no chain waits for another ("length"), which saves
    forwards, and on a processor that a small model does not fill no time; with a position that all chains share
    ("horizon") they are done at the same time, and are quicker for as many tokens.
    """
    problem = Problem(size, folders(size))
    contenders: dict[str, Callable[[int], dict[str, Any]]] = {}
    for law in LAWS[size]:
        contenders[f"MCMC, {law}"] = partial(problem.ours, law)
        contenders[f"forwards alone, {law}"] = partial(problem.forwards_alone, law, False)
        contenders[f"forwards and draws alone, {law}"] = partial(problem.forwards_alone, law, True)
    contenders["generate, shared position"] = partial(problem.on_generate, "horizon")
    contenders["generate, own positions"] = partial(problem.on_generate, "length")
    found = in_turns(contenders, ROUNDS[size], warm_up=False)
    figures = {
        "parameters": size,
        "chains": CHAINS,
        "steps": STEPS,
        "tokens": CAP,
        "rounds": ROUNDS[size],
        "cpu_seconds": {name: median(f["cpu_seconds"] for f in rows) for name, rows in found.items()},
        "lm_forwards": {name: median(f["lm_forwards"] for f in r) for name, r in found.items() if "MCMC" in name},
        "mean_reward": {n: mean(f["mean_reward"] for f in r) for n, r in found.items() if "alone" not in n},
        "own_positions_on_generate_over": {f"MCMC, {w}": ratio(found, "generate, own positions", f"MCMC, {w}")
                                           for w in LAWS[size]},
        "shared_position_on_generate_over": {f"MCMC, {w}": ratio(found, "generate, shared position", f"MCMC, {w}")
                                             for w in LAWS[size]},
        "ess_per_cpu_second": {w: median(f["ess_per_cpu_second"] for f in found[f"MCMC, {w}"]) for w in LAWS[size]},
        "over_forwards_alone": {w: ratio(found, f"MCMC, {w}", f"forwards alone, {w}") for w in LAWS[size]},
        "over_forwards_and_draws_alone": {w: ratio(found, f"MCMC, {w}", f"forwards and draws alone, {w}")
                                          for w in LAWS[size]},
    }  # fmt: skip
    record(f"mcmc-{size}", figures)
    assert figures["own_positions_on_generate_over"]["MCMC, horizon"] >= WANTED[size]
    assert figures["shared_position_on_generate_over"]["MCMC, horizon"] >= 1
    assert figures["over_forwards_alone"]["horizon"] <= 1.10
    assert figures["lm_forwards"]["MCMC, length"] < 0.75 * CAP * STEPS


def test_where_quest_spends_its_time(folders: Callable[[str], Path]) -> None:
    """Chains of quest-decoding are its generating: what caches across steps save is all there is to save."""
    setup = {
        "folder": str(folders("1M")),
        "tokens": CAP,
        "letter": LETTER,
        "beta": BETA,
        "context": CONTEXT,
        "chains": CHAINS,
        "steps": 4,
    }
    peer = Peer("quest_mcmc.py", setup)
    peer.close()
    record("mcmc-quest-1M", {"chains": CHAINS, "steps": 4, "tokens": CAP, **peer.versions})
    assert peer.versions["share_in_generating"] >= 0.9
