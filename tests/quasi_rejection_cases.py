"""Models and proposals for the tests of quasi-rejection, its arithmetic and its engine."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lmppl.modeling.evidence import Constraint, Reward
from lmppl.modeling.model import Model
from tests.models import BruteForce, enumerable_lm, has_no, wavy

__all__ = ["HARD", "SOFT", "model_of", "weights_of"]

SOFT = (Reward(wavy, beta=0.5, name="wavy"),)
HARD = (Reward(wavy, beta=0.5, name="wavy"), Constraint(has_no("b"), name="no b"))


def model_of(kind: str, factors: tuple = SOFT) -> Model:
    return Model(enumerable_lm(kind), factors)


def weights_of(kind: str, table: BruteForce, other: bool) -> tuple[Tensor, Tensor]:
    """log q (S,) and log γ − log q (S,) of every outcome, for the prior or for another LM as the proposal."""
    log_q = enumerable_lm(kind, seed=3).score(table.sequences) if other else table.log_prior
    possible = log_q > -math.inf
    log_w = torch.full_like(log_q, -math.inf)
    log_w[possible] = table.log_gamma[possible] - log_q[possible]
    return log_q, log_w
