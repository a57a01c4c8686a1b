"""Exit codes: what an error means to the shell, and the one clear message it leaves on stderr."""

from __future__ import annotations

import contextlib
import logging
import sys
import sysconfig
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

import typer
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from lmppl.comparison import Row
    from lmppl.errors import LmpplError

__all__ = [
    "FAILED",
    "INFEASIBLE",
    "INTERRUPTED",
    "UNSUPPORTED",
    "USAGE",
    "exit_codes",
    "nothing_ran",
    "results_on_stdout",
    "say",
]

FAILED, USAGE, UNSUPPORTED, INFEASIBLE, INTERRUPTED = 1, 2, 3, 4, 5
STYLES = {"note": "yellow", "interrupted": "yellow", "error": "bold red"}
PACKAGE = Path(__file__).resolve().parents[1]


def say(kind: Literal["note", "interrupted", "error"], message: str) -> None:
    """A message for people, on stderr: `kind: message`; one line, but for a terminal's own lines."""
    console = Console(stderr=True, highlight=False)
    console.print(Text.assemble((f"{kind}:", STYLES[kind]), " ", message), soft_wrap=not console.is_terminal)


def exit_code(error: LmpplError) -> int:
    """What an error means to the shell."""
    from lmppl.errors import InfeasibleModel, InterruptedRun, ModelError, UnsupportedModel

    kinds = (
        (InterruptedRun, INTERRUPTED),
        (UnsupportedModel, UNSUPPORTED),
        (InfeasibleModel, INFEASIBLE),
        (ModelError, USAGE),
    )
    return next((number for kind, number in kinds if isinstance(error, kind)), FAILED)


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """Turn lmppl's errors into a message and an exit code.

    2 usage, spec file, declaration, or an engine of the user's own that raises; 3 the engine cannot run; 4 no outcome
    satisfies the evidence; 5 interrupted; 1 any other error that lmppl raises on purpose. Errors of other kinds are
    bugs and keep their traceback.
    """
    from lmppl.errors import InterruptedRun, LmpplError

    with _warnings_on_stderr():
        try:
            yield
        except KeyboardInterrupt:
            say("interrupted", "nothing was finished, nothing is kept")
            raise typer.Exit(INTERRUPTED) from None
        except LmpplError as error:
            what = "; ".join([str(error), *getattr(error, "__notes__", [])])
            say("interrupted" if isinstance(error, InterruptedRun) else "error", what)
            raise typer.Exit(exit_code(error)) from None
        except Exception as error:
            place = _users_place(error)
            if place is None:
                raise
            say("error", f"{place}: {type(error).__name__}: {' '.join(str(error).split())}")
            raise typer.Exit(USAGE) from None


def nothing_ran(rows: Sequence[Row]) -> int | None:
    """The exit code of a comparison whose rows all lack a result, after their reasons on stderr; else None.

    3 where no engine can run on the model, 4 where none found an outcome with γ > 0; where they failed differently, 2
    if the declaration is to blame for one, else 1.
    """
    from lmppl.comparison.table import reason

    if not rows or any(row.figures for row in rows):
        return None
    for row in rows:
        say("error", " ".join(reason(row).split()))
    codes = {FAILED if row.error is None else exit_code(row.error) for row in rows}
    return codes.pop() if len(codes) == 1 else USAGE if USAGE in codes else FAILED


def _users_place(error: Exception) -> str | None:
    """`file:line, in function` where code of the user's own raised, itself or in a library; None where lmppl's did."""
    libraries = {Path(path).resolve() for name, path in sysconfig.get_paths().items() if name.endswith("lib")}
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename).resolve()
        if PACKAGE in file.parents:
            return None
        if file.is_file() and libraries.isdisjoint(file.parents):
            return f"{frame.filename}:{frame.lineno}, in {frame.name}"
    return None


class _Plain(logging.Handler):
    """Warnings as plain lines, without a logger's name or a time."""

    def emit(self, record: logging.LogRecord) -> None:
        say("note", record.getMessage())


@contextlib.contextmanager
def _warnings_on_stderr() -> Iterator[None]:
    logger, handler = logging.getLogger("lmppl"), _Plain(logging.WARNING)
    before = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = before


@contextlib.contextmanager
def results_on_stdout() -> Iterator[TextIO]:
    """The stream for results; what user functions print meanwhile goes to stderr."""
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        yield stdout
