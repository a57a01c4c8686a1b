"""Evidence: the factors that a model multiplies its prior by."""

from lmppl.modeling.evidence.attitudes import LowerBound, Marginal, Mean, Moderated, Quantile, Robust
from lmppl.modeling.evidence.automata import Automaton
from lmppl.modeling.evidence.bag_of_words import BagOfWords
from lmppl.modeling.evidence.constraint import Constraint
from lmppl.modeling.evidence.cut_mixture import CutMixture
from lmppl.modeling.evidence.hidden_classifier import HiddenClassifier
from lmppl.modeling.evidence.moments import Moment
from lmppl.modeling.evidence.power import PowerPrior
from lmppl.modeling.evidence.reward import Optimality, Reward
from lmppl.modeling.evidence.reward_sources import DeepEnsemble, LaplaceLastLayer, MCDropout, PosteriorDraws
from lmppl.modeling.evidence.uncertain import SpreadGate, UncertainReward

__all__ = [
    "Automaton",
    "BagOfWords",
    "Constraint",
    "CutMixture",
    "DeepEnsemble",
    "HiddenClassifier",
    "LaplaceLastLayer",
    "LowerBound",
    "MCDropout",
    "Marginal",
    "Mean",
    "Moderated",
    "Moment",
    "Optimality",
    "PosteriorDraws",
    "PowerPrior",
    "Quantile",
    "Reward",
    "Robust",
    "SpreadGate",
    "UncertainReward",
]
