"""What a row says, for one context: log Z, the mean of each feature, how often constraints hold, KL to the prior.

Means are those of the row's own law, with its weights: f̂ = Σ w̄ f, standard error √(Σ w̄² (f − f̂)²) [owen2000], or that
of its sweeps or chains. Where the row is a table they are exact.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lmppl.comparison.figures import Figure, Relation, missing
from lmppl.comparison.laws import NO_LOG_Z, NO_WEIGHTS, Law
from lmppl.comparison.reference import Reference
from lmppl.diagnostics import binomial_upper
from lmppl.modeling.model import Model
from lmppl.modeling.target import log_evidence

__all__ = ["summaries"]


def summaries(law: Law, reference: Reference | None, model: Model, context: int) -> dict[str, Figure]:
    """The figures of one context, by column: `log_z`, `kl_to_prior`, `mean:feature`, `satisfied:factor`."""
    rows = law.draws.context == context
    draws = law.draws.select(rows)
    figures = {"log_z": _log_z(law, context), "kl_to_prior": _kl_to_prior(law, reference, context)}
    for name, column in draws.features.items():
        if not _is_predicate(model, name, law.draws.features[name]):
            for label, values in _components(name, column):
                figures[f"mean:{label}"] = _mean(law, context, values)
    for factor in model.factors:
        value = draws.log_factors[factor.name].double()
        alive = torch.where(value.isnan(), value, (value > -math.inf).double())
        if factor.hard is not False:
            figures[f"satisfied:{factor.name}"] = _satisfied(law, context, alive)
    return figures


def _satisfied(law: Law, context: int, alive: Tensor) -> Figure:
    """The share with φ > 0. π* has no other texts; elsewhere, where no draw violates, the 95 % lower bound."""
    if law.kind in ("posterior", "proposal", "weighted"):
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
        return missing("every draw has γ = 0")
    w, f = weights[used], values[used].double()
    constant = bool((f == f[0]).all())
    mean = float(f[0]) if constant else float((w * f).sum())
    if math.isnan(mean):
        return missing("some draws leave the support of π0, where evidence is not evaluated")
    if law.tabulated if exact is None else exact:
        return Figure(mean, 0.0)
    if not math.isfinite(mean):
        return Figure(mean)
    if constant:
        return Figure(mean, note="its draws do not differ here, so no error can be estimated")
    influence = torch.zeros_like(weights).masked_scatter(used, w * (f - mean))
    error = law.error_of_mean(influence, context)
    return Figure(mean, None if math.isnan(error) else error)


def _log_z(law: Law, context: int) -> Figure:
    estimates = law.approximation.log_normalizer
    if not estimates:
        reason = {"proposal": "every draw has γ = 0", "policy": "every draw has γ = 0", "weighted": NO_LOG_Z}
        return missing(reason.get(law.kind, NO_WEIGHTS))
    best = estimates[0]
    interval = None if best.interval is None else (float(best.interval[context, 0]), float(best.interval[context, 1]))
    error = None if best.standard_error is None else float(best.standard_error[context])
    relations: dict[str, Relation] = {"lower_bound": "≥", "upper_bound": "≤"}
    relation = relations.get(best.kind, "=")
    return Figure(float(best.value[context]), error, interval, relation, note=best.note)


def _kl_to_prior(law: Law, reference: Reference | None, context: int) -> Figure:
    """KL of the row's law to π0: E[Σ log φ] − log Z for π*, E_q[log q − log π0] for a policy; in nats."""
    rows = law.draws.context == context
    draws = law.draws.select(rows)
    if law.kind == "policy":
        return _of_policy(draws.log_q, draws.log_prior)
    if law.kind == "other":
        bound = law.kl_to_prior_bound
        if bound is None:
            return missing("log q of its draws is not known")
        return Figure(bound, 0.0, relation="≤", note="KL(q‖π0) ≤ log n − (n−1)/n")
    log_z = _log_z(law, context)
    log_z_error = log_z.error
    if reference is not None and reference.exact:
        log_z, log_z_error = Figure(float(reference.log_z[context])), float(reference.log_z_error[context])
    evidence = _mean(law, context, log_evidence(draws))
    if evidence.value is None or log_z.value is None:
        return missing(evidence.note or log_z.note)
    errors = [evidence.error, log_z_error]
    error = None if any(e is None or math.isnan(e) for e in errors) else math.hypot(*(e or 0.0 for e in errors))
    return Figure(evidence.value - log_z.value, error)


def _of_policy(log_q: Tensor | None, log_prior: Tensor | None) -> Figure:
    if log_q is None or log_prior is None:
        return missing("log q of its draws is not known")
    ratio = log_q.double() - log_prior.double()
    if bool((ratio == math.inf).any()):
        return Figure(math.inf, note="it draws texts that the prior cannot")
    error = float(ratio.std()) / math.sqrt(len(ratio)) if len(ratio) > 1 else None
    return Figure(float(ratio.mean()), error)
