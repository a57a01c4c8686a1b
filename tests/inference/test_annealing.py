"""Annealing: unbiased weights and their upper bound by full enumeration, the ladder, and what a run says of itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from lmppl.errors import InfeasibleModel, ModelError
from lmppl.inference.ais import AIS
from lmppl.inference.annealed import AnnealingShard
from lmppl.inference.annealed_sweep import AnnealedSweep, backward_path
from lmppl.inference.annealing_ladder import conditional_ess, next_level
from lmppl.inference.bounds import sandwich
from lmppl.inference.conditional_smc import sandwich as sandwich_smc
from lmppl.inference.engine import Budget, Guarantee
from lmppl.inference.exact import Exact
from lmppl.inference.importance import Importance
from lmppl.inference.mcmc import Kernel, Mixture, Restart, SuffixResample
from lmppl.inference.mcmc.chains import StepInfo
from lmppl.inference.resampling import RESAMPLING
from lmppl.inference.reverse_annealing import conditional_annealing, reverse_ais, sandwich_annealing
from lmppl.inference.run import infer
from lmppl.inference.smc import SMC
from lmppl.inference.tempered_smc import TemperedSMC
from lmppl.lm.base import LanguageModel
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence import Constraint, Reward
from lmppl.modeling.model import Model
from lmppl.modeling.target import Target, log_evidence
from lmppl.sequences import Draws, concatenate
from lmppl.testing.enumeration import every_outcome
from tests.inference.whole_runs import check_that_a_stopped_run_goes_on
from tests.models import ENUMERABLE, TOLERANCE, all_outcomes, brute_force, count_of, enumerable_lm, has_no, wavy

VISIBLE = 1e-4  # a mutant must be wrong by this much


def small(kind: str) -> LanguageModel:
    """An LM with so few outcomes that a whole engine can be enumerated on it: 3 on the table, 7 on the networks."""
    if kind == "tabular":
        return TabularLM([[0.7, 0.3], [0.0, 1.0], [0.45, 0.55]], ["a", "<eos>"], max_new_tokens=2)
    from lmppl.lm.transformers import TransformersLM
    from tests.lm.random_models import build, tokenizer

    return TransformersLM(build(kind, 3, seed=1), tokenizer=tokenizer(3), context="a", max_new_tokens=2)


FACTORS = {
    "soft": (Reward(wavy, beta=0.6, name="wavy"),),
    "hard": (Reward(wavy, beta=0.6, name="wavy"), Constraint(lambda texts: [len(t) < 2 for t in texts], name="short")),
}


def small_model(kind: str, factors: str) -> Model:
    return Model(small(kind), FACTORS[factors])


@dataclass(frozen=True)
class PairGibbs(Kernel):
    """Outcomes i and j of the model exchange by their mass under π0·φ^λ: reversible, and few branches to walk."""

    i: int
    j: int

    name: ClassVar[str] = "pair"

    def step(self, state, source, power=1.0, *, evidence=log_evidence):
        table = evaluated_outcomes(state.target)
        pair = table.select([self.i, self.j])
        mass = pair.log_prior + power * evidence(pair)
        keys = pair.keys()
        inside = torch.tensor([key in keys for key in state.draws.keys()])  # noqa: SIM118 - a method
        where = torch.nonzero(inside).squeeze(1)
        index = torch.arange(len(state.draws))
        if len(where):
            chosen, _ = source.tokens(mass.expand(len(where), 2))
            index[where] = len(index) + chosen
        draws = concatenate([state.draws, pair]).select(index)
        numbers = torch.zeros(len(index), dtype=torch.float64)
        return replace(state, draws=draws), StepInfo(self.name, inside, numbers, torch.full_like(index, -1), numbers)


EVALUATED: dict[int, tuple[Target, Draws]] = {}


def evaluated_outcomes(target: Target) -> Draws:
    """Every outcome of the model's first context, evaluated, in the order of `all_outcomes`."""
    if id(target) not in EVALUATED:
        rows = all_outcomes(target.prior, 0)
        draws = Draws(rows.ids, rows.lengths, rows.finished, rows.context, rows.prompts, rows.decoder)
        EVALUATED[id(target)] = (target, target.evaluate(replace(draws, log_prior=target.log_prior(draws).double())))
    return EVALUATED[id(target)][1]


CYCLE = (PairGibbs(0, 1), PairGibbs(1, 2))  # one after the other: invariant, not reversible
NETWORK_CYCLE = (PairGibbs(0, 2), PairGibbs(2, 3))


def forward(model: Model, engine: AIS | TemperedSMC, ladder: tuple[float, ...]) -> tuple[float, float, dict]:
    """E Ẑ, Pr(Ẑ > 0), and E[(1/N) Σ_i w_i 1(x_i = x)] of every outcome x."""
    target = Target(model)
    shard = AnnealingShard(0, engine.num_particles, 0, (0,), engine.num_particles, ladder)
    mean, positive, total, masses = 0.0, 0.0, 0.0, {}
    for probability, part in every_outcome(lambda source: engine.simulate(target, shard, source)):
        total += probability
        z = math.exp(float(part.info["log_z"]))
        mean += probability * z
        positive += probability * (z > 0)
        weights = part.draws.log_weight.exp() / engine.num_particles
        assert float(weights.sum()) == pytest.approx(z, abs=1e-12)
        for key, w in zip(part.draws.keys(), weights.tolist(), strict=True):
            masses[key] = masses.get(key, 0.0) + probability * w
    assert total == pytest.approx(1.0, abs=TOLERANCE)
    return mean, positive, masses


def assert_unbiased(model: Model, engine: AIS | TemperedSMC, ladder: tuple[float, ...]) -> float:
    """Checks E Ẑ = Z and E[Ẑ Σ W̄ f] = Z E_π*[f] for every f; gives Pr(Ẑ > 0)."""
    mean, positive, masses = forward(model, engine, ladder)
    table = brute_force(model, 0)
    assert mean == pytest.approx(float(table.log_z.exp()), abs=TOLERANCE)
    for key, gamma in zip(table.sequences.keys(), table.log_gamma.exp().tolist(), strict=True):
        assert masses.get(key, 0.0) == pytest.approx(gamma, abs=TOLERANCE)
    return positive


# Forward: E Ẑ = Z.


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize(
    ("kind", "kernel", "ladder"),
    [
        ("tabular", CYCLE, (0.0, 0.3, 0.8, 1.0)),
        ("tabular", Restart(), (0.0, 0.4, 1.0)),
        ("tabular", SuffixResample(), (0.0, 0.4, 1.0)),
        ("llama", SuffixResample(), (0.0, 0.4, 1.0)),
        ("mistral", Restart(), (0.0, 0.4, 1.0)),
    ],
    ids=["cycle", "restart", "suffix", "llama", "mistral"],
)
def test_ais_is_unbiased(kind, kernel, ladder, factors) -> None:
    assert_unbiased(small_model(kind, factors), AIS(1, kernel=kernel), ladder)


def test_two_particles_of_ais_are_unbiased() -> None:
    assert_unbiased(small_model("tabular", "hard"), AIS(2, kernel=CYCLE), (0.0, 0.4, 1.0))


def test_ais_with_one_temperature_is_importance_sampling() -> None:
    result = infer(enumerable_lm("tabular") * Reward(wavy, name="r"), AIS(32, 1), 64)
    assert torch.allclose(result.draws.log_weight, result.draws.log_factors["r"])
    assert result.info["acceptance"].shape == (0, 2)


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("resampling", RESAMPLING)
def test_tempered_smc_is_unbiased(resampling, factors) -> None:
    engine = TemperedSMC(2, kernel=CYCLE, resampling=resampling)
    assert_unbiased(small_model("tabular", factors), engine, (0.0, 0.4, 1.0))


def test_tempered_smc_is_unbiased_on_two_inner_temperatures_with_triggered_resampling() -> None:
    engine = TemperedSMC(2, kernel=CYCLE[:1], ess_threshold=0.95)
    assert_unbiased(small_model("tabular", "soft"), engine, (0.0, 0.3, 0.8, 1.0))


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_tempered_smc_is_unbiased_on_networks(kind) -> None:
    assert_unbiased(small_model(kind, "hard"), TemperedSMC(2, kernel=NETWORK_CYCLE[:1]), (0.0, 0.4, 1.0))


@pytest.mark.parametrize("factors", FACTORS)
def test_waste_free_sweeps_are_unbiased(factors) -> None:
    engine = TemperedSMC(4, kernel=CYCLE[:1], chain_length=2)
    positive = assert_unbiased(small_model("tabular", factors), engine, (0.0, 0.4, 1.0))
    assert positive == pytest.approx(1.0) if factors == "soft" else positive < 1.0


def test_a_ladder_chosen_on_the_way_makes_the_estimate_biased() -> None:
    """Why the default freezes the ladder of a pilot: the same sweep with its own ladder fails the same check."""
    model = small_model("tabular", "soft")
    mean, _, _ = forward(model, TemperedSMC(2, kernel=CYCLE[:1], ladder="online", ess_target=0.65), ())
    assert abs(mean - float(brute_force(model, 0).log_z.exp())) > 1e-6


# Reverse: E[1/Ẑ] = Pr(Ẑ > 0)/Z and E log Ẑ ≥ log Z.


def reverse(model: Model, run) -> tuple[float, float]:
    """E[1/Ẑ] and E[log Ẑ] of `run(row, source) -> log Ẑ` over exact draws."""
    target, table = Target(model), brute_force(model, 0)
    rows = table.sequences
    rows = Draws(rows.ids, rows.lengths, rows.finished, rows.context, rows.prompts, rows.decoder)
    rows = replace(rows, log_prior=target.log_prior(rows))
    inverse, log_mean = 0.0, 0.0
    for number, mass in enumerate(table.log_posterior.exp().tolist()):
        if mass == 0.0:
            continue
        row = rows.select([number])
        for probability, log_z in every_outcome(lambda source, r=row: run(target, r, source)):
            inverse += mass * probability * math.exp(-float(log_z))
            log_mean += mass * probability * float(log_z)
    return inverse, log_mean


def annealed(engine, ladder):
    return lambda target, row, source: conditional_annealing(target, engine, row, source, ladder=ladder).log_z


LADDER, LONGER = (0.0, 0.4, 1.0), (0.0, 0.3, 0.8, 1.0)
CASES = [
    ("tabular", "soft", AIS(1, kernel=CYCLE), LONGER),
    ("tabular", "hard", AIS(1, kernel=CYCLE), LONGER),
    ("tabular", "soft", AIS(2, kernel=CYCLE), LADDER),
    ("tabular", "hard", AIS(2, kernel=CYCLE), LADDER),
    ("tabular", "soft", AIS(1, kernel=(Restart(), SuffixResample())), LADDER),
    ("tabular", "soft", TemperedSMC(2, kernel=CYCLE), LADDER),
    ("tabular", "hard", TemperedSMC(2, kernel=CYCLE), LADDER),
    ("tabular", "soft", TemperedSMC(2, kernel=CYCLE, resampling="multinomial"), LADDER),
    ("tabular", "hard", TemperedSMC(2, kernel=CYCLE, resampling="stratified"), LADDER),
    ("tabular", "hard", TemperedSMC(2, kernel=CYCLE, resampling="residual"), LADDER),
    ("tabular", "hard", TemperedSMC(2, kernel=CYCLE, resampling="ssp", ess_threshold=0.95), LADDER),
    ("llama", "soft", AIS(1, kernel=NETWORK_CYCLE), LADDER),
    ("mistral", "hard", TemperedSMC(2, kernel=NETWORK_CYCLE[:1]), LADDER),
]


@pytest.mark.parametrize(("kind", "factors", "engine", "ladder"), CASES, ids=range(len(CASES)))
def test_the_reverse_run_from_an_exact_draw(kind, factors, engine, ladder) -> None:
    model = small_model(kind, factors)
    log_z = float(brute_force(model, 0).log_z)
    inverse, log_mean = reverse(model, annealed(engine, ladder))
    table = brute_force(model, 0)
    dead = float(table.log_prior.exp()[table.log_phi == -math.inf].sum())
    positive = 1.0 - dead**engine.num_particles  # a particle that lives at first lives on
    assert inverse == pytest.approx(positive / math.exp(log_z), abs=TOLERANCE)
    assert log_mean >= log_z - TOLERANCE


def test_the_retained_row_starts_in_every_slot_alike() -> None:
    model = small_model("tabular", "soft")
    target, table = Target(model), brute_force(model, 0)
    row = model.prior.parse(table.sequences.ids[:1], torch.tensor([0]))
    row = Draws(row.ids, row.lengths, row.finished, row.context, row.prompts, model.prior.decode)
    found = torch.zeros(3, dtype=torch.float64)
    engine = TemperedSMC(3, ladder=(0.0, 1.0))
    for probability, result in every_outcome(lambda source: conditional_annealing(target, engine, row, source)):
        assert result.slots is not None
        found[result.slots] += probability
        assert result.draws.keys()[int(result.slots)] == row.keys()[0]
    assert torch.allclose(found, torch.full_like(found, 1 / 3), atol=1e-12, rtol=0)


@pytest.mark.parametrize("engine", [AIS(1, kernel=CYCLE), AIS(2, kernel=CYCLE), TemperedSMC(2, kernel=CYCLE)])
def test_the_same_kernels_in_the_forward_order_are_no_reverse_run(engine) -> None:
    """Mutant: the composition is not reversible, so that it is not its own time reversal.

    For one particle E[1/W] does not see that: any kernels that leave the path invariant give it, in any order.
    """
    model, ladder = small_model("tabular", "soft"), (0.0, 0.4, 1.0)
    schedule = engine.schedule(ladder)

    def mutant(target, row, source):
        path = backward_path(target, row, ladder, schedule.kernels, source)
        return AnnealedSweep(target, row.context, schedule, source, path=path).run().log_z

    inverse, _ = reverse(model, mutant)
    off = abs(inverse * float(brute_force(model, 0).log_z.exp()) - 1.0)
    assert off < TOLERANCE if engine.num_particles == 1 else off > VISIBLE


def test_a_retained_path_that_need_not_survive_is_no_conditional_run(monkeypatch) -> None:
    """Mutant: slot 0 is kept and the others are resampled, which is right for multinomial resampling alone."""
    import lmppl.inference.annealed_sweep as module

    def keep_first(scheme, log_weights, retained, source):
        ancestors = module.resample(scheme, log_weights, source)
        ancestors[torch.arange(len(retained)), retained] = retained
        return ancestors, retained

    model, ladder = small_model("tabular", "soft"), (0.0, 0.4, 1.0)
    engine = TemperedSMC(2, kernel=CYCLE[:1])
    right, _ = reverse(model, annealed(engine, ladder))
    monkeypatch.setattr(module, "resample_conditionally", keep_first)
    wrong, _ = reverse(model, annealed(engine, ladder))
    z = float(brute_force(model, 0).log_z.exp())
    assert right * z == pytest.approx(1.0, abs=TOLERANCE)
    assert abs(wrong * z - 1.0) > VISIBLE


# The ladder.


def test_conditional_ess_is_the_ess_of_the_increments_among_the_living() -> None:
    log_w = torch.tensor([[0.0, 0.0, 0.0, -math.inf], [-math.inf] * 4], dtype=torch.float64)
    log_u = torch.tensor([[0.0, math.log(2.0), -math.inf, 1.0], [0.0] * 4], dtype=torch.float64)
    share = conditional_ess(log_w, log_u)
    assert float(share[0]) == pytest.approx(1.5**2 / 2.5)
    assert bool(share[1].isnan())


def test_the_next_level_does_not_wait_for_a_group_in_which_nothing_lives() -> None:
    log_phi = torch.tensor([[-3.0, 0.0, 1.0, 2.0], [-math.inf] * 4], dtype=torch.float64)
    level = next_level(torch.zeros(2, 4, dtype=torch.float64), log_phi, 0.0, 0.7)
    assert level == next_level(torch.zeros(1, 4, dtype=torch.float64), log_phi[:1], 0.0, 0.7)
    assert 0.05 < level < 1.0


def test_the_next_level_meets_its_target_in_every_group() -> None:
    log_phi = torch.randn(2, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    log_phi[1] *= 2
    log_phi[1, :50] = -math.inf
    log_w = torch.zeros(2, 200, dtype=torch.float64)
    level = next_level(log_w, log_phi, 0.0, 0.5)
    share = conditional_ess(log_w, level * log_phi)
    assert float(share.min()) == pytest.approx(0.5, abs=1e-9)
    assert next_level(log_w, log_phi * 1e-3, 0.2, 0.5) == 1.0


# Runs.

MODEL = enumerable_lm("tabular") * Reward(wavy, beta=0.3, name="wavy") * Constraint(has_no("b"), name="no b")


@pytest.mark.parametrize("kind", ENUMERABLE)
@pytest.mark.parametrize(
    "engine",
    [AIS(64, 6), TemperedSMC(64), TemperedSMC(64, ladder="online"), TemperedSMC(64, chain_length=4)],
    ids=["ais", "pilot", "online", "waste-free"],
)
def test_a_run_agrees_with_enumeration_in_both_contexts(kind, engine) -> None:
    model = enumerable_lm(kind) * Reward(wavy, beta=0.3, name="wavy") * Constraint(has_no("b"), name="no b")
    result = infer(model, engine, 64 * 12, seed=3)
    assert result.guarantee is Guarantee.CONSISTENT
    assert torch.bincount(result.draws.context).tolist() == [64 * 12] * 2
    (estimate,) = result.log_normalizer
    z = result.info["log_z_sweeps"]
    assert z.shape == (2, 12)
    draws = result.draws
    for c in (0, 1):
        table = brute_force(model, c)
        mean = torch.logsumexp(draws.log_weight[draws.context == c], 0) - math.log(64 * 12)
        assert float(mean) == pytest.approx(float(torch.logsumexp(z[c], 0)) - math.log(12), abs=1e-9)
        assert float(estimate.value[c]) == pytest.approx(float(mean), abs=1e-9)
        error = float(estimate.standard_error[c])
        assert abs(float(estimate.value[c] - table.log_z)) < 4.5 * error + 0.02
    means = result.expectation(lambda texts: [float("a" in t) for t in texts])
    exact = infer(model, Exact()).expectation(lambda texts: [float("a" in t) for t in texts])
    assert bool(((means.value - exact.value).abs() < 4.5 * means.standard_error + 0.02).all())
    assert result.info["ladder"][0] == 0.0
    assert result.info["ladder"][-1] == 1.0
    assert "ladders" not in result.info or engine.ladder == "online"
    assert estimate.kind == ("consistent" if getattr(engine, "ladder", None) == "online" else "unbiased_Z")


def test_the_pilot_chooses_a_ladder_and_gives_no_draws() -> None:
    parts = []
    result = infer(MODEL, TemperedSMC(32), 64, on_part=parts.append)
    assert [p.shard.pilot for p in parts] == [True, False, False]
    assert len(parts[0].draws) == 0
    assert parts[1].shard.ladder == parts[2].shard.ladder == tuple(result.info["ladder"].tolist())
    assert set(result.draws.columns["shard"].tolist()) == {1, 2}


def test_diagnostics_have_one_entry_a_temperature() -> None:
    result = infer(MODEL, AIS(32, 5), 64)
    info = result.info
    assert info["ladder"].tolist() == pytest.approx([(k / 5) ** 2 for k in range(6)])
    assert info["acceptance"].shape == (4, 2)
    assert bool(((info["acceptance"] > 0) & (info["acceptance"] < 1)).all())
    assert info["ess_history"].shape == (5, 2)
    assert set(result.draws.columns) == {"shard", "parent"}
    assert set(infer(MODEL, TemperedSMC(8), 16).draws.columns) == {"shard", "parent", "sweep"}


def test_equal_seeds_give_equal_draws() -> None:
    for engine in (AIS(16, 4), TemperedSMC(16)):
        first, again, other = (infer(MODEL, engine, 32, seed=s).draws for s in (0, 0, 1))
        assert first.keys() == again.keys() != other.keys()
        assert torch.equal(first.log_weight, again.log_weight)


def test_a_budget_adds_sweeps() -> None:
    result = infer(MODEL, TemperedSMC(16), budget=Budget(lm_tokens=4000))
    assert result.cost.lm_tokens >= 4000
    assert result.info["log_z_sweeps"].shape[1] > 1
    with pytest.raises(InfeasibleModel, match="after its pilot"):
        infer(MODEL, TemperedSMC(16), budget=Budget(lm_tokens=1))


@pytest.mark.parametrize("engine", [AIS(16, 3), TemperedSMC(16)], ids=["ais", "tempered"])
def test_a_run_that_was_stopped_goes_on_to_the_same_draws(engine, tmp_path) -> None:
    check_that_a_stopped_run_goes_on(MODEL, engine, 64, tmp_path)


def test_annealing_beats_importance_from_the_prior_at_a_steep_reward() -> None:
    steep = enumerable_lm("tabular") * Reward(count_of("c"), beta=0.12, name="c")
    exact = torch.stack([brute_force(steep, c).log_z for c in (0, 1)])[:, None]

    def error(engine) -> float:
        log_z = infer(steep, engine, 64 * 10, seed=1).info["log_z_sweeps"]
        return float((log_z - exact).square().mean())

    assert error(TemperedSMC(64, num_moves=2)) < 0.5 * error(AIS(64, 1))


def test_live_figures() -> None:
    parts = []
    engine = TemperedSMC(16, ess_target=0.95)
    infer(MODEL, engine, 32, on_part=parts.append)
    assert set(engine.live(parts[:1])) == {"pilot", "temperatures"}
    assert set(engine.live(parts)) == {"sweeps", "log Ẑ", "temperatures", "acceptance"}


# Bounds.


@pytest.mark.parametrize("engine", [AIS(32, 6), TemperedSMC(32)], ids=["ais", "tempered"])
def test_the_sandwich_holds_log_z(engine) -> None:
    exact = infer(MODEL, Exact()).draw(40, generator=torch.Generator().manual_seed(0))
    low, high = sandwich(MODEL, engine, exact.with_columns(log_weight=None), num_sweeps=20, seed=5)
    assert (low.kind, high.kind) == ("lower_bound", "upper_bound")
    for c in (0, 1):
        log_z = float(brute_force(MODEL, c).log_z)
        assert float(low.interval[c, 0]) - 0.02 < log_z < float(high.interval[c, 1]) + 0.02
        gap = float(high.value[c] - low.value[c])
        noise = math.hypot(float(high.standard_error[c]), float(low.standard_error[c]))
        assert -4.5 * noise < gap < 0.3
    same = reverse_ais(MODEL, engine, exact.with_columns(log_weight=None), seed=5)
    assert torch.allclose(same.value, high.value)


def test_the_reverse_run_sees_a_mode_that_forward_runs_miss() -> None:
    """One outcome in 10⁵ draws has nearly all the mass: weights look fine, and the upper bound says so."""
    lm = TabularLM([[0.5, 0.5 - 1e-5, 1e-5, 0.0], [0.2, 0.2, 0.0, 0.6], [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0],
                    [0.5, 0.5 - 1e-5, 1e-5, 0.0]], ["a", "b", "c", "<eos>"], max_new_tokens=4)  # fmt: skip
    model = lm * Reward(count_of("c"), beta=1 / 18.0, name="c")
    forward_run = infer(model, AIS(64, 3, kernel=SuffixResample()), 64 * 4, seed=2)
    exact = infer(model, Exact()).draw(20, generator=torch.Generator().manual_seed(0)).with_columns(log_weight=None)
    high = reverse_ais(model, AIS(64, 3, kernel=SuffixResample()), exact, seed=2)
    log_z = float(brute_force(model, 0).log_z)
    assert float(forward_run.log_normalizer[0].value) < log_z - 3
    assert float(forward_run.info["ess"]) > 200
    assert float(high.interval[0, 1]) > log_z - 0.1


# What goes wrong.


def test_all_dead_names_the_factor_the_temperature_and_the_bound() -> None:
    never = MODEL * Constraint(lambda texts: [False] * len(texts), name="never")
    with pytest.raises(InfeasibleModel, match=r"died at the first temperature, λ = 0.0625: factor 'never'.*Pr_π0"):
        infer(never, AIS(16, 4), 32)
    with pytest.raises(InfeasibleModel, match=r"tempered_smc: all .* 'never'"):
        infer(never, TemperedSMC(16), 32)


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        (AIS(0), "num_particles=0"),
        (AIS(4, 0), "num_temperatures=0"),
        (AIS(4, ladder=()), r"got ladder=\(\), expected a tuple of numbers that rise from 0 to 1"),
        (TemperedSMC(4, ladder=()), r"got ladder=\(\), expected a tuple of numbers that rise from 0 to 1"),
        (AIS(4, ladder=(0.0, "half", 1.0)), "numbers that rise from 0 to 1"),
        (AIS(4, ladder=(0.0, 0.5)), "numbers that rise from 0 to 1"),
        (AIS(4, ladder=(0.0, 0.5, 0.5, 1.0)), "numbers that rise from 0 to 1"),
        (AIS(4, kernel=()), "expected a kernel"),
        (TemperedSMC(4, ladder="guess"), "'pilot', 'online'"),
        (TemperedSMC(4, ess_target=1.0), "ess_target=1.0"),
        (TemperedSMC(4, ess_threshold=2.0), "ess_threshold=2.0"),
        (TemperedSMC(4, resampling="beam"), "no resampling is called 'beam'"),
        (TemperedSMC(4, chain_length=3), "a divisor of num_particles=4"),
        (TemperedSMC(4, chain_length=2, num_moves=2), "waste-free"),
    ],
)
def test_nonsense_is_refused_when_planned(engine, words) -> None:
    with pytest.raises(ModelError, match=words):
        infer(MODEL, engine, 8)


def test_one_sandwich_for_each_engine_that_can_hold_an_exact_draw() -> None:
    exact = infer(MODEL, Exact()).draw(4, generator=torch.Generator().manual_seed(0)).with_columns(log_weight=None)
    for engine, part in ((SMC(8), sandwich_smc), (AIS(8, 2), sandwich_annealing), (TemperedSMC(8), sandwich_annealing)):
        whole, alone = (f(MODEL, engine, exact, num_sweeps=3, seed=2, level=0.8) for f in (sandwich, part))
        for mine, other in zip(whole, alone, strict=True):
            assert torch.equal(mine.value, other.value)
            assert torch.equal(mine.interval, other.interval)
            assert (mine.kind, mine.level, mine.note) == (other.kind, 0.8, other.note)
    with pytest.raises(ModelError, match="got Importance, expected SMC, AIS or TemperedSMC"):
        sandwich(MODEL, Importance(), exact)


def test_reverse_runs_need_exact_draws_and_a_fixed_ladder() -> None:
    exact = infer(MODEL, Exact()).draw(2, generator=torch.Generator().manual_seed(0)).with_columns(log_weight=None)
    with pytest.raises(ModelError, match="use ladder='pilot'"):
        reverse_ais(MODEL, TemperedSMC(4, ladder="online"), exact)
    with pytest.raises(ModelError, match="no bound follows"):
        sandwich(MODEL, TemperedSMC(4, ladder="online"), exact)
    with pytest.raises(ModelError, match="waste-free"):
        reverse_ais(MODEL, TemperedSMC(4, chain_length=2), exact)
    weighted = exact.with_columns(log_weight=torch.arange(float(len(exact))))
    with pytest.raises(ModelError, match="equally weighted exact ones"):
        reverse_ais(MODEL, AIS(4), weighted)
    with pytest.raises(ModelError, match="no exact draw for context 'ab'"):
        reverse_ais(MODEL, AIS(4, 2), exact.select(exact.context == 0))
    prior = MODEL.prior.draw(200, generator=torch.Generator().manual_seed(0))
    dead = prior.select(torch.tensor(["b" in text for text in prior.text]))
    with pytest.raises(ModelError, match=r"reverse run: row 0, .* has γ = 0"):
        reverse_ais(MODEL, AIS(4, 1), dead)
    for count in (0, -1, 1.5):
        with pytest.raises(ModelError, match=f"reverse_ais: got num_particles={count}, expected an integer"):
            reverse_ais(MODEL, AIS(4), exact, num_particles=count)
    for engine in (SMC(4), AIS(4), TemperedSMC(4)):
        with pytest.raises(ModelError, match="sandwich: got num_sweeps=0, expected an integer"):
            sandwich(MODEL, engine, exact, num_sweeps=0)
    with pytest.raises(ModelError, match="SMC: got num_particles=0"):
        sandwich(MODEL, SMC(0), exact)


def test_default_kernels_are_far_and_near_moves() -> None:
    assert isinstance(AIS().kernel, Mixture)
    assert "neal" in AIS().cite().lower()
    assert "Waste-Free" in TemperedSMC().cite()
    assert str(AIS(num_temperatures=4)) == "ais(num_temperatures=4)"
