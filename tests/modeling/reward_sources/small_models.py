"""Small sequence classifiers in float64: a BERT, a Llama that pools at the last token, and a perceptron by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

SENTENCES = ["good film", "bad", "the good bad film was good", "was", "film bad film"]
WORDS = ["[PAD]", "[UNK]", "a", "bad", "film", "good", "the", "was"]


def tokenizer() -> Any:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", model_max_length=8
    )


def bert(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
        num_labels=1,
        pad_token_id=0,
        initializer_range=1.0,
        **options,
    )
    return transformers.BertForSequenceClassification(config).double().eval()


def llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        num_labels=1,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=1.0,
    )
    return transformers.LlamaForSequenceClassification(config).double().eval()


class Perceptron(nn.Module):
    """The mean embedding, an affine map and tanh, dropout, and a linear head: r = w·(mask ⊙ tanh(Ae + b)) + a."""

    def __init__(self, p: float = 0.4, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.config = SimpleNamespace(num_labels=1, pad_token_id=0, id2label={0: "r"}, problem_type=None)
        self.embedding, self.hidden = nn.Embedding(len(WORDS), 5), nn.Linear(5, 6)
        self.dropout, self.score = nn.Dropout(p), nn.Linear(6, 1)
        self.double().eval()

    @property
    def device(self) -> torch.device:
        return self.score.weight.device

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask[..., None].double()
        return torch.tanh(self.hidden((self.embedding(input_ids) * mask).sum(1) / mask.sum(1)))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.score(self.dropout(self.features(input_ids, attention_mask))))


def features_by_hand(model: Perceptron, texts: list[str]) -> Tensor:
    """(B, 6) what the dropout layer of the perceptron sees, one text at a time."""
    read = tokenizer()
    with torch.no_grad():
        rows = [read(text, return_tensors="pt") for text in texts]
        return torch.cat([model.features(row["input_ids"], row["attention_mask"]) for row in rows])
