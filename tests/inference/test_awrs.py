"""Adaptive weighted rejection: proper weights by walking every outcome, mutants that are not, and few checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from lmppl.errors import ModelError, ShapeError, UnsupportedModel
from lmppl.inference.awrs import AWRS, WeightedTokens, awrs
from lmppl.inference.run import infer
from lmppl.inference.smc import SMC
from lmppl.inference.step_proposals import StepProposal, StepRows
from lmppl.lm import LM
from lmppl.lm.frontier import Frontier
from lmppl.lm.randomness import Source
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence import Constraint, Reward
from lmppl.modeling.target import Target
from lmppl.testing.enumeration import every_outcome
from tests.inference.smc_cases import Law, brute_of, small_lm, sweep_law
from tests.models import ENUMERABLE, TOLERANCE, enumerable_lm, has_no, wavy

LAWS = {
    "skewed": [0.5, 0.05, 0.3, 0.15],
    "flat": [0.25, 0.25, 0.25, 0.25],
    "with a zero": [0.6, 0.0, 0.1, 0.3],
}
ALLOWED = {"two": [1, 3], "one": [2], "all": [0, 1, 2, 3], "none": [], "the likely one": [0]}


def log_law(probs: Sequence[float]) -> Tensor:
    return torch.tensor([probs], dtype=torch.float64).log()


def among(tokens: Sequence[int]) -> Callable[[Tensor, Tensor], Tensor]:
    wanted = torch.tensor(tokens, dtype=torch.int64)
    return lambda rows, drawn: torch.isin(drawn, wanted)


def expected_weights(run: Callable[[Source], WeightedTokens], vocab: int) -> Tensor:
    """(V,) E[Ŵ 1[x = v]] of the first row, over the whole tree of choices."""
    total, mass = torch.zeros(vocab, dtype=torch.float64), 0.0
    for probability, found in every_outcome(run):
        total[found.tokens[0]] += probability * float(found.log_weights[0].exp())
        mass += probability
    assert mass == pytest.approx(1.0, abs=1e-12)
    return total


VARIANTS = {
    "adaptive": {},
    "two further draws": {"extra": 2},
    "many further draws": {"extra": 5},
    "budget 1": {"max_checks": 1},
    "budget 2": {"max_checks": 2},
    "budget 3, two further": {"max_checks": 3, "extra": 2},
    "geometric": {"replacement": True, "max_checks": 4},
    "geometric, budget 1": {"replacement": True, "max_checks": 1},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize(
    ("law", "allowed"),
    [*(("skewed", allowed) for allowed in ALLOWED), ("flat", "two"), ("with a zero", "two"), ("with a zero", "one")],
)
def test_the_weighted_token_is_proper(law: str, allowed: str, options: dict) -> None:
    log_probs, good = log_law(LAWS[law]), ALLOWED[allowed]
    found = expected_weights(lambda source: awrs(log_probs, among(good), source, **options), 4)
    wanted = torch.zeros(4, dtype=torch.float64)
    wanted[good] = log_probs[0, good].exp()
    assert torch.allclose(found, wanted, atol=TOLERANCE, rtol=0)


def test_rows_of_one_batch_are_proper_together() -> None:
    log_probs = torch.cat([log_law([0.5, 0.2, 0.3]), log_law([0.1, 0.6, 0.3])])
    good = torch.tensor([[True, False, True], [False, True, False]])
    total = torch.zeros(2, 3, dtype=torch.float64)
    for probability, found in every_outcome(lambda source: awrs(log_probs, lambda r, t: good[r, t], source)):
        total[[0, 1], found.tokens] += probability * found.log_weights.exp()
    assert torch.allclose(total, log_probs.exp() * good, atol=TOLERANCE, rtol=0)


def walk(source: Source, log_probs: Tensor, good: Sequence[int]) -> tuple[list[int], list[float]]:
    """Draws without replacement up to one after the first allowed token, and the mass left before each."""
    left, drawn, remaining = log_probs.clone(), [], []
    while True:
        remaining.append(float(left.exp().sum()))
        drawn.append(int(source.tokens(left)[0]))
        left[0, drawn[-1]] = -math.inf
        if (len(drawn) > 1 and drawn[-2] in good) or bool((left == -math.inf).all()):
            return drawn, remaining


def mutant(weight: Callable[[int, bool, float, float, int], float]) -> Callable[..., WeightedTokens]:
    """A sampler that weighs (x, whether y is allowed, mass before y with x, π0(x), tries) in its own way."""

    def run(source: Source, log_probs: Tensor, good: Sequence[int]) -> WeightedTokens:
        drawn, remaining = walk(source, log_probs, good)
        k = next(i for i, v in enumerate(drawn) if v in good)
        known = float(log_probs[0, drawn[k]].exp())
        more = k + 1 < len(drawn)
        accepted = more and drawn[k + 1] in good
        value = weight(drawn[k], accepted, remaining[k + 1] if more else 0.0, known, k + 1)
        return WeightedTokens(torch.tensor([drawn[k]]), torch.tensor([value]).double().log(), torch.tensor([k + 2]))

    return run


MUTANTS = {
    "no adaptive renormalisation": lambda x, ok, left, known, tries: known + ok * (1.0 - known),
    "the first token's mass left out": lambda x, ok, left, known, tries: ok * left,
    "one over the tries": lambda x, ok, left, known, tries: 1.0 / tries,
    "mass left at the first allowed token": lambda x, ok, left, known, tries: left + known,
}


def test_the_walk_of_the_mutants_is_right_with_the_right_weight() -> None:
    log_probs, right = log_law(LAWS["skewed"]), mutant(lambda x, ok, left, known, tries: known + ok * left)
    found = expected_weights(lambda source: right(source, log_probs, [1, 3]), 4)
    assert torch.allclose(found, torch.tensor([0, 0.05, 0, 0.15]).double(), atol=TOLERANCE)


@pytest.mark.parametrize("weight", MUTANTS.values(), ids=MUTANTS)
def test_mutants_are_not_proper(weight) -> None:
    log_probs, wrong = log_law(LAWS["skewed"]), mutant(weight)
    found = expected_weights(lambda source: wrong(source, log_probs, [1, 3]), 4)
    assert float((found - torch.tensor([0, 0.05, 0, 0.15]).double()).abs().max()) > 1e-3


def test_one_over_the_tries_of_the_geometric_variant_is_not_proper() -> None:
    """1/n at the first allowed token has mean −p log p/(1 − p), not p."""

    def run(source: Source) -> WeightedTokens:
        found = awrs(log_law(LAWS["skewed"]), among([1, 3]), source, replacement=True, max_checks=5)
        tries = (1 / found.log_weights.exp()).floor() + 1
        return found._replace(log_weights=-tries.log())

    wanted = torch.tensor([0, 0.05, 0, 0.15]).double()
    assert float((expected_weights(run, 4) - wanted).abs().max()) > 1e-3


# What it costs, and what it says.


def seeded(seed: int = 0) -> Source:
    return Source(torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("replacement", [False, True])
def test_checks_are_counted_and_few(replacement: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    log_probs = torch.log_softmax(2.0 * torch.randn(64, 500, generator=generator, dtype=torch.float64), -1)
    good = torch.rand(64, 500, generator=generator) < 0.5
    asked = []

    def allowed(rows: Tensor, tokens: Tensor) -> Tensor:
        asked.append((rows, tokens))
        return good[rows, tokens]

    found = awrs(log_probs, allowed, seeded(), replacement=replacement)
    assert int(found.checks.sum()) == sum(len(rows) for rows, _ in asked)
    assert float(found.checks.double().mean()) < (4.0 if not replacement else 6.0)  # of 500 tokens
    assert bool(good[torch.arange(64), found.tokens].all())
    if not replacement:
        pairs = [pair for rows, tokens in asked for pair in zip(rows.tolist(), tokens.tolist(), strict=True)]
        assert len(set(pairs)) == len(pairs)


def test_the_adaptive_variant_has_less_variance_than_the_geometric_one() -> None:
    log_probs = log_law(LAWS["skewed"])
    p, second = 0.2, {}
    for name, options in (("adaptive", {}), ("geometric", {"replacement": True, "max_checks": 5})):
        outcomes = every_outcome(lambda source, o=options: awrs(log_probs, among([1, 3]), source, **o))
        second[name] = sum(q * float(found.log_weights[0].exp()) ** 2 for q, found in outcomes)
    assert p**2 < second["adaptive"] < second["geometric"]


def test_more_further_draws_lower_the_variance() -> None:
    log_probs, variances = log_law([0.3, 0.25, 0.2, 0.15, 0.1]), []
    for extra in (1, 2, 3):
        outcomes = every_outcome(lambda source, e=extra: awrs(log_probs, among([1, 3, 4]), source, extra=e))
        variances.append(sum(q * (float(f.log_weights[0].exp()) - 0.5) ** 2 for q, f in outcomes))
    assert variances[0] > variances[1] > variances[2]


def test_weights_lie_between_the_token_and_the_mass_left() -> None:
    log_probs = torch.log_softmax(torch.randn(200, 30, generator=torch.Generator().manual_seed(1)), -1)
    found = awrs(log_probs, lambda rows, tokens: tokens % 3 == 0, seeded(2))
    weight = found.log_weights.exp()
    assert bool((weight >= log_probs.gather(1, found.tokens[:, None])[:, 0].double().exp() - 1e-6).all())
    assert bool((weight <= 1.0 + 1e-6).all())


def test_where_everything_is_allowed_nothing_varies() -> None:
    log_probs = torch.log_softmax(torch.randn(50, 30, generator=torch.Generator().manual_seed(1)).double(), -1)
    found = awrs(log_probs, lambda rows, tokens: tokens >= 0, seeded())
    assert torch.allclose(found.log_weights, torch.zeros(50).double(), atol=1e-12)
    assert found.checks.tolist() == [2] * 50


def test_where_nothing_is_allowed_the_weight_is_zero_after_all_tokens() -> None:
    log_probs = torch.cat([log_law(LAWS["skewed"]), log_law(LAWS["with a zero"])])
    found = awrs(log_probs, lambda rows, tokens: tokens < 0, seeded())
    assert found.log_weights.tolist() == [-math.inf] * 2
    assert found.checks.tolist() == [4, 3]
    assert awrs(log_probs, lambda r, t: t < 0, seeded(), max_checks=2).checks.tolist() == [2, 2]


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ShapeError, match=r"expected \(B, V\)"):
        awrs(torch.zeros(3), among([0]), seeded())
    with pytest.raises(ModelError, match="extra=0"):
        awrs(log_law(LAWS["flat"]), among([0]), seeded(), extra=0)
    with pytest.raises(ModelError, match="max_checks=0"):
        awrs(log_law(LAWS["flat"]), among([0]), seeded(), max_checks=0)
    with pytest.raises(ShapeError, match="allowed returned"):
        awrs(log_law(LAWS["flat"]), lambda rows, tokens: tokens.double(), seeded())


# As a step proposal.


def rows_after_context(lm_kind: str, weigh) -> StepRows:
    lm = enumerable_lm(lm_kind)
    return StepRows(Frontier(lm, torch.arange(lm.num_contexts)), weigh)


@pytest.mark.parametrize(
    ("kind", "options"), [("tabular", {}), *((kind, {"max_checks": 2}) for kind in ENUMERABLE)], ids=str
)
def test_increments_are_proper_for_the_prior_times_the_twist(kind: str, options: dict) -> None:
    vocab = enumerable_lm(kind).vocab_size
    ratio = torch.linspace(-1.0, 0.5, 2 * vocab, dtype=torch.float64).view(2, vocab)
    ratio[0, 1] = ratio[1, 0] = ratio[1, 2] = -math.inf

    def weigh(candidates: Tensor | None, index: Tensor | None = None) -> Tensor:
        some = ratio if index is None else ratio[index]
        return some if candidates is None else some.gather(1, candidates)

    rows = rows_after_context(kind, weigh)
    total = torch.zeros(2, vocab, dtype=torch.float64)
    sampler = AWRS(**options).start(None, rows.frontier)
    for probability, found in every_outcome(lambda source: sampler.propose(rows, source)):
        total[[0, 1], found.tokens] += probability * found.log_increment.exp()
        dead = found.log_increment == -math.inf
        picked = ratio.gather(1, found.tokens[:, None])[:, 0]
        assert bool((dead | (found.weigh == picked)).all())
    wanted = (rows.log_prior.double() + ratio).exp()
    assert torch.allclose(total, wanted, atol=TOLERANCE, rtol=0)


def test_without_a_twist_it_is_the_prior() -> None:
    rows = rows_after_context("tabular", None)
    for _, found in every_outcome(lambda source: AWRS().start(None, rows.frontier).propose(rows, source)):
        assert found.log_increment.tolist() == [0.0, 0.0]
        assert torch.equal(found.log_prior, rows.log_prior.gather(1, found.tokens[:, None])[:, 0])


def test_given_tokens_are_refused() -> None:
    rows = rows_after_context("tabular", lambda candidates: torch.zeros(2, 1))
    rows.given = torch.tensor([-1, 2])
    with pytest.raises(UnsupportedModel, match="conditional SMC"):
        AWRS().start(None, rows.frontier).propose(rows, seeded())


def test_it_is_a_step_proposal() -> None:
    assert isinstance(AWRS(), StepProposal)


# In sequential Monte Carlo.


class Unweighted(AWRS):
    """A mutant that takes the allowed mass for 1."""

    def start(self, target: Target, frontier: Frontier):
        sampler = super().start(target, frontier)
        propose = sampler.propose

        def ignoring(rows: StepRows, source: Source):
            found = propose(rows, source)
            return found._replace(log_increment=found.weigh)

        sampler.propose = ignoring
        return sampler


def law_of(kind: str, proposal: AWRS, context: int, particles: int = 1) -> Law:
    model = small_lm(kind) * Reward(wavy, beta=0.4) * Constraint(has_no("b"), prefix_closed=True)
    smc = SMC(particles, proposal=proposal, ess_threshold=1.0)
    return Law(brute_of(model, context), sweep_law(Target(model), smc, context))


@pytest.mark.parametrize(
    ("kind", "context", "particles", "options"),
    [("tabular", 0, 2, {"max_checks": 2}), ("tabular", 1, 1, {}), ("llama", 1, 1, {}), ("mistral", 0, 1, {})],
)
def test_sweeps_that_use_it_are_unbiased(kind: str, context: int, particles: int, options: dict) -> None:
    law = law_of(kind, AWRS(**options), context, particles)
    assert law.total == pytest.approx(1.0, abs=1e-10)
    assert law.mean_z == pytest.approx(float(law.brute.log_z.exp()), abs=TOLERANCE)
    assert torch.allclose(law.mean_mass, law.brute.log_gamma.exp(), rtol=0, atol=TOLERANCE)


def test_sweeps_that_ignore_the_estimate_are_biased() -> None:
    law = law_of("tabular", Unweighted(), 0)
    assert float((law.mean_mass - law.brute.log_gamma.exp()).abs().max()) > 1e-3


def test_a_run_asks_about_few_tokens() -> None:
    asked: list[str] = []

    def without_letters(texts: list[str]) -> list[bool]:
        asked.extend(texts)
        return [not set(t) & set("xyzq") for t in texts]

    lm = LM("tiny", context="The film", max_new_tokens=6)
    model = lm * Constraint(without_letters, prefix_closed=True)
    result = infer(model, SMC(16, proposal=AWRS(), num_sweeps=1), seed=1)
    assert result.cost.factor_calls == len(asked) < 16 * 6 * 6  # of 16 · 6 · V
    assert not any(set(t) & set("xyzq") for t in result.draws.text)
    assert bool((result.draws.log_weight > -math.inf).all())


def test_rows_that_wait_at_words_are_asked_about_apart() -> None:
    """Rows of different lengths have the twist's state in several pieces."""
    lm = TabularLM.random(3, 3, order=2, seed=3, context="a")
    lm = TabularLM(lm.log_table.exp().view(4, 4, 3), ["a", " ", "<eos>"], max_new_tokens=3, context="a")
    model = lm * Reward(wavy, beta=0.4) * Constraint(lambda texts: ["aa" not in t for t in texts], prefix_closed=True)
    smc = SMC(2, proposal=AWRS(max_checks=1), ess_threshold=1.0, every="word")
    law = Law(brute_of(model, 0), sweep_law(Target(model), smc, 0))
    assert law.mean_z == pytest.approx(float(law.brute.log_z.exp()), abs=TOLERANCE)
    assert torch.allclose(law.mean_mass, law.brute.log_gamma.exp(), rtol=0, atol=TOLERANCE)
