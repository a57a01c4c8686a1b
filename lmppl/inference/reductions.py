"""Reductions: passes from a model to a model that need inference. Here: moments to multipliers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from lmppl.diagnostics.tilting import Tilt, is_reachable, tilt
from lmppl.errors import InfeasibleModel, ModelError
from lmppl.inference.approximation import LEVEL, Z_SCORE, Approximation, ExactTable, widening
from lmppl.inference.engine import Engine, Guarantee
from lmppl.inference.run import infer
from lmppl.modeling.evidence.moments import Moment
from lmppl.modeling.model import Model
from lmppl.modeling.target import log_evidence
from lmppl.sequences import Cost, Estimate

__all__ = ["MomentFit", "fit_moments"]

MIN_SHARE = 0.1  # of the draws' effective size, which a step may not take more from
MAX_ROUNDS = 20
SETTLED = 3.0  # standard errors of λ: a round that moves it by more was not drawn where it ends
EXACT = 1e-9


@dataclass(frozen=True, eq=False)
class MomentFit:
    """A model whose moments have their multipliers.

    Parameters
    ----------
    model : Model
        The fitted model, an ordinary one: every engine runs on it.
    multipliers : dict of str to Estimate
        λ by factor, (C, K), with intervals (C, K, 2).
    achieved : dict of str to Estimate
        E_π*[f] by factor, (C, K), of fresh draws of the fitted model.
    kl_prior : Tensor (C,)
        KL(π*‖π0) = E_π*[Σ log φ] − log Z of the fitted model, in nats, of the same draws; nan without an estimate of Z.
    cost : Cost
        Of all rounds.
    num_rounds : int
    """

    model: Model
    multipliers: dict[str, Estimate]
    achieved: dict[str, Estimate]
    kl_prior: Tensor
    cost: Cost
    num_rounds: int

    def __repr__(self) -> str:
        lines = [self.model.formula]
        for name, estimate in self.multipliers.items():
            target = next(f for f in self.model.factors if f.name == name)
            assert isinstance(target, Moment)
            mean = self.achieved[name]
            for c, prompt in enumerate(self.model.prior.prompts):
                for k, wanted in enumerate(target.target.tolist()):
                    label = name if len(target.target) == 1 else f"{name}[{k}]"
                    low, high = _ends(estimate, c, k)
                    reached, error = float(mean.value[c, k]), _error(mean, c, k)
                    lines.append(
                        f"  {label} in context {prompt!r}: λ = {float(estimate.value[c, k]):.4g} "
                        f"[{low:.4g}, {high:.4g}], E[f] = {reached:.4g} ±{error:.2g} for {wanted:g}"
                    )
        shown = ", ".join(f"{v:.4g}" for v in self.kl_prior.tolist())
        return "\n".join([*lines, f"  KL(π*‖π0) = {shown} nats"])


def fit_moments(
    model: Model,
    engine: Engine | str | None = None,
    *,
    shared: bool = False,
    num_draws: int | None = None,
    seed: int = 0,
    max_rounds: int = MAX_ROUNDS,
) -> MomentFit:
    """The multipliers λ of a model's moments: λ = argmin log Z(λ) − λ·μ, in each context or `shared` by all.

    Each round draws from the model at the present λ with `engine`, computes f once on each draw, and moves λ by
    Newton's method on the reweighted draws as far as their effective size allows; the proposal so follows the fit. The
    last round is one that reaches μ by a step within its own error, and its draws state the error of λ. Then the fitted
    model is drawn from afresh, to see what its moments are. On an exact table λ is exact. λ is as good as the engine's
    draws: chains that do not reach what μ needs leave it too large. Source: `csiszar1975`, `khalifa2021`.

    Parameters
    ----------
    model : Model
        With one `Moment` or more, and any other factors.
    engine : Engine or str, optional
        By default the first that can run, exact ones first. One whose proposal does not follow the model (`Importance`
        from the prior) reaches as far as its draws do.
    shared : bool
        One λ for all contexts: the mean of E_π*[f] over the contexts is μ.
    num_draws : int, optional
        Draws per context and round.
    seed : int
    max_rounds : int

    Returns
    -------
    MomentFit

    Raises
    ------
    ModelError
        Where no factor is a moment, or the engine's law is not π*.
    InfeasibleModel
        Where μ is not in the relative interior of what the draws reach (of all that can be reached, where the engine
        enumerates), with the interval; where f is the same on all draws; where the rounds end before μ is reached.
    """
    if not isinstance(model, Model):
        raise ModelError(f"fit_moments: got {type(model).__name__}, expected a model: prior * Moment(f, target)")
    moments = [f for f in model.factors if isinstance(f, Moment)]
    if not moments:
        raise ModelError("fit_moments: the model has no Moment(f, target)")
    if isinstance(max_rounds, bool) or not isinstance(max_rounds, int) or max_rounds < 1:
        raise ModelError(f"fit_moments: got max_rounds={max_rounds!r}, expected at least 1")
    target = torch.cat([m.target for m in moments])
    contexts = model.prior.num_contexts
    groups = [list(range(contexts))] if shared else [[c] for c in range(contexts)]
    present = torch.zeros(contexts, len(target), dtype=torch.float64)
    cost, number = Cost(), 0
    while True:
        found = infer(_at(model, moments, present), engine, num_draws, seed=seed + number, progress=False)
        cost.add(found.cost)
        if found.guarantee in (Guarantee.APPROXIMATE, Guarantee.HEURISTIC):
            raise ModelError(
                f"fit_moments: the draws of {found.engine} are {found.guarantee.value}, of a law that is not π*, and "
                "their means say nothing of λ; use an engine that is exact or consistent"
            )
        values = _values(found, moments)
        tilts = [_tilted(found, values, moments, target, group) for group in groups]
        for group, one in zip(groups, tilts, strict=True):
            present[group] += one.multipliers
        number += 1
        errors = torch.cat([_errors(found, values, g, one) for g, one in zip(groups, tilts, strict=True)])
        steps = torch.stack([one.multipliers for one in tilts])
        if all(one.complete for one in tilts) and bool((steps.abs() <= SETTLED * errors + EXACT).all()):
            break
        if number == max_rounds:
            _refuse_unreached(values, moments, target, max_rounds)
    fitted = _at(model, moments, present)
    fresh = infer(fitted, engine, num_draws, seed=seed + max_rounds, progress=False)
    cost.add(fresh.cost)
    errors = errors.expand(contexts, -1)
    exact = isinstance(found, ExactTable) and found.enumerated
    return MomentFit(
        fitted,
        _by_moment(moments, present, errors, exact),
        {m.name: _mean_of(fresh, m) for m in moments},
        _kl_prior(fresh),
        cost,
        number,
    )


def _at(model: Model, moments: Sequence[Moment], multipliers: Tensor) -> Model:
    """The model with its moments at multipliers (C, K), K over all moments."""
    parts = iter(multipliers.split([len(m.target) for m in moments], 1))
    return Model(model.prior, [f.with_multipliers(next(parts)) if isinstance(f, Moment) else f for f in model.factors])


def _values(found: Approximation, moments: Sequence[Moment]) -> Tensor:
    """(N, K) f of all moments, from the columns that the draws carry."""
    assert found.model is not None
    columns = []
    for moment in moments:
        names = found.model.feature_names(found.model[moment.name])
        columns.append(moment.values({name: found.draws.features[name] for name in names}))
    return torch.cat(columns, 1).double().cpu()


def _log_weight(found: Approximation, group: Sequence[int]) -> Tensor:
    """(N,) normalised log-weights, so that each context of the group has the same share; −inf outside it."""
    draws = found.draws
    weight = torch.zeros(len(draws)) if draws.log_weight is None else draws.log_weight
    result = torch.full((len(draws),), -torch.inf, dtype=torch.float64)
    for c in group:
        rows = draws.context.cpu() == c
        result[rows] = torch.log_softmax(weight.cpu()[rows].double(), 0)
    return result


def _tilted(
    found: Approximation, values: Tensor, moments: Sequence[Moment], target: Tensor, group: Sequence[int]
) -> Tilt:
    log_weight = _log_weight(found, group)
    inside = values[log_weight > -torch.inf]
    whole = isinstance(found, ExactTable) and found.enumerated
    low, high = inside.amin(0), inside.amax(0)
    for k, name in enumerate(_labels(moments)):
        if float(low[k]) == float(high[k]) != float(target[k]):
            raise InfeasibleModel(
                f"fit_moments: {name} is {float(low[k]):g} on all {len(inside)} draws {_where(found, group)}, and its "
                f"target is {float(target[k]):g}: no multiplier follows from draws that never differ; draw more, or "
                "from an engine that finds what differs"
            )
    context = found.draws.context.cpu()
    reachable = is_reachable(inside, target, context[log_weight > -torch.inf])
    if whole and not reachable:
        _refuse_unreachable(moments, low, high, target, _where(found, group))
    size = torch.exp(2 * log_weight.logsumexp(0) - (2 * log_weight).logsumexp(0))
    found_tilt = tilt(values, log_weight, target, context, min_ess=0.0 if whole else MIN_SHARE * float(size))
    return found_tilt if reachable else found_tilt._replace(complete=False)  # all weight on the rim of the draws


def _refuse_unreachable(moments: Sequence[Moment], low: Tensor, high: Tensor, target: Tensor, where: str) -> NoReturn:
    rows = [
        f"{name} reaches ({a:g}, {b:g}) and its target is {m:g}"
        for name, a, b, m in zip(_labels(moments), low.tolist(), high.tolist(), target.tolist(), strict=True)
    ]
    together = "" if len(rows) == 1 else "; targets must be reachable together, inside the hull of the outcomes"
    raise InfeasibleModel(f"fit_moments: no law has these moments {where}: {'; '.join(rows)}{together}")


def _refuse_unreached(values: Tensor, moments: Sequence[Moment], target: Tensor, rounds: int) -> NoReturn:
    rows = [
        f"{name} is in [{a:g}, {b:g}] on the last draws and its target is {m:g}"
        for name, a, b, m in zip(
            _labels(moments), values.amin(0).tolist(), values.amax(0).tolist(), target.tolist(), strict=True
        )
    ]
    raise InfeasibleModel(
        f"fit_moments: {rounds} rounds have not reached the target: {'; '.join(rows)}; draw more, use an engine whose "
        "draws follow the model (MCMC, SMC), or choose a target that can be reached"
    )


def _labels(moments: Sequence[Moment]) -> list[str]:
    return [m.name if len(m.target) == 1 else f"{m.name}[{k}]" for m in moments for k in range(len(m.target))]


def _where(found: Approximation, group: Sequence[int]) -> str:
    if len(group) > 1:
        return "of all contexts"
    return f"in context {group[0]} ({found.draws.prompts[group[0]]!r})"


def _errors(found: Approximation, values: Tensor, group: Sequence[int], one: Tilt) -> Tensor:
    """(1, K) standard errors of λ by the delta method: Cov⁻¹ times those of the mean at λ."""
    weights = one.log_weight.exp()
    inverse = torch.linalg.pinv(one.covariance)
    squares = torch.zeros(values.shape[1], dtype=torch.float64)
    for c in group:
        rows = found.draws.context.cpu() == c
        mean = weights[rows] @ values[rows] / weights[rows].sum()
        influence = weights[rows][:, None] * (values[rows] - mean) @ inverse
        wide = widening(found.clusters(rows))
        for k in range(len(squares)):
            squares[k] += (found.error_of_mean(influence[:, k], rows).double().cpu() * wide) ** 2
    return squares.sqrt()[None]


def _by_moment(moments: Sequence[Moment], value: Tensor, error: Tensor, exact: bool) -> dict[str, Estimate]:
    found, first = {}, 0
    for moment in moments:
        part = slice(first, first + len(moment.target))
        first = part.stop
        v, e = value[:, part], torch.zeros_like(value[:, part]) if exact else error[:, part]
        interval = torch.stack([v - Z_SCORE * e, v + Z_SCORE * e], -1)
        found[moment.name] = Estimate(v, interval, 1.0 if exact else LEVEL, "exact" if exact else "consistent", e)
    return found


def _mean_of(found: Approximation, moment: Moment) -> Estimate:
    """E[f] (C, K) of the draws."""
    values = _values(found, [moment])
    weights = torch.stack([_log_weight(found, [c]).exp() for c in range(found.draws.num_contexts)])
    mean = weights @ values
    exact = isinstance(found, ExactTable) and found.enumerated
    errors = torch.zeros_like(mean)
    if not exact:
        for c in range(len(mean)):
            rows = found.draws.context.cpu() == c
            wide = widening(found.clusters(rows))
            for k in range(mean.shape[1]):
                influence = weights[c] * (values[:, k] - mean[c, k])
                errors[c, k] = found.error_of_mean(influence[rows], rows) * wide
    interval = torch.stack([mean - Z_SCORE * errors, mean + Z_SCORE * errors], -1)
    return Estimate(mean, interval, 1.0 if exact else LEVEL, "exact" if exact else "consistent", errors)


def _kl_prior(found: Approximation) -> Tensor:
    evidence = log_evidence(found.draws).cpu()
    means = torch.stack(
        [
            torch.where(w > 0, w * evidence, 0.0).sum()
            for w in (_log_weight(found, [c]).exp() for c in range(found.draws.num_contexts))
        ]
    )
    if not found.log_normalizer:
        return torch.full_like(means, torch.nan)
    return means - found.log_normalizer[0].value.double().cpu()


def _ends(estimate: Estimate, c: int, k: int) -> tuple[float, float]:
    assert estimate.interval is not None
    low, high = estimate.interval[c, k].tolist()
    return low, high


def _error(estimate: Estimate, c: int, k: int) -> float:
    assert estimate.standard_error is not None
    return float(estimate.standard_error[c, k])
