"""The posterior of a head by Pyro: NUTS, and an AutoGuide fitted by SVI.

Both see the same density, p(y | h, η) p(h | τ) p(τ) p(η), of the heads h_j = w + δ_j that annotators have: w is
integrated out, and drawn afterwards from N(s² Σ_j h_j/τ², s²I), s⁻² = σ⁻² + J τ⁻², which is its law given h and τ.
Without annotators h is w itself. Coordinates are those in which the Laplace approximation of (h, η) is N(0, I); σ stays
where the evidence put it. Nothing is left behind: parameters live in a store of their own, random numbers in a fork of
torch's generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lmppl.errors import ModelError
from lmppl.modeling.evidence.preference.heads import TIE_SCALE, HeadProblem
from lmppl.modeling.evidence.preference.laplace import LaplaceFit
from lmppl.modeling.evidence.preference.posteriors import HeadDraws

__all__ = ["autoguide", "nuts"]

MAX_DIVERGING = 0.01  # share of steps
R_HAT = 1.1  # above it a chain is no posterior
NUM_STEPS = 600  # of SVI
NUM_PARTICLES = 16  # draws of the guide behind each gradient


class WhitenedModel:
    """The Pyro model.

    Parameters
    ----------
    problem : HeadProblem
    fit : LaplaceFit
        Gives σ and the coordinates.
    """

    def __init__(self, problem: HeadProblem, fit: LaplaceFit) -> None:
        self.problem, self.sigma = problem, fit.scales.weights
        # The rows give (h_1, …, h_J, η), or (w, η), of θ = (w, δ_1, …, δ_J, η).
        rows = torch.eye(len(fit.mode), dtype=torch.float64)
        if problem.num_annotators:
            d = problem.dim
            shared = torch.eye(d, dtype=torch.float64).repeat(problem.num_annotators, 1)
            rows = rows[d:]
            rows[: len(shared), :d] = shared
        self.location = rows @ fit.mode
        self.factor = torch.linalg.cholesky(rows @ fit.covariance @ rows.T)
        # With it the density of z is p(y, h, η) |L|, so that the ELBO bounds the evidence log p(y | σ).
        self.constant = float(self.factor.diagonal().log().sum()) - problem.has_ties * math.log(TIE_SCALE)

    def __call__(self) -> None:
        import pyro
        from pyro import distributions as dist

        zero = torch.zeros((), dtype=torch.float64)
        z = pyro.sample("z", dist.Normal(zero, zero + 1).expand([len(self.location)]).to_event(1))
        tau = pyro.sample("annotator_scale", dist.HalfNormal(zero + 1)) if self.problem.num_annotators else None
        heads, eta = self.parameters(z)
        if tau is None:
            said = self.problem.log_likelihood(heads[..., 0, :], None, eta)
        else:
            said = self.problem.log_likelihood(torch.zeros_like(heads[..., 0, :]), heads, eta)
        log_prior = self.log_prior(heads, tau)
        if eta is not None:
            log_prior = log_prior - 0.5 * (eta / TIE_SCALE) ** 2
        # z has the density N(0, I) already, which is taken away again; factors of 2π are as many in both.
        pyro.factor("pairs", said + log_prior + 0.5 * z.square().sum(-1) + self.constant)

    def log_prior(self, heads: Tensor, tau: Tensor | None) -> Tensor:
        """(...) log p(h | τ) but for 2π, of heads (..., J, D): each feature has N(0, τ²I + σ²11ᵀ) over the heads."""
        sigma, (count, dim) = self.sigma, heads.shape[-2:]
        squares = heads.square().sum((-2, -1))
        if tau is None:
            return -0.5 * squares / sigma**2 - dim * math.log(sigma)
        total = tau**2 + count * sigma**2
        shared = heads.sum(-2).square().sum(-1) * sigma**2 / total
        log_det = 2 * (count - 1) * tau.log() + total.log()
        return -0.5 * (squares - shared) / tau**2 - 0.5 * dim * log_det

    def parameters(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Heads (..., J, D), J = 1 without annotators, and η (...)."""
        theta = self.location + z @ self.factor.T
        eta = theta[..., -1] if self.problem.has_ties else None
        size = theta.shape[-1] - self.problem.has_ties
        return theta[..., :size].unflatten(-1, (-1, self.problem.dim)), eta

    def head_draws(self, sites: dict[str, Tensor], generator: torch.Generator) -> HeadDraws:
        """Draws of the sites (M, ...), as draws of a head."""
        heads, eta = self.parameters(sites["z"].detach())
        if not self.problem.num_annotators:
            return HeadDraws(heads[:, 0], eta=eta)
        tau = sites["annotator_scale"].detach()[:, None]
        noise = torch.randn(2, len(heads), self.problem.dim, dtype=torch.float64, generator=generator)
        variance = 1 / (self.sigma**-2 + self.problem.num_annotators * tau**-2)
        weights = variance * heads.sum(1) / tau**2 + variance.sqrt() * noise[0]
        return HeadDraws(weights, heads - weights[:, None], tau * noise[1], eta)


def nuts(problem: HeadProblem, fit: LaplaceFit, num_draws: int, seed: int) -> tuple[HeadDraws, dict[str, Any]]:
    """Draws of one chain of the no-U-turn sampler (`hoffman2014`), and what it says of itself.

    Raises
    ------
    ModelError
        Where R̂ of a coordinate is above 1.1, or more than one step in a hundred diverges: the chain has not reached
        the posterior, or not all of it.
    """
    from pyro.infer import MCMC, NUTS
    from pyro.infer.autoguide.initialization import init_to_value

    model = WhitenedModel(problem, fit)
    start = {"z": torch.zeros_like(model.location)}
    if problem.num_annotators:
        start["annotator_scale"] = torch.tensor(fit.scales.annotators, dtype=torch.float64)
    warmup = max(100, num_draws // 2)
    with _sandbox(seed):
        kernel = NUTS(model, init_strategy=init_to_value(values=start))
        chain = MCMC(kernel, num_samples=num_draws, warmup_steps=warmup, disable_progbar=True)
        chain.run()
        sites = {name: value.double() for name, value in chain.get_samples().items()}
        said = chain.diagnostics()
    r_hat = max(float(said[name]["r_hat"].max()) for name in sites)
    n_eff = min(float(said[name]["n_eff"].min()) for name in sites)
    if not r_hat < R_HAT:
        raise ModelError(f"BayesianRewardModel: NUTS has not converged: R̂ = {r_hat:.2f}; raise num_draws={num_draws}")
    divergences = sum(len(rows) for rows in said["divergences"].values())
    if divergences > MAX_DIVERGING * num_draws:
        raise ModelError(
            f"BayesianRewardModel: NUTS diverged in {divergences} of {num_draws} steps, so that it misses a part of "
            "the posterior; set prior_scale=, or use posterior='laplace'"
        )
    generator = torch.Generator().manual_seed(seed)
    facts = {"r_hat": r_hat, "n_eff": n_eff, "divergences": divergences, "warmup": warmup}
    return model.head_draws(sites, generator), facts


def autoguide(problem: HeadProblem, fit: LaplaceFit, num_draws: int, seed: int) -> tuple[HeadDraws, dict[str, Any]]:
    """Draws of a Gaussian of full covariance (`AutoMultivariateNormal`) that SVI fits to the posterior.

    An approximation: of reverse KL, and its error is not measured here; `BayesianRewardModel.agreement` compares fits.
    """
    import pyro
    from pyro.infer import SVI, Trace_ELBO
    from pyro.infer.autoguide import AutoMultivariateNormal
    from pyro.infer.autoguide.initialization import init_to_value
    from pyro.optim import ClippedAdam

    model = WhitenedModel(problem, fit)
    start = {"z": torch.zeros_like(model.location)}
    if problem.num_annotators:
        start["annotator_scale"] = torch.tensor(fit.scales.annotators, dtype=torch.float64)
    with _sandbox(seed):
        guide = AutoMultivariateNormal(model, init_loc_fn=init_to_value(values=start), init_scale=0.9)
        elbo = Trace_ELBO(num_particles=NUM_PARTICLES, vectorize_particles=True, max_plate_nesting=0)
        # The rate falls by a factor of 100, so that the last steps average out the noise of the first.
        optimizer = ClippedAdam({"lr": 0.02, "lrd": 0.01 ** (1 / NUM_STEPS)})
        svi = SVI(model, guide, optimizer, elbo)
        losses = [float(svi.step()) for _ in range(NUM_STEPS)]
        with torch.no_grad(), pyro.plate("draws", num_draws, dim=-1):
            sites = {name: value.double() for name, value in guide().items()}
    late = losses[-NUM_STEPS // 5 :]
    facts = {"elbo": -math.fsum(late) / len(late), "num_steps": NUM_STEPS}
    return model.head_draws(sites, torch.Generator().manual_seed(seed)), facts


SAMPLERS: dict[str, Callable[[HeadProblem, LaplaceFit, int, int], tuple[HeadDraws, dict[str, Any]]]] = {
    "nuts": nuts,
    "autoguide": autoguide,
}


@contextmanager
def _sandbox(seed: int) -> Iterator[None]:
    """A parameter store, a torch generator and a default dtype of one's own."""
    import pyro

    dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope():
        torch.manual_seed(seed)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
