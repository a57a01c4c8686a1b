"""LMFactor: products and ratios of LMs by hand, prefix by prefix, through engines; through text; what is refused."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lmppl
from lmppl.diagnostics.divergences import total_variation
from lmppl.errors import ContextError, FactorError, ModelError
from lmppl.lm.base import LanguageModel
from lmppl.lm.randomness import Source
from lmppl.lm.tabular import TabularLM
from lmppl.lm.transformers import TransformersLM
from lmppl.modeling.graph import FactorGraph
from lmppl.modeling.target import Target
from lmppl.modeling.user_functions import evaluate
from lmppl.sequences import Draws
from lmppl.testing import check_factor
from tests.inference.smc_cases import Law, brute_of, small_lm, sweep_law
from tests.lm.random_models import build, random_lm, tokenizer
from tests.modeling.lm_factors.by_hand import log_prob, next_log_probs, states_agree, token_log_probs
from tests.models import ENUMERABLE, TOLERANCE, all_outcomes, brute_force, enumerable_lm, goodness_of_fit

VISIBLE = 1e-2  # nats by which a mutant must be wrong
KINDS = pytest.mark.parametrize("kind", ENUMERABLE)


def persona(kind: str) -> LanguageModel:
    """Another LM on the same tokens, whose two contexts are others than the prior's."""
    return enumerable_lm(kind, seed=1) | (["b", ""] if kind == "tabular" else ["bb", "a"])


def factor_of(name: str, kind: str) -> lmppl.LMFactor:
    lm, plain = persona(kind), enumerable_lm(kind, seed=2)
    return {
        "product": lambda: lmppl.LMFactor(lm),
        "half": lambda: lmppl.LMFactor(lm, 0.5),
        "away": lambda: lmppl.LMFactor(lm, -0.5),
        "persona": lambda: lmppl.LMFactor(lm, 0.7, over=plain),
        "anti-persona": lambda: lmppl.LMFactor(lm, -0.7, over=plain),
        "one context": lambda: lmppl.LMFactor(lm | [lm.prompts[0]], 0.5, over=plain),
    }[name]()


NAMES = ("product", "half", "away", "persona", "anti-persona", "one context")


def by_hand(factor: lmppl.LMFactor, rows: list[list[int]], context: int) -> Tensor:
    """log φ from sums of next-token log-probabilities."""
    lms = [factor.lm] if factor.over is None else [factor.lm, factor.over]
    columns = [[log_prob(lm, min(context, lm.num_contexts - 1), row) for row in rows] for lm in lms]
    values = torch.tensor(columns, dtype=torch.float64)
    return factor.weight * (values[0] - values[1] if len(lms) == 2 else values[0])


@KINDS
@pytest.mark.parametrize("name", NAMES)
def test_the_posterior_is_the_product(kind: str, name: str) -> None:
    """log φ, log Z and π* of every outcome, against probabilities written out."""
    lm, factor = enumerable_lm(kind), factor_of(name, kind)
    model = lm * factor
    exact = lmppl.infer(model, lmppl.Exact(), progress=False)
    for context in range(2):
        outcomes = all_outcomes(lm, context)
        rows = outcomes.token_lists()
        log_phi = by_hand(factor, rows, context)
        assert float((brute_force(model, context).log_phi - log_phi).abs().max()) < TOLERANCE
        log_prior = torch.tensor([log_prob(lm, context, row) for row in rows], dtype=torch.float64)
        log_z = float((log_prior + log_phi).logsumexp(0))
        assert float(exact.log_normalizer[0].value[context]) == pytest.approx(log_z, abs=TOLERANCE)


@KINDS
def test_mutants_are_seen(kind: str) -> None:
    """Means in place of sums, the EOS left out, and the prior's contexts in place of the persona's are other laws."""
    lm, factor = enumerable_lm(kind), factor_of("product", kind)
    other = persona(kind)
    outcomes = all_outcomes(lm, 1)
    rows = outcomes.token_lists()
    mean = [sum(p) / len(p) for p in (token_log_probs(other, 1, row) for row in rows)]
    no_end = [log_prob(other, 1, row[:-1] if row[-1] in lm.eos_ids else row) for row in rows]
    wrong_context = [log_prob(enumerable_lm(kind, seed=1), 1, row) for row in rows]
    right = brute_force(lm * factor, 1)
    for mutant in (mean, no_end, wrong_context):
        log_law = torch.log_softmax(right.log_prior + torch.tensor(mutant, dtype=torch.float64), 0)
        assert total_variation(right.log_posterior, log_law) > VISIBLE


@KINDS
@pytest.mark.parametrize("name", NAMES)
def test_the_form_obeys_its_law(kind: str, name: str) -> None:
    report = check_factor(factor_of(name, kind), enumerable_lm(kind), num_sequences=40, tolerance=1e-9)
    assert "potential(start) + Σ weigh = potential(final) = log φ" in report.held
    assert "φ > 0, as hard=False says" in report.held


@KINDS
@torch.no_grad()
def test_all_tokens_are_weighed_from_the_cache(kind: str) -> None:
    """weigh(None) is a·log p of the next token, exactly; states stay as they are, selected and cut."""
    lm, factor = enumerable_lm(kind), factor_of("persona", kind)
    form = factor.bind(lm).incremental
    context, rows = torch.tensor([0, 1, 1]), torch.tensor([[0, 1, 0], [1, 2, 1], [2, 0, 0]])
    states_agree(form, lm, context, rows, 1e-9)
    state = form.start(context)
    state = form.advance(state, rows[:, 0], None)
    for i, (c, token) in enumerate(zip(context.tolist(), rows[:, 0].tolist(), strict=True)):
        wanted = 0.7 * (next_log_probs(factor.lm, c, [token])[-1] - next_log_probs(factor.over, c, [token])[-1])
        assert float((form.weigh(state, None)[i] - wanted).abs().max()) < TOLERANCE


@KINDS
@pytest.mark.parametrize("weight", [0.6, -0.4])
@pytest.mark.parametrize("proposal", ["prior", "optimal"])
def test_smc_is_unbiased(kind: str, weight: float, proposal: str) -> None:
    """E Ẑ = Z and E[Ẑ Σ W̄ 1[x]] = γ(x), over every outcome of whole sweeps of two particles."""
    lm, other = small_lm(kind), small_lm(kind, seed=3) if kind == "tabular" else _other_network(kind)
    model = lm * lmppl.LMFactor(other, weight)
    brute = brute_of(model, 1)
    law = Law(brute, sweep_law(Target(model), lmppl.SMC(2, ess_threshold=1.0, proposal=proposal), 1))
    assert math.isclose(law.mean_z, float(brute.log_z.exp()), abs_tol=TOLERANCE)
    assert torch.allclose(law.mean_mass, brute.log_gamma.exp(), rtol=0, atol=TOLERANCE)


def test_rows_wait_for_each_other() -> None:
    """Rounds of several tokens, after which rows of different lengths are read anew."""
    model = small_lm("tabular") * lmppl.LMFactor(small_lm("tabular", seed=3), 0.6)
    brute = brute_of(model, 1)
    law = Law(brute, sweep_law(Target(model), lmppl.SMC(2, ess_threshold=1.0, every=re.compile("a")), 1))
    assert torch.allclose(law.mean_mass, brute.log_gamma.exp(), rtol=0, atol=TOLERANCE)


def _other_network(kind: str) -> TransformersLM:
    return TransformersLM(build(kind, 3, seed=4), tokenizer=tokenizer(3), context=["a", "bb"], max_new_tokens=2)


ENGINES = {
    "rejection": lmppl.Rejection(),
    "importance": lmppl.Importance(4000),
    "smc": lmppl.SMC(64),
    "mcmc": lmppl.MCMC(num_chains=200, warmup=30, num_steps=10),
    "guided": None,  # importance, from the law that the form steers
}


@pytest.mark.parametrize("name", list(ENGINES))
@pytest.mark.parametrize("kind", ["tabular", "llama"])
def test_engines_agree_with_enumeration(name: str, kind: str) -> None:
    """TV of 2,000 draws from π* at most 0.08: of an exact sample of as many it exceeds 0.05 once in a thousand."""
    lm = enumerable_lm(kind)
    model = lm * lmppl.LMFactor(persona(kind), 0.5)
    engine = ENGINES[name] or lmppl.Importance(2000, proposal=lmppl.WeightedDecoding().language_model(model))
    found = lmppl.infer(model, engine, num_draws=2000, seed=3, progress=False)
    for context in range(2):
        brute = brute_force(model, context)
        number = {key: i for i, key in enumerate(brute.sequences.keys())}
        draws = found.draws.select(found.draws.context == context)
        rows = torch.tensor([number[key] for key in draws.keys()])  # noqa: SIM118 - a method
        share = torch.zeros(len(number), dtype=torch.float64).index_add_(0, rows, draws.weights)
        assert 0.5 * float((share - brute.log_posterior.exp()).abs().sum()) < 0.08


def test_exact_draws_follow_the_product() -> None:
    model = enumerable_lm("mistral") * factor_of("half", "mistral")
    found = lmppl.infer(model, lmppl.Rejection(), num_draws=1500, seed=1, progress=False)
    brute = brute_force(model, 0)
    assert goodness_of_fit(found.draws.select(found.draws.context == 0), brute, brute.log_posterior) > 1e-3


# What it costs.


def test_every_forward_is_counted() -> None:
    """A run counts the other LM's forwards: those of the form, one a token for equal rows once, and of whole rows."""
    lm, other = enumerable_lm("llama"), enumerable_lm("llama", seed=1)
    rows = all_outcomes(lm, 0)
    model = lm * lmppl.LMFactor(other)
    for target in (Target(model), Target(model)):
        target.log_factors(rows)
        assert target.cost.lm_forwards == 2  # one prefill, one pass over what follows
        assert target.cost.lm_tokens == 2 + int((rows.lengths - 1).sum())
        target.log_factors(rows)
        assert target.cost.lm_forwards == 2
    target = Target(model)
    form = target.factors[0].incremental
    state = form.start(torch.zeros(64, dtype=torch.int64))
    form.weigh(state, None)
    form.weigh(form.select(state, torch.arange(8)), torch.zeros(8, 1, dtype=torch.int64))
    assert (target.cost.lm_forwards, target.cost.lm_tokens) == (1, 2)
    form.advance(state, torch.arange(64) % 3, None)
    assert (target.cost.lm_forwards, target.cost.lm_tokens) == (2, 5)


def test_a_sweep_counts_the_other_lm() -> None:
    """One prefill and one forward a round for each LM; rows that end are scored by the law they were weighed by."""
    lm = enumerable_lm("llama")

    def swept(model: lmppl.Model) -> tuple[lmppl.Cost, Draws]:
        target = Target(model)
        source = Source(torch.Generator().manual_seed(0))
        smc = lmppl.SMC(64, ess_threshold=0.9)
        return target.cost, smc.sweep(target, torch.tensor([1]), source).draws

    alone, _ = swept(lm * lmppl.Reward(lambda texts: [0.0] * len(texts), name="nothing"))
    for factor, lms in ((factor_of("half", "llama"), 1), (factor_of("persona", "llama"), 2)):
        both, draws = swept(lm * factor)
        assert both.lm_forwards - alone.lm_forwards == lms * lm.max_new_tokens
        wanted = by_hand(factor, draws.token_lists(), 1)
        assert float((draws.log_factors["lm_factor"] - wanted).abs().max()) < TOLERANCE


def test_a_guided_law_counts_the_other_lm() -> None:
    lm = enumerable_lm("tabular")
    cost = lmppl.Cost()
    q = lmppl.WeightedDecoding().language_model(lm * factor_of("half", "tabular"))
    q.draw(4, cost=cost)
    plain = lmppl.Cost()
    lm.draw(4, cost=plain)
    assert cost.lm_forwards > plain.lm_forwards


# Zeros.


def with_zero() -> tuple[TabularLM, TabularLM]:
    """A prior that writes "b", and another LM that never does."""
    prior = TabularLM([0.4, 0.3, 0.3], max_new_tokens=2)
    return prior, TabularLM([0.7, 0.0, 0.3], max_new_tokens=2)


@pytest.mark.parametrize("engine", [lmppl.Importance(64), lmppl.SMC(16), lmppl.Exact()], ids=["is", "smc", "exact"])
def test_zeros_exclude_or_are_an_error(engine: lmppl.Engine) -> None:
    prior, other = with_zero()
    found = lmppl.infer(prior * lmppl.LMFactor(other), engine, num_draws=64, seed=0, progress=False)
    kept = found.draws.weights > 0
    assert all("b" not in text for text, k in zip(found.draws.text, kept.tolist(), strict=True) if k)
    for bad in (lmppl.LMFactor(other, -1.0, name="away"), lmppl.LMFactor(prior, over=other, name="away")):
        with pytest.raises(FactorError, match=r"factor 'away': .*p\(x\|c'\) of TabularLM is 0 for the text '.*b"):
            lmppl.infer(prior * bad, engine, num_draws=64, seed=0, progress=False)


def test_what_the_prior_cannot_write_is_no_error() -> None:
    _, other = with_zero()
    model = other * lmppl.LMFactor(other, -1.0)
    exact, smc = (
        lmppl.infer(model, engine, num_draws=400, seed=0, progress=False) for engine in (lmppl.Exact(), lmppl.SMC(16))
    )
    # π0/π0 = 1 on each of the three outcomes that can be written: "", "a", and "aa", which is cut
    assert float(exact.log_normalizer[0].value[0]) == pytest.approx(math.log(3), abs=TOLERANCE)
    assert abs(float(smc.log_normalizer[0].value[0]) - math.log(3)) < 5 * float(smc.log_normalizer[0].standard_error)
    (everywhere,) = Target(model).log_factors(all_outcomes(other, 0)).values()
    assert bool(everywhere.isfinite().all())


# Other tokens, through text.


def words(probs: list[float], symbols: list[str], cap: int) -> TabularLM:
    return TabularLM(probs, symbols, max_new_tokens=cap)


def test_other_tokens_are_read_through_text() -> None:
    """log p of the canonical tokens of the text, and of the end where the row ended; whole rows alone."""
    prior = words([0.3, 0.3, 0.2, 0.2], ["a", "b", "ab", "<eos>"], 3)
    other = words([0.1, 0.6, 0.3], ["b", "a", "<eos>"], 8)
    model = prior * lmppl.LMFactor(other, 0.5)
    factor = model.factors[0]
    assert factor.incremental is None
    assert factor.hard is None
    outcomes = all_outcomes(prior, 0)
    (found,) = Target(model).log_factors(outcomes).values()
    for text, over, value in zip(outcomes.text, outcomes.finished.tolist(), found.tolist(), strict=True):
        letters = sum(math.log(0.6 if ch == "a" else 0.1) for ch in text)
        assert value == pytest.approx(0.5 * (letters + over * math.log(0.3)), abs=TOLERANCE)
    report = check_factor(lmppl.LMFactor(other, 0.5), prior)
    assert "log φ does not depend on the batch" in report.held
    cost = lmppl.infer(model, lmppl.Importance(64), seed=0, progress=False).cost
    assert cost.lm_forwards > lmppl.infer(prior, lmppl.Importance(64), seed=0, progress=False).cost.lm_forwards


def test_another_end_is_another_vocabulary() -> None:
    """Equal symbols with another EOS: "b" ends nothing there, and the end is EOS by its own id."""
    prior = words([0.5, 0.3, 0.2], ["a", "b", "<eos>"], 2)
    other = TabularLM([0.5, 0.3, 0.2], ["a", "b", "<eos>"], eos=None, max_new_tokens=4)
    (found,) = Target(prior * lmppl.LMFactor(other)).log_factors(prior.sequences([[0, 1], [0, 2]])).values()
    assert found.tolist() == [pytest.approx(math.log(0.15)), -math.inf]  # it never ends


def test_a_text_that_cannot_be_written_has_probability_zero() -> None:
    prior, other = words([0.5, 0.3, 0.2], ["a", "z", "<eos>"], 2), words([0.8, 0.2], ["a", "<eos>"], 4)
    rows = prior.sequences([[0, 2], [1, 2]])
    (found,) = Target(prior * lmppl.LMFactor(other)).log_factors(rows).values()
    assert found.tolist() == [pytest.approx(math.log(0.16)), -math.inf]
    with pytest.raises(FactorError, match="is 0 for the text 'z'"):
        Target(prior * lmppl.LMFactor(other, -1.0)).log_factors(rows)


@pytest.mark.shared
def test_two_real_lms_of_different_tokenizers(shared: Path) -> None:
    """The prior's texts, in the tokens that the other LM's own tokenizer gives them, scored without a cache."""
    prior = lmppl.LM(str(shared / "models/stories260K"), context="Once upon a time", max_new_tokens=6)
    other = lmppl.LM(str(shared / "models/glassllm-en"), context="Alice was", max_new_tokens=40)
    model = prior * lmppl.LMFactor(other, 0.5)
    draws = lmppl.infer(model, lmppl.Importance(8), seed=0, progress=False).draws
    start = other.context_ids[0].tolist()
    written = 0
    for text, value in zip(draws.text, draws.log_factors["lm_factor"].tolist(), strict=True):
        ids = other.encode(text)
        if ids is None:
            assert value == -math.inf
            continue
        written += 1
        assert other.decode(other.sequences([ids])) == [text]
        with torch.no_grad():
            logits = other.network.model(input_ids=torch.tensor([[*start, *ids]]), use_cache=False).logits[0]
        log_probs = torch.log_softmax(logits.double(), -1)[len(start) - 1 : -1]
        wanted = float(log_probs.gather(1, torch.tensor(ids)[:, None]).sum())
        assert value == pytest.approx(0.5 * wanted, abs=1e-3)
    assert written > 0


# Declarations.


def test_the_declaration_round_trips() -> None:
    lm, factor = enumerable_lm("tabular"), factor_of("persona", "tabular")
    model = lm * factor
    graph = FactorGraph.from_dict(model.graph.to_dict())
    assert graph.required_functions() == ("lm_factor", "lm_factor_over")
    again = graph.to_model(lm, {"lm_factor": factor.lm, "lm_factor_over": factor.over})
    assert again.graph.content_hash() == model.graph.content_hash()
    assert again.spec_hash == model.spec_hash
    rows = all_outcomes(lm, 0)
    for name, value in Target(model).log_factors(rows).items():
        assert torch.equal(Target(again).log_factors(rows)[name], value)
    assert (lm * factor_of("half", "tabular")).spec_hash != (lm * factor_of("product", "tabular")).spec_hash
    before = model.spec_hash
    lmppl.infer(model, lmppl.SMC(8), seed=0, num_draws=8, progress=False)
    assert model.spec_hash == before
    assert model.factors[0].formula == "(lm_factor(x|c')/lm_factor_over(x|c''))^0.7"


def test_the_bound_is_declared_where_there_is_one() -> None:
    lm, over = enumerable_lm("tabular"), enumerable_lm("tabular", seed=2)
    uppers = [lmppl.LMFactor(lm).upper, lmppl.LMFactor(lm, -1.0).upper, lmppl.LMFactor(lm, over=over).upper]
    assert uppers == [0.0, math.inf, math.inf]


def test_a_factor_meets_one_prior_after_another() -> None:
    """What it has learnt of the first prior, whose tokens are the LM's, is forgotten with the second, whose are not."""
    prior, other = words([0.5, 0.3, 0.2], ["a", "z", "<eos>"], 2), words([0.5, 0.3, 0.2], ["a", "b", "<eos>"], 4)
    for factor in (lmppl.LMFactor(other), lmppl.InfillingFactor("a", other)):
        first = (other * factor).factors[0]
        assert first.hard is False
        assert first.incremental is not None
        second = (prior * first).factors[0]
        assert second.hard is None
        assert second.incremental is None


def test_a_longer_prior_gives_the_other_lm_room() -> None:
    """The other LM's cap is not asked: rows as long as the prior's are scored by both LMs alike."""
    short = enumerable_lm("llama", seed=1).with_max_new_tokens(1)
    lm = enumerable_lm("llama")
    one, two = (Target(lm * lmppl.LMFactor(other)) for other in (short, enumerable_lm("llama", seed=1)))
    rows = all_outcomes(lm, 1)
    assert torch.allclose(*(next(iter(t.log_factors(rows).values())) for t in (one, two)), rtol=0, atol=TOLERANCE)


class Unreadable(TabularLM):
    """A table without a tokenizer."""

    encode = None  # type: ignore[assignment]


def test_what_is_refused() -> None:
    lm = enumerable_lm("tabular")
    for weight in (0.0, math.inf, math.nan, True, "1"):
        with pytest.raises(ModelError, match="LMFactor: got weight"):
            lmppl.LMFactor(lm, weight)
    with pytest.raises(ModelError, match="got lm=str, expected a language model"):
        lmppl.LMFactor("tiny")
    with pytest.raises(ModelError, match="got over=str"):
        lmppl.LMFactor(lm, over="tiny")
    with pytest.raises(ContextError, match="factor 'p': its LM has 3 contexts and the prior has 2"):
        lm * lmppl.LMFactor(lm | ["", "a", "b"], name="p")
    deaf = Unreadable([0.5, 0.5], ["a", "<eos>"], max_new_tokens=2)
    with pytest.raises(
        ModelError, match=r"factor 'p': Unreadable cannot read text.*it has 2 tokens, and the prior has 4"
    ):
        lm * lmppl.LMFactor(deaf, name="p")
    stopped = random_lm("llama", stop="b", context="a")
    with pytest.raises(ModelError, match="declare it without stop="):
        lm * lmppl.LMFactor(stopped)
    small = words([0.8, 0.2], ["a", "<eos>"], 1)
    with pytest.raises(FactorError, match=r"takes 3 tokens of the LM, which was declared with max_new_tokens=1; give"):
        Target(lm * lmppl.LMFactor(small, name="p")).log_factors(lm.sequences([[0, 0, 3]]))
    with pytest.raises(FactorError, match="multiply a prior by it first"):
        evaluate(lmppl.LMFactor(lm).features[0], lm.sequences([[0]]), factor="p")
