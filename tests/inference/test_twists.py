"""Twists: exact soft values, products, and the forms of factors; as laws, and at work in SMC."""

import math

import pytest
import torch

from lmppl.errors import ModelError
from lmppl.inference.run import infer
from lmppl.inference.smc import SMC
from lmppl.inference.twists import ExactTwist, FactorTwist, ProductTwist
from lmppl.inference.twists.track import TwistTrack
from lmppl.lm.frontier import Frontier
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence.automata import Automaton
from lmppl.modeling.evidence.constraint import Constraint
from lmppl.modeling.evidence.reward import Reward
from lmppl.modeling.factors import Incremental
from lmppl.modeling.model import Model
from tests.inference.smc_cases import ArbitraryTwist, counts, forbids, small_lm
from tests.lm.random_models import random_lm, uncached_logits
from tests.models import ENUMERABLE, brute_force, enumerable_lm, has_no, wavy


def hard_model(kind: str) -> Model:
    return enumerable_lm(kind) * Reward(wavy, beta=0.4) * Constraint(has_no("b"))


def walk(twist, context, tokens):
    """Potentials after each prefix of one row, and the sums of its increments."""
    state = twist.start(torch.tensor([context]))
    potentials = [float(twist.potential(state)[0])]
    sums = [potentials[0]]
    for token in tokens:
        at = torch.tensor([[token]])
        weight = float(twist.weigh(state, at)[0, 0])
        assert weight == pytest.approx(float(twist.weigh(state, None)[0, token]), abs=1e-12)
        state = twist.advance(state, at[0], None)
        potentials.append(float(twist.potential(state)[0]))
        sums.append(sums[-1] + weight)
    return potentials, sums


@pytest.mark.parametrize("kind", ENUMERABLE)
@pytest.mark.parametrize("context", [0, 1])
def test_exact_twist_is_the_soft_value_of_every_prefix(kind, context):
    model = hard_model(kind)
    twist, values = ExactTwist.of(model), brute_force(model, context).soft_values()
    for row in brute_force(model, context).sequences.token_lists():
        potentials, sums = walk(twist, context, row)
        for t, (potential, total) in enumerate(zip(potentials, sums, strict=True)):
            wanted = values.get(tuple(row[:t]), -math.inf)
            assert potential == pytest.approx(wanted, abs=1e-10)
            assert total == pytest.approx(wanted, abs=1e-10)


def test_exact_twist_by_dynamic_programming_is_that_of_the_tree():
    prior = TabularLM.random(3, 4, order=2, seed=2, context=["", "ab"])
    model = prior * Constraint(Automaton.avoiding("ba") & Automaton.length(1))
    twist = ExactTwist.of(model)
    for context in (0, 1):
        brute = brute_force(model, context)
        values = brute.soft_values()
        for row in brute.sequences.token_lists():
            for t, potential in enumerate(walk(twist, context, row)[0]):
                assert potential == pytest.approx(values[tuple(row[:t])], abs=1e-10)


@pytest.mark.parametrize("kind", ENUMERABLE)
def test_exact_twist_in_the_proposal_leaves_no_variance(kind):
    model = hard_model(kind)
    twist = ExactTwist.of(model)
    run = infer(model, SMC(16, twist=twist), 64, progress=False)
    exact = torch.stack([brute_force(model, c).log_z for c in range(2)])
    assert torch.allclose(run.draws.log_weight, exact[run.draws.context], atol=1e-9)
    assert torch.allclose(run.info["log_z_sweeps"], exact[:, None].expand(2, 4), atol=1e-9)
    assert int(run.info["resamplings"].sum()) == 0
    bootstrap = infer(model, SMC(16, twist=twist, proposal="prior"), 64, progress=False)
    assert float(bootstrap.info["log_z_sweeps"].std(1).min()) > 0.01


def test_products_add_up():
    vocab = 3
    a, b = ArbitraryTwist(vocab, 1), ArbitraryTwist(vocab, 2)
    product = ProductTwist(a, b)
    assert isinstance(product, Incremental)
    state = product.start(torch.tensor([0, 1, 0]))
    for tokens in ([0, 1, 1], [1, 1, 0]):
        each = [t.weigh(s.own, None) for t, s in zip((a, b), state, strict=True)]
        assert product.weigh(state, None).equal(each[0] + each[1])
        state = product.advance(state, torch.tensor(tokens), None)
    assert product.potential(state).equal(a.potential(state[0].own) + b.potential(state[1].own))
    turned = product.select(state, torch.tensor([2, 0]))
    assert product.potential(turned).equal(product.potential(state)[torch.tensor([2, 0])])
    cut = product.crop(state, torch.tensor([1, 0, 2]))
    assert product.potential(cut)[1] == product.potential(product.start(torch.tensor([1])))[0]
    assert len(ProductTwist()) == 0


def test_exact_twist_crops():
    twist = ExactTwist.of(hard_model("tabular"))
    state = twist.start(torch.tensor([0, 1]))
    potentials = [twist.potential(state)]
    for tokens in ([0, 2], [2, 0]):
        state = twist.advance(state, torch.tensor(tokens), None)
        potentials.append(twist.potential(state))
    cut = twist.crop(state, torch.tensor([1, 2]))
    assert twist.potential(cut).tolist() == [potentials[1][0], potentials[2][1]]
    again = twist.advance(twist.crop(state, torch.tensor([1, 1])), torch.tensor([2, 0]), None)
    assert twist.potential(again).equal(potentials[2])


def test_fingerprints_follow_content():
    twist, other = ExactTwist.of(hard_model("tabular")), ExactTwist.of(enumerable_lm("tabular") * Reward(wavy))
    assert twist.fingerprint == ExactTwist.of(hard_model("tabular")).fingerprint != other.fingerprint
    assert ProductTwist(twist, other).fingerprint != ProductTwist(other, twist).fingerprint
    with pytest.raises(ModelError, match="ArbitraryTwist has no fingerprint"):
        _ = ProductTwist(ArbitraryTwist(3)).fingerprint


def test_factor_twist_takes_the_forms_of_the_factors():
    lm = small_lm("tabular", 3)
    model = lm * forbids("b", 3) * Reward(wavy, beta=0.4) * counts("a", 3, 0.7)
    twist = FactorTwist.of(model)
    assert twist.names == ("no_b", "count_a")
    potentials, sums = walk(twist, 0, [0, 0, 1])
    assert potentials == pytest.approx([0.0, 0.7, 1.4, -math.inf])
    assert sums == pytest.approx(potentials)
    automaton = FactorTwist.of(lm * Constraint(Automaton.avoiding("b"), name="no_b"))
    assert automaton.names == ("no_b",)  # it has its form from the prior's tokens
    with pytest.raises(ModelError, match="got str"):
        ProductTwist("no twist")


class ReadsHidden:
    """Keeps the scores that the LM's hidden state gives, so that a test can compare them with a fresh forward."""

    needs = ("hidden",)

    def start(self, contexts, step):
        return [(int(c), (), s) for c, s in zip(contexts, step.logits[:, -1], strict=True)]

    def weigh(self, state, candidates):
        scores = torch.stack([s for _, _, s in state]) * 0.3
        return scores if candidates is None else scores.gather(1, candidates)

    def advance(self, state, tokens, step):
        rows = zip(state, tokens.tolist(), step.logits[:, -1], strict=True)
        return [(c, (*x, v), s) for (c, x, _), v, s in rows]

    def potential(self, state):
        return torch.zeros(len(state), dtype=torch.float64)

    def select(self, state, index):
        return [state[i] for i in index.tolist()]

    def crop(self, state, lengths):
        raise NotImplementedError


def ten_rows(lm):
    """Five rows of each of two contexts, and the twist that keeps what it has read of them."""
    frontier = Frontier(lm, torch.arange(2).repeat_interleave(5))
    return frontier, TwistTrack(ReadsHidden(), frontier), torch.Generator().manual_seed(1)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_twist_on_hidden_states_gets_those_of_its_own_rows(kind):
    lm = random_lm(kind, max_new_tokens=5)
    frontier, track, generator = ten_rows(lm)
    seen = 0
    while len(live := frontier.live):
        track.settle()
        (chunk,) = track._chunks
        for row, (c, prefix, scores) in zip(live.tolist(), chunk.state.own, strict=True):
            assert list(prefix) == frontier.ids[row, : int(frontier.lengths[row])].tolist()
            assert torch.allclose(scores, uncached_logits(lm, c, list(prefix))[-1], atol=1e-9)
            seen += 1
        tokens = torch.randint(lm.vocab_size, (len(live),), generator=generator)
        stopped = frontier.append(tokens)
        track.append(tokens, ~stopped)
        index = torch.randint(len(frontier), (len(frontier),), generator=generator)
        before = frontier.live
        frontier.select(index)
        track.select(torch.searchsorted(before, index[frontier.live]))
    assert seen > 20


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_twist_on_hidden_states_is_rebuilt_at_boundaries(kind):
    lm = random_lm(kind, max_new_tokens=4)
    frontier, track, generator = ten_rows(lm)
    tokens = torch.randint(4, (10,), generator=generator)  # no EOS
    frontier.append(tokens)
    track.append(tokens, torch.ones(10, dtype=torch.bool))
    keep = torch.arange(10) % 2 == 0
    everyone = frontier.live
    frontier.drop(keep)
    track.drop(keep)
    assert len(track.weigh(None)) == 5
    tokens = torch.randint(4, (5,), generator=generator)
    frontier.append(tokens)
    track.append(tokens, torch.ones(5, dtype=torch.bool))
    frontier.resume(everyone)
    track.rebuild()
    scores = track.weigh(None) / 0.3
    for row, got in zip(everyone.tolist(), scores, strict=True):
        prefix = frontier.ids[row, : int(frontier.lengths[row])].tolist()
        assert torch.allclose(got, uncached_logits(lm, int(frontier.context[row]), prefix)[-1], atol=1e-9)


def test_an_exact_twist_is_refused_by_another_prior():
    """Other tables, and other contexts, whose prefixes it does not know."""
    one, other = (TabularLM.random(3, 3, seed=seed, context=["", "a"]) * Reward(wavy) for seed in (1, 2))
    twist = ExactTwist.of(one)
    assert infer(one, SMC(8, twist=twist), progress=False).log_normalizer[0].value.shape == (2,)
    for foreign in (other, one | ["a", ""]):
        with pytest.raises(ModelError, match=r"the exact twist is that of TabularLM.* by ExactTwist.of"):
            infer(foreign, SMC(8, twist=twist), progress=False)


def test_an_exact_twist_of_a_tighter_declaration_leaves_a_lower_bound():
    """It never writes what its own declaration excludes: E Ẑ < Z, and the estimate says so."""
    prior = TabularLM.random(3, 3, seed=1, context=["", "a"])
    tight = prior * Reward(wavy) * Constraint(has_no("a"), name="no_a")
    twist = ExactTwist.of(tight)
    loose = prior * Reward(wavy)
    for given in (twist, ProductTwist(twist, twist)):
        found = infer(loose, SMC(64, twist=given), seed=0, progress=False)
        assert found.log_normalizer[0].kind == "lower_bound"
        assert "and may exclude what this model allows: then E Ẑ < Z" in found.log_normalizer[0].note
    assert float(found.log_normalizer[0].value[0]) < float(brute_force(loose, 0).log_z) - 0.2
    assert infer(tight, SMC(64, twist=twist), progress=False).log_normalizer[0].kind == "unbiased_Z"
