"""Small models, arbitrary twists and exact laws for the tests of SMC and conditional SMC."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from functools import cache

import torch
from torch import Tensor

from lmppl.inference.conditional_smc import conditional_smc
from lmppl.inference.smc import SMC
from lmppl.inference.sweep import SweepResult
from lmppl.lm.base import LanguageModel
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence.constraint import Constraint
from lmppl.modeling.evidence.reward import Reward
from lmppl.modeling.factors import Factor, Feature
from lmppl.modeling.model import Model
from lmppl.modeling.target import Target
from lmppl.testing.enumeration import every_outcome
from tests.lm.random_models import random_lm
from tests.models import BruteForce, brute_force, has_no, wavy

SCHEMES = ("multinomial", "stratified", "systematic", "residual", "ssp")
KINDS = ("tabular", "llama", "mistral")
VISIBLE = 1e-4  # a mutant must be wrong by this much


@cache
def small_lm(kind: str, horizon: int = 2, seed: int = 0) -> LanguageModel:
    """V = 3: a, b and EOS; two contexts of different length."""
    if kind == "tabular":
        return TabularLM.random(3, horizon, order=2, seed=seed, context=["", "ab"])
    return random_lm(kind, vocab_size=3, max_new_tokens=horizon)


def small_model(kind: str, hard: bool, horizon: int = 2) -> Model:
    model = small_lm(kind, horizon) * Reward(wavy, beta=0.4)
    return model * Constraint(has_no("b")) if hard else model


class ArbitraryTwist:
    """A positive number for every prefix, ψ(∅) among them, that has nothing to do with the evidence."""

    needs = ("ids",)

    def __init__(self, vocab_size: int, seed: int = 0, spread: float = 1.0) -> None:
        self.vocab_size, self.seed, self.spread = vocab_size, seed, spread

    def value(self, context: int, prefix: tuple[int, ...]) -> float:
        return self.spread * random.Random(f"{self.seed}:{context}:{prefix}").gauss(0.0, 1.0)

    def start(self, contexts):
        return [(c, ()) for c in contexts.tolist()]

    def weigh(self, state, candidates):
        rows = [range(self.vocab_size)] * len(state) if candidates is None else candidates.tolist()
        values = [
            [self.value(c, (*prefix, v)) - self.value(c, prefix) for v in row]
            for (c, prefix), row in zip(state, rows, strict=True)
        ]
        return torch.tensor(values, dtype=torch.float64)

    def advance(self, state, tokens, step):
        return [(c, (*prefix, v)) for (c, prefix), v in zip(state, tokens.tolist(), strict=True)]

    def potential(self, state):
        return torch.tensor([self.value(c, prefix) for c, prefix in state], dtype=torch.float64)

    def select(self, state, index):
        return [state[i] for i in index.tolist()]

    def crop(self, state, lengths):
        return [(c, prefix[:n]) for (c, prefix), n in zip(state, lengths.tolist(), strict=True)]


class OneNumber:
    """Base of forms whose state is one number a row, the potential, 0 at the start."""

    needs = ("ids",)

    def __init__(self, token: int, vocab_size: int) -> None:
        self.token, self.vocab_size = token, vocab_size

    def start(self, contexts):
        return torch.zeros(len(contexts), dtype=torch.float64)

    def asked(self, state, candidates):
        return torch.arange(self.vocab_size).expand(len(state), -1) if candidates is None else candidates

    def potential(self, state):
        return state

    def select(self, state, index):
        return state[index]

    def crop(self, state, lengths):
        raise NotImplementedError


class NoLetter(OneNumber):
    """1[no `token` in x] prefix by prefix: −inf from the token on."""

    def __init__(self, token: int, vocab_size: int, *, wrong: str = "") -> None:
        super().__init__(token, vocab_size)
        self.wrong = wrong

    def weigh(self, state, candidates):
        gain = 0.5 if self.wrong == "weigh" else 0.0
        gone = (self.asked(state, candidates) == self.token) | (state == -math.inf)[:, None]
        return torch.where(gone, -math.inf, gain)

    def advance(self, state, tokens, step):
        return torch.where(tokens == self.token, -math.inf, state)


class CountLetter(OneNumber):
    """exp(strength · how often `token` is in x), prefix by prefix, off by `error` at the end of a row."""

    def __init__(self, token: int, vocab_size: int, strength: float, error: float = 0.0) -> None:
        super().__init__(token, vocab_size)
        self.strength, self.error = strength, error

    def gain(self, tokens):
        return self.strength * (tokens == self.token).double() + self.error * (tokens == self.vocab_size - 1)

    def weigh(self, state, candidates):
        return self.gain(self.asked(state, candidates))

    def advance(self, state, tokens, step):
        return state + self.gain(tokens)


def with_form(factor: Factor, form: object) -> Factor:
    """The factor with an incremental form."""
    return Factor(
        factor.name, factor.features, factor.log_factor, upper=factor.upper, hard=factor.hard, incremental=form,
        formula=factor.formula,
    )  # fmt: skip


def forbids(letter: str, vocab_size: int, **options) -> Factor:
    """A constraint against a letter, with its incremental form."""
    return with_form(Constraint(has_no(letter), name=f"no_{letter}"), NoLetter(ord(letter) - 97, vocab_size, **options))


def counts(letter: str, vocab_size: int, strength: float, **options) -> Factor:
    """A reward that counts a letter, with its incremental form."""
    feature = Feature(f"count_{letter}", lambda texts: [float(t.count(letter)) for t in texts])
    form = CountLetter(ord(letter) - 97, vocab_size, strength, **options)
    return with_form(Reward(feature, beta=1 / strength), form)


def sweep_law(target: Target, smc: SMC, context: int = 0) -> list[tuple[float, SweepResult]]:
    """Every outcome of one sweep of one context."""
    return list(every_outcome(lambda source: smc.sweep(target, torch.tensor([context]), source)))


class Law:
    """What the exact law of a sweep says, by outcome of the brute-force table."""

    def __init__(self, brute: BruteForce, runs: list[tuple[float, SweepResult]]) -> None:
        self.brute = brute
        number = {key: i for i, key in enumerate(brute.sequences.keys())}
        size = len(number)
        self.total = sum(p for p, _ in runs)
        self.mean_z = self.mean_log_z = self.chance = self.inverse = 0.0
        self.mean_mass = torch.zeros(size, dtype=torch.float64)  # E[Ẑ Σ W̄ 1[x]]
        self.draw = torch.zeros(size, dtype=torch.float64)  # the law of a row drawn by weight
        for p, run in runs:
            z = float(run.log_z[0].exp())
            log_w = run.draws.log_weight
            rows = torch.tensor([number[key] for key in run.draws.keys()])  # noqa: SIM118 - a method
            self.mean_z += p * z
            self.mean_mass.index_add_(0, rows, p * log_w.exp() / len(log_w))
            if z > 0:
                self.chance += p
                self.inverse += p / z
                self.mean_log_z += p * math.log(z)
                self.draw.index_add_(0, rows, p * torch.softmax(log_w, 0))


def conditional_law(target: Target, smc: SMC, brute: BruteForce, row: int) -> Law:
    """The exact law of a conditional sweep that retains one outcome."""
    x = one_row(target, brute, row)
    return Law(brute, list(every_outcome(lambda source: conditional_smc(target, smc, x, source))))


def one_row(target: Target, brute: BruteForce, row: int):
    from lmppl.sequences import Draws

    s = brute.sequences.select([row])
    return Draws(
        s.ids, s.lengths, s.finished, s.context, s.prompts, s.decoder, log_prior=brute.log_prior[row : row + 1]
    )


def brute_of(model: Model, context: int = 0) -> BruteForce:
    return brute_force(model, context)


def possible(brute: BruteForce) -> list[int]:
    """Outcomes with γ > 0."""
    return torch.nonzero(brute.log_gamma > -math.inf).squeeze(1).tolist()


def kernel(target: Target, smc: SMC, brute: BruteForce, step) -> Tensor:
    """(S, S) the transition matrix of `step(target, smc, rows, source)` on the outcomes; rows with γ = 0 stay 0."""
    number = {key: i for i, key in enumerate(brute.sequences.keys())}
    matrix = torch.zeros(len(number), len(number), dtype=torch.float64)
    for row in possible(brute):
        x = one_row(target, brute, row)
        found: dict[int, float] = defaultdict(float)
        for p, new in every_outcome(lambda source, x=x: step(target, smc, x, source)):
            found[number[new.keys()[0]]] += p
        for column, p in found.items():
            matrix[row, column] = p
    return matrix
