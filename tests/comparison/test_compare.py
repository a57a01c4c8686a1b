"""`compare`: which rows there are, what becomes of failures and Ctrl-C, repeats, contexts, references."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from lmppl.comparison import Comparison, Figure, compare
from lmppl.comparison.figures import average, missing, spread, worst
from lmppl.errors import InterruptedRun, ModelError
from lmppl.inference import SMC, BestOfN, Budget, Exact, Importance, Rejection, infer
from lmppl.inference.engine import Engine, Guarantee, Part, Shard
from lmppl.inference.mcmc import MCMC, Restart
from lmppl.lm import LM, TabularLM
from lmppl.modeling import Constraint, Model, Reward
from lmppl.modeling.target import Target
from tests.models import count_of, has_no


def model(contexts: Any = ("",), **options: Any) -> Model:
    prior = TabularLM.random(3, 4, seed=3, context=list(contexts))
    return prior * Reward(count_of("a"), beta=1, name="a", **options) * Constraint(has_no("bb"), name="no bb")


@dataclass(frozen=True)
class Pressed(Engine):
    """An engine in whose `at`-th shard somebody presses Ctrl-C."""

    at: int = 0
    name: ClassVar[str] = "pressed"
    guarantee: ClassVar[Guarantee] = Guarantee.CONSISTENT

    def run_shard(self, target: Target, shard: Shard, *, state: Any = None) -> Part:
        if shard.id == self.at:
            raise KeyboardInterrupt
        return Importance().run_shard(target, shard)

    def merge(self, parts: Any) -> Any:
        return Importance().merge(parts)


def test_the_prior_comes_first_and_rows_keep_their_order() -> None:
    table = compare(model(upper=4), ["exact", Rejection(), "importance(100)"], num_draws=50)
    assert [row.label for row in table.rows] == ["prior", "exact", "rejection", "importance"]
    assert [row.guarantee for row in table.rows] == ["as is", "exact", "exact", "consistent"]
    assert [row.law for row in table.rows] == ["itself", "π*", "π*", "π0"]
    assert table["prior"]["kl_to_prior"].value == 0.0
    assert table["importance"]["draws"].value == 50.0
    assert table.approximations["rejection"][0].engine == Rejection()
    assert table.reference.enumerated


def test_unsupported_and_failing_engines_keep_a_row_with_their_reason() -> None:
    impossible = TabularLM.random(3, 3, seed=1) * Constraint(has_no(""), name="never")
    table = compare(impossible, ["importance", "best_of_n(n=2)", "exact"], num_draws=20)
    assert all(row.repeats == 0 and not row.figures for row in table.rows[1:])
    assert (table["prior"]["zero"].value, table["prior"]["ess"].value) == (1.0, 0.0)
    assert (table["prior"]["kl_reverse"].value, table["prior"]["log_z"].value) == (math.inf, None)
    assert "weight zero" in table["importance"].reason
    assert "best_of_n" in table["best_of_n(n=2)"].reason
    table = compare(model(), ["rejection", "exact"])
    assert "pass upper=..." in table["rejection"].reason
    assert table["exact"]["log_z"].error == 0.0
    assert "no result ¹" in str(table)
    assert "pass upper=..." in str(table)


def test_equal_labels_are_numbered_and_a_mapping_names() -> None:
    other = TabularLM.random(3, 4, seed=4)
    table = compare(model(), [other, other], num_draws=20)
    assert [row.label for row in table.rows] == ["prior", "TabularLM", "TabularLM #2"]
    table = compare(model(), {"mine": other, "again": "importance(20)"})
    assert [row.label for row in table.rows] == ["prior", "mine", "again"]


def test_labels_name_the_objects_that_engines_were_given() -> None:
    other = TabularLM.random(3, 4, seed=4)
    engines = [
        Importance(), Importance(proposal=other), Importance(7, proposal=other), SMC(8, proposal="prior"),
        MCMC(4, num_steps=2, kernel=Restart(proposal=other)), MCMC(4, num_steps=2), BestOfN(2),
    ]  # fmt: skip
    labels = [row.label for row in compare(model(), engines).rows[1:]]
    assert labels == [
        "importance", "importance(proposal=TabularLM)", "importance(num_draws=7, proposal=TabularLM)",
        "smc(num_particles=8, proposal='prior')", "mcmc(num_chains=4, num_steps=2, kernel=Restart)",
        "mcmc(num_chains=4, num_steps=2)", "best_of_n(n=2)",
    ]  # fmt: skip
    known = infer(model(), Exact())
    table = compare(model(), [Importance(proposal=known), infer(model(), Importance(9, proposal=other))], num_draws=9)
    assert [row.label for row in table.rows[1:]] == [
        "importance(proposal=exact)", "importance(num_draws=9, proposal=TabularLM)",
    ]  # fmt: skip


def test_language_models_are_named_with_their_truncation() -> None:
    narrow = LM("tiny", context="The", max_new_tokens=2, top_k=5)
    declared = LM("tiny", context="The", max_new_tokens=2) * Reward(count_of("a"), upper=9, name="a")
    table = compare(declared, [Importance(proposal=narrow), narrow, SMC(8, proposal=narrow)], num_draws=40)
    labels = ["importance(proposal=LM(top_k=5))", "LM(top_k=5)", "smc(num_particles=8, proposal=LM(top_k=5))"]
    assert [row.label for row in table.rows[1:]] == labels
    for label in (labels[0], labels[2]):  # means under the part of π* that the proposal covers
        for name in ("mean:a", "kl_to_prior"):
            assert table[label][name].relation == "≈"
            assert "may not cover" in table[label][name].note
    assert table["LM(top_k=5)"]["mean:a"].relation == "="
    assert table[labels[2]]["kl_reverse"].value is None  # its own log Z is too small to bound anything
    assert "may not cover" in table[labels[2]]["tv"].note
    row = table["LM(top_k=5)"]
    assert {row[name].relation for name in ("log_z", "kl_reverse", "tv")} == {"≥"}
    assert all("may not cover" in row[name].note for name in ("log_z", "kl_reverse", "tv"))


def test_evidence_that_only_another_row_found_is_told() -> None:
    """Few texts have evidence: 20 draws of the prior agree on log Z = 0, the best of 2,000 has it."""
    prior = TabularLM.random(4, 12, seed=3)
    rare = prior * Reward(lambda texts: [float(t.startswith("ccbb")) for t in texts], beta=0.05, name="rare")
    found = infer(rare, BestOfN(2000), 2, seed=1)
    assert float(found.draws.log_factors["rare"].max()) == 20.0
    table = compare(rare, {"importance": "importance", "best": found}, num_draws=20, seed=2)
    assert table["importance"]["log_z"].value == pytest.approx(0.0)
    assert "best found texts with more evidence" in table["importance"]["log_z"].note
    assert "best found texts with more evidence" in " ".join(str(table).split())
    assert "found texts" not in table["best"]["log_z"].note
    agreeing = compare(rare, {"one": "importance", "two": "importance"}, num_draws=20, seed=2)
    assert "found texts" not in str(agreeing)


def test_finished_approximations_are_rows_and_cost_what_they_cost() -> None:
    done = infer(model(), Importance(200), seed=5)
    table = compare(model(), {"done": done}, repeats=3, num_draws=10)
    assert table.approximations["done"] == (done,)
    assert table["done"]["lm_tokens"].value == done.cost.lm_tokens
    with pytest.raises(ModelError, match="another declaration"):
        compare(model().without("a"), [done])


@pytest.mark.parametrize(
    ("engines", "message"),
    [
        ("exact", "expected a list"),
        ([Exact], "expected an instance"),
        (["exakt"], "did you mean 'exact'"),
        ([3], "expected an Engine"),
        ([], r"engines: got none, .*compare\(model, \['importance', lmppl.SMC\(64\)\]\)"),
        ({}, "engines: got none"),
        (None, r"engines: got None, expected a list such as \['importance', "),
    ],
)
def test_wrong_arguments_raise_before_anything_runs(engines: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        compare(model(), engines)
    with pytest.raises(ModelError, match="repeats: got 0"):
        compare(model(), [], repeats=0)


def test_a_policy_of_other_contexts_keeps_a_row_with_the_reason() -> None:
    table = compare(model(), {"other": TabularLM.random(3, 4, seed=4, context="a")}, num_draws=10)
    assert "prompts" in table["other"].reason


def test_heavy_weights_are_told() -> None:
    prior, other = (TabularLM.random(8, 20, seed=seed, eos=None) for seed in (3, 4))
    table = compare(prior, {"importance": Importance(proposal=other)}, num_draws=1000)
    assert table["importance"]["k_hat"].value > 0.7
    assert "are not to be trusted" in str(table)


def test_repeats_use_successive_seeds_and_tables_run_once() -> None:
    table = compare(model(), ["importance", "exact"], repeats=3, num_draws=100, seed=7)
    runs = table.approximations["importance"]
    assert [run.seed for run in runs] == [7, 8, 9]
    values = [float(run.log_normalizer[0].value[0]) for run in runs]
    figure = table["importance"]["log_z"]
    assert figure.value == pytest.approx(sum(values) / 3)
    assert figure.spread == pytest.approx(float(torch.tensor(values, dtype=torch.float64).std()))
    assert table["exact"].repeats == 1
    assert "sd" in str(table)


def test_contexts_are_averaged_and_listed() -> None:
    declared = model(["", "a", "b"])
    table = compare(declared, ["exact"], num_draws=50)
    parts = [row for row in table.per_context if row.label == "exact"]
    assert [row.context for row in parts] == [0, 1, 2]
    truth = infer(declared, Exact()).log_normalizer[0].value
    assert [row["log_z"].value for row in parts] == pytest.approx(truth.tolist())
    assert table["exact"]["log_z"].value == pytest.approx(float(truth.mean()))
    assert "Averaged over 3 contexts" in str(table)
    assert table["prior"]["draws"].value == 50.0


def test_a_reference_of_ones_own_is_used_and_checked() -> None:
    declared = model(upper=4)
    sampled = infer(declared, Rejection(), 100)
    table = compare(declared, ["importance"], sampled, num_draws=100)
    assert "100 exact draws" in table.reference.description
    assert table["importance"]["tv_draws"].value is None
    weighted = compare(declared, ["importance"], infer(declared, Importance(), 100), num_draws=100)
    assert weighted["importance"]["tv"].relation == "≈"
    with pytest.raises(ModelError, match="is no approximation of π"):
        compare(declared, ["exact"], infer(declared, BestOfN(2), 10))
    with pytest.raises(ModelError, match="contexts"):
        compare(model(["", "a"]), ["exact"], sampled)
    with pytest.raises(ModelError, match=r"reference: .* is of another declaration"):
        compare(declared.without("a") * Reward(count_of("a"), beta=9, name="a"), ["exact"], sampled)
    with pytest.raises(ModelError, match=r"got 'exact', .*reference=lmppl.infer\(model, 'exact'\)"):
        compare(declared, ["importance"], reference="exact")
    with pytest.raises(ModelError, match=r"reference=lmppl.infer\(model, lmppl.Exact\(\)\)"):
        compare(declared, ["importance"], reference=Exact())


def test_where_nothing_is_exact_each_row_uses_its_own_log_z() -> None:
    prior = TabularLM.random(6, 12, seed=3)
    table = compare(prior * Reward(count_of("a"), beta=1, name="a"), ["importance", "best_of_n(n=4)"], num_draws=50)
    assert table.reference is None
    assert "No exact reference" in str(table)
    assert table["best_of_n(n=4)"]["kl_reverse"].value is None
    assert table["best_of_n(n=4)"]["log_z"].value is None


def test_best_of_n_has_a_bound_where_outcomes_are_too_many() -> None:
    prior = TabularLM.random(6, 12, seed=3)
    declared = prior * Reward(count_of("a"), beta=4, upper=12, name="a")
    table = compare(declared, ["rejection", "best_of_n(n=4)"], num_draws=100)
    figure = table["best_of_n(n=4)"]["kl_reverse"]
    assert figure.relation == "≤"
    assert figure.value > 0
    bound = math.log(4) - 3 / 4
    evidence = table["best_of_n(n=4)"]["mean:a"].value / 4
    assert figure.value == pytest.approx(bound - evidence + table["rejection"]["log_z"].value)
    # An estimate of log Z that may be too small makes no bound.
    weighted = compare(declared, ["best_of_n(n=4)"], infer(declared, Importance(100)), num_draws=100)
    assert weighted["best_of_n(n=4)"]["kl_reverse"].relation == "≈"


def test_after_an_interrupt_the_finished_rows_stand() -> None:
    table = compare(model(upper=4), ["rejection", Pressed(), "exact"], num_draws=30)
    assert table.interrupted
    assert [row.label for row in table.rows] == ["prior", "rejection"]
    assert table.not_run == ("pressed", "exact")
    assert table["rejection"]["kl_reverse"].value == 0.0
    assert "Interrupted" in str(table)
    assert "not run: pressed, exact" in str(table)


def test_an_interrupt_in_a_later_shard_keeps_the_partial_row() -> None:
    table = compare(model(), [Pressed(at=1), "exact"], num_draws=2000)
    assert table.interrupted
    assert table["pressed(at=1)"].status == "interrupted"
    assert table["pressed(at=1)"]["draws"].value == 1024.0
    assert "pressed(at=1) (partial)" in str(table)


def test_an_interrupt_while_the_table_is_made_keeps_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of π* is a run of its own; stopped, it leaves rows with their own estimates, and says so."""
    module = importlib.import_module("lmppl.comparison.compare")
    original = module.infer

    def stopped(model: Any, engine: Any, *args: Any, **options: Any) -> Any:
        if isinstance(engine, Exact):
            raise InterruptedRun("stopped")
        return original(model, engine, *args, **options)

    monkeypatch.setattr(module, "infer", stopped)
    table = compare(model(), ["importance"], num_draws=50)
    assert table.interrupted
    assert table.reference is None
    assert [row.label for row in table.rows] == ["prior", "importance"]


def test_a_budget_is_no_interruption() -> None:
    table = compare(model(), ["importance"], budget=Budget(lm_tokens=500))
    assert not table.interrupted
    assert table["importance"]["lm_tokens"].value >= 500


def test_a_bare_language_model_is_a_model() -> None:
    table = compare(TabularLM.random(3, 3, seed=0), ["exact", "rejection"], num_draws=20)
    assert table["rejection"]["log_z"].value == pytest.approx(0.0)


def test_averages_of_figures() -> None:
    two = [Figure(1.0, 0.3, (0.0, 2.0)), Figure(3.0, 0.4, (2.0, 4.0), "≤", note="why")]
    mean = average(two)
    assert (mean.value, mean.interval, mean.relation, mean.note) == (2.0, (1.0, 3.0), "≤", "why")
    assert mean.error == pytest.approx(0.25)
    assert average([two[0], missing("gone")]) == missing("gone")
    assert average([Figure(1.0, relation="≥"), Figure(2.0, relation="≤")]).relation == "≈"
    assert average([Figure(1.0, 0.1), Figure(2.0)]).error is None
    assert average([Figure(math.inf), Figure(2.0)]).value == math.inf
    assert spread([1.0]) is None
    assert spread([1.0, math.inf]) is None
    assert spread([1.0, 3.0]) == pytest.approx(math.sqrt(2))


def test_a_bound_stands_only_where_no_part_shows_a_violation() -> None:
    bound = Figure(0.97, relation="≥", note="no draw shows it", observed=1.0)
    clean = average([bound, bound])
    assert (clean.value, clean.relation, clean.observed) == (0.97, "≥", 1.0)
    mixed = average([bound, Figure(0.9, 0.1), bound])
    assert (mixed.value, mixed.relation, mixed.note) == (pytest.approx(2.9 / 3), "=", "")
    assert average([clean, mixed]).value == pytest.approx((1.0 + 2.9 / 3) / 2)
    infinite = Figure(math.inf, note="some draws")
    assert average([Figure(1.0, relation="≥", note="none"), infinite]) == infinite


def test_the_share_that_holds_is_that_of_the_draws_where_any_context_violates() -> None:
    rare = TabularLM.random(3, 4, seed=3, context=["", "a", "ab"]) * Constraint(has_no("bbb"), name="rare")
    mixed = []
    sampled = infer(rare, Rejection(), 20)  # with a table of π* the share would be exact
    for seed in range(8):
        table = compare(rare, ["best_of_n(n=1)"], sampled, num_draws=20, seed=seed)
        parts = [row for row in table.per_context if row.label == "best_of_n(n=1)"]
        draws = table.approximations["best_of_n(n=1)"][0].draws
        violating = float((draws.log_factors["rare"] == -math.inf).double().mean())
        row = table["best_of_n(n=1)"]["satisfied:rare"]
        assert (row.relation == "=") == (violating > 0)
        if violating:
            assert row.value == pytest.approx(1 - violating)
            mixed.append({row["satisfied:rare"].relation for row in parts} == {"=", "≥"})
    assert any(mixed)


def test_the_worst_of_figures() -> None:
    good, bad, gone = Figure(0.3), Figure(0.9, note="heavy"), missing("tied")
    assert worst([good, bad]) == bad
    assert worst([good, gone]) == gone
    assert worst([gone, bad, good]) == bad
    assert worst([gone, gone]) == gone


def test_names_that_do_not_exist_say_what_there_is(tmp_path: Path) -> None:
    table: Comparison = compare(model(), ["exact"], num_draws=10)
    with pytest.raises(ModelError, match="there are"):
        table["exakt"]
    with pytest.raises(ModelError, match="log_z"):
        table["exact"]["logz"]
