"""Which factor's incremental form breaks its law, on one row that shows it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lmppl.errors import FactorError
from lmppl.lm.decoder import Step
from lmppl.modeling.factors import Factor
from lmppl.modeling.named_forms import NamedForm
from lmppl.modeling.target import Target
from lmppl.sequences import Draws

__all__ = ["LAW_TOLERANCE", "agree", "broken_form"]

LAW_TOLERANCE = 1e-3  # of an incremental form, in nats, relative above 1: float32 sums stay far below it


def agree(got: Tensor, expected: Tensor) -> Tensor:
    """Where two values of log φ are the same, as far as an incremental form can be; −inf agrees with −inf alone."""
    close = (got - expected).abs() <= LAW_TOLERANCE * expected.abs().clamp_min(1.0)
    return (got == expected) | (close & expected.isfinite())


def broken_form(target: Target, factors: Sequence[Factor], row: Draws, tolerance: float) -> FactorError:
    """The error that names the factor, the text, and what was got and expected.

    Parameters
    ----------
    target : Target
    factors : sequence of Factor
        With incremental forms.
    row : Draws
        One prefix or outcome, with `log_prior`, on which a sum of increments and a potential, or log φ, disagree.
    tolerance : float
        In nats, relative above 1.
    """
    length = int(row.lengths[0])
    whole = bool(target.prior.is_outcome(row)[0])
    log_phi = target.evaluate(row).log_factors if whole else {}
    for factor in factors:
        total, potential, at = _walk(target, factor, row, length, tolerance)
        text = row.text[0]
        if at is not None:
            shown = Draws(
                row.ids, torch.tensor([at]), torch.tensor([False]), row.context, row.prompts, row.decoder
            ).text[0]
            return FactorError(
                f"factor {factor.name!r}: its incremental form breaks its law at token {at} ({shown!r}): potential is "
                f"{potential:.6g}, expected potential(start) + Σ weigh = {total:.6g}; lmppl.testing.check_factor tries "
                "more"
            )
        if whole and _differ(total, float(log_phi[factor.name][0]), tolerance):
            return FactorError(
                f"factor {factor.name!r}: its incremental form breaks its law for the text {text!r}: "
                f"potential(start) + Σ weigh is {total:.6g}, expected log φ = {float(log_phi[factor.name][0]):.6g}; "
                "lmppl.testing.check_factor tries more"
            )
    names = ", ".join(repr(f.name) for f in factors)
    return FactorError(
        f"factors {names}: an incremental form breaks its law for the text {row.text[0]!r} in a batch, and keeps it "
        "for that row alone: its state depends on the other rows, or select does not reorder all of it"
    )


def _walk(target: Target, factor: Factor, row: Draws, length: int, tolerance: float) -> tuple[float, float, int | None]:
    """Sum of increments, potential, and the number of tokens after which they differ first (None: nowhere)."""
    lm = target.prior
    form = NamedForm.of(factor, lm.vocab_size)
    context, ids = row.context.to(lm.device), row.ids.to(lm.device)
    with torch.no_grad():
        decoder = lm.decoder()
        step, cache = decoder.prefill(context)
        state = form.start(context, step)
        total = potential = float(form.potential(state)[0])
        for t in range(length):
            tokens = ids[:, t]
            total += float(form.weigh(state, tokens[:, None])[0, 0])
            if t + 1 == length and length == lm.max_new_tokens and "hidden" in form.needs:
                return total, potential, None
            if "hidden" in form.needs:
                step, cache = decoder.extend(cache, tokens[:, None])
            after: Step | None = step if "hidden" in form.needs else None
            state = form.advance(state, tokens, after)
            potential = float(form.potential(state)[0])
            if _differ(total, potential, tolerance):
                return total, potential, t + 1
    return total, potential, None


def _differ(a: float, b: float, tolerance: float) -> bool:
    close = math.isfinite(b) and abs(a - b) <= tolerance * max(1.0, abs(b))
    return a != b and not close
