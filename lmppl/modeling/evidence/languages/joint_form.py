"""JointForm: the prefix-by-prefix form of "all of these constraints" or "one of them", from their own forms."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lmppl.lm.decoder import Step
from lmppl.modeling.factors import Incremental, start_incremental

__all__ = ["JointForm"]


class JointForm:
    """log ψ(x_≤t) = min_k log ψ_k ("and") or max_k log ψ_k ("or") of forms whose potentials are 0 or −inf.

    With "and" a prefix can be lost to the parts together before any of them says so; it is then lost later.

    Parameters
    ----------
    forms : sequence of Incremental
        At least one.
    operation : {"and", "or"}
    """

    def __init__(self, forms: Sequence[Incremental], operation: Literal["and", "or"]) -> None:
        self.forms, self.operation = tuple(forms), operation
        self._combine: Callable[[Tensor, Tensor], Tensor] = torch.minimum if operation == "and" else torch.maximum

    @property
    def needs(self) -> Collection[Literal["text", "ids", "hidden"]]:
        """As `Incremental.needs`: what any part reads."""
        return frozenset(need for form in self.forms for need in form.needs)

    def start(self, contexts: Tensor, step: Step | None = None) -> tuple[Any, ...]:
        """As `Incremental.start`."""
        return tuple(start_incremental(form, contexts, step) for form in self.forms)

    def weigh(self, state: tuple[Any, ...], candidates: Tensor | None) -> Tensor:
        """As `Incremental.weigh`; −inf for a row that is dead."""
        now = [form.potential(one) for form, one in zip(self.forms, state, strict=True)]
        after = [
            form.weigh(one, candidates) + potential[:, None]
            for form, one, potential in zip(self.forms, state, now, strict=True)
        ]
        joint, before = after[0], now[0]
        for one, potential in zip(after[1:], now[1:], strict=True):
            joint, before = self._combine(joint, one), self._combine(before, potential)
        return torch.where(before[:, None] > -torch.inf, joint, -torch.inf)

    def advance(self, state: tuple[Any, ...], tokens: Tensor, step: Any = None) -> tuple[Any, ...]:
        """As `Incremental.advance`."""
        return tuple(form.advance(one, tokens, step) for form, one in zip(self.forms, state, strict=True))

    def potential(self, state: tuple[Any, ...]) -> Tensor:
        """As `Incremental.potential`."""
        joint, *others = (form.potential(one) for form, one in zip(self.forms, state, strict=True))
        for other in others:
            joint = self._combine(joint, other)
        return joint

    def select(self, state: tuple[Any, ...], index: Tensor) -> tuple[Any, ...]:
        """As `Incremental.select`."""
        return tuple(form.select(one, index) for form, one in zip(self.forms, state, strict=True))

    def crop(self, state: tuple[Any, ...], lengths: Tensor) -> tuple[Any, ...]:
        """As `Incremental.crop`."""
        return tuple(form.crop(one, lengths) for form, one in zip(self.forms, state, strict=True))

    def __repr__(self) -> str:
        return f" {self.operation} ".join(map(repr, self.forms))
