"""The posterior of a head as a Gaussian at its mode, by Newton's method, and the evidence that chooses its scales.

H is the Hessian of −log p(y, θ) at the mode θ̂; θ | y ≈ N(θ̂, H⁻¹), and
log p(y | σ, τ) ≈ log p(y, θ̂) + (P/2) log 2π − ½ log |H|. Source: `mackay1992` for the evidence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lmppl.errors import ModelError
from lmppl.modeling.evidence.preference.heads import HeadProblem, Scales

__all__ = ["LaplaceFit", "best_scales", "laplace"]

LOG_SCALES = (-5.0, 3.0)  # of σ and τ, on standardised features
NEAR = 0.01  # of log σ and log τ: the posterior is much wider
MAX_STEPS = 100
TOLERANCE = 1e-18  # of Newton's decrement gᵀH⁻¹g, in nats


@dataclass(frozen=True, eq=False)
class LaplaceFit:
    """A Gaussian for θ.

    Parameters
    ----------
    mode : Tensor (P,)
    hessian : Tensor (P, P)
        Of −log p(y, θ) at the mode.
    log_evidence : float
        log p(y | σ, τ), in nats.
    scales : Scales
    """

    mode: Tensor
    hessian: Tensor
    log_evidence: float
    scales: Scales

    @property
    def covariance(self) -> Tensor:
        """(P, P) H⁻¹."""
        return torch.cholesky_inverse(torch.linalg.cholesky(self.hessian))


def laplace(problem: HeadProblem, scales: Scales, start: Tensor | None = None) -> LaplaceFit:
    """The mode of p(θ | y), its Hessian and the evidence.

    Without noise log p(y, θ) is strictly concave and the mode the only one. With noise there may be several: it is the
    highest of those that are found from θ = 0, from the mode without noise, and from that mode when every pair has
    differences of one size; NUTS starts there too. Newton's matrix is replaced by one that leaves out what noise adds,
    wherever the Hessian is not positive.

    Raises
    ------
    ModelError
        Where Newton's method does not converge, or ends where the Hessian is not positive.
    """
    if start is not None:
        return _newton(problem, scales, start)
    zero = torch.zeros(problem.num_parameters, dtype=torch.float64)
    found = _newton(problem, scales, zero)
    if problem.noise:
        size = problem.delta.norm(dim=1, keepdim=True)
        even = problem.delta / torch.where(size > 0, size / size[size > 0].median(), 1.0)
        for clean in (replace(problem, noise=0.0), replace(problem, noise=0.0, delta=even)):
            other = _newton(problem, scales, _newton(clean, scales, zero).mode)
            if problem.log_joint(other.mode, scales) > problem.log_joint(found.mode, scales):
                found = other
    return found


def _newton(problem: HeadProblem, scales: Scales, theta: Tensor) -> LaplaceFit:
    for _ in range(MAX_STEPS):
        at = problem.curvature(theta, scales)
        factor, failed = torch.linalg.cholesky_ex(at.hessian)
        is_newton = int(failed) == 0
        if not is_newton:
            factor = torch.linalg.cholesky(problem.safe_hessian(theta, scales))
        step = -torch.cholesky_solve(at.gradient[:, None], factor)[:, 0]
        decrement = float(-(step @ at.gradient))
        if decrement <= TOLERANCE * (1 + abs(float(at.value))) and is_newton:
            size = problem.num_parameters
            log_det = 2 * float(factor.diagonal().log().sum())
            evidence = -float(at.value) + 0.5 * size * math.log(2 * math.pi) - 0.5 * log_det
            return LaplaceFit(theta, at.hessian, evidence, scales)
        theta = _descend(problem, scales, theta, step, float(at.value), decrement)
    raise ModelError(
        f"BayesianRewardModel: Newton's method has not converged after {MAX_STEPS} steps; choose a smaller "
        "prior_scale= or less noise="
    )


def _descend(
    problem: HeadProblem, scales: Scales, theta: Tensor, step: Tensor, value: float, decrement: float
) -> Tensor:
    """The first of the points θ + step/2^k that is lower as it should be; rounding is not asked for descent."""
    rounding = 1e-13 * (1 + abs(value))
    for halvings in range(50):
        share = 0.5**halvings
        found = -float(problem.log_joint(theta + share * step, scales))
        if found <= value - 1e-4 * share * decrement + rounding:
            return theta + share * step
    raise ModelError("BayesianRewardModel: Newton's method found no descent; features of wildly different sizes?")


def best_scales(problem: HeadProblem, prior_scale: float | None) -> LaplaceFit:
    """The Laplace fit at the scales that are most probable given the pairs.

    σ maximises the evidence, unless `prior_scale` states it. τ maximises the evidence times its prior HalfNormal(1) as
    a density of log τ, which vanishes at τ = 0: the mode of θ and τ together would lie there, whatever the pairs say.
    Both are looked for between e^−5 and e^3, to 0.01 of their logarithms; the maximum is a local one.

    Raises
    ------
    ModelError
        Where no σ makes the pairs more probable than weights of nought do, or the search does not settle.
    """
    from scipy.optimize import minimize, minimize_scalar

    memory: dict[str, LaplaceFit] = {}

    def loss(log_weights: float, log_annotators: float) -> float:
        scales = Scales(math.exp(log_weights), math.exp(log_annotators))
        last = memory.get("last")
        fit = laplace(problem, scales, None if last is None or problem.noise else last.mode)
        memory["last"] = fit
        prior = log_annotators - scales.annotators**2 / 2 if problem.num_annotators else 0.0
        return -(fit.log_evidence + prior)

    known = None if prior_scale is None else math.log(prior_scale)
    if not problem.num_annotators:
        if known is not None:
            loss(known, 0.0)
            return memory["last"]
        found = minimize_scalar(lambda s: loss(s, 0.0), bounds=LOG_SCALES, method="bounded", options={"xatol": NEAR})
        _refuse_silent_pairs(-float(found.fun), -loss(LOG_SCALES[0], 0.0))
        loss(float(found.x), 0.0)
        return memory["last"]
    if known is not None:
        one = minimize_scalar(lambda t: loss(known, t), bounds=LOG_SCALES, method="bounded", options={"xatol": NEAR})
        loss(known, float(one.x))
        return memory["last"]
    both = minimize(
        lambda at: loss(*at),
        (-1.0, -1.0),
        method="Nelder-Mead",
        bounds=(LOG_SCALES, LOG_SCALES),
        options={"xatol": NEAR, "fatol": 1e-3, "maxiter": 200},
    )
    if not both.success:
        raise ModelError(
            f"BayesianRewardModel: the scales of the prior have not settled ({both.message}); state prior_scale="
        )
    _refuse_silent_pairs(-float(both.fun), -loss(LOG_SCALES[0], float(both.x[1])))
    loss(*both.x)
    return memory["last"]


def _refuse_silent_pairs(best: float, null: float) -> None:
    if best <= null + 1e-6:
        raise ModelError(
            "BayesianRewardModel: no prior_scale makes the pairs more probable than weights of nought: the choices do "
            "not depend on these features; give others, or state prior_scale="
        )
