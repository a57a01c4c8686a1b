"""A guided decoder as it is, and as a proposal: a crude score of prefixes, corrected by weights.

    lmppl compare examples/guided.py
    python examples/guided.py

The score adds a nat for each word of praise so far, among the 30 most probable tokens. It steers well, and it samples
another law than the posterior, one that never says the rarer tokens: `compare` shows how far off it is as it stands,
and what its weights are worth in a mixture with the prior, which does cover.
"""

import lmppl

PRAISE = {"great", "good", "best", "love", "loved", "funny", "beautiful", "brilliant", "wonderful"}


def praise(texts: list[str]) -> list[float]:
    """Words of praise in each text, three at most."""
    return [float(min(3, sum(word.strip(".,!") in PRAISE for word in text.lower().split()))) for text in texts]


prior = lmppl.LM("tiny", context="The film was", max_new_tokens=12)
model = prior * lmppl.Reward(praise, beta=1.0, upper=3.0)
guided = lmppl.WeightedDecoding.controlled(praise, top_k=30)
engines = [lmppl.Importance(64), guided, lmppl.BestOfN(4, soft=1.0), lmppl.Beam(4)]


if __name__ == "__main__":
    q = guided.language_model(model)
    corrected = lmppl.Importance(64, proposal=q, defensive=0.25)
    entrants = {"guided": q, "corrected": corrected, "from the prior": lmppl.Importance(64)}
    print(lmppl.compare(model, entrants, num_draws=64))
