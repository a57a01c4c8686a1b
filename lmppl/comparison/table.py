"""A comparison for people: which columns there are, how a cell reads, and tables that fit the terminal."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from lmppl.comparison.figures import Figure, caution

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lmppl.comparison.result import Comparison, Row

__all__ = ["as_text", "markdown", "reason", "renderables"]

TEXT_WIDTH = 100
LABEL_WIDTH, LAW_WIDTH = 32, 20
GAP = 2


class Column(NamedTuple):
    """A column: its key in `Row.figures`, its heading, and how its values read."""

    key: str
    heading: str
    kind: str = "nats"


@dataclass
class Notes:
    """Numbered notes below the tables; equal ones are one."""

    texts: list[str] = field(default_factory=list)

    def mark(self, text: str) -> str:
        """The mark of a note, which is kept."""
        if text not in self.texts:
            self.texts.append(text)
        return _superscript(self.texts.index(text) + 1)


@dataclass
class Grid:
    """A titled table of strings, ready to be drawn."""

    title: str
    headings: list[str]
    lines: list[list[str]]


def grids(comparison: Comparison) -> tuple[list[Grid], Notes]:
    """The four tables, and their notes."""
    notes = Notes()
    ran = [row for row in comparison.rows if row.figures]
    keys = list(dict.fromkeys(key for row in ran for key in row.figures))
    means = [Column(k, f"E[{k.removeprefix('mean:')}]") for k in keys if k.startswith("mean:")]
    shares = [Column(k, f"{k.removeprefix('satisfied:')} holds", "share") for k in keys if k.startswith("satisfied:")]
    says = [Column("log_z", "log Z"), Column("kl_to_prior", "KL(·‖π0)"), *means, *shares]
    close = [
        Column("kl_reverse", "KL(q‖π*)"),
        Column("kl_forward", "KL(π*‖q)"),
        Column("tv", "TV(q, π*)"),
        Column("zero", "Pr(γ=0)", "share"),
    ]
    worth = [Column("draws", "draws", "count"), Column("ess", "ESS", "count"), Column("k_hat", "k̂")]
    if comparison.reference is not None and comparison.reference.enumerated:
        worth += [Column("tv_draws", "TV of draws"), Column("tv_draws_exact", "TV if exact")]
    cost = [
        Column("lm_tokens", "LM tokens", "count"),
        Column("tokens_per_draw", "per ESS", "count"),
        Column("lm_forwards", "LM forwards", "count"),
        Column("factor_calls", "factor calls", "count"),
        Column("seconds", "seconds", "seconds"),
    ]
    result = [
        _grid("What each says", comparison.rows, "guarantee", says, notes),
        _grid("How close one draw is to π*: the law q, before any weighting", ran, "law", close, notes),
        _grid("What the draws are worth, with their weights", ran, "", worth, notes),
        _grid("What they cost", ran, "", cost, notes),
    ]
    return result, notes


def _grid(title: str, rows: Sequence[Row], text: str, columns: Sequence[Column], notes: Notes) -> Grid:
    columns = [c for c in columns if any(c.key in row.figures for row in rows)]
    heading = {"guarantee": ["guarantee"], "law": ["q"], "": []}[text]
    lines = []
    for row in rows:
        line = [row.label + (" (partial)" if row.status == "interrupted" else "")]
        if text:
            line.append(getattr(row, text))
        if not row.figures:
            line[-1] = f"no result {notes.mark(reason(row))}"
            line += [""] * len(columns)
        elif row.reason and text == "guarantee":
            line[0] += f" {notes.mark(reason(row))}"
        if row.figures:
            line += [_cell(row.figures.get(c.key), c, notes) for c in columns]
        lines.append(line)
    return Grid(title, ["", *heading, *(c.heading for c in columns)], lines)


def reason(row: Row) -> str:
    """Why a row has no result, with its label in front."""
    name = row.label.partition("(")[0]
    return row.reason if row.reason.startswith(name) else f"{row.label}: {row.reason}"


def _cell(figure: Figure | None, column: Column, notes: Notes) -> str:
    if figure is None:
        return "—"
    # The counts in the reason for an undefined k̂ differ from row to row; the data keep them.
    note = figure.note.partition(",")[0] if figure.note.startswith("k̂ undefined") else figure.note
    if figure.value is None:
        return f"— {notes.mark(note)}"
    kind = column.kind
    text = ("" if figure.relation == "=" else figure.relation) + _number(figure.value, kind)
    if figure.spread and kind == "nats" and figure.error != 0.0:
        text += f" sd {_number(figure.spread, kind)}"
    elif figure.interval is not None and figure.interval[0] < figure.interval[1]:
        text += f" [{_number(figure.interval[0], kind)}, {_number(figure.interval[1], kind)}]"
    elif figure.error and math.isfinite(figure.error) and kind == "nats":
        text += f" ±{_number(figure.error, kind)}"
    if math.isfinite(figure.value):
        note = caution(note) or ("" if figure.relation == "=" else note)
    if note:
        text += f" {notes.mark(note)}"
    return text


def _number(value: float, kind: str) -> str:
    if math.isnan(value):
        return "nan"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if kind == "count":
        return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.2g}"
    if kind == "share":
        return _percent(value)
    if kind == "seconds":
        return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"
    return f"{value:z.3f}" if abs(value) < 1000 else f"{value:.4g}"


def _percent(share: float) -> str:
    """A share in percent; what is neither all nor nothing never reads as if it were."""
    if 0 < share < 0.001:
        return "<0.1 %"
    if 0.999 < share < 1 - 1e-12:
        return ">99.9 %"
    return f"{100 * share:.1f} %" if 0 < share < 1 - 1e-12 else f"{100 * share:.0f} %"


def _superscript(number: int) -> str:
    return "".join("⁰¹²³⁴⁵⁶⁷⁸⁹"[int(digit)] for digit in str(number))


def caption(comparison: Comparison) -> list[str]:
    """What must be known to read the tables: units, averages, reference, and an interruption."""
    known = comparison.reference
    lines = ["Nats; ± is one standard error (wider, by Student's t, of few sweeps or chains), brackets 95 % intervals."]
    if comparison.repeats > 1:
        lines[0] += f" Means of {comparison.repeats} runs, seeds from {comparison.seed}; sd is the spread between runs."
    if len(comparison.contexts) > 1:
        lines[0] += f" Averaged over {len(comparison.contexts)} contexts; `per_context` has each."
    nothing = "No exact reference: each row uses its own estimate of log Z."
    lines.append(nothing if known is None else f"π* from {known.description}.")
    if any(row.law not in ("", "→ π*") and row.guarantee == "consistent" for row in comparison.rows):
        lines.append(
            "A weighted engine draws from its proposal, which is its q; the weights correct log Z, means and KL(·‖π0)."
        )
    if any(row.law == "→ π*" for row in comparison.rows):
        lines.append(
            "→ π*: sweeps or chains, whose means approach those of π*; ESS: as many independent draws would be as good."
        )
    if known is not None and known.enumerated:
        lines.append("TV if exact: what as many exact draws (of ESS, where weighted) show on average.")
    if comparison.interrupted:
        left = f"; not run: {', '.join(comparison.not_run)}" if comparison.not_run else ""
        lines.append(f"Interrupted: only what was finished is shown{left}.")
    return lines


def pieces(grid: Grid, width: int) -> Iterator[Grid]:
    """The grid cut into tables that fit `width`, each with the labels in front."""
    widths = [max(len(heading), *(len(line[i]) for line in grid.lines)) for i, heading in enumerate(grid.headings)]
    widths[0] = min(widths[0], LABEL_WIDTH)
    widths = [min(w, LAW_WIDTH) if h == "q" else w for w, h in zip(widths, grid.headings, strict=True)]
    first, title = 1, grid.title
    while first < len(widths):
        used, last = widths[0], first
        while last < len(widths) and (last == first or used + GAP + widths[last] <= width):
            used += GAP + widths[last]
            last += 1
        keep = [0, *range(first, last)]
        yield Grid(title, [grid.headings[i] for i in keep], [[line[i] for i in keep] for line in grid.lines])
        first, title = last, f"{grid.title}, continued"


def renderables(comparison: Comparison, width: int) -> Iterator[RenderableType]:
    """What a rich console prints."""
    from rich.table import Table
    from rich.text import Text

    whole, notes = grids(comparison)
    for grid in (piece for g in whole if g.lines for piece in pieces(g, width - 1)):
        yield Text()
        yield Text(grid.title, style="bold")
        table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, expand=False)
        for heading in grid.headings:
            words = heading in ("", "guarantee", "q")
            table.add_column(
                Text(heading, style="dim"), justify="left" if words else "right", no_wrap=not words,
                max_width={"": LABEL_WIDTH, "q": LAW_WIDTH}.get(heading), overflow="fold",
            )  # fmt: skip
        for line in grid.lines:
            table.add_row(*(Text(cell) for cell in line))
        yield table
    yield Text()
    for sentence in caption(comparison):
        yield Text(sentence, style="dim")
    below = Table.grid(padding=(0, 1, 0, 0))
    for number, note in enumerate(notes.texts, 1):
        below.add_row(Text(f" {_superscript(number)}", style="dim"), Text(note, style="dim"))
    if notes.texts:
        yield below


def as_text(comparison: Comparison, width: int = TEXT_WIDTH) -> str:
    """The tables as plain text of at most `width` columns."""
    from rich.console import Console

    file = io.StringIO()
    Console(file=file, width=width, color_system=None, force_terminal=False, legacy_windows=False).print(comparison)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()).strip("\n")


def markdown(comparison: Comparison) -> str:
    """The tables as Markdown, with caption and notes."""
    whole, notes = grids(comparison)
    blocks = [f"`{comparison.formula}`"]
    for grid in whole:
        if grid.lines:
            cells = [grid.headings, ["---", *["---:"] * (len(grid.headings) - 1)], *grid.lines]
            lines = ["| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in cells]
            blocks.append(f"**{grid.title}**\n\n" + "\n".join(lines))
    blocks.append("  \n".join(caption(comparison)))
    if notes.texts:
        blocks.append("\n".join(f"{_superscript(i)} {text}  " for i, text in enumerate(notes.texts, 1)))
    return "\n\n".join(blocks) + "\n"
