"""A `transformers` sequence classifier as a function of texts, batched on its device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmppl.errors import ModelError

__all__ = ["SequenceClassifier", "longest_input"]


class SequenceClassifier:
    """texts → logits or log-probabilities of one output, (B,) float64.

    One output: the logit, or log σ(logit) if `log_prob`. Several: log softmax(logits)[label], or log
    σ(logit[label]) where the model's `problem_type` is multi-label.

    Parameters
    ----------
    model, tokenizer
        A `...ForSequenceClassification` in evaluation mode, and what it reads with; neither is changed.
    label : str, optional
        The output that is meant, by its name in `model.config.id2label`.
    log_prob : bool
        See above.
    batch_size : int
        Texts in one forward; texts of similar length go together, padded on the right.
    max_length : int, optional
        Cut texts to this many tokens; if None, a text that is too long is an error.
    owner : str
        Whom errors name.

    Raises
    ------
    ModelError
        See `Reward.from_pretrained`; when called, for texts that are too long or that have no token.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        label: str | None = None,
        log_prob: bool = False,
        batch_size: int = 32,
        max_length: int | None = None,
        owner: str = "Reward.from_pretrained",
    ) -> None:
        config: Any = getattr(model, "config", None)
        if getattr(config, "num_labels", None) is None or not callable(model):
            raise ModelError(
                f"{owner}: got {type(model).__name__}, expected a name, a path or a "
                "transformers sequence-classification model"
            )
        if not callable(tokenizer):
            raise ModelError(f"{owner}: a loaded model needs its tokenizer=")
        if getattr(model, "training", False):
            raise ModelError(f"{owner}: the model is in training mode (dropout is on); call model.eval()")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ModelError(f"{owner}: got batch_size={batch_size!r}, expected at least 1")
        if batch_size > 1:
            _check_padding(config, tokenizer, owner)
        self.model, self.tokenizer, self.label = model, tokenizer, label
        self.batch_size, self.max_length = batch_size, max_length
        self.column = _column_of(config, label, owner)
        self.is_multi_label = config.problem_type == "multi_label_classification"
        self.is_log_prob = config.problem_type != "regression" and (log_prob or config.num_labels > 1)
        self.longest = longest_input(config, tokenizer)
        self.__name__ = label or type(model).__name__

    def __call__(self, texts: list[str]) -> Any:
        """(B,) the values of the output that is meant."""
        return self.values(texts)

    def values(self, texts: list[str]) -> Tensor:
        """(B,) the logit or log-probability of the output that is meant."""
        logits = self.logits(texts)
        if not self.is_log_prob:
            column: Tensor = logits[:, self.column]
        elif logits.shape[1] == 1 or self.is_multi_label:
            column = torch.nn.functional.logsigmoid(logits[:, self.column])
        else:
            column = torch.log_softmax(logits, -1)[:, self.column]
        return column

    def logits(self, texts: list[str]) -> Tensor:
        """(B, L) what the model calls logits, float64 on the CPU."""
        if not texts:
            return torch.zeros(0, self.model.config.num_labels, dtype=torch.float64)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        parts = [
            self._forward([texts[i] for i in order[start : start + self.batch_size]])
            for start in range(0, len(texts), self.batch_size)
        ]
        return torch.cat(parts)[torch.tensor(order).argsort()]

    @torch.no_grad()
    def _forward(self, texts: list[str]) -> Tensor:
        options = {} if self.max_length is None else {"truncation": True, "max_length": self.max_length}
        # On the right, whatever side the tokenizer prefers: positions of a row then do not depend on its companions.
        batch = self.tokenizer(texts, padding=len(texts) > 1, padding_side="right", return_tensors="pt", **options)
        lengths = batch["attention_mask"].sum(-1)
        if int(lengths.min()) == 0:
            raise ModelError(
                "the tokenizer reads an empty text as no token; use on='full' or a tokenizer that adds one"
            )
        if self.longest is not None and int(lengths.max()) > self.longest:
            raise ModelError(
                f"a text has {int(lengths.max())} tokens, more than the {self.longest} that the model reads; "
                "cut texts with max_length=, or lower the prior's max_new_tokens"
            )
        logits: Tensor = self.model(**batch.to(self.model.device)).logits
        return logits.double().cpu()


def longest_input(config: Any, tokenizer: Any) -> int | None:
    """How many tokens a network reads, as its configuration and its tokenizer say: some count positions from 2 on."""
    limits = (getattr(config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None))
    return min((n for n in limits if isinstance(n, int) and n > 0), default=None)


def _check_padding(config: Any, tokenizer: Any, owner: str) -> None:
    """A model that reads its last token finds it by its own pad id, which must be what rows are padded with."""
    of_model = getattr(getattr(config, "get_text_config", lambda: config)(), "pad_token_id", None)
    if tokenizer.pad_token_id is None or of_model is None:
        raise ModelError(
            f"{owner}: no padding token; load model and tokenizer yourself and set "
            "tokenizer.pad_token and model.config.pad_token_id, or read texts one by one with batch_size=1"
        )
    if tokenizer.pad_token_id != of_model:
        raise ModelError(
            f"{owner}: the tokenizer pads with {tokenizer.pad_token_id}, but "
            f"model.config.pad_token_id={of_model}; set them equal, or read texts one by one with batch_size=1"
        )


def _column_of(config: Any, label: str | None, owner: str) -> int:
    labels = {str(name): int(i) for i, name in config.id2label.items()}
    if config.num_labels == 1:
        if label is not None and label not in labels:
            raise ModelError(f"{owner}: got label={label!r}, but the model has the one output {list(labels)}")
        return 0
    if label not in labels:
        raise ModelError(f"{owner}: got label={label!r}, expected one of the model's {list(labels)}")
    return labels[label]
