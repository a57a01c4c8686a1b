"""`compare`: several engines, policies or finished approximations on one declaration, measured against the same π*."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace

from lmppl.comparison.as_is import AsIs
from lmppl.comparison.closeness import closeness
from lmppl.comparison.figures import Figure, average, missing, spread, worst
from lmppl.comparison.laws import Law, law_of
from lmppl.comparison.reference import TABLE_GUARD, Reference
from lmppl.comparison.result import Comparison, Row
from lmppl.comparison.summaries import MostEvidence, summaries
from lmppl.comparison.worth import worth
from lmppl.errors import InterruptedRun, LmpplError, ModelError, SupportTooLarge
from lmppl.inference.approximation import Approximation, ExactTable
from lmppl.inference.engine import Budget, Engine, Guarantee, require_instance
from lmppl.inference.exact import Exact
from lmppl.inference.resolve import parse_engine
from lmppl.inference.run import infer
from lmppl.lm.base import LanguageModel
from lmppl.modeling.model import Model
from lmppl.modeling.target import TargetForm, log_evidence

__all__ = ["compare"]

log = logging.getLogger(__name__)

Entrant = Engine | str | LanguageModel | Approximation


@dataclass
class _Run:
    """One row in the making: what was asked, and the approximations that came out, one a repeat."""

    label: str
    entrant: Engine | LanguageModel | Approximation
    done: list[Approximation] = field(default_factory=list)
    error: LmpplError | None = None
    reason: str = ""

    def law(self, approximation: Approximation) -> Law:
        policy = self.entrant if isinstance(self.entrant, LanguageModel) else None
        return law_of(approximation, policy)


class _Interrupted(Exception):
    """Ctrl-C: what is finished stays."""


def compare(
    model: Model | LanguageModel,
    engines: Sequence[Entrant] | Mapping[str, Entrant],
    reference: Approximation | None = None,
    *,
    repeats: int = 1,
    budget: Budget | None = None,
    num_draws: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Comparison:
    """Run each engine on the same declaration and measure how well it approximates π*.

    Each row speaks about one law q, the law of one *unweighted* draw, and the table names it:

    - an exact engine: q = π*, so that both divergences are 0 by construction;
    - an engine whose draws carry weights w = γ/q (importance sampling): the divergences are those of its proposal q,
      before weighting. Its log Z, means and KL to the prior are estimates under π*, corrected by the weights, and
      ESS and k̂ say how far the correction can be trusted;
    - sweeps of particles, and chains: their means are estimates under π*, with the error of the sweeps or chains,
      widened by Student's t where they are few. One draw has no known density; of a sweep KL(q‖π*) ≤ log Z − E[log Ẑ]
      is shown, by the upper end of its interval. Their ESS is the number of independent draws of π* that would leave
      the same errors, at most that of the weights; fewer than four sweeps have none;
    - a language model: q itself, taken as it is; the weights γ/q only measure it. To correct it instead, pass
      `Importance(proposal=q)`. The prior is always the first row;
    - a heuristic: its own law. A decoding-time law is a language model, measured as such; best-of-n has the bound
      KL(q‖π0) ≤ log n − (n−1)/n, and its exact law where π* is a table; a search has no law;
    - quasi-rejection: the law of what it accepts, exactly where π* is a table, else as its run measured it.

    Columns, in nats: log Z with its 95 % interval; KL of the row's law to π0; the mean of every raw feature and the
    share that satisfies every hard constraint; KL(q‖π*) = log Z − E_q[log w], ∞ where q can violate a hard constraint;
    KL(π*‖q) = E_π*[log w] − log Z over exact draws of the reference, which alone see missed modes; TV = E_q[(1 −
    w/Z)₊]; Pr_q(γ = 0), or its 95 % bound where no draw of any context or repeat shows it; ESS = (Σw)²/Σw²; Pareto k̂.
    Where π* is a table the divergences are exact, and the TV of the draws' weighted empirical law stands beside the
    expected TV of as many exact draws. Then the cost. A figure that cannot be computed is "—", with the reason below
    the table. With several contexts figures are averaged over them, but for k̂, which is the worst; `per_context` has
    each.

    Parameters
    ----------
    model : Model or LanguageModel
        The declaration.
    engines : sequence or mapping
        Engines, their names, language models, and approximations of this model already computed; a mapping gives the
        labels.
    reference : Approximation, optional
        What provides π*. By default `Exact` where π* has at most 20,000 outcomes or is a finite machine; else the
        first exact engine among `engines`; else none, and each row uses its own estimate of log Z.
    repeats : int
        Independent runs of each engine, with seeds `seed`, `seed` + 1, ...; means, and the spread between runs.
    budget : Budget, optional
        For each run.
    num_draws : int, optional
        Draws per context of each run; each engine's own default if neither this nor a budget is given.
    seed : int
    progress : bool, optional
        As in `infer`.

    Returns
    -------
    Comparison
        An engine that cannot run, or fails, keeps a row with its reason. After Ctrl-C the finished rows, marked
        interrupted.

    Raises
    ------
    ModelError
        Where an argument is wrong, before anything runs.

    References
    ----------
    eikema2022 for the divergences, kong1992, vehtari2024, beirami2024
    """
    if not isinstance(model, Model):
        model = Model(model)
    if repeats < 1:
        raise ModelError(f"repeats: got {repeats}, expected at least 1")
    runs = [_Run("prior", model.prior), *_entries(engines, model, num_draws)]
    if reference is not None:
        Reference.of(reference, model)
    interrupted = False
    known: Reference | None = None
    rows: list[Row] = []
    per_context: list[Row] = []
    try:
        for run in runs:
            _execute(run, model, repeats, budget, num_draws, seed, progress)
    except _Interrupted:
        interrupted = True
    started = [run for run in runs if run.done or run.reason]
    try:
        try:
            known = _reference(reference, model, started, seed, search=not interrupted)
        except _Interrupted:
            interrupted, known = True, _reference(reference, model, started, seed, search=False)
        most = [_most_evidence(started, c) for c in range(model.prior.num_contexts)]
        for run in started:
            row, details = _measure(run, known, model, most)
            rows.append(row)
            per_context += details
    except KeyboardInterrupt:
        interrupted = True
    return Comparison(
        rows=tuple(rows),
        per_context=tuple(per_context),
        approximations={run.label: tuple(run.done) for run in started},
        reference=known,
        formula=model.formula,
        spec_hash=model.spec_hash,
        contexts=model.prior.prompts,
        repeats=repeats,
        seed=seed,
        interrupted=interrupted,
        not_run=tuple(run.label for run in runs if run.label not in {row.label for row in rows}),
    )


def _entries(engines: Sequence[Entrant] | Mapping[str, Entrant], model: Model, num_draws: int | None) -> list[_Run]:
    if isinstance(engines, str | Engine | LanguageModel | Approximation):
        raise ModelError(f"engines: got one {type(engines).__name__}, expected a list: [{engines!r}]")
    if not isinstance(engines, Sequence | Mapping):
        raise ModelError(f"engines: got {engines!r}, expected a list such as ['importance', lmppl.SMC(64)]")
    if len(engines) == 0:
        raise ModelError(
            "engines: got none, expected at least one: lmppl.compare(model, ['importance', lmppl.SMC(64)]); the prior "
            "is the first row of every comparison by itself"
        )
    named = engines.items() if isinstance(engines, Mapping) else ((None, e) for e in engines)
    runs: list[_Run] = []
    taken = {"prior"}
    for label, given in named:
        entrant = parse_engine(given) if isinstance(given, str) else given
        if isinstance(entrant, Approximation):
            _require_same_model(entrant, model)
        elif not isinstance(entrant, LanguageModel):
            require_instance(entrant)
        wanted = _label(entrant, num_draws) if label is None else label
        unique, number = wanted, 2
        while unique in taken:
            unique, number = f"{wanted} #{number}", number + 1
        taken.add(unique)
        runs.append(_Run(unique, entrant))
    return runs


def _label(entrant: Engine | LanguageModel | Approximation, num_draws: int | None) -> str:
    if isinstance(entrant, Engine):
        default = {f.name: f.default for f in fields(entrant)}.get("num_draws", MISSING)
        if num_draws is not None and default is not MISSING:  # the engine's own number is overruled, so not shown
            entrant = replace(entrant, num_draws=default)
        return _named(entrant)
    if isinstance(entrant, Approximation):
        return type(entrant).__name__ if entrant.engine is None else _named(entrant.engine)
    return _in_a_word(entrant)


def _named(engine: Engine) -> str:
    """The engine with the objects that it was given, in a word each: two rows of one engine differ by these."""
    text = str(engine)
    hidden = [f for f in fields(engine) if f.init and (not f.repr or f.name == "proposal")]
    given = [(f.name, getattr(engine, f.name)) for f in hidden]
    default = {f.name: f.default for f in hidden}
    words = [f"{name}={_in_a_word(v)}" for name, v in given if v is not None and v is not default[name]]
    if not words:
        return text
    return f"{text[:-1]}, {', '.join(words)})" if text.endswith(")") else f"{text}({', '.join(words)})"


def _in_a_word(value: object) -> str:
    """An object as a short word: its type, with the truncation of a language model, or its name."""
    if isinstance(value, Approximation):
        return type(value).__name__ if value.engine is None else _named(value.engine)
    if isinstance(value, LanguageModel):
        limits = {name: getattr(value, name, None) for name in ("top_k", "top_p")}
        shown = ", ".join(f"{name}={limit}" for name, limit in limits.items() if limit is not None)
        name = type(value).__name__.replace("TransformersLM", "LM")  # as users write it
        return f"{name}({shown})" if shown else name
    if isinstance(value, tuple):
        return f"({', '.join(map(_in_a_word, value))})"
    if isinstance(value, str | int | float):
        return repr(value)
    return str(getattr(value, "__name__", type(value).__name__))


def _require_same_model(approximation: Approximation, model: Model) -> None:
    if approximation.model is not None and approximation.model.spec_hash != model.spec_hash:
        raise ModelError(
            f"engines: {approximation!r} is of another declaration, {approximation.model.formula}, expected "
            f"{model.formula}"
        )


def _execute(
    run: _Run,
    model: Model,
    repeats: int,
    budget: Budget | None,
    num_draws: int | None,
    seed: int,
    progress: bool | None,
) -> None:
    """Run one entrant `repeats` times; its errors become its reason."""
    if isinstance(run.entrant, Approximation):
        run.done.append(run.entrant)
        return
    engine = AsIs(run.entrant) if isinstance(run.entrant, LanguageModel) else run.entrant
    for number in range(repeats):
        try:
            result = infer(model, engine, num_draws, budget=budget, seed=seed + number, progress=progress)
        except (InterruptedRun, KeyboardInterrupt) as error:
            raise _Interrupted from error
        except LmpplError as error:
            run.error = error
            run.reason = f"repeat {number + 1} of {repeats} failed: {error}" if number else str(error)
            return
        run.done.append(result)
        if result.status == "interrupted" and not (budget is not None and budget.spent(result.cost)):
            raise _Interrupted
        if isinstance(result, ExactTable) and result.enumerated:
            return


def _reference(
    given: Approximation | None, model: Model, runs: Sequence[_Run], seed: int, *, search: bool
) -> Reference | None:
    """The given one; else an exact table among the runs, or one made here; else exact draws among the runs."""
    if given is not None:
        return Reference.of(given, model)
    finished = [a for run in runs if not isinstance(run.entrant, LanguageModel) for a in run.done]
    exact = [a for a in finished if a.guarantee is Guarantee.EXACT]
    tables = [a for a in exact if isinstance(a, ExactTable)]
    engine = Exact(max_sequences=TABLE_GUARD)
    if not tables and search and engine.unsupported_reason(TargetForm.of(model)) is None:
        try:
            tables = [a for a in [infer(model, engine, seed=seed, progress=False)] if isinstance(a, ExactTable)]
        except SupportTooLarge:
            log.debug("more than %d outcomes: no table of π*", TABLE_GUARD)
        except InterruptedRun as error:
            raise _Interrupted from error
        except LmpplError as error:
            log.warning("no table of π*: %s", error)
    best = [*tables, *exact]
    return Reference.of(best[0], model) if best else None


def _most_evidence(runs: Sequence[_Run], context: int) -> MostEvidence:
    found = [MostEvidence(-math.inf, "")]
    for run in runs:
        for approximation in run.done:
            evidence = log_evidence(approximation.draws.select(approximation.draws.context == context))
            if len(evidence):
                found.append(MostEvidence(float(evidence.max()), run.label))
    return max(found, key=lambda one: one.value)


def _measure(
    run: _Run, reference: Reference | None, model: Model, most: Sequence[MostEvidence]
) -> tuple[Row, list[Row]]:
    """The row, averaged over contexts and repeats, and its parts: one row a context, averaged over repeats."""
    if not run.done:
        guarantee = run.entrant.guarantee.value if isinstance(run.entrant, Engine) else "—"
        return Row(run.label, guarantee, "", {}, repeats=0, reason=run.reason, error=run.error), []
    laws = [run.law(a) for a in run.done]
    contexts = range(model.prior.num_contexts)
    table = [
        [
            closeness(law, reference, c) | worth(law, reference, c) | summaries(law, reference, model, c, most[c])
            for c in contexts
        ]
        for law in laws
    ]
    by_repeat = [_combine(row, average) for row in table]
    guarantee = "as is" if isinstance(run.entrant, LanguageModel) else run.done[0].guarantee.value
    status = "interrupted" if any(a.status == "interrupted" for a in run.done) else "complete"
    costs = [_cost(a, figures) for a, figures in zip(run.done, table, strict=True)]
    figures = _combine(by_repeat, _over_repeats) | _combine(costs, _over_repeats)
    row = Row(run.label, guarantee, laws[0].q, figures, len(laws), reason=run.reason, status=status)
    details = [
        Row(run.label, guarantee, laws[0].q, _combine([r[c] for r in table], _over_repeats), len(laws), context=c)
        for c in contexts
    ]
    return row, details


def _combine(parts: Sequence[dict[str, Figure]], how: Callable[[Sequence[Figure]], Figure]) -> dict[str, Figure]:
    """Column by column."""
    names = list(dict.fromkeys(name for part in parts for name in part))
    columns = {name: [part.get(name, missing("not in every part")) for part in parts] for name in names}
    return {name: (worst if name == "k_hat" else how)(figures) for name, figures in columns.items()}


def _over_repeats(figures: Sequence[Figure]) -> Figure:
    mean = average(figures)
    values = [f.value for f in figures if f.value is not None]
    if mean.value is None or len(figures) < 2:
        return mean
    return Figure(mean.value, mean.error, mean.interval, mean.relation, spread(values), mean.note, mean.observed)


def _cost(approximation: Approximation, contexts: Sequence[dict[str, Figure]]) -> dict[str, Figure]:
    """What one run spent, its draws per context, and its LM tokens for each effective draw."""
    cost = {name: Figure(float(value)) for name, value in approximation.cost.as_dict().items()}
    effective = [f["ess"].value for f in contexts]
    total = sum(v for v in effective if v is not None)
    unknown = next((f["ess"] for f in contexts if f["ess"].value is None), None)
    per_draw = unknown or Figure(approximation.cost.lm_tokens / total if total else math.inf)
    per_context = len(approximation.draws) / approximation.draws.num_contexts
    return {"draws": Figure(per_context), **cost, "tokens_per_draw": per_draw}
