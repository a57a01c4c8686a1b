"""How close the law q of a row is to π*, for one context: divergences, and the share of draws with γ = 0.

With a table of π* and a scorer of q the figures are exact. Otherwise they come from draws, with w = γ/q:

- KL(q‖π*) = log Z − E_q[log w]; ∞ as soon as a draw of q has γ = 0.
- KL(π*‖q) = E_π*[log w] − log Z over the reference's draws, which see modes that q misses; without them Σ w̄ log(N
  w̄) over the row's own, which never exceeds log N and is blind to missed modes.
- TV = E_q[(1 − w/Z)₊].

log Z is the reference's; without a reference it is the row's own estimate, too small where its draws miss mass. Of a
draw of a sweep there is a bound, KL(q‖π*) ≤ log Z − E[log Ẑ | Ẑ > 0] − log Pr(Ẑ > 0), of which the upper end of its
95 % interval is shown.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lmppl.comparison.figures import BY_CONSTRUCTION, HEAVY, Figure, Relation, missing
from lmppl.comparison.laws import ALL_ZERO, FOUND, UNKNOWN_DENSITY, Law
from lmppl.comparison.reference import Reference
from lmppl.diagnostics import (
    binomial_upper,
    elbo,
    eubo,
    kl_divergence,
    self_normalised_kl,
    total_variation,
    total_variation_from_weights,
    zero_weight_share,
)
from lmppl.diagnostics.weights import KHAT_LIMIT
from lmppl.inference.approximation import Z_SCORE, widening
from lmppl.modeling.target import log_evidence

__all__ = ["closeness"]

OWN_LOG_Z = "with log Z from weighted draws: too small where they miss mass"
OUTSIDE = "some draws of q have γ = 0"
UNSEEN = "no draw has γ = 0; if q gives such texts any probability, this is ∞"
NONE_SEEN = "95 % bound: no draw shows it"
SWEEPS = "one draw of one sweep: upper end at 95 % of the bound log Z − E[log Ẑ]"
NO_MASS = "draws with γ = 0 have weight 0"
NEVER_ACCEPTED = "what has γ = 0 is never accepted"
MEASURED = "measured on its own proposals: blind to mass that none of them reached"
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-9}  # how far a table of log-probabilities is from summing to 1


def closeness(law: Law, reference: Reference | None, context: int) -> dict[str, Figure]:
    """The figures of one context, by column: KL both ways, TV, Pr_q(γ=0).

    Parameters
    ----------
    law : Law
        What the row speaks about. Divergences are those of q, *before* weighting; the weights correct them.
    reference : Reference, optional
        What is known of π*.
    context : int
    """
    if law.kind == "posterior":
        zero = Figure(0.0, 0.0, note=BY_CONSTRUCTION)
        return {"kl_reverse": zero, "kl_forward": zero, "tv": zero, "zero": zero}
    if law.kind == "weighted":
        return _of_sweeps(law, reference, context)
    if law.kind == "found":
        return _of_search(law, context)
    log_q = None if reference is None else law.log_q(reference, context)
    if reference is not None and reference.enumerated and log_q is not None:
        return _from_table(reference, context, log_q)
    if law.kind == "accepted":
        return _as_measured(law, context)
    return _from_draws(law, reference, context, log_q)


def _from_table(reference: Reference, context: int, log_q: Tensor) -> dict[str, Figure]:
    rows = reference.draws.context == context
    log_p = reference.weights[rows].log()
    log_prior = reference.draws.log_prior
    assert log_prior is not None
    rounding = max(ROUNDING[log_q.dtype], ROUNDING[log_prior.dtype])
    log_q = log_q.double()
    outside = 1.0 - float(log_q.exp().sum())
    if outside > rounding:  # mass of q off the support of π0 is one more outcome
        log_q = torch.cat([log_q, log_q.new_tensor([math.log(outside)])])
        log_p = torch.cat([log_p, log_p.new_tensor([-math.inf])])
    return {
        "kl_reverse": Figure(float(kl_divergence(log_q, log_p)), 0.0),
        "kl_forward": Figure(float(kl_divergence(log_p, log_q)), 0.0),
        "tv": Figure(float(total_variation(log_p, log_q)), 0.0),
        "zero": Figure(float(log_q[log_p == -math.inf].exp().sum()), 0.0),
    }


def _from_draws(law: Law, reference: Reference | None, context: int, log_q: Tensor | None) -> dict[str, Figure]:
    if not law.has_weights:
        return _without_density(law, reference, context)
    log_w = law.log_ratios(context)
    log_z, log_z_error, biased = _log_z(law, reference, context)
    lower = elbo(log_w)
    relation: Relation = "=" if not biased else "≥" if reference is None and law.coverage else "≈"
    note = (law.coverage if relation == "≥" else OWN_LOG_Z) if biased else ""
    if float(lower.value) == -math.inf:
        reverse = Figure(math.inf, note=OUTSIDE)
    elif law.may_violate:
        error = _root(lower.standard_error, log_z_error)
        reverse = Figure(log_z - float(lower.value), error, relation="≥", note=UNSEEN)
    else:
        reverse = Figure(
            log_z - float(lower.value), _root(lower.standard_error, log_z_error), None, relation, note=note
        )
    short = total_variation_from_weights(log_w, log_z) if len(log_w) > 1 and log_z > -math.inf else None
    tv = missing(ALL_ZERO if log_z == -math.inf else "one draw")
    if short is not None:
        tv = Figure(float(short.value), _number(short.standard_error), None, relation, note=note)
    return {
        "kl_reverse": reverse,
        "kl_forward": _forward(log_w, reference, context, log_q),
        "tv": tv,
        "zero": _zero_share(law, log_w),
    }


def _zero_share(law: Law, log_w: Tensor) -> Figure:
    """Pr_q(γ = 0): the share among the draws; where none is among them, its 95 % upper bound."""
    count, share = len(log_w), float(zero_weight_share(log_w))
    if share == 0.0 and law.may_violate:
        bound = float(binomial_upper(torch.tensor(0), torch.tensor(count)))
        return Figure(bound, relation="≤", note=NONE_SEEN, observed=0.0)
    return Figure(share, math.sqrt(share * (1 - share) / count))


def _forward(log_w: Tensor, reference: Reference | None, context: int, log_q: Tensor | None) -> Figure:
    """KL(π*‖q) over draws of π* where there are any, else from the row's own weights."""
    if reference is None or log_q is None or not reference.exact:
        if float(zero_weight_share(log_w)) == 1.0:
            return missing(ALL_ZERO)
        own = self_normalised_kl(log_w)
        note = f"from its own weights: blind to modes it misses, and {own.note}"
        return Figure(float(own.value), _number(own.standard_error), relation="≈", note=note)
    rows = reference.draws.context == context
    upper = eubo(reference.log_gamma[rows] - log_q)
    log_z, error = float(reference.log_z[context]), float(reference.log_z_error[context])
    infinite = float(upper.value) == math.inf
    return Figure(
        float(upper.value) - log_z,
        None if infinite else _root(upper.standard_error, error),
        note=upper.note if infinite else "",
    )


def _without_density(law: Law, reference: Reference | None, context: int) -> dict[str, Figure]:
    """The share with γ = 0, and for best-of-n a bound by KL(q‖π0) ≤ log n − (n−1)/n.

    KL(q‖π*) = KL(q‖π0) − E_q[Σ log φ] + log Z.
    """
    unknown = missing(UNKNOWN_DENSITY)
    rows = law.draws.context == context
    evidence = log_evidence(law.draws.select(rows))
    figures = {"kl_reverse": unknown, "kl_forward": unknown, "tv": unknown, "zero": _zero_share(law, evidence)}
    bound = law.kl_to_prior_bound
    if bool((evidence == -math.inf).any()):
        figures["kl_reverse"] = Figure(math.inf, note=OUTSIDE)
    elif law.may_violate:
        figures["kl_reverse"] = missing(f"{UNKNOWN_DENSITY}; ∞ if q can violate a constraint")
    elif bound is not None and reference is not None:
        spent = float(evidence.std()) / math.sqrt(len(evidence)) if len(evidence) > 1 else None
        error = None if spent is None else math.hypot(spent, float(reference.log_z_error[context]))
        value = bound - float(evidence.mean()) + float(reference.log_z[context])
        note = "bound by KL(q‖π0) ≤ log n − (n−1)/n"
        if reference.exact:
            figures["kl_reverse"] = Figure(value, error, relation="≤", note=note)
        else:
            figures["kl_reverse"] = Figure(value, error, relation="≈", note=f"{note}, {OWN_LOG_Z}")
    return figures


def _of_search(law: Law, context: int) -> dict[str, Figure]:
    """A search gives the same texts each time: their share with γ = 0 is no estimate, and there is no law."""
    none = missing(FOUND)
    evidence = log_evidence(law.draws.select(law.draws.context == context))
    share = float((evidence == -math.inf).double().mean())
    return {"kl_reverse": none, "kl_forward": none, "tv": none, "zero": Figure(share, 0.0)}


def _as_measured(law: Law, context: int) -> dict[str, Figure]:
    """The distances of quasi-rejection's law, as its run measured them."""
    info = law.approximation.info
    lower = info.get("distances_note")
    heavy = float(info["khat"][context]) > KHAT_LIMIT
    within = "; no proposal exceeded its bound M_q" if int(info["exceeding"][context]) == 0 else ""
    note = "; ".join([(lower or MEASURED) + within, *([HEAVY] if heavy else [])])
    figures = {"zero": Figure(0.0, 0.0, note=NEVER_ACCEPTED)}
    for column, name in (("kl_reverse", "reverse_kl"), ("kl_forward", "kl"), ("tv", "total_variation")):
        value, error = float(info[name][context]), float(info[f"{name}_error"][context])
        relation: Relation = "≥" if lower else "≈"
        figures[column] = Figure(value, None if math.isnan(error) else error, relation=relation, note=note)
    return figures


def _of_sweeps(law: Law, reference: Reference | None, context: int) -> dict[str, Figure]:
    """The law q of one draw of one sweep: KL(q‖π*) ≤ log Z − E[log Ẑ | Ẑ > 0] − log Pr(Ẑ > 0), and TV from it.

    Shown is the upper end of the bound's interval, by Student's t over the sweeps: TV is a convex function of the
    bound, and of a noisy one that came out near 0 it would claim what nobody knows. Chains have no such bound: what
    they have not reached shows nowhere.
    """
    unknown = missing(UNKNOWN_DENSITY)
    figures = {"kl_reverse": unknown, "kl_forward": unknown, "tv": unknown, "zero": Figure(0.0, 0.0, note=NO_MASS)}
    sweeps = law.approximation.info.get("log_z_sweeps")
    if sweeps is None:
        return figures
    own, found = sweeps[context], sweeps[context][sweeps[context] > -math.inf]
    if len(found) < 2:
        few = missing(f"{len(found)} sweep{'s' * (len(found) != 1)} with Ẑ > 0: no bound without a spread")
        return {**figures, "kl_reverse": few, "tv": few}
    log_z, error = float(torch.logsumexp(own, 0)) - math.log(len(own)), 0.0
    if reference is not None:
        log_z, error = float(reference.log_z[context]), float(reference.log_z_error[context])
    alive = len(found) / len(own)
    spread = math.hypot(float(found.std()) / math.sqrt(len(found)), math.sqrt((1 - alive) / (alive * len(own))))
    half = Z_SCORE * widening(len(found)) * math.hypot(spread, 0.0 if math.isnan(error) else error)
    value = log_z - float(found.mean()) - math.log(alive) + half
    if value < 0:
        noise = missing("the interval of log Z − E[log Ẑ], which is at least 0, lies below 0: noise")
        return {**figures, "kl_reverse": noise, "tv": noise}
    trusted = reference is not None and reference.exact
    if law.coverage and reference is None:
        return {**figures, "kl_reverse": missing(law.coverage), "tv": missing(law.coverage)}
    relation: Relation = "≤" if trusted else "≈"
    note = SWEEPS if trusted else f"{SWEEPS}, {OWN_LOG_Z}"
    figures["kl_reverse"] = Figure(value, relation=relation, note=note)
    tv = min(math.sqrt(value / 2), math.sqrt(-math.expm1(-value)))
    figures["tv"] = Figure(tv, relation=relation, note=f"from KL(q‖π*) of {note}")
    return figures


def _log_z(law: Law, reference: Reference | None, context: int) -> tuple[float, float, bool]:
    """log Z, its standard error, and whether it is the row's own."""
    if reference is not None:
        return float(reference.log_z[context]), float(reference.log_z_error[context]), not reference.exact
    log_w = law.log_ratios(context)
    return float(torch.logsumexp(log_w, 0)) - math.log(len(log_w)), 0.0, True


def _root(error: Tensor | None, other: float) -> float | None:
    return None if error is None or math.isnan(other) else math.hypot(float(error), other)


def _number(value: Tensor | None) -> float | None:
    return None if value is None else float(value)
