"""What a row says, for one context: log Z, the mean of each feature, how often constraints hold, KL to the prior.

Means are those of the row's own law, with its weights: f̂ = Σ w̄ f, standard error √(Σ w̄² (f − f̂)²) [owen2000], or that
of its sweeps or chains, wider by Student's t where they are few. Where the row is a table, or the outcome of a search,
they have no error.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lmppl.comparison.figures import Figure, Relation, missing
from lmppl.comparison.laws import ALL_ZERO, FOUND, NO_LOG_Z, NO_WEIGHTS, UNKNOWN_DENSITY, Law
from lmppl.comparison.reference import Reference
from lmppl.diagnostics import binomial_upper, kl_divergence, log_mean_weight
from lmppl.inference.approximation import Z_SCORE
from lmppl.modeling.model import Model
from lmppl.modeling.target import log_evidence

__all__ = ["MostEvidence", "summaries"]

TIED = 1e-9


class MostEvidence(NamedTuple):
    """The most evidence, max Σ log φ, among the draws of one context of all rows, and the row that found it."""

    value: float
    label: str


def summaries(
    law: Law, reference: Reference | None, model: Model, context: int, most: MostEvidence | None = None
) -> dict[str, Figure]:
    """The figures of one context, by column: `log_z`, `kl_to_prior`, `mean:feature`, `satisfied:factor`.

    `most` is the row whose draws have the most evidence: where those of this row have one value, less than that, log Z
    says that it has not seen the rest.
    """
    rows = law.draws.context == context
    draws = law.draws.select(rows)
    log_z = _log_z(law, context)
    if (
        most is not None
        and log_z.value is not None
        and log_z.relation == "="
        and (reference is None or not reference.exact)
    ):
        log_z = _overlooked(log_z, log_evidence(draws), most)
    figures = {"log_z": log_z, "kl_to_prior": _partial(law, _kl_to_prior(law, reference, context))}
    for name, column in draws.features.items():
        if not _is_predicate(model, name, law.draws.features[name]):
            for label, values in _components(name, column):
                figures[f"mean:{label}"] = _partial(law, _mean(law, context, values))
    for factor in model.factors:
        value = draws.log_factors[factor.name].double()
        alive = torch.where(value.isnan(), value, (value > -math.inf).double())
        if factor.hard is not False:
            known = _satisfied_by_law(law, reference, context, factor.name) if bool((alive == 1).all()) else None
            figures[f"satisfied:{factor.name}"] = known or _satisfied(law, context, alive)
    return figures


def _partial(law: Law, figure: Figure) -> Figure:
    """A figure about π*, marked where its draws may see a part of π* alone."""
    if figure.value is None or not law.partial:
        return figure
    return replace(figure, relation="≈", note=law.partial)


def _overlooked(log_z: Figure, evidence: Tensor, most: MostEvidence) -> Figure:
    seen = evidence[evidence > -math.inf]
    if len(seen) == 0 or float(seen.max() - seen.min()) > TIED or most.value <= float(seen.max()) + TIED:
        return log_z
    note = (
        f"{most.label} found texts with more evidence than any of its draws, which have all the same: log Z misses it"
    )
    return replace(log_z, note="; ".join(part for part in (log_z.note, note) if part))


def _satisfied_by_law(law: Law, reference: Reference | None, context: int, name: str) -> Figure | None:
    """Pr_q(φ > 0) by the table of π*; None where q or the table is not known, or q leaves the support of π0."""
    log_q = None if reference is None or not reference.enumerated else law.log_q(reference, context)
    if log_q is None or reference is None or float(log_q.double().exp().sum()) < 1 - 1e-4:
        return None
    value = reference.draws.log_factors[name][reference.draws.context == context]
    return Figure(1.0 - float(log_q.double()[value == -math.inf].exp().sum()), 0.0)


def _satisfied(law: Law, context: int, alive: Tensor) -> Figure:
    """The share with φ > 0. π* has no other texts; elsewhere, where no draw violates, the 95 % lower bound."""
    if law.kind in ("posterior", "proposal", "weighted", "accepted", "found"):
        return _mean(law, context, alive, exact=True)
    if bool((alive == 1).all()):
        seen = float(binomial_upper(torch.tensor(0), torch.tensor(len(alive))))
        return Figure(1.0 - seen, relation="≥", note="95 % bound: no draw shows it", observed=1.0)
    return _mean(law, context, alive)


def _components(name: str, column: Tensor) -> list[tuple[str, Tensor]]:
    if column.dim() == 1:
        return [(name, column)]
    return [(f"{name}[{k}]", values) for k, values in enumerate(column.unbind(1))]


def _is_predicate(model: Model, name: str, column: Tensor) -> bool:
    """Whether a feature only says which texts a hard constraint allows: its mean is the share that satisfies it."""
    owners = [f for f in model.factors if name in model.feature_names(f)]
    return all(f.hard is True for f in owners) and bool(((column == 0) | (column == 1)).all())


def _mean(law: Law, context: int, values: Tensor, *, exact: bool | None = None) -> Figure:
    """The mean of `values` (n,) of the draws of one context; `exact` says that it has no error, as in a table."""
    weights = law.weights[law.draws.context == context]
    used = weights > 0
    if not bool(used.any()):
        return missing(ALL_ZERO)
    w, f = weights[used], values[used].double()
    constant = bool((f == f[0]).all())
    mean = float(f[0]) if constant else float((w * f).sum())
    if math.isnan(mean):
        return missing("some draws leave the support of π0, where evidence is not evaluated")
    if law.tabulated or law.kind == "found" if exact is None else exact:
        return Figure(mean, 0.0)
    if not math.isfinite(mean):
        return Figure(mean)
    if constant:
        return Figure(mean, note="its draws do not differ here, so no error can be estimated")
    influence = torch.zeros_like(weights).masked_scatter(used, w * (f - mean))
    error = law.error_of_mean(influence, context) * law.widening(context)
    return Figure(mean, None if math.isnan(error) else error)


def _log_z(law: Law, context: int) -> Figure:
    estimates = law.approximation.log_normalizer
    if law.kind == "policy":
        return _log_z_of_policy(law, context)
    if not estimates:
        reason = {"proposal": ALL_ZERO, "weighted": NO_LOG_Z}
        return missing(reason.get(law.kind, NO_WEIGHTS))
    best = estimates[0]
    value = float(best.value[context])
    if best.kind == "lower_bound" and value == -math.inf:
        return missing("all that it found has γ = 0: no bound of log Z")
    relations: dict[str, Relation] = {"lower_bound": "≥", "upper_bound": "≤"}
    relation = relations.get(best.kind, "=")
    interval = None if best.interval is None else (float(best.interval[context, 0]), float(best.interval[context, 1]))
    if relation != "=" and best.level == 1.0:
        interval = None  # the bound itself is certain
    error = None if best.standard_error is None else float(best.standard_error[context])
    return Figure(value, error, interval, relation, note=best.note)


def _log_z_of_policy(law: Law, context: int) -> Figure:
    """log Ẑ from the weights γ/q of its draws, which measure it."""
    log_w = law.log_ratios(context)
    if not bool((log_w > -math.inf).any()):
        return missing(ALL_ZERO)
    found = log_mean_weight(log_w)
    assert found.interval is not None
    assert found.standard_error is not None
    note = "; ".join(part for part in (found.note, law.coverage) if part)
    low, high = found.interval.tolist()
    relation: Relation = "≥" if law.coverage else "="
    return Figure(float(found.value), float(found.standard_error), (low, high), relation, note=note)


def _kl_to_prior(law: Law, reference: Reference | None, context: int) -> Figure:
    """KL of the row's law to π0: E[Σ log φ] − log Z for π*, E_q[log q − log π0] for a policy; in nats."""
    rows = law.draws.context == context
    draws = law.draws.select(rows)
    if law.kind == "policy":
        return _of_policy(draws.log_q, draws.log_prior)
    if law.kind == "other":
        bound = law.kl_to_prior_bound
        if bound is None:
            return missing(UNKNOWN_DENSITY)
        return Figure(bound, 0.0, relation="≤", note="KL(q‖π0) ≤ log n − (n−1)/n")
    if law.kind == "found":
        return missing(FOUND)
    if law.kind == "accepted":
        return _of_accepted(law, reference, context)
    log_z = _log_z(law, context)
    ends = log_z.interval
    log_z_error = log_z.error if ends is None else (ends[1] - ends[0]) / (2 * Z_SCORE)
    if reference is not None and reference.exact:
        log_z, log_z_error = Figure(float(reference.log_z[context])), float(reference.log_z_error[context])
    evidence = _mean(law, context, log_evidence(draws))
    if evidence.value is None or log_z.value is None:
        return missing(evidence.note or log_z.note)
    errors = [evidence.error, log_z_error]
    error = None if any(e is None or math.isnan(e) for e in errors) else math.hypot(*(e or 0.0 for e in errors))
    return Figure(evidence.value - log_z.value, error)


def _of_accepted(law: Law, reference: Reference | None, context: int) -> Figure:
    """KL(law‖π0) of quasi-rejection's law min(γ, M_q q)/Z_q: from the table, or, with q = π0, from its draws.

    Of draws of the prior it is E_law[min(Σ log φ, log M_q)] − log Z_q, Z_q/M_q the acceptance rate.
    """
    log_q = None if reference is None or not reference.enumerated else law.log_q(reference, context)
    if log_q is not None and reference is not None and reference.draws.log_prior is not None:
        log_prior = reference.draws.log_prior[reference.draws.context == context]
        return Figure(float(kl_divergence(log_q, log_prior.double())), 0.0)
    if getattr(law.approximation.engine, "proposal", None) is not None:
        return missing(UNKNOWN_DENSITY)
    info = law.approximation.info
    log_bound, tried, accepted = (float(info[k][context]) for k in ("log_bound", "proposals", "accepted"))
    capped = log_evidence(law.draws.select(law.draws.context == context)).clamp_max(log_bound)
    if len(capped) < 2:
        return missing("one draw")
    error = math.hypot(float(capped.std()) / math.sqrt(len(capped)), math.sqrt((1 - accepted / tried) / accepted))
    return Figure(float(capped.mean()) - math.log(accepted / tried) - log_bound, error)


def _of_policy(log_q: Tensor | None, log_prior: Tensor | None) -> Figure:
    if log_q is None or log_prior is None:
        return missing(UNKNOWN_DENSITY)
    ratio = log_q.double() - log_prior.double()
    if bool((ratio == math.inf).any()):
        return Figure(math.inf, note="it draws texts that the prior cannot")
    error = float(ratio.std()) / math.sqrt(len(ratio)) if len(ratio) > 1 else None
    return Figure(float(ratio.mean()), error)
