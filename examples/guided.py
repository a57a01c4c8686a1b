"""Guided decoders as they are, and as proposals: crude scores of prefixes, corrected by weights.

    lmppl compare examples/guided.py
    python examples/guided.py

A nat for each word of praise. `WeightedDecoding` counts those so far among the 30 most probable tokens, and `PPLM`
follows the gradient of their probability. Both steer well, and sample another law than the posterior; the former never
says the rarer tokens. `compare` shows how far off they are as they stand, and what their weights are worth in a mixture
with the prior, which does cover. The evidence has no bound; `QuasiRejection` chooses one, and says what that costs.
"""

import lmppl

PRAISE = ("great", "good", "best", "love", "loved", "funny", "beautiful", "brilliant", "wonderful")


def praise(texts: list[str]) -> list[float]:
    """Words of praise in each text, three at most."""
    return [float(min(3, sum(word.strip(".,!") in PRAISE for word in text.lower().split()))) for text in texts]


prior = lmppl.LM("tiny", context="The film was", max_new_tokens=12)
model = prior * lmppl.BagOfWords(PRAISE)
guided = lmppl.WeightedDecoding.controlled(praise, top_k=30)
engines = [
    lmppl.Importance(64),
    lmppl.QuasiRejection(64, acceptance=0.3, pilot=256),
    guided,
    lmppl.PPLM(),
    lmppl.BestOfN(4, soft=1.0),
    lmppl.Beam(4),
]


if __name__ == "__main__":
    q, pplm = guided.language_model(model), lmppl.PPLM().language_model(model)
    corrected = lmppl.Importance(64, proposal=q, defensive=0.25)
    entrants = {"guided": q, "pplm": pplm, "guided, corrected": corrected, "from the prior": lmppl.Importance(64)}
    print(lmppl.compare(model, entrants, num_draws=64))
