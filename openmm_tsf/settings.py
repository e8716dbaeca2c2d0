"""The settings of a run: one frozen dataclass for each table of its configuration file.

The defaults are the alanine dipeptide job. A value out of range is a ValueError that names the key, the value and what
is allowed; `openmm_tsf.config` reads and writes files.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .architecture import cannot_explore
from .edg_settings import MolecularEDGSettings
from .flow import FlowSettings
from .training import TrainingSettings
from .weights import FEWEST

MODELS = ("ff96-obc1", "ff99sbildn-obc2", "vacuum")
TIMESTEP_FS = {False: 1.0, True: 2.0}
"""Default time step [fs] without and with constrained bonds."""
EXPLORE = 0.1
"""Share of the draws that explore by default."""
N_FRAMES = {"flow": 400_000, "edg": 4_000}
N_DRAWS = {"flow": 100_000, "edg": 10_000}
"""Frames of the dynamics and draws of an ensemble by default, of each model."""


@dataclass(frozen=True)
class MoleculeSettings:
    """What is simulated: a built-in model, or the user's files.

    Args:
        model: a model of `alanine_dipeptide`; the default where no `structure` is given.
        structure: PDB, mmCIF or inpcrd file.
        parameters: prmtop or serialized System XML that goes with it.
        force_field: OpenMM force-field XMLs, built-in names or files.
        implicit_solvent: solvent for a prmtop: "HCT", "OBC1", "OBC2", "GBn" or "GBn2".
        constraints: "none", "HBonds", "AllBonds" or "HAngles".
        name: for file names and titles.
    """

    model: Literal["ff96-obc1", "ff99sbildn-obc2", "vacuum"] | None = None
    structure: str | None = None
    parameters: str | None = None
    force_field: tuple[str, ...] = ()
    implicit_solvent: Literal["HCT", "OBC1", "OBC2", "GBn", "GBn2"] | None = None
    constraints: Literal["none", "HBonds", "AllBonds", "HAngles"] = "none"
    name: str | None = None

    def __post_init__(self) -> None:
        files = [n for n in ("parameters", "force_field", "implicit_solvent", "name") if getattr(self, n)]
        if self.structure is None and files:
            raise ValueError(f"{files[0]} has no effect without structure, a file with the coordinates")
        if self.structure is not None and self.model is not None:
            raise ValueError(f"model = {self.model!r} and structure = {self.structure!r} exclude each other")
        if self.structure is None and self.model is None:
            object.__setattr__(self, "model", MODELS[0])


@dataclass(frozen=True)
class ZMatrixSettings:
    """Changes to the automatic internal coordinates; atoms by label as in "ALA2-CA" (`openmm-tsf info FLOW` has them).

    Args:
        root: three atoms to begin with.
        references: atom to the three atoms that it hangs on by bond, angle and torsion.
        kinds: atom to the kind of its torsion. "soft" lifts the cis/trans bound of a "planar" one.
    """

    root: tuple[str, ...] = ()
    references: dict[str, tuple[str, ...]] = field(default_factory=dict)
    kinds: dict[str, Literal["soft", "planar", "stiff"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what, atoms in {"root": self.root or ("",) * 3, **self.references}.items():
            if len(atoms) != 3:
                raise ValueError(f"{what} names {len(atoms)} atoms ({', '.join(atoms)}): must be 3")


@dataclass(frozen=True)
class EnergySettings:
    """What computes energies, in every stage.

    Args:
        engine: "batched" (whole batches at once) or "openmm"; by default batches where the force field allows and none
            of the other keys is given, which are OpenMM's.
        platform: "CUDA", "OpenCL", "HIP", "CPU" or "Reference"; by default the fastest that works.
        precision: of the CUDA and OpenCL platforms.
        device_index: which GPU.
    """

    engine: Literal["batched", "openmm"] | None = None
    platform: str | None = None
    precision: Literal["single", "mixed", "double"] | None = None
    device_index: int | None = None

    def __post_init__(self) -> None:
        _at_least(self, 0, "device_index")
        given = [key for key in ("platform", "precision", "device_index") if getattr(self, key) is not None]
        if self.engine == "batched" and given:
            raise ValueError(f'{given[0]} = {getattr(self, given[0])!r} is for engine = "openmm"')


@dataclass(frozen=True)
class SimulateSettings:
    """The training frames: dynamics at one temperature, or a trajectory that the user has.

    Args:
        temperature: of the dynamics, or of the trajectory [K].
        n_frames: frames kept, of all walkers together; by default 400,000 to train a flow, and 4,000 for a diffusion
            generator, which takes its coordinates from them and nothing else.
        spacing_fs: time between kept frames of a walker [fs].
        n_walkers: independent trajectories; by default 128 in batches and 8 with OpenMM.
        timestep_fs: [fs]; by default 1 without and 2 with constrained bonds.
        friction_per_ps: of Langevin dynamics [1/ps].
        equilibration_ps: time dropped at the beginning of each walker [ps].
        trajectory: any file that mdtraj reads; nothing is simulated then.
        trajectory_walkers: rows of the trajectory that belong to one time, if walkers take turns in it.
        trajectory_stride: keep every n-th frame of it.
    """

    temperature: float = 600.0
    n_frames: int | None = None
    spacing_fs: float = 20.0
    n_walkers: int | None = None
    timestep_fs: float | None = None
    friction_per_ps: float = 1.0
    equilibration_ps: float = 20.0
    trajectory: str | None = None
    trajectory_walkers: int = 1
    trajectory_stride: int = 1

    def __post_init__(self) -> None:
        _above_zero(self, "temperature", "spacing_fs", "timestep_fs", "friction_per_ps")
        _at_least(self, 1, "n_walkers", "trajectory_walkers", "trajectory_stride")
        _at_least(self, 2, "n_frames")
        _at_least(self, 0, "equilibration_ps")
        if self.timestep_fs is not None and not math.isclose(
            self.spacing_fs / self.timestep_fs, max(1, round(self.spacing_fs / self.timestep_fs)), rel_tol=1e-9
        ):
            raise ValueError(
                f"spacing_fs = {self.spacing_fs:g} must be a multiple of timestep_fs = {self.timestep_fs:g}"
            )


@dataclass(frozen=True)
class SampleSettings:
    """The ensembles drawn from the trained model.

    Args:
        temperatures: targets [K]; the training temperature is always drawn besides.
        n: valid draws at each temperature; by default 100,000 of a flow, and 10,000 of a diffusion generator, whose
            weights take an equation each.
        explore: share of the draws spread over all basins of the backbone, so that rare ones are seen often enough; by
            default a tenth, and none in kinds of flows that cannot.
    """

    temperatures: tuple[float, ...] = (300.0,)
    n: int | None = None
    explore: float | None = None

    def __post_init__(self) -> None:
        if not self.temperatures:
            raise ValueError("temperatures = [] must name at least one temperature in K")
        bad = [t for t in self.temperatures if not (math.isfinite(t) and t > 0.0)]
        if bad:
            raise ValueError(f"temperatures holds {bad[0]:g}: must be finite and above 0 K")
        _at_least(self, 1, "n")
        if self.explore is not None and not 0.0 <= self.explore < 1.0:
            raise ValueError(f"explore = {self.explore:g} must be at least 0 and below 1")


@dataclass(frozen=True)
class Config:
    """All of a run.

    Args:
        seed: fixes the random numbers of every stage.
        model: what is trained: "flow", on frames and energies, or "edg", a diffusion generator, on energies alone.
        edg: of model = "edg", whose settings are in this table and in neither [flow] nor [train].
    """

    seed: int = 1
    model: Literal["flow", "edg"] = "flow"
    molecule: MoleculeSettings = field(default_factory=MoleculeSettings)
    energy: EnergySettings = field(default_factory=EnergySettings)
    simulate: SimulateSettings = field(default_factory=SimulateSettings)
    zmatrix: ZMatrixSettings = field(default_factory=ZMatrixSettings)
    flow: FlowSettings = field(default_factory=FlowSettings)
    train: TrainingSettings = field(default_factory=TrainingSettings)
    sample: SampleSettings = field(default_factory=SampleSettings)
    edg: MolecularEDGSettings | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed = {self.seed} must lie in 0 ... 2147483647")
        self._settle_model()
        self.train.takes_paths(self.flow.kind, cut=self.flow.on_lines)
        self._settle_explore()
        if self.simulate.timestep_fs is None:
            self._settle("simulate", timestep_fs=TIMESTEP_FS[self.molecule.constraints != "none"])
        if self.simulate.n_frames is None:
            self._settle("simulate", n_frames=N_FRAMES[self.model])
        if self.sample.n is None:
            self._settle("sample", n=N_DRAWS[self.model])

    def _settle(self, table: str, **values: Any) -> None:
        object.__setattr__(self, table, replace(getattr(self, table), **values))

    def _settle_model(self) -> None:
        if self.model == "flow":
            if self.edg is not None:
                raise ValueError('[edg] has no effect on model = "flow"; did you mean model = "edg"?')
            return
        for table, default in (("flow", FlowSettings()), ("train", TrainingSettings())):
            if getattr(self, table) != default:
                raise ValueError(f'[{table}] has no effect on model = "edg", whose settings are in [edg]')
        if self.sample.n is not None and self.sample.n < FEWEST:
            raise ValueError(f"sample.n = {self.sample.n}: fewer than {FEWEST} weights do not say what they are worth")
        own = self.edg or MolecularEDGSettings()
        wanted = (self.simulate.temperature, *self.sample.temperatures)
        low, high = min(wanted), max(wanted)
        if own.temperatures is None:
            own = replace(own, temperatures=(low,) if low == high else (low, high))
        elif not own.temperatures[0] <= low <= high <= own.temperatures[-1]:
            raise ValueError(
                f"edg.temperatures = {list(own.temperatures)} must have {low:g} and {high:g} K between them, which are "
                "the extremes of simulate.temperature and sample.temperatures"
            )
        object.__setattr__(self, "edg", own)

    def _settle_explore(self) -> None:
        share = self.sample.explore
        if share is None:
            self._settle("sample", explore=EXPLORE if self.explores else 0.0)
        elif share > 0.0 and not self.explores:
            why = 'model = "edg" has no' if self.model == "edg" else None
            why = f"{why} potentials of torsions to warm" if why else cannot_explore(self.flow)
            raise ValueError(f"sample.explore = {share:g}: {why}; leave it out, or 0")

    @property
    def explores(self) -> bool:
        """Whether draws can be spread over basins."""
        return self.model == "flow" and self.flow.explores


def stage_seed(seed: int, purpose: str) -> int:
    """A seed for one purpose in 0 ... 2**31 - 1, so that stages do not share random numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:4], "big") >> 1


def _above_zero(settings: Any, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and not (math.isfinite(value) and value > 0.0):
            raise ValueError(f"{name} = {value:g} must be finite and above 0")


def _at_least(settings: Any, least: int, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value >= least:
            raise ValueError(f"{name} = {value:g} must be at least {least}")
