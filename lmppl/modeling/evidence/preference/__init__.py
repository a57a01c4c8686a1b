"""Preferences as evidence: rewards learned from pairs of texts, with what they leave open."""

from lmppl.modeling.evidence.preference.distribution import PreferenceDistribution
from lmppl.modeling.evidence.preference.embeddings import EncoderFeatures, LMFeatures
from lmppl.modeling.evidence.preference.evaluation import Evaluation
from lmppl.modeling.evidence.preference.pairs import Preference
from lmppl.modeling.evidence.preference.reward_model import BayesianRewardModel

__all__ = [
    "BayesianRewardModel",
    "EncoderFeatures",
    "Evaluation",
    "LMFeatures",
    "Preference",
    "PreferenceDistribution",
]
