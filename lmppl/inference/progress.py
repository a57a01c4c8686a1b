"""A progress bar with the figures a person would watch, on stderr; silent where nobody watches."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lmppl.sequences import Cost

if TYPE_CHECKING:
    from lmppl.inference.engine import Engine, Part, Request

__all__ = ["finished_share", "progress_bar"]

STEPS = 1000  # resolution of the bar


@contextmanager
def progress_bar(
    engine: Engine, request: Request, show: bool | None = None
) -> Iterator[Callable[[Sequence[Part]], None]]:
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
    callable
        To be called with all parts finished so far, after each shard.
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield lambda parts: None
        return

    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[figures]}[/dim]"),
    )
    start = time.perf_counter()
    console = Console(stderr=True)
    shared = sys.stdout is sys.stderr  # the command line sends what user functions print there: above the bar, then
    with Progress(*columns, console=console, transient=True, redirect_stdout=shared, refresh_per_second=4) as bar:
        task = bar.add_task(str(engine).replace("[", r"\["), total=None, figures="")

        def update(parts: Sequence[Part]) -> None:
            share = finished_share(engine, request, parts)
            figures = {**engine.live(parts), "draws/s": _rate(parts, time.perf_counter() - start)}
            shown = " · ".join(f"{name} {value}" for name, value in figures.items())
            total = None if share is None else STEPS
            bar.update(task, total=total, completed=STEPS * (share or 0.0), figures=shown)

        yield update


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
    return f"{sum(len(p.draws) for p in parts) / max(seconds, 1e-9):,.0f}"
