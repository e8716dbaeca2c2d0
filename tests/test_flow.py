"""The flow from end to end: steerable in Cartesian space, faithful, blind to rigid motion, right in absolute terms."""

import math

import laws
import numpy as np
import pytest
import scipy.integrate
import torch
from molecules import (
    MOLECULES,
    TRIMER,
    chain4_internals,
    chain4_log_z,
    dynamics,
    frames_of,
    harmonic_chain4,
    harmonic_trimer,
    internals_of,
    perturbed,
    rigid_harmonic_trimer,
    seeded,
)
from openmm import unit

from openmm_tsf.energy import OpenMMEnergy
from openmm_tsf.ensemble import draw
from openmm_tsf.flow import Flow, FlowSettings, build_flow
from openmm_tsf.systems import Molecule
from openmm_tsf.trajectories import Frames
from openmm_tsf.units import kT
from openmm_tsf.zmatrix import build_zmatrix

SMALL = {"blocks": 2, "hidden": 8, "depth": 1, "energy_order": 3, "entropy_order": 2}
N_FRAMES = 1000


def flow_of(name: str, size: float = 0.15, **settings) -> Flow:
    """A small flow of one of MOLECULES at 600 K, with random weights."""
    frames = Frames(frames_of(name, N_FRAMES), np.full(N_FRAMES, 600.0))
    flow = build_flow(MOLECULES[name](), frames, FlowSettings(**{**SMALL, **settings}), generator=seeded(1))
    return perturbed(flow, size).requires_grad_(False)


def frames(name: str = "ala2", n: int = N_FRAMES) -> torch.Tensor:
    return torch.tensor(frames_of(name, N_FRAMES)[:n])


def moved(x: torch.Tensor, seed: int = 5) -> torch.Tensor:
    """Every frame turned and shifted at random."""
    g = seeded(seed)
    turn, _ = torch.linalg.qr(torch.randn(len(x), 3, 3, generator=g))
    turn = turn * torch.linalg.det(turn)[:, None, None]  # no reflections
    return x @ turn.mT + 3.0 * torch.randn(len(x), 1, 3, generator=g)


# --- steerable --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ala2", "ala2 rigid", "three residues", "proline"])
def test_flows_steer_in_cartesian_space(name):
    flow = flow_of(name)
    x = frames(name)
    assert float(flow.at(600.0).log_prob(x).std()) > 10.0  # not the trivial law of a constant
    laws.steerable(flow, x, 300.0, 600.0, bound=1e-9)
    laws.steerable(flow, x, 150.0, 600.0, bound=1e-9)


@pytest.mark.parametrize("settings", [{"entropy_order": 0}, {"blocks": 1}, {"depth": 3}], ids=str)
def test_flows_of_other_architecture_steer(settings):
    laws.steerable(flow_of("ala2", **settings), frames(), 300.0, 600.0, bound=1e-9)


def test_a_free_affine_coupling_visibly_breaks_the_law():
    flow = flow_of("ala2", kind="real-nvp", momenta=False, size=0.1)
    assert laws.steering_spread(flow, frames(), 300.0, 600.0) > 0.1


@pytest.mark.parametrize("kind", ["tsf", "real-nvp", "spline"])
def test_exploring_is_refused_where_it_would_do_nothing(kind):
    steered = flow_of("ala2", kind=kind, size=0.0).at(300.0)
    with pytest.raises(ValueError, match=f"explore = 0.1 is not possible: flows of kind '{kind}' have no potentials"):
        steered.exploring(0.1)
    assert steered.exploring(0.0) == steered


def test_the_entropy_changes_populations_but_not_the_law():
    """Potential energies, and so heat capacities, that differ from basin to basin: the point of the prior."""
    flow = flow_of("ala2")
    a = torch.rand(2000, flow.prior.n_soft, generator=seeded(2)) * laws.TWO_PI
    hot, cold = (flow.at(t).prior.log_prob_torsions(a) for t in (600.0, 300.0))
    spread = cold - 2.0 * hot  # constant without entropy
    assert float(spread.max() - spread.min()) > 0.1


# --- faithful ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [600.0, 300.0])
@pytest.mark.parametrize("name", ["ala2", "ala2 rigid", "proline"])
def test_draws_are_scored_as_they_are_drawn(name, temperature):
    flow = flow_of(name, size=0.03)
    laws.faithful(flow.at(temperature), 500, seeded(3), atol=1e-7)


def test_a_score_that_forgets_a_constant_is_noticed():
    flow = flow_of("ala2", size=0.03)

    class Forgetful:
        def sample(self, n, *, generator):
            x, log_prob = flow.at(300.0).sample(n, generator=generator)
            return x, log_prob + 1e-6

        log_prob = staticmethod(flow.at(300.0).log_prob)

    with pytest.raises(AssertionError, match="log_prob of draws is off"):
        laws.faithful(Forgetful(), 100, seeded(3), atol=1e-7)


def test_proposals_off_the_chart_are_nan_and_masked():
    steered = flow_of("ala2").at(1500.0)
    x, log_prob, valid = steered.propose(2000, generator=seeded(4))
    assert x.shape == (2000, 22, 3) and log_prob.shape == valid.shape == (2000,)
    assert 100 < int(valid.sum()) < 1900
    assert torch.isfinite(x[valid]).all() and torch.isnan(x[~valid]).all()
    assert torch.isfinite(log_prob).all()
    assert float((steered.log_prob(x[valid]) - log_prob[valid]).abs().max()) < 1e-6


def test_samples_are_the_valid_proposals_in_order():
    steered = flow_of("ala2").at(1500.0)
    x, log_prob = steered.sample(300, generator=seeded(4))
    proposed, log_q, valid = steered.propose(300, generator=seeded(4))
    n = int(valid.sum())
    assert x.shape == (300, 22, 3) and log_prob.shape == (300,) and torch.isfinite(log_prob).all() and n < 300
    assert torch.equal(x[:n], proposed[valid]) and torch.equal(log_prob[:n], log_q[valid])
    assert torch.isfinite(steered.log_prob(x)).all()


def test_none_can_be_drawn():
    x, log_prob = flow_of("ala2", size=0.03).at(300.0).sample(0, generator=seeded(1))
    assert x.shape == (0, 22, 3) and log_prob.shape == (0,)


def test_a_flow_that_never_hits_the_chart_says_so():
    flow = flow_of("ala2", size=0.03)
    flow.transform.transforms[-1].mean += 100.0
    with pytest.raises(RuntimeError, match=r"only 0 of \d+ draws are on the chart at 300 K"):
        flow.at(300.0).sample(10, generator=seeded(1))


def test_the_same_generator_gives_the_same_draws_and_no_other_state_is_touched():
    steered = flow_of("ala2", size=0.03).at(300.0)
    before = torch.random.get_rng_state()
    one, two, other = (steered.sample(20, generator=seeded(s))[0] for s in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(before, torch.random.get_rng_state())


def test_weights_between_two_temperatures_average_to_one():
    """q_T at one temperature against q_T at another, both through Cartesian space: normalised over the whole map."""
    flow = flow_of("chain4", size=0.05)
    x, log_q, valid = flow.at(600.0).propose(20_000, generator=seeded(6))
    assert valid.all()  # the part off the chart would be missing
    laws.mean_weight_is_one(flow.at(500.0).log_prob(x), log_q)


def test_exploring_flows_are_faithful_and_their_weights_exact():
    flow = flow_of("ala2", size=0.05)
    steered = flow.at(300.0)
    exploring = steered.exploring(0.2)
    laws.faithful(exploring, 300, seeded(3), atol=1e-7)
    x, log_q, valid = exploring.propose(20_000, generator=seeded(6))
    assert valid.all()  # the part off the chart would be missing
    laws.mean_weight_is_one(steered.log_prob(x), log_q)
    assert torch.equal(steered.exploring(0.0).log_prob(x[:5]), steered.log_prob(x[:5]))
    assert laws.difference(exploring.log_prob(x), steered.log_prob(x)) > 0.2
    with pytest.raises(ValueError, match="share of exploring draws"):
        steered.exploring(1.0)


# --- invariances and the chart ----------------------------------------------------------------------------------------


def test_rigid_motions_do_not_matter():
    steered = flow_of("ala2").at(300.0)
    x = frames(n=300)
    reference = steered.log_prob(x)
    assert float((steered.log_prob(moved(x)) - reference).abs().max()) < 1e-7 * float(reference.abs().max())
    # and internal motions do
    bent = x.clone()
    bent[:, 8] += 0.001
    assert float((steered.log_prob(bent) - reference).abs().min()) > 1e-3


def test_frames_off_the_chart_have_no_density():
    steered = flow_of("ala2").at(300.0)
    x = frames(n=6)
    x[1] = x[1] * torch.tensor([1.0, 1.0, -1.0])  # D-alanine
    internals = internals_of("ala2")
    q = internals.inverse(x)[0]
    planar = next(i for i, name in enumerate(internals.names) if name.startswith("phi(ACE1-CH3"))
    q[3, planar] = 0.1  # cis
    x[3] = internals.forward(q)[0][3]
    log_prob = steered.log_prob(x)
    assert torch.isneginf(log_prob).tolist() == [False, True, False, True, False, False]
    assert torch.isfinite(log_prob[[0, 2, 4, 5]]).all()


def test_neighbours_do_not_matter():
    steered = flow_of("ala2").at(300.0)
    x = frames(n=8)
    whole = steered.log_prob(x)
    assert float((torch.cat([steered.log_prob(x[i : i + 1]) for i in range(8)]) - whole).abs().max()) < 1e-9
    assert float((steered.log_prob(x.flip(0)).flip(0) - whole).abs().max()) < 1e-9


def test_frames_in_single_precision_are_scored_in_double_and_returned_in_single():
    steered = flow_of("ala2").at(300.0)
    x = frames(n=8).float()
    assert torch.equal(steered.log_prob(x), steered.log_prob(x.double()).float())


def test_a_flow_in_single_precision_agrees_with_its_double():
    flow = flow_of("ala2", size=0.03)
    exact = flow.at(300.0).log_prob(frames(n=50))
    single = flow.float().at(300.0)
    x, log_prob = single.sample(5, generator=seeded(1))
    assert x.dtype == log_prob.dtype == torch.float32
    assert float((single.log_prob(frames(n=50)) - exact).abs().max()) < 0.1


def test_positions_have_the_right_gradient():
    steered = flow_of("trimer", size=0.1).at(300.0)
    x = frames("trimer", 3).requires_grad_()
    assert torch.autograd.gradcheck(steered.log_prob, x, eps=1e-8, rtol=1e-3)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, -300.0, math.nan, math.inf, -5 * unit.kelvin])
def test_temperatures_must_be_above_zero(temperature):
    with pytest.raises(ValueError, match="above 0 K"):
        flow_of("trimer").at(temperature)


def test_temperatures_may_carry_a_unit():
    flow = flow_of("trimer")
    x = frames("trimer", 5)
    assert flow.at(300 * unit.kelvin).temperature == 300.0
    assert torch.equal(flow.at(300 * unit.kelvin).log_prob(x), flow.at(300).log_prob(x))
    with pytest.raises(ValueError, match="temperature has unit"):
        flow.at(2.5 * unit.kilojoule_per_mole)


def test_another_number_of_atoms_is_refused_with_numbers():
    with pytest.raises(ValueError, match=r"\(5, 21, 3\); expected \(batch, 22, 3\)"):
        flow_of("ala2").at(300.0).log_prob(frames(n=5)[:, :21])


def test_frames_that_are_not_finite_are_refused_with_numbers():
    x = frames(n=9)
    x[2, 5, 1] = math.nan
    x[7, 0] = math.inf
    with pytest.raises(ValueError, match="2 of 9 frames are not finite, the first at index 2"):
        flow_of("ala2").at(300.0).log_prob(x)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("blocks", 0), ("hidden", 0), ("depth", 0), ("energy_order", 0), ("entropy_order", -1)],
)
def test_settings_are_checked(setting, value):
    with pytest.raises(ValueError, match=f"{setting} must be at least .*not {value}"):
        FlowSettings(**{setting: value})


# --- building ---------------------------------------------------------------------------------------------------------


def test_untrained_flows_have_the_mean_and_covariance_of_the_frames(generator):
    n, temperatures = 4000, (600.0, 300.0)
    q = torch.cat([chain4_internals(n, t, seed=i) for i, t in enumerate(temperatures)])
    x = internals_of("chain4").forward(q)[0].numpy()
    flow = build_flow(
        harmonic_chain4(), Frames(x, np.repeat(temperatures, n)), FlowSettings(**SMALL), generator=generator
    )
    assert flow.training_temperature == 600.0
    for t in temperatures:
        draws, _ = flow.at(t).sample(20_000, generator=generator)
        stiff = flow.internals.inverse(draws)[0][:, :5]
        exact = chain4_internals(n, t, seed=7)[:, :5]
        assert float(((stiff.mean(0) - exact.mean(0)) / exact.std(0)).abs().max()) < 5 * math.sqrt(1 / n)
        assert float((stiff.std(0) / exact.std(0) - 1).abs().max()) < 5 * math.sqrt(1 / n)


def test_a_training_temperature_can_be_given(generator):
    x = Frames(frames_of("trimer", N_FRAMES), np.full(N_FRAMES, 600.0))
    one = build_flow(MOLECULES["trimer"](), x, generator=generator, training_temperature=450 * unit.kelvin)
    two = build_flow(MOLECULES["trimer"](), x, generator=generator)
    assert one.training_temperature == 450.0 and two.training_temperature == 600.0
    for flow in (one, two):  # tau = 1 differs, the density of the frames does not
        draws, _ = flow.at(600.0).sample(5000, generator=seeded(1))
        q, exact = flow.internals.inverse(draws)[0], flow.internals.inverse(frames("trimer"))[0]
        assert float((q.std(0) / exact.std(0) - 1).abs().max()) < 0.12


def test_too_few_frames_are_refused_with_numbers(generator):
    x = Frames(frames_of("ala2", N_FRAMES)[:100], np.full(100, 600.0))
    with pytest.raises(ValueError, match="100 frames are too few for 55 stiff coordinates"):
        build_flow(MOLECULES["ala2"](), x, generator=generator)


def test_frames_of_another_isomer_are_refused(generator):
    x = Frames(frames_of("ala2", N_FRAMES) * np.array([1, 1, -1]), np.full(N_FRAMES, 600.0))
    with pytest.raises(ValueError, match="another isomer than the reference structure"):
        build_flow(MOLECULES["ala2"](), x, generator=generator)


def test_building_is_reproducible_and_touches_no_global_state():
    x = Frames(frames_of("ala2", N_FRAMES), np.full(N_FRAMES, 600.0))
    before = torch.random.get_rng_state()
    flows = [build_flow(MOLECULES["ala2"](), x, FlowSettings(**SMALL), generator=seeded(s)) for s in (1, 1, 2)]
    assert torch.equal(before, torch.random.get_rng_state())
    states = [torch.cat([p.flatten().double() for p in flow.state_dict().values()]) for flow in flows]
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_flows_work_whatever_the_default_dtype_is():
    torch.set_default_dtype(torch.float32)
    for name in ("trimer", "rigid trimer", "chain4", "ethanol"):
        n = 200
        q = internals_of(name).reference + 1e-6 * torch.randn(n, internals_of(name).dim, generator=seeded(1)).double()
        x = internals_of(name).forward(q)[0]
        flow = build_flow(
            MOLECULES[name](), Frames(x.numpy(), np.full(n, 600.0)), FlowSettings(**SMALL), generator=seeded(1)
        )
        draws, log_prob = flow.requires_grad_(False).at(300.0).sample(10, generator=seeded(2))
        assert draws.dtype == log_prob.dtype == flow.dtype == torch.float64
        assert float((flow.at(300.0).log_prob(draws) - log_prob).abs().max()) < 1e-5


@pytest.mark.parametrize(("name", "pairs"), [("ala2", 1), ("three residues", 3), ("butane", 0), ("proline", 0)])
def test_phi_and_psi_of_a_residue_share_a_potential(name, pairs):
    internals = internals_of(name)
    n = 300
    q = internals.reference + 1e-6 * torch.randn(n, internals.dim, generator=seeded(1))
    x = Frames(internals.forward(q)[0].numpy(), np.full(n, 600.0))
    flow = build_flow(MOLECULES[name](), x, FlowSettings(**SMALL), generator=seeded(1))
    soft = [name for name, circular in zip(internals.names, internals.circular, strict=True) if circular]
    groups = flow.prior.groups
    assert sorted(i for group in groups for i in group) == list(range(len(soft)))
    joint = [group for group in groups if len(group) == 2]
    assert len(joint) == pairs
    for phi, psi in joint:  # names are phi(first second third fourth), from one end or the other
        axes = [set(soft[i][4:-1].split()[1:3]) for i in (phi, psi)]
        residue = next(iter(axes[0] & axes[1])).split("-")[0]
        assert axes == [{f"{residue}-N", f"{residue}-CA"}, {f"{residue}-CA", f"{residue}-C"}]


def test_it_says_what_it_is():
    text = repr(flow_of("ala2").at(300.0))
    assert "60 degrees of freedom" in text and "trained at 600 K" in text and "at 300 K" in text


# --- the absolute check -----------------------------------------------------------------------------------------------


def log_z_and_error(flow: Flow, molecule: Molecule, temperature: float, n: int = 20_000) -> tuple[float, float]:
    """ln Z from weights, with a bootstrap error over all draws, the rejected ones among them."""
    energy = OpenMMEnergy(molecule.system, "Reference", n_contexts=1)
    ensemble = draw(flow, energy, temperature=temperature, n=n, generator=seeded(8))
    weights = np.concatenate((ensemble.log_weights.exp().numpy(), np.zeros(ensemble.n_rejected)))
    rng = np.random.default_rng(1)
    replicates = [np.log(rng.choice(weights, len(weights)).mean()) for _ in range(200)]
    assert ensemble.log_z == pytest.approx(np.log(weights.mean()), abs=1e-9)
    return ensemble.log_z, float(np.std(replicates))


@pytest.mark.parametrize("temperature", [600.0, 424.0, 300.0])
def test_ln_z_of_a_harmonic_molecule_is_the_analytic_one(temperature):
    q = chain4_internals(4000, 900.0, seed=2)  # too wide for what it is told to be, so that weights have work to do
    x = internals_of("chain4").forward(q)[0].numpy()
    flow = build_flow(harmonic_chain4(), Frames(x, np.full(len(x), 600.0)), FlowSettings(**SMALL), generator=seeded(1))
    log_z, error = log_z_and_error(perturbed(flow, 0.03).requires_grad_(False), harmonic_chain4(), temperature)
    assert 0.003 < error < 0.03
    assert abs(log_z - chain4_log_z(temperature)) < 4 * error


def integral(f, low: float, high: float) -> float:
    return scipy.integrate.quad(f, low, high, epsabs=0, epsrel=1e-10)[0]


@pytest.mark.parametrize("temperature", [600.0, 300.0])
@pytest.mark.parametrize("rigid", [False, True], ids=["free", "rigid bonds"])
def test_ln_z_of_bonds_and_angles_as_force_fields_have_them(rigid, temperature):
    """Independent of flat internals: r^2 and sin(theta) by quadrature, sqrt(4 - cos^2) where bonds are rigid."""
    molecule = rigid_harmonic_trimer() if rigid else harmonic_trimer()
    (r0, k_bond), (t0, k_angle) = TRIMER["bond"], TRIMER["angle"]
    tau = kT(temperature)
    mass = molecule.masses[0]

    def angle(t: float) -> float:
        factor = math.sqrt(4 - math.cos(t) ** 2) / mass if rigid else 1.0
        return factor * math.sin(t) * math.exp(-0.5 * k_angle * (t - t0) ** 2 / tau)

    width = 12 * math.sqrt(tau / k_bond)
    bond = integral(lambda r: r * r * math.exp(-0.5 * k_bond * (r - r0) ** 2 / tau), r0 - width, r0 + width)
    exact = math.log(integral(angle, 0.0, math.pi)) + (0.0 if rigid else 2 * math.log(bond))
    x = dynamics(molecule, 2000, temperature=900.0, spacing=50)
    flow = build_flow(molecule, Frames(x, np.full(len(x), 600.0)), FlowSettings(**SMALL), generator=seeded(1))
    log_z, error = log_z_and_error(perturbed(flow, 0.03).requires_grad_(False), molecule, temperature)
    assert 0.0005 < error < 0.03
    assert abs(log_z - exact) < 4 * error


def test_the_constraint_factor_of_the_flow_is_that_of_its_internals():
    steered = flow_of("ala2 rigid").at(300.0)
    x = frames("ala2 rigid", 5)
    assert torch.equal(steered.log_constraint_factor(x), internals_of("ala2 rigid").log_constraint_factor(x))
    assert float(steered.log_constraint_factor(x).abs().min()) > 0.1
    assert torch.equal(flow_of("ala2").at(300.0).log_constraint_factor(x), torch.zeros(5))


def test_other_coordinates_can_be_given(generator):
    molecule = MOLECULES["ala2"]()
    z = build_zmatrix(molecule, kinds={molecule.atom_labels.index("NME3-C"): "soft"})
    x = Frames(frames_of("ala2", N_FRAMES), np.full(N_FRAMES, 600.0))
    flow = build_flow(molecule, x, FlowSettings(**SMALL), zmatrix=z, generator=generator)
    assert flow.zmatrix is z and flow.prior.n_soft == 6
