"""Whether a proposal covers: declared truncation, zeros of tables, and what estimates of log Z say about it."""

from dataclasses import replace

import pytest
import torch

from lmppl import LM
from lmppl.errors import ModelError
from lmppl.inference import infer
from lmppl.inference.coverage import coverage_note, may_not_cover, positive_everywhere
from lmppl.inference.exact import Exact
from lmppl.inference.importance import Importance
from lmppl.inference.mcmc import (
    MCMC,
    BlockResample,
    LocalEdit,
    Mixture,
    ParticleGibbs,
    Restart,
    SuffixResample,
    TokenGibbs,
)
from lmppl.inference.proposals import as_proposal
from lmppl.inference.quasi_rejection import QuasiRejection
from lmppl.inference.smc import SMC
from lmppl.inference.weighted_decoding import WeightedDecoding
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence.reward import Reward
from tests.inference.smc_cases import ArbitraryTwist
from tests.models import brute_force, enumerable_lm, wavy

SYMBOLS = ["a", "b", "<eos>"]


def table(rows, cap=3, **options):
    return TabularLM(rows, SYMBOLS, max_new_tokens=cap, **options)


EVERYTHING = table([[0.5, 0.3, 0.2]] * 4)
NO_B = table([[0.8, 0.0, 0.2]] * 4)
NO_B_AFTER_B = table([[0.5, 0.3, 0.2], [0.8, 0.0, 0.2], [0.5, 0.3, 0.2], [0.5, 0.3, 0.2]])
AFTER_THE_END = table([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [1.0, 0.0, 0.0], [0.5, 0.3, 0.2]])
NO_END_AT_THE_START = table([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.6, 0.4, 0.0]])


@pytest.mark.parametrize(
    ("lm", "prior", "expected"),
    [
        (EVERYTHING, NO_B, False),
        (NO_B, EVERYTHING, True),
        (NO_B, NO_B, False),
        (table([[0.6, 0.0, 0.4]] * 4), NO_B, False),
        (NO_B_AFTER_B, EVERYTHING, True),
        (NO_B_AFTER_B, NO_B, False),  # the prior never makes the b after which q has none
        (AFTER_THE_END, EVERYTHING, False),  # nothing follows <eos>
        (NO_END_AT_THE_START, EVERYTHING, True),
        (table([[0.5, 0.3, 0.2], [0.8, 0.0, 0.2], [0.5, 0.3, 0.2], [0.5, 0.3, 0.2]], cap=1),
         table([[0.5, 0.3, 0.2]] * 4, cap=1), False),  # the zero is beyond the cap
        (NO_B.at_temperature(2.0), EVERYTHING, True),
        (NO_B, EVERYTHING.at_temperature(0.5), True),
        (NO_B.at_temperature(2.0), NO_B, False),
    ],
)  # fmt: skip
def test_zeros_of_a_table_that_the_prior_can_reach(lm, prior, expected):
    """Against the definition: q(x) = 0 < π0(x) for some outcome."""
    assert may_not_cover(lm, prior) is expected
    rows = prior.enumerate_sequences()
    missed = (lm.score(rows) == -torch.inf) & (prior.score(rows) > -torch.inf)
    assert bool(missed.any()) is expected


@pytest.mark.parametrize("seed", range(12))
def test_random_tables_with_zeros(seed):
    generator = torch.Generator().manual_seed(seed)
    tables = []
    for order in (1, 2):
        probs = torch.rand(*(4,) * order, 3, generator=generator, dtype=torch.float64)
        probs = probs * (torch.rand(probs.shape, generator=generator) > 0.15)
        probs[..., 0] += 0.1
        tables.append(table(probs / probs.sum(-1, keepdim=True), context=["", "a"]))
    for lm, prior in (tables, tables[::-1]):
        missed = False
        for c in range(2):
            rows = prior.enumerate_sequences(c)
            missed |= bool(((lm.score(rows) == -torch.inf) & (prior.score(rows) > -torch.inf)).any())
        assert may_not_cover(lm, prior) is missed


def test_what_is_known_of_other_language_models():
    llama = enumerable_lm("llama")
    assert positive_everywhere(llama)
    assert positive_everywhere(EVERYTHING)
    assert not positive_everywhere(NO_B)
    assert not positive_everywhere(NO_B.at_temperature(2.0))
    assert not may_not_cover(llama, EVERYTHING)
    guided = WeightedDecoding(ArbitraryTwist(3)).language_model(EVERYTHING * Reward(wavy))
    assert not may_not_cover(guided, EVERYTHING)
    assert may_not_cover(NO_B, guided)  # not a table: taken to be positive
    cut = WeightedDecoding(ArbitraryTwist(3), top_k=2).language_model(EVERYTHING * Reward(wavy))
    assert "is truncated" in coverage_note(cut, EVERYTHING)
    exact = infer(NO_B * Reward(wavy), Exact(), progress=False).as_language_model()
    assert coverage_note(exact, NO_B) == ""


@pytest.mark.parametrize("engine", [Importance(200), SMC(16), QuasiRejection(50, bound=0.0)], ids=str)
def test_an_estimate_says_that_its_proposal_may_not_cover(engine, caplog):
    model = EVERYTHING * Reward(wavy, beta=0.4)
    run = infer(model, replace(engine, proposal=NO_B), progress=False)
    note = "gives probability 0 to tokens that the prior can make, so it may not cover π*: then E Ẑ < Z"
    from_weights = run.log_normalizer[: 1 if isinstance(engine, QuasiRejection) else None]
    assert all(note in e.note for e in from_weights)  # log Z_q is a lower bound whatever q covers
    assert [e.kind for e in run.log_normalizer] == ["lower_bound"] * len(run.log_normalizer)
    assert note in run.info["coverage"]
    assert [note in r.message for r in caplog.records].count(True) == 1
    assert float(run.log_normalizer[0].value[0]) < float(brute_force(model, 0).log_z) - 0.1
    caplog.clear()
    for other, proposal in ((model, table([[0.4, 0.4, 0.2]] * 4)), (NO_B * Reward(wavy), NO_B)):
        run = infer(other, replace(engine, proposal=proposal), progress=False)
        assert not any("cover" in e.note for e in run.log_normalizer)
        assert "coverage" not in run.info
        assert run.log_normalizer[0].kind == "unbiased_Z"
    assert not caplog.records


BLIND_KERNELS = [
    Restart(proposal=NO_B), SuffixResample(proposal=NO_B), BlockResample(1, proposal=NO_B), LocalEdit(proposal=NO_B),
    TokenGibbs(proposal=NO_B),
    ParticleGibbs(SMC(4, proposal=NO_B)),  # refuses rows that it cannot write; all start from others here
    Mixture((Restart(proposal=NO_B), SuffixResample(proposal=NO_B))),
]  # fmt: skip


@pytest.mark.parametrize("kernel", BLIND_KERNELS, ids=lambda kernel: type(kernel).__name__)
def test_chains_say_that_their_proposal_may_not_cover(kernel, caplog):
    model = EVERYTHING * Reward(wavy, beta=0.4)
    run = infer(
        model,
        MCMC(8, 4, warmup=2, kernel=kernel, start=NO_B.draw(8, generator=torch.Generator().manual_seed(0))),
        progress=False,
    )
    note = "gives probability 0 to tokens that the prior can make, so it may not cover π*: chains can neither reach"
    assert note in run.info["coverage"]
    assert run.info["coverage"] in run.info["chain_notes"]
    assert [note in r.message for r in caplog.records].count(True) == 1


def test_a_mixture_with_one_kernel_that_reaches_everything_covers(caplog):
    kernel = Mixture((Restart(), SuffixResample(proposal=NO_B)))
    run = infer(EVERYTHING * Reward(wavy), MCMC(8, 4, warmup=2, kernel=kernel), progress=False)
    assert "coverage" not in run.info
    assert not any("cover" in r.message for r in caplog.records)


def test_laws_made_from_a_truncated_prior_are_cut_no_further():
    whole = LM("tiny", context="The", max_new_tokens=3)
    cut = LM("tiny", context="The", max_new_tokens=3, top_k=5)
    guided = WeightedDecoding(ArbitraryTwist(cut.vocab_size)).language_model(cut * Reward(wavy))
    for lm in (guided, guided.at_temperature(2.0), cut.at_temperature(0.5), cut):
        assert coverage_note(lm, cut) == ""
        assert "is truncated" in coverage_note(lm, whole)
    further = WeightedDecoding(ArbitraryTwist(cut.vocab_size), top_k=3).language_model(cut * Reward(wavy))
    assert "is truncated" in coverage_note(further, cut)


def test_a_defensive_mixture_covers():
    model = EVERYTHING * Reward(wavy, beta=0.4)
    run = infer(model, Importance(200, proposal=NO_B, defensive=0.2), progress=False)
    assert not any("cover" in e.note for e in run.log_normalizer)


def test_other_symbols_are_other_tokens():
    other = TabularLM([[0.5, 0.3, 0.2]] * 4, ["b", "a", "<eos>"], max_new_tokens=3)
    for lm in (other, other.at_temperature(2.0)):
        with pytest.raises(
            ModelError, match=r"got vocabulary \('b', 'a', '<eos>'\), expected the prior's \('a', 'b', "
        ):
            as_proposal(lm, EVERYTHING)
    assert as_proposal(EVERYTHING, EVERYTHING) is EVERYTHING
