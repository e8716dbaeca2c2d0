"""Bonds, angles, torsions and maps, harmonic and custom: each term alone against OpenMM's Reference platform."""

import copy
import math
import pickle
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import openmm
import pytest
import torch
from openmm import unit
from torch.fx.experimental.proxy_tensor import make_fx

from openmm_tsf.energy import bonded, cmap, custom
from openmm_tsf.energy.unsupported import UnsupportedForce, check_atoms, plain
from openmm_tsf.systems import alanine_dipeptide

A = 22
PARAMETERS = {"scale": 1.7, "tilt": 4.0}
"""Global parameters, by values that are not the defaults of the forces."""


def rows(size: int, n: int, seed: int) -> list[list[int]]:
    """n random tuples of different atoms."""
    rng = np.random.default_rng(seed)
    return [[int(i) for i in rng.choice(A, size, replace=False)] for _ in range(n)]


def random_numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def molecular(name: str) -> openmm.Force:
    """A force of alanine dipeptide."""
    system = alanine_dipeptide().system  # by name: forces do not keep their System alive
    return next(copy.deepcopy(force) for force in system.getForces() if type(force).__name__ == name)


def periodic_torsions() -> openmm.PeriodicTorsionForce:
    """Shared quadruples, some of them in reverse, any phase, and periodicities that leave gaps."""
    force, numbers = openmm.PeriodicTorsionForce(), random_numbers(1, 30, 2)
    for row, atoms in enumerate(rows(4, 10, 2) * 3):
        force.addTorsion(
            *(atoms if row < 10 else atoms[::-1]), 1 + row % 7, 3.0 * numbers[row, 0], 8.0 * numbers[row, 1]
        )
    return force


def rb_torsions() -> openmm.RBTorsionForce:
    force = openmm.RBTorsionForce()
    for atoms, numbers in zip(rows(4, 10, 3), random_numbers(4, 10, 6), strict=True):
        force.addTorsion(*atoms, *(8.0 * numbers))
    force.addTorsion(0, 1, 2, 3, 5.0, 0, 0, 0, 0, 0)
    return force


def cmap_torsions(*sizes: int) -> openmm.CMAPTorsionForce:
    force = openmm.CMAPTorsionForce()
    for size in sizes:
        force.addMap(size, 4.0 * random_numbers(size, size * size))
    for row, (one, two) in enumerate(zip(rows(4, 8, 5), rows(4, 8, 6), strict=True)):
        force.addTorsion(row % len(sizes), *one, *two)
    force.addTorsion(0, 4, 6, 8, 14, 6, 8, 14, 16)
    return force


def custom_force(kind: str, text: str, names: str, size: int) -> openmm.Force:
    """A custom force with parameters between 0.2 and 1.8 in each of eight rows."""
    force = getattr(openmm, "CustomExternalForce" if kind == "Particle" else f"Custom{kind}Force")(text)
    for name in names.split():
        getattr(force, f"addPer{kind}Parameter")(name)
    for name in PARAMETERS:
        force.addGlobalParameter(name, 1.0)
    for atoms, numbers in zip(rows(size, 8, 7), np.random.default_rng(8).uniform(0.2, 1.8, (8, 9)), strict=True):
        getattr(force, f"add{kind}")(*atoms, list(numbers[: len(names.split())]))
    return force


FORCES = {
    "bonds": lambda: molecular("HarmonicBondForce"),
    "angles": lambda: molecular("HarmonicAngleForce"),
    "torsions": lambda: molecular("PeriodicTorsionForce"),
    "random torsions": periodic_torsions,
    "rb torsions": rb_torsions,
    "maps": lambda: cmap_torsions(24, 2, 3, 7),
    "custom bonds": lambda: custom_force("Bond", "scale*k*(1-exp(-a*d))^2 + tilt*r; d = r-r0", "k a r0", 2),
    "custom angles": lambda: custom_force("Angle", "50*scale*k*(theta-theta0)^2 + tilt*cos(2*theta)", "k theta0", 3),
    "custom torsions": lambda: custom_force(
        "Torsion", "k*min(d, 6.283185307179586-d)^2 + tilt*sin(theta); d = abs(theta-theta0)", "k theta0", 4
    ),
    "custom external": lambda: custom_force("Particle", "k*(x-x0)^2 + scale*y*z^2 + tilt*tanh(x*y)", "k x0", 1),
    "constant": lambda: custom_force("Bond", "scale*k", "k", 2),
    "constants alone": lambda: custom_force("Angle", "scale + tilt", "", 3),
}
READERS = {
    "HarmonicBondForce": bonded.read_harmonic_bonds,
    "HarmonicAngleForce": bonded.read_harmonic_angles,
    "PeriodicTorsionForce": bonded.read_periodic_torsions,
    "RBTorsionForce": bonded.read_rb_torsions,
    "CMAPTorsionForce": cmap.read_cmap_torsions,
    "CustomBondForce": custom.read_custom_bonds,
    "CustomAngleForce": custom.read_custom_angles,
    "CustomTorsionForce": custom.read_custom_torsions,
    "CustomExternalForce": custom.read_custom_external,
}
CURVED = [name for name in FORCES if not name.startswith("constant")]


def read(force: openmm.Force) -> torch.nn.Module | None:
    return READERS[type(force).__name__](force, PARAMETERS, A)


def evaluate(term, positions: np.ndarray, dtype: torch.dtype = torch.float64) -> tuple[np.ndarray, np.ndarray]:
    """Energies (B,) and forces (B, A, 3) of a term."""
    x = torch.tensor(positions, dtype=dtype).permute(1, 2, 0).contiguous().requires_grad_()
    energies = copy.deepcopy(term).to(dtype)(SimpleNamespace(positions=x))
    (gradient,) = torch.autograd.grad(energies.sum(), x)
    assert energies.dtype == gradient.dtype == dtype
    return energies.detach().numpy().astype(float), -gradient.permute(2, 0, 1).numpy().astype(float)


def openmm_says(force: openmm.Force, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Energies (B,) and forces (B, A, 3) of one force on the Reference platform."""
    system = openmm.System()
    for _ in range(A):
        system.addParticle(1.0)
    system.addForce(copy.deepcopy(force))
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
    for name in set(PARAMETERS) & set(context.getParameters()):
        context.setParameter(name, PARAMETERS[name])
    energies, forces = [], []
    for x in positions:
        context.setPositions(x)
        state = context.getState(energy=True, forces=True)
        energies.append(state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole))
        forces.append(state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer))
    return np.array(energies), np.array(forces)


@dataclass
class Limits:
    """Allowed differences: of energies [kJ/mol] and relative, of forces relative to the largest one."""

    energy: float
    relative: float
    force: float


LIMITS = {torch.float64: Limits(1e-6, 1e-9, 1e-8), torch.float32: Limits(2e-3, 1e-5, 1e-4)}


def differs(found: tuple, wanted: tuple, limits: Limits, largest: float | None = None) -> str:
    """What is wrong with energies and forces, nothing if they are within the limits.

    Args:
        largest: force to compare with [kJ/mol/nm], the largest of each configuration by default.
    """
    (energies, forces), (expected, expected_forces) = found, wanted
    energy = np.abs(energies - expected) / (limits.energy + limits.relative * np.abs(expected))
    size = np.abs(expected_forces).max(axis=(1, 2)) if largest is None else largest
    force = np.abs(forces - expected_forces).max(axis=(1, 2)) / (limits.force * np.where(size == 0.0, 1.0, size))
    said = []
    for what, ratio in (("energy", energy), ("force", force)):
        if not (ratio <= 1.0).all():
            said.append(f"{what} off by {np.nanmax(ratio):.3g} times the limit")
    return ", ".join(said)


@pytest.fixture(scope="module")
def frames() -> dict[str, np.ndarray]:
    """Geometries (B, A, 3) [nm] of every kind."""
    molecule = np.array(alanine_dipeptide().positions)
    return {
        "perturbed": molecule + 0.02 * random_numbers(11, 40, A, 3),
        "random": 0.3 * random_numbers(12, 40, A, 3),
        "clashing": 0.02 * random_numbers(13, 40, A, 3),
        "huge": 5.0 * random_numbers(14, 40, A, 3),
    }


# --- equal to OpenMM --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", FORCES)
def test_equals_openmm(frames, name, dtype):
    force = FORCES[name]()
    term = read(force)
    assert term.label == type(force).__name__
    for kind, x in frames.items():
        x = torch.tensor(x, dtype=dtype).double().numpy()
        wanted = openmm_says(force, x)
        assert name not in CURVED or np.ptp(wanted[0]) > 0.1
        assert not differs(evaluate(term, x, dtype), wanted, LIMITS[dtype]), kind


def flipped(term, buffer: str) -> None:
    getattr(term, buffer).neg_()


def transposed_maps(term) -> None:
    term.first, term.second = term.second, term.first


BREAKAGE = {
    "bond length": ("bonds", lambda term: term.centre.add_(1e-7)),
    "angle constant": ("angles", lambda term: term.half_k.mul_(1.0 + 1e-7)),
    "sign of the phase": ("random torsions", lambda term: flipped(term, "sines")),
    "phase of pi": ("rb torsions", lambda term: term.cosines[1].neg_()),
    "sign of phi": ("custom torsions", lambda term: term.columns[1].neg_()),
    "order of the torsions": ("maps", transposed_maps),
    "grid of the map": ("maps", lambda term: term.start.add_(1)),
    "global parameter": ("custom bonds", lambda term: term.constants.update(scale=1.0)),
}


@pytest.mark.parametrize("what", BREAKAGE)
def test_the_comparison_notices(frames, what):
    name, breaks = BREAKAGE[what]
    term, wanted = read(FORCES[name]()), openmm_says(FORCES[name](), frames["perturbed"])
    breaks(term)
    assert "energy" in differs(evaluate(term, frames["perturbed"]), wanted, LIMITS[torch.float64])


def test_names_that_clash_mean_what_they_mean_to_openmm(frames):
    force = custom_force("Bond", "scale*r*k + tilt", "k scale r", 2)
    assert not differs(
        evaluate(read(force), frames["random"]), openmm_says(force, frames["random"]), LIMITS[torch.float64]
    )


# --- near the singular geometries -------------------------------------------------------------------------------------


OPENINGS = np.array([1e-2, 1e-4, 1e-6, 1e-8])


def nearly_straight(openings: np.ndarray, end: float) -> np.ndarray:
    """Positions with an angle of atoms 0, 1, 2 that is these [rad] away from 0 (end > 0) or pi (end < 0)."""
    x = np.repeat(random_numbers(21, A, 3)[None], len(openings), axis=0)
    x[:, 0], x[:, 1] = [0.11, 0, 0], [0, 0, 0]
    x[:, 2] = np.stack([end * np.cos(openings), end * np.sin(openings), np.zeros(len(openings))], axis=1)
    return x


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("theta0", [0.0, 2.0, math.pi])
@pytest.mark.parametrize("end", [-0.13, 0.13])
def test_angles_near_the_line(end, theta0, dtype):
    force, limits = openmm.HarmonicAngleForce(), LIMITS[dtype]
    force.addAngle(0, 1, 2, theta0, 500.0)
    off = np.abs(OPENINGS - theta0 if end > 0 else math.pi - OPENINGS - theta0)
    x = nearly_straight(OPENINGS, end)
    found, wanted = evaluate(read(force), x, dtype), openmm_says(force, x)
    exact = 250.0 * off**2
    assert (np.abs(found[0] - exact) <= limits.energy + limits.relative * exact).all()
    pull = np.linalg.norm(found[1][:, 0], axis=1)
    assert pull == pytest.approx(500.0 * off / 0.11, rel=limits.force, abs=limits.force * 5.0 / 0.11)
    # OpenMM's own angle, an arccosine, is good to 1e-16 / opening, and its force dies out below 1e-4.
    assert (np.abs(wanted[0] - exact) <= limits.energy + limits.relative * exact + 500.0 * off * 1e-15 / OPENINGS).all()
    assert not differs([f[:1] for f in found], [w[:1] for w in wanted], limits)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize("end", [-0.13, 0.13])
def test_angles_on_the_line_have_an_energy_and_no_force(end, custom, dtype):
    force = openmm.CustomAngleForce("250*(theta-2)^2") if custom else openmm.HarmonicAngleForce()
    force.addAngle(0, 1, 2, *([[]] if custom else [2.0, 500.0]))
    x = nearly_straight(np.zeros(1), end)
    assert not differs(evaluate(read(force), x, dtype), openmm_says(force, x), LIMITS[dtype], 500.0 / 0.11)
    t = torch.tensor(x, dtype=dtype).permute(1, 2, 0).requires_grad_()
    (gradient,) = torch.autograd.grad(read(force).to(dtype)(SimpleNamespace(positions=t)).sum(), t, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum() + gradient.sum(), t)
    assert second.isfinite().all()


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("near", [0.0, math.pi / 2, math.pi])
@pytest.mark.parametrize("kind", ["PeriodicTorsionForce", "RBTorsionForce", "CustomTorsionForce", "CMAPTorsionForce"])
def test_torsions_near_the_plane(kind, near, dtype):
    atoms = (0, 1, 2, 3)
    if kind == "PeriodicTorsionForce":
        force = openmm.PeriodicTorsionForce()
        for n in range(1, 7):
            force.addTorsion(*atoms, n, 0.7 * n, 20.0)
    elif kind == "RBTorsionForce":
        force = openmm.RBTorsionForce()
        force.addTorsion(*atoms, 1.0, -20.0, 30.0, 5.0, -9.0, 12.0)
    elif kind == "CustomTorsionForce":
        force = openmm.CustomTorsionForce("20*(1+cos(3*theta-0.4))")
        force.addTorsion(*atoms, [])
    else:
        force = openmm.CMAPTorsionForce()
        force.addMap(8, 10.0 * random_numbers(31, 64))
        force.addTorsion(0, *atoms, *atoms)
    turns = [near + sign * d for d in (0.0, 1e-2, 1e-5, 1e-8, 1e-12) for sign in (-1, 1)]
    x = np.repeat(random_numbers(32, A, 3)[None], len(turns), axis=0)
    x[:, 0], x[:, 1], x[:, 2] = [0.1, 0, -0.04], [0, 0, 0], [0, 0, 0.15]
    x[:, 3] = [[0.09 * math.cos(turn), 0.09 * math.sin(turn), 0.2] for turn in turns]
    x = torch.tensor(x, dtype=dtype).double().numpy()
    wanted = openmm_says(force, x)
    assert not differs(evaluate(read(force), x, dtype), wanted, LIMITS[dtype], 100.0)


@pytest.mark.parametrize(
    ("name", "along"),
    [("bonds", {1: 0.1, 4: 0.1}), ("angles", {1: 0.1, 4: 0.1}), ("torsions", {1: 0.1, 4: 0.2, 6: 0.3})],
)
def test_what_has_no_direction_is_not_finite_and_leaves_its_neighbours_alone(frames, name, along):
    term, x = read(FORCES[name]()), frames["perturbed"][:3].copy()
    energies, forces = evaluate(term, x)
    for atom, place in along.items():
        x[1, atom] = place, 0.0, 0.0
    found, found_forces = evaluate(term, x)
    assert not (np.isfinite(found[1]) and np.isfinite(found_forces[1]).all())
    assert np.array_equal(found[[0, 2]], energies[[0, 2]])
    assert np.array_equal(found_forces[[0, 2]], forces[[0, 2]])


@pytest.mark.parametrize("name", CURVED)
def test_nan_stays_in_its_configuration(frames, name):
    term, x = read(FORCES[name]()), frames["perturbed"][:4].copy()
    good = evaluate(term, x)
    x[2] = math.nan
    energies, forces = evaluate(term, x)
    assert math.isnan(energies[2]) and np.isnan(forces[2]).any()
    assert np.array_equal(energies[[0, 1, 3]], good[0][[0, 1, 3]])
    assert np.array_equal(forces[[0, 1, 3]], good[1][[0, 1, 3]])


# --- maps -------------------------------------------------------------------------------------------------------------


def at_torsions(phi: np.ndarray, psi: np.ndarray) -> np.ndarray:
    """Positions with the torsions 0-1-2-3 and 4-5-6-7 [rad]."""
    x = np.repeat(random_numbers(41, A, 3)[None], len(phi), axis=0)
    for first, turn in ((0, phi), (4, psi)):
        x[:, first], x[:, first + 1], x[:, first + 2] = [0.1, 0, -0.04], [0, 0, 0], [0, 0, 0.15]
        x[:, first + 3] = np.stack([0.1 * np.cos(turn), 0.1 * np.sin(turn), np.full(len(turn), 0.2)], axis=1)
    return x


def one_map(size: int) -> openmm.CMAPTorsionForce:
    force = openmm.CMAPTorsionForce()
    force.addMap(size, 5.0 * random_numbers(42 + size, size * size))
    force.addTorsion(0, 0, 1, 2, 3, 4, 5, 6, 7)
    return force


@pytest.mark.parametrize("size", [2, 5, 24])
def test_maps_pass_through_their_values_and_are_smooth_at_cell_borders(size):
    force = one_map(size)
    i, j = (k.ravel() for k in np.meshgrid(range(size), range(size), indexing="ij"))
    step = 2.0 * math.pi / size
    values = np.array(plain(force.getMapParameters(0)[1]))[i + size * j]
    for h, tolerance in ((0.0, 1e-9), (1e-10, 1e-7), (-1e-10, 1e-7)):
        x = at_torsions(i * step + h, j * step - h)
        found, wanted = evaluate(read(force), x), openmm_says(force, x)
        assert np.abs(found[0] - values).max() < tolerance
        assert not differs(found, wanted, LIMITS[torch.float64], max(1.0, np.abs(wanted[1]).max()))


def test_maps_between_their_values():
    turns = np.random.default_rng(43).uniform(-math.pi, math.pi, (2, 300))
    x = at_torsions(*turns)
    for size in (2, 3, 10, 24):
        force = one_map(size)
        assert not differs(evaluate(read(force), x), openmm_says(force, x), LIMITS[torch.float64])


# --- derivatives and tracing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CURVED)
def test_second_derivatives(frames, name):
    term = read(FORCES[name]())
    x = torch.tensor(frames["perturbed"][:6]).permute(1, 2, 0).contiguous().requires_grad_()
    along = torch.tensor(random_numbers(51, *x.shape))

    def gradient(positions: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(term(SimpleNamespace(positions=positions)).sum(), positions, create_graph=True)[0]

    (found,) = torch.autograd.grad((gradient(x) * along).sum(), x)
    h = 1e-6
    wanted = (gradient(x + h * along) - gradient(x - h * along)) / (2 * h)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert wanted.abs().max() > 1.0


def energy_and_forces(term):
    def function(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        positions = positions.detach().requires_grad_()
        energies = term(SimpleNamespace(positions=positions))
        return energies.detach(), -torch.autograd.grad(energies.sum(), positions)[0]

    return function


@pytest.mark.parametrize("name", FORCES)
def test_traces_without_depending_on_the_numbers(frames, name):
    function = energy_and_forces(read(FORCES[name]()))
    x = torch.tensor(frames["perturbed"]).permute(1, 2, 0).contiguous()
    traced = make_fx(function)(x)
    for kind in ("perturbed", "random"):
        x = torch.tensor(frames[kind]).permute(1, 2, 0).contiguous()
        for found, wanted in zip(traced(x), function(x), strict=True):
            assert torch.allclose(found, wanted, rtol=1e-13, atol=0.0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, when it loads its compiler
def test_compiles(frames):
    terms = [read(FORCES[name]()) for name in ("angles", "random torsions", "maps", "custom torsions")]
    function = energy_and_forces(lambda geometry: sum(term(geometry) for term in terms))
    x = torch.tensor(frames["perturbed"]).permute(1, 2, 0).contiguous()
    compiled = torch.compile(make_fx(function)(x), dynamic=False)
    for found, wanted in zip(compiled(x), function(x), strict=True):
        assert (found - wanted).abs().max() < 1e-12 * wanted.abs().max()


@pytest.mark.parametrize("name", FORCES)
def test_copies_and_pickles(frames, name):
    term = read(FORCES[name]())
    for other in (copy.deepcopy(term), pickle.loads(pickle.dumps(term))):
        assert np.array_equal(evaluate(other, frames["random"])[0], evaluate(term, frames["random"])[0])
    dtypes = {buffer.dtype for buffer in copy.deepcopy(term).float().buffers()}
    assert dtypes <= {torch.float32, torch.int64}


# --- rows -------------------------------------------------------------------------------------------------------------


def test_each_quadruple_is_measured_once_and_zeros_are_left_out():
    force, term = FORCES["torsions"](), read(FORCES["torsions"]())
    found = [force.getTorsionParameters(k) for k in range(force.getNumTorsions())]
    kept = {min(tuple(row[:4]), tuple(row[3::-1])) for row in found if row[6]._value != 0.0}
    assert len(found) == 52
    assert term.cosines.shape == (5, len(kept), 1) and len(kept) == 25
    assert read(periodic_torsions()).cosines.shape[1] == 10


@pytest.mark.parametrize("name", READERS)
def test_no_rows(name):
    text = ["1"] if name.startswith("Custom") else []
    assert READERS[name](getattr(openmm, name)(*text), {}, A) is None


def test_rows_of_zeros():
    torsions, rb, bonds = openmm.PeriodicTorsionForce(), openmm.RBTorsionForce(), openmm.HarmonicBondForce()
    torsions.addTorsion(0, 1, 2, 3, 2, 0.5, 0.0)
    rb.addTorsion(0, 1, 2, 3, *[0.0] * 6)
    bonds.addBond(0, 1, 0.1, 0.0)
    assert read(torsions) is read(rb) is read(bonds) is None
    bonds.addBond(2, 1, 0.1, 10.0)
    assert len(read(bonds).centre) == 1


ROWS = {
    "HarmonicBondForce": lambda f, atom: f.addBond(3, atom, 0.1, 0.0),
    "HarmonicAngleForce": lambda f, atom: f.addAngle(3, 4, atom, 2.0, 0.0),
    "PeriodicTorsionForce": lambda f, atom: f.addTorsion(3, 4, atom, 5, 1, 0.0, 0.0),
    "RBTorsionForce": lambda f, atom: f.addTorsion(atom, 3, 4, 5, *[0.0] * 6),
    "CMAPTorsionForce": lambda f, atom: f.addTorsion(0, 3, 4, 5, 6, 3, 4, 5, atom),
    "CustomBondForce": lambda f, atom: f.addBond(atom, 3, [1.0, 1.0, 1.0]),
    "CustomAngleForce": lambda f, atom: f.addAngle(3, atom, 4, [1.0, 1.0]),
    "CustomTorsionForce": lambda f, atom: f.addTorsion(3, 4, 5, atom, [1.0, 1.0]),
    "CustomExternalForce": lambda f, atom: f.addParticle(atom, [1.0, 1.0]),
}
OF_CLASS = dict(zip(READERS, [FORCES[name] for name in (*CURVED[:3], *CURVED[4:])], strict=True))


@pytest.mark.parametrize("atom", [-1, A])
@pytest.mark.parametrize("name", ROWS)
def test_atoms_that_do_not_exist(name, atom):
    force = OF_CLASS[name]()
    row = ROWS[name](force, atom)
    with pytest.raises(ValueError, match=rf"^{name}: row {row} names atom {atom}; the System has atoms 0 to 21$"):
        read(force)


@pytest.mark.parametrize("name", [name for name in READERS if name != "CustomExternalForce"])
def test_periodic_boundaries_are_refused(name):
    force = OF_CLASS[name]()
    read(force)
    force.setUsesPeriodicBoundaryConditions(True)
    with pytest.raises(UnsupportedForce, match=rf"^{name} .*periodic boundary conditions.*; use OpenMMEnergy$"):
        read(force)


def test_periodic_distances_are_refused():
    force = openmm.CustomExternalForce("periodicdistance(x, y, z, 0, 0, 0)^2")
    force.addParticle(0, [])
    with pytest.raises(UnsupportedForce, match=r"^CustomExternalForce .*periodic.*; use OpenMMEnergy$"):
        read(force)


def test_a_bond_of_an_atom_with_itself_is_refused():
    force = openmm.HarmonicBondForce()
    force.addBond(7, 7, 0.1, 1.0)
    with pytest.raises(
        UnsupportedForce, match=r"^HarmonicBondForce: row 0 joins atom 7 to itself.*; use OpenMMEnergy$"
    ):
        read(force)
    assert check_atoms(force, 0, [7, 8, 7], A) == (7, 8, 7)


def test_rows_that_contradict_their_force():
    maps, torsions, bonds = cmap_torsions(4), openmm.PeriodicTorsionForce(), FORCES["custom bonds"]()
    maps.addTorsion(1, 0, 1, 2, 3, 4, 5, 6, 7)
    with pytest.raises(ValueError, match=r"CMAPTorsionForce: row 9 reads map 1; there are 1"):
        read(maps)
    with pytest.raises(ValueError, match=r"CMAPTorsionForce: map 0 is of size 1"):
        read(one_map(1))
    torsions.addTorsion(0, 1, 2, 3, 0, 0.5, 1.0)
    with pytest.raises(ValueError, match=r"PeriodicTorsionForce: row 0 has periodicity 0; it must be at least 1"):
        read(torsions)
    bonds.addBond(0, 1, [1.0])
    with pytest.raises(ValueError, match=r"CustomBondForce: row 8 has 1 parameters; the force names 3"):
        read(bonds)


@pytest.mark.parametrize(("text", "said"), [("k*nosuch(r)", "nosuch"), ("k*theta", "theta"), ("k*(r", "unbalanced")])
def test_expressions_that_mean_nothing(text, said):
    with pytest.raises(ValueError, match=rf"CustomBondForce.*{said}"):
        read(custom_force("Bond", text, "k", 2))


def test_global_parameters_of_other_forces_are_not_seen():
    force = openmm.CustomBondForce("scale*r")
    force.addBond(0, 1, [])
    with pytest.raises(ValueError, match=r"CustomBondForce.*scale"):
        read(force)


def test_plain_takes_off_units_of_any_size():
    values = plain([1.0 * unit.angstrom, 2, 3.0 * unit.kilocalorie_per_mole, 180.0 * unit.degree, np.float32(0.5)])
    assert values == pytest.approx([0.1, 2.0, 12.552, math.pi, 0.5])
    assert all(type(value) is float for value in values)
