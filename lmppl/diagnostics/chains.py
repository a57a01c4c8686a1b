"""What Markov chains say about themselves: R̂, effective sample sizes, Monte Carlo errors, and chains that never move.

Every figure takes the values h(x) of one scalar, shape (chains, steps), warm-up left out. All of them are blind to
mass of π* that no chain reached: chains that agree on one mode look perfect. The rank-based figures work on
texts' discrete scalars (lengths, counts, indicators) because ties get their mean rank; where values do not vary there
is nothing to estimate, and the figure is the one that nobody can mistake for convergence, with the reason in `note`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmppl.errors import ModelError, ShapeError

__all__ = [
    "ChainFigure",
    "autocorrelation_time",
    "bulk_ess",
    "mcse",
    "nested_rhat",
    "nested_rhat_floor",
    "rhat",
    "stuck_chains",
    "tail_ess",
]

Array = NDArray[np.float64]

MIN_STEPS = 4  # two halves of two steps: below, no variance within a half
SEEN_STEPS = 20  # of a chain, in which an autocorrelation can be seen
MANY_CHAINS = 16  # whose means' spread is known to a fifth
BLOM = 3 / 8  # offset of the normal scores [vehtari2021]


class ChainFigure(NamedTuple):
    """A figure about chains.

    Parameters
    ----------
    value : float
        Never nan where it was computed; nan, with a note, is for whoever has too few chains or steps to ask for it.
    note : str
        Begins with "constant:" where no value differs from any other, with "stuck:" where some chain never moves (it
        names them); empty where there is nothing to say.
    """

    value: float
    note: str = ""

    @property
    def constant(self) -> bool:
        """Whether the scalar never varied, in any chain: the figure then says nothing about convergence."""
        return self.note.startswith("constant:")


def rhat(x: Tensor) -> ChainFigure:
    """Rank-normalised split R̂: √(variance over all half-chains / variance within them), of ranks; about 1 when mixed.

    The larger of R̂ on normal scores of the ranks and R̂ on those of |x − median|. Detects chains whose locations or
    spreads differ, and drift between the first and the second half of a chain; above 1.01, do not trust. Blind to modes
    that no chain visits, to events so rare that no chain saw them, and to what other scalars do.

    Parameters
    ----------
    x : Tensor (chains, steps)
        Finite values; at least 4 steps. One chain is compared with its own other half.

    Returns
    -------
    ChainFigure
        `value` inf where halves differ and none of them varies, and where nothing varies ("constant").

    Raises
    ------
    ShapeError, ModelError
        Where the shape is another, or a value is nan or infinite.

    References
    ----------
    vehtari2021
    """
    values = _checked(x)
    return _figure(values, lambda: _bulk_and_spread(_split(values), _plain_rhat), of_constant=math.inf)


def nested_rhat(x: Tensor, groups: Tensor) -> ChainFigure:
    """Rank-normalised nested R̂ = √(1 + B/W) for many short chains, even of one step.

    Chains of one group start from one point, groups start apart. B is the variance of the groups' means; W is the mean
    over groups of the variance within chains plus the variance between the chains of the group. Chains are not split.
    Detects groups that still remember their starting points. Chains that have forgotten them give up to about
    √(1 + 1/M), M chains a group (`nested_rhat_floor`), not 1; judge the figure against that. Blind to what all groups
    miss, as R̂ is, and to memory of the start where the groups' starting points are alike.

    Parameters
    ----------
    x : Tensor (chains, steps)
        Finite values; at least 1 step.
    groups : Tensor (chains,), int64
        The group of each chain: at least 2 groups, of equal size, of at least 2 chains.

    Returns
    -------
    ChainFigure
        As `rhat`: inf where groups differ and nothing varies within them, and where nothing varies at all.

    Raises
    ------
    ShapeError, ModelError
        Where shapes or group sizes are others, or a value is nan or infinite.

    References
    ----------
    margossian2024
    """
    values = _checked(x, min_steps=1)
    if groups.shape != (len(values),):
        raise ShapeError(
            f"nested_rhat: got groups {tuple(groups.shape)}, expected ({len(values)},): one for each chain"
        )
    _, group, sizes = np.unique(groups.cpu().numpy(), return_inverse=True, return_counts=True)
    if len(sizes) < 2 or sizes.min() != sizes.max() or sizes.min() < 2:
        raise ModelError(
            f"nested_rhat: got groups of {sizes.tolist()} chains, expected at least 2 groups of one size, at least 2"
        )
    members = np.argsort(group, kind="stable").reshape(len(sizes), -1)
    return _figure(
        values, lambda: _bulk_and_spread(values, lambda z: _plain_nested_rhat(z[members])), of_constant=math.inf
    )


def nested_rhat_floor(chains_per_group: int) -> float:
    """√(1 + 1/M): nested R̂ of groups of M independent chains that have forgotten where they started.

    Of chains of one step; of longer chains it is the upper end, reached where the steps of a chain hardly differ.
    """
    return math.sqrt(1.0 + 1.0 / chains_per_group)


def bulk_ess(x: Tensor) -> ChainFigure:
    """Effective sample size of the ranks' normal scores: how many independent draws the middle of the law is worth.

    Of split chains, so that disagreement between and within chains lowers it as autocorrelation does; antithetic chains
    can exceed chains × steps. Of 16 chains or more of fewer than 20 steps, at most what the spread of their means
    allows. Detects slow mixing. Blind to slow mixing of the tails alone, and to unseen modes.

    Parameters
    ----------
    x : Tensor (chains, steps)
        Finite values; at least 4 steps.

    Returns
    -------
    ChainFigure
        For a constant scalar: the number of chains, since one that never moves is worth at most one draw.

    Raises
    ------
    ShapeError, ModelError
        As in `rhat`.

    References
    ----------
    vehtari2021
    """
    values = _checked(x)
    return _figure(values, lambda: _ess(values, "bulk"), of_constant=len(values))


def tail_ess(x: Tensor, probability: float = 0.05) -> ChainFigure:
    """The smaller effective sample size of the indicators of the two tails, each of mass `probability` or more.

    The tails are {x ≤ q_p} and {x ≥ q_{1−p}}. On discrete scalars a tail can hold every value, as when more than 1 − p
    of them tie; it is then taken without the quantile itself, since a constant indicator would count as perfect.
    Detects chains that visit extremes too rarely to estimate quantiles there. Blind to tails that no chain reached.

    Parameters
    ----------
    x : Tensor (chains, steps)
        Finite values; at least 4 steps.
    probability : float
        Mass of each tail, between 0 and 1/2.

    Returns
    -------
    ChainFigure
        For a constant scalar: the number of chains.

    Raises
    ------
    ShapeError, ModelError
        As in `rhat`.

    References
    ----------
    vehtari2021
    """
    if not 0.0 < probability < 0.5:
        raise ModelError(f"tail_ess: got probability={probability}, expected between 0 and 1/2")
    values = _checked(x)
    low, high = np.quantile(values, [probability, 1.0 - probability])
    lower = values <= low if (values > low).any() else values < low
    upper = values >= high if (values < high).any() else values > high
    tails = [tail.astype(np.float64) for tail in (lower, upper)]
    return _figure(values, lambda: min(_ess(tail, "mean") for tail in tails), of_constant=len(values))


def mcse(x: Tensor) -> ChainFigure:
    """Monte Carlo standard error of the mean: s/√ESS, s over all draws, ESS that of the values themselves.

    In the unit of x. Detects means that autocorrelation makes less certain than their number of draws suggests. Blind
    to bias from warm-up or from unseen modes, and meaningless where the variance under π* is infinite.

    Parameters
    ----------
    x : Tensor (chains, steps)
        Finite values; at least 4 steps.

    Returns
    -------
    ChainFigure
        inf for a constant scalar: values that never vary say nothing about an error.

    Raises
    ------
    ShapeError, ModelError
        As in `rhat`.

    References
    ----------
    vehtari2021
    """
    values = _checked(x)
    return _figure(values, lambda: float(values.std(ddof=1)) / math.sqrt(_ess(values, "mean")), of_constant=math.inf)


def autocorrelation_time(x: Tensor) -> ChainFigure:
    """τ = chains · steps / ESS of the values: steps between draws that are worth as much as independent ones.

    Detects and is blind to the same as `mcse`. About 1 for independent draws, below 1 for antithetic chains.

    Parameters
    ----------
    x : Tensor (chains, steps)
        Finite values; at least 4 steps.

    Returns
    -------
    ChainFigure
        For a constant scalar: the number of steps.

    Raises
    ------
    ShapeError, ModelError
        As in `rhat`.

    References
    ----------
    vehtari2021
    """
    values = _checked(x)
    return _figure(values, lambda: values.size / _ess(values, "mean"), of_constant=values.shape[1])


def stuck_chains(x: Tensor) -> tuple[int, ...]:
    """Numbers of the chains that hold one value at every step.

    Of a scalar, a chain can look stuck because h takes few values; of the states themselves, (chains, steps, T) token
    ids, it did not move. Detects chains that never accept. Blind to chains that move within one mode.

    Parameters
    ----------
    x : Tensor (chains, steps) or (chains, steps, K)
        At least 2 steps.

    Raises
    ------
    ShapeError
        Where there are fewer dimensions or steps: one step cannot show that a chain moves.
    """
    if x.dim() < 2 or x.shape[1] < 2:
        raise ShapeError(f"stuck_chains: got shape {tuple(x.shape)}, expected (chains, steps) with at least 2 steps")
    still = (x == x[:, :1]).flatten(1).all(1)
    return tuple(torch.nonzero(still).squeeze(1).tolist())


def _checked(x: Tensor, min_steps: int = MIN_STEPS) -> Array:
    if x.dim() != 2 or x.shape[0] < 1 or x.shape[1] < min_steps:
        raise ShapeError(
            f"chains: got shape {tuple(x.shape)}, expected (chains, steps) with at least {min_steps} steps"
        )
    values: Array = x.detach().cpu().double().numpy()
    odd = np.argwhere(~np.isfinite(values))
    if len(odd):
        chain, step = odd[0].tolist()
        raise ModelError(f"chains: got {values[chain, step]} in chain {chain} at step {step}, expected finite values")
    return values


def _figure(values: Array, compute: Callable[[], float], *, of_constant: float) -> ChainFigure:
    """What `compute` finds where values vary, and what the figure of a constant is, each with its note."""
    note = _note(values)
    return ChainFigure(float(of_constant) if note.startswith("constant:") else compute(), note)


def _note(values: Array) -> str:
    if np.ptp(values) == 0:
        return (
            f"constant: every value is {values.flat[0]:g}; either h does not vary under π*, or no chain moves "
            "(stuck_chains of the states tells)"
        )
    still = np.flatnonzero(np.ptp(values, axis=1) == 0).tolist() if values.shape[1] > 1 else []
    if not still:
        return ""
    if len(still) == len(values):
        return f"stuck: none of the {len(values)} chains ever changes its value"
    named = ", ".join(map(str, still[:8])) + (", ..." if len(still) > 8 else "")
    one = len(still) == 1
    return (
        f"stuck: chain{'' if one else 's'} {named} never change{'s' if one else ''} {'its' if one else 'their'} value"
    )


def _split(values: Array) -> Array:
    """(2 chains, steps // 2) first and last halves; the middle of an odd number is left out."""
    half = values.shape[1] // 2
    return np.concatenate([values[:, :half], values[:, -half:]])


def _normal_scores(values: Array) -> Array:
    """Φ⁻¹ of the fractional ranks over all chains; ties share their mean rank."""
    from scipy.special import ndtri
    from scipy.stats import rankdata

    ranks = rankdata(values, method="average").reshape(values.shape)
    scores: Array = ndtri((ranks - BLOM) / (values.size - 2.0 * BLOM + 1.0))
    return scores


def _bulk_and_spread(values: Array, plain: Callable[[Array], float]) -> float:
    """The larger of a plain R̂ of the normal scores, and of those of |x − median|."""
    folded = np.abs(values - np.median(values))  # a symmetrical indicator folds to a constant, which says nothing
    spread = plain(_normal_scores(folded)) if np.ptp(folded) > 0 else 1.0
    return max(plain(_normal_scores(values)), spread)


def _plain_rhat(values: Array) -> float:
    steps = values.shape[1]
    within = float(values.var(axis=1, ddof=1).mean())
    between = float(values.mean(axis=1).var(ddof=1))
    return math.inf if _vanishes(within, between) else math.sqrt((steps - 1) / steps + between / within)


def _plain_nested_rhat(values: Array) -> float:
    """Of (groups, chains, steps)."""
    means = values.mean(axis=2)
    inside = values.var(axis=2, ddof=1).mean(axis=1) if values.shape[2] > 1 else np.zeros(len(values))
    within = float((inside + means.var(axis=1, ddof=1)).mean())
    between = float(means.mean(axis=1).var(ddof=1))
    return math.inf if _vanishes(within, between) else math.sqrt(1.0 + between / within)


def _vanishes(within: float, between: float) -> bool:
    """Whether the variance within is rounding only, beside that between (scores are of order 1)."""
    return within <= 1e-20 * max(between, 1e-10)


def _ess(values: Array, method: str) -> float:
    """arviz's estimate, for values that vary; of many short chains no more than their means say.

    In a few steps no autocorrelation can be seen, and the estimate is at its ceiling whatever the chains do. The means
    of C chains have the variance Var(h)/ESS · C, which their spread shows.
    """
    from arviz_stats.base.array import array_stats

    untyped: Any = array_stats
    found = float(untyped.ess(values, method=method))
    chains, steps = values.shape
    if steps >= SEEN_STEPS or chains < MANY_CHAINS:
        return found
    scores = _normal_scores(values) if method == "bulk" else values
    between = float(scores.mean(1).var(ddof=1)) / chains
    return min(found, float(scores.var(ddof=1)) / between) if between > 0 else found
