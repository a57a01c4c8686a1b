"""The exact twist: soft values V(x_≤t) = log E_π0[∏ φ | x_≤t], where π* can be computed."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lmppl.errors import UnsupportedModel
from lmppl.inference.approximation import ExactTable
from lmppl.inference.exact import Exact
from lmppl.inference.posterior_lm import PosteriorLM
from lmppl.inference.prefix_tree import PrefixTreeLM
from lmppl.inference.run import infer
from lmppl.lm.base import ENUMERATION_GUARD, LanguageModel
from lmppl.modeling.model import Model

__all__ = ["ExactTwist"]


class _Rows(NamedTuple):
    """B rows: for each, the states of both machines and V after 0..t tokens (B, t+1, ·), and its tokens so far.

    They live on the CPU, where the machines are; what is asked of them goes to the device that asks.
    """

    states: Tensor
    values: Tensor
    lengths: Tensor
    device: torch.device

    def last(self) -> tuple[Tensor, Tensor, Tensor]:
        row = torch.arange(len(self.lengths))
        at = self.states[row, self.lengths]
        return at[:, 0], at[:, 1], self.values[row, self.lengths]


class ExactTwist:
    """ψ(x_≤t) = e^{V(x_≤t)}, V(x_≤t) = log E_π0[∏ φ | x_≤t]: the optimal twist, ψ(∅) = Z.

    With it in the proposal too (SMC's "optimal") every weight is Z: π*(v|x_<t) = π0(v|x_<t) e^{V(x_<t v) − V(x_<t)}. In
    the bootstrap variant weights still vary. Source: `levine2018`, `zhao2024`.

    V is read off two laws over the same outcomes, e^{V(x_<t v) − V(x_<t)} = π*(v|x_<t)/π0(v|x_<t): those that `Exact`
    computes, by dynamic programming for a `TabularLM` under finite automata, as a tree of prefixes for any prior with
    few outcomes.

    Parameters
    ----------
    law, base : PosteriorLM
        π* and π0 as machines, on the same contexts; `ExactTwist.of(model)` computes them.
    model : Model, optional
        What `law` is the posterior of. The twist is refused by other priors; under another declaration it is an
        approximation, which may exclude what that one allows: SMC's log Ẑ is a lower bound then, and says so.
    """

    needs: Collection[Literal["text", "ids", "hidden"]] = frozenset({"ids"})

    def __init__(self, law: PosteriorLM, base: PosteriorLM, model: Model | None = None) -> None:
        self.law, self.base, self.model = law, base, model
        self.log_normalizer: Tensor = law.log_normalizer

    @classmethod
    def of(cls, model: Model, *, max_sequences: int = ENUMERATION_GUARD) -> ExactTwist:
        """The exact twist of a model that `Exact` can run on.

        Raises
        ------
        UnsupportedModel, InfeasibleModel
            As `Exact` does.
        """
        table = infer(model, Exact(max_sequences=max_sequences), 1, progress=False)
        assert isinstance(table, ExactTable)
        law = _machine(table.as_language_model())
        if isinstance(law, PrefixTreeLM):
            log_prior = table.draws.log_prior
            assert log_prior is not None
            return cls(law, PrefixTreeLM(model.prior, table.draws, log_prior), model)
        prior = infer(Model(model.prior), Exact(max_sequences=max_sequences), 1, progress=False)
        return cls(law, _machine(prior.as_language_model()), model)

    @property
    def fingerprint(self) -> str:
        """Of the two laws."""
        return hashlib.sha256(f"{self.law.fingerprint}{self.base.fingerprint}".encode()).hexdigest()[:16]

    def unsupported_reason(self, lm: LanguageModel) -> str | None:
        """Why the twist cannot serve `lm`, in one sentence; None where it can."""
        if self.model is None or self.model.prior is lm or self.model.prior.fingerprint == lm.fingerprint:
            return None
        own = self.model.prior
        return (
            f"the exact twist is that of {own!r} (fingerprint {own.fingerprint}), and this is {lm!r} (fingerprint "
            f"{lm.fingerprint}): other tables, contexts or options; compute it by ExactTwist.of(model)"
        )

    def shortcoming(self, model: Model) -> str:
        """Why the twist may exclude what `model` allows; "" where nothing speaks against it."""
        if self.model is None or self.model is model or self.model.spec_hash == model.spec_hash:
            return ""
        return f"the exact twist is that of {self.model.formula}, and may exclude what this model allows: then E Ẑ < Z"

    def start(self, contexts: Tensor) -> _Rows:
        """As `Incremental.start`."""
        where = contexts.cpu()
        states = torch.stack([self.law.initial[where], self.base.initial[where]], -1)
        return _Rows(states[:, None], self.log_normalizer[where][:, None], torch.zeros_like(where), contexts.device)

    def weigh(self, state: _Rows, candidates: Tensor | None) -> Tensor:
        """As `Incremental.weigh`; −inf after a prefix with V = −inf."""
        at_law, at_base, value = state.last()
        posterior, prior = self.law.next_log_probs(at_law), self.base.next_log_probs(at_base)
        if candidates is not None:
            posterior, prior = posterior.gather(1, candidates.cpu()), prior.gather(1, candidates.cpu())
        possible = (posterior > -torch.inf) & (prior > -torch.inf) & (value > -torch.inf)[:, None]
        ratio = torch.where(possible, posterior - torch.where(possible, prior, 0.0), -torch.inf)
        return ratio.to(state.device)

    def advance(self, state: _Rows, tokens: Tensor, step: Any) -> _Rows:
        """As `Incremental.advance`."""
        tokens = tokens.cpu()
        at_law, at_base, value = state.last()
        increment = self.weigh(state, tokens[:, None])[:, 0].cpu()
        states, values, lengths = state.states, state.values, state.lengths + 1
        if len(lengths) and int(lengths.max()) >= states.shape[1]:
            states = torch.cat([states, torch.zeros_like(states)], 1)
            values = torch.cat([values, torch.zeros_like(values)], 1)
        else:
            states, values = states.clone(), values.clone()
        row = torch.arange(len(lengths))
        after = torch.stack([self.law.advance(at_law, tokens), self.base.advance(at_base, tokens)], -1)
        states[row, lengths], values[row, lengths] = after, value + increment
        return _Rows(states, values, lengths, state.device)

    def potential(self, state: _Rows) -> Tensor:
        """As `Incremental.potential`: V, in nats."""
        return state.last()[2].to(state.device)

    def select(self, state: _Rows, index: Tensor) -> _Rows:
        """As `Incremental.select`."""
        index = index.cpu()
        return _Rows(state.states[index], state.values[index], state.lengths[index], state.device)

    def crop(self, state: _Rows, lengths: Tensor) -> _Rows:
        """As `Incremental.crop`."""
        return state._replace(lengths=torch.minimum(state.lengths, lengths.cpu()))

    def __repr__(self) -> str:
        return f"ExactTwist({self.law!r})"


def _machine(law: LanguageModel) -> PosteriorLM:
    if not isinstance(law, PosteriorLM):
        raise UnsupportedModel(f"ExactTwist: got {type(law).__name__}, expected a law that Exact has computed")
    return law
