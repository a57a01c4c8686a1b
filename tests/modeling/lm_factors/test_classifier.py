"""Classifier: its form for prefixes by hand and by exact laws, its gradient, its costs, and the engines that use it."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor, nn

import lmppl
from lmppl.errors import UnsupportedModel
from lmppl.lm.randomness import Source
from lmppl.lm.transformers import TransformersLM
from lmppl.modeling.evidence.lm_factors.classifier import HeadOnMean
from lmppl.modeling.soft import SoftStep
from lmppl.modeling.target import Target
from lmppl.testing import check_factor
from tests.inference.smc_cases import Law, brute_of, small_lm, sweep_law
from tests.lm.random_models import random_lm
from tests.modeling.lm_factors.by_hand import states_agree, walk
from tests.models import TOLERANCE, all_outcomes, brute_force, enumerable_lm

NETWORKS = pytest.mark.parametrize("kind", ["llama", "mistral"])


def head_of(outputs: int = 1, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(16, outputs, dtype=torch.float64).eval()


def factor_of(outputs: int = 3) -> lmppl.Classifier:
    return lmppl.Classifier(head_of(outputs), label=None if outputs == 1 else 1)


@torch.no_grad()
def log_class(lm: TransformersLM, context: int, row: list[int], outputs: int = 3) -> float:
    """log p(a|·) of the mean state after each token of `row`, from prefills; of no token, the context's."""
    where = torch.tensor([context])
    steps = [lm.decoder().prefill(where, torch.tensor([row[:t]]))[0] for t in range(1, len(row) + 1)]
    steps = steps or [lm.decoder().prefill(where)[0]]
    scores = head_of(outputs)(torch.stack([step.hidden[0, -1] for step in steps]).mean(0))
    return float(nn.functional.logsigmoid(scores)[0] if outputs == 1 else torch.log_softmax(scores, -1)[1])


@NETWORKS
@pytest.mark.parametrize("outputs", [1, 3])
def test_the_form_obeys_its_law(kind: str, outputs: int) -> None:
    report = check_factor(factor_of(outputs), enumerable_lm(kind), num_sequences=40, tolerance=1e-6)
    assert "potential(start) + Σ weigh = potential(final) = log φ" in report.held


@NETWORKS
def test_prefixes_are_judged_one_token_later(kind: str) -> None:
    """ψ(x_≤t) = p(a|x_<t) of rows that go on, φ at their end; all tokens that go on weigh the same."""
    lm = enumerable_lm(kind)
    form = factor_of().bind(lm).incremental
    context, rows = torch.tensor([0, 1, 1]), torch.tensor([[0, 1], [1, 2], [2, 0]])
    states_agree(form, lm, context, torch.cat([rows, rows[:, :1]], 1)[:, :2], 1e-6)
    for t in range(3):
        state = walk(form, lm, context, rows[:, :t])
        for i, c in enumerate(context.tolist()):
            row = rows[i, :t].tolist()
            before, now = log_class(lm, c, row[:-1]), log_class(lm, c, row)
            assert float(form.potential(state)[i]) == pytest.approx(before if t else now, abs=1e-6)
            weights = form.weigh(state, None)[i].tolist()
            assert weights[4] == pytest.approx(log_class(lm, c, [*row, 4]) - before, abs=1e-6)  # EOS
            if t < 2:
                assert weights[:4] == pytest.approx([now - before] * 4, abs=1e-6)
            else:  # the cap: every token is the last
                after = [log_class(lm, c, [*row, v]) for v in range(4)]
                assert weights[:4] == pytest.approx([a - before for a in after], abs=1e-6)


@NETWORKS
@pytest.mark.parametrize("proposal", ["prior", "optimal"])
def test_smc_is_unbiased(kind: str, proposal: str) -> None:
    """E Ẑ = Z and E[Ẑ Σ W̄ 1[x]] = γ(x), over every outcome of whole sweeps of two particles."""
    model = small_lm(kind) * factor_of()
    brute = brute_of(model, 1)
    law = Law(brute, sweep_law(Target(model), lmppl.SMC(2, ess_threshold=1.0, proposal=proposal), 1))
    assert math.isclose(law.mean_z, float(brute.log_z.exp()), abs_tol=1e-6)
    assert torch.allclose(law.mean_mass, brute.log_gamma.exp(), rtol=0, atol=1e-6)


def test_rows_wait_for_each_other() -> None:
    """Rounds of several tokens, after which rows of different lengths are read anew."""
    model = small_lm("llama") * factor_of()
    brute = brute_of(model, 1)
    law = Law(brute, sweep_law(Target(model), lmppl.SMC(2, ess_threshold=1.0, every=re.compile("a")), 1))
    assert torch.allclose(law.mean_mass, brute.log_gamma.exp(), rtol=0, atol=1e-6)


ENGINES = {
    "rejection": lmppl.Rejection(),
    "importance": lmppl.Importance(4000),
    "smc": lmppl.SMC(64),
    "mcmc": lmppl.MCMC(num_chains=200, warmup=20, num_steps=10),
    "guided": None,  # importance, from the law that the form steers
    "pplm": None,
}


@pytest.mark.parametrize("name", list(ENGINES))
def test_engines_agree_with_enumeration(name: str) -> None:
    """TV of 2,000 draws from π* at most 0.1: of an exact sample of as many it exceeds 0.07 once in a thousand."""
    lm = enumerable_lm("llama")
    model = lm * factor_of()
    engine = ENGINES[name]
    if engine is None:
        steered = lmppl.WeightedDecoding() if name == "guided" else lmppl.PPLM(num_steps=1)
        engine = lmppl.Importance(2000, proposal=steered.language_model(model))
    found = lmppl.infer(model, engine, num_draws=2000, seed=3, progress=False)
    for context in range(2):
        brute = brute_force(model, context)
        number = {key: i for i, key in enumerate(brute.sequences.keys())}
        draws = found.draws.select(found.draws.context == context)
        rows = torch.tensor([number[key] for key in draws.keys()])  # noqa: SIM118 - a method
        share = torch.zeros(len(number), dtype=torch.float64).index_add_(0, rows, draws.weights)
        assert 0.5 * float((share - brute.log_posterior.exp()).abs().sum()) < 0.1


def test_a_twist_costs_no_forward() -> None:
    """A sweep makes the forwards that it makes without the form, and one pass over the texts that end in a round."""
    lm = enumerable_lm("llama")

    def swept(model: lmppl.Model) -> tuple[lmppl.Cost, int]:
        target = Target(model)
        source = Source(torch.Generator().manual_seed(0))
        smc = lmppl.SMC(64, proposal="prior", ess_threshold=0.0)
        draws = smc.sweep(target, torch.tensor([0]), source).draws
        return target.cost, len(set(draws.keys()))

    alone, _ = swept(lm * lmppl.Reward(lambda texts: [0.0] * len(texts), name="nothing"))
    both, distinct = swept(lm * factor_of())
    assert 0 < both.lm_forwards - alone.lm_forwards <= 2 * lm.max_new_tokens
    assert both.factor_calls == distinct


def test_the_states_of_a_text_are_read_once() -> None:
    target = Target(enumerable_lm("llama") * factor_of())
    rows = all_outcomes(enumerable_lm("llama"), 0)
    target.log_factors(rows)
    spent = target.cost.copy()
    assert spent.factor_calls == len(rows)
    target.log_factors(rows)
    assert (target.cost.lm_forwards, target.cost.cache_hits) == (spent.lm_forwards, len(rows))


@pytest.mark.parametrize("outputs", [1, 3])
def test_the_gradient_of_the_soft_form_is_that_of_finite_differences(outputs: int) -> None:
    soft = factor_of(outputs).soft(enumerable_lm("llama"))
    torch.manual_seed(1)
    mean = torch.randn(2, 16, dtype=torch.float64, requires_grad=True)

    def value(hidden: Tensor) -> Tensor:
        return soft(SoftStep(torch.zeros(2, 5, dtype=torch.float64), hidden, hidden)).sum()

    (gradient,) = torch.autograd.grad(value(mean), mean)
    for i, j in ((0, 0), (1, 7), (0, 15)):
        shift = torch.zeros_like(mean)
        shift[i, j] = 1e-5
        with torch.no_grad():
            slope = (value(mean + shift) - value(mean - shift)) / 2e-5
        assert float(gradient[i, j]) == pytest.approx(float(slope), abs=1e-8)


def test_an_lm_without_hidden_states_is_refused() -> None:
    model = enumerable_lm("tabular") * factor_of()
    for engine in (lmppl.SMC(8), lmppl.Importance(8)):
        with pytest.raises(UnsupportedModel, match="gives no hidden states"):
            lmppl.infer(model, engine, seed=0, progress=False)


def test_a_guided_law_with_another_head_is_another() -> None:
    lm = random_lm("llama")
    one, other = (lm * lmppl.Classifier(head_of(3, seed), label=1) for seed in (0, 1))
    prints = [lmppl.WeightedDecoding().language_model(m).fingerprint for m in (one, other)]
    assert prints[0] != prints[1]
    assert one.spec_hash != other.spec_hash
    assert isinstance(one.factors[0].features[0].fn, HeadOnMean)
    assert abs(float(brute_force(one, 0).log_z) - float(brute_force(other, 0).log_z)) > TOLERANCE
