"""Exact answers in plain Python floats, from conditional tables alone.

No decoder, no target and no engine has a part in it. Paths multiply probabilities and sums are `math.fsum`, so that
answers are right to about 1e-15.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

__all__ = ["Outcome", "log_sum", "outcomes"]


class Outcome(NamedTuple):
    """One completion: its tokens (EOS included), whether it ended by EOS, its text, and log π0 in nats."""

    ids: tuple[int, ...]
    finished: bool
    text: str
    log_prior: float


def outcomes(
    conditional: Callable[[tuple[int, ...]], Sequence[float]],
    symbols: Sequence[str],
    *,
    eos: int | None,
    cap: int,
    context: tuple[int, ...] = (),
) -> list[Outcome]:
    """Every outcome of positive probability: paths through the tree of tokens that end at EOS or at the cap.

    Parameters
    ----------
    conditional : callable
        Context and completion so far → probabilities of the next token.
    symbols : sequence of str
        The text of each token; that of EOS is not part of a completion's text.
    eos : int or None
    cap : int
        T.
    context : tuple of int
        The tokens that stand before.
    """

    def grow(ids: tuple[int, ...], probability: float) -> Iterator[Outcome]:
        finished = bool(ids) and ids[-1] == eos
        if finished or len(ids) == cap:
            text = "".join(symbols[t] for t in ids if t != eos)
            yield Outcome(ids, finished, text, math.log(probability))
            return
        for token, p in enumerate(conditional((*context, *ids))):
            if p > 0:
                yield from grow((*ids, token), probability * p)

    return list(grow((), 1.0))


def log_sum(values: Sequence[float]) -> float:
    """Log Σ exp of values that may be −inf, summed without rounding error."""
    top = max(values, default=-math.inf)
    if top == -math.inf:
        return top
    return top + math.log(math.fsum(math.exp(v - top) for v in values))
