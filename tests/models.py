"""Enumerable language models for every test: V ≤ 5, T ≤ 4, float64, EOS and cap, two contexts of different length.

Each identity is checked on an explicit table and, through the real decoder, on a random Llama and on a random Mistral
with a sliding window. `brute_force` writes out every outcome with itertools, and knows nothing of lmppl's enumeration.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from scipy.stats import chi2
from torch import Tensor

from lmppl.lm.base import LanguageModel
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.model import Model
from lmppl.modeling.target import Target
from lmppl.sequences import Sequences

ENUMERABLE = ("tabular", "llama", "mistral")
TOLERANCE = 1e-10


@cache
def enumerable_lm(kind: str, seed: int = 0, temperature: float = 1.0) -> LanguageModel:
    """One of `ENUMERABLE`; other seeds are other laws on the same outcomes, `temperature` is per token."""
    if kind == "tabular":
        lm = TabularLM.random(4, 4, order=2, seed=seed, context=["", "ab"])
        table = torch.softmax(lm.log_table / temperature, -1).view(5, 5, 4)
        return TabularLM(table, max_new_tokens=4, context=["", "ab"])
    from lmppl.lm.transformers import TransformersLM
    from tests.lm.random_models import build, tokenizer

    options = {"context": ["ab", "bacab"], "max_new_tokens": 3, "temperature": temperature}
    return TransformersLM(build(kind, 5, seed=seed), tokenizer=tokenizer(5), **options)


def enumerable_models() -> list[tuple[str, LanguageModel]]:
    """Name and LM of each kind."""
    return [(kind, enumerable_lm(kind)) for kind in ENUMERABLE]


def all_outcomes(lm: LanguageModel, context: int) -> Sequences:
    """Every outcome of one context, those of probability zero included: rows cut at their first EOS, or at the cap."""
    rows = set()
    for row in itertools.product(range(lm.vocab_size), repeat=lm.max_new_tokens):
        ends = [t for t, token in enumerate(row) if token in lm.eos_ids]
        rows.add(row[: ends[0] + 1] if ends else row)
    ordered = sorted(rows)
    return lm.sequences(ordered, [context] * len(ordered))


@dataclass(frozen=True, eq=False)
class BruteForce:
    """One context's posterior, written out: log π0, log φ, log γ and log π* (S,) of all S outcomes, in nats."""

    sequences: Sequences
    log_prior: Tensor
    log_phi: Tensor

    @property
    def log_gamma(self) -> Tensor:
        return torch.where(self.log_prior > -math.inf, self.log_prior + self.log_phi, -math.inf)

    @property
    def log_z(self) -> Tensor:
        return self.log_gamma.exp().sum().log()

    @property
    def log_posterior(self) -> Tensor:
        return self.log_gamma - self.log_z

    def soft_values(self) -> dict[tuple[int, ...], float]:
        """V(x_≤t) = log E_π0[φ | x_≤t] of every prefix of positive probability, outcomes included."""
        return {u: math.log(g / p) if g > 0 else -math.inf for u, (p, g) in self._masses(self.log_phi.exp()).items()}

    def mean_values(self, values: Tensor) -> dict[tuple[int, ...], float]:
        """E_π0[values | x_≤t] of every prefix of positive probability."""
        return {u: g / p for u, (p, g) in self._masses(values).items()}

    def _masses(self, values: Tensor) -> dict[tuple[int, ...], tuple[float, float]]:
        masses: dict[tuple[int, ...], tuple[float, float]] = {}
        for row, log_p, value in zip(
            self.sequences.token_lists(), self.log_prior.tolist(), values.tolist(), strict=True
        ):
            if log_p > -math.inf:
                for t in range(len(row) + 1):
                    prior, weighted = masses.get(tuple(row[:t]), (0.0, 0.0))
                    masses[tuple(row[:t])] = (prior + math.exp(log_p), weighted + math.exp(log_p) * value)
        return masses


def brute_force(model: Model | LanguageModel, context: int) -> BruteForce:
    """Every outcome of one context with log π0 (teacher-forced) and Σ_k log φ_k."""
    model = model if isinstance(model, Model) else Model(model)
    target = Target(model)
    sequences = all_outcomes(model.prior, context)
    log_phi = torch.zeros(len(sequences), dtype=torch.float64)
    for value in target.log_factors(sequences).values():
        log_phi = log_phi + value
    return BruteForce(sequences, target.log_prior(sequences).double(), log_phi)


def wavy(texts: list[str]) -> list[float]:
    """A reward in [−1, 1] that no two texts share by accident."""
    return [math.sin(1.0 + sum((i + 1.3) * ord(ch) for i, ch in enumerate(t))) for t in texts]


def count_of(letter: str) -> Callable[[list[str]], list[float]]:
    """The reward that counts a letter: few levels, many ties."""
    return lambda texts: [float(t.count(letter)) for t in texts]


def has_no(letter: str) -> Callable[[list[str]], list[bool]]:
    """The constraint that forbids a letter."""
    return lambda texts: [letter not in t for t in texts]


def goodness_of_fit(draws: Sequences, brute: BruteForce, log_law: Tensor) -> float:
    """p-value of the chi-square test that draws of one context follow `log_law` on the brute-force outcomes.

    Outcomes with fewer than 5 expected draws are pooled; a draw of probability zero gives p = 0.
    """
    number = {key: i for i, key in enumerate(brute.sequences.keys())}
    rows = torch.tensor([number[key] for key in draws.keys()])  # noqa: SIM118 - a method, not a mapping's
    observed = torch.bincount(rows, minlength=len(number)).double()
    expected = len(draws) * log_law.exp()
    if bool((observed[expected == 0] > 0).any()):
        return 0.0
    rare = expected < 5
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    used = expected > 0
    statistic = ((observed - expected)[used].square() / expected[used]).sum()
    return float(chi2.sf(float(statistic), int(used.sum()) - 1))
