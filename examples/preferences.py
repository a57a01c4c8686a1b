"""Film reviews by a reward that pairs of reviews have taught, and that knows what they have not.

    lmppl compare examples/preferences.py
    python examples/preferences.py

Twelve choices between reviews are few. `Robust` treads lightly where they leave the reward open, and `num_references`
takes out what no choice can tell: a constant. The script shows what the posterior says of some texts.
"""

import math

import lmppl

PRAISE = {"good", "great", "brilliant", "beautiful", "fascinating", "powerful", "funny", "charming", "easy"}
BLAME = {"bad", "boring", "awful", "waste", "terrible", "stupid", "dull", "worst", "poor"}

PAIRS = [
    (" a great and funny story.", " a waste of time."),
    (" good, if too long for me.", " awful."),
    (" beautiful and easy to like.", " a boring and stupid mess that never seems to end."),
    (" charming.", " poor in every way."),
    (" a powerful drama.", " a dull drama."),
    (" brilliant, and brilliant again.", " good, but I have seen it before, and it was better then."),
    (" a film about a family.", " the worst film about a family."),
    (" fascinating.", " a film that I saw with my family."),
    (" terrible.", " terrible, boring, and a waste of my money."),
    (" great.", " easy."),
    (" great fun, and never dull.", " not so bad."),
    (" bad, but short.", " good, and so very long that I fell asleep in the middle of it and woke up at the end."),
]


def manners(texts: list[str]) -> list[list[float]]:
    """Words of praise, words of blame, and the logarithm of the number of words."""
    words = [text.lower().replace(",", " ").replace(".", " ").split() for text in texts]
    return [[sum(w in PRAISE for w in said), sum(w in BLAME for w in said), math.log1p(len(said))] for said in words]


prior = lmppl.LM("tiny", context="The film was", max_new_tokens=12)
reward = lmppl.BayesianRewardModel.fit(PAIRS, manners, attitude=lmppl.Robust(2.0), num_references=64)
model = prior * reward
engines = [lmppl.Importance(256), lmppl.SMC(64)]


if __name__ == "__main__":
    print(reward.facts)
    means, spreads = reward.belief([" great.", " a waste of time.", " great, great, great, great."])
    print("means", means.round(decimals=2).tolist(), "spreads", spreads.round(decimals=2).tolist())
    for attitude in (lmppl.Mean(), lmppl.Marginal(), lmppl.Robust(2.0)):
        draws = lmppl.infer(prior * reward.with_attitude(attitude), lmppl.SMC(64), seed=1).draws
        print(f"{attitude!r:18} mean spread {float(draws.features['preference'][:, 1].mean()):.2f}: {draws.text[0]!r}")
