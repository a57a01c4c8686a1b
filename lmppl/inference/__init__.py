"""HOW: engines that turn a declaration into draws, each one published algorithm in its own file."""

from lmppl.inference.approximation import Approximation, Chains, ExactTable, Particles, Sampler
from lmppl.inference.best_of_n import BestOfN, best_of_n_law
from lmppl.inference.engine import Budget, Engine, Guarantee, Part, Request, Shard, infer, shard_generator, stream
from lmppl.inference.exact import Exact
from lmppl.inference.importance import Importance
from lmppl.inference.quasi_rejection import QuasiRejection, QuasiRejectionCurve, quasi_rejection_curve
from lmppl.inference.rejection import Rejection
from lmppl.inference.resolve import ENGINES, parse_engine, resolve_engine, split_engines

__all__ = [
    "ENGINES",
    "Approximation",
    "BestOfN",
    "Budget",
    "Chains",
    "Engine",
    "Exact",
    "ExactTable",
    "Guarantee",
    "Importance",
    "Part",
    "Particles",
    "QuasiRejection",
    "QuasiRejectionCurve",
    "Rejection",
    "Request",
    "Sampler",
    "Shard",
    "best_of_n_law",
    "infer",
    "parse_engine",
    "quasi_rejection_curve",
    "resolve_engine",
    "shard_generator",
    "split_engines",
    "stream",
]
