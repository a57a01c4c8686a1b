"""The cut mixture: the brute-force mixture of the members' posteriors, on every engine; and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lmppl
from lmppl.errors import FactorError, InfeasibleModel, ModelError
from lmppl.inference.mcmc import MCMC, TokenGibbs
from lmppl.lm.base import LanguageModel
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.target import Target
from lmppl.testing import check_factor
from tests.models import (
    TOLERANCE,
    all_outcomes,
    brute_force,
    count_of,
    enumerable_models,
    goodness_of_fit,
    has_no,
    wavy,
)

BETA = 0.6
LMS = pytest.mark.parametrize(
    "lm", [lm for _, lm in enumerable_models()], ids=[name for name, _ in enumerable_models()]
)
SMALL = TabularLM.random(4, 3, seed=3, context=["", "ab"])


def members(texts: list[str]) -> list[list[float]]:
    """Three members of different likings, sharpness and constants."""
    return [[w, 2.5 * t.count("a") - 4.0, -1.5 * len(t) + w] for t, w in zip(texts, wavy(texts), strict=True)]


def mild(texts: list[str]) -> list[list[float]]:
    """Three members in [−1, 1], so that a bound of all is close to each."""
    return [[w, t.count("a") / 3, -len(t) / 3] for t, w in zip(texts, wavy(texts), strict=True)]


def on_prompts(prompts: list[str], completions: list[str]) -> list[list[float]]:
    """Members whose constants differ from context to context."""
    return [[r0, r1 + 3.0 * len(p), r2 - len(p)] for p, (r0, r1, r2) in zip(prompts, members(completions), strict=True)]


def f64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def rest(lm: LanguageModel) -> lmppl.Model:
    """p0: the prior with other evidence."""
    return lm * lmppl.Reward(count_of("b"), beta=0.8) * lmppl.Constraint(has_no("c"), name="no_c")


def parts(lm: LanguageModel, context: int) -> tuple[Any, Tensor, Tensor]:
    """One context's outcomes of p0, with log p0 (S,) and r/β (S, M)."""
    brute = brute_force(rest(lm), context)
    return brute, brute.log_posterior, f64(members(list(brute.sequences.text))) / BETA


@LMS
def test_the_posterior_is_the_mixture_of_the_members_posteriors(lm: LanguageModel) -> None:
    """π_cut = mean_m π*_m in each context, each π*_m by brute force on its own; log Z_m and log Z are theirs."""
    fit = lmppl.fit_cut_mixture(rest(lm) * lmppl.UncertainReward(members, BETA, lmppl.CutMixture()))
    assert fit.log_normalizers.kind == "exact"
    exact = lmppl.infer(fit.model, lmppl.Exact())
    for context in range(lm.num_contexts):
        _, log_p0, exponent = parts(lm, context)
        own = [
            brute_force(rest(lm) * lmppl.Reward(lambda texts, m=m: [r[m] for r in members(texts)], BETA), context)
            for m in range(3)
        ]
        mixture = torch.stack([b.log_posterior for b in own]).logsumexp(0) - math.log(3)
        found = brute_force(fit.model, context)
        assert float((found.log_posterior - mixture).nan_to_num(0.0).abs().max()) < TOLERANCE
        log_z = (log_p0[:, None] + exponent).logsumexp(0)
        assert float((fit.log_normalizers.value[context] - log_z).abs().max()) < TOLERANCE
        log_z0 = float(brute_force(rest(lm), context).log_z)  # E_p0[φ] = 1
        assert float(exact.log_normalizer[0].value[context]) == pytest.approx(log_z0, abs=TOLERANCE)


@LMS
def test_wrong_mixtures_are_others(lm: LanguageModel) -> None:
    """Mutants: members not divided by their Z_m (`Marginal`); one context's Z_m in the other; rewards averaged."""
    fit = lmppl.fit_cut_mixture(rest(lm) * lmppl.UncertainReward(members, BETA, lmppl.CutMixture()))
    log_z = fit.log_normalizers.value
    for context in range(lm.num_contexts):
        _, log_p0, exponent = parts(lm, context)
        right = brute_force(fit.model, context).log_posterior.exp()

        def law(log_phi: Tensor, log_p0: Tensor = log_p0) -> Tensor:
            return torch.softmax(log_p0 + log_phi, 0)

        assert float((law((exponent - log_z[context]).logsumexp(1)) - right).abs().max()) < TOLERANCE
        for mutant in (
            exponent.logsumexp(1),
            (exponent - log_z[1 - context]).logsumexp(1),
            (exponent - log_z.mean(0)).logsumexp(1),
            exponent.mean(1),
            (exponent + log_z[context]).logsumexp(1),
        ):
            assert float((law(mutant) - right).abs().sum()) / 2 > 1e-3


@LMS
def test_constants_of_members_cancel_in_each_context(lm: LanguageModel) -> None:
    models = [
        lmppl.fit_cut_mixture(lm * lmppl.UncertainReward(fn, BETA, lmppl.CutMixture(), num_references=n)).model
        for fn, n in ((members, None), (on_prompts, None), (members, 8))
    ]
    for context in range(lm.num_contexts):
        laws = [brute_force(model, context).log_posterior.exp() for model in models]
        assert max(float((law - laws[0]).abs().max()) for law in laws) < TOLERANCE


def test_expectations_are_means_over_the_members() -> None:
    fit = lmppl.fit_cut_mixture(SMALL * lmppl.UncertainReward(members, BETA, lmppl.CutMixture()))
    alone = [
        lmppl.infer(SMALL * lmppl.Reward(lambda texts, m=m: [r[m] for r in members(texts)], BETA), "exact")
        for m in range(3)
    ]
    wanted = torch.stack([one.expectation(wavy).value for one in alone]).mean(0)
    assert float((lmppl.infer(fit.model, "exact").expectation(wavy).value - wanted).abs().max()) < TOLERANCE


ENGINES = {
    "importance": lmppl.Importance(3000),
    "smc": lmppl.SMC(256, num_sweeps=16),
    "mcmc": lmppl.MCMC(num_chains=64, num_steps=40),
    "tempered_smc": lmppl.TemperedSMC(512),
    "rejection": lmppl.Rejection(2000),
}


@pytest.mark.parametrize("name", list(ENGINES))
def test_engines_agree_with_the_exact_fit(name: str) -> None:
    """log Z_m of 2 × 3 members within 4.5 standard errors (10⁻⁵ each), and these are small."""
    fn = mild if name == "rejection" else members
    upper = 1.0 if name == "rejection" else 4.5
    model = SMALL * lmppl.Reward(wavy, upper=1.0) * lmppl.UncertainReward(fn, BETA, lmppl.CutMixture(), upper=upper)
    exact = lmppl.fit_cut_mixture(model)
    fit = lmppl.fit_cut_mixture(model, ENGINES[name], seed=5)
    gap = (fit.log_normalizers.value - exact.log_normalizers.value).abs()
    error = fit.log_normalizers.standard_error
    assert error is not None
    assert bool((gap < 4.5 * error).all()), (gap, error)
    assert float(error.max()) < 0.3
    assert fit.num_rounds >= 2
    assert fit.cost.lm_tokens > 0
    assert bool((fit.effective_sizes > 20).all())


@pytest.mark.parametrize(
    "engine",
    [
        lmppl.Exact(), lmppl.Importance(), lmppl.SMC(64), lmppl.MCMC(64, 16), lmppl.Rejection(), lmppl.Splitting(64),
        lmppl.AIS(), lmppl.TemperedSMC(64), lmppl.BestOfN(4), lmppl.QuasiRejection(), lmppl.Tempered(),
    ],
    ids=lambda e: e.name,
)  # fmt: skip
def test_every_engine_runs_on_the_fitted_model_and_none_on_the_other(engine: lmppl.Engine) -> None:
    declared = SMALL * lmppl.UncertainReward(mild, BETA, lmppl.CutMixture(), upper=1.0)
    with pytest.raises(ModelError, match=r"'mild': its members' log Z_m are not fitted yet; fit them with lmppl.fi"):
        lmppl.infer(declared, engine)
    found = lmppl.infer(lmppl.fit_cut_mixture(declared).model, engine, seed=1)
    assert len(found.draws) > 0


def test_draws_of_the_fitted_model_follow_the_mixture() -> None:
    model = lmppl.fit_cut_mixture(SMALL * lmppl.UncertainReward(mild, BETA, lmppl.CutMixture(), upper=1.0)).model
    draws = lmppl.infer(model, lmppl.Rejection(2000), seed=4).draws
    for context in range(2):
        brute = brute_force(model, context)
        rows = torch.nonzero(draws.context == context).squeeze(1)
        assert goodness_of_fit(draws.select(rows), brute, brute.log_posterior) > 1e-4


FAR = TabularLM([0.04, 0.04, 0.04, 0.88, 0.0], ["a", "b", "c", "d", "<eos>"], max_new_tokens=6)


def letters(sharp: float) -> Callable[[list[str]], list[list[float]]]:
    def counts(texts: list[str]) -> list[list[float]]:
        return [[sharp * t.count("a"), sharp * t.count("b"), sharp * t.count("c")] for t in texts]

    return counts


def test_members_far_from_the_prior_are_reached_by_steps() -> None:
    """Each member likes one letter much: log Z_m = 6 log(0.96 + 0.04 e³) within 4.5 errors, in several rounds."""
    model = FAR * lmppl.UncertainReward(letters(3.0), 1.0, lmppl.CutMixture())
    right = 6 * math.log(0.96 + 0.04 * math.exp(3.0))
    fit = lmppl.fit_cut_mixture(model, MCMC(num_chains=64, num_steps=40, kernel=TokenGibbs()), seed=1)
    error = fit.log_normalizers.standard_error
    assert error is not None
    assert bool(((fit.log_normalizers.value - right).abs() < 4.5 * error).all())
    assert float(error.max()) <= 0.35
    assert fit.num_rounds > 2


def test_draws_that_do_not_follow_are_refused_with_the_member() -> None:
    model = FAR * lmppl.UncertainReward(letters(3.0), 1.0, lmppl.CutMixture())
    told = r"factor 'counts': in round \d the posterior of member \d has \S+ effective draws in context 0 \(''\), fewer"
    with pytest.raises(InfeasibleModel, match=told):
        lmppl.fit_cut_mixture(model, lmppl.Importance(500))
    with pytest.raises(InfeasibleModel, match=r"after 3 rounds log Z of member \d has a standard error|not settled"):
        lmppl.fit_cut_mixture(model, lmppl.TemperedSMC(64), max_rounds=3, seed=2)
    with pytest.raises(InfeasibleModel, match=r"1 rounds have not settled \(they reach 1 of the members' evidence\)"):
        lmppl.fit_cut_mixture(SMALL * lmppl.UncertainReward(mild, 1.0, lmppl.CutMixture()), "importance", max_rounds=1)


def test_laws_and_columns() -> None:
    """The factor is a function of (x, c); its column keeps m, s and r/β; a gate shares the function's calls."""
    calls: list[str] = []

    def counted(texts: list[str]) -> list[list[float]]:
        calls.extend(texts)
        return members(texts)

    reward = lmppl.UncertainReward(counted, BETA, lmppl.CutMixture(), upper=4.5)
    model = lmppl.fit_cut_mixture(SMALL * reward * reward.gate(50.0)).model
    check_factor(model["counted"], SMALL)
    outcomes = all_outcomes(SMALL, 1)
    target = Target(model)
    calls.clear()
    target.log_factors(outcomes)
    assert len(calls) == len(set(outcomes.text))
    values = f64(members(list(outcomes.text)))
    wanted = torch.cat([values.mean(1)[:, None], values.std(1)[:, None], values / BETA], 1)
    assert float((target.features(outcomes)["counted"] - wanted).abs().max()) < TOLERANCE


def test_a_gate_knows_the_centred_spread() -> None:
    reward = lmppl.UncertainReward(members, BETA, lmppl.CutMixture(), num_references=8, name="r")
    model = lmppl.fit_cut_mixture(SMALL * reward * reward.gate(2.0)).model
    target = Target(model)
    rows = all_outcomes(SMALL, 1)
    spread = next(iter(target.features(rows).values()))[:, 1]
    assert ((target.log_factors(rows)["r_known"] == 0) == (spread <= 2.0)).all()
    assert bool((spread <= 2.0).any())
    assert bool((spread > 2.0).any())


def test_the_declaration_round_trips() -> None:
    declared = SMALL * lmppl.UncertainReward(members, BETA, lmppl.CutMixture(), num_references=8, name="r")
    fitted = lmppl.fit_cut_mixture(declared).model
    for model in (declared, fitted):
        assert model.graph.required_functions() == ("members",)
        again = model.graph.from_dict(model.graph.to_dict()).to_model(SMALL, {"members": members})
        assert again.graph.content_hash() == model.graph.content_hash()
    assert declared.spec_hash != fitted.spec_hash
    outcomes = all_outcomes(SMALL, 1)
    assert torch.equal(*(Target(m).log_factors(outcomes)["r"] for m in (fitted, again)))


def test_the_fit_is_shown_with_what_marginal_would_do() -> None:
    fit = lmppl.fit_cut_mixture(SMALL * lmppl.UncertainReward(members, BETA, lmppl.CutMixture()))
    assert repr(fit).startswith(
        "π*(x|c) ∝ π0(x|c) · mean_m exp(members(x)/0.6)/Z_m\n  member 0 in context '': log Z = "
    )
    assert fit.marginal_shares.sum(1).tolist() == pytest.approx([1.0, 1.0])


def test_moments_are_fitted_on_the_fitted_model() -> None:
    cut = lmppl.fit_cut_mixture(SMALL * lmppl.UncertainReward(members, BETA, lmppl.CutMixture())).model
    model = lmppl.fit_moments(cut * lmppl.Moment(count_of("a"), 1.0, name="a")).model
    assert lmppl.infer(model, "exact").expectation(count_of("a")).value.tolist() == pytest.approx([1.0, 1.0])


def two_numbers(texts: list[str]) -> tuple[list[float], list[float]]:
    return wavy(texts), [0.5] * len(texts)


def fit(factor: lmppl.Factor, *others: lmppl.Factor, engine: Any = None, **options: Any) -> lmppl.CutMixtureFit:
    return lmppl.fit_cut_mixture(lmppl.Model(SMALL, [factor, *others]), engine, **options)


CUT = lmppl.UncertainReward(members, BETA, lmppl.CutMixture())


@pytest.mark.parametrize(
    ("make", "kind", "told"),
    [
        (lambda: fit(lmppl.Reward(wavy)), ModelError, "has no UncertainReward"),
        (lambda: fit(CUT, CUT), ModelError, r"2 cut mixtures \('members', 'members_2'\)"),
        (lambda: fit(CUT, engine=lmppl.BestOfN(4)), ModelError, "are heuristic, of a law that is not π"),
        (lambda: fit(CUT, max_rounds=0), ModelError, "max_rounds=0"),
        (
            lambda: fit(lmppl.UncertainReward(two_numbers, 1.0, lmppl.CutMixture(), name="r")),
            FactorError,
            r"factor 'r': two_numbers: CutMixture\(\) mixes the posteriors of members, expected an ensemble",
        ),
        (lambda: fit(CUT).model | ["", "b", "c"], None, ""),
        (
            lambda: lmppl.infer(fit(CUT).model | ["", "b", "c"], "importance"),
            ModelError,
            "fitted for 2 contexts, and the prior has 3",
        ),
        (
            lambda: lmppl.infer(SMALL * CUT.with_attitude(lmppl.CutMixture([[0.0, 1.0]] * 2)), "importance"),
            FactorError,
            "fitted for 2 members, got 3",
        ),
        (lambda: lmppl.CutMixture([[0.0, math.nan]]), ModelError, "M ≥ 2 finite numbers"),
        (lambda: lmppl.CutMixture([0.0, 1.0]), ModelError, "expected C rows of M numbers"),  # type: ignore[list-item]
        (
            lambda: lmppl.UncertainReward(members, 1.0, lmppl.CutMixture(), stochastic=True),
            ModelError,
            "stochastic=True with CutMixture",
        ),
        (
            lambda: fit(lmppl.UncertainReward(members, BETA, lmppl.CutMixture(), upper=1.0), engine="importance"),
            FactorError,
            "which the declared upper=1 allows",
        ),
    ],
    ids=[
        "no mixture", "two", "heuristic", "rounds", "gaussian", "declared", "contexts", "members", "nan", "flat",
        "estimates", "bound",
    ],
)  # fmt: skip
def test_wrong_declarations(make: Any, kind: type[Exception] | None, told: str) -> None:
    if kind is None:
        make()
        return
    with pytest.raises(kind, match=told):
        make()
