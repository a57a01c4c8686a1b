"""Where uncertain rewards come from: functions of texts that return what is known of r, for `UncertainReward`."""

from lmppl.modeling.evidence.reward_sources.deep_ensemble import DeepEnsemble
from lmppl.modeling.evidence.reward_sources.laplace import LaplaceLastLayer
from lmppl.modeling.evidence.reward_sources.mc_dropout import MCDropout
from lmppl.modeling.evidence.reward_sources.posterior_draws import PosteriorDraws

__all__ = ["DeepEnsemble", "LaplaceLastLayer", "MCDropout", "PosteriorDraws"]
