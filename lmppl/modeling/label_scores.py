"""Classifiers as functions of texts: `transformers` pipelines, and fitted classifiers as scikit-learn has them.

Neither library is imported here: a classifier is known by what it offers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmppl.errors import ModelError, ShapeError

__all__ = ["FittedScore", "Label", "LabelScore", "fitted_score", "is_log_probability", "label_score"]

Label = str | int
BATCH_SIZE = 32  # of a pipeline that was made without one, which would read texts one by one
ROUNDING = 1e-4  # nats


def is_log_probability(fn: Callable[..., Any]) -> bool:
    """Whether `fn` is known to return log-probabilities, which 0 bounds."""
    return getattr(fn, "is_log_prob", False) is True


@dataclass(frozen=True)
class LabelScore:
    """The score of one label, from a `transformers` text-classification pipeline.

    A batch goes in at once, in forwards of the pipeline's own `batch_size`, or of 32. Where rows of one forward would
    change each other (padding on the left, no padding token, or another one than the model's) texts are read one by
    one.

    Parameters
    ----------
    pipeline : callable
        list of texts → for each a dict {"label", "score"}, or a list of them.
    label : str
        The label whose score is wanted.
    is_log_prob : bool
        The log of the score, in nats; the score must be a probability.
    """

    pipeline: Callable[..., Any]
    label: Label
    is_log_prob: bool = False

    def __call__(self, texts: list[str]) -> list[float]:
        # A pipeline reports its best label only, unless it is asked for all of them.
        asked = {"top_k": None} | self._batching() if hasattr(self.pipeline, "task") else {}
        results = self.pipeline(texts, **asked)
        scores = [self._score(item) for item in results]
        return [self._log(p) for p in scores] if self.is_log_prob else scores

    def _batching(self) -> dict[str, int]:
        tokenizer = getattr(self.pipeline, "tokenizer", None)
        config = getattr(getattr(self.pipeline, "model", None), "config", None)
        if tokenizer is None or config is None or not hasattr(self.pipeline, "_batch_size"):
            return {}
        pad = getattr(getattr(config, "get_text_config", lambda: config)(), "pad_token_id", None)
        if pad is None or tokenizer.pad_token_id != pad or tokenizer.padding_side != "right":
            return {"batch_size": 1}
        return {} if self.pipeline._batch_size is not None else {"batch_size": BATCH_SIZE}

    def _score(self, item: Any) -> float:
        scores = {one["label"]: float(one["score"]) for one in ([item] if isinstance(item, Mapping) else item)}
        if self.label not in scores:
            raise ModelError(f"label {self.label!r} is not among the labels that came back: {sorted(scores)}")
        return scores[self.label]

    def _log(self, score: float) -> float:
        if score < 0 or score > 1:
            raise ModelError(
                f"the score {score:g} of label {self.label!r} is no probability, so that it has no log-probability; "
                "leave the pipeline's function_to_apply at its default"
            )
        return math.log(score) if score > 0 else -math.inf


def label_score(pipeline: Callable[..., Any], label: Label, log_prob: bool, kind: str) -> LabelScore:
    """`LabelScore` of a label that the pipeline has, as far as it says which it has."""
    known = getattr(getattr(getattr(pipeline, "model", None), "config", None), "id2label", None)
    if known and label not in known.values():
        raise ModelError(f"{kind}: got label={label!r}, expected one of the pipeline's {list(known.values())}")
    return LabelScore(pipeline, label, log_prob)


@dataclass(frozen=True)
class FittedScore:
    """log p(label|x) of a fitted classifier, in nats: its `predict_log_proba`, or the log of its `predict_proba`.

    The probabilities of a text that add up to 1 but for rounding are normalised in float64, so that none is above 1.

    Parameters
    ----------
    classifier
        Has `classes_`, and takes a list of texts.
    label : str or int
        The class that is meant.
    column : int
        Its place in `classes_`.

    Raises
    ------
    ShapeError
        Where not one row of all classes comes back for each text.
    """

    classifier: Any
    label: Label
    column: int

    is_log_prob = True

    def __call__(self, texts: list[str]) -> Tensor:
        log_p = self._log_probabilities(texts)
        expected = (len(texts), len(self.classifier.classes_))
        if tuple(log_p.shape) != expected:
            raise ShapeError(
                f"{type(self.classifier).__name__} returned probabilities of shape {tuple(log_p.shape)}, expected "
                f"{expected}: one row for each text, one column for each class"
            )
        sums_to_one = torch.logsumexp(log_p, -1, keepdim=True).abs() < ROUNDING
        return torch.where(sums_to_one, torch.log_softmax(log_p, -1), log_p)[:, self.column]

    def _log_probabilities(self, texts: list[str]) -> Tensor:
        own = getattr(self.classifier, "predict_log_proba", None)
        if own is None:
            return torch.from_numpy(np.array(self.classifier.predict_proba(texts), dtype=np.float64)).log()
        with np.errstate(divide="ignore"):  # a tree may be certain, and log 0 is −∞
            return torch.from_numpy(np.array(own(texts), dtype=np.float64))


def fitted_score(classifier: Any, label: Label | None, kind: str) -> FittedScore | None:
    """`FittedScore` of an object that predicts, as scikit-learn's do; None of any other object.

    Raises
    ------
    ModelError
        Where it is not fitted, gives no probabilities, reads no texts, or has no such label.
    """
    name = type(classifier).__name__
    if callable(classifier) or isinstance(classifier, type) or not hasattr(classifier, "predict"):
        return None
    if not (hasattr(classifier, "predict_log_proba") or hasattr(classifier, "predict_proba")):
        raise ModelError(
            f"{kind}: {name} gives no probabilities (it has no predict_log_proba); pass the method that is meant, such "
            "as its predict or decision_function, or calibrate it (CalibratedClassifierCV)"
        )
    classes = getattr(classifier, "classes_", None)
    if classes is None:
        raise ModelError(f"{kind}: {name} is not fitted (it has no classes_); call its fit(texts, labels) first")
    if isinstance(classes, list) and any(np.ndim(one) for one in classes):
        raise ModelError(f"{kind}: {name} has {len(classes)} outputs, expected one; fit a classifier for each")
    if hasattr(classifier, "n_features_in_"):
        raise ModelError(
            f"{kind}: {name} reads rows of {classifier.n_features_in_} numbers, expected a classifier of texts, such "
            "as make_pipeline(TfidfVectorizer(), LogisticRegression()), fitted"
        )
    labels = np.asarray(classes).tolist()
    if label is None or label not in labels:
        what = "label= is needed" if label is None else f"got label={label!r}"
        raise ModelError(f"{kind}: {what}, expected one of the classes of {name}: {labels}")
    return FittedScore(classifier, label, labels.index(label))
