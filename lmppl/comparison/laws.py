"""Which law a row speaks about: π* itself, a proposal, a language model as it is, or something else."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from lmppl.comparison.reference import Reference
from lmppl.errors import SupportTooLarge
from lmppl.inference.approximation import Approximation, ExactTable, widening
from lmppl.inference.best_of_n import BestOfN, best_of_n_law, soft_best_of_n_law
from lmppl.inference.coverage import coverage_note, positive_everywhere
from lmppl.inference.engine import Guarantee
from lmppl.inference.quasi_rejection import QuasiRejection
from lmppl.inference.steered_decoding import SteeredSampler
from lmppl.lm.base import LanguageModel
from lmppl.modeling.target import log_evidence
from lmppl.sequences import Draws

__all__ = ["Law", "law_of"]

NO_WEIGHTS = "its draws are of another law than π*, without weights"
NO_LOG_Z = "chains give no estimate of log Z"
ALL_ZERO = "every draw has γ = 0"
FOUND = "the outcome of a search, which has no law"
UNKNOWN_DENSITY = "log q of its draws is not known"

Kind = Literal["posterior", "proposal", "weighted", "policy", "accepted", "found", "other"]


@dataclass(frozen=True, eq=False)
class Law:
    """The law q of one unweighted draw of a row, and the draws that show it.

    Parameters
    ----------
    kind : str
        "posterior": q = π* by construction. "proposal": draws of q, which the engine's weights w = γ/q correct.
        "weighted": particles of sweeps, or chains, whose (weighted) means stand for π*, while one draw has no known
        density. "policy": draws of q, taken as they are; the weights only measure. "accepted": proposals that
        quasi-rejection accepted, of the law ∝ min(γ, M_q q), which its engine measures. "found": what a search without
        randomness found, which has no law. "other": the density of q is not known.
    q : str
        Its name, for people.
    approximation : Approximation
    density : LanguageModel, optional
        Scores log q.
    scored : dict
        log q of references' rows, by reference and context, once computed.
    """

    kind: Kind
    q: str
    approximation: Approximation
    density: LanguageModel | None = None
    scored: dict[tuple[int, int], Tensor | None] = field(default_factory=dict, repr=False)

    @property
    def draws(self) -> Draws:
        """All draws, every context."""
        return self.approximation.draws

    @property
    def tabulated(self) -> bool:
        """The draws are the table of π* itself."""
        return isinstance(self.approximation, ExactTable) and self.approximation.enumerated

    @property
    def has_weights(self) -> bool:
        """Whether `log_weight` is log γ − log q of independent draws of q."""
        return self.kind in ("proposal", "policy")

    @property
    def may_violate(self) -> bool:
        """Whether q could give outcomes with γ = 0 some probability without any draw showing it.

        By a factor that can be −inf, or where another LM than the prior draws what π0 may exclude.
        """
        model = self.approximation.model
        if self.kind in ("posterior", "weighted", "accepted", "found"):
            return False
        if model is None or any(f.hard is not False for f in model.factors):
            return True
        return self.has_weights and self.density is not model.prior and not positive_everywhere(model.prior)

    @cached_property
    def weights(self) -> Tensor:
        """(N,) what the row's means use: the engine's weights; equal ones for a policy, which is taken as it is."""
        if self.kind != "policy":
            return self.draws.weights
        counts = torch.bincount(self.draws.context, minlength=self.draws.num_contexts)
        return 1.0 / counts[self.draws.context].double()

    @cached_property
    def all_log_ratios(self) -> Tensor:
        """(N,) log γ − log q of independent draws of q, before any smoothing of the weights."""
        known = log_ratios(self.draws)
        if known is not None:
            return known
        log_prior, log_q = self.draws.log_prior, self.draws.log_q
        assert log_prior is not None
        assert log_q is not None
        alive = log_prior > -math.inf
        return torch.where(alive, log_prior.double() + log_evidence(self.draws) - log_q.double(), -math.inf)

    def log_ratios(self, context: int) -> Tensor:
        """(n,) those of one context."""
        return self.all_log_ratios[self.draws.context == context].double().cpu()

    @property
    def coverage(self) -> str:
        """Why q may not cover π*, so that weights γ/q see too little; "" where nothing speaks against it."""
        known, model = self.approximation.info.get("coverage"), self.approximation.model
        if known:
            return str(known)
        if model is None or self.density is None or self.density is model.prior:
            return ""
        return coverage_note(self.density, model.prior).replace("the proposal", "q")

    @property
    def partial(self) -> str:
        """Why its weighted means may be those of the part of π* that q covers; "" for a law that is taken as it is."""
        return f"of what q covers; {self.coverage}" if self.kind in ("proposal", "weighted") and self.coverage else ""

    def error_of_mean(self, influence: Tensor, context: int) -> float:
        """The standard error of a mean under the weights, from w̄ (f − f̂) of the draws of one context."""
        return float(self.approximation.error_of_mean(influence, self.draws.context == context))

    def widening(self, context: int) -> float:
        """By how much the error of so few sweeps or chains is to be taken wider, after Student's t."""
        return widening(self.approximation.clusters(self.draws.context == context))

    def log_q(self, reference: Reference, context: int) -> Tensor | None:
        """(S,) log q of the reference's rows of one context, in nats; None where it cannot be computed."""
        key = id(reference), context
        if key not in self.scored:
            self.scored[key] = self._log_q(reference, context)
        return self.scored[key]

    def _log_q(self, reference: Reference, context: int) -> Tensor | None:
        rows = reference.draws.context == context
        model = self.approximation.model
        if self.density is not None and model is not None and self.density is model.prior:
            known = reference.draws.log_prior
            return None if known is None else known[rows]
        if self.density is not None:
            return self.density.score(reference.draws.select(rows).sequences)
        engine = self.approximation.engine
        if self.kind == "accepted" and reference.enumerated:
            return self._log_accepted(reference, context)
        if isinstance(engine, BestOfN) and reference.enumerated:
            table = reference.draws.select(rows)
            score = (
                log_evidence(table) if engine.score is None else {**table.features, **table.log_factors}[engine.score]
            )
            assert table.log_prior is not None
            if engine.soft is None:
                return best_of_n_law(table.log_prior, score, engine.n)
            try:
                return soft_best_of_n_law(table.log_prior, score, engine.n, engine.soft)
            except SupportTooLarge:
                return None
        return None

    def _log_accepted(self, reference: Reference, context: int) -> Tensor | None:
        """(S,) log of the law ∝ min(γ, M_q q) on the table of one context, given the bound that the run chose."""
        rows, model = reference.draws.context == context, self.approximation.model
        proposal = getattr(self.approximation.engine, "proposal", None)
        if isinstance(proposal, Approximation):
            proposal = proposal.as_language_model()
        if proposal is None or (model is not None and proposal is model.prior):
            log_q = reference.draws.log_prior
            log_q = None if log_q is None else log_q[rows]
        else:
            log_q = proposal.score(reference.draws.select(rows).sequences)
        if log_q is None:
            return None
        log_bound = float(self.approximation.info["log_bound"][context])
        accepted = torch.minimum(reference.log_gamma[rows], log_bound + log_q.double())
        return accepted - torch.logsumexp(accepted, 0)

    @property
    def kl_to_prior_bound(self) -> float | None:
        """An upper bound of KL(q‖π0) that the engine knows, in nats: log n − (n−1)/n of best-of-n [beirami2024]."""
        bound = self.approximation.info.get("kl_bound")
        return None if bound is None else float(bound)


def law_of(approximation: Approximation, policy: LanguageModel | None = None) -> Law:
    """The law that the row of `approximation` speaks about.

    Parameters
    ----------
    approximation : Approximation
    policy : LanguageModel, optional
        The row is this language model, taken as it is, and `approximation` its draws with weights γ/q.
    """
    if policy is not None:
        return Law("policy", "itself", approximation, policy)
    if isinstance(approximation, SteeredSampler):
        return Law("policy", "its own", approximation, approximation.as_language_model())
    if "searched" in approximation.info:
        return Law("found", "—", approximation)
    if isinstance(approximation.engine, QuasiRejection):
        return Law("accepted", "its own", approximation)
    if approximation.guarantee is Guarantee.EXACT:
        return Law("posterior", "π*", approximation)
    if approximation.guarantee is not Guarantee.HEURISTIC and weights_are_ratios(approximation.draws):
        proposal = getattr(approximation.engine, "proposal", None)
        if isinstance(proposal, ExactTable):
            proposal = proposal.as_language_model()
        if isinstance(proposal, LanguageModel) and not getattr(approximation.engine, "defensive", 0.0):
            return Law("proposal", type(proposal).__name__, approximation, proposal)
        if approximation.model is not None and _drawn_from_prior(approximation.draws):
            return Law("proposal", "π0", approximation, approximation.model.prior)
        return Law("proposal", "a proposal", approximation)
    if approximation.guarantee is Guarantee.CONSISTENT:
        return Law("weighted", "→ π*", approximation)
    return Law("other", "its own", approximation)


def _drawn_from_prior(draws: Draws) -> bool:
    if draws.log_q is None or draws.log_prior is None:
        return False
    return torch.equal(draws.log_q, draws.log_prior)


def log_ratios(draws: Draws) -> Tensor | None:
    """(N,) log γ − log q as the engine computed it, before any smoothing of the weights; None where it has none."""
    return draws.columns.get("raw_log_weight", draws.log_weight)


def weights_are_ratios(draws: Draws) -> bool:
    """Whether log w = log π0 + Σ log φ − log q row by row, so that the draws are plain draws of a proposal."""
    log_w = log_ratios(draws)
    if log_w is None or draws.log_prior is None or draws.log_q is None:
        return False
    expected = draws.log_prior.double() + log_evidence(draws) - draws.log_q.double()
    alive = expected > -torch.inf
    if not bool((log_w[~alive] == -torch.inf).all()):
        return False
    return bool(torch.allclose(log_w[alive].double(), expected[alive], atol=1e-3, rtol=1e-5))
