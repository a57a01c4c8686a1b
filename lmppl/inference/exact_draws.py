"""Conditional runs from exact draws of π*: log Ẑ of runs that hold one, for upper bounds of log Z."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lmppl.errors import ModelError
from lmppl.lm.decoding import plan_rows
from lmppl.modeling.model import Model
from lmppl.sequences import Draws

__all__ = ["check_count", "log_z_holding"]


def check_count(who: str, name: str, value: object) -> None:
    """Raise `ModelError` where the argument `name` of `who` is no integer of at least 1."""
    if type(value) is not int or value < 1:
        raise ModelError(f"{who}: got {name}={value!r}, expected an integer of at least 1")


def log_z_holding(
    exact_draws: Draws, model: Model, num_particles: int, run: Callable[[Draws], Tensor], *, who: str
) -> list[Tensor]:
    """log Ẑ of a conditional run for each exact draw, in nats, context by context.

    Parameters
    ----------
    exact_draws : Draws
        Equally weighted.
    model : Model
        Whose posterior they are draws of; its prior's memory plan says how many runs go together.
    num_particles : int
        N of a run.
    run : callable
        Maps rows (G,) to log Ẑ (G,) of a run that holds each.
    who : str
        Is named where the draws are refused.

    Raises
    ------
    ModelError
        Where they are no draws, are weighted, or a context has none; where they say of themselves that they are
        another model's, or not exact.
    """
    prior = model.prior
    if not isinstance(exact_draws, Draws):
        raise ModelError(
            f"{who}: got {type(exact_draws).__name__}, expected exact draws, such as `infer(model, Rejection()).draws`"
        )
    log_weight = exact_draws.log_weight
    if log_weight is not None and float(log_weight.max() - log_weight.min()) != 0.0:
        raise ModelError(f"{who}: got weighted draws, expected equally weighted exact ones, as `Rejection` gives them")
    _check_origin(exact_draws, model, who)
    there = torch.bincount(exact_draws.context, minlength=prior.num_contexts)
    if bool((there == 0).any()):
        prompt = prior.prompts[int(there.argmin())]
        raise ModelError(f"{who}: got no exact draw for context {prompt!r}")
    size = max(1, plan_rows(prior, len(exact_draws) * num_particles) // num_particles)
    index = torch.arange(len(exact_draws)).split(size)
    log_z = torch.cat([run(exact_draws.select(rows)) for rows in index])
    return [log_z[exact_draws.context == c] for c in range(prior.num_contexts)]


def _check_origin(draws: Draws, model: Model, who: str) -> None:
    """Refuse draws whose run was of another model, or not exact; draws that do not say are taken at their word."""
    guarantee, spec = draws.meta.get("guarantee"), draws.meta.get("spec_hash")
    if guarantee not in (None, "exact"):
        raise ModelError(
            f"{who}: the draws come from {draws.meta['engine']}, which is {guarantee}, expected exact draws: "
            "without them the upper bound is none; take those of Rejection, or Exact(...).draw"
        )
    if spec not in (None, model.spec_hash):
        raise ModelError(
            f"{who}: the draws are of another model, {draws.meta['formula']} (spec {spec}), than {model.formula} "
            f"(spec {model.spec_hash}); draw them from this one"
        )
