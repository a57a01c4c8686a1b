"""Tests of a sampler by exact draws of π*, without a density: exchangeability in one step, rank calibration."""

from __future__ import annotations

import torch
from torch import Tensor

from lmppl.errors import ModelError, ShapeError

__all__ = ["exchangeability", "holm", "rank_calibration"]

MIN_DRAWS = 9  # of rank_calibration: n draws see the first n moments of a distribution function only


def exchangeability(
    before: Tensor, after: Tensor, *, num_flips: int = 9999, generator: torch.Generator | None = None
) -> float:
    """p-value of the hypothesis that x is a draw of π* and that the kernel x → x' is π*-reversible.

    Then (x, x') and (x', x) have one law, so that each difference h(x') − h(x) is as likely as its negative: the sum of
    N independent differences is compared with sums under random signs (exact size, up to the number of flips).

    Detects draws that one step of a right kernel would move to where π* has more mass, and a kernel that does not leave
    the law of right draws as it is. Blind to masses that the kernel cannot bridge in one step, and to kernels that are
    not reversible but invariant, such as a fixed sweep of several: those it calls wrong.

    Parameters
    ----------
    before, after : Tensor (N,)
        h of independent draws, and of each after one step.
    num_flips : int
        Random sign vectors.
    generator : torch.Generator, optional
        Draws the signs; by default one of seed 0, so that equal data give equal p-values.

    Returns
    -------
    float
        In (0, 1]; 1 where nothing moved.

    Raises
    ------
    ShapeError
        Where the two are not both (N,).
    """
    if before.dim() != 1 or before.shape != after.shape:
        got = f"{tuple(before.shape)} and {tuple(after.shape)}"
        raise ShapeError(f"exchangeability: got shapes {got}, expected the same (N,)")
    gaps = (after.double() - before.double()).cpu()
    gaps = gaps[gaps != 0]
    if len(gaps) == 0:
        return 1.0
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    signs = 1.0 - 2.0 * torch.randint(2, (num_flips, len(gaps)), generator=generator).double()
    sums = (signs @ gaps).abs()
    slack = 1e-12 * float(gaps.abs().sum())
    return float((1 + (sums >= gaps.sum().abs() - slack).sum()) / (num_flips + 1))


def rank_calibration(exact: Tensor, draws: Tensor, *, generator: torch.Generator | None = None) -> float:
    """p-value of the hypothesis that n independent draws have the law of an exact draw (simulation-based calibration).

    The rank of the exact draw among its n, ties broken at random, is then uniform on 0..n; M ranks are compared with
    that by chi-square, neighbouring ranks pooled so that 5 or more are expected in each.

    Detects a wrong location, width or shape of h. Sees only the first n moments of the draws' distribution function at
    the exact draw, and nothing of what h does not depend on: use n of 9 or more, and several h.

    Parameters
    ----------
    exact : Tensor (M,)
        h of M independent exact draws of π*.
    draws : Tensor (M, n)
        h of the sampler's draws, independent of each other and of the exact ones.
    generator : torch.Generator, optional
        Breaks ties; by default one of seed 0, so that equal data give equal p-values.

    Raises
    ------
    ShapeError
        Where the shapes are not (M,) and (M, n).
    ModelError
        Where n < 9, or M < 10: too little to test anything.

    References
    ----------
    talts2018
    """
    from scipy.stats import chi2

    if exact.dim() != 1 or draws.dim() != 2 or len(exact) != len(draws):
        got = f"{tuple(exact.shape)} and {tuple(draws.shape)}"
        raise ShapeError(f"rank_calibration: got shapes {got}, expected (M,) and (M, n)")
    count, n = draws.shape
    if n < MIN_DRAWS or count < 10:
        raise ModelError(f"rank_calibration: got M = {count} and n = {n}, expected M ≥ 10 and n ≥ {MIN_DRAWS}")
    reference = exact.double().cpu()[:, None]
    values = draws.double().cpu()
    ties = (values == reference).sum(1)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    lottery = torch.rand(count, dtype=torch.float64, generator=generator)
    ranks = (values < reference).sum(1) + torch.minimum((lottery * (ties + 1)).floor().long(), ties)
    bins = max(2, min(n + 1, count // 5))
    cell = ranks * bins // (n + 1)
    share = torch.bincount(torch.arange(n + 1) * bins // (n + 1), minlength=bins).double() / (n + 1)
    observed = torch.bincount(cell, minlength=bins).double()
    statistic = ((observed - count * share).square() / (count * share)).sum()
    return float(chi2.sf(float(statistic), bins - 1))


def holm(p_values: dict[str, float], level: float = 0.05) -> list[str]:
    """Names of the hypotheses that Holm's procedure rejects; one true one is among them with probability ≤ `level`."""
    rejected = []
    for number, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        if p > level / (len(p_values) - number):
            break
        rejected.append(name)
    return rejected
