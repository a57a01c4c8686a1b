"""Top-k and nucleus truncation as a declared law: what is cut has probability zero, what is left is renormalised.

The source of nucleus truncation is `holtzman2020curious`. Ties are broken by the lower token id, so that the law is a
function of the logits and never of the order in which a sort happens to return equal entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmppl.errors import ModelError

__all__ = ["check_truncation", "keep_top_k", "keep_top_p"]


def check_truncation(top_k: int | None, top_p: float | None) -> None:
    """Raise `ModelError` unless `top_k` ≥ 1 and 0 < `top_p` ≤ 1, where given."""
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise ModelError(f"top_k: got {top_k!r}, expected an integer of at least 1, or None for no truncation")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ModelError(f"top_p: got {top_p!r}, expected 0 < top_p ≤ 1, or None for no truncation")


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """(B, V) logits with −inf at all but the `top_k` largest of each row."""
    if top_k >= logits.shape[-1]:
        return logits
    edge = logits.topk(top_k, -1).values[:, -1:]
    above = logits > edge
    tied = logits == edge
    room = top_k - above.sum(-1, keepdim=True)
    kept = above | (tied & (tied.cumsum(-1) <= room))
    return logits.masked_fill(~kept, -torch.inf)


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """(B, V) logits with −inf outside the nucleus.

    Tokens in order of falling probability are kept while the mass before them is below `top_p`; the first always is.
    """
    if top_p >= 1.0:
        return logits
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices
    probs = torch.softmax(logits.gather(-1, order), -1)
    before = probs.cumsum(-1) - probs
    before[:, 0] = 0.0
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before < top_p)
    return logits.masked_fill(~kept, -torch.inf)
