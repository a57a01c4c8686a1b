"""Annealed importance sampling along π0·φ^λ, λ from 0 to 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from lmppl.diagnostics.normalizers import log_mean_weight, stack
from lmppl.errors import ModelError
from lmppl.inference.annealed import Annealed
from lmppl.inference.annealed_sweep import AnnealingSchedule
from lmppl.inference.annealing_ladder import check_ladder
from lmppl.inference.approximation import LEVEL
from lmppl.inference.engine import Guarantee, Part, Shard
from lmppl.inference.mcmc import Kernel, Mixture
from lmppl.lm.randomness import Source
from lmppl.modeling.target import Target
from lmppl.sequences import Estimate

__all__ = ["AIS"]


@dataclass(frozen=True)
class AIS(Annealed):
    """Annealed importance sampling: draws of π0, moved by MCMC along π0·φ^λ, and weighted on the way.

    x_0 ~ π0; x_k comes from x_{k−1} by the kernels at λ_k, which leave π0·φ^{λ_k} invariant. With the weight

        W = ∏_{k=1..K} φ(x_{k−1})^{λ_k − λ_{k−1}},   E[W] = Z   and   E[W f(x_{K−1})] = Z E_π*[f],

    for any ladder and any invariant kernels, mixing or not; the better they mix, the less W varies. Particles are
    independent, as in importance sampling, and so are the errors.

    A row with φ = 0 has weight zero from the first step on, and is moved no more: a hard constraint is in force as
    soon as λ > 0, so AIS helps rewards, and does nothing for a rare constraint (`Splitting` does).

    Parameters
    ----------
    num_particles : int
        N per context and sweep: the batch that moves together.
    num_temperatures : int
        K, where no ladder is given: λ_k = (k/K)², with the shortest steps where weights change most.
    ladder : tuple of float, optional
        0 = λ_0 < … < λ_K = 1.
    kernel : Kernel or tuple of Kernel
        Of `lmppl.inference.mcmc`. A tuple is one kernel after the other, which is invariant but not reversible though
        each of them is; reverse runs take them in the opposite order.
    num_moves : int
        How often, at each temperature.
    num_sweeps : int
        Sweeps where `infer` is not told a number of draws; of n draws it makes ⌈n/N⌉ sweeps.

    Raises
    ------
    InfeasibleModel
        Where all particles of a context have weight zero: which factor did it, and what follows about Z.

    Notes
    -----
    `log_normalizer`: log of the mean weight, by the delta method. `info`: `ladder` (K+1,); `acceptance` (K−1, C), the
    share of proposals accepted at each temperature; `ess_history` (K, C), mean ESS of a sweep after each reweighting;
    `ess`, `khat`, `zero_sweeps` (C,); `log_z_sweeps` (C, S); `distinct_ancestors` (C,). Columns: `shard`, `parent`.

    References
    ----------
    neal2001
    """

    num_particles: int = 512
    num_temperatures: int = 8
    ladder: tuple[float, ...] | None = field(default=None, kw_only=True)
    kernel: Kernel | tuple[Kernel, ...] = field(default=Mixture(), repr=False, kw_only=True)
    num_moves: int = field(default=1, kw_only=True)
    num_sweeps: int = field(default=2, kw_only=True)

    name: ClassVar[str] = "ais"
    guarantee: ClassVar[Guarantee] = Guarantee.CONSISTENT
    references: ClassVar[tuple[str, ...]] = ("neal2001",)

    def check(self, target: Target) -> None:
        """As `Annealed.check`."""
        super().check(target)
        if self.ladder is None and self.num_temperatures < 1:
            raise ModelError(f"AIS: got num_temperatures={self.num_temperatures}, expected at least 1")
        check_ladder("AIS", self.fixed_ladder())

    def fixed_ladder(self) -> tuple[float, ...]:
        """λ_0..λ_K."""
        if self.ladder is not None:
            return self.ladder
        return tuple((k / self.num_temperatures) ** 2 for k in range(self.num_temperatures + 1))

    def schedule(self, ladder: tuple[float, ...]) -> AnnealingSchedule:
        """Without resampling."""
        return AnnealingSchedule(self.num_particles, ladder, 0.5, self.moves)

    def simulate(self, target: Target, shard: Shard, source: Source, *, state: Any = None) -> Part:
        """As `Annealed.simulate`; particles are independent, so that no column `sweep` ties them together."""
        part = super().simulate(target, shard, source)
        columns = {name: column for name, column in part.draws.columns.items() if name != "sweep"}
        return replace(part, draws=part.draws.with_columns(columns=columns))

    def estimate(self, weights: Sequence[Tensor], log_z: Tensor) -> Estimate:
        """From all weights: particles are independent."""
        return stack([log_mean_weight(w, LEVEL) for w in weights])
