"""A classifier on the prior's own hidden states."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from lmppl.errors import ModelError, ShapeError
from lmppl.lm.base import LanguageModel
from lmppl.modeling.evidence.lm_factors.mean_potential import MeanPotential
from lmppl.modeling.evidence.prefixes import evaluator
from lmppl.modeling.factors import Factor, Feature
from lmppl.modeling.function_contents import content_digest
from lmppl.modeling.soft import SoftForm, SoftStep
from lmppl.sequences import Sequences

__all__ = ["Classifier"]

Head = Callable[[Tensor], Tensor]


class HeadOnMean:
    """Hidden states (B, T, H) and mask (B, T) → the head's logits of their mean over the completion's tokens.

    Parameters
    ----------
    head : callable
        (B, H) → (B,), (B, 1) or (B, K).
    """

    def __init__(self, head: Head) -> None:
        self.head = head

    def __call__(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """(B,) or (B, K)."""
        return self.logits((hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True))

    def logits(self, mean: Tensor) -> Tensor:
        """(B,) or (B, K) for means (B, H), in the head's own precision."""
        first = next(self.head.parameters(), None) if isinstance(self.head, nn.Module) else None
        scores = self.head(mean if first is None else mean.to(first.dtype))
        if scores.dim() == 2 and scores.shape[1] == 1:
            scores = scores[:, 0]
        if scores.dim() > 2 or len(scores) != len(mean):
            raise ShapeError(
                f"the head gave shape {tuple(scores.shape)} for {len(mean)} rows, expected (B,), (B, 1) or (B, K)"
            )
        return scores.to(mean.dtype)


class Classifier(Factor):
    """A head on the prior's hidden states, averaged over the completion: log φ(x) = log p(a|x) ≤ 0, in nats.

    log σ(s) of a head with one output, log softmax(s)[label] of one with K. The states come from one more pass of the
    prior over each draw, which is counted.

    The soft form is log p(a|x_≤t) of the mean so far. The form for prefixes says the same one token later, of the
    states that the prior makes anyway: ψ(x_≤t) = p(a|x_<t), since what the last token brings is known when it has been
    read; at the end of a row it is φ. Source: `dathathri2020`.

    Parameters
    ----------
    head : callable
        (B, H) → (B,), (B, 1) or (B, K) logits; an `nn.Module` must be in evaluation mode, and stays as it is.
    label : int, optional
        The class a; needed for K outputs.
    name : str, optional
        How errors and tables call the factor; by default "classifier".

    Raises
    ------
    ModelError
        Where the head is in training mode, or `label` does not fit its outputs.
    """

    label: int | None

    def __init__(self, head: Head, *, label: int | None = None, name: str | None = None) -> None:
        if not callable(head):
            raise ModelError(f"Classifier: got {type(head).__name__}, expected a function of hidden states")
        if isinstance(head, nn.Module) and head.training:
            raise ModelError("Classifier: the head is in training mode; call head.eval()")
        if label is not None and (isinstance(label, bool) or not isinstance(label, int) or label < 0):
            raise ModelError(f"Classifier: got label={label!r}, expected the index of a class")
        on_mean = head if isinstance(head, HeadOnMean) else HeadOnMean(head)
        label_name = name or "classifier"

        def log_factor(columns: dict[str, Tensor]) -> Tensor:
            (logits,) = columns.values()
            return log_class_prob(logits, label)

        super().__init__(
            name=label_name,
            features=(Feature(label_name, on_mean, on="hidden"),),
            log_factor=log_factor,
            upper=0.0,
            hard=False,
            soft=self.soft_form,
            formula=f"p({'a' if label is None else label}|{label_name}(c, x))",
            named=name is not None,
        )
        object.__setattr__(self, "label", label)

    def bind(self, lm: LanguageModel, log_factor: Callable[[Sequences], Tensor] | None = None) -> Factor:
        """As `Factor.bind`: with the form for prefixes of `lm`."""
        on_mean, label = self.features[0].fn, self.label
        assert isinstance(on_mean, HeadOnMean)
        bound = copy.copy(self)
        ending = evaluator(self, lm, log_factor)
        form = MeanPotential(
            lm, lambda mean: log_class_prob(on_mean.logits(mean), label), ending,
            lambda: f"{content_digest(on_mean)}:{label}",
        )  # fmt: skip
        object.__setattr__(bound, "incremental", form)
        return bound

    def soft_form(self, lm: LanguageModel) -> SoftForm:
        """log p(a|x_≤t) as a function of the step."""
        on_mean, label = self.features[0].fn, self.label
        assert isinstance(on_mean, HeadOnMean)

        def log_prob(step: SoftStep) -> Tensor:
            return log_class_prob(on_mean.logits(step.mean_hidden), label)

        return log_prob

    def describe(self) -> dict[str, Any]:
        """As `Factor.describe`, with the label."""
        return super().describe() | {"label": self.label}

    @classmethod
    def from_description(
        cls, data: Mapping[str, Any], features: Sequence[Feature], functions: Mapping[str, Any]
    ) -> Self:
        """The factor that `describe` described; the feature's function is the head."""
        return cls(features[0].fn, label=data["label"], name=data["name"])


def log_class_prob(logits: Tensor, label: int | None) -> Tensor:
    """(B,) log p(a): of one logit (B,), or of `label` among (B, K)."""
    if logits.dim() == 1:
        if label is not None:
            raise ModelError(f"Classifier: got label={label} for a head with one output, expected none")
        return torch.nn.functional.logsigmoid(logits)
    if label is None or label >= logits.shape[1]:
        raise ModelError(f"Classifier: got label={label} for a head with {logits.shape[1]} outputs")
    return torch.log_softmax(logits, -1)[:, label]
