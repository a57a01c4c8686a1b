"""NamedForm: an incremental form, and what errors call it: what somebody else's form does wrong is told here, once."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor

from lmppl.errors import FactorError, LmpplError, ModelError
from lmppl.lm.decoder import Step
from lmppl.modeling.factors import Factor, Incremental, missing_members, start_incremental
from lmppl.modeling.user_functions import OUT_OF_MEMORY

__all__ = ["FormRowError", "NamedForm"]


class FormRowError(FactorError):
    """A value of a form is wrong in one row; whoever knows the text of the row says it.

    Parameters
    ----------
    row : int
        Index among the rows of the state.
    before, after : str
        The message, before and after the place where the row stands.
    """

    def __init__(self, row: int, before: str, after: str) -> None:
        self.row, self.before, self.after = row, before, after
        super().__init__(f"{before} in row {row}{after}")

    def told(self, text: str) -> FactorError:
        """The error with the text that the row has so far."""
        return FactorError(f"{self.before} after the text {text!r}{self.after}")


class _Rows(NamedTuple):
    """The form's own state, and the number of its rows B."""

    own: Any
    size: int


class NamedForm:
    """The `Incremental` that `form` is, each call checked; errors name whose it is.

    Parameters
    ----------
    form : Incremental
    who : str
        "factor 'short': its incremental form", or "twist".
    vocab_size : int, optional
        V, for the shape of increments of all tokens; not checked by default.

    Raises
    ------
    ModelError
        Where a method, or `needs`, is missing.
    FactorError
        From a call: where the form raises (with file and line), gives nan or +inf, or no tensor of increments (B, k) or
        potentials (B,).
    """

    def __init__(self, form: Incremental, who: str, vocab_size: int | None = None) -> None:
        missing = missing_members(form)
        if missing:
            raise ModelError(f"{who}{missing}")
        self.form, self.who, self.vocab_size = form, who, vocab_size

    @classmethod
    def of(cls, factor: Factor, vocab_size: int | None = None) -> NamedForm:
        """The incremental form of a factor that has one."""
        assert factor.incremental is not None
        return cls(factor.incremental, f"factor {factor.name!r}: its incremental form", vocab_size)

    @property
    def needs(self) -> Collection[Literal["text", "ids", "hidden"]]:
        """As the form's."""
        return self.form.needs

    def start(self, contexts: Tensor, step: Step | None = None) -> _Rows:
        """As `Incremental.start`."""
        return _Rows(self._call("start", lambda: start_incremental(self.form, contexts, step)), len(contexts))

    def weigh(self, state: _Rows, candidates: Tensor | None) -> Tensor:
        """As `Incremental.weigh`; what it says of rows with potential −inf means nothing, and is not looked at."""
        values: Tensor = self._call("weigh", lambda: self.form.weigh(state.own, candidates))
        width = self.vocab_size if candidates is None else candidates.shape[1]
        self._check_shape("weigh", values, (state.size, width))
        if bool((values < math.inf).all()):  # false for nan too
            return values
        wrong = ~(values < math.inf) & (self.potential(state) > -math.inf).to(values.device)[:, None]
        if bool(wrong.any()):
            row, column = torch.nonzero(wrong)[0].tolist()
            token = column if candidates is None else int(candidates[row, column])
            self._refuse("weigh", row, float(values[row, column]), f" for token {token}")
        return values

    def advance(self, state: _Rows, tokens: Tensor, step: Step | None) -> _Rows:
        """As `Incremental.advance`."""
        return _Rows(self._call("advance", lambda: self.form.advance(state.own, tokens, step)), state.size)  # type: ignore[arg-type]

    def potential(self, state: _Rows) -> Tensor:
        """As `Incremental.potential`."""
        values: Tensor = self._call("potential", lambda: self.form.potential(state.own))
        self._check_shape("potential", values, (state.size,))
        wrong = ~(values < math.inf)
        if bool(wrong.any()):
            row = int(torch.nonzero(wrong)[0, 0])
            self._refuse("potential", row, float(values[row]), "")
        return values

    def select(self, state: _Rows, index: Tensor) -> _Rows:
        """As `Incremental.select`."""
        return _Rows(self._call("select", lambda: self.form.select(state.own, index)), len(index))

    def crop(self, state: _Rows, lengths: Tensor) -> _Rows:
        """As `Incremental.crop`."""
        return _Rows(self._call("crop", lambda: self.form.crop(state.own, lengths)), state.size)

    def __repr__(self) -> str:
        return repr(self.form)

    def _call(self, method: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (LmpplError, *OUT_OF_MEMORY):
            raise
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            raise FactorError(
                f"{self.who}: {method} raised {type(error).__name__}: {error} ({Path(last.filename).name}, line "
                f"{last.lineno})"
            ) from error

    def _check_shape(self, method: str, values: Any, expected: tuple[int | None, ...]) -> None:
        if not isinstance(values, Tensor):
            raise FactorError(f"{self.who}: {method} gave a {type(values).__name__}, expected a tensor of shape "
                              f"{_shown(expected)}")  # fmt: skip
        got = tuple(values.shape)
        same = len(got) == len(expected) and all(e is None or g == e for g, e in zip(got, expected, strict=True))
        if not same:
            raise FactorError(f"{self.who}: {method} gave shape {got}, expected {_shown(expected)}")

    def _refuse(self, method: str, row: int, value: float, where: str) -> NoReturn:
        raise FormRowError(row, f"{self.who}: {method} is {value}{where}", ", expected a finite number of nats or −inf")


def _shown(shape: tuple[int | None, ...]) -> str:
    return f"({', '.join('V' if n is None else str(n) for n in shape)}{',' if len(shape) == 1 else ''})"
