"""HOW: engines that turn a declaration into draws, each one published algorithm in its own file."""

from lmppl.inference.approximation import Approximation, Chains, ExactTable, Particles, Sampler
from lmppl.inference.best_of_n import BestOfN, best_of_n_law
from lmppl.inference.conditional_smc import Sandwich, conditional_smc, particle_gibbs_step, sandwich
from lmppl.inference.engine import Budget, Engine, Guarantee, Part, Request, Shard, infer, shard_generator, stream
from lmppl.inference.exact import Exact
from lmppl.inference.importance import Importance
from lmppl.inference.quasi_rejection import QuasiRejection, QuasiRejectionCurve, quasi_rejection_curve
from lmppl.inference.rejection import Rejection
from lmppl.inference.resolve import ENGINES, parse_engine, resolve_engine, split_engines
from lmppl.inference.smc import SMC
from lmppl.inference.step_proposals import StepProposal
from lmppl.inference.twists import ExactTwist, FactorTwist, ProductTwist

__all__ = [
    "ENGINES",
    "SMC",
    "Approximation",
    "BestOfN",
    "Budget",
    "Chains",
    "Engine",
    "Exact",
    "ExactTable",
    "ExactTwist",
    "FactorTwist",
    "Guarantee",
    "Importance",
    "Part",
    "Particles",
    "ProductTwist",
    "QuasiRejection",
    "QuasiRejectionCurve",
    "Rejection",
    "Request",
    "Sampler",
    "Sandwich",
    "Shard",
    "StepProposal",
    "best_of_n_law",
    "conditional_smc",
    "infer",
    "parse_engine",
    "particle_gibbs_step",
    "quasi_rejection_curve",
    "resolve_engine",
    "sandwich",
    "shard_generator",
    "split_engines",
    "stream",
]
