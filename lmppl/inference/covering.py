"""Draws that cover every member of an ensemble: a mixture of p0 and of each member's posterior at some powers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lmppl.errors import ModelError
from lmppl.inference.approximation import Approximation, ExactTable, widening
from lmppl.modeling.evidence.cut_mixture import CutMixture
from lmppl.modeling.evidence.uncertain import JUDGED

__all__ = ["Covering", "Round"]

MIN_SIZE = 20.0  # effective draws of each member and of the prior, in each context
MIN_SHARE = 0.25  # of its effective draws that a member keeps from one power of its evidence to the next
MIN_STEP = 1e-3  # of a power
EXACT = 1e-9


@dataclass(frozen=True)
class Covering(CutMixture):
    """The proposal of a round: the mixture of p0 and of p0·e^{λ r_m/β} for each member and each power λ so far.

    log φ = log (1 + Σ_λ Σ_m exp(λ r_m/β − log Z_m(λ))) − log K, K the number of components, so that φ ≥ 1/K.

    Parameters
    ----------
    log_normalizers : C rows of J·M floats
        log Z_m(λ), the members of the first power first.
    powers : tuple of J floats
    """

    powers: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Rows may be empty, unlike those of a fitted mixture: the first round has no power yet."""

    def log_factor_of(self, judged: Tensor, context: Tensor | None) -> Tensor:
        """(B,) log φ."""
        assert self.log_normalizers is not None
        assert context is not None
        log_z, powers = (
            torch.tensor(value, dtype=torch.float64, device=judged.device)
            for value in (self.log_normalizers, self.powers)
        )
        away = (judged[:, None, :] * powers[None, :, None]).flatten(1) - log_z[context.long().to(judged.device)]
        components = torch.cat([judged.new_zeros(len(judged), 1), away], 1)
        return components.logsumexp(1) - math.log(components.shape[1])

    def upper(self, reward_upper: float, beta: float) -> float:
        """sup log φ of rewards that are at most `reward_upper`."""
        assert self.log_normalizers is not None
        ends = torch.zeros(len(self.log_normalizers), 1, dtype=torch.float64)
        if self.powers:
            log_z = torch.tensor(self.log_normalizers, dtype=torch.float64)
            tops = torch.tensor(self.powers, dtype=torch.float64) * (reward_upper / beta)
            ends = torch.cat([ends, tops.repeat_interleave(log_z.shape[1] // len(tops)) - log_z], 1)
        return float(ends.logsumexp(1).max()) - math.log(ends.shape[1]) + EXACT


class Round:
    """What the draws of one round say of p0·e^{λ r_m/β}, at any power λ.

    Parameters
    ----------
    found : Approximation
        Of p0·φ, φ the covering factor.
    name : str
        The factor.
    """

    def __init__(self, found: Approximation, name: str) -> None:
        assert found.model is not None
        draws = found.draws
        column = found.model.feature_names(found.model[name])[0]
        exponents = draws.features[column][:, JUDGED:].double().cpu()
        raw = torch.zeros(len(draws)) if draws.log_weight is None else draws.log_weight
        to_p0 = raw.double().cpu() - draws.log_factors[name].double().cpu()
        self.found, self.is_exact = found, isinstance(found, ExactTable) and found.enumerated
        self.rows = [draws.context.cpu() == c for c in range(draws.num_contexts)]
        self.base = [torch.log_softmax(to_p0[rows], 0) for rows in self.rows]  # weights of p0
        self.exponents = [exponents[rows] for rows in self.rows]  # r_m/β

    def log_z(self, power: float) -> Tensor:
        """(C, M) log Z_m(λ) = log E_p0[e^{λ r_m/β}]."""
        pairs = zip(self.base, self.exponents, strict=True)
        return torch.stack([(base[:, None] + power * e).logsumexp(0) for base, e in pairs])

    def sizes(self, power: float) -> Tensor:
        """(C, M) effective draws of each member; at λ = 0 those of p0."""
        return torch.stack([1.0 / shares.square().sum(0) for shares in self._shares(power)])

    def errors(self, power: float) -> Tensor:
        """(C, M) standard errors of log Z_m(λ), by the delta method."""
        result = torch.zeros_like(self.sizes(power))
        if self.is_exact:
            return result
        for c, shares in enumerate(self._shares(power)):
            wide = widening(self.found.clusters(self.rows[c]))
            influence = shares - self.base[c].exp()[:, None]
            for m in range(result.shape[1]):
                result[c, m] = self.found.error_of_mean(influence[:, m], self.rows[c]) * wide
        if bool(result.isnan().any()):
            raise ModelError(
                f"fit_cut_mixture: the draws of {self.found.engine} state no error, as those of a single sweep or "
                "chain do not; ask for more sweeps or chains"
            )
        return result

    def next_power(self, power: float) -> float:
        """The largest λ ≤ 1 at which each member still has enough effective draws."""
        needed = (MIN_SHARE * self.sizes(power)).clamp_min(MIN_SIZE)
        if self._covers(1.0, needed):
            return 1.0
        low, high = power, 1.0
        while high - low > MIN_STEP / 2:
            middle = (low + high) / 2
            low, high = (middle, high) if self._covers(middle, needed) else (low, middle)
        return low

    def _covers(self, power: float, needed: Tensor) -> bool:
        return bool((self.sizes(power) >= needed).all())

    def _shares(self, power: float) -> list[Tensor]:
        """(n, M) weights of each member, of sum one."""
        return [torch.softmax(base[:, None] + power * e, 0) for base, e in zip(self.base, self.exponents, strict=True)]
