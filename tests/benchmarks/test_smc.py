"""`SMC` under a character class and a Python reward, against genlm-control and a hand-written loop: CPU time and log Ẑ.

All contenders do equal work: the models' texts never end before the cap. Ratios are medians over rounds in which each
contender runs once. The peers run in their own environment and process (`measuring.peers_python`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor
from transformers import DynamicCache

import lmppl
from lmppl.inference.smc import SMC
from lmppl.lm import LM
from lmppl.modeling.factors import Factor, Feature
from lmppl.modeling.model import Model
from tests.benchmarks.measuring import Found, Peer, cpu_seconds, in_turns, log_mean_exp, ratio, record
from tests.benchmarks.random_llama import CONTEXT, allowed_characters

pytestmark = pytest.mark.usefixtures("one_thread")

LETTER, BETA = "a", 2.0  # the reward is the number of times that the letter occurs
THRESHOLD = 0.5
NUM_REPEATS = 30
# Peers as they come, and tuned for the case; a pruned vocabulary tells AWRS beforehand what the class allows.
PEERS = {
    "AWRS": {"sampler": "awrs", "options": {}},
    "AWRS, pruned": {"sampler": "awrs-pruned", "options": {}},
    "critic only, tuned": {"sampler": "critic", "options": {"batch_size": 64, "timeout": 0}},
}


def reward(texts: list[str]) -> list[int]:
    return [text.count(LETTER) for text in texts]


class CharacterClass:
    """The class as an incremental form: a token is allowed or not, whatever stands before it."""

    needs: frozenset[str] = frozenset()

    def __init__(self, log_allowed: Tensor) -> None:
        self.log_allowed = log_allowed  # (V,), 0 or −inf

    def start(self, contexts: Tensor) -> Tensor:
        return torch.zeros(len(contexts))

    def weigh(self, state: Tensor, candidates: Tensor | None) -> Tensor:
        if candidates is None:
            return self.log_allowed.expand(len(state), -1)
        return self.log_allowed[candidates]

    def advance(self, state: Tensor, tokens: Tensor, step: Any) -> Tensor:
        return state + self.log_allowed[tokens]

    def potential(self, state: Tensor) -> Tensor:
        return state

    def select(self, state: Tensor, index: Tensor) -> Tensor:
        return state[index]

    def crop(self, state: Tensor, lengths: Tensor) -> Tensor:
        return torch.zeros_like(state)  # rows of positive weight have potential 0 at every length


class Problem:
    """A model of `size`, its class and reward, for every contender."""

    def __init__(self, size: str, folder: Path, particles: int, cap: int) -> None:
        self.size, self.folder, self.particles, self.cap = size, folder, particles, cap
        self.lm = LM(str(folder), context=CONTEXT, max_new_tokens=cap, device="cpu")
        assert self.lm.abilities.cache == "buffer"  # probed before the clock runs
        tokenizer, letters = self.lm.tokenizer, set(allowed_characters())
        texts = [tokenizer.decode([i]) for i in range(self.lm.vocab_size)]
        special = set(tokenizer.all_special_ids)
        self.allowed = torch.tensor([set(t) <= letters and i not in special for i, t in enumerate(texts)])
        log_allowed = torch.zeros(len(texts)).masked_fill(~self.allowed, -math.inf)

        def in_class(completions: list[str]) -> list[bool]:
            return [letters.issuperset(text) for text in completions]

        def log_factor(columns: dict[str, Tensor]) -> Tensor:
            return torch.zeros(len(columns["class"]), dtype=torch.float64).masked_fill(columns["class"] == 0, -math.inf)

        characters = Factor(
            "class", (Feature("class", in_class),), log_factor, 0.0, True, incremental=CharacterClass(log_allowed)
        )
        self.model: Model = self.lm * characters * lmppl.Reward(reward, beta=BETA)
        self.prompt = self.lm.context_ids.tolist()[0]

    def ours(self, number: int) -> dict[str, float]:
        engine = SMC(num_particles=self.particles, ess_threshold=THRESHOLD, resampling="systematic")
        seconds, result = cpu_seconds(
            lambda: lmppl.infer(self.model, engine, self.particles, seed=number, progress=False)
        )
        assert len(result.draws) == self.particles
        mean_length = float(result.draws.lengths.double().mean())
        return {
            "cpu_seconds": seconds,
            "log_z": float(result.log_normalizer[0].log_value[0]),
            "mean_length": mean_length,
        }

    def by_hand(self, number: int) -> dict[str, float]:
        seconds, log_z = cpu_seconds(lambda: hand_written(self, torch.Generator().manual_seed(number + 1)))
        return {"cpu_seconds": seconds, "log_z": log_z}

    def setup(self, peer: dict[str, Any]) -> dict[str, Any]:
        """What a peer is told."""
        return {
            **peer,
            "folder": str(self.folder),
            "allowed": allowed_characters(),
            "letter": LETTER,
            "beta": BETA,
            "prompt_ids": self.prompt,
            "particles": self.particles,
            "tokens": self.cap,
            "ess_threshold": THRESHOLD,
        }


@torch.no_grad()
def hand_written(problem: Problem, generator: torch.Generator) -> float:
    """The loop that one writes for this case alone: batch, cache, masked multinomial, resampling; log Ẑ."""
    model, tokenizer, count = problem.lm.network.model, problem.lm.tokenizer, problem.particles
    cache = DynamicCache(config=model.config)
    tokens = torch.tensor([problem.prompt]).expand(count, -1)
    ids = torch.empty(count, problem.cap, dtype=torch.int64)
    log_w, log_z = torch.zeros(count), 0.0
    for t in range(problem.cap):
        logits = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        log_p = torch.log_softmax(logits, -1).masked_fill(~problem.allowed, -math.inf)
        log_w += torch.logsumexp(log_p, -1)
        tokens = torch.multinomial(torch.softmax(log_p, -1), 1, generator=generator)
        ids[:, t] = tokens[:, 0]
        weights = torch.softmax(log_w, 0)
        if t + 1 < problem.cap and 1 / float((weights**2).sum()) < THRESHOLD * count:
            log_z += float(torch.logsumexp(log_w, 0)) - math.log(count)
            log_w = torch.zeros(count)
            ancestors = torch.multinomial(weights, count, replacement=True, generator=generator)
            cache.reorder_cache(ancestors)
            ids, tokens = ids[ancestors], tokens[ancestors]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    log_w += torch.tensor(reward(texts)) / BETA
    return log_z + float(torch.logsumexp(log_w, 0)) - math.log(count)


def compete(problem: Problem, peers: Sequence[str], rounds: int) -> tuple[Found, dict[str, Any]]:
    """What every contender did in each round, and the peers' versions."""
    running = {name: Peer("genlm_smc.py", problem.setup(PEERS[name])) for name in peers}

    def run(peer: Peer, number: int) -> dict[str, float]:
        answer = peer.ask({"seed": number + 1})
        assert answer["mean_length"] == problem.cap
        return answer

    contenders = {name: partial(run, peer) for name, peer in running.items()}
    try:
        found = in_turns({"SMC": problem.ours, "by hand": problem.by_hand, **contenders}, rounds)
    finally:
        for peer in running.values():
            peer.close()
    assert all(f["mean_length"] == problem.cap for f in found["SMC"])
    return found, next(iter(running.values())).versions


def summary(problem: Problem, found: Found, peer_versions: dict[str, Any]) -> dict[str, Any]:
    """The figures of one case, as they are recorded."""
    return {
        "parameters": problem.size,
        "particles": problem.particles,
        "tokens": problem.cap,
        "rounds": len(found["SMC"]),
        "cpu_seconds": {name: median(f["cpu_seconds"] for f in rows) for name, rows in found.items()},
        "cpu_seconds_over_ours": {name: ratio(found, name, "SMC") for name in found if name != "SMC"},
        "ours_over_by_hand": ratio(found, "SMC", "by hand"),
        "peers": peer_versions,
    }


def log_normalizers(found: Found) -> dict[str, Any]:
    """Mean Ẑ and variance of log Ẑ of each, and of its ratio to ours a bootstrap interval and an F-test.

    `p_ours_greater` is the one-sided p-value of "ours has the greater variance".
    """
    samples = {name: torch.tensor([f["log_z"] for f in rows], dtype=torch.float64) for name, rows in found.items()}
    ours = samples["SMC"]
    count, generator = len(ours), torch.Generator().manual_seed(0)
    index = torch.randint(count, (2, 10_000, count), generator=generator)
    result = {}
    for name, values in samples.items():
        over_ours = values[index[0]].var(1) / ours[index[1]].var(1)
        f_statistic = float(ours.var() / values.var())
        result[name] = {
            "log_mean_z": log_mean_exp(values),
            "mean_log_z": float(values.mean()),
            "variance_log_z": float(values.var()),
            "variance_over_ours": 1 / f_statistic,
            "bootstrap_95": [float(q) for q in torch.quantile(over_ours, torch.tensor([0.025, 0.975]).double())],
            "p_ours_greater": float(scipy.stats.f.sf(f_statistic, count - 1, count - 1)),
        }
    return result


def test_small_model(folders: Callable[[str], Path]) -> None:
    problem = Problem("0.3M", folders("0.3M"), particles=64, cap=32)
    found, peer_versions = compete(problem, list(PEERS), NUM_REPEATS)
    figures = summary(problem, found, peer_versions)
    spread = log_normalizers(found)
    record("smc-0.3M-64x32", {**figures, "log_normalizer": spread})
    faster = figures["cpu_seconds_over_ours"]
    assert faster["AWRS"] >= 5
    assert faster["AWRS, pruned"] >= 5
    assert faster["critic only, tuned"] >= 2
    assert figures["ours_over_by_hand"] <= 1.2
    for name in PEERS:
        assert spread[name]["p_ours_greater"] >= 0.01, (name, spread[name])


def test_larger_model(folders: Callable[[str], Path]) -> None:
    problem = Problem("7M", folders("7M"), particles=64, cap=32)
    figures = summary(problem, *compete(problem, ["AWRS", "critic only, tuned"], 5))
    record("smc-7M-64x32", figures)
    assert figures["cpu_seconds_over_ours"]["AWRS"] >= 2
    assert figures["ours_over_by_hand"] <= 1.2


def test_longer_texts(folders: Callable[[str], Path]) -> None:
    """Not against the critic alone, whose sixteen particles may all die in so long a text."""
    problem = Problem("0.3M", folders("0.3M"), particles=16, cap=128)
    figures = summary(problem, *compete(problem, ["AWRS"], 5))
    record("smc-0.3M-16x128", figures)
    assert figures["cpu_seconds_over_ours"]["AWRS"] >= 8
    assert figures["ours_over_by_hand"] <= 1.2
