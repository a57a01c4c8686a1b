"""A language model under Pyro's effect handlers: sample, plate, trace, condition, replay, Empirical, enumeration."""

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import config_enumerate

from lmppl.errors import ShapeError
from lmppl.lm import TabularLM
from tests.lm.random_models import random_lm


@pytest.fixture(params=["tabular", "llama", "mistral"])
def lm(request):
    if request.param == "tabular":
        return TabularLM.random(4, 3, order=2, seed=3, context=["a", "bca"])
    return random_lm(request.param)


def test_shapes_are_those_of_a_distribution(lm):
    assert lm.batch_shape == (2,)
    assert lm.event_shape == (3,)
    assert lm.sample().shape == (2, 3)
    value = lm.sample((4, 5))
    assert value.shape == (4, 5, 2, 3)
    assert value.dtype == torch.int64
    assert lm.log_prob(value).shape == (4, 5, 2)
    assert bool(lm.support.check(value).all())


def test_each_column_of_a_sample_belongs_to_its_context(lm):
    value = lm.sample((6,))
    for context in (0, 1):
        alone = lm.with_contexts([lm.prompts[context]])
        got = alone.log_prob(value[:, context : context + 1])[:, 0]
        torch.testing.assert_close(lm.log_prob(value)[:, context], got, rtol=0, atol=1e-10)


def test_trace_adds_the_log_probabilities_of_its_site(lm):
    def program():
        with pyro.plate("contexts", 2):
            return pyro.sample("x", lm)

    trace = poutine.trace(program).get_trace()
    value = trace.nodes["x"]["value"]
    torch.testing.assert_close(trace.log_prob_sum(), lm.log_prob(value).sum())


def test_a_vectorised_plate_draws_rows_for_every_context(lm):
    def program():
        with pyro.plate("particles", 7, dim=-2), pyro.plate("contexts", 2, dim=-1):
            return pyro.sample("x", lm)

    trace = poutine.trace(program).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["x"]["value"].shape == (7, 2, 3)
    assert trace.nodes["x"]["log_prob"].shape == (7, 2)


def test_condition_and_replay_keep_the_value(lm):
    def program():
        with pyro.plate("contexts", 2):
            return pyro.sample("x", lm)

    value = lm.sample()
    conditioned = poutine.trace(pyro.condition(program, data={"x": value})).get_trace()
    assert conditioned.nodes["x"]["is_observed"]
    torch.testing.assert_close(conditioned.log_prob_sum(), lm.log_prob(value).sum())
    first = poutine.trace(program).get_trace()
    again = poutine.trace(poutine.replay(program, trace=first)).get_trace()
    assert torch.equal(again.nodes["x"]["value"], first.nodes["x"]["value"])


def test_a_mask_and_a_scale_act_on_the_log_probabilities(lm):
    value = lm.sample()
    masked = lm.mask(torch.tensor([True, False])).log_prob(value)
    torch.testing.assert_close(masked, lm.log_prob(value) * torch.tensor([1.0, 0.0], dtype=masked.dtype))


def test_expanding_a_single_context(lm):
    single = lm.with_contexts(["a"])
    wide = single.expand_by([4])
    assert wide.batch_shape == (4, 1)
    assert wide.sample().shape == (4, 1, 3)


def test_an_empirical_distribution_over_draws(lm):
    draws = lm.draw(50, generator=torch.Generator().manual_seed(0))
    rows = draws.select(draws.context == 1)
    empirical = dist.Empirical(rows.ids, torch.zeros(len(rows), dtype=torch.float64))
    value = empirical.sample()
    assert value.tolist() in rows.ids.tolist()


def test_enumeration_sums_to_one(lm):
    values = lm.enumerate_support()
    torch.testing.assert_close(lm.log_prob(values).exp().sum(0), torch.ones(2).double(), rtol=0, atol=1e-10)
    assert lm.enumerate_support(expand=False).shape == (len(values), 1, 3)


def test_pyro_sums_one_context_out(lm):
    single = lm.with_contexts(["a"])

    @config_enumerate
    def program():
        x = pyro.sample("x", single)
        pyro.factor("evidence", (x[..., 0] == 1).to(torch.float64))

    traced = poutine.trace(poutine.enum(program, first_available_dim=-2)).get_trace()
    traced.compute_log_prob()
    total = (traced.nodes["x"]["log_prob"] + traced.nodes["evidence"]["log_prob"]).logsumexp(0)
    listed = single.enumerate_sequences()
    want = torch.logsumexp(listed.log_prior + (listed.ids[:, 0] == 1).double(), 0)
    torch.testing.assert_close(total.squeeze(), want, rtol=0, atol=1e-10)


def test_a_float_value_is_refused(lm):
    with pytest.raises(ShapeError, match="expected int64"):
        lm.log_prob(lm.sample().float())
    with pytest.raises(ShapeError, match="last dimension"):
        lm.log_prob(lm.sample()[..., :2])
