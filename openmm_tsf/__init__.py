"""Equilibrium ensembles of a molecule at any temperature, from a temperature-steerable flow trained at one.

The public names below load on first use, so that importing the package is quick, prints nothing and changes nothing:

    import openmm_tsf as tsf

    molecule = tsf.alanine_dipeptide()
    energy = tsf.BatchedEnergy(molecule.system, molecule.positions)
    flow = tsf.pretrained("ala2")
    ensemble = tsf.draw(flow, energy, temperature=300.0, n=1000, generator=torch.Generator().manual_seed(1))
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "systems": ("Molecule", "alanine_dipeptide"),
    "trajectories": ("Frames", "load_frames"),
    "energy": ("BatchedEnergy", "OpenMMEnergy"),
    "zmatrix": ("ZMatrix", "build_zmatrix"),
    "internals": ("FlatInternals",),
    "flow": ("Flow", "FlowSettings", "SteeredFlow", "build_flow"),
    "dynamics": ("simulate",),
    "training": ("History", "TrainingSettings", "train"),
    "refinement": ("RefinementSettings", "refine"),
    "checkpoint": ("CheckpointError", "flow_info", "load_flow", "pretrained", "save_flow"),
    "ensemble": ("Ensemble", "draw"),
    "metropolis": ("Target", "Walkers", "independence_step", "latent_step"),
    "exchange": ("FlowMove", "FlowReplicaExchangeSampler"),
    "weights": ("effective_sample_size",),
    "notebook": ("view", "view_basins"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME_OF)]


def __getattr__(name: str) -> object:
    """Load a public name from its module the first time it is used (PEP 562)."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted({*globals(), *__all__})
