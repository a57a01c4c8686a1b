"""How good predictions of choices are: log-likelihood, accuracy, calibration, and posterior predictive checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lmppl.modeling.evidence.preference.pairs import Pairs
from lmppl.sequences import Estimate

__all__ = ["NUM_REPLICATES", "Calibration", "Evaluation", "PredictiveCheck", "evaluate_predictions"]

NUM_BINS = 10
NUM_REPLICATES = 1000
CHUNK = 50  # replicates at a time
SMALL = 0.01  # a p-value below it, divided by the number of checks, is a contradiction
FIRST, SECOND, TIE = range(3)

Replicate = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Which share of the choices predicted with confidence c = max(p, 1 − p) was right, by c.

    Parameters
    ----------
    count : Tensor (K,)
        Choices in each of K bins of equal width over [½, 1].
    confidence : Tensor (K,)
        Their mean c; nan in an empty bin.
    share : Tensor (K,)
        Which share of them was right; nan in an empty bin.
    interval : Tensor (K, 2)
        Of the share, by Clopper and Pearson, at 0.95.
    error : float
        The expected calibration error Σ_k (count_k / N) |confidence_k − share_k|. Source: `guo2017`.
    expected_error : float
        Its mean over replicates, in which choices are made by draws of the posterior: even a true model has an error.
    p_value : float
        The share of replicates (and of the data, which is one) whose error is at least as large.
    """

    count: Tensor
    confidence: Tensor
    share: Tensor
    interval: Tensor
    error: float
    expected_error: float
    p_value: float


@dataclass(frozen=True)
class PredictiveCheck:
    """A figure of the choices, against its law when choices are made by the fitted model.

    Parameters
    ----------
    name : str
        "agreement": choices of the text that was the likelier one; "agreement of NAME"; "ties".
    observed : float
    interval : tuple of two floats
        The middle 95 % of the replicates.
    p_value : float
        Two-sided: twice the smaller share of replicates (and the data) on one side of `observed`, ties counted on both.
    """

    name: str
    observed: float
    interval: tuple[float, float]
    p_value: float


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What pairs say about a reward model.

    Parameters
    ----------
    num_pairs, num_ties : int
    log_likelihood : Estimate (1,)
        Mean log P(what was said) of a pair, in nats; a coin has −0.693. Its standard error is over pairs (divisor
        N − 1; nan of a single pair), its interval Gaussian, at 0.95.
    accuracy : Estimate (1,)
        Share of the choices in which the chosen text was the likelier one, one half where both were as likely, by
        Clopper and Pearson, at 0.95.
    calibration : Calibration
    checks : tuple of PredictiveCheck
    """

    num_pairs: int
    num_ties: int
    log_likelihood: Estimate
    accuracy: Estimate
    calibration: Calibration
    checks: tuple[PredictiveCheck, ...]

    @property
    def contradictions(self) -> tuple[PredictiveCheck, ...]:
        """The checks with p < 0.01 / their number."""
        return tuple(one for one in self.checks if one.p_value < SMALL / len(self.checks))

    def __repr__(self) -> str:
        (mean,), (error,) = self.log_likelihood.value.tolist(), self._error.tolist()
        (share,), (low, high) = self.accuracy.value.tolist(), _ends(self.accuracy)
        bins = self.calibration
        lines = [
            f"{self.num_pairs} pairs, {self.num_ties} ties",
            f"  log-likelihood a pair {mean:.4f} ± {error:.4f} nats",
            f"  accuracy {share:.3f} [{low:.3f}, {high:.3f}]",
            f"  calibration error {bins.error:.4f}, if calibrated {bins.expected_error:.4f} (p = {bins.p_value:.2g})",
        ]
        lines += [
            f"  {one.name}: {one.observed:g}, model [{one.interval[0]:g}, {one.interval[1]:g}] (p = {one.p_value:.2g})"
            for one in self.checks
        ]
        return "\n".join(lines)

    @property
    def _error(self) -> Tensor:
        assert self.log_likelihood.standard_error is not None
        return self.log_likelihood.standard_error


def evaluate_predictions(log_p: Tensor, pairs: Pairs, replicate: Replicate, seed: int = 0) -> Evaluation:
    """The figures of predictions.

    Parameters
    ----------
    log_p : Tensor (N, 3)
        log P of "chosen is better", "rejected is better", "tie", in nats.
    pairs : Pairs
        What was said: that the chosen text is better, or that there is a tie.
    replicate : callable
        Numbers (R,) of replicates below 1000 → the outcomes' probabilities (R, N, 3), by a draw of what is not known
        for each.
    seed : int
        Of the choices in replicates.
    """
    said = torch.where(pairs.tie, log_p[:, TIE], log_p[:, FIRST])
    mean = said.mean()[None]
    error = said.std()[None] / len(said) ** 0.5 if len(said) > 1 else torch.full((1,), torch.nan, dtype=said.dtype)
    chosen = torch.sigmoid(log_p[:, FIRST] - log_p[:, SECOND])
    above = (chosen - 0.5).sign()
    right = (1 + above[~pairs.tie]) / 2
    count = torch.tensor(float(len(right)), dtype=torch.float64)
    checks, calibration = _replicated(chosen, above, pairs, replicate, bool((log_p[:, TIE] > -torch.inf).any()), seed)
    return Evaluation(
        num_pairs=len(pairs),
        num_ties=int(pairs.tie.sum()),
        log_likelihood=Estimate(
            mean,
            torch.stack([mean - 1.96 * error, mean + 1.96 * error], 1),
            standard_error=error,
            replicates=len(said),
            note="of the spread over pairs",
        ),
        accuracy=Estimate(right.mean()[None], _clopper_pearson(right.sum(), count)[None], replicates=len(right)),
        calibration=calibration,
        checks=checks,
    )


def _replicated(
    chosen: Tensor, above: Tensor, pairs: Pairs, replicate: Replicate, has_ties: bool, seed: int
) -> tuple[tuple[PredictiveCheck, ...], Calibration]:
    """What choices that are made again say of those that were made. Source: `gelman1996`."""
    generator = torch.Generator().manual_seed(seed)
    groups = {"agreement": torch.ones(len(pairs), dtype=torch.bool)}
    groups |= {f"agreement of {name}": pairs.annotator == j for j, name in enumerate(pairs.annotators)}
    masks = torch.stack(list(groups.values()), 1).double()
    decided = (~pairs.tie).double()
    confidence = torch.maximum(chosen, 1 - chosen)
    bins = ((confidence - 0.5) * 2 * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    member = torch.nn.functional.one_hot(bins, NUM_BINS).double() * decided[:, None]
    count, claimed = member.sum(0), confidence @ member
    agreements, ties, errors = [], [], []
    for numbers in torch.arange(NUM_REPLICATES).split(CHUNK):
        p = replicate(numbers)
        level = torch.rand(p.shape[:2], dtype=torch.float64, generator=generator)
        won, tied = level < p[..., FIRST], level >= p[..., FIRST] + p[..., SECOND]
        said = torch.where(won, 1.0, -1.0).masked_fill(tied, 0.0).double()
        agreements.append((said * above == 1).double() @ masks)
        ties.append(tied.sum(1).double())
        # Calibration is about choices: the pairs that were choices are made again as choices.
        level = torch.rand(p.shape[:2], dtype=torch.float64, generator=generator)
        first = torch.where(level * (p[..., FIRST] + p[..., SECOND]) < p[..., FIRST], 1.0, -1.0)
        errors.append((claimed - (1 + first * above) / 2 @ member).abs().sum(1) / count.sum())
    replicated = dict(zip(groups, torch.cat(agreements).T, strict=True)) | {"ties": torch.cat(ties)}
    agreed = (decided * above == 1).double()
    seen = {name: float(agreed[rows].sum()) for name, rows in groups.items()}
    if has_ties:
        seen["ties"] = float(pairs.tie.sum())
    hit = (1 + above) / 2 @ member
    error, again = float((claimed - hit).abs().sum() / count.sum()), torch.cat(errors)
    calibration = Calibration(
        count=count.long(),
        confidence=claimed / count,
        share=hit / count,
        interval=_clopper_pearson(hit, count),
        error=error,
        expected_error=float(again.mean()),
        p_value=(1 + int((again >= error - 1e-12).sum())) / (1 + len(again)),
    )
    return tuple(_check(name, value, replicated[name]) for name, value in seen.items()), calibration


def _check(name: str, observed: float, replicated: Tensor) -> PredictiveCheck:
    sides = min(int((replicated >= observed).sum()), int((replicated <= observed).sum()))
    low, high = replicated.quantile(torch.tensor([0.025, 0.975], dtype=replicated.dtype)).tolist()
    return PredictiveCheck(name, observed, (low, high), min(1.0, 2 * (1 + sides) / (1 + len(replicated))))


def _clopper_pearson(hits: Tensor, total: Tensor) -> Tensor:
    """(..., 2) the interval at 0.95; [0, 1] of no trial."""
    from scipy.special import betaincinv

    k, n = hits.numpy(), total.numpy()
    low = torch.as_tensor(betaincinv(k.clip(1e-300), n - k + 1, 0.025)).where(hits > 0, torch.zeros_like(hits))
    high = torch.as_tensor(betaincinv(k + 1, (n - k).clip(1e-300), 0.975)).where(hits < total, torch.ones_like(hits))
    return torch.stack([low, high], -1)


def _ends(estimate: Estimate) -> tuple[float, float]:
    assert estimate.interval is not None
    low, high = estimate.interval[0].tolist()
    return low, high
