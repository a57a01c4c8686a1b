"""Every outcome of a random procedure with its probability, by walking the tree of its choices.

The procedure takes a `Source` and is run again for each path through the tree: the first run takes the first branch of
every choice; each further run repeats the last one up to its last choice that has a branch left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from lmppl.lm.randomness import Breaks, Source

__all__ = ["EnumeratingSource", "every_outcome"]

R = TypeVar("R")

ROUNDING = 1e-9


class EnumeratingSource(Source):
    """A source that takes one given path through the tree of choices.

    Parameters
    ----------
    path : list of int
        The branch of each choice, in order; choices after the last one take their first branch.
    """

    walked: ClassVar[bool] = True

    def __init__(self, path: list[int]) -> None:
        super().__init__(torch.Generator())
        self.path = path
        self.taken: list[tuple[int, int]] = []
        self.log_probability = 0.0

    def choose(self, log_probabilities: Tensor) -> int:
        """An index of positive probability, (K,) of which sum to 1."""
        branches = torch.nonzero(log_probabilities > -math.inf).squeeze(1).tolist()
        total = float(log_probabilities.double().exp().sum())
        assert abs(total - 1.0) < ROUNDING, f"the branches of a choice have total probability {total}"
        number = len(self.taken)
        branch = self.path[number] if number < len(self.path) else 0
        self.taken.append((branch, len(branches)))
        index = int(branches[branch])
        self.log_probability += float(log_probabilities[index])
        return index

    def uniforms(self, count: int, breaks: Breaks | None = None) -> Tensor:
        """As `Source.uniforms`: the middle of one of the pieces on which the caller's result is constant."""
        assert breaks is not None, "a uniform number without breaks cannot be enumerated"
        points = list(breaks())
        assert len(points) == count, f"got breaks for {len(points)} uniform numbers, expected {count}"
        values = []
        for inner in points:
            inside = inner.double().cpu()
            inside = inside[(inside > ROUNDING) & (inside < 1 - ROUNDING)]
            edges = torch.cat([inside.new_zeros(1), torch.sort(inside).values, inside.new_ones(1)])
            widths = edges.diff()
            wide = widths > ROUNDING
            lengths = torch.where(wide, widths, 0.0)
            piece = self.choose((lengths / lengths.sum()).log())
            values.append((edges[piece] + edges[piece + 1]) / 2)
        return torch.stack(values) if values else torch.zeros(0, dtype=torch.float64)

    def tokens(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """As `Source.tokens`."""
        log_probs = torch.log_softmax(logits.double(), -1)
        chosen = torch.tensor([self.choose(row) for row in log_probs.cpu()], dtype=torch.int64, device=logits.device)
        return chosen, log_probs.gather(1, chosen[:, None])[:, 0].to(logits.dtype)

    def accept(self, log_probability: Tensor) -> Tensor:
        """As `Source.accept`."""
        answers = []
        for value in log_probability.double().cpu().exp().tolist():
            pair = torch.tensor([value, 1.0 - value], dtype=torch.float64).log()
            answers.append(self.choose(pair) == 0)
        return torch.tensor(answers, dtype=torch.bool, device=log_probability.device)

    def integers(self, high: Tensor) -> Tensor:
        """As `Source.integers`."""
        chosen = [self.choose(torch.full((n,), -math.log(n), dtype=torch.float64)) for n in high.tolist()]
        return torch.tensor(chosen, dtype=torch.int64, device=high.device)


def every_outcome(run: Callable[[Source], R], *, limit: int = 1_000_000) -> Iterator[tuple[float, R]]:
    """(probability, result) of each path through the choices that `run` makes; the probabilities sum to 1.

    Parameters
    ----------
    run : callable
        Takes a `Source` and makes all its random choices with it; otherwise deterministic.
    limit : int
        Paths, beyond which the walk fails: the model is too large to enumerate.

    Raises
    ------
    AssertionError
        Where there are more than `limit` paths, or a choice cannot be enumerated.
    """
    path: list[int] = []
    for _ in range(limit):
        source = EnumeratingSource(path)
        result = run(source)
        yield math.exp(source.log_probability), result
        taken = source.taken
        while taken and taken[-1][0] + 1 == taken[-1][1]:
            taken.pop()
        if not taken:
            return
        path = [branch for branch, _ in taken]
        path[-1] += 1
    raise AssertionError(f"every_outcome: more than {limit:,} paths; use a smaller model")
