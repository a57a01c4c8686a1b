"""Another LM as evidence: a persona's LM over the plain one, and a text that is to follow.

    lmppl compare examples/persona.py
    python examples/persona.py

The persona is the same network after another context, a story for small children. The evidence is how much more
probable a text is there than after the plain context, to the power a: a = 0 is the prior, a = 1 the persona itself,
a < 1 something in between, and a > 1 a caricature. A second model asks what stands between two given texts.
"""

import lmppl

prior = lmppl.LM("tiny", context="The film was", max_new_tokens=10)
story = prior | "Once upon a time there was a little cat. The cat was happy. The film was"
model = prior * lmppl.LMFactor(story, 0.5, over=prior, name="story")
engines = [lmppl.Importance(128), lmppl.SMC(32)]


if __name__ == "__main__":
    for weight in (0.5, 1.0, 2.0):
        posterior = lmppl.infer(prior * lmppl.LMFactor(story, weight, over=prior), lmppl.SMC(32), 32, seed=1)
        log_z = float(posterior.log_normalizer[0].value[0])
        print(f"\nThe story's LM over the plain one, to the power {weight:g} (log Z = {log_z:.2f})")
        for text in posterior.draws.resample(3).text:
            print(f"  The film was{text}")

    between = prior * lmppl.InfillingFactor(" but the ending was dull.")
    posterior = lmppl.infer(between, lmppl.SMC(64), 64, seed=1)
    print("\nWhat may stand before an ending")
    for text in dict.fromkeys(posterior.draws.resample(4).text):
        print(f"  The film was{text} but the ending was dull.")
