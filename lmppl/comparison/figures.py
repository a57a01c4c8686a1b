"""A figure of a comparison: its value, its error, and what must be known to read it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Figure", "Relation", "average", "missing", "spread", "worst"]

Relation = Literal["=", "≈", "≤", "≥"]


@dataclass(frozen=True)
class Figure:
    """One cell.

    Parameters
    ----------
    value : float or None
        None where it cannot be computed; `note` then says why.
    error : float, optional
        Standard error of `value`; 0 where it is exact; None where no honest one is known.
    interval : (float, float), optional
        Confidence interval at 95 %.
    relation : {"=", "≈", "≤", "≥"}
        "=": an unbiased estimate or exact; "≈": an estimate with a bias that the note names; "≤": the truth is at most
        this, or "≥" at least.
    spread : float, optional
        Standard deviation over repeats.
    note : str
        What a reader must know.
    """

    value: float | None
    error: float | None = None
    interval: tuple[float, float] | None = None
    relation: Relation = "="
    spread: float | None = None
    note: str = ""

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


def average(figures: Sequence[Figure]) -> Figure:
    """The mean over contexts of one repeat, or over repeats.

    A mean exists only where every part does: otherwise the first missing part's reason stands. The error is that of
    a mean of independent parts; the interval averages the ends, which is conservative for independent parts.
    """
    first = figures[0]
    if len(figures) == 1:
        return first
    absent = next((f for f in figures if f.value is None), None)
    if absent is not None:
        return absent
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
        note=next((f.note for f in figures if f.note), ""),
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
