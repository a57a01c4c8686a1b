"""NUTS and the AutoGuide: nothing is left behind, and both are the posterior within their errors."""

from __future__ import annotations

import random

import numpy as np
import pyro
import pytest
import torch

import lmppl
from lmppl.modeling.evidence.preference import sampling
from tests.modeling.preference.cases import world


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
