"""The embedded language model: small enough to ship in the wheel, real enough to be worth conditioning.

A Llama of 2.6 million parameters, trained by this project on sampled text: short sentences about films,
books, meals, hotels and journeys, and stories for small children. It needs no network and no download.

* Architecture: 5 layers, width 192, 6 heads, context 256, tied embeddings; weights stored in float16.
* Tokenizer: byte-level BPE with 2,048 entries. It puts BOS before a text (``add_special_tokens=True``), adds
  no space, and decodes every text to itself. PAD, BOS and EOS are the ids 0, 1 and 2.
* Every training document ends with EOS, so a draw from ``"The film was"`` usually finishes within 24 tokens.

``PROVENANCE.md`` beside the weights states the data, the licences, the training and the measured figures;
``examples/train_tiny.py`` and ``examples/tiny_corpus.py`` made it.
"""

from pathlib import Path

__all__ = ["tiny_path"]


def tiny_path() -> Path:
    """Folder of the embedded model, in the layout that transformers' ``from_pretrained`` reads.

    Returns
    -------
    Path
        The folder ``tiny_weights`` beside this module: weights, configuration, tokenizer and provenance.

    Raises
    ------
    FileNotFoundError
        If the weights are missing, as in a checkout or an installation that left out binary files.
    """
    folder = Path(__file__).with_name("tiny_weights")
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the embedded language model is missing: no model.safetensors in {folder}. "
            "Reinstall lmppl, or train the model with examples/train_tiny.py --out FOLDER."
        )
    return folder
