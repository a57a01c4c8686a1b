"""A lipogram: text without the letter t, steered token by token.

    lmppl compare examples/lipogram.py
    python examples/lipogram.py

One prior text in twelve has no t. `Rejection` throws the others away at their end. The constraint is an automaton, so
that `SMC` knows before each token which ones are lost: its particles never meet a t, and their weights say how much
probability the constraint has cost. The reward enters at the end of a text. `Greedy` obeys the constraint as well, and
knows one text.
"""

import lmppl


def words(texts: list[str]) -> list[float]:
    """How many of eight words each text has."""
    return [min(len(text.split()), 8) / 8 for text in texts]


prior = lmppl.LM("tiny", context="The film was", max_new_tokens=10)
model = (
    prior
    * lmppl.Constraint(lmppl.Automaton.avoiding("t"), name="no_t")
    * lmppl.Reward(words, beta=0.5, upper=1.0)
)  # fmt: skip
engines = [lmppl.Rejection(), lmppl.Importance(1024), lmppl.SMC(64), lmppl.Greedy()]


if __name__ == "__main__":
    posterior = lmppl.infer(model, lmppl.SMC(64), seed=1)
    print(model, posterior.log_normalizer[0], sep="\n")
    print("log Z by sweep:", [round(z, 2) for z in posterior.info["log_z_sweeps"][0].tolist()])
    print("ancestors left:", posterior.info["distinct_ancestors"][0].tolist(), "of 64")
    for text in posterior.draw(5).text:
        print("The film was", text.strip())
