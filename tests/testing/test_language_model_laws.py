"""check_language_model passes a right LM, and each broken one fails by the law that it breaks."""

import pytest
import torch

from lmppl.lm.machine import MachineDecoder, MachineRows
from lmppl.lm.tabular import TabularLM
from lmppl.testing import CheckFailed, Report, check_language_model
from lmppl.testing.decoder_laws import check_decoder
from tests.lm.random_models import random_lm


def build(kind=TabularLM, **options):
    lm = TabularLM.random(3, 4, order=2, seed=1, context=["", "ab"])
    return kind(lm.log_table.exp().view(4, 4, 3), max_new_tokens=4, context=list(lm.prompts), **options)


class Rescored(TabularLM):
    """Draws and scores agree with one another, and both with no law: a subclass says what becomes of log p(x)."""

    def change(self, rows, tokens):
        raise NotImplementedError

    def token_log_probs(self, sequences, *, cost=None):
        return self.change(sequences, super().token_log_probs(sequences, cost=cost))

    def draw(self, num_draws, *, generator=None, cost=None):
        draws = super().draw(num_draws, generator=generator, cost=cost)
        return draws.with_columns(log_prior=self.token_log_probs(draws).sum(-1))


class WithoutEos(Rescored):
    def change(self, rows, tokens):
        return tokens.masked_fill(rows.ids == self.eos_index, 0.0)


class WrongTemperature(Rescored):
    def change(self, rows, tokens):
        return tokens / 2


class MeanInsteadOfSum(Rescored):
    def change(self, rows, tokens):
        return tokens / rows.lengths[:, None]


class Unnormalised(Rescored):
    def change(self, rows, tokens):
        return torch.where(rows.mask, tokens - 0.01, tokens)


class Positive(Rescored):
    def change(self, rows, tokens):
        return -tokens


class EosOnlyInDraws(TabularLM):
    def token_log_probs(self, sequences, *, cost=None):
        return super().token_log_probs(sequences, cost=cost).masked_fill(sequences.ids == self.eos_index, 0.0)


class DrawsAnotherLaw(TabularLM):
    def draw(self, num_draws, *, generator=None, cost=None):
        other = TabularLM.random(3, 4, order=1, seed=8, context=list(self.prompts))
        draws = other.draw(num_draws, generator=generator, cost=cost)
        return draws.with_columns(log_prior=self.score(draws))


class ScoresTheBatch(TabularLM):
    def score(self, sequences, *, cost=None):
        return super().score(sequences, cost=cost) - 0.1 * float(len(sequences) == 1)


class ScoresTheOrder(TabularLM):
    def score(self, sequences, *, cost=None):
        scores = super().score(sequences, cost=cost)
        return scores if len(scores) < 20 else scores + 1e-3 * (sequences.lengths == sequences.lengths[0])


class IgnoresTheSeed(TabularLM):
    def draw(self, num_draws, *, generator=None, cost=None):
        return super().draw(num_draws, cost=cost)


class LeavesRubbishAfterTheEnd(TabularLM):
    def draw(self, num_draws, *, generator=None, cost=None):
        draws = super().draw(num_draws, generator=generator, cost=cost)
        return draws.with_columns(ids=draws.ids.masked_fill(~draws.mask, 1))


class StopsEarly(TabularLM):
    def draw(self, num_draws, *, generator=None, cost=None):
        draws = super().draw(num_draws, generator=generator, cost=cost)
        return draws.with_columns(lengths=draws.lengths - 1, finished=torch.zeros_like(draws.finished))


class MixesContexts(TabularLM):
    def draw(self, num_draws, *, generator=None, cost=None):
        draws = super().draw(num_draws, generator=generator, cost=cost)
        return draws.select(torch.arange(len(draws)).view(2, -1).T.reshape(-1))


class ForgetsTheContext(TabularLM):
    def log_prob(self, value):
        return super().log_prob(value[..., :1, :]).expand(value.shape[:-1])


class GoesOnAfterEos(TabularLM):
    def is_outcome(self, sequences):
        return super().is_outcome(sequences) | (sequences.lengths < 3)


class ForgetsAnOutcome(TabularLM):
    def enumerate_sequences(self, context=0, **options):
        table = super().enumerate_sequences(context, **options)
        return table.select(slice(1, None))


class BrokenDecoder(TabularLM):
    kind: type[MachineDecoder]

    def decoder(self):
        return self.kind(self.initial, self._advance, self._scores)


class RightPrefill(MachineDecoder):
    def prefill(self, context, prefix=None, lengths=None):
        return MachineDecoder(self.initial, self.advance, self.scores).prefill(context, prefix, lengths)


class CropForgetsWhereRowsStart(BrokenDecoder):
    class kind(RightPrefill):
        def crop(self, state, lengths):
            width = int(lengths.max()) + 1
            columns = (lengths[:, None] + 1 - width + torch.arange(width)).clamp_min(0)
            return MachineRows(state.history.gather(1, columns), width, lengths)


class CropCutsTooLittle(BrokenDecoder):
    class kind(RightPrefill):
        def crop(self, state, lengths):
            return super().crop(state, (lengths + 1).minimum(state.lengths))


class SelectKeepsTheOrder(BrokenDecoder):
    class kind(MachineDecoder):
        def select(self, state, index):
            return super().select(state, index.sort().values)


class PrefillIgnoresLengths(BrokenDecoder):
    class kind(MachineDecoder):
        def prefill(self, context, prefix=None, lengths=None):
            return super().prefill(context, prefix)


class ChunkReadsItsLastTokenOnly(BrokenDecoder):
    class kind(RightPrefill):
        def extend(self, state, tokens, *, grad=False):
            return super().extend(state, tokens[:, -1:].expand(tokens.shape))


@pytest.mark.parametrize(
    ("kind", "law"),
    [
        (WithoutEos, "probabilities of all outcomes sum to 1"),
        (WrongTemperature, "probabilities of all outcomes sum to 1"),
        (MeanInsteadOfSum, "probabilities of all outcomes sum to 1"),
        (Unnormalised, "probabilities of all outcomes sum to 1"),
        (Positive, "log-probabilities are at most 0"),
        (EosOnlyInDraws, "a draw's log_prior is its score"),
        (DrawsAnotherLaw, "draws have the probabilities that score says"),
        (ScoresTheBatch, "scores do not depend on the batch"),
        (ScoresTheOrder, "(a draw's log_prior is its score|scores do not depend on the (order|batch))"),
        (IgnoresTheSeed, "equal seeds give equal draws"),
        (LeavesRubbishAfterTheEnd, "the pad id stands after the end"),
        (StopsEarly, "every draw is an outcome"),
        (MixesContexts, "draws are ordered by context"),
        (ForgetsTheContext, "log_prob is score"),
        (GoesOnAfterEos, "what no run can produce has probability 0"),
        (ForgetsAnOutcome, "enumerate_sequences lists every outcome"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_broken_lm_fails(kind, law):
    with pytest.raises(CheckFailed, match=rf"TabularLM|{kind.__name__}") as failure:
        check_language_model(build(kind))
    assert failure.match(law)
    assert "got" in str(failure.value)
    assert "expected" in str(failure.value)


@pytest.mark.parametrize(
    ("kind", "law"),
    [
        (CropForgetsWhereRowsStart, "crop cuts rows to different lengths, again and again"),
        (CropCutsTooLittle, "crop cuts all rows to one length"),
        (SelectKeepsTheOrder, "select reorders, repeats and drops rows"),
        (PrefillIgnoresLengths, "prefixes of different length do not disturb one another"),
        (ChunkReadsItsLastTokenOnly, "a chunk of tokens is the same as one after the other"),
    ],
)
def test_a_broken_decoder_fails(kind, law):
    """Given right draws, so that no other law is in the way."""
    draws = build().draw(200, generator=torch.Generator().manual_seed(0))
    with pytest.raises(CheckFailed, match=f"decoder: {law} does not hold"):
        check_decoder(Report("it"), build(kind), draws, 1e-8)
    with pytest.raises(CheckFailed):
        check_language_model(build(kind))


@pytest.mark.parametrize("kind", [WrongTemperature, WithoutEos, Unnormalised, DrawsAnotherLaw])
def test_a_broken_lm_that_is_too_large_to_enumerate_fails_too(kind):
    with pytest.raises(CheckFailed, match=r"token [12]"):
        check_language_model(build(kind), max_rows=10)


def test_a_right_lm_passes():
    report = check_language_model(build())
    assert not report.skipped
    assert 0 < report.error_rate <= 1e-5
    text = str(report)
    assert text.startswith("TabularLM(2 contexts, max_new_tokens=4): 28 laws hold")
    assert "all 3^4 rows of tokens" in text


def test_what_is_left_out_is_said():
    report = check_language_model(TabularLM.random(6, 50, seed=3))
    assert "too many" in report.skipped["the probabilities of all outcomes sum to 1"]
    short = check_language_model(TabularLM.random(3, 1))
    assert "no draw has two tokens" in short.skipped["decoder: crop cuts"]


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_real_decoders_keep_the_laws(kind):
    """Random networks in float64, the second with a window shorter than its rows."""
    report = check_language_model(random_lm(kind), num_draws=500)
    assert "decoder: crop cuts rows to different lengths, again and again" in report.held
