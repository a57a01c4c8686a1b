"""Calling user functions: the conventions they may follow, and errors that show the offending text.

A feature is somebody else's code. Whatever it does wrong is told here, once: which factor, got and expected, on which
text, and how to fix it. Nothing is repaired silently: a wrong shape is never reshaped, a wrong value never clipped.
"""

from __future__ import annotations

import functools
import inspect
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from lmppl.errors import FactorError, ModelError, ShapeError
from lmppl.modeling.factors import Factor, Feature, FeatureInput
from lmppl.sequences import Sequences

__all__ = ["RowError", "evaluate", "evaluate_log_factor", "function_name", "quote", "to_feature"]

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)


class RowError(FactorError):
    """A factor refuses the value at one row; it knows the row but not the text, which `evaluate_log_factor` fills in.

    Parameters
    ----------
    row : int
        Index of the row.
    before, after : str
        The message, before and after the place where the text stands.
    """

    def __init__(self, row: int, before: str, after: str) -> None:
        self.row, self.before, self.after = row, before, after
        super().__init__(f"{before} row {row}{after}")


def quote(text: str, limit: int = 80) -> str:
    """`repr(text)`, cut to about `limit` characters."""
    shown = repr(text)
    return shown if len(shown) <= limit else f"{shown[: limit - 4]}...{shown[0]}"


def function_name(fn: Callable[..., Any]) -> str | None:
    """How `fn` calls itself; None for a lambda."""
    if isinstance(fn, LabelScore):
        return fn.label
    if isinstance(fn, functools.partial):
        return function_name(fn.func)
    name = getattr(fn, "__name__", None) or type(fn).__name__
    return None if name == "<lambda>" else str(name)


@dataclass(frozen=True)
class LabelScore:
    """The score of one label, from a `transformers` text-classification pipeline.

    Parameters
    ----------
    pipeline : callable
        list of texts → for each a dict {"label", "score"}, or a list of them.
    label : str
        The label whose score is wanted.
    """

    pipeline: Callable[..., Any]
    label: str

    def __call__(self, texts: list[str]) -> list[float]:
        # A pipeline reports its best label only, unless it is asked for all of them.
        asked = {"top_k": None} if hasattr(self.pipeline, "task") else {}
        results = self.pipeline(texts, **asked)
        return [self._score(item) for item in results]

    def _score(self, item: Any) -> float:
        scores = {one["label"]: float(one["score"]) for one in ([item] if isinstance(item, Mapping) else item)}
        if self.label not in scores:
            raise ModelError(f"label {self.label!r} is not among the labels that came back: {sorted(scores)}")
        return scores[self.label]


def to_feature(
    fn: Callable[..., Any] | Feature,
    *,
    kind: str,
    on: FeatureInput = "text",
    stochastic: bool = False,
    fingerprint: str | None = None,
    label: str | None = None,
) -> Feature:
    """The feature of a function; a `Feature` is passed through.

    Parameters
    ----------
    fn : callable or Feature
        See `Feature.fn`.
    kind : str
        The declaration that asks ("Reward"), for messages and for the name of a lambda.
    on, stochastic, fingerprint
        As in `Feature`.
    label : str, optional
        For a text-classification pipeline: the label whose score is meant.

    Raises
    ------
    ModelError
        Where `fn` is no function of one list of texts, or options contradict a given `Feature`.
    """
    if isinstance(fn, Feature):
        if (on, stochastic, fingerprint, label) != ("text", False, None, None):
            raise ModelError(f"{kind}: got a Feature together with its options; set them in the Feature")
        return fn
    if not callable(fn):
        raise ModelError(f"{kind}: got {type(fn).__name__}, expected a function of a list of texts")
    if hasattr(fn, "config") and hasattr(fn, "forward"):
        raise ModelError(
            f"{kind}: got the network {type(fn).__name__}, expected a function of a list of texts; "
            "a sequence classifier becomes one by Reward.from_pretrained(model, tokenizer)"
        )
    if hasattr(fn, "log_prob"):
        raise ModelError(f"{kind}: got the distribution {type(fn).__name__}, expected a function of a list of texts")
    if on not in ("text", "full", "ids", "hidden"):
        raise ModelError(f"{kind}: got on={on!r}, expected 'text', 'full', 'ids' or 'hidden'")
    if label is not None:
        fn = LabelScore(fn, label)
    feature = Feature(function_name(fn) or kind.lower(), fn, on, stochastic, fingerprint)
    _check_signature(feature, kind)
    try:
        hash(fn)
    except TypeError as error:
        raise ModelError(
            f"{kind}: {feature.name} cannot be hashed, so that it cannot be recognised when two factors share it; "
            "a dataclass becomes hashable with @dataclass(eq=False)"
        ) from error
    return feature


def _check_signature(feature: Feature, kind: str) -> None:
    if feature.reads_prompts:
        needed = [
            p.name
            for p in inspect.signature(feature.fn).parameters.values()
            if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        ]
        unknown = [name for name in needed if name not in ("prompts", "completions", "completion_ids")]
        if unknown:
            raise ModelError(
                f"{kind}: {feature.name} needs {', '.join(unknown)} besides prompts and completions; "
                f"bind it: functools.partial({feature.name}, {unknown[0]}=...)"
            )
        if feature.on != "text":
            raise ModelError(
                f"{kind}: {feature.name} takes prompts and completions, which on={feature.on!r} contradicts; leave on= out"
            )
        return
    try:
        signature = inspect.signature(feature.fn)
    except (TypeError, ValueError):  # builtins have no signature
        return
    try:
        signature.bind([])
    except TypeError as error:
        raise ModelError(
            f"{kind}: {feature.name}{signature} cannot be called with one list of texts ({error}); "
            "bind the other arguments with functools.partial"
        ) from error


def evaluate(feature: Feature, sequences: Sequences, *, factor: str) -> Tensor:
    """Run a user function on B sequences, once, and check what comes back.

    Parameters
    ----------
    feature : Feature
        The function and what it reads: the completion texts (`on="text"`), context + completion ("full"), the
        `Sequences` themselves ("ids"), or, in the Hugging Face reward convention, prompts and completions by keyword.
    sequences : Sequences
        The B rows.
    factor : str
        The factor that errors name.

    Returns
    -------
    Tensor (B,) or (B, K), float64
        Finite or −inf (whether −inf is allowed is the factor's business), on the device of the ids.

    Raises
    ------
    FactorError
        Where the function raises, or returns something that is no number: nan, +inf, None, a string; the message quotes
        the text, which is found by calling the function again on one text after the other.
    ShapeError
        Where the result is not of shape (B,) or (B, K) with K ≥ 2.
    """
    if feature.on == "hidden":
        raise FactorError(f"factor {factor!r}: feature {feature.name!r} reads hidden states, which texts do not have")
    device = sequences.ids.device
    if len(sequences) == 0:
        return torch.zeros(0, dtype=torch.float64, device=device)
    call = _Call(feature, sequences, factor)
    return _Column(call, call.run()).tensor().to(device)


def evaluate_log_factor(factor: Factor, columns: dict[str, Tensor], sequences: Sequences) -> Tensor:
    """(B,) log φ from feature columns, in nats; what goes wrong names the factor and the text of the row.

    Raises
    ------
    FactorError
        Where the factor refuses a value (above its bound, not boolean), or its own function raises.
    """
    try:
        return factor.log_factor(columns)
    except RowError as error:
        text = quote(sequences.text[error.row])
        raise FactorError(f"factor {factor.name!r}: {error.before} {text}{error.after}") from error
    except ModelError as error:
        raise type(error)(f"factor {factor.name!r}: {error}") from error
    except OUT_OF_MEMORY:
        raise
    except Exception as error:
        raise FactorError(f"factor {factor.name!r}: log_factor raised {_described(error)}") from error


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class _Call:
    """One batch for one function."""

    feature: Feature
    sequences: Sequences
    factor: str

    @property
    def texts(self) -> list[str]:
        return self.sequences.full_text if self.feature.on == "full" else self.sequences.text

    @property
    def head(self) -> str:
        return f"factor {self.factor!r}: {self.feature.name}"

    def run(self) -> Any:
        arguments = self._arguments(self.sequences)
        try:
            return self._call(arguments)
        except OUT_OF_MEMORY:
            raise
        except Exception as error:
            self._blame(error)

    def _arguments(self, rows: Sequences) -> tuple[list[Any], dict[str, Any]]:
        feature = self.feature
        if feature.on == "ids":
            return [rows], {}
        texts = list(rows.full_text if feature.on == "full" else rows.text)
        if not feature.reads_prompts:
            return [texts], {}
        prompts = [rows.prompts[c] for c in rows.context.tolist()]
        given = {"prompts": prompts, "completions": texts, "completion_ids": rows.token_lists()}
        parameters = inspect.signature(feature.fn).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            given = {name: value for name, value in given.items() if name in parameters}
        return [], given

    def _call(self, arguments: tuple[list[Any], dict[str, Any]]) -> Any:
        with torch.no_grad():
            return self.feature.fn(*arguments[0], **arguments[1])

    def _blame(self, original: Exception) -> NoReturn:
        """Find the text that the function cannot read, and raise with it."""
        hint = ""
        if isinstance(original, AttributeError | TypeError) and "list" in str(original) and self.feature.on != "ids":
            hint = "; the function gets a list of texts and returns one number for each"
        for row in range(len(self.sequences)):
            arguments = self._arguments(self.sequences.select([row]))
            try:
                self._call(arguments)
            except OUT_OF_MEMORY:
                raise
            except Exception as error:
                raise FactorError(
                    f"{self.head} raised {_described(error)} on the text {quote(self.texts[row])}{hint}"
                ) from error
        raise FactorError(
            f"{self.head} raised {_described(original)} on a batch of {len(self.sequences)} texts but on none of them "
            f"alone; the first is {quote(self.texts[0])}"
        ) from original


@dataclass(frozen=True)
class _Column:
    """What a function returned for one batch, read as numbers."""

    call: _Call
    values: Any

    def tensor(self) -> Tensor:
        """The checked column (B,) or (B, K), float64."""
        values = self.values
        if isinstance(values, Tensor):
            values = values.detach()
        elif hasattr(values, "__array__") and not isinstance(values, np.generic):
            array = np.asarray(values)
            values = torch.from_numpy(array.copy()) if array.dtype.kind in "biuf" else array.tolist()
        if isinstance(values, numbers.Real | np.generic) or (isinstance(values, Tensor) and values.dim() == 0):
            self._refuse_scalar(values)
        column = values if isinstance(values, Tensor) else self._from_items(values)
        if column.is_complex():
            raise FactorError(f"{self.call.head} returned complex numbers, expected real ones")
        self._check_shape(tuple(column.shape))
        column = column.to(torch.float64)
        bad = torch.isnan(column) | (column == torch.inf)
        if bool(bad.any()):
            row = int(torch.nonzero(bad)[0, 0])
            wrong = column[row].reshape(-1)[bad[row].reshape(-1)][0]
            self._refuse(row, f"{float(wrong)}", "a finite number")
        return column

    def _from_items(self, values: Any) -> Tensor:
        if not isinstance(values, list | tuple):
            name = type(values).__name__
            raise FactorError(
                f"{self.call.head} returned a {name}, expected a list, an array or a tensor of "
                f"{len(self.call.sequences)} numbers"
            )
        if len(values) != len(self.call.sequences):
            self._check_shape((len(values),))
        rows = [self._item(row, value) for row, value in enumerate(values)]
        widths = [len(value) if isinstance(value, list) else 0 for value in rows]
        odd = next((row for row, width in enumerate(widths) if width != widths[0]), None)
        if odd is not None:
            raise ShapeError(
                f"{self.call.head} returned {widths[0] or 'one'} numbers for the first text but {widths[odd] or 'one'} for "
                f"{quote(self.call.texts[odd])}"
            )
        return torch.tensor(rows, dtype=torch.float64)

    def _item(self, row: int, value: Any) -> float | list[float]:
        if isinstance(value, Tensor):
            value = value.detach().cpu().numpy() if value.dtype != torch.bfloat16 else value.detach().float().numpy()
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if isinstance(value, list | tuple) and not _labels(value):
            return [self._number(row, one) for one in value]
        return self._number(row, value)

    def _number(self, row: int, value: Any) -> float:
        if labels := _labels(value):
            known = getattr(getattr(getattr(self.call.feature.fn, "model", None), "config", None), "id2label", None)
            names = list(known.values()) if isinstance(known, Mapping) else labels
            raise FactorError(
                f"{self.call.head} returned labels with scores, expected numbers; choose the score with "
                f"label=, one of {names}"
            )
        if isinstance(value, numbers.Real | np.bool_):
            try:
                return float(value)
            except OverflowError:
                return torch.inf
        self._refuse(row, quote(value) if isinstance(value, str) else repr(value), "a number")

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        count = len(self.call.sequences)
        if shape[0] == count and (len(shape) == 1 or (len(shape) == 2 and shape[1] > 1)):
            return
        expected = f"expected ({count},): one number for each of {count} texts, the first being"
        fix = ""
        if shape == (count, 1):
            fix = "; return values.squeeze(-1)"
        elif shape == (1, count):
            fix = "; return values.squeeze(0)"
        raise ShapeError(f"{self.call.head} returned: got shape {shape}, {expected} {quote(self.call.texts[0])}{fix}")

    def _refuse_scalar(self, value: Any) -> NoReturn:
        count = len(self.call.sequences)
        raise ShapeError(
            f"{self.call.head} returned the single number {float(value):g} for a list of {count} texts, expected a list of "
            f"{count}; the function gets a list of texts and returns one number for each (and .squeeze() of a batch of one "
            f"must be .squeeze(-1)); the first text is {quote(self.call.texts[0])}"
        )

    def _refuse(self, row: int, got: str, expected: str) -> NoReturn:
        raise FactorError(f"{self.call.head} returned {got}, expected {expected}, for the text {quote(self.call.texts[row])}")


def _labels(value: Any) -> list[str]:
    """The labels of a pipeline's answer for one text; empty where it is none."""
    items: Sequence[Any] = value if isinstance(value, list | tuple) else [value]
    return [str(one["label"]) for one in items if isinstance(one, Mapping) and {"label", "score"} <= set(one)]
