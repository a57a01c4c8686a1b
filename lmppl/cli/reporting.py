"""What `lmppl infer` says about a run: for people, and as plain data."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import tempfile
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lmppl.cli.findings import findings, plain_info
from lmppl.errors import MissingDependency, ModelError, StorageError
from lmppl.inference.approximation import Approximation
from lmppl.inference.engine import Guarantee
from lmppl.sequences import Draws

__all__ = ["check_folder", "one_line", "print_run", "run_as_dict", "screen"]

SHOWN = 5
LOOKED_AT = 1000  # draws among which different ones are looked for
PIPE_WIDTH = 100
SUFFIXES = (".jsonl", ".safetensors", ".parquet")


class _Screen(Console):
    """A console that leaves no blanks at the ends of lines, which rich pads, in a pipe or a file."""

    def print(self, *objects: Any, **options: Any) -> None:
        if self.is_terminal:
            super().print(*objects, **options)
            return
        with self.capture() as printed:
            super().print(*objects, **options)
        self.file.write(re.sub(r" +$", "", printed.get(), flags=re.MULTILINE))


def screen(stdout: TextIO) -> Console:
    """A console on `stdout`: as wide as the terminal, or 100 columns where it is a pipe or a file."""
    known = stdout.isatty() or "COLUMNS" in os.environ
    return _Screen(file=stdout, highlight=False, width=None if known else PIPE_WIDTH)


def check_folder(out: Path | None, suffixes: tuple[str, ...] = SUFFIXES) -> None:
    """Refuse an output that cannot be written, before anything is computed.

    Raises
    ------
    ModelError
        On another suffix, and where the folder does not exist.
    MissingDependency
        For `.parquet` without the extra `data`.
    StorageError
        Where the folder cannot be written in, or `out` exists and is no file.
    """
    if out is None:
        return
    if out.suffix not in suffixes:
        raise ModelError(f"--out {out}: the suffix must be one of {', '.join(suffixes)}")
    if out.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise MissingDependency("--out .parquet needs pyarrow: pip install 'lmppl[data]'")
    place = out.resolve()
    if not place.parent.is_dir():
        raise ModelError(f"--out {out}: there is no folder {place.parent}")
    if place.exists() and not place.is_file():
        raise StorageError(f"--out {out}: it exists and is no regular file")
    try:
        with tempfile.NamedTemporaryFile(dir=place.parent, prefix=".lmppl-"):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(f"--out {out}: cannot write in the folder {place.parent}: {reason}") from error


def run_as_dict(result: Approximation, out: Path | None) -> dict[str, Any]:
    """Plain data about a run; the draws are in it where they were not saved to `out`."""
    draws = result.draws
    data: dict[str, Any] = {
        "formula": draws.meta.get("formula"),
        "engine": str(result.engine),
        "guarantee": result.guarantee.value,
        "status": result.status,
        "seed": result.seed,
        "num_draws": len(draws),
        "log_z": [_estimate(result, c) for c in range(draws.num_contexts)],
        "cost": dict(result.cost.as_dict()),
        "info": plain_info(result.info),
        "spec_hash": draws.meta.get("spec_hash"),
        "versions": draws.meta.get("versions"),
        "out": None if out is None else str(out),
    }
    if out is None:
        weights = draws.weights.tolist()
        rows = zip(draws.context.tolist(), draws.text, weights, strict=True)
        data["draws"] = [{"context": c, "text": text, "weight": w} for c, text, w in rows]
    return data


def _estimate(result: Approximation, context: int) -> dict[str, Any] | None:
    if not result.log_normalizer:
        return None
    best = result.log_normalizer[0]
    ends = [None, None] if best.interval is None else best.interval[context].tolist()
    value, low, high = (None if e is None or not math.isfinite(e) else e for e in (float(best.value[context]), *ends))
    return {"value": value, "low": low, "high": high, "kind": best.kind, "note": best.note}


def print_run(result: Approximation, out: Path | None, stdout: TextIO, num_draws: int | None = None) -> None:
    """Formula, log Z, cost and a few draws of the posterior; `num_draws` per context were asked for."""
    console, draws = screen(stdout), result.draws
    facts = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    facts.add_column(style="dim")
    facts.add_column()
    facts.add_row("model", Text(str(draws.meta.get("formula", ""))))
    facts.add_row("engine", Text(f"{result.engine} · {_promise(result.guarantee)}"))
    for c in range(draws.num_contexts):
        name = "log Z" if draws.num_contexts == 1 else f"log Z({draws.prompts[c]!r})"
        facts.add_row(name, Text(_log_z(result, c)))
    note = result.log_normalizer[0].note if result.log_normalizer else ""
    for hint in (note, _more_sweeps(result)):
        if hint:
            facts.add_row("", Text(hint, style="dim"))
    worth = result.info.get("ess")
    weighted = "" if worth is None else f", worth {float(worth.sum()):,.0f} unweighted ones (ESS)"
    each = len(draws) // draws.num_contexts
    other = num_draws is not None and each != num_draws and result.status == "complete"
    asked = f" ({each:,} a context, {num_draws:,} asked for)" if other else ""
    facts.add_row("draws", f"{len(draws):,}{asked}{weighted}" + (f" → {out}" if out is not None else ""))
    for name, text in findings(result.info):
        facts.add_row(name, Text(text))
    cost = result.cost
    facts.add_row("cost", f"{cost.lm_tokens:,} LM tokens · {cost.factor_calls:,} factor calls · {cost.seconds:.1f} s")
    console.print(facts)
    console.print()
    other = result.guarantee in (Guarantee.HEURISTIC, Guarantee.APPROXIMATE)
    law = "the engine's own law" if other else "the posterior"
    console.print(Text(f"Some draws of {law}", style="bold"))
    generator = torch.Generator().manual_seed(result.seed)
    sample = _different(draws, generator)
    for context, text in zip(sample.context.tolist(), sample.text, strict=True):
        line = Text(f"  {one_line(draws.prompts[context])}", style="dim")
        gap = " " * bool(draws.prompts[context] and not text)
        line.append(gap + (one_line(text) or "(the empty text)"), style="not dim" if text else "italic")
        console.print(line, overflow="ellipsis", no_wrap=True)


def _different(draws: Draws, generator: torch.Generator) -> Draws:
    """A few draws of each context, none twice: the first ones, or by weight, without replacement (Gumbel's trick)."""
    chosen = []
    for c in range(draws.num_contexts):
        rows = torch.nonzero(draws.context == c).squeeze(1).cpu()
        if draws.log_weight is not None:
            log_w = draws.log_weight.cpu()[rows].double()
            rows, log_w = rows[log_w > -math.inf], log_w[log_w > -math.inf]
            noise = -torch.rand(len(rows), generator=generator, dtype=torch.float64).log()
            rows = rows[torch.argsort(log_w - noise.log(), descending=True)]
        rows = rows[:LOOKED_AT]
        first: dict[object, int] = {}
        for key, row in zip(draws.select(rows).keys(), rows.tolist(), strict=True):
            first.setdefault(key, row)
        chosen += list(first.values())[:SHOWN]
    return draws.select(chosen)


def _promise(guarantee: Guarantee) -> str:
    return {
        Guarantee.EXACT: "exact",
        Guarantee.CONSISTENT: "consistent: exact in the limit",
        Guarantee.APPROXIMATE: "approximate",
        Guarantee.HEURISTIC: "heuristic: another law than the posterior",
    }[guarantee]


def _log_z(result: Approximation, context: int) -> str:
    if not result.log_normalizer:
        return "— (this engine estimates none)"
    best = result.log_normalizer[0]
    value = float(best.value[context])
    if best.kind == "lower_bound" and best.level == 1.0:
        return f"≥ {value:z.4f}, for certain" if value > -math.inf else "— (all that was found has γ = 0: no bound)"
    text = f"{value:z.4f}"
    if best.interval is not None and best.kind != "exact":
        low, high = best.interval[context].tolist()
        text += "  (no interval)" if math.isnan(low) else f"  [{low:z.4f}, {high:z.4f}] at {best.level:.0%}"
    return text + (" exactly" if best.kind == "exact" else "")


def _more_sweeps(result: Approximation) -> str:
    """How to have several sweeps, where one states no error."""
    sweeps, size = result.info.get("log_z_sweeps"), getattr(result.engine, "num_particles", None)
    usual = getattr(result.engine, "num_sweeps", None)
    if sweeps is None or sweeps.shape[1] > 1 or size is None or "sweep" not in result.draws.columns:
        return ""
    number = max(4, usual or 0)
    return f"-n {size * number} makes {number} sweeps of {size} particles, whose spread is an error"


def one_line(text: str) -> str:
    """A text on one line, line breaks shown."""
    return text.replace("\r\n", "\n").replace("\n", "⏎").replace("\t", " ")
