"""Tiny random Hugging Face LMs in float64, and tokenizers of single letters: where brute force can check everything."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen3NextConfig,
)

from lmppl.lm import TransformersLM

KINDS = ("llama", "mistral", "gpt2", "gemma3", "qwen3_next")
WINDOW = 3  # shorter than every context and completion together


def config(kind: str, vocab_size: int, **changes: Any) -> Any:
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    } | changes
    if kind == "llama":
        return LlamaConfig(**common)
    if kind == "mistral":
        return MistralConfig(**common, sliding_window=WINDOW)
    if kind == "gpt2":
        shape = {"n_embd": 16, "n_inner": 24, "n_layer": 2, "n_head": 4, "n_positions": 64}
        names = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
        return GPT2Config(**shape, **{k: common[k] for k in names}, resid_pdrop=0.5, attn_pdrop=0.5)
    if kind == "gemma2":  # soft-caps its logits
        return Gemma2Config(**common, sliding_window=WINDOW, final_logit_softcapping=3.0)
    if kind == "granite":  # divides its logits
        return GraniteConfig(**common, logits_scaling=0.4)
    if kind == "gemma3":
        layers = ["sliding_attention", "full_attention", "sliding_attention"]
        return Gemma3TextConfig(**common | {"num_hidden_layers": 3}, sliding_window=WINDOW, layer_types=layers)
    if kind == "qwen3_next":
        return Qwen3NextConfig(
            **common,
            layer_types=["linear_attention", "full_attention"],
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=4,
            linear_value_head_dim=4,
            num_experts=0,
            mlp_only_layers=[0, 1],
        )
    raise ValueError(kind)


def build(kind: str, vocab_size: int = 5, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """Weights of order one, so that a wrong mask or position moves log-probabilities by tenths of a nat."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(kind, vocab_size)).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 1.0 if "embed" in name or "wte" in name else 0.6)
    return model


@cache
def network(kind: str, vocab_size: int = 5, dtype: torch.dtype = torch.float64) -> nn.Module:
    """One such model, shared by the tests that only read it."""
    return build(kind, vocab_size, dtype=dtype)


@cache
def tokenizer(vocab_size: int = 5, eos: str | None = "</s>", pad: str | None = None) -> PreTrainedTokenizerFast:
    """Letters a, b, ...; then a pad token of its own where asked for, then EOS."""
    special = [s for s in (pad, eos) if s is not None]
    symbols = [chr(ord("a") + i) for i in range(vocab_size - len(special))] + special
    backend = Tokenizer(models.WordLevel({s: i for i, s in enumerate(symbols)}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token=pad)


def random_lm(kind: str, *, vocab_size: int = 5, pad: str | None = None, **options: Any) -> TransformersLM:
    """An LM over V = 5 for two contexts of different length, T = 3, unless told otherwise."""
    options = {"context": ["ab", "bacab"], "max_new_tokens": 3} | options
    return TransformersLM(network(kind, vocab_size), tokenizer=tokenizer(vocab_size, pad=pad), **options)


def uncached_logits(lm: TransformersLM, context: int, completion: list[int]) -> Tensor:
    """(L + 1, V) raw scores before and after each completion token: one unpadded row, one forward, no cache."""
    length = int(lm.context_lengths[context])
    prompt = lm.context_ids[context, -length:].tolist()
    return _forward_of_one_row(lm.network.model, (*prompt, *completion))[length - 1 :]


@lru_cache(maxsize=4096)
@torch.no_grad()
def _forward_of_one_row(model: Any, ids: tuple[int, ...]) -> Tensor:
    logits: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits
