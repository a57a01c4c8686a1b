"""What the draws of a row are worth, with their weights: effective draws, k̂, and their distance to a table of π*."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lmppl.comparison.figures import HEAVY, Figure, missing
from lmppl.comparison.laws import ALL_ZERO, NO_WEIGHTS, Law
from lmppl.comparison.reference import Reference
from lmppl.diagnostics import effective_sample_size, pareto_khat, zero_weight_share
from lmppl.diagnostics.weights import KHAT_LIMIT
from lmppl.inference.approximation import Chains

__all__ = ["expected_total_variation", "worth"]

TABLE = "a table of all outcomes, not draws"
FEWEST = (
    "the fewest over log π0, the length and each factor, by the errors of sweeps or chains, and no more than the "
    "weights are worth"
)
FEW_CLUSTERS = 4  # whose spread s has E[1/s²] < ∞: 1/s² of n normal means is (n − 1)/(n − 3) times too large on average
UNSTATED = {
    True: "one chain, too short to see its autocorrelation, states no error",
    False: "one sweep states no error; run four or more for an effective size",
}
NO_KHAT = {
    True: "chains have no weights",
    False: "none of particles that branch: the spread of the sweeps is what tells",
}


def worth(law: Law, reference: Reference | None, context: int) -> dict[str, Figure]:
    """The figures of one context, by column: ESS, k̂, and, where π* is a table, TV of the draws with its noise."""
    figures = _effective(law, context)
    return figures | _noise(law, reference, context, figures["ess"])


def _effective(law: Law, context: int) -> dict[str, Figure]:
    if law.kind == "weighted":
        return {"ess": _effective_draws(law, context), "k_hat": _known_khat(law, context)}
    if law.has_weights:
        log_w = law.log_ratios(context)
        if float(zero_weight_share(log_w)) == 1.0:
            return {"ess": Figure(0.0), "k_hat": missing(ALL_ZERO)}
        shape = pareto_khat(log_w)
        k_hat = missing(shape.note) if math.isnan(shape.value) else _khat(shape.value)
        return {"ess": Figure(float(effective_sample_size(log_w))), "k_hat": k_hat}
    if law.tabulated:
        return {"ess": missing(TABLE), "k_hat": missing(TABLE)}
    if law.kind == "posterior":
        count = int((law.draws.context == context).sum())
        return {"ess": Figure(float(count)), "k_hat": missing("draws from π* have no weights")}
    return {"ess": missing(NO_WEIGHTS), "k_hat": missing(NO_WEIGHTS)}


def _khat(value: float) -> Figure:
    return Figure(value, note=HEAVY if value > KHAT_LIMIT else "")


def _known_khat(law: Law, context: int) -> Figure:
    """k̂ as the engine of sweeps computed it, of the weights before it resampled."""
    info = law.approximation.info
    if "khat" not in info:
        return missing(NO_KHAT[isinstance(law.approximation, Chains)])
    value, notes = float(info["khat"][context]), info.get("khat_note")
    if math.isnan(value):
        return missing(notes[context] if notes and notes[context] else "undefined for these weights")
    return _khat(value)


def _effective_draws(law: Law, context: int) -> Figure:
    """Independent draws of π* that would be as good: the fewest over log π0, the length and each log φ.

    For a scalar h it is Var(h)/SE(ĥ)², with the error that the sweeps or chains state, and no more than
    (Σw)²/Σw². SE² from the spread of n sweeps (or short chains) is noisy, and 1/SE² too large on average by
    (n − 1)/(n − 3), which is taken off; of fewer than four it has no average, and nothing is shown.
    """
    rows = law.draws.context == context
    chains, clusters = isinstance(law.approximation, Chains), law.approximation.clusters(rows)
    if clusters == 1:
        return missing(UNSTATED[chains])
    if clusters is not None and clusters < FEW_CLUSTERS:
        what = "chains" if chains else "sweeps"
        return missing(f"{clusters} {what}: too few for an effective size by their spread, which takes four or more")
    known = 1.0 if clusters is None else (clusters - 3) / (clusters - 1)
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
            found.append(known * variance / error**2)
    if not found:
        return missing("its draws do not differ")
    if draws.log_weight is not None:
        found.append(float(effective_sample_size(draws.log_weight)))
    return Figure(min(found), note=FEWEST)


def _noise(law: Law, reference: Reference | None, context: int, effective: Figure) -> dict[str, Figure]:
    """TV between π* and the weighted empirical law of the draws, and its mean for as many exact draws.

    Where draws are weighted "as many" is ESS: exact draws that would be as noisy.
    """
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
    figures = {"tv_draws": Figure(0.5 * distance)}
    if law.kind == "weighted" and effective.value is None:
        return {**figures, "tv_draws_exact": missing(effective.note)}
    number = effective.value if law.kind in ("proposal", "weighted") else float(len(weights))
    return {**figures, "tv_draws_exact": Figure(expected_total_variation(p, max(1, round(number or 1.0))))}


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
