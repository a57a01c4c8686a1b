"""A language model taken as it is: its draws, whose weights only measure it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from lmppl.diagnostics import log_mean_weight, stack
from lmppl.errors import ModelError
from lmppl.inference.approximation import Particles
from lmppl.inference.engine import Engine, Guarantee, Part, Request, Shard
from lmppl.inference.importance import Importance
from lmppl.lm.base import LanguageModel
from lmppl.modeling.target import Target
from lmppl.sequences import concatenate

__all__ = ["AsIs"]


@dataclass(frozen=True)
class AsIs(Engine):
    """Draws of q with `log_weight` = log γ − log q, for comparison: a policy, or the prior.

    The law that its draws show is q, not π*. Unlike `Importance` it accepts that every draw has γ = 0, which is a
    finding about q; then there is no estimate of log Z.

    Parameters
    ----------
    policy : LanguageModel
        q, on the prior's outcomes.
    num_draws : int
        Draws per context, where `infer` is not told.
    """

    policy: LanguageModel | None = field(default=None, repr=False)
    num_draws: int = 1000

    name: ClassVar[str] = "as_is"
    guarantee: ClassVar[Guarantee] = Guarantee.HEURISTIC

    def plan(self, target: Target, request: Request) -> list[Shard]:
        if self.policy is None:
            raise ModelError("AsIs: got no policy, expected a language model")
        return self._sampler(target).plan(target, request)

    def run_shard(self, target: Target, shard: Shard, *, state: Any = None) -> Part:
        return self._sampler(target).run_shard(target, shard)

    def merge(self, parts: Sequence[Part]) -> Particles:
        draws = concatenate([part.draws for part in parts])
        log_w = draws.log_weight
        assert log_w is not None
        by_context = [log_w[draws.context == c].cpu() for c in range(draws.num_contexts)]
        alive = all(bool((w > -torch.inf).any()) for w in by_context)
        log_z = (stack([log_mean_weight(w) for w in by_context]),) if alive else ()
        return Particles(draws, log_z, self.guarantee)

    def _sampler(self, target: Target) -> Importance:
        proposal = None if self.policy is target.prior else self.policy
        return Importance(self.num_draws, proposal=proposal)
