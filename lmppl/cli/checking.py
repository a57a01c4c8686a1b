"""What `lmppl check` finds out: the declaration, its factors on a few prior draws, and which engines can run."""

from __future__ import annotations

import math
from typing import Any, TextIO

import torch
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from lmppl.cli.reporting import one_line, screen
from lmppl.cli.spec import Spec
from lmppl.inference.engine import Engine
from lmppl.inference.resolve import ENGINES, parse_engine
from lmppl.modeling.factors import Factor
from lmppl.modeling.model import Model
from lmppl.modeling.target import Target, TargetForm

__all__ = ["check_model", "print_check"]


def check_model(spec: Spec, num_draws: int, seed: int) -> dict[str, Any]:
    """Plain data about a spec: formula, prior, factors, graph, factors tried on prior draws, engines.

    Raises
    ------
    FactorError, ShapeError
        Where a factor fails on a prior draw.
    """
    model, form = spec.model, TargetForm.of(spec.model)
    model.graph.validate()
    listed = [parse_engine(e) if isinstance(e, str) else e for e in spec.engines]
    engines = [*(kind() for kind in ENGINES), *(e for e in listed if isinstance(e, Engine) and type(e) not in ENGINES)]
    reasons = [(engine, engine.unsupported_reason(form)) for engine in engines]
    return {
        "spec": str(spec.path),
        "name": spec.name,
        "formula": model.formula,
        "spec_hash": model.spec_hash,
        "prior": repr(model.prior),
        "contexts": list(model.prior.prompts),
        "factors": [_factor(model, factor) for factor in model.factors],
        "mermaid": model.graph.to_mermaid(),
        "tried": _tried(model, num_draws, seed) if num_draws else [],
        "engines": [
            {"name": str(engine), "guarantee": engine.guarantee.value, "runs": reason is None, "reason": reason}
            for engine, reason in reasons
        ],
    }


def _factor(model: Model, factor: Factor) -> dict[str, Any]:
    return {
        "name": factor.name,
        "kind": factor.kind,
        "formula": factor.formula,
        "features": list(model.feature_names(factor)),
        "upper": factor.upper if math.isfinite(factor.upper) else None,
        "hard": factor.hard,
        "stochastic": factor.stochastic,
        "automaton": factor.automaton is not None,
    }


def _tried(model: Model, num_draws: int, seed: int) -> list[dict[str, Any]]:
    draws = model.prior.draw(num_draws, generator=torch.Generator().manual_seed(seed))
    draws = Target(model).evaluate(draws)
    values = {name: column.tolist() for name, column in draws.log_factors.items()}
    return [
        {"context": c, "text": text, "log_factors": {n: _finite(v[i]) for n, v in values.items()}}
        for i, (c, text) in enumerate(zip(draws.context.tolist(), draws.text, strict=True))
    ]


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else "-inf"


def print_check(report: dict[str, Any], stdout: TextIO) -> None:
    """The report for people."""
    console = screen(stdout)
    console.print(Text(report["formula"], style="bold"))
    console.print()
    console.print(_tree(report))
    if report["tried"]:
        console.print()
        console.print(Text("On draws of the prior: log φ of each factor", style="bold"))
        console.print(_trial_table(report))
    console.print()
    console.print(Text("Engines", style="bold"))
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for engine in report["engines"]:
        mark = Text("✓ runs", style="green") if engine["runs"] else Text("✗", style="red")
        table.add_row(Text(engine["name"]), mark, Text(engine["reason"] or engine["guarantee"], style="dim"))
    console.print(table)


def _tree(report: dict[str, Any]) -> Tree:
    tree = Tree(Text.assemble("π0  ", (report["prior"], "dim")), guide_style="dim")
    contexts = report["contexts"]
    shown = ", ".join(repr(one_line(c)) for c in contexts[:3]) + (", ..." if len(contexts) > 3 else "")
    tree.add(Text.assemble(f"{len(contexts)} context{'s' if len(contexts) > 1 else ''}  ", (shown, "dim")))
    for factor in report["factors"]:
        facts = [factor["kind"], "hard" if factor["hard"] else "soft" if factor["hard"] is False else "may be hard"]
        facts.append("no upper bound" if factor["upper"] is None else f"log φ ≤ {factor['upper']:g}")
        facts += [word for word in ("stochastic", "automaton") if factor[word]]
        branch = tree.add(Text.assemble(factor["name"], "  ", (" · ".join(facts), "dim")))
        branch.add(Text(f"reads {', '.join(factor['features'])}", style="dim"))
    return tree


def _trial_table(report: dict[str, Any]) -> Table:
    names = [factor["name"] for factor in report["factors"]]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("text", no_wrap=True, overflow="ellipsis", ratio=1)
    for name in names:
        table.add_column(Text(name), justify="right", no_wrap=True, min_width=max(7, len(name)))
    for row in report["tried"]:
        values = (row["log_factors"][name] for name in names)
        cells = ("-∞" if isinstance(v, str) else f"{v:z.3f}" for v in values)
        prompt = one_line(report["contexts"][row["context"]])
        table.add_row(Text.assemble((prompt, "dim"), one_line(row["text"])), *cells)
    return table
