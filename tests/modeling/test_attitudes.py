"""What attitudes make of a belief: the evidence table, against quadrature, optimisation over beliefs, and limits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, special, stats
from torch import Tensor
from torch import distributions as d

from lmppl.errors import FactorError, ModelError
from lmppl.modeling.evidence.attitudes import LowerBound, Marginal, Mean, Moderated, Quantile, Robust
from lmppl.modeling.evidence.beliefs import Distributed, Gaussian, Members

EXACT = 1e-10
BETA = 0.7
MEANS = torch.tensor([-3.0, -0.5, 0.0, 1.2], dtype=torch.float64)
SPREADS = torch.tensor([0.3, 1.5, 0.8, 2.0], dtype=torch.float64)
MEMBERS = torch.tensor([[1.0, -2.0, 0.5], [0.2, 0.2, 0.2], [-30.0, 4.0, 1.0]], dtype=torch.float64)
ATTITUDES = (Mean(), Marginal(), Robust(1.3), LowerBound(1.5), Quantile(0.3), Moderated())


def row(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(got: Tensor, wanted: object, tolerance: float = EXACT) -> None:
    expected = torch.as_tensor(wanted, dtype=torch.float64)
    gap = (got.double() - expected).abs() / expected.abs().clamp_min(1.0)
    assert float(gap.max()) < tolerance, (got, expected)


def test_the_gaussian_column_of_the_table() -> None:
    belief, m, s = Gaussian(MEANS, SPREADS), MEANS, SPREADS
    close(Mean().log_factor(belief, BETA), m / BETA)
    close(Marginal().log_factor(belief, BETA), m / BETA + s**2 / (2 * BETA**2))
    close(Robust(1.3).log_factor(belief, BETA), m / BETA - s**2 / (2 * 1.3 * BETA**2))
    close(LowerBound(1.5).log_factor(belief, BETA), (m - 1.5 * s) / BETA)
    close(Quantile(0.3).log_factor(belief, BETA), (m + s * stats.norm.ppf(0.3)) / BETA)


def test_members_are_averaged() -> None:
    belief, r = Members(MEMBERS), MEMBERS.numpy()
    close(Mean().log_factor(belief, BETA), r.mean(1) / BETA)
    close(Marginal().log_factor(belief, BETA), np.log(np.exp(r / BETA).mean(1)))
    close(Robust(1.3).log_factor(belief, BETA), -1.3 * np.log(np.exp(-r / (1.3 * BETA)).mean(1)))
    close(LowerBound(1.5).log_factor(belief, BETA), (r.mean(1) - 1.5 * r.std(1, ddof=1)) / BETA)
    close(Quantile(0.3).log_factor(belief, BETA), np.quantile(r, 0.3, axis=1) / BETA)
    close(Moderated().log_factor(belief, BETA), np.log((1 / (1 + np.exp(-r / BETA))).mean(1)))


@pytest.mark.parametrize("wrong", [-1.0, 1.0], ids=["Robust with the sign of Marginal", "Marginal without its sign"])
def test_the_wrong_sign_is_seen(wrong: float) -> None:
    """Mutant: log E[e^{±r/β}] with the other sign of the exponent."""
    belief = Members(MEMBERS)
    mutant = belief.log_mgf(-wrong / BETA) * (1 if wrong > 0 else -1)
    right = (Marginal() if wrong > 0 else Robust(1.0)).log_factor(belief, BETA)
    assert float((mutant - right).abs().max()) > 0.1


def test_robust_is_the_least_over_beliefs() -> None:
    """−κ log E[e^{−r/κβ}] = min_Q E_Q[r]/β + κ KL(Q‖p), by optimising over all Q on the members."""
    kappa, r = 0.6, MEMBERS[0].numpy()
    size = len(r)

    def cost(logits: np.ndarray) -> float:
        q = np.exp(logits - np.logaddexp.reduce(logits))
        return float((q * r).sum() / BETA + kappa * (q * np.log(q * size)).sum())

    best = optimize.minimize(cost, np.zeros(size), method="BFGS", tol=1e-12).fun
    close(Robust(kappa).log_factor(Members(MEMBERS[:1]), BETA), [best], 1e-8)
    grid = np.stack(np.meshgrid(*[np.linspace(-4, 4, 33)] * size), -1).reshape(-1, size)
    assert min(cost(logits) for logits in grid[::7]) >= best - 1e-12


@pytest.mark.parametrize("belief", [Members(MEMBERS), Gaussian(MEANS, SPREADS)], ids=["members", "gaussian"])
def test_limits_of_kappa(belief: Members | Gaussian) -> None:
    """κ → ∞ is the mean, with an error of s²/2κβ² that is told exactly; κ → 0 the worst member."""
    for kappa in (1e4, 1e8, 1e12):
        value = Robust(kappa).log_factor(belief, BETA)
        gap = belief.mean / BETA - value
        spread = belief.spread if isinstance(belief, Gaussian) else belief.values.std(1, correction=0)
        assert float((gap - spread**2 / (2 * kappa * BETA**2)).abs().max()) < max(1e-11, 30 / kappa**1.5)
    if isinstance(belief, Members):
        worst = belief.values.amin(1) / BETA
        gaps = Robust(1e-6).log_factor(belief, BETA) - worst
        assert bool((gaps >= -EXACT).all())
        assert float(gaps.max()) < 1e-6 * math.log(3) + EXACT


@pytest.mark.parametrize("mean", [-200.0, -20.0, -3.0, 0.0, 0.4, 8.0])
@pytest.mark.parametrize("spread", [1e-3, 0.5, 2.0, 11.0, 60.0])
def test_moderated_is_right_as_a_logarithm(mean: float, spread: float) -> None:
    """Against adaptive quadrature in the logarithm, where the integrand is largest."""
    got = float(Moderated().log_factor(Gaussian(row(mean), row(spread)), 1.0))

    def log_integrand(z: np.ndarray) -> np.ndarray:
        return -z * z / 2 - np.log(2 * np.pi) / 2 - np.logaddexp(0, -(mean + spread * z))

    grid = np.linspace(-80, 80, 400_001)
    peak = log_integrand(grid).max()
    corner = -mean / spread  # where σ turns
    edges = sorted(
        {
            -80.0,
            80.0,
            *np.clip([corner + k / spread for k in (-40, -4, 0, 4, 40)], -80, 80),
            *np.clip(grid[log_integrand(grid).argmax()] + np.array([-9.0, -1.0, 0.0, 1.0, 9.0]), -80, 80),
        }
    )
    parts = [
        integrate.quad(lambda z: np.exp(log_integrand(z) - peak), a, b, epsabs=0, epsrel=1e-13, limit=400)[0]
        for a, b in itertools.pairwise(edges)
    ]
    assert got == pytest.approx(peak + math.log(math.fsum(parts)), rel=1e-9, abs=1e-9)


def test_moderated_without_spread_is_sigmoid() -> None:
    belief = Gaussian(MEANS, torch.zeros(4))
    close(Moderated().log_factor(belief, BETA), torch.nn.functional.logsigmoid(MEANS / BETA))


def test_the_probit_approximation_is_bad_in_log_phi() -> None:
    """The known wrong variant: within .02 everywhere as a probability, off by many nats as a logarithm."""
    mean, spread = torch.linspace(-30, 30, 61).double(), torch.full((61,), 2.0).double()
    right = Moderated().log_factor(Gaussian(mean, spread), 1.0)
    probit = torch.nn.functional.logsigmoid(mean / (1 + math.pi * spread**2 / 8).sqrt())
    assert float((probit.exp() - right.exp()).abs().max()) < 0.02
    assert float((probit - right).abs().max()) > 5


def test_who_treads_lightly() -> None:
    """How log φ changes with spread, at every mean; `Moderated` changes side at m = 0 and becomes `Marginal`."""
    means = torch.tensor([-40.0, -2.0, 2.0, 6.0]).double()

    def change(attitude: Mean) -> Tensor:
        narrow, wide = (attitude.log_factor(Gaussian(means, torch.full((4,), s)), 1.0) for s in (0.5, 1.5))
        return wide - narrow

    for attitude in (Robust(0.8), LowerBound(0.5), Quantile(0.2)):
        assert bool((change(attitude) < 0).all())
    assert bool((change(Marginal()) > 0).all())
    assert bool((change(Mean()) == 0).all())
    assert (change(Moderated()) > 0).tolist() == [True, True, False, False]
    close(change(Moderated())[:1], change(Marginal())[:1], 1e-8)


# Each with its support; of the uniform one it differs between the rows.
LAWS: dict[str, tuple[d.Distribution, float | None, float | None]] = {
    "normal": (d.Normal(row(0.3, -1), row(0.5, 2)), -math.inf, math.inf),
    "laplace": (d.Laplace(row(0.3, -1), row(0.2, 0.4)), -math.inf, math.inf),
    "gamma": (d.Gamma(row(0.7, 3), row(4, 5)), 0, math.inf),
    "exponential": (d.Exponential(row(4, 6)), 0, math.inf),
    "gumbel": (d.Gumbel(row(0.3, -1), row(0.2, 0.4)), -math.inf, math.inf),
    "half-normal": (d.HalfNormal(row(0.5, 2)), 0, math.inf),
    "uniform": (d.Uniform(row(-1, 0), row(2, 1e-4)), None, None),
    "beta": (d.Beta(row(0.3, 5), row(2, 0.4)), 0, 1),
    "mixture": (
        d.MixtureSameFamily(
            d.Categorical(torch.stack([row(0.2, 0.8), row(0.5, 0.5)])),
            d.Normal(torch.stack([row(0, 3), row(-1, 1)]), torch.stack([row(0.5, 1), row(2, 0.1)])),
        ),
        -math.inf,
        math.inf,
    ),
    "affine": (
        d.TransformedDistribution(d.Gamma(row(2, 3), row(4, 5)), [d.AffineTransform(1.0, -0.5)]), -math.inf, 1.0,
    ),
}  # fmt: skip


def expected(name: str, which: int, of: Callable[[float], float]) -> float:
    """E[f(r)] of one row, by adaptive quadrature."""
    law, low, high = LAWS[name]
    if isinstance(law, d.Beta):  # whose density may be infinite at the ends
        a, b = float(law.concentration1[which]), float(law.concentration0[which])
        weighted, _ = integrate.quad(of, 0, 1, weight="alg", wvar=(a - 1, b - 1), epsabs=1e-14, epsrel=1e-12)
        return weighted / special.beta(a, b)
    if low is None or high is None:
        low, high = (float(end[which]) for end in (law.support.lower_bound, law.support.upper_bound))

    def integrand(r: float) -> float:
        at = Distributed(law).mean.clone()  # the other row stays inside its support
        at[which] = r
        return of(r) * math.exp(float(law.log_prob(at)[which]))

    points = np.clip([-30, -5, -2, -1, 0, 1, 2, 5, 30], max(low, -200), min(high, 200))
    edges = sorted({max(low, -200.0), min(high, 200.0), *map(float, points)})
    return math.fsum(integrate.quad(integrand, a, b, epsabs=1e-14, epsrel=1e-12, limit=300)[0]
                     for a, b in itertools.pairwise(edges))  # fmt: skip


@pytest.mark.parametrize("name", list(LAWS))
@pytest.mark.parametrize("beta", [0.7, 5.0])
def test_closed_forms_of_laws(name: str, beta: float) -> None:
    belief = Distributed(LAWS[name][0])
    for which in (0, 1):
        ahead = math.log(expected(name, which, lambda r: math.exp(r / beta)))
        assert float(Marginal().log_factor(belief, beta)[which]) == pytest.approx(ahead, rel=1e-7, abs=1e-8)
        behind = -2 * math.log(expected(name, which, lambda r: math.exp(-r / (2 * beta))))
        assert float(Robust(2.0).log_factor(belief, beta)[which]) == pytest.approx(behind, rel=1e-7, abs=1e-8)


@pytest.mark.parametrize("name", ["normal", "beta", "mixture"])
def test_moderated_of_laws(name: str) -> None:
    value = Moderated().log_factor(Distributed(LAWS[name][0]), 0.5)
    for which in (0, 1):
        right = math.log(expected(name, which, lambda r: 1 / (1 + math.exp(-r / 0.5))))
        assert float(value[which]) == pytest.approx(right, rel=1e-8, abs=1e-9)


@pytest.mark.parametrize("attitude", ATTITUDES, ids=lambda a: type(a).__name__)
def test_a_finite_support_is_its_members(attitude: Mean) -> None:
    """Two equally likely outcomes are an ensemble of two, and a Pyro law is read as the torch law that it is."""
    import pyro.distributions as pyro_dist

    if isinstance(attitude, LowerBound | Quantile):
        law: d.Distribution = pyro_dist.Normal(MEANS, SPREADS)
        close(attitude.log_factor(Distributed(law), BETA), attitude.log_factor(Gaussian(MEANS, SPREADS), BETA))
        return
    coin = Distributed(d.Bernoulli(torch.tensor([0.5, 0.5]).double()))
    members = Members(torch.tensor([[0.0, 1.0]] * 2).double())
    close(attitude.log_factor(coin, BETA), attitude.log_factor(members, BETA))


def test_quantiles_of_a_finite_support() -> None:
    """The smallest value that is not exceeded with probability t, reached at equality too."""
    law = Distributed(d.Binomial(4, torch.tensor([0.5, 0.9]).double()))
    for level in (0.01, 0.0625, 0.3125, 0.5, 0.99):
        wanted = [stats.binom.ppf(level, 4, p) for p in (0.5, 0.9)]
        close(law.quantile(level), wanted)


@pytest.mark.parametrize("attitude", ATTITUDES, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize(
    "belief",
    [Members(MEMBERS), Gaussian(MEANS[:3], SPREADS[:3]), Distributed(d.Normal(MEANS[:3], SPREADS[:3]))],
    ids=["members", "gaussian", "law"],
)
def test_a_shift_moves_all_but_moderated_alike(attitude: Mean, belief: Members | Gaussian | Distributed) -> None:
    by = torch.tensor([0.4, -2.0, 7.0]).double()
    moved = attitude.log_factor(belief.shifted(by), BETA)
    if isinstance(attitude, Moderated):
        inner = Gaussian(belief.mean, belief.spread) if not isinstance(belief, Members) else belief
        close(moved, attitude.log_factor(inner.shifted(by), BETA))
    else:
        close(moved, attitude.log_factor(belief, BETA) + by / BETA)


@pytest.mark.parametrize(
    ("law", "attitude", "told"),
    [
        (d.StudentT(torch.tensor([5.0])), Marginal(), r"right tail is too heavy"),
        (d.StudentT(torch.tensor([5.0])), Robust(1.0), r"left tail is too heavy"),
        (d.Exponential(torch.tensor([0.5])), Marginal(), r"infinite at beta=1"),
        (d.Laplace(torch.tensor([0.0]), torch.tensor([2.0])), Robust(1.0), r"raise kappa"),
        (d.LogNormal(torch.tensor([0.0]), torch.tensor([1.0])), Marginal(), r"infinite"),
        (d.Gumbel(torch.tensor([0.0]), torch.tensor([1.5])), Marginal(), r"infinite"),
        (
            d.LogNormal(torch.tensor([0.0]), torch.tensor([1.0])),
            Robust(1.0),
            r"not known in closed form for a LogNormal",
        ),
        (d.Cauchy(torch.tensor([0.0]), torch.tensor([1.0])), Mean(), r"no finite mean"),
        (d.Gamma(torch.tensor([1.0]), torch.tensor([1.0])), Quantile(0.5), r"a quantile is not known in closed form"),
        (d.Gamma(torch.tensor([1.0]), torch.tensor([1.0])), Moderated(), r"return draws from it as an ensemble"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_a_law_cannot_say_is_told(law: d.Distribution, attitude: Mean, told: str) -> None:
    with pytest.raises(FactorError, match=told):
        attitude.log_factor(Distributed(law), 1.0)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Robust(0.0), "kappa=0"),
        (lambda: Robust(math.inf), "kappa=inf"),
        (lambda: Robust("2"), "kappa='2'"),
        (lambda: Quantile(1.0), "between 0 and 1"),
        (lambda: LowerBound(math.nan), "k=nan"),
    ],
    ids=["kappa 0", "kappa inf", "kappa text", "level 1", "k nan"],
)
def test_options_out_of_range(make: Callable[[], object], told: str) -> None:
    with pytest.raises(ModelError, match=told):
        make()


@pytest.mark.parametrize("attitude", ATTITUDES, ids=lambda a: type(a).__name__)
def test_the_bound_is_respected(attitude: Mean) -> None:
    members = Members(MEMBERS)
    bound = attitude.upper(float(MEMBERS.max()), BETA)
    assert bool((attitude.log_factor(members, BETA) <= bound + EXACT).all())
    assert LowerBound(-1.0).upper(0.0, BETA) == math.inf
