"""Exit codes: what an error means to the shell, and the one clear message it leaves on stderr."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import TextIO

import typer
from rich.console import Console
from rich.text import Text

__all__ = ["FAILED", "INFEASIBLE", "INTERRUPTED", "UNSUPPORTED", "USAGE", "exit_codes", "results_on", "say"]

FAILED, USAGE, UNSUPPORTED, INFEASIBLE, INTERRUPTED = 1, 2, 3, 4, 5


def say(message: str, style: str = "") -> None:
    """A message for people, on stderr."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(Text(message, style=style))


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """Turn lmppl's errors into a message and an exit code.

    2 usage, spec file or declaration; 3 the engine cannot run; 4 no outcome satisfies the evidence; 5 interrupted; 1
    any other error that lmppl raises on purpose. Errors of other kinds are bugs and keep their traceback.
    """
    from lmppl.errors import InfeasibleModel, InterruptedRun, LmpplError, ModelError, UnsupportedModel

    with _warnings_on_stderr():
        try:
            yield
        except KeyboardInterrupt:
            say("interrupted: nothing was finished, nothing is kept", "yellow")
            raise typer.Exit(INTERRUPTED) from None
        except LmpplError as error:
            kinds = (
                (InterruptedRun, INTERRUPTED),
                (UnsupportedModel, UNSUPPORTED),
                (InfeasibleModel, INFEASIBLE),
                (ModelError, USAGE),
            )
            code = next((number for kind, number in kinds if isinstance(error, kind)), FAILED)
            message = Text("error ", style="bold red")
            message.append(str(error), style="not bold default")
            Console(stderr=True, highlight=False, soft_wrap=True).print(message)
            raise typer.Exit(code) from None


class _Plain(logging.Handler):
    """Warnings as plain lines, without a logger's name or a time."""

    def emit(self, record: logging.LogRecord) -> None:
        say(f"note  {record.getMessage()}", "yellow")


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
def results_on(machine: bool) -> Iterator[TextIO]:
    """The stream for results; where it is for machines, what user functions print goes to stderr instead."""
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr) if machine else contextlib.nullcontext():
        yield stdout
