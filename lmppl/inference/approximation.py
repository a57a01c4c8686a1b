"""What `infer` returns: weighted draws, a normaliser with its error, and what it cost.

Four kinds: `Particles` (a weighted set), `Chains` (dependent draws), `Sampler` (a lazy exact sampler) and `ExactTable`
(every outcome with its probability, or the law as an LM).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lmppl.errors import BudgetExhausted, ModelError, UnsupportedModel
from lmppl.inference.engine import Engine, Guarantee
from lmppl.inference.run import infer
from lmppl.lm.base import LanguageModel
from lmppl.modeling.factors import Feature
from lmppl.modeling.model import Model
from lmppl.modeling.target import Target
from lmppl.modeling.user_functions import evaluate
from lmppl.sequences import Cost, Draws, Estimate, EstimateKind, Sequences

__all__ = ["Approximation", "Chains", "ExactTable", "Particles", "Sampler", "widening"]

LEVEL = 0.95
Z_SCORE = 1.959963984540054  # Φ⁻¹(0.975)


def widening(clusters: int | None) -> float:
    """t/z at 97.5 %: by how much the spread of so few independent sets of draws is to be taken wider; 1 for None.

    s of n sets has n − 1 degrees of freedom: 6.5 for two, 1.2 for eight, 1.02 for 64.
    """
    if clusters is None:
        return 1.0
    if clusters < 2:
        return math.nan
    from scipy import stats  # imports much, and changes warning filters

    return float(stats.t.ppf((1.0 + LEVEL) / 2.0, clusters - 1)) / Z_SCORE


SHOWN_ENTRIES = 16  # of a tensor in `info`, when it is printed


class Normalizers(tuple[Estimate, ...]):
    """Estimates of log Z; asked for one where there is none, it says so."""

    __slots__ = ()

    def __getitem__(self, index: Any) -> Any:
        if not self and not isinstance(index, slice):
            raise IndexError(
                "log_normalizer is empty: this engine gives no estimate of log Z (chains without Restart, laws that "
                "are not π*); use Importance or SMC, with the draws' LM as proposal where it has a density"
            )
        return super().__getitem__(index)


class Info(dict[str, Any]):
    """Figures of a run by name; printed, large tensors are their shapes."""

    def __repr__(self) -> str:
        return f"{{{', '.join(f'{name!r}: {_short(value)}' for name, value in self.items())}}}"


def _short(value: Any) -> str:
    if isinstance(value, Tensor) and value.numel() > SHOWN_ENTRIES:
        return f"tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple) and any(isinstance(one, Tensor) for one in value):
        return f"({', '.join(map(_short, value))})"
    return repr(value)


@dataclass(frozen=True, eq=False)
class Approximation:
    """An approximation of π*.

    Parameters
    ----------
    draws : Draws
        Weighted, as computed.
    log_normalizer : tuple of Estimate
        Estimates of log Z(c), in nats, one `Estimate` a method; the first is the engine's best.
    guarantee : Guarantee
    info : dict
        Figures of the run, by name: tensors of shape (C,) or numbers.
    cost : Cost
        Everything that was spent; `setup` is the part that does not grow with the number of draws.
    status : {"complete", "interrupted"}
        Interrupted runs hold whole shards only.
    """

    draws: Draws
    log_normalizer: tuple[Estimate, ...]
    guarantee: Guarantee
    info: dict[str, Any] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    setup: Cost = field(default_factory=Cost)
    status: Literal["complete", "interrupted"] = "complete"
    engine: Engine | None = None
    model: Model | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "info", Info(self.info))
        object.__setattr__(self, "log_normalizer", Normalizers(self.log_normalizer))

    def draw(self, num_draws: int, *, generator: torch.Generator | None = None) -> Draws:
        """`num_draws` equally weighted draws per context, resampled from the weights.

        Resampled draws repeat: for fresh ones run the engine again with another seed.
        """
        return self.draws.resample(num_draws, generator=generator)

    def expectation(self, fn: str | Callable[..., Any] | Feature) -> Estimate:
        """E_π*[f], one value per context, with its error.

        Self-normalised: f̂ = Σ w̄ f, standard error √(Σ w̄² (f − f̂)²), interval f̂ ± 1.96 standard errors
        (`hesterberg1995`, `owen2000`); of few sweeps or chains Student's t takes the place of 1.96. It inherits the
        weights' blind spots: unseen mass does not show, and where all
        draws agree the interval is nan. A heuristic engine's figure is about its own law, as the note says.

        Parameters
        ----------
        fn : str, callable or Feature
            The name of a feature or factor column, or a function of texts with the same contract as a feature.
        """
        values = self._column(fn)
        weights = self.draws.weights
        means, errors = [], []
        for c in range(self.draws.num_contexts):
            rows = self.draws.context == c
            w, f = weights[rows], values[rows]
            means.append(torch.where(w > 0, w * f, 0.0).sum())
            errors.append(self.error_of_mean(torch.where(w > 0, w * (f - means[-1]), 0.0), rows))
        value, error = torch.stack(means), torch.stack(errors)
        if isinstance(self, ExactTable) and self.enumerated:
            return Estimate(value, torch.stack([value, value], -1), 1.0, "exact", torch.zeros_like(value))
        few = [widening(self.clusters(self.draws.context == c)) for c in range(self.draws.num_contexts)]
        half = torch.where(error > 0, Z_SCORE * error.new_tensor(few) * error, torch.nan)
        notes = []
        if self.guarantee in (Guarantee.APPROXIMATE, Guarantee.HEURISTIC):
            notes.append("an expectation under the engine's own law, not under π*")
        if bool((error == 0).any()):
            notes.append("all draws of some context agree, so that they state no error: no interval there")
        if bool(error.isnan().any()):
            notes.append("one sweep states no error: run two or more")
        return Estimate(
            value,
            torch.stack([value - half, value + half], -1),
            LEVEL,
            self._kind_of_mean(),
            error,
            len(self.draws) // max(1, self.draws.num_contexts),
            "; ".join(notes),
        )

    def _kind_of_mean(self) -> EstimateKind:
        if self.guarantee in (Guarantee.APPROXIMATE, Guarantee.HEURISTIC):
            return "own_law"
        return "consistent" if self.draws.log_weight is not None or isinstance(self, Chains) else "unbiased"

    def as_language_model(self) -> LanguageModel:
        """The approximation as an LM: a policy or an exact table; other kinds cannot be scored."""
        raise UnsupportedModel(
            f"{type(self).__name__} has draws but no log-probability, so it is no language model; use Exact where it "
            "can run, or train a policy"
        )

    def error_of_mean(self, influence: Tensor, rows: Tensor) -> Tensor:
        """The standard error of a weighted mean of one context from w̄ (f − f̂) (n,) of its draws, `rows` (N,) bool."""
        return influence.square().sum().sqrt()

    def clusters(self, rows: Tensor) -> int | None:
        """How many independent sets of the draws `rows` (N,) bool `error_of_mean` compares; None: single draws."""
        return None

    def _column(self, fn: str | Callable[..., Any] | Feature) -> Tensor:
        if isinstance(fn, str):
            known = {**self.draws.log_factors, **self.draws.features}
            if fn not in known:
                raise ModelError(f"expectation: no column {fn!r}; there are {sorted(known)}")
            return known[fn].double()
        feature = fn if isinstance(fn, Feature) else Feature(getattr(fn, "__name__", "f"), fn)
        value = evaluate(feature, self.draws, who="expectation")
        if value.dim() != 1:
            raise ModelError(f"expectation: {feature.name} returned shape {tuple(value.shape)}, expected (N,)")
        return value.double().to(self.draws.ids.device)

    def __repr__(self) -> str:
        shown = self.log_normalizer[0] if self.log_normalizer else "—"
        return f"{type(self).__name__}({self.engine or ''}, {len(self.draws)} draws, log Z = {shown}, {self.status})"


@dataclass(frozen=True, eq=False, repr=False)
class Particles(Approximation):
    """Weighted draws: importance sampling, SMC.

    Draws with a column `sweep` depend on each other within a sweep, and only the sweeps are independent: the error of
    an expectation is then √(S/(S−1) Σ_s u_s²), u_s the sum of w̄ (f − f̂) over sweep s of S, and nan for a single one.
    """

    def error_of_mean(self, influence: Tensor, rows: Tensor) -> Tensor:
        sweep = self.draws.columns.get("sweep")
        if sweep is None:
            return super().error_of_mean(influence, rows)
        labels, of = torch.unique(sweep[rows].to(influence.device), return_inverse=True)
        count = len(labels)
        if count < 2:
            return influence.new_tensor(torch.nan)
        sums = influence.new_zeros(count).index_add_(0, of, influence)
        return (sums.square().sum() * count / (count - 1)).sqrt()

    def clusters(self, rows: Tensor) -> int | None:
        sweep = self.draws.columns.get("sweep")
        return None if sweep is None else len(sweep[rows].unique())


@dataclass(frozen=True, eq=False, repr=False)
class Chains(Approximation):
    """Dependent draws, with columns `chain` and `step`, as many of each chain.

    The error of an expectation is that of the mean of independent chains' means, s/√C, where there are 16 chains or
    more: it holds whatever the autocorrelation is. With fewer it is the Monte Carlo standard error
    (`lmppl.diagnostics.mcse`), which has to see the autocorrelation and needs 20 steps a chain for it; shorter ones
    have their means alone, and a single one has nan.
    """

    def error_of_mean(self, influence: Tensor, rows: Tensor) -> Tensor:
        from lmppl.diagnostics.chains import mcse

        chain, step = (self.draws.columns[name][rows] for name in ("chain", "step"))
        count = len(chain.unique())
        order = torch.argsort(chain * (int(step.max()) + 1) + step, stable=True)
        values = (influence * len(influence))[order].view(count, -1)
        if float(values.max()) == float(values.min()):
            return influence.new_zeros(())
        if self.clusters(rows) is not None:
            return values.mean(1).std() / math.sqrt(count)
        return influence.new_tensor(mcse(values).value)

    def clusters(self, rows: Tensor) -> int | None:
        from lmppl.diagnostics.chains import MANY_CHAINS, SEEN_STEPS

        count = len(self.draws.columns["chain"][rows].unique())
        return count if count >= MANY_CHAINS or int(rows.sum()) < SEEN_STEPS * count else None


@dataclass(frozen=True, eq=False, repr=False)
class Sampler(Approximation):
    """An exact (or heuristic) sampler: equally weighted independent draws, and more on demand."""

    def draw(self, num_draws: int, *, generator: torch.Generator | None = None) -> Draws:
        """`num_draws` fresh independent draws per context: the engine runs again with a seed from `generator`."""
        if self.engine is None or self.model is None:
            raise ModelError("draw: this approximation was not made by lmppl.infer, so its engine is not known")
        seed = int(torch.randint(1 << 62, (), generator=generator))
        draws = infer(self.model, self.engine, num_draws, seed=seed, progress=False).draws
        fewest = int(torch.bincount(draws.context, minlength=draws.num_contexts).min())
        if fewest < num_draws:
            raise BudgetExhausted(f"draw: {self.engine} reached {fewest} of {num_draws} draws; raise its max_tries")
        return draws


@dataclass(frozen=True, eq=False, repr=False)
class ExactTable(Approximation):
    """π* itself as an LM, with draws.

    Parameters
    ----------
    law : LanguageModel
        π*.
    enumerated : bool
        `draws` is the table of all outcomes, weighted by γ, so that expectations over it are exact; else it holds
        independent exact draws, equally weighted.
    """

    law: LanguageModel | None = None
    enumerated: bool = True

    def draw(self, num_draws: int, *, generator: torch.Generator | None = None) -> Draws:
        """`num_draws` fresh independent draws of π* per context; `log_q` is log π*; scored by prior and factors."""
        draws = self.as_language_model().draw(num_draws, generator=generator)
        if self.model is None:
            return replace(draws, log_prior=None)
        target = Target(self.model)
        return target.evaluate(replace(draws, log_prior=target.log_prior(draws)))

    def log_prob(self, sequences: Sequences) -> Tensor:
        """(N,) log π*(x|c), in nats."""
        return self.as_language_model().score(sequences)

    def as_language_model(self) -> LanguageModel:
        """π* as a `LanguageModel`: it samples and scores, and can be a proposal or the next model's prior."""
        if self.law is None:
            raise UnsupportedModel("this exact table holds no law")
        return self.law
