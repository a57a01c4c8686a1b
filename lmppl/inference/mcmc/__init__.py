"""MCMC over sequences: kernels, batches of chains, and the engines that run them."""

from lmppl.inference.mcmc.chains import ChainState, Kernel, StepInfo
from lmppl.inference.mcmc.engine import MCMC
from lmppl.inference.mcmc.kernels import Mixture, Restart, SuffixResample

__all__ = ["MCMC", "ChainState", "Kernel", "Mixture", "Restart", "StepInfo", "SuffixResample"]
