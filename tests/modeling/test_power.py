"""PowerPrior: π0^α over whole sequences, its incremental form, its cost, its declaration as data; and tempered LMs."""

import math

import pytest
import torch

from lmppl.diagnostics.divergences import total_variation
from lmppl.errors import FactorError, ModelError, UnsupportedModel
from lmppl.inference.exact import Exact
from lmppl.inference.importance import Importance
from lmppl.inference.rejection import Rejection
from lmppl.inference.run import infer
from lmppl.inference.smc import SMC
from lmppl.lm.decoder import Step
from lmppl.lm.derived import TemperedLM
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence.constraint import Constraint
from lmppl.modeling.evidence.power import PowerPotential, PowerPrior
from lmppl.modeling.evidence.reward import Reward
from lmppl.modeling.factors import start_incremental
from lmppl.modeling.graph import FactorGraph
from lmppl.modeling.model import Model
from lmppl.modeling.target import Target
from lmppl.testing import check_factor, check_language_model
from tests.models import ENUMERABLE, TOLERANCE, all_outcomes, brute_force, enumerable_lm, has_no, wavy

CONTEXTS = (0, 1)


def law(model, context):
    rows = brute_force(model.prior, context)
    return infer(model, Exact(), progress=False).as_language_model().score(rows.sequences), rows


@pytest.mark.parametrize("kind", ENUMERABLE)
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.5])
def test_the_target_is_a_power_of_whole_sequences(kind, context, alpha):
    lm = enumerable_lm(kind)
    exact, brute = law(lm**alpha, context)
    expected = alpha * brute.log_prior
    log_z = torch.logsumexp(expected, 0)
    torch.testing.assert_close(exact.exp(), (expected - log_z).exp(), rtol=0, atol=TOLERANCE)
    result = infer(lm**alpha, Exact(), progress=False)
    assert float(result.log_normalizer[0].value[context]) == pytest.approx(float(log_z), abs=TOLERANCE)
    # Mutant: temperature 1/α token by token.
    tempered = lm.at_temperature(1 / alpha).score(brute.sequences)
    apart = float(total_variation(tempered, exact))
    assert apart < TOLERANCE if alpha == 1.0 else apart > 1e-3


@pytest.mark.parametrize("kind", ENUMERABLE)
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_tempered_lm_tempers_each_token(kind, context):
    lm = enumerable_lm(kind)
    tempered = lm.at_temperature(0.4)
    assert isinstance(tempered, TemperedLM)
    for row in all_outcomes(lm, context).token_lists()[::7]:
        total = 0.0
        for t, token in enumerate(row):
            given = torch.tensor([row[:t]], dtype=torch.int64) if t else None
            with torch.no_grad():
                step, _ = lm.decoder().prefill(torch.tensor([context]), given)
                total += float(torch.log_softmax(step.log_probs[0, -1] / 0.4, -1)[token])
        assert float(tempered.score(lm.sequences([row], [context]))) == pytest.approx(total, abs=TOLERANCE)


@pytest.mark.parametrize("kind", ENUMERABLE)
def test_a_tempered_lm_is_a_language_model(kind):
    tempered = enumerable_lm(kind).at_temperature(0.7)
    report = check_language_model(tempered, num_draws=800)
    assert "the probabilities of all outcomes sum to 1" in report.held
    assert tempered.fingerprint != enumerable_lm(kind).fingerprint
    assert tempered.fingerprint != enumerable_lm(kind).at_temperature(0.8).fingerprint
    assert (tempered | ["a"]).prompts == ("a",)


def test_a_tempered_transformers_lm_is_the_lm_with_that_temperature():
    lm, other = enumerable_lm("llama"), enumerable_lm("llama", temperature=0.5)
    rows = all_outcomes(lm, 1)
    torch.testing.assert_close(lm.at_temperature(0.5).score(rows), other.score(rows), rtol=0, atol=TOLERANCE)
    for wrong in (0.0, -1.0, math.inf, "1", True):
        with pytest.raises(ModelError, match="expected a positive number"):
            lm.at_temperature(wrong)


@pytest.mark.parametrize("kind", ENUMERABLE)
@pytest.mark.parametrize("alpha", [0.5, 3.0])
def test_the_incremental_form_adds_up_to_log_phi(kind, alpha):
    report = check_factor(PowerPrior(alpha), enumerable_lm(kind), num_sequences=40, tolerance=1e-10)
    assert "potential(start) + Σ weigh = potential(final) = log φ" in report.held
    assert "φ > 0, as hard=False says" in report.held


def walk(form, lm, context, rows, *, crop=None):
    """States and their potentials, token by token, through the decoder; `crop` cuts after the last token."""
    decoder = lm.decoder()
    with torch.no_grad():
        step, cache = decoder.prefill(context)
        state = start_incremental(form, context, step)
        for token in rows.unbind(1):
            step, cache = decoder.extend(cache, token[:, None])
            state = form.advance(state, token, step)
    return state, cache, decoder


@pytest.mark.parametrize("kind", ENUMERABLE)
@torch.no_grad()
def test_rows_are_selected_and_cut_to_different_lengths(kind):
    lm, form = enumerable_lm(kind), PowerPotential(2.0)
    context, rows = torch.tensor([0, 1, 1]), torch.tensor([[0, 1], [1, 2], [2, 0]])
    state, cache, decoder = walk(form, lm, context, rows)
    index, lengths = torch.tensor([2, 0, 1, 1]), torch.tensor([1, 2, 0, 1])
    state = form.crop(form.select(state, index), lengths)
    for i, (row, n) in enumerate(zip(index.tolist(), lengths.tolist(), strict=True)):
        fresh, _, _ = walk(form, lm, context[row : row + 1], rows[row : row + 1, :n])
        torch.testing.assert_close(form.potential(state)[i], form.potential(fresh)[0], rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(form.weigh(state, None)[i], form.weigh(fresh, None)[0], rtol=0, atol=TOLERANCE)
    if "ragged" not in decoder.capabilities:
        return
    cache = decoder.crop(decoder.select(cache, index), lengths)
    tokens = torch.tensor([0, 2, 1, 0])
    with torch.no_grad():
        step, _ = decoder.extend(cache, tokens[:, None])
    state = form.advance(state, tokens, step)
    for i, (row, n) in enumerate(zip(index.tolist(), lengths.tolist(), strict=True)):
        longer = torch.cat([rows[row, :n], tokens[i : i + 1]])[None]
        fresh, _, _ = walk(form, lm, context[row : row + 1], longer)
        torch.testing.assert_close(form.potential(state)[i], form.potential(fresh)[0], rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(form.weigh(state, None)[i], form.weigh(fresh, None)[0], rtol=0, atol=TOLERANCE)
        some = torch.tensor([[2, 0]]).expand(4, 2)
        chosen = form.weigh(state, some)[i]
        torch.testing.assert_close(chosen, form.weigh(fresh, None)[0][[2, 0]], rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_the_steps_that_are_kept_hold_no_scores():
    form, lm = PowerPotential(2.0), enumerable_lm("llama")
    state, _, _ = walk(form, lm, torch.tensor([0]), torch.tensor([[0, 1]]))
    form.weigh(state, None)
    assert [("logits" in step.__dict__) for step in state.steps] == [False, False, True]
    assert isinstance(state.steps[0], Step)


@torch.no_grad()
def test_off_the_support_the_factor_is_silent():
    lm = TabularLM([[0.5, 0.5, 0.0]] * 3 + [[0.0, 0.6, 0.4]], max_new_tokens=2)
    for alpha in (0.5, 2.0):
        target = Target(lm**alpha)
        rows = lm.sequences([[0, 1], [1, 0]])
        assert target.log_prob_unnormalized(rows)[0] == -math.inf
        assert float(target.log_prob_unnormalized(rows)[1]) == pytest.approx(alpha * math.log(0.3), abs=TOLERANCE)
        assert target.log_factors(rows)["power_prior"][0] == 0.0
        form = PowerPotential(alpha)
        step, _ = lm.decoder().prefill(torch.tensor([0]))
        state = form.start(torch.tensor([0]), step)
        assert form.weigh(state, None)[0, 0] == 0.0
        assert bool(torch.isfinite(form.weigh(state, None)).all())


# Cost and bounds.


@pytest.mark.parametrize("kind", ["tabular", "llama"])
def test_it_costs_no_forward_of_its_own(kind):
    lm = enumerable_lm(kind)
    with_power = infer(lm**2, Importance(300), progress=False)
    without = infer(lm * Reward(wavy), Importance(300), progress=False)
    assert with_power.cost.lm_forwards == without.cost.lm_forwards
    assert with_power.cost.lm_tokens == without.cost.lm_tokens
    torch.testing.assert_close(with_power.draws.log_weight, with_power.draws.log_prior.double(), rtol=0, atol=1e-12)
    exact = infer(lm**2, Exact(), progress=False)
    assert exact.cost.lm_forwards == infer(lm * Reward(wavy), Exact(), progress=False).cost.lm_forwards
    target = Target(lm**2)
    rows = all_outcomes(lm, 0)
    target.log_prob_unnormalized(rows)
    alone = Target(Model(lm))
    alone.log_prior(rows)
    assert target.cost.lm_forwards == alone.cost.lm_forwards


@pytest.mark.parametrize("kind", ["tabular", "mistral"])
def test_tempered_proposals_are_corrected(kind):
    model = enumerable_lm(kind) ** 3.0
    log_z = infer(model, Exact(), progress=False).log_normalizer[0].value
    result = infer(model, Importance(4000, proposal=model.prior.at_temperature(1 / 3)), seed=3, progress=False)
    from_prior = infer(model, Importance(4000), seed=3, progress=False)
    assert bool((result.info["ess"] > from_prior.info["ess"]).all())
    for c in CONTEXTS:
        error = result.log_normalizer[0].standard_error[c]
        assert abs(float(result.log_normalizer[0].value[c] - log_z[c])) < 4.5 * float(error)


@pytest.mark.parametrize("kind", ["tabular", "llama"])
@pytest.mark.parametrize("proposal", ["optimal", "tempered"])
def test_smc_steers_by_the_incremental_form(kind, proposal):
    model = enumerable_lm(kind) ** 2.5
    log_z = infer(model, Exact(), progress=False).log_normalizer[0].value
    q = "optimal" if proposal == "optimal" else model.prior.at_temperature(1 / 2.5)
    result = infer(model, SMC(32, proposal=q, num_sweeps=60), seed=1, progress=False)
    estimate = result.log_normalizer[0]
    for c in CONTEXTS:
        assert abs(float(estimate.value[c] - log_z[c])) < 4.5 * float(estimate.standard_error[c])


def test_rewards_may_read_log_prior():
    lm = enumerable_lm("tabular")
    half = lm * Reward(lambda log_prior: 0.5 * log_prior, on="log_prior", name="half")
    rows = all_outcomes(lm, 0)
    expected = Target(lm**1.5).log_prob_unnormalized(rows)
    torch.testing.assert_close(Target(half).log_prob_unnormalized(rows), expected, rtol=0, atol=TOLERANCE)


def test_the_bound_of_a_sharpened_prior_lets_rejection_run():
    model = enumerable_lm("tabular") ** 1.5
    assert PowerPrior(1.0).upper == PowerPrior(1.5).upper == 0.0
    assert PowerPrior(0.5).upper == math.inf
    result = infer(model, Rejection(200), progress=False)
    assert len(result.draws) == 400
    with pytest.raises(UnsupportedModel, match="power_prior"):
        infer(enumerable_lm("tabular") ** 0.5, Rejection(), progress=False)


# The declaration.


def test_the_declaration_is_data():
    lm = enumerable_lm("tabular")
    model = lm**2 * Reward(wavy, beta=0.5) * Constraint(has_no("b"))
    assert [f.name for f in model.factors][:2] == ["power_prior", "wavy"]
    graph = model.graph
    assert "feature:log_prior" in graph.dependencies("power_prior")
    assert "c" in graph.dependencies("power_prior")
    assert "log_prior" not in graph.required_functions()
    functions = {f.name: f.fn for f in model.features.values() if f.on == "text"}
    again = FactorGraph.from_dict(graph.to_dict()).to_model(lm, functions)
    assert again.factors[0].alpha == 2.0
    assert again.graph.content_hash() == graph.content_hash()
    assert again.spec_hash == model.spec_hash
    assert (lm**2).spec_hash != (lm**3).spec_hash
    assert (lm**2).formula == "π*(x|c) ∝ π0(x|c)^2"
    assert (lm**0.5 * Reward(wavy)).formula == "π*(x|c) ∝ π0(x|c)^0.5 · exp(wavy(x))"
    assert (lm**2 * PowerPrior(1.5)).formula == "π*(x|c) ∝ π0(x|c)^2.5"
    assert "power_prior: PowerPrior, φ = π0(x|c)^1" in repr(lm**2)
    assert PowerPrior(0.25).formula == "π0(x|c)^(-0.75)"


def test_two_powers_multiply_and_share_their_feature():
    lm = enumerable_lm("tabular")
    model = lm**2 * PowerPrior(1.5)
    assert len(model.features) == 1
    assert [f.name for f in model.factors] == ["power_prior", "power_prior_2"]
    exact, brute = law(model, 0)
    expected = 2.5 * brute.log_prior
    torch.testing.assert_close(exact, expected - torch.logsumexp(expected, 0), rtol=0, atol=TOLERANCE)


def test_errors():
    lm = enumerable_lm("tabular")
    for wrong in (0, -1.0, math.inf, math.nan, "2", True):
        with pytest.raises(ModelError, match="power prior: got alpha="):
            lm**wrong
    with pytest.raises(ModelError, match="reads the LM's next-token law"):
        PowerPotential(2.0).start(torch.tensor([0]))
    rows = lm.sequences([[0, 3]])
    from lmppl.modeling.user_functions import evaluate

    with pytest.raises(FactorError, match="reads log π0"):
        evaluate(PowerPrior(2.0).features[0], rows, factor="power_prior")
