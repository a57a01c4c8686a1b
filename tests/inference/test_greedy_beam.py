"""Greedy and beam search against brute force: a wide beam finds the modes, a narrow one follows its own rule."""

import math

import pytest
import torch

from lmppl.comparison import compare
from lmppl.errors import InfeasibleModel, ModelError, UnsupportedModel
from lmppl.inference.beam_search import Beam, Greedy, search
from lmppl.inference.engine import Guarantee
from lmppl.inference.prefix_scores import PrefixScore
from lmppl.inference.run import infer
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence.constraint import Constraint
from lmppl.modeling.evidence.reward import Reward
from lmppl.modeling.factors import Factor
from lmppl.sequences import Cost
from lmppl.testing import check_engine
from tests.models import ENUMERABLE, TOLERANCE, brute_force, enumerable_lm, has_no, wavy

CONTEXTS = (0, 1)


def with_form(prior, beta=0.5):
    """A reward of the text so far that is its own incremental form: log ψ(x_≤t) = wavy(x_≤t)/β."""
    reward = Reward(wavy, beta=beta, name="wave")
    form = PrefixScore(wavy, beta=beta)(prior)
    return Factor("wave", reward.features, reward.log_factor, hard=False, incremental=form)


def search_by_hand(prior, context, width, score):
    """Beam search on lists: extensions in the order of beams and tokens, best first, stable."""
    beams = [((), 0.0, False)]
    for t in range(prior.max_new_tokens):
        ahead = []
        for row, total, over in beams:
            if over:
                ahead.append((row, total, True))
                continue
            given = torch.tensor([row], dtype=torch.int64) if row else None
            with torch.no_grad():
                step, _ = prior.decoder().prefill(torch.tensor([context]), given)
                log_p = step.log_probs[0, -1].tolist()
            for v, value in enumerate(log_p):
                longer = (*row, v)
                ended = v in prior.eos_ids or t + 1 == prior.max_new_tokens
                ahead.append((longer, total + value + score(longer) - score(row), ended))
        beams = sorted(ahead, key=lambda one: -one[1])[:width]
    return [(row, total) for row, total, _ in beams]


@pytest.mark.parametrize("kind", ENUMERABLE)
@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize("guided", [False, True])
def test_the_beams_are_those_of_a_search_by_hand(kind, width, guided):
    prior = enumerable_lm(kind)
    model = prior * with_form(prior)
    result = infer(model, Beam(width, guided=guided), progress=False)

    def score(row):
        return wavy(prior.sequences([row]).text)[0] / 0.5 if guided and row else 0.0

    for c in CONTEXTS:
        own = result.draws.select(result.draws.context == c)
        expected = search_by_hand(prior, c, width, score)
        assert [tuple(row) for row in own.token_lists()] == [row for row, _ in expected]
        torch.testing.assert_close(
            own.columns["score"], torch.tensor([s for _, s in expected], dtype=torch.float64), rtol=0, atol=TOLERANCE
        )
        assert own.columns["rank"].tolist() == list(range(len(expected)))
    assert result.info["searched"] == (("wave",) if guided else ())


@pytest.mark.parametrize("kind", ENUMERABLE)
def test_a_wide_beam_finds_the_modes_of_the_prior(kind):
    prior = enumerable_lm(kind)
    result = infer(prior, Beam(200), progress=False)
    for c in CONTEXTS:
        brute = brute_force(prior, c)
        own = result.draws.select(result.draws.context == c)
        order = torch.sort(brute.log_prior, descending=True).values[: len(own)]
        torch.testing.assert_close(own.log_prior, order, rtol=0, atol=TOLERANCE)
        assert len(set(own.keys())) == len(own)
        possible = int((brute.log_prior > -math.inf).sum())
        assert len(own) == min(200, possible)


@pytest.mark.parametrize("kind", ENUMERABLE)
def test_greedy_takes_the_most_probable_token(kind):
    prior = enumerable_lm(kind)
    result = infer(prior, Greedy(), progress=False)
    draws = result.draws
    assert len(draws) == 2
    for c in CONTEXTS:
        (row,) = draws.select(draws.context == c).token_lists()
        for t, token in enumerate(row):
            given = torch.tensor([row[:t]]) if t else None
            with torch.no_grad():
                step, _ = prior.decoder().prefill(torch.tensor([c]), given)
            assert int(step.hidden.shape[0]) == 1
            with torch.no_grad():
                assert token == int(step.log_probs[0, -1].argmax())
    beam = infer(prior, Beam(1), progress=False).draws
    assert torch.equal(beam.ids, draws.ids)
    torch.testing.assert_close(draws.log_prior, prior.score(draws), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ENUMERABLE)
def test_the_sum_over_beams_is_a_lower_bound_of_z(kind):
    prior = enumerable_lm(kind)
    model = prior * with_form(prior) * Constraint(has_no("b"))
    last = torch.full((2,), -math.inf, dtype=torch.float64)
    for width in (1, 4, 30, 200):
        result = infer(model, Beam(width), progress=False)
        (estimate,) = result.log_normalizer
        assert estimate.kind == "lower_bound"
        for c in CONTEXTS:
            brute = brute_force(model, c)
            own = result.draws.select(result.draws.context == c)
            number = {key: i for i, key in enumerate(brute.sequences.keys())}
            rows = [number[key] for key in own.keys()]  # noqa: SIM118 - a method, not a mapping's
            total = torch.logsumexp(brute.log_gamma[rows], 0)
            torch.testing.assert_close(estimate.value[c], total, rtol=0, atol=TOLERANCE)
            assert float(total) <= float(brute.log_z) + TOLERANCE
            share = float((brute.log_phi[rows] == -math.inf).double().mean())
            assert float(result.info["violating_share"][c]) == pytest.approx(share)
        last = estimate.value
    exact = torch.stack([brute_force(model, c).log_z for c in CONTEXTS])
    torch.testing.assert_close(last, exact, rtol=0, atol=TOLERANCE)  # the widest beam has found everything


def test_ties_go_to_the_lower_token_and_beam():
    prior = TabularLM([0.25, 0.25, 0.25, 0.25], eos=None, max_new_tokens=2)
    draws = infer(prior, Beam(5), progress=False).draws
    assert draws.token_lists() == [[0, 0], [0, 1], [0, 2], [0, 3], [1, 0]]
    assert infer(prior, Greedy(), progress=False).draws.token_lists() == [[0, 0]]


def test_fewer_outcomes_than_beams():
    prior = TabularLM([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.6, 0.4, 0.0]], max_new_tokens=3)
    draws = infer(prior, Beam(6), progress=False).draws
    assert draws.token_lists() == [[0, 1, 2], [1, 2]]
    torch.testing.assert_close(draws.log_prior.exp(), torch.tensor([0.6, 0.4], dtype=torch.float64))


# The engine.


def test_it_is_deterministic_and_says_so():
    prior = enumerable_lm("llama")
    model = prior * with_form(prior)
    for engine in (Greedy(), Beam(3)):
        assert engine.guarantee is Guarantee.HEURISTIC
        first = infer(model, engine, 50, seed=1, progress=False)
        other = infer(model, engine, 7, seed=2, progress=False)
        assert torch.equal(first.draws.ids, other.draws.ids)
        assert len(first.draws) == 2 * engine.num_beams
        assert first.draws.log_weight is None
        assert first.status == "complete"
    with pytest.raises(UnsupportedModel):
        first.as_language_model()


@pytest.mark.parametrize("engine", [Greedy(), Beam()], ids=str)
def test_the_engine_keeps_the_contract(engine):
    report = check_engine(engine)
    assert "shards depend on seed and id alone" in report.held
    assert "log_prior is that of the prior" in report.held
    assert any("deterministic" in reason for reason in report.skipped.values())


def test_compare_shows_them_beside_samplers():
    model = enumerable_lm("tabular") * Reward(wavy, beta=0.5)
    table = compare(model, [Greedy(), Beam(3)], num_draws=20, progress=False)
    assert "greedy" in str(table)
    assert [row.guarantee for row in table.rows][1:] == ["heuristic", "heuristic"]


def test_equal_prefixes_are_read_once():
    lm, cost = enumerable_lm("llama"), Cost()
    search(lm, torch.tensor([0, 1]), 3, cost=cost)
    prompts = int(lm.context_lengths.sum())
    assert cost.lm_forwards == 3
    assert cost.lm_tokens <= prompts + 2 * 3 * 2


def test_a_search_that_satisfies_nothing_says_so(caplog):
    table = [[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.0, 0.0, 1.0], [0.7, 0.2, 0.1]]
    prior = TabularLM(table, max_new_tokens=2, context=["", "a"])
    model = prior * Constraint(has_no("a"), name="no a") * Reward(wavy)
    result = infer(model, Greedy(), progress=False)
    assert result.log_normalizer[0].value.tolist() == [-math.inf, -math.inf]
    (record,) = caplog.records
    told = "greedy: γ = 0 for all that was found (1) for context '' (and for 1 more), by factor 'no a'"
    assert told in record.message
    caplog.clear()
    result = infer(model, Beam(4), progress=False)
    assert 0 < float(result.info["violating_share"][0]) < 1
    assert [r.message for r in caplog.records] == ["beam: 75.0 % of the beams violate a hard constraint"]
    caplog.clear()
    infer(prior * Reward(wavy), Beam(4), progress=False)
    assert not caplog.records


def test_bad_input():
    prior = enumerable_lm("tabular")
    with pytest.raises(ModelError, match="got num_beams=0"):
        infer(prior, Beam(0), progress=False)
    form = PrefixScore(lambda texts: [-math.inf for _ in texts])(prior)
    nothing = Constraint(lambda texts: [False for _ in texts], name="nothing")
    factor = Factor("nothing", nothing.features, nothing.log_factor, incremental=form)
    with pytest.raises(
        InfeasibleModel, match=r"every beam for context '' \(and for 1 more\) ran into prefixes that 'nothing'"
    ):
        infer(prior * factor, Greedy(), progress=False)
