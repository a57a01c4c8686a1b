"""What can go wrong in a sweep, found as it happens: forms that break their law, twists of zero, infinite weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lmppl.errors import FactorError, InfeasibleModel, ModelError
from lmppl.inference.step_proposals import Proposed
from lmppl.inference.twists.exclusions import try_start
from lmppl.inference.twists.lawfulness import LAW_TOLERANCE, agree, broken_form
from lmppl.inference.twists.product import FactorTwist
from lmppl.inference.twists.track import TwistTrack
from lmppl.lm.frontier import Frontier
from lmppl.modeling.target import Target
from lmppl.sequences import Draws

__all__ = ["SweepChecks"]


class SweepChecks:
    """The checks of one sweep, and its count of what gave particles weight zero.

    Parameters
    ----------
    target : Target
    frontier : Frontier
    twist : TwistTrack or None
    count : int
        N, rows of a group.
    rows_as_draws : callable
        The rows of given numbers as they are now, with their log π0.

    Attributes
    ----------
    lawful : FactorTwist or None
        The twist, where it is made of the factors' own forms: then it must end at their log φ.
    deaths : Tensor (G, K+1), int64
        How often each factor, and last a zero of π0 or of the proposal's weight, gave a particle weight zero.
    """

    def __init__(
        self,
        target: Target,
        frontier: Frontier,
        twist: TwistTrack | None,
        count: int,
        rows_as_draws: Callable[[Tensor], Draws],
    ) -> None:
        self.target, self.frontier, self.twist, self.count = target, frontier, twist, count
        self.groups = len(frontier) // count
        self.rows_as_draws = rows_as_draws
        self.names = [f.name for f in target.factors]
        form = None if twist is None else twist.twist
        self.lawful = form if isinstance(form, FactorTwist) and set(self.names).issuperset(form.names) else None
        self.deaths = torch.zeros(self.groups, len(self.names) + 1, dtype=torch.int64)

    def start(self) -> Tensor | None:
        """ψ(∅) of each row, in nats: the first weight, so that Ẑ estimates Z whatever ψ(∅) is; None for ψ = 1."""
        if self.twist is None:
            return None
        potential = self.twist.start_potential.to("cpu", torch.float64)
        if not bool((potential < math.inf).all()):
            raise FactorError("twist: the potential of the empty completion is nan or +inf, expected a finite number")
        if bool((potential == -math.inf).any()):
            c = int(self.frontier.context[int((potential == -math.inf).int().argmax())])
            who = "the twist is 0"
            if self.lawful is not None:
                try_start(self.target, self.lawful.factors, c)
                who = f"one of the factors {', '.join(map(repr, self.lawful.names))} is 0"
            raise InfeasibleModel(
                f"smc: {who} before the first token of context {self.target.contexts[c]!r}, so that Z = 0 there"
            )
        return potential

    def potentials(self, rows: Tensor, log_psi: Tensor) -> None:
        """The forms' potentials are the sums of their increments so far, `log_psi` of the live `rows`."""
        if self.lawful is None or self.twist is None:
            return
        got = self.twist.potential().to("cpu", torch.float64)
        off = ~agree(got, log_psi)
        if bool(off.any()):
            self._refuse_form(rows[off][:1])

    def ends(self, rows: Tensor, draws: Draws, log_psi: Tensor, log_phi: Tensor) -> None:
        """At the end of a row the forms' potentials are log φ of their factors; a twist is 0 only where γ is."""
        if self.lawful is None:
            lost = (log_psi == -math.inf) & (log_phi > -math.inf)
            if bool(lost.any()):
                row = int(torch.nonzero(lost)[0, 0])
                raise ModelError(
                    f"twist: ψ = 0 for the text {draws.text[row]!r}, which has γ > 0: a twist must be positive "
                    "wherever γ can still become positive, or E Ẑ < Z and no weight shows it"
                )
            return
        expected = torch.zeros_like(log_psi)
        for name in self.lawful.names:
            expected = expected + draws.log_factors[name].cpu()
        off = ~agree(log_psi, expected)
        if bool(off.any()):
            self._refuse_form(rows[off][:1])

    def increments(self, proposed: Proposed, rows: Tensor) -> None:
        """No weight is infinite."""
        wrong = ~(proposed.log_increment < math.inf)
        if not bool(wrong.any()):
            return
        bad = int(torch.nonzero(wrong)[0, 0])
        text = self.rows_as_draws(rows[bad : bad + 1]).text[0]
        raise ModelError(
            f"proposal: the weight of token {int(proposed.tokens[bad])} after the text {text!r} is "
            f"{float(proposed.log_increment[bad])} in log, with log π0 = {float(proposed.log_prior[bad]):.4g} and "
            f"twist {float(proposed.weigh[bad]):.4g}: a proposal with q = 0 where π* > 0 does not cover it, and the "
            "weight γ/q is infinite; mix it with the prior, or propose from the prior"
        )

    def refuse_death(self, rows: Tensor) -> None:
        """Raise for the first of `rows`, which are retained and have died."""
        text = self.rows_as_draws(rows[:1]).text[0]
        raise ModelError(
            f"conditional SMC: the twist, or the proposal's weight, is 0 for a row with γ > 0 after the text {text!r}: "
            "a twist must be positive wherever γ can still become positive"
        )

    def count_deaths(self, rows: Tensor, died: Tensor, tokens: Tensor) -> None:
        """Count what gave the `died` (L,) among the live `rows` weight zero before their end."""
        at = torch.nonzero(died).squeeze(1)
        group = rows[at] // self.count
        known = torch.zeros(len(at), dtype=torch.bool)
        if self.lawful is not None and self.twist is not None:
            on_device = at.to(tokens.device)
            terms = self.twist.terms(on_device, tokens[on_device])
            for name, term in zip(self.lawful.names, terms, strict=True):
                zero = term.cpu() == -math.inf
                self.deaths[:, self.names.index(name)] += torch.bincount(group[zero], minlength=self.groups)
                known |= zero
        self.deaths[:, -1] += torch.bincount(group[~known], minlength=self.groups)

    def count_ends(self, rows: Tensor, evaluated: Draws, died: Tensor) -> None:
        """Count which factors gave `rows` that have ended weight zero, but for those that had it before."""
        group = rows // self.count
        for k, name in enumerate(self.names):
            zero = (evaluated.log_factors[name].cpu() == -math.inf) & ~died
            self.deaths[:, k] += torch.bincount(group[zero], minlength=self.groups)

    def _refuse_form(self, row: Tensor) -> None:
        """Find the factor whose form breaks its law on one row, and raise `FactorError`."""
        assert self.lawful is not None
        raise broken_form(self.target, self.lawful.factors, self.rows_as_draws(row), LAW_TOLERANCE)
