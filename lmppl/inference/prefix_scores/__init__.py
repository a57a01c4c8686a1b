"""Prefix scores: what a user has (a classifier, a value function, LMs of classes) as potentials of prefixes.

Each is a declaration that becomes an `Incremental` form when the LM is known that it is to steer: `score(lm)`. All have
ψ(∅) = 1, so that they are twists that leave Ẑ as it is.
"""

from lmppl.inference.prefix_scores.classes import ClassConditional
from lmppl.inference.prefix_scores.functions import PrefixScore
from lmppl.inference.prefix_scores.hidden import HiddenScore

__all__ = ["ClassConditional", "HiddenScore", "PrefixScore"]
