"""check_engine passes right engines, and each broken one fails by the law that it breaks."""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from lmppl.errors import InfeasibleModel
from lmppl.inference import Engine, Guarantee, Part, Particles, Sampler, shard_generator
from lmppl.lm.decoding import draw_rows
from lmppl.modeling.target import log_evidence
from lmppl.sequences import Draws, Estimate, concatenate
from lmppl.testing import CheckFailed, check_engine, references

PROBLEMS = {r.name: r for r in references()}
SOME = [PROBLEMS[name] for name in ("hard_constraint", "two_contexts", "unbounded_reward", "long_horizon")]
BOUNDED = [PROBLEMS[name] for name in ("bounded_reward", "hard_constraint", "two_contexts", "long_horizon")]


def proposals(target, shard, num_draws, generator):
    context = torch.tensor(shard.contexts).repeat_interleave(num_draws)
    return target.evaluate(draw_rows(target.prior, context, generator=generator, cost=target.cost))


@dataclass(frozen=True)
class TinyImportance(Engine):
    """Importance sampling from the prior, in the fewest lines; broken variants override a step."""

    name: ClassVar[str] = "tiny_importance"
    guarantee: ClassVar[Guarantee] = Guarantee.CONSISTENT

    def run_shard(self, target, shard, *, state=None):
        return Part(shard, self.weighted(proposals(target, shard, shard.num_draws, self.generator(shard))))

    def generator(self, shard):
        return shard_generator(shard)

    def weighted(self, draws: Draws) -> Draws:
        return draws.with_columns(log_weight=log_evidence(draws))

    def merge(self, parts):
        draws = concatenate([p.draws for p in parts])
        return Particles(draws, (self.normalizer(draws),), self.guarantee)

    def normalizer(self, draws: Draws) -> Estimate:
        value, error = [], []
        for c in range(draws.num_contexts):
            w = draws.log_weight[draws.context == c].exp()
            value.append(w.mean().log())
            error.append(w.std() / w.mean() / math.sqrt(len(w)))
        value, error = torch.stack(value), torch.stack(error)
        interval = torch.stack([value - 1.96 * error, value + 1.96 * error], -1)
        return Estimate(value, interval, 0.95, "unbiased_Z", error)


@dataclass(frozen=True)
class TinyRejection(Engine):
    """Rejection from the prior, with the bound that the factors declare plus `slack` nats."""

    slack: float = 0.0
    name: ClassVar[str] = "tiny_rejection"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT

    def unsupported_reason(self, form):
        return "no bound; declare upper" if math.isinf(form.log_upper) else None

    def run_shard(self, target, shard, *, state=None):
        generator, rows = shard_generator(shard), []
        for _ in range(200):
            batch = proposals(target, shard, 500, generator)
            log_accept = log_evidence(batch) - target.form.log_upper - self.slack
            rows.append(batch.select(torch.rand(len(batch), generator=generator).log() < log_accept))
            found = concatenate(rows)
            counts = torch.bincount(found.context, minlength=len(shard.contexts))
            if int(counts.min()) >= shard.num_draws:
                picked = [torch.nonzero(found.context == c)[: shard.num_draws, 0] for c in shard.contexts]
                return Part(shard, self.finished(found.select(torch.cat(picked))))
        raise InfeasibleModel("nothing accepted")

    def finished(self, draws: Draws) -> Draws:
        return draws.with_columns(log_weight=None, log_q=None)

    def merge(self, parts):
        return Sampler(concatenate([p.draws for p in parts]), (), self.guarantee)


def test_right_engines_pass():
    report = check_engine(TinyImportance(), problems=SOME, seeds=(0, 1, 2))
    assert report.held["intervals of log Z cover as often as they say"] == "p ≥ 1e-06"
    assert report.held["expectations are within 4.5 standard errors"] == "on 4 references"
    report = check_engine(TinyRejection(), problems=BOUNDED)
    assert report.held["draws have the law π*"] == "on 3 references"
    assert not any(name.startswith("reference") for name in report.skipped)
    assert check_engine(TinyRejection(slack=0.5), problems=BOUNDED[:2]), "a bound that is not tight is right too"


def test_references_that_are_not_supported_are_listed_with_the_reason():
    report = check_engine(TinyRejection(), problems=SOME)
    assert report.skipped["reference 'unbounded_reward'"] == "no bound; declare upper"
    with pytest.raises(CheckFailed, match="some reference posterior is supported"):
        check_engine(TinyRejection(), problems=[PROBLEMS["unbounded_reward"]])


def test_finding_nothing_is_honest_only_where_the_posterior_is_rare():
    @dataclass(frozen=True)
    class FindsNothing(TinyRejection):
        def run_shard(self, target, shard, *, state=None):
            if target.factors[0].name == "is_bbbb":
                raise InfeasibleModel("nothing accepted")
            return super().run_shard(target, shard)

    report = check_engine(FindsNothing(), problems=[PROBLEMS["rare_constraint"], BOUNDED[0]])
    assert "said so" in report.skipped["a run with seed 0 on 'rare_constraint'"]

    @dataclass(frozen=True)
    class GivesUp(TinyRejection):
        def run_shard(self, target, shard, *, state=None):
            raise InfeasibleModel("nothing accepted")

    with pytest.raises(CheckFailed, match="'bounded_reward': a draw with γ > 0 is found"):
        check_engine(GivesUp(), problems=BOUNDED)


# Broken engines.


class DropsZeroWeights(TinyImportance):
    """Z is then estimated from the draws that obey the constraint only."""

    def weighted(self, draws):
        draws = super().weighted(draws)
        return draws.select(draws.log_weight > -math.inf)


class ForgetsAFactor(TinyImportance):
    def weighted(self, draws):
        return draws.with_columns(log_weight=next(iter(draws.log_factors.values())))


class ForgetsTheWeights(TinyImportance):
    def weighted(self, draws):
        return draws.with_columns(log_weight=None)

    def normalizer(self, draws):
        return Estimate(torch.zeros(draws.num_contexts).double(), None, kind="lower_bound")


class SoftensZero(TinyImportance):
    def weighted(self, draws):
        draws = super().weighted(draws)
        return draws.with_columns(log_weight=draws.log_weight.clamp_min(-20.0))


class TemperedWeights(TinyImportance):
    def weighted(self, draws):
        draws = super().weighted(draws)
        return draws.with_columns(log_weight=draws.log_weight * 0.8)


class LeavesUnfinishedOut(TinyImportance):
    def weighted(self, draws):
        return super().weighted(draws.select(draws.finished | (draws.context.bincount().min() < 10)))


class ChangesThePrior(TinyImportance):
    def weighted(self, draws):
        return super().weighted(draws).with_columns(log_prior=draws.log_prior + 0.1)


class ChangesTheFactors(TinyImportance):
    def weighted(self, draws):
        return super().weighted(draws).with_columns(log_factors={k: v / 2 for k, v in draws.log_factors.items()})


class LosesTheFeatures(TinyImportance):
    def weighted(self, draws):
        return super().weighted(draws).with_columns(features={})


class BoldIntervals(TinyImportance):
    def normalizer(self, draws):
        estimate = super().normalizer(draws)
        middle = estimate.value[:, None]
        return dataclasses.replace(estimate, interval=middle + (estimate.interval - middle) / 20)


class IgnoresTheSeed(TinyImportance):
    def generator(self, shard):
        return None


class OneSeedForAll(TinyImportance):
    def generator(self, shard):
        return torch.Generator().manual_seed(shard.id)


class SharesOneGenerator(TinyImportance):
    """Right for one pass in one order, and not repeatable shard by shard."""

    kept: ClassVar[dict] = {}

    def generator(self, shard):
        if shard.id == 0:
            self.kept["generator"] = shard_generator(shard)
        return self.kept["generator"]


class CountsNothing(TinyImportance):
    def run_shard(self, target, shard, *, state=None):
        part = super().run_shard(target, shard)
        target.cost.lm_tokens = target.cost.lm_forwards = 0
        return part


class ClippedBound(TinyRejection):
    """Accepts with min(1, φ/M) and M two nats too low: rewards above it are all alike."""


class WeighsExactDraws(TinyRejection):
    def finished(self, draws):
        return draws.with_columns(log_weight=log_evidence(draws))


class AcceptsEverything(TinyRejection):
    def run_shard(self, target, shard, *, state=None):
        return Part(shard, self.finished(proposals(target, shard, shard.num_draws, shard_generator(shard))))


class ShortDrawsOnly(TinyRejection):
    def finished(self, draws):
        return super().finished(draws.select(draws.finished))


@pytest.mark.parametrize(
    ("engine", "law"),
    [
        (DropsZeroWeights(), "log Z is within 4.5 standard errors"),
        (ForgetsAFactor(), "where γ = 0 the weight is 0|log Z is within|expectations are within"),
        (ForgetsTheWeights(), "where γ = 0 the weight is 0"),
        (SoftensZero(), "where γ = 0 the weight is 0"),
        (TemperedWeights(), "expectations are within|log Z is within"),
        (LeavesUnfinishedOut(), "expectations are within"),
        (ChangesThePrior(), "log_prior is that of the prior"),
        (ChangesTheFactors(), "log_factors are what the target computes"),
        (LosesTheFeatures(), "draws have all features"),
        (BoldIntervals(), "intervals of log Z cover as often as they say"),
        (IgnoresTheSeed(), "equal seeds give equal draws"),
        (OneSeedForAll(), "different seeds give different draws"),
        (SharesOneGenerator(), "shards depend on seed and id alone"),
        (CountsNothing(), "LM tokens, forwards and seconds are counted"),
        (ClippedBound(slack=-2.0), "draws have the law π"),
        (WeighsExactDraws(), "exact draws have equal weights"),
        (AcceptsEverything(), "where γ = 0 the weight is 0|draws have the law π"),
        (ShortDrawsOnly(), "draws have the law π"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Engine) else "",
)
def test_a_broken_engine_fails(engine, law):
    problems = SOME if engine.guarantee is Guarantee.CONSISTENT else BOUNDED
    seeds = (0, 1, 2, 3, 4) if isinstance(engine, BoldIntervals) else (0, 1)
    with pytest.raises(CheckFailed, match=r"engine tiny_\w+") as failure:
        check_engine(engine, problems=problems, seeds=seeds)
    assert failure.match(law)
    assert failure.match("got .* expected")
