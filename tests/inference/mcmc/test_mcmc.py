"""The engine: segments, starts, figures, certificate, estimated factors, and what a new user would get wrong."""

import math

import pytest
import torch

from lmppl.errors import InfeasibleModel, ModelError
from lmppl.inference.approximation import Chains
from lmppl.inference.engine import Budget, Request
from lmppl.inference.exact import Exact
from lmppl.inference.importance import Importance
from lmppl.inference.mcmc import MCMC, Mixture, ParticleGibbs, Restart, SuffixResample, Tempered, TokenGibbs
from lmppl.inference.mcmc.chains import StepInfo
from lmppl.inference.mcmc.summary import Moves, stuck
from lmppl.inference.run import infer
from lmppl.inference.smc import SMC
from lmppl.lm.randomness import Source
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence.constraint import Constraint
from lmppl.modeling.evidence.reward import Reward
from lmppl.modeling.factors import Factor, Feature
from lmppl.modeling.target import Target, log_evidence
from lmppl.testing import check_engine, references
from lmppl.testing.enumeration import every_outcome
from tests.inference.mcmc.kernel_matrices import CONTEXT, EXACT, SHAPES, VISIBLE, draws_at, law_at, tiny_lm
from tests.inference.smc_cases import ArbitraryTwist
from tests.models import brute_force, enumerable_lm, goodness_of_fit, has_no, wavy

FEW = {"num_chains": 8, "num_steps": 12, "warmup": 4}


def by_name(*names):
    return [r for r in references() if r.name in names]


def test_it_keeps_its_guarantee():
    report = check_engine(MCMC(), problems=by_name("reward_and_constraint"))
    assert "expectations are within 4.5 standard errors" in report.held
    assert "shards depend on seed and id alone" in report.held


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_draws_of_networks_have_the_law_of_the_posterior(kind):
    model = SHAPES["hard"](tiny_lm(kind))
    engine = MCMC(num_chains=400, num_steps=1, warmup=25)
    run = infer(model, engine, seed=3, progress=False)
    for context in (0, 1):
        brute = brute_force(model, context)
        rows = run.draws.select(run.draws.context == context)
        assert goodness_of_fit(rows, brute, brute.log_posterior) > 1e-4


def test_chains_are_rectangular_and_expectations_use_their_error():
    run = infer(SHAPES["soft"](tiny_lm("tabular")), MCMC(8, num_steps=24, warmup=4), progress=False)
    assert isinstance(run, Chains)
    draws = run.draws
    assert len(draws) == 2 * 8 * 24
    for context in (0, 1):
        rows = draws.context == context
        assert sorted(draws.columns["chain"][rows].tolist()) == sorted(list(range(8)) * 24)
        assert draws.columns["step"][rows].max() == 23
    estimate = run.expectation("wavy")
    values = draws.features["wavy"][draws.context == 0].double()
    assert float(estimate.value[0]) == pytest.approx(float(values.mean()))
    assert torch.allclose(estimate.standard_error, run.info["mcse"]["wavy"] * 0.4, rtol=1e-9)
    short = infer(SHAPES["soft"](tiny_lm("tabular")), MCMC(num_chains=8, num_steps=1, warmup=2), progress=False)
    means = short.draws.features["wavy"][short.draws.context == 1].double()
    assert float(short.expectation("wavy").standard_error[1]) == pytest.approx(float(means.std() / math.sqrt(8)))


def test_segments_go_on_from_plain_state():
    model = SHAPES["soft"](tiny_lm("tabular"))
    engine = MCMC(num_chains=4, num_steps=70, warmup=3, thin=2)
    target = Target(model)
    shards = engine.plan(target, Request(None, None, 5))
    assert [s.steps for s in shards] == [32, 32, 6]
    assert [s.warmup for s in shards] == [3, 0, 0]
    whole = infer(model, engine, seed=5, progress=False)
    state, parts = None, []
    for shard in shards:
        part = engine.run_shard(Target(model), shard, state=state)
        state = part.info["state"]
        parts.append(part)
    again = engine.merge(parts)
    assert again.draws.keys() == whole.draws.keys()
    assert whole.draws.columns["step"][whole.draws.context == 0].unique().tolist() == list(range(70))
    assert int(state["step"]) == 70


def test_a_budget_ends_it_after_whole_segments():
    model = SHAPES["soft"](tiny_lm("tabular"))
    run = infer(model, MCMC(num_chains=4, warmup=2), budget=Budget(lm_tokens=700), progress=False)
    assert len(run.draws) % (2 * 4 * 32) == 0
    assert run.cost.lm_tokens >= 700


def test_figures_name_kernels_positions_and_stuck_chains(caplog):
    lm = tiny_lm("tabular")
    kernel = Mixture((Restart(), SuffixResample("horizon"), TokenGibbs(2)))
    run = infer(SHAPES["soft"](lm), MCMC(**FEW, kernel=kernel), seed=2, progress=False)
    info = run.info
    assert set(info["acceptance"]) == {"restart", "suffix", "token_gibbs"}
    assert info["acceptance"]["restart"].shape == (2,)
    assert info["acceptance_by_position"]["suffix"].shape == (lm.max_new_tokens + 1,)
    assert set(info["rhat"]) == set(info["bulk_ess"]) == {"wavy", "log_prior", "length"}
    assert bool((info["nested_rhat"]["length"] > 0.5).all())
    one = Constraint(lambda texts: [t == "ab" for t in texts], name="one")
    with caplog.at_level("WARNING"):
        stuck = infer(lm * one, MCMC(**FEW, max_tries=4096), progress=False)
    assert stuck.info["stuck"][0] == tuple(range(8))
    assert caplog.text.count("8 of 8 chains never moved for context '', and in 1 more") == 1
    assert all(len(record.getMessage()) < 200 for record in caplog.records)
    assert any("constant" in note for note in stuck.info["chain_notes"])
    assert float(stuck.expectation("one").standard_error[0]) == 0.0


def segment(count, last, steps, settled=0, woken=0):
    every = (torch.full((len(count),), n) for n in (settled, woken))
    columns = zip(("count", "last", "settled", "woken"), (torch.tensor(count), torch.tensor(last), *every), strict=True)
    return {**dict(columns), "steps": steps}


def test_chains_that_stand_still_longer_than_chance_are_stuck():
    """Chain 2 stands still while the others move in half of their steps: (1/2)^m · 4 < 0.001 from m = 12 on."""
    for steps, expected in ((10, {}), (12, {0: (2,)})):
        half = steps // 2
        assert stuck([segment([half, half, 0, half], [steps, steps, 0, steps], steps)], 1, 1) == expected
    # Moves of rare events, one in 50 steps of each chain, explain that some chains show none.
    assert stuck([segment([1] * 40 + [0] * 24, [3] * 40 + [0] * 24, 50)], 1, 2) == {}
    # So do moves in bursts: often, but rarely after a rest.
    assert stuck([segment([30] * 63 + [0], [90] * 63 + [0], 100)], 1, 2) == {0: (63,)}
    assert stuck([segment([30] * 63 + [0], [90] * 63 + [0], 100, settled=50, woken=2)], 1, 2) == {}
    # The warm-up counts, and the time since the last move: of two segments, and for each context by itself.
    first = segment([16, 15, 16, 14, 0, 3], [30, 29, 31, 32, 0, 4], 32)
    second = segment([16, 0, 15, 12, 0, 9], [32, 0, 31, 32, 0, 32], 32)
    assert stuck([first, second], 2, 32) == {0: (1,), 1: (1,)}
    assert stuck([first], 2, 1) == {1: (1, 2)}  # the third has not moved for 28 steps
    # Where no chain moves at all there is no rate.
    assert stuck([segment([0, 0], [0, 0], 9)], 1, 9) == {}
    assert stuck([segment([0, 0], [0, 0], 10)], 1, 10) == {0: (0, 1)}


def test_moves_are_changes_of_the_row_and_not_acceptances():
    lm = tiny_lm("tabular")
    every = lm.enumerate_sequences(0)
    start = torch.tensor([0, 1, 2, 3])
    moves = Moves(every.select(start))
    moves.see(every.select(start))
    moves.see(every.select(torch.tensor([0, 2, 1, 4])))
    assert (moves.count.tolist(), moves.last.tolist(), moves.steps) == ([0, 1, 1, 1], [0, 2, 2, 2], 2)
    for rows in [[0, 2, 1, 4]] * 5 + [[0, 1, 1, 4]] * 2:
        moves.see(every.select(torch.tensor(rows)))
    assert (moves.settled.tolist(), moves.woken.tolist()) == ([4, 1, 2, 2], [0, 1, 0, 0])


def test_chains_that_their_kernel_cannot_free_are_named():
    """No change of one token of "aaaa" leads to a text that begins with "bb": those chains stand still, others move."""
    prior = TabularLM([0.5, 0.5], ["a", "b"], max_new_tokens=4, eos=None)
    islands = prior * Constraint(lambda texts: [t.startswith("bb") or t == "aaaa" for t in texts], name="islands")
    run = infer(islands, MCMC(16, num_steps=40, warmup=0, kernel=TokenGibbs(2)), seed=0, progress=False)
    first = run.draws.columns["step"] == 0
    held = [i for i, text in enumerate(run.draws.select(torch.nonzero(first).squeeze(1)).text) if text == "aaaa"]
    assert 0 < len(held) < 16
    assert run.info["stuck"] == {0: tuple(held)}


def test_few_kept_steps_cry_no_wolf(caplog):
    """π* gives one text 0.89: chains that keep it for two steps, or for 64, are right to."""
    prior = TabularLM.random(4, 5, seed=0, context=["", "ab"])
    model = prior * Reward(lambda texts: [float(t.count("a")) for t in texts], beta=0.7, upper=5, name="a")
    with caplog.at_level("WARNING"):
        for engine in (MCMC(num_steps=4), MCMC(), Tempered(num_steps=2), Tempered(num_steps=7)):
            assert infer(model, engine, seed=3, progress=False).info["stuck"] == {}
    assert "never moved" not in caplog.text


@pytest.mark.parametrize("shape", ["soft", "hard"])
def test_log_z_comes_with_the_restarts(shape):
    model = SHAPES[shape](enumerable_lm("tabular"))
    run = infer(model, MCMC(num_chains=200, num_steps=10, warmup=10), seed=4, progress=False)
    exact = infer(model, Exact(), progress=False).log_normalizer[0].value
    (estimate,) = run.log_normalizer
    assert estimate.kind == "unbiased_Z"
    assert bool(((estimate.value - exact).abs() < 4.5 * estimate.standard_error).all())
    assert infer(model, MCMC(**FEW, kernel=SuffixResample()), progress=False).log_normalizer == ()


def test_proposals_of_another_law_give_no_log_z_however_deep_they_stand():
    other = Mixture((Mixture((Restart(proposal=enumerable_lm("tabular", seed=3)),)), SuffixResample()))
    run = infer(enumerable_lm("tabular") * Reward(wavy, beta=0.5), MCMC(**FEW, kernel=other), progress=False)
    assert run.log_normalizer == ()


def test_the_certificate_bounds_the_distance():
    lm = tiny_lm("tabular")
    model = lm * Reward(wavy, beta=1.0, upper=1.0)
    run = infer(model, MCMC(64, num_steps=20, warmup=10, kernel=Restart()), progress=False)
    exact = infer(model, Exact(), progress=False).log_normalizer[0].value
    best = (1 - (exact - 1.0).exp()) ** 30
    assert bool((run.info["certificate"] >= best).all())  # Z at the lower end of its interval
    assert bool((run.info["certificate"] < 1e-2).all())
    assert "certificate" not in infer(model, MCMC(**FEW), progress=False).info
    other = Restart(tiny_lm("tabular", 1))
    assert "certificate" not in infer(model, MCMC(**FEW, kernel=other), progress=False).info
    none = infer(SHAPES["hard"](lm), MCMC(**FEW, kernel=Restart()), progress=False).info
    assert none["certificate"].isnan().tolist() == [True, True]
    assert "no certificate: factor 'wavy' declares no bound; pass upper=..." in none["chain_notes"]


def test_the_certificate_counts_the_steps_of_every_segment():
    model = tiny_lm("tabular") * Reward(wavy, beta=1.0, upper=1.0)
    run = infer(model, MCMC(2, num_steps=40, warmup=3, thin=2, kernel=Restart()), progress=False)
    share = torch.exp(run.log_normalizer[-1].interval[:, 0] - 1.0)
    expected = (1 - share) ** (3 + 2 * 40)
    assert torch.allclose(run.info["certificate"], expected, rtol=1e-9, atol=0)
    assert bool((expected > 0).all())


# Starts.


def test_starts_from_draws_approximations_and_engines():
    model = SHAPES["hard"](tiny_lm("tabular"))
    weighted = infer(model, Importance(200), progress=False)
    for start in (weighted, weighted.draws, Importance(100), "importance(num_draws=50)"):
        run = infer(model, MCMC(**FEW, start=start), progress=False)
        assert bool((run.info["starts"] >= 1).all())
        assert all(has_no("b")(run.draws.text))
    own = model.prior.sequences([[0, 0, 0]] * 8 + [[0, 2]] * 8, [0] * 8 + [1] * 8)
    still = infer(model, MCMC(8, num_steps=1, warmup=0, kernel=SuffixResample("horizon"), start=own), progress=False)
    assert still.info["starts"].tolist() == [8, 8]
    with pytest.raises(ModelError, match="is no outcome of the prior"):
        infer(model, MCMC(**FEW, start=model.prior.sequences([[0]], [0])), progress=False)
    with pytest.raises(InfeasibleModel, match="no row for context 'ab'"):
        infer(model, MCMC(**FEW, start=model.prior.sequences([[2]], [0])), progress=False)
    with pytest.raises(ModelError, match="where the target is 0"):
        infer(model, MCMC(**FEW, start=model.prior.sequences([[1, 2], [1, 2]], [0, 1])), progress=False)
    with pytest.raises(ModelError, match="expected 'prior', draws"):
        infer(model, MCMC(**FEW, start=3), progress=False)


def test_no_start_says_what_follows_and_few_starts_are_shared():
    lm = tiny_lm("tabular")
    never = lm * Reward(wavy) * Constraint(lambda t: [False] * len(t), name="no")
    words = (
        r": none of 100 draws .* has γ > 0 \(factor 'no' is 0 on 100\): Pr_π0\(γ > 0\) < .*start=an engine that steers"
    )
    with pytest.raises(InfeasibleModel, match="^mcmc" + words):
        infer(never, MCMC(**FEW, max_tries=100), progress=False)
    with pytest.raises(InfeasibleModel, match="^tempered" + words):
        infer(never, Tempered(num_chains=2, max_tries=100), progress=False)
    rare = lm * Constraint(lambda texts: [t == "aaa" for t in texts])
    chance = [float(lm.score(lm.sequences([[0, 0, 0]], [c])).exp()) for c in (0, 1)]
    assert min(chance) > 0
    tries = math.ceil(3 / min(chance))
    run = infer(rare, MCMC(num_chains=64, num_steps=2, warmup=0, max_tries=tries), seed=1, progress=False)
    assert bool((run.info["starts"] < 64).any())


def test_a_sweep_that_cannot_begin_is_the_chains_error():
    class Zero(ArbitraryTwist):
        def value(self, context, prefix):
            return super().value(context, prefix) if prefix else -math.inf

    kernel = ParticleGibbs(SMC(2, twist=Zero(3), proposal="prior"))
    with pytest.raises(InfeasibleModel, match=r"^mcmc, kernel ParticleGibbs: the twist is 0 before the first token"):
        infer(SHAPES["soft"](tiny_lm("tabular")), MCMC(**FEW, kernel=kernel), progress=False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_chains": 0}, "got num_chains=0"),
        ({"thin": 0}, "got thin=0"),
        ({"warmup": -1}, "got warmup=-1"),
        ({"kernel": Restart}, "expected a kernel"),
    ],
)
def test_wrong_configurations_are_refused(changes, words):
    with pytest.raises(ModelError, match=words):
        infer(SHAPES["soft"](tiny_lm("tabular")), MCMC(**changes), progress=False)


# Estimated factors.

LEVELS = (0.25, 1.75)  # of the estimate over φ, equally likely: unbiased


def estimated(lm, current):
    """log φ̂ = wavy/0.4 + log level, the level drawn anew at each call by the present source."""

    def fn(texts):
        which = current["source"].integers(torch.full((len(texts),), len(LEVELS)))
        levels = torch.tensor(LEVELS, dtype=torch.float64)[which]
        return torch.tensor(wavy(texts), dtype=torch.float64) / 0.4 + levels.log()

    return lm * Factor("estimate", (Feature("estimate", fn, stochastic=True),), lambda columns: columns["estimate"])


def pseudo_marginal_matrix(kernel, lm, *, redraw):
    """On (row, level): the estimate is part of the state; the mutant forgets it and has rows alone."""
    current = {}
    model, soft = estimated(lm, current), SHAPES["soft"](lm)
    target, brute = Target(model), brute_force(soft, CONTEXT)
    keys, size = brute.sequences.keys(), len(LEVELS)
    number = {key: i for i, key in enumerate(keys)}
    count = len(keys) * (1 if redraw else size)
    matrix = torch.zeros(count, count, dtype=torch.float64)
    base = brute.log_phi
    for i in range(len(keys)):
        for level in range(1 if redraw else size):
            start = draws_at(model, brute, [i])
            if not redraw:
                value = base[i : i + 1] + math.log(LEVELS[level])
                columns = {"features": {"estimate": value}, "log_factors": {"estimate": value}}
                start = start.with_columns(**columns)

            def run(source, start=start):
                current["source"] = source
                state, _ = kernel.step(kernel.start(target, start), source)
                return state.draws.keys()[0], float(state.draws.log_factors["estimate"][0])

            for probability, (key, value) in every_outcome(run):
                to = number[key]
                if not redraw:
                    level_of = math.exp(value - float(base[to]))
                    to = to * size + min(range(size), key=lambda k: abs(LEVELS[k] - level_of))
                matrix[i if redraw else i * size + level, to] += probability
    law = law_at(brute)
    if not redraw:
        law = (law[:, None] * torch.tensor(LEVELS, dtype=torch.float64) / size).flatten()
    return matrix, law


@pytest.mark.parametrize("kernel", [Restart(), SuffixResample(), TokenGibbs(None)], ids=lambda k: k.name)
def test_estimates_that_are_kept_leave_the_posterior(kernel):
    matrix, law = pseudo_marginal_matrix(kernel, tiny_lm("tabular", horizon=2), redraw=False)
    assert float((matrix.sum(1) - 1).abs().max()) < EXACT
    assert float((law @ matrix - law).abs().max()) < EXACT


def test_mutant_that_redraws_both_estimates():
    matrix, law = pseudo_marginal_matrix(Restart(), tiny_lm("tabular", horizon=2), redraw=True)
    assert float((law @ matrix - law).abs().max()) > VISIBLE


def test_a_run_with_an_estimated_factor():
    generator = torch.Generator().manual_seed(0)
    model = estimated(tiny_lm("tabular"), {"source": Source(generator)})
    run = infer(model, MCMC(num_chains=100, num_steps=4, warmup=20), progress=False)
    assert isinstance(run, Chains)
    assert run.cost.cache_hits == 0


class Still(Restart):
    """Proposes nothing."""

    def step(self, state, source, power=1.0, *, evidence=log_evidence):
        none = torch.full((len(state),), math.nan, dtype=torch.float64)
        nowhere = torch.full((len(state),), -1)
        return state, StepInfo(self.name, torch.zeros(len(state), dtype=torch.bool), none, nowhere, none)


def test_the_present_estimate_is_kept_from_one_segment_to_the_next():
    model = estimated(tiny_lm("tabular"), {"source": Source(torch.Generator().manual_seed(0))})
    engine = MCMC(num_chains=100, num_steps=40, warmup=0, kernel=Still())
    target = Target(model)
    first, second = engine.plan(target, Request(None, None, 3))
    part = engine.run_shard(target, first)
    after = engine.run_shard(target, second, state=part.info["state"])
    (name,) = part.draws.log_factors
    last = part.draws.select(part.draws.columns["step"] == 31)
    next_one = after.draws.select(after.draws.columns["step"] == 32)
    assert last.keys() == next_one.keys()
    assert torch.equal(last.log_factors[name], next_one.log_factors[name])
    again = target.evaluate(last.with_columns(features={}, log_factors={}))
    assert not torch.equal(last.log_factors[name], again.log_factors[name])  # mutant: estimated anew


# The power posterior.


def test_power_posterior_with_the_tempered_prior_as_proposal():
    alpha = 3.0
    lm = tiny_lm("tabular", horizon=4)
    kernel = SuffixResample("horizon", proposal=lm.at_temperature(1 / alpha), block=2)
    run = infer(lm**alpha, MCMC(400, num_steps=8, warmup=23, kernel=kernel), seed=2, progress=False)
    last = run.draws.select(run.draws.columns["step"] == 7)
    for context in (0, 1):
        brute = brute_force(lm, context)
        law = torch.log_softmax(alpha * brute.log_prior, 0)
        rows = last.select(last.context == context)
        assert goodness_of_fit(rows, brute, law) > 1e-4
    own = infer(lm**alpha, MCMC(400, num_steps=8, warmup=23, kernel=SuffixResample()), seed=2, progress=False)
    assert float(run.info["acceptance"]["suffix"].min()) > float(own.info["acceptance"]["suffix"].max())


def test_means_of_chains_are_consistent_not_unbiased() -> None:
    found = infer(TabularLM.random(3, 2, seed=5) * Reward(wavy), MCMC(num_chains=4, num_steps=8), seed=0)
    assert found.expectation(lambda texts: [float(len(t)) for t in texts]).kind == "consistent"


def test_constraints_say_nothing_of_mixing() -> None:
    """log φ = 0 on all rows: they have no figures, and R̂ of the others is finite."""
    lm = TabularLM.random(4, 4, seed=5)
    model = lm * Reward(wavy) * Constraint(has_no("aa"), name="no_aa")
    found = infer(model, MCMC(num_chains=16, num_steps=32), seed=0)
    assert set(found.info["rhat"]) == set(found.info["nested_rhat"]) == {"wavy", "log_prior", "length"}
    assert all(bool(torch.isfinite(value).all()) for value in found.info["rhat"].values())


def test_means_under_an_engines_own_law_are_called_so() -> None:
    model = TabularLM.random(3, 2, seed=5) * Reward(wavy, upper=1.0)
    for engine, kind in (("best_of_n", "own_law"), ("quasi_rejection", "own_law"), ("rejection", "unbiased"),
                         ("importance", "consistent")):  # fmt: skip
        assert infer(model, engine, 8, seed=0).expectation("wavy").kind == kind
