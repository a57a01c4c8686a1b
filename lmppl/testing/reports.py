"""What a check says: the law that failed, or everything that was checked, left out, and how sure it is."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["CheckFailed", "Report"]


class CheckFailed(AssertionError):
    """A law does not hold; the message is one sentence: whose, which law, got and expected."""


@dataclass
class Report:
    """What a check has found to hold.

    Parameters
    ----------
    subject : str
        What was checked.
    held : dict
        Law → how it was checked.
    skipped : dict
        Law → why it could not be checked.
    error_rate : float
        Probability that a correct subject fails this check, summed over its statistical laws (union bound); the other
        laws are exact up to rounding.
    """

    subject: str
    held: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    error_rate: float = 0.0

    def require(self, holds: bool | Tensor, law: str, got: object, expected: object, how: str = "") -> None:
        """Note that `law` holds, or raise `CheckFailed`.

        Parameters
        ----------
        holds : bool
        law : str
            The law as a statement.
        got, expected : object
            What the message shows.
        how : str
            How it was checked, for the report.
        """
        if not bool(holds):
            raise CheckFailed(f"{self.subject}: {law} does not hold: got {got}, expected {expected}")
        self.held[law] = how

    def require_close(self, got: Tensor, expected: Tensor, law: str, *, tolerance: float, how: str = "") -> None:
        """Require that two tensors of log-values agree within `tolerance` nats, −inf where the other is −inf."""
        self.require(got.shape == expected.shape, law, f"shape {tuple(got.shape)}", f"shape {tuple(expected.shape)}")
        got, expected = got.detach().double(), expected.detach().double()
        gap = torch.where(got == expected, 0.0, (got - expected).abs()).nan_to_num(torch.inf)
        if gap.numel() == 0:
            self.held[law] = how
            return
        worst = int(gap.argmax())
        where = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), gap.shape))
        self.require(
            float(gap.max()) <= tolerance,
            law,
            f"{float(got.flatten()[worst]):.6g} at {list(where)}",
            f"{float(expected.flatten()[worst]):.6g} within {tolerance:g}",
            how or f"within {tolerance:g}",
        )

    def require_likely(self, p_value: float, error_rate: float, law: str, got: object, expected: object) -> None:
        """Require that a test's p-value is at least `error_rate`, and add that to the report's own."""
        self.error_rate += error_rate
        self.require(p_value >= error_rate, law, f"{got} (p = {p_value:.2g})", expected, f"p ≥ {error_rate:g}")

    def skip(self, law: str, reason: str) -> None:
        """Note that `law` could not be checked."""
        self.skipped[law] = reason

    def __str__(self) -> str:
        lines = [f"{self.subject}: {len(self.held)} laws hold"]
        if self.error_rate:
            lines[0] += f"; a correct one fails with probability at most {self.error_rate:.1g}"
        lines += [f"  holds: {law}{f' ({how})' if how else ''}" for law, how in self.held.items()]
        lines += [f"  not checked: {law}: {reason}" for law, reason in self.skipped.items()]
        return "\n".join(lines)
