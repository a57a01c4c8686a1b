"""MCMC over sequences: kernels, batches of chains, and the engines that run them."""

from lmppl.inference.mcmc.blocks import BlockResample
from lmppl.inference.mcmc.chains import ChainState, Kernel, StepInfo
from lmppl.inference.mcmc.edits import LocalEdit
from lmppl.inference.mcmc.engine import MCMC
from lmppl.inference.mcmc.kernels import Restart, SuffixResample
from lmppl.inference.mcmc.mixture import Mixture
from lmppl.inference.mcmc.particle_gibbs import ParticleGibbs
from lmppl.inference.mcmc.tempering import Tempered
from lmppl.inference.mcmc.token_gibbs import TokenGibbs

__all__ = [
    "MCMC",
    "BlockResample",
    "ChainState",
    "Kernel",
    "LocalEdit",
    "Mixture",
    "ParticleGibbs",
    "Restart",
    "StepInfo",
    "SuffixResample",
    "Tempered",
    "TokenGibbs",
]
