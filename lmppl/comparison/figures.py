"""A figure of a comparison: its value, its error, and what must be known to read it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lmppl.diagnostics.weights import KHAT_LIMIT

__all__ = ["BY_CONSTRUCTION", "HEAVY", "Figure", "Relation", "average", "caution", "missing", "spread", "worst"]

Relation = Literal["=", "≈", "≤", "≥"]
BY_CONSTRUCTION = "0 by construction: its draws are from π*"
HEAVY = f"k̂ > {KHAT_LIMIT}: weighted figures of this row are not to be trusted"
CONTEXTS = re.compile(r"^contexts [\d, ]+: ")
METHODS = ("delta method", "empirical Bernstein", "Clopper–Pearson", BY_CONSTRUCTION)  # say how, not how far to trust


@dataclass(frozen=True)
class Figure:
    """One cell.

    Parameters
    ----------
    value : float or None
        None where it cannot be computed; `note` then says why.
    error : float, optional
        Standard error of `value`, wider by Student's t where few sweeps or chains state it; 0 where it is exact; None
        where no honest one is known.
    interval : (float, float), optional
        Confidence interval at 95 %.
    relation : {"=", "≈", "≤", "≥"}
        "=": an unbiased estimate or exact; "≈": an estimate with a bias that the note names; "≤": the truth is at most
        this, or "≥" at least.
    spread : float, optional
        Standard deviation over repeats.
    note : str
        What a reader must know.
    observed : float, optional
        Where `value` bounds a share that no draw shows: the share among the draws, 0 or 1.
    """

    value: float | None
    error: float | None = None
    interval: tuple[float, float] | None = None
    relation: Relation = "="
    spread: float | None = None
    note: str = ""
    observed: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; infinite values become strings."""
        return {
            "value": _plain(self.value),
            "error": _plain(self.error),
            "interval": None if self.interval is None else [_plain(v) for v in self.interval],
            "relation": self.relation,
            "spread": _plain(self.spread),
            "note": self.note,
        }


def missing(reason: str) -> Figure:
    """A figure that cannot be computed, and why."""
    return Figure(None, note=reason)


def caution(note: str) -> str:
    """What in a note limits trust: its clauses, but for those that only name a method."""
    return "; ".join(clause for clause in note.split("; ") if not CONTEXTS.sub("", clause).startswith(METHODS))


def average(figures: Sequence[Figure]) -> Figure:
    """The mean over contexts of one repeat, or over repeats.

    A mean exists only where every part does: otherwise the first missing part's reason stands. The error is that of
    a mean of independent parts; the interval averages the ends, which is conservative for independent parts. Bounds of
    what no draw shows are averaged where all parts are such bounds; beside a part that shows it, they count as the 0
    or 1 that was observed. An infinite part is the mean, with its note.
    """
    first = figures[0]
    if len(figures) == 1:
        return first
    absent = next((f for f in figures if f.value is None), None)
    if absent is not None:
        return absent
    infinite = next((f for f in figures if f.value == math.inf and f.relation == "="), None)
    if infinite is not None:
        return infinite
    bounded = [f.observed for f in figures if f.observed is not None]
    if 0 < len(bounded) < len(figures):
        figures = [f if f.observed is None else Figure(f.observed) for f in figures]
    values = [f.value for f in figures if f.value is not None]
    errors = [f.error for f in figures if f.error is not None]
    ends = [f.interval for f in figures if f.interval is not None]
    n = len(figures)
    relations = {f.relation for f in figures}
    bounds = relations - {"="}
    relation: Relation = "=" if not bounds else bounds.pop() if len(bounds) == 1 else "≈"
    return Figure(
        value=sum(values) / n,
        error=math.sqrt(sum(e * e for e in errors)) / n if len(errors) == n else None,
        interval=(sum(e[0] for e in ends) / n, sum(e[1] for e in ends) / n) if len(ends) == n else None,
        relation=relation,
        note=max((f.note for f in figures), key=lambda note: (bool(caution(note)), bool(note))),
        observed=sum(bounded) / n if len(bounded) == n else None,
    )


def worst(figures: Sequence[Figure]) -> Figure:
    """The largest, for a figure that warns where it is large; one that says nothing only hides a small one."""
    known = [f for f in figures if f.value is not None]
    absent = [f for f in figures if f.value is None]
    largest = max(known, key=lambda f: f.value or 0.0, default=None)
    if largest is None or (absent and not largest.note):
        return absent[0]
    return largest


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation (N − 1) over repeats; None for fewer than two, or where one is infinite."""
    if len(values) < 2 or not all(math.isfinite(v) for v in values):
        return None
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def _plain(value: float | None) -> float | str | None:
    if value is None or math.isfinite(value):
        return value
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
