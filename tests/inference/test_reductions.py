"""Moments to multipliers: the closed form of one binary feature, duality on enumerable models, and honest intervals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import optimize
from torch import Tensor

import lmppl
from lmppl.diagnostics.tilting import is_reachable, tilt
from lmppl.errors import FactorError, InfeasibleModel, ModelError, ShapeError
from lmppl.inference.mcmc import MCMC, TokenGibbs
from lmppl.lm.base import LanguageModel
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.target import Target
from tests.models import TOLERANCE, all_outcomes, brute_force, count_of, enumerable_models, has_no, wavy

LMS = pytest.mark.parametrize(
    "lm", [lm for _, lm in enumerable_models()], ids=[name for name, _ in enumerable_models()]
)


def has_a(texts: list[str]) -> list[bool]:
    return ["a" in t for t in texts]


def coin(p: float, context: Any = "") -> TabularLM:
    """One token, "a" with probability p."""
    return TabularLM([p, 1 - p, 0.0], ["a", "b", "<eos>"], max_new_tokens=1, context=context)


def test_one_binary_feature_in_closed_form() -> None:
    """λ = log((1−p)/p) for the target ½; at p = .07406 the published figures of the biographies of women."""
    fit = lmppl.fit_moments(coin(0.07406) * lmppl.Moment(has_a, 0.5))
    found = lmppl.infer(fit.model, lmppl.Exact())
    assert float(fit.multipliers["has_a"].value) == pytest.approx(math.log((1 - 0.07406) / 0.07406), abs=1e-10)
    assert float(fit.multipliers["has_a"].value) == pytest.approx(2.526, abs=5e-4)
    assert float(found.log_normalizer[0].value) == pytest.approx(0.6162, abs=5e-5)
    assert float(fit.kl_prior) == pytest.approx(0.6468, abs=5e-5)
    posterior = found.expectation(has_a).value
    assert float(posterior) == pytest.approx(0.5, abs=TOLERANCE)
    assert abs(float(posterior) - 0.07406) == pytest.approx(0.4259, abs=5e-5)  # TV of two laws on two outcomes
    assert fit.multipliers["has_a"].kind == "exact"
    assert "λ = 2.526 [2.526, 2.526], E[f] = 0.5 ±0 for 0.5" in repr(fit)


@LMS
def test_the_fitted_model_is_the_nearest_one(lm: LanguageModel) -> None:
    """On top of a reward: the moments are met, and λ is what a general optimiser finds for the dual."""
    model = lm * lmppl.Reward(wavy, beta=0.7) * lmppl.Moment(has_a, 0.6) * lmppl.Moment(count_of("b"), 0.9, name="b")
    fit = lmppl.fit_moments(model)
    for context in range(lm.num_contexts):
        brute = brute_force(lm * lmppl.Reward(wavy, beta=0.7), context)
        texts = list(brute.sequences.text)
        f = torch.stack([torch.tensor(has_a(texts)).double(), torch.tensor(count_of("b")(texts)).double()], 1)
        target, base = torch.tensor([0.6, 0.9]).double(), brute.log_posterior

        def dual(at: Any, f: Tensor = f, base: Tensor = base, target: Tensor = target) -> float:
            theta = torch.tensor(at, dtype=torch.float64)
            return float((base + f @ theta).logsumexp(0) - theta @ target)

        best = optimize.minimize(dual, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-14})
        mine = torch.cat([fit.multipliers[name].value[context] for name in ("has_a", "b")])
        assert mine.tolist() == pytest.approx(best.x.tolist(), abs=1e-5)
        fitted = brute_force(fit.model, context).log_posterior
        assert (fitted.exp() @ f).tolist() == pytest.approx([0.6, 0.9], abs=TOLERANCE)
        assert float((fitted - torch.log_softmax(base + f @ mine, 0)).nan_to_num(0.0).abs().max()) < TOLERANCE
        kl = (fitted.exp() * (fitted - brute.log_prior).nan_to_num(0.0)).sum()
        assert float(fit.kl_prior[context]) == pytest.approx(float(kl), abs=TOLERANCE)


@LMS
def test_a_moment_beside_a_constraint_and_a_reward(lm: LanguageModel) -> None:
    """The I-projection of prior × reward × constraint: π*/p0 is exp(λf) on what is allowed, and E[f] = μ."""
    others = lm * lmppl.Reward(wavy, beta=0.7) * lmppl.Constraint(has_no("c"), name="no_c")
    fit = lmppl.fit_moments(others * lmppl.Moment(count_of("a"), 0.9, name="a"))
    for context in range(lm.num_contexts):
        base, fitted = brute_force(others, context), brute_force(fit.model, context).log_posterior
        texts = list(base.sequences.text)
        f = torch.tensor(count_of("a")(texts)).double()
        assert float(fitted.exp() @ f) == pytest.approx(0.9, abs=TOLERANCE)
        multiplier = fit.multipliers["a"].value[context, 0]
        wanted = torch.log_softmax(base.log_posterior + multiplier * f, 0)
        assert float((fitted - wanted).nan_to_num(0.0).abs().max()) < TOLERANCE
        allowed = torch.tensor(has_no("c")(texts))
        assert bool((fitted[~allowed] == -math.inf).all())


@LMS
def test_a_vector_is_as_many_moments(lm: LanguageModel) -> None:
    def both(texts: list[str]) -> list[list[float]]:
        return [[float("a" in t), float(t.count("b"))] for t in texts]

    apart = lmppl.fit_moments(lm * lmppl.Moment(has_a, 0.6) * lmppl.Moment(count_of("b"), 0.9, name="b"))
    together = lmppl.fit_moments(lm * lmppl.Moment(both, [0.6, 0.9]))
    for k, name in enumerate(("has_a", "b")):
        gap = together.multipliers["both"].value[:, k] - apart.multipliers[name].value[:, 0]
        assert float(gap.abs().max()) < TOLERANCE


@LMS
def test_shared_multipliers_meet_the_mean_over_contexts(lm: LanguageModel) -> None:
    fit = lmppl.fit_moments(lm * lmppl.Moment(has_a, 0.6), shared=True)
    value = fit.multipliers["has_a"].value
    assert torch.equal(value[0], value[1])
    assert float(fit.achieved["has_a"].value.mean()) == pytest.approx(0.6, abs=TOLERANCE)
    assert float((fit.achieved["has_a"].value[:, 0] - 0.6).abs().max()) > 1e-3


def test_multipliers_of_unweighted_draws_are_wrong() -> None:
    """Mutant: the weights of the draws left out."""
    lm = coin(0.2)
    model = lm * lmppl.Reward(lambda texts: [2.0 * ("b" in t) for t in texts], name="r") * lmppl.Moment(has_a, 0.5)
    right = float(lmppl.fit_moments(model).multipliers["has_a"].value)
    draws = lmppl.infer(lm * model.factors[0], lmppl.Importance(4000), seed=0).draws
    f = torch.tensor(has_a(list(draws.text))).double()[:, None]
    target = torch.tensor([0.5]).double()
    assert float(tilt(f, draws.log_weight, target).multipliers) == pytest.approx(right, abs=0.2)
    assert abs(float(tilt(f, torch.zeros(4000), target).multipliers) - right) > 1


@pytest.mark.parametrize(
    "engine", [lmppl.SMC(64), lmppl.MCMC(num_chains=64, num_steps=60), lmppl.Importance(4000)], ids=lambda e: e.name
)
def test_engines_agree_with_the_exact_fit(engine: lmppl.Engine) -> None:
    lm = TabularLM.random(4, 4, seed=7, context=["", "ab"])
    model = lm * lmppl.Reward(wavy) * lmppl.Moment(count_of("a"), 2.0, name="a")
    exact = lmppl.fit_moments(model)
    fit = lmppl.fit_moments(model, engine, seed=3)
    for mine, right in ((fit.multipliers["a"], exact.multipliers["a"]), (fit.achieved["a"], exact.achieved["a"])):
        gap = (mine.value - right.value).abs()
        assert bool((gap < 4.5 * mine.standard_error).all()), (mine, right)
        assert bool((mine.standard_error < 0.3).all())
    assert fit.cost.lm_tokens > 0


def test_the_proposal_follows_the_fit() -> None:
    """Far from the prior one round of draws does not reach the target, and rounds of tilted ones do."""
    lm = TabularLM([0.05, 0.95, 0.0], ["a", "b", "<eos>"], max_new_tokens=12)
    model = lm * lmppl.Moment(count_of("a"), 6.0, name="a")
    right = lmppl.fit_moments(model, lmppl.Exact(max_sequences=10_000))
    fit = lmppl.fit_moments(model, MCMC(num_chains=64, num_steps=60, kernel=TokenGibbs()), seed=1)
    assert fit.num_rounds > 1
    gap = abs(float(fit.multipliers["a"].value - right.multipliers["a"].value))
    assert gap < 4.5 * float(fit.multipliers["a"].standard_error) < 0.5
    with pytest.raises(InfeasibleModel, match=r"4 rounds have not reached the target: a is in \[0, \d\] on"):
        lmppl.fit_moments(model, lmppl.Importance(300), max_rounds=4)


def test_targets_out_of_reach_show_what_can_be_reached() -> None:
    lm = TabularLM([0.5, 0.3, 0.2], ["a", "b", "<eos>"], max_new_tokens=2)
    with pytest.raises(InfeasibleModel, match=r"a reaches \(0, 2\) and its target is 2.5"):
        lmppl.fit_moments(lm * lmppl.Moment(count_of("a"), 2.5, name="a"))
    with pytest.raises(InfeasibleModel, match=r"a reaches \(0, 2\) and its target is 2"):  # only in the limit
        lmppl.fit_moments(lm * lmppl.Moment(count_of("a"), 2.0, name="a"))
    both = lm * lmppl.Moment(count_of("a"), 1.5, name="a") * lmppl.Moment(count_of("b"), 1.5, name="b")
    with pytest.raises(InfeasibleModel, match="targets must be reachable together"):
        lmppl.fit_moments(both)


def test_what_was_never_seen_is_no_large_multiplier() -> None:
    lm = coin(1e-6)
    with pytest.raises(InfeasibleModel, match=r"has_a is 0 on all 500 draws in context 0 \(''\), and its"):
        lmppl.fit_moments(lm * lmppl.Moment(has_a, 0.5), lmppl.Importance(500))


def test_every_engine_takes_the_fitted_model_and_none_the_other() -> None:
    lm = coin(0.2)
    declared = lm * lmppl.Moment(has_a, 0.5, range=(0, 1))
    assert declared.formula == "π*(x|c) ∝ π0(x|c) · exp(λ·has_a(x)), E[has_a(x)] = 0.5"
    for engine in ("exact", "importance", "mcmc"):
        with pytest.raises(ModelError, match=r"its multiplier is not fitted yet; fit it with lmppl.fit_moments"):
            lmppl.infer(declared, engine)
    fitted = lmppl.fit_moments(declared).model
    for engine in (lmppl.Rejection(400), lmppl.SMC(64), lmppl.MCMC(64, 16), lmppl.Splitting(64)):
        share = lmppl.infer(fitted, engine, seed=2).expectation(has_a)
        assert abs(float(share.value) - 0.5) < 4.5 * float(share.standard_error)


def test_the_declaration_round_trips() -> None:
    lm = coin(0.2, context=["", "b"])
    for model in (lm * lmppl.Moment(has_a, 0.5, range=(0, 1)), lmppl.fit_moments(lm * lmppl.Moment(has_a, 0.5)).model):
        again = model.graph.from_dict(model.graph.to_dict()).to_model(lm, {"has_a": has_a})
        assert again.graph.content_hash() == model.graph.content_hash()
        assert model.graph.required_functions() == ("has_a",)
    outcomes = all_outcomes(lm, 1)
    values = [Target(m).log_factors(outcomes)["has_a"] for m in (model, again)]
    assert torch.equal(*values)


@pytest.mark.parametrize(
    ("make", "kind", "told"),
    [
        (
            lambda: lmppl.fit_moments(coin(0.2) * lmppl.Moment(has_a, 0.5), "best_of_n"),
            ModelError,
            r"are heuristic, of a law that is not π",
        ),
        (lambda: lmppl.Moment(has_a, math.nan), ModelError, "target=nan"),
        (lambda: lmppl.Moment(has_a, "half"), ModelError, "target='half'"),
        (lambda: lmppl.Moment(has_a, 1.0, range=(0, 1)), ModelError, "strictly between 0 and 1"),
        (lambda: lmppl.Moment(has_a, 0.5, range=(1, 0)), ModelError, "the smaller one first"),
        (lambda: lmppl.Moment(0.5, 0.5), ModelError, "expected a function"),
        (lambda: lmppl.fit_moments(coin(0.2) * lmppl.Reward(wavy)), ModelError, "has no Moment"),
        (
            lambda: lmppl.fit_moments(coin(0.2) * lmppl.Moment(has_a, [0.5, 0.5])),
            ShapeError,
            "got 1 numbers .* expected 2",
        ),
        (
            lambda: lmppl.fit_moments(coin(0.2) * lmppl.Moment(lambda t: [3.0] * len(t), 0.5, range=(0, 1), name="f")),
            FactorError,
            r"got 3 for .* outside range=\(0.0, 1.0\)",
        ),
        (
            lambda: lmppl.fit_moments(coin(0.2) * lmppl.Moment(has_a, 0.5)).model | ["", "b"],
            ModelError,
            "fitted for 1 contexts, and the prior has 2",
        ),
    ],
    ids=[
        "heuristic",
        "nan",
        "text",
        "at the end",
        "order",
        "no function",
        "no moment",
        "length",
        "outside",
        "contexts",
    ],
)
def test_wrong_declarations(make: Any, kind: type[Exception], told: str) -> None:
    with pytest.raises(kind, match=told):
        make()


def test_the_hull() -> None:
    square = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]).double()
    for target, inside in (([0.5, 0.5], True), ([0.0, 0.5], False), ([1.2, 0.5], False), ([1e-6, 1e-6], True)):
        assert is_reachable(square, torch.tensor(target).double()) is inside
    line = torch.tensor([[0.0, 0.0], [1.0, 2.0]]).double()  # features that depend on each other
    assert is_reachable(line, torch.tensor([0.25, 0.5]).double())
    assert not is_reachable(line, torch.tensor([0.25, 0.6]).double())
    found = tilt(line, torch.zeros(2), torch.tensor([0.25, 0.5]).double())
    assert found.complete
    assert (found.log_weight.exp() @ line).tolist() == pytest.approx([0.25, 0.5])
