"""The lines of a run's figures: what they read, and that nothing is shown where nothing is known."""

import json
import math

import pytest
import torch

from lmppl.cli.findings import LABELS, READERS, findings, plain_info
from lmppl.inference import ENGINES, PPLM, Engine, QuasiRejection, WeightedDecoding, infer
from lmppl.inference.mcmc import MCMC, Restart
from lmppl.inference.smc import SMC
from lmppl.modeling.evidence import Automaton, BagOfWords
from lmppl.modeling.evidence.constraint import Constraint
from lmppl.modeling.evidence.reward import Reward
from lmppl.modeling.model import Model
from tests.models import enumerable_lm, has_no, wavy


def shown(engine: Engine) -> dict[str, str]:
    model = enumerable_lm("tabular") * Reward(wavy, beta=0.4, upper=1.0)
    return dict(findings(infer(model, engine, 256, seed=1).info))


def test_every_reader_has_a_label() -> None:
    assert set(READERS) == set(LABELS)


def test_sweeps_show_their_spread_and_their_ancestors() -> None:
    found = shown(SMC(32))
    assert found["sweeps"].startswith("8, log Ẑ of each from ")
    assert 1 <= float(found["lowest ESS"]) <= 32
    low = int(found["ancestors left"].split(" to ")[0])
    assert 1 <= low <= 32


def test_chains_show_agreement_acceptance_and_certificate() -> None:
    found = shown(MCMC(16, kernel=Restart()))
    assert float(found["worst R̂"].split()[0]) > 0.9
    assert found["accepted"].startswith("restart ")
    bounds = [float(x) for x in found["TV at most"].split(", ")]
    assert len(bounds) == 2
    assert all(0 <= b <= 1 for b in bounds)


def test_a_constraint_that_always_holds_is_not_the_worst_scalar() -> None:
    model = enumerable_lm("tabular") * Constraint(has_no("b"), name="no_b") * Reward(wavy, beta=0.4)
    found = dict(findings(infer(model, MCMC(16, num_steps=8), seed=1).info))
    assert "no_b" not in found["worst R̂"]
    assert math.isfinite(float(found["worst R̂"].split()[0]))
    assert "no_b" not in found["lowest bulk ESS"]


def test_quasi_rejection_shows_its_distance() -> None:
    found = shown(QuasiRejection())
    assert set(found) >= {"acceptance", "TV at most"}


def test_nothing_is_shown_where_nothing_is_known() -> None:
    assert dict(findings({"khat": torch.tensor([math.nan]), "stuck": {}, "something": 3})) == {}


def model_for(kind: type[Engine]) -> Model:
    """What the engine can run on: a reward, or what it needs beside."""
    if kind is PPLM:
        return enumerable_lm("llama") * BagOfWords(["a", "b"])
    if kind is WeightedDecoding:
        return enumerable_lm("tabular") * Constraint(Automaton.avoiding("b"))
    return enumerable_lm("tabular") * Reward(wavy, beta=0.4, upper=1.0)


@pytest.mark.parametrize("kind", ENGINES, ids=lambda kind: kind.name)
def test_info_of_every_engine_is_plain_for_programs(kind: type[Engine]) -> None:
    info = infer(model_for(kind), kind(), 64, seed=1).info
    assert json.loads(json.dumps(plain_info(info), allow_nan=False)).keys() == info.keys()
