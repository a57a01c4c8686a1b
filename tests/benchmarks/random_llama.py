"""Llama models with random weights, and byte-level tokenizers of distinct strings, as folders that any library loads.

Nothing of them is committed: the seed makes them again.
"""

from __future__ import annotations

import random
import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["CONTEXT", "SIZES", "allowed_characters", "make_folder"]

CONTEXT = "It was"
SPECIAL = ["<pad>", "<bos>", "<eos>"]
LOGIT_SCALE = 2.0  # standard deviation of the next-token logits, in nats

# Shape by name: vocabulary, hidden size, intermediate size, layers, heads.
SIZES = {
    "0.3M": (512, 64, 172, 5, 8),
    "1M": (1024, 128, 344, 4, 8),
    "7M": (8192, 256, 688, 4, 8),
    "12M": (4096, 384, 1024, 5, 8),
}


def allowed_characters() -> str:
    """The character class of the benchmarks' constraint: lower-case letters, blank, full stop and comma."""
    return string.ascii_lowercase + " .,"


def corpus(seed: int, lines: int = 20_000) -> list[str]:
    """Words of random syllables, of which a third are numbers, capitals or punctuation."""
    chance = random.Random(seed)
    syllables = [c + v + d for c in "bcdfghjklmnprstvwz" for v in "aeiou" for d in ("", "n", "r", "s")]

    def word() -> str:
        kind = chance.random()
        if kind < 0.12:
            return "".join(chance.choices(string.digits, k=chance.randint(1, 4)))
        if kind < 0.2:
            return "".join(chance.choices(string.punctuation, k=chance.randint(1, 3)))
        text = "".join(chance.choices(syllables, k=chance.randint(1, 3)))
        return text.capitalize() if kind < 0.35 else text

    return [" ".join(word() for _ in range(12)) + "." for _ in range(lines)]


def make_tokenizer(vocab_size: int, seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with `vocab_size` entries, trained on `corpus`; it puts nothing before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(seed), trainer)
    assert tokenizer.get_vocab_size() == vocab_size
    pad, bos, eos = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos)


@torch.no_grad()
def forbid(model: LlamaForCausalLM, tokens: list[int]) -> None:
    """Make `tokens` all but impossible everywhere: without EOS all texts run to the cap, and no text hides a token.

    One dimension of the residual stream holds a constant that no layer writes to, and only these logits read it.
    """
    model.model.embed_tokens.weight[:, 0] = 1.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    model.lm_head.weight[:, 0] = 0.0
    model.lm_head.weight[tokens] = 0.0
    model.lm_head.weight[tokens, 0] = -300.0


def make_folder(size: str, folder: Path, *, seed: int = 0) -> Path:
    """Write the model `size` and its tokenizer to `folder`; the same seed gives the same weights."""
    vocab, hidden, intermediate, layers, heads = SIZES[size]
    tokenizer = make_tokenizer(vocab, seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        initializer_range=0.08,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
        torch.nn.init.normal_(model.lm_head.weight, std=LOGIT_SCALE / hidden**0.5)
        forbid(model, tokenizer.all_special_ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
