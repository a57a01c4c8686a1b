"""lmppl: probabilistic programming for language models.

Declare a posterior (a prior LM × evidence), swap inference engines, compare how well each approximates it.
"""

from __future__ import annotations

from lmppl.comparison import Comparison, compare
from lmppl.errors import LmpplError
from lmppl.inference import (
    ENGINES,
    Approximation,
    BestOfN,
    Budget,
    Engine,
    Exact,
    Guarantee,
    Importance,
    Part,
    QuasiRejection,
    Rejection,
    Shard,
    infer,
    stream,
)
from lmppl.lm import LM, LanguageModel, TabularLM, TransformersLM
from lmppl.modeling import (
    Automaton,
    Constraint,
    Factor,
    Feature,
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
    "ENGINES",
    "LM",
    "Approximation",
    "Automaton",
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
    "Guarantee",
    "Importance",
    "Incremental",
    "LanguageModel",
    "LmpplError",
    "Model",
    "Optimality",
    "Part",
    "QuasiRejection",
    "PowerPrior",
    "Rejection",
    "Reward",
    "Sequences",
    "Shard",
    "TabularLM",
    "Target",
    "TargetForm",
    "TransformersLM",
    "compare",
    "infer",
    "stream",
]
