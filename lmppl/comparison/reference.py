"""The reference: the best knowledge of π* that a comparison has, against which every row is measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmppl.errors import ModelError
from lmppl.inference.approximation import Approximation, ExactTable
from lmppl.inference.engine import Guarantee
from lmppl.modeling.model import Model
from lmppl.modeling.target import Target, TargetForm, log_evidence
from lmppl.sequences import Draws, concatenate

__all__ = ["Reference"]

TABLE_GUARD = 20_000  # outcomes, up to which a comparison enumerates unasked


@dataclass(frozen=True, eq=False)
class Reference:
    """log Z and weighted draws of π*, or all of π* as a table.

    Parameters
    ----------
    description : str
        What it is, for people.
    log_z : Tensor (C,)
        log Z(c), in nats.
    log_z_error : Tensor (C,)
        Its standard error; zero where exact, nan where unknown.
    draws : Draws
        The outcomes of the table where `enumerated`, else draws of π*.
    weights : Tensor (N,)
        π*(x|c) itself where `enumerated`, else self-normalised weights.
    log_gamma : Tensor (N,)
        log γ(x|c) of the draws, in nats.
    enumerated : bool
        The draws are every outcome of the prior, those with γ = 0 too.
    exact : bool
        The draws are independent draws of π*, or its table; otherwise weighted draws, blind to mass they missed.
    approximation : Approximation
        Where it comes from.
    """

    description: str
    log_z: Tensor
    log_z_error: Tensor
    draws: Draws
    weights: Tensor
    log_gamma: Tensor
    enumerated: bool
    exact: bool
    approximation: Approximation

    @classmethod
    def of(cls, approximation: Approximation, model: Model) -> Reference:
        """What an approximation of the same model knows of π*.

        Raises
        ------
        ModelError
            Where it is no approximation, has no estimate of log Z, is of another declaration or other contexts, or is
            a heuristic: its draws are no draws of π*.
        """
        if not isinstance(approximation, Approximation):
            engine = repr(approximation) if isinstance(approximation, str) else "lmppl.Exact()"
            raise ModelError(
                f"reference: got {approximation!r}, expected an approximation of the model, such as "
                f"reference=lmppl.infer(model, {engine}); without one, compare looks for π* itself"
            )
        if approximation.draws.prompts != model.prior.prompts:
            raise ModelError("reference: its contexts are not those of the model")
        if approximation.model is not None and approximation.model.spec_hash != model.spec_hash:
            raise ModelError(
                f"reference: {approximation!r} is of another declaration, {approximation.model.formula}, expected "
                f"{model.formula}"
            )
        if approximation.guarantee is Guarantee.HEURISTIC or not approximation.log_normalizer:
            raise ModelError(
                f"reference: {approximation!r} is no approximation of π*; use Exact, Rejection or Importance"
            )
        log_z = approximation.log_normalizer[0].value.double().cpu()
        error = _error(approximation)
        exact = approximation.guarantee is Guarantee.EXACT
        name = str(approximation.engine or type(approximation).__name__)
        draws, enumerated = approximation.draws, False
        if isinstance(approximation, ExactTable):
            enumerated = approximation.enumerated
            if not enumerated and TargetForm.of(model).max_outcomes <= TABLE_GUARD:
                draws, enumerated = _every_outcome(model), True
        if draws.log_prior is None:
            raise ModelError(f"reference: {name} has draws without log π0")
        log_gamma = draws.log_prior.double() + log_evidence(draws)
        if enumerated:
            weights = (log_gamma - log_z.to(log_gamma.device)[draws.context]).exp()
            described = f"{name}, the table of all {len(draws):,} outcomes"
        else:
            weights = draws.weights
            what = "exact draws" if exact else "weighted draws, blind to mass they miss"
            described = f"{name}, {len(draws):,} {what}"
        return cls(described, log_z, error, draws, weights, log_gamma, enumerated, exact, approximation)


def _every_outcome(model: Model) -> Draws:
    prior = model.prior
    outcomes = [prior.enumerate_sequences(c, max_sequences=TABLE_GUARD) for c in range(prior.num_contexts)]
    return Target(model).evaluate(concatenate(outcomes, pad_id=prior.pad_id))


def _error(approximation: Approximation) -> Tensor:
    """(C,) standard error of log Ẑ: as given, or from the interval's width under a normal law."""
    estimate = approximation.log_normalizer[0]
    if estimate.standard_error is not None:
        return estimate.standard_error.double().cpu()
    if estimate.interval is None:
        return torch.full_like(estimate.value.double().cpu(), torch.nan)
    interval = estimate.interval.double().cpu()
    return (interval[:, 1] - interval[:, 0]) / (2 * 1.959963984540054)
