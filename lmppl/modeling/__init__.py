"""WHAT is wanted: factors, models, their graph and the compiled target."""

from __future__ import annotations

from lmppl.modeling.evidence import (
    Automaton,
    BagOfWords,
    Constraint,
    CutMixture,
    DeepEnsemble,
    HiddenClassifier,
    LaplaceLastLayer,
    LowerBound,
    Marginal,
    MCDropout,
    Mean,
    Moderated,
    Moment,
    Optimality,
    PosteriorDraws,
    PowerPrior,
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
    "Constraint",
    "CutMixture",
    "DeepEnsemble",
    "Factor",
    "Feature",
    "HiddenClassifier",
    "Incremental",
    "LaplaceLastLayer",
    "LowerBound",
    "MCDropout",
    "Marginal",
    "Mean",
    "Model",
    "Moderated",
    "Moment",
    "Optimality",
    "PosteriorDraws",
    "PowerPrior",
    "Quantile",
    "Reward",
    "Robust",
    "SpreadGate",
    "Target",
    "TargetForm",
    "UncertainReward",
]
