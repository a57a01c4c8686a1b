"""Splitting: unbiased with ties and for every score by full enumeration, and what a run says about itself."""

from __future__ import annotations

import math

import pytest
import torch

import lmppl.inference.splitting_sweep as module
from lmppl.errors import InfeasibleModel, ModelError, UnsupportedModel
from lmppl.inference.engine import Budget, Guarantee
from lmppl.inference.mcmc import Restart, SuffixResample
from lmppl.inference.run import infer
from lmppl.inference.splitting import Splitting, SplittingShard
from lmppl.inference.splitting_sweep import killed
from lmppl.lm.base import LanguageModel
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence import Constraint, Reward
from lmppl.modeling.factors import Feature
from lmppl.modeling.model import Model
from lmppl.modeling.target import Target, TargetForm
from lmppl.testing.enumeration import every_outcome
from tests.inference.whole_runs import check_that_a_stopped_run_goes_on
from tests.models import ENUMERABLE, TOLERANCE, brute_force, count_of, enumerable_lm, wavy

VISIBLE = 1e-3  # a mutant must be wrong by this much


def small(kind: str) -> LanguageModel:
    """An LM with so few outcomes that a whole sweep can be enumerated on it: 3 on the table, 7 on the networks."""
    if kind == "tabular":
        return TabularLM([[0.7, 0.3], [0.0, 1.0], [0.45, 0.55]], ["a", "<eos>"], max_new_tokens=2)
    from lmppl.lm.transformers import TransformersLM
    from tests.lm.random_models import build, tokenizer

    return TransformersLM(build(kind, 3, seed=1), tokenizer=tokenizer(3), context="a", max_new_tokens=2)


def letters(texts: list[str]) -> list[float]:
    """A score with ties: how many letters."""
    return [float(len(t)) for t in texts]


def backwards(texts: list[str]) -> list[float]:
    """A score that leads away from what is wanted."""
    return [-float(len(t)) for t in texts]


LONG = Constraint(lambda texts: [len(t) >= 2 for t in texts], name="long")
SOFT = Reward(wavy, beta=0.6, name="wavy")


def law(model: Model, engine: Splitting, top: float) -> tuple[float, dict]:
    """E Ẑ, and E[(1/N) Σ_i w_i 1(x_i = x)] of every outcome x, of one sweep."""
    target = Target(model)
    shard = SplittingShard(0, engine.num_particles, 0, (0,), engine.num_particles, (top,))
    mean, total, masses = 0.0, 0.0, {}
    for probability, part in every_outcome(lambda source: engine.simulate(target, shard, source)):
        total += probability
        mean += probability * math.exp(float(part.info["log_z"]))
        weights = part.draws.log_weight.exp() / engine.num_particles
        for key, w in zip(part.draws.keys(), weights.tolist(), strict=True):
            masses[key] = masses.get(key, 0.0) + probability * w
    assert total == pytest.approx(1.0, abs=TOLERANCE)
    return mean, masses


def assert_unbiased(model: Model, engine: Splitting, top: float) -> None:
    """E Ẑ = Z and E[Ẑ Σ W̄ f] = Z E_π*[f] for every f."""
    mean, masses = law(model, engine, top)
    table = brute_force(model, 0)
    assert mean == pytest.approx(float(table.log_z.exp()), abs=TOLERANCE)
    for key, gamma in zip(table.sequences.keys(), table.log_gamma.exp().tolist(), strict=True):
        assert masses.get(key, 0.0) == pytest.approx(gamma, abs=TOLERANCE)


CASES = [
    ("tabular", (LONG,), Splitting(2, 0.5, score=letters, kernel=Restart(), num_moves=1), 1.0),
    ("tabular", (LONG,), Splitting(2, 0.5, score=letters, kernel=Restart(), num_moves=1), math.inf),
    ("tabular", (SOFT, LONG), Splitting(2, 0.5, score=letters, kernel=SuffixResample(), num_moves=1), 1.0),
    ("tabular", (SOFT,), Splitting(2, 0.5, kernel=Restart(), num_moves=1), math.inf),
    ("tabular", (SOFT,), Splitting(2, 0.5, score="wavy", kernel=Restart(), num_moves=1), 0.2),
    ("tabular", (SOFT, LONG), Splitting(2, 0.5, score=backwards, kernel=Restart(), num_moves=1), math.inf),
    ("tabular", (SOFT, LONG), Splitting(2, 0.5, kernel=Restart(), num_moves=1), math.inf),
    ("tabular", (LONG,), Splitting(3, 0.34, score=letters, kernel=Restart(), num_moves=1), 1.0),
    ("tabular", (SOFT,), Splitting(3, 0.6, kernel=Restart(), num_moves=1), 1.0),
    ("llama", (Constraint(lambda texts: ["bb" in t for t in texts], name="bb"),),
     Splitting(2, 0.5, score=count_of("b"), kernel=Restart(), num_moves=1), 0.5),
    ("mistral", (SOFT,), Splitting(2, 0.5, score=count_of("b"), kernel=Restart(), num_moves=1), 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "factors", "engine", "top"), CASES, ids=range(len(CASES)))
def test_a_sweep_is_unbiased_for_any_score(kind, factors, engine, top) -> None:
    assert_unbiased(Model(small(kind), factors), engine, top)


def test_counting_k_deaths_where_more_have_tied_is_biased(monkeypatch) -> None:
    """Mutant: the factor 1 − k/N of a level without ties, although all K ≥ k particles at the level are killed."""
    monkeypatch.setattr(module, "log_share_left", lambda masks: torch.full((len(masks),), 2 / 3).double().log())
    model = Model(small("tabular"), (LONG,))
    mean, _ = law(model, Splitting(3, 0.34, score=letters, kernel=Restart(), num_moves=1), 1.0)
    assert abs(mean - float(brute_force(model, 0).log_z.exp())) > VISIBLE


def test_leaving_out_the_retired_is_biased_where_the_score_is_not_the_evidence(monkeypatch) -> None:
    """Mutant: only the particles that are left count, as if all below the top had φ = 0."""
    monkeypatch.setattr(module.SplittingSweep, "_retire", lambda self, masks, number: None)
    model = Model(small("tabular"), (SOFT,))
    mean, _ = law(model, CASES[4][2], 0.2)
    assert abs(mean - float(brute_force(model, 0).log_z.exp())) > VISIBLE


def test_all_at_the_level_are_killed() -> None:
    scores = torch.tensor([2.0, 1.0, 1.0, 3.0, 1.0])
    assert killed(scores, 0.2).tolist() == [False, True, True, False, True]
    assert killed(scores, 0.8).tolist() == [True, True, True, False, True]
    assert killed(torch.tensor([-math.inf, 0.0, -math.inf]), 0.34).tolist() == [True, False, True]


# Runs.


@pytest.mark.parametrize("kind", ENUMERABLE)
def test_a_run_agrees_with_enumeration_in_both_contexts(kind) -> None:
    model = enumerable_lm(kind) * SOFT * Constraint(lambda texts: [t.count("a") >= 2 for t in texts], name="aa")
    result = infer(model, Splitting(48, score=count_of("a")), 48 * 16, seed=2)
    assert result.guarantee is Guarantee.CONSISTENT
    (estimate,) = result.log_normalizer
    assert estimate.kind == "unbiased_Z"
    draws, z = result.draws, result.info["log_z_sweeps"]
    assert z.shape == (2, 16)
    for c in (0, 1):
        table = brute_force(model, c)
        mine = draws.log_weight[draws.context == c]
        mean = torch.logsumexp(mine, 0) - math.log(len(mine))
        assert float(mean) == pytest.approx(float(torch.logsumexp(z[c], 0)) - math.log(16), abs=1e-9)
        error = float(estimate.standard_error[c])
        assert abs(float(estimate.value[c] - table.log_z)) < 4.5 * error + 0.02
    assert set(draws.columns) == {"sweep", "shard", "parent", "score", "round"}
    assert len(result.info["levels"]) == 16
    assert result.info["rounds"].shape == (2, 16)


def test_a_rare_constraint_is_reached() -> None:
    """Probability e^{−13}: 128 particles × 12 sweeps find it with a few rounds."""
    lm = TabularLM([[0.05, 0.55, 0.3, 0.1]] * 5, ["a", "b", "c", "<eos>"], max_new_tokens=8)
    model = lm * Constraint(lambda texts: [t.count("a") >= 4 for t in texts], name="aaaa")
    result = infer(model, Splitting(128, score=count_of("a"), top=3.0), 128 * 12, seed=1)
    exact = float(brute_force_log_z(lm))
    (estimate,) = result.log_normalizer
    assert exact < -6
    assert abs(float(estimate.value) - exact) < 4.5 * float(estimate.standard_error) + 0.05
    assert float(estimate.standard_error) < 0.4
    assert all(text.count("a") >= 4 for text in result.draw(20).text)


def brute_force_log_z(lm: TabularLM) -> float:
    """log Pr(at least 4 a's): symbols are independent, so the count is a sum over lengths."""
    p_end, p_a, total = 0.1, 0.05, 0.0
    p_other = 1 - p_end - p_a

    def at_least_four(n: int) -> float:
        return sum(math.comb(n, k) * p_a**k * p_other ** (n - k) for k in range(4, n + 1))

    for n in range(8):
        total += at_least_four(n) * p_end
    return math.log(total + at_least_four(8))


def test_the_pilot_finds_the_top_and_gives_no_draws() -> None:
    model = enumerable_lm("tabular") * Reward(count_of("a"), beta=0.4, name="a")
    parts = []
    result = infer(model, Splitting(32), 64, on_part=parts.append)
    assert [bool(p.shard.tops) for p in parts] == [False, True, True]
    assert len(parts[0].draws) == 0
    assert parts[1].shard.tops == parts[2].shard.tops == tuple(result.info["tops"].tolist())
    assert set(Splitting(32).live(parts)) >= {"sweeps", "log Ẑ", "rounds"}
    assert set(Splitting(32).live(parts[:1])) == {"pilot", "rounds"}


def test_scores_by_name_by_function_and_by_feature_agree() -> None:
    model = enumerable_lm("tabular") * Reward(count_of("a"), beta=1.0, name="a")
    by_name, by_function = (infer(model, Splitting(16, score=s, top=2.0), 32) for s in ("a", count_of("a")))
    by_feature = infer(model, Splitting(16, score=Feature("n", count_of("a")), top=2.0), 32)
    assert by_name.draws.keys() == by_function.draws.keys() == by_feature.draws.keys()
    assert torch.equal(by_name.draws.log_weight, by_feature.draws.log_weight)


def test_equal_seeds_give_equal_draws_and_a_budget_adds_sweeps() -> None:
    model = enumerable_lm("tabular") * Reward(count_of("a"), beta=0.4, name="a")
    engine = Splitting(16, top=2.0)
    first, again, other = (infer(model, engine, 32, seed=s).draws for s in (0, 0, 1))
    assert first.keys() == again.keys() != other.keys()
    result = infer(model, engine, budget=Budget(lm_tokens=3000))
    assert result.info["log_z_sweeps"].shape[1] > 1


# What goes wrong.


def test_a_plain_predicate_is_refused_with_what_to_give() -> None:
    model = enumerable_lm("tabular") * LONG
    with pytest.raises(UnsupportedModel, match="plain predicates, of one level; give score="):
        infer(model, Splitting())
    with pytest.raises(UnsupportedModel, match="there is no factor; give score="):
        infer(enumerable_lm("tabular"), Splitting())
    assert Splitting(score=letters).unsupported_reason(TargetForm.of(model)) is None


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        (Splitting(1), "num_particles=1"),
        (Splitting(8, 1.0), "kill_share=1.0"),
        (Splitting(8, score="lenght"), r"names no factor or feature; there are \['wavy'\]"),
        (Splitting(8, score=3.0), "got score=3.0"),
        (Splitting(8, top=math.nan), "top=nan"),
        (Splitting(8, kernel=()), "expected a kernel"),
        (Splitting(8, score=lambda texts: [[1.0, 2.0]] * len(texts)), "2 values a text"),
        (Splitting(8, score=lambda texts: [math.inf] * len(texts)), "returned inf"),
    ],
)
def test_nonsense_is_refused(engine, words) -> None:
    with pytest.raises(Exception, match=words) as caught:
        infer(enumerable_lm("tabular") * SOFT, engine, 8)
    assert isinstance(caught.value, ModelError)


def test_a_score_that_leads_nowhere_says_how_far_it_went() -> None:
    never = enumerable_lm("tabular") * Constraint(lambda texts: [False] * len(texts), name="never")
    with pytest.raises(
        InfeasibleModel, match=r"no particle of 2 sweeps .* highest .* factor 'never' is still"
    ) as error:
        infer(never, Splitting(16, score=letters, top=3.0), 32)
    assert "Ẑ ≤ 1 is unbiased, so that Z ≤ Pr(Ẑ > 0) < 0.78 with 95% confidence" in str(error.value)
    with pytest.raises(InfeasibleModel, match=r"of its only sweep .*Z ≤ Pr\(Ẑ > 0\)·M < 0\.95·M, log M = 2, with 95%"):
        infer(never * Reward(wavy, beta=0.5, upper=1.0), Splitting(16, score=letters, top=3.0), 16)
    with pytest.raises(InfeasibleModel, match=r"Pr\(Ẑ > 0\) < 0\.95 with .* no bound on Z follows without upper="):
        infer(never * Reward(wavy), Splitting(16, score=letters, top=3.0), 16)


def test_a_score_without_levels_says_that_nothing_was_split(caplog: pytest.LogCaptureFixture) -> None:
    for top in (None, 5.0):
        result = infer(
            enumerable_lm("tabular") * SOFT, Splitting(16, score=lambda texts: [1.0] * len(texts), top=top), 32
        )
        assert bool((result.info["rounds"] <= 1).all())
        assert f"all {48 if top is None else 32} draws of the prior for context" in caplog.text
        assert "(and for 1 more) have the score 1, so that nothing was split" in caplog.text
        caplog.clear()
    infer(enumerable_lm("tabular") * SOFT, Splitting(16), 32)
    assert "nothing was split" not in caplog.text


def test_the_engine_is_plain_configuration() -> None:
    assert str(Splitting(64, score="a")) == "splitting(num_particles=64, score='a')"
    assert str(Splitting(64, score=letters)) == "splitting(num_particles=64, score='letters')"
    assert "brehier2016" in Splitting.references


def test_a_run_that_was_stopped_goes_on_to_the_same_draws(tmp_path) -> None:
    model = enumerable_lm("tabular") * Reward(count_of("a"), beta=0.4, name="a")
    check_that_a_stopped_run_goes_on(model, Splitting(16, score=letters), 64, tmp_path)
