"""Preference pairs with a known head: texts are numbered, features are a table, choices follow Davidson's model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import lmppl
from lmppl.modeling.evidence.preference.heads import HeadProblem
from lmppl.modeling.evidence.preference.likelihood import log_outcomes


def f64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class World:
    """Texts "0", "1", ...; r = wᵀf of the table's rows; annotator j has w + δ_j."""

    table: Tensor
    weights: Tensor
    deviations: Tensor | None = None
    eta: float | None = None
    noise: float = 0.0

    def features(self, texts: list[str]) -> Tensor:
        return self.table[[int(t) for t in texts]]

    def pairs(self, count: int, seed: int) -> list[lmppl.Preference]:
        """Choices between texts drawn at random."""
        generator = torch.Generator().manual_seed(seed)
        first = torch.randint(len(self.table), (count,), generator=generator)
        step = torch.randint(1, len(self.table), (count,), generator=generator)
        second = (first + step) % len(self.table)
        num = 1 if self.deviations is None else len(self.deviations)
        annotator = torch.randint(num, (count,), generator=generator)
        head = self.weights if self.deviations is None else self.weights + self.deviations[annotator]
        u = ((self.table[first] - self.table[second]) * head).sum(1)
        p = log_outcomes(u, None if self.eta is None else f64(self.eta), self.noise).exp()
        said = torch.multinomial(p, 1, generator=generator)[:, 0].tolist()
        made = []
        for a, b, j, y in zip(first.tolist(), second.tolist(), annotator.tolist(), said, strict=True):
            name = None if self.deviations is None else f"person {j}"
            chosen, rejected = (b, a) if y == 1 else (a, b)
            made.append(lmppl.Preference(str(chosen), str(rejected), annotator=name, tie=y == 2))
        return made


def world(dim: int, seed: int = 0, num_texts: int = 40, weight_scale: float = 0.5, **options: Any) -> World:
    """Features N(0, I), w ~ N(0, `weight_scale`² I); `annotators` is their number and τ."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(num_texts, dim, dtype=torch.float64, generator=generator)
    weights = weight_scale * torch.randn(dim, dtype=torch.float64, generator=generator)
    if "annotators" in options:
        num, scale = options.pop("annotators")
        options["deviations"] = scale * torch.randn(num, dim, dtype=torch.float64, generator=generator)
    return World(table, weights, **options)


def problem(
    count: int = 60, dim: int = 3, annotators: int = 0, ties: bool = False, noise: float = 0.0, seed: int = 0
) -> HeadProblem:
    """A small problem with every part that is asked for."""
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(count, dim, dtype=torch.float64, generator=generator)
    delta[:, 0] += 0.4
    tie = (torch.arange(count) % 4 == 0) & ties
    annotator = torch.randint(max(annotators, 1), (count,), generator=generator)
    return HeadProblem(delta, tie, annotator, annotators, noise)
