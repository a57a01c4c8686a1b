"""Parallel tempering: replicas of each chain at powers of the evidence between none and all, which swap rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmppl.errors import ModelError
from lmppl.inference.annealing_ladder import check_ladder
from lmppl.inference.approximation import Chains
from lmppl.inference.engine import Engine, Part
from lmppl.inference.mcmc.chains import ChainState, Kernel, StepInfo, Walked, tempered
from lmppl.inference.mcmc.engine import MCMC
from lmppl.lm.randomness import Source
from lmppl.modeling.target import Target, TargetForm, log_evidence

ADAPT = 10  # steps of the warm-up between two looks at the swap rates

__all__ = ["Tempered", "adapted_ladder", "log_swap_acceptance", "swap"]


def log_swap_acceptance(power_i: Tensor, power_j: Tensor, log_phi_i: Tensor, log_phi_j: Tensor) -> Tensor:
    """log min(1, exp((λ_i − λ_j)(log φ(x_j) − log φ(x_i)))), in nats, on the path π0·φ^λ; 0·(−inf) = 0.

    Exchanging the rows of two powers leaves the product of their laws invariant: the ratio is
    φ(x_j)^λ_i φ(x_i)^λ_j / φ(x_i)^λ_i φ(x_j)^λ_j.
    """
    after = tempered(log_phi_j, power_i) + tempered(log_phi_i, power_j)
    before = tempered(log_phi_i, power_i) + tempered(log_phi_j, power_j)
    return torch.where(after == -torch.inf, -torch.inf, (after - before).clamp_max(0.0))


def swap(
    kernel: Kernel, state: ChainState, powers: Tensor, pairs: Tensor, source: Source
) -> tuple[ChainState, Tensor, Tensor]:
    """Try to exchange the rows of `pairs` (P, 2) of chains, at `powers` (B,).

    Returns
    -------
    state : ChainState
    chance : Tensor (P,)
        log-probability of each exchange.
    done : Tensor (P,), bool
    """
    log_phi = log_evidence(state.draws)
    i, j = pairs.unbind(1)
    chance = log_swap_acceptance(powers[i], powers[j], log_phi[i], log_phi[j])
    done = source.accept(chance)
    index = torch.arange(len(state))
    index[i[done]], index[j[done]] = j[done], i[done]
    return (kernel.select(state, index) if bool(done.any()) else state), chance, done


def adapted_ladder(ladder: Sequence[float], rates: Sequence[float]) -> tuple[float, ...]:
    """A ladder of as many powers at which neighbours swap more evenly, from the `rates` at which they did.

    The distance between neighbours is taken as −log rate (at most that of one swap in a hundred, and at least that of
    99), and the powers are
    put at equal distances along it, straight within each gap.
    """
    gaps = torch.tensor([-math.log(min(max(rate, 0.01), 0.99)) for rate in rates], dtype=torch.float64)
    along = torch.cat([gaps.new_zeros(1), gaps.cumsum(0)])
    powers = torch.tensor(ladder, dtype=torch.float64)
    wanted = torch.linspace(0.0, 1.0, len(ladder), dtype=torch.float64)[1:-1] * along[-1]
    gap = torch.searchsorted(along, wanted, right=True) - 1
    share = (wanted - along[gap]) / (along[gap + 1] - along[gap])
    inner = powers[gap] + share * (powers[gap + 1] - powers[gap])
    return (float(ladder[0]), *inner.tolist(), float(ladder[-1]))


@dataclass(frozen=True)
class Tempered(MCMC):
    """Parallel tempering: every chain has replicas on the path π0·φ^λ, λ from 0 to 1, that swap rows with neighbours.

    At λ = 0 rows are draws of the prior; what they find wanders to λ = 1, the only power whose rows are kept. All
    replicas of all chains are one batch. The ladder is adapted while the chains warm up, towards equal swap rates, and
    then frozen: an adapting chain has no invariant law.

    Parameters
    ----------
    num_chains : int
        Chains per context, each of `num_temperatures` replicas.
    num_temperatures : int
        Powers, 0 and 1 included.
    ladder : tuple of float, optional
        The powers instead, ascending from 0 to 1, never adapted.
    swap_every : int
        Steps between attempts, even pairs and odd pairs in turn.

    Raises
    ------
    UnsupportedModel
        For stochastic factors: a power of an unbiased estimate is a biased one.

    Notes
    -----
    `info` as in `MCMC`, of the rows at λ = 1; `ladder` and `swap_rates`, between neighbours, after warm-up. No
    `certificate`: its bound is that of a chain that swaps with no other.

    References
    ----------
    swendsen1986, geyer1991, hastings1970, vehtari2021
    """

    num_chains: int = 32
    num_temperatures: int = 5
    ladder: tuple[float, ...] | None = field(default=None, kw_only=True)
    swap_every: int = field(default=1, kw_only=True)

    name: ClassVar[str] = "tempered"
    references: ClassVar[tuple[str, ...]] = ("swendsen1986", "geyer1991", "hastings1970", "vehtari2021")

    def unsupported_reason(self, form: TargetForm) -> str | None:
        """As `Engine.unsupported_reason`: factors must be exact."""
        return Engine.unsupported_reason(self, form)

    @property
    def powers(self) -> tuple[float, ...]:
        """The ladder before it is adapted: 0, then from 2^−(K−2) on each twice the one before."""
        if self.ladder is not None:
            return self.ladder
        return (0.0, *(2.0 ** (k + 2 - self.num_temperatures) for k in range(self.num_temperatures - 1)))

    def _check(self, target: Target) -> None:
        super()._check(target)
        if self.ladder is None and self.num_temperatures < 2:
            raise ModelError(f"Tempered: got num_temperatures={self.num_temperatures}, expected at least 2")
        check_ladder("Tempered", self.powers)
        if self.swap_every < 1:
            raise ModelError(f"Tempered: got swap_every={self.swap_every}, expected at least 1")

    def merge(self, parts: Sequence[Part]) -> Chains:
        result = super().merge(parts)
        memory = parts[-1].info["state"]
        tried, done = memory["swaps"]
        result.info["ladder"] = tuple(memory["ladder"].tolist())
        result.info["swap_rates"] = done / tried
        return result

    @property
    def _replicas(self) -> int:
        return len(self.powers)

    def _begin(self, state: Mapping[str, Any] | None) -> dict[str, Any]:
        if state is not None:
            return {"ladder": state["ladder"], "swaps": state["swaps"].clone(), "round": int(state["round"])}
        ladder = torch.tensor(self.powers, dtype=torch.float64)
        return {"ladder": ladder, "swaps": torch.zeros(2, len(ladder) - 1, dtype=torch.float64), "round": 0}

    def _powers(self, memory: Mapping[str, Any], count: int) -> Tensor:
        ladder: Tensor = memory["ladder"]
        return ladder.repeat(count // len(ladder))

    def _walk(
        self, chains: ChainState, source: Source, memory: dict[str, Any], warmup: int, total: int
    ) -> Iterator[Walked]:
        for number in range(total):
            chains, info = self._advance(chains, source, memory, number < warmup)
            yield Walked(chains.draws, info)

    def _advance(
        self, chains: ChainState, source: Source, memory: dict[str, Any], warming: bool
    ) -> tuple[ChainState, StepInfo]:
        """One step of all replicas, and their swaps."""
        count = len(chains)
        powers, size = self._powers(memory, count), self._replicas
        chains, info = self.kernel.step(chains, source, powers)
        number = memory["round"] = memory["round"] + 1
        if number % self.swap_every == 0:
            lower = torch.arange(number // self.swap_every % 2 if size > 2 else 0, size - 1, 2)
            first = torch.arange(0, count, size)[:, None]
            i = (first + lower).flatten()
            chains, chance, _ = swap(self.kernel, chains, powers, torch.stack([i, i + 1], 1), source)
            memory["swaps"][0, lower] += len(first)
            memory["swaps"][1, lower] += chance.exp().view(len(first), -1).sum(0)
        if warming and number % ADAPT == 0 and self.ladder is None:
            self._adapt(memory)
        if warming and number == self.warmup:
            memory["swaps"] = torch.zeros_like(memory["swaps"])
        return chains, info

    def _adapt(self, memory: dict[str, Any]) -> None:
        tried, done = memory["swaps"]
        if bool((tried > 0).all()):
            ladder = adapted_ladder(memory["ladder"].tolist(), (done / tried).tolist())
            memory["ladder"] = torch.tensor(ladder, dtype=torch.float64)
            memory["swaps"] = torch.zeros_like(memory["swaps"])
