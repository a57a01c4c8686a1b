"""lmppl: probabilistic programming for language models.

Declare a posterior (a prior LM × evidence), swap inference engines, compare how well each approximates it.
"""

from __future__ import annotations

from lmppl.comparison import Comparison, compare
from lmppl.errors import LmpplError
from lmppl.inference import (
    AIS,
    ENGINES,
    MCMC,
    PPLM,
    SMC,
    Approximation,
    Beam,
    BestOfN,
    Budget,
    Engine,
    Exact,
    Greedy,
    Guarantee,
    Importance,
    Part,
    QuasiRejection,
    Rejection,
    Shard,
    Splitting,
    TemperedSMC,
    WeightedDecoding,
    infer,
    stream,
)
from lmppl.lm import LM, LanguageModel, TabularLM, TransformersLM
from lmppl.modeling import (
    Automaton,
    BagOfWords,
    Constraint,
    Factor,
    Feature,
    HiddenClassifier,
    Incremental,
    Model,
    Optimality,
    PowerPrior,
    Reward,
    Target,
    TargetForm,
)
from lmppl.sequences import Cost, Draws, Estimate, Sequences

__version__ = "0.1.0"

__all__ = [
    "AIS",
    "ENGINES",
    "LM",
    "MCMC",
    "PPLM",
    "SMC",
    "Approximation",
    "Automaton",
    "BagOfWords",
    "Beam",
    "BestOfN",
    "Budget",
    "Comparison",
    "Constraint",
    "Cost",
    "Draws",
    "Engine",
    "Estimate",
    "Exact",
    "Factor",
    "Feature",
    "Greedy",
    "Guarantee",
    "HiddenClassifier",
    "Importance",
    "Incremental",
    "LanguageModel",
    "LmpplError",
    "Model",
    "Optimality",
    "Part",
    "PowerPrior",
    "QuasiRejection",
    "Rejection",
    "Reward",
    "Sequences",
    "Shard",
    "Splitting",
    "TabularLM",
    "Target",
    "TargetForm",
    "TemperedSMC",
    "TransformersLM",
    "WeightedDecoding",
    "compare",
    "infer",
    "stream",
]
