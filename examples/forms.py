"""A form for a text: one sentence that an expression describes, without some words, and a JSON document of a schema.

    lmppl compare examples/forms.py
    python examples/forms.py

Languages are constraints that engines see inside, so that `SMC` knows before each token what can still become a
sentence of this form. `WeightedDecoding` uses the same masks and stops there: its texts have the form, and another law
than the posterior, since a mask never asks how likely the form is to be kept from here on. `Importance` with it as
proposal puts that right, and so does `SMC`.
"""

import lmppl

sentence = lmppl.Regex(r" (?:very |so )?[a-z]+(?:, [a-z]+)* (?:and|but) (?:very )?[a-z]+\.")
model = (
    lmppl.LM("tiny", context="The film was", max_new_tokens=12)
    * (sentence & ~lmppl.Contains(["bad", "boring"], whole_words=True))
    * lmppl.Finished()
)
masked = lmppl.WeightedDecoding()
engines = [masked, lmppl.SMC(64)]

review = lmppl.JsonSchema(
    {
        "type": "object",
        "properties": {"film": {"enum": ["good", "bad"]}, "stars": {"type": "integer", "minimum": 1, "maximum": 5}},
        "required": ["film", "stars"],
        "additionalProperties": False,
    }
)


if __name__ == "__main__":
    corrected = lmppl.Importance(256, proposal=masked.language_model(model))
    print(lmppl.compare(model, {"masked": masked, "masked, corrected": corrected, "smc": lmppl.SMC(64)}, num_draws=512))
    posterior = lmppl.infer(model, lmppl.SMC(64), seed=1)
    print(model, posterior.log_normalizer[0], sep="\n")
    for text in posterior.draw(5).text:
        print("The film was" + text)
    documents = lmppl.LM("tiny", context="The film was ", max_new_tokens=40) * review * lmppl.Finished()
    print(lmppl.infer(documents, lmppl.SMC(32), seed=1).draw(3).text)
