"""NUTS and the AutoGuide: nothing is left behind, and both are the posterior within their errors."""

from __future__ import annotations

import math
import random

import numpy as np
import pyro
import pytest
import torch
from torch.distributions import Normal

import lmppl
from lmppl.modeling.evidence.preference import sampling
from lmppl.modeling.evidence.preference.heads import Scales
from lmppl.modeling.evidence.preference.laplace import laplace
from tests.modeling.preference.cases import f64, problem, world


@pytest.mark.parametrize("posterior", ["nuts", "autoguide"])
def test_a_fit_leaves_no_trace(posterior: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's parameters, generators and default dtype stay."""
    monkeypatch.setattr(sampling, "NUM_STEPS", 30)
    pyro.param("mine", torch.tensor(3.0))
    torch.manual_seed(11)
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), torch.get_default_dtype())  # noqa: NPY002
    one = world(1)
    options = {"posterior": posterior, "prior_scale": 0.5, "num_draws": 100}
    first = lmppl.BayesianRewardModel.fit(one.pairs(30, 0), one.features, **options)
    after = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), torch.get_default_dtype())  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert float(pyro.param("mine").detach()) == 3.0
    pyro.clear_param_store()
    assert first.posterior.belief(torch.zeros(2, 1, dtype=torch.float64)).shape == (2, 100)


def test_the_population_is_integrated_out_exactly() -> None:
    """p(h | τ) p(w | h, τ) = p(w) Π p(h_j | w, τ); and draws of w given h and τ have the moments of that law."""
    one = problem(count=80, dim=2, annotators=5, ties=True)
    fit = laplace(one, Scales(0.7, 0.4))
    model = sampling.WhitenedModel(one, fit)
    generator = torch.Generator().manual_seed(2)
    heads = torch.randn(5, 2, dtype=torch.float64, generator=generator)
    w, tau, sigma = torch.randn(2, dtype=torch.float64, generator=generator), f64(0.4), f64(0.7)
    joint = Normal(0.0 * sigma, sigma).log_prob(w).sum() + Normal(w, tau).log_prob(heads).sum()
    variance = 1 / (sigma**-2 + 5 * tau**-2)
    given = Normal(variance * heads.sum(0) / tau**2, variance.sqrt()).log_prob(w).sum()
    found = model.log_prior(heads, tau) - 5 * math.log(2 * math.pi)
    assert float(found) == pytest.approx(float(joint - given), abs=1e-10)
    z = torch.zeros(20000, 11, dtype=torch.float64)
    drawn = model.head_draws({"z": z, "annotator_scale": tau.expand(20000)}, generator)
    assert drawn.deviations is not None
    mode = fit.mode[:2] + fit.mode[2:12].view(5, 2)
    assert float((drawn.weights[:, None] + drawn.deviations - mode).abs().max()) < 1e-12
    wanted = variance * mode.sum(0) / tau**2
    assert float(((drawn.weights.mean(0) - wanted) / (variance / 20000).sqrt()).abs().max()) < 4
    assert float((drawn.weights.std(0) / variance.sqrt() - 1).abs().max()) < 0.03


def test_the_density_that_pyro_sees_is_the_joint() -> None:
    """log p(y, θ) in whitened coordinates: with |L|, and with nothing left of the N(0, I) that z has of its own."""
    one = problem(count=60, dim=2, ties=True)
    fit = laplace(one, Scales(0.7, 1.0))
    model = sampling.WhitenedModel(one, fit)
    z = torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    trace = pyro.poutine.trace(pyro.poutine.condition(model, {"z": z})).get_trace()
    theta = fit.mode + model.factor @ z
    wanted = one.log_joint(theta, fit.scales) + torch.logdet(model.factor)
    assert float(trace.log_prob_sum()) == pytest.approx(float(wanted), abs=1e-10)
