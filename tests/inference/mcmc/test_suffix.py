"""Kernels that regenerate suffixes leave π*·K = π*, exactly, on rows of every length; known wrong variants do not."""

import dataclasses
import math

import pytest
import torch

from lmppl.inference.mcmc import Mixture, Restart, SuffixResample
from lmppl.inference.mcmc.chains import log_acceptance
from lmppl.inference.mcmc.kernels import conditioned_log_ratio, marginalised_log_ratio
from lmppl.inference.pplm import PPLM
from lmppl.inference.weighted_decoding import WeightedDecoding
from lmppl.lm.randomness import Source
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence.bag_of_words import BagOfWords
from lmppl.modeling.evidence.reward import Reward
from lmppl.modeling.model import Model
from lmppl.modeling.target import Target
from lmppl.sequences import Cost, Draws
from tests.inference.mcmc.kernel_matrices import (
    CONTEXT,
    EXACT,
    SHAPES,
    VISIBLE,
    law_at,
    off_balance,
    suffix_matrix,
    tiny_lm,
    walked_matrix,
)
from tests.lm.random_models import random_lm
from tests.models import ENUMERABLE, brute_force, enumerable_lm, wavy

KERNELS = {
    "length": SuffixResample,
    "blocks": lambda **k: SuffixResample(block=2, **k),
    "horizon": lambda **k: SuffixResample("horizon", **k),
    "entropy": lambda **k: SuffixResample("entropy", **k),
    "length, marginalised": lambda **k: SuffixResample(ratio="marginalised", **k),
    "entropy, marginalised": lambda **k: SuffixResample("entropy", ratio="marginalised", **k),
}


@pytest.mark.parametrize("kind", ENUMERABLE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("own", [True, False], ids=["prior", "other"])
def test_matrices_of_every_law_of_positions_leave_the_posterior(kind, shape, own):
    lm = enumerable_lm(kind)
    for build in KERNELS.values():
        kernel = build() if own else build(proposal=enumerable_lm(kind, seed=1))
        for context in (0, 1):
            matrix, brute = suffix_matrix(kernel, SHAPES[shape](lm), context)
            bad, unbalanced = off_balance(matrix, law_at(brute))
            assert bad < EXACT
            assert unbalanced < EXACT


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("own", [True, False], ids=["prior", "other"])
def test_the_step_is_its_matrix(name, own):
    for shape, horizon in (("soft", 2), ("hard", 3)):
        lm = tiny_lm("tabular", horizon=horizon)
        kernel = KERNELS[name]() if own else KERNELS[name](proposal=tiny_lm("tabular", 1, horizon))
        matrix, brute = walked_matrix(kernel, SHAPES[shape](lm))
        bad, _ = off_balance(matrix, law_at(brute))
        assert bad < EXACT
        written, _ = suffix_matrix(kernel, SHAPES[shape](lm))
        inside = brute.log_gamma > -math.inf
        assert torch.allclose(matrix[inside], written[inside], atol=EXACT, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_the_step_is_its_matrix_on_networks(kind):
    lm, other = tiny_lm(kind), tiny_lm(kind, 1)
    kernels = [SuffixResample(), SuffixResample("entropy", proposal=other, ratio="marginalised")]
    for kernel in kernels:
        matrix, brute = walked_matrix(kernel, SHAPES["soft"](lm))
        assert off_balance(matrix, law_at(brute))[0] < EXACT
        written, _ = suffix_matrix(kernel, SHAPES["soft"](lm))
        assert torch.allclose(matrix, written, atol=1e-10, rtol=0)


@pytest.mark.parametrize("power", [0.0, 0.3])
def test_powers_of_the_evidence(power):
    model = SHAPES["hard"](tiny_lm("tabular", horizon=2))
    for kernel in (Restart(), SuffixResample(), Mixture((Restart(), SuffixResample("horizon")), (0.3, 0.7))):
        matrix, brute = walked_matrix(kernel, model, power=power)
        law = law_at(brute, power)
        assert off_balance(matrix, law)[0] < EXACT
        excluded = float(law[brute.log_phi == -math.inf].sum())
        assert excluded > 0.1 if power == 0.0 else excluded == 0.0  # at power 0 rows with φ = 0 are like others


def steered(kind, lm):
    """A law that a decoding-time method gives: PPLM on networks, weighted decoding on a table."""
    if kind == "tabular":
        engine = WeightedDecoding.controlled(lambda texts: [-1.0 * t.count("b") for t in texts])
        return engine.language_model(lm * Reward(wavy))
    return PPLM(num_steps=1, step_size=1.0).language_model(lm * BagOfWords(["a"]))


@pytest.mark.parametrize("kind", ["tabular", "llama", pytest.param("mistral", marks=pytest.mark.slow)])
def test_guided_laws_as_proposals(kind):
    lm = tiny_lm(kind, horizon=2)
    q = steered(kind, lm)
    for kernel in (Restart(q), SuffixResample(proposal=q))[0 if kind == "tabular" else 1 :]:
        matrix, brute = walked_matrix(kernel, SHAPES["soft"](lm))
        assert max(off_balance(matrix, law_at(brute))) < EXACT
        assert float(matrix.diag().min()) < 1 - VISIBLE
    brute = brute_force(lm, CONTEXT)
    assert float((q.score(brute.sequences).double() - brute.log_prior).abs().max()) > 0.01  # q ≠ π0


@pytest.mark.parametrize("kind", ENUMERABLE)
def test_blocks_at_low_temperature_leave_the_power_posterior(kind):
    lm = tiny_lm(kind, temperature=4.0)
    kernel = SuffixResample("horizon", proposal=lm.at_temperature(1 / 3), block=2)
    matrix, brute = walked_matrix(kernel, lm**3.0)
    assert max(off_balance(matrix, law_at(brute))) < EXACT
    assert float((law_at(brute) - torch.softmax(3.0 * brute.log_prior, 0)).abs().max()) < EXACT
    own, _ = walked_matrix(kernel, Model(lm))
    assert off_balance(own, law_at(brute))[0] > VISIBLE  # mutant: without the power


def certain():
    """V = 3, T = 3; after a comes b for certain, and after b the end."""
    table = [[0.6, 0.3, 0.1], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.5, 0.3, 0.2]]
    return TabularLM([table[3], *table[1:3], table[0]], ["a", "b", "<eos>"], max_new_tokens=3, context=["", "ab"])


@pytest.mark.parametrize("shape", SHAPES)
def test_positions_with_nothing_to_choose(shape):
    """The entropy of some positions is 0, and of some rows everywhere."""
    kernels = [SuffixResample("entropy"), SuffixResample("entropy", ratio="marginalised")]
    kernels.append(SuffixResample("entropy", proposal=tiny_lm("tabular", 1)))
    for kernel in kernels:
        matrix, brute = walked_matrix(kernel, SHAPES[shape](certain()), context=0)
        assert off_balance(matrix, law_at(brute))[0] < EXACT


class LastToken(SuffixResample):
    """Always the last token: a new row of another length has p(i|x') = 0."""

    def log_index_law(self, lengths, horizon, entropies=None):
        last = torch.arange(horizon) == lengths[:, None] - 1
        return torch.where(last, 0.0, -torch.inf).double()


def zeros_left_out(old, new, keep):
    law = torch.where(new.log_index > -torch.inf, new.log_index, 0.0)
    return conditioned_log_ratio(old, new._replace(log_index=law), keep)


@pytest.mark.parametrize("kind", ENUMERABLE)
def test_a_position_that_the_new_row_would_not_take_refuses_it(kind):
    model = SHAPES["soft"](tiny_lm(kind))
    kernel = LastToken("entropy")
    matrix, brute = walked_matrix(kernel, model)
    assert max(off_balance(matrix, law_at(brute))) < EXACT
    written, _ = suffix_matrix(kernel, model)
    assert torch.allclose(matrix, written, atol=1e-10, rtol=0)
    wrong, _ = suffix_matrix(kernel, model, log_ratio=zeros_left_out)
    assert off_balance(wrong, law_at(brute))[0] > VISIBLE


@pytest.mark.parametrize("kind", ENUMERABLE)
@pytest.mark.parametrize("index", ["length", "horizon", "entropy"])
def test_the_ratio_given_the_position_is_that_summed_over_it(kind, index):
    """p(i|x) q(x'_≥i) is a function of i and the shared prefix times one of x, x': the sum cancels, row by row."""
    seen = 0

    def compared(old, new, keep):
        nonlocal seen
        at = keep[:, None]
        one, summed = conditioned_log_ratio(old, new, keep), marginalised_log_ratio(old, new, keep)
        same = (old.ids == new.ids).cumprod(1).sum(1) >= keep
        inside = same & (torch.cat([x.log_index.gather(1, at) for x in (old, new)], 1) > -torch.inf).all(1)
        assert torch.allclose(one[inside], summed[inside], atol=EXACT, rtol=0)
        seen += int((inside & (torch.minimum(old.lengths, new.lengths) == 1)).sum())
        return one

    for q in (tiny_lm(kind), tiny_lm(kind, 1)):
        suffix_matrix(SuffixResample(index, proposal=q), SHAPES["soft"](tiny_lm(kind)), log_ratio=compared)
    assert seen > 0  # rows of one token among them


# Mutants.


def means(old, new, keep):
    def part(scores):
        inside = torch.arange(scores.ids.shape[1]) >= keep[:, None]
        size = (scores.lengths - keep).clamp_min(1)
        return torch.where(inside, scores.log_prior - scores.log_q, 0.0).sum(1) / size

    at = keep[:, None]
    return part(new) - part(old) + (new.log_index.gather(1, at) - old.log_index.gather(1, at))[:, 0]


def old_as_far_as_new(old, new, keep):
    beyond = torch.arange(old.ids.shape[1]) >= new.lengths[:, None]
    cut = old._replace(log_prior=old.log_prior.masked_fill(beyond, 0.0), log_q=old.log_q.masked_fill(beyond, 0.0))
    return conditioned_log_ratio(cut, new, keep)


def without_index(old, new, keep):
    flat = torch.zeros_like(old.log_index)
    return conditioned_log_ratio(old._replace(log_index=flat), new._replace(log_index=flat), keep)


def clamped(ratio, new, old, power):
    return log_acceptance(ratio, new, old, power).clamp_min(-0.5)


@pytest.mark.parametrize("kind", ENUMERABLE)
@pytest.mark.parametrize("mutant", [means, old_as_far_as_new], ids=lambda m: m.__name__)
def test_mutants_that_need_another_proposal_to_show(kind, mutant):
    model = SHAPES["soft"](enumerable_lm(kind))
    kernel = SuffixResample(proposal=enumerable_lm(kind, seed=1))
    matrix, brute = suffix_matrix(kernel, model, log_ratio=mutant)
    assert off_balance(matrix, law_at(brute))[0] > VISIBLE
    matrix, brute = suffix_matrix(SuffixResample(), model, log_ratio=mutant)
    assert off_balance(matrix, law_at(brute))[0] < EXACT  # with q = π0 nobody sees it


@pytest.mark.parametrize("kind", ENUMERABLE)
@pytest.mark.parametrize("index", ["length", "entropy"])
def test_mutant_without_the_law_of_the_position(kind, index):
    matrix, brute = suffix_matrix(SuffixResample(index), SHAPES["soft"](enumerable_lm(kind)), log_ratio=without_index)
    assert off_balance(matrix, law_at(brute))[0] > VISIBLE


@pytest.mark.parametrize("kind", ENUMERABLE)
def test_mutant_with_a_lower_clamp(kind):
    matrix, brute = suffix_matrix(SuffixResample(), SHAPES["soft"](enumerable_lm(kind)), accept=clamped)
    assert off_balance(matrix, law_at(brute))[0] > VISIBLE


def test_mutant_with_a_cap_per_suffix():
    """Each suffix may have T tokens: rows outgrow the cap, so that those which it should cut are never proposed."""
    lm = enumerable_lm("tabular")
    model = SHAPES["soft"](lm)
    brute = brute_force(model, CONTEXT)
    rows = brute.sequences
    scores = lm.token_log_probs(rows).double()
    cut = ~rows.finished
    scores[cut, 1:] = -math.inf  # from position 1 on, a row of T tokens goes on
    kernel = SuffixResample("horizon")
    matrix, _ = suffix_matrix(kernel, model, proposed=scores)
    assert off_balance(matrix, law_at(brute))[0] > VISIBLE
    matrix, _ = suffix_matrix(kernel, model)
    assert off_balance(matrix, law_at(brute))[0] < EXACT


# What else it promises.


@pytest.mark.parametrize("kind", ENUMERABLE)
def test_independence_converges_as_its_certificate_says(kind):
    """TV(δ_x K^n, π*) ≤ (1 − Z/M)^n from every start, with M = sup φ."""
    lm = enumerable_lm(kind)
    model = SHAPES["hard"](lm)
    restart = dataclasses.make_dataclass("Index", [])()
    restart.lm = lambda target: target.prior
    restart.log_ratio = conditioned_log_ratio
    restart.log_index_law = lambda n, horizon, e: (
        torch.full((len(n), horizon), -math.inf).double().index_fill_(1, torch.tensor([0]), 0.0)
    )
    matrix, brute = suffix_matrix(restart, model)
    law, share = law_at(brute), float((brute.log_z - brute.log_phi.max()).exp())
    power = torch.eye(len(law), dtype=torch.float64)
    for n in range(1, 12):
        power = power @ matrix
        distance = 0.5 * (power - law).abs().sum(1)[brute.log_gamma > -math.inf].max()
        assert float(distance) <= (1 - share) ** n + EXACT


def test_restart_from_both_proposals_leaves_the_posterior():
    for kernel in (Restart(), Restart(tiny_lm("tabular", 1))):
        matrix, brute = walked_matrix(kernel, SHAPES["hard"](tiny_lm("tabular")))
        assert max(off_balance(matrix, law_at(brute))) < EXACT


def test_a_step_reads_only_what_it_writes():
    lm = random_lm("llama", vocab_size=6, max_new_tokens=8)
    model, cost = SHAPES["soft"](lm), Cost()
    start = lm.draw(8, generator=torch.Generator().manual_seed(0))
    start = Draws(start.ids, start.lengths, start.finished, start.context, start.prompts, start.decoder)
    kernel, source = SuffixResample(), Source(torch.Generator().manual_seed(1))
    state = kernel.start(Target(model), start, cost)
    state, _ = Restart().step(state, source)
    rows = torch.arange(len(state))
    state.caught_up(lm, rows, state.draws.lengths)
    for _ in range(6):
        before, keep = cost.copy(), None
        old = state.draws
        state, info = kernel.step(state, source, 0.0)  # power 0: everything is accepted where lengths are equal
        spent, keep = cost - before, info.position
        assert spent.lm_forwards <= int((lm.max_new_tokens - keep - 1).max())
        assert spent.lm_tokens <= int((lm.max_new_tokens - keep - 1).sum())
        grown = torch.where(info.accepted, state.draws.lengths, 0) - keep - 1
        assert spent.lm_tokens >= int(grown.clamp_min(0).sum())
        assert len(old) == len(state.draws)


def test_chains_share_the_column_under_the_horizon_law():
    lm = tiny_lm("tabular")
    start = lm.draw(10, generator=torch.Generator().manual_seed(0))
    kernel, source = SuffixResample("horizon"), Source(torch.Generator().manual_seed(3))
    state = kernel.start(Target(SHAPES["soft"](lm)), start)
    for _ in range(5):
        lengths = state.draws.lengths
        state, info = kernel.step(state, source)
        columns = info.position[info.position >= 0].unique()
        assert len(columns) <= 1
        if len(columns):
            assert torch.equal(info.position < 0, lengths <= columns[0])


def test_wrong_kernels_are_refused():
    from lmppl.errors import ModelError

    lm = tiny_lm("tabular")
    target = Target(SHAPES["hard"](lm))
    start = lm.draw(2, generator=torch.Generator().manual_seed(0))
    for kernel, words in (
        (SuffixResample("middle"), "expected one of"),
        (SuffixResample(block=9), "expected an integer of 1 to max_new_tokens=3"),
        (Mixture(()), "expected a tuple of kernels"),
        (Mixture(weights=(1.0,)), "expected 2 positive numbers"),
        (Restart(enumerable_lm("tabular")), "expected the prior's"),
    ):
        with pytest.raises(ModelError, match=words):
            kernel.start(target, start)
    dead = lm.sequences([[1, 2]], [0])
    dead = Draws(dead.ids, dead.lengths, dead.finished, dead.context, dead.prompts, dead.decoder)
    with pytest.raises(ModelError, match=r"chain 0 starts at 'b' .* where the target is 0"):
        Restart().start(target, dead)
    assert wavy(["b"]) != wavy(["a"])
