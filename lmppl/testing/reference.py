"""A reference posterior: a small declaration whose normaliser, posterior and expectations are known exactly.

In the manner of posteriordb: a name, a version, the answers, and a check against recorded ones whenever it is built.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmppl.modeling.model import Model
from lmppl.sequences import Sequences
from lmppl.testing.brute_force import Outcome, log_sum

__all__ = ["STATISTICS", "Key", "ReferencePosterior", "enumerated"]

Key = tuple[bool, tuple[int, ...]]  # finished, tokens

STATISTICS: dict[str, Callable[[Sequences], Tensor]] = {
    "length": lambda rows: rows.lengths.double(),
    "finished": lambda rows: rows.finished.double(),
    "begins_with_a": lambda rows: (rows.ids[:, 0] == 0).double(),
}


@dataclass(frozen=True, eq=False)
class ReferencePosterior:
    """One declaration with its answers.

    Parameters
    ----------
    name, description, version : str
        The version changes whenever an answer does.
    model : Model
    log_normalizer : Tensor (C,)
        log Z(c), in nats, exact.
    posterior : tuple of dict, or None
        For each context: (finished, tokens) → π*(x|c) of every outcome with γ > 0. None where they are too many.
    expectations : dict of Tensor (C,)
        E_π*[h] of each h in `STATISTICS`.
    num_draws, num_proposals : int
        Enough for an exact sampler's test, and for a weighted one's.
    rare : bool
        Whether a run may honestly find no outcome at all with γ > 0.
    """

    name: str
    description: str
    version: str
    model: Model
    log_normalizer: Tensor
    posterior: tuple[dict[Key, float], ...] | None
    expectations: dict[str, Tensor]
    num_draws: int = 1200
    num_proposals: int = 3000
    rare: bool = False

    def checked(self, recorded: Sequence[float]) -> ReferencePosterior:
        """The reference itself, if its log Z is the recorded one."""
        wanted = torch.tensor(recorded, dtype=torch.float64)
        if not torch.allclose(self.log_normalizer, wanted, rtol=0.0, atol=1e-12):
            got = self.log_normalizer.tolist()
            raise AssertionError(f"reference {self.name!r}: log Z is {got}, recorded {wanted.tolist()}")
        return self


def enumerated(
    name: str,
    description: str,
    model: Model,
    tables: Sequence[Sequence[Outcome]],
    log_evidence: Callable[[Outcome, str], float],
    **options: Any,
) -> ReferencePosterior:
    """A reference whose answers are sums over all outcomes.

    Parameters
    ----------
    name, description : str
    model : Model
        The declaration.
    tables : sequence of sequence of Outcome
        The outcomes of π0 for each context, by `brute_force`.
    log_evidence : callable
        Outcome and context → Σ_k log φ_k, in nats, written apart from the model's factors.
    options
        Further fields of `ReferencePosterior`.
    """
    log_z: list[float] = []
    posterior: list[dict[Key, float]] = []
    sums: dict[str, list[float]] = {statistic: [] for statistic in STATISTICS}
    for table, context in zip(tables, model.prior.prompts, strict=True):
        log_gamma = [x.log_prior + log_evidence(x, context) for x in table]
        log_z.append(log_sum(log_gamma))
        weights = [math.exp(g - log_z[-1]) for g in log_gamma]
        posterior.append({(x.finished, x.ids): w for x, w in zip(table, weights, strict=True) if w > 0})
        by_name: dict[str, list[float]] = {
            "length": [len(x.ids) for x in table],
            "finished": [x.finished for x in table],
            "begins_with_a": [x.ids[0] == 0 for x in table],
        }
        for statistic, values in by_name.items():
            sums[statistic].append(math.fsum(w * v for w, v in zip(weights, values, strict=True)))
    exact = {statistic: torch.tensor(values, dtype=torch.float64) for statistic, values in sums.items()}
    log_normalizer = torch.tensor(log_z, dtype=torch.float64)
    return ReferencePosterior(name, description, "1", model, log_normalizer, tuple(posterior), exact, **options)
