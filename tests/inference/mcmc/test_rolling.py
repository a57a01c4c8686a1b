"""Chains that go on by themselves take the kernel's steps: exactly, in any company, on caches that others share."""

import itertools
import math

import pytest
import torch

from lmppl.inference.mcmc import MCMC, SuffixResample, rolling
from lmppl.inference.mcmc.chains import Kernel
from lmppl.inference.run import infer
from lmppl.lm.randomness import Source
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence.reward import Reward
from lmppl.modeling.target import Target
from lmppl.sequences import Cost, concatenate
from lmppl.testing.enumeration import every_outcome
from tests.inference.mcmc.kernel_matrices import SHAPES, draws_at, tiny_lm, walked_matrix
from tests.lm.random_models import random_lm
from tests.models import brute_force, wavy

EXACT = 1e-12


def two_chains(model):
    """A chain of each context, at its shortest and at its longest row with γ > 0, and the steps' matrices."""
    matrices, starts, first = [], [], []
    for context in (0, 1):
        matrix, brute = walked_matrix(SuffixResample(), model, context)
        order = torch.argsort(brute.sequences.lengths, stable=True, descending=context == 1)
        at = int(order[brute.log_gamma[order] > -math.inf][0])
        matrices.append((matrix, brute.sequences.keys()))
        starts.append(draws_at(model, brute, [at]))
        first.append(at)
    return matrices, starts, first


@pytest.mark.parametrize(
    ("shape", "waiting"),
    [
        ("soft", 1),
        pytest.param("hard", rolling.WAITING, marks=pytest.mark.slow),
        pytest.param("soft", rolling.WAITING, marks=pytest.mark.slow),  # ten seconds each
    ],
)
def test_the_joint_law_of_two_chains_is_the_product_of_their_steps(shape, waiting, monkeypatch):
    """All paths of two steps of two chains, one of which may be in its second step while the other is in its first.

    Or they wait for each other, as those that end together do, and begin rows of other lengths together.
    """
    monkeypatch.setattr(rolling, "WAITING", waiting)
    model = SHAPES[shape](TabularLM.random(2, 2, order=1, seed=4, context=["", "a"]))
    matrices, starts, first = two_chains(model)
    assert starts[0].lengths != starts[1].lengths
    target, kernel = Target(model), SuffixResample()

    def run(source):
        state = kernel.start(target, concatenate(starts))
        return tuple(tuple(walked.draws.keys()) for walked in kernel.walk(state, source, 2))

    law: dict = {}
    for probability, path in every_outcome(run):
        law[path] = law.get(path, 0.0) + probability
    size = [range(len(keys)) for _, keys in matrices]
    total = 0.0
    for a, b, c, d in itertools.product(size[0], size[1], size[0], size[1]):
        (one, one_keys), (two, two_keys) = matrices
        expected = float(one[first[0], a] * one[a, c] * two[first[1], b] * two[b, d])
        got = law.get(((one_keys[a], two_keys[b]), (one_keys[c], two_keys[d])), 0.0)
        assert abs(got - expected) < EXACT
        total += got
    assert abs(total - 1) < EXACT


def test_rows_of_different_lengths_draw_positions_of_their_own():
    """The joint law of one step of a row of two tokens beside one of three."""
    model = SHAPES["soft"](TabularLM.random(2, 3, order=1, seed=4, context=["", "a"]))
    starts, laws = [], []
    for context, length in ((0, 2), (1, 3)):
        matrix, brute = walked_matrix(SuffixResample(), model, context)
        at = int(torch.nonzero((brute.sequences.lengths == length) & (brute.log_gamma > -math.inf))[0, 0])
        starts.append(draws_at(model, brute, [at]))
        laws.append(dict(zip(brute.sequences.keys(), matrix[at].tolist(), strict=True)))
    target, kernel = Target(model), SuffixResample()

    def run(source):
        (walked,) = kernel.walk(kernel.start(target, concatenate(starts)), source, 1)
        return tuple(walked.draws.keys())

    law: dict = {}
    for probability, pair in every_outcome(run):
        law[pair] = law.get(pair, 0.0) + probability
    assert law.keys() == {(a, b) for a, p in laws[0].items() for b, q in laws[1].items() if p * q > 0}
    for (a, b), probability in law.items():
        assert abs(probability - laws[0][a] * laws[1][b]) < EXACT


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3_next"])
def test_what_chains_say_of_their_rows_is_what_uncached_forwards_say(kind):
    lm = random_lm(kind, max_new_tokens=6)
    model, source = lm * Reward(wavy, beta=0.7), Source(torch.Generator().manual_seed(0))
    kernel, target = SuffixResample(), Target(model)
    start = lm.draw(10, generator=torch.Generator().manual_seed(1))
    state = kernel.start(target, start)
    tolerance = 1e-4 if kind == "qwen3_next" else 1e-9
    walked = list(kernel.walk(state, source, 12))
    assert len(walked) == 12
    moved = 0
    for draws, info in walked:
        assert torch.equal(draws.context, start.context)
        assert bool(lm.is_outcome(draws).all())
        assert torch.allclose(draws.log_prior, lm.score(draws).double(), atol=tolerance, rtol=0)
        assert torch.allclose(draws.log_factors["wavy"], torch.tensor(wavy(draws.text)).double() / 0.7, atol=1e-9)
        assert bool((info.position >= 0).all())
        moved += int(info.accepted.sum())
    assert moved > 60


def test_each_step_keeps_what_its_position_says():
    lm = tiny_lm("tabular", horizon=5)
    kernel, target = SuffixResample(block=2), Target(SHAPES["hard"](lm))
    run = infer(target.model, MCMC(8, num_steps=4, warmup=0), seed=1, progress=False)
    start = run.draws.select(run.draws.columns["step"] == 3)
    state = kernel.start(target, start)
    before = state.draws
    for draws, info in kernel.walk(state, Source(torch.Generator().manual_seed(2)), 9):
        assert bool((info.position % 2 == 0).all())
        kept = torch.arange(5) < info.position[:, None]
        assert bool(((draws.ids == before.ids) | ~kept).all())
        same = (draws.ids == before.ids).all(1) & (draws.lengths == before.lengths)
        assert bool((same | info.accepted).all())
        before = draws


def test_forwards_are_as_many_as_there_are_tokens_to_write_over_the_chains():
    lm = TabularLM.random(5, 16, order=1, seed=0)
    lm.eos_ids = ()
    model, kernel = lm * Reward(wavy, beta=5.0), SuffixResample()
    start = lm.draw(48, generator=torch.Generator().manual_seed(0))
    spent = {}
    for name, walk in (("alone", kernel.walk), ("together", lambda *a: Kernel.walk(kernel, *a))):
        cost = Cost()
        state = kernel.start(Target(model), start, cost)
        state.caught_up(lm, torch.arange(48), state.draws.lengths)
        before = cost.copy()
        infos = [walked.info for walked in walk(state, Source(torch.Generator().manual_seed(1)), 24)]
        written = sum(int((16 - info.position - 1).sum()) for info in infos)
        spent[name] = cost - before
        assert spent[name].lm_tokens == written
    assert spent["alone"].lm_forwards < 0.75 * spent["together"].lm_forwards


def test_the_same_seed_repeats_the_same_draws_and_lengths_have_their_posterior_mean():
    model = SHAPES["soft"](tiny_lm("llama", horizon=4))
    engine = MCMC(16, num_steps=70, warmup=3, kernel=SuffixResample())
    first, again = (infer(model, engine, seed=5, progress=False) for _ in range(2))
    assert first.draws.keys() == again.draws.keys()
    assert torch.equal(first.draws.log_prior, again.draws.log_prior)
    for context in (0, 1):
        brute = brute_force(model, context)
        rows = first.draws.context == context
        assert float(first.draws.lengths[rows].double().mean()) == pytest.approx(
            float((brute.log_posterior.exp() * brute.sequences.lengths).sum()), abs=0.12
        )
