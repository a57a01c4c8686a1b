"""Chains: near moves and far moves of whole texts, and the figures that say whether they agree.

    lmppl compare examples/chains.py
    python examples/chains.py

The reward reads whole texts: short words are wanted. Each step writes the rest of every text anew from a random word
on, or now and then all of it; texts are accepted by the posterior. The chains are figures of themselves: R̂ near 1 and
an effective sample size near the number of draws say that they have forgotten where they started.
"""

import lmppl
from lmppl.inference import Mixture, Restart, SuffixResample


def brevity(texts: list[str]) -> list[float]:
    """Minus the mean length of the words of each text."""
    return [-sum(map(len, t.split())) / max(1, len(t.split())) for t in texts]


prior = lmppl.LM("tiny", context="The film was", max_new_tokens=12)
model = prior * lmppl.Reward(brevity, beta=1.5, upper=0.0)
kernel = Mixture((Restart(), SuffixResample()), weights=(1.0, 3.0))
engines = [lmppl.MCMC(num_chains=16, num_steps=8, warmup=16, kernel=kernel), lmppl.Importance(128)]


if __name__ == "__main__":
    posterior = lmppl.infer(model, lmppl.MCMC(num_chains=64, num_steps=20, warmup=40, kernel=kernel))
    info = posterior.info
    for name in ("rhat", "bulk_ess"):
        print(f"{name}: " + ", ".join(f"{scalar} {value.item():.2f}" for scalar, value in info[name].items()))
    print("accepted: " + ", ".join(f"{name} {rate.item():.0%}" for name, rate in info["acceptance"].items()))
    print(f"E[brevity] = {posterior.expectation('brevity')}, log Z = {posterior.log_normalizer[0]}")
    print("\n".join(posterior.draws.text[-5:]))
