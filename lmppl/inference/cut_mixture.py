"""The cut mixture: the members' log Z_m, from draws that cover the posterior of every member."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import NoReturn

import torch
from torch import Tensor

from lmppl.errors import InfeasibleModel, ModelError
from lmppl.inference.approximation import LEVEL, Z_SCORE, Approximation
from lmppl.inference.covering import EXACT, MIN_SIZE, MIN_STEP, Covering, Round
from lmppl.inference.engine import Engine, Guarantee
from lmppl.inference.run import infer
from lmppl.modeling.evidence.cut_mixture import CutMixture
from lmppl.modeling.evidence.uncertain import UncertainReward
from lmppl.modeling.model import Model
from lmppl.sequences import Cost, Estimate

__all__ = ["CutMixtureFit", "fit_cut_mixture"]

MAX_ROUNDS = 20
MAX_ERROR = 0.35  # nats of log Z_m; resampled draws repeat, which weights do not show and errors do
SETTLED = 4.0  # standard errors of the difference of two rounds


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
    of p0 and of p0·e^{λ r_m/β} for all members and powers λ so far, each component with an equal share: no weight of a
    component exceeds their number. It takes the members to the next power as far as their effective draws allow, so
    that members far from p0 are reached by steps. For any q ∝ p0·φ with φ > 0, E_q[e^{λ r_m/β}/φ]/E_q[1/φ] = Z_m(λ).
    The last round is one at λ = 1 that agrees with the one before within their errors, has 20 effective draws or more
    of each member and of p0, and knows each log Z_m to 0.35 nats. On an exact table the log Z_m are exact, at once.
    What no draw has met is in no figure: chains that do not reach a member's texts leave its Z_m too small. Moments are
    fitted afterwards, on the fitted model. Source: `jacob2017` (the cut), `shirts2008` (ratios of normalisers from a
    mixture), `geyer1991` (powers on the way).

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
    if not isinstance(model, Model):
        raise ModelError(
            f"fit_cut_mixture: got {type(model).__name__}, expected a model: prior * UncertainReward(fn, beta, "
            "CutMixture())"
        )
    factor = _the_cut_mixture(model)
    if isinstance(max_rounds, bool) or not isinstance(max_rounds, int) or max_rounds < 1:
        raise ModelError(f"fit_cut_mixture: got max_rounds={max_rounds!r}, expected at least 1")
    cost, powers = Cost(), [0.0]
    last: Round | None = None
    for number in range(1, max_rounds + 1):
        proposal = Covering(_rows(last, powers[1:], model.prior.num_contexts), tuple(powers[1:]))
        found = infer(_judged_by(model, factor, proposal), engine, num_draws, seed=seed + number, progress=False)
        cost.add(found.cost)
        _refuse_other_laws(found)
        now = Round(found, factor.name)
        if now.is_exact or (last is not None and powers[-1] == 1.0 and _is_settled(last, now)):
            return _fitted(model, factor, now, cost, number)
        if powers[-1] < 1.0:
            following = now.next_power(powers[-1])
            if following - powers[-1] < MIN_STEP:
                _refuse_few_draws(model, factor.name, now, powers[-1] + MIN_STEP, number)
            powers.append(following)
        last = now
    assert last is not None  # max_rounds ≥ 1
    _refuse_unsettled(model, factor.name, last, powers[-1], max_rounds)


def _fitted(model: Model, factor: UncertainReward, now: Round, cost: Cost, number: int) -> CutMixtureFit:
    log_z, errors = now.log_z(1.0), now.errors(1.0)
    half = Z_SCORE * errors
    exact = now.is_exact
    return CutMixtureFit(
        _judged_by(model, factor, CutMixture(tuple(map(tuple, log_z.tolist())))),
        Estimate(
            log_z,
            torch.stack([log_z - half, log_z + half], -1),
            1.0 if exact else LEVEL,
            "exact" if exact else "consistent",
            errors,
        ),
        torch.full_like(log_z, inf) if exact else now.sizes(1.0),
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


def _rows(last: Round | None, powers: list[float], num_contexts: int) -> tuple[tuple[float, ...], ...]:
    """C rows of log Z_m(λ) of all powers."""
    if last is None or not powers:
        return ((),) * num_contexts
    return tuple(map(tuple, torch.cat([last.log_z(power) for power in powers], 1).tolist()))


def _refuse_other_laws(found: Approximation) -> None:
    if found.guarantee in (Guarantee.APPROXIMATE, Guarantee.HEURISTIC):
        raise ModelError(
            f"fit_cut_mixture: the draws of {found.engine} are {found.guarantee.value}, of a law that is not π*, and "
            "their means say nothing of Z_m; use an engine that is exact or consistent"
        )


def _is_settled(last: Round, now: Round) -> bool:
    errors = now.errors(1.0)
    allowed = SETTLED * (last.errors(1.0).square() + errors.square()).sqrt() + EXACT
    agree = bool(((now.log_z(1.0) - last.log_z(1.0)).abs() <= allowed).all())
    enough = all(bool((now.sizes(power) >= MIN_SIZE).all()) for power in (0.0, 1.0))
    return agree and enough and bool((errors <= MAX_ERROR).all())


def _refuse_few_draws(model: Model, name: str, now: Round, power: float, rounds: int) -> NoReturn:
    sizes = now.sizes(power)
    c, m = divmod(int(sizes.argmin()), sizes.shape[1])
    raise InfeasibleModel(
        f"fit_cut_mixture: factor {name!r}: in round {rounds} the posterior of member {m} has {float(sizes[c, m]):.3g} "
        f"effective draws in context {c} ({model.prior.prompts[c]!r}), fewer than {MIN_SIZE:g}, at {power:.3g} of its "
        "evidence, so that its Z says nothing; raise num_draws=, use an engine whose draws follow the model (MCMC, "
        "SMC), or raise beta"
    )


def _refuse_unsettled(model: Model, name: str, now: Round, power: float, rounds: int) -> NoReturn:
    if bool((now.sizes(power) < MIN_SIZE).any()):
        _refuse_few_draws(model, name, now, power, rounds)
    errors = now.errors(power)
    if bool((errors > MAX_ERROR).any()):
        c, m = divmod(int(errors.argmax()), errors.shape[1])
        raise InfeasibleModel(
            f"fit_cut_mixture: factor {name!r}: after {rounds} rounds log Z of member {m} has a standard error of "
            f"{float(errors[c, m]):.2g} nats in context {c} ({model.prior.prompts[c]!r}), more than {MAX_ERROR:g}; "
            "raise num_draws=, or use an engine whose draws follow the model (MCMC, SMC)"
        )
    raise InfeasibleModel(
        f"fit_cut_mixture: factor {name!r}: {rounds} rounds have not settled (they reach {power:.3g} of the members' "
        "evidence); raise max_rounds= or num_draws=, or use an engine whose draws follow the model (MCMC, SMC)"
    )
