"""Whole engines on networks: the log π0 that comes with their draws is that of fresh forwards of one row, no cache."""

import pytest
import torch

from lmppl.inference import (
    AIS,
    MCMC,
    PPLM,
    SMC,
    BestOfN,
    Importance,
    QuasiRejection,
    Rejection,
    Splitting,
    TemperedSMC,
    WeightedDecoding,
)
from lmppl.inference.mcmc import (
    BlockResample,
    LocalEdit,
    Mixture,
    ParticleGibbs,
    Restart,
    SuffixResample,
    Tempered,
    TokenGibbs,
)
from lmppl.inference.run import infer
from lmppl.modeling import BagOfWords
from lmppl.modeling.evidence.reward import Reward
from tests.lm.random_models import random_lm, uncached_logits
from tests.models import wavy

TOLERANCE = 1e-9
ROWS = 120  # of each run that are scored again
CHAINS = {"num_chains": 8, "num_steps": 10, "warmup": 3}


def few_b(texts):
    return [-float(t.count("b")) for t in texts]


ENGINES = {
    "rejection": lambda lm: Rejection(40),
    "importance": lambda lm: Importance(60, proposal=lm.at_temperature(1.5), defensive=0.2),
    "smc": lambda lm: SMC(16, num_sweeps=2),
    "ais": lambda lm: AIS(16, num_sweeps=2),
    "tempered smc": lambda lm: TemperedSMC(16, num_sweeps=2),
    "waste-free": lambda lm: TemperedSMC(16, chain_length=4, num_sweeps=2),
    "splitting": lambda lm: Splitting(16, num_sweeps=2),
    "mixture": lambda lm: MCMC(**CHAINS),
    "suffix": lambda lm: MCMC(**CHAINS, kernel=SuffixResample()),
    "suffix by another LM": lambda lm: MCMC(**CHAINS, kernel=SuffixResample("entropy", lm.at_temperature(1.5))),
    "block": lambda lm: MCMC(**CHAINS, kernel=BlockResample(2)),
    "block by another LM": lambda lm: MCMC(**CHAINS, kernel=BlockResample(2, lm.at_temperature(1.5))),
    "edit": lambda lm: MCMC(**CHAINS, kernel=LocalEdit()),
    "gibbs": lambda lm: MCMC(**CHAINS, kernel=TokenGibbs(2)),
    "all kernels": lambda lm: MCMC(
        **CHAINS,
        kernel=Mixture(
            (Restart(), SuffixResample(), BlockResample(2), LocalEdit(), TokenGibbs(2), ParticleGibbs(SMC(3)))
        ),
    ),
    "tempered": lambda lm: Tempered(6, num_steps=10, warmup=3),
    "quasi-rejection": lambda lm: QuasiRejection(40, bound=1.0),
    "best of n": lambda lm: BestOfN(4, num_draws=30),
    "weighted decoding": lambda lm: WeightedDecoding.controlled(few_b),
    "pplm": lambda lm: PPLM(num_steps=1, num_draws=20),
}


def fresh(lm, draws):
    """(N,) log π0 by one forward of each row alone, and of each with the other context."""
    own, other = [], []
    for tokens, context in zip(draws.token_lists(), draws.context.tolist(), strict=True):
        for scores, c in ((own, context), (other, 1 - context)):
            logits = torch.log_softmax(uncached_logits(lm, c, tokens[:-1]) / lm.temperature, -1)
            scores.append(sum(float(logits[t, token]) for t, token in enumerate(tokens)))
    return torch.tensor(own, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("name", ENGINES)
def test_scores_of_whole_runs_are_those_of_fresh_forwards(kind, name):
    lm = random_lm(kind, max_new_tokens=5, temperature=2.0)
    evidence = BagOfWords(["a"]) if name == "pplm" else Reward(wavy, beta=0.5, upper=1.0)
    draws = infer(lm * evidence, ENGINES[name](lm), seed=2, progress=False).draws
    draws = draws.select(torch.randperm(len(draws), generator=torch.Generator().manual_seed(0))[:ROWS])
    expected, wrong = fresh(lm, draws)
    assert float((draws.log_prior.double() - expected).abs().max()) < TOLERANCE
    assert float((wrong - expected).abs().max()) > 0.1  # a cache of the other context would show
    rows = [
        {tuple(t) for t, c in zip(draws.token_lists(), draws.context.tolist(), strict=True) if c == k} for k in (0, 1)
    ]
    assert rows[0] & rows[1], "no continuation stands in both contexts"
