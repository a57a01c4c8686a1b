"""ParticleGibbs: iterated conditional SMC as a kernel, a whole new row from particles that know the present one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lmppl.errors import InfeasibleModel, ModelError
from lmppl.inference.conditional_smc import particle_gibbs_step
from lmppl.inference.coverage import without_reach
from lmppl.inference.mcmc.chains import ChainState, Evidence, Kernel, StepInfo, replaced
from lmppl.inference.smc import SMC
from lmppl.inference.step_proposals import LanguageModelProposal
from lmppl.lm.randomness import Source
from lmppl.modeling.target import Target, log_evidence

__all__ = ["ParticleGibbs"]


@dataclass(frozen=True)
class ParticleGibbs(Kernel):
    """Each chain runs a sweep of SMC in which its row survives, and takes one of the particles by weight.

    Leaves π* invariant for every number of particles, twist and resampling scheme. All chains' particles are one
    batch; their caches do not outlive the step.

    Parameters
    ----------
    smc : SMC
        Particles of each chain, twist, proposal, resampling; by default 16 particles.

    References
    ----------
    andrieu2010, chopin2015
    """

    smc: SMC = field(default=SMC(num_particles=16))

    name: ClassVar[str] = "particle_gibbs"
    references: ClassVar[tuple[str, ...]] = ("andrieu2010", "chopin2015")

    def check(self, target: Target) -> None:
        """As `Kernel.check`."""
        if target.form.stochastic:
            raise ModelError(
                f"ParticleGibbs: factor {target.form.stochastic[0]!r} is declared stochastic=True, and the sweep would "
                "estimate the present row anew; use Restart or SuffixResample, which keep its estimate"
            )
        if not isinstance(self.smc, SMC):
            raise ModelError(f"ParticleGibbs: got smc={self.smc!r}, expected an SMC(...), an instance")
        if self.smc.num_particles < 2:
            raise ModelError(
                f"ParticleGibbs: got SMC(num_particles={self.smc.num_particles}), expected at least 2: one of them is "
                "the present row, and alone it would never move"
            )
        self.smc.check(target)

    def coverage(self, target: Target) -> str:
        """As `Kernel.coverage`: of the particles' proposal."""
        proposal = self.smc.step_proposal(target)
        return without_reach(proposal.lm, target.prior) if isinstance(proposal, LanguageModelProposal) else ""

    def step(
        self, state: ChainState, source: Source, power: float | Tensor = 1.0, *, evidence: Evidence = log_evidence
    ) -> tuple[ChainState, StepInfo]:
        """As `Kernel.step`, for the target π* only: `power` 1 and the factors' own evidence.

        Raises
        ------
        ModelError
            For another power or evidence: the sweep is one of the target as it is declared.
        InfeasibleModel
            Where the twist is 0 before the first token.
        """
        if evidence is not log_evidence or isinstance(power, Tensor) or power != 1.0:
            raise ModelError(
                "ParticleGibbs steps at power 1 with the declared evidence only; tempering and splitting need another "
                "kernel, such as SuffixResample"
            )
        old = state.draws
        try:
            new = particle_gibbs_step(state.target, self.smc, old, source)
        except InfeasibleModel as error:
            raise InfeasibleModel(f"mcmc, kernel ParticleGibbs: {str(error).removeprefix('smc: ')}") from error
        assert new.log_prior is not None
        new = new.with_columns(log_prior=new.log_prior.double(), log_q=None, columns={}, meta={})
        same = (new.ids == old.ids).cumprod(1).sum(1)
        moved = (same < old.ids.shape[1]) | (new.lengths != old.lengths) | (new.finished != old.finished)
        rows = torch.nonzero(moved).squeeze(1)
        count = len(old)
        none = torch.full((count,), torch.nan, dtype=torch.float64)
        info = StepInfo(self.name, moved, none, torch.zeros(count, dtype=torch.int64), none)
        keep = torch.minimum(same, torch.minimum(old.lengths, new.lengths))
        return replaced(state, new.select(rows), rows, torch.arange(len(rows)), keep[rows]), info
