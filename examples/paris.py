"""A hard constraint: the text contains "Paris".

    lmppl compare examples/paris.py --num-draws 200
    python examples/paris.py

The evidence is an indicator, so log Z is the log of the prior probability that the text contains the word, and
rejection gives exact draws at a cost of 1/Z proposals each.
"""

import lmppl

prior = lmppl.LM("tiny", context="My favourite city is", max_new_tokens=24)


def mentions_paris(texts: list[str]) -> list[bool]:
    """Whether each text contains the word."""
    return ["Paris" in text for text in texts]


model = prior * lmppl.Constraint(mentions_paris)
engines = [lmppl.Rejection(), lmppl.Importance(4096), lmppl.BestOfN(16)]


if __name__ == "__main__":
    print(model)
    posterior = lmppl.infer(model, "rejection", num_draws=20)
    print(f"log Z = {posterior.log_normalizer[0]}\n")
    for text in posterior.draws.full_text:
        print(" ", text)
