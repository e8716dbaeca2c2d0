"""At which temperature to sample a learned model: cool it, heat it, or leave it.

A model q_1 ~ exp(-Ehat) learned from too few samples of p ~ exp(-E/T) is closer to p at some other sampling
temperature, q_t ~ exp(-Ehat/t). With K = Cov(u, Ehat)/t, C = Var(Ehat)/t^2 over q_t, and u = E/T,

    d KL(q_t || p)/dt = (K - C)/t                          zero at t*: fidelity, what is drawn is likely in p
    d KL(p || q_t)/dt = (<Ehat>_q - <Ehat>_p)/t^2          zero at t': diversity, what is likely in p is drawn

so that K > C says to lower the temperature and K < C to raise it.

Source: Fields, Ngampruetikorn, Schwab, Palmer, arXiv 2512.09152.
"""

from openmm_tsf.tuning.diagnostics import Advice, TemperatureDiagnostics, temperature_diagnostics
from openmm_tsf.tuning.levels import LevelDecomposition, energy_level_decomposition
from openmm_tsf.tuning.samples import ScoredSamples, enumerated
from openmm_tsf.tuning.search import OptimalTemperature, optimal_sampling_temperature
from openmm_tsf.tuning.sizes import DataSizeCurve, data_size_curve

__all__ = [
    "Advice", "DataSizeCurve", "LevelDecomposition", "OptimalTemperature", "ScoredSamples", "TemperatureDiagnostics",
    "data_size_curve", "energy_level_decomposition", "enumerated", "optimal_sampling_temperature",
    "temperature_diagnostics",
]  # fmt: skip
