"""Target: the compiled declaration γ(x|c) = π0(x|c) ∏ φ_k(x, c): batched, checked, cached and counted.

A target belongs to one run: counter and score cache are the run's own, so that a second engine never looks free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lmppl.errors import FactorError, ShapeError
from lmppl.lm.decoding import hidden_states
from lmppl.lm.derived import count_base
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.factors import Factor, Feature
from lmppl.modeling.model import Model
from lmppl.modeling.user_functions import evaluate, evaluate_log_factor
from lmppl.sequences import Cost, Draws, Sequences

__all__ = ["Target", "TargetForm"]


@dataclass(frozen=True)
class TargetForm:
    """What an engine may ask about a target before it runs.

    Parameters
    ----------
    num_contexts, horizon, vocab_size : int
        C, T, V.
    max_outcomes : float
        An upper bound of the number of outcomes of one context (exact for tables); inf where it overflows.
    tabular : bool
        The prior is a finite machine (`TabularLM`), so that dynamic programming is exact at any horizon.
    factor_names : tuple of str
    unbounded : tuple of str
        Factors that declare no finite `upper`.
    without_automaton : tuple of str
        Factors that are not given by a finite automaton.
    hard : tuple of str
        Factors that can be −inf, or do not say.
    stochastic : tuple of str
        Factors that are only estimated.
    log_upper : float
        Σ_k sup log φ_k, in nats; inf where one is unbounded.
    incremental, soft : tuple of str
        Factors with a prefix-by-prefix form, and with a differentiable one.
    graded : tuple of str
        Factors that are no plain predicate: φ may take more values than 0 and 1.
    """

    num_contexts: int
    horizon: int
    vocab_size: int
    max_outcomes: float
    tabular: bool
    factor_names: tuple[str, ...]
    unbounded: tuple[str, ...]
    without_automaton: tuple[str, ...]
    hard: tuple[str, ...]
    stochastic: tuple[str, ...]
    log_upper: float
    incremental: tuple[str, ...] = ()
    soft: tuple[str, ...] = ()
    graded: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: Model) -> TargetForm:
        """Read the form off a declaration."""
        prior, factors = model.prior, model.factors
        return cls(
            num_contexts=prior.num_contexts,
            horizon=prior.max_new_tokens,
            vocab_size=prior.vocab_size,
            max_outcomes=prior.max_outcomes(),
            tabular=isinstance(prior, TabularLM),
            factor_names=tuple(f.name for f in factors),
            unbounded=tuple(f.name for f in factors if not math.isfinite(f.upper)),
            without_automaton=tuple(f.name for f in factors if f.automaton is None),
            hard=tuple(f.name for f in factors if f.hard is not False),
            stochastic=tuple(f.name for f in factors if f.stochastic),
            log_upper=sum(f.upper for f in factors),
            incremental=tuple(f.name for f in factors if f.incremental is not None),
            soft=tuple(f.name for f in factors if f.soft is not None),
            graded=tuple(f.name for f in factors if not f.is_predicate),
        )


class Target:
    """γ(x|c), ready to be evaluated on batches of sequences.

    Parameters
    ----------
    model : Model
        The declaration.

    Attributes
    ----------
    cost : Cost
        What this run has spent so far.
    watcher : callable, optional
        Told about the progress of the present shard: see `report`.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.prior = model.prior
        self.factors = tuple(f.bind(model.prior, partial(self.log_factor, f.name)) for f in model.factors)
        self.form = TargetForm.of(model)
        self.cost = Cost()
        for factor in self.factors:  # forms and features that run LMs of their own
            count_base(factor.incremental, self.cost)
        own = {
            name: replace(feature, name=name)
            for factor in reversed(self.factors)  # of factors that share a feature, the first one's
            for name, feature in zip(model.feature_names(factor), factor.features, strict=True)
        }
        self._features = {name: _counted(own[name], self.cost) for name in model.features}
        self.watcher: Callable[[float, Mapping[str, str]], None] | None = None
        self._known = {name: _Values() for name in model.features}
        self._shapes: dict[str, torch.Size] = {}  # of one value, from the first batch on

    @property
    def contexts(self) -> tuple[str, ...]:
        """The C contexts."""
        return self.prior.prompts

    def report(self, share: float, figures: Mapping[str, str]) -> None:
        """Tell whoever watches this run how much of the present shard is done, in [0, 1], and what to show."""
        if self.watcher is not None:
            self.watcher(share, figures)

    def log_prior(self, sequences: Sequences) -> Tensor:
        """(N,) log π0(x|c), in nats."""
        return self.prior.score(sequences, cost=self.cost)

    def features(self, sequences: Sequences) -> dict[str, Tensor]:
        """Raw feature columns (N,) or (N, K) by name; each function runs once on each distinct text.

        Of no sequences: (0,) until a function has shown its K.

        Raises
        ------
        FactorError, ShapeError
            Naming the factor and the offending text.
        """
        return {name: self._column(name, feature, sequences) for name, feature in self._features.items()}

    def log_factors(self, sequences: Sequences, features: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """log φ_k (N,) by factor name, in nats: finite or −inf.

        Raises
        ------
        FactorError
            On nan, on +inf, and on −inf from a factor that declares `hard=False`.
        """
        if len(sequences) == 0:
            return {f.name: torch.zeros(0, dtype=torch.float64) for f in self.factors}
        columns = self.features(sequences) if features is None else features
        return {factor.name: self._log_factor(factor, sequences, columns) for factor in self.factors}

    def log_factor(self, name: str, sequences: Sequences) -> Tensor:
        """(N,) log φ_k of the factor called `name`, in nats; of prefixes too, if its functions take them."""
        factor = self.model[name]
        columns = {n: self._column(n, self._features[n], sequences) for n in self.model.feature_names(factor)}
        return self._log_factor(factor, sequences, columns)

    def _log_factor(self, factor: Factor, sequences: Sequences, columns: Mapping[str, Tensor]) -> Tensor:
        names = self.model.feature_names(factor)
        own = {f.name: columns[n] for f, n in zip(factor.features, names, strict=True)}
        return _checked(factor, evaluate_log_factor(factor, own, sequences), sequences)

    def log_prob_unnormalized(self, sequences: Sequences) -> Tensor:
        """(N,) log γ(x|c), in nats; −inf off the support of π0, whatever the factors say there."""
        log_prior = self.log_prior(sequences)
        total = log_prior.to(torch.float64, copy=True)
        inside = torch.nonzero(log_prior > -torch.inf).squeeze(1)
        for value in self.log_factors(_with_log_prior(sequences.select(inside), log_prior[inside])).values():
            total[inside] += value
        return total

    def evaluate(self, draws: Draws) -> Draws:
        """`draws` (with `log_prior`) with raw features and log φ_k filled in."""
        features = self.features(draws)
        return draws.with_columns(features=features, log_factors=self.log_factors(draws, features))

    def _column(self, name: str, feature: Feature, sequences: Sequences) -> Tensor:
        owner = next(f.name for f in self.factors if name in self.model.feature_names(f))
        if len(sequences) == 0:
            return torch.zeros(0, *self._shapes.get(name, ()), dtype=torch.float64)
        if feature.stochastic or feature.on == "log_prior":  # log π0 comes with the draws
            self.cost.factor_calls += len(sequences)
            values = self._evaluated(feature, sequences, owner)
            self._shapes[name] = values.shape[1:]
            return values
        known = self._known[name]
        keys = _content_keys(feature, sequences)
        fresh = known.missing(keys)
        if fresh:
            values = self._evaluated(feature, sequences.select(list(fresh.values())), owner)
            shape = self._shapes.setdefault(name, values.shape[1:])
            if shape != values.shape[1:]:
                shapes = f"{tuple(shape)} for some texts and {tuple(values.shape[1:])} for others"
                raise ShapeError(f"factor {owner!r}: feature {name!r} has values of shape {shapes}, expected one shape")
            known.add(list(fresh), values)
        self.cost.factor_calls += len(fresh)
        self.cost.cache_hits += len(keys) - len(fresh)
        return known.get(keys)

    def _evaluated(self, feature: Feature, sequences: Sequences, owner: str) -> Tensor:
        """What the function returns, given what the prior says of the rows where it reads that."""
        given: tuple[Tensor, ...] | None = None
        if feature.on == "hidden":
            given = hidden_states(self.prior, sequences, cost=self.cost)
        elif feature.on == "log_prior":
            carried = sequences.log_prior if isinstance(sequences, Draws) else None
            given = (self.log_prior(sequences) if carried is None else carried,)
        return evaluate(feature, sequences, factor=owner, given=given)


def _counted(feature: Feature, cost: Cost) -> Feature:
    """The feature, whose function counts forwards of an LM of its own into `cost` where it has one."""
    counting_into = getattr(feature.fn, "counting_into", None)
    return feature if counting_into is None else replace(feature, fn=counting_into(cost))


def _with_log_prior(sequences: Sequences, log_prior: Tensor) -> Draws:
    """The rows as draws that carry log π0."""
    if isinstance(sequences, Draws):
        return sequences.with_columns(log_prior=log_prior)
    s = sequences
    draws = Draws(s.ids, s.lengths, s.finished, s.context, s.prompts, s.decoder, log_prior=log_prior)
    if "text" in s.__dict__:
        draws.__dict__["text"] = s.text
    return draws


class _Values:
    """What one user function has returned in this run, by content: a row of one tensor for each distinct key."""

    def __init__(self) -> None:
        self._row: dict[Hashable, int] = {}
        self._values: Tensor | None = None

    def missing(self, keys: Sequence[Hashable]) -> dict[Hashable, int]:
        """Keys without a value, each with its first position."""
        first: dict[Hashable, int] = {}
        for position, key in enumerate(keys):
            if key not in self._row:
                first.setdefault(key, position)
        return first

    def add(self, keys: Sequence[Hashable], values: Tensor) -> None:
        """Keep the values of new keys."""
        self._row.update(zip(keys, range(len(self._row), len(self._row) + len(keys)), strict=True))
        self._values = values if self._values is None else torch.cat([self._values, values])

    def get(self, keys: Sequence[Hashable]) -> Tensor:
        """Values of keys that are all known."""
        assert self._values is not None
        return self._values[[self._row[key] for key in keys]]


def log_evidence(draws: Draws) -> Tensor:
    """(N,) Σ_k log φ_k(x), in nats, float64."""
    total = torch.zeros(len(draws), dtype=torch.float64, device=draws.ids.device)
    for value in draws.log_factors.values():
        total = total + value
    return total


def _content_keys(feature: Feature, sequences: Sequences) -> list[Hashable]:
    """What a feature's value may depend on, by content; functions of prompts may ask for token ids too."""
    if feature.on == "text" and not feature.reads_prompts:
        return list(sequences.text)
    if feature.on == "full":
        return list(zip(sequences.context.tolist(), sequences.text, strict=True))
    return list(sequences.keys())


def _checked(factor: Factor, value: Tensor, sequences: Sequences) -> Tensor:
    if not isinstance(value, Tensor):
        raise FactorError(f"factor {factor.name!r}: log φ is a {type(value).__name__}, expected a tensor")
    if value.shape != (len(sequences),):
        raise FactorError(f"factor {factor.name!r}: log φ has shape {tuple(value.shape)}, expected ({len(sequences)},)")
    value = value.double()
    bad = torch.isnan(value) | (value == torch.inf)
    what = "nan or +inf"
    if factor.hard is False and not bool(bad.any()):
        bad, what = (
            value == -torch.inf,
            f"−inf, although this {factor.kind} has hard=False (a Constraint excludes texts),",
        )
    if bool(bad.any()):
        row = int(torch.nonzero(bad)[0, 0])
        raise FactorError(f"factor {factor.name!r}: log φ is {what} for the text {sequences.text[row]!r}")
    return value
