"""SMC of genlm-control on its transformers backend: one line of JSON out for each line in.

Run by `tests/benchmarks/test_smc.py` with the peers' own Python; see `requirements.txt` beside this file.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from importlib.metadata import version

import numpy as np
import torch
from genlm.control import AWRS, SMC, Potential, PromptedLLM, direct_token_sampler


class CharacterClass(Potential):
    """0 where each token is made of allowed bytes, else −inf."""

    def __init__(self, vocabulary, allowed):
        super().__init__(vocabulary)
        self.allowed = frozenset(t for t in vocabulary if set(t) <= allowed)

    async def prefix(self, context):
        return 0.0 if self.allowed.issuperset(context) else -np.inf

    complete = prefix

    async def batch_prefix(self, contexts):
        return np.array([0.0 if self.allowed.issuperset(c) else -np.inf for c in contexts])

    batch_complete = batch_prefix


class TextReward(Potential):
    """A Python function of the whole text, as evidence at its end."""

    def __init__(self, vocabulary, letter, beta):
        super().__init__(vocabulary)
        self.letter, self.beta = letter, beta

    def is_terminal_only(self):
        return True

    def value(self, context):
        return b"".join(context).decode("utf-8", errors="replace").count(self.letter) / self.beta

    async def prefix(self, context):
        return 0.0

    async def complete(self, context):
        return self.value(context)

    async def batch_prefix(self, contexts):
        return np.zeros(len(contexts))

    async def batch_complete(self, contexts):
        return np.array([self.value(c) for c in contexts])


class Critic(TextReward):
    """Class and reward in one, for a proposal that knows neither."""

    def __init__(self, vocabulary, allowed, letter, beta):
        super().__init__(vocabulary, letter, beta)
        self.allowed = frozenset(t for t in vocabulary if set(t) <= allowed)

    def is_terminal_only(self):
        return False

    async def prefix(self, context):
        return 0.0 if self.allowed.issuperset(context) else -np.inf

    async def complete(self, context):
        return self.value(context) if self.allowed.issuperset(context) else -np.inf

    async def batch_prefix(self, contexts):
        return np.array([0.0 if self.allowed.issuperset(c) else -np.inf for c in contexts])

    async def batch_complete(self, contexts):
        return np.array([await self.complete(c) for c in contexts])


def say(answer):
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main():
    torch.set_num_threads(1)
    setup = json.loads(sys.stdin.readline())
    allowed = set(setup["allowed"].encode())
    llm = PromptedLLM.from_name(setup["folder"], backend="hf", **setup["options"])
    llm.prompt_ids = setup["prompt_ids"]
    reward = setup["letter"], setup["beta"]
    if setup["sampler"] == "critic":
        sampler = SMC(direct_token_sampler(llm), critic=Critic(llm.vocab, allowed, *reward))
    else:
        # A pruned vocabulary holds allowed tokens only, so that nothing is ever rejected.
        vocabulary = [t for t in llm.vocab if set(t) <= allowed] if setup["sampler"] == "awrs-pruned" else llm.vocab
        awrs = AWRS(llm, CharacterClass(vocabulary, allowed))
        sampler = SMC(awrs, critic=TextReward(awrs.target.vocab, *reward))
    cap = setup["tokens"]
    say({name: version(name) for name in ("genlm-control", "genlm-backend", "transformers", "torch")})

    async def run(seed):
        np.random.seed(seed)  # noqa: NPY002 - what genlm-control draws from
        torch.manual_seed(seed)
        llm.model.clear_cache()
        gc.collect()
        start, wall = time.process_time(), time.perf_counter()
        drawn = await sampler(
            n_particles=setup["particles"],
            ess_threshold=setup["ess_threshold"],
            max_tokens=cap + 1,
            terminate_when=lambda context: len(context) >= cap,
        )
        spent = time.process_time() - start, time.perf_counter() - wall
        lengths = [len(context) - 1 for context in drawn.contexts]
        say(
            {
                "cpu_seconds": spent[0],
                "wall_seconds": spent[1],
                "log_z": float(drawn.log_ml),
                "mean_length": float(np.mean(lengths)),
            }
        )

    async def serve():
        for line in sys.stdin:
            await run(json.loads(line)["seed"])

    asyncio.run(serve())


main()
