"""One Hugging Face causal LM as a network: a body that gives hidden states, a head that gives logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from lmppl.errors import UnsupportedModel

__all__ = ["POSTPROCESSING", "Network"]


def _identity(logits: Tensor, config: Any) -> Tensor:
    return logits


def _soft_cap(logits: Tensor, config: Any) -> Tensor:
    cap = float(config.final_logit_softcapping)
    return torch.tanh(logits / cap) * cap


def _multiply(logits: Tensor, config: Any) -> Tensor:
    return logits * float(config.logit_scale)


def _divide(logits: Tensor, config: Any) -> Tensor:
    return logits / float(config.logits_scaling)


# What architectures do after the output embedding, by the config entry that declares it.
POSTPROCESSING: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "plain": _identity,
    "final_logit_softcapping": _soft_cap,
    "logit_scale": _multiply,
    "logits_scaling": _divide,
}


class Network:
    """The forward of one model.

    Parameters
    ----------
    model : nn.Module
        A Hugging Face causal LM. Parameters, config and generation config are only read. Dropout is off in every
        forward made here, and the model's own train/eval state is as it was afterwards.

    Raises
    ------
    UnsupportedModel
        For sequence-to-sequence models and for models without an output embedding.
    """

    def __init__(self, model: nn.Module) -> None:
        config: Any = getattr(model, "config", None)
        if config is None:
            raise UnsupportedModel(
                f"{type(model).__name__}: not a Hugging Face causal LM (it has no config); write an own LanguageModel"
            )
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModel(
                f"{type(model).__name__} is a sequence-to-sequence model; lmppl needs a causal (decoder-only) LM"
            )
        self.model = cast(Any, model)
        self.config: Any = config.get_text_config(decoder=True)
        self.head: Any = self.model.get_output_embeddings()
        if self.head is None:
            raise UnsupportedModel(f"{type(model).__name__} has no output embedding: it is no causal LM")
        self.body: Any = self.model.get_decoder()
        self.modules = list(model.modules())
        self._buffers = [(module._buffers, name) for module in self.modules for name in module._buffers]
        # The class's own signature: an instance may be wrapped by hooks that take anything.
        self._takes = {
            id(module): inspect.signature(type(module).forward).parameters.keys() for module in (self.model, self.body)
        }
        first = next(model.parameters())
        self.device, self.network_dtype = first.device, first.dtype
        self.dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        self.vocab_size = int(self.head.weight.shape[0])

    @property
    def name(self) -> str:
        """The model's class, for messages."""
        return type(self.model).__name__

    @property
    def window(self) -> int | None:
        """Positions that the network can read, None where the config states no limit."""
        for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
            value = getattr(self.config, name, None)
            if isinstance(value, int) and value > 0:
                return value
        return None

    @property
    def frequencies_change_at(self) -> int | None:
        """Tokens at which rotary frequencies change for the whole batch ("longrope"), None where they never do."""
        rotary = getattr(self.config, "rope_parameters", None) or getattr(self.config, "rope_scaling", None) or {}
        if rotary.get("rope_type", rotary.get("type")) != "longrope":
            return None
        change = rotary.get("original_max_position_embeddings")
        own = getattr(self.config, "original_max_position_embeddings", None)
        return change if isinstance(change, int) else own

    def forward(
        self,
        tokens: Tensor,
        *,
        split: bool,
        cache: Any = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        inference: bool = False,
    ) -> Tensor:
        """Hidden states (B, k, H) of `tokens` (B, k), or logits (B, k, V) where the model cannot be split.

        `inference` where the cache's own tensors are made elsewhere, so that under `torch.no_grad` all that the model
        makes may be unfit to be written or differentiated later: a tenth less to do in a forward of few rows.
        """
        module = self.body if split else self.model
        arguments: dict[str, Any] = {"input_ids": tokens, "use_cache": cache is not None}
        takes = self._takes[id(module)]
        if cache is not None:
            arguments["cache" if "cache" in takes else "past_key_values"] = cache  # from transformers 5.24 on
        if mask is not None:
            arguments["attention_mask"] = mask
            if "position_ids" in takes:
                arguments["position_ids"] = positions
        cheaper = inference and not torch.is_grad_enabled()
        with self._evaluating(), torch.inference_mode() if cheaper else nullcontext():
            output = module(**arguments)
        result: Tensor = output[0] if split else output.logits
        if not cheaper:
            return result
        self._restore_buffers()
        return result.clone()

    def project(self, hidden: Tensor, head: str | None) -> Tensor:
        """(M, V) logits, in the dtype that the softmax runs in."""
        if head is None:
            return hidden.to(self.dtype)
        logits: Tensor = POSTPROCESSING[head](self.head(hidden), self.config)
        return logits.to(self.dtype)

    @property
    def sliding_window(self) -> int | None:
        """Positions that a local attention layer sees, None where all layers see everything."""
        sizes = [getattr(self.config, name, None) for name in ("sliding_window", "attention_chunk_size")]
        return min((s for s in sizes if isinstance(s, int) and s > 0), default=None)

    def cache_bytes_per_token(self) -> int:
        """Bytes that one position of one row takes in the cache, from the config.

        Two vectors of the hidden size in each layer where the config has no attention heads (recurrent networks, whose
        real need does not grow with the row).
        """
        config = self.config
        queries = getattr(config, "num_attention_heads", None)
        if queries:
            heads = getattr(config, "num_key_value_heads", None) or queries
            width = heads * (getattr(config, "head_dim", None) or config.hidden_size // queries)
        else:
            width = config.hidden_size
        return int(2 * config.num_hidden_layers * width * torch.finfo(self.network_dtype).bits // 8)

    def _restore_buffers(self) -> None:
        """Buffers that a model has replaced in inference mode (rotary frequencies of longer rows) as plain tensors."""
        for buffers, name in self._buffers:
            value = buffers[name]
            if value is not None and value.is_inference():
                buffers[name] = value.clone()

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = [module for module in self.modules if module.training]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True
