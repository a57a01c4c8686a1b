"""Resampling: N ancestors from N weights, such that particle i has N·W̄_i offspring on average.

Each scheme has two laws. `resample` draws the ancestors A; `resample_conditionally` draws (A, k) given that particle b
survives in slot k, from

    r(A | W̄) 1[A^k = b] / (N W̄_b),

the law that conditional SMC needs (`andrieu2010`, `chopin2015`). It is a law for every unbiased scheme, because b has
N W̄_b offspring on average. The slot k moves: for schemes whose slots are ordered (all but multinomial) "keep the
retained particle where it is and resample the rest" is another law, and breaks the invariance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lmppl.lm.randomness import Source

__all__ = ["RESAMPLING", "Scheme", "effective_sizes", "resample", "resample_conditionally", "resample_to"]

ROUNDING = 1e-12  # of N·W̄: a part this small is none, and one this near to an integer is that integer
ROOM = 1e-9  # of N·W̄ of a retained particle, where its own is lost in rounding


class Scheme(NamedTuple):
    """Two laws of one scheme, for G independent groups of N particles.

    Parameters
    ----------
    draw : callable
        (weights (G, N), source) → ancestors (G, N); weights sum to 1 in each row.
    draw_given : callable
        (weights (G, N), b (G,), source) → ancestors (G, N) and slots k (G,), with ancestors[g, k[g]] = b[g].
    """

    draw: Callable[[Tensor, Source], Tensor]
    draw_given: Callable[[Tensor, Tensor, Source], tuple[Tensor, Tensor]]


def resample(scheme: str, log_weights: Tensor, source: Source) -> Tensor:
    """(G, N) int64 ancestors by the scheme of that name, on the device of `log_weights` (G, N).

    Every row of `log_weights` needs a finite entry; particles of weight zero are never chosen.
    """
    ancestors = RESAMPLING[scheme].draw(_normalised(log_weights), source)
    return ancestors.to(log_weights.device)


def resample_to(log_weights: Tensor, count: int, source: Source) -> Tensor:
    """(G, count) int64 ancestors from `log_weights` (G, N) by systematic resampling: count·W̄_i offspring on average."""
    return _systematic(_normalised(log_weights), source, count).to(log_weights.device)


def resample_conditionally(scheme: str, log_weights: Tensor, retained: Tensor, source: Source) -> tuple[Tensor, Tensor]:
    """Ancestors (G, N), and the slot (G,) in which the particle `retained` (G,) survives, given that it does."""
    ancestors, slots = RESAMPLING[scheme].draw_given(_normalised(log_weights), retained.cpu(), source)
    return ancestors.to(log_weights.device), slots.to(log_weights.device)


def effective_sizes(log_weights: Tensor) -> Tensor:
    """(G,) ESS = (Σ w)²/Σ w² of each row of `log_weights` (G, N); 0 where all weights are zero."""
    top = log_weights.amax(-1, keepdim=True)
    weights = (log_weights - top.clamp_min(torch.finfo(log_weights.dtype).min)).exp()
    squares = weights.square().sum(-1)
    return torch.where(squares == 0, 0.0, weights.sum(-1).square() / squares)


def _with_room(weights: Tensor, retained: Tensor) -> Tensor:
    """`weights` (G, N), where the `retained` particle (G,) has at least `ROOM`/N, so that rounding leaves it its place.

    Given that it survives, a particle that the others outweigh by more than rounding sees still does: its conditional
    law is the limit of those at small weights, and that at `ROOM`/N is as near to it as `ROOM`. Other weights, of which
    nobody sees a difference, stay as they are to the bit.
    """
    count = weights.shape[1]
    lost = weights.gather(1, retained[:, None])[:, 0] * count < 2 * ROUNDING
    if not bool(lost.any()):
        return weights
    raised = weights.scatter(1, retained[:, None], ROOM / count)
    raised = raised / raised.sum(1, keepdim=True)
    return torch.where(lost[:, None], raised, weights)


def _normalised(log_weights: Tensor) -> Tensor:
    return torch.softmax(log_weights.double(), -1).cpu()


def _edges(weights: Tensor) -> Tensor:
    """(G, N) the distribution function, whose last positive entry is exactly 1."""
    edges = weights.cumsum(-1)
    return edges / edges[:, -1:]


def _invert(edges: Tensor, points: Tensor) -> Tensor:
    """(G, M) the particle whose piece of [0, 1) holds each point (G, M)."""
    index = torch.searchsorted(edges, points, right=True)
    last = (edges < 1.0).sum(-1, keepdim=True)  # rounding can lift a point to 1
    return torch.minimum(index, last)


def _points_within(edges: Tensor, particle: Tensor, source: Source, cuts: Callable[[int], Tensor]) -> Tensor:
    """(G,) a point uniform on the piece of [0, 1) of `particle` (G,); results change at the points `cuts(g)` alone."""
    high = edges.gather(1, particle[:, None])[:, 0]
    low = torch.where(particle > 0, edges.gather(1, (particle - 1).clamp_min(0)[:, None])[:, 0], 0.0)

    def breaks() -> list[Tensor]:
        return [(cuts(g) - low[g]) / (high[g] - low[g]) for g in range(len(particle))]

    uniforms = source.uniforms(len(particle), breaks)
    point = low + uniforms * (high - low)
    return torch.minimum(point, torch.nextafter(high, low))


# Multinomial: N independent draws.


def _independent(edges: Tensor, count: int, source: Source) -> Tensor:
    """(G, count) independent draws from the distribution functions `edges` (G, N)."""
    groups = len(edges)
    uniforms = source.uniforms(groups * count, lambda: [row for row in edges for _ in range(count)])
    return _invert(edges, uniforms.view(groups, count))


def _multinomial(weights: Tensor, source: Source) -> Tensor:
    return _independent(_edges(weights), weights.shape[1], source)


def _multinomial_given(weights: Tensor, retained: Tensor, source: Source) -> tuple[Tensor, Tensor]:
    groups, count = weights.shape
    slots = source.integers(torch.full((groups,), count))
    others = _independent(_edges(weights), count - 1, source)
    return _insert(others, slots, retained), slots


def _insert(others: Tensor, slots: Tensor, retained: Tensor) -> Tensor:
    """(G, N) with `retained` in the slot, and the N − 1 others around it in their order."""
    groups, count = others.shape[0], others.shape[1] + 1
    free = torch.arange(count) != slots[:, None]
    ancestors = torch.empty(groups, count, dtype=torch.int64)
    ancestors[free] = others.reshape(-1)
    ancestors[~free] = retained
    return ancestors


# Stratified and systematic: one point in each of the N strata [i/N, (i+1)/N).


def _stratified(weights: Tensor, source: Source) -> Tensor:
    groups, count = weights.shape
    edges, strata = _edges(weights), torch.arange(count, dtype=torch.float64)
    uniforms = source.uniforms(groups * count, lambda: [row * count - i for row in edges for i in range(count)])
    return _invert(edges, (strata + uniforms.view(groups, count)) / count)


def _stratified_given(weights: Tensor, retained: Tensor, source: Source) -> tuple[Tensor, Tensor]:
    groups, count = weights.shape
    edges, strata = _edges(weights), torch.arange(count, dtype=torch.float64)
    point = _points_within(edges, retained, source, lambda g: strata / count)
    slots = (point * count).floor().long().clamp_max(count - 1)
    free = torch.arange(count) != slots[:, None]
    where = torch.nonzero(free)
    uniforms = source.uniforms(len(where), lambda: [edges[g] * count - i for g, i in where.tolist()])
    points = torch.zeros(groups, count, dtype=torch.float64)
    points[free] = uniforms
    ancestors = _invert(edges, (strata + points) / count)
    ancestors[~free] = retained
    return ancestors, slots


def _systematic(weights: Tensor, source: Source, count: int | None = None) -> Tensor:
    groups, count = weights.shape[0], weights.shape[1] if count is None else count
    edges, strata = _edges(weights), torch.arange(count, dtype=torch.float64)
    uniforms = source.uniforms(groups, lambda: [(row * count).frac() for row in edges])
    return _invert(edges, (strata + uniforms[:, None]) / count)


def _systematic_given(weights: Tensor, retained: Tensor, source: Source) -> tuple[Tensor, Tensor]:
    groups, count = weights.shape
    edges, strata = _edges(weights), torch.arange(count, dtype=torch.float64)

    def cuts(g: int) -> Tensor:
        return torch.cat([strata / count, ((strata[:, None] + (edges[g] * count).frac()) / count).reshape(-1)])

    scaled = _points_within(edges, retained, source, cuts) * count
    slots = scaled.floor().long().clamp_max(count - 1)
    ancestors = _invert(edges, (strata + (scaled - slots)[:, None]) / count)
    ancestors[torch.arange(groups), slots] = retained
    return ancestors, slots


# Residual: ⌊N W̄_i⌋ copies of each, the rest by independent draws.


class _Residue(NamedTuple):
    copies: Tensor  # (G, N) ⌊N W̄⌋
    rest: Tensor  # (G, N) N W̄ − ⌊N W̄⌋


def _residue(weights: Tensor) -> _Residue:
    scaled = weights * weights.shape[1]
    copies = (scaled + ROUNDING).floor()  # a product of one rounding error below an integer is that integer
    rest = scaled - copies
    return _Residue(copies.long(), torch.where(rest > ROUNDING, rest, 0.0))


def _residual_of(residue: _Residue, source: Source, keep: int | None = None) -> tuple[Tensor, int]:
    """(N,) ancestors of one group, and the slot of `keep`, to which one of the random slots goes."""
    copies, rest = residue.copies[0], residue.rest[0]
    fixed = torch.repeat_interleave(torch.arange(len(copies)), copies)
    missing = len(copies) - len(fixed)
    if missing == 0:
        return fixed, -1
    edges = _edges(rest[None])
    if keep is None:
        return torch.cat([fixed, _independent(edges, missing, source)[0]]), -1
    slot = source.integers(torch.tensor([missing]))
    drawn = _insert(_independent(edges, missing - 1, source), slot, torch.tensor([keep]))[0]
    return torch.cat([fixed, drawn]), len(fixed) + int(slot)


def _residual(weights: Tensor, source: Source) -> Tensor:
    return torch.stack([_residual_of(_residue(row[None]), source)[0] for row in weights])


def _residual_given(weights: Tensor, retained: Tensor, source: Source) -> tuple[Tensor, Tensor]:
    ancestors, slots = [], []
    for row, b in zip(_with_room(weights, retained), retained.tolist(), strict=True):
        residue = _residue(row[None])
        copies, share = int(residue.copies[0, b]), float(residue.rest[0, b])
        random = copies == 0 or bool(source.accept(torch.tensor([share / (copies + share)], dtype=torch.float64).log()))
        if random:
            drawn, slot = _residual_of(residue, source, keep=b)
        else:
            drawn, _ = _residual_of(residue, source)
            first = int(residue.copies[0, :b].sum())
            slot = first + int(source.integers(torch.tensor([copies])))
        ancestors.append(drawn)
        slots.append(slot)
    return torch.stack(ancestors), torch.tensor(slots)


# SSP, the Srinivasan sampling process: residual weights are rounded to 0 or 1 by pairwise martingale steps.


def _ssp_counts(weights: list[float], source: Source, keep: int | None = None) -> list[int]:
    """Offspring numbers, each ⌊N W̄⌋ or ⌈N W̄⌉; with `keep`, from their law weighted by the offspring of `keep`.

    The expected offspring n + p of a particle is a martingale, so that a step with branches of probability r has, in
    the weighted law, branches ∝ r·(n + p after the branch).
    """
    count = len(weights)
    scaled = [w * count for w in weights]
    whole = [int(s + ROUNDING) for s in scaled]
    part = [max(0.0, s - n) for s, n in zip(scaled, whole, strict=True)]
    part = [0.0 if p < ROUNDING else p for p in part]
    up = [0] * count
    i = 0
    for j in range(1, count):
        p, q = part[i], part[j]
        if q == 0.0:
            continue
        if p == 0.0:
            i = j
            continue
        rise, fall = min(q, 1.0 - p), min(p, 1.0 - q)
        chance = fall / (rise + fall)
        if keep in (i, j):
            base = whole[keep] + up[keep]
            now, raised, lowered = (p, p + rise, p - fall) if keep == i else (q, q - rise, q + fall)
            chance *= (base + raised) / (base + now)
            # A branch that leaves no offspring has probability 0 exactly: rounding must not make it possible.
            chance = 1.0 if base + lowered < ROUNDING else 0.0 if base + raised < ROUNDING else chance
        if bool(source.accept(torch.tensor([min(chance, 1.0)], dtype=torch.float64).log())):
            p, q = (p + rise, 0.0) if rise == q else (1.0, q - rise)
        else:
            p, q = (0.0, q + fall) if fall == p else (p - fall, 1.0)
        part[i], part[j] = p, q
        for k in (i, j):
            if part[k] > 1.0 - ROUNDING:
                part[k], up[k] = 0.0, 1
            elif part[k] < ROUNDING:
                part[k] = 0.0
        if part[i] == 0.0:
            i = j
    counts = [n + u for n, u in zip(whole, up, strict=True)]
    if sum(counts) < count:  # all that is left of the last particle's part is rounding
        counts[i] += count - sum(counts)
    return counts


def _spread(counts: list[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


def _ssp(weights: Tensor, source: Source) -> Tensor:
    return torch.stack([_spread(_ssp_counts(row, source)) for row in weights.tolist()])


def _ssp_given(weights: Tensor, retained: Tensor, source: Source) -> tuple[Tensor, Tensor]:
    ancestors, slots = [], []
    for row, b in zip(_with_room(weights, retained).tolist(), retained.tolist(), strict=True):
        counts = _ssp_counts(row, source, keep=b)
        ancestors.append(_spread(counts))
        slots.append(sum(counts[:b]) + int(source.integers(torch.tensor([counts[b]]))))
    return torch.stack(ancestors), torch.tensor(slots)


RESAMPLING: dict[str, Scheme] = {
    "multinomial": Scheme(_multinomial, _multinomial_given),
    "stratified": Scheme(_stratified, _stratified_given),
    "systematic": Scheme(_systematic, _systematic_given),
    "residual": Scheme(_residual, _residual_given),
    "ssp": Scheme(_ssp, _ssp_given),
}
"""By name: `gordon1993` (multinomial), `kitagawa1996` (stratified), `carpenter1999` (systematic), `liu1998` (residual),
`gerber2019` (SSP)."""
