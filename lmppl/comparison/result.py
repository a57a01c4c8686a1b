"""`Comparison`, what `compare` returns: rows of figures, the approximations behind them, and ways to keep them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmppl.comparison.figures import Figure
from lmppl.comparison.reference import Reference
from lmppl.errors import LmpplError, MissingDependency, ModelError, StorageError
from lmppl.inference.approximation import Approximation
from lmppl.storage import atomic_write, versions

if TYPE_CHECKING:
    import pandas
    from rich.console import Console, ConsoleOptions, RenderableType

__all__ = ["Comparison", "Row"]


@dataclass(frozen=True, eq=False)
class Row:
    """One engine, policy or approximation.

    Parameters
    ----------
    label : str
        How the table calls it.
    guarantee : str
        "exact", "consistent", "approximate" or "heuristic"; "as is" for a language model; "—" where nothing ran.
    law : str
        The law q that its divergences are about.
    figures : dict of Figure
        By column: those of `compare`'s docstring, as keys `log_z`, `kl_to_prior`, `mean:NAME`, `satisfied:NAME`,
        `kl_reverse` KL(q‖π*), `kl_forward` KL(π*‖q), `tv`, `zero` Pr_q(γ=0), `ess`, `k_hat`, `tv_draws`,
        `tv_draws_exact`, `draws`, `tokens_per_draw`, and the fields of `Cost`.
    repeats : int
        Runs behind the figures; 0 where it did not run.
    reason : str
        Why it did not run, or not to the end: one sentence.
    status : {"complete", "interrupted"}
    context : int, optional
        The context of a part of `Comparison.per_context`.
    error : LmpplError, optional
        What was raised where nothing ran to the end of a first repeat.
    """

    label: str
    guarantee: str
    law: str
    figures: Mapping[str, Figure] = field(default_factory=dict)
    repeats: int = 1
    reason: str = ""
    status: str = "complete"
    context: int | None = None
    error: LmpplError | None = None

    def __getitem__(self, column: str) -> Figure:
        """The figure of one column."""
        if column not in self.figures:
            raise ModelError(f"row {self.label!r} has no figure {column!r}; it has {', '.join(self.figures) or 'none'}")
        return self.figures[column]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        figures = {name: figure.as_dict() for name, figure in self.figures.items()}
        fields = {"label": self.label, "guarantee": self.guarantee, "law": self.law, "repeats": self.repeats}
        return {**fields, "reason": self.reason, "status": self.status, "context": self.context, "figures": figures}

    def flat(self) -> dict[str, Any]:
        """One value a column, with `column_error`, `column_low`, `column_high`, `column_spread` where there are any."""
        cells: dict[str, Any] = {"label": self.label, "guarantee": self.guarantee, "law": self.law}
        if self.context is not None:
            cells["context"] = self.context
        cells |= {"repeats": self.repeats, "reason": self.reason, "status": self.status}
        for name, figure in self.figures.items():
            cells[name] = figure.value
            if figure.relation != "=":
                cells[f"{name}_relation"] = figure.relation
            for suffix, value in (("error", figure.error), ("spread", figure.spread)):
                if value is not None:
                    cells[f"{name}_{suffix}"] = value
            if figure.interval is not None:
                cells[f"{name}_low"], cells[f"{name}_high"] = figure.interval
        return cells


@dataclass(frozen=True, eq=False)
class Comparison:
    """Rows of figures about one declaration.

    `print` shows four tables: what each row says about π*, how close its law is, what its draws are worth and cost.
    Rich consoles and notebooks show the same.

    Parameters
    ----------
    rows : tuple of Row
        The prior first, then the entrants in their order; averaged over contexts and repeats.
    per_context : tuple of Row
        The same for each context, averaged over repeats.
    approximations : dict of tuple of Approximation
        By label, one a repeat.
    reference : Reference, optional
        What π* was measured with.
    formula, spec_hash, contexts, repeats, seed
        What was compared, and how.
    interrupted : bool
        Ctrl-C ended it: the rows are those that were finished.
    not_run : tuple of str
        Labels of entrants that the interruption left out.
    """

    rows: tuple[Row, ...]
    per_context: tuple[Row, ...]
    approximations: Mapping[str, tuple[Approximation, ...]]
    reference: Reference | None
    formula: str
    spec_hash: str
    contexts: tuple[str, ...]
    repeats: int
    seed: int
    interrupted: bool = False
    not_run: tuple[str, ...] = ()

    def __getitem__(self, label: str) -> Row:
        """The row called `label`."""
        for row in self.rows:
            if row.label == label:
                return row
        raise ModelError(f"no row is called {label!r}; there are {[row.label for row in self.rows]}")

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON: everything but the draws."""
        return {
            "formula": self.formula,
            "spec_hash": self.spec_hash,
            "contexts": list(self.contexts),
            "reference": None if self.reference is None else self.reference.description,
            "repeats": self.repeats,
            "seed": self.seed,
            "interrupted": self.interrupted,
            "not_run": list(self.not_run),
            "versions": versions(),
            "rows": [row.as_dict() for row in self.rows],
            "per_context": [row.as_dict() for row in self.per_context],
        }

    def save(self, path: str | Path) -> Path:
        """Write to `path`, whole or not at all; the suffix chooses: `.json` (everything but draws), `.csv`, `.md`.

        Raises
        ------
        StorageError
            On another suffix, and where the file cannot be written; an existing file then stays as it was.
        """
        path = Path(path)
        writers = {".json": self._json, ".csv": self._csv, ".md": self.to_markdown}
        if path.suffix not in writers:
            raise StorageError(f"cannot save a comparison as {path.name!r}: the suffix must be {', '.join(writers)}")
        text = writers[path.suffix]()
        return atomic_write(path, lambda file: file.write_text(text, encoding="utf-8"))

    def to_pandas(self) -> pandas.DataFrame:
        """One line a row of the comparison, with errors and ends of intervals as columns; needs the extra `data`."""
        try:
            import pandas
        except ImportError as error:
            raise MissingDependency("to_pandas needs pandas: pip install 'lmppl[data]'") from error
        return pandas.DataFrame([row.flat() for row in self.rows])

    def to_markdown(self) -> str:
        """The tables as Markdown, with their notes."""
        from lmppl.comparison.table import markdown

        return markdown(self)

    def _json(self) -> str:
        return json.dumps(self.as_dict(), ensure_ascii=False, indent=2, allow_nan=False) + "\n"

    def _csv(self) -> str:
        lines = [row.flat() for row in self.rows]
        names = list(dict.fromkeys(name for line in lines for name in line))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, restval="")
        writer.writeheader()
        writer.writerows(lines)
        return text.getvalue()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from lmppl.comparison.table import renderables

        yield from renderables(self, options.max_width)

    def __str__(self) -> str:
        from lmppl.comparison.table import as_text

        return as_text(self)

    def _repr_markdown_(self) -> str:
        return self.to_markdown()

    def __repr__(self) -> str:
        known = "no reference" if self.reference is None else f"reference: {self.reference.description}"
        state = ", interrupted" if self.interrupted else ""
        return f"Comparison({', '.join(row.label for row in self.rows)}; {known}{state})"
