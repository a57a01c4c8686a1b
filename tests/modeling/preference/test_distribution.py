"""Distributions of preference: probabilities of choices from two laws, and what is learned of the spread."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

import lmppl
from lmppl.modeling.evidence import laws
from lmppl.modeling.evidence.preference.preference_heads import Levels, PreferenceHeads, log_first
from lmppl.modeling.returned_values import Batch
from tests.modeling.preference.cases import f64

GRID = torch.linspace(-12, 12, 4001, dtype=torch.float64)


def outputs(width: int, seed: int) -> Tensor:
    return torch.randn(5, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_a_normal_choice_is_an_integral() -> None:
    """P(r(a) > r(b)) = ∫ p_a(r) F_b(r) dr; the mutants σ_a + σ_b and one shared spread fail."""
    first, second = 0.5 * outputs(2, 0), 0.5 * outputs(2, 1)
    found = log_first("normal", first, second).exp()
    for row in range(5):
        a, b = (Normal(one[row, 0], one[row, 1].exp()) for one in (first, second))
        wanted = (a.log_prob(GRID).exp() * b.cdf(GRID)).sum() * (GRID[1] - GRID[0])
        assert float(found[row]) == pytest.approx(float(wanted), abs=1e-9)
    gap = first[:, 0] - second[:, 0]
    for scale in (first[:, 1].exp() + second[:, 1].exp(), math.sqrt(2) * first[:, 1].exp()):
        assert float((Normal(0.0, 1.0).cdf(gap / scale) - found).abs().max()) > 0.02


def test_a_categorical_choice_is_a_sum() -> None:
    """Σ_ij p(i) q(j) (1[i > j] + ½ 1[i = j]), so that both orders add up to one; without the half they do not."""
    first, second = outputs(4, 0), outputs(4, 1)
    p, q = first.softmax(-1), second.softmax(-1)
    win = torch.zeros(5, dtype=torch.float64)
    for i in range(4):
        for j in range(4):
            win += p[:, i] * q[:, j] * (1.0 if i > j else 0.5 if i == j else 0.0)
    found = log_first("categorical", first, second).exp()
    assert float((found - win).abs().max()) < 1e-14
    assert float((found + log_first("categorical", second, first).exp() - 1).abs().max()) < 1e-14
    strict = win - 0.5 * (p * q).sum(1)
    assert float((strict + (1 - win - 0.5 * (p * q).sum(1)) - 1).abs().max()) > 0.1


def test_levels_have_moments_and_quantiles() -> None:
    law = Levels(logits=outputs(4, 2))
    levels = torch.arange(4.0, dtype=torch.float64)
    assert float((law.mean - law.probs @ levels).abs().max()) < 1e-14
    assert float((law.stddev**2 - (law.probs @ levels**2 - law.mean**2)).abs().max()) < 1e-14
    assert torch.equal(laws.moment(law, "mean"), law.mean)
    below = law.probs.cumsum(1)
    for row, level in enumerate(laws.quantile(law, 0.3).tolist()):
        assert float(below[row, int(level)]) >= 0.3
        assert level == 0 or float(below[row, int(level) - 1]) < 0.3


def divided(count: int, seed: int) -> tuple[list[tuple[str, str]], dict[str, list[float]]]:
    """Texts with a quality everybody likes, and a trait that half of the people love and half hate."""
    generator = torch.Generator().manual_seed(seed)
    quality = torch.randn(60, dtype=torch.float64, generator=generator)
    trait = (torch.arange(60) % 2).double()
    table = {str(i): [float(quality[i]), float(trait[i])] for i in range(60)}
    first, second = torch.randint(60, (2, count), generator=generator)
    second = torch.where(first == second, (second + 1) % 60, second)
    noise = torch.randn(2, count, dtype=torch.float64, generator=generator)
    spread = 0.7 * (1 + 2 * trait)
    r = [quality[side] + spread[side] * z for side, z in zip((first, second), noise, strict=True)]
    better = r[0] > r[1]
    chosen, rejected = torch.where(better, first, second), torch.where(better, second, first)
    return [(str(a), str(b)) for a, b in zip(chosen.tolist(), rejected.tolist(), strict=True)], table


@pytest.mark.parametrize("kind", ["normal", "categorical"])
def test_the_spread_of_divisive_texts_is_found(kind: str) -> None:
    """The true ratio of spreads is 3; a cautious quantile then prefers what nobody hates."""
    pairs, table = divided(3000, 0)
    model = lmppl.PreferenceDistribution.fit(pairs, lambda ts: f64([table[t] for t in ts]), kind=kind, prior_scale=2.0)  # type: ignore[arg-type]
    table |= {"liked by all": [0.5, 0.0], "divisive": [1.0, 1.0]}
    texts = ["liked by all", "divisive"]
    belief = model.texts(texts)
    if isinstance(belief, Levels):
        spread = belief.stddev
        assert float(spread[1] / spread[0]) > 1.3  # levels have ends, at which spreads are short
    else:
        mean, spread = belief
        assert 2.4 < float(spread[1] / spread[0]) < 3.7
        assert float(mean[1]) > float(mean[0])
    careful = model.with_attitude(lmppl.Quantile(0.1))
    low = careful.features[0].read(model.texts(texts), Batch("test", 2, lambda: texts))  # type: ignore[misc]
    assert float(low[0, 2]) > float(low[1, 2])


def test_the_fit_is_a_maximum() -> None:
    """No step of any weight of the normal heads raises the posterior density."""
    pairs, table = divided(200, 3)
    model = lmppl.PreferenceDistribution.fit(pairs, lambda ts: f64([table[t] for t in ts]), prior_scale=0.5)
    heads, scaled = model.texts.heads, model.texts.features
    first, second = (scaled(list(side), "test") for side in zip(*pairs, strict=True))

    def density(weights: Tensor) -> float:
        said = PreferenceHeads("normal", weights, heads.bias).log_first(first, second).sum()
        return float(said - (weights / 0.5).square().sum() / 2)

    best = density(heads.weights)
    for index in range(heads.weights.numel()):
        for step in (-1e-3, 1e-3):
            other = heads.weights.clone()
            other.view(-1)[index] += step
            assert density(other) < best
    assert heads.bias.tolist() == [0.0, -0.5 * math.log(2)]


def test_its_predictions_are_those_of_its_heads_and_quantiles_are_evidence() -> None:
    pairs, table = divided(200, 3)

    def features(texts: list[str]) -> Tensor:
        return f64([table.get(t, [float(len(t)), 0.0]) for t in texts])

    for kind in ("normal", "categorical"):
        model = lmppl.PreferenceDistribution.fit(pairs, features, kind=kind, attitude=lmppl.Quantile(0.2), beta=0.5)  # type: ignore[arg-type]
        log_p = model.log_predictive(pairs)
        assert float((log_p.exp().sum(1) - 1).abs().max()) < 1e-12
        assert model.evaluate(pairs).log_likelihood.value.item() == pytest.approx(float(log_p[:, 0].mean()))
        lm = lmppl.TabularLM.random(3, 2, order=1, seed=0)
        draws = lmppl.infer(lm * model, lmppl.Exact()).draw(20).features["preference"]
        if kind == "normal":
            wanted = (draws[:, 0] + draws[:, 1] * float(torch.special.ndtri(f64(0.2)))) / 0.5
            assert float((draws[:, 2] - wanted).abs().max()) < 1e-10
        else:
            assert set((draws[:, 2] * 0.5).tolist()) <= {0.0, 1.0, 2.0, 3.0, 4.0}
