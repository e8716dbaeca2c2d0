"""What every test shares: one thread, float64, shape checks, fixed seeds and the molecule of the main job."""

import os
import warnings

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("OPENMM_CPU_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import shape_checks
import torch
from jaxtyping import install_import_hook

# Shapes and types in signatures are checked here and only here; set the variable to 0 to time the bare code.
if os.environ.get("OPENMM_TSF_CHECK_SHAPES", "1") != "0":
    install_import_hook("openmm_tsf", "shape_checks.check")

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped, with the reason, where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def float64_in_fixtures():
    """Float64 is the default dtype in fixtures of a wider scope too."""
    torch.set_default_dtype(torch.float64)


@pytest.fixture(autouse=True)
def float64_by_default(float64_in_fixtures):
    """Float64 is the default dtype in tests; whatever a test sets is undone."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(previous)


@pytest.fixture(autouse=True)
def shapes_are_checked_anew():
    """In every test the first calls of every function are checked."""
    shape_checks.calls.clear()


@pytest.fixture
def generator() -> torch.Generator:
    """A fresh generator with a fixed seed."""
    return torch.Generator().manual_seed(20240)


TINY = """
seed = 3
[simulate]
n_frames = 600
spacing_fs = 10.0
n_walkers = 20
equilibration_ps = 0.2
[flow]
blocks = 1
hidden = 8
depth = 1
energy_order = 2
entropy_order = 1
[train]
steps = 40
batch_frames = 64
batch_draws = 8
evaluate_every = 10
checkpoint_every = 10
[sample]
temperatures = [500.0]
n = 200
"""


@pytest.fixture(scope="session")
def tiny_toml() -> str:
    """A configuration whose stages take seconds; the flow that it makes is a poor one."""
    return TINY


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, float64_in_fixtures):
    """A run directory with every stage of `tiny_toml` done. Do not change it: copy it."""
    import tomllib

    from openmm_tsf.config import parse_config
    from openmm_tsf.reporting import STAGES
    from openmm_tsf.rundir import open_run

    folder = tmp_path_factory.mktemp("runs") / "tiny"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is out of reach")
        with open_run(folder, parse_config(tomllib.loads(TINY))) as run:
            for _, work in STAGES.values():
                work(run, None)
    return folder


@pytest.fixture(scope="session")
def ala2(float64_in_fixtures):
    """Alanine dipeptide in the default model (ff96 + OBC1, no constraints)."""
    from openmm_tsf import alanine_dipeptide

    return alanine_dipeptide()
