"""Tempered SMC samplers along π0·φ^λ, λ from 0 to 1: whole rows, weighted, resampled and moved by MCMC."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from lmppl.diagnostics.normalizers import log_mean_sweeps, stack
from lmppl.errors import ModelError
from lmppl.inference.annealed import Annealed
from lmppl.inference.annealed_sweep import AnnealingSchedule
from lmppl.inference.annealing_ladder import check_ladder
from lmppl.inference.approximation import LEVEL
from lmppl.inference.engine import Guarantee
from lmppl.inference.mcmc import Kernel, Mixture
from lmppl.inference.resampling import RESAMPLING
from lmppl.modeling.target import Target
from lmppl.sequences import Estimate

__all__ = ["TemperedSMC"]


@dataclass(frozen=True)
class TemperedSMC(Annealed):
    """A tempered SMC sampler: as AIS along π0·φ^λ, and particles are resampled between the temperatures.

    Ẑ, the product of the temperatures' mean weights, is unbiased on a ladder that is fixed before the sweep, for
    every invariant kernel and every resampling scheme, triggered by ESS or not, waste-free or not. What adaptivity
    does to that:

    - `ladder="pilot"` (the default): one sweep, which is then thrown away, chooses the ladder; the sweeps that count
      use it as it stands, so that **Ẑ is unbiased**, given the ladder and hence at all.
    - `ladder="online"`: each sweep chooses its own λ's from its own particles. Ẑ and expectations are then
      **consistent as N grows but biased**, and no bound on log Z follows from them (`beskos2016`).

    Parameters
    ----------
    num_particles : int
        N per context and sweep.
    ladder : "pilot", "online" or tuple of float
        How the temperatures are chosen; a tuple is 0 = λ_0 < … < λ_K = 1. One ladder serves all contexts.
    ess_target : float
        In (0, 1): the next λ is the largest at which the conditional ESS of the living particles is this share of
        their number, in every context.
    ess_threshold : float
        Resample a context when ESS < `ess_threshold`·N: 1 at every temperature, 0 never, which is AIS.
    resampling : {"systematic", "stratified", "multinomial", "residual", "ssp"}
    kernel, num_moves
        As in `AIS`.
    chain_length : int
        P > 1 is the waste-free sampler: at each temperature N/P ancestors are resampled (systematically), and all P
        states of each one's chain of P − 1 moves are the new particles; `num_moves` is then 1 and nothing is thrown
        away. It pays with P well above 1 and N/P of at least some dozens.
    num_sweeps : int
        Independent sweeps where `infer` is not told a number of draws; their spread is the error.

    Raises
    ------
    InfeasibleModel
        Where all particles of a context died in every sweep: at which temperature, which factor did it, and what
        follows about Z.

    Notes
    -----
    `log_normalizer`: log of the mean of Ẑ over sweeps, by the delta method with Student's t. `info` is that of `AIS`;
    with `ladder="online"` `ladders` has that of each sweep, and histories are means over the sweeps that went as far.
    `distinct_ancestors` (C,): initial particles, of all sweeps, from which draws with positive weight descend.
    Columns: `sweep`, `shard`, `parent`.

    References
    ----------
    delmoral2006, zhou2016, beskos2016, dau2022
    """

    num_particles: int = 64
    ladder: str | tuple[float, ...] = field(default="pilot", kw_only=True)
    ess_target: float = field(default=0.5, kw_only=True)
    ess_threshold: float = field(default=1.0, kw_only=True)
    resampling: str = field(default="systematic", kw_only=True)
    kernel: Kernel | tuple[Kernel, ...] = field(default=Mixture(), repr=False, kw_only=True)
    num_moves: int = field(default=1, kw_only=True)
    chain_length: int = field(default=1, kw_only=True)
    num_sweeps: int = field(default=8, kw_only=True)

    name: ClassVar[str] = "tempered_smc"
    guarantee: ClassVar[Guarantee] = Guarantee.CONSISTENT
    references: ClassVar[tuple[str, ...]] = ("delmoral2006", "zhou2016", "beskos2016", "dau2022")

    def check(self, target: Target) -> None:
        """As `Annealed.check`."""
        super().check(target)
        if not isinstance(self.ladder, str):
            check_ladder("TemperedSMC", self.ladder)
        elif self.ladder not in ("pilot", "online"):
            raise ModelError(
                f"TemperedSMC: got ladder={self.ladder!r}, expected 'pilot', 'online' or a tuple of numbers"
            )
        if not 0.0 < self.ess_target < 1.0:
            raise ModelError(f"TemperedSMC: got ess_target={self.ess_target}, expected a share in (0, 1)")
        if not 0.0 <= self.ess_threshold <= 1.0:
            raise ModelError(f"TemperedSMC: got ess_threshold={self.ess_threshold}, expected a share of N in [0, 1]")
        if self.resampling not in RESAMPLING:
            raise ModelError(
                f"TemperedSMC: no resampling is called {self.resampling!r}; there are {', '.join(RESAMPLING)}"
            )
        if self.chain_length < 1 or self.num_particles % self.chain_length:
            raise ModelError(
                f"TemperedSMC: got chain_length={self.chain_length}, expected a divisor of num_particles="
                f"{self.num_particles}"
            )
        if self.chain_length > 1 and (self.num_moves, self.resampling, self.ess_threshold) != (1, "systematic", 1.0):
            raise ModelError(
                "TemperedSMC: waste-free sweeps (chain_length > 1) resample systematically at every temperature and "
                "keep every move: leave num_moves, resampling and ess_threshold as they are"
            )

    def fixed_ladder(self) -> tuple[float, ...] | None:
        """λ_0..λ_K; () online, None from a pilot."""
        if isinstance(self.ladder, str):
            return None if self.ladder == "pilot" else ()
        return self.ladder

    def schedule(self, ladder: tuple[float, ...]) -> AnnealingSchedule:
        """With resampling."""
        return AnnealingSchedule(
            self.num_particles,
            ladder,
            self.ess_target,
            self.moves,
            self.ess_threshold,
            self.resampling,
            self.chain_length,
        )

    def estimate(self, weights: Sequence[Tensor], log_z: Tensor) -> Estimate:
        """From the spread of the sweeps, which are independent of each other."""
        estimate = stack([log_mean_sweeps(z, LEVEL) for z in log_z])
        if self.ladder == "online":
            note = (
                f"{estimate.note}; each sweep chose its ladder from its own particles, so Ẑ is consistent, not unbiased"
            )
            return replace(estimate, kind="consistent", note=note)
        return estimate
