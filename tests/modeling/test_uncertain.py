"""Uncertain rewards as factors: on enumerable models, centred over the prior, gated, estimated; and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lmppl
from lmppl.errors import FactorError, ModelError, ShapeError
from lmppl.lm.base import LanguageModel
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence.attitudes import Attitude
from lmppl.modeling.target import Target
from tests.models import TOLERANCE, all_outcomes, brute_force, enumerable_models, wavy

ATTITUDES = {
    "mean": lmppl.Mean(),
    "marginal": lmppl.Marginal(),
    "robust": lmppl.Robust(0.8),
    "lower_bound": lmppl.LowerBound(1.0),
    "quantile": lmppl.Quantile(0.25),
    "moderated": lmppl.Moderated(),
}
BETA = 0.6
LMS = pytest.mark.parametrize(
    "lm", [lm for _, lm in enumerable_models()], ids=[name for name, _ in enumerable_models()]
)


def members(texts: list[str]) -> list[list[float]]:
    """Three members that disagree more about long texts, each with a constant of its own."""
    return [[w, w * (1 + 0.4 * len(t)) + 5.0, len(t) - w - 3.0] for t, w in zip(texts, wavy(texts), strict=True)]


def f64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def moments(texts: list[str]) -> tuple[list[float], Tensor]:
    return wavy(texts), f64([0.2 + 0.3 * len(t) for t in texts])


def law(texts: list[str]) -> torch.distributions.Distribution:
    return torch.distributions.Normal(f64(wavy(texts)), moments(texts)[1])


def by_hand(attitude: str, rewards: Tensor) -> Tensor:
    """log φ of members (S, M), written out."""
    r = rewards / BETA
    return {
        "mean": r.mean(1),
        "marginal": r.exp().mean(1).log(),
        "robust": -0.8 * (-r / 0.8).exp().mean(1).log(),
        "lower_bound": r.mean(1) - r.std(1),
        "quantile": r.quantile(0.25, dim=1),
        "moderated": torch.sigmoid(r).mean(1).log(),
    }[attitude]


@LMS
@pytest.mark.parametrize("attitude", list(ATTITUDES))
def test_the_posterior_is_the_attitudes(lm: LanguageModel, attitude: str) -> None:
    """π* of every outcome and Z of the exact engine, against log φ written out by hand."""
    model = lm * lmppl.UncertainReward(members, BETA, ATTITUDES[attitude])
    exact = lmppl.infer(model, lmppl.Exact())
    for context in range(lm.num_contexts):
        outcomes = all_outcomes(lm, context)
        log_phi = by_hand(attitude, f64(members(list(outcomes.text))))
        log_prior = Target(model).log_prior(outcomes).double()
        log_z = (log_prior + log_phi).logsumexp(0)
        assert float(exact.log_normalizer[0].value[context]) == pytest.approx(float(log_z), abs=TOLERANCE)
        brute = brute_force(model, context)
        assert float((brute.log_phi - log_phi).abs().max()) < TOLERANCE


@LMS
@pytest.mark.parametrize("attitude", list(ATTITUDES))
def test_members_are_centred_over_draws_of_the_prior(lm: LanguageModel, attitude: str) -> None:
    """Per member and context, and over fixed draws: log φ of a text is the same in any batch."""
    model = lm * lmppl.UncertainReward(members, BETA, ATTITUDES[attitude], num_references=16)
    references = lm.draw(16, generator=torch.Generator().manual_seed(0))
    for context in range(lm.num_contexts):
        outcomes = all_outcomes(lm, context)
        own = [t for t, c in zip(references.text, references.context.tolist(), strict=True) if c == context]
        centre = f64(members(own)).mean(0)
        wanted = by_hand(attitude, f64(members(list(outcomes.text))) - centre)
        (found,) = Target(model).log_factors(outcomes).values()
        assert float((found - wanted).abs().max()) < TOLERANCE
        alone = torch.cat([Target(model).log_factors(outcomes.select([i]))[model.factors[0].name] for i in (0, 3)])
        assert float((alone - found[[0, 3]]).abs().max()) < 1e-13


@LMS
def test_a_members_constant_counts_until_it_is_centred(lm: LanguageModel) -> None:
    """Mutant: members that are not centred; the posterior then depends on constants that mean nothing."""

    def shifted(texts: list[str]) -> Tensor:
        return f64(members(texts)) + f64([0.0, -7.0, 4.0])

    def laws(num_references: int | None) -> list[Tensor]:
        models = [
            lm * lmppl.UncertainReward(fn, BETA, lmppl.Robust(0.8), num_references=num_references)
            for fn in (members, shifted)
        ]
        return [brute_force(model, 1).log_posterior for model in models]

    centred, raw = laws(16), laws(None)
    possible = centred[0] > -math.inf
    assert float((centred[0] - centred[1])[possible].abs().max()) < TOLERANCE
    assert float((raw[0] - raw[1])[possible].abs().max()) > 0.1


def test_gaussians_and_laws_are_centred_by_their_means() -> None:
    lm = TabularLM.random(4, 3, seed=3, context=["", "ab"])
    outcomes = all_outcomes(lm, 1)
    references = lm.draw(8, generator=torch.Generator().manual_seed(0))
    own = [t for t, c in zip(references.text, references.context.tolist(), strict=True) if c == 1]
    shift = sum(wavy(own)) / len(own) / BETA
    for fn in (moments, law):
        (raw,) = Target(lm * lmppl.UncertainReward(fn, BETA, lmppl.Robust(2.0))).log_factors(outcomes).values()
        factor = lmppl.UncertainReward(fn, BETA, lmppl.Robust(2.0), num_references=8)
        (centred,) = Target(lm * factor).log_factors(outcomes).values()
        assert float((raw - shift - centred).abs().max()) < TOLERANCE


def test_centres_follow_the_prior() -> None:
    """Another prior, or other contexts, have references of their own."""
    lm = TabularLM.random(4, 3, seed=3, context="")
    factor = lmppl.UncertainReward(members, BETA, lmppl.Robust(2.0), num_references=8)
    first, second = lm * factor, TabularLM.random(4, 3, seed=4, context="") * factor
    outcomes = all_outcomes(lm, 0)
    values = [Target(model).log_factors(outcomes)["members"] for model in (first, second, first | ["", ""])]
    assert float((values[0] - values[1]).abs().max()) > 1e-3
    assert float((values[0] - values[2]).abs().max()) > 1e-3


def test_means_and_standard_deviations_are_a_gaussian() -> None:
    lm = TabularLM.random(4, 3, seed=3)
    outcomes = all_outcomes(lm, 0)
    for attitude in ATTITUDES.values():
        pair, normal = (lm * lmppl.UncertainReward(fn, BETA, attitude) for fn in (moments, law))
        one, other = (Target(model).log_factors(outcomes).values() for model in (pair, normal))
        assert float((next(iter(one)) - next(iter(other))).abs().max()) < TOLERANCE


def test_raw_features_are_mean_spread_and_log_factor() -> None:
    lm = TabularLM.random(4, 3, seed=3)
    found = lmppl.infer(lm * lmppl.UncertainReward(members, BETA, lmppl.Robust(2.0)), lmppl.Importance(64), seed=0)
    rewards = f64(members(list(found.draws.text)))
    wanted = torch.stack([rewards.mean(1), rewards.std(1), found.draws.log_factors["members"]], 1)
    assert float((found.draws.features["members"] - wanted).abs().max()) < TOLERANCE


def test_a_gate_excludes_what_is_not_known_and_asks_once() -> None:
    """s(x) ≤ limit, by the same calls as the reward."""
    calls: list[str] = []

    def counted(texts: list[str]) -> list[list[float]]:
        calls.extend(texts)
        return members(texts)

    lm = TabularLM.random(4, 3, seed=3)
    reward = lmppl.UncertainReward(counted, BETA, lmppl.Robust(0.8))
    for references in (None, 8):
        reward = lmppl.UncertainReward(counted, BETA, lmppl.Robust(0.8), num_references=references)
        model = lm * reward * reward.gate(2.5)
        outcomes = all_outcomes(lm, 0)
        target = Target(model)
        target.log_factors(outcomes)
        calls.clear()
        target = Target(model)
        log_factors = target.log_factors(outcomes)
        assert len(calls) == len(set(outcomes.text)) if references is None else len(calls) == len(set(outcomes.keys()))
        spread = target.features(outcomes)["counted"][:, 1]
        assert torch.equal(log_factors["counted_known"] == -math.inf, spread > 2.5)
        assert 0 < int((spread > 2.5).sum()) < len(spread)


def test_fresh_samples_are_estimates() -> None:
    """The pseudo-marginal chain on samples of r has `Marginal`'s posterior; others are refused."""
    lm = TabularLM.random(3, 2, seed=5)
    noise = torch.Generator().manual_seed(1)

    def samples(texts: list[str]) -> Tensor:
        return f64(wavy(texts))[:, None] + 0.5 * torch.randn(len(texts), 2, generator=noise)

    factor = lmppl.UncertainReward(samples, 1.0, lmppl.Marginal(), stochastic=True)
    found = lmppl.infer(lm * factor, lmppl.MCMC(num_chains=64, num_steps=400, warmup=50), seed=1)
    right = lmppl.infer(lm * lmppl.Reward(wavy), lmppl.Exact())  # Gaussian noise: e^{s²/2} everywhere
    for text in set(right.draws.text):
        wanted, share = (
            one.expectation(lambda texts, text=text: [float(t == text) for t in texts]) for one in (right, found)
        )
        assert abs(float(share.value - wanted.value)) < 5 * float(share.standard_error)
    with pytest.raises(ModelError, match="stochastic=True with Robust"):
        lmppl.UncertainReward(samples, 1.0, lmppl.Robust(1.0), stochastic=True)


def test_bounds_enable_rejection() -> None:
    lm = TabularLM.random(3, 2, seed=5)
    model = lm * lmppl.UncertainReward(members, 1.0, lmppl.Moderated())
    assert len(lmppl.infer(model, lmppl.Rejection(32), seed=0).draws) == 32
    with pytest.raises(FactorError, match=r"above .* which the declared upper=0 allows"):
        lmppl.infer(lm * lmppl.UncertainReward(members, 1.0, lmppl.Mean(), upper=0.0), lmppl.Rejection(32), seed=0)


def test_the_declaration_round_trips() -> None:
    lm = TabularLM.random(3, 2, seed=5)
    reward = lmppl.UncertainReward(members, 0.5, lmppl.Robust(2.0), num_references=8)
    model = lm * reward * reward.gate(2.0)
    again = model.graph.from_dict(model.graph.to_dict()).to_model(lm, {"members": members})
    assert again.graph.content_hash() == model.graph.content_hash()
    outcomes = all_outcomes(lm, 0)
    for one, other in zip(
        Target(model).log_factors(outcomes).values(), Target(again).log_factors(outcomes).values(), strict=True
    ):
        assert torch.equal(one, other)
    others = [
        lm * lmppl.UncertainReward(members, 0.5, lmppl.Robust(2.0)),
        lm * lmppl.UncertainReward(members, 0.5, lmppl.Robust(3.0)),
        lm * lmppl.UncertainReward(members, 0.5, lmppl.Mean()),
    ]
    assert len({m.spec_hash for m in others}) == 3
    before = others[0].spec_hash
    lmppl.infer(others[0], lmppl.Importance(8), seed=0)
    assert others[0].spec_hash == before


def test_the_hash_of_centred_members_does_not_change_by_use() -> None:
    model = TabularLM.random(3, 2, seed=5) * lmppl.UncertainReward(members, 0.5, num_references=8)
    before = model.spec_hash
    lmppl.infer(model, lmppl.Importance(8), seed=0)
    assert model.spec_hash == before


def returning(value: Callable[[int], Any]) -> Callable[[list[str]], Any]:
    def belief(texts: list[str]) -> Any:
        return value(len(texts))

    return belief


Normal = torch.distributions.Normal
BAD: dict[str, tuple[Callable[[int], Any], type[Exception], str]] = {
    "one number a text": (lambda n: [0.5] * n, ShapeError, "a reward without uncertainty is a Reward"),
    "an ensemble of one": (lambda n: torch.zeros(n, 1), ShapeError, "an ensemble of one, which has no spread"),
    "lists of one": (lambda n: [[0.1]] * n, ShapeError, "an ensemble of one, which has no spread"),
    "nan": (lambda n: [[0.1, math.nan]] * n, FactorError, "returned nan, expected a finite number, for the text"),
    "-inf": (lambda n: [[0.1, -math.inf]] * n, FactorError, "returned -inf, expected a finite number"),
    "too few rows": (lambda n: [[0.1, 0.2]] * (n - 1), ShapeError, "got shape"),
    "negative spread": (lambda n: ([0.1] * n, [-0.5] * n), FactorError, "standard deviation -0.5, expected one that"),
    "three moments": (lambda n: ([0.1] * n,) * 3, ShapeError, "a tuple of 3, expected two"),
    "moments of two": (lambda n: (torch.zeros(n, 2), torch.zeros(n, 2)), ShapeError, "returned means of shape"),
    "a law for all": (lambda n: Normal(0.0, 1.0), ShapeError, r"of batch shape \(\) and event shape \(\), expected"),
    "labels": (lambda n: ["good"] * n, FactorError, "expected a number"),
    "infinite evidence": (
        lambda n: torch.distributions.StudentT(torch.full((n,), 3.0)), FactorError, "left tail is too heavy",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BAD))
def test_what_is_no_belief_is_told(name: str) -> None:
    value, kind, told = BAD[name]
    model = TabularLM.random(3, 2, seed=5) * lmppl.UncertainReward(returning(value), 1.0, lmppl.Robust(1.0), name="r")
    with pytest.raises(kind, match=told) as caught:
        lmppl.infer(model, lmppl.Importance(16), seed=0)
    assert str(caught.value).startswith("factor 'r': belief")


HEAVY: dict[str, tuple[Attitude, Callable[[int], Any], str]] = {
    "student, marginal": (
        lmppl.Marginal(),
        lambda n: torch.distributions.StudentT(torch.full((n,), 3.0)),
        r"E\[exp\(r/β\)\] is infinite at beta=0.5 \(the reward's right tail is too heavy\) for the text '.*'; raise",
    ),
    "log-normal, marginal": (
        lmppl.Marginal(),
        lambda n: torch.distributions.LogNormal(torch.zeros(n), torch.ones(n)),
        "the reward's right tail is too heavy",
    ),
    "gamma, marginal": (  # finite for β > 1, infinite below
        lmppl.Marginal(),
        lambda n: torch.distributions.Gamma(torch.ones(n), torch.ones(n)),
        "right tail is too heavy.*raise beta, or choose Mean",
    ),
    "student, robust": (
        lmppl.Robust(1.0),
        lambda n: torch.distributions.StudentT(torch.full((n,), 3.0)),
        "left tail is too heavy.*raise kappa",
    ),
}


@pytest.mark.parametrize("name", list(HEAVY))
@pytest.mark.parametrize("engine", ["exact", "importance", "mcmc"])
def test_infinite_evidence_is_one_error_of_the_factor(name: str, engine: str) -> None:
    """A reward posterior with infinite marginal evidence: by every engine the same sentence, which names the factor."""
    attitude, value, told = HEAVY[name]
    model = TabularLM.random(3, 2, seed=5) * lmppl.UncertainReward(returning(value), 0.5, attitude, name="r")
    with pytest.raises(FactorError, match=f"^factor 'r': belief: .*{told}"):
        lmppl.infer(model, engine)


@pytest.mark.parametrize("engine", ["exact", "importance", "mcmc"])
def test_an_ensemble_of_one_is_one_error_of_the_factor(engine: str) -> None:
    for value in (lambda n: torch.zeros(n, 1), lambda n: [[0.5]] * n):
        model = TabularLM.random(3, 2, seed=5) * lmppl.UncertainReward(returning(value), 1.0, lmppl.Mean(), name="r")
        with pytest.raises(ShapeError, match=r"^factor 'r': belief returned an ensemble of one.*declare it as Reward"):
            lmppl.infer(model, engine)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"beta": 0.0}, "beta=0.0"),
        ({"attitude": lmppl.Robust}, r"write Robust\(\.\.\.\)"),
        ({"attitude": "robust"}, "got attitude='robust'"),
        ({"num_references": 0}, "num_references=0"),
        ({"num_references": 8, "upper": 1.0}, "centring moves the reward"),
        ({"num_references": 8, "attitude": lmppl.Marginal(), "stochastic": True}, "no members"),
        ({"upper": -math.inf}, "upper=-inf"),
    ],
    ids=["beta", "class", "text", "no references", "bound", "estimates", "upper"],
)
def test_wrong_declarations(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ModelError, match=told):
        lmppl.UncertainReward(members, **options)


def test_repeated_texts_are_no_calls() -> None:
    calls: list[str] = []

    def counted(texts: list[str]) -> list[list[float]]:
        calls.extend(texts)
        return members(texts)

    model = TabularLM.random(3, 2, seed=5) * lmppl.UncertainReward(counted, 1.0, lmppl.Robust(1.0))
    found = lmppl.infer(model, lmppl.MCMC(num_chains=8, num_steps=50, warmup=0), seed=0)
    assert len(calls) == len(set(calls)) == found.cost.factor_calls
    assert found.cost.cache_hits > 300
