"""Frozen embeddings of `transformers` networks as features: the mean of the last hidden states over a text's tokens."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from lmppl.errors import ModelError
from lmppl.lm.base import LanguageModel
from lmppl.modeling.evidence.sequence_classifier import longest_input
from lmppl.modeling.returned_values import quote

__all__ = ["EncoderFeatures", "LMFeatures"]


class EncoderFeatures:
    """texts → (B, H): the mean over a text's tokens of an encoder's last hidden states, frozen.

    Padding never enters: e(x) = (1/T) Σ_t h_t over the T tokens of x alone. Source: `reimers2019` for means as
    sentence embeddings.

    Parameters
    ----------
    model, tokenizer
        A `transformers` network with `last_hidden_state`, in evaluation mode, and what it reads with; neither is
        changed.
    batch_size : int
        Texts in one forward; texts of similar length go together.
    max_length : int, optional
        Cut texts to their last so many tokens; by default a text that is too long for the network is an error.

    Raises
    ------
    ModelError
        For a network in training mode; when called, for texts that are too long or that have no token.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 32, max_length: int | None = None) -> None:
        if not callable(model) or getattr(model, "config", None) is None:
            raise ModelError(f"EncoderFeatures: got {type(model).__name__}, expected a transformers network")
        if not callable(tokenizer):
            raise ModelError("EncoderFeatures: a loaded network needs its tokenizer")
        if getattr(model, "training", False):
            raise ModelError("EncoderFeatures: the network is in training mode (dropout is on); call model.eval()")
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value is not None and value < 1:
                raise ModelError(f"EncoderFeatures: got {name}={value}, expected at least 1")
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.max_length = batch_size, max_length
        self.longest = longest_input(model.config, tokenizer)
        self.__name__ = type(model).__name__

    @classmethod
    def from_pretrained(
        cls, path: str, *, batch_size: int = 32, max_length: int | None = None, device: str | torch.device = "cpu"
    ) -> Self:
        """The encoder and the tokenizer of a name or a folder, loaded by `transformers`."""
        from transformers import AutoModel, AutoTokenizer

        model = AutoModel.from_pretrained(path).to(device).eval()
        return cls(model, AutoTokenizer.from_pretrained(path), batch_size=batch_size, max_length=max_length)

    def __call__(self, texts: list[str]) -> Tensor:
        ids = [self._tokens(text) for text in texts]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        rows: list[Tensor] = []
        for start in range(0, len(ids), self.batch_size):
            rows += self._forward([ids[i] for i in order[start : start + self.batch_size]])
        back = torch.empty(len(ids), dtype=torch.long)
        back[order] = torch.arange(len(ids))
        return torch.stack(rows)[back]

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]  # it is cut, or refused, here
        if not ids:
            raise ModelError(
                f"{self.__name__} reads the text {quote(text)} as no token; use on='full', so that its context is read "
                "too, or a tokenizer that adds a token"
            )
        if self.max_length is not None:
            return ids[-self.max_length :]
        if self.longest is not None and len(ids) > self.longest:
            raise ModelError(
                f"the text {quote(text)} has {len(ids)} tokens, more than the {self.longest} that {self.__name__} "
                "reads; cut texts with max_length="
            )
        return ids

    @torch.no_grad()
    def _forward(self, ids: list[list[int]]) -> Tensor:
        longest = max(map(len, ids))
        device = next(self.model.parameters()).device
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in ids], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=device)
        hidden = self.model(input_ids=tokens, attention_mask=mask).last_hidden_state.double()
        weight = mask[:, :, None].double()
        # A state at a place of padding may be nan, which 0 · nan would keep.
        mean: Tensor = (hidden.masked_fill(weight == 0, 0.0)).sum(1) / weight.sum(1)
        return mean.cpu()


class LMFeatures(EncoderFeatures):
    """texts → (B, H): the mean over a text's tokens of the LM's own last hidden states.

    Parameters
    ----------
    lm : LanguageModel
        A Hugging Face LM of lmppl. The text is read as it stands: use `on="full"` for texts with their contexts.
    batch_size, max_length
        As in `EncoderFeatures`.
    """

    def __init__(self, lm: LanguageModel, *, batch_size: int = 32, max_length: int | None = None) -> None:
        network, tokenizer = getattr(lm, "network", None), getattr(lm, "tokenizer", None)
        if network is None or tokenizer is None:
            raise ModelError(
                f"LMFeatures: got {type(lm).__name__}, which has no hidden states; give a Hugging Face LM, or a "
                "function of a list of texts as features"
            )
        super().__init__(network.body, tokenizer, batch_size=batch_size, max_length=max_length)
