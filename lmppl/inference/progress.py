"""A progress bar with the figures a person would watch, on stderr; silent where nobody watches."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lmppl.sequences import Cost

if TYPE_CHECKING:
    from rich.progress import Progress

    from lmppl.inference.engine import Engine, Part, Request, Shard

__all__ = ["Bar", "finished_share", "in_a_row", "progress_bar", "rich_progress"]

STEPS = 1000  # resolution of the bar
REFRESH = 0.1  # seconds between two looks into one shard


class Bar:
    """Where the progress of a run is shown; this one shows nothing."""

    looks_within = False
    """Whether it shows what happens inside a shard; engines then say so step by step."""

    def parts(self, parts: Sequence[Part]) -> None:
        """All parts that are finished so far, after each shard."""

    def within(self, shard: Shard | None, share: float, figures: Mapping[str, str], cost: Cost) -> None:
        """How much of the present shard is done, and what the engine shows; `cost` is the run's so far."""


class RichBar(Bar):
    """A bar on stderr.

    Parameters
    ----------
    engine, request
        The run.
    bar : rich.progress.Progress
        Where the one task is shown.
    """

    looks_within = True

    def __init__(self, engine: Engine, request: Request, bar: Progress) -> None:
        self.engine, self.request, self.bar = engine, request, bar
        self.start = self.shown = time.perf_counter()
        self.done: Sequence[Part] = ()
        self.task = bar.add_task(str(engine).replace("[", r"\["), total=None, figures="")

    def parts(self, parts: Sequence[Part]) -> None:
        self.done = list(parts)
        seconds = time.perf_counter() - self.start
        tokens = sum(p.cost.lm_tokens for p in parts)
        figures = {
            **self.engine.live(parts),
            "draws/s": _rate(parts, seconds),
            "tokens/s": _per_second(tokens, seconds),
        }
        self._show(finished_share(self.engine, self.request, parts), figures)

    def within(self, shard: Shard | None, share: float, figures: Mapping[str, str], cost: Cost) -> None:
        now = time.perf_counter()
        if now - self.shown < REFRESH:
            return
        self.shown = now
        tokens = _per_second(cost.lm_tokens, now - self.start)
        before = finished_share(self.engine, self.request, self.done) or 0.0
        wanted = self.engine.wanted(self.request)
        part = 0.0 if wanted is None or shard is None else share * min(1.0, shard.num_draws / wanted)
        self._show(min(1.0, before + part), {**figures, "tokens/s": tokens})

    def _show(self, share: float | None, figures: Mapping[str, str]) -> None:
        total = None if share is None else STEPS
        self.bar.update(self.task, total=total, completed=STEPS * (share or 0.0), figures=in_a_row(figures))


@contextmanager
def progress_bar(engine: Engine, request: Request, show: bool | None = None) -> Iterator[Bar]:
    """A bar on stderr for one run of `engine`; it disappears when the run ends.

    Parameters
    ----------
    engine : Engine
        Its `live(parts)` gives the figures beside the bar.
    request : Request
        What the run was asked for; it decides how far the bar is.
    show : bool, optional
        None shows the bar where stderr is a terminal.

    Yields
    ------
    Bar
        To be told after each shard, and within one.
    """
    with rich_progress(show) as bar:
        yield Bar() if bar is None else RichBar(engine, request, bar)


@contextmanager
def rich_progress(show: bool | None = None) -> Iterator[Progress | None]:
    """Bars on stderr, of tasks with a field `figures`, that disappear at the end; None where nobody watches.

    Parameters
    ----------
    show : bool, optional
        None shows bars where stderr is a terminal.
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield None
        return

    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.table import Column

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(table_column=Column(min_width=len("0:00:00"), no_wrap=True)),
        TextColumn("[dim]{task.fields[figures]}[/dim]"),
    )
    console = Console(stderr=True)
    shared = sys.stdout is sys.stderr  # the command line sends what user functions print there: above the bar, then
    with Progress(*columns, console=console, transient=True, redirect_stdout=shared, refresh_per_second=4) as bar:
        yield bar


def in_a_row(figures: Mapping[str, str]) -> str:
    """Figures as a bar shows them."""
    return " · ".join(f"{name} {value}" for name, value in figures.items())


def finished_share(engine: Engine, request: Request, parts: Sequence[Part]) -> float | None:
    """How much of the request is done, in [0, 1]: of the draws or of the budget, whichever is further; None if unknown.

    Draws count per context; an engine that keeps fewer draws than it proposes is as far as its draws are.
    """
    if not parts:
        return None
    shares = []
    wanted = engine.wanted(request)
    if wanted is not None:
        shares.append(sum(len(p.draws) for p in parts) / (wanted * len(parts[0].shard.contexts)))
    if request.budget is not None:
        spent = sum((p.cost for p in parts), Cost())
        if request.budget.lm_tokens:
            shares.append(spent.lm_tokens / request.budget.lm_tokens)
        if request.budget.seconds:
            shares.append(spent.seconds / request.budget.seconds)
    return min(1.0, max(shares)) if shares else None


def _rate(parts: Sequence[Part], seconds: float) -> str:
    return _per_second(sum(len(p.draws) for p in parts), seconds)


def _per_second(count: int, seconds: float) -> str:
    return f"{count / max(seconds, 1e-9):,.0f}"
