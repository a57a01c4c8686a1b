"""Weighted decoding: the guided law by hand and by enumeration, its instances, what weights correct, and refusals."""

import math

import pytest
import torch

from lmppl.diagnostics.divergences import total_variation
from lmppl.errors import FactorError, ModelError, ShapeError, StorageError, UnsupportedModel
from lmppl.inference.approximation import Sampler
from lmppl.inference.engine import Guarantee, Shard
from lmppl.inference.exact import Exact
from lmppl.inference.guided import GuidedLM
from lmppl.inference.importance import Importance, importance_log_weights
from lmppl.inference.prefix_scores import ClassConditional, HiddenScore, PrefixScore
from lmppl.inference.run import infer
from lmppl.inference.smc import SMC
from lmppl.inference.steered_decoding import DecodingEngine, draw_steered
from lmppl.inference.twists import ExactTwist
from lmppl.inference.weighted_decoding import WeightedDecoding
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence.constraint import Constraint
from lmppl.modeling.evidence.power import PowerPrior
from lmppl.modeling.evidence.reward import Reward
from lmppl.modeling.factors import Factor, Feature, start_incremental
from lmppl.modeling.model import Model
from lmppl.modeling.target import Target
from lmppl.testing import check_engine, check_language_model
from lmppl.testing.enumeration import every_outcome
from tests.inference.smc_cases import ArbitraryTwist
from tests.models import ENUMERABLE, TOLERANCE, brute_force, enumerable_lm, goodness_of_fit, has_no, wavy

BETA = 0.4
VISIBLE = 1e-3
CONTEXTS = (0, 1)


def soft_model(kind):
    return enumerable_lm(kind) * Reward(wavy, beta=BETA)


def hard_model(kind):
    return soft_model(kind) * Constraint(has_no("b"))


def table_score(model, which="soft"):
    """A value function of prefixes, read off the brute-force table: soft values, or mean values, in nats."""
    tables = []
    for c in range(model.prior.num_contexts):
        brute = brute_force(model, c)
        tables.append(brute.soft_values() if which == "soft" else brute.mean_values(brute.log_phi))

    def value(rows):
        keys = zip(rows.context.tolist(), rows.token_lists(), strict=True)
        return [tables[c].get(tuple(row), -math.inf) for c, row in keys]

    return PrefixScore(value, on="ids")


def crude(rows):
    """An honest classifier that knows little: a bounded score of any prefix."""
    return [math.sin(1.0 + 0.7 * c + sum((i + 2.1) * t for i, t in enumerate(row)))
            for c, row in zip(rows.context.tolist(), rows.token_lists(), strict=True)]  # fmt: skip


def law(lm, brute):
    return lm.score(brute.sequences)


# The law.


@pytest.mark.parametrize("kind", ENUMERABLE)
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(("strength", "top_k"), [(0.0, None), (0.5, None), (2.0, 2)])
@torch.no_grad()
def test_the_law_is_a_product_of_reweighted_conditionals(kind, context, strength, top_k):
    prior = enumerable_lm(kind)
    lm = GuidedLM(prior, PrefixScore(crude, on="ids"), strength=strength, top_k=top_k)
    brute = brute_force(prior, context)
    known = {}

    def conditional(prefix):
        if prefix not in known:
            given = torch.tensor([prefix], dtype=torch.int64) if prefix else None
            step, _ = prior.decoder().prefill(torch.tensor([context]), given)
            rows = prior.sequences([(*prefix, v) for v in range(prior.vocab_size)], [context] * prior.vocab_size)
            scores = step.log_probs[0, -1] + strength * torch.tensor(crude(rows), dtype=torch.float64)
            if top_k is not None:
                kept = step.log_probs[0, -1].topk(top_k).indices
                cut = torch.full_like(scores, -math.inf)
                cut[kept] = scores[kept]
                scores = cut
            known[prefix] = torch.log_softmax(scores, -1)
        return known[prefix]

    rows = brute.sequences.token_lists()
    expected = torch.stack(
        [torch.stack([conditional(tuple(row[:t]))[v] for t, v in enumerate(row)]).sum() for row in rows]
    )
    torch.testing.assert_close(law(lm, brute).exp(), expected.exp(), rtol=0, atol=TOLERANCE)
    assert lm.truncated is (top_k is not None)


@pytest.mark.parametrize("kind", ENUMERABLE)
@pytest.mark.parametrize("form", ["text", "ids", "power", "both"])
def test_it_is_a_language_model(kind, form):
    prior = enumerable_lm(kind)
    guides = {
        "text": PrefixScore(wavy),
        "ids": PrefixScore(crude, on="ids"),
        "power": PowerPrior(1.7),
        "both": [PrefixScore(crude, on="ids"), PowerPrior(0.6)],
    }
    report = check_language_model(GuidedLM(prior, guides[form]), num_draws=150)
    assert "the probabilities of all outcomes sum to 1" in report.held
    if "ragged" in prior.decoder().capabilities:
        assert "decoder: crop cuts rows to different lengths, again and again" in report.held


@pytest.mark.parametrize("kind", ENUMERABLE)
@pytest.mark.parametrize("model_of", [soft_model, hard_model])
def test_exact_soft_values_give_the_posterior_and_zero_weight_variance(kind, model_of):
    model = model_of(kind)
    exact = infer(model, Exact(), progress=False)
    for twist in (table_score(model), ExactTwist.of(model)):
        result = infer(model, WeightedDecoding(twist), 60, progress=False)
        lm = result.as_language_model()
        for c in CONTEXTS:
            brute = brute_force(model, c)
            torch.testing.assert_close(law(lm, brute).exp(), brute.log_posterior.exp(), rtol=0, atol=TOLERANCE)
        weights = infer(model, Importance(50, proposal=result), progress=False).draws
        log_z = exact.log_normalizer[0].value[weights.context]
        torch.testing.assert_close(weights.log_weight, log_z, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ENUMERABLE)
@pytest.mark.parametrize("context", CONTEXTS)
def test_mean_values_do_not_give_the_posterior(kind, context):
    """Mutant: E[r|prefix]/β in place of log E[e^{r/β}|prefix]."""
    model = soft_model(kind)
    brute = brute_force(model, context)
    lm = WeightedDecoding(table_score(model, "mean")).language_model(model)
    assert float(total_variation(law(lm, brute), brute.log_posterior)) > VISIBLE
    log_w = importance_log_weights(brute.log_gamma, law(lm, brute))
    assert float(log_w.max() - log_w.min()) > VISIBLE


@pytest.mark.parametrize("kind", ENUMERABLE)
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("engine", ["crude", "mean", "fudge", "top_k"])
def test_weights_correct_any_law_that_covers(kind, context, engine):
    """Σ_x q(x) w(x) f(x) = Z E_π*[f] over all outcomes, where q covers; a truncated q falls short of Z."""
    model = hard_model(kind)
    engines = {
        "crude": WeightedDecoding(PrefixScore(crude, on="ids"), strength=1.5),
        "mean": WeightedDecoding(table_score(soft_model(kind), "mean")),
        "fudge": WeightedDecoding.fudge(
            lambda texts: [1 / (1 + t.count("b")) for t in texts], probability=True, top_k=None
        ),
        "top_k": WeightedDecoding(PrefixScore(crude, on="ids"), top_k=2),
    }
    brute = brute_force(model, context)
    log_q = law(engines[engine].language_model(model), brute)
    inside = log_q > -math.inf
    log_w = importance_log_weights(brute.log_gamma[inside], log_q[inside])
    f = brute.sequences.lengths.double() + 0.3 * brute.sequences.ids[:, 0]
    total = (log_q[inside].exp() * log_w.exp()).sum()
    moment = (log_q[inside].exp() * log_w.exp() * f[inside]).sum()
    expected = (brute.log_posterior.exp() * f).sum() * brute.log_z.exp()
    if engine == "top_k":
        assert float(total) < float(brute.log_z.exp()) - VISIBLE
        return
    assert float(total) == pytest.approx(float(brute.log_z.exp()), abs=TOLERANCE)
    assert float(moment) == pytest.approx(float(expected), abs=TOLERANCE)
    # Mutant: the draws of q taken as draws of π*.
    assert float(total_variation(log_q, brute.log_posterior)) > VISIBLE


def test_where_every_candidate_is_dead_the_prior_speaks():
    prior = TabularLM.random(3, 3, order=1, seed=1, context=["", "a"])

    def only_a(texts):
        return [0.0 if t and set(t) == {"a"} else -math.inf for t in texts]

    model = prior * Constraint(lambda texts: [set(t) == {"a"} for t in texts], name="only_a")
    lm = GuidedLM(prior, PrefixScore(only_a))
    check_language_model(lm, num_draws=300)
    with torch.no_grad():
        dead = torch.tensor([[1], [0]])
        step, _ = lm.decoder().prefill(torch.tensor([0, 0]), dead)
        from_prior, _ = prior.decoder().prefill(torch.tensor([0, 0]), dead)
    torch.testing.assert_close(step.log_probs[0], from_prior.log_probs[0])
    assert step.log_probs[1, 0, 1] == -math.inf  # "ab"
    assert step.hidden[0, 0, -1] == 1.0
    assert step.hidden[1, 0, -1] == 0.0
    # "a" then EOS keeps the text "a", so that the score allows it.
    brute = brute_force(model, 0)
    log_q = lm.score(brute.sequences)
    assert bool((log_q[brute.log_gamma == -math.inf] == -math.inf).all())
    assert bool((log_q[brute.log_gamma > -math.inf] > -math.inf).all())


# Instances.


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("kind", ["tabular", "llama"])
@torch.no_grad()
def test_class_conditional_lms_by_bayes_rule(kind, normalized):
    prior, other = enumerable_lm(kind), enumerable_lm(kind, seed=1)
    masses = [0.3, 0.7]
    score = ClassConditional((other, prior), 0, masses, normalized)
    form = score(prior)
    context = torch.tensor([0, 1, 1])
    rows = torch.tensor([[0, 1], [1, 0], [2, 2]])
    state = start_incremental(form, context, None)
    assert form.potential(state).tolist() == pytest.approx([0.0] * 3, abs=TOLERANCE)
    for t, token in enumerate(rows.unbind(1)):
        some = torch.tensor([[2, 0]]).expand(3, 2)
        torch.testing.assert_close(form.weigh(state, some), form.weigh(state, None)[:, [2, 0]])
        weight = form.weigh(state, token[:, None])[:, 0]
        before = form.potential(state)
        state = form.advance(state, token, None)
        torch.testing.assert_close(form.potential(state), before + weight)
        given = prior.sequences(rows[:, : t + 1].tolist(), context.tolist())
        joint = torch.stack([lm.token_log_probs(given).sum(-1) for lm in (other, prior)], -1)
        joint = (joint / (t + 1) if normalized else joint) + torch.tensor(masses, dtype=torch.float64).log()
        expected = torch.log_softmax(joint, -1)[:, 0] - math.log(0.3)
        torch.testing.assert_close(form.potential(state), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["tabular", "mistral"])
def test_gedi_is_a_language_model_and_its_networks_are_counted(kind):
    prior, other = enumerable_lm(kind), enumerable_lm(kind, seed=1)
    engine = WeightedDecoding.gedi([other, prior], length_normalized=False, strength=1.0)
    model = soft_model(kind)
    check_language_model(engine.language_model(model), num_draws=300)
    result = infer(model, engine, 40, progress=False)
    plain = infer(model, WeightedDecoding(PrefixScore(crude, on="ids"), strength=0.0), 40, progress=False)
    assert result.cost.lm_forwards == pytest.approx(3 * plain.cost.lm_forwards, abs=9)
    # With one class that is the prior itself and one that is another LM, λ = 1 makes prefixes of the other more likely.
    brute = brute_force(prior, 0)
    log_q = engine.language_model(model).score(brute.sequences)
    drift = log_q - brute.log_prior
    evidence = other.score(brute.sequences) - brute.log_prior
    assert float(torch.corrcoef(torch.stack([drift, evidence]))[0, 1]) > 0.5


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_head_on_hidden_states_scores_every_token(kind):
    prior = enumerable_lm(kind)
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 5, dtype=torch.float64)
    engine = WeightedDecoding.controlled(head, on="hidden", beta=2.0)
    lm = engine.language_model(soft_model(kind))
    check_language_model(lm, num_draws=300)
    with torch.no_grad():
        step, _ = prior.decoder().prefill(torch.tensor([1]), torch.tensor([[0, 2]]))
        expected = torch.log_softmax(step.log_probs[0, -1] + head(step.hidden[0, -1]) / 2.0, -1)
        got, _ = lm.decoder().prefill(torch.tensor([1]), torch.tensor([[0, 2]]))
    torch.testing.assert_close(got.log_probs[0, -1], expected, rtol=0, atol=TOLERANCE)
    with pytest.raises(ShapeError, match=r"the head gave shape \(2, 1\), expected \(2, 5\)"):
        infer(soft_model(kind), WeightedDecoding.controlled(lambda h: h[:, :1], on="hidden"), 5, progress=False)
    with pytest.raises(ModelError, match="gives no hidden states"):
        HiddenScore(head)(enumerable_lm("tabular"))


# The engine.


@pytest.mark.parametrize("kind", ["tabular", "llama"])
def test_the_whole_engine_by_enumeration(kind):
    """Walk every path of the engine's choices: the law of its draws is q, and log q, log π0 are those of the rows."""
    prior = TabularLM.random(3, 2, order=1, seed=3, context=["", "a"]) if kind == "tabular" else None
    if prior is None:
        from tests.lm.random_models import random_lm

        prior = random_lm("llama", max_new_tokens=2)
    model = prior * Reward(wavy, beta=BETA)
    engine = WeightedDecoding(PrefixScore(crude, on="ids"))
    lm = engine.language_model(model)
    target = Target(model)
    shard = Shard(0, 1, 0, (1,), 8)
    law_of: dict = {}
    for probability, part in every_outcome(lambda source: engine.simulate(target, shard, source)):
        draws = part.draws
        (key,) = draws.keys()
        law_of[key] = law_of.get(key, 0.0) + probability
        assert math.exp(float(draws.log_q[0])) == pytest.approx(probability, abs=TOLERANCE)
        assert float(draws.log_prior[0]) == pytest.approx(float(prior.score(draws)[0]), abs=TOLERANCE)
        assert float(lm.score(draws)[0]) == pytest.approx(float(draws.log_q[0]), abs=TOLERANCE)
    assert sum(law_of.values()) == pytest.approx(1.0, abs=TOLERANCE)


# Statistics: p-values below 1e-3 in 1 of 1,000 runs; fixed seeds.


@pytest.mark.parametrize("kind", ["tabular", "mistral"])
def test_draws_have_the_law_and_importance_reaches_the_posterior(kind):
    model = hard_model(kind)
    engine = WeightedDecoding.controlled(lambda texts: [-2.0 * t.count("b") for t in texts])
    result = infer(model, engine, 1500, seed=3, progress=False)
    assert isinstance(result, Sampler)
    assert result.guarantee is Guarantee.HEURISTIC
    assert result.draws.log_weight is None
    assert result.info["not_decoded"] == tuple(f.name for f in model.factors)
    lm = result.as_language_model()
    corrected = infer(model, Importance(3000, proposal=result), seed=4, progress=False)
    plain = infer(model, Importance(3000), seed=4, progress=False)
    for c in CONTEXTS:
        brute = brute_force(model, c)
        own = result.draws.select(result.draws.context == c)
        assert goodness_of_fit(own, brute, law(lm, brute)) > 1e-3
        assert goodness_of_fit(own, brute, brute.log_posterior) < 1e-6
        violating = float((brute.log_phi == -math.inf).double() @ law(lm, brute).exp())
        assert float(result.info["violating_share"][c]) == pytest.approx(violating, abs=0.05)
        estimate = corrected.log_normalizer[0]
        assert abs(float(estimate.value[c] - brute.log_z)) < 4.5 * float(estimate.standard_error[c])
        length = corrected.expectation(Feature("length", lambda rows: rows.lengths.double(), on="ids"))
        exact = float((brute.log_posterior.exp() * brute.sequences.lengths).sum())
        assert abs(float(length.value[c]) - exact) < 4.5 * float(length.standard_error[c])
    assert float(corrected.info["ess"].min()) > float(plain.info["ess"].min())
    assert len(result.draw(3, generator=torch.Generator().manual_seed(1))) == 6


def test_factors_with_a_form_steer_by_themselves():
    prior = enumerable_lm("llama")
    model = prior**2.5 * Reward(wavy)
    result = infer(model, WeightedDecoding(), 20, progress=False)
    assert result.info["not_decoded"] == ("wavy",)
    brute = brute_force(prior, 0)
    # Token by token, π0·π0^{α−1} normalised is temperature 1/α.
    tempered = prior.at_temperature(1 / 2.5)
    torch.testing.assert_close(
        result.as_language_model().score(brute.sequences), tempered.score(brute.sequences), rtol=0, atol=TOLERANCE
    )


def test_the_engine_keeps_the_contract():
    prior = TabularLM.random(4, 4, seed=5, context=["", "ab"])
    model = prior**1.5 * Reward(wavy, beta=0.5)
    first = infer(model, WeightedDecoding(num_draws=30), progress=False, seed=1)
    assert torch.equal(first.draws.ids, infer(model, WeightedDecoding(), 30, progress=False, seed=1).draws.ids)
    torch.testing.assert_close(first.draws.log_prior, prior.score(first.draws), rtol=0, atol=TOLERANCE)
    scored = first.as_language_model().score(first.draws)
    torch.testing.assert_close(first.draws.log_q, scored, rtol=0, atol=TOLERANCE)
    report = check_engine(WeightedDecoding(PrefixScore(wavy)))
    assert "shards depend on seed and id alone" in report.held
    assert "log_prior is that of the prior" in report.held


def test_one_pass_scores_prior_and_proposal():
    model = soft_model("llama")
    result = infer(model, WeightedDecoding(PrefixScore(crude, on="ids")), 50, progress=False)
    assert result.cost.lm_forwards <= model.prior.max_new_tokens
    classified = result.cost.factor_calls - len(set(result.draws.text))
    assert classified <= sum(5**t for t in (1, 2, 3)) * 2


def test_rows_that_have_ended_are_scored_no_more():
    seen = []

    def spy(texts):
        seen.extend(texts)
        return [0.0 for _ in texts]

    prior = TabularLM.random(3, 4, seed=0)
    lm = GuidedLM(prior, PrefixScore(spy))
    rows = prior.sequences([[0, 2], [0, 1, 0, 1]])
    lm.score(rows)
    assert max(len(t) for t in seen) == 4
    assert not any(t.startswith("a") and len(t) > 1 and t[1] == "<" for t in seen)
    torch.testing.assert_close(lm.score(rows), prior.score(rows))


def test_other_contexts_and_fingerprints():
    prior = enumerable_lm("tabular")
    lm = GuidedLM(prior, PrefixScore(crude, on="ids"), strength=0.5)
    other = lm | ["b"]
    assert other.prompts == ("b",)
    assert (other.strength, other.top_k) == (0.5, None)
    prints = {
        one.fingerprint
        for one in (
            lm,
            other,
            GuidedLM(prior, PrefixScore(crude, on="ids")),
            GuidedLM(prior, PrefixScore(wavy)),
            GuidedLM(prior, PowerPrior(2.0)),
            GuidedLM(prior, PowerPrior(3.0)),
        )
    }
    assert len(prints) == 6
    draws = draw_steered(lm, torch.tensor([0, 1]), _source())
    assert len(draws) == 2
    chained = infer(lm * Reward(wavy), Exact(), progress=False)  # the guided law as the next prior
    assert bool(torch.isfinite(chained.log_normalizer[0].value).all())


def _source():
    from lmppl.lm.randomness import Source

    return Source(torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["tabular", "llama"])
def test_smc_with_a_guided_proposal_reaches_the_posterior(kind):
    model = hard_model(kind)
    q = WeightedDecoding.controlled(lambda texts: [-2.0 * t.count("b") for t in texts]).language_model(model)
    result = infer(model, SMC(32, proposal=q, num_sweeps=60), seed=5, progress=False)
    estimate = result.log_normalizer[0]
    length = result.expectation(Feature("length", lambda rows: rows.lengths.double(), on="ids"))
    for c in CONTEXTS:
        brute = brute_force(model, c)
        assert abs(float(estimate.value[c] - brute.log_z)) < 4.5 * float(estimate.standard_error[c])
        exact = float((brute.log_posterior.exp() * brute.sequences.lengths).sum())
        assert abs(float(length.value[c]) - exact) < 4.5 * float(length.standard_error[c])


def test_a_checkpoint_knows_the_scores(tmp_path):
    model = soft_model("tabular")
    engine = WeightedDecoding(PrefixScore(crude, on="ids"))
    once = infer(model, engine, 700, seed=1, progress=False, checkpoint=tmp_path / "run")
    again = infer(model, engine, 700, seed=1, progress=False, checkpoint=tmp_path / "run")
    assert torch.equal(once.draws.ids, again.draws.ids)
    assert torch.equal(once.draws.log_q, again.draws.log_q)
    assert again.info["not_decoded"] == once.info["not_decoded"]
    with pytest.raises(StorageError, match="belongs to another run"):
        infer(model, WeightedDecoding(PrefixScore(wavy)), 700, seed=1, progress=False, checkpoint=tmp_path / "run")
    head = torch.nn.Linear(2, 2)
    prints = {HiddenScore(head).fingerprint, HiddenScore(head, 2.0).fingerprint, PrefixScore(crude).fingerprint}
    prints |= {ClassConditional((model.prior, model.prior), t).fingerprint for t in (0, 1)}
    assert len(prints) == 5


# Bad input.


def test_refusals():
    prior = enumerable_lm("tabular")
    with pytest.raises(UnsupportedModel, match=r"weighted_decoding needs scores of prefixes: factor 'wavy' has none"):
        infer(soft_model("tabular"), WeightedDecoding(), 5, progress=False)
    with pytest.raises(UnsupportedModel, match="this model has no factor"):
        infer(prior, WeightedDecoding(), 5, progress=False)
    with pytest.raises(ModelError, match="no factor is called 'nope'"):
        infer(soft_model("tabular"), WeightedDecoding(factors=["nope"]), 5, progress=False)
    with pytest.raises(ModelError, match="factor 'wavy' has no incremental form"):
        infer(soft_model("tabular"), WeightedDecoding(factors=("wavy",)), 5, progress=False)
    with pytest.raises(ModelError, match="strength: got -1"):
        infer(soft_model("tabular"), WeightedDecoding(PrefixScore(crude, on="ids"), strength=-1.0), 5, progress=False)
    with pytest.raises(ModelError, match="top_k: got 0"):
        GuidedLM(prior, PrefixScore(wavy), top_k=0)
    with pytest.raises(ModelError, match="guide: got int"):
        GuidedLM(prior, 3)
    with pytest.raises(ModelError, match="guide: got str"):
        GuidedLM(prior, lambda lm: "x")
    with pytest.raises(ModelError, match="got beta=0"):
        GuidedLM(prior, PrefixScore(wavy, beta=0.0))
    with pytest.raises(ModelError, match="expected a list of names"):
        WeightedDecoding(factors="wavy").language_model(soft_model("tabular"))


def test_bad_scores_are_named():
    model = soft_model("tabular")

    def run(fn, **options):
        infer(model, WeightedDecoding.fudge(fn, **options), 5, progress=False)

    with pytest.raises(FactorError, match=r"^prefix score: "):
        run(lambda texts: [math.nan for _ in texts])
    with pytest.raises(ModelError, match=r"got 1.5 for 'a', expected a probability"):
        run(lambda texts: [1.5 for _ in texts], probability=True)
    with pytest.raises(ShapeError):
        run(lambda texts: [0.0])
    with pytest.raises(ModelError, match="expected one of ≥ 2"):
        ClassConditional((model.prior,))(model.prior)
    with pytest.raises(ModelError, match="the LM of class 1 has vocab_size 5"):
        ClassConditional((model.prior, enumerable_lm("llama")))(model.prior)
    with pytest.raises(ModelError, match="expected 2 positive numbers"):
        ClassConditional((model.prior, model.prior), prior=[1.0, 0.0])(model.prior)

    class Broken:
        needs = ()

        def start(self, contexts):
            return torch.zeros(len(contexts))

        def weigh(self, state, candidates):
            return torch.full((len(state), 4), math.inf)

        def advance(self, state, tokens, step):
            return state

        def potential(self, state):
            return state

        def select(self, state, index):
            return state[index]

        def crop(self, state, lengths):
            return state

    with pytest.raises(ModelError, match=r"guide Broken: weigh is inf for token 0, expected"):
        infer(model, WeightedDecoding(Broken()), 5, progress=False)


def test_a_factor_that_has_a_form_can_be_given_as_it_is():
    prior = enumerable_lm("tabular")
    factor = Factor("flat", (), lambda columns: torch.zeros(0), incremental=PrefixScore(crude, on="ids")(prior))
    lm = GuidedLM(prior, factor)
    same = GuidedLM(prior, PrefixScore(crude, on="ids"))
    brute = brute_force(Model(prior), 1)
    torch.testing.assert_close(law(lm, brute), law(same, brute))
    assert issubclass(WeightedDecoding, DecodingEngine)


class Forbids(ArbitraryTwist):
    """Forbids all that could follow prefixes of `length` tokens or more."""

    def __init__(self, vocab_size: int, length: int) -> None:
        super().__init__(vocab_size)
        self.length = length

    def weigh(self, state, candidates=None):
        weights = super().weigh(state, candidates)
        late = torch.tensor([len(prefix) >= self.length for _, prefix in state])
        return weights.masked_fill(late[:, None], -torch.inf)


def test_scores_that_forbid_what_has_mass_say_so(caplog):
    model = enumerable_lm("tabular") * Reward(wavy, beta=0.5)
    with pytest.raises(ModelError, match=r"weighted_decoding: the scores forbid every token .* in all 50 draws for"):
        infer(model, WeightedDecoding(Forbids(4, 0)), 50, progress=False)
    infer(model, WeightedDecoding(Forbids(4, 1)), 50, progress=False)
    assert "the scores forbid every token after some prefix, though what follows there has γ > 0, in " in caplog.text
