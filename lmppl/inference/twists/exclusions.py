"""Whether what incremental forms exclude is excluded rightly: the one fault of a form that no row of a run can show.

A token with weigh = −inf is never made by a proposal that follows the form, and a row that takes it elsewhere dies. If
φ > 0 after such a token all the same, E Ẑ < Z, and every row that is left agrees with the form. So a few rows of the
run are given excluded tokens, and their log φ is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lmppl.inference.engine import Shard, shard_generator
from lmppl.inference.proposals import draw_from
from lmppl.inference.twists.lawfulness import LAW_TOLERANCE, broken_form
from lmppl.lm.base import LanguageModel
from lmppl.lm.decoder import Step
from lmppl.lm.decoding import CountingDecoder
from lmppl.lm.randomness import Source
from lmppl.modeling.evidence.constraint import Constraint
from lmppl.modeling.evidence.power import PowerPrior
from lmppl.modeling.factors import Factor
from lmppl.modeling.named_forms import NamedForm
from lmppl.modeling.target import Target, log_evidence
from lmppl.sequences import Draws

__all__ = ["TRIED_ROWS", "steering_factors", "try_exclusions", "try_start"]

TRIED_ROWS = 16  # of a run, each with one excluded token
Projection = Callable[[Tensor], Tensor]

ASKED_TOKENS = 8  # that a form which reads texts is asked about, in place of all V
TRIAL_STREAM = -2  # the id of the seed of these choices, which no shard has


def try_exclusions(target: Target, factors: Sequence[Factor], draws: Draws, seed: int) -> None:
    """Give `TRIED_ROWS` rows an excluded token each, and raise where φ > 0 there.

    Rows with γ > 0 are taken where there are any. In each, at a position drawn uniformly, a token is drawn from π0
    among those that a form excludes there; what follows is the rest of the row, the rest of another row, or the end, in
    turn. The row as it was is looked at too: one that a form has killed may have φ > 0 itself.

    Costs two forwards of at most `TRIED_ROWS` rows and an evaluation of the factors' functions on as many texts,
    counted in the target's cost. Choices come from `seed` alone. A wrong exclusion is found with a probability that
    grows with its share of the prior mass that is excluded; `lmppl.testing.check_factor` looks at more rows.

    Parameters
    ----------
    target : Target
    factors : sequence of Factor
        Those of the target whose forms steer. Left out are forms that follow from the factor itself: an automaton's
        without a function beside it, a power of the prior; and factors that are only estimated.
    draws : Draws
        Outcomes of the run, evaluated, with log π0.
    seed : int

    Raises
    ------
    FactorError
        Naming the factor and the text.
    """
    tried = [f for f in factors if f.incremental is not None and not f.stochastic and not _by_construction(f)]
    if not tried or len(draws) == 0:
        return
    generator = shard_generator(Shard(TRIAL_STREAM, 0, seed, (), 0))
    rows = _chosen(draws, generator)
    if len(rows) == 0:
        return
    walk = _Walk(target, tried, rows, generator)
    for factor, dead in zip(tried, walk.dead, strict=True):
        _refuse(target, factor, rows, dead & (rows.log_factors[factor.name].cpu() > -math.inf))
    changed, origin = _changed(target, rows, walk, generator)
    if len(origin) == 0:
        return
    for factor in tried:
        forbidden = torch.tensor([factor.name in walk.by[row] for row in origin.tolist()])
        if not bool(forbidden.any()):
            continue
        there = changed.select(forbidden)
        wrong = there.select(target.log_factor(factor.name, there).cpu() > -math.inf)
        if len(wrong):  # what π0 cannot write may be excluded by anybody
            wrong = wrong.with_columns(log_prior=target.log_prior(wrong))
            assert wrong.log_prior is not None
            _refuse(target, factor, wrong, wrong.log_prior > -math.inf)


def try_start(target: Target, factors: Sequence[Factor], context: int) -> None:
    """Raise `FactorError` where forms exclude every completion of a context, and a few draws of π0 have φ > 0 there."""
    tried = [f for f in factors if f.incremental is not None and not f.stochastic and not _by_construction(f)]
    generator = shard_generator(Shard(TRIAL_STREAM, 0, 0, (), 0))
    rows = draw_from(target.prior, torch.full((TRIED_ROWS,), context), Source(generator), cost=target.cost)
    where = rows.context[:1].to(target.prior.device)
    step, _ = CountingDecoder(target.prior, target.cost).prefill(where)
    for factor in tried:
        form = NamedForm.of(factor, target.prior.vocab_size)
        if float(form.potential(form.start(where, step))[0]) == -math.inf:
            _refuse(target, factor, rows, target.log_factor(factor.name, rows).cpu() > -math.inf)


def steering_factors(target: Target, lm: LanguageModel) -> list[Factor]:
    """The target's factors whose forms steer a guided law; none for another LM."""
    names = getattr(lm, "steered_by", ())
    return [f for f in target.factors if f.name in names]


def _by_construction(factor: Factor) -> bool:
    """Whether the form cannot say otherwise than log φ, since both are made from the same."""
    return isinstance(factor, PowerPrior) or (isinstance(factor, Constraint) and factor.is_automaton)


def _refuse(target: Target, factor: Factor, rows: Draws, wrong: Tensor) -> None:
    if bool(wrong.any()):
        raise broken_form(target, [factor], rows.select(wrong).select([0]), LAW_TOLERANCE)


def _chosen(draws: Draws, generator: torch.Generator) -> Draws:
    """`TRIED_ROWS` rows, longest first, of those with γ > 0 if there are any; repeated where there are fewer."""
    assert draws.log_prior is not None
    inside = torch.nonzero(draws.log_prior.cpu() > -math.inf).squeeze(1)
    good = inside[log_evidence(draws).cpu()[inside] > -math.inf]
    pool = good if len(good) else inside
    order = pool[torch.randperm(len(pool), generator=generator)]
    if len(order) == 0:
        return draws.select(order)
    chosen = order[torch.arange(TRIED_ROWS) % len(order)]
    return draws.select(chosen[torch.argsort(draws.lengths[chosen], descending=True, stable=True)])


class _Walk:
    """The forms on whole rows: which have died on them, and what they exclude at one position of each.

    Attributes
    ----------
    dead : list of Tensor (B,) bool
        For each factor, whether potential(start) + Σ weigh is −inf at the end of the row.
    at : list of int
        A position of each row, drawn uniformly.
    excluded : dict of int to int
        Row → a token that a form excludes there; rows without one are left out.
    by : dict of int to set of str
        Row → the factors that exclude that token.
    """

    def __init__(self, target: Target, factors: Sequence[Factor], rows: Draws, generator: torch.Generator) -> None:
        lm = target.prior
        self.generator, self.device = generator, lm.device
        self.names = [f.name for f in factors]
        self.forms = [NamedForm.of(f, lm.vocab_size) for f in factors]
        share = torch.rand(len(rows), generator=generator, dtype=torch.float64)
        self.at = (share * rows.lengths).long().tolist()
        self.excluded: dict[int, int] = {}
        self.by: dict[int, set[str]] = {}
        with torch.no_grad():
            hidden, project = _read(target, rows)
            self.dead = self._walk(rows, hidden, project)

    def _walk(self, rows: Draws, hidden: Tensor, project: Projection) -> list[Tensor]:
        """Read the rows, longest first, and look at what is excluded on the way; which rows each form kills."""
        ids = rows.ids.to(self.device)
        states: list[Any] = [f.start(rows.context.to(self.device), Step(project, hidden[:, :1])) for f in self.forms]
        dead = [form.potential(state) == -math.inf for form, state in zip(self.forms, states, strict=True)]
        going = [int((rows.lengths > t).sum()) for t in range(int(rows.lengths[0]) + 1)]
        for t, count in enumerate(going[:-1]):
            here = [row for row, at in enumerate(self.at) if at == t]
            if here:
                probs = torch.softmax(project(hidden[here, t]).double(), -1)
                self._look(states, dead, torch.tensor(here), probs.cpu())
            tokens = ids[:count, t]
            for gone, form, state in zip(dead, self.forms, states, strict=True):
                gone[:count] |= form.weigh(state, tokens[:, None])[:, 0] == -math.inf
            after = going[t + 1]
            if after == 0:
                break
            step = Step(project, hidden[:after, t + 1 : t + 2])
            for k, form in enumerate(self.forms):
                state = states[k] if after == count else form.select(states[k], torch.arange(after, device=self.device))
                states[k] = form.advance(state, tokens[:after], step)
        return [gone.cpu() for gone in dead]

    def _look(self, states: Sequence[Any], dead: Sequence[Tensor], rows: Tensor, probs: Tensor) -> None:
        """Draw an excluded token for each of `rows` (M,), of the states' rows; probs (M, V) are π0's."""
        masks = []
        index = rows.to(self.device)
        for gone, form, state in zip(dead, self.forms, states, strict=True):
            some = form.select(state, index)
            if "text" in form.needs:
                count = min(ASKED_TOKENS, int((probs > 0).sum(1).min()))
                asked = torch.multinomial(probs, count, generator=self.generator)
                weights = form.weigh(some, asked.to(self.device)).cpu()
                mask = torch.zeros_like(probs, dtype=torch.bool).scatter(1, asked, weights == -math.inf)
            else:
                mask = form.weigh(some, None).cpu() == -math.inf
            masks.append(mask & (probs > 0) & ~gone[index].cpu()[:, None])
        either = torch.stack(masks).any(0)
        for i, row in enumerate(rows.tolist()):
            if bool(either[i].any()):
                token = int(torch.multinomial(probs[i] * either[i], 1, generator=self.generator))
                self.excluded[row] = token
                self.by[row] = {name for name, mask in zip(self.names, masks, strict=True) if bool(mask[i, token])}


def _read(target: Target, rows: Draws) -> tuple[Tensor, Projection]:
    """(B, L, H) what the prior predicts each token of the rows from, in two forwards, and how it does."""
    lm = target.prior
    distinct, row_of = torch.unique(rows.context.to(lm.device), return_inverse=True)
    decoder = CountingDecoder(lm, target.cost)
    step, cache = decoder.prefill(distinct)
    hidden = step.hidden[:, -1:][row_of]
    before = int(rows.lengths.max()) - 1
    if before > 0:
        read = rows.ids[:, :before].to(lm.device)
        count = int((rows.lengths - 1).sum())
        after, _ = decoder.extend(decoder.select(cache, row_of), read, count=count)
        hidden = torch.cat([hidden, after.hidden], 1)
    return hidden, step.project


def _changed(target: Target, rows: Draws, walk: _Walk, generator: torch.Generator) -> tuple[Draws, Tensor]:
    """The rows with their excluded tokens, those that are outcomes of the prior; and which rows they were."""
    lm = target.prior
    tokens = rows.token_lists()
    made, origin = [], []
    for turn, (row, token) in enumerate(walk.excluded.items()):
        t, own = walk.at[row], tokens[row]
        other = tokens[int(torch.randint(len(tokens), (), generator=generator))]
        rest = (own[t + 1 :], other[t + 1 :], [])[turn % 3]
        new = [*own[:t], token, *(rest or lm.eos_ids[:1])][: lm.max_new_tokens]
        if token in lm.eos_ids:
            new = new[: t + 1]
        made.append(new)
        origin.append(row)
    where = rows.context[origin].tolist()
    s = lm.sequences(made, where)
    changed = Draws(s.ids, s.lengths, s.finished, s.context, s.prompts, s.decoder)
    whole = lm.is_outcome(changed)
    return changed.select(whole), torch.tensor(origin, dtype=torch.int64)[whole]
