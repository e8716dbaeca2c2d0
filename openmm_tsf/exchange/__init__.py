"""Flows inside the samplers of openmmtools and OpenMM: the only place that knows them.

openmmtools is not imported before something needs it: a `FlowMove` is an MCMCMove by what it does.
"""

from importlib import import_module

_HOMES = {
    "move": ("FlowMove",),
    "flows": ("use_flow",),
    "openmm_app": ("FlowReplicaExchangeSampler",),
    "sampler": ("rescaling",),
    "storage": ("acceptance", "read_exchange", "to_mdtraj"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> object:
    """Load a public name from its module the first time it is used (PEP 562)."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value
