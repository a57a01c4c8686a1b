"""Whether a proposal q covers π*: q > 0 wherever γ > 0. Where it does not, E Ẑ < Z, and no weight shows it."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from lmppl.lm.base import LanguageModel
from lmppl.lm.derived import ReweighedLM, TemperedLM
from lmppl.lm.tabular import TabularLM
from lmppl.lm.transformers import TransformersLM
from lmppl.sequences import Estimate

__all__ = [
    "coverage_note",
    "may_not_cover",
    "positive_everywhere",
    "tell_coverage",
    "truncates",
    "with_coverage",
    "without_reach",
]

log = logging.getLogger(__name__)

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

    So does a declared truncation, and a `TabularLM` with a zero that the prior can reach, or with zeros that are too
    many to be compared; where the prior is no table,
    it is taken to be positive. What is made from the prior itself is cut where it cuts beyond the prior. Of other LMs
    nothing is known, and False does not prove that they cover.

    Parameters
    ----------
    lm : LanguageModel
        q, as `as_proposal` gives it.
    prior : LanguageModel
        π0.
    """
    return _shortcoming(lm, prior) != ""


def coverage_note(lm: LanguageModel, prior: LanguageModel) -> str:
    """What an estimate of log Z says about a proposal that may not cover; "" where nothing speaks against it."""
    why = _shortcoming(lm, prior)
    return f"the proposal {why}, so it may not cover π*: then E Ẑ < Z and no weight shows it" if why else ""


def without_reach(lm: LanguageModel, prior: LanguageModel) -> str:
    """What chains say about a proposal that may not cover; "" where nothing speaks against it."""
    why = _shortcoming(lm, prior)
    return (
        f"the proposal {why}, so it may not cover π*: chains can neither reach nor leave texts that it cannot write, "
        "however long they run, and no figure of chains shows it"
        if why
        else ""
    )


def with_coverage(estimates: tuple[Estimate, ...], note: str) -> tuple[Estimate, ...]:
    """Estimates of log Z from a proposal that may not cover, which `note` says: E Ẑ ≤ Z, a lower bound, is left."""
    if not note:
        return estimates
    return tuple(replace(e, kind="lower_bound", note=f"{e.note}; {note}" if e.note else note) for e in estimates)


def tell_coverage(who: str, note: str) -> None:
    """Warn of a proposal that may not cover, where `note` says that it is one."""
    if note:
        log.warning("%s: %s; propose from a law that is positive where the prior is, or from the prior", who, note)


def _shortcoming(lm: LanguageModel, prior: LanguageModel) -> str:
    """Why the proposal may not cover, after "the proposal"; "" where nothing is known against it."""
    if lm is prior:
        return ""
    if isinstance(lm, ReweighedLM):
        return _cut(lm) or _shortcoming(lm.base, prior)
    table = _table(lm)
    if truncates(lm):
        return "is truncated"
    missing = False if table is None else _misses(table, _table(prior))
    if missing is None:
        return "has zeros, which are too many to be compared with the prior's"
    return "gives probability 0 to tokens that the prior can make" if missing else ""


def _cut(lm: ReweighedLM) -> str:
    """As `_shortcoming`, of what the LM cuts beyond the LM that it is made from."""
    declared = [(getattr(lm, n, None), getattr(lm.base, n, None)) for n in ("top_k", "top_p")]
    beyond = any(own is not None and own != inherited for own, inherited in declared)
    return "is truncated" if beyond or (truncates(lm) and not truncates(lm.base)) else ""


def _table(lm: LanguageModel) -> TabularLM | None:
    """The table whose zeros are those of `lm`, if it is one."""
    while isinstance(lm, TemperedLM):
        lm = lm.base
    return lm if isinstance(lm, TabularLM) else None


def _misses(table: TabularLM, prior: TabularLM | None) -> bool | None:
    """Whether some prefix below the cap, possible under both, has a next token that the prior alone can make.

    None where there are more than `PAIRS_LIMIT` prefixes to tell apart.
    """
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
            return None
        seen, pairs = both, reached
    return False
