"""Evidence: the factors that a model multiplies its prior by."""

from lmppl.modeling.evidence.attitudes import LowerBound, Marginal, Mean, Moderated, Quantile, Robust
from lmppl.modeling.evidence.automata import Automaton
from lmppl.modeling.evidence.bag_of_words import BagOfWords
from lmppl.modeling.evidence.constraint import Constraint
from lmppl.modeling.evidence.hidden_classifier import HiddenClassifier
from lmppl.modeling.evidence.moments import Moment
from lmppl.modeling.evidence.power import PowerPrior
from lmppl.modeling.evidence.preference import (
    BayesianRewardModel,
    EncoderFeatures,
    LMFeatures,
    Preference,
    PreferenceDistribution,
)
from lmppl.modeling.evidence.reward import Optimality, Reward
from lmppl.modeling.evidence.uncertain import SpreadGate, UncertainReward

__all__ = [
    "Automaton",
    "BagOfWords",
    "BayesianRewardModel",
    "Constraint",
    "EncoderFeatures",
    "HiddenClassifier",
    "LMFeatures",
    "LowerBound",
    "Marginal",
    "Mean",
    "Moderated",
    "Moment",
    "Optimality",
    "PowerPrior",
    "Preference",
    "PreferenceDistribution",
    "Quantile",
    "Reward",
    "Robust",
    "SpreadGate",
    "UncertainReward",
]
