"""Molecules to test with, each made here from numbers, and dynamics of them that anyone can repeat to the bit."""

from __future__ import annotations

import random
from functools import cache

import numpy as np
import openmm
import torch
from openmm import app, unit
from scipy.special import i0e
from torch import Tensor

from openmm_tsf.internals import FlatInternals
from openmm_tsf.systems import Molecule, alanine_dipeptide
from openmm_tsf.units import kT
from openmm_tsf.zmatrix import build_zmatrix

TETRAHEDRAL = 109.47
MASSES = {"C": 12.011, "H": 1.008, "N": 14.007, "O": 15.999}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def perturbed(flow: torch.nn.Module, size: float, seed: int = 9) -> torch.nn.Module:
    """Every parameter moved, those that start at zero too (last layers, Fourier coefficients)."""
    g = seeded(seed)
    for parameter in flow.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=g, dtype=parameter.dtype)
    return flow


def place(a: np.ndarray, b: np.ndarray, c: np.ndarray, r: float, theta: float, phi: float) -> np.ndarray:
    """The point at distance r [nm] from c, at angle theta to b and torsion phi to a [degrees]; an oracle."""
    theta, phi = np.deg2rad(theta), np.deg2rad(phi)
    axis = (c - b) / np.linalg.norm(c - b)
    normal = np.cross(b - a, axis)
    normal /= np.linalg.norm(normal)
    across = np.cross(normal, axis)
    return c + r * (-np.cos(theta) * axis + np.sin(theta) * (np.cos(phi) * across + np.sin(phi) * normal))


def handmade(name: str, atoms: list[tuple], extra_bonds: tuple[tuple[str, str], ...] = ()) -> Molecule:
    """A molecule without forces.

    Args:
        name: of the molecule.
        atoms: (name, bonded to, angle to, torsion to, r, theta, phi), shorter for the first three. The element is the
            first letter of the name.
        extra_bonds: bonds besides those to "bonded to", ring closures for example.
    """
    x: dict[str, np.ndarray] = {}
    topology = app.Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    system = openmm.System()
    made = {}
    for atom, *row in atoms:
        references, numbers = row[: len(row) // 2], row[len(row) // 2 :]
        if not references:
            x[atom] = np.zeros(3)
        elif len(references) == 1:
            x[atom] = x[references[0]] + np.array([numbers[0], 0.0, 0.0])
        elif len(references) == 2:
            bond, angle = (x[r] for r in references)
            x[atom] = place(angle + np.array([0.0, 1.0, 0.3]), angle, bond, *numbers, 0.0)
        else:
            bond, angle, torsion = (x[r] for r in references)
            x[atom] = place(torsion, angle, bond, *numbers)
        made[atom] = topology.addAtom(atom, app.Element.getBySymbol(atom[0]), residue)
        system.addParticle(MASSES[atom[0]])
        if references:
            topology.addBond(made[atom], made[references[0]])
    for one, two in extra_bonds:
        topology.addBond(made[one], made[two])
    return Molecule(system, topology, np.array(list(x.values())), name)


def with_system(molecule: Molecule, change) -> Molecule:
    """The molecule with `change(system)` applied to a copy of its System."""
    system = openmm.XmlSerializer.clone(molecule.system)
    change(system)
    return Molecule(system, molecule.topology, molecule.positions, molecule.name)


def mirrored(molecule: Molecule) -> Molecule:
    """The other enantiomer."""
    return Molecule(molecule.system, molecule.topology, molecule.positions * np.array([1.0, 1.0, -1.0]), "mirror image")


@cache
def trimer() -> Molecule:
    """Three carbons in a bent chain, no forces."""
    return handmade("trimer", [("C1",), ("C2", "C1", 0.15), ("C3", "C2", "C1", 0.15, 110.0)])


@cache
def rigid_trimer() -> Molecule:
    """The trimer with both bonds rigid: one degree of freedom, the angle."""

    def constrain(system: openmm.System) -> None:
        system.addConstraint(0, 1, 0.15)
        system.addConstraint(1, 2, 0.15)

    return with_system(trimer(), constrain)


@cache
def chain4() -> Molecule:
    """Four atoms in a chain: 3 bonds, 2 angles, 1 soft torsion; no forces."""
    rows = [("O1",), ("O2", "O1", 0.145), ("H1", "O1", "O2", 0.1, 100.0), ("H2", "O2", "O1", "H1", 0.1, 100.0, 110.0)]
    return handmade("chain", rows)


CHAIN4 = {"bond": 4e9, "angle": 300.0, "barrier": 6.0, "centre": 1.0}
"""Force constants of `harmonic_chain4` [kJ/mol/nm^6, kJ/mol, kJ/mol] and the minimum of its torsion [rad]."""


@cache
def harmonic_chain4() -> Molecule:
    """`chain4` with OpenMM forces that are harmonic in r^3/3 and cos theta, and a cosine of the torsion."""
    x = chain4().positions
    bond = openmm.CustomBondForce("0.5*k*(r^3/3 - q0)^2")
    angle = openmm.CustomAngleForce("0.5*k*(-cos(theta) - q0)^2")
    torsion = openmm.CustomTorsionForce("k*(1 - cos(theta - t0))")
    for add in (bond.addPerBondParameter, angle.addPerAngleParameter):
        add("k")
        add("q0")
    torsion.addPerTorsionParameter("k")
    torsion.addPerTorsionParameter("t0")
    for i, j in ((0, 1), (0, 2), (1, 3)):
        bond.addBond(i, j, [CHAIN4["bond"], np.linalg.norm(x[i] - x[j]) ** 3 / 3])
    for i, j, k in ((2, 0, 1), (0, 1, 3)):
        u, v = x[i] - x[j], x[k] - x[j]
        angle.addAngle(i, j, k, [CHAIN4["angle"], -u @ v / np.linalg.norm(u) / np.linalg.norm(v)])
    torsion.addTorsion(2, 0, 1, 3, [CHAIN4["barrier"], CHAIN4["centre"]])
    return with_system(chain4(), lambda system: [system.addForce(force) for force in (bond, angle, torsion)])


def chain4_internals(n: int, temperature: float, seed: int) -> Tensor:
    """n exact draws of the internals (n, 6) of `harmonic_chain4`, as FlatInternals has them."""
    rng, tau = np.random.default_rng(seed), kT(temperature)
    widths = np.sqrt(tau / np.array([CHAIN4["bond"]] * 3 + [CHAIN4["angle"]] * 2))
    q = internals_of("chain4").reference.numpy() + np.zeros((n, 1))
    q[:, :5] += widths * rng.normal(size=(n, 5))
    q[:, 5] = rng.vonmises(CHAIN4["centre"], CHAIN4["barrier"] / tau, size=n)
    return torch.tensor(q, dtype=torch.float64)


def chain4_log_z(temperature: float) -> float:
    """ln of the integral of exp(-U/kT) of `harmonic_chain4` over flat internals, in closed form."""
    tau = kT(temperature)
    kappa = CHAIN4["barrier"] / tau
    gaussians = 1.5 * np.log(2 * np.pi * tau / CHAIN4["bond"]) + np.log(2 * np.pi * tau / CHAIN4["angle"])
    return float(gaussians + np.log(2 * np.pi * i0e(kappa)))


BEND = 0.25
"""How far the angles of `coupled_energy` follow the torsion, in units of -cos(theta)."""


def coupled_energy(x: Tensor, bend: float = BEND) -> Tensor:
    """U (batch,) [kJ/mol] of chain4: as `harmonic_chain4`, but with angles that follow the cosine of the torsion."""
    internals = internals_of("chain4")
    q = internals.inverse(x)[0] - internals.reference.to(x)
    phi = q[:, 5] + float(internals.reference[5])
    bonds, angles = q[:, :3], q[:, 3:5] - bend * phi.cos()[:, None]
    harmonic = 0.5 * (CHAIN4["bond"] * (bonds**2).sum(1) + CHAIN4["angle"] * (angles**2).sum(1))
    return harmonic + CHAIN4["barrier"] * (1.0 - torch.cos(phi - CHAIN4["centre"]))


def coupled_frames(n: int, temperature: float, seed: int, bend: float = BEND) -> np.ndarray:
    """n exact draws (n, 4, 3) [nm] of exp(-U/kT) of `coupled_energy`; ln Z is that of `harmonic_chain4`."""
    q = chain4_internals(n, temperature, seed)
    q[:, 3:5] += bend * q[:, 5:].cos()
    return internals_of("chain4").forward(q)[0].numpy()


@cache
def harmonic_trimer() -> Molecule:
    """The trimer with OpenMM's own harmonic bonds and angle."""

    def add_forces(system: openmm.System) -> None:
        bonds, angles = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce()
        bonds.addBond(0, 1, *TRIMER["bond"])
        bonds.addBond(1, 2, *TRIMER["bond"])
        angles.addAngle(0, 1, 2, *TRIMER["angle"])
        system.addForce(bonds)
        system.addForce(angles)

    return with_system(trimer(), add_forces)


@cache
def rigid_harmonic_trimer() -> Molecule:
    """The trimer with both bonds rigid and a harmonic angle."""

    def add_force(system: openmm.System) -> None:
        angle = openmm.HarmonicAngleForce()
        angle.addAngle(0, 1, 2, *TRIMER["angle"])
        system.addForce(angle)

    return with_system(rigid_trimer(), add_force)


TRIMER = {"bond": (0.15, 1.5e5), "angle": (np.deg2rad(110.0), 150.0)}
"""Minimum and force constant [nm, kJ/mol/nm^2; rad, kJ/mol/rad^2]."""


def methyl(names: str, carbon: str, angle: str, torsion: str, phi: float = 60.0) -> list[tuple]:
    """Rows of as many hydrogens as there are letters in `names`, 120 degrees apart."""
    return [(f"H{carbon}{n}", carbon, angle, torsion, 0.109, TETRAHEDRAL, phi + 120.0 * i) for i, n in enumerate(names)]


@cache
def ethanol() -> Molecule:
    rows = [
        ("C1",),
        ("C2", "C1", 0.153),
        ("O3", "C2", "C1", 0.143, 109.0),
        ("HO", "O3", "C2", "C1", 0.096, 108.0, 60.0),
    ]
    rows += [("HC2a", "C2", "C1", "O3", 0.109, 110.0, 120.0), ("HC2b", "C2", "C1", "O3", 0.109, 110.0, -120.0)]
    return handmade("ethanol", rows + methyl("abc", "C1", "C2", "O3"))


@cache
def butane() -> Molecule:
    rows = [
        ("C1",),
        ("C2", "C1", 0.153),
        ("C3", "C2", "C1", 0.153, 112.0),
        ("C4", "C3", "C2", "C1", 0.153, 112.0, 175.0),
    ]
    for carbon, one, other in (("C2", "C1", "C3"), ("C3", "C2", "C4")):
        rows += [(f"H{carbon}{n}", carbon, one, other, 0.109, 110.0, phi) for n, phi in (("a", 120.0), ("b", -120.0))]
    return handmade("butane", rows + methyl("abc", "C1", "C2", "C3") + methyl("abc", "C4", "C3", "C2"))


@cache
def cyclopropane() -> Molecule:
    rows = [("C1",), ("C2", "C1", 0.151), ("C3", "C2", "C1", 0.151, 60.0)]
    for carbon, one, other in (("C1", "C2", "C3"), ("C2", "C1", "C3"), ("C3", "C1", "C2")):
        rows += [(f"H{carbon}{n}", carbon, one, other, 0.108, 118.0, phi) for n, phi in (("a", 110.0), ("b", -110.0))]
    return handmade("cyclopropane", rows, extra_bonds=(("C1", "C3"),))


@cache
def acetonitrile() -> Molecule:
    rows = [("C1",), ("C2", "C1", 0.146), ("N3", "C2", "C1", 0.116, 179.0), *methyl("abc", "C1", "C2", "N3")]
    return handmade("acetonitrile", rows)


PHI, PSI = -70.0, 140.0


@cache
def peptide(*residues: str, omega: float = 180.0) -> Molecule:
    """ACE-residues-NME of L-amino acids (ALA, GLY, PRO) in amber99sb-ildn and vacuum, relaxed.

    Args:
        residues: three-letter names.
        omega: torsion [degrees] of the peptide bond in front of the first residue.
    """
    names = ("ACE", *residues, "NME")
    x = _heavy_atoms(names, omega)
    topology = app.Topology()
    chain = topology.addChain()
    for i, name in enumerate(names):
        residue = topology.addResidue(name, chain)
        for _, atom in (key for key in x if key[0] == i):
            topology.addAtom(atom, app.Element.getBySymbol(atom[0]), residue)
    topology.createStandardBonds()
    ordered = np.array([x[key] for i in range(len(names)) for key in x if key[0] == i])
    return _with_hydrogens(topology, ordered, "-".join(names))


def _with_hydrogens(topology: app.Topology, x: np.ndarray, name: str) -> Molecule:
    force_field = app.ForceField("amber99sbildn.xml")
    modeller = app.Modeller(topology, x * unit.nanometer)
    reference = openmm.Platform.getPlatformByName("Reference")
    state = random.getstate()
    random.seed(1)  # where addHydrogens starts from
    try:
        modeller.addHydrogens(force_field, platform=reference)
    finally:
        random.setstate(state)
    system = force_field.createSystem(modeller.topology, nonbondedMethod=app.NoCutoff, constraints=None)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), reference)
    context.setPositions(modeller.positions)
    openmm.LocalEnergyMinimizer.minimize(context, 5.0)
    return Molecule(system, modeller.topology, context.getState(positions=True).getPositions(asNumpy=True), name)


def _heavy_atoms(names: tuple[str, ...], omega: float) -> dict[tuple[int, str], np.ndarray]:
    """Positions [nm] by (residue, atom), grown from N to C."""
    x = {(0, "CH3"): np.zeros(3), (0, "C"): np.array([0.1522, 0.0, 0.0]), (0, "O"): np.array([0.2144, 0.1060, 0.0])}

    def hang(atom: tuple[int, str], *references: tuple[int, str], at: tuple[float, float, float]) -> None:
        x[atom] = place(*(x[reference] for reference in reversed(references)), *at)

    for i, name in enumerate(names[1:], 1):
        first = i == 1
        carbonyl, alpha = (i - 1, "C"), (i - 1, "CH3" if first else "CA")
        n, ca, c, cb = ((i, atom) for atom in ("N", "C" if name == "NME" else "CA", "C", "CB"))
        hang(n, carbonyl, alpha, (0, "O") if first else (i - 1, "N"), at=(0.1335, 116.6, 180.0 if first else PSI))
        hang(ca, n, carbonyl, alpha, at=(0.1449, 121.9, omega if first else 180.0))
        if not first:
            hang((i - 1, "O"), carbonyl, n, ca, at=(0.1229, 122.9, 0.0))
        if name == "NME":
            break
        hang(c, ca, n, carbonyl, at=(0.1522, 111.1, PHI))
        if name != "GLY":
            hang(cb, ca, n, c, at=(0.1526, 104.0 if name == "PRO" else 110.0, -120.0))
        if name == "PRO":
            hang((i, "CG"), cb, ca, n, at=(0.150, 104.0, 28.0))
            hang((i, "CD"), (i, "CG"), cb, ca, at=(0.150, 106.0, -37.0))
    return x


MOLECULES = {
    "ala2": lambda: alanine_dipeptide("vacuum"),
    "ala2 rigid": lambda: alanine_dipeptide("vacuum", constraints="HBonds"),
    "trimer": harmonic_trimer,
    "rigid trimer": rigid_harmonic_trimer,
    "chain4": harmonic_chain4,
    "ethanol": ethanol,
    "butane": butane,
    "cyclopropane": cyclopropane,
    "proline": lambda: peptide("PRO"),
    "cis proline": lambda: peptide("PRO", omega=0.0),
    "three residues": lambda: peptide("ALA", "GLY", "ALA"),
}
"""Molecules by name, made when called."""


@cache
def internals_of(name: str) -> FlatInternals:
    """Internals of one of MOLECULES, with the automatic z-matrix."""
    molecule = MOLECULES[name]()
    return FlatInternals(molecule, build_zmatrix(molecule))


@cache
def frames_of(name: str, n: int) -> np.ndarray:
    """n frames (n, A, 3) [nm] of one of MOLECULES at 600 K; read-only."""
    frames = dynamics(MOLECULES[name](), n, spacing=40)
    frames.flags.writeable = False
    return frames


def dynamics(
    molecule: Molecule, n: int, *, temperature: float = 600.0, spacing: int = 100, seed: int = 1, dt: float = 1e-3
) -> np.ndarray:
    """n frames (n, A, 3) [nm] of Langevin dynamics, `spacing` steps of dt [ps] apart, on the Reference platform."""
    integrator = openmm.LangevinMiddleIntegrator(temperature, 5.0, dt)
    integrator.setRandomNumberSeed(seed)
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(molecule.system, integrator, platform)
    context.setPositions(molecule.positions)
    context.setVelocitiesToTemperature(temperature, seed)
    frames = []
    integrator.step(20 * spacing)
    for _ in range(n):
        integrator.step(spacing)
        frames.append(context.getState(positions=True).getPositions(asNumpy=True)._value)
    return np.array(frames)


def random_internals(internals: FlatInternals, n: int, generator: torch.Generator, width: float = 1.0) -> Tensor:
    """n internals (n, D) on the chart: soft torsions anywhere, the others near the reference."""
    q = internals.reference.repeat(n, 1)
    noise = torch.randn(q.shape, generator=generator, dtype=q.dtype) * width
    r, c = internals.n_bonds, internals.n_bonds + internals.n_angles
    q[:, :r] *= 1.0 + 0.05 * noise[:, :r]
    q[:, r:c] = (q[:, r:c] + 0.06 * noise[:, r:c]).clamp(-0.97, 0.97)
    q[:, c:] += 0.15 * noise[:, c:]
    turns = 2 * torch.pi * torch.rand(q.shape, generator=generator, dtype=q.dtype) - torch.pi
    q = internals.chart.on_branch(torch.where(internals.circular, turns, q))
    inside = internals.chart(q)
    if inside.float().mean() < 0.9:
        raise RuntimeError(f"{internals.chart.describe(q)}: choose a smaller width")
    return q[inside]
