"""Twists: potentials ψ(x_≤t) that stand for the evidence before a row has ended."""

from lmppl.inference.twists.exact import ExactTwist
from lmppl.inference.twists.product import FactorTwist, ProductTwist

__all__ = ["ExactTwist", "FactorTwist", "ProductTwist"]
