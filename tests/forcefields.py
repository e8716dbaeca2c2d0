"""Systems to test energies with, what OpenMM says about them, and configurations from easy to hopeless.

`TERMS` has every supported force alone, with random parameters; `WHOLE` has molecules as force fields make them;
`PERIODIC`, `UNSUPPORTED`, `BROKEN` have what is to be refused. Everything is made from fixed seeds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import numpy as np
import openmm
from molecules import dynamics, frames_of, peptide
from openmm import app, unit

from openmm_tsf.systems import Molecule, alanine_dipeptide

N = 9
"""Atoms of the Systems made here."""
TURN = 2.0 * np.pi


# --- what OpenMM says -------------------------------------------------------------------------------------------------


def system_of(*forces: openmm.Force, n_atoms: int = N) -> openmm.System:
    """A System of n carbon-like atoms with these forces, which it takes over."""
    system = openmm.System()
    for _ in range(n_atoms):
        system.addParticle(12.0)
    for force in forces:
        system.addForce(force)
    return system


def openmm_says(
    system: openmm.System, positions: np.ndarray, parameters: Mapping[str, float] | None = None, groups: int = -1
) -> tuple[np.ndarray, np.ndarray]:
    """Energies (B,) [kJ/mol] and forces (B, A, 3) [kJ/mol/nm] of the Reference platform, one frame after the other.

    Args:
        system: as OpenMM has it.
        positions: (B, A, 3) [nm].
        parameters: values of global parameters, the defaults otherwise.
        groups: force groups as a bit mask, all by default.
    """
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    for name, value in (parameters or {}).items():
        context.setParameter(name, value)
    energies, forces = np.zeros(len(positions)), np.zeros(positions.shape)
    for row, x in enumerate(np.asarray(positions, dtype=np.float64)):
        context.setPositions(x)
        state = context.getState(energy=True, forces=True, groups=groups)
        energies[row] = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
        forces[row] = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)
    return energies, forces


# --- configurations ---------------------------------------------------------------------------------------------------


def packings(n_atoms: int, n: int, seed: int = 11, apart: float = 0.13) -> np.ndarray:
    """n random arrangements (n, n_atoms, 3) [nm] about as dense as a molecule, no two atoms nearer than `apart`."""
    rng, edge = np.random.default_rng(seed), 0.22 * n_atoms ** (1 / 3)
    rows = []
    for _ in range(n):
        x = rng.uniform(0, edge, size=(1, 3))
        while len(x) < n_atoms:
            new = rng.uniform(0, edge, size=3)
            if np.linalg.norm(x - new, axis=1).min() > apart:
                x = np.append(x, new[None], 0)
        rows.append(x)
    return np.array(rows)


def clashing(positions: np.ndarray, seed: int = 12) -> np.ndarray:
    """Each frame with one atom put 0.03 to 0.06 nm away from another, any other, bonded or not."""
    rng, x = np.random.default_rng(seed), positions.copy()
    for row in x:
        i, j = rng.choice(len(row), 2, replace=False)
        direction = rng.normal(size=3)
        row[j] = row[i] + direction / np.linalg.norm(direction) * rng.uniform(0.03, 0.06)
    return x


def far_apart(positions: np.ndarray) -> np.ndarray:
    """Each frame blown up tenfold, with its last atom another 100 nm away."""
    x = 10.0 * positions
    x[:, -1] += np.array([100.0, -30.0, 20.0])
    return x


def perturbed_frames(positions: np.ndarray, size: float = 0.02, seed: int = 13) -> np.ndarray:
    """Each frame with normal noise [nm] on every coordinate."""
    return positions + size * np.random.default_rng(seed).normal(size=positions.shape)


def mixture(positions: np.ndarray) -> np.ndarray:
    """Frames, and the same frames perturbed, clashing, and far apart: four times as many."""
    return np.concatenate([positions, perturbed_frames(positions), clashing(positions), far_apart(positions)])


# --- bonded forces ----------------------------------------------------------------------------------------------------


def rows_of_atoms(rng: np.random.Generator, size: int, n: int) -> list[list[int]]:
    """n random tuples of different atoms, in any order; tuples may come twice."""
    return [[int(i) for i in rng.choice(N, size, replace=False)] for _ in range(n)]


def harmonic_bonds(seed: int = 1) -> openmm.HarmonicBondForce:
    rng, force = np.random.default_rng(seed), openmm.HarmonicBondForce()
    for i, j in rows_of_atoms(rng, 2, 10):
        force.addBond(i, j, rng.uniform(0.1, 0.2), rng.uniform(1e3, 3e5))
    force.addBond(0, 1, 0.15, 0.0)
    force.addBond(1, 0, 0.15, 2e5)  # the same two atoms once more, the other way round
    return force


def harmonic_angles(seed: int = 2) -> openmm.HarmonicAngleForce:
    rng, force = np.random.default_rng(seed), openmm.HarmonicAngleForce()
    for i, j, k in rows_of_atoms(rng, 3, 12):
        force.addAngle(i, j, k, rng.uniform(1.0, 3.1), rng.uniform(100, 900))
    return force


def periodic_torsions(seed: int = 3) -> openmm.PeriodicTorsionForce:
    rng, force = np.random.default_rng(seed), openmm.PeriodicTorsionForce()
    for row, atoms in enumerate(rows_of_atoms(rng, 4, 14)):
        force.addTorsion(*atoms, row % 6 + 1, rng.uniform(-TURN, TURN), rng.uniform(-20, 20))
    return force


def rb_torsions(seed: int = 4) -> openmm.RBTorsionForce:
    rng, force = np.random.default_rng(seed), openmm.RBTorsionForce()
    for atoms in rows_of_atoms(rng, 4, 10):
        force.addTorsion(*atoms, *rng.uniform(-10, 10, size=6))
    return force


def cmap_torsions(seed: int = 5) -> openmm.CMAPTorsionForce:
    rng, force = np.random.default_rng(seed), openmm.CMAPTorsionForce()
    for size in (24, 5, 10):
        force.addMap(size, rng.uniform(-15, 15, size=size * size))
    for row, (one, two) in enumerate(zip(rows_of_atoms(rng, 4, 7), rows_of_atoms(rng, 4, 7), strict=True)):
        force.addTorsion(row % 3, *one, *two)
    chain = rows_of_atoms(rng, 5, 1)[0]
    force.addTorsion(0, *chain[:4], *chain[1:])  # as along a backbone
    return force


def custom(force: openmm.Force, kind: str, names: str, parameters: Mapping[str, float]) -> openmm.Force:
    """A custom force with per-`kind` parameters (names) and global ones (values) declared."""
    for name in names.split():
        getattr(force, f"addPer{kind}Parameter")(name)
    for name, value in parameters.items():
        force.addGlobalParameter(name, value)
    return force


def custom_bonds(seed: int = 6) -> openmm.CustomBondForce:
    rng = np.random.default_rng(seed)
    text = "scale*depth*(1-exp(-a*(r-r0)))^2 + select(step(r-far), depth*(r-far)^2, 0); far=2*r0"
    force = custom(openmm.CustomBondForce(text), "Bond", "depth a r0", {"scale": 1.7})
    for i, j in rows_of_atoms(rng, 2, 10):
        force.addBond(i, j, [rng.uniform(100, 500), rng.uniform(2, 20), rng.uniform(0.1, 0.2)])
    return force


def many_functions() -> openmm.CustomBondForce:
    """A bond expression with the functions and the operators that others lack."""
    terms = (
        "sqrt(r) + exp(-r) + log(1+r) + sin(3*r) + cos(r) + sec(r/1000) + csc(1.5+tanh(r)) + tan(tanh(r)) + "
        "cot(1+tanh(r)) + asin(u) + acos(u) + atan(r) + atan2(u, 0.3) + sinh(u) + cosh(u) + tanh(r) + erf(r) + "
        "erfc(r) + min(r, 0.3) + max(r, 0.3) + abs(r-0.3) + floor(5*u) + ceil(5*u) + step(r-0.25) + delta(r) + "
        "select(step(r-0.2), r, 2*r) + square(r) + cube(u) + recip(r+1) + r^-2.5 + 2^u + (-u)^3 + -u^2 + 1.5e-1*r"
    )
    force = openmm.CustomBondForce(f"k*({terms}); u=w/(1+w); w=r/2")
    custom(force, "Bond", "k", {})
    for row, (i, j) in enumerate(rows_of_atoms(np.random.default_rng(21), 2, 6)):
        force.addBond(i, j, [1.0 + row])
    return force


def custom_angles(seed: int = 7) -> openmm.CustomAngleForce:
    rng = np.random.default_rng(seed)
    text = "stiffness*k*(theta-theta0)^2*(1 - 0.3*(theta-theta0)) + bend*cos(theta)"
    force = custom(openmm.CustomAngleForce(text), "Angle", "k theta0", {"stiffness": 0.5, "bend": 3.0})
    for i, j, k in rows_of_atoms(rng, 3, 10):
        force.addAngle(i, j, k, [rng.uniform(100, 600), rng.uniform(1, 3)])
    return force


def custom_torsions(seed: int = 8) -> openmm.CustomTorsionForce:
    rng = np.random.default_rng(seed)
    text = "k*min(d, 2*pi-d)^2 + sin(theta)*tilt; d=abs(theta-theta0); pi=3.141592653589793"
    force = custom(openmm.CustomTorsionForce(text), "Torsion", "k theta0", {"tilt": 4.0})
    for atoms in rows_of_atoms(rng, 4, 10):
        force.addTorsion(*atoms, [rng.uniform(10, 60), rng.uniform(-3, 3)])
    return force


def custom_external(seed: int = 9) -> openmm.CustomExternalForce:
    rng = np.random.default_rng(seed)
    text = "pull*k*((x-x0)^2 + (y-y0)^2 + 2*(z-z0)^2) + x*y*z"
    force = custom(openmm.CustomExternalForce(text), "Particle", "k x0 y0 z0", {"pull": 0.3})
    for i in (0, 4, 4, 8):
        force.addParticle(i, [rng.uniform(100, 900), *rng.uniform(-0.2, 0.2, size=3)])
    return force


# --- nonbonded forces -------------------------------------------------------------------------------------------------


def nonbonded(seed: int = 10, n_atoms: int = N) -> openmm.NonbondedForce:
    """Charges of both signs and zero, one atom without and one with a large Lennard-Jones term; no exceptions."""
    rng, force = np.random.default_rng(seed), openmm.NonbondedForce()
    for i in range(n_atoms):
        charge = 0.0 if i == 3 else rng.uniform(-0.8, 0.8)
        force.addParticle(charge, 0.0 if i == 5 else rng.uniform(0.08, 0.22), 0.0 if i == 6 else rng.uniform(0.05, 0.9))
    return force


def with_exceptions(force: openmm.NonbondedForce) -> openmm.NonbondedForce:
    """Excluded pairs, scaled pairs as force fields make them, and pairs that interact in a way of their own."""
    force.createExceptionsFromBonds([(i, i + 1) for i in range(5)], 0.8333, 0.5)
    force.addException(6, 8, 0.31, 0.17, 0.4)
    force.addException(8, 7, 0.0, 0.2, 0.7)
    force.addException(0, 8, -0.2, 0.1, 0.0)
    return force


def with_offsets(force: openmm.NonbondedForce, seed: int = 11) -> openmm.NonbondedForce:
    """Offsets of particles and exceptions by two global parameters, several on one particle, one at zero by default."""
    rng = np.random.default_rng(seed)
    force.addGlobalParameter("lambda_electrostatics", 0.6)
    force.addGlobalParameter("lambda_sterics", 0.0)
    for name, i in (("lambda_electrostatics", 0), ("lambda_electrostatics", 4), ("lambda_sterics", 4)):
        force.addParticleParameterOffset(name, i, rng.uniform(-0.5, 0.5), 0.03, 0.3)
    last = force.getNumExceptions() - 1
    for name, row in (("lambda_electrostatics", last - 2), ("lambda_electrostatics", last), ("lambda_sterics", last)):
        force.addExceptionParameterOffset(name, row, 0.2, 0.15, 0.5)
    return force


def with_cutoff(force: openmm.NonbondedForce, dielectric: float = 78.3, switch: float = 0.0) -> openmm.NonbondedForce:
    """Reaction field beyond 0.4 nm, which cuts through the packings and through the exceptions."""
    force.setNonbondedMethod(openmm.NonbondedForce.CutoffNonPeriodic)
    force.setCutoffDistance(0.4)
    force.setReactionFieldDielectric(dielectric)
    if switch:
        force.setUseSwitchingFunction(True)
        force.setSwitchingDistance(switch)
    return force


def switch_without_cutoff() -> openmm.NonbondedForce:
    """A switching function that OpenMM ignores, since there is no cutoff."""
    force = nonbonded()
    force.setUseSwitchingFunction(True)
    force.setSwitchingDistance(0.2)
    return force


LENNARD_JONES = "scale*4*epsilon*((s/r)^12 - (s/r)^6) + 138.9*q1*q2/r; s=0.5*(s1+s2); epsilon=sqrt(e1*e2)"


def custom_nonbonded(
    exclusions: Sequence[tuple[int, int]] = (), seed: int = 12, n_atoms: int = N
) -> openmm.CustomNonbondedForce:
    rng = np.random.default_rng(seed)
    force = custom(openmm.CustomNonbondedForce(LENNARD_JONES), "Particle", "q s e", {"scale": 0.7})
    for _ in range(n_atoms):
        force.addParticle([rng.uniform(-0.5, 0.5), rng.uniform(0.1, 0.3), rng.uniform(0.1, 0.8)])
    for i, j in exclusions:
        force.addExclusion(i, j)
    return force


EXCLUSIONS = ((0, 1), (5, 2), (8, 0), (3, 4))


def custom_nonbonded_cutoff(switch: float = 0.0) -> openmm.CustomNonbondedForce:
    force = custom_nonbonded(EXCLUSIONS)
    force.setNonbondedMethod(openmm.CustomNonbondedForce.CutoffNonPeriodic)
    force.setCutoffDistance(0.4)
    force.setUseSwitchingFunction(switch > 0)
    force.setSwitchingDistance(switch or 0.3)
    return force


def interaction_groups() -> openmm.CustomNonbondedForce:
    """Two overlapping groups: a pair in both counts twice."""
    force = custom_nonbonded(EXCLUSIONS)
    force.addInteractionGroup([0, 1, 2, 3], [3, 4, 5, 6])
    force.addInteractionGroup([2, 3], [5, 6, 7])
    return force


def tabulated_nonbonded() -> openmm.CustomNonbondedForce:
    """Coefficients looked up by the types of two atoms, as NBFIX comes from CHARMM force fields."""
    force = openmm.CustomNonbondedForce("a(kind1, kind2)/r^9 - b(kind1, kind2)/r^3")
    rng = np.random.default_rng(13)
    for name, size in (("a", 1e-4), ("b", 1e-2)):
        values = rng.uniform(0.1, 1.0, size=(3, 3)) * size
        force.addTabulatedFunction(name, openmm.Discrete2DFunction(3, 3, (values + values.T).flatten()))
    force.addPerParticleParameter("kind")
    for i in range(N):
        force.addParticle([float(i % 3)])
    return force


def computed_values() -> openmm.CustomNonbondedForce:
    """A value computed from each particle's own parameters before pairs are formed."""
    force = custom(openmm.CustomNonbondedForce("exp(-v1*v2*r)"), "Particle", "q", {"scale": 0.7})
    force.addComputedValue("v", "scale+q^2")
    for i in range(N):
        force.addParticle([0.3 * i])
    return force


# --- implicit solvent -------------------------------------------------------------------------------------------------


def gbsa_obc(surface: float = 2.25936, seed: int = 14, n_atoms: int = N) -> openmm.GBSAOBCForce:
    rng, force = np.random.default_rng(seed), openmm.GBSAOBCForce()
    force.setSolventDielectric(60.0)
    force.setSoluteDielectric(1.5)
    force.setSurfaceAreaEnergy(surface)
    for _ in range(n_atoms):
        force.addParticle(rng.uniform(-0.8, 0.8), rng.uniform(0.1, 0.2), rng.uniform(0.6, 1.0))
    return force


PAIR, PAIR_ALL = openmm.CustomGBForce.ParticlePair, openmm.CustomGBForce.ParticlePairNoExclusions
SINGLE = openmm.CustomGBForce.SingleParticle
GB_ENERGY = "-strength*q1*q2/f; f=sqrt(r^2 + B1*B2*exp(-r^2/(4*B1*B2)))"


def custom_gb(
    values: Sequence[tuple[str, str, int]], terms: Sequence[tuple[str, int]], seed: int = 15, n_atoms: int = N
) -> openmm.CustomGBForce:
    """Computed values and energy terms over particles with a charge q and a size s, with exclusions among N."""
    rng = np.random.default_rng(seed)
    force = custom(openmm.CustomGBForce(), "Particle", "q s", {"strength": 55.0, "screening": 3.0})
    for _ in range(n_atoms):
        force.addParticle([rng.uniform(-0.8, 0.8), rng.uniform(0.1, 0.2)])
    for row in values:
        force.addComputedValue(*row)
    for row in terms:
        force.addEnergyTerm(*row)
    for i, j in EXCLUSIONS if n_atoms == N else ():
        force.addExclusion(i, j)
    return force


OVERLAP = "s2*exp(-screening*r/s1)"  # not the same for (1, 2) and (2, 1): a sum over ordered pairs
RADIUS = ("B", "s*(1 + I + 0.2*I^2)", SINGLE)


def chained_gb(n_atoms: int = N) -> openmm.CustomGBForce:
    """Values of values, of the position too, in single-particle terms and in pair terms of both kinds."""
    values = [("I", OVERLAP, PAIR_ALL), RADIUS, ("C", "B^2 + 0.1*x*y + sin(I+z)", SINGLE)]
    terms = [
        ("strength*q^2/B + C*z", SINGLE),
        (GB_ENERGY, PAIR),
        ("C1*C2*exp(-screening*r) + B1 + B2", PAIR_ALL),
        ("I*x", SINGLE),
    ]
    return custom_gb(values, terms, n_atoms=n_atoms)


def excluding_gb() -> openmm.CustomGBForce:
    """The first value leaves out excluded pairs."""
    return custom_gb([("I", OVERLAP, PAIR), RADIUS], [(GB_ENERGY, PAIR_ALL), ("q*B", SINGLE)])


def singles_gb() -> openmm.CustomGBForce:
    """No value is a sum over pairs: OpenMM has no such thing."""
    return custom_gb([("B", "s+0.1*x^2", SINGLE)], [(GB_ENERGY, PAIR_ALL), ("strength*B*q", SINGLE)])


def valueless_gb() -> openmm.CustomGBForce:
    """No computed value at all: making a Context of it ends the process, without a word."""
    return custom_gb([], [("strength*q1*q2*exp(-r)", PAIR), ("q*(x^2+y)", SINGLE)])


def tabulated_gb(*tables: tuple[str, openmm.TabulatedFunction], text: str) -> openmm.CustomGBForce:
    """`chained_gb` with a pair value scaled by a tabulated function."""
    force = custom_gb([("I", f"{OVERLAP}*{text}; k1=step(q1); k2=step(q2)", PAIR_ALL), RADIUS], [(GB_ENERGY, PAIR_ALL)])
    for name, table in tables:
        force.addTabulatedFunction(name, table)
    return force


def discrete_gb() -> openmm.CustomGBForce:
    """Tables of one, two and three indices."""
    numbers = np.random.default_rng(16).uniform(0.5, 1.5, size=12)
    tables = (
        ("one", openmm.Discrete1DFunction(numbers[:2])),
        ("two", openmm.Discrete2DFunction(2, 3, numbers[:6])),
        ("three", openmm.Discrete3DFunction(2, 3, 2, numbers)),
    )
    return tabulated_gb(*tables, text="one(k1)*two(k1, k1+k2)*three(k2, 2*k1, k2)*one(1)")


def gb_cutoff() -> openmm.CustomGBForce:
    force = chained_gb()
    force.setNonbondedMethod(openmm.CustomGBForce.CutoffNonPeriodic)
    force.setCutoffDistance(0.4)
    return force


def gbsa_cutoff() -> openmm.GBSAOBCForce:
    force = gbsa_obc()
    force.setNonbondedMethod(openmm.GBSAOBCForce.CutoffNonPeriodic)
    force.setCutoffDistance(0.4)
    return force


# --- every supported force alone --------------------------------------------------------------------------------------

Build = Callable[[], openmm.Force | Sequence[openmm.Force]]
TERMS: dict[str, Build] = {
    "HarmonicBondForce": harmonic_bonds,
    "HarmonicAngleForce": harmonic_angles,
    "PeriodicTorsionForce": periodic_torsions,
    "RBTorsionForce": rb_torsions,
    "CMAPTorsionForce": cmap_torsions,
    "CustomBondForce": custom_bonds,
    "CustomBondForce, many functions": many_functions,
    "CustomAngleForce": custom_angles,
    "CustomTorsionForce": custom_torsions,
    "CustomExternalForce": custom_external,
    "NonbondedForce": nonbonded,
    "NonbondedForce, exceptions": lambda: with_exceptions(nonbonded()),
    "NonbondedForce, offsets": lambda: with_offsets(with_exceptions(nonbonded())),
    "NonbondedForce, cutoff": lambda: with_cutoff(nonbonded()),
    "NonbondedForce, cutoff and exceptions": lambda: with_cutoff(with_exceptions(nonbonded()), 5.0),
    "NonbondedForce, cutoff in vacuum": lambda: with_cutoff(nonbonded(), 1.0),
    "NonbondedForce, switch": lambda: with_cutoff(with_exceptions(nonbonded()), switch=0.25),
    "NonbondedForce, switch and offsets": lambda: with_cutoff(with_offsets(with_exceptions(nonbonded())), switch=0.3),
    "NonbondedForce, switch without cutoff": switch_without_cutoff,
    "CustomNonbondedForce": custom_nonbonded,
    "CustomNonbondedForce, exclusions": lambda: custom_nonbonded(EXCLUSIONS),
    "GBSAOBCForce": gbsa_obc,
    "GBSAOBCForce, no surface": lambda: gbsa_obc(0.0),
    "CustomGBForce, chained": chained_gb,
    "CustomGBForce, exclusions": excluding_gb,
    "CustomGBForce, discrete tables": discrete_gb,
    "two of a kind": lambda: [harmonic_bonds(), harmonic_bonds(seed=99), nonbonded(), nonbonded(seed=98)],
}
"""Force or forces by name."""

OPTIONAL: dict[str, tuple[Build, str]] = {
    "interaction groups": (interaction_groups, r"CustomNonbondedForce.*interaction group"),
    "custom cutoff": (custom_nonbonded_cutoff, r"CustomNonbondedForce.*cutoff"),
    "custom switch": (lambda: custom_nonbonded_cutoff(0.25), r"CustomNonbondedForce.*cutoff"),
    "nonbonded table": (tabulated_nonbonded, r"CustomNonbondedForce.*(table|tabulated)"),
    "nonbonded computed values": (computed_values, r"CustomNonbondedForce.*computed value"),
    "custom GB cutoff": (gb_cutoff, r"CustomGBForce.*cutoff"),
    "GBSA cutoff": (gbsa_cutoff, r"GBSAOBCForce.*cutoff"),
}
"""What may be right or may be refused, and then in these words."""


def built(build: Build) -> openmm.System:
    """The System of a force or of several."""
    made = build()
    return system_of(*made) if isinstance(made, list | tuple) else system_of(made)


def tiny() -> openmm.System:
    """Three atoms with bonds, an angle and charges: small enough to compile in seconds."""
    bonds, angles = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce()
    bonds.addBond(0, 1, 0.1, 1e4)
    angles.addAngle(0, 1, 2, 1.9, 300.0)
    return system_of(bonds, angles, nonbonded(n_atoms=3), n_atoms=3)


def everything() -> openmm.System:
    """Every supported force in one System, each class once, its global parameters in no other force."""
    kinds = [harmonic_bonds(), harmonic_angles(), periodic_torsions(), rb_torsions(), cmap_torsions()]
    kinds += [custom_bonds(), custom_angles(), custom_torsions(), custom_external(), openmm.CMMotionRemover()]
    kinds += [with_offsets(with_exceptions(nonbonded())), gbsa_obc(), chained_gb()]
    pairs = custom_nonbonded(EXCLUSIONS)
    pairs.setGlobalParameterName(0, "softness")
    pairs.setEnergyFunction(LENNARD_JONES.replace("scale", "softness"))
    return system_of(*kinds, pairs)


# --- what is to be refused --------------------------------------------------------------------------------------------


def periodic(build: Build) -> Callable[[], openmm.Force]:
    """The force with periodic boundary conditions."""

    def made() -> openmm.Force:
        force = build()
        if hasattr(force, "setUsesPeriodicBoundaryConditions"):
            force.setUsesPeriodicBoundaryConditions(True)
        else:
            force.setNonbondedMethod(force.CutoffPeriodic)
        return force

    return made


def periodic_distance() -> openmm.CustomExternalForce:
    """A function of the periodic box that only external forces have."""
    force = openmm.CustomExternalForce("k*periodicdistance(x, y, z, 0, 0, 0)^2")
    custom(force, "Particle", "k", {})
    force.addParticle(2, [3.0])
    return force


def with_method(method: int) -> Callable[[], openmm.Force]:
    """Nonbonded interactions with a method of its own."""

    def made() -> openmm.Force:
        force = nonbonded()
        force.setNonbondedMethod(method)
        return force

    return made


SIMPLE = {
    build.__name__: build
    for build in (
        harmonic_bonds,
        harmonic_angles,
        periodic_torsions,
        rb_torsions,
        cmap_torsions,
        custom_bonds,
        custom_angles,
        custom_torsions,
        nonbonded,
        custom_nonbonded,
        gbsa_obc,
        chained_gb,
    )
}
PERIODIC: dict[str, Build] = {
    **{name: periodic(build) for name, build in SIMPLE.items()},
    **{name: with_method(getattr(openmm.NonbondedForce, name)) for name in ("PME", "Ewald", "LJPME")},
    "periodic_distance": periodic_distance,
}
"""Forces that need a periodic box."""


def continuous(kind: str) -> openmm.TabulatedFunction:
    """A continuous table with as many arguments as `kind` says."""
    dim, size = int(kind[0]), 4
    edges = [0.0, 2.0] * dim
    return getattr(openmm, f"Continuous{dim}DFunction")(*[size] * (dim if dim > 1 else 0), np.ones(size**dim), *edges)


def continuous_nonbonded() -> openmm.CustomNonbondedForce:
    force = openmm.CustomNonbondedForce("shape(r)")
    force.addTabulatedFunction("shape", continuous("1D"))
    for _ in range(N):
        force.addParticle([])
    return force


TABLES: dict[str, Build] = {
    "1D": lambda: tabulated_gb(("shape", continuous("1D")), text="shape(r)"),
    "2D": lambda: tabulated_gb(("shape", continuous("2D")), text="shape(r, r)"),
    "3D": lambda: tabulated_gb(("shape", continuous("3D")), text="shape(r, r, r)"),
    "pairs": continuous_nonbonded,
}
"""Continuous tables, all called "shape"."""


def python_force() -> openmm.Force:
    return openmm.PythonForce(_no_force)


def _no_force(state: openmm.State) -> tuple[float, np.ndarray]:
    return 0.0, np.zeros((N, 3))


def cv_force() -> openmm.CustomCVForce:
    force = openmm.CustomCVForce("cv^2")
    force.addCollectiveVariable("cv", harmonic_bonds())
    return force


def many_particles() -> openmm.CustomManyParticleForce:
    force = openmm.CustomManyParticleForce(3, "distance(p1, p2)+distance(p1, p3)")
    for _ in range(N):
        force.addParticle([], 0)
    return force


def hydrogen_bonds() -> openmm.CustomHbondForce:
    force = openmm.CustomHbondForce("distance(a1, d1)")
    force.addDonor(0, 1, -1, [])
    force.addAcceptor(2, 3, -1, [])
    return force


def centroids() -> openmm.CustomCentroidBondForce:
    force = openmm.CustomCentroidBondForce(2, "distance(g1, g2)")
    force.addGroup([0, 1])
    force.addGroup([2, 3])
    force.addBond([0, 1], [])
    return force


def compound_bonds() -> openmm.CustomCompoundBondForce:
    force = openmm.CustomCompoundBondForce(2, "distance(p1, p2)")
    force.addBond([0, 1], [])
    return force


UNSUPPORTED: dict[str, Callable[[], openmm.Force]] = {
    "ATMForce": lambda: openmm.ATMForce(0.5, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0),
    "AmoebaGeneralizedKirkwoodForce": openmm.AmoebaGeneralizedKirkwoodForce,
    "AmoebaMultipoleForce": openmm.AmoebaMultipoleForce,
    "AmoebaTorsionTorsionForce": openmm.AmoebaTorsionTorsionForce,
    "AmoebaVdwForce": openmm.AmoebaVdwForce,
    "AmoebaWcaDispersionForce": openmm.AmoebaWcaDispersionForce,
    "ConstantPotentialForce": openmm.ConstantPotentialForce,
    "CustomCVForce": cv_force,
    "CustomCentroidBondForce": centroids,
    "CustomCompoundBondForce": compound_bonds,
    "CustomHbondForce": hydrogen_bonds,
    "CustomManyParticleForce": many_particles,
    "CustomVolumeForce": lambda: openmm.CustomVolumeForce("v"),
    "DrudeForce": openmm.DrudeForce,
    "GayBerneForce": openmm.GayBerneForce,
    "HippoNonbondedForce": openmm.HippoNonbondedForce,
    "LCPOForce": openmm.LCPOForce,
    "MonteCarloAnisotropicBarostat": lambda: openmm.MonteCarloAnisotropicBarostat([1.0, 1.0, 1.0], 300.0),
    "MonteCarloBarostat": lambda: openmm.MonteCarloBarostat(1.0, 300.0),
    "MonteCarloFlexibleBarostat": lambda: openmm.MonteCarloFlexibleBarostat(1.0, 300.0),
    "MonteCarloMembraneBarostat": lambda: openmm.MonteCarloMembraneBarostat(1.0, 0.0, 300.0, 0, 0),
    "OrientationRestraintForce": lambda: openmm.OrientationRestraintForce(
        10.0, [[float(i), 0, i * i] for i in range(N)]
    ),
    "PythonForce": python_force,
    "RGForce": openmm.RGForce,
    "RMSDForce": lambda: openmm.RMSDForce([[float(i), 0.0, 0.0] for i in range(N)]),
}
"""Forces of other classes, by class."""
SUPPORTED = {name.split(",")[0] for name in TERMS if name.split(",")[0].endswith("Force")} | {"CMMotionRemover"}
"""Classes that have a batched form; AndersenThermostat may have one or not."""


def broken_bond(text: str) -> Callable[[], openmm.Force]:
    """A custom bond whose expression OpenMM itself refuses when it makes a Context."""

    def made() -> openmm.Force:
        force = custom(openmm.CustomBondForce(text), "Bond", "k", {"scale": 1.0})
        force.addBond(0, 1, [2.0])
        return force

    return made


def foreign_pairs() -> list[openmm.Force]:
    """Pairs whose expression has a global parameter that another force declares, and they do not."""
    force = openmm.CustomNonbondedForce("scale*r")
    for _ in range(N):
        force.addParticle([])
    return [custom_bonds(), force]


def broken_gb(text: str) -> Callable[[], openmm.Force]:
    """A GB model with one energy term."""
    return lambda: custom_gb([("I", OVERLAP, PAIR_ALL)], [(text, SINGLE)])


EXPRESSIONS: dict[str, tuple[Build, str]] = {
    "a global parameter of another force": (foreign_pairs, r"CustomNonbondedForce.*scale"),
    "the same in GB": (lambda: [custom_bonds(), broken_gb("I*scale")()], r"CustomGBForce.*scale"),
    "unknown function": (broken_bond("k*nosuch(r)"), r"CustomBondForce.*nosuch"),
    "unknown variable": (broken_bond("k*r*missing"), r"CustomBondForce.*missing"),
    "a name of another force": (broken_bond("k*theta"), r"CustomBondForce.*theta"),
    "does not parse": (broken_bond("k*(r"), r"CustomBondForce"),
    "empty": (broken_bond(""), r"CustomBondForce"),
    "unknown function in GB": (broken_gb("nosuch(I)"), r"CustomGBForce.*nosuch"),
    "unknown variable in GB": (broken_gb("I*missing"), r"CustomGBForce.*missing"),
    "value before it is there": (
        lambda: custom_gb([("I", OVERLAP, PAIR_ALL), ("B", "C*I", SINGLE), ("C", "I", SINGLE)], [("B", SINGLE)]),
        r"CustomGBForce.*\bC\b",
    ),
    "unknown variable of pairs": (
        lambda: custom_gb([("I", "q3*r", PAIR_ALL)], [("I", SINGLE)]),
        r"CustomGBForce.*q3",
    ),
}
"""Expressions that mean nothing, and what the message must say."""


def out_of_range(build: Build, change: Callable[[openmm.Force], None]) -> Callable[[], openmm.Force]:
    """A force after a change that gives it an atom it does not have."""

    def made() -> openmm.Force:
        force = build()
        change(force)
        return force

    return made


def missing_atoms(atom: int) -> dict[str, Callable[[], openmm.Force]]:
    """Forces whose last row has an atom that the System lacks."""
    return {
        "HarmonicBondForce": out_of_range(harmonic_bonds, lambda f: f.addBond(0, atom, 0.1, 1e5)),
        "HarmonicAngleForce": out_of_range(harmonic_angles, lambda f: f.addAngle(0, 1, atom, 2.0, 100)),
        "PeriodicTorsionForce": out_of_range(periodic_torsions, lambda f: f.addTorsion(0, atom, 1, 2, 1, 0.0, 1.0)),
        "RBTorsionForce": out_of_range(rb_torsions, lambda f: f.addTorsion(atom, 0, 1, 2, *[1.0] * 6)),
        "CMAPTorsionForce": out_of_range(cmap_torsions, lambda f: f.addTorsion(0, 0, 1, 2, 3, 4, 5, 6, atom)),
        "CustomBondForce": out_of_range(custom_bonds, lambda f: f.addBond(atom, 0, [1.0, 1.0, 0.1])),
        "CustomAngleForce": out_of_range(custom_angles, lambda f: f.addAngle(0, 1, atom, [1.0, 2.0])),
        "CustomTorsionForce": out_of_range(custom_torsions, lambda f: f.addTorsion(0, 1, atom, 2, [1.0, 2.0])),
        "CustomExternalForce": out_of_range(custom_external, lambda f: f.addParticle(atom, [1.0, 0.0, 0.0, 0.0])),
        "NonbondedForce": out_of_range(nonbonded, lambda f: f.addException(0, atom, 0.1, 0.2, 0.3)),
        "CustomNonbondedForce": out_of_range(custom_nonbonded, lambda f: f.addExclusion(atom, 0)),
        "CustomGBForce": out_of_range(chained_gb, lambda f: f.addExclusion(2, atom)),
    }


def other_breakage() -> dict[str, tuple[Callable[[], openmm.Force], str]]:
    """Rows that do not fit their force or their System, and what the message must say."""
    particles = {
        "NonbondedForce": out_of_range(nonbonded, lambda f: f.addParticle(0.1, 0.2, 0.3)),
        "CustomNonbondedForce": out_of_range(custom_nonbonded, lambda f: f.addParticle([0.1, 0.2, 0.3])),
        "GBSAOBCForce": out_of_range(gbsa_obc, lambda f: f.addParticle(0.1, 0.2, 0.3)),
        "CustomGBForce": out_of_range(chained_gb, lambda f: f.addParticle([0.1, 0.2])),
    }
    rows = {f"{name}, 10 of 9 particles": (build, rf"{name}.*\b10\b") for name, build in particles.items()}
    offsets = {
        "offset of particle 9": lambda f: f.addParticleParameterOffset("lambda_sterics", N, 0.1, 0.0, 0.0),
        "offset of particle -1": lambda f: f.addParticleParameterOffset("lambda_sterics", -1, 0.1, 0.0, 0.0),
        "offset of exception 99": lambda f: f.addExceptionParameterOffset("lambda_sterics", 99, 0.1, 0.0, 0.0),
        "offset of exception -1": lambda f: f.addExceptionParameterOffset("lambda_sterics", -1, 0.1, 0.0, 0.0),
    }
    for name, change in offsets.items():
        rows[name] = (out_of_range(TERMS["NonbondedForce, offsets"], change), rf"NonbondedForce.*{name.split()[-1]}")
    rows["no such map"] = (
        out_of_range(cmap_torsions, lambda f: f.addTorsion(3, 0, 1, 2, 3, 4, 5, 6, 7)),
        "CMAPTorsionForce",
    )
    return rows


# --- whole molecules --------------------------------------------------------------------------------------------------


@cache
def alanines() -> Molecule:
    """ACE-ALA-ALA-ALA-NME."""
    return peptide("ALA", "ALA", "ALA")


def force_field(*files: str, **options) -> Callable[[], Molecule]:
    """`alanines` in a force field of OpenMM's own."""

    def made() -> Molecule:
        molecule = alanines()
        system = app.ForceField(*files).createSystem(molecule.topology, **options)
        return Molecule(system, molecule.topology, molecule.positions, "alanines")

    return made


@cache
def charmm_alanines() -> Molecule:
    """Three alanines with charged ends in CHARMM36: CMAP, Lennard-Jones from tables, custom 1-4 terms and impropers."""
    capped, topology, x = alanines(), app.Topology(), []
    chain = topology.addChain()
    *residues, last = list(capped.topology.residues())[1:]
    for residue in residues:
        new = topology.addResidue("ALA", chain)
        for atom in residue.atoms():
            if atom.element.symbol != "H":
                topology.addAtom(atom.name, atom.element, new)
                x.append(capped.positions[atom.index])
    topology.addAtom("OXT", app.element.oxygen, new)
    x.append(capped.positions[next(atom.index for atom in last.atoms() if atom.name == "N")])
    topology.createStandardBonds()
    modeller, field = app.Modeller(topology, np.array(x) * unit.nanometer), app.ForceField("charmm36.xml")
    state = random.getstate()
    random.seed(1)  # where addHydrogens starts from
    try:
        modeller.addHydrogens(field, platform=openmm.Platform.getPlatformByName("Reference"))
    finally:
        random.setstate(state)
    return Molecule(field.createSystem(modeller.topology), modeller.topology, modeller.positions, "charmm")


FF14SB = "amber14/protein.ff14SB.xml"
CUTOFF = {"nonbondedMethod": app.CutoffNonPeriodic, "nonbondedCutoff": 0.6 * unit.nanometer}
WHOLE: dict[str, Callable[[], Molecule]] = {
    "ala2, ff96-obc1": lambda: alanine_dipeptide(),
    "ala2, ff99sbildn-obc2": lambda: alanine_dipeptide("ff99sbildn-obc2"),
    "ala2, vacuum": lambda: alanine_dipeptide("vacuum"),
    "ala2, ff96-obc1, HBonds": lambda: alanine_dipeptide(constraints="HBonds"),
    "ala2, ff99sbildn-obc2, HBonds": lambda: alanine_dipeptide("ff99sbildn-obc2", constraints="HBonds"),
    "ala2, vacuum, HBonds": lambda: alanine_dipeptide("vacuum", constraints="HBonds"),
    "alanines, ff14SB, HCT": force_field(FF14SB, "implicit/hct.xml"),
    "alanines, ff14SB, OBC1": force_field(FF14SB, "implicit/obc1.xml"),
    "alanines, ff14SB, OBC2": force_field(FF14SB, "implicit/obc2.xml"),
    "alanines, ff14SB, OBC2 with salt": force_field(
        FF14SB, "implicit/obc2.xml", implicitSolventKappa=1.0 / unit.nanometer
    ),
    "alanines, ff14SB, GBn": force_field(FF14SB, "implicit/gbn.xml"),
    "alanines, ff14SB, GBn2": force_field(FF14SB, "implicit/gbn2.xml"),
    "alanines, ff99SB-ildn, GBSAOBC": force_field("amber99sbildn.xml", "amber99_obc.xml"),
    "alanines, ff19SB with CMAP": force_field("amber19/protein.ff19SB.xml"),
    "alanines, ff14SB, cutoff": force_field(FF14SB, **CUTOFF),
}
"""Molecules as force fields make them."""
WHOLE_OPTIONAL: dict[str, tuple[Callable[[], Molecule], str]] = {
    "alanines, ff14SB, GBn2, cutoff": (force_field(FF14SB, "implicit/gbn2.xml", **CUTOFF), r"CustomGBForce.*cutoff"),
    "alanines, CHARMM36": (charmm_alanines, r"CustomNonbondedForce.*(table|tabulated)"),
}
"""What may be right or may be refused, and then in these words."""


@cache
def hot_frames(kind: str, n: int = 5) -> np.ndarray:
    """Frames (n, A, 3) [nm] at 600 K in vacuum; the solvent is not missed here.

    Args:
        kind: name in `WHOLE` or `WHOLE_OPTIONAL`.
        n: number of frames.
    """
    if kind.startswith("ala2"):
        return frames_of("ala2", n)
    return dynamics(charmm_alanines() if "CHARMM" in kind else alanines(), n, spacing=25)
