"""`lmppl demo`: the embedded language model, a reward and a constraint, and the engines side by side."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from lmppl.cli.reporting import one_line, screen
from lmppl.cli.sentiment import is_impersonal, sentiment
from lmppl.comparison import Comparison, Figure, compare
from lmppl.inference.best_of_n import BestOfN
from lmppl.inference.engine import Engine
from lmppl.inference.exact import Exact
from lmppl.inference.importance import Importance
from lmppl.inference.mcmc import MCMC
from lmppl.inference.rejection import Rejection
from lmppl.inference.smc import SMC
from lmppl.lm import LM
from lmppl.modeling import Constraint, Model, Reward
from lmppl.sequences import Draws

__all__ = ["demo_model", "run_demo"]

CONTEXT = "The film was"
NUM_DRAWS = 400
SHOWN = 7
EVIDENCE = "sentiment: words of praise and of blame, from -1 to 1; is_impersonal: no word such as I, my, we."
PROGRAM = """\
prior = lmppl.LM("tiny", context="The film was", max_new_tokens=24)
model = prior * lmppl.Reward(sentiment, beta=0.5, upper=1) * lmppl.Constraint(is_impersonal)
engines = [lmppl.Rejection(), lmppl.Importance(), lmppl.SMC(), lmppl.MCMC(warmup=20),
           lmppl.BestOfN(8), lmppl.Exact()]
lmppl.compare(model, engines, num_draws={num_draws}, seed={seed})"""


def demo_model() -> Model:
    """What the demonstration declares: texts about a film that praise it, and do without the first person."""
    prior = LM("tiny", context=CONTEXT, max_new_tokens=24)
    return prior * Reward(sentiment, beta=0.5, upper=1) * Constraint(is_impersonal)


def run_demo(seed: int, progress: bool | None) -> bool:
    """Print the declaration, draws before and after the evidence, the comparison, and what was seen.

    Returns
    -------
    bool
        False where Ctrl-C ended it.
    """
    console = screen(sys.stdout)
    model = demo_model()
    console.print(Text(PROGRAM.format(num_draws=NUM_DRAWS, seed=seed), style="cyan"), soft_wrap=True)
    console.print()
    console.print(Text(model.formula, style="bold"))
    console.print(Text(EVIDENCE, style="dim"))
    engines: Sequence[Engine] = [Rejection(), Importance(), SMC(), MCMC(warmup=20), BestOfN(n=8), Exact()]
    result = compare(model, engines, num_draws=NUM_DRAWS, seed=seed, progress=progress)
    console.print()
    if result.approximations.get("rejection"):
        before, after = result.approximations["prior"][0].draws, result.approximations["rejection"][0].draws
        console.print(_side_by_side(before, after, console.width))
    console.print(result)
    if not result.interrupted:
        console.print()
        console.print(Text(summary(result), style="bold"))
    return not result.interrupted


def _side_by_side(before: Draws, after: Draws, width: int) -> Group:
    half = (width - 3) // 2
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold", width=width)
    for heading in ("draws of the prior", "draws of the posterior"):
        table.add_column(heading, width=half, no_wrap=True, overflow="ellipsis")
    for left, right in zip(_lines(before), _lines(after), strict=True):
        table.add_row(left, right)
    return Group(table, Text(f"the number is the sentiment; each text continues {CONTEXT!r}", style="dim"))


def _lines(draws: Draws) -> list[Text]:
    scores = draws.features["sentiment"].tolist()
    colours = {1: "green", 0: "default", -1: "red"}
    lines = []
    for score, text in list(zip(scores, draws.text, strict=True))[:SHOWN]:
        style = colours[(score > 0) - (score < 0)]
        lines.append(Text.assemble((f"{score:+.1f} ", style), one_line(text).strip()))
    return lines


def summary(result: Comparison) -> str:
    """One sentence about what the comparison shows, from its figures."""
    prior, exact, best = (result[name] for name in ("prior", "rejection", "best_of_n(n=8)"))
    gaps = {name: _gap(exact["log_z"], result[name]["log_z"]) for name in ("importance", "smc", "mcmc(warmup=20)")}
    furthest = max(gaps, key=lambda name: gaps[name])
    mean, holds = "mean:sentiment", "satisfied:is_impersonal"
    before, after, kept = prior[mean].value or 0.0, exact[mean].value or 0.0, prior[holds].value or 0.0
    own = abs((best[mean].value or 0.0) - after) > 3 * math.hypot(best[mean].error or 0.0, exact[mean].error or 0.0)
    where = "goes elsewhere" if own else "comes near"
    return (
        f"Seen: the evidence moved the mean sentiment from {before:+.2f} to {after:+.2f} and the share of impersonal "
        f"texts from {kept:.0%} to 100%; rejection, importance, SMC and MCMC"
        f" {_agreement(exact['log_z'], result[furthest]['log_z'])}; best-of-8, a heuristic, {where}, to "
        f"{best[mean].value or 0.0:+.2f}."
    )


def _gap(one: Figure, other: Figure) -> float:
    """How far two estimates of log Z are apart, in standard errors of their difference."""
    gap = abs((one.value or 0.0) - (other.value or 0.0))
    noise = math.hypot(one.error or 0.0, other.error or 0.0)
    return gap / noise if noise else math.inf if gap else 0.0


def _agreement(one: Figure, other: Figure) -> str:
    """Whether two estimates of log Z agree, and how often they would differ so by chance."""
    distance = _gap(one, other)
    if distance <= 2:
        return f"agree on log Z within {distance:.1f} standard errors"
    chance = math.erfc(distance / math.sqrt(2))
    often = f" (by chance once in {1 / chance:,.0f} runs)" if chance > 1e-6 else ""
    return f"differ on log Z by {distance:.1f} standard errors{often}"
