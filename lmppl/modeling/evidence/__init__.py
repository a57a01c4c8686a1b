"""Evidence: the factors that a model multiplies its prior by."""

from lmppl.modeling.evidence.attitudes import LowerBound, Marginal, Mean, Moderated, Quantile, Robust
from lmppl.modeling.evidence.automata import Automaton
from lmppl.modeling.evidence.bag_of_words import BagOfWords
from lmppl.modeling.evidence.constraint import Constraint
from lmppl.modeling.evidence.cut_mixture import CutMixture
from lmppl.modeling.evidence.languages import (
    Banned,
    Contains,
    Finished,
    Grammar,
    JsonSchema,
    Language,
    MaxWords,
    OneOf,
    Regex,
)
from lmppl.modeling.evidence.lm_factors import Classifier, InfillingFactor, LMFactor
from lmppl.modeling.evidence.moments import Moment
from lmppl.modeling.evidence.power import PowerPrior
from lmppl.modeling.evidence.preference import (
    BayesianRewardModel,
    EncoderFeatures,
    LMFeatures,
    Preference,
    PreferenceDistribution,
)
from lmppl.modeling.evidence.remote_judge import RemoteJudge
from lmppl.modeling.evidence.reward import Optimality, Reward
from lmppl.modeling.evidence.reward_sources import DeepEnsemble, LaplaceLastLayer, MCDropout, PosteriorDraws
from lmppl.modeling.evidence.uncertain import SpreadGate, UncertainReward

__all__ = [
    "Automaton",
    "BagOfWords",
    "Banned",
    "BayesianRewardModel",
    "Classifier",
    "Constraint",
    "Contains",
    "CutMixture",
    "DeepEnsemble",
    "EncoderFeatures",
    "Finished",
    "Grammar",
    "InfillingFactor",
    "JsonSchema",
    "LMFactor",
    "LMFeatures",
    "Language",
    "LaplaceLastLayer",
    "LowerBound",
    "MCDropout",
    "Marginal",
    "MaxWords",
    "Mean",
    "Moderated",
    "Moment",
    "OneOf",
    "Optimality",
    "PosteriorDraws",
    "PowerPrior",
    "Preference",
    "PreferenceDistribution",
    "Quantile",
    "Regex",
    "RemoteJudge",
    "Reward",
    "Robust",
    "SpreadGate",
    "UncertainReward",
]
