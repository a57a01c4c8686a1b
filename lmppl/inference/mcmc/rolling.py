"""Chains that do not wait for each other: each begins its next step when its last one has ended.

A step of all chains at once takes as many forwards as its longest suffix has tokens. Chains are independent, and which
of them is at work depends on the past alone, so that each may go on by itself: the forwards are then as many as there
are tokens to write, over the chains. Every chain takes the same steps, by the same law.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lmppl.inference.mcmc.chains import ChainState, Proposal, StepInfo, Walked, metropolis_hastings
from lmppl.lm.randomness import Source
from lmppl.lm.shelf import Regenerated, Shelf
from lmppl.lm.writer import Writer
from lmppl.sequences import concatenate

__all__ = ["rolled"]

WAITING = 8  # one in so many chains has ended when they are accepted, and begin anew, together


def rolled(
    name: str,
    state: ChainState,
    shelf: Shelf,
    source: Source,
    num_steps: int,
    positions: Callable[[Tensor], Tensor],
    propose: Callable[[ChainState, Shelf, Tensor, Tensor, Regenerated], Proposal],
) -> Iterator[Walked]:
    """`num_steps` steps of every chain that write its suffix anew, one after another as all chains have taken them.

    Parameters
    ----------
    name : str
        Of the kernel.
    state : ChainState
        Consumed; its draws are those of the last step once all are taken.
    shelf : Shelf
        The rows under the LM that writes.
    source : Source
    num_steps : int
    positions : callable
        Draws the tokens to keep (M,) of rows of `lengths` (M,).
    propose : callable
        The proposal, from the rows (M,), the tokens kept (M,) and what was written after them.
    """
    count, device = len(state), shelf.slot.device
    pad_id = state.target.prior.pad_id
    every = torch.arange(count)
    taken = torch.zeros(count, dtype=torch.int64)
    keep = torch.zeros(count, dtype=torch.int64)
    batch = max(1, count // WAITING)
    writer = Writer(shelf, source)
    ready, emitted = every, 0
    waiting: list[tuple[Tensor, Tensor, Walked]] = []  # chains, steps, and where they led
    while emitted < num_steps:
        if len(ready):
            keep[ready] = positions(state.draws.lengths[ready])
            writer.begin(ready.to(device), keep[ready].to(device), state.draws.ids[ready].to(device))
        while writer.num_live and writer.num_done < batch:
            writer.advance()
        new = writer.collect()
        rows = new.pending.rows.cpu()
        proposal = propose(state, shelf, rows, keep[rows], new)
        state, info = metropolis_hastings(name, state, proposal, source)
        done = Walked(state.draws.select(rows), StepInfo(info.kernel, *(x[rows] for x in info[1:])))
        waiting.append((rows, taken[rows], done))
        taken[rows] += 1
        ready = rows[taken[rows] < num_steps]
        if int(taken.min()) > emitted:
            rows, steps, pool = _pooled(waiting, pad_id)
            for number in range(emitted, int(taken.min())):
                at = torch.nonzero(steps == number).squeeze(1)
                yield _picked(pool, at[torch.argsort(rows[at])])
            emitted = int(taken.min())
            rest = torch.nonzero(steps >= emitted).squeeze(1)
            waiting = [(rows[rest], steps[rest], _picked(pool, rest))]


def _pooled(waiting: list[tuple[Tensor, Tensor, Walked]], pad_id: int) -> tuple[Tensor, Tensor, Walked]:
    rows = torch.cat([chains for chains, _, _ in waiting])
    steps = torch.cat([taken for _, taken, _ in waiting])
    parts = [led for _, _, led in waiting]
    draws = concatenate([p.draws for p in parts], pad_id=pad_id)
    columns = (torch.cat(column) for column in zip(*(p.info[1:] for p in parts), strict=True))
    return rows, steps, Walked(draws, StepInfo(parts[0].info.kernel, *columns))


def _picked(pool: Walked, rows: Tensor) -> Walked:
    return Walked(pool.draws.select(rows), StepInfo(pool.info.kernel, *(x[rows] for x in pool.info[1:])))
