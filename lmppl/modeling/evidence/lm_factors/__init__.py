"""Language models as evidence: products of LMs, the likelihood of a given continuation, heads on hidden states."""

from lmppl.modeling.evidence.lm_factors.classifier import Classifier
from lmppl.modeling.evidence.lm_factors.infilling import InfillingFactor
from lmppl.modeling.evidence.lm_factors.lm_factor import LMFactor

__all__ = ["Classifier", "InfillingFactor", "LMFactor"]
