"""Whether a proposal q covers π*: q > 0 wherever γ > 0. Where it does not, E Ẑ < Z, and no weight shows it."""

from __future__ import annotations

import torch

from lmppl.lm.base import LanguageModel
from lmppl.lm.derived import TemperedLM
from lmppl.lm.tabular import TabularLM
from lmppl.lm.transformers import TransformersLM

__all__ = ["coverage_note", "may_not_cover", "positive_everywhere", "truncates"]

PAIRS_LIMIT = 10_000_000  # pairs of states times V, that two tables are compared on


def truncates(lm: LanguageModel) -> bool:
    """Whether the LM says that it gives probability zero to tokens on purpose."""
    declared = [getattr(lm, name, None) for name in ("top_k", "top_p")]
    return bool(getattr(lm, "truncated", False)) or any(value is not None for value in declared)


def positive_everywhere(lm: LanguageModel) -> bool:
    """Whether every token has positive probability after every prefix, as far as the LM's kind tells."""
    table = _table(lm)
    if table is not None:
        return bool((table.log_table > -torch.inf).all())
    return isinstance(lm, TransformersLM) and not truncates(lm)


def may_not_cover(lm: LanguageModel, prior: LanguageModel) -> bool:
    """Whether the proposal is known to give probability zero where the prior does not, or to do so on purpose.

    So does a declared truncation, and a `TabularLM` with a zero that the prior can reach; where the prior is no table,
    it is taken to be positive. Of other LMs nothing is known, and False does not prove that they cover.

    Parameters
    ----------
    lm : LanguageModel
        q, as `as_proposal` gives it.
    prior : LanguageModel
        π0.
    """
    table = _table(lm)
    return truncates(lm) or (table is not None and lm is not prior and _misses(table, _table(prior)))


def coverage_note(lm: LanguageModel, prior: LanguageModel) -> str:
    """What an estimate of log Z says about a proposal that may not cover; "" where nothing speaks against it."""
    if not may_not_cover(lm, prior):
        return ""
    why = "is truncated" if truncates(lm) else "gives probability 0 to tokens that the prior can make"
    return f"the proposal {why}, so it may not cover π*: then E Ẑ < Z and no weight shows it"


def _table(lm: LanguageModel) -> TabularLM | None:
    """The table whose zeros are those of `lm`, if it is one."""
    while isinstance(lm, TemperedLM):
        lm = lm.base
    return lm if isinstance(lm, TabularLM) else None


def _misses(table: TabularLM, prior: TabularLM | None) -> bool:
    """Whether some prefix below the cap, possible under both, has a next token that the prior alone can make."""
    possible = table.log_table > -torch.inf
    if bool(possible.all()):
        return False
    of_prior = torch.ones_like(possible[:1]) if prior is None else prior.log_table > -torch.inf
    onwards = torch.zeros(1, table.vocab_size, dtype=torch.int64) if prior is None else prior.next_state
    start = torch.zeros_like(table.initial) if prior is None else prior.initial
    goes_on = torch.ones(table.vocab_size, dtype=torch.bool)
    goes_on[list(table.eos_ids)] = False
    pairs = torch.stack([table.initial, start], 1).unique(dim=0)
    seen = pairs
    for _ in range(table.max_new_tokens):
        own, other = possible[pairs[:, 0]], of_prior[pairs[:, 1]]
        if bool((other & ~own).any()):
            return True
        row, token = torch.nonzero(other & goes_on, as_tuple=True)
        reached = torch.stack([table.next_state[pairs[row, 0], token], onwards[pairs[row, 1], token]], 1).unique(dim=0)
        both = torch.cat([seen, reached]).unique(dim=0)
        if len(both) == len(seen):
            return False
        if len(both) * table.vocab_size > PAIRS_LIMIT:
            return True
        seen, pairs = both, reached
    return False
