"""Whole segments of chains, over every outcome of their choices; what is kept, counted and frozen of them."""

import dataclasses
import itertools
import math

import pytest
import torch

from lmppl.errors import InfeasibleModel
from lmppl.inference.engine import Request
from lmppl.inference.mcmc import (
    MCMC,
    BlockResample,
    LocalEdit,
    Mixture,
    ParticleGibbs,
    Restart,
    SuffixResample,
    Tempered,
    TokenGibbs,
)
from lmppl.inference.mcmc.engine import ChainShard
from lmppl.inference.mcmc.starts import start_draws
from lmppl.inference.run import infer
from lmppl.inference.smc import SMC
from lmppl.lm.tabular import TabularLM
from lmppl.lm.transformers import TransformersLM
from lmppl.modeling.evidence.constraint import Constraint
from lmppl.modeling.evidence.reward import Reward
from lmppl.modeling.target import Target
from lmppl.sequences import Draws
from lmppl.testing.enumeration import every_outcome
from tests.inference.mcmc.kernel_matrices import (
    CONTEXT,
    EXACT,
    SHAPES,
    VISIBLE,
    draws_at,
    law_at,
    tiny_lm,
    walked_matrix,
)
from tests.lm.random_models import build, tokenizer
from tests.models import brute_force, enumerable_lm, has_no, wavy

KERNELS = {
    "suffix": SuffixResample(),
    "restart": Restart(),
    "mixture": Mixture(),
    "block": BlockResample(1),
    "gibbs": TokenGibbs(2),
    "edit": LocalEdit(),
    "particle gibbs": ParticleGibbs(SMC(2)),
}
SIZES = {"gibbs": (3, 2), "particle gibbs": (3, 1)}  # V and T, where not (2, 2)


def small(kind, vocab_size=2, horizon=2):
    """Three outcomes ("", "a", "aa") unless told otherwise, none of them almost certain."""
    if kind == "tabular":
        return TabularLM.random(vocab_size, horizon, order=1, seed=4, context=["", "a"])
    options = {"context": ["a", "aaa"], "max_new_tokens": horizon, "temperature": 4.0}
    return TransformersLM(build(kind, vocab_size, seed=2), tokenizer=tokenizer(vocab_size), **options)


def segment(steps, warmup):
    """One chain of context `CONTEXT`."""
    return ChainShard(0, steps, 0, (CONTEXT,), 4, steps, warmup)


def law_of_the_last(engine, model, steps, warmup):
    """(S,) the law of the last kept row, over all segments that start; and the probability that one starts."""
    brute, target = brute_force(model, CONTEXT), Target(model)
    number = {key: i for i, key in enumerate(brute.sequences.keys())}
    law = torch.zeros(len(number), dtype=torch.float64)

    def run(source):
        try:
            return engine.simulate(target, segment(steps, warmup), source).draws
        except InfeasibleModel:
            return None

    for probability, draws in every_outcome(run):
        if draws is not None:
            assert draws.columns["step"].tolist() == list(range(steps))
            law[number[draws.keys()[-1]]] += probability
    return law / law.sum(), float(law.sum())


def started(brute):
    """(S,) the law of a start from the prior: π0 given γ > 0."""
    return torch.softmax(torch.where(brute.log_gamma > -math.inf, brute.log_prior, -math.inf), 0)


@pytest.mark.parametrize("name", KERNELS)
def test_a_segment_from_the_prior_has_the_law_of_as_many_steps(name):
    model, kernel = SHAPES["soft"](small("tabular", *SIZES.get(name, ()))), KERNELS[name]
    matrix, brute = walked_matrix(kernel, model)
    law, _ = law_of_the_last(MCMC(1, kernel=kernel), model, 1, 1)
    assert float((law - started(brute) @ matrix @ matrix).abs().max()) < EXACT
    assert float((law - started(brute) @ matrix).abs().max()) > VISIBLE  # mutant: one step less
    assert float((law - law_at(brute)).abs().max()) > VISIBLE  # two steps are not many


def test_thinned_segments_take_the_steps_that_they_drop():
    model, kernel = SHAPES["soft"](small("tabular")), SuffixResample()
    matrix, brute = walked_matrix(kernel, model)
    law, _ = law_of_the_last(MCMC(1, kernel=kernel, thin=2), model, 1, 0)
    assert float((law - started(brute) @ torch.linalg.matrix_power(matrix, 2)).abs().max()) < EXACT


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_segment_on_a_network(kind):
    model, kernel = SHAPES["soft"](small(kind)) * Constraint(has_no("aa")), SuffixResample()
    matrix, brute = walked_matrix(kernel, model)
    law, chance = law_of_the_last(MCMC(1, kernel=kernel, max_tries=1), model, 2, 0)
    assert float((law - started(brute) @ matrix @ matrix).abs().max()) < EXACT
    possible = brute.log_prior[brute.log_gamma > -math.inf].exp().sum()
    assert chance == pytest.approx(float(possible), abs=EXACT)


def test_a_start_is_tried_as_often_as_allowed():
    model = SHAPES["hard"](tiny_lm("tabular", horizon=2))
    brute = brute_force(model, CONTEXT)
    impossible = 1 - float(brute.log_prior[brute.log_gamma > -math.inf].exp().sum())
    for tries in (1, 2):
        law, chance = law_of_the_last(MCMC(1, kernel=LocalEdit(), max_tries=tries), model, 1, 0)
        assert chance == pytest.approx(1 - impossible**tries, abs=EXACT)
        matrix, _ = walked_matrix(LocalEdit(), model)
        assert float((law - started(brute) @ matrix).abs().max()) < EXACT


def test_given_starts_are_drawn_by_their_weights():
    model, kernel = SHAPES["soft"](tiny_lm("tabular", horizon=2)), SuffixResample()
    matrix, brute = walked_matrix(kernel, model)
    weights = torch.tensor([0.7, 0.3, 0.0], dtype=torch.float64)
    given = draws_at(model, brute, [0, 3, 5]).with_columns(log_weight=weights.log())
    at = torch.zeros(len(brute.log_prior), dtype=torch.float64).index_add_(0, torch.tensor([0, 3, 5]), weights)
    law, _ = law_of_the_last(MCMC(1, kernel=kernel, start=given), model, 1, 0)
    assert float((law - at @ matrix).abs().max()) < EXACT
    even = (at > 0).double() / 2
    assert float((law - even @ matrix).abs().max()) > VISIBLE  # mutant: the weights ignored
    options = {"max_tries": 1, "seed": 0}
    context = torch.full((2,), CONTEXT)
    found = every_outcome(lambda source: start_draws(given, Target(model), context, source, **options).draws.keys())
    pairs = {tuple(keys): p for p, keys in found}
    keys = given.keys()
    assert pairs[keys[0], keys[1]] == pytest.approx(0.21, abs=EXACT)
    assert sum(pairs.values()) == pytest.approx(1.0, abs=EXACT)


@pytest.mark.parametrize("kind", ["tabular", "mistral"])
def test_a_tempered_segment_from_the_product_law_keeps_the_posterior(kind):
    """Exact draws at every power in, an exact draw at λ = 1 out, swaps and all; started at π* alone it is not one."""
    model, powers = small(kind, 3, 1) * Reward(wavy, beta=0.4), (0.0, 1.0)
    brute = brute_force(model, CONTEXT)
    engine = Tempered(1, ladder=powers, kernel=SuffixResample())
    every = range(len(brute.log_prior))
    rows = {pair: draws_at(model, brute, list(pair)) for pair in itertools.product(every, repeat=2)}
    law, careless = torch.zeros(2, len(every), dtype=torch.float64)
    for (i, j), start in rows.items():
        to, _ = law_of_the_last(dataclasses.replace(engine, start=start), model, 1, 0)
        law += law_at(brute, powers[0])[i] * law_at(brute, powers[1])[j] * to
        careless += law_at(brute, powers[0])[i] * law_at(brute, powers[0])[j] * to
    assert float((law - law_at(brute)).abs().max()) < EXACT
    assert float((careless - law_at(brute)).abs().max()) > VISIBLE


def test_thin_keeps_the_last_of_each_group_of_steps():
    model = SHAPES["soft"](tiny_lm("tabular"))
    for kernel in (Mixture(), SuffixResample()):
        every = infer(model, MCMC(4, num_steps=8, warmup=3, kernel=kernel), seed=1, progress=False).draws
        second = infer(model, MCMC(4, num_steps=4, warmup=3, thin=2, kernel=kernel), seed=1, progress=False).draws
        wanted = every.select(every.columns["step"] % 2 == 1)
        assert second.keys() == wanted.keys()
        assert second.columns["step"].tolist() == ((wanted.columns["step"] - 1) // 2).tolist()
        assert second.keys() != every.select(every.columns["step"] % 2 == 0).keys()


def test_acceptance_is_counted_by_kernel_context_and_position(monkeypatch):
    """Against the steps themselves, those of the warm-up left out."""
    engine = MCMC(6, num_steps=9, warmup=4, thin=2, kernel=Mixture((Restart(), SuffixResample(), LocalEdit())))
    seen, step = [], Mixture.step

    def spy(self, state, source, *args, **options):
        state, info = step(self, state, source, *args, **options)
        seen.append((state.draws.context, info))
        return state, info

    monkeypatch.setattr(Mixture, "step", spy)
    model = SHAPES["soft"](tiny_lm("tabular"))
    info = infer(model, engine, seed=4, progress=False).info
    assert len(seen) == 4 + 2 * 9
    tried, done = {}, {}
    for context, step_info in seen[4:]:
        for c, position, accepted in zip(
            context.tolist(), step_info.position.tolist(), step_info.accepted.tolist(), strict=True
        ):
            if position >= 0:
                for key in ((step_info.kernel, "context", c), (step_info.kernel, "position", position)):
                    tried[key] = tried.get(key, 0) + 1
                    done[key] = done.get(key, 0) + accepted
    assert set(info["acceptance"]) == {"restart", "suffix", "edit"}
    for label, figures in (("context", info["acceptance"]), ("position", info["acceptance_by_position"])):
        for name, rates in figures.items():
            for at, rate in enumerate(rates.tolist()):
                key = (name, label, at)
                assert rate == (done[key] / tried[key] if key in tried else pytest.approx(math.nan, nan_ok=True))
    assert not bool(info["acceptance_by_position"]["restart"][0].isnan())
    assert bool(info["acceptance_by_position"]["restart"][1:].isnan().all())
    assert len({float(x) for x in info["acceptance_by_position"]["suffix"][:3]}) == 3  # a shift would show


def test_a_tempered_run_counts_the_rows_at_the_whole_evidence(monkeypatch):
    engine = Tempered(5, num_steps=12, warmup=0, kernel=Restart(), ladder=(0.0, 0.5, 1.0))
    seen, step = [], Restart.step

    def spy(self, state, source, *args, **options):
        state, info = step(self, state, source, *args, **options)
        seen.append(info.accepted)
        return state, info

    monkeypatch.setattr(Restart, "step", spy)
    info = infer(SHAPES["soft"](tiny_lm("tabular")), engine, seed=4, progress=False).info
    accepted = torch.stack(seen).double().view(12, 2, 5, 3)
    assert torch.equal(info["acceptance"]["restart"], accepted[..., 2].mean((0, 2)))
    assert not torch.equal(info["acceptance"]["restart"], accepted.mean((0, 2, 3)))  # mutant: all replicas


def test_the_adapted_ladder_is_that_of_the_warm_up():
    model = tiny_lm("tabular", horizon=4) * Reward(wavy, beta=0.15)
    found = {}
    for steps in (1, 33, 70):  # one segment, two, three
        engine = Tempered(8, num_steps=steps, warmup=30, num_temperatures=4)
        found[steps] = infer(model, engine, seed=1, progress=False).info["ladder"]
    assert found[1] == found[33] == found[70]
    assert found[1] != Tempered(num_temperatures=4).powers
    longer = infer(model, Tempered(8, num_steps=1, warmup=60, num_temperatures=4), seed=1, progress=False)
    assert longer.info["ladder"] != found[1]  # it does adapt where it may


def test_states_of_segments_are_where_they_ended():
    """What a segment leaves is the last row of each chain, so that the next one goes on from there."""
    model, engine = SHAPES["soft"](enumerable_lm("llama")), MCMC(4, num_steps=40, warmup=2)
    target = Target(model)
    first, second = engine.plan(target, Request(None, None, 3))
    part = engine.run_shard(target, first)
    state = part.info["state"]
    last = part.draws.select(part.draws.columns["step"] == 31)
    assert torch.equal(state["ids"], last.ids)
    assert state["context"].tolist() == last.context.tolist()
    rows = Draws(state["ids"], state["lengths"], state["finished"], state["context"], last.prompts, model.prior.decode)
    assert torch.allclose(state["log_prior"], model.prior.score(rows), atol=1e-10, rtol=0)
    assert int(engine.run_shard(target, second, state=state).draws.columns["step"].min()) == 32
