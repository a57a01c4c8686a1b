"""SMC as an engine: scores against fresh forwards, what it costs, what it tells, and what it refuses."""

import math
from dataclasses import replace

import pytest
import torch

from lmppl.diagnostics.weights import pareto_khat
from lmppl.errors import FactorError, InfeasibleModel, ModelError
from lmppl.inference.genealogy import ancestor_paths, distinct_ancestors
from lmppl.inference.importance import Importance
from lmppl.inference.run import infer
from lmppl.inference.smc import SMC
from lmppl.inference.step_proposals import OptimalProposal, PriorProposal
from lmppl.inference.twists import FactorTwist, ProductTwist
from lmppl.lm.randomness import Source
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence.automata import Automaton
from lmppl.modeling.evidence.constraint import Constraint
from lmppl.modeling.evidence.reward import Reward
from lmppl.modeling.factors import Feature
from lmppl.modeling.target import Target, log_evidence
from tests.inference.smc_cases import ArbitraryTwist, counts, forbids, small_lm
from tests.lm.random_models import random_lm, uncached_logits
from tests.models import ENUMERABLE, brute_force, count_of, enumerable_lm, has_no, wavy


def model_of(kind):
    return random_lm(kind, max_new_tokens=5) * Reward(wavy, beta=0.3) * counts("a", 5, 0.8) * counts("c", 5, 0.5)


def source(seed=0):
    return Source(torch.Generator().manual_seed(seed))


# Scores and costs.


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("every", [1, 2])
def test_scores_are_those_of_fresh_forwards(kind, every):
    """Two contexts of different length with equal continuations in one batch, resampled at every chance."""
    model = model_of(kind)
    smc = SMC(24, ess_threshold=1.0, resampling="stratified", every=every, proposal="prior")
    run = infer(model, smc, 24, progress=False)
    draws = run.draws
    texts = [{t for t, c in zip(draws.text, draws.context.tolist(), strict=True) if c == k} for k in range(2)]
    assert texts[0] & texts[1]
    assert int(run.info["resamplings"].sum()) > 0
    assert bool(model.prior.is_outcome(draws).all())
    assert torch.allclose(draws.log_prior, model.prior.score(draws).double(), atol=1e-9)
    for row, (tokens, c) in enumerate(zip(draws.token_lists(), draws.context.tolist(), strict=True)):
        scores = torch.log_softmax(uncached_logits(model.prior, c, tokens[:-1]), -1)
        wanted = sum(float(scores[t, v]) for t, v in enumerate(tokens))
        assert float(draws.log_prior[row]) == pytest.approx(wanted, abs=1e-9)


def test_one_forward_a_step_for_the_live_and_distinct_rows():
    model = random_lm("llama", max_new_tokens=5) * counts("a", 5, 0.8)
    target, calls = Target(model), []

    class Watches(PriorProposal):
        def start(self, target, frontier):
            inner = super().start(target, frontier)
            propose = inner.propose

            def spied(rows, source):
                prefixes = frontier.sequences().select(frontier.live)
                calls.append(len({(c, tuple(t)) for c, _, t in prefixes.keys()}))  # noqa: SIM118 - a method
                return propose(rows, source)

            inner.propose = spied
            return inner

    SMC(32, proposal=Watches(), ess_threshold=1.0).sweep(target, torch.arange(2), source())
    assert target.cost.lm_forwards == len(calls) == 5
    assert target.cost.lm_tokens == int(model.prior.context_lengths.sum()) + sum(calls[1:])
    assert calls[0] == 2
    assert all(n < 64 for n in calls)


def test_user_functions_are_called_once_for_each_distinct_text():
    seen = []

    def noted(texts):
        seen.extend(texts)
        return [0.1 * len(t) for t in texts]

    run = infer(random_lm("llama") * Reward(noted), SMC(32), 128, progress=False)
    assert len(seen) == len(set(seen)) == run.cost.factor_calls


# What comes back.


@pytest.mark.parametrize("kind", ENUMERABLE)
def test_weights_of_all_draws_average_to_z(kind):
    model = enumerable_lm(kind) * Reward(wavy, beta=0.4) * Constraint(has_no("b"))
    run = infer(model, SMC(16), 5 * 16, progress=False)
    draws, info = run.draws, run.info
    assert len(draws) == 2 * 5 * 16
    assert draws.context.tolist() == sorted(draws.context.tolist())
    for c in range(2):
        rows = draws.context == c
        mean = torch.logsumexp(draws.log_weight[rows], 0) - math.log(int(rows.sum()))
        assert float(mean) == pytest.approx(float(run.log_normalizer[0].value[c]), abs=1e-12)
        by_sweep = [torch.logsumexp(draws.log_weight[rows & (draws.columns["sweep"] == s)], 0) for s in range(5)]
        assert torch.allclose(torch.stack(by_sweep) - math.log(16), info["log_z_sweeps"][c], atol=1e-12)
    assert set(draws.columns) == {"sweep", "shard", "parent"}
    assert info["log_z_sweeps"].shape == info["resamplings"].shape == info["distinct_ancestors"].shape == (2, 5)
    assert info["ess_history"].shape[:2] == (2, 5)
    assert run.log_normalizer[0].kind == "unbiased_Z"
    assert run.log_normalizer[0].replicates == 5
    assert "Student" in run.log_normalizer[0].note


def test_sweeps_are_as_many_as_the_draws_need():
    model = enumerable_lm("tabular") * Reward(wavy)
    assert len(infer(model, SMC(10), progress=False).draws) == 2 * 80
    assert len(infer(model, SMC(10, num_sweeps=3), progress=False).draws) == 2 * 30
    assert len(infer(model, SMC(10), 21, progress=False).draws) == 2 * 30
    single = infer(model, SMC(10), 10, progress=False).log_normalizer[0]
    assert bool(single.interval.isnan().all())
    assert "one sweep" in single.note


def test_genealogy():
    ancestors = torch.tensor([[[0, 0, 2]], [[0, 1, 1]], [[1, 1, 2]]])
    # Final particles come from slots 1, 1, 2, before that from 1, 1, 1, and before that from 0.
    assert ancestor_paths(ancestors).tolist() == [[[0, 0, 0]], [[1, 1, 1]], [[1, 1, 2]]]
    assert distinct_ancestors(ancestors).tolist() == [[1], [1], [2]]
    untouched = torch.arange(4).expand(3, 2, 4)
    assert distinct_ancestors(untouched).tolist() == [[4, 4]] * 3


def test_ancestors_are_those_whose_prefixes_the_rows_share():
    model = enumerable_lm("tabular") * counts("a", 4, 3.0)
    run = infer(model, SMC(12, ess_threshold=1.0, proposal="prior"), 12, progress=False)
    (ancestors,) = run.info["ancestors"]
    first = ancestor_paths(ancestors)[0]
    for c in range(2):
        ids = run.draws.ids[run.draws.context == c]
        for slot in first[c].unique().tolist():
            assert len(ids[first[c] == slot, 0].unique()) == 1
        resampled = torch.nonzero((ancestors[:, c] != torch.arange(12)).any(1)).squeeze(1)
        last = ancestors[int(resampled[-1]), c]
        assert run.draws.columns["parent"][run.draws.context == c].equal(last.long())
    assert int(run.info["distinct_ancestors"].max()) < 12


def test_weights_before_resampling_tell_of_heavy_tails():
    model = TabularLM.random(12, 6, seed=3, eos=None) * Reward(wavy)
    run = infer(model, SMC(64, twist=ArbitraryTwist(12, spread=2.5), proposal="prior"), 256, progress=False)
    assert float(run.info["khat"][0]) > 0.3
    note = run.log_normalizer[0].note
    assert ("heavy-tailed" in note) is (float(run.info["khat"][0]) > 0.7)


def test_khat_is_that_of_the_weights_at_the_worst_round():
    """Never resampled, from the prior: the weight after t tokens is ψ(x_≤t), and at the end φ(x)."""
    lm = TabularLM.random(12, 6, seed=3, eos=None)
    twist = ArbitraryTwist(12, spread=2.5)
    run = infer(lm * Reward(wavy), SMC(64, twist=twist, proposal="prior", ess_threshold=0.0), 256, progress=False)
    rows = run.draws.token_lists()
    values = [[twist.value(0, tuple(row[:t])) for row in rows] for t in range(1, 6)]
    rounds = [torch.tensor(v, dtype=torch.float64) for v in values]
    rounds.append(torch.tensor(wavy(run.draws.text), dtype=torch.float64))
    shares = [torch.softmax(weights, 0) for weights in rounds]
    sizes = [1 / float(w.square().sum()) for w in shares]
    worst = min(range(6), key=sizes.__getitem__)
    assert worst < 5  # not the final weights
    shapes = [pareto_khat(weights).value for weights in rounds]
    assert float(run.info["khat"][0]) == pytest.approx(shapes[worst], abs=1e-9)
    assert abs(shapes[worst] - shapes[-1]) > 0.05


def test_khat_pools_sweeps_on_the_scale_of_z():
    """Resampled after every token: the weights of a round count for what their sweep's Ẑ is up to it."""
    lm = TabularLM.random(12, 6, seed=3, eos=None)
    smc, parts = SMC(64, twist=ArbitraryTwist(12, spread=2.5), proposal="prior", ess_threshold=1.0), []
    run = infer(lm * Reward(wavy), smc, 256, progress=False, on_part=parts.append)
    assert len(parts) == 4
    assert all(bool(p.info["resampled"][:-1].all()) for p in parts)
    history = torch.stack([p.info["log_weights"][:, 0] for p in parts], 1)  # (rounds, sweeps, N)
    log_z = torch.logsumexp(history, -1) - math.log(64)
    assert torch.allclose(log_z[-1], run.info["log_z_sweeps"][0], atol=1e-10, rtol=0)
    sizes = [1 / float(torch.softmax(w.flatten(), 0).square().sum()) for w in history]
    worst = min(range(len(sizes)), key=sizes.__getitem__)
    assert float(run.info["khat"][0]) == pytest.approx(pareto_khat(history[worst].flatten()).value, abs=1e-9)
    alone = history - log_z[:, :, None]  # mutant: each sweep on a scale of its own, at any round
    mutants = [pareto_khat(weights.flatten()).value for weights in alone]
    assert not any(abs(value - float(run.info["khat"][0])) < 0.01 for value in mutants)  # nan: undefined


def test_defaults():
    lm, target = small_lm("tabular"), lambda m: Target(m)
    smc = SMC()
    assert (smc.num_particles, smc.ess_threshold, smc.resampling, smc.num_sweeps) == (64, 0.5, "systematic", 8)
    plain = target(lm * Reward(wavy))
    assert smc.twist_of(plain) is None
    assert isinstance(smc.step_proposal(plain), PriorProposal)
    formed = target(lm * Reward(wavy) * counts("a", 3, 1.0))
    assert isinstance(smc.twist_of(formed), FactorTwist)
    assert isinstance(smc.step_proposal(formed), OptimalProposal)
    reads_text = counts("a", 3, 1.0)
    reads_text.incremental.needs = ("text",)
    assert isinstance(smc.step_proposal(target(lm * reads_text)), PriorProposal)
    alone = replace(smc, twist=ProductTwist())
    assert alone.twist_of(formed) is None


def test_without_twist_and_resampling_it_is_importance_sampling():
    model = enumerable_lm("tabular") * Reward(wavy, beta=0.4) * Constraint(has_no("b"))
    run = infer(model, SMC(64, ess_threshold=0.0, twist=ProductTwist()), 64, progress=False)
    assert torch.allclose(run.draws.log_weight, log_evidence(run.draws))
    assert int(run.info["resamplings"].sum()) == 0


def test_an_approximation_can_propose():
    from lmppl.inference.exact import Exact

    model = enumerable_lm("llama") * Reward(wavy, beta=0.4)
    table = infer(model, Exact(), progress=False)
    run = infer(model, SMC(16, ess_threshold=0.0, proposal=table), 32, progress=False)
    exact = torch.stack([brute_force(model, c).log_z for c in range(2)])
    assert torch.allclose(run.draws.log_weight, exact[run.draws.context], atol=1e-9)


def test_an_automaton_masks_tokens():
    prior = TabularLM.random(6, 12, order=2, seed=0)
    model = prior * Constraint(Automaton.avoiding("a") & Automaton.length(12, 12), name="long")
    smc, blind = infer(model, SMC(), progress=False), infer(model, Importance(512), progress=False)
    assert float(smc.log_normalizer[0].standard_error[0]) < 0.2 * float(blind.log_normalizer[0].standard_error[0])
    assert bool((smc.draws.log_weight > -math.inf).all())


def test_progress_is_told():
    heard = []
    target = Target(enumerable_lm("tabular") * Reward(wavy))
    target.watcher = lambda share, figures: heard.append((share, dict(figures)))
    SMC(8).sweep(target, torch.arange(2), source())
    assert [s for s, _ in heard] == sorted(s for s, _ in heard)
    assert heard[-1][0] == 1.0
    assert set(heard[0][1]) == {"ESS", "log Ẑ", "live rows"}


def test_a_stopped_run_goes_on_to_the_same_draws(tmp_path):
    model = enumerable_lm("llama") * Reward(Feature("wavy", wavy, fingerprint="1"), beta=0.4)
    whole = infer(model, SMC(8), 32, progress=False)
    stopped = []

    def stop(part):
        stopped.append(part)
        if len(stopped) == 2:
            raise KeyboardInterrupt

    half = infer(model, SMC(8), 32, progress=False, checkpoint=tmp_path / "run", on_part=stop)
    assert half.status == "interrupted"
    again = infer(model, SMC(8), 32, progress=False, checkpoint=tmp_path / "run")
    assert again.draws.ids.equal(whole.draws.ids)
    assert again.draws.log_weight.equal(whole.draws.log_weight)
    assert again.info["log_z_sweeps"].equal(whole.info["log_z_sweeps"])


# What goes wrong.


def test_rows_that_die_leave_no_trace_in_the_draws():
    """A form kills rows before their end; draws are outcomes all the same, and Ẑ is right."""
    lm = enumerable_lm("tabular")
    model = lm * forbids("b", 4) * Reward(wavy, beta=0.4)
    for threshold in (0.0, 0.5, 1.0):
        smc = SMC(32, ess_threshold=threshold, proposal="prior")
        run = infer(model, smc, 60 * 32, progress=False)
        assert bool(lm.is_outcome(run.draws).all())
        alive = run.draws.log_weight > -math.inf
        assert not any("b" in t for t in run.draws.select(alive).text)
        assert threshold == 0.0 or float(alive.double().mean()) > 0.8
        for c in range(2):
            low, high = run.log_normalizer[0].interval[c].tolist()
            assert low - 0.02 < float(brute_force(model, c).log_z) < high + 0.02


def test_a_sweep_that_dies_weighs_nothing():
    lm = TabularLM.random(3, 3, seed=0)
    model = lm * forbids("a", 3)
    run = infer(model, SMC(1, proposal="prior"), 200, progress=False)
    dead = run.info["log_z_sweeps"][0] == -math.inf
    assert 20 < int(dead.sum()) < 180
    assert int(run.info["zero_sweeps"][0]) == int(dead.sum())
    assert len(run.draws) == 200
    assert bool(lm.is_outcome(run.draws).all())
    assert (run.draws.log_weight == -math.inf).equal(dead)
    assert torch.allclose(run.draws.log_prior, lm.score(run.draws), atol=1e-10)


def test_all_dead_names_the_factor_the_token_and_the_bound():
    lm = small_lm("tabular", 3)
    never = Constraint(lambda texts: [False] * len(texts), name="never")
    with pytest.raises(InfeasibleModel) as error:
        infer(lm * Reward(wavy) * never, SMC(8, ess_threshold=0.0), progress=False)
    message = str(error.value)
    assert "smc: all 8 particles died in each of 8 sweeps for context '' (and for 1 more)" in message
    assert "factor 'never' gave most of them weight zero" in message
    assert "Pr_π0(γ > 0) < 4.6e-02 with 95% confidence" in message
    with pytest.raises(InfeasibleModel, match=r"smc: all 8 particles died in its only sweep for"):
        infer(lm * never, SMC(8), 8, progress=False)
    with pytest.raises(InfeasibleModel, match=r"Z < 4\.6e-02 with 95% confidence; use more particles"):
        infer(lm * never, SMC(8, ess_threshold=0.0), progress=False)
    with pytest.raises(InfeasibleModel, match=r"Z ≤ Pr\(Ẑ > 0\) < 0\.31 with 95% confidence"):
        infer(lm * never, SMC(8), progress=False)
    no_a, no_b = (Constraint(Automaton.avoiding(x), name=f"no_{x}") for x in "ab")
    hopeless = TabularLM.random(2, 3, seed=0, eos=None) * no_a * no_b
    with pytest.raises(InfeasibleModel, match=r"the last of them at token 1: factor 'no_.' .*'no_b'.*Z ≤ Pr\(Ẑ > 0\)"):
        infer(hopeless, SMC(8), progress=False)


def test_a_form_that_breaks_its_law_is_named():
    lm = small_lm("tabular", 3)
    with pytest.raises(FactorError, match=r"factor 'no_b': its incremental form breaks its law at token 1 .*potential"):
        infer(lm * counts("a", 3, 0.7) * forbids("b", 3, wrong="weigh"), SMC(8), progress=False)
    with pytest.raises(FactorError, match=r"factor 'count_a': .* for the text .*expected log φ = "):
        infer(lm * forbids("b", 3) * counts("a", 3, 0.7, error=0.5), SMC(8), progress=False)

    contradicted = Constraint(lambda texts: ["b" in t for t in texts], name="b", automaton=Automaton.containing("a"))
    with pytest.raises(FactorError, match=r"factor 'b': .* breaks its law .* expected log φ = -inf"):
        infer(lm * contradicted, SMC(16), progress=False)

    class Broken(ArbitraryTwist):
        def weigh(self, state, candidates):
            return super().weigh(state, candidates) * math.nan

    with pytest.raises(FactorError, match="weigh is nan for token 0 after the text ''"):
        infer(lm * Reward(wavy), SMC(8, twist=Broken(3)), progress=False)


def test_a_proposal_that_does_not_cover_is_explained():
    from lmppl.inference.conditional_smc import conditional_smc

    lm = TabularLM([[0.5, 0.3, 0.2]] * 4, ["a", "b", "<eos>"], max_new_tokens=2)
    blind = TabularLM([[0.8, 0.0, 0.2]] * 4, ["a", "b", "<eos>"], max_new_tokens=2)
    model = lm * Reward(count_of("b"))
    draws = infer(model, Importance(64), progress=False).draws
    row = draws.select(["b" in t for t in draws.text]).select([0])
    with pytest.raises(ModelError, match=r"q = 0 for the token 1 .*the weight γ/q is infinite"):
        conditional_smc(Target(model), SMC(4, proposal=blind), row, source())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_particles": 0}, "num_particles=0, expected at least 1"),
        ({"ess_threshold": 1.5}, r"ess_threshold=1.5, expected a share of N in \[0, 1\]"),
        ({"resampling": "systemic"}, "did you mean 'systematic'"),
        ({"every": "line"}, "every='line', expected a number of tokens"),
        ({"every": 0}, "every=0"),
        ({"every": 2.5}, "every=2.5, expected a number of tokens"),
        ({"every": None}, "every=None, expected a number of tokens"),
        ({"num_sweeps": 0}, "num_sweeps=0"),
        ({"twist": "exact"}, "twist: got str, .* expected an object with needs, start"),
        ({"proposal": "best"}, "proposal='best', expected 'prior', 'optimal'"),
        ({"proposal": 3}, "proposal=3, expected"),
        ({"proposal": TabularLM.random(4, 2)}, "vocab_size 4, expected the prior's 3"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ModelError, match=message):
        infer(small_lm("tabular") * Reward(wavy), SMC(**options), progress=False)
