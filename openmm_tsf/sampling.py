"""Behind `openmm-tsf sample` and `openmm-tsf info`: any flow at any temperature, and what flows and machines say."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch

from . import __version__
from .analysis import alpha_left, phi_psi
from .architecture import cannot_explore
from .checkpoint import flow_info, flow_path, load_flow
from .edg.molecular import MolecularEDG
from .edg_checkpoint import load_molecular_edg, molecular_edg_info
from .energy import BatchedEnergy, choose_energy
from .energy.platforms import available_platforms, n_cores
from .energy.unsupported import UnsupportedForce
from .ensemble import Ensemble, draw
from .flow import Flow, FlowSettings
from .report import share_bound, unseen
from .settings import EXPLORE
from .stages import MODEL_FILE, ensemble_name, save_frames
from .systems import Molecule
from .tune_stage import tuned_temperature
from .weights import FEWEST

FRAME_FORMATS = (".dcd", ".xtc", ".trr", ".nc", ".pdb", ".gro", ".xyz")
"""Endings that get equally likely frames; only .npz gets the draws with their weights."""
SHOWN_VERSIONS = ("torch", "openmm", "openmmtools", "mdtraj", "nglview", "numpy")


def sample_to_file(
    source: str, temperature: float, *, n: int, out: Path | None, at: float | None, explore: float | None, seed: int,
    tuned: bool = False, engine: str | None = None, platform: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> tuple[dict[str, str], Path]:  # fmt: skip
    """Draw an ensemble and write it; everything that can go wrong with the file is tried before the work is done.

    Args:
        source: as in `flow_path`; or a diffusion generator, or the directory of its run.
        temperature: of the ensemble [K].
        n: number of draws.
        out: file; its ending says what is written. By default ensemble_<T>K.npz in the present folder.
        at: temperature the model runs at [K]; by default that of the ensemble.
        explore: share of the draws spread over all basins; by default a tenth, and none where the flow cannot.
        seed: of the draws.
        tuned: the flow runs at t* times the temperature, see `tuned_temperature`.
        engine, platform: as in `choose_energy`.
        progress: told of the draws.

    Returns:
        rows to show, and the path written.

    Warns:
        UserWarning: the flow cannot explore, and it was not said that it should not.
    """
    out = Path(f"{ensemble_name(temperature)}.npz") if out is None else out
    _check_target(out)
    flow = load_source(source)
    if isinstance(flow, MolecularEDG):
        explore = _of_generators(tuned, explore)
    elif explore is None:
        explore = EXPLORE if flow.settings.explores else 0.0
        if explore == 0.0:
            warnings.warn(f"no draws explore: {cannot_explore(flow.settings)}", stacklevel=2)
    energy = choose_energy(flow.molecule.system, flow.molecule.positions, n=n, engine=engine, platform=platform)
    generator = torch.Generator().manual_seed(seed)
    how = ""
    if tuned:
        at, how = tuned_temperature(source, flow, energy, temperature, seed, progress)
    begin = time.perf_counter()
    ensemble = draw(
        flow, energy, temperature=temperature, n=n, generator=generator, at=at, explore=explore, progress=progress
    )
    seconds = time.perf_counter() - begin
    if out.suffix == ".npz":
        ensemble.save(out)
    else:
        save_frames(ensemble, flow.molecule, out, generator)
    rows = figures(ensemble, flow.molecule)
    if at is not None:
        rows["run at"] = f"{at:.4g} K, weighed for {temperature:g} K" + (how and f"; t* = {at / temperature:.4g} {how}")
    if isinstance(flow, MolecularEDG):
        bound, error = ensemble.log_z_bound, ensemble.log_z_error
        rows["ln Z"] = f"{ensemble.log_z:.3f} ± {error:.2g} nat; lower bound {bound:.3f} nat"
    if ensemble.sampling_temperature != flow.training_temperature and not steers(flow):
        rows["steering"] = steering_of(flow)
    return rows | {"time": f"{seconds:.1f} s ({n / seconds:.0f} draws/s)"}, out


def load_source(source: str) -> Flow | MolecularEDG:
    """The flow or the diffusion generator that a path, a run directory or a pretrained name means.

    Raises:
        FileNotFoundError, ValueError: there is none; see `flow_path`, `load_flow` and `load_molecular_edg`.
    """
    path = generator_path(source)
    return load_flow(flow_path(source)) if path is None else load_molecular_edg(path)


def generator_path(source: str) -> Path | None:
    """The diffusion generator that a path or a run directory means; None where they mean something else."""
    path = Path(source)
    own = path / MODEL_FILE["edg"] if path.is_dir() else path
    return own if own.suffix == ".edg" and own.exists() else None


def _of_generators(tuned: bool, explore: float | None) -> float:
    """Share of the draws of a diffusion generator that explore: none.

    Raises:
        ValueError: something is asked for that is of flows.
    """
    if tuned:
        raise ValueError("--tuned is for flows; a diffusion generator runs at the temperature of --at")
    if explore:
        raise ValueError(f"--explore {explore:g} is for flows: a diffusion generator has no potentials of torsions")
    return 0.0


def steers(model: Flow | MolecularEDG) -> bool:
    """Whether one energy serves every temperature."""
    return isinstance(model, Flow) and model.settings.steers


def steering_of(model: Flow | MolecularEDG) -> str:
    """Whether a model steers, in words."""
    if isinstance(model, MolecularEDG):
        low, high = model.temperatures
        return f"learned from {low:g} to {high:g} K, not exact" if model.settings.conditioned else "none"
    return steering(model.settings)


def steering(settings: FlowSettings) -> str:
    """Whether a flow steers, in words."""
    if settings.steers:
        return "exact"
    return f"none: flows of kind {settings.kind!r} change shape with temperature in ways of their own"


def figures(ensemble: Ensemble, molecule: Molecule) -> dict[str, str]:
    """What says how far to trust an ensemble, ready to print: names and values with units."""
    mean, error = ensemble.mean(ensemble.energy)
    few = "" if len(ensemble) + ensemble.n_rejected >= FEWEST else "; too few draws to tell"
    rows = {
        "draws": f"{len(ensemble)}, and {ensemble.n_rejected} rejected on the way (counted as zero weights)",
        "effective sample size": f"{100 * ensemble.ess:.3g} % (Kish, unclipped{few})",
        "largest weight": f"{100 * ensemble.largest_weight_share:.3g} % of all",
        "mean energy": f"{float(mean):.2f} ± {float(error):.2f} kJ/mol",
    }
    try:
        phi, _ = phi_psi(ensemble.positions, molecule)
    except ValueError:  # no residue with both torsions
        return rows
    members = torch.as_tensor(alpha_left(phi)).double()
    share, error = map(float, ensemble.mean(members))
    raw, bound = float(members.mean()), share_bound(share, error, ensemble.n_effective)
    found = f"{100 * share:.3g} ± {100 * error:.2g} %" if bound is None else unseen(len(ensemble), raw, bound)
    rows["alpha_L share"] = f"{found} reweighted, {100 * raw:.3g} % raw"
    return rows


def describe_flow(source: str) -> tuple[str, dict[str, str], str]:
    """Title, rows and z-matrix: what a checkpoint says about itself."""
    if (generator := generator_path(source)) is not None:
        return _describe_generator(generator)
    path = flow_path(source)
    facts, flow = flow_info(path), load_flow(path)
    facts["settings"] = asdict(flow.settings) | {"momenta": flow.settings.has_momenta}
    rows = {
        "molecule": facts["molecule"],
        "trained at": f"{facts['training_temperature']:g} K",
        "steering": steering_of(flow),
        "momenta": f"{flow.n_momenta}, as many as coordinates" if flow.n_momenta else "none",
        "numbers": f"{facts['n_numbers']:,}",
        **{name: ", ".join(f"{k} {v}" for k, v in facts[name].items()) for name in ("settings", "extra", "versions")},
        "sha256": facts["sha256"],
        "format": facts["format"],
    }
    return str(path), rows, f"{_energy_table(flow.molecule)}\n\ninternal coordinates\n{flow.zmatrix}"


def _describe_generator(path: Path) -> tuple[str, dict[str, str], str]:
    facts, generator = molecular_edg_info(path), load_molecular_edg(path)
    low, high = generator.temperatures
    rows = {
        "molecule": facts["molecule"],
        "model": "diffusion generator",
        "trained at": f"{low:g} K" if low == high else f"{low:g} to {high:g} K",
        "steering": steering_of(generator),
        "numbers": f"{facts['n_numbers']:,}",
        **{name: ", ".join(f"{k} {v}" for k, v in facts[name].items()) for name in ("settings", "extra", "versions")},
        "sha256": facts["sha256"],
        "format": facts["format"],
    }
    return str(path), rows, f"{_energy_table(generator.molecule)}\n\ninternal coordinates\n{generator.zmatrix}"


def describe_machine() -> tuple[str, dict[str, str], str]:
    """Title, rows and nothing more: versions, OpenMM platforms, cores and devices."""
    rows = {"openmm-tsf": __version__, **{name: _version(name) for name in SHOWN_VERSIONS}}
    rows["OpenMM platforms"] = ", ".join(available_platforms())
    rows["cores"] = str(n_cores())
    gpu = torch.cuda.is_available()
    rows["CUDA in torch"] = torch.cuda.get_device_name() if gpu else "none"
    return "openmm-tsf", rows, ""


def _energy_table(molecule: Molecule) -> str:
    """The terms of the batched energy beside OpenMM's."""
    try:
        energy = BatchedEnergy(molecule.system, molecule.positions, verify=False)
    except UnsupportedForce as error:
        return f"energies one by one with OpenMM: {error}"
    found = energy.agreements(molecule.positions)
    n = found[0].n if found else 0
    lines = [f"energies in batches, compared with OpenMM's Reference platform on {n} geometries"]
    lines += [f"  {'term':24} {'largest, kJ/mol':>16} {'difference':>11} {'of forces':>10}"]
    for a in found:
        note = "" if a.allowed else "   NOT WITHIN ROUNDING"
        lines.append(f"  {a.label:24} {a.energy:16.4f} {a.energy_error:11.1e} {a.force_error:10.1e}{note}")
    return "\n".join(lines)


def _check_target(out: Path) -> None:
    if out.suffix not in (".npz", *FRAME_FORMATS):
        raise ValueError(f"{out}: write .npz (draws with weights) or frames as {', '.join(FRAME_FORMATS)}")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(2, "no such folder", str(out.absolute().parent))
    if out.is_dir() or not os.access(out.absolute().parent, os.W_OK):
        raise PermissionError(13, "cannot be written", str(out))


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
