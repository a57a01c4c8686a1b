"""A Bayesian reward model as evidence: its belief, its centring, the exact posterior it declares, round trips."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import lmppl
from lmppl import BayesianRewardModel, PreferenceDistribution
from lmppl.errors import ModelError
from lmppl.lm.base import LanguageModel
from lmppl.modeling.evidence.beliefs import Gaussian
from lmppl.modeling.evidence.preference.head_belief import HeadBelief
from lmppl.modeling.evidence.preference.posteriors import DrawnHead
from lmppl.modeling.graph import FactorGraph
from lmppl.modeling.target import Target
from lmppl.testing import check_factor
from tests.modeling.preference.cases import f64, world
from tests.models import TOLERANCE, all_outcomes, brute_force, enumerable_models

LMS = pytest.mark.parametrize(
    "lm", [lm for _, lm in enumerable_models()], ids=[name for name, _ in enumerable_models()]
)
TEXTS = ["a", "b", "ab", "ba", "aab", "bba", "abab", "bbbb", "aaaa", "", "abc", "c"]
PAIRS = [(TEXTS[i], TEXTS[(i * 5 + 3) % 12]) for i in range(12) if i != (i * 5 + 3) % 12] + [("ab", "ba"), ("aab", "b")]
BETA = 0.7
REFERENCES = 16


def counts(texts: list[str]) -> Tensor:
    return f64([[t.count("a"), t.count("b"), len(t) + 0.3 * t.count("ab")] for t in texts])


def fitted(**options: Any) -> BayesianRewardModel:
    return BayesianRewardModel.fit(PAIRS, counts, **{"prior_scale": 0.8, "beta": BETA} | options)


def drawn(model: BayesianRewardModel, count: int = 7) -> HeadBelief:
    """The same head known by draws of its Gaussian."""
    head = DrawnHead(model.posterior.draws(count, torch.Generator().manual_seed(5)), 0.0)
    return HeadBelief(model.belief.features, head)


def scaled(texts: list[str]) -> Tensor:
    """Standardised features, written out."""
    training = counts([t for pair in zip(*PAIRS, strict=True) for t in pair])
    return (counts(texts) - training.mean(0)) / training.std(0)


def by_hand(features: Tensor, model: BayesianRewardModel, kappa: float) -> Tensor:
    """log φ of `Robust(κ)`: m/β − s²/2κβ², with s² = fᵀ H⁻¹ f."""
    mean = features @ model.posterior.mean
    variance = torch.einsum("bd,de,be->b", features, model.posterior.covariance, features)
    return mean / BETA - variance / (2 * kappa * BETA**2)


def test_the_belief_is_the_laplace_posterior() -> None:
    """m = ŵᵀf and s² = fᵀH⁻¹f, with ŵ and H of the problem written out."""
    model = fitted()
    chosen, rejected = zip(*PAIRS, strict=True)
    delta = scaled(list(chosen)) - scaled(list(rejected))
    w = model.posterior.mean
    p = torch.sigmoid(delta @ w)
    assert float((delta.T @ (1 - p) - w / 0.64).abs().max()) < 1e-8  # the gradient at ŵ
    hessian = (delta * (p * (1 - p))[:, None]).T @ delta + torch.eye(3, dtype=torch.float64) / 0.64
    assert float((model.posterior.covariance - torch.linalg.inv(hessian)).abs().max()) < 1e-10
    means, spreads = model.belief(TEXTS)
    assert float((means - scaled(TEXTS) @ w).abs().max()) < 1e-10
    wanted = torch.einsum("bd,de,be->b", scaled(TEXTS), torch.linalg.inv(hessian), scaled(TEXTS)).sqrt()
    assert float((spreads - wanted).abs().max()) < 1e-10


@LMS
@pytest.mark.parametrize("on", ["text", "full"])
def test_the_posterior_over_texts_is_exact(lm: LanguageModel, on: str) -> None:
    model = fitted(attitude=lmppl.Robust(0.8), on=on, num_references=0)
    for context in range(lm.num_contexts):
        outcomes = all_outcomes(lm, context)
        texts = list(outcomes.text if on == "text" else outcomes.full_text)
        brute = brute_force(lm * model, context)
        assert float((brute.log_phi - by_hand(scaled(texts), model, 0.8)).abs().max()) < TOLERANCE
        exact = lmppl.infer(lm * model, lmppl.Exact())
        assert float(exact.log_normalizer[0].value[context]) == pytest.approx(float(brute.log_z), abs=TOLERANCE)


def centred_features(lm: LanguageModel, context: int, texts: list[str]) -> Tensor:
    references = lm.draw(REFERENCES, generator=torch.Generator().manual_seed(0))
    own = [t for t, c in zip(references.text, references.context.tolist(), strict=True) if c == context]
    return scaled(texts) - scaled(own).mean(0)


@LMS
def test_centring_moves_the_spread_too(lm: LanguageModel) -> None:
    """s² = (f − f̄)ᵀΣ(f − f̄); the mutant, which shifts the mean alone, declares another posterior."""
    model = fitted(attitude=lmppl.Robust(0.8), num_references=REFERENCES)
    for context in range(lm.num_contexts):
        texts = list(all_outcomes(lm, context).text)
        features = centred_features(lm, context, texts)
        found = brute_force(lm * model, context).log_phi
        assert float((found - by_hand(features, model, 0.8)).abs().max()) < TOLERANCE
        means, spreads = model.belief(texts)
        shift = means - features @ model.posterior.mean
        mutant = lmppl.Robust(0.8).log_factor(Gaussian(means - shift, spreads), BETA)
        assert float((found - mutant).std()) > 0.05


@LMS
def test_a_constant_of_every_head_is_lost(lm: LanguageModel) -> None:
    """Features shifted by a constant change no choice: log φ stays, and does not where nothing is centred."""
    shifted = [
        BayesianRewardModel.fit(PAIRS, counts, prior_scale=0.8, attitude=lmppl.Robust(0.8), num_references=n)
        for n in (REFERENCES, 0)
    ]
    moved = []
    for model in shifted:
        features = copy.copy(model.belief.features)
        object.__setattr__(features, "centre", features.centre + 1.7)
        belief = HeadBelief(features, model.posterior)
        moved.append(
            BayesianRewardModel(belief, attitude=lmppl.Robust(0.8), num_references=model.num_references, name="moved")
        )
    laws = [brute_force(lm * one, 1).log_posterior for one in (*shifted, *moved)]
    possible = laws[0] > -math.inf
    assert float((laws[0] - laws[2])[possible].abs().max()) < TOLERANCE
    assert float((laws[1] - laws[3])[possible].abs().max()) > 0.01


@LMS
def test_members_are_centred_as_any_ensemble_is(lm: LanguageModel) -> None:
    """Draws of the head, centred by features, against the same members given to `UncertainReward`."""
    belief = drawn(fitted())
    ours = BayesianRewardModel(belief, BETA, lmppl.Robust(0.8), num_references=REFERENCES)
    theirs = lmppl.UncertainReward(belief, BETA, lmppl.Robust(0.8), num_references=REFERENCES)
    for context in range(lm.num_contexts):
        gap = brute_force(lm * ours, context).log_phi - brute_force(lm * theirs, context).log_phi
        assert float(gap.abs().max()) < TOLERANCE


def test_a_gate_knows_the_centred_spread() -> None:
    lm = lmppl.TabularLM.random(4, 3, order=1, seed=3, context=["", "ab"])
    model = fitted(num_references=REFERENCES)
    texts = list(all_outcomes(lm, 1).text)
    features = centred_features(lm, 1, texts)
    spread = torch.einsum("bd,de,be->b", features, model.posterior.covariance, features).sqrt()
    limit = float(spread.median()) + 1e-6
    target = Target(lm * model * model.gate(limit))
    found = target.log_factors(all_outcomes(lm, 1))[f"{model.name}_known"]
    assert (found == 0).tolist() == (spread <= limit).tolist()
    assert len(target.model.features) == 1  # the function is shared
    raw = model.belief(texts)[1]
    assert (raw <= limit).tolist() != (spread <= limit).tolist()


@pytest.mark.parametrize("kind", ["laplace", "draws", "annotators", "normal", "categorical"])
@pytest.mark.parametrize("references", [0, REFERENCES])
def test_a_declaration_comes_back_from_json(kind: str, references: int | None) -> None:
    lm = lmppl.TabularLM.random(4, 3, order=1, seed=3, context=["", "ab"])
    attitude = lmppl.Quantile(0.2)
    factor: lmppl.UncertainReward
    if kind in ("normal", "categorical"):
        options: Any = {"kind": kind, "attitude": attitude, "num_references": references, "name": "p"}
        factor = PreferenceDistribution.fit(PAIRS, counts, **options)
    elif kind == "annotators":
        named = [lmppl.Preference(*p, annotator="xyz"[i % 3], tie=i == 2) for i, p in enumerate(PAIRS)]
        factor = BayesianRewardModel.fit(named, counts, prior_scale=0.5, attitude=attitude, num_references=references)
    else:
        model = fitted(attitude=attitude, num_references=references, name="p")
        belief = model.belief if kind == "laplace" else drawn(model)
        factor = BayesianRewardModel(belief, BETA, attitude, num_references=references, name="p")
    declared = lm * factor * factor.gate(0.9)
    graph = FactorGraph.from_dict(json.loads(json.dumps(declared.graph.to_dict())))
    (feature,) = graph.required_functions()
    for function in (counts, factor.features[0].fn):
        again = graph.to_model(lm, {feature: function})
        assert again.factors[0].describe() == factor.describe()
        assert type(again.factors[0]) is type(factor)
        for context in (0, 1):
            gap = brute_force(again, context).log_phi - brute_force(declared, context).log_phi
            assert float(torch.nan_to_num(gap).abs().max()) == 0.0
    if isinstance(factor, BayesianRewardModel):
        rebuilt = again.factors[0]
        assert isinstance(rebuilt, BayesianRewardModel)
        assert torch.equal(rebuilt.log_predictive(PAIRS), factor.log_predictive(PAIRS))


def test_an_attitude_that_sees_the_constant_asks_for_a_centre() -> None:
    """With the message before a fit, which may take minutes; each head has a constant, a law of people has one."""
    with pytest.raises(ModelError, match=r"BayesianRewardModel: Robust\(kappa=0.8\) needs num_references="):
        BayesianRewardModel.fit([], counts, attitude=lmppl.Robust(0.8))
    with pytest.raises(ModelError, match="num_references=0 keeps it as it is"):
        fitted().with_attitude(lmppl.LowerBound(1.0))
    everyone = PreferenceDistribution.fit(PAIRS, counts, attitude=lmppl.Quantile(0.2))
    with pytest.raises(ModelError, match="PreferenceDistribution: Moderated"):
        everyone.with_attitude(lmppl.Moderated())
    assert fitted().with_attitude(lmppl.Robust(0.8), num_references=0).num_references == 0


def test_one_fit_serves_several_declarations() -> None:
    model = fitted(num_references=REFERENCES, name="r")
    other = model.with_attitude(lmppl.LowerBound(1.0), beta=0.3, name="careful")
    assert (other.beta, other.attitude, other.num_references) == (0.3, lmppl.LowerBound(1.0), REFERENCES)
    assert (other.name, model.name, other.belief is model.belief) == ("careful", "r", True)
    assert model.with_attitude(lmppl.Mean()).name == "r"
    assert fitted().name == "preference"


def test_agreement_of_two_posteriors() -> None:
    model = fitted()
    same = BayesianRewardModel(drawn(model, 4000))
    assert model.agreement(same).apart == []
    assert "they agree" in repr(model.agreement(same))
    wide = fitted(prior_scale=5.0)
    assert wide.agreement(model).apart != []
    assert "they differ in columns" in repr(wide.agreement(model))
    assert model.agreement(same).shift_error == pytest.approx(4000**-0.5)
    others = BayesianRewardModel.fit([*PAIRS, ("aaaaaaa", "b")], counts, prior_scale=0.8)
    with pytest.raises(ModelError, match=r"standardised by other texts.*fit both to the same pairs"):
        model.agreement(others)
    with pytest.raises(ModelError, match="got Mean, expected a BayesianRewardModel"):
        model.agreement(lmppl.Mean())  # type: ignore[arg-type]


def test_ties_alone_say_nothing_of_choices() -> None:
    model = fitted()
    with pytest.raises(ModelError, match="evaluate: got ties, and the model was fitted to pairs without"):
        model.evaluate([lmppl.Preference("a", "b", tie=True)])
    tied = BayesianRewardModel.fit([*PAIRS, lmppl.Preference("a", "abc", tie=True)], counts, prior_scale=0.8)
    with pytest.raises(ModelError, match="evaluate: all 1 pairs are ties, expected some choices"):
        tied.evaluate([lmppl.Preference("a", "b", tie=True)])


@pytest.mark.parametrize("references", [None, REFERENCES])
def test_draws_of_the_head_are_mixed(references: int | None) -> None:
    """The cut mixture of a learned reward: refused until it is fitted, centred or not, with a gate, and from JSON."""
    lm = lmppl.TabularLM.random(4, 3, order=1, seed=3, context=["", "ab"])
    factor = BayesianRewardModel(drawn(fitted()), BETA, lmppl.CutMixture(), num_references=references, name="r")
    declared = lm * factor * factor.gate(2.0)
    with pytest.raises(ModelError, match="factor 'r': its members' log Z_m are not fitted yet"):
        lmppl.infer(declared, lmppl.Exact())
    model = lmppl.fit_cut_mixture(declared).model
    graph = FactorGraph.from_dict(json.loads(json.dumps(model.graph.to_dict())))
    again = graph.to_model(lm, dict.fromkeys(graph.required_functions(), counts))
    for context in (0, 1):
        there = brute_force(declared_without(model, "r"), context).log_phi > -math.inf
        raw = drawn(fitted()).posterior.belief(scaled(list(all_outcomes(lm, context).text)))
        assert isinstance(raw, Tensor)
        # A member's constant cancels with its Z, so that centring changes nothing but the gate.
        log_p0 = torch.where(there, lm.score(all_outcomes(lm, context)), -math.inf)
        members = torch.log_softmax(log_p0[:, None] + raw / BETA, 0)
        wanted = members.logsumexp(1) - math.log(raw.shape[1])
        for one in (model, again):
            found = torch.log_softmax(lm.score(all_outcomes(lm, context)) + brute_force(one, context).log_phi, 0)
            assert float((found.exp() - wanted.exp()).abs().max()) < TOLERANCE


def declared_without(model: lmppl.Model, name: str) -> lmppl.Model:
    return lmppl.Model(model.prior, [factor for factor in model.factors if factor.name != name])


def test_annotators_widen_what_is_known_of_the_population() -> None:
    """Few annotators who differ leave the population's head open, however many pairs each of them judged."""
    one = world(3, seed=4, annotators=(4, 0.8))
    named = one.pairs(400, seed=5)
    anonymous = [lmppl.Preference(p.chosen, p.rejected) for p in named]
    models = [BayesianRewardModel.fit(pairs, one.features, prior_scale=0.8) for pairs in (named, anonymous)]
    assert models[0].facts["annotator_scale"] == pytest.approx(0.8, abs=0.4)
    assert models[0].belief.annotators == tuple(f"person {j}" for j in range(4))
    ratio = models[0].posterior.covariance.diagonal() / models[1].posterior.covariance.diagonal()
    assert float(ratio.min()) > 2
    (pair,) = one.pairs(1, seed=6)
    asked = [lmppl.Preference(pair.chosen, pair.rejected, annotator=name) for name in ("person 0", "person 1", "else")]
    p = models[0].log_predictive(asked)[:, 0].exp()
    assert len({round(value, 3) for value in p.tolist()}) == 3


def test_scales_are_stated_or_found() -> None:
    one = world(3, seed=4)
    pairs = one.pairs(100, seed=0)
    found, stated = (BayesianRewardModel.fit(pairs, one.features, prior_scale=scale).facts for scale in (None, 0.02))
    assert stated["prior_scale"] == pytest.approx(0.02)
    assert 0.02 < found["prior_scale"] < 20
    assert found["log_evidence"] > stated["log_evidence"]
    assert found["num_pairs"] == 100


@LMS
@pytest.mark.parametrize("references", [0, 4])
def test_it_keeps_the_laws_of_factors(lm: LanguageModel, references: int | None) -> None:
    """log φ is a function of text and context, alone or in a batch, centred or not."""
    check_factor(fitted(attitude=lmppl.Robust(0.8), num_references=references), lm)
    check_factor(PreferenceDistribution.fit(PAIRS, counts, attitude=lmppl.Quantile(0.2), num_references=references), lm)
