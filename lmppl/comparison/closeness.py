"""How close the law q of a row is to π*, for one context: divergences, effective draws, and the noise of the draws.

With a table of π* and a scorer of q the figures are exact. Otherwise they come from draws, with w = γ/q:

- KL(q‖π*) = log Z − E_q[log w]; ∞ as soon as a draw of q has γ = 0.
- KL(π*‖q) = E_π*[log w] − log Z over the reference's draws, which see modes that q misses; without them Σ w̄ log(N
  w̄) over the row's own, which never exceeds log N and is blind to missed modes.
- TV = E_q[(1 − w/Z)₊].

log Z is the reference's; without a reference it is the row's own estimate, too small where its draws miss mass.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lmppl.comparison.figures import BY_CONSTRUCTION, Figure, Relation, missing
from lmppl.comparison.laws import NO_WEIGHTS, Law, log_ratios
from lmppl.comparison.reference import Reference
from lmppl.diagnostics import (
    binomial_upper,
    effective_sample_size,
    elbo,
    eubo,
    kl_divergence,
    pareto_khat,
    self_normalised_kl,
    total_variation,
    total_variation_from_weights,
    zero_weight_share,
)
from lmppl.diagnostics.weights import KHAT_LIMIT
from lmppl.modeling.target import log_evidence

__all__ = ["closeness", "expected_total_variation"]

OWN_LOG_Z = "with log Z from weighted draws: too small where they miss mass"
UNKNOWN_DENSITY = "log q of its draws is not known"
OUTSIDE = "some draws of q have γ = 0"
TABLE = "a table of all outcomes, not draws"
HEAVY = f"k̂ > {KHAT_LIMIT}: weighted figures of this row are not to be trusted"
UNSEEN = "no draw has γ = 0; if q gives such texts any probability, this is ∞"
NONE_SEEN = "95 % bound: no draw shows it"
ALL_ZERO = "every draw has γ = 0"
SWEEPS = "bound for one draw of one sweep: log Z − E[log Ẑ]"
NO_MASS = "draws with γ = 0 have weight 0"
FEWEST = "the fewest over log π0, the length and each factor, by the errors of sweeps or chains"
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-9}  # how far a table of log-probabilities is from summing to 1


def closeness(law: Law, reference: Reference | None, context: int) -> dict[str, Figure]:
    """The figures of one context, by column: KL both ways, TV, Pr_q(γ=0), ESS, k̂, and TV of the draws with its noise.

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
        figures = {"kl_reverse": zero, "kl_forward": zero, "tv": zero, "zero": zero}
    elif law.kind == "weighted":
        figures = _of_sweeps(law, reference, context)
    else:
        log_q = None if reference is None else law.log_q(reference, context)
        if reference is not None and reference.enumerated and log_q is not None:
            figures = _from_table(reference, context, log_q)
        else:
            figures = _from_draws(law, reference, context, log_q)
    return figures | _effective(law, context) | _noise(law, reference, context)


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
    log_w = _log_weights(law, context)
    log_z, log_z_error, biased = _log_z(law, reference, context)
    lower = elbo(log_w)
    relation: Relation = "≈" if biased else "="
    note = OWN_LOG_Z if biased else ""
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
    """Best-of-n has a bound: KL(q‖π*) = KL(q‖π0) − E_q[Σ log φ] + log Z, KL(q‖π0) ≤ log n − (n−1)/n."""
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


def _of_sweeps(law: Law, reference: Reference | None, context: int) -> dict[str, Figure]:
    """The law q of one draw of one sweep: KL(q‖π*) ≤ log Z − E[log Ẑ | Ẑ > 0] − log Pr(Ẑ > 0), and TV from it.

    Chains have no such bound: what they have not reached shows nowhere.
    """
    unknown = missing(UNKNOWN_DENSITY)
    figures = {"kl_reverse": unknown, "kl_forward": unknown, "tv": unknown, "zero": Figure(0.0, 0.0, note=NO_MASS)}
    sweeps = law.approximation.info.get("log_z_sweeps")
    if sweeps is None:
        return figures
    own, alive = sweeps[context], sweeps[context] > -math.inf
    log_z, error = float(torch.logsumexp(own, 0)) - math.log(len(own)), 0.0
    if reference is not None:
        log_z, error = float(reference.log_z[context]), float(reference.log_z_error[context])
    found = own[alive]
    value = max(0.0, log_z - float(found.mean()) - math.log(float(alive.double().mean())))
    spread = float(found.std()) / math.sqrt(len(found)) if len(found) > 1 else math.nan
    total = math.hypot(spread, error)
    trusted = reference is not None and reference.exact
    note = SWEEPS if trusted else f"{SWEEPS}, {OWN_LOG_Z}"
    relation: Relation = "≤" if trusted else "≈"
    figures["kl_reverse"] = Figure(value, None if math.isnan(total) else total, relation=relation, note=note)
    tv = min(math.sqrt(value / 2), math.sqrt(-math.expm1(-value)))
    figures["tv"] = Figure(tv, relation=relation, note=f"from KL(q‖π*): {note}")
    return figures


def _effective_draws(law: Law, context: int) -> Figure:
    """Independent draws of π* that would be as good: the fewest over log π0, the length and each log φ.

    For a scalar h it is Var(h)/SE(ĥ)², with the error that the sweeps or chains state.
    """
    rows = law.draws.context == context
    draws, weights = law.draws.select(rows), law.weights[rows]
    scalars = [draws.lengths.double(), *(value.double() for value in draws.log_factors.values())]
    if draws.log_prior is not None:
        scalars.append(draws.log_prior.double())
    found = []
    for values in scalars:
        inside = weights > 0
        centred = torch.where(inside, values - (weights[inside] * values[inside]).sum(), 0.0)
        variance = float((weights * centred.square()).sum())
        error = law.error_of_mean(weights * centred, context)
        if variance > 0 and error > 0:
            found.append(variance / error**2)
        elif variance > 0 and math.isnan(error):
            return missing("one sweep, or one chain that is too short, states no error")
    return Figure(min(found), note=FEWEST) if found else missing("its draws do not differ")


def _effective(law: Law, context: int) -> dict[str, Figure]:
    rows = law.draws.context == context
    count = int(rows.sum())
    if law.kind == "weighted":
        k_hat = law.approximation.info.get("khat")
        value = math.nan if k_hat is None else float(k_hat[context])
        notes = law.approximation.info.get("khat_note")
        why = "chains have no weights" if k_hat is None else "undefined for these weights"
        shown = missing(notes[context] if notes and notes[context] else why)
        if not math.isnan(value):
            shown = Figure(value, note=HEAVY if value > KHAT_LIMIT else "")
        return {"ess": _effective_draws(law, context), "k_hat": shown}
    if law.has_weights:
        log_w = _log_weights(law, context)
        if float(zero_weight_share(log_w)) == 1.0:
            none = missing(ALL_ZERO)
            return {"ess": Figure(0.0), "k_hat": none}
        shape = pareto_khat(log_w)
        k_hat = missing(shape.note)
        if not math.isnan(shape.value):
            k_hat = Figure(shape.value, note=HEAVY if shape.value > KHAT_LIMIT else "")
        return {"ess": Figure(float(effective_sample_size(log_w))), "k_hat": k_hat}
    if law.tabulated:
        return {"ess": missing(TABLE), "k_hat": missing(TABLE)}
    if law.kind == "posterior":
        return {"ess": Figure(float(count)), "k_hat": missing("draws from π* have no weights")}
    return {"ess": missing(NO_WEIGHTS), "k_hat": missing(NO_WEIGHTS)}


def _noise(law: Law, reference: Reference | None, context: int) -> dict[str, Figure]:
    """TV between the (weighted) empirical law of the draws and π*, beside what as many exact draws would show."""
    if reference is None or not reference.enumerated:
        reason = missing("needs the table of π*: outcomes are too many")
        return {"tv_draws": reason, "tv_draws_exact": reason}
    if law.tabulated:
        reason = missing(TABLE)
        return {"tv_draws": reason, "tv_draws_exact": reason}
    table, drawn = reference.draws.context == context, law.draws.context == context
    mass: dict[object, float] = {}
    weights = law.weights[drawn].tolist()
    for key, weight in zip(law.draws.select(drawn).keys(), weights, strict=True):
        mass[key] = mass.get(key, 0.0) + weight
    p = reference.weights[table].cpu()
    keys = reference.draws.select(table).keys()
    distance = sum(abs(mass.pop(key, 0.0) - q) for key, q in zip(keys, p.tolist(), strict=True)) + sum(mass.values())
    weighted = law.kind in ("proposal", "weighted")
    number = _effective(law, context)["ess"].value if weighted else float(len(weights))
    return {
        "tv_draws": Figure(0.5 * distance),
        "tv_draws_exact": Figure(expected_total_variation(p, max(1, round(number or 1.0)))),
    }


def expected_total_variation(probabilities: Tensor, num_draws: int) -> float:
    """E[TV] between a law and the empirical law of n independent draws of it: ½ Σ_x E|k_x/n − p_x|.

    By de Moivre's identity E|k − np| = 2 (m+1) C(n, m+1) p^(m+1) (1−p)^(n−m), m = ⌊np⌋, exactly.

    Parameters
    ----------
    probabilities : Tensor (S,)
        p_x, summing to 1.
    num_draws : int
        n ≥ 1.
    """
    p = probabilities.double()
    p = p[(p > 0) & (p < 1)]
    n = torch.tensor(float(num_draws), dtype=torch.float64)
    m = torch.floor(n * p).clamp_max(num_draws - 1)
    log_choose = torch.lgamma(n + 1) - torch.lgamma(m + 2) - torch.lgamma(n - m)
    log_mean = math.log(2.0) + torch.log(m + 1) + log_choose + (m + 1) * torch.log(p) + (n - m) * torch.log1p(-p)
    return 0.5 * float(log_mean.exp().sum()) / num_draws


def _log_weights(law: Law, context: int) -> Tensor:
    log_w = log_ratios(law.draws)
    assert log_w is not None
    return log_w[law.draws.context == context].double().cpu()


def _log_z(law: Law, reference: Reference | None, context: int) -> tuple[float, float, bool]:
    """log Z, its standard error, and whether it is the row's own."""
    if reference is not None:
        return float(reference.log_z[context]), float(reference.log_z_error[context]), not reference.exact
    log_w = _log_weights(law, context)
    return float(torch.logsumexp(log_w, 0)) - math.log(len(log_w)), 0.0, True


def _root(error: Tensor | None, other: float) -> float | None:
    return None if error is None or math.isnan(other) else math.hypot(float(error), other)


def _number(value: Tensor | None) -> float | None:
    return None if value is None else float(value)
