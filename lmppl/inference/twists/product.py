"""Products of twists, and the twist that a model's own factors give."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from typing import Any, Literal

from torch import Tensor

from lmppl.errors import ModelError
from lmppl.lm.base import LanguageModel
from lmppl.lm.decoder import Step
from lmppl.modeling.factors import Factor, Incremental
from lmppl.modeling.model import Model
from lmppl.modeling.named_forms import NamedForm
from lmppl.modeling.target import Target

__all__ = ["FactorTwist", "ProductTwist"]


class ProductTwist:
    """ψ(x_≤t) = ∏_j ψ_j(x_≤t): log-potentials and increments add up, −inf as soon as one is.

    Parameters
    ----------
    *twists : Incremental
        None at all is ψ = 1.
    """

    def __init__(self, *twists: Incremental) -> None:
        self.twists = twists
        self.parts = self._named()
        self.needs: Collection[Literal["text", "ids", "hidden"]] = frozenset(n for t in twists for n in t.needs)

    def _named(self) -> tuple[NamedForm, ...]:
        """The twists, each call checked."""
        return tuple(NamedForm(t, "twist") for t in self.twists)

    def __len__(self) -> int:
        return len(self.twists)

    def shortcoming(self, model: Model) -> str:
        """The first reason why one of the twists may exclude what `model` allows; "" where none speaks against it."""
        asked = (ask for t in self.twists if (ask := getattr(t, "shortcoming", None)) is not None)
        return next((why for ask in asked if (why := ask(model))), "")

    def unsupported_reason(self, lm: LanguageModel) -> str | None:
        """Why one of the twists cannot serve `lm`, in one sentence; None where all can."""
        reasons = (refuse(lm) for t in self.twists if (refuse := getattr(t, "unsupported_reason", None)) is not None)
        return next((reason for reason in reasons if reason is not None), None)

    @property
    def fingerprint(self) -> str:
        """Of the twists in their order; each must have one."""
        parts = [getattr(t, "fingerprint", None) for t in self.twists]
        if any(not isinstance(p, str) for p in parts):
            bad = next(t for t, p in zip(self.twists, parts, strict=True) if not isinstance(p, str))
            raise ModelError(f"twist: {type(bad).__name__} has no fingerprint; give it one to checkpoint runs with it")
        return hashlib.sha256("\n".join(str(p) for p in parts).encode()).hexdigest()[:16]

    def start(self, contexts: Tensor, step: Step | None = None) -> tuple[Any, ...]:
        """As `Incremental.start`."""
        return tuple(t.start(contexts, step) for t in self.parts)

    def weigh(self, state: Any, candidates: Tensor | None) -> Tensor:
        """As `Incremental.weigh`."""
        return _sum(self.terms(state, candidates))

    def terms(self, state: Any, candidates: Tensor | None) -> list[Tensor]:
        """`weigh` of each of the twists."""
        return [t.weigh(s, candidates) for t, s in zip(self.parts, state, strict=True)]

    def advance(self, state: Any, tokens: Tensor, step: Any) -> tuple[Any, ...]:
        """As `Incremental.advance`."""
        return tuple(t.advance(s, tokens, step) for t, s in zip(self.parts, state, strict=True))

    def potential(self, state: Any) -> Tensor:
        """As `Incremental.potential`."""
        return _sum([t.potential(s) for t, s in zip(self.parts, state, strict=True)])

    def select(self, state: Any, index: Tensor) -> tuple[Any, ...]:
        """As `Incremental.select`."""
        return tuple(t.select(s, index) for t, s in zip(self.parts, state, strict=True))

    def crop(self, state: Any, lengths: Tensor) -> tuple[Any, ...]:
        """As `Incremental.crop`."""
        return tuple(t.crop(s, lengths) for t, s in zip(self.parts, state, strict=True))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.twists))})"


class FactorTwist(ProductTwist):
    """The product of the incremental forms of those factors that have one: what SMC uses where no twist is given.

    Each form obeys potential(start) + Σ weigh = potential(final) = log φ_k, so that at the end of a row nothing is left
    to correct but the factors without a form.

    Parameters
    ----------
    factors : sequence of Factor
        Those without an incremental form are left out; `FactorTwist.of(model)` takes a model's.
    vocab_size : int, optional
        V, for the shape of increments of all tokens; not checked by default.
    """

    def __init__(self, factors: Sequence[Factor], vocab_size: int | None = None) -> None:
        self.factors = tuple(f for f in factors if f.incremental is not None)
        self.vocab_size = vocab_size
        super().__init__(*(f.incremental for f in self.factors if f.incremental is not None))

    @classmethod
    def of(cls, model: Model) -> FactorTwist:
        """The twist of a model's factors, bound to its prior: constraints have forms that know the prior's tokens."""
        return cls(Target(model).factors, model.prior.vocab_size)

    def _named(self) -> tuple[NamedForm, ...]:
        return tuple(NamedForm.of(f, self.vocab_size) for f in self.factors)

    @property
    def names(self) -> tuple[str, ...]:
        """The factors, in the order of `terms`."""
        return tuple(f.name for f in self.factors)

    def __repr__(self) -> str:
        return f"FactorTwist({', '.join(map(repr, self.names))})"


def _sum(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
