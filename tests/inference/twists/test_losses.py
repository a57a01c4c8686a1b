"""Every loss at every prefix of an enumerable model: the true soft value minimises it, and its gradient is as stated.

A table with one free value per prefix stands for a head of unlimited capacity; all outcomes with their probabilities
stand for infinitely many draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import pytest
import torch
from torch import Tensor

from lmppl.errors import ModelError
from lmppl.inference.twists.losses import (
    Consistency,
    Contrastive,
    Rollouts,
    SoftValue,
    TwistLoss,
    resolve_loss,
)
from lmppl.modeling import Constraint, Model, Reward
from tests.models import ENUMERABLE, BruteForce, brute_force, count_of, enumerable_lm, has_no, wavy

NEVER = -80.0  # stands for log ψ = −inf, which no loss reaches
PROPER = [Contrastive(), SoftValue(), Consistency(), Consistency(bootstrap=False)]

REWARDS: dict[str, Callable[[], list[object]]] = {
    "wavy": lambda: [Reward(wavy, beta=0.5)],
    "ties": lambda: [Reward(count_of("a"), beta=0.7)],
    "hard": lambda: [Reward(wavy, beta=0.5), Constraint(has_no("b"))],
}


def declared(kind: str, shape: str) -> Model:
    model = Model(enumerable_lm(kind))
    for factor in REWARDS[shape]():
        model = model * factor
    return model


@dataclass(frozen=True, eq=False)
class Table:
    """One value for each prefix of each context, and rollouts that read it."""

    brutes: list[BruteForce]

    @cached_property
    def numbers(self) -> dict[tuple[int, tuple[int, ...]], int]:
        prefixes = [(c, u) for c, b in enumerate(self.brutes) for u in b.soft_values() if u]
        return {prefix: i for i, prefix in enumerate(prefixes)}

    @cached_property
    def soft(self) -> Tensor:
        return self._values(lambda b: b.soft_values())

    @cached_property
    def mean(self) -> Tensor:
        return self._values(lambda b: b.mean_values(b.log_phi))

    def _values(self, of: Callable[[BruteForce], dict[tuple[int, ...], float]]) -> Tensor:
        tables = [of(b) for b in self.brutes]
        values = [tables[c][u] for c, u in self.numbers]
        return torch.tensor([v if v > -math.inf else NEVER for v in values], dtype=torch.float64)

    @cached_property
    def finite(self) -> Tensor:
        return self.soft > NEVER

    @cached_property
    def prior(self) -> dict[tuple[int, tuple[int, ...]], float]:
        """π0(x_≤t) of every prefix."""
        return {
            (c, u): p for c, b in enumerate(self.brutes) for u, (p, _) in b._masses(torch.zeros(len(b.log_phi))).items()
        }

    @cached_property
    def ahead(self) -> tuple[dict[tuple[int, tuple[int, ...]], int], Tensor, Tensor]:
        """The prefixes that go on: their number; the children of each, (P, V); and log π0(v|prefix), −inf for none."""
        parents = {p: i for i, p in enumerate({(c, u[:-1]) for c, u in self.numbers})}
        children: list[list[tuple[int, float]]] = [[] for _ in parents]
        for (c, u), i in self.numbers.items():
            parent = (c, u[:-1])
            children[parents[parent]].append((i, math.log(self.prior[c, u] / self.prior[parent])))
        width = max(map(len, children))
        padded = [row + [(0, -math.inf)] * (width - len(row)) for row in children]
        index = torch.tensor([[i for i, _ in row] for row in padded])
        return parents, index, torch.tensor([[p for _, p in row] for row in padded], dtype=torch.float64)

    @cached_property
    def rows(self) -> tuple[Tensor, Tensor, Rollouts]:
        """For all outcomes of positive probability: the value and the parent at each token, and all that is fixed."""
        rows = [
            (c, ids, float(p), float(f))
            for c, b in enumerate(self.brutes)
            for ids, p, f in zip(b.sequences.token_lists(), b.log_prior, b.log_phi, strict=True)
            if p > -math.inf
        ]
        width = max(len(ids) for _, ids, _, _ in rows)
        index, before = torch.zeros(2, len(rows), width, dtype=torch.int64)
        for i, (c, ids, _, _) in enumerate(rows):
            for t in range(len(ids)):
                index[i, t] = self.numbers[c, tuple(ids[: t + 1])]
                before[i, t] = self.ahead[0][c, tuple(ids[:t])]
        context = torch.tensor([r[0] for r in rows])
        log_prior, log_phi = (torch.tensor([r[k] for r in rows], dtype=torch.float64) for k in (2, 3))
        lengths = torch.tensor([len(r[1]) for r in rows])
        log_z = torch.stack([b.log_z for b in self.brutes])[context]
        nothing = torch.zeros(0)
        return index, before, Rollouts(nothing, log_phi, log_prior, log_prior + log_phi, log_z, lengths, context)

    def rollouts(self, psi: Tensor) -> Rollouts:
        """All outcomes of positive probability of all contexts, weighted by π0 and by γ."""
        index, before, fixed = self.rows
        _, children, ratios = self.ahead
        return replace(fixed, log_psi=psi[index], expect=lambda: torch.logsumexp(psi[children] + ratios, 1)[before])

    def gradient(self, loss: Callable[[Rollouts], Tensor], at: Tensor) -> Tensor:
        psi = at.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(self.rollouts(psi)), psi)
        return gradient

    def minimiser(self, loss: Callable[[Rollouts], Tensor], seed: int = 0) -> Tensor:
        """From a random start, by L-BFGS on values scaled by √π0(x_≤t), which evens out their curvature."""
        scale = torch.tensor([self.prior[p] for p in self.numbers], dtype=torch.float64).sqrt()
        generator = torch.Generator().manual_seed(seed)
        scaled = (scale * torch.randn(len(scale), dtype=torch.float64, generator=generator)).requires_grad_()
        optimizer = torch.optim.LBFGS(
            [scaled], lr=1.0, max_iter=400, tolerance_grad=1e-14, tolerance_change=0.0, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss(self.rollouts(scaled / scale))
            value.backward()
            return value

        optimizer.step(closure)
        return (scaled / scale).detach()


def table_of(kind: str, shape: str) -> Table:
    model = declared(kind, shape)
    return Table([brute_force(model, c) for c in range(model.prior.num_contexts)])


@dataclass(frozen=True)
class MeanValue(TwistLoss):
    """The mutant: squared error on log φ, whose minimiser is E_π0[log φ | x_≤t]."""

    name = "mean_value"

    def __call__(self, rollouts: Rollouts) -> Tensor:
        r = rollouts
        squares = (r.log_psi - r.log_phi[:, None]).masked_fill(~r.mask, 0.0).square().sum(1)
        return (r.log_prior_weight.exp() * squares).sum()


class ForgetsTheFinished(Contrastive):
    """The mutant: outcomes that ended before t are left out of π_t^ψ."""

    def __call__(self, rollouts: Rollouts) -> Tensor:
        return super().__call__(replace(rollouts, log_phi=torch.full_like(rollouts.log_phi, -math.inf)))


@pytest.mark.parametrize("loss", PROPER, ids=repr)
@pytest.mark.parametrize("shape", REWARDS)
@pytest.mark.parametrize("kind", ENUMERABLE)
def test_the_soft_value_is_stationary(kind: str, shape: str, loss: TwistLoss) -> None:
    table = table_of(kind, shape)
    assert table.gradient(loss, table.soft).abs().max() < 1e-10
    assert table.gradient(loss, table.soft + 0.1 * torch.sin(torch.arange(len(table.soft)))).abs().max() > 1e-4


@pytest.mark.parametrize("loss", [SoftValue(), Consistency(bootstrap=False), Contrastive()], ids=repr)
def test_the_minimiser_from_a_random_start_is_the_soft_value(loss: TwistLoss) -> None:
    table = table_of("llama", "wavy")
    found = table.minimiser(loss)
    if loss.free_scale:  # of each context and t; where nothing can have ended before, it stays where it was
        for c in range(2):
            for t in range(1, 4):
                at = [i for (d, u), i in table.numbers.items() if (d, len(u)) == (c, t)]
                gap = (found - table.soft)[at]
                assert (gap - gap[0]).abs().max() < 1e-4
                assert t == 1 or gap.abs().max() < 1e-4
    else:
        assert (found - table.soft).abs().max() < 1e-4


def test_temporal_differences_have_the_soft_value_as_fixed_point() -> None:
    table = table_of("llama", "wavy")
    ends = {(c, tuple(row)) for c, b in enumerate(table.brutes) for row in b.sequences.token_lists()}
    over = torch.tensor([prefix in ends for prefix in table.numbers])
    psi = torch.where(over, table.soft, 0.0)
    # The steps that a table allows: each prefix by its own curvature, which is its probability.
    weight = torch.tensor([table.prior[p] for p in table.numbers], dtype=torch.float64)
    for _ in range(40):
        psi = psi - 0.7 * table.gradient(Consistency(), psi) / weight
    assert (psi - table.soft).abs().max() < 1e-6


def test_squared_error_on_log_phi_learns_mean_values_instead() -> None:
    table = table_of("llama", "wavy")
    assert table.gradient(MeanValue(), table.mean).abs().max() < 1e-10
    assert table.gradient(MeanValue(), table.soft).abs().max() > 1e-2
    assert (table.mean - table.soft).abs().max() > 0.1
    for loss in PROPER:
        assert table.gradient(loss, table.mean).abs().max() > 1e-3


@pytest.mark.parametrize("shape", REWARDS)
@pytest.mark.parametrize("kind", ENUMERABLE)
def test_the_contrastive_gradient_is_that_of_the_divergences(kind: str, shape: str) -> None:
    """Of Σ_t KL(σ_t‖π_t^ψ), written out over prefixes."""
    table = table_of(kind, shape)
    at = torch.randn(len(table.soft), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    psi = at.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for c, b in enumerate(table.brutes):
        ids = b.sequences.token_lists()
        for t in range(1, max(map(len, ids)) + 1):
            posterior: dict[tuple[int, ...], float] = {}
            log_law: dict[tuple[int, ...], Tensor] = {}
            for row, log_p, log_phi, log_star in zip(ids, b.log_prior, b.log_phi, b.log_posterior, strict=True):
                if log_p == -math.inf:
                    continue
                prefix = tuple(row[:t])
                posterior[prefix] = posterior.get(prefix, 0.0) + math.exp(log_star)
                if len(row) < t:
                    log_law[(*prefix, -1)] = log_p + log_phi
                    posterior[(*prefix, -1)] = posterior.pop(prefix)
                else:
                    log_law[prefix] = math.log(table.prior[c, prefix]) + psi[table.numbers[c, prefix]]
            log_total = torch.logsumexp(torch.stack(list(log_law.values())), 0)
            for prefix, p in posterior.items():
                if p > 0:
                    total = total + p * (math.log(p) - (log_law[prefix] - log_total))
    (expected,) = torch.autograd.grad(total, psi)
    assert expected.abs().max() > 1e-3
    assert (table.gradient(Contrastive(), at) - expected).abs().max() < 1e-10


def test_leaving_out_the_finished_outcomes_is_another_target() -> None:
    table = table_of("llama", "wavy")
    assert table.gradient(ForgetsTheFinished(), table.soft).abs().max() > 1e-2
    scaled = table.soft + torch.tensor([float(len(u)) for _, u in table.numbers])  # another factor for each t
    assert table.gradient(Contrastive(), scaled).abs().max() > 1e-2


@pytest.mark.parametrize("shape", REWARDS)
def test_positives_that_stand_for_the_posterior_alone_do_the_same(shape: str) -> None:
    table = table_of("llama", shape)

    def apart(r: Rollouts) -> Rollouts:
        nothing = torch.full_like(r.log_phi, -math.inf)

        def twice(x: Tensor, y: Tensor) -> Tensor:
            return torch.cat([x, y])

        return Rollouts(
            twice(r.log_psi, r.log_psi), twice(r.log_phi, torch.zeros_like(r.log_phi)),
            twice(r.log_prior_weight, nothing), twice(nothing, r.log_posterior_weight), twice(r.log_z, r.log_z),
            twice(r.lengths, r.lengths), twice(r.context, r.context),
        )  # fmt: skip

    at = torch.randn(len(table.soft), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = table.gradient(Contrastive(), at)
    assert (table.gradient(lambda r: Contrastive()(apart(r)), at) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("loss", PROPER, ids=repr)
def test_a_batch_without_positives_or_without_mass_gives_no_nan(loss: TwistLoss) -> None:
    table = table_of("llama", "hard")
    psi = table.soft.clone().requires_grad_()
    r = table.rollouts(psi)
    dead = torch.full_like(r.log_phi, -math.inf)
    loss(replace(r, log_phi=dead, log_posterior_weight=dead)).backward()
    assert psi.grad is None or bool(torch.isfinite(psi.grad).all())


def test_losses_are_named() -> None:
    assert resolve_loss("ctl") == resolve_loss("contrastive") == Contrastive()
    assert resolve_loss(Consistency(bootstrap=False)) == Consistency(bootstrap=False)
    with pytest.raises(ModelError, match="loss: got 'mse', expected one of 'ctl'"):
        resolve_loss("mse")
    with pytest.raises(ModelError, match="needs the values of all next tokens"):
        Consistency()(replace(table_of("llama", "wavy").rollouts(torch.zeros(400, dtype=torch.float64)), expect=None))
