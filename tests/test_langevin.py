"""Batched Langevin dynamics: OpenMM's step, exact statistics where they are known, swaps, resumption, failures."""

import math
from dataclasses import replace

import numpy as np
import openmm
import pytest
import torch
from molecules import TRIMER, harmonic_trimer, rigid_harmonic_trimer, rigid_trimer, seeded
from openmm import app

from openmm_tsf.energy import BatchedEnergy, OpenMMEnergy
from openmm_tsf.langevin import BatchedLangevin
from openmm_tsf.systems import alanine_dipeptide
from openmm_tsf.units import kT


class Springs:
    """U = k |x|^2 / 2 of all coordinates; k = 0 for free particles."""

    def __init__(self, k=0.0):
        self.k = k

    def evaluate(self, x):
        return 0.5 * self.k * (x * x).sum((0, 1)), -self.k * x


class OneByOne:
    """OpenMM's own energies and forces in the layout of the dynamics."""

    def __init__(self, system):
        self.energy = OpenMMEnergy(system, "Reference")

    def evaluate(self, x):
        energies, forces = self.energy.forces(x.permute(2, 0, 1))
        return torch.tensor(energies).to(x), torch.tensor(forces).permute(1, 2, 0).contiguous().to(x)


def particles(masses, remover=0, constraints=()):
    system = openmm.System()
    for mass in masses:
        system.addParticle(mass)
    for i, j, length in constraints:
        system.addConstraint(i, j, length)
    if remover:
        system.addForce(openmm.CMMotionRemover(remover))
    return system


def integrator(system, energy, timestep_fs=1.0, friction_per_ps=1.0, **rest):
    rest = {"dtype": torch.float64, **rest}
    return BatchedLangevin(system, energy, timestep_fs=timestep_fs, friction_per_ps=friction_per_ps, **rest)


def assert_mean(values, wanted, sigmas=4.0, largest_error=0.02):
    """The mean of independent values is as wanted within its standard error, which is small enough to tell."""
    error = float(values.std() / math.sqrt(values.numel()))
    assert error < largest_error * abs(wanted)
    assert abs(float(values.mean()) - wanted) < sigmas * error, (
        f"{float(values.mean()):.5g} +- {error:.2g}, not {wanted}"
    )


def is_mean(*args, **kwargs):
    try:
        assert_mean(*args, **kwargs)
    except AssertionError:
        return False
    return True


# --- the same step as OpenMM's ----------------------------------------------------------------------------------------


def openmm_after(system, state, walker, n_steps, timestep_fs, friction_per_ps):
    """Positions, velocities, energy and kinetic energy of OpenMM's integrator at zero temperature."""
    langevin = openmm.LangevinMiddleIntegrator(0.0, friction_per_ps, timestep_fs / 1000.0)
    langevin.setConstraintTolerance(1e-14)
    context = openmm.Context(system, langevin, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(state.positions[..., walker].numpy())
    context.setVelocities(state.velocities[..., walker].numpy())
    langevin.step(n_steps)
    end = context.getState(positions=True, velocities=True, energy=True)
    x, v = end.getPositions(asNumpy=True)._value, end.getVelocities(asNumpy=True)._value
    return x, v, end.getPotentialEnergy()._value, end.getKineticEnergy()._value


@pytest.mark.parametrize("friction", [0.0, 60.0])
@pytest.mark.parametrize(
    ("constraints", "timestep_fs"), [(None, 1.0), ("HBonds", 2.0), ("AllBonds", 2.0), (app.HAngles, 2.0)], ids=str
)
def test_same_steps_as_openmm(constraints, timestep_fs, friction):
    molecule = alanine_dipeptide("vacuum", constraints=constraints)
    langevin = integrator(molecule.system, OneByOne(molecule.system), timestep_fs, friction, constraint_tolerance=1e-14)
    hot = langevin.start(molecule.positions, [300.0, 600.0], generator=seeded(1))
    start = langevin.resume(hot.positions, hot.velocities, torch.zeros(2))
    end = langevin.run(start, 100, generator=seeded(2))
    assert end.step == 100
    for walker in range(2):
        x, v, energy, kinetic = openmm_after(molecule.system, start, walker, 100, timestep_fs, friction)
        assert np.abs(x - start.positions[..., walker].numpy()).max() > 0.005
        assert np.abs(x - end.positions[..., walker].numpy()).max() < 1e-11
        assert np.abs(v - end.velocities[..., walker].numpy()).max() < 1e-9
        assert abs(energy - float(end.energies[walker])) < 1e-8
        assert abs(kinetic - float(langevin.kinetic_energies(end)[walker])) < 1e-9


@pytest.mark.parametrize("frequency", [1, 4])
def test_centre_of_mass_as_in_openmm(frequency):
    system = particles([12.0, 1.0, 16.0], remover=frequency)
    spring = openmm.CustomExternalForce("500*(x^2+y^2+z^2)")
    for i in range(3):
        spring.addParticle(i)
    system.addForce(spring)
    langevin = integrator(system, Springs(1000.0), 2.0, 0.0)
    start = langevin.start(torch.randn(1, 3, 3, generator=seeded(1)), [300.0], generator=seeded(2))
    wanted = openmm_after(system, start, 0, 30, 2.0, 0.0)
    end = langevin.run(langevin.run(start, 13, generator=seeded(3)), 17, generator=seeded(4))
    assert np.abs(wanted[0] - end.positions[..., 0].numpy()).max() < 1e-12
    bare = integrator(particles([12.0, 1.0, 16.0]), Springs(1000.0), 2.0, 0.0).run(start, 30, generator=seeded(3))
    assert np.abs(wanted[0] - bare.positions[..., 0].numpy()).max() > 1e-3


@pytest.mark.parametrize("constraints", [None, "HBonds"])
def test_loose_projection_of_velocities_is_good_enough(constraints):
    """Velocities are projected to a tolerance that the later correction of positions forgives."""
    molecule = alanine_dipeptide("vacuum", constraints=constraints)
    energy, ends = OneByOne(molecule.system), []
    for tolerance in (1e-9, 1e-14):
        langevin = integrator(molecule.system, energy, 2.0, 5.0, constraint_tolerance=tolerance)
        start = langevin.start(molecule.positions, [600.0] * 4, generator=seeded(1))
        ends.append(langevin.run(start, 20, generator=seeded(2)))
    assert float((ends[0].positions - ends[1].positions).abs().max()) < 1e-9
    assert float((ends[0].velocities - ends[1].velocities).abs().max()) < 2e-7


# --- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("friction", [20.0, 200.0])
def test_harmonic_oscillators_are_exact_at_any_time_step(friction):
    """omega dt = 1, where velocity Verlet's energies are a quarter off."""
    masses, temperatures, dt = [1.0, 4.0], torch.tensor([100.0, 300.0, 1000.0]).repeat(1000), 0.004
    k = 1.0 / dt**2  # of the lighter particle: omega dt = 1
    langevin = integrator(particles(masses), Springs(k), 1000.0 * dt, friction)
    g = seeded(1)
    x = torch.randn(len(temperatures), 2, 3, generator=g) * (kT(temperatures) / k).sqrt()[:, None, None]
    state = langevin.run(langevin.start(x, temperatures, generator=g), 100, generator=g)
    squares = torch.zeros(3, *state.positions.shape)
    n = 15
    for _ in range(n):
        state = langevin.run(state, 20, generator=g)
        on_time = state.velocities[0] + 0.5 * dt * state.forces[0] / masses[0]
        squares[:2] += torch.stack([state.positions**2, state.velocities**2]) / n
        squares[2, 0] += on_time**2 / n
    for temperature in (100.0, 300.0, 1000.0):
        rows = temperatures == temperature
        for atom, mass in enumerate(masses):
            assert_mean(squares[0, atom][:, rows], kT(temperature) / k)
            assert_mean(squares[1, atom][:, rows], kT(temperature) / mass)
        # 1 - (omega dt)^2/4 for velocities at the time of x: the time step is long enough to matter
        assert_mean(squares[2, 0][:, rows], 0.75 * kT(temperature) / masses[0])
        assert not is_mean(squares[0, 0][:, rows], 1.05 * kT(temperature) / k)


def test_free_particles_forget_their_velocity_as_they_should():
    temperatures = torch.tensor([200.0, 800.0]).repeat(3000)
    langevin = integrator(particles([2.0, 9.0]), Springs(), 2.0, 10.0)
    state = langevin.start(torch.zeros(2, 3), temperatures, generator=seeded(1))
    later = langevin.run(state, 40, generator=seeded(2))
    decay = math.exp(-10.0 * 0.002)
    for temperature in (200.0, 800.0):
        rows = temperatures == temperature
        for atom, mass in enumerate((2.0, 9.0)):
            v, w = state.velocities[atom][:, rows], later.velocities[atom][:, rows]
            assert_mean(v**2, kT(temperature) / mass, largest_error=0.03)
            assert_mean(w**2, kT(temperature) / mass, largest_error=0.03)
            assert_mean(v * w, decay**40 * kT(temperature) / mass, largest_error=0.05)
            # x is the sum of (v + v')/2 over all steps; its covariance with v is a geometric series
            drift = later.positions[atom][:, rows]
            series = 0.5 * (1 + decay) * (1 - decay**40) / (1 - decay)
            assert_mean(v * drift, 0.002 * series * kT(temperature) / mass, largest_error=0.05)


def test_massless_particles_stay_where_they_are():
    langevin = integrator(particles([0.0, 12.0, 1.0], remover=1), Springs(1000.0), 2.0, 5.0)
    assert langevin.n_degrees_of_freedom == 3
    x = torch.randn(3, 3, generator=seeded(1))
    start = langevin.start(x, [300.0] * 4, generator=seeded(2))
    end = langevin.run(start, 50, generator=seeded(3))
    assert torch.equal(end.positions[0], x[0][:, None].expand(3, 4))
    assert not end.velocities[0].any()
    assert float((end.positions[1:] - start.positions[1:]).abs().min()) > 1e-4


@pytest.mark.parametrize(("remover", "dtype"), [(0, torch.float64), (1, torch.float32)])
def test_equipartition_with_constraints(remover, dtype):
    """Kinetic energy of free pairs, each rigid: 3N - C - 3 degrees of freedom."""
    dt, friction, masses = 2.0, 5.0, [12.0, 1.0] * 2
    system = particles(masses, remover, [(0, 1, 0.11), (2, 3, 0.11)])
    langevin = integrator(system, Springs(), dt, friction, dtype=dtype)
    assert langevin.n_degrees_of_freedom == 12 - 2 - 3 * remover
    x = torch.tensor([[0.0, 0, 0], [0.11, 0, 0], [0, 1, 0], [0, 1, 0.11]])
    temperatures = torch.tensor([150.0, 600.0]).repeat(1000)
    g = seeded(5)
    state = langevin.start(x, temperatures, generator=g)
    means = torch.zeros(2000)
    for _ in range(6):
        state = langevin.run(state, 30, generator=g)
        means += langevin.kinetic_temperatures(state) / temperatures / 6
    # The last kick of noise has moved the centre of mass since it was stopped, and pulls at the constraints with half
    # of its strength until the next step takes that out.
    noise = 1.0 - math.exp(-2.0 * friction * dt / 1000.0)
    extra = noise * (3 * remover + 2 / 4)
    for temperature in (150.0, 600.0):
        rows = means[temperatures == temperature]
        assert_mean(rows, 1.0 + extra / langevin.n_degrees_of_freedom)
        for wrong in (12.0, 10.0, 9.0, 7.0):
            if wrong != langevin.n_degrees_of_freedom:
                assert not is_mean(rows * langevin.n_degrees_of_freedom / wrong, 1.0)


def test_rigid_trimer_has_the_metric_of_its_constraints():
    """p(cos) ~ sqrt(4 - cos^2) for equal masses, which no force acts on: <cos^2> = 0.3210, not 1/3."""
    c = np.linspace(-1.0, 1.0, 100_001)
    wanted = float((c**2 * np.sqrt(4 - c**2)).sum() / np.sqrt(4 - c**2).sum())
    assert abs(wanted - 0.3210) < 2e-4
    langevin = integrator(rigid_trimer().system, Springs(), 10.0, 4.0, constraint_tolerance=1e-6)
    g, n, rows = seeded(1), 1600, 8
    cosines = torch.rand(n, generator=g) * 2 - 1  # the wrong distribution to start from
    x = torch.zeros(n, 3, 3)
    x[:, 0, 0], x[:, 2, 0], x[:, 2, 1] = 0.15, 0.15 * cosines, 0.15 * (1 - cosines**2).sqrt()
    state = langevin.start(x, torch.full((n,), 300.0), generator=g)
    squares = torch.zeros(n)
    for row in range(-2, rows):
        state = langevin.run(state, 50, generator=g)
        one, other = state.positions[0] - state.positions[1], state.positions[2] - state.positions[1]
        if row >= 0:
            squares += ((one * other).sum(0) / 0.15**2) ** 2 / rows
    assert_mean(squares, wanted)
    assert not is_mean(squares, 1.0 / 3.0)


def trimer_energies(temperature, rigid):
    """Mean and variance of U of the harmonic trimer over kT, by quadrature: bonds and angle are independent."""
    mean = variance = 0.0
    (r0, k), (theta0, bend), tau = TRIMER["bond"], TRIMER["angle"], kT(temperature)
    r, theta = np.linspace(0.5 * r0, 1.5 * r0, 20_001), np.linspace(0.0, np.pi, 20_001)
    metric = np.sqrt(4 - np.cos(theta) ** 2) if rigid else 1.0
    terms = [(0.5 * bend * (theta - theta0) ** 2 / tau, np.sin(theta) * metric)]
    if not rigid:
        terms += 2 * [(0.5 * k * (r - r0) ** 2 / tau, r**2)]
    for u, volume in terms:
        p = volume * np.exp(-u)
        p /= p.sum()
        mean += (u * p).sum()
        variance += (u**2 * p).sum() - (u * p).sum() ** 2
    return mean, variance


@pytest.mark.parametrize("rigid", [False, True])
def test_energies_of_a_molecule_are_distributed_as_they_should(rigid):
    molecule = rigid_harmonic_trimer() if rigid else harmonic_trimer()
    langevin = integrator(
        molecule.system, BatchedEnergy(molecule.system, compile=False), 2.0, 20.0, constraint_tolerance=1e-6
    )
    g, temperatures = seeded(1), torch.tensor([300.0, 600.0]).repeat(1000)
    state = langevin.run(langevin.start(molecule.positions, temperatures, generator=g), 100, generator=g)
    energies = []
    for _ in range(8):
        state = langevin.run(state, 25, generator=g)
        energies.append(state.energies / kT(temperatures))
    for temperature in (300.0, 600.0):
        mean, variance = trimer_energies(temperature, rigid)
        found = torch.stack(energies)[:, temperatures == temperature]
        assert_mean(found.mean(0), mean)
        assert_mean(((found - mean) ** 2).mean(0), variance, largest_error=0.1)
        assert not is_mean(found.mean(0), mean + 0.1)


@pytest.mark.slow
def test_alanine_dipeptide_has_the_energies_of_openmm():
    """Mean and spread of U at 600 K with rigid X-H bonds at 2 fs, against OpenMM's own integrator."""
    molecule = alanine_dipeptide(constraints="HBonds")
    langevin = integrator(
        molecule.system, BatchedEnergy(molecule.system, compile=False), 2.0, 10.0, dtype=torch.float32
    )
    g, temperatures = seeded(1), torch.full((128,), 600.0)
    state = langevin.run(langevin.start(molecule.positions, temperatures, generator=g), 600, generator=g)
    batched = []
    for _ in range(30):
        state = langevin.run(state, 40, generator=g)
        batched.append(state.energies.double())
    one = openmm.LangevinMiddleIntegrator(600.0, 10.0, 0.002)
    one.setRandomNumberSeed(1)
    platform = openmm.Platform.getPlatformByName("CPU")
    context = openmm.Context(molecule.system, one, platform, {"Threads": "1"})
    context.setPositions(np.array(molecule.positions))
    context.setVelocitiesToTemperature(600.0, 1)
    one.step(1000)
    single = torch.zeros(900)
    for row in range(len(single)):
        one.step(40)
        single[row] = context.getState(energy=True).getPotentialEnergy()._value
    batched, single = torch.stack(batched).mean(0), single.reshape(30, 30).mean(1)  # over 2.4 ps each
    error = math.hypot(batched.std() / len(batched) ** 0.5, single.std() / len(single) ** 0.5)
    assert error < 1.5, "kJ/mol; a degree of freedom more or less is 2.5"
    assert abs(float(batched.mean() - single.mean())) < 4.0 * error
    assert abs(float(langevin.kinetic_temperatures(state).mean()) - 600.0) < 4.0 * 600.0 * (2 / 51 / 128) ** 0.5


# --- swaps ------------------------------------------------------------------------------------------------------------

LADDER = (300.0, 600.0)


def swapping(n_rounds, change=lambda state: {}, n=1500, seed=1):
    """x^2 and v^2 over kT/k and kT/m of oscillators at omega dt = 1 with a swap every 2 steps.

    `change` gives what swap is to be told instead of the truth.

    Returns:
        means over the n walkers at a temperature and 10 rounds, (rounds / 10, 2, levels), and the acceptance.
    """
    dt = 0.004
    langevin = integrator(particles([1.0]), Springs(dt**-2), 1000.0 * dt, 100.0)
    g, temperatures = seeded(seed), torch.tensor(LADDER).repeat_interleave(n)
    x = torch.randn(2 * n, 1, 3, generator=g) * (kT(temperatures) * dt**2).sqrt()[:, None, None]
    state = langevin.start(x, temperatures, generator=g)
    means, n_accepted = torch.zeros(n_rounds, 2, 2), 0
    for row in means:
        state = langevin.run(state, 2, generator=g)
        swapped, info = langevin.swap(replace(state, **change(state)), generator=g)
        state = replace(swapped, energies=state.energies, forces=state.forces)
        n_accepted += int(info.n_accepted)
        assert int(info.n_tried) == n
        for level, temperature in enumerate(LADDER):
            rows = state.temperatures == temperature
            row[0, level] = (state.positions[..., rows] ** 2).mean() / (kT(temperature) * dt**2)
            row[1, level] = (state.velocities[..., rows] ** 2).mean() / kT(temperature)
    return means.unflatten(0, (-1, 10)).mean(1), n_accepted / n_rounds / n


def test_swaps_keep_every_temperature_exact():
    means, acceptance = swapping(300)
    for value in means.flatten(1).T:
        assert_mean(value, 1.0, largest_error=0.003)
    rng = np.random.default_rng(1)
    low, high = rng.gamma(1.5, 1.0, (2, 200_000)) * np.array([[1.0], [2.0]])  # energies over the lower kT
    wanted = np.minimum(1.0, np.exp(0.5 * (low - high))).mean()
    assert abs(acceptance - wanted) < 0.01


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {"energies": torch.zeros_like(state.energies)},  # no Metropolis test
        lambda state: {"energies": -state.energies},
        lambda state: {"forces": torch.zeros_like(state.forces)},  # velocities rescaled half a step late
    ],
    ids=["no test", "wrong sign", "plain rescaling"],
)
def test_wrong_swaps_are_noticed(change):
    means, _ = swapping(300, change)
    assert not all(is_mean(value, 1.0, largest_error=0.003) for value in means[:, 0].T)
    assert all(float(value.std()) < 0.02 for value in means[:, 0].T)  # it is the mean that is off


def test_swaps_pair_neighbours_in_turn():
    langevin = integrator(particles([1.0]), Springs(1000.0), 2.0, 5.0)
    temperatures = torch.tensor([300.0, 400.0, 500.0, 600.0]).repeat(5)[:18]
    g = seeded(1)
    state = langevin.run(langevin.start(torch.zeros(1, 3), temperatures, generator=g), 100, generator=g)
    tried = []
    for _ in range(3):
        new, info = langevin.swap(state, generator=g)
        assert info.levels.tolist() == [300.0, 400.0, 500.0, 600.0]
        assert bool((info.n_accepted <= info.n_tried).all())
        assert torch.equal(new.temperatures.sort()[0], state.temperatures.sort()[0])
        moved = new.temperatures != state.temperatures
        assert int(moved.sum()) == 2 * int(info.n_accepted.sum()) > 0
        assert torch.equal(new.positions, state.positions)
        assert torch.equal(new.velocities[..., ~moved], state.velocities[..., ~moved])
        assert bool((new.velocities[..., moved] != state.velocities[..., moved]).all())
        tried.append(info.n_tried.tolist())
        state = new
    assert tried == [[5, 0, 4], [0, 4, 0], [5, 0, 4]]
    assert (state.step, state.n_swaps) == (100, 3)


def test_one_temperature_has_nothing_to_swap():
    langevin = integrator(particles([1.0]), Springs(1000.0))
    state = langevin.start(torch.zeros(1, 3), [300.0] * 3, generator=seeded(1))
    new, info = langevin.swap(state, generator=seeded(2))
    assert torch.equal(new.velocities, state.velocities)
    assert info.n_tried.numel() == 0


def test_swapped_velocities_stay_on_the_constraints():
    molecule = alanine_dipeptide("vacuum", constraints="HBonds")
    langevin = integrator(molecule.system, OneByOne(molecule.system), 2.0, 5.0)
    g = seeded(1)
    state = langevin.run(langevin.start(molecule.positions, [300.0, 310.0] * 4, generator=g), 10, generator=g)
    state = replace(state, velocities=langevin.constraints.velocities(state.velocities, state.positions))
    new, info = langevin.swap(state, generator=g)
    assert int(info.n_accepted) > 0
    again = langevin.constraints.velocities(new.velocities, new.positions)
    assert float((again - new.velocities).abs().max()) < 1e-6


# --- states -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("constraints", [None, "HBonds"])
def test_pieces_give_the_same_bits_as_the_whole(constraints, dtype):
    molecule = alanine_dipeptide("vacuum", constraints=constraints)
    energy = OneByOne(molecule.system)
    langevin = integrator(molecule.system, energy, 2.0, 5.0, dtype=dtype)
    temperatures = torch.tensor([300.0, 320.0, 340.0])
    ends = []
    for pieces in ([12, 12], [5, 7, 1, 11], [12, 0, 12]):
        g = seeded(3)
        state = langevin.start(molecule.positions, temperatures, generator=g)
        for n in pieces:
            if state.step == 12 and not state.n_swaps:
                state, _ = langevin.swap(state, generator=g)
            state = langevin.run(state, n, generator=g)
            if len(pieces) == 4:  # as from a file
                other, g = g, torch.Generator()
                g.set_state(other.get_state())
                numbers = {"step": state.step, "n_swaps": state.n_swaps}
                again = [torch.tensor(x.numpy()) for x in (state.positions, state.velocities, state.temperatures)]
                state = integrator(molecule.system, energy, 2.0, 5.0, dtype=dtype).resume(*again, **numbers)
        ends.append(state)
    for other in ends[1:]:
        for name in ("positions", "velocities", "forces", "energies", "temperatures", "step", "n_swaps"):
            one, two = getattr(ends[0], name), getattr(other, name)
            assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two
    other = langevin.run(langevin.start(molecule.positions, temperatures, generator=seeded(4)), 24, generator=seeded(3))
    assert float((other.positions - ends[0].positions).abs().max()) > 1e-3


def test_a_state_has_the_energies_of_its_positions_and_is_left_alone():
    molecule = alanine_dipeptide("vacuum")
    energy = OneByOne(molecule.system)
    langevin = integrator(molecule.system, energy)
    start = langevin.start(molecule.positions, [300.0, 600.0], generator=seeded(1))
    copy = {name: value.clone() for name, value in vars(start).items() if isinstance(value, torch.Tensor)}
    torch.manual_seed(5)
    before = torch.get_rng_state()
    end = langevin.run(start, 7, generator=seeded(2))
    langevin.swap(end, generator=seeded(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(value, getattr(start, name)) for name, value in copy.items())
    for state in (start, end):
        energies, forces = energy.evaluate(state.positions)
        assert torch.equal(energies, state.energies)
        assert torch.equal(forces, state.forces)


def test_single_precision_follows_double_for_a_while():
    molecule = alanine_dipeptide("vacuum", constraints="HBonds")
    ends = []
    for dtype in (torch.float32, torch.float64):
        langevin = integrator(molecule.system, OneByOne(molecule.system), 2.0, 0.0, dtype=dtype)
        exact = integrator(molecule.system, OneByOne(molecule.system), 2.0, 0.0)
        start = exact.start(molecule.positions, [300.0, 600.0], generator=seeded(1))
        start = langevin.resume(start.positions.to(dtype), start.velocities.to(dtype), start.temperatures)
        ends.append(langevin.run(start, 50, generator=seeded(2)))
    assert ends[0].positions.dtype == ends[0].energies.dtype == torch.float32
    assert float((ends[0].positions - ends[1].positions).abs().max()) < 1e-5


def test_walkers_may_start_from_one_geometry_or_from_their_own():
    langevin = integrator(particles([1.0, 2.0]), Springs(10.0))
    x = torch.randn(4, 2, 3, generator=seeded(1))
    own = langevin.start(x, [300.0] * 4, generator=seeded(2))
    assert torch.equal(own.positions, x.permute(1, 2, 0))
    same = langevin.start(x[0].numpy(), np.full(4, 300.0), generator=seeded(2))
    assert torch.equal(same.positions, x[0][..., None].expand(2, 3, 4))
    assert torch.equal(same.velocities, own.velocities)


# --- failures ---------------------------------------------------------------------------------------------------------


class Trap(Springs):
    """Not finite where a particle is further than 1 nm."""

    def evaluate(self, x):
        lost = x.abs().amax((0, 1)) > 1.0
        return tuple(torch.where(lost, math.nan, values) for values in super().evaluate(x))


@pytest.mark.parametrize("n_steps", [1, 30, 100, 250])
def test_walkers_that_explode_are_named(n_steps):
    langevin = integrator(particles([1.0, 1.0]), Trap(100.0), 2.0, 1.0)
    x = torch.full((12, 2, 3), 0.01)
    x[4, 1, 2], x[7, 0, 0] = 1.5, 1.2
    state = langevin.start(x, [10.0] * 12, generator=seeded(1))
    message = (
        rf"2 of 12 walkers exploded within 100 steps before step {min(n_steps, 100)} \(walkers 4, 7: energy or "
        r"positions are not finite\); use a smaller timestep_fs than 2, or check the molecule's forces"
    )
    with pytest.raises(ValueError, match=message):
        langevin.run(state, n_steps, generator=seeded(2))


def test_too_long_a_time_step_with_constraints_is_named():
    molecule = alanine_dipeptide("vacuum", constraints="HBonds")
    langevin = integrator(molecule.system, OneByOne(molecule.system), 30.0, 1.0, dtype=torch.float32)
    state = langevin.start(molecule.positions, [600.0] * 6, generator=seeded(1))
    with pytest.raises(ValueError, match=r"step \d+ of 30 fs: constraints cannot be met in \d of 6 walkers \("):
        langevin.run(state, 100, generator=seeded(2))


def with_virtual_site():
    system = particles([1.0, 1.0, 0.0])
    system.setVirtualSite(2, openmm.TwoParticleAverageSite(0, 1, 0.5, 0.5))
    return system


def with_force(force):
    system = particles([1.0])
    system.addForce(force)
    return system


@pytest.mark.parametrize(
    ("system", "options", "message"),
    [
        (particles([1.0]), {"timestep_fs": 0.0}, "timestep_fs must be finite and above 0, not 0"),
        (particles([1.0]), {"timestep_fs": math.nan}, "timestep_fs must be finite and above 0, not nan"),
        (particles([1.0]), {"friction_per_ps": -1.0}, "friction_per_ps must be finite and at least 0, not -1"),
        (with_virtual_site(), {}, r"has 1 virtual sites \(first: particle 2\)"),
        (with_force(openmm.MonteCarloBarostat(1, 300)), {}, "MonteCarloBarostat cannot act in batched dynamics"),
        (with_force(openmm.AndersenThermostat(300, 1)), {}, "AndersenThermostat cannot act in batched dynamics"),
        (particles([1.0, 0.0], constraints=[(0, 1, 0.1)]), {}, "atoms 0 and 1 involves a particle without mass"),
        (particles([1.0, 1.0], constraints=[(0, 1, 0.1)]), {"constraint_tolerance": 1e-18}, "below the precision"),
    ],
)
def test_what_cannot_be_integrated_is_refused(system, options, message):
    with pytest.raises(ValueError, match=message):
        integrator(system, Springs(), **options)


@pytest.mark.parametrize(
    ("positions", "temperatures", "message"),
    [
        (torch.zeros(3, 3), [300.0], "3, 3.*2 atoms in the System"),
        (torch.zeros(2, 2, 3), [300.0], "do not fit"),
        (torch.zeros(2, 3), [], "do not fit"),
        (torch.zeros(2, 3), [300.0, 0.0], "temperatures finite and above 0 K"),
        (torch.zeros(2, 3), [300.0, math.nan], "temperatures finite and above 0 K"),
        (torch.full((2, 3), math.nan), [300.0], "positions must be finite"),
    ],
)
def test_what_cannot_be_started_from_is_refused(positions, temperatures, message):
    with pytest.raises(ValueError, match=message):
        integrator(particles([1.0, 1.0]), Springs()).start(positions, temperatures, generator=seeded(1))
