"""The cut mixture: the members' log Z_m, from draws that cover the posterior of every member."""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from lmppl.errors import InfeasibleModel, ModelError
from lmppl.inference.approximation import LEVEL, Z_SCORE, Approximation, ExactTable, widening
from lmppl.inference.engine import Engine, Guarantee
from lmppl.inference.run import infer
from lmppl.modeling.evidence.attitudes import CutMixture
from lmppl.modeling.evidence.uncertain import JUDGED, UncertainReward
from lmppl.modeling.model import Model
from lmppl.sequences import Cost, Estimate

__all__ = ["CutMixtureFit", "fit_cut_mixture"]

MIN_SIZE = 20.0  # effective draws of each member and of the prior, in each context
MAX_ROUNDS = 10
SETTLED = 4.0  # standard errors of the difference of two rounds
EXACT = 1e-9


@dataclass(frozen=True, eq=False)
class CutMixtureFit:
    """A model whose cut mixture has its members' normalisers.

    Parameters
    ----------
    model : Model
        The fitted model, an ordinary one: every engine runs on it. Its Z is that of the model without the members.
    log_normalizers : Estimate
        log Z_m(c) = log E_p0[e^{r_m/β}], in nats, (C, M), with intervals (C, M, 2); p0 is the prior with the other
        factors, normalised.
    effective_sizes : Tensor (C, M)
        (Σ w)²/Σ w² of the last round's draws, weighted to each member's posterior; inf where it is exact.
    cost : Cost
        Of all rounds.
    num_rounds : int
    """

    model: Model
    log_normalizers: Estimate
    effective_sizes: Tensor
    cost: Cost
    num_rounds: int

    @property
    def marginal_shares(self) -> Tensor:
        """(C, M) Z_m/Σ Z_m: the share that each member's posterior has under `Marginal`; here it is 1/M."""
        return torch.softmax(self.log_normalizers.value, -1)

    def __repr__(self) -> str:
        lines = [self.model.formula]
        interval = self.log_normalizers.interval
        assert interval is not None
        for c, prompt in enumerate(self.model.prior.prompts):
            for m, share in enumerate(self.marginal_shares[c].tolist()):
                low, high = interval[c, m].tolist()
                lines.append(
                    f"  member {m} in context {prompt!r}: log Z = {float(self.log_normalizers.value[c, m]):.4g} "
                    f"[{low:.4g}, {high:.4g}], share {share:.3g} under Marginal"
                )
        return "\n".join(lines)


@dataclass(frozen=True)
class Covering(CutMixture):
    """The proposal of a round: the mixture of the members' posteriors at the present log Z_m, and of p0 itself.

    log φ = log (1 + Σ_m exp(r_m/β − log Z_m)) − log(M + 1) ≥ −log(M + 1); a log Z_m of inf leaves the member out.
    """

    def __post_init__(self) -> None:
        pass

    def log_factor_of(self, judged: Tensor, context: Tensor | None) -> Tensor:
        """(B,) log φ."""
        assert self.log_normalizers is not None
        assert context is not None
        log_z = torch.tensor(self.log_normalizers, dtype=torch.float64, device=judged.device)
        away = judged - log_z[context.long().to(judged.device)]
        return torch.cat([torch.zeros_like(away[:, :1]), away], 1).logsumexp(1) - math.log(away.shape[1] + 1)

    def upper(self, reward_upper: float, beta: float) -> float:
        """sup log φ of rewards that are at most `reward_upper`."""
        assert self.log_normalizers is not None
        ends = [[0.0, *(reward_upper / beta - z for z in row)] for row in self.log_normalizers]
        if any(math.isnan(end) for row in ends for end in row):  # no bound on r, and a member that is left out
            return inf
        return float(torch.tensor(ends, dtype=torch.float64).logsumexp(1).max()) - math.log(len(ends[0])) + EXACT


@dataclass(frozen=True, eq=False)
class Round:
    """What one round's draws say: log Z_m (C, M), standard errors (C, M), effective sizes (C, M + 1), p0's first."""

    log_z: Tensor
    errors: Tensor
    sizes: Tensor


def fit_cut_mixture(
    model: Model,
    engine: Engine | str | None = None,
    *,
    num_draws: int | None = None,
    seed: int = 0,
    max_rounds: int = MAX_ROUNDS,
) -> CutMixtureFit:
    """The log Z_m(c) of a model's cut mixture: log Z_m = log E_p0[e^{r_m/β}], per context, for all members at once.

    The first round draws from p0, the model without the members. Each later round draws with `engine` from the mixture
    of p0 and the members' posteriors at the present log Z_m: no weight of a member on such draws exceeds M + 1, so that
    a few hundred draws serve every member. For any q ∝ p0·φ with φ > 0, E_q[e^{r_m/β}/φ]/E_q[1/φ] = Z_m. The last round
    is one that agrees with the one before within their errors, and has 20 effective draws or more of each member and of
    p0. On an exact table the log Z_m are exact. Moments are fitted afterwards, on the fitted model. Source: `jacob2017`
    (the cut), `shirts2008` (ratios of normalisers from a mixture).

    Parameters
    ----------
    model : Model
        With one `UncertainReward` whose attitude is `CutMixture()`, and any other factors.
    engine : Engine or str, optional
        By default the first that can run, exact ones first. One whose proposal does not follow the model (`Importance`
        from the prior) reaches as far as its draws do.
    num_draws : int, optional
        Draws per context and round.
    seed : int
    max_rounds : int

    Returns
    -------
    CutMixtureFit

    Raises
    ------
    ModelError
        Where no factor, or more than one, is a cut mixture; where the engine's law is not π*, or states no error.
    InfeasibleModel
        Where some member has too few effective draws, or the rounds do not agree; it names the member.
    """
    factor = _the_cut_mixture(model)
    if isinstance(max_rounds, bool) or not isinstance(max_rounds, int) or max_rounds < 1:
        raise ModelError(f"fit_cut_mixture: got max_rounds={max_rounds!r}, expected at least 1")
    cost, last = Cost(), None
    rows: tuple[tuple[float, ...], ...] = ((inf,),) * model.prior.num_contexts  # p0 alone, however many members
    for number in range(1, max_rounds + 1):
        found = infer(_judged_by(model, factor, Covering(rows)), engine, num_draws, seed=seed + number, progress=False)
        cost.add(found.cost)
        _refuse_other_laws(found)
        now = _round(found, factor.name)
        if _is_exact(found) or (last is not None and _agree(last, now) and bool((now.sizes >= MIN_SIZE).all())):
            break
        last, rows = now, _rows(now.log_z)
        if number == max_rounds:
            _refuse_unsettled(model, factor.name, now, max_rounds)
    fitted = _judged_by(model, factor, CutMixture(_rows(now.log_z)))
    half = Z_SCORE * now.errors
    interval = torch.stack([now.log_z - half, now.log_z + half], -1)
    exact = _is_exact(found)
    level, kind = (1.0, "exact") if exact else (LEVEL, "consistent")
    return CutMixtureFit(
        fitted,
        Estimate(now.log_z, interval, level, kind, now.errors),  # type: ignore[arg-type]
        torch.full_like(now.log_z, inf) if exact else now.sizes[:, 1:],
        cost,
        number,
    )


def _the_cut_mixture(model: Model) -> UncertainReward:
    found = [f for f in model.factors if isinstance(f, UncertainReward) and isinstance(f.attitude, CutMixture)]
    if not found:
        raise ModelError("fit_cut_mixture: the model has no UncertainReward(fn, beta, CutMixture())")
    if len(found) > 1:
        names = ", ".join(repr(f.name) for f in found)
        raise ModelError(
            f"fit_cut_mixture: the model has {len(found)} cut mixtures ({names}), of which each is a mixture given the "
            "other; declare one ensemble of their members, or of their pairs"
        )
    return found[0]


def _judged_by(model: Model, factor: UncertainReward, attitude: CutMixture) -> Model:
    return Model(model.prior, [factor.with_attitude(attitude) if f is factor else f for f in model.factors])


def _rows(log_z: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, log_z.tolist()))


def _is_exact(found: Approximation) -> bool:
    return isinstance(found, ExactTable) and found.enumerated


def _refuse_other_laws(found: Approximation) -> None:
    if found.guarantee in (Guarantee.APPROXIMATE, Guarantee.HEURISTIC):
        raise ModelError(
            f"fit_cut_mixture: the draws of {found.engine} are {found.guarantee.value}, of a law that is not π*, and "
            "their means say nothing of Z_m; use an engine that is exact or consistent"
        )


def _round(found: Approximation, name: str) -> Round:
    """log Z_m of weighted draws of p0·φ, with errors by the delta method."""
    assert found.model is not None
    draws = found.draws
    column = found.model.feature_names(found.model[name])[0]
    exponents = draws.features[column][:, JUDGED:].double().cpu()
    exponents = torch.cat([torch.zeros_like(exponents[:, :1]), exponents], 1)
    log_phi = draws.log_factors[name].double().cpu()
    raw = torch.zeros(len(draws)) if draws.log_weight is None else draws.log_weight
    context, exact = draws.context.cpu(), _is_exact(found)
    values, errors, sizes = [], [], []
    for c in range(draws.num_contexts):
        rows = context == c
        log_w = torch.log_softmax(raw.double().cpu()[rows], 0)[:, None] + exponents[rows] - log_phi[rows, None]
        total = log_w.logsumexp(0)
        values.append(total[1:] - total[0])
        shares = (log_w - total).exp()
        sizes.append(1.0 / shares.square().sum(0))
        wide = widening(found.clusters(rows))
        influence = shares[:, 1:] - shares[:, :1]
        error = [0.0 if exact else float(found.error_of_mean(one, rows)) * wide for one in influence.T]
        errors.append(torch.tensor(error, dtype=torch.float64))
    result = Round(torch.stack(values), torch.stack(errors), torch.stack(sizes))
    if bool(result.errors.isnan().any()):
        raise ModelError(
            f"fit_cut_mixture: the draws of {found.engine} state no error, as those of a single sweep or chain do not; "
            "ask for more sweeps or chains"
        )
    return result


def _agree(last: Round, now: Round) -> bool:
    allowed = SETTLED * (last.errors.square() + now.errors.square()).sqrt() + EXACT
    return bool(((now.log_z - last.log_z).abs() <= allowed).all())


def _refuse_unsettled(model: Model, name: str, now: Round, rounds: int) -> None:
    place = int(now.sizes.argmin())
    c, k = divmod(place, now.sizes.shape[1])
    who = "the model without the members" if k == 0 else f"member {k - 1}"
    size, where = float(now.sizes[c, k]), f"in context {c} ({model.prior.prompts[c]!r})"
    if size < MIN_SIZE:
        raise InfeasibleModel(
            f"fit_cut_mixture: factor {name!r}: after {rounds} rounds the posterior of {who} has {size:.3g} effective "
            f"draws {where}, fewer than {MIN_SIZE:g}, so that its Z says nothing; raise num_draws=, use an engine "
            "whose draws follow the model (MCMC, SMC), or raise beta"
        )
    raise InfeasibleModel(
        f"fit_cut_mixture: factor {name!r}: {rounds} rounds do not agree on log Z_m within their errors; raise "
        "max_rounds= or num_draws=, or use an engine whose draws follow the model (MCMC, SMC)"
    )
