"""InfillingFactor: conditioning on the future by hand, prefix by prefix, through engines; costs, zeros, refusals."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

import lmppl
from lmppl.diagnostics.divergences import total_variation
from lmppl.errors import ContextError, FactorError, ModelError
from lmppl.lm.base import LanguageModel
from lmppl.lm.randomness import Source
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.graph import FactorGraph
from lmppl.modeling.target import Target
from lmppl.testing import check_factor
from tests.inference.smc_cases import Law, brute_of, small_lm, sweep_law
from tests.lm.random_models import random_lm
from tests.modeling.lm_factors.by_hand import log_prob, states_agree, token_log_probs
from tests.models import ENUMERABLE, TOLERANCE, all_outcomes, brute_force, enumerable_lm

VISIBLE = 1e-2  # total variation by which a mutant must be wrong
KINDS = pytest.mark.parametrize("kind", ENUMERABLE)
LETTERS = {"a": 0, "b": 1, "c": 2}


def factor_of(name: str, kind: str) -> lmppl.InfillingFactor:
    other = enumerable_lm(kind, seed=1)
    return {
        "prior": lambda: lmppl.InfillingFactor("ba"),
        "one token": lambda: lmppl.InfillingFactor("b"),
        "two futures": lambda: lmppl.InfillingFactor(["a", "cab"]),
        "another lm": lambda: lmppl.InfillingFactor("ab", other | [other.prompts[1]], 0.5),
        "away": lambda: lmppl.InfillingFactor(["a", "ba"], weight=-0.5),
    }[name]()


NAMES = ("prior", "one token", "two futures", "another lm", "away")


def of_future(lm: LanguageModel, context: int, row: list[int], future: str) -> float:
    """log p(future|c, row), from the conditionals of the long row."""
    tokens = [LETTERS[ch] for ch in future]
    return sum(token_log_probs(lm, context, [*row, *tokens])[len(row) :])


def by_hand(factor: lmppl.InfillingFactor, prior: LanguageModel, rows: list[list[int]], context: int) -> Tensor:
    """log φ: the EOS is left out, then comes the future."""
    lm, where = (prior, context) if factor.lm is None else (factor.lm, 0)
    future = factor.futures[min(context, len(factor.futures) - 1)]
    bare = [row[:-1] if row[-1] in prior.eos_ids else row for row in rows]
    values = [factor.weight * of_future(lm, where, row, future) for row in bare]
    return torch.tensor(values, dtype=torch.float64)


@KINDS
@pytest.mark.parametrize("name", NAMES)
def test_the_posterior_conditions_the_long_sequence(kind: str, name: str) -> None:
    """π*(x) ∝ p(x) p(future|x)^a for every outcome, and its log Z, against conditionals of long rows."""
    lm, factor = enumerable_lm(kind), factor_of(name, kind)
    model = lm * factor
    exact = lmppl.infer(model, lmppl.Exact(), progress=False)
    for context in range(2):
        outcomes = all_outcomes(lm, context)
        rows = outcomes.token_lists()
        log_phi = by_hand(factor, lm, rows, context)
        assert float((brute_force(model, context).log_phi - log_phi).abs().max()) < TOLERANCE
        log_prior = torch.tensor([log_prob(lm, context, row) for row in rows], dtype=torch.float64)
        log_z = float((log_prior + log_phi).logsumexp(0))
        assert float(exact.log_normalizer[0].value[context]) == pytest.approx(log_z, abs=TOLERANCE)


def test_it_is_the_law_of_what_stands_before_a_mark() -> None:
    """An LM without EOS: π* of the first two of three tokens is the law of the long LM given that the third is "b"."""
    table = TabularLM.random(3, 3, order=2, seed=4, eos=None, context="a")
    short = table.with_max_new_tokens(2)
    exact = lmppl.infer(short * lmppl.InfillingFactor("b"), lmppl.Exact(), progress=False)
    every = table.enumerate_sequences()
    given = every.ids[:, 2] == 1
    mass: dict[tuple[int, ...], float] = {}
    for row, p in zip(every.ids[given].tolist(), every.log_prior[given].exp().tolist(), strict=True):
        mass[tuple(row[:2])] = p / float(every.log_prior[given].exp().sum())
    q = exact.as_language_model()
    for row, p in mass.items():
        assert float(q.score(short.sequences([list(row)])).exp()) == pytest.approx(p, abs=TOLERANCE)


@KINDS
def test_mutants_are_seen(kind: str) -> None:
    """The EOS kept before the future, the mean over the future's tokens, and another context are other laws."""
    lm = enumerable_lm(kind)
    right = brute_force(lm * factor_of("prior", kind), 1)
    rows = right.sequences.token_lists()
    bare = [row[:-1] if row[-1] in lm.eos_ids else row for row in rows]
    kept = [of_future(lm, 1, row, "ba") for row in rows]
    mean = [of_future(lm, 1, row, "ba") / 2 for row in bare]
    wrong_context = [of_future(lm, 0, row, "ba") for row in bare]
    for mutant in (kept, mean, wrong_context):
        log_law = torch.log_softmax(right.log_prior + torch.tensor(mutant, dtype=torch.float64), 0)
        assert total_variation(right.log_posterior, log_law) > (1e-3 if mutant is wrong_context else VISIBLE)


@KINDS
@pytest.mark.parametrize("name", NAMES)
def test_the_form_obeys_its_law(kind: str, name: str) -> None:
    report = check_factor(factor_of(name, kind), enumerable_lm(kind), num_sequences=40, tolerance=1e-9)
    assert "potential(start) + Σ weigh = potential(final) = log φ" in report.held
    assert "log φ does not depend on the batch" in report.held


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_stop_strings_end_rows(kind: str) -> None:
    """A stop string is part of x, so that the future follows its tokens; LMs that stop elsewhere score alike."""
    lm, other = random_lm(kind, stop="ba"), enumerable_lm(kind, seed=1)
    rows = lm.sequences([[1, 0], [0, 1, 0], [0, 4], [2, 2, 2]])
    assert rows.finished.tolist() == [True, True, True, False]
    for factor in (lmppl.InfillingFactor("ab"), lmppl.LMFactor(other, 0.5)):
        (found,) = Target(lm * factor).log_factors(rows).values()
        for row, value in zip(rows.token_lists(), found.tolist(), strict=True):
            bare = row[:-1] if row[-1] == 4 else row
            future = isinstance(factor, lmppl.InfillingFactor)
            wanted = of_future(lm, 0, bare, "ab") if future else 0.5 * log_prob(other, 0, row)
            assert value == pytest.approx(wanted, abs=TOLERANCE)
        report = check_factor(factor, lm, num_sequences=40, tolerance=1e-9)
        assert "potential(start) + Σ weigh = potential(final) = log φ" in report.held


@KINDS
@torch.no_grad()
def test_prefixes_are_read_from_the_cache(kind: str) -> None:
    """ψ is log p(future|c, x_≤t) of each prefix; states stay as they are, selected and cut."""
    lm, factor = enumerable_lm(kind), factor_of("two futures", kind)
    form = factor.bind(lm).incremental
    context, rows = torch.tensor([0, 1, 1]), torch.tensor([[0, 1, 0], [1, 2, 1], [2, 0, 0]])
    states_agree(form, lm, context, rows, 1e-9)
    state = form.start(context)
    for t in range(3):
        wanted = [of_future(lm, c, rows[i, :t].tolist(), factor.futures[c]) for i, c in enumerate(context.tolist())]
        assert float((form.potential(state) - torch.tensor(wanted, dtype=torch.float64)).abs().max()) < 1e-9
        state = form.advance(state, rows[:, t], None)


@pytest.mark.parametrize("kind", ["tabular", "llama", pytest.param("mistral", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["prior", "one token", "away"])
def test_smc_is_unbiased(kind: str, name: str) -> None:
    """E Ẑ = Z and E[Ẑ Σ W̄ 1[x]] = γ(x), over every outcome of whole sweeps of two particles."""
    lm = small_lm(kind)
    factor = {
        "prior": lmppl.InfillingFactor("ba"),
        "one token": lmppl.InfillingFactor("a", weight=2.0),
        "away": lmppl.InfillingFactor("b", weight=-0.5),
    }[name]
    model = lm * factor
    brute = brute_of(model, 1)
    law = Law(brute, sweep_law(Target(model), lmppl.SMC(2, ess_threshold=1.0), 1))
    assert math.isclose(law.mean_z, float(brute.log_z.exp()), abs_tol=TOLERANCE)
    assert torch.allclose(law.mean_mass, brute.log_gamma.exp(), rtol=0, atol=TOLERANCE)


def test_rows_wait_for_each_other() -> None:
    """Rounds of several tokens, after which rows of different lengths are read anew."""
    model = small_lm("tabular") * lmppl.InfillingFactor("ba")
    brute = brute_of(model, 1)
    law = Law(brute, sweep_law(Target(model), lmppl.SMC(2, ess_threshold=1.0, every=re.compile("a")), 1))
    assert torch.allclose(law.mean_mass, brute.log_gamma.exp(), rtol=0, atol=TOLERANCE)


ENGINES = {
    "rejection": lmppl.Rejection(),
    "importance": lmppl.Importance(4000),
    "smc": lmppl.SMC(64),
    "mcmc": lmppl.MCMC(num_chains=200, warmup=30, num_steps=10),
}


@pytest.mark.parametrize("name", list(ENGINES))
@pytest.mark.parametrize("kind", ["tabular", "mistral"])
def test_engines_agree_with_enumeration(name: str, kind: str) -> None:
    """TV of 2,000 draws from π* at most 0.1: of an exact sample of as many it exceeds 0.07 once in a thousand."""
    lm = enumerable_lm(kind)
    model = lm * lmppl.InfillingFactor("ba", weight=0.5)
    found = lmppl.infer(model, ENGINES[name], num_draws=2000, seed=3, progress=False)
    for context in range(2):
        brute = brute_force(model, context)
        number = {key: i for i, key in enumerate(brute.sequences.keys())}
        draws = found.draws.select(found.draws.context == context)
        rows = torch.tensor([number[key] for key in draws.keys()])  # noqa: SIM118 - a method
        share = torch.zeros(len(number), dtype=torch.float64).index_add_(0, rows, draws.weights)
        assert 0.5 * float((share - brute.log_posterior.exp()).abs().sum()) < 0.1


def test_guided_laws_correct_what_they_steer() -> None:
    """The form may be asked about all V too: importance weights from the guided law give log Z."""
    model = enumerable_lm("llama") * lmppl.InfillingFactor("ba", weight=0.5)
    q = lmppl.WeightedDecoding().language_model(model)
    found = lmppl.infer(model, lmppl.Importance(1000, proposal=q), num_draws=1000, seed=0, progress=False)
    estimate = found.log_normalizer[0]
    for context in range(2):
        gap = float(estimate.value[context]) - float(brute_force(model, context).log_z)
        assert abs(gap) < 5 * float(estimate.standard_error[context])


# What it costs.


def test_the_future_is_read_behind_the_particles_own_tokens() -> None:
    """One forward a round for what is asked about, none for the row that goes on with it, and none for all V."""
    lm = enumerable_lm("llama")
    target = Target(lm * lmppl.InfillingFactor("ba"))
    form = target.factors[0].incremental
    assert "text" in form.needs
    state = form.start(torch.zeros(64, dtype=torch.int64))
    assert (target.cost.lm_forwards, target.cost.lm_tokens) == (2, 2 + 1)  # the context, the first of the future
    tokens = torch.arange(64)[:, None] % 3
    form.weigh(state, tokens)
    assert (target.cost.lm_forwards, target.cost.lm_tokens) == (3, 3 + 3 * 2)
    state = form.advance(state, tokens[:, 0], None)
    assert target.cost.lm_forwards == 3
    form.weigh(state, tokens)
    assert (target.cost.lm_forwards, target.cost.lm_tokens) == (4, 9 + 3 * 2)
    form.weigh(state, torch.full((64, 1), 4))  # EOS: the future behind the prefix is known
    assert target.cost.lm_forwards == 4


@KINDS
def test_a_sweep_reads_each_row_once(kind: str) -> None:
    """Rows that end are scored by what the form has read of them: no forward of their own, and the right log φ."""
    lm, factor = enumerable_lm(kind), factor_of("prior", kind)
    target = Target(lm * factor)
    source = Source(torch.Generator().manual_seed(0))
    draws = lmppl.SMC(64, ess_threshold=0.9).sweep(target, torch.tensor([1]), source).draws
    horizon = lm.max_new_tokens
    assert target.cost.lm_forwards == horizon + 2 + horizon  # the prior; the form's start, and one a round
    assert float((draws.log_factors["infilling"] - by_hand(factor, lm, draws.token_lists(), 1)).abs().max()) < 1e-9


@torch.no_grad()
def test_a_cache_that_cannot_be_cut_is_read_again() -> None:
    """A recurrent state: the form obeys its law there too, at one more forward a token."""
    lm = random_lm("qwen3_next", vocab_size=3, max_new_tokens=2, context=["ab", "b"])
    assert "crop" not in lm.decoder().capabilities
    report = check_factor(lmppl.InfillingFactor("ba"), lm, num_sequences=20, tolerance=1e-5)
    assert "potential(start) + Σ weigh = potential(final) = log φ" in report.held


# Zeros.


def chain(cap: int = 3) -> TabularLM:
    """a → b or a; b → c or end; c → a: the future "c" has probability 0 unless the row ends in b."""
    after = [[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.6, 0.4], [0.6, 0.0, 0.0, 0.4], [0.25] * 4, [0.7, 0.3, 0.0, 0.0]]
    return TabularLM(after, ["a", "b", "c", "<eos>"], max_new_tokens=cap)


@pytest.mark.parametrize("proposal", ["prior", "optimal"])
def test_a_prefix_that_cannot_be_followed_yet_goes_on(proposal: str) -> None:
    """p(future|x_≤t) = 0 of a prefix whose continuations have p > 0: ψ stays positive, and SMC is unbiased."""
    model = chain() * lmppl.InfillingFactor("c")
    report = check_factor(lmppl.InfillingFactor("c"), chain(), tolerance=1e-10)
    assert "a potential of −inf stays −inf" in report.held
    brute = brute_of(model)
    assert bool((brute.log_phi == -math.inf).any())
    law = Law(brute, sweep_law(Target(model), lmppl.SMC(2, ess_threshold=1.0, proposal=proposal)))
    assert math.isclose(law.mean_z, float(brute.log_z.exp()), abs_tol=TOLERANCE)
    assert torch.allclose(law.mean_mass, brute.log_gamma.exp(), rtol=0, atol=TOLERANCE)


def test_a_future_that_must_not_be_impossible() -> None:
    with pytest.raises(FactorError, match=r"factor 'infilling': .*p\(future\|c', x\) of TabularLM is 0 for the text"):
        lmppl.infer(chain() * lmppl.InfillingFactor("c", weight=-1.0), lmppl.SMC(16), seed=0, progress=False)


# Other tokens.


def test_other_tokens_are_read_through_text() -> None:
    prior = TabularLM([0.3, 0.3, 0.2, 0.2], ["a", "b", "ab", "<eos>"], max_new_tokens=3)
    table = TabularLM.random(3, 3, seed=5).log_table.exp().view(4, 3)
    other = TabularLM(table, ["b", "a", "<eos>"], max_new_tokens=9)
    model = prior * lmppl.InfillingFactor("ab", other, 0.5)
    assert model.factors[0].incremental is None
    outcomes = all_outcomes(prior, 0)
    (found,) = Target(model).log_factors(outcomes).values()
    for text, value in zip(outcomes.text, found.tolist(), strict=True):
        row = ["ba".index(ch) for ch in text]
        wanted = 0.5 * sum(token_log_probs(other, 0, [*row, 1, 0])[len(row) :])
        assert value == pytest.approx(wanted, abs=TOLERANCE)


def test_text_after_a_context_and_at_the_beginning() -> None:
    """The embedded LM: the future's tokens are those that its text has there."""
    for context in ("The film was", ""):
        lm = lmppl.LM("tiny", context=context, max_new_tokens=4)
        bound = (lm * lmppl.InfillingFactor(" great.")).factors[0]
        (tokens,) = bound.features[0].fn.futures
        assert lm.decode(lm.with_max_new_tokens(8).sequences([list(tokens)])) == [" great."]


# Declarations.


def test_the_declaration_round_trips() -> None:
    lm, other = enumerable_lm("tabular"), enumerable_lm("tabular", seed=1)
    model = lm * lmppl.InfillingFactor(["a", "cab"]) * lmppl.InfillingFactor("b", other, 0.5, name="other")
    graph = FactorGraph.from_dict(model.graph.to_dict())
    assert graph.required_functions() == ("other",)
    again = graph.to_model(lm, {"other": other})
    assert (again.graph.content_hash(), again.spec_hash) == (model.graph.content_hash(), model.spec_hash)
    rows = all_outcomes(lm, 1)
    for name, value in Target(model).log_factors(rows).items():
        assert torch.equal(Target(again).log_factors(rows)[name], value)
    assert (lm * lmppl.InfillingFactor("a")).spec_hash != (lm * lmppl.InfillingFactor("b")).spec_hash
    assert (lmppl.InfillingFactor("a").upper, lmppl.InfillingFactor("a", weight=-1).upper) == (0.0, math.inf)


def test_what_is_refused() -> None:
    lm = enumerable_lm("tabular")
    for wrong in ("", [], ["a", ""], [3]):
        with pytest.raises(ModelError, match="InfillingFactor: got future="):
            lmppl.InfillingFactor(wrong)
    with pytest.raises(ModelError, match="got weight=0"):
        lmppl.InfillingFactor("a", weight=0)
    with pytest.raises(ModelError, match="got lm=str"):
        lmppl.InfillingFactor("a", "tiny")
    with pytest.raises(ContextError, match="factor 'infilling': it has 3 futures and the prior has 2 contexts"):
        lm * lmppl.InfillingFactor(["a", "b", "c"])
    with pytest.raises(ModelError, match="factor 'infilling': TabularLM cannot write the future 'zebra'"):
        lm * lmppl.InfillingFactor("zebra")
    policy = lmppl.WeightedDecoding().language_model(lm * lmppl.PowerPrior(2.0))
    with pytest.raises(ModelError, match="factor 'infilling': the future is read behind the prior's cap: GuidedLM"):
        policy * lmppl.InfillingFactor("a")
    prefixes = {(): [0.5, 0.5], (0,): [0.5, 0.5]}
    finite = TabularLM.from_prefixes(prefixes, ["a", "<eos>"], max_new_tokens=2)
    with pytest.raises(ModelError, match="can be reached but has no entry"):
        finite * lmppl.InfillingFactor("a")
    with pytest.raises(ContextError, match="window"):
        random_lm("llama", max_new_tokens=58) * lmppl.InfillingFactor("a" * 20)
