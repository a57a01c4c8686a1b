"""Rounds of proposals: what holds for each engine that accepts some of what it proposes."""

from __future__ import annotations

import pytest

from lmppl.inference.quasi_rejection import QuasiRejection
from lmppl.inference.rejection import Rejection
from lmppl.modeling.evidence import Constraint, Reward
from lmppl.modeling.model import Model
from tests.inference.whole_runs import run_parts
from tests.models import enumerable_lm, has_no, wavy
from tests.quasi_rejection_cases import HARD

PRODUCT = (Reward(wavy, beta=0.6, upper=2.0, name="wavy"), Constraint(has_no("aa"), name="no aa"))


@pytest.mark.parametrize(
    ("engine", "factors"),
    [(Rejection(batch=7), PRODUCT), (QuasiRejection(bound=0.5, batch=14), HARD)],
    ids=["rejection", "quasi_rejection"],
)
def test_the_count_of_proposals_does_not_depend_on_how_shards_are_cut(engine, factors) -> None:
    """N ends with the k-th acceptance: the position of the last draw among all proposals of its context."""
    parts = run_parts(engine, Model(enumerable_lm("tabular"), factors), 20)
    result = engine.merge(parts)
    for c in (0, 1):
        last = result.draws.select(result.draws.context == c)
        shard, proposal = int(last.columns["shard"][-1]), int(last.columns["proposal"][-1])
        before = sum(p.shard.num_draws for p in parts if p.shard.id < shard and c in p.shard.contexts)
        assert int(result.info["proposals"][c]) == before + proposal + 1
    assert len({p.shard.contexts for p in parts}) == 2, "a context that is done is left out of later shards"
