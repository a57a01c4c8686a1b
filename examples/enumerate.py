"""See everything exactly: a posterior over a small tabular LM, every outcome listed.

    lmppl compare examples/enumerate.py
    python examples/enumerate.py

The prior is a two-letter language with an end symbol. The declaration likes the letter b and forbids "aa". Both the
prior and the posterior are tables that fit on a screen, so a surprising posterior is a surprising *declaration*:
there is no inference error to blame.
"""

import lmppl

prior = lmppl.TabularLM(
    [
        # next:  a    b   <eos>       after
        [0.5, 0.3, 0.2],  #           a
        [0.2, 0.5, 0.3],  #           b
        [0.0, 0.0, 1.0],  #           <eos> (never read)
        [0.6, 0.4, 0.0],  #           the start
    ],
    ["a", "b", "<eos>"],
    max_new_tokens=4,
)


def count_b(texts: list[str]) -> list[int]:
    """How many letters b each text has."""
    return [text.count("b") for text in texts]


model = (
    prior * lmppl.Reward(count_b, beta=1.0, upper=4) * lmppl.Constraint(lmppl.Automaton.avoiding("aa"), name="no_aa")
)
engines = [lmppl.Exact(), lmppl.Rejection(), lmppl.Importance(4096)]


if __name__ == "__main__":
    print(model)
    posterior = lmppl.infer(model, "exact")
    probabilities = posterior.draws.weights.tolist()
    rows = zip(posterior.draws.text, posterior.draws.log_prior.exp().tolist(), probabilities, strict=True)
    print(f"log Z = {posterior.log_normalizer[0].log_value.item():.4f}\n\n{'text':6} {'prior':>8} {'posterior':>10}")
    for text, before, after in sorted(rows, key=lambda row: -row[2]):
        print(f"{text:6} {before:8.4f} {after:10.4f}")
    print(f"\nE[count_b] = {posterior.expectation('count_b')}")
    print(lmppl.compare(model, engines))
