"""The posterior of a head by Pyro: NUTS, and an AutoGuide fitted by SVI.

Both see the same density p(y, θ), in coordinates in which the Laplace approximation is N(0, I): w and η are θ̂ + L z
with L Lᵀ their covariance, and δ_j = τ ζ_j, ζ_j ~ N(0, I), τ ~ HalfNormal(1). σ stays where the evidence put it.
Nothing is left behind: parameters live in a store of their own, random numbers in a fork of torch's generator.
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
        self.problem, self.fit = problem, fit
        d = problem.dim
        kept = torch.cat([torch.arange(d), torch.arange(len(fit.mode) - problem.has_ties, len(fit.mode))])
        self.location = fit.mode[kept]
        self.factor = torch.linalg.cholesky(fit.covariance[kept][:, kept])
        # With it the density of z is p(y, θ) |L|, so that the ELBO bounds the evidence log p(y | σ).
        self.constant = float(self.factor.diagonal().log().sum()) - d * math.log(fit.scales.weights)
        self.constant -= problem.has_ties * math.log(TIE_SCALE)

    def __call__(self) -> None:
        import pyro
        from pyro import distributions as dist

        size, zero = len(self.location), torch.zeros((), dtype=torch.float64)
        z = pyro.sample("z", dist.Normal(zero, zero + 1).expand([size]).to_event(1))
        unit = scale = None
        if self.problem.num_annotators:
            shape = [self.problem.num_annotators, self.problem.dim]
            scale = pyro.sample("annotator_scale", dist.HalfNormal(zero + 1))
            unit = pyro.sample("deviations", dist.Normal(zero, zero + 1).expand(shape).to_event(2))
        weights, deviations, eta = self.parameters(z, unit, scale)
        log_prior = -0.5 * (weights / self.fit.scales.weights).square().sum(-1)
        if eta is not None:
            log_prior = log_prior - 0.5 * (eta / TIE_SCALE) ** 2
        # z has the density N(0, I) already, which is taken away again; factors of 2π are as many in both.
        log_density = self.problem.log_likelihood(weights, deviations, eta) + log_prior + 0.5 * z.square().sum(-1)
        pyro.factor("pairs", log_density + self.constant)

    def parameters(
        self, z: Tensor, unit: Tensor | None, scale: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """w (..., D), δ (..., J, D) and η (...)."""
        theta = self.location + z @ self.factor.T
        deviations = None if unit is None or scale is None else unit * scale[..., None, None]
        return theta[..., : self.problem.dim], deviations, theta[..., -1] if self.problem.has_ties else None

    def head_draws(self, sites: dict[str, Tensor], generator: torch.Generator) -> HeadDraws:
        """Draws of the sites (M, ...), as draws of a head."""
        scale = sites.get("annotator_scale")
        weights, deviations, eta = self.parameters(sites["z"], sites.get("deviations"), scale)
        unknown = None
        if scale is not None:
            unknown = scale[:, None] * torch.randn(weights.shape, dtype=torch.float64, generator=generator)
        return HeadDraws(*(None if one is None else one.detach() for one in (weights, deviations, unknown, eta)))  # type: ignore[arg-type]


def nuts(problem: HeadProblem, fit: LaplaceFit, num_draws: int, seed: int) -> tuple[HeadDraws, dict[str, Any]]:
    """Draws of one chain of the no-U-turn sampler (`hoffman2014`), and what it says of itself.

    Raises
    ------
    ModelError
        Where R̂ of a coordinate is above 1.1: the chain has not reached the posterior.
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
    generator = torch.Generator().manual_seed(seed)
    facts = {"r_hat": r_hat, "n_eff": n_eff, "divergences": divergences, "warmup": warmup}
    return model.head_draws(sites, generator), facts


def autoguide(problem: HeadProblem, fit: LaplaceFit, num_draws: int, seed: int) -> tuple[HeadDraws, dict[str, Any]]:
    """Draws of a Gaussian of full covariance (`AutoMultivariateNormal`) that SVI fits to the posterior."""
    import pyro
    from pyro.infer import SVI, Trace_ELBO
    from pyro.infer.autoguide import AutoMultivariateNormal
    from pyro.infer.autoguide.initialization import init_to_value
    from pyro.optim import ClippedAdam

    model = WhitenedModel(problem, fit)
    start = {"z": torch.zeros_like(model.location)}
    if problem.num_annotators:
        start["annotator_scale"] = torch.tensor(fit.scales.annotators, dtype=torch.float64)
        start["deviations"] = torch.zeros(problem.num_annotators, problem.dim, dtype=torch.float64)
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
