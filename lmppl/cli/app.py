"""The commands of `lmppl` and their options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from lmppl.cli.exits import INTERRUPTED, exit_codes, nothing_ran, results_on_stdout, say

if TYPE_CHECKING:
    from lmppl.inference.engine import Budget

__all__ = ["app", "main"]

EXIT_CODES = (
    "Exit codes: 0 done · 2 wrong usage, spec file or declaration · 3 the engine cannot run on this model · "
    "4 no outcome satisfies the evidence · 5 interrupted (whole shards are kept and saved) · 1 any other error."
)
COMPARE_CODES = (
    f"{EXIT_CODES} Engines without a result keep their rows and the code is 0, unless none but the prior has one: then "
    "their reasons are on stderr, and the code is 3 or 4 where all failed so, else 2 or 1."
)
SPEC_HELP = "SPEC.py, or SPEC.py:name of the model in it."
ENGINE_HELP = "A name, 'importance(4096)', or package.module:MyEngine(...)."

app = typer.Typer(
    name="lmppl",
    help="Declare a posterior over texts, swap inference engines, compare them.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

SpecArgument = Annotated[str, typer.Argument(metavar="SPEC", help=SPEC_HELP, show_default=False)]
NumDraws = Annotated[
    int | None,
    typer.Option("--num-draws", "-n", min=1, metavar="N", help="Draws per context; by default the engine's."),
]
Seed = Annotated[int, typer.Option(metavar="N", help="The same seed and plan give the same draws.")]
Tokens = Annotated[
    int | None, typer.Option("--budget-tokens", min=1, metavar="N", help="Stop after so many LM tokens.")
]
Seconds = Annotated[
    float | None, typer.Option("--budget-seconds", min=0.0, metavar="S", help="Stop after so many seconds.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Machine output on stdout, and nothing else there.")]
Progress = Annotated[
    bool | None, typer.Option("--progress/--no-progress", help="A progress bar; by default where stderr is a terminal.")
]


def main() -> None:
    """Entry point of the script `lmppl`."""
    app()


def _version(wanted: bool) -> None:
    if wanted:
        from lmppl import __version__

        typer.echo(f"lmppl {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Declare a posterior over texts, swap inference engines, compare them."""


@app.command(epilog=EXIT_CODES)
def demo(
    seed: Seed = 1,
    progress: Progress = None,
) -> None:
    """Condition the embedded language model on two pieces of evidence, and compare the engines."""
    with exit_codes():
        from lmppl.cli.demo import run_demo

        if not run_demo(seed, progress):
            say("interrupted", "the rows are those that were finished")
            raise typer.Exit(INTERRUPTED)


@app.command(epilog=EXIT_CODES)
def check(
    spec: SpecArgument,
    draws: Annotated[int, typer.Option(min=0, metavar="N", help="Prior draws on which each factor is tried.")] = 4,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Print a declaration, try its factors on a few prior draws, and say which engines can run on it."""
    with exit_codes(), results_on_stdout() as stdout:
        from lmppl.cli.checking import check_model, print_check
        from lmppl.cli.spec import load_spec

        report = check_model(load_spec(spec), draws, seed)
        if as_json:
            _write_json(report, stdout)
        else:
            print_check(report, stdout)


@app.command(epilog=EXIT_CODES)
def infer(
    spec: SpecArgument,
    engine: Annotated[
        str | None,
        typer.Option("--engine", "-e", metavar="ENGINE", help=f"{ENGINE_HELP} By default the first that can run."),
    ] = None,
    num_draws: NumDraws = None,
    seed: Seed = 0,
    budget_tokens: Tokens = None,
    budget_seconds: Seconds = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Save the draws: .jsonl, .safetensors or .parquet."),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep finished shards there; the same command goes on where it was stopped."),
    ] = None,
    as_json: AsJson = False,
    progress: Progress = None,
) -> None:
    """Run one engine on a declaration, and save its draws."""
    with exit_codes(), results_on_stdout() as stdout:
        from lmppl.cli.reporting import check_folder, print_run, run_as_dict
        from lmppl.cli.spec import add_import_folders, load_spec
        from lmppl.inference.resolve import parse_engine
        from lmppl.inference.run import infer as run

        check_folder(out)
        add_import_folders(spec)
        chosen = None if engine is None else parse_engine(engine)
        loaded = load_spec(spec)
        budget = _budget(budget_tokens, budget_seconds)
        result = run(
            loaded.model, chosen, num_draws, budget=budget, seed=seed, progress=progress, checkpoint=checkpoint
        )
        if out is not None:
            result.draws.save(out)
        if as_json:
            _write_json(run_as_dict(result, out), stdout)
        else:
            print_run(result, out, stdout, num_draws)
        stopped = result.status == "interrupted"
        if stopped and budget is not None and budget.spent(result.cost):
            if "shortfall" not in result.info:  # else the engine has told, context by context
                say("note", f"the budget ended first: {len(result.draws):,} draws")
        elif stopped:
            where = f"saved to {out}" if out is not None else "shown above; --out saves them"
            on = "" if checkpoint is None else "; run the same command again to go on"
            say("interrupted", f"{len(result.draws):,} draws of whole shards are {where}{on}")
            raise typer.Exit(INTERRUPTED)


@app.command(epilog=COMPARE_CODES)
def compare(
    spec: SpecArgument,
    engines: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help=f"Separated by commas. {ENGINE_HELP} By default the spec's list `engines`, else every engine.",
        ),
    ] = None,
    num_draws: NumDraws = None,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Independent runs of each engine.")] = 1,
    seed: Seed = 0,
    budget_tokens: Tokens = None,
    budget_seconds: Seconds = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Save the comparison: .json, .csv or .md.")
    ] = None,
    as_json: AsJson = False,
    progress: Progress = None,
) -> None:
    """Run several engines on one declaration, and say how well each approximates the same posterior."""
    with exit_codes(), results_on_stdout() as stdout:
        from rich.text import Text

        from lmppl.cli.reporting import check_folder, screen
        from lmppl.cli.spec import add_import_folders, load_spec
        from lmppl.comparison import compare as run
        from lmppl.inference.resolve import ENGINES, parse_engine, split_engines

        check_folder(out, (".json", ".csv", ".md"))
        add_import_folders(spec)
        listed = None if engines is None else [parse_engine(piece) for piece in split_engines(engines)]
        loaded = load_spec(spec)
        chosen = listed or loaded.engines or tuple(kind() for kind in ENGINES)
        result = run(
            loaded.model, chosen, repeats=repeats, budget=_budget(budget_tokens, budget_seconds), num_draws=num_draws,
            seed=seed, progress=progress,
        )  # fmt: skip
        if out is not None:
            result.save(out)
        if as_json:
            _write_json(result.as_dict(), stdout)
        else:
            console = screen(stdout)
            console.print(Text(result.formula, style="bold"))
            console.print(result)
        if out is not None:
            say("note", f"saved to {out}")
        if result.interrupted:
            left = f"; not run: {', '.join(result.not_run)}" if result.not_run else ""
            say("interrupted", f"the rows are those that were finished{left}")
            raise typer.Exit(INTERRUPTED)
        code = nothing_ran(result.rows[1:])
        if code is not None:
            raise typer.Exit(code)


def _budget(tokens: int | None, seconds: float | None) -> Budget | None:
    from lmppl.inference.engine import Budget

    return None if tokens is None and seconds is None else Budget(lm_tokens=tokens, seconds=seconds)


def _write_json(data: object, stdout: TextIO) -> None:
    stdout.write(json.dumps(data, ensure_ascii=False, indent=2, allow_nan=False) + "\n")
