"""HOW: engines that turn a declaration into draws, each one published algorithm in its own file."""

from lmppl.inference.ais import AIS
from lmppl.inference.approximation import Approximation, Chains, ExactTable, Particles, Sampler
from lmppl.inference.awrs import AWRS, awrs
from lmppl.inference.beam_search import Beam, Greedy
from lmppl.inference.best_of_n import BestOfN, best_of_n_law, soft_best_of_n_law
from lmppl.inference.bounds import Sandwich, sandwich
from lmppl.inference.conditional_smc import conditional_smc, particle_gibbs_step
from lmppl.inference.cut_mixture import CutMixtureFit, fit_cut_mixture
from lmppl.inference.engine import Budget, Engine, Guarantee, Part, Request, Shard, shard_generator
from lmppl.inference.exact import Exact
from lmppl.inference.guided import GuidedLM
from lmppl.inference.importance import Importance
from lmppl.inference.mcmc import (
    MCMC,
    BlockResample,
    LocalEdit,
    Mixture,
    ParticleGibbs,
    Restart,
    SuffixResample,
    Tempered,
    TokenGibbs,
)
from lmppl.inference.pplm import PPLM
from lmppl.inference.prefix_scores import ClassConditional, HiddenScore, PrefixScore
from lmppl.inference.quasi_rejection import QuasiRejection
from lmppl.inference.reductions import MomentFit, fit_moments
from lmppl.inference.rejection import Rejection
from lmppl.inference.resolve import ENGINES, parse_engine, resolve_engine, split_engines
from lmppl.inference.reverse_annealing import conditional_annealing, reverse_ais
from lmppl.inference.run import infer, stream
from lmppl.inference.smc import SMC
from lmppl.inference.splitting import Splitting
from lmppl.inference.step_proposals import StepProposal
from lmppl.inference.tempered_smc import TemperedSMC
from lmppl.inference.twists import ExactTwist, FactorTwist, LearnedTwist, ProductTwist, learn_twist
from lmppl.inference.weighted_decoding import WeightedDecoding

__all__ = [
    "AIS",
    "AWRS",
    "ENGINES",
    "MCMC",
    "PPLM",
    "SMC",
    "Approximation",
    "Beam",
    "BestOfN",
    "BlockResample",
    "Budget",
    "Chains",
    "ClassConditional",
    "CutMixtureFit",
    "Engine",
    "Exact",
    "ExactTable",
    "ExactTwist",
    "FactorTwist",
    "Greedy",
    "Guarantee",
    "GuidedLM",
    "HiddenScore",
    "Importance",
    "LearnedTwist",
    "LocalEdit",
    "Mixture",
    "MomentFit",
    "Part",
    "ParticleGibbs",
    "Particles",
    "PrefixScore",
    "ProductTwist",
    "QuasiRejection",
    "Rejection",
    "Request",
    "Restart",
    "Sampler",
    "Sandwich",
    "Shard",
    "Splitting",
    "StepProposal",
    "SuffixResample",
    "Tempered",
    "TemperedSMC",
    "TokenGibbs",
    "WeightedDecoding",
    "awrs",
    "best_of_n_law",
    "conditional_annealing",
    "conditional_smc",
    "fit_cut_mixture",
    "fit_moments",
    "infer",
    "learn_twist",
    "parse_engine",
    "particle_gibbs_step",
    "resolve_engine",
    "reverse_ais",
    "sandwich",
    "shard_generator",
    "soft_best_of_n_law",
    "split_engines",
    "stream",
]
