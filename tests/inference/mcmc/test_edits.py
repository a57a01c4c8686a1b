"""Kernels that change a row inside leave π*·K = π* in detailed balance; wrong boundaries do not."""

import math

import pytest
import torch

import lmppl.inference.mcmc.blocks as blocks
import lmppl.inference.mcmc.edits as edits
from lmppl.errors import ModelError
from lmppl.inference.mcmc import BlockResample, LocalEdit, ParticleGibbs, TokenGibbs
from lmppl.inference.smc import SMC
from lmppl.lm.randomness import Source
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence.reward import Reward
from lmppl.modeling.factors import Feature
from lmppl.modeling.target import Target
from lmppl.testing.enumeration import EnumeratingSource
from tests.inference.mcmc.kernel_matrices import EXACT, SHAPES, VISIBLE, law_at, off_balance, tiny_lm, walked_matrix
from tests.models import wavy

KERNELS = {
    "block": lambda q: BlockResample(1),
    "long block": lambda q: BlockResample(2),
    "block of another LM": lambda q: BlockResample(1, q),
    "gibbs": lambda q: TokenGibbs(None),
    "gibbs of two": lambda q: TokenGibbs(2),
    "gibbs by another LM": lambda q: TokenGibbs(2, proposal=q),
    "gibbs of given": lambda q: TokenGibbs(candidates=(0, 2)),
    "edit": lambda q: LocalEdit(),
    "edit by another LM": lambda q: LocalEdit(q),
}


@pytest.mark.parametrize("name", KERNELS)
def test_detailed_balance(name):
    kernel = KERNELS[name](tiny_lm("tabular", 1))
    for shape in SHAPES:
        matrix, brute = walked_matrix(kernel, SHAPES[shape](tiny_lm("tabular")), power=0.7)
        assert max(off_balance(matrix, law_at(brute, 0.7))) < EXACT
        if shape == "soft":
            assert float(matrix.diag().min()) < 1 - VISIBLE  # it moves


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("name", ["block", "block of another LM", "gibbs", "gibbs by another LM", "edit by another LM"])
def test_detailed_balance_on_networks(kind, name):
    kernel = KERNELS[name](tiny_lm(kind, 1))
    for shape in ("soft", "hard") if kind == "llama" else ("soft", "counts"):
        matrix, brute = walked_matrix(kernel, SHAPES[shape](tiny_lm(kind)))
        assert max(off_balance(matrix, law_at(brute))) < EXACT


def two_ends():
    """V = 4 with two EOS ids, T = 2."""
    lm = TabularLM.random(4, 2, order=1, seed=3)
    lm.eos_ids = (2, 3)
    return lm


def test_edits_at_the_cap_know_how_many_tokens_end_a_row(monkeypatch):
    model = two_ends() * Reward(Feature("sum", lambda rows: rows.ids.double().sum(1), on="ids"), beta=3.0)
    matrix, brute = walked_matrix(LocalEdit(), model, context=0)
    assert max(off_balance(matrix, law_at(brute))) < EXACT
    right = edits.edit_log_ratio
    monkeypatch.setattr(edits, "edit_log_ratio", lambda *a: right(*a[:4], torch.zeros_like(a[4]), a[5]))
    matrix, brute = walked_matrix(LocalEdit(), model, context=0)
    assert off_balance(matrix, law_at(brute))[0] > VISIBLE  # mutant: the EOS comes for free


def test_mutants_of_edits_and_blocks(monkeypatch):
    model = SHAPES["soft"](tiny_lm("tabular"))
    right = edits.edit_log_ratio

    def without_the_token_that_goes(kind, change, new, old, appended, num_eos):
        return right(kind, change, new, torch.zeros_like(old), appended, num_eos)

    monkeypatch.setattr(edits, "edit_log_ratio", without_the_token_that_goes)
    matrix, brute = walked_matrix(LocalEdit(), model)
    assert off_balance(matrix, law_at(brute))[0] > VISIBLE
    block = blocks.block_log_ratio

    def without_the_tail(change, new, old):
        return block(new - old, new, old)

    monkeypatch.setattr(blocks, "block_log_ratio", without_the_tail)
    matrix, brute = walked_matrix(BlockResample(1), model)
    assert off_balance(matrix, law_at(brute))[0] > VISIBLE


def test_rows_whose_token_is_no_candidate_stay():
    model = SHAPES["soft"](tiny_lm("tabular"))
    matrix, brute = walked_matrix(TokenGibbs(2), model)
    stays = (matrix.diag() > 1 - EXACT) & (law_at(brute) > 0)
    assert bool(stays.any())  # they wait for another kernel


def test_mutant_candidates_that_depend_on_the_present_token(monkeypatch):
    """The best token *and* the present one: a set that the other token would not have."""
    model = SHAPES["soft"](tiny_lm("tabular"))
    original, present = TokenGibbs.step, {}

    def step(self, state, source, *args, **kwargs):
        present["ids"] = state.draws.ids
        return original(self, state, source, *args, **kwargs)

    def candidate_set(self, logits):
        best = logits.topk(1).indices
        other = present["ids"].gather(1, (present["keep"])[:, None])
        return torch.cat([best, torch.where(other == best, (best + 1) % logits.shape[1], other)], 1)

    integers = EnumeratingSource.integers

    def spy(self, high):
        present["keep"] = integers(self, high)
        return present["keep"]

    monkeypatch.setattr(TokenGibbs, "step", step)
    monkeypatch.setattr(TokenGibbs, "candidate_set", candidate_set)
    monkeypatch.setattr(EnumeratingSource, "integers", spy)
    matrix, brute = walked_matrix(TokenGibbs(2), model)
    assert off_balance(matrix, law_at(brute))[0] > VISIBLE


@pytest.mark.parametrize(
    ("kind", "shape", "scheme"),
    [
        ("tabular", "soft", "multinomial"),
        ("tabular", "hard", "multinomial"),
        ("tabular", "counts", "systematic"),
        ("llama", "soft", "systematic"),
        ("mistral", "hard", "ssp"),
    ],
)
def test_particle_gibbs_leaves_the_posterior(kind, shape, scheme):
    lm = TabularLM.random(3, 2, order=1, seed=0, context=["", "ab"]) if kind == "tabular" else tiny_lm(kind)
    kernel = ParticleGibbs(SMC(num_particles=2, resampling=scheme))
    matrix, brute = walked_matrix(kernel, SHAPES[shape](lm))
    assert off_balance(matrix, law_at(brute))[0] < EXACT
    inside = law_at(brute) > 0
    assert float(matrix.diag()[inside].min()) < 1 - VISIBLE  # it moves


def test_particle_gibbs_refuses_other_targets():
    lm = tiny_lm("tabular")
    kernel, source = ParticleGibbs(), Source(torch.Generator().manual_seed(0))
    state = kernel.start(Target(lm * Reward(wavy)), lm.draw(2, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ModelError, match="power 1"):
        kernel.step(state, source, 0.5)
    noisy = lm * Reward(Feature("noisy", wavy, stochastic=True))
    with pytest.raises(ModelError, match="stochastic=True"):
        kernel.check(Target(noisy))


def test_many_chains_of_both_contexts_stay_outcomes_of_the_prior():
    lm = tiny_lm("tabular", horizon=5)
    model = SHAPES["soft"](lm)
    source = Source(torch.Generator().manual_seed(0))
    start = lm.draw(20, generator=torch.Generator().manual_seed(1))
    kernels = [BlockResample(2), LocalEdit(), TokenGibbs(2), BlockResample(1, tiny_lm("tabular", 1, 5))]
    state = kernels[0].start(Target(model), start)
    for kernel in kernels * 4:
        state, info = kernel.step(state, source)
        draws = state.draws
        assert bool(lm.is_outcome(draws).all())
        assert torch.allclose(draws.log_prior, lm.score(draws), atol=1e-10, rtol=0)
        assert torch.allclose(draws.log_factors["wavy"], torch.tensor(wavy(draws.text)).double() / 0.4, atol=1e-12)
        assert info.accepted.shape == (40,)
        assert not bool((info.log_acceptance[info.position >= 0] > 0).any())
    assert math.isfinite(float(draws.log_prior.sum()))


def test_wrong_configurations_are_refused():
    target = Target(tiny_lm("tabular") * Reward(wavy))
    for kernel, words in (
        (BlockResample(0), "expected an integer of at least 1"),
        (TokenGibbs(1), "expected at least 2"),
        (TokenGibbs(candidates=(0, 7)), "at least 2 different ids of 0 to 2"),
        (TokenGibbs(candidates=()), r"got candidates=\(\), expected at least 2 different ids"),
        (TokenGibbs(candidates=(1,)), "at least 2 different ids"),
        (TokenGibbs(candidates=("a", "b")), "at least 2 different ids of 0 to 2"),
        (ParticleGibbs(smc="foo"), "got smc='foo', expected an SMC"),
        (ParticleGibbs(SMC(num_particles=1)), "alone it would never move"),
    ):
        with pytest.raises(ModelError, match=words):
            kernel.check(target)
