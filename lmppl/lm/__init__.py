"""Language models: whatever can be a prior, a proposal or a policy."""

from lmppl.lm.base import LanguageModel
from lmppl.lm.decoder import Decoder, State, Step
from lmppl.lm.tabular import TabularLM
from lmppl.lm.transformers import LM, TransformersLM

__all__ = ["LM", "Decoder", "LanguageModel", "State", "Step", "TabularLM", "TransformersLM"]
