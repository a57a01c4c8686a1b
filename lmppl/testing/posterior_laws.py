"""What a run guarantees about the posterior, tested against the exact answers of a reference."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lmppl.inference.approximation import Approximation, ExactTable
from lmppl.modeling.factors import Feature
from lmppl.sequences import Draws, Estimate, Sequences
from lmppl.testing.reference import STATISTICS, Key, ReferencePosterior
from lmppl.testing.reports import Report
from lmppl.testing.statistics import chi_square_p_value, too_many_misses

__all__ = ["Coverage", "check_approximate", "check_consistent", "check_exact"]

STANDARD_ERRORS = 4.5
Z_RATE = 7e-6  # two-sided, of a normal figure at 4.5 standard errors
ROUNDING = 1e-9
FAVOURITES = 5  # outcomes of highest posterior probability that are followed one by one
MIN_EFFECTIVE = 200.0  # draws behind a normal approximation
MIN_COUNT = 20.0


def check_exact(report: Report, reference: ReferencePosterior, run: Approximation, error_rate: float) -> None:
    """Draws have the law π*: a table agrees to rounding, independent draws by chi-square."""
    draws = run.draws
    if isinstance(run, ExactTable):
        _check_table(report, reference, run)
        draws = run.draw(reference.num_draws, generator=torch.Generator().manual_seed(run.seed))
    elif draws.log_weight is not None:
        spread = float(draws.log_weight.max() - draws.log_weight.min())
        report.require(spread == 0.0, "exact draws have equal weights", f"log-weights {spread:g} nats apart", "0")
    posterior = reference.posterior
    if posterior is None:
        check_consistent(report, reference, run)
        return
    for c, table in enumerate(posterior):
        counts = Counter(_keys(draws.select(draws.context == c)))
        strange = set(counts) - set(table)
        report.require(not strange, "no draw lies where γ = 0", sorted(strange)[:1], "outcomes with γ > 0")
        p_value = chi_square_p_value([counts[key] for key in table], list(table.values()))
        got = f"counts of {sum(counts.values())} draws that differ for context {c}"
        report.require_likely(p_value, error_rate, "draws have the law π*", got, "chi-square agreement")


def _check_table(report: Report, reference: ReferencePosterior, run: ExactTable) -> None:
    (estimate,) = run.log_normalizer
    report.require_close(estimate.value, reference.log_normalizer, "log Z is exact", tolerance=ROUNDING)
    if reference.posterior is None:
        return
    prior = reference.model.prior
    for c, table in enumerate(reference.posterior):
        rows = prior.sequences([ids for _, ids in table], [c] * len(table))
        exact = torch.tensor([math.log(p) for p in table.values()], dtype=torch.float64)
        report.require_close(run.log_prob(rows), exact, "log_prob is log π*", tolerance=ROUNDING)


def check_consistent(report: Report, reference: ReferencePosterior, run: Approximation) -> None:
    """Weighted expectations agree with the exact ones within 4.5 of the standard errors that the run states."""
    effective = _effective_draws(run.draws)
    for name, fn in STATISTICS.items():
        _check_expectation(report, run, name, fn, reference.expectations[name], effective)
    if reference.posterior is None:
        return
    for rank in range(FAVOURITES):
        ordered = [sorted(table.items(), key=lambda item: -item[1]) for table in reference.posterior]
        if any(len(table) <= rank for table in ordered):
            return
        keys = [table[rank][0] for table in ordered]
        exact = torch.tensor([table[rank][1] for table in ordered], dtype=torch.float64)
        _check_expectation(report, run, f"outcome_{rank}", _indicator(keys), exact, effective)


def check_approximate(report: Report, reference: ReferencePosterior, run: Approximation) -> None:
    """Probabilities of events differ from the posterior's by no more than the measured bound on TV(law, π*).

    The bound is `info["total_variation_bound"]` (C,), with its standard error `total_variation_bound_error`.
    """
    law = "events are as probable as the bound on the total variation allows"
    if "total_variation_bound" not in run.info or reference.posterior is None:
        report.skip(law, "no measured bound, or no exact table")
        return
    bound, error = run.info["total_variation_bound"], run.info["total_variation_bound_error"]
    for c, table in enumerate(reference.posterior):
        keys = Counter(_keys(run.draws.select(run.draws.context == c)))
        total = sum(keys.values())
        strange = set(keys) - set(table)
        report.require(not strange, "no draw lies where γ = 0", sorted(strange)[:1], "outcomes with γ > 0")
        ordered = sorted(table.items(), key=lambda item: -item[1])[:FAVOURITES]
        for key, exact in ordered:
            share = keys[key] / total
            noise = math.sqrt(max(exact * (1 - exact), share * (1 - share)) / total + float(error[c]) ** 2)
            report.error_rate += Z_RATE
            close = abs(share - exact) <= float(bound[c]) + STANDARD_ERRORS * noise + ROUNDING
            got = f"{share:.4f} for an outcome of context {c}, with TV ≤ {float(bound[c]):.4f}"
            report.require(close, law, got, f"{exact:.4f}")


def _check_expectation(
    report: Report,
    run: Approximation,
    name: str,
    fn: Callable[[Sequences], Tensor],
    exact: Tensor,
    effective: Tensor,
) -> None:
    estimate = run.expectation(Feature(name, fn, on="ids"))
    law = f"expectations are within {STANDARD_ERRORS} standard errors"
    if estimate.standard_error is None:
        report.skip(f"{law}: E[{name}]", "the run states no standard error")
        return
    for c, error in enumerate(estimate.standard_error.tolist()):
        value, wanted = float(estimate.value[c]), float(exact[c])
        rare = ROUNDING < wanted < 1 - ROUNDING and float(effective[c]) * min(wanted, 1 - wanted) < MIN_COUNT
        if float(effective[c]) < MIN_EFFECTIVE or rare:
            report.skip(f"{law}: E[{name}]", f"{float(effective[c]):.0f} effective draws are too few to be normal")
            continue
        report.error_rate += Z_RATE
        close = abs(value - wanted) <= STANDARD_ERRORS * error + ROUNDING
        report.require(close, law, f"E[{name}] = {value:.5g} ± {error:.2g} for context {c}", f"{wanted:.5g}")


def _effective_draws(draws: Draws) -> Tensor:
    """(C,) (Σ w)²/Σ w², 0 where all weights are zero."""
    weights = draws.weights
    squares = [weights[draws.context == c].square().sum() for c in range(draws.num_contexts)]
    return torch.stack([torch.where(s > 0, 1 / s, 0.0) for s in squares])


def _keys(draws: Sequences) -> list[Key]:
    return [(finished, ids) for _, finished, ids in draws.keys()]  # noqa: SIM118 - not a mapping


def _indicator(keys: list[Key]) -> Callable[[Sequences], Tensor]:
    def fn(rows: Sequences) -> Tensor:
        hits = [(finished, ids) == keys[c] for c, finished, ids in rows.keys()]  # noqa: SIM118 - not a mapping
        return torch.tensor(hits, dtype=torch.float64)

    return fn


@dataclass
class Coverage:
    """Intervals of log Z over all runs: how many there were at each level, and how many missed."""

    trials: defaultdict[float, int] = field(default_factory=lambda: defaultdict(int))
    misses: defaultdict[float, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, report: Report, reference: ReferencePosterior, run: Approximation) -> None:
        """Count the intervals of one run; figures with a standard error must also be within 4.5 of them."""
        for estimate in run.log_normalizer:
            for c, exact in enumerate(reference.log_normalizer.tolist()):
                self._add(estimate, c, exact, f"{reference.name} (seed {run.seed})")
            if estimate.kind in ("unbiased_Z", "exact"):
                _check_log_z(report, estimate, reference, run)

    def _add(self, estimate: Estimate, c: int, exact: float, where: str) -> None:
        if estimate.interval is None or estimate.kind == "exact":
            return
        low, high = estimate.interval[c].tolist()
        missed = exact < low - ROUNDING if estimate.kind != "upper_bound" else False
        missed |= exact > high + ROUNDING if estimate.kind != "lower_bound" else False
        self.trials[estimate.level] += 1
        if missed:
            self.misses[estimate.level].append(f"{where}: log Z = {exact:.4f} not in [{low:.4f}, {high:.4f}]")

    def check(self, report: Report, error_rate: float) -> None:
        """Require that at each level no more intervals missed than `error_rate` allows."""
        law = "intervals of log Z cover as often as they say"
        if not self.trials:
            report.skip(law, "no run gave an interval")
        for level, trials in self.trials.items():
            missed = self.misses[level]
            p_value = too_many_misses(len(missed), trials, level)
            got = f"{len(missed)} of {trials} missed" + (f", the first: {missed[0]}" if missed else "")
            report.require_likely(p_value, error_rate, law, got, f"a coverage of {level:g}")


def _check_log_z(report: Report, estimate: Estimate, reference: ReferencePosterior, run: Approximation) -> None:
    law = f"log Z is within {STANDARD_ERRORS} standard errors"
    if estimate.standard_error is None:
        report.skip(law, "the run states no standard error")
        return
    effective = _effective_draws(run.draws)
    for c, error in enumerate(estimate.standard_error.tolist()):
        if not math.isfinite(error):
            report.skip(law, "the run states no standard error")
            continue
        if estimate.kind != "exact" and float(effective[c]) < MIN_EFFECTIVE:
            report.skip(law, f"{float(effective[c]):.0f} effective draws are too few to be normal")
            continue
        report.error_rate += Z_RATE if error > 0 else 0.0
        value, exact = float(estimate.value[c]), float(reference.log_normalizer[c])
        close = abs(value - exact) <= STANDARD_ERRORS * error + ROUNDING
        report.require(close, law, f"{value:.5g} ± {error:.2g} for context {c}", f"{exact:.5g}")
