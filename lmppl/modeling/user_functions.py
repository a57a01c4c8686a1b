"""Calling user functions: the conventions that they may follow, and errors that show the offending text.

A feature is somebody else's code. What it does wrong is told here, once: which factor, on which text, how to
fix it.
"""

from __future__ import annotations

import inspect
import traceback
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from lmppl.errors import FactorError, ModelError, ShapeError
from lmppl.modeling.factors import Factor, Feature
from lmppl.modeling.returned_values import Batch, quote, read_column
from lmppl.sequences import Draws, Sequences

__all__ = ["RowError", "evaluate", "evaluate_log_factor", "returned"]

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)


class RowError(FactorError):
    """A factor refuses the value at one row; the text of the row is filled in by `evaluate_log_factor`.

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


def evaluate(
    feature: Feature,
    sequences: Sequences,
    *,
    factor: str = "",
    who: str | None = None,
    given: tuple[Tensor, ...] | None = None,
) -> Tensor:
    """Run a user function on B sequences, once, and check what comes back.

    Parameters
    ----------
    feature : Feature
        The function and what it reads: the completion texts (`on="text"`), context + completion ("full"), the
        `Sequences` themselves ("ids"), or, in the Hugging Face reward convention, prompts and completions by
        keyword.
    sequences : Sequences
        The B rows.
    factor : str
        The factor that errors name.
    who : str, optional
        What errors begin with where it is no factor's function.
    given : tuple of Tensor, optional
        What a function of the prior reads: log π0 (B,) (`on="log_prior"`; by default the draws' own), or hidden states
        (B, T, H) and mask (B, T) (`on="hidden"`).

    Returns
    -------
    Tensor (B,) or (B, K), float64
        Finite or −inf (whether −inf is allowed is the factor's business), on the device of the ids.

    Raises
    ------
    FactorError
        Where the function raises, or returns something that is no number: nan, +inf, None, a string; the
        message quotes the text, which is found by calling the function again on one text after the other.
    ShapeError
        Where the result is not of shape (B,) or (B, K) with K ≥ 2.
    """
    who = f"factor {factor!r}" if who is None else who
    if feature.on == "log_prior" and given is None and isinstance(sequences, Draws) and sequences.log_prior is not None:
        given = (sequences.log_prior,)
    if feature.on in ("hidden", "log_prior") and given is None:
        what = "hidden states" if feature.on == "hidden" else "log π0(x|c)"
        raise FactorError(
            f"{who}: feature {feature.name!r} reads {what}, which texts do not have; evaluate it with an LM"
        )
    device = sequences.ids.device
    if len(sequences) == 0:
        return torch.zeros(0, dtype=torch.float64, device=device)
    call = _Call(feature, sequences, who, given)
    read = read_column if feature.read is None else feature.read
    return read(call.run(), call.batch).to(device)


def returned(feature: Feature, sequences: Sequences) -> tuple[Any, Batch]:
    """What a user function returns for B ≥ 1 sequences, as it is, and what errors say about the call."""
    call = _Call(feature, sequences, "")
    return call.run(), call.batch


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
    """The error, and the line that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(last.filename).name}, line {last.lineno})"


class _Call:
    """One batch for one function."""

    def __init__(
        self, feature: Feature, sequences: Sequences, who: str, given: tuple[Tensor, ...] | None = None
    ) -> None:
        self.feature, self.sequences, self.given, self.who = feature, sequences, given, who
        config = getattr(getattr(feature.fn, "model", None), "config", None)  # a pipeline knows its labels
        known = getattr(config, "id2label", None) or {}
        self.batch = Batch(
            head=f"{who}: {feature.name}" if who else feature.name,
            size=len(sequences),
            texts=lambda: sequences.full_text if feature.on == "full" else sequences.text,
            labels=tuple(str(label) for label in known.values()),
        )

    def run(self) -> Any:
        """What the function returns for the whole batch."""
        arguments = self._arguments(self.sequences, self.given)
        try:
            return self._call(*arguments)
        except OUT_OF_MEMORY:
            raise
        except (FactorError, ShapeError) as error:  # of a function inside the function, whose text is told already
            kind = ShapeError if isinstance(error, ShapeError) else FactorError
            raise kind(f"{self.who}: {error}" if self.who else str(error)) from error
        except Exception as error:
            self._blame(error)
            raise

    def _arguments(
        self, rows: Sequences, of_prior: tuple[Tensor, ...] | None = None
    ) -> tuple[list[Any], dict[str, Any]]:
        feature = self.feature
        if of_prior is not None:
            return list(of_prior), {}
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

    def _call(self, positional: list[Any], keywords: dict[str, Any]) -> Any:
        with torch.no_grad():
            return self.feature.fn(*positional, **keywords)

    def _blame(self, original: Exception) -> NoReturn:
        """Find the text that the function cannot read, and raise with it."""
        head, count = self.batch.head, self.batch.size
        hint = self._hint(original)
        for row in range(count):
            one = None if self.given is None else tuple(value[row : row + 1] for value in self.given)
            arguments = self._arguments(self.sequences.select([row]), one)
            try:
                self._call(*arguments)
            except OUT_OF_MEMORY:
                raise
            except Exception as error:
                raise FactorError(
                    f"{head} raised {_described(error)} on the text {self.batch.text(row)}{hint}"
                ) from error
        raise FactorError(
            f"{head} raised {_described(original)} on a batch of {count} texts but on none of them alone; "
            f"the first is {self.batch.text(0)}"
        ) from original

    def _hint(self, original: Exception) -> str:
        said = str(original)
        if isinstance(original, TypeError) and self.feature.reads_prompts and "indices must be integers" in said:
            return (
                "; prompts and completions are strings here, chat turns as the template writes them: a function of "
                'messages needs [[{"role": "assistant", "content": c}] for c in completions]'
            )
        if isinstance(original, AttributeError | TypeError) and "list" in said and self.feature.on != "ids":
            return "; the function gets a list of texts and returns one number for each"
        return ""
