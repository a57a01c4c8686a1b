"""Evidence: the factors that a model multiplies its prior by."""

from lmppl.modeling.evidence.automata import Automaton
from lmppl.modeling.evidence.constraint import Constraint
from lmppl.modeling.evidence.power import PowerPrior
from lmppl.modeling.evidence.reward import Optimality, Reward

__all__ = ["Automaton", "Constraint", "Optimality", "PowerPrior", "Reward"]
