"""Engines, policies and finished approximations of one declaration, side by side."""

from lmppl.comparison.compare import compare
from lmppl.comparison.figures import Figure
from lmppl.comparison.reference import Reference
from lmppl.comparison.result import Comparison, Row

__all__ = ["Comparison", "Figure", "Reference", "Row", "compare"]
