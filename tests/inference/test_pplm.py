"""PPLM: gradients against finite differences, the law by hand and by weights, the caller's model, costs, refusals."""

import copy
import math

import pytest
import torch
from torch import nn

from lmppl.diagnostics.divergences import total_variation
from lmppl.errors import ModelError, UnsupportedModel
from lmppl.inference.engine import Guarantee, Shard
from lmppl.inference.exact import Exact
from lmppl.inference.importance import Importance, importance_log_weights
from lmppl.inference.perturbed_lm import PerturbedDecoder, PerturbedLM
from lmppl.inference.pplm import PPLM
from lmppl.inference.run import infer
from lmppl.inference.smc import SMC
from lmppl.lm.perturbation import has_open_past, past_of, read_again, zeros_like_past
from lmppl.lm.transformers import TransformersLM
from lmppl.modeling.evidence.bag_of_words import BagOfWords
from lmppl.modeling.evidence.constraint import Constraint
from lmppl.modeling.evidence.lm_factors.classifier import Classifier
from lmppl.modeling.evidence.reward import Reward
from lmppl.modeling.factors import Factor, Feature
from lmppl.modeling.graph import FactorGraph
from lmppl.modeling.soft import SoftStep
from lmppl.modeling.target import Target
from lmppl.testing import check_factor, check_language_model
from lmppl.testing.enumeration import every_outcome
from tests.lm.random_models import build, random_lm, tokenizer
from tests.models import TOLERANCE, brute_force, enumerable_lm, goodness_of_fit, has_no, wavy

NETWORKS = ("llama", "mistral")
STRONG = PPLM(num_steps=3, step_size=2.0, fusion=0.9, kl_scale=0.05)


def head_of(seed=0, outputs=1):
    torch.manual_seed(seed)
    return nn.Linear(16, outputs, dtype=torch.float64).eval()


def factor_of(name):
    return BagOfWords(["b", "zebra"]) if name == "bag" else Classifier(head_of(outputs=3), label=1)


def steered(kind, factor="bag", engine=STRONG):
    model = enumerable_lm(kind) * factor_of(factor)
    return model, engine.language_model(model)


# Gradients.

SIZE = 5e-3  # norms and attention of these networks are computed in float32, whatever the dtype of the weights


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("factor", ["bag", "classifier"])
def test_the_gradient_on_the_cache_is_that_of_finite_differences(kind, factor):
    _, lm = steered(kind, factor)
    decoder = lm.decoder()
    assert lm.place == "cache"
    context, prefix = torch.tensor([0, 1]), torch.tensor([[0, 1], [2, 0]])
    with torch.no_grad():
        step, _ = lm.base.decoder().prefill(context, prefix)
        _, state = decoder.prefill(context, prefix)
        prior = step.log_probs[:, -1]
    past = past_of(state.base)
    deltas = zeros_like_past(past)

    before = state.total - step.hidden[:, -1]

    def value(changes):
        pairs = [(k + changes[2 * i], v + changes[2 * i + 1]) for i, (k, v) in enumerate(past)]
        return decoder._objective(step, read_again(decoder.base, state.base, state.last, pairs), state, before, prior)

    gradients = torch.autograd.grad(value(deltas).sum(), deltas)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for number, gradient in enumerate(gradients):
            direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
            slope = torch.zeros(2, dtype=torch.float64)
            for steps, weight in ((1, 2 / 3), (-1, -2 / 3), (2, -1 / 12), (-2, 1 / 12)):
                changes = [torch.zeros_like(d) for d in deltas]
                changes[number] = steps * SIZE * direction
                slope += weight * value(changes) / SIZE
            expected = (gradient * direction).flatten(1).sum(1)  # row by row: rows do not touch one another
            torch.testing.assert_close(slope, expected, rtol=2e-3, atol=5e-4)
            assert float(expected.abs().max()) > 0.005


@pytest.mark.parametrize("kind", NETWORKS)
@torch.no_grad()
def test_reading_the_last_token_again_over_the_same_past_changes_nothing(kind):
    lm = enumerable_lm(kind)
    decoder = lm.decoder()
    for prefix, lengths in (([[0, 1], [2, 0]], [2, 2]), ([[0, 1], [2, 0]], [1, 2])):
        tokens, counts = torch.tensor(prefix), torch.tensor(lengths)
        step, state = decoder.prefill(torch.tensor([1, 0]), tokens, counts)
        last = tokens.gather(1, counts[:, None] - 1)[:, 0]
        hidden = read_again(decoder, state, last, past_of(state))
        torch.testing.assert_close(hidden, step.hidden[:, -1], rtol=0, atol=TOLERANCE)
        after, _ = decoder.extend(state, torch.tensor([[0], [1]]))  # the cache is as it was
        longer = [torch.cat([row[:n], torch.tensor([t])]) for row, n, t in zip(tokens, lengths, (0, 1), strict=True)]
        for i, row in enumerate(longer):
            fresh, _ = lm.decoder().prefill(torch.tensor([1 - i]), row[None])
            torch.testing.assert_close(after.log_probs[i, -1], fresh.log_probs[0, -1], rtol=0, atol=TOLERANCE)


# The law.


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("context", [0, 1])
@pytest.mark.parametrize(
    "settings",
    [PPLM(num_steps=0), PPLM(step_size=0.0), PPLM(fusion=0.0, step_size=1.0), PPLM(num_steps=0, perturb="hidden")],
    ids=str,
)
def test_without_steps_the_law_is_the_prior(kind, context, settings):
    _, lm = steered(kind, engine=settings)
    brute = brute_force(enumerable_lm(kind), context)
    torch.testing.assert_close(lm.score(brute.sequences), brute.log_prior, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("factor", ["bag", "classifier"])
@pytest.mark.parametrize("perturb", ["cache", "hidden"])
def test_it_is_a_language_model_that_does_what_it_is_told(kind, factor, perturb):
    engine = PPLM(num_steps=2, step_size=2.0, perturb=perturb)
    model, lm = steered(kind, factor, engine)
    report = check_language_model(lm, num_draws=80)
    assert "the probabilities of all outcomes sum to 1" in report.held
    assert "decoder: prefixes of different length do not disturb one another" in report.held
    brute = brute_force(model, 0)
    log_q = lm.score(brute.sequences)
    if factor == "bag":
        share = (brute.sequences.ids == 1).double().sum(1)
        assert float(log_q.exp() @ share) > float(brute.log_prior.exp() @ share) + 0.02
    else:
        assert float(log_q.exp() @ brute.log_phi) > float(brute.log_prior.exp() @ brute.log_phi) + 0.005


@torch.no_grad()
def test_the_hidden_law_is_the_published_update_by_hand():
    """Two steps on the last hidden state, written out: normalised gradient, KL term, geometric mean."""
    engine = PPLM(num_steps=2, step_size=0.7, kl_scale=0.3, fusion=0.6, norm_power=1.5, perturb="hidden")
    model, lm = steered("llama", "bag", engine)
    prior = model.prior
    step, _ = prior.decoder().prefill(torch.tensor([1]), torch.tensor([[2]]))
    hidden, log_p = step.hidden[0, -1], step.log_probs[0, -1]
    delta = torch.zeros_like(hidden)
    for _ in range(2):
        with torch.enable_grad():
            moved = (hidden + delta).clone().requires_grad_()
            log_q = torch.log_softmax(step.project(moved[None])[0], -1)
            value = log_q[1] - 0.3 * (log_q.exp() * (log_q - log_p)).sum()
            (gradient,) = torch.autograd.grad(value, moved)
        delta = delta + 0.7 * gradient / gradient.norm() ** 1.5
    changed = torch.log_softmax(step.project((hidden + delta)[None])[0], -1)
    expected = torch.log_softmax(0.6 * changed + 0.4 * log_p, -1)
    got, _ = lm.decoder().prefill(torch.tensor([1]), torch.tensor([[2]]))
    torch.testing.assert_close(got.log_probs[0, -1], expected, rtol=0, atol=TOLERANCE)
    # Mutant: arithmetic in place of geometric mean.
    mixture = torch.log(0.6 * changed.exp() + 0.4 * log_p.exp())
    assert float((mixture - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("perturb", ["cache", "hidden"])
def test_the_mean_hidden_state_holds_each_token_once(perturb):
    """At the first gradient step nothing has moved, so that soft forms see the mean of the prior's own states."""
    seen = []

    def soft(lm):
        def form(step):
            seen.append(step.mean_hidden.detach().clone())
            return step.log_probs[:, 0]

        return form

    factor = Factor("seen", (), lambda columns: torch.zeros(0), soft=soft)
    prior, context, tokens = enumerable_lm("llama"), torch.tensor([1]), torch.tensor([[2, 0]])
    decoder = PerturbedLM(prior, [factor], PPLM(num_steps=1, perturb=perturb)).decoder()
    _, begun = decoder.prefill(context)
    decoder.extend(begun, tokens)
    decoder.prefill(context, tokens)
    plain = prior.decoder()
    first, state = plain.prefill(context)
    states = plain.extend(state, tokens)[0].hidden[0]
    expected = [first.hidden[0, -1], states[0], states.mean(0), states.mean(0)]
    close = {"rtol": 0, "atol": TOLERANCE if perturb == "hidden" else 1e-5}  # the cache is read again in float32 norms
    for mean, wanted in zip(seen, expected, strict=True):
        torch.testing.assert_close(mean[0], wanted.detach(), **close)


def test_a_context_of_one_token_has_no_past_to_move():
    lm = random_lm("llama", context=["a", "ab"], max_new_tokens=2)
    law = STRONG.language_model(lm * factor_of("bag"))
    with torch.no_grad():
        step, _ = law.decoder().prefill(torch.tensor([0]))
        prior, _ = lm.decoder().prefill(torch.tensor([0]))
    torch.testing.assert_close(step.log_probs, prior.log_probs, rtol=0, atol=TOLERANCE)
    check_language_model(law, num_draws=60)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("context", [0, 1])
def test_weights_correct_it(kind, context):
    model, lm = steered(kind)
    model = model * Reward(wavy, beta=0.4) * Constraint(has_no("c"))
    brute = brute_force(model, context)
    log_q = lm.score(brute.sequences)
    log_w = importance_log_weights(brute.log_gamma, log_q)
    f = brute.sequences.lengths.double()
    assert float((log_q + log_w).exp().sum()) == pytest.approx(float(brute.log_z.exp()), abs=TOLERANCE)
    expected = float(brute.log_z.exp() * (brute.log_posterior.exp() @ f))
    assert float((log_q + log_w).exp() @ f) == pytest.approx(expected, abs=TOLERANCE)
    assert float(total_variation(log_q, brute.log_posterior)) > 1e-3


def test_the_whole_engine_by_enumeration():
    lm = random_lm("mistral", max_new_tokens=2)
    model = lm * factor_of("bag")
    target, shard = Target(model), Shard(0, 1, 0, (1,), 8)
    total = 0.0
    for probability, part in every_outcome(lambda source: STRONG.simulate(target, shard, source)):
        draws, total = part.draws, total + probability
        assert math.exp(float(draws.log_q[0])) == pytest.approx(probability, abs=TOLERANCE)
        assert float(draws.log_prior[0]) == pytest.approx(float(lm.score(draws)[0]), abs=TOLERANCE)
    assert total == pytest.approx(1.0, abs=TOLERANCE)


# Statistics: p-values below 1e-3 in 1 of 1,000 runs; fixed seeds.


def test_draws_have_the_law_and_importance_reaches_the_posterior():
    model = enumerable_lm("llama") * factor_of("bag") * Reward(wavy, beta=0.4)
    result = infer(model, STRONG, 600, seed=1, progress=False)
    assert result.guarantee is Guarantee.HEURISTIC
    assert result.info["perturbed"] == "cache"
    assert result.info["not_decoded"] == ("wavy",)
    lm = result.as_language_model()
    assert isinstance(lm, PerturbedLM)
    corrected = infer(model, Importance(800, proposal=result), seed=2, progress=False)
    for c in (0, 1):
        brute = brute_force(model, c)
        own = result.draws.select(result.draws.context == c)
        assert goodness_of_fit(own, brute, lm.score(brute.sequences)) > 1e-3
        estimate = corrected.log_normalizer[0]
        assert abs(float(estimate.value[c] - brute.log_z)) < 4.5 * float(estimate.standard_error[c])


# The caller's model, and what it costs.


def test_smc_with_a_perturbed_proposal_reaches_the_posterior():
    """The result of the engine is the proposal; without the correction it is another law."""
    model = enumerable_lm("llama") * factor_of("bag") * Reward(wavy, beta=0.5)
    steered_run = infer(model, PPLM(num_steps=2, step_size=1.0), 300, seed=1, progress=False)
    result = infer(model, SMC(32, proposal=steered_run, num_sweeps=40), seed=5, progress=False)
    estimate, length = result.log_normalizer[0], Feature("length", lambda rows: rows.lengths.double(), on="ids")
    mean, raw = result.expectation(length), steered_run.expectation(length)
    exact = []
    for c in (0, 1):
        brute = brute_force(model, c)
        assert abs(float(estimate.value[c] - brute.log_z)) < 4.5 * float(estimate.standard_error[c])
        exact.append(float((brute.log_posterior.exp() * brute.sequences.lengths).sum()))
        assert abs(float(mean.value[c]) - exact[c]) < 4.5 * float(mean.standard_error[c])
    gaps = [abs(float(raw.value[c]) - exact[c]) / float(raw.standard_error[c]) for c in (0, 1)]
    assert max(gaps) > 4.5


def test_the_callers_model_is_unchanged_bit_by_bit():
    network = build("llama", 5)
    network.train()
    before = copy.deepcopy(network.state_dict())
    flags = [(p.requires_grad, p.grad) for p in network.parameters()]
    lm = TransformersLM(network, tokenizer=tokenizer(5), context=["ab", "bacab"], max_new_tokens=3)
    tokens = torch.tensor([[0, 1, 2, 0]])
    network.eval()
    with torch.no_grad():
        logits = network(input_ids=tokens).logits
    network.train()
    head = head_of(outputs=2)
    weights = copy.deepcopy(head.state_dict())
    infer(lm * BagOfWords(["b"]) * Classifier(head, label=0), STRONG, 20, progress=False)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [(p.requires_grad, p.grad) for p in network.parameters()] == flags
    assert all(torch.equal(value, weights[name]) for name, value in head.state_dict().items())
    assert all(p.grad is None for p in head.parameters())
    network.eval()
    with torch.no_grad():
        assert torch.equal(network(input_ids=tokens).logits, logits)
    assert torch.is_grad_enabled()


def test_every_pass_is_counted():
    model = enumerable_lm("llama") * factor_of("bag")
    result = infer(model, PPLM(num_steps=2, step_size=1.0), 30, progress=False)
    plain = infer(model, PPLM(num_steps=0), 30, progress=False)
    # In each of T steps: two forwards with gradients, one without.
    assert result.cost.lm_forwards == 4 * plain.cost.lm_forwards
    assert 0 < result.cost.backward_tokens < result.cost.lm_tokens
    assert plain.cost.backward_tokens == 0
    hidden = infer(model, PPLM(num_steps=2, step_size=1.0, perturb="hidden"), 30, progress=False)
    assert hidden.cost.lm_forwards == plain.cost.lm_forwards
    prefixes = hidden.cost.lm_tokens - int((model.prior.context_lengths - 1).sum())  # whose next token is drawn
    assert hidden.cost.backward_tokens == 2 * prefixes
    torch.testing.assert_close(result.draws.log_prior, model.prior.score(result.draws), rtol=0, atol=TOLERANCE)
    again = infer(model, PPLM(num_steps=2, step_size=1.0), 30, progress=False)
    assert torch.equal(again.draws.ids, result.draws.ids)


def test_architectures_without_an_open_cache_move_the_hidden_state():
    lm = random_lm("qwen3_next", max_new_tokens=2)
    assert not has_open_past(lm)
    model = lm * factor_of("bag")
    result = infer(model, PPLM(step_size=1.0), 5, progress=False)
    assert result.info["perturbed"] == "hidden"
    with pytest.raises(UnsupportedModel, match="use perturb='hidden'"):
        infer(model, PPLM(perturb="cache"), 5, progress=False)


def test_other_contexts_and_fingerprints():
    model, lm = steered("llama")
    assert (lm | ["ba"]).prompts == ("ba",)
    others = [
        PPLM(step_size=1.0).language_model(model),
        PPLM(perturb="hidden", step_size=1.0).language_model(model),
        STRONG.language_model(enumerable_lm("llama") * factor_of("classifier")),
    ]
    assert len({lm.fingerprint, *(one.fingerprint for one in others)}) == 4
    decoder = lm.decoder()
    assert isinstance(decoder, PerturbedDecoder)
    assert "crop" not in decoder.capabilities
    with pytest.raises(UnsupportedModel, match="cannot be cut back"):
        decoder.crop(None, torch.tensor([0]))


# The two factors.


def test_a_bag_counts_words_and_finds_their_tokens():
    bag = BagOfWords(["Lake", "river", "fish-pond"], weight=0.5)
    texts = ["The lake, the LAKE and lakes.", "A fish-pond by the river", ""]
    column = torch.tensor(bag.features[0].fn(texts), dtype=torch.float64)
    assert column.tolist() == [2.0, 2.0, 0.0]
    assert bag.log_factor({"bag_of_words": column}).tolist() == [1.0, 1.0, 0.0]
    assert bag.words == ("fish-pond", "lake", "river")
    lm = enumerable_lm("llama")
    assert BagOfWords(["B", "c"]).tokens(lm).tolist() == [1, 2]
    log_probs = torch.log_softmax(torch.arange(5.0, dtype=torch.float64), -1)[None]
    step = SoftStep(log_probs, torch.zeros(1, 2), torch.zeros(1, 2))
    assert float(BagOfWords(["b", "c"], 2.0).soft(lm)(step)) == pytest.approx(
        2 * math.log(float(log_probs.exp()[0, 1:3].sum()))
    )
    check_factor(BagOfWords(["b"]), lm)
    assert BagOfWords(["b"]).upper == math.inf
    assert BagOfWords(["b"], -1.0).upper == 0.0
    for wrong in ([], "lake", ["two words"], [3], [""]):
        with pytest.raises(ModelError, match="BagOfWords: got"):
            BagOfWords(wrong)
    with pytest.raises(ModelError, match="got weight=nan"):
        BagOfWords(["b"], math.nan)
    with pytest.raises(ModelError, match="none of its 1 words is a single token"):
        BagOfWords(["zebra"]).tokens(lm)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("outputs", [1, 3])
@torch.no_grad()
def test_a_classifier_reads_the_mean_hidden_state(kind, outputs):
    head = head_of(outputs=outputs)
    factor = Classifier(head, label=None if outputs == 1 else 2)
    lm = enumerable_lm(kind)
    rows = lm.sequences([[0, 1], [2, 4], [1, 0, 3]], [0, 1, 1])
    target = Target(lm * factor)
    got = target.log_factors(rows)["classifier"]
    for i, row in enumerate(rows.token_lists()):
        states = []
        for t in range(1, len(row) + 1):
            step, _ = lm.decoder().prefill(rows.context[i : i + 1], torch.tensor([row[:t]]))
            states.append(step.hidden[0, -1])
        scores = head(torch.stack(states).mean(0))
        expected = torch.nn.functional.logsigmoid(scores)[0] if outputs == 1 else torch.log_softmax(scores, -1)[2]
        assert float(got[i]) == pytest.approx(float(expected), abs=TOLERANCE)
    assert target.cost.lm_forwards > 0
    report = check_factor(factor, lm)
    assert "log φ does not depend on the batch" in report.held
    assert infer(lm * factor, Exact(), progress=False).log_normalizer[0].value.shape == (2,)


def test_the_factors_are_data():
    lm = enumerable_lm("llama")
    head = head_of(outputs=3)
    model = lm * BagOfWords(["b"], 0.5) * Classifier(head, label=1)
    graph = FactorGraph.from_dict(model.graph.to_dict())
    assert graph.required_functions() == ("classifier",)
    again = graph.to_model(lm, {"classifier": head})
    assert (again.factors[0].words, again.factors[0].weight, again.factors[1].label) == (("b",), 0.5, 1)
    rows = lm.sequences([[0, 1], [1, 1, 1]])
    for name, value in Target(model).log_factors(rows).items():
        torch.testing.assert_close(Target(again).log_factors(rows)[name], value)


# Bad input.


def test_refusals():
    lm = enumerable_lm("llama")
    bag = factor_of("bag")

    def run(model, engine=STRONG):
        infer(model, engine, 3, progress=False)

    with pytest.raises(UnsupportedModel, match="pplm needs a differentiable form: factor 'wavy' has none"):
        run(lm * Reward(wavy))
    with pytest.raises(UnsupportedModel, match="the prior is a table"):
        run(enumerable_lm("tabular") * bag)
    with pytest.raises(UnsupportedModel, match="declare it without top_k and top_p"):
        run(random_lm("llama", top_k=3) * bag)
    with pytest.raises(ModelError, match=r"got fusion=1.5, expected a number in \[0, 1\]"):
        run(lm * bag, PPLM(fusion=1.5))
    with pytest.raises(ModelError, match="got num_steps=-1"):
        run(lm * bag, PPLM(num_steps=-1))
    with pytest.raises(ModelError, match=r"got fusion=1\.5"):  # before what the model lacks
        run(lm * Reward(wavy), PPLM(fusion=1.5))
    with pytest.raises(ModelError, match="got step_size='big', expected float"):
        run(lm * bag, PPLM(step_size="big"))
    with pytest.raises(ModelError, match="got perturb='weights'"):
        run(lm * bag, PPLM(perturb="weights"))
    with pytest.raises(ModelError, match="expected a list of names"):
        run(lm * bag, PPLM(factors="bag_of_words"))
    with pytest.raises(ModelError, match="factor 'wavy' has no soft form"):
        run(lm * bag * Reward(wavy), PPLM(factors=["wavy"]))
    with pytest.raises(ModelError, match="the head is in training mode"):
        Classifier(nn.Linear(2, 2))
    with pytest.raises(ModelError, match="label=None for a head with 3 outputs"):
        run(lm * Classifier(head_of(outputs=3)))
    with pytest.raises(ModelError, match="label=1 for a head with one output"):
        run(lm * Classifier(head_of(), label=1))
    with pytest.raises(UnsupportedModel, match="no hidden states"):
        infer(enumerable_lm("tabular") * Classifier(head_of()), Exact(), progress=False)

    def nothing(lm):
        return lambda step: step.log_probs[:, 0] * math.nan

    broken = Factor("broken", bag.features, bag.log_factor, soft=nothing)
    with pytest.raises(ModelError, match="factor 'broken': its soft form"):
        run(lm * broken)
