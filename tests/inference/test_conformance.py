"""Every engine on the reference posteriors that it supports: what it guarantees, it keeps."""

import pytest
import torch

from lmppl.inference import (
    AIS,
    ENGINES,
    MCMC,
    PPLM,
    SMC,
    Exact,
    Guarantee,
    Importance,
    Rejection,
    Splitting,
    Tempered,
    TemperedSMC,
)
from lmppl.modeling import BagOfWords
from lmppl.testing import check_engine, references
from lmppl.testing.reference import ReferencePosterior
from tests.models import brute_force, enumerable_lm

# Engines whose runs take many small forwards: a few references here, all of them in tests/statistical.
STEPPING = (SMC, MCMC, Tempered, AIS, TemperedSMC, Splitting)
FEW = ("reward_and_constraint", "two_contexts", "sparse_support")
ENUMERABLE = {r.name for r in references() if r.posterior is not None}
EVERYTHING = {r.name for r in references()}


def network_problem():
    """A network and a factor with a soft form: what an engine needs that follows gradients, and no table has."""
    model = enumerable_lm("llama") * BagOfWords(["a", "b"])
    tables = [brute_force(model, c) for c in range(model.prior.num_contexts)]
    posterior = tuple(
        {
            (f, ids): p
            for (_, f, ids), p in zip(t.sequences.keys(), t.log_posterior.exp().tolist(), strict=True)
            if p > 0
        }
        for t in tables
    )
    log_z = torch.stack([t.log_z for t in tables])
    return ReferencePosterior("network", "a Llama and a bag of words", "1", model, log_z, posterior, {})


def problems_of(kind):
    if kind is PPLM:
        return [network_problem()]
    return [r for r in references() if r.name in FEW] if kind in STEPPING else None


@pytest.fixture(scope="module")
def reports():
    """The report of each engine's check, run once; an engine that fails its check raises here."""
    done = {}

    def report(kind):
        if kind not in done:
            done[kind] = check_engine(kind(), problems=problems_of(kind))
        return done[kind]

    return report


def supported(report):
    return EVERYTHING - {law.split("'")[1] for law in report.skipped if law.startswith("reference ")}


@pytest.mark.parametrize("kind", ENGINES, ids=lambda kind: kind.name)
def test_an_engine_keeps_its_guarantee(kind, reports):
    report = reports(kind)
    assert "equal seeds give equal draws" in report.held
    assert "shards depend on seed and id alone" in report.held
    if kind.guarantee is Guarantee.EXACT:
        assert "draws have the law π*" in report.held
    if kind.guarantee is Guarantee.CONSISTENT:
        assert "expectations are within 4.5 standard errors" in report.held
    assert report.error_rate < 5e-3


def test_the_exact_engine_supports_everything(reports):
    assert supported(reports(Exact)) == EVERYTHING


def test_rejection_supports_what_is_bounded(reports):
    assert supported(reports(Rejection)) == EVERYTHING - {"unbounded_reward"}


def test_importance_supports_everything(reports):
    assert supported(reports(Importance)) == EVERYTHING


@pytest.mark.parametrize("kind", ENGINES, ids=lambda kind: kind.name)
def test_a_refusal_says_why_and_what_to_do(kind, reports):
    reasons = [reason for law, reason in reports(kind).skipped.items() if law.startswith("reference ")]
    assert [r for r in reasons if not r.startswith((kind.name, "exact enumeration"))] == []
    assert [r for r in reasons if ";" not in r] == [], "a reason says how to fix it"
