"""A comparison for people and for programs: cells, widths, files."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from lmppl.comparison import Comparison, Figure, compare
from lmppl.comparison.table import Column, Notes, _cell, as_text
from lmppl.errors import StorageError
from lmppl.inference import Budget, Importance
from lmppl.lm import TabularLM
from lmppl.modeling import Constraint, Reward
from tests.models import count_of, has_no


@pytest.fixture(scope="module")
def table() -> Comparison:
    prior = TabularLM.random(3, 4, seed=3, context=["", "a"])
    model = prior * Reward(count_of("a"), beta=1, name="a") * Constraint(has_no("bb"), name="no [b]")
    return compare(model, ["exact", "rejection", "importance", "best_of_n(n=2)"], num_draws=60)


@pytest.mark.parametrize(
    ("figure", "kind", "text"),
    [
        (Figure(1.23456), "nats", "1.235"),
        (Figure(1.23456, 0.0), "nats", "1.235"),
        (Figure(1.23456, 0.012), "nats", "1.235 ±0.012"),
        (Figure(1.0, 0.1, (0.8, 1.2)), "nats", "1.000 [0.800, 1.200]"),
        (Figure(1.0, 0.0, (1.0, 1.0)), "nats", "1.000"),
        (Figure(1.0, 0.1, (0.8, 1.2), spread=0.25), "nats", "1.000 sd 0.250"),
        (Figure(0.5, None, None, "≈", note="why"), "nats", "≈0.500 ¹"),
        (Figure(0.5, None, None, "≤"), "nats", "≤0.500"),
        (Figure(float("inf"), note="why"), "nats", "∞ ¹"),
        (Figure(float("-inf")), "nats", "-∞"),
        (Figure(None, note="why"), "nats", "— ¹"),
        (Figure(-0.0001, 0.0001), "nats", "0.000 ±0.000"),
        (Figure(-0.0001, relation="≈"), "nats", "≈0.000"),
        (Figure(1.0, note="Clopper–Pearson: holds at every N"), "nats", "1.000"),
        (Figure(1.0, note="Clopper–Pearson: holds at every N; N was not fixed"), "nats", "1.000 ¹"),
        (Figure(1.0, note="contexts 0, 1: delta method: asymptotic; contexts 2: weights are equal"), "nats", "1.000 ¹"),
        (None, "nats", "—"),
        (Figure(12345.6), "count", "12,346"),
        (Figure(1.0), "share", "100 %"),
        (Figure(0.0), "share", "0 %"),
        (Figure(0.99999), "share", ">99.9 %"),
        (Figure(0.00001), "share", "<0.1 %"),
        (Figure(0.5), "share", "50.0 %"),
        (Figure(1.234), "seconds", "1.23"),
    ],
)
def test_a_cell_reads(figure: Figure | None, kind: str, text: str) -> None:
    assert _cell(figure, Column("x", "x", kind), Notes()) == text


def test_what_limits_trust_in_log_z_is_below_the_table() -> None:
    prior, other = (TabularLM.random(8, 20, seed=seed, eos=None) for seed in (3, 4))
    heavy = compare(prior, {"importance": Importance(proposal=other)}, num_draws=1000)
    assert " not to be trusted: k̂ = " in str(heavy)
    assert "delta method: asymptotic" not in str(heavy)
    assert heavy["importance"]["log_z"].note.startswith("delta method")
    narrow = TabularLM([0.5, 0.5, 0.0], ["a", "b", "<eos>"], max_new_tokens=3)
    bounded = narrow * Reward(count_of("a"), beta=1, upper=3, name="a")
    short = compare(bounded, ["rejection"], num_draws=5000, budget=Budget(lm_tokens=30))
    assert "so N was not fixed" in str(short)


def test_equal_notes_are_one() -> None:
    notes = Notes()
    assert [notes.mark(text) for text in ("a", "b", "a")] == ["¹", "²", "¹"]
    for number in range(20):
        notes.mark(str(number))
    assert notes.mark("9") == "¹²"


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_tables_fit_the_width_and_lose_no_column(table: Comparison, width: int) -> None:
    text = as_text(table, width)
    assert max(len(line) for line in text.splitlines()) <= width
    for heading in (
        "guarantee",
        "log Z",
        "KL(·‖π0)",
        "E[",
        "no [b] holds",
        "KL(q‖π*)",
        "KL(π*‖q)",
        "ESS",
        "k̂",
        "LM tokens",
    ):
        assert heading in text
    assert "…" not in text


def test_printing_and_rich_show_the_same(table: Comparison) -> None:
    assert str(table) == as_text(table)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table)
    assert "How close one draw is" in console.export_text()
    assert repr(table).startswith("Comparison(prior, exact, rejection, importance, best_of_n(n=2); reference: exact")


def test_json_is_strict_and_whole(table: Comparison, tmp_path: Path) -> None:
    path = table.save(tmp_path / "x.json")
    data = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert [row["label"] for row in data["rows"]] == [row.label for row in table.rows]
    assert data["rows"][0]["figures"]["kl_reverse"]["value"] == "inf"
    assert data["rows"][2]["reason"]
    assert len(data["per_context"]) == 2 * 4
    assert data["spec_hash"] == table.spec_hash


def test_csv_has_one_line_a_row(table: Comparison, tmp_path: Path) -> None:
    with table.save(tmp_path / "x.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["label"] for line in lines] == [row.label for row in table.rows]
    assert float(lines[1]["log_z"]) == pytest.approx(table["exact"]["log_z"].value)
    assert lines[2]["log_z"] == ""


def test_markdown_has_every_table_and_note(table: Comparison, tmp_path: Path) -> None:
    text = table.save(tmp_path / "x.md").read_text()
    assert text.count("| --- |") == 4
    assert "of another law than π*" in text
    assert table.formula in text
    assert table._repr_markdown_() == text


def test_pandas_has_errors_as_columns(table: Comparison) -> None:
    pytest.importorskip("pandas", reason="needs pandas: pip install 'lmppl[data]'")
    frame = table.to_pandas().set_index("label")
    assert frame.loc["exact", "log_z_error"] == 0.0
    assert frame.loc["importance", "log_z_low"] < frame.loc["importance", "log_z"]


def test_a_comparison_that_cannot_be_saved_leaves_what_was_there(table: Comparison, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"\.json, \.csv, \.md"):
        table.save(tmp_path / "x.html")
    with pytest.raises(StorageError):
        table.save(tmp_path / "nowhere" / "x.json")
    assert list(tmp_path.iterdir()) == []


def test_notes_hang_from_their_numbers(table: Comparison) -> None:
    lines = as_text(table, width=60).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(" ¹"))
    continued = [
        line for line in lines[first:] if not line.startswith((" ¹", " ²", " ³", " ⁴", " ⁵", " ⁶", " ⁷", " ⁸"))
    ]
    assert continued
    assert all(line.startswith("   ") for line in continued)
