"""Tests for what plugs into lmppl: give your factor, language model or engine to its check.

Each check raises `CheckFailed`, which names the law that does not hold, or returns a `Report` of what was checked and
how sure that is. Engines are checked on `references()`: small posteriors whose answers are known exactly.
"""

from lmppl.testing.engine_laws import check_engine
from lmppl.testing.factor_laws import check_factor
from lmppl.testing.language_model_laws import check_language_model
from lmppl.testing.problems import references
from lmppl.testing.reference import ReferencePosterior
from lmppl.testing.reports import CheckFailed, Report

__all__ = [
    "CheckFailed",
    "ReferencePosterior",
    "Report",
    "check_engine",
    "check_factor",
    "check_language_model",
    "references",
]
