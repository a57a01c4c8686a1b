"""The lines of a run's figures: what they read, and that nothing is shown where nothing is known."""

import json
import math

import pytest
import torch

from lmppl.cli.findings import LABELS, READERS, findings, plain_info
from lmppl.inference import ENGINES, PPLM, BestOfN, Engine, Greedy, QuasiRejection, WeightedDecoding, infer
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
    assert found["sweeps"].startswith("8 a context, log Ẑ of each from ")
    assert found["sweeps"].count("from") == 2
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


def test_the_spread_of_sweeps_is_that_of_one_context() -> None:
    """A range over contexts would be read as a huge spread."""
    log_z = torch.tensor([[1.0, 1.1], [5.0, 5.3]])
    assert dict(findings({"log_z_sweeps": log_z}))["sweeps"] == (
        "2 a context, log Ẑ of each from 1.00 to 1.10; from 5.00 to 5.30"
    )
    assert dict(findings({"log_z_sweeps": log_z[:1]}))["sweeps"] == "2, log Ẑ of each from 1.00 to 1.10"
    assert "to" not in dict(findings({"log_z_sweeps": log_z[:, :1]}))["sweeps"].split()
    many = torch.stack([torch.tensor([0.0, 0.1 * c]) for c in range(6)])
    many[3, 0] = -math.inf
    text = dict(findings({"log_z_sweeps": many, "zero_sweeps": torch.tensor([0, 0, 0, 1, 0, 0])}))["sweeps"]
    assert text == "2 a context, log Ẑ of each from -inf to 0.30 where they differ most; 1 found nothing with γ > 0"


def test_no_certificate_says_why_and_a_vacuous_one_says_so() -> None:
    unbounded = enumerable_lm("tabular") * Reward(wavy, beta=0.4, name="wavy")
    found = dict(findings(infer(unbounded, MCMC(4, num_steps=4, kernel=Restart()), seed=1).info))
    assert found["TV at most"].startswith("no certificate: factor 'wavy' declares no bound")
    text = dict(findings({"certificate": torch.tensor([0.01, 1.0])}))["TV at most"]
    assert text == "0.01, 1 (1: nothing is certain yet; take more steps)"


def test_heuristics_say_what_they_left_out() -> None:
    model = enumerable_lm("tabular") * Reward(wavy, beta=0.4, upper=1.0, name="wavy")
    clean = model * Constraint(has_no("bb"), name="no bb", prefix_closed=True)
    found = dict(findings(infer(clean, WeightedDecoding(), 20, seed=1).info))
    assert found["not decoded"] == "wavy: the draws were made without a look at it"
    assert "violating" not in found
    assert dict(findings(infer(clean, Greedy()).info))["searched by"] == "the prior's probability · no bb"
    assert dict(findings(infer(model, Greedy()).info))["searched by"] == "the prior's probability"
    blind = dict(findings(infer(model * Constraint(has_no("b"), name="no b"), BestOfN(1), 40, seed=1).info))
    assert float(blind["violating"].split()[0]) > 0


def test_a_constraint_that_always_holds_is_not_the_worst_scalar() -> None:
    model = enumerable_lm("tabular") * Constraint(has_no("b"), name="no_b") * Reward(wavy, beta=0.4)
    found = dict(findings(infer(model, MCMC(16, num_steps=8), seed=1).info))
    assert "no_b" not in found["worst R̂"]
    assert math.isfinite(float(found["worst R̂"].split()[0]))
    assert "no_b" not in found["lowest bulk ESS"]


def test_quasi_rejection_shows_its_distance() -> None:
    found = shown(QuasiRejection())
    assert set(found) >= {"acceptance", "TV measured", "TV at most"}
    assert found["TV measured"].count("±") == 2


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
