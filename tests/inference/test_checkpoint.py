"""Checkpoints: a run that was stopped goes on to the same draws, bit for bit; what does not fit is refused by name."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lmppl.errors import ModelError, StorageError
from lmppl.inference import (
    AIS,
    MCMC,
    PPLM,
    SMC,
    BestOfN,
    Budget,
    Engine,
    Exact,
    ExactTable,
    Importance,
    Part,
    QuasiRejection,
    Rejection,
    Splitting,
    TemperedSMC,
    WeightedDecoding,
    infer,
)
from lmppl.inference.checkpoint import engine_identity
from lmppl.inference.mcmc import (
    BlockResample,
    LocalEdit,
    Mixture,
    ParticleGibbs,
    Restart,
    SuffixResample,
    Tempered,
    TokenGibbs,
)
from lmppl.inference.twists import ExactTwist
from lmppl.lm.tabular import TabularLM
from lmppl.modeling import BagOfWords
from lmppl.modeling.evidence.automata import Automaton
from lmppl.modeling.evidence.constraint import Constraint
from lmppl.modeling.evidence.reward import Reward
from lmppl.modeling.factors import Factor
from lmppl.modeling.model import Model
from lmppl.storage import pack, unpack
from tests.inference.whole_runs import check_that_a_stopped_run_goes_on, same_run
from tests.lm.random_models import random_lm
from tests.models import enumerable_lm, wavy

PROJECT = Path(__file__).resolve().parents[2]
DRAWS = 2500
ENGINES = [
    (Importance(), DRAWS),
    (Rejection(batch=512), DRAWS),
    (BestOfN(4), DRAWS),
    (Importance(proposal=enumerable_lm("tabular", seed=1)), DRAWS),
    (QuasiRejection(bound=1.0), DRAWS),
    (SMC(16), 64),
    (SMC(16, twist=ExactTwist.of(enumerable_lm("tabular") * Reward(wavy, beta=0.5, upper=1.0))), 64),
    (MCMC(4, warmup=10), 4 * 32 * 3),
    (Tempered(4, warmup=10), 4 * 32 * 3),
    (AIS(16), 64),
    (TemperedSMC(16), 64),
    (Splitting(16), 64),
]


def model() -> Model:
    return enumerable_lm("tabular") * Reward(wavy, beta=0.5, upper=1.0)


class Stop(Exception):
    """In place of a crash."""


def louder(texts: list[str]) -> list[float]:
    """Another function than `wavy`, for a factor of the same name."""
    return [value - 0.1 for value in wavy(texts)]


def crash_after(count: int):
    seen: list[Part] = []

    def on_part(part: Part) -> None:
        seen.append(part)
        if len(seen) == count:
            raise Stop

    return on_part


@pytest.mark.parametrize(("engine", "num_draws"), ENGINES, ids=str)
def test_a_run_that_crashed_goes_on_to_the_same_draws(engine: Engine, num_draws: int, tmp_path: Path) -> None:
    whole = infer(model(), engine, num_draws, seed=5)
    with pytest.raises(Stop):
        infer(model(), engine, num_draws, seed=5, checkpoint=tmp_path / "run", on_part=crash_after(2))
    parts = sorted((tmp_path / "run").glob("part-*"))
    assert len(parts) == 2
    times = [path.stat().st_mtime_ns for path in parts]
    resumed = infer(model(), engine, num_draws, seed=5, checkpoint=tmp_path / "run")
    assert [path.stat().st_mtime_ns for path in parts] == times
    assert same_run(resumed, whole)
    assert resumed.cost.lm_tokens == whole.cost.lm_tokens
    assert resumed.status == "complete"


def few_b(texts: list[str]) -> list[float]:
    return [-float(text.count("b")) for text in texts]


EVERY_KERNEL = (
    Restart(), SuffixResample("horizon"), SuffixResample("entropy"), BlockResample(2), LocalEdit(), TokenGibbs(2),
    ParticleGibbs(SMC(3)),
)  # fmt: skip
ON_NETWORKS = [
    (MCMC(4, warmup=5, kernel=SuffixResample()), 4 * 32 * 2),
    (MCMC(4, warmup=5, kernel=Mixture(EVERY_KERNEL)), 4 * 32 * 2),
    (Tempered(4, warmup=5), 4 * 32 * 2),
    (AIS(16), 32),
    (TemperedSMC(16), 32),
    (Splitting(16), 32),
    (Importance(), 1500),
    (QuasiRejection(bound=1.0), 800),
    (BestOfN(4), 300),
    (WeightedDecoding.controlled(few_b), 1200),
    (PPLM(num_steps=1), 600),
]


@pytest.mark.parametrize(("kind", "engine", "num_draws"), [
    (("llama", "mistral")[i % 2], engine, num_draws) for i, (engine, num_draws) in enumerate(ON_NETWORKS)
], ids=str)  # fmt: skip
def test_resumption_on_a_network_builds_its_caches_again(
    kind: str, engine: Engine, num_draws: int, tmp_path: Path
) -> None:
    """A cache that was read anew is not bitwise the one that grew: the run that goes on must not see which it has."""
    evidence = BagOfWords(["a"]) if isinstance(engine, PPLM) else Reward(wavy, beta=0.5, upper=1.0)
    declared = random_lm(kind, max_new_tokens=5) * evidence
    whole = infer(declared, engine, num_draws, seed=5)
    with pytest.raises(Stop):
        infer(declared, engine, num_draws, seed=5, checkpoint=tmp_path, on_part=crash_after(1))
    resumed = infer(declared, engine, num_draws, seed=5, checkpoint=tmp_path)
    assert len(list(tmp_path.glob("part-*"))) > 1
    assert same_run(resumed, whole)


def test_a_finished_run_is_read_and_not_computed(tmp_path: Path) -> None:
    calls: list[int] = []

    def counted(texts: list[str]) -> list[float]:
        calls.append(len(texts))
        return wavy(texts)

    declared = enumerable_lm("tabular") * Reward(counted, beta=0.5)
    first = infer(declared, Importance(), 500, checkpoint=tmp_path)
    assert calls
    calls.clear()
    again = infer(declared, Importance(), 500, checkpoint=tmp_path)
    assert not calls
    assert same_run(first, again)


@pytest.mark.parametrize("context", ["", ["", "a"]], ids=["one", "two"])
@pytest.mark.parametrize("engine", [None, Splitting(8), MCMC(4, 2, warmup=2), SMC(8)], ids=str)
def test_runs_of_one_context_and_of_several_are_kept(engine: Engine | None, context, tmp_path: Path) -> None:
    declared = TabularLM.random(3, 3, seed=0, context=context) * Reward(wavy, beta=0.5, upper=1.0)
    first = infer(declared, engine, 16, checkpoint=tmp_path)
    again = infer(declared, engine, 16, checkpoint=tmp_path)
    assert same_run(first, again)


@pytest.mark.parametrize(
    "evidence", [Reward(wavy, beta=0.5), Constraint(Automaton.containing("a"))], ids=["reward", "automaton"]
)
def test_a_table_of_the_posterior_is_kept_and_its_law_made_again(evidence: Factor, tmp_path: Path) -> None:
    declared = TabularLM.random(3, 3, seed=0, context=["", "a"]) * evidence
    first = infer(declared, "exact", 50, checkpoint=tmp_path)
    read = infer(declared, "exact", 50, checkpoint=tmp_path)
    assert len(list(tmp_path.glob("part-*"))) == 1
    assert same_run(first, read)
    assert isinstance(first, ExactTable)
    assert isinstance(read, ExactTable)
    assert read.as_language_model().fingerprint == first.as_language_model().fingerprint
    assert torch.equal(read.log_prob(first.draws), first.log_prob(first.draws))
    assert read.info.keys() == first.info.keys()
    assert read.setup == first.setup
    assert read.cost.lm_tokens == first.cost.lm_tokens


def test_a_budget_can_be_raised(tmp_path: Path) -> None:
    infer(model(), Importance(), budget=Budget(lm_tokens=10), seed=1, checkpoint=tmp_path)
    assert len(list(tmp_path.glob("part-*"))) == 1
    longer = infer(model(), Importance(), budget=Budget(lm_tokens=10_000), seed=1, checkpoint=tmp_path)
    assert same_run(longer, infer(model(), Importance(), budget=Budget(lm_tokens=10_000), seed=1))


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (lambda folder: infer(model(), Importance(), 100, seed=2, checkpoint=folder), "its seed is 1"),
        (lambda folder: infer(model(), Importance(proposal=enumerable_lm("tabular", seed=2)), 100, seed=1,
                              checkpoint=folder), "its engine.proposal is None, expected 'TabularLM "),
        (lambda folder: infer(model(), BestOfN(4), 100, seed=1, checkpoint=folder),
         "its engine.type is 'lmppl.inference.importance.Importance', expected 'lmppl.inference.best_of_n.BestOfN'"),
        (lambda folder: infer(model(), Importance(7), 100, seed=1, checkpoint=folder),
         "its engine.num_draws is 1000, expected 7"),
        (lambda folder: infer(enumerable_lm("tabular") * Reward(wavy, beta=0.6, upper=1.0), Importance(), 100, seed=1,
                              checkpoint=folder), "its factor 'wavy' is declared otherwise"),
        (lambda folder: infer(enumerable_lm("tabular") * Reward(louder, beta=0.5, upper=1.0, name="wavy"),
                              Importance(), 100, seed=1, checkpoint=folder), "its factor 'wavy' is declared otherwise"),
        (lambda folder: infer(model() * Reward(wavy, name="more"), Importance(), 100, seed=1, checkpoint=folder),
         "it has no factor 'more', and this model has one"),
        (lambda folder: infer(model().without("wavy"), Importance(), 100, seed=1, checkpoint=folder),
         "it has a factor 'wavy', and this model has none"),
        (lambda folder: infer(enumerable_lm("tabular", seed=1) * Reward(wavy, beta=0.5, upper=1.0), Importance(), 100,
                              seed=1, checkpoint=folder), "its LM is another one"),
    ],
)  # fmt: skip
def test_another_run_is_refused_and_the_folder_kept(other, what: str, tmp_path: Path) -> None:
    infer(model(), Importance(), 100, seed=1, checkpoint=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(StorageError, match="belongs to another run") as refusal:
        other(tmp_path)
    assert what in str(refusal.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_damaged_part_is_refused_and_the_others_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = infer(model(), Importance(), DRAWS, checkpoint=tmp_path)
    first, second, *_ = sorted(tmp_path.glob("part-*"))
    content = bytearray(second.read_bytes())
    content[-3] ^= 1  # one bit of one number
    second.write_bytes(content)
    kept = first.stat().st_mtime_ns
    with caplog.at_level(logging.WARNING):
        again = infer(model(), Importance(), DRAWS, checkpoint=tmp_path)
    assert f"{second.name} is damaged" in caplog.text
    assert first.stat().st_mtime_ns == kept
    assert same_run(again, whole)
    content = second.read_bytes()
    at = content.index(b"lm_tokens") + content[content.index(b"lm_tokens") :].index(b": ") + 2  # a digit of the header
    second.write_bytes(content[:at] + (b"8" if content[at : at + 1] != b"8" else b"7") + content[at + 1 :])
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert same_run(infer(model(), Importance(), DRAWS, checkpoint=tmp_path), whole)
    assert f"{second.name} is damaged" in caplog.text
    second.write_bytes(second.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        assert same_run(infer(model(), Importance(), DRAWS, checkpoint=tmp_path), whole)


def test_a_damaged_manifest_and_a_strange_folder_are_refused(tmp_path: Path) -> None:
    infer(model(), Importance(), 100, checkpoint=tmp_path / "run")
    manifest = tmp_path / "run" / "run.json"
    manifest.write_text(manifest.read_text()[:40])
    with pytest.raises(StorageError, match=r"run\.json: damaged"):
        infer(model(), Importance(), 100, checkpoint=tmp_path / "run")
    assert list((tmp_path / "run").glob("part-*"))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(StorageError, match="not empty and holds no run"):
        infer(model(), Importance(), 100, checkpoint=tmp_path / "notes")
    with pytest.raises(StorageError, match="no folder"):
        infer(model(), Importance(), 100, checkpoint=tmp_path / "notes" / "mine.txt")


def test_lists_and_versions_are_compared_field_by_field(tmp_path: Path) -> None:
    infer(model(), AIS(8, ladder=(0.0, 0.5, 1.0)), 8, seed=1, checkpoint=tmp_path)
    with pytest.raises(StorageError, match=r"its engine\.ladder\.1 is 0\.5, expected 0\.6"):
        infer(model(), AIS(8, ladder=(0.0, 0.6, 1.0)), 8, seed=1, checkpoint=tmp_path)
    manifest = tmp_path / "run.json"
    manifest.write_text(manifest.read_text().replace(f'"{torch.__version__}"', '"0.1"'))
    with pytest.raises(
        StorageError, match=rf"its versions\.torch is '0\.1', expected '{re.escape(torch.__version__)}'"
    ):
        infer(model(), AIS(8, ladder=(0.0, 0.5, 1.0)), 8, seed=1, checkpoint=tmp_path)


def test_a_configuration_without_a_fingerprint_cannot_be_recognised() -> None:
    assert engine_identity(Importance()) == engine_identity(Importance())
    assert engine_identity(Importance()) != engine_identity(Importance(7))
    assert engine_identity(torch.ones(2)) != engine_identity(torch.zeros(2))
    with pytest.raises(ModelError, match="object has no fingerprint"):
        engine_identity({"twist": object()})


def test_approximations_are_recognised_by_their_draws_and_their_law() -> None:
    def run(engine: Engine, seed: int = 0):
        return infer(model(), engine, 50, seed=seed)

    particles, guided = Importance(), WeightedDecoding(ExactTwist.of(model()))
    for engine in (particles, guided, Exact()):
        assert engine_identity(run(engine)) == engine_identity(run(engine))
    assert engine_identity(run(particles)) != engine_identity(run(particles, 1))
    other = WeightedDecoding(ExactTwist.of(model()), strength=0.5)
    assert engine_identity(run(guided))["law"] != engine_identity(run(other))["law"]
    draws = run(particles).draws
    assert engine_identity(draws) != engine_identity(draws.with_columns(log_weight=None))


@pytest.mark.parametrize("engine", [
    lambda: SMC(16, proposal=infer(model(), WeightedDecoding(ExactTwist.of(model())), 20)),
    lambda: MCMC(4, warmup=2, start=infer(model(), Importance(), 50)),
], ids=["proposal", "start"])  # fmt: skip
def test_runs_with_an_approximation_go_on(engine, tmp_path: Path) -> None:
    check_that_a_stopped_run_goes_on(model(), engine(), 4 * 32 * 3, tmp_path)


def test_plain_data_comes_back_as_it_was() -> None:
    value = {"a": (1, 2.5, float("inf")), "b": [None, True, {"c": torch.arange(3)}], 4: "x", "e": {}, "f": ()}
    tensors: dict[str, torch.Tensor] = {}
    data = json.loads(json.dumps(pack(value, tensors)))
    again = unpack(data, tensors)
    assert torch.equal(again["b"][2].pop("c"), value["b"][2].pop("c"))
    assert again == value
    with pytest.raises(StorageError, match="a/0: got object"):
        pack({"a": [object()]}, {})


SLOW = """
import time
from lmppl import Reward, TabularLM

def slow(sequences):
    time.sleep(0.05)
    return [0.0] * len(sequences)

model = TabularLM.random(3, 4, seed=0) * Reward(slow, on="ids", beta=2.0)
"""


@pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL to a process")
@pytest.mark.parametrize(
    ("engine", "num_draws"), [("importance", 40000), ("mcmc(num_chains=4, warmup=3)", 4 * 32 * 12)], ids=str
)
def test_kill_9_in_mid_run_and_resumption(engine: str, num_draws: int, tmp_path: Path) -> None:
    (tmp_path / "spec.py").write_text(SLOW if engine == "importance" else SLOW.replace("0.05", "0.002"))
    run = [sys.executable, "-m", "lmppl", "infer", "spec.py", "-e", engine, "-n", str(num_draws), "--seed", "3"]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    kept = tmp_path / "kept"
    process = subprocess.Popen(
        [*run, "--checkpoint", "kept"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while len(list(kept.glob("part-*"))) < 3 and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    finished = len(list(kept.glob("part-*")))
    assert 3 <= finished < (40 if engine == "importance" else 12)
    for target, more in (("a.safetensors", ["--checkpoint", "kept"]), ("b.safetensors", [])):
        subprocess.run([*run, *more, "-o", target], cwd=tmp_path, env=environment, check=True, capture_output=True)
    stored = [(tmp_path / name).read_bytes() for name in ("a.safetensors", "b.safetensors")]
    assert stored[0] == stored[1]


def test_priors_without_their_own_content_hash_are_not_confused(tmp_path: Path) -> None:
    infer(TabularLM.random(3, 3, seed=0) * Reward(wavy), Importance(), 50, checkpoint=tmp_path)
    with pytest.raises(StorageError, match="its LM is another one"):
        infer(TabularLM.random(3, 3, seed=1) * Reward(wavy), Importance(), 50, checkpoint=tmp_path)
