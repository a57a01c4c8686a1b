"""Bounds of log Z from both sides, by whichever engine has a forward and a conditional run."""

from __future__ import annotations

from lmppl.errors import ModelError
from lmppl.inference.ais import AIS
from lmppl.inference.approximation import LEVEL
from lmppl.inference.conditional_smc import Sandwich
from lmppl.inference.conditional_smc import sandwich as sandwich_smc
from lmppl.inference.reverse_annealing import sandwich_annealing
from lmppl.inference.smc import SMC
from lmppl.inference.tempered_smc import TemperedSMC
from lmppl.lm.base import LanguageModel
from lmppl.modeling.model import Model, model_of
from lmppl.sequences import Draws

__all__ = ["Sandwich", "sandwich"]


def sandwich(
    model: Model | LanguageModel,
    engine: SMC | AIS | TemperedSMC,
    exact_draws: Draws,
    *,
    num_sweeps: int | None = None,
    seed: int = 0,
    level: float = LEVEL,
) -> Sandwich:
    """A lower bound of log Z from sweeps of `engine`, and an upper bound from its runs that hold an exact draw.

    E log Ẑ ≤ log Z for an unbiased Ẑ, and E log Ẑ ≥ log Z for that of a conditional sweep (`conditional_smc`) or of a
    reverse run (`reverse_ais`), one an exact draw. Both are means of log Ẑ with Student's t intervals for their
    expectations. The upper bound is one only if the draws are exact (`Rejection`, `Exact(...).draw`); it is the side
    that sees missed modes.

    Parameters
    ----------
    model : Model or LanguageModel
    engine : SMC, AIS or TemperedSMC
        `SMC(ess_threshold=0, ...)` without a twist is importance sampling with N draws. A ladder is that of the
        forward run; `ladder="online"` gives no bound.
    exact_draws : Draws
        Equally weighted exact draws of π*, two or more of each context.
    num_sweeps : int, optional
        Sweeps for the lower bound; by default the engine's.
    seed : int
    level : float
        Coverage of the intervals.

    Returns
    -------
    Sandwich
        `lower` and `upper`, each an `Estimate` (C,), in nats.

    Raises
    ------
    ModelError
        Where the engine is another one, or its Ẑ is biased; where the draws are weighted, or a context has none; where
        they say of themselves that they are another model's, or not exact.

    References
    ----------
    grosse2015, zhao2024
    """
    model = model_of(model)
    if isinstance(engine, SMC):
        return sandwich_smc(model, engine, exact_draws, num_sweeps=num_sweeps, seed=seed, level=level)
    if isinstance(engine, AIS | TemperedSMC):
        return sandwich_annealing(model, engine, exact_draws, num_sweeps=num_sweeps, seed=seed, level=level)
    raise ModelError(
        f"sandwich: got {type(engine).__name__}, expected SMC, AIS or TemperedSMC, whose runs can hold an exact draw"
    )
