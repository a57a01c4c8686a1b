"""Wrong arguments of engines, kernels, twists and declarations: one sentence that names the argument."""

from __future__ import annotations

import math

import pytest
import torch

from lmppl.errors import ContextError, FactorError, LmpplError, ModelError, StorageError
from lmppl.inference import (
    AIS,
    MCMC,
    SMC,
    Beam,
    Greedy,
    Importance,
    QuasiRejection,
    Rejection,
    TemperedSMC,
    WeightedDecoding,
    infer,
    reverse_ais,
    sandwich,
)
from lmppl.inference.mcmc import BlockResample, Mixture, Restart, SuffixResample, Tempered, TokenGibbs
from lmppl.inference.twists import FactorTwist, LearnedTwist
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence.automata import Automaton
from lmppl.modeling.evidence.constraint import Constraint
from lmppl.modeling.evidence.reward import Reward
from tests.inference.smc_cases import ArbitraryTwist
from tests.models import wavy

PRIOR = TabularLM.random(3, 3, seed=0)
MODEL = PRIOR * Reward(wavy, beta=0.5, upper=1.0)


def chains(kernel, **options):
    return MCMC(4, 2, warmup=1, kernel=kernel, **options)


ENGINES = [
    *((kind(ladder=ladder), rf"{kind.__name__}: got ladder=")
      for kind in (AIS, TemperedSMC, Tempered)
      for ladder in (1.5, True, torch.tensor(1.0), (0.0, "x", 1.0), (False, True), (0.0, math.nan, 1.0))),
    (TemperedSMC(ladder=None), "TemperedSMC: got ladder=None"),
    (Rejection(batch=0), "Rejection: got batch=0, expected at least 1"),
    (QuasiRejection(pilot=0), "QuasiRejection: got pilot=0, expected at least 1"),
    (MCMC(warmup=-1), "MCMC: got warmup=-1, expected at least 0"),
    (MCMC(warmup="x"), "MCMC: got warmup='x', expected int"),
    (Tempered(4, kernel=3), "Tempered: got kernel=3, expected a kernel"),
    *((WeightedDecoding(factors=names), "WeightedDecoding: got factors=") for names in (1.5, -1, True, "wavy", (3,))),
    *((chains(TokenGibbs(num_candidates=count)), "TokenGibbs: got num_candidates=")
      for count in ("x", math.nan, math.inf, [1], (), 2.5, True, torch.tensor(3))),
    *((chains(TokenGibbs(candidates=tokens)), "TokenGibbs: got candidates=") for tokens in (3, 1.5, True, "ab", (0,))),
    *((chains(Mixture(kernels)), "Mixture: got kernels=") for kernels in (3, 1.5, Restart(), "ab", ())),
    *((chains(Mixture(weights=weights)), "Mixture: got weights=") for weights in (3, 1.5, "ab", ("a", "b"), (1, True))),
    (chains(SuffixResample(block=True)), "SuffixResample: got block=True"),
    (chains(BlockResample(size=True)), "BlockResample: got size=True"),
    (SMC(twist=FactorTwist), r"SMC: twist: got the class FactorTwist, expected an instance: FactorTwist\(\.\.\.\)"),
    (SMC(twist="a.twist"), r"a file of a twist is read by LearnedTwist\.load\('a\.twist', model\)"),
    (WeightedDecoding(ArbitraryTwist), "guide: got the class ArbitraryTwist, expected an instance"),
]  # fmt: skip


@pytest.mark.parametrize(("engine", "message"), ENGINES, ids=lambda value: str(value)[:40])
def test_wrong_arguments_of_engines(engine, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        infer(MODEL, engine, 4, progress=False)


DRAWS = PRIOR.draw(4, generator=torch.Generator().manual_seed(0))
CALLS = [
    (lambda: WeightedDecoding.gedi(3), r"WeightedDecoding\.gedi: got 3, expected a list of language models"),
    (lambda: sandwich(MODEL, SMC(8), 3), "sandwich: got int, expected exact draws"),
    (lambda: sandwich(MODEL, AIS(8), 3), "reverse_ais: got int, expected exact draws"),
    (lambda: reverse_ais(MODEL, SMC(8), DRAWS), "reverse_ais: got SMC, expected AIS or TemperedSMC"),
    (lambda: MODEL | 3, "got the context 3, expected a string"),
    (lambda: PRIOR | [None], "got the context None, expected a string"),
    (lambda: Automaton.containing(3), "got the pattern 3, expected a text or token ids"),
    (lambda: Reward(wavy) ** 2, r"got Reward \*\* 2: a factor has a strength of its own, such as Reward\(fn, beta="),
    (lambda: PRIOR + Reward(wavy), r"got TabularLM \+ Reward: evidence is multiplied, as in prior \* factor"),
    (lambda: MODEL + Reward(wavy), r"got Model \+ Reward: evidence is multiplied"),
    (lambda: Reward(wavy) + 1, r"got Reward \+ int: evidence is multiplied"),
    (lambda: Reward(wavy, name=3), "got name=3, expected a string"),
    (lambda: Constraint(wavy, name=3), "got name=3, expected a string"),
    (lambda: infer(MODEL, "importance", 8, progress="x"), "progress: got 'x', expected True, False or None"),
    (lambda: infer(MODEL, chains(Restart(), start=DRAWS), 8) and infer(
        PRIOR * Constraint(lambda texts: [False] * len(texts)), chains(Restart(), start=DRAWS), 8),
     "mcmc: chain 0 starts at "),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), CALLS, ids=[message[:40] for _, message in CALLS])
def test_wrong_arguments_of_calls(call, message: str) -> None:
    with pytest.raises((ModelError, ContextError), match=message):
        call()


def test_a_twist_is_read_from_a_file(tmp_path) -> None:
    with pytest.raises(StorageError, match="it is a folder, expected the file of a twist"):
        LearnedTwist.load(tmp_path, MODEL)
    with pytest.raises(StorageError, match="there is no such file"):
        LearnedTwist.load(tmp_path / "none", MODEL)


def test_what_a_form_reads_is_known() -> None:
    twist = ArbitraryTwist(3)
    twist.needs = ("foo",)
    with pytest.raises(ModelError, match=r"SMC: twist: got needs=\('foo',\), expected some of 'text', 'ids', 'hidden'"):
        infer(MODEL, SMC(8, twist=twist), 8, progress=False)
    twist.needs = "ids"
    with pytest.raises(ModelError, match="got needs='ids', expected some of"):
        infer(MODEL, SMC(8, twist=twist), 8, progress=False)


@pytest.mark.parametrize("engine", [Greedy(), Beam(4), WeightedDecoding()], ids=str)
def test_a_lie_about_prefixes_is_found_by_every_engine_that_follows_them(engine) -> None:
    lie = Constraint(lambda texts: [len(text) != 1 for text in texts], prefix_closed=True, name="lie")
    with pytest.raises(FactorError, match="factor 'lie'"):
        infer(PRIOR * lie, engine, progress=False)


class Nan(ArbitraryTwist):
    """Weighs every token with nan."""

    def weigh(self, state, candidates=None):
        return super().weigh(state, candidates) * math.nan


@pytest.mark.parametrize("run", [
    lambda: infer(MODEL, WeightedDecoding(Nan(3)), progress=False),
    lambda: infer(MODEL, Importance(8, proposal=WeightedDecoding(Nan(3)).language_model(MODEL)), progress=False),
    lambda: infer(MODEL, SMC(8, twist=Nan(3)), progress=False),
], ids=["weighted_decoding", "importance", "smc"])  # fmt: skip
def test_nan_of_a_form_is_an_error_of_the_documented_kind(run) -> None:
    with pytest.raises(LmpplError, match="weigh is nan for token 0") as error:
        run()
    assert type(error.value) is FactorError
