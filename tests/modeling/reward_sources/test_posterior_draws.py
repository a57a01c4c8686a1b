"""Draws of a posterior over rewards: each a member; with a real posterior of Pyro."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

import lmppl
from lmppl.errors import FactorError, ModelError, ShapeError
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.function_contents import content_digest

LM = TabularLM.random(3, 2, seed=5)
SLOPES, OFFSETS = torch.tensor([[1.0, 2.0], [0.5, -1.0], [0.0, 3.0]]).double(), torch.tensor([0.0, 1.0, -1.0]).double()


def counts(texts: list[str]) -> Tensor:
    return torch.tensor([[t.count("a"), t.count("b")] for t in texts], dtype=torch.float64)


def linear(texts: list[str], slope: Tensor, offset: Tensor) -> Tensor:
    return counts(texts) @ slope + offset


def all_at_once(texts: list[str], slope: Tensor, offset: Tensor) -> Tensor:
    return counts(texts) @ slope.T + offset


def test_each_draw_is_a_member() -> None:
    texts = ["aab", "", "b"]
    wanted = torch.tensor([[4.0, 1.0, 2.0], [0.0, 1.0, -1.0], [2.0, 0.0, 2.0]]).double()
    samples = {"slope": SLOPES, "offset": OFFSETS}
    assert torch.equal(lmppl.PosteriorDraws(linear, samples)(texts), wanted)
    assert torch.equal(lmppl.PosteriorDraws(all_at_once, samples, vectorized=True)(texts), wanted)

    def in_numpy(texts: list[str], slope: Any, offset: Any) -> Any:
        assert isinstance(slope, np.ndarray)
        return counts(texts).numpy() @ slope + offset

    arrays = {"slope": SLOPES.numpy(), "offset": OFFSETS.tolist()}
    assert torch.equal(lmppl.PosteriorDraws(in_numpy, arrays)(texts), wanted)


def test_draws_of_a_posterior_of_pyro() -> None:
    """NUTS on conjugate Bayesian linear regression: the belief has the posterior's mean and spread of r(x)."""
    data = counts(["a", "b", "ab", "aab", "abb", ""])
    y = torch.tensor([1.0, -0.5, 0.4, 1.6, 0.1, 0.2]).double()

    def regression() -> None:
        slope = pyro.sample("slope", dist.Normal(torch.zeros(2).double(), 2.0).to_event(1))
        pyro.sample("y", dist.Normal(data @ slope, 0.5).to_event(1), obs=y)

    pyro.set_rng_seed(0)
    mcmc = MCMC(NUTS(regression), num_samples=160, warmup_steps=50, disable_progbar=True)
    mcmc.run()

    def rewards(texts: list[str], slope: Tensor) -> Tensor:
        return counts(texts) @ slope.T

    source = lmppl.PosteriorDraws(rewards, mcmc.get_samples(), vectorized=True)
    covariance = torch.linalg.inv(data.T @ data / 0.25 + torch.eye(2) / 4)
    x = counts(["ab", "a", "bb"])
    m, s = x @ (covariance @ (data.T @ y / 0.25)), (x @ covariance * x).sum(1).sqrt()
    found = source(["ab", "a", "bb"])
    assert bool(((found.mean(1) - m).abs() < 0.4 * s).all())  # 4.5 standard errors of 125 independent draws
    assert bool(((found.std(1) / s - 1).abs() < 0.35).all())
    model = LM * lmppl.UncertainReward(source, 0.5, lmppl.Robust(2.0))
    assert model.features["rewards"].fn is source
    fit = lmppl.fit_cut_mixture(LM * lmppl.UncertainReward(source, 0.5, lmppl.CutMixture()))
    assert lmppl.infer(fit.model, "exact").log_normalizer[0].value.tolist() == pytest.approx([0.0], abs=1e-10)


def test_contents_and_pickles() -> None:
    source = lmppl.PosteriorDraws(linear, {"slope": SLOPES, "offset": OFFSETS})
    again = pickle.loads(pickle.dumps(source))
    assert torch.equal(source(["ab"]), again(["ab"]))
    other = lmppl.PosteriorDraws(linear, {"slope": 2 * SLOPES, "offset": OFFSETS})
    assert content_digest(source) == content_digest(again) != content_digest(other)


def breaks(texts: list[str], offset: Tensor) -> list[float]:
    return [math.nan if float(offset) > 0.5 else 0.0 for _ in texts]


def raises(texts: list[str], offset: Tensor) -> list[float]:
    return [1.0 / (len(t) != 1) for t in texts]


def raises_at_once(texts: list[str], offset: Tensor) -> Tensor:
    return torch.tensor([1.0 / (t != "a") for t in texts])[:, None] + offset


@pytest.mark.parametrize(
    ("fn", "options", "kind", "told"),
    [
        (breaks, {}, FactorError, "draw 1 returned nan, expected a finite number"),
        (raises, {}, FactorError, "draw 0 raised ZeroDivisionError"),
        (linear, {}, FactorError, "draw 0 raised TypeError: .*missing 1 required positional argument: 'slope'"),
        (raises_at_once, {"vectorized": True}, FactorError, "raised ZeroDivisionError.* on the text 'a'"),
        (raises, {"vectorized": True}, FactorError, "raised ZeroDivisionError|returned list, expected"),
        (lambda texts, offset: torch.zeros(len(texts), 2), {"vectorized": True}, ShapeError, "expected .*, 3\\)"),
    ],
    ids=["nan", "raises", "site", "vectorized raises", "vectorized", "shape"],
)
def test_errors_name_the_factor_and_the_draw(fn: Any, options: Any, kind: type[Exception], told: str) -> None:
    source = lmppl.PosteriorDraws(fn, {"offset": OFFSETS}, **options)
    with pytest.raises(kind, match=f"factor 'r': .*{told}"):
        lmppl.infer(LM * lmppl.UncertainReward(source, 1.0, lmppl.Mean(), name="r"), "exact")


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: lmppl.PosteriorDraws(linear, {}), "got no samples"),
        (lambda: lmppl.PosteriorDraws(linear, {"slope": SLOPES[:1]}), r"got 1 draw\(s\)"),
        (lambda: lmppl.PosteriorDraws(linear, {"slope": SLOPES, "offset": OFFSETS[:2]}), "'slope': 3, 'offset': 2"),
        (lambda: lmppl.PosteriorDraws(linear, {"slope": 1.0}), "got 0 draw"),
        (lambda: lmppl.PosteriorDraws(3, {"slope": SLOPES}), "got int, expected a function"),  # type: ignore[arg-type]
    ],
    ids=["none", "one", "lengths", "number", "function"],
)
def test_wrong_draws(build: Any, told: str) -> None:
    with pytest.raises(ModelError, match=told):
        build()
