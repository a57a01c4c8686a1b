"""What `lmppl infer` says about a run: for people, and as plain data."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lmppl.errors import MissingDependency, ModelError
from lmppl.inference.approximation import Approximation
from lmppl.inference.engine import Guarantee
from lmppl.sequences import Draws

__all__ = ["check_folder", "one_line", "print_run", "run_as_dict", "screen"]

SHOWN = 5
PIPE_WIDTH = 100
SUFFIXES = (".jsonl", ".safetensors", ".parquet")


def screen() -> Console:
    """Standard output: as wide as the terminal, or 100 columns where it is a pipe or a file."""
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, width=None if known else PIPE_WIDTH)


def check_folder(out: Path | None, suffixes: tuple[str, ...] = SUFFIXES) -> None:
    """Refuse an output that cannot be written, before anything is computed.

    Raises
    ------
    ModelError
        On another suffix, and where the folder does not exist.
    MissingDependency
        For `.parquet` without the extra `data`.
    """
    if out is None:
        return
    if out.suffix not in suffixes:
        raise ModelError(f"--out {out}: the suffix must be one of {', '.join(suffixes)}")
    if out.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise MissingDependency("--out .parquet needs pyarrow: pip install 'lmppl[data]'")
    if not out.resolve().parent.is_dir():
        raise ModelError(f"--out {out}: there is no folder {out.resolve().parent}")


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


def print_run(result: Approximation, out: Path | None) -> None:
    """Formula, log Z, cost and a few draws of the posterior, on stdout."""
    console, draws = screen(), result.draws
    facts = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    facts.add_column(style="dim")
    facts.add_column()
    facts.add_row("model", Text(str(draws.meta.get("formula", ""))))
    facts.add_row("engine", Text(f"{result.engine} · {_promise(result.guarantee)}"))
    for c in range(draws.num_contexts):
        name = "log Z" if draws.num_contexts == 1 else f"log Z({draws.prompts[c]!r})"
        facts.add_row(name, Text(_log_z(result, c)))
    note = result.log_normalizer[0].note if result.log_normalizer else ""
    if note:
        facts.add_row("", Text(note, style="dim"))
    worth = result.info.get("ess")
    weighted = "" if worth is None else f", worth {float(worth.sum()):,.0f} unweighted ones (ESS)"
    facts.add_row("draws", f"{len(draws):,}{weighted}" + (f" → {out}" if out is not None else ""))
    cost = result.cost
    facts.add_row("cost", f"{cost.lm_tokens:,} LM tokens · {cost.factor_calls:,} factor calls · {cost.seconds:.1f} s")
    console.print(facts)
    console.print()
    law = "the engine's own law" if result.guarantee is Guarantee.HEURISTIC else "the posterior"
    console.print(Text(f"Some draws of {law}", style="bold"))
    generator = torch.Generator().manual_seed(result.seed)
    sample = draws.resample(SHOWN, generator=generator) if _has_weights(draws) else _first(draws)
    for context, text in zip(sample.context.tolist(), sample.text, strict=True):
        line = Text(f"  {one_line(draws.prompts[context])}", style="dim")
        line.append(one_line(text) or "(the empty text)", style="not dim" if text else "italic")
        console.print(line, overflow="ellipsis", no_wrap=True)


def _first(draws: Draws) -> Draws:
    rows = [torch.nonzero(draws.context == c).squeeze(1)[:SHOWN] for c in range(draws.num_contexts)]
    return draws.select(torch.cat(rows))


def _has_weights(draws: Draws) -> bool:
    return draws.log_weight is not None


def _promise(guarantee: Guarantee) -> str:
    return {
        Guarantee.EXACT: "exact",
        Guarantee.CONSISTENT: "consistent: weighted draws, exact in the limit",
        Guarantee.APPROXIMATE: "approximate",
        Guarantee.HEURISTIC: "heuristic: another law than the posterior",
    }[guarantee]


def _log_z(result: Approximation, context: int) -> str:
    if not result.log_normalizer:
        return "— (this engine estimates none)"
    best = result.log_normalizer[0]
    text = f"{float(best.value[context]):.4f}"
    if best.interval is not None and best.kind != "exact":
        low, high = best.interval[context].tolist()
        text += "  (no interval)" if math.isnan(low) else f"  [{low:.4f}, {high:.4f}] at {best.level:.0%}"
    return text + (" exactly" if best.kind == "exact" else "")


def one_line(text: str) -> str:
    """A text on one line, line breaks shown."""
    return text.replace("\r\n", "\n").replace("\n", "⏎").replace("\t", " ")
