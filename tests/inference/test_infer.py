"""`infer` and its progress bar: shards, budgets, Ctrl-C, seeds, and what a person sees meanwhile."""

from __future__ import annotations

import io
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from lmppl.errors import InfeasibleModel, InterruptedRun, ModelError, UnsupportedModel
from lmppl.inference import (
    AIS,
    MCMC,
    SMC,
    BestOfN,
    Budget,
    Engine,
    Exact,
    Guarantee,
    Importance,
    Part,
    QuasiRejection,
    Rejection,
    Request,
    Shard,
    Splitting,
    Tempered,
    TemperedSMC,
    infer,
    progress,
    stream,
)
from lmppl.inference.progress import finished_share, progress_bar
from lmppl.lm import TabularLM
from lmppl.modeling import Constraint, Model, Reward, Target
from lmppl.sequences import Cost, concatenate
from tests.models import count_of, enumerable_lm, has_no, wavy

PRIOR = TabularLM.random(3, 4, seed=2, context=["", "a"])


def model() -> Model:
    return PRIOR * Reward(count_of("a"), beta=1, upper=4, name="a") * Constraint(has_no("bb"), name="no bb")


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


def test_default_engine_is_exact_where_it_can_be() -> None:
    assert isinstance(infer(model()).engine, Exact)
    assert infer(PRIOR, "importance(10)").engine == Importance(10)


def test_an_unsupported_engine_raises_its_reason() -> None:
    with pytest.raises(UnsupportedModel, match="pass upper="):
        infer(PRIOR * Reward(count_of("a"), name="a"), "rejection")


@pytest.mark.parametrize("count", [0, -1])
@pytest.mark.parametrize("engine", ["exact", "rejection", "importance", "best_of_n"])
def test_fewer_than_one_draw_is_refused(engine: str, count: int) -> None:
    with pytest.raises(ModelError, match=f"num_draws: got {count}, expected at least 1"):
        infer(model(), engine, count)


def test_the_result_says_what_made_it() -> None:
    result = infer(model(), "importance", 30, seed=11)
    assert (result.seed, result.status, result.engine) == (11, "complete", Importance())
    meta = result.draws.meta
    assert meta["engine"] == "importance"
    assert meta["guarantee"] == "consistent"
    assert meta["spec_hash"] == model().spec_hash
    assert meta["formula"] == model().formula
    assert "torch" in meta["versions"]
    assert result.cost.lm_tokens > 0
    assert result.cost.seconds > 0


def test_parts_are_handed_on_as_they_finish_and_cost_what_the_run_costs() -> None:
    parts: list[Part] = []
    result = infer(model(), "importance", 1500, on_part=parts.append)
    assert [part.shard.id for part in parts] == [0, 1, 2]
    assert sum((part.cost for part in parts), Cost()).lm_tokens == result.cost.lm_tokens


def test_budgets_stop_after_the_shard_that_spends_them() -> None:
    parts: list[Part] = []
    result = infer(model(), "importance", budget=Budget(lm_tokens=1), on_part=parts.append)
    assert len(parts) == 1
    assert result.status == "complete"
    result = infer(model(), "importance", 5000, budget=Budget(lm_tokens=1))
    assert result.status == "interrupted"
    assert len(result.draws) == 1024


def test_a_budget_without_a_limit_is_refused() -> None:
    with pytest.raises(ModelError, match="has no limit"):
        infer(model(), "importance", budget=Budget())


def test_ctrl_c_keeps_whole_shards_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    result = infer(model(), Pressed(at=2), 3000)
    assert result.status == "interrupted"
    assert len(result.draws) == 2048
    assert "2 whole shard(s) with 2048 draws are kept" in caplog.text
    with pytest.raises(InterruptedRun, match="nothing is kept"):
        infer(model(), Pressed(at=0), 3000)


def test_an_interrupted_run_with_a_checkpoint_says_how_to_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    go_on = re.escape(f"run the same call again with checkpoint={str(folder)!r}")
    with pytest.raises(InterruptedRun, match="nothing is kept"):
        infer(model(), Pressed(at=0), 3000, checkpoint=tmp_path / "none")
    infer(model(), Pressed(at=2), 3000, checkpoint=folder)
    assert re.search(go_on, caplog.text)

    def pressed(part: Part) -> None:
        raise KeyboardInterrupt

    again = infer(model(), Pressed(at=2), 3000, checkpoint=folder, on_part=pressed)
    assert len(again.draws) == 1024

    class Refusing(Pressed):
        def merge(self, parts: Any) -> Any:
            raise InfeasibleModel("nothing")

    for surplus, made in ((False, "a draw with γ > 0 was made"), (True, "any draw was accepted")):
        refusing = type("Refusing", (Refusing,), {"surplus": surplus, "fingerprint": "x"})
        place = tmp_path / str(surplus)
        there = re.escape(f"checkpoint={str(place)!r}")
        with pytest.raises(InterruptedRun, match=f"before {made}; its checkpoint holds 2 whole shard.*{there}"):
            infer(model(), refusing(at=2), 3000, checkpoint=place)
        with pytest.raises(InterruptedRun, match=f"before {made}; nothing is kept"):
            infer(model(), refusing(at=2), 3000)


def test_the_bar_is_silent_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    infer(model(), "importance", 3000)
    infer(model(), "importance", 3000, progress=False)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_the_bar_shows_figures_on_stderr_and_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    infer(model(), "rejection", 3000)
    shown = screen.getvalue()
    assert "rejection" in shown
    assert "acceptance" in shown
    assert "draws/s" in shown
    assert shown.rstrip().endswith("\x1b[2K")  # the line is erased at the end


SAMPLERS = {
    Rejection(50): {"acceptance", "log Ẑ"},
    Importance(300): {"lowest ESS/N", "log Ẑ"},
    SMC(16, num_sweeps=2): {"log Ẑ", "ancestors"},
    AIS(16, num_sweeps=2): {"log Ẑ"},
    TemperedSMC(16, num_sweeps=2): {"log Ẑ"},
    Splitting(16, num_sweeps=2): {"log Ẑ"},
    MCMC(4, num_steps=12, warmup=3): {"accepted (suffix)", "lowest ESS", "log Ẑ"},
    Tempered(4, num_steps=12, warmup=3): {"accepted (suffix)", "lowest ESS", "log Ẑ"},
    QuasiRejection(50, bound=1.0): {"acceptance"},
    BestOfN(4): set(),
}


@pytest.mark.parametrize(("engine", "figures"), SAMPLERS.items(), ids=lambda e: e.name if isinstance(e, Engine) else "")
def test_the_bar_tells_the_speed_and_how_well_it_goes(
    engine: Engine, figures: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[dict[str, str]] = []
    monkeypatch.setattr(progress.RichBar, "_show", lambda self, share, figures: shown.append(dict(figures)))
    monkeypatch.setattr(progress, "REFRESH", 0.0)
    result = infer(enumerable_lm("tabular") * Reward(wavy, beta=0.5, upper=1.0), engine, progress=True)
    assert all("tokens/s" in one for one in shown)
    assert float(shown[-1]["tokens/s"].replace(",", "")) > 0
    assert figures <= set(shown[-1])
    if "log Ẑ" in figures:
        mine = float(shown[-1]["log Ẑ"])
        assert mine == pytest.approx(float(result.log_normalizer[0].value[0]), abs=0.06)
    if "lowest ESS" in figures:
        least = float(result.info["bulk_ess"]["log_prior"].min())
        assert float(shown[-1]["lowest ESS"].replace(",", "")) == pytest.approx(least, abs=0.51)
    if "acceptance" in figures:
        assert float(shown[-1]["acceptance"].rstrip("%")) / 100 == pytest.approx(
            float(result.info["accepted"].sum() / result.info["proposals"].sum()), abs=0.05
        )


def test_how_far_a_run_is() -> None:
    target = Target(model())
    shard = Importance().plan(target, Request(100, None, 0))[0]
    part = Importance().run_shard(target, shard)
    part = replace(part, cost=Cost(lm_tokens=30, seconds=2.0))
    assert len(part.draws) == 200

    def share(num_draws: int | None, budget: Budget | None = None, count: int = 1) -> float | None:
        return finished_share(Importance(), Request(num_draws, budget, 0), [part] * count)

    assert share(100, count=0) is None
    assert share(400) == pytest.approx(0.25)
    assert share(400, count=2) == pytest.approx(0.5)
    assert share(50) == 1.0
    assert share(None) == pytest.approx(0.1)
    assert share(None, Budget(lm_tokens=300)) == pytest.approx(0.1)
    assert share(None, Budget(seconds=4.0)) == pytest.approx(0.5)
    assert share(400, Budget(seconds=4.0)) == pytest.approx(0.5)
    assert share(None, Budget()) is None


def test_the_bar_can_be_asked_for_or_forbidden(capsys: pytest.CaptureFixture[str]) -> None:
    part = Importance().run_shard(target := Target(model()), Importance().plan(target, Request(10, None, 0))[0])
    for show in (True, False):
        with progress_bar(Importance(), Request(10, None, 0), show) as bar:
            bar.within(part.shard, 0.5, {"ESS": "7.0"}, Cost(lm_tokens=10))
            bar.parts([part])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("engine", [Rejection(batch=64), Importance(), BestOfN(4)])
def test_a_stream_gives_the_draws_of_infer_shard_by_shard(engine: Engine) -> None:
    whole = infer(model(), engine, 1500, seed=3).draws
    streamed = list(stream(model(), engine, 1500, seed=3))
    assert len(streamed) > 1
    for c in range(2):
        rows = concatenate([part.select(part.context == c) for part in streamed]).token_lists()
        assert rows == whole.select(whole.context == c).token_lists()


def test_closing_a_stream_stops_the_run() -> None:
    calls = []

    def counted(texts: list[str]) -> list[float]:
        calls.append(len(texts))
        return [0.0] * len(texts)

    draws = stream(PRIOR * Reward(counted, upper=0, name="counted"), Importance(), 100_000)
    first = next(draws)
    draws.close()  # type: ignore[attr-defined]
    assert len(first) <= 1024
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_draws": 2.5}, "num_draws: got 2.5"),
        ({"engine": Importance(2.5)}, "Importance: got num_draws=2.5, expected int"),
        ({"engine": BestOfN(2.5)}, "got n=2.5, expected int"),
        ({"seed": "a"}, "seed: got 'a', expected an integer"),
        ({"on_part": 3}, "on_part: got 3, expected a function of a Part"),
        ({"checkpoint": 3}, "checkpoint: got 3, expected the path of a folder"),
        ({"budget": 100}, "budget: got 100, expected lmppl.Budget"),
        ({"budget": Budget(seconds=-1)}, "seconds=-1, expected a positive number"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        infer(model(), **{"engine": "importance", **arguments})


def test_streamed_draws_say_where_they_come_from_and_nothing_accepted_is_an_error() -> None:
    first = next(stream(model(), "rejection(50)", seed=5))
    assert first.meta["engine"] == "rejection(num_draws=50)"
    assert first.meta["seed"] == 5
    never = PRIOR * Constraint(lambda texts: [False] * len(texts), name="never")
    with pytest.raises(InfeasibleModel, match="never"):
        list(stream(never, Rejection(max_tries=200), 10))


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ('importance(num_draws="x")', "Importance: got num_draws='x', expected int"),
        ('best_of_n(n="x")', "got n='x', expected int"),
        ('rejection(log_upper="x")', "got log_upper='x', expected float or None"),
        (Exact(max_sequences="x"), "got max_sequences='x', expected int"),
        (Importance(defensive="x"), "got defensive='x', expected float"),
        (Importance(num_draws=True), "got num_draws=True, expected int"),
    ],
)
def test_engine_fields_of_another_type_are_refused(engine: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        infer(model(), engine)


def test_an_interrupt_before_anything_is_accepted_keeps_nothing() -> None:
    presses = []

    def never(texts: list[str]) -> list[bool]:
        presses.append(texts)
        if len(presses) > 1:
            raise KeyboardInterrupt
        return [False] * len(texts)

    prior = TabularLM.random(20, 8, seed=0)
    with pytest.raises(InterruptedRun, match="before any draw was accepted"):
        infer(prior * Constraint(never), Rejection(), 50)


def test_a_part_is_what_a_shard_returns() -> None:
    class Half(Importance):
        def run_shard(self, target: Target, shard: Shard, *, state: Any = None) -> Any:
            return 7

    with pytest.raises(ModelError, match="run_shard returned int, expected a Part"):
        infer(model(), Half())


@pytest.mark.parametrize("wrong", [2, len, Reward, "text", PRIOR])
def test_a_prior_is_multiplied_by_factors_only(wrong: Any) -> None:
    with pytest.raises(ModelError, match="expected a factor"):
        PRIOR * wrong
