"""Rows that MCMC moves within a sweep: what is kept of them, how they are put back, how often moves are accepted."""

from __future__ import annotations

import torch
from torch import Tensor

from lmppl.inference.mcmc.chains import StepInfo
from lmppl.lm.base import LanguageModel
from lmppl.modeling.target import Target
from lmppl.sequences import Draws, concatenate

__all__ = ["MoveCount", "bare", "overwrite"]


def bare(target: Target, draws: Draws) -> Draws:
    """`draws` with float64 log π0, features and log-factors, computed where they are missing, and nothing else."""
    if draws.log_prior is None:
        draws = draws.with_columns(log_prior=target.log_prior(draws))
    if {f.name for f in target.factors} != set(draws.log_factors):
        draws = target.evaluate(draws)
    assert draws.log_prior is not None
    return draws.with_columns(log_weight=None, log_q=None, log_prior=draws.log_prior.double(), columns={}, meta={})


def overwrite(draws: Draws, rows: Tensor, new: Draws, prior: LanguageModel) -> Draws:
    """`draws` with `new` (M,) at `rows` (M,); both have the same columns."""
    index = torch.arange(len(draws))
    index[rows] = len(draws) + torch.arange(len(rows))
    return concatenate([draws, new], pad_id=prior.pad_id).select(index)


class MoveCount:
    """How many proposals kernels made and accepted in each of G groups."""

    def __init__(self, groups: int) -> None:
        self.accepted = torch.zeros(groups, dtype=torch.float64)
        self.proposed = torch.zeros(groups, dtype=torch.float64)

    def add(self, info: StepInfo, group: Tensor) -> None:
        """One step of rows that belong to `group` (M,); a row without a proposal counts for nothing."""
        asked = ~info.log_acceptance.isnan()
        self.accepted += torch.bincount(group[asked & info.accepted], minlength=len(self.accepted))
        self.proposed += torch.bincount(group[asked], minlength=len(self.proposed))

    @property
    def rate(self) -> Tensor:
        """(G,) the share accepted; nan where nothing was proposed."""
        return self.accepted / self.proposed
