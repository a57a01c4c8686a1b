"""Tempering: swaps and whole steps leave the product of the powers' laws invariant; the ladder freezes."""

import itertools
import math

import pytest
import torch

from lmppl.errors import ModelError, UnsupportedModel
from lmppl.inference.mcmc import MCMC, Restart, SuffixResample, Tempered, tempering
from lmppl.inference.mcmc.tempering import adapted_ladder, log_swap_acceptance, swap
from lmppl.inference.run import infer
from lmppl.lm.transformers import TransformersLM
from lmppl.modeling.evidence.reward import Reward
from lmppl.modeling.factors import Feature
from lmppl.modeling.target import Target
from lmppl.testing.enumeration import every_outcome
from tests.inference.mcmc.kernel_matrices import CONTEXT, EXACT, SHAPES, VISIBLE, draws_at, law_at, tiny_lm
from tests.lm.random_models import build, tokenizer
from tests.models import brute_force, enumerable_lm, wavy

POWERS = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)


def product_law(brute, powers):
    law = torch.ones(1, dtype=torch.float64)
    for power in powers.tolist():
        law = (law[:, None] * law_at(brute, power)[None]).flatten()
    return law


def product_matrix(model, powers, move):
    """(S^K, S^K) of `move(kernel, state, source)` on K replicas of one chain."""
    target, brute, kernel = Target(model), brute_force(model, CONTEXT), Restart()
    number = {key: i for i, key in enumerate(brute.sequences.keys())}
    law = product_law(brute, powers)
    size = len(number)
    matrix = torch.eye(len(law), dtype=torch.float64)
    for at, rows in enumerate(itertools.product(range(size), repeat=len(powers))):
        if law[at] == 0:
            continue
        start = draws_at(model, brute, list(rows))
        matrix[at] = 0.0

        def run(source, start=start):
            return move(kernel, kernel.start(target, start, power=powers), source).draws.keys()

        for probability, keys in every_outcome(run):
            to = 0
            for key in keys:
                to = to * size + number[key]
            matrix[at, to] += probability
    return matrix, law


@pytest.mark.parametrize("shape", ["soft", "hard"])
def test_swaps_leave_the_product_law(shape):
    model = SHAPES[shape](tiny_lm("tabular", horizon=2))
    powers = POWERS[[0, 2]] if shape == "hard" else POWERS[[1, 2]]
    pairs = torch.tensor([[0, 1]])
    matrix, law = product_matrix(model, powers, lambda k, s, source: swap(k, s, powers, pairs, source)[0])
    flow = law[:, None] * matrix
    assert float((law @ matrix - law).abs().max()) < EXACT
    assert float((flow - flow.T).abs().max()) < EXACT
    assert float(matrix.diag().min()) < 1 - VISIBLE


def test_a_swap_with_the_wrong_sign_does_not():
    model = SHAPES["soft"](tiny_lm("tabular", horizon=2))
    powers = POWERS[[1, 2]]

    def wrong(kernel, state, source):
        phi = state.draws.log_factors["wavy"]
        chance = log_swap_acceptance(powers[1:], powers[:1], phi[:1], phi[1:])
        done = source.accept(chance)
        return kernel.select(state, torch.tensor([1, 0])) if bool(done) else state

    matrix, law = product_matrix(model, powers, wrong)
    assert float((law @ matrix - law).abs().max()) > VISIBLE


def test_a_whole_step_leaves_the_product_law():
    """Both phases of the swaps, as the engine takes them, on three replicas."""
    model = SHAPES["hard"](tiny_lm("tabular", horizon=1))
    engine = Tempered(1, warmup=0, kernel=SuffixResample(), ladder=tuple(POWERS.tolist()))

    for phase in (0, 1):

        def move(kernel, state, source, phase=phase):
            memory = {"ladder": POWERS, "swaps": torch.zeros(2, 2, dtype=torch.float64), "round": phase}
            return engine._advance(state, source, memory, False)[0]

        matrix, law = product_matrix(model, POWERS, move)
        assert float((law @ matrix - law).abs().max()) < EXACT


@pytest.mark.parametrize(("kind", "shape"), [("llama", "counts"), ("mistral", "hard")])
def test_a_whole_step_on_a_network(kind, shape):
    """Two replicas of rows of one token, which a network writes, and their swap."""
    options = {"context": ["ab", "bacab"], "max_new_tokens": 1, "temperature": 4.0}
    model = SHAPES[shape](TransformersLM(build(kind, 3), tokenizer=tokenizer(3), **options))
    powers = POWERS[[0, 2]]
    engine = Tempered(1, warmup=0, kernel=SuffixResample(), ladder=tuple(powers.tolist()))

    def move(kernel, state, source):
        memory = {"ladder": powers, "swaps": torch.zeros(2, 1, dtype=torch.float64), "round": 0}
        return engine._advance(state, source, memory, False)[0]

    matrix, law = product_matrix(model, powers, move)
    assert float((law @ matrix - law).abs().max()) < EXACT
    assert float(matrix.diag().min()) < 1 - VISIBLE


def test_powers_of_zero_are_absent():
    none, one = torch.tensor([-math.inf]), torch.tensor([-1.0])
    zero, half = torch.tensor([0.0]), torch.tensor([0.5])
    assert float(log_swap_acceptance(zero, half, none, one)) == -math.inf  # φ = 0 would come under a power
    assert float(log_swap_acceptance(zero, half, one, one)) == 0.0


def test_the_ladder_moves_towards_even_rates():
    assert adapted_ladder((0.0, 0.5, 1.0), (0.3, 0.3)) == pytest.approx((0.0, 0.5, 1.0))
    moved = adapted_ladder((0.0, 0.5, 1.0), (0.9, 0.1))
    assert moved[0] == 0.0
    assert moved[2] == 1.0
    assert 0.5 < moved[1] < 1.0


def test_the_engine_shows_its_swaps_and_freezes_its_ladder():
    model = tiny_lm("tabular", horizon=4) * Reward(wavy, beta=0.15)
    run = infer(model, Tempered(8, num_steps=40, warmup=30, num_temperatures=4), seed=1, progress=False)
    ladder, rates = run.info["ladder"], run.info["swap_rates"]
    assert ladder[0] == 0.0
    assert ladder[-1] == 1.0
    assert ladder != Tempered(num_temperatures=4).powers
    assert bool(((rates > 0.0) & (rates <= 1.0)).all())
    assert len(run.draws) == 2 * 8 * 40
    fixed = infer(model, Tempered(8, num_steps=4, warmup=20, ladder=(0.0, 0.3, 1.0)), progress=False)
    assert fixed.info["ladder"] == (0.0, 0.3, 1.0)


def test_swap_rates_are_those_of_each_pair_of_neighbours(monkeypatch):
    """Against the swaps themselves, of three chains in two contexts, those of the warm-up left out."""
    seen = []

    def spy(kernel, state, powers, pairs, source):
        found = swap(kernel, state, powers, pairs, source)
        seen.append((powers, pairs, found[1]))
        return found

    monkeypatch.setattr(tempering, "swap", spy)
    ladder = (0.0, 0.1, 0.4, 1.0)
    engine = Tempered(3, num_steps=40, warmup=4, ladder=ladder)
    run = infer(SHAPES["soft"](tiny_lm("tabular")), engine, seed=2, progress=False)
    assert len(seen) == 44
    tried, done = torch.zeros(2, 3, dtype=torch.float64)
    for powers, pairs, chance in seen[4:]:
        assert torch.equal(powers, torch.tensor(ladder, dtype=torch.float64).repeat(2 * 3))
        lower = pairs[:, 0] % 4
        assert torch.equal(pairs[:, 1], pairs[:, 0] + 1)
        assert sorted(lower.unique().tolist()) in ([0, 2], [1])
        tried.index_add_(0, lower, torch.ones_like(chance))
        done.index_add_(0, lower, chance.exp())
    rates = done / tried
    assert torch.allclose(run.info["swap_rates"], rates, atol=EXACT, rtol=0)
    assert float((rates[:, None] - rates).abs().fill_diagonal_(1.0).min()) > 0.01  # one taken for another would show


def test_there_is_no_certificate_for_chains_that_swap():
    model = enumerable_lm("tabular") * Reward(wavy, beta=0.5, upper=1.0, name="wavy")
    few = {"num_chains": 4, "num_steps": 4, "warmup": 2, "kernel": Restart()}
    assert "certificate" in infer(model, MCMC(**few), progress=False).info
    assert "certificate" not in infer(model, Tempered(**few), progress=False).info


def test_wrong_ladders_and_estimated_factors_are_refused():
    model = tiny_lm("tabular") * Reward(wavy)
    for ladder in ((0.0, 0.5), (0.5, 1.0), (0.0, 0.7, 0.6, 1.0)):
        with pytest.raises(ModelError, match="rise from 0 to 1"):
            infer(model, Tempered(ladder=ladder), progress=False)
    with pytest.raises(ModelError, match="at least 2"):
        infer(model, Tempered(num_temperatures=1), progress=False)
    noisy = tiny_lm("tabular") * Reward(Feature("noisy", wavy, stochastic=True))
    with pytest.raises(UnsupportedModel, match="stochastic=True"):
        infer(noisy, Tempered(), progress=False)
