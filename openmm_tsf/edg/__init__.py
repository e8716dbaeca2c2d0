"""The energy-based diffusion generator (EDG): a decoder of latents that is trained against the energy alone.

A decoder draws z_0 ~ N(0, I) and x | z_0; it need not be invertible. An encoder, the reverse of a diffusion of z_0 with
a learned score, says how x could have come about: that gives a bound of the relative entropy in training, which
integrates no equation, and in the end the weight of every draw, by the probability-flow equation.

Source: Wang, Guo, Wu, Zhou, Energy based diffusion generator for efficient sampling of Boltzmann distributions, arXiv
2401.02080.
"""

from openmm_tsf.edg.bound import BoundSample, kl_bound
from openmm_tsf.edg.decoders import Conditional, GaussianDecoder, HamiltonianDecoder
from openmm_tsf.edg.diffusion import VariancePreserving
from openmm_tsf.edg.draws import EDGDraws, draw
from openmm_tsf.edg.encoder_ode import encoder_log_prob
from openmm_tsf.edg.generator import EDG, EDGSettings, build_edg
from openmm_tsf.edg.networks import Target
from openmm_tsf.edg.scores import EnergyScore, GaussianScore, PlainScore
from openmm_tsf.edg.training import EDGHistory, EDGTrainingSettings, train_edg

__all__ = [
    "EDG", "BoundSample", "Conditional", "EDGDraws", "EDGHistory", "EDGSettings", "EDGTrainingSettings", "EnergyScore",
    "GaussianDecoder", "GaussianScore", "HamiltonianDecoder", "PlainScore", "Target", "VariancePreserving", "build_edg",
    "draw", "encoder_log_prob", "kl_bound", "train_edg",
]  # fmt: skip
