"""Genealogies of particles: who descends from whom, and how many ancestors are left.

Resampling makes particles share ancestors. Where all particles of a sweep descend from one, the sweep holds one opinion
about its beginning, whatever its weights say.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ancestor_paths", "distinct_ancestors"]


def ancestor_paths(ancestors: Tensor) -> Tensor:
    """(R, G, N) int64: the slot that each final particle's ancestor had before round r's resampling.

    Parameters
    ----------
    ancestors : Tensor (R, G, N)
        One sweep's `info["ancestors"]`: for each round the slot of the ancestor of each particle.
    """
    paths = torch.empty(ancestors.shape, dtype=torch.int64)
    at = torch.arange(ancestors.shape[2]).expand(ancestors.shape[1:])
    for r in range(len(ancestors) - 1, -1, -1):
        at = ancestors[r].long().gather(1, at)
        paths[r] = at
    return paths


def distinct_ancestors(ancestors: Tensor) -> Tensor:
    """(R, G) int64: how many particles of each round have descendants among the final ones, between 1 and N.

    Never falls with r; entry 0 is the number of first tokens' particles that are left.
    """
    ordered = torch.sort(ancestor_paths(ancestors), -1).values
    return 1 + (ordered.diff(dim=-1) > 0).sum(-1)
