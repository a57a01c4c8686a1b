"""Film reviews that three judges like, where they agree: an uncertain reward, with a gate against what divides them.

    lmppl compare examples/judges.py
    python examples/judges.py

Each judge counts praise by words of its own, so that they agree about some texts and not about others. `Robust` reads
their disagreement as a reason for caution; the same declaration with `Marginal` would look for it.
"""

import lmppl

PRAISE = (
    {"good", "great", "brilliant", "beautiful", "fascinating", "powerful"},
    {"good", "great", "funny", "easy", "charming", "sweet"},
    {"good", "great", "strange", "complicated", "dark", "powerful"},
)


def judges(texts: list[str]) -> list[list[float]]:
    """1 for a judge that finds a word of praise, else 0."""
    words = [set(text.lower().replace(",", " ").replace(".", " ").split()) for text in texts]
    return [[float(bool(said & liked)) for liked in PRAISE] for said in words]


prior = lmppl.LM("tiny", context="The film was", max_new_tokens=16)
reward = lmppl.UncertainReward(judges, 0.25, lmppl.Robust(1.0), upper=1.0)
model = prior * reward * reward.gate(0.55)
engines = [lmppl.Rejection(), lmppl.Importance(1024), lmppl.SMC(64)]


if __name__ == "__main__":
    for attitude in (lmppl.Mean(), lmppl.Marginal(), lmppl.Robust(1.0)):
        other = prior * lmppl.UncertainReward(judges, 0.25, attitude, upper=1.0)
        draws = lmppl.infer(other, lmppl.Rejection(), num_draws=200, seed=1).draws
        mean, spread, _ = draws.features["judges"].mean(0).tolist()
        print(f"{attitude!r:18} the judges' mean {mean:.2f}, their spread {spread:.2f}: {draws.text[0]!r}")
