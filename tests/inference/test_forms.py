"""Incremental forms of a user's that are wrong: exclusions that no row shows, values that are none, missing members."""

import math
from dataclasses import replace

import pytest
import torch

from lmppl.errors import FactorError, InfeasibleModel, ModelError
from lmppl.inference import infer
from lmppl.inference.guided import GuidedLM
from lmppl.inference.importance import Importance
from lmppl.inference.smc import SMC
from lmppl.inference.twists import FactorTwist, ProductTwist
from lmppl.inference.weighted_decoding import WeightedDecoding
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence.automata import Automaton
from lmppl.modeling.evidence.constraint import Constraint
from lmppl.modeling.evidence.reward import Reward
from lmppl.modeling.target import Target
from lmppl.testing.enumeration import every_outcome
from tests.inference.smc_cases import ArbitraryTwist, counts, forbids, small_lm, with_form
from tests.models import brute_force, enumerable_lm, has_no, wavy

KINDS = ("tabular", "llama", "mistral")
CONTRADICTED = r"factor 'free': its incremental form breaks its law .*-inf"


class Lawful:
    """Whatever `wavy` says, prefix by prefix: a form of texts that keeps the law, but for what it excludes."""

    needs = ("ids",)

    def __init__(self, lm, excluded=None, needs=("ids",)):
        self.lm, self.excluded, self.needs = lm, excluded, needs

    def value(self, rows):
        texts = self.lm.sequences([row for _, row in rows], [c for c, _ in rows]).text
        values = [v / 0.4 for v in wavy(texts)]
        return [-math.inf if self.excluded in row else v for v, (_, row) in zip(values, rows, strict=True)]

    def start(self, contexts):
        return [(c, ()) for c in contexts.tolist()]

    def weigh(self, state, candidates):
        every = [range(self.lm.vocab_size)] * len(state) if candidates is None else candidates.tolist()
        rows = [[(c, (*row, v)) for v in some] for (c, row), some in zip(state, every, strict=True)]
        before = self.value(state)
        weights = [[v - b if v > -math.inf else v for v in self.value(r)] for r, b in zip(rows, before, strict=True)]
        return torch.tensor(weights, dtype=torch.float64)

    def advance(self, state, tokens, step):
        return [(c, (*row, v)) for (c, row), v in zip(state, tokens.tolist(), strict=True)]

    def potential(self, state):
        return torch.tensor(self.value(state), dtype=torch.float64)

    def select(self, state, index):
        return [state[i] for i in index.tolist()]

    def crop(self, state, lengths):
        return [(c, row[:n]) for (c, row), n in zip(state, lengths.tolist(), strict=True)]


def lawful(lm, excluded=None, needs=("ids",)):
    return with_form(Reward(wavy, beta=0.4, name="free"), Lawful(lm, excluded, needs))


ENGINES = {
    "optimal": SMC(8),
    "prior": SMC(8, proposal="prior"),
    "decoding": WeightedDecoding(num_draws=8),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_that_is_excluded_though_it_may_follow_is_found(kind, engine):
    """No row of the run shows it: E Ẑ < Z, and all the rows that are left agree with the form."""
    lm = enumerable_lm(kind)
    with pytest.raises(FactorError, match=CONTRADICTED):
        infer(lm * lawful(lm, excluded=1), ENGINES[engine], progress=False)
    infer(lm * lawful(lm), ENGINES[engine], progress=False)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_form_of_texts_is_asked_about_a_few_tokens(engine):
    lm = enumerable_lm("tabular")
    with pytest.raises(FactorError, match=CONTRADICTED):
        infer(lm * lawful(lm, excluded=1, needs=("text",)), ENGINES[engine], progress=False)


def test_the_first_token_and_the_end_can_be_excluded_wrongly():
    lm = TabularLM.random(3, 3, seed=0, context=["", "a"])
    for token in (0, 2):
        with pytest.raises(FactorError, match=CONTRADICTED):
            infer(lm * lawful(lm, excluded=token), SMC(16), progress=False)


def test_a_form_that_excludes_everything_is_no_proof_that_nothing_is_possible():
    lm = small_lm("tabular", 3)
    nothing = lawful(lm)
    nothing.incremental.value = lambda rows: [0.0 if not row else -math.inf for _, row in rows]
    with pytest.raises(FactorError, match=CONTRADICTED):
        infer(lm * nothing, SMC(8), progress=False)
    with pytest.raises(FactorError, match=CONTRADICTED):
        infer(lm * nothing, WeightedDecoding(num_draws=8), progress=False)
    nothing.incremental.value = lambda rows: [-math.inf for _ in rows]
    with pytest.raises(FactorError, match=CONTRADICTED):
        infer(lm * nothing, SMC(8), progress=False)


def test_an_automaton_that_rejects_what_the_function_allows_is_found():
    lm = small_lm("tabular", 3)
    wrong = Constraint(lambda texts: [True for _ in texts], name="free", automaton=Automaton.avoiding("b"))
    with pytest.raises(FactorError, match=r"factor 'free': its incremental form breaks its law"):
        infer(lm * wrong, SMC(8), progress=False)
    mended = Constraint(lambda texts: ["ab" not in t[:2] for t in texts], name="free", prefix_closed=True)
    infer(lm * mended, SMC(8), progress=False)


def test_a_constraint_that_is_not_closed_is_found():
    """A text with one b is mended by a second: prefix_closed=True is false of it."""
    lm = TabularLM.random(3, 4, seed=2)
    even = Constraint(lambda texts: [t.count("b") % 2 == 0 for t in texts], name="free", prefix_closed=True)
    with pytest.raises(FactorError, match=r"factor 'free': it is declared prefix_closed=True, but forbids"):
        infer(lm * even, SMC(32, proposal="prior"), progress=False)


def test_a_guided_proposal_and_a_product_of_twists_are_tried_too():
    lm = enumerable_lm("tabular")
    model = lm * lawful(lm, excluded=1)
    guided = WeightedDecoding().language_model(model)
    for engine in (
        Importance(16, proposal=guided),
        SMC(8, twist=ProductTwist(), proposal=guided),
        SMC(8, twist=ProductTwist(FactorTwist.of(model), ArbitraryTwist(lm.vocab_size))),
    ):
        with pytest.raises(FactorError, match=CONTRADICTED):
            infer(model, engine, progress=False)


def test_forms_that_follow_from_their_factor_are_not_tried():
    for model in (
        enumerable_lm("llama") * Constraint(Automaton.avoiding("a"), name="no_a"),
        enumerable_lm("llama") ** 2.0,
        enumerable_lm("llama") * Reward(wavy),
    ):
        target = Target(model)
        smc = SMC(8)
        run = infer(model, smc, 8, seed=3, progress=False)
        smc.run_shard(target, smc.plan(target, _request(3, 8))[0])
        horizon = model.prior.max_new_tokens
        assert run.cost.lm_forwards == target.cost.lm_forwards <= horizon


def _request(seed, count):
    from lmppl.inference.engine import Request

    return Request(count, None, seed)


def test_the_trial_costs_two_forwards_a_run_and_changes_no_draw():
    lm = enumerable_lm("llama")
    model, without = lm * forbids("b", lm.vocab_size), lm * Constraint(Automaton.avoiding("b"), name="no_b")
    tried, plain = (infer(m, SMC(16), 64, seed=5, progress=False) for m in (model, without))
    assert tried.draws.ids.equal(plain.draws.ids)
    assert tried.cost.lm_forwards - plain.cost.lm_forwards == 2
    prompts = int(lm.context_lengths.sum())
    assert tried.cost.lm_tokens - plain.cost.lm_tokens <= 16 * lm.max_new_tokens * 2 + 16 * prompts
    again = infer(model, SMC(16), 64, seed=5, progress=False)
    assert again.cost == tried.cost.__class__(**{**vars(tried.cost), "seconds": again.cost.seconds})


def test_a_run_with_a_trial_can_still_be_enumerated():
    lm = small_lm("tabular", 2)
    model = lm * forbids("b", 3) * counts("a", 3, 0.5)
    target, smc = Target(model), SMC(2)
    shard = smc.plan(target, _request(0, 2))[0]
    runs = list(every_outcome(lambda source: smc.simulate(target, shard, source)))
    for c in range(2):
        mean = sum(p * float(part.info["log_z"][c].exp()) for p, part in runs)
        assert mean == pytest.approx(float(brute_force(model, c).log_z.exp()), abs=1e-10)


# Values that are none, members that are missing.


class Flawed(Lawful):
    """A form with one method that answers wrongly."""

    def __init__(self, lm, method, answer):
        super().__init__(lm)
        self.method, self.answer = method, answer

    def weigh(self, state, candidates):
        values = super().weigh(state, candidates)
        return self.answer(values) if self.method == "weigh" else values

    def potential(self, state):
        values = super().potential(state)
        return self.answer(values) if self.method == "potential" else values


def stumble(values):
    return values + {}["lost"]


FLAWS = {
    "nan": (lambda v: v * math.nan, r"{method} is nan.* expected a finite number of nats or −inf"),
    "inf": (lambda v: v + math.inf, r"{method} is inf.* expected a finite number of nats or −inf"),
    "list": (lambda v: v.tolist(), r"{method} gave a list, expected a tensor of shape \("),
    "shape": (lambda v: v[..., None], r"{method} gave shape \(.*, 1\), expected \("),
    "raises": (stumble, r"{method} raised KeyError: 'lost' \(test_forms.py, line \d+\)"),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["weigh", "potential"])
@pytest.mark.parametrize("flaw", FLAWS)
def test_what_a_form_answers_wrongly_names_the_factor(flaw, method, engine):
    lm = small_lm("tabular")
    answer, message = FLAWS[flaw]
    factor = with_form(Reward(wavy, beta=0.4, name="mine"), Flawed(lm, method, answer))
    expected = r"factor 'mine': its incremental form: " + message.format(method=method)
    with pytest.raises(FactorError, match=expected):
        infer(lm * factor, ENGINES[engine], progress=False)
    whose = "guide Flawed" if engine == "decoding" else "twist"
    engine = replace(ENGINES[engine], twist=Flawed(lm, method, answer))
    with pytest.raises(FactorError, match=f"{whose}: " + message.format(method=method)):
        infer(lm * Reward(wavy), engine, progress=False)


def test_a_potential_of_one_column_is_not_taken_for_a_number_a_row():
    lm = small_lm("tabular")
    column = Flawed(lm, "potential", lambda v: v[:, None])
    with pytest.raises(FactorError, match=r"factor 'mine': .* potential gave shape \(16, 1\), expected \(16,\)"):
        infer(lm * with_form(Reward(wavy, beta=0.4, name="mine"), column), SMC(8), progress=False)
    wide = Flawed(lm, "weigh", lambda v: v[:, :1])
    with pytest.raises(FactorError, match=r"factor 'mine': .* weigh gave shape \(16, 1\), expected \(16, 3\)"):
        infer(lm * with_form(Reward(wavy, beta=0.4, name="mine"), wide), SMC(8), progress=False)


def test_errors_in_a_sweep_quote_the_text():
    lm = TabularLM.random(3, 3, seed=0, eos=None)
    late = Flawed(lm, "weigh", lambda v: v)
    late.answer = lambda v: v if late.calm else v * math.nan
    late.calm = True

    def potential(state):
        late.calm = len(state[0][1]) < 1
        return Lawful.potential(late, state)

    late.potential = potential
    with pytest.raises(FactorError, match=r"weigh is nan for token 0 after the text '[abc]+', expected"):
        infer(lm * with_form(Reward(wavy, beta=0.4, name="mine"), late), SMC(4, proposal="optimal"), progress=False)


class Without:
    """A form that lacks a member."""

    def __init__(self, *names):
        self.names = names

    def __getattr__(self, name):
        if name.startswith("_") or name in self.names:
            raise AttributeError(name)
        return ("ids",) if name == "needs" else lambda *a: None


def test_a_form_without_needs_is_told_what_they_are():
    lm = small_lm("tabular")
    for factor in (lambda form: with_form(Reward(wavy, name="mine"), form),):
        with pytest.raises(
            ModelError, match=r"factor 'mine': its incremental form has no `needs`.* needs = \(\"ids\",\)"
        ):
            factor(Without("needs"))
        with pytest.raises(ModelError, match=r"factor 'mine': its incremental form: got Without, which has no weigh"):
            factor(Without("weigh"))
    with pytest.raises(ModelError, match="guide has no `needs`"):
        GuidedLM(lm, Without("needs"))
    with pytest.raises(ModelError, match="SMC: twist has no `needs`"):
        infer(lm * Reward(wavy), SMC(4, twist=Without("needs")), progress=False)
    with pytest.raises(ModelError, match="twist has no `needs`"):
        ProductTwist(Without("needs"))


# A learned twist belongs to one LM.


class Elsewhere(ArbitraryTwist):
    """As a learned twist refuses."""

    def unsupported_reason(self, lm):
        return "the twist was learned on another LM"


def test_a_twist_of_another_lm_is_refused_by_every_guide():
    lm = small_lm("tabular")
    for engine in (
        WeightedDecoding(Elsewhere(3)),
        SMC(4, twist=Elsewhere(3)),
        SMC(4, twist=ProductTwist(ArbitraryTwist(3), Elsewhere(3))),
        WeightedDecoding(ProductTwist(Elsewhere(3))),
    ):
        with pytest.raises(ModelError, match="the twist was learned on another LM"):
            infer(lm * Reward(wavy), engine, progress=False)


# Decoding that satisfies nothing.


def test_decoding_that_never_satisfies_the_evidence_says_so(caplog):
    lm = small_lm("tabular", 3)
    never = Constraint(lambda texts: [False for _ in texts], name="never")
    told = (
        r"weighted_decoding: none of 30 draws for context '' \(and for 1 more\) has γ > 0 "
        r"\(factor 'never' is 0 on 30\): Pr_q\(γ > 0\) < 0.095"
    )
    with pytest.raises(InfeasibleModel, match=told):
        infer(lm * counts("a", 3, 0.5) * never, WeightedDecoding(), 30, progress=False)
    half = Constraint(has_no("b"), name="half")
    run = infer(lm * counts("a", 3, 0.5) * half, WeightedDecoding(), 30, progress=False)
    assert 0 < float(run.info["violating_share"].max()) < 1
    share = 100 * float(run.info["violating_share"].mean())
    assert f"weighted_decoding: {share:.1f} % of the draws violate a hard constraint" in caplog.text
    caplog.clear()
    infer(lm * counts("a", 3, 0.5), WeightedDecoding(), 30, progress=False)
    assert not caplog.text
