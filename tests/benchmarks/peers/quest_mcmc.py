"""Suffix resampling of quest-decoding on its transformers model, on the CPU: where its time goes, one line of JSON.

Run by `tests/benchmarks/test_mcmc.py` with the peers' own Python; see `requirements.txt` beside this file. The model
class is quest's own but for the loading, which asks for CUDA and flash attention; its profiler marks, which need CUDA,
are left out.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version

import torch

torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *arguments: None

from quest import Quest, RLHFSuffixProposal  # noqa: E402
from quest.model.base import DEFAULT_TEMPLATE, LocalLanguageModel  # noqa: E402
from quest.model.hf import HF  # noqa: E402
from quest.reward.base import Reward  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402


class OnCPU(HF):
    """`HF` loaded on the CPU, with the seconds that it spends on generating."""

    def __init__(self, folder, max_new_tokens):
        LocalLanguageModel.__init__(self, folder, DEFAULT_TEMPLATE, max_new_tokens=max_new_tokens)
        self.device_map = "cpu"
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.stop_words_ids = [self.tokenizer.eos_token_id]
        self.seconds = 0.0

    def continuation(self, prompt, prefix=None, prompt_key_values=None):
        start = time.process_time()
        result = super().continuation(prompt, prefix, prompt_key_values)
        self.seconds += time.process_time() - start
        return result


class Letters(Reward):
    """How often a letter occurs."""

    def __init__(self, letter):
        super().__init__("letters")
        self.letter = letter

    def evaluate(self, candidates, accepted_indices=None, **options):
        return [float(text.count(self.letter)) for text in candidates]


def main():
    torch.set_num_threads(1)
    setup = json.loads(sys.stdin.readline())
    model = OnCPU(setup["folder"], setup["tokens"])
    proposal = RLHFSuffixProposal(model=model, reward=Letters(setup["letter"]))
    chains = Quest([{"prompt": setup["context"]}] * setup["chains"], proposal, beta=setup["beta"])
    start = time.process_time()
    chains.run(steps=setup["steps"])
    whole = time.process_time() - start
    answer = {
        "quest-decoding": version("quest-decoding"),
        "transformers": version("transformers"),
        "cpu_seconds": whole,
        "share_in_generating": model.seconds / whole,
    }
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


main()
