"""WHAT is wanted: factors, models, their graph and the compiled target."""

from __future__ import annotations

from lmppl.modeling.evidence import (
    Automaton,
    BagOfWords,
    BayesianRewardModel,
    Constraint,
    EncoderFeatures,
    HiddenClassifier,
    LMFeatures,
    LowerBound,
    Marginal,
    Mean,
    Moderated,
    Moment,
    Optimality,
    PowerPrior,
    Preference,
    PreferenceDistribution,
    Quantile,
    Reward,
    Robust,
    SpreadGate,
    UncertainReward,
)
from lmppl.modeling.factors import Factor, Feature, Incremental
from lmppl.modeling.model import Model
from lmppl.modeling.target import Target, TargetForm

__all__ = [
    "Automaton",
    "BagOfWords",
    "BayesianRewardModel",
    "Constraint",
    "EncoderFeatures",
    "Factor",
    "Feature",
    "HiddenClassifier",
    "Incremental",
    "LMFeatures",
    "LowerBound",
    "Marginal",
    "Mean",
    "Model",
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
    "Target",
    "TargetForm",
    "UncertainReward",
]
