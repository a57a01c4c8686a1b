"""One sweep of sequential Monte Carlo: N particles of each of G groups, propagated, weighted and resampled.

A group is a context in an SMC run, a chain in particle Gibbs; groups share forwards and never mix. With a retained row
in each group the sweep is conditional SMC: that row takes its own tokens, and resampling is by the law of the scheme
given that it survives.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmppl.inference.proposals import check_bounds, evaluate_inside
from lmppl.inference.resampling import effective_sizes, resample, resample_conditionally
from lmppl.inference.step_proposals import Proposed, StepProposal, StepRows
from lmppl.inference.sweep_checks import SweepChecks
from lmppl.inference.twists.track import TwistTrack
from lmppl.lm.frontier import Frontier
from lmppl.lm.randomness import Source
from lmppl.modeling.factors import Incremental
from lmppl.modeling.target import Target, log_evidence
from lmppl.sequences import Draws

__all__ = ["BOUNDARIES", "Retained", "Schedule", "Sweep", "SweepResult"]

BOUNDARIES = {"word": re.compile(r"\S(?=\s)"), "sentence": re.compile(r"[.!?]+")}
"""What is counted in a row's text: a row is at its next boundary when there is one more."""


class Schedule(NamedTuple):
    """When and how particles are resampled."""

    num_particles: int
    ess_threshold: float
    resampling: str
    every: int | str | re.Pattern[str]


class Retained(NamedTuple):
    """One row of each of G groups that conditional SMC keeps: ids (G, T), lengths (G,), and the slots they start in."""

    ids: Tensor
    lengths: Tensor
    slots: Tensor


class SweepResult(NamedTuple):
    """What a sweep has found.

    Parameters
    ----------
    draws : Draws
        G·N rows, group by group, with log π0, features, log-factors, `log_weight` = log(Ẑ W̄_i N) and the column
        `parent`, the slot of each row's ancestor at the last resampling.
    log_z : Tensor (G,), float64
        log Ẑ = Σ log of mean increments, in nats.
    slots : Tensor (G,) or None
        Where the retained rows are now.
    info : dict
        `ess` (R, G) before each resampling and at the end, `log_weights` (R, G, N) then; `ancestors` (R, G, N) int32,
        the slot of each particle's ancestor (its own where the group was not resampled), `resampled` (R, G) bool;
        `deaths` (G, K+1), how often each factor, and last a zero of π0 or of the proposal's weight, gave a particle
        weight zero; `dead_at` (G,) the tokens of the row that died last where all of them died, else −1.
    """

    draws: Draws
    log_z: Tensor
    slots: Tensor | None
    info: dict[str, Any]


class Sweep:
    """A sweep that is to be run once.

    Parameters
    ----------
    target : Target
    context : Tensor (G,), int64
        The context of each group.
    schedule : Schedule
    twist : Incremental or None
        ψ; None is ψ = 1.
    proposal : StepProposal
    source : Source
    retained : Retained, optional
        Makes it conditional SMC.
    """

    def __init__(
        self,
        target: Target,
        context: Tensor,
        schedule: Schedule,
        twist: Incremental | None,
        proposal: StepProposal,
        source: Source,
        *,
        retained: Retained | None = None,
    ) -> None:
        self.target, self.schedule, self.source, self.retained = target, schedule, source, retained
        self.groups, self.count = len(context), schedule.num_particles
        rows = self.groups * self.count
        self.frontier = Frontier(target.prior, context.repeat_interleave(self.count), cost=target.cost)
        self.device = self.frontier.ids.device
        self.twist = None if twist is None else TwistTrack(twist, self.frontier)
        self.checks = SweepChecks(target, self.frontier, self.twist, self.count, self._draws)
        self.sampler = proposal.start(target, self.frontier)
        self.slots = None if retained is None else retained.slots.clone()
        # Bookkeeping in float64 on the CPU: a number or three a row.
        self.log_w = torch.zeros(rows, dtype=torch.float64)  # since the last resampling
        self.log_z = torch.zeros(self.groups, dtype=torch.float64)  # up to it
        self.log_psi = torch.zeros(rows, dtype=torch.float64)
        self.log_prior = torch.zeros(rows, dtype=torch.float64)
        self.themselves = torch.arange(self.count).repeat(self.groups, 1)
        self.parent = self.themselves.view(-1).clone()
        self.texts: list[str | None] = [None] * rows
        self.has_texts = False
        self.dead_at = torch.full((self.groups,), -1)
        self.history: dict[str, list[Any]] = {k: [] for k in ("ess", "log_weights", "ancestors", "resampled")}
        potential = self.checks.start()
        if potential is not None:
            self.log_psi += potential
            self.log_w += potential

    def run(self) -> SweepResult:
        """Propagate until every row has ended."""
        frontier = self.frontier
        while len(frontier.live):
            self._round()
            over = len(frontier.live) == 0
            self._resample(final=over)
            if self.target.watcher is not None:
                self._report()
        self._finish_dead_groups()
        return self._result()

    # One token.

    def _step(self) -> None:
        """Give each live row its next token and its weight; rows that end or die are live no more."""
        frontier, twist = self.frontier, self.twist
        live = frontier.live
        given = self._given(live)
        rows = StepRows(frontier, None if twist is None else twist.weigh, given)
        tokens, increment, log_prior, weigh = self.sampler.propose(rows, self.source)
        at = live.cpu()
        increment, log_prior, weigh = (x.to("cpu", torch.float64) for x in (increment, log_prior, weigh))
        self.checks.increments(Proposed(tokens, increment, log_prior, weigh), at)
        self.checks.potentials(at, self.log_psi[at])
        self.sampler.append(tokens)
        # Rows of weight zero are read no more: which factor did it is asked before the twist forgets.
        died = increment == -math.inf
        if bool(died.any()):
            self.checks.count_deaths(at, died, tokens)
            if given is not None and bool(died[given.cpu() >= 0].any()):
                self.checks.refuse_death(at[died & (given.cpu() >= 0)])
        stopped = frontier.append(tokens)
        ended = stopped.cpu()
        self.log_prior[at] += log_prior
        self.log_w[at] += increment
        self.log_psi[at] += weigh
        if bool(ended.any()):
            self._end(at[ended], died[ended])
        keep = ~died
        if bool(died.any()):
            frontier.drop(keep[~ended].to(self.device))
        if twist is not None:
            twist.append(tokens, (keep & ~ended).to(self.device))

    def _end(self, rows: Tensor, died: Tensor) -> None:
        """Replace ψ by φ in the weights of rows that have ended."""
        draws = self._draws(rows)
        inside = self.log_prior[rows] > -math.inf
        log_phi = torch.full((len(rows),), -math.inf, dtype=torch.float64)
        evaluated = self.target.evaluate(draws if bool(inside.all()) else draws.select(inside))
        log_phi[inside] = log_evidence(evaluated).cpu()
        if "text" in evaluated.__dict__:
            self.has_texts = True
            for row, text in zip(rows[inside].tolist(), evaluated.text, strict=True):
                self.texts[row] = text
        log_psi = self.log_psi[rows]
        self.checks.ends(rows[inside], evaluated, log_psi[inside], log_phi[inside])
        self.log_w[rows] += torch.where(log_psi > -math.inf, log_phi - log_psi, -math.inf)
        self.checks.count_ends(rows[inside], evaluated, died[inside])

    def _given(self, live: Tensor) -> Tensor | None:
        """The tokens that retained rows must take, −1 elsewhere."""
        if self.retained is None or self.slots is None:
            return None
        rows = (torch.arange(self.groups) * self.count + self.slots).to(self.device)
        place = torch.searchsorted(live, rows).clamp_max(len(live) - 1)
        there = live[place] == rows
        given = torch.full_like(live, -1)
        lengths = self.frontier.lengths[rows].clamp_max(self.retained.ids.shape[1] - 1)
        tokens = self.retained.ids.to(self.device).gather(1, lengths[:, None])[:, 0]
        given[place[there]] = tokens[there]
        return given

    # Rounds and resampling.

    def _round(self) -> None:
        """Advance each live row to its next boundary."""
        every, frontier = self.schedule.every, self.frontier
        if isinstance(every, int):
            for _ in range(every):
                if len(frontier.live):
                    self._step()
        else:
            self._round_to_boundary(BOUNDARIES[every] if isinstance(every, str) else every)

    def _round_to_boundary(self, boundary: re.Pattern[str]) -> None:
        frontier = self.frontier
        if len(self.history["ess"]):  # rows are of different lengths from the second round on
            frontier.resume(frontier.live)
            self.sampler.resume()
            if self.twist is not None:
                self.twist.rebuild()
        before = torch.zeros(len(frontier), dtype=torch.int64)
        before[frontier.live.cpu()] = self._boundaries(boundary, frontier.live)
        waiting = []
        while len(frontier.live):
            self._step()
            live = frontier.live
            if len(live) == 0:
                break
            there = (self._boundaries(boundary, live) > before[live.cpu()]).to(self.device)
            if bool(there.any()):
                waiting.append(live[there])
                frontier.drop(~there)
                if self.twist is not None:
                    self.twist.drop(~there)
        if waiting:
            frontier.live = torch.cat(waiting).sort().values

    def _boundaries(self, boundary: re.Pattern[str], rows: Tensor) -> Tensor:
        texts = self.frontier.sequences().select(rows.cpu()).text
        return torch.tensor([len(boundary.findall(text)) for text in texts], dtype=torch.int64)

    def _resample(self, *, final: bool) -> None:
        """Resample the groups whose ESS is low; at the end, those with rows that died before their end."""
        frontier, count = self.frontier, self.count
        log_w = self.log_w.view(self.groups, count)
        ess = effective_sizes(log_w)
        if final:
            unended = ~frontier.finished & (frontier.lengths < self.target.prior.max_new_tokens)
            chosen = unended.cpu().view(self.groups, count).any(1)
        else:
            chosen = ess < self.schedule.ess_threshold * count * (1 - 1e-9)
            if bool(chosen.any()):  # a group whose rows have all ended keeps its weights
                going = torch.zeros(len(frontier), dtype=torch.bool)
                going[frontier.live.cpu()] = True
                chosen &= going.view(self.groups, count).any(1)
        dead = ess == 0.0
        if bool(dead.any()):
            longest = frontier.lengths.cpu().view(self.groups, count).amax(1)
            self.dead_at = torch.where(dead & (self.dead_at < 0), longest, self.dead_at)
            chosen = chosen & ~dead
        self.history["ess"].append(ess)
        self.history["log_weights"].append(self.log_z[:, None] + log_w)
        ancestors = self.themselves
        if bool(chosen.any()):
            ancestors = ancestors.clone()
            ancestors[chosen] = self._ancestors(log_w, chosen)
            self._select(ancestors, chosen)
        self.history["ancestors"].append(ancestors)
        self.history["resampled"].append(chosen)

    def _ancestors(self, log_w: Tensor, chosen: Tensor) -> Tensor:
        scheme = self.schedule.resampling
        if self.slots is None:
            return resample(scheme, log_w[chosen], self.source)
        ancestors, self.slots[chosen] = resample_conditionally(scheme, log_w[chosen], self.slots[chosen], self.source)
        return ancestors

    def _select(self, ancestors: Tensor, chosen: Tensor) -> None:
        frontier, count = self.frontier, self.count
        log_w = self.log_w.view(self.groups, count)
        self.log_z[chosen] += torch.logsumexp(log_w[chosen], 1) - math.log(count)
        log_w[chosen] = 0.0
        self.parent.view(self.groups, count)[chosen] = ancestors[chosen]
        index = (ancestors + torch.arange(self.groups)[:, None] * count).view(-1)
        on_device = index.to(self.device)
        before = frontier.live
        frontier.select(on_device)
        self.sampler.select(on_device)
        if self.twist is not None and isinstance(self.schedule.every, int):  # else it is rebuilt for the next round
            self.twist.select(torch.searchsorted(before, on_device[frontier.live]))
        self.log_psi, self.log_prior = self.log_psi[index], self.log_prior[index]
        if self.has_texts:
            self.texts = [self.texts[i] for i in index.tolist()]

    # The end.

    def _finish_dead_groups(self) -> None:
        """Rows of groups in which every weight is zero go on as draws of the prior: draws are outcomes, of weight 0."""
        frontier = self.frontier
        rest = torch.nonzero(~frontier.finished & (frontier.lengths < self.target.prior.max_new_tokens)).squeeze(1)
        if len(rest) == 0:
            return
        frontier.resume(rest)
        while len(frontier.live):
            live = frontier.live.cpu()
            tokens, log_prior = self.source.tokens(frontier.logits())
            self.log_prior[live] += log_prior.to("cpu", torch.float64)
            frontier.append(tokens)

    def _result(self) -> SweepResult:
        draws = self._draws(torch.arange(len(self.frontier)))
        if self.has_texts and None not in self.texts:
            draws.__dict__["text"] = self.texts
        draws = evaluate_inside(self.target, draws)
        check_bounds(draws, self.target.factors)
        log_w = self.log_w.view(self.groups, self.count)
        log_weight = (self.log_z[:, None] + log_w).view(-1)
        log_z = self.log_z + torch.logsumexp(log_w, 1) - math.log(self.count)
        info: dict[str, Any] = {
            "ess": torch.stack(self.history["ess"]),
            "log_weights": torch.stack(self.history["log_weights"]),
            "ancestors": torch.stack(self.history["ancestors"]).to(torch.int32),
            "resampled": torch.stack(self.history["resampled"]),
            "deaths": self.checks.deaths,
            "dead_at": self.dead_at,
        }
        draws = draws.with_columns(log_weight=log_weight, columns={"parent": self.parent})
        return SweepResult(draws, log_z, self.slots, info)

    def _draws(self, rows: Tensor) -> Draws:
        frontier, lm = self.frontier, self.target.prior
        at = rows.to(self.device)
        ids, lengths, finished, context = (
            x[at].cpu() for x in (frontier.ids, frontier.lengths, frontier.finished, frontier.context)
        )
        return Draws(ids, lengths, finished, context, lm.prompts, lm.decode, log_prior=self.log_prior[rows])

    def _report(self) -> None:
        log_w = self.log_w.view(self.groups, self.count)
        ess = effective_sizes(log_w).min()
        log_z = self.log_z + torch.logsumexp(log_w, 1) - math.log(self.count)
        figures = {
            "ESS": f"{float(ess):.1f}",
            "log Ẑ": f"{float(log_z[0]):.3f}",
            "live rows": f"{len(self.frontier.live):,}",
        }
        share = int(self.frontier.lengths.max()) / self.target.prior.max_new_tokens
        self.target.report(1.0 if len(self.frontier.live) == 0 else share, figures)
