"""Rare evidence with grades: three words that begin with b, which one prior text in two hundred has.

    lmppl compare examples/rare.py --num-draws 256
    python examples/rare.py

Rejection proposes hundreds of texts for each that it keeps, and the weights of importance hang on the few that have all
three. A score with grades leads there: `Splitting` kills the lowest scores level by level, `AIS` and `TemperedSMC` turn
the evidence up from power 0 to 1, and `Tempered` lets chains wander between the prior and the posterior.
"""

import lmppl


def alliteration(texts: list[str]) -> list[int]:
    """How many words of each text begin with b, three at most."""
    return [min(3, sum(word.startswith("b") for word in text.lower().split())) for text in texts]


prior = lmppl.LM("tiny", context="The film was", max_new_tokens=8)
model = prior * lmppl.Reward(alliteration, beta=0.5, upper=3)
engines = [
    lmppl.Rejection(64),
    lmppl.Importance(1024),
    lmppl.Splitting(64, num_sweeps=4),
    lmppl.AIS(64, num_sweeps=4),
    lmppl.TemperedSMC(64, num_sweeps=4),
    lmppl.Tempered(16, num_temperatures=4, num_steps=8, warmup=8),
]


if __name__ == "__main__":
    posterior = lmppl.infer(model, lmppl.Splitting(64, num_sweeps=4))
    print(model, posterior.log_normalizer[0], sep="\n")
    print("killed, round by round:", [int(k) for k in posterior.info["killed"][0][:, 0].tolist()])
    for text in posterior.draw(5).text:
        print("The film was", text.strip())
    print(lmppl.compare(model, engines))
