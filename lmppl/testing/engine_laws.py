"""The laws of an inference engine, as a check that anybody can run on their own, on references with known answers.

What holds for every engine stands in `run_laws`; what it guarantees about the posterior stands in `posterior_laws`.
"""

from __future__ import annotations

from collections.abc import Sequence

from lmppl.errors import InfeasibleModel
from lmppl.inference.approximation import Approximation, ExactTable
from lmppl.inference.engine import Engine, Guarantee, Part
from lmppl.inference.run import infer
from lmppl.modeling.target import TargetForm
from lmppl.testing.posterior_laws import Coverage, check_approximate, check_consistent, check_exact
from lmppl.testing.problems import references
from lmppl.testing.reference import ReferencePosterior
from lmppl.testing.reports import Report
from lmppl.testing.run_laws import check_contract, check_repeats, same_draws

__all__ = ["check_engine"]


def check_engine(
    engine: Engine,
    *,
    problems: Sequence[ReferencePosterior] | None = None,
    seeds: Sequence[int] = (0, 1),
    error_rate: float = 1e-6,
) -> Report:
    """Run an engine on all reference posteriors that it supports, and check what it guarantees.

    Every engine: draws are outcomes of the prior with the columns that the target gives, the cost is counted, the seed
    repeats the run, shards repeat alone and in any order. EXACT: chi-square against the exact table, and log Z.
    CONSISTENT: expectations within 4.5 standard errors, and log Z. APPROXIMATE: events no further from
    the posterior than the stated bound on the total variation allows. Intervals of log Z must cover as often as they
    say, over all runs.

    Parameters
    ----------
    engine : Engine
    problems : sequence of ReferencePosterior, optional
        By default `references()`.
    seeds : sequence of int
        One run each, on each reference.
    error_rate : float
        Probability that a correct engine fails one chi-square test, or the test of coverage.

    Returns
    -------
    Report
        With the references that the engine does not support, and its reasons.

    Raises
    ------
    CheckFailed
        Naming the reference and the first law that does not hold; also where no reference is supported.
    """
    problems = references() if problems is None else problems
    report = Report(f"engine {engine}")
    coverage = Coverage()
    on: dict[str, list[str]] = {}
    for reference in problems:
        reason = engine.unsupported_reason(TargetForm.of(reference.model))
        if reason is not None:
            report.skip(f"reference {reference.name!r}", reason)
            continue
        part = Report(f"engine {engine} on reference {reference.name!r}")
        _check_reference(part, engine, reference, seeds, coverage, error_rate)
        report.error_rate += part.error_rate
        for law in part.held:
            on.setdefault(law, []).append(reference.name)
        for law, why in part.skipped.items():
            report.skip(f"{law} on {reference.name!r}", why)
    report.require(bool(on), "some reference posterior is supported", "none", "at least one")
    report.held = {law: f"on {len(names)} references" for law, names in on.items()}
    coverage.check(report, error_rate)
    return report


def _check_reference(
    report: Report,
    engine: Engine,
    reference: ReferencePosterior,
    seeds: Sequence[int],
    coverage: Coverage,
    error_rate: float,
) -> None:
    runs: list[Approximation] = []
    for seed in seeds:
        parts: list[Part] = []
        try:
            run = infer(
                reference.model, engine, _count(engine, reference), seed=seed, progress=False, on_part=parts.append
            )
        except InfeasibleModel as error:
            report.require(reference.rare, "a draw with γ > 0 is found", f"InfeasibleModel: {error}", "draws")
            report.skip(f"a run with seed {seed}", "it found no outcome with γ > 0 in its budget, and said so")
            continue
        check_contract(report, reference, run)
        if seed == seeds[0]:
            check_repeats(report, engine, reference, run, parts, _count(engine, reference))
        if engine.guarantee is Guarantee.EXACT:
            check_exact(report, reference, run, error_rate)
        elif engine.guarantee is Guarantee.CONSISTENT:
            check_consistent(report, reference, run)
        elif engine.guarantee is Guarantee.APPROXIMATE:
            check_approximate(report, reference, run)
        if engine.guarantee in (Guarantee.EXACT, Guarantee.CONSISTENT):
            coverage.add(report, reference, run)
        runs.append(run)
    posterior = reference.posterior
    degenerate = posterior is not None and all(len(table) < 3 for table in posterior)
    if getattr(engine, "deterministic", False):
        report.skip("different seeds give different draws", "the engine declares itself deterministic")
    elif len(runs) > 1 and not (isinstance(runs[0], ExactTable) or degenerate):
        differ = not same_draws(runs[0].draws, runs[1].draws)
        report.require(differ, "different seeds give different draws", "the same draws", "others")


def _count(engine: Engine, reference: ReferencePosterior) -> int:
    if engine.guarantee is Guarantee.EXACT:
        return reference.num_draws
    if engine.guarantee is Guarantee.HEURISTIC:  # nothing statistical is claimed, so that few draws do
        return reference.num_draws // 6
    return reference.num_proposals
