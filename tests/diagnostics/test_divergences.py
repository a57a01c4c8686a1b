"""Divergences: identities by enumeration, with a q that covers π* and one that does not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lmppl.diagnostics import (
    elbo,
    entropy_effective_sample_size,
    eubo,
    kl_divergence,
    self_normalised_kl,
    total_variation,
    total_variation_from_weights,
)
from lmppl.errors import ModelError, ShapeError
from lmppl.modeling.evidence import Constraint, Reward
from tests.models import TOLERANCE, brute_force, count_of, enumerable_lm, has_no


def tables(*, hard: bool) -> tuple[Tensor, Tensor, float]:
    """log π*, log q and log Z of an enumerated model; q is another LM."""
    factor = Constraint(has_no("b")) if hard else Reward(count_of("a"), beta=0.7)
    table = brute_force(enumerable_lm("tabular") * factor, 1)
    q = brute_force(enumerable_lm("tabular", seed=1), 1)
    return table.log_posterior, q.log_prior, float(table.log_z)


def exact_sample(log_p: Tensor, values: Tensor, resolution: int) -> Tensor:
    """`values` repeated in proportion to p, so that a sample mean is an expectation up to 1/`resolution`."""
    return values.repeat_interleave((log_p.exp() * resolution).round().long())


def test_kl_and_tv_of_tables() -> None:
    p, q = torch.tensor([0.5, 0.5, 0.0]).double(), torch.tensor([0.25, 0.5, 0.25]).double()
    assert float(kl_divergence(p.log(), q.log())) == pytest.approx(0.5 * math.log(2))
    assert float(kl_divergence(q.log(), p.log())) == math.inf
    assert float(total_variation(p.log(), q.log())) == pytest.approx(0.25)
    assert float(kl_divergence(p.log(), p.log())) == 0.0


@pytest.mark.parametrize("hard", [False, True])
def test_tv_is_bounded_by_kl(hard) -> None:
    log_p, log_q, _ = tables(hard=hard)
    kl, tv = float(kl_divergence(log_p, log_q)), float(total_variation(log_p, log_q))
    assert tv <= math.sqrt(kl / 2)
    assert tv <= math.sqrt(1 - math.exp(-kl))


def test_elbo_and_eubo_enclose_log_z_by_the_two_kls() -> None:
    log_p, log_q, log_z = tables(hard=False)
    log_w = log_p + log_z - log_q
    below, above = log_z - float(kl_divergence(log_q, log_p)), log_z + float(kl_divergence(log_p, log_q))
    assert float((log_q.exp() * log_w).sum()) == pytest.approx(below, abs=TOLERANCE)
    assert float((log_p.exp() * log_w).sum()) == pytest.approx(above, abs=TOLERANCE)
    low = elbo(exact_sample(log_q, log_w, 10**5))
    high = eubo(exact_sample(log_p, log_w, 10**5))
    assert (low.kind, high.kind) == ("lower_bound", "upper_bound")
    assert float(low.value) == pytest.approx(below, abs=0.01)
    assert float(high.value) == pytest.approx(above, abs=0.01)
    assert float(low.interval[1]) < log_z < float(high.interval[0])


def test_elbo_is_minus_infinity_where_q_can_violate_a_constraint() -> None:
    log_p, log_q, log_z = tables(hard=True)
    estimate = elbo(log_p + log_z - log_q)
    assert float(estimate.value) == -math.inf
    assert estimate.interval is None
    assert "Pr_q(γ = 0) > 0" in estimate.note


def test_eubo_sees_a_missed_mode_that_weights_do_not_show() -> None:
    # q holds 1 % of π* and is perfect there.
    log_gamma = torch.tensor([0.01, 0.99], dtype=torch.float64).log()
    log_q = torch.tensor([1.0, 0.0], dtype=torch.float64).log()
    from_q = (log_gamma - log_q)[[0] * 1000]
    assert float(elbo(from_q).value) == pytest.approx(math.log(0.01))
    assert float(entropy_effective_sample_size(from_q)) == pytest.approx(1000.0)
    estimate = eubo((log_gamma - log_q)[[1] * 99 + [0]])
    assert float(estimate.value) == math.inf
    assert "99 of 100" in estimate.note


def test_eubo_refuses_draws_that_cannot_be_exact() -> None:
    with pytest.raises(ModelError, match="γ = 0"):
        eubo(torch.tensor([0.0, -math.inf]))


@pytest.mark.parametrize("covers", [True, False])
def test_total_variation_from_weights_is_exact_even_where_q_does_not_cover(covers) -> None:
    log_p, log_q, log_z = tables(hard=True)
    if not covers:
        log_q = log_q.clone()
        log_q[torch.argmax(log_p)] = -math.inf
        log_q = log_q - torch.logsumexp(log_q, 0)
    inside = log_q > -math.inf
    ratio = (log_p - log_q)[inside].exp()  # w/Z where q can draw
    truth = float(total_variation(log_p, log_q))
    assert float((log_q[inside].exp() * torch.relu(1 - ratio)).sum()) == pytest.approx(truth, abs=TOLERANCE)
    mutant = 0.5 * float((log_q[inside].exp() * (ratio - 1).abs()).sum())
    assert (mutant == pytest.approx(truth, abs=1e-6)) is covers

    log_w = log_p + log_z - log_q
    estimate = total_variation_from_weights(exact_sample(log_q, log_w, 10**5), log_z)
    assert float(estimate.value) == pytest.approx(truth, abs=2e-3)
    assert float(estimate.interval[0]) < truth < float(estimate.interval[1])


def test_self_normalised_kl_is_the_entropy_size_in_nats_and_has_a_cap() -> None:
    log_w = torch.tensor([0.0, 1.0, 2.0, -math.inf], dtype=torch.float64)
    estimate = self_normalised_kl(log_w)
    assert float(estimate.value) == pytest.approx(math.log(4) - math.log(float(entropy_effective_sample_size(log_w))))
    assert "log N = 1.39" in estimate.note
    single = torch.full((10,), -math.inf)
    single[0] = 0.0
    worst = self_normalised_kl(single)
    assert float(worst.value) == pytest.approx(math.log(10))
    assert float(worst.interval[1]) <= math.log(10) + 1e-12


def test_self_normalised_kl_converges_to_the_forward_kl_and_its_error_is_right() -> None:
    log_p, log_q, _ = tables(hard=False)
    truth = float(kl_divergence(log_p, log_q))
    generator = torch.Generator().manual_seed(0)
    values, errors = [], []
    for _ in range(200):
        index = torch.multinomial(log_q.exp(), 2000, replacement=True, generator=generator)
        estimate = self_normalised_kl((log_p - log_q)[index])
        values.append(float(estimate.value))
        errors.append(float(estimate.standard_error))
    spread = torch.tensor(values).std()
    assert sum(values) / 200 == pytest.approx(truth, abs=0.1)
    assert sum(errors) / 200 == pytest.approx(float(spread), rel=0.25)


def test_tables_must_be_whole() -> None:
    whole = torch.tensor([0.5, 0.5]).log()
    with pytest.raises(ModelError, match=r"sum to 0\.75"):
        kl_divergence(whole, torch.tensor([0.5, 0.25]).log())
    with pytest.raises(ShapeError, match="the same"):
        total_variation(whole, torch.tensor([1.0]).log())
