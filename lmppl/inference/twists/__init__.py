"""Twists: potentials ψ(x_≤t) that stand for the evidence before a row has ended."""

from lmppl.inference.twists.exact import ExactTwist
from lmppl.inference.twists.learned import LearnedTwist, TwistRecord
from lmppl.inference.twists.losses import Consistency, Contrastive, Rollouts, SoftValue, TwistLoss
from lmppl.inference.twists.product import FactorTwist, ProductTwist
from lmppl.inference.twists.training import learn_twist

__all__ = [
    "Consistency",
    "Contrastive",
    "ExactTwist",
    "FactorTwist",
    "LearnedTwist",
    "ProductTwist",
    "Rollouts",
    "SoftValue",
    "TwistLoss",
    "TwistRecord",
    "learn_twist",
]
