"""Stories about a bear, half of them about a she-bear: a wish about the whole posterior, not about any one text.

    python examples/balanced.py

The prior says "he" of nearly every bear. No reward says how much to change that; a moment does: E_π*[female] = ½. Among
all laws that meet it, exp(λ·female(x)) changes the prior least, and `fit_moments` finds λ. For a binary feature of
prior probability p it is log((1 − p)/p), and the change is KL(π*‖π0) = ½ log(1/(4p(1 − p))).
"""

import math
import re

import lmppl

FEMALE = {"she", "her", "hers", "herself"}
MALE = {"he", "him", "his", "himself"}


def female(texts: list[str]) -> list[bool]:
    """Whether a text has more female pronouns than male ones."""
    words = [re.findall(r"[a-z]+", text.lower()) for text in texts]
    return [sum(w in FEMALE for w in one) > sum(w in MALE for w in one) for one in words]


prior = lmppl.LM("tiny", context="Once upon a time, there was a bear", max_new_tokens=14)
declared = prior * lmppl.Moment(female, 0.5, range=(0, 1))


if __name__ == "__main__":
    share = lmppl.infer(prior, lmppl.Importance(320), seed=1).expectation(female)
    p = float(share.value)
    print(f"prior: {p:.0%} female; so λ is about {math.log((1 - p) / p):.2f}", end="")
    print(f" and KL about {0.5 * math.log(1 / (4 * p * (1 - p))):.2f} nats\n")
    fit = lmppl.fit_moments(declared, lmppl.Importance(320))
    print(fit, end="\n\n")
    stories = lmppl.infer(fit.model, lmppl.Rejection(8, batch=32), seed=2).draws.text
    for is_female, story in zip(female(stories), stories, strict=True):
        print(f"{'she' if is_female else '   '}  There was a bear{story.replace(chr(10), ' ')}")
