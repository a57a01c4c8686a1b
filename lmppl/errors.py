"""Every error that lmppl raises on purpose: one flat family, each saying what, where, got/expected, how to fix."""

from __future__ import annotations

__all__ = [
    "BudgetExhausted",
    "ContextError",
    "FactorError",
    "InfeasibleModel",
    "InterruptedRun",
    "LmpplError",
    "MissingDependency",
    "ModelError",
    "ShapeError",
    "SpecError",
    "StorageError",
    "SupportTooLarge",
    "UnsupportedModel",
]


class LmpplError(Exception):
    """Base class: `except lmppl.LmpplError` catches everything that lmppl raises on purpose."""


class ModelError(LmpplError, ValueError):
    """The declaration is wrong: an argument, a factor, or a combination that defines no posterior."""


class ShapeError(ModelError):
    """A tensor or a list has the wrong shape; the message shows got and expected."""


class ContextError(ModelError):
    """A context cannot be used: none given, empty, or longer than the LM's window allows."""


class FactorError(ModelError):
    """A user function of a factor failed: it raised, or returned nan, +inf, or a forbidden −inf."""


class SpecError(ModelError):
    """A spec file cannot be used: missing, raising, or without the name asked for."""


class SupportTooLarge(ModelError):
    """Enumeration would exceed its size guard."""


class UnsupportedModel(LmpplError, TypeError):
    """An engine cannot run on this model; the message is the engine's `unsupported_reason`."""


class InfeasibleModel(LmpplError, RuntimeError):
    """No outcome with γ > 0 was found: Z = 0, or below the stated upper confidence bound."""


class BudgetExhausted(LmpplError, RuntimeError):
    """The budget of draws, tokens or seconds ended before the requested number of draws was reached."""


class InterruptedRun(LmpplError, RuntimeError):
    """The run was stopped before a first shard was whole, so that there is nothing unbiased to return."""


class MissingDependency(LmpplError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""


class StorageError(LmpplError, OSError):
    """Draws, tables or models could not be saved or loaded; an existing file is left as it was."""
