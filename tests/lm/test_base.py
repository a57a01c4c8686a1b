"""LanguageModel: a distribution over outcomes, with one canonical form for each, usable under torch and Pyro."""

import itertools
import math

import pyro
import pytest
import torch
from pyro.infer import TraceEnum_ELBO

from lmppl.errors import ContextError, ModelError, ShapeError, SupportTooLarge
from lmppl.lm.base import LanguageModel, guard_support
from lmppl.lm.decoder import Decoder, Step
from lmppl.lm.tabular import TabularLM
from lmppl.sequences import Sequences

EOS = 2


@pytest.fixture
def lm() -> TabularLM:
    return TabularLM.random(3, 3, order=2, seed=1, context=["", "ab"])


def all_rows(lm):
    return torch.tensor(list(itertools.product(range(lm.vocab_size), repeat=lm.max_new_tokens)))


# Outcomes.


def test_an_outcome_ends_at_eos_or_the_cap(lm):
    rows = lm.sequences([[0, EOS], [0, 1, 0], [0, 1], [EOS], [0, 0, EOS], [EOS, 0], [EOS, EOS], [0, EOS, 1], []])
    assert lm.is_outcome(rows).tolist() == [True, True, False, True, True, False, False, False, False]
    scores = lm.score(rows)
    assert torch.isfinite(scores).tolist() == lm.is_outcome(rows).tolist()
    assert not scores.isnan().any()


def test_rows_beyond_the_cap_are_no_outcomes(lm):
    """As a proposal with a longer cap may make them."""
    longer = TabularLM.random(3, 5, order=2, seed=1, context=["", "ab"])
    rows = longer.sequences([[0, 1, 0, EOS], [0, 1, 0, 1, 0], [0, EOS], [0, 1, EOS]])
    assert lm.is_outcome(rows).tolist() == [False, False, True, True]
    assert lm.score(rows)[:2].tolist() == [-math.inf] * 2


def test_finished_must_be_true(lm):
    rows = lm.sequences([[0, 1, EOS], [0, 1, 0]])
    lying = Sequences(rows.ids, rows.lengths, ~rows.finished, rows.context, rows.prompts)
    assert lm.is_outcome(rows).all()
    assert not lm.is_outcome(lying).any()


def test_score_is_the_sum_of_token_log_probs(lm):
    table = lm.enumerate_sequences(1)
    tokens = lm.token_log_probs(table)
    assert tokens.shape == (len(table), 3)
    torch.testing.assert_close(tokens.sum(-1), table.log_prior)
    assert (tokens[~table.mask] == 0).all()


def test_parse_cuts_at_the_first_end(lm):
    parsed = lm.parse(torch.tensor([[0, EOS, 1], [1, 1, 1], [EOS, EOS, EOS]]), torch.tensor([0, 1, 0]))
    assert parsed.token_lists() == [[0, EOS], [1, 1, 1], [EOS]]
    assert parsed.finished.tolist() == [True, False, True]
    assert (parsed.ids[~parsed.mask] == lm.pad_id).all()


def test_rows_that_end_by_eos_alone_are_parsed_at_once(lm):
    class Stepping(TabularLM):
        def ended(self, ids, step):
            return super().ended(ids, step)

    class Early(TabularLM):
        """Also ends at two equal tokens."""

        def ended(self, ids, step):
            return super().ended(ids, step) | ((ids[:, step] == ids[:, step - 1]) & (step > 0))

    rows = all_rows(lm)
    where = torch.zeros(len(rows), dtype=torch.int64)
    at_once = lm.parse(rows, where)
    stepping, early = (kind.random(3, 3, order=2, seed=1) for kind in (Stepping, Early))
    assert lm.ends_by_eos_alone
    assert not stepping.ends_by_eos_alone
    by_steps = stepping.parse(rows, where)
    for name in ("ids", "lengths", "finished"):
        assert getattr(at_once, name).equal(getattr(by_steps, name))
    assert early.parse(torch.tensor([[0, 0, 1]]), where[:1]).lengths.tolist() == [2]
    nothing = lm.parse(rows[:, :0], where)
    assert nothing.lengths.tolist() == [0] * len(rows)
    assert not nothing.finished.any()


def test_sequences_check_what_they_are_given(lm):
    with pytest.raises(ShapeError, match="row 1 has 4 tokens, expected at most 3"):
        lm.sequences([[0], [0, 0, 0, 0]])
    with pytest.raises(ShapeError, match=r"row 0 is \[3\], expected ids of 0 to 2"):
        lm.sequences([[3]])
    with pytest.raises(ShapeError, match=r"row 0 is \[-1\]"):
        lm.sequences([[-1]])
    assert len(lm.sequences([])) == 0
    assert lm.score(lm.sequences([])).shape == (0,)
    assert lm.score(lm.sequences([[], []])).tolist() == [-math.inf] * 2


# torch.distributions.


def test_shapes(lm):
    assert lm.batch_shape == (2,)
    assert lm.event_shape == (3,)
    assert lm.sample().shape == (2, 3)
    assert lm.sample((4, 5)).shape == (4, 5, 2, 3)
    assert lm.log_prob(lm.sample((4, 5))).shape == (4, 5, 2)
    assert lm.log_prob(torch.tensor([0, EOS, EOS])).shape == (2,), "one value, asked of every context"


def test_samples_belong_to_their_context():
    sure = TabularLM.from_prefixes(
        {"": (0, 1, 0), "a": (1, 0, 0), "b": (0, 1, 0)}, ["a", "b", "<eos>"], max_new_tokens=1, context=["a", "b", ""]
    )
    assert sure.sample((5,))[:, :, 0].tolist() == [[0, 1, 1]] * 5


def test_probabilities_of_all_ids_sum_to_one(lm):
    """Each outcome has one canonical form: pads after the end, and nothing else there."""
    rows = all_rows(lm)
    log_probs = lm.log_prob(rows[:, None, :].expand(-1, 2, -1))
    torch.testing.assert_close(log_probs.exp().sum(0), torch.ones(2).double())
    assert log_probs[rows.tolist().index([0, EOS, 0])].tolist() == [-math.inf] * 2


def test_log_prob_agrees_with_score(lm):
    draws = lm.draw(20, generator=torch.Generator().manual_seed(0))
    values = draws.ids.view(2, 20, 3).transpose(0, 1)
    torch.testing.assert_close(lm.log_prob(values).T.reshape(-1), draws.log_prior)


def test_log_prob_refuses_what_is_no_value(lm):
    with pytest.raises(ShapeError, match=r"got last dimension \(4,\), expected \(3,\)"):
        lm.log_prob(torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ShapeError, match=r"got ids of dtype torch.float32, expected int64"):
        lm.log_prob(torch.zeros(2, 3))
    for wrong in (-1, 3):
        with pytest.raises(ShapeError, match="ids outside the vocabulary, expected 0 to 2"):
            lm.log_prob(torch.tensor([[0, 0, wrong]] * 2))


def test_support(lm):
    support = lm.enumerate_support()
    assert support.shape == (15, 2, 3)
    torch.testing.assert_close(lm.log_prob(support).exp().sum(0), torch.ones(2).double())
    assert lm.enumerate_support(expand=False).shape == (15, 1, 3)
    assert lm.support.check(support).all()
    assert lm.support.event_dim == 1
    assert not lm.support.check(torch.tensor([0, 0, 3]))


def test_enumeration_is_guarded(lm):
    assert len(lm.enumerate_sequences(max_sequences=15)) == 15
    with pytest.raises(SupportTooLarge, match="more than 14 outcomes"):
        lm.enumerate_sequences(max_sequences=14)
    guard_support(10, 10)
    with pytest.raises(SupportTooLarge):
        guard_support(11, 10)


# Pyro.


def test_under_plate_and_condition(lm):
    def program():
        with pyro.plate("contexts", 2):
            return pyro.sample("x", lm)

    trace = pyro.poutine.trace(program).get_trace()
    assert trace.nodes["x"]["value"].shape == (2, 3)
    value = torch.tensor([[0, 1, EOS], [1, EOS, EOS]])
    trace = pyro.poutine.trace(pyro.condition(program, data={"x": value})).get_trace()
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], lm.log_prob(value))
    assert trace.nodes["x"]["log_prob"].shape == (2,)


def test_pyro_can_sum_it_out():
    """TraceEnum_ELBO as an independent oracle: it enumerates our support and sums p(x) φ(x)."""
    one = TabularLM.random(3, 3, order=1, seed=2)

    def reward(ids):
        return (ids == 0).sum(-1).double()

    def model():
        with pyro.plate("contexts", 1):
            x = pyro.sample("x", one, infer={"enumerate": "parallel"})
            pyro.factor("r", reward(x))

    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    table = one.enumerate_sequences()
    exact = torch.logsumexp(table.log_prior + reward(table.ids), 0)
    assert -elbo.loss(model, lambda: None) == pytest.approx(float(exact), abs=1e-9)


# Contexts and arguments.


def test_other_contexts(lm):
    assert (lm | "b").prompts == ("b",)
    assert (lm | ["b", ""]).prompts == ("b", "")
    assert lm.prompts == ("", "ab"), "the LM itself is as it was"


def test_arguments_are_checked(lm):
    with pytest.raises(ContextError, match="got an empty list"):
        _ = lm | []
    with pytest.raises(ModelError, match="num_draws: got 0"):
        lm.draw(0)
    for cap in (0, -1, 2.0, "3"):
        with pytest.raises(ModelError, match="max_new_tokens: got"):
            TabularLM([0.5, 0.5], max_new_tokens=cap)


def test_what_it_is_not_said_to_be_cannot_be_made():
    with pytest.raises(TypeError, match="abstract"):
        LanguageModel([""], vocab_size=2, max_new_tokens=1, eos_ids=[], pad_id=0)


def test_the_decoder_is_a_decoder(lm):
    assert isinstance(lm.decoder(), Decoder)


def test_repr_is_short(lm):
    assert repr(lm) == "TabularLM(2 contexts, max_new_tokens=3)"
    assert repr(lm | "ab") == "TabularLM('ab', max_new_tokens=3)"


# Step.


@pytest.mark.parametrize("chunk", [1, 7, 1 << 22])
def test_a_step_scores_tokens_in_chunks(chunk):
    weight, hidden = torch.randn(4, 6).double(), torch.randn(2, 5, 4).double()
    step = Step(lambda rows: rows @ weight, hidden)
    tokens = torch.randint(6, (2, 5))
    expected = step.log_probs.gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(step.log_prob_of(tokens, chunk=chunk), expected)
    torch.testing.assert_close(step.log_probs.exp().sum(-1), torch.ones(2, 5).double())
