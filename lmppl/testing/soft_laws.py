"""The law of soft forms: their gradient is the derivative of their value."""

from __future__ import annotations

import torch
from torch import Tensor

from lmppl.lm.base import LanguageModel
from lmppl.modeling.factors import Factor
from lmppl.modeling.soft import SoftStep
from lmppl.testing.reports import Report

__all__ = ["check_soft"]

LAW = "the gradient of the soft form agrees with finite differences"
DIRECTIONS = 4
STEP = 1e-3
RELATIVE = 0.02  # a head in float32 leaves three digits of a difference


def check_soft(report: Report, factor: Factor, lm: LanguageModel | None, seed: int) -> None:
    """(f(s + εd) − f(s − εd))/2ε = ⟨∇f(s), d⟩ in random directions d of the next token's logits and the hidden states.

    Needs an LM, whose step after each context is the point s.
    """
    if factor.soft is None or lm is None:
        why = "it has none" if factor.soft is None else "it needs a step: give an LM in place of sequences"
        report.skip(LAW, why)
        return
    form = factor.soft(lm)
    contexts = torch.arange(lm.num_contexts, device=lm.device)
    step, _ = lm.decoder().prefill(contexts)
    hidden = torch.zeros(len(contexts), 1) if step.hidden is None else step.hidden[:, -1]
    log_probs = step.log_probs[:, -1].double().clamp_min(-50.0)  # differences need finite logits
    point = [log_probs, hidden.double(), hidden.double()]

    def value(parts: list[Tensor]) -> Tensor:
        logits, now, mean = parts
        found: Tensor = form(SoftStep(torch.log_softmax(logits, -1), now, mean))
        return found.double().sum()

    leaves = [part.clone().requires_grad_() for part in point]
    with torch.enable_grad():
        total = value(leaves)
    report.require(total.requires_grad, LAW, "a value without a gradient", "one that follows its step")
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(DIRECTIONS):
        direction = [torch.randn(part.shape, generator=generator, dtype=torch.float64).to(part) for part in point]
        slope = sum(
            (float((g.double() * d).sum()) for g, d in zip(gradients, direction, strict=True) if g is not None), 0.0
        )
        ends = [
            float(value([p + sign * STEP * d for p, d in zip(point, direction, strict=True)]).detach())
            for sign in (1, -1)
        ]
        found = (ends[0] - ends[1]) / (2 * STEP)
        close = abs(found - slope) <= RELATIVE * max(abs(found), abs(slope)) + 1e-3
        report.require(
            close, LAW, f"a gradient of {slope:.6g} in a random direction", f"{found:.6g}", "in 4 directions"
        )
