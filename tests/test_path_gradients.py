"""Path gradients: on average those of the plain losses, and without noise at the goal.

In two or three dimensions a mean over frames of a known density, and the relative entropy of a flow, are integrals:
gradients are compared to rounding instead of error bars.
"""

import dataclasses
import math

import laws
import numpy as np
import pytest
import torch
from molecules import (
    chain4,
    chain4_internals,
    coupled_energy,
    coupled_frames,
    harmonic_chain4,
    perturbed,
    seeded,
    with_system,
)
from toys import SYSTEMS

from openmm_tsf import losses, pretraining, training
from openmm_tsf.architecture import FlowSettings, build_modules
from openmm_tsf.energy import BatchedEnergy
from openmm_tsf.flow import Flow, build_flow, build_vector_flow
from openmm_tsf.internals import FlatInternals
from openmm_tsf.losses import energy_loss, likelihood_loss, slopes_of
from openmm_tsf.training import JUDGED_BY, TrainingSettings, train
from openmm_tsf.trajectories import Frames
from openmm_tsf.units import kT
from openmm_tsf.vectors import LineCoordinates, Samples
from openmm_tsf.zmatrix import build_zmatrix

HOT = 600.0
BEND = 0.1
"""How far the angles of the chain follow its torsion: all frames are on the chart."""
NO_LIMIT = 1e6
"""Where reduced energies would begin to be softened."""
SMALL = {"blocks": 1, "hidden": 5, "depth": 1, "energy_order": 2, "entropy_order": 1}
WELL = SYSTEMS["double well"]


class RingCoordinates(LineCoordinates):
    """x = (u, v, a), two lines and a circle: the least in which a map of constant volume can stretch."""

    def __init__(self) -> None:
        super().__init__(3)
        self.register_buffer("circular", torch.tensor([False, False, True]), persistent=False)


def ring(x: torch.Tensor) -> torch.Tensor:
    """Two lengths that follow an angle in a cosine."""
    u, v, a = x.T
    stretch = 2.0 * (u - 0.4 * a.cos()) ** 2 + 1.5 * (v - 0.3 * a.sin() + 0.3 * u) ** 2 + 0.3 * u**4
    return stretch + 1.2 * (1.0 - (a - 2.8).cos())


def ring_flow(size: float, **settings) -> Flow:
    """An "anharmonic" flow of two lengths and an angle: quartic and Fourier potentials, entropy, couplings of both."""
    settings = FlowSettings(**{**SMALL, **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        groups = [(0,)]
        circular = torch.tensor([False, False, True])
        modules = build_modules(settings, circular, groups, torch.zeros(2), 0.6 * torch.eye(2))
        flow = Flow(*modules, internals=RingCoordinates(), molecule=None, training_temperature=1.0, settings=settings)
    return perturbed(flow.double(), size)


def line_flow(kind: str, size: float, *, dim: int = 2, momenta: bool = False, **settings) -> Flow:
    x = torch.randn(500, dim, generator=seeded(1)).cumsum(1) + 0.3
    settings = FlowSettings(kind=kind, momenta=momenta, **{**SMALL, **settings})
    return perturbed(build_vector_flow(dim, Samples(x), settings, generator=seeded(2)), size)


def bowl(x: torch.Tensor) -> torch.Tensor:
    """A smooth energy of any dimension, neither harmonic nor even."""
    return 0.5 * ((x - 0.4) ** 2).sum(1) + 0.3 * (x.sum(1)).cos() + 0.05 * (x**4).sum(1)


TOYS = {
    "ring": (lambda size: ring_flow(size), ring, (laws.line(4.5, 45), laws.line(4.5, 45), laws.circle(32))),
    "anharmonic": (lambda size: line_flow("anharmonic", size), bowl, (laws.line(7.0, 321),) * 2),
    "tsf": (lambda size: line_flow("tsf", size), bowl, (laws.line(7.0, 321),) * 2),
    "real-nvp": (lambda size: line_flow("real-nvp", size), bowl, (laws.line(7.0, 321),) * 2),
}
"""Flow without momenta, energy, and axes of a quadrature over all space."""


def space(axes: tuple) -> tuple[torch.Tensor, float]:
    """Points (n, d) of the product of axes, and the volume of each."""
    return torch.cartesian_prod(*axes), math.prod(float(axis[1] - axis[0]) for axis in axes)


def gradient(total: torch.Tensor, flow: Flow, leave: tuple[str, ...] = ()) -> torch.Tensor:
    """d total by all parameters of the flow but those whose name holds one of `leave`, flattened."""
    parameters = [p for name, p in flow.named_parameters() if not any(part in name for part in leave)]
    parts = torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True, retain_graph=True)
    return torch.cat([part.flatten() for part in parts])


# --- likelihood: value and mean gradient ------------------------------------------------------------------------------


def boltzmann_means(flow: Flow, energy, axes, temperatures: dict[float, float], spoil: float = 0.0) -> tuple:
    """Gradients of the mean loss over the exact ensemble, plain and path, by quadrature.

    Args:
        temperatures: share of the frames at each.
        spoil: share by which slopes along the first coordinate are too large. A factor on all of them would change no
            mean where volume is preserved: there E[grad u . dG] = E[div dG] = 0.
    """
    points, _ = space(axes)
    q = points.repeat(len(temperatures), 1)
    t = torch.tensor(list(temperatures)).repeat_interleave(len(points))
    weights = [share * (-energy(points) / temperature).softmax(0) for temperature, share in temperatures.items()]
    used = torch.cat(weights) > 1e-18
    q, t, weights = q[used], t[used], torch.cat(weights)[used]
    slopes = slopes_of(flow, energy, q, t)
    slopes[:, 0] *= 1.0 + spoil
    plain, path = likelihood_loss(flow, q, t), likelihood_loss(flow, q, t, slopes=slopes)
    assert laws.difference(plain, path) < 1e-9  # the value is the plain one
    return gradient((weights * plain).sum(), flow), gradient((weights * path).sum(), flow)


@pytest.mark.parametrize("temperatures", [{1.0: 1.0}, {0.7: 1.0}, {1.0: 0.3, 0.6: 0.5, 1.3: 0.2}], ids=str)
@pytest.mark.parametrize("toy", TOYS)
def test_over_the_boltzmann_distribution_both_likelihood_gradients_have_one_mean(toy, temperatures):
    make, energy, axes = TOYS[toy]
    flow = make(0.2)
    plain, path = boltzmann_means(flow, energy, axes, temperatures)
    assert int((plain.abs() > 1e-3).sum()) > 0.6 * len(plain)
    assert laws.difference(plain, path) < 1e-6 * float(plain.abs().max())


@pytest.mark.parametrize("toy", ["ring", "tsf", "real-nvp"])
def test_wrong_slopes_are_noticed(toy):
    make, energy, axes = TOYS[toy]
    plain, path = boltzmann_means(make(0.2), energy, axes, {1.0: 1.0}, spoil=0.02)
    assert laws.difference(plain, path) > 1e-3 * float(plain.abs().max())


def test_splines_take_path_gradients_too():
    """Their slopes have kinks, which only a fine quadrature can take."""
    flow, axes = line_flow("spline", 0.2), (laws.line(6.0, 601),) * 2
    plain, path = boltzmann_means(flow, bowl, axes, {1.0: 1.0})
    assert laws.difference(plain, path) < 2e-3 * float(plain.abs().max())
    _, wrong = boltzmann_means(flow, bowl, axes, {1.0: 1.0}, spoil=0.02)
    assert laws.difference(plain, wrong) > 5e-3 * float(plain.abs().max())


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("kind", ["tsf", "real-nvp", "anharmonic"])
def test_with_momenta_the_mean_is_the_same_within_its_error(kind, temperature):
    """Both on the same frames and the same momenta, so that the difference has little noise."""
    flow = line_flow(kind, 0.15, momenta=True)
    x = WELL_FRAMES[temperature]
    rows, wrong = [], []
    for i in range(40):
        q = x[i * 500 : (i + 1) * 500]
        t = torch.full((500,), temperature)
        slopes = slopes_of(flow, bowl, q, t)
        found = [
            likelihood_loss(flow, q, t, slopes=s, generator=seeded(900 + i))
            for s in (None, slopes, slopes * torch.tensor([1.5, 1.0]))
        ]
        assert laws.difference(found[0], found[1]) < 1e-9
        means = [gradient(loss.mean(), flow) for loss in found]
        rows.append(torch.stack((means[0], means[1] - means[0])))
        wrong.append(means[2] - means[0])
    both, wrong = torch.stack(rows), torch.stack(wrong)
    mean, error = both.mean(0), both.std(0) / math.sqrt(len(rows))
    used = error[1] > 1e-12
    assert int(used.sum()) > 20
    assert float((mean[1] / error[1])[used].abs().max()) < 4.5
    assert float(error[1].max()) < 0.3 * float(mean[0].abs().max())  # so that the test sees something
    z = (wrong.mean(0) / (wrong.std(0) / math.sqrt(len(wrong))))[used]
    assert float(z.abs().max()) > 8.0


def exact_bowl(n: int, temperature: float, seed: int) -> torch.Tensor:
    """n exact draws of exp(-bowl/T) in two dimensions: rejection from a wide Gaussian."""
    g, kept = seeded(seed), []
    while sum(map(len, kept)) < n:
        x = 0.4 + math.sqrt(1.3 * temperature) * torch.randn(4 * n, 2, generator=g)
        log_ratio = -bowl(x) / temperature + 0.5 * ((x - 0.4) ** 2).sum(1) / (1.3 * temperature) - 0.3 / temperature
        assert float(log_ratio.max()) < 1e-9
        kept.append(x[torch.rand(len(x), generator=g).log() < log_ratio])
    return torch.cat(kept)[:n]


WELL_FRAMES = {t: exact_bowl(20_000, t, seed=11) for t in (1.0, 0.6)}


def test_on_a_molecule_the_mean_is_the_same_within_its_error():
    """Exact frames of a chain of four atoms, with OpenMM's units, at two temperatures at once."""
    frames = Frames(coupled_frames(2000, HOT, 3, BEND), np.full(2000, HOT))
    flow = perturbed(build_flow(harmonic_chain4(), frames, FlowSettings(**SMALL), generator=seeded(1)), 0.1)
    q = [chain4_internals(20_000, t, seed=int(t)) for t in (HOT, 400.0)]
    for part in q:
        part[:, 3:5] += BEND * part[:, 5:].cos()

    def energy(x: torch.Tensor) -> torch.Tensor:
        return coupled_energy(x, BEND)

    rows, wrong, spoil = [], [], torch.tensor([1.3, 1.0, 1.0, 1.0, 1.0, 1.0])
    for i in range(40):
        part = torch.cat([each[i * 500 : (i + 1) * 500] for each in q])
        t = torch.tensor([HOT, 400.0]).repeat_interleave(500)
        slopes = slopes_of(flow, energy, part, t)
        found = [likelihood_loss(flow, part, t, slopes=s) for s in (None, slopes, slopes * spoil)]
        assert laws.difference(found[0], found[1]) < 1e-8
        plain, path, spoilt = (gradient(loss.mean(), flow) for loss in found)
        rows.append(torch.stack((plain, path - plain)))
        wrong.append(spoilt - plain)
    both, wrong = torch.stack(rows), torch.stack(wrong)
    mean, error = both.mean(0), both.std(0) / math.sqrt(len(rows))
    used = error[1] > 1e-9 * float(error[1].max())
    assert int(used.sum()) > 50
    assert float((mean[1] / error[1])[used].abs().max()) < 4.5
    assert int(((mean[0] / error[0])[used].abs() > 10.0).sum()) > 10
    z = (wrong.mean(0) / (wrong.std(0) / math.sqrt(len(wrong))))[used]
    assert float(z.abs().max()) > 8.0


def test_torsions_that_are_cut_open_have_another_mean():
    """What flows over the cut is missing from the path gradient, which is why training refuses it there."""
    frames = Frames(coupled_frames(2000, HOT, 3, BEND), np.full(2000, HOT))
    settings = FlowSettings(kind="tsf", momenta=False, **SMALL)
    flow = perturbed(build_flow(harmonic_chain4(), frames, settings, generator=seeded(1)), 0.05)
    x = coupled_frames(20_000, HOT, 8, BEND)
    q, kept = flow.internals.of_frames(x)
    assert kept.all()
    rows = []
    for part in q.split(500):
        t = torch.full((len(part),), HOT)
        slopes = slopes_of(flow, lambda x: coupled_energy(x, BEND), part, t)
        plain, path = (gradient(likelihood_loss(flow, part, t, slopes=s).mean(), flow) for s in (None, slopes))
        rows.append(path - plain)
    rows = torch.stack(rows)
    z = rows.mean(0) / (rows.std(0) / math.sqrt(len(rows))).clamp_min(1e-12)
    assert float(z.abs().max()) > 8.0


def test_training_takes_no_path_gradients_where_torsions_are_cut_open(tmp_path):
    frames = Frames(coupled_frames(400, HOT, 3, BEND), np.full(400, HOT))
    flow = build_flow(harmonic_chain4(), frames, FlowSettings(kind="tsf", **SMALL), generator=seeded(1))
    settings = TrainingSettings(steps=2, batch_frames=8, batch_draws=8, energy_weight=0.0)
    with pytest.raises(ValueError, match="wrong for flows of kind 'tsf', whose torsions are cut open"):
        asked = dataclasses.replace(settings, estimator="path")
        train(flow, frames, coupled_energy, asked, directory=tmp_path / "path", seed=1)
    history = train(flow, frames, coupled_energy, settings, directory=tmp_path / "plain", seed=1)
    assert history.n_energy_evaluations == 0  # no forces at the frames were needed


# --- likelihood: no noise where the flow is right ---------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("toy", TOYS)
def test_where_the_flow_is_right_no_frame_says_anything(toy, temperature):
    """Each frame by itself: its gradient is zero, and not only the mean; plain ones are not.

    A flow that is right at one temperature is right at all of them if it steers, and only then.
    """
    flow, frozen = TOYS[toy][0](0.3), TOYS[toy][0](0.3).requires_grad_(False)

    def energy(x: torch.Tensor) -> torch.Tensor:
        return -frozen.at(1.0).log_prob(x)

    q, _ = frozen.at(1.0).sample(200, generator=seeded(4))
    t = torch.full((200,), temperature)
    slopes = slopes_of(flow, energy, q, t)
    signs = torch.randn(200, generator=seeded(5))
    path = gradient((signs * likelihood_loss(flow, q, t, slopes=slopes)).sum(), flow, leave=LEFT)
    plain = gradient((signs * likelihood_loss(flow, q, t)).sum(), flow, leave=LEFT)
    assert float(plain.abs().max()) > 1.0
    if toy == "real-nvp" and temperature != 1.0:
        assert float(path.abs().max()) > 1e-2 * float(plain.abs().max())
    else:
        assert float(path.abs().max()) < 1e-7 * float(plain.abs().max())


LEFT = ("prior.",)
"""Parameters of the latent density: they have no path, and the gradient of likelihood there is the plain one."""


@pytest.mark.parametrize("toy", ["ring", "anharmonic"])
def test_latent_densities_have_the_plain_gradient(toy):
    """Also of the entropies, at every frame: densities of latents do not move along a path."""
    make, energy, _ = TOYS[toy]
    flow = make(0.2)
    q, _ = flow.at(1.0).sample(50, generator=seeded(4))
    t = torch.tensor([1.0, 0.7]).repeat(25)
    signs = torch.randn(50, generator=seeded(5))
    layers = ("transform.",)
    found = [likelihood_loss(flow, q, t, slopes=s) for s in (None, slopes_of(flow, energy, q, t))]
    plain, path = (gradient((signs * loss).sum(), flow, leave=layers) for loss in found)
    assert len(plain) >= 4 and laws.difference(plain, path) < 1e-9 * (1.0 + float(plain.abs().max()))
    assert float(plain.abs().min()) > 1e-6


def test_with_momenta_no_frame_says_anything_either():
    """A flow that starts as the right Gaussian, of positions and momenta."""
    flow = line_flow("tsf", 0.0, momenta=True)
    matrix, mean = (getattr(flow.transform.transforms[-1], name) for name in ("matrix", "mean"))
    precision = torch.linalg.inv(matrix @ matrix.T)

    def energy(x: torch.Tensor) -> torch.Tensor:
        return 0.5 * (((x - mean) @ precision) * (x - mean)).sum(1)

    q, _ = flow.at(1.0).sample(100, generator=seeded(4))
    t, signs = torch.tensor([1.0, 0.5]).repeat(50), torch.randn(100, generator=seeded(5))
    found = []
    for slopes in (slopes_of(flow, energy, q, t), None):
        loss = likelihood_loss(flow, q, t, slopes=slopes, generator=seeded(6))
        found.append(float(gradient((signs * loss).sum(), flow).abs().max()))
    assert found[0] < 1e-9 * found[1] and found[1] > 1.0


# --- slopes -----------------------------------------------------------------------------------------------------------


def differences(flow: Flow, energy, q: torch.Tensor, t: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Derivatives of U/kT by internals, by central differences of the energy of positions."""
    columns = []
    for i, step in enumerate(steps):
        shift = torch.zeros(q.shape[1])
        shift[i] = step
        up, down = (energy(flow.internals.forward(q + s)[0]) for s in (shift, -shift))
        columns.append((up - down) / (2.0 * step) / flow.kT(t))
    return torch.stack(columns, 1)


@pytest.mark.parametrize("chunk", [7, 16384])
def test_slopes_are_those_of_the_energy(chunk):
    frames = Frames(coupled_frames(2000, HOT, 3, BEND), np.full(2000, HOT))
    flow = build_flow(harmonic_chain4(), frames, FlowSettings(**SMALL), generator=seeded(1))
    energy = BatchedEnergy(harmonic_chain4().system)
    q = chain4_internals(50, HOT, seed=2)
    t = torch.tensor([300.0, 450.0, 600.0])[torch.randint(3, (50,), generator=seeded(2))]
    exact = differences(flow, energy, q, t, 1e-5 * q.std(0))
    found = slopes_of(flow, energy, q, t, chunk=chunk)
    size = exact.abs().amax(0)
    assert float(((found - exact).abs() / size).max()) < 1e-5
    by_hand = torch.tensor([4e9] * 3 + [300.0] * 2) * (q - flow.internals.reference)[:, :5] / kT(t)[:, None]
    assert float(((found[:, :5] - by_hand).abs() / size[:5]).max()) < 1e-5
    single = slopes_of(flow, energy, q.float(), t.float(), chunk=chunk)
    assert single.dtype == torch.float32 and float(((single - exact).abs() / size).max()) < 1e-3
    assert not found.requires_grad and not q.requires_grad


def test_slopes_of_plain_vectors_are_those_of_the_energy():
    flow, x = line_flow("tsf", 0.1, momenta=True), torch.randn(30, 2, generator=seeded(1))
    t = torch.linspace(0.5, 2.0, 30)
    exact = differences(flow, WELL.energy, x, t, torch.full((2,), 1e-5))
    found = slopes_of(flow, WELL.energy, x, t)
    assert found.shape == (30, 2) and laws.difference(found, exact) < 1e-6 * float(exact.abs().max())


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_forces_that_are_not_finite_are_refused(bad):
    flow, x = line_flow("tsf", 0.1), torch.randn(30, 2, generator=seeded(1))

    def broken(x: torch.Tensor) -> torch.Tensor:
        return bowl(x) * torch.where(torch.arange(len(x)) < 3, bad, 1.0)

    with pytest.raises(ValueError, match="3 of 30 frames have forces that are not finite"):
        slopes_of(flow, broken, x, torch.ones(30))


def test_frames_with_rigid_bonds_have_the_same_mean():
    """A chain of four equal atoms with three rigid bonds: two angles, a torsion, and exp(-U/kT) sqrt(det Zc)."""

    def rigid(system) -> None:
        for i, j, length in ((0, 1, 0.145), (0, 2, 0.1), (1, 3, 0.1)):
            system.addConstraint(i, j, length)
        for i in range(4):
            system.setParticleMass(i, 1.0)

    molecule = with_system(chain4(), rigid)
    zmatrix = build_zmatrix(molecule, kinds={3: "soft"})
    internals = FlatInternals(molecule, zmatrix)
    assert internals.dim == 3

    def energy(x: torch.Tensor) -> torch.Tensor:
        first, second, a = internals.inverse(x)[0].T
        angles = 18.0 * ((first - 0.15 * a.cos()) ** 2 + (second - 0.15 * a.cos()) ** 2)
        return kT(HOT) * (angles + 1.0 - a.cos())

    q, _ = space((laws.line(0.99, 41), laws.line(0.99, 41), laws.circle(32)))
    x = internals.forward(q)[0]
    factor = internals.log_constraint_factor(x)
    assert float(factor.max() - factor.min()) > 0.05
    weights = (-energy(x) / kT(HOT) + factor).softmax(0)
    picked = torch.multinomial(weights, 1000, generator=seeded(1))
    frames = Frames(x[picked].numpy(), np.full(1000, HOT))
    start = build_flow(molecule, frames, FlowSettings(**SMALL), zmatrix=zmatrix, generator=seeded(1))
    flow, t = perturbed(start, 0.2), torch.full((len(q),), HOT)
    slopes, wanted = slopes_of(flow, energy, q, t), differences(
        flow, lambda x: energy(x) - kT(HOT) * internals.log_constraint_factor(x), q, t, torch.full((3,), 1e-5)
    )  # fmt: skip
    plain, right, path = (
        gradient((weights * likelihood_loss(flow, q, t, slopes=s)).sum(), flow) for s in (None, wanted, slopes)
    )
    assert laws.difference(plain, right) < 1e-5 * float(plain.abs().max()), "the test itself is wrong"
    assert laws.difference(plain, path) < 1e-5 * float(plain.abs().max())


# --- energy: mean gradient --------------------------------------------------------------------------------------------


def relative_entropy(flow: Flow, energy, axes, temperature: float) -> torch.Tensor:
    """E_q[ln q + U/kT] by quadrature over all space; of pairs (x, p) where there are momenta."""
    points, area = space(axes)
    density = flow.at(temperature).vectors.joint_log_prob
    with torch.no_grad():
        points = points[density(points) > -40.0]
    x, p = points.split((points.shape[1] - flow.n_momenta, flow.n_momenta), 1)
    log_q, u = density(points), energy(x) / temperature + 0.5 * (p**2).sum(1) / temperature
    assert abs(float((log_q.detach().exp() * area).sum()) - 1.0) < 1e-7
    return (log_q.exp() * (log_q + u)).sum() * area


WIDE, SPACE = (laws.line(14.0, 281),) * 2, (laws.line(6.0, 49), laws.line(6.0, 49), laws.circle(32))
ENERGY_TOYS = {
    "ring": (lambda: ring_flow(0.1, quartic=False), ring, SPACE),
    "ring, quartic": (lambda: ring_flow(0.1), ring, SPACE),
    "anharmonic": (lambda: line_flow("anharmonic", 0.1), bowl, WIDE),
    "real-nvp": (lambda: line_flow("real-nvp", 0.1), bowl, WIDE),
    "tsf with momenta": (lambda: line_flow("tsf", 0.1, dim=1, momenta=True), bowl, WIDE),
    "real-nvp with momenta": (lambda: line_flow("real-nvp", 0.1, dim=1, momenta=True), bowl, WIDE),
    "anharmonic with momenta": (lambda: line_flow("anharmonic", 0.1, dim=1, momenta=True), bowl, WIDE),
}


def surrogate_gradients(flow: Flow, energy, temperature: float, n: int, **options) -> torch.Tensor:
    """Replicates (n, parameters) of the gradient of the energy loss; the quartic potentials are not its business."""
    rows = []
    for i in range(n):
        result = energy_loss(
            flow, energy, temperature, 2000, start=NO_LIMIT, generator=seeded(400 + i), **options
        )  # fmt: skip
        rows.append(gradient(result.surrogate, flow, leave=("prior.stiff",)))
    return torch.stack(rows)


@pytest.mark.parametrize("path", [True, False], ids=["path", "plain"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("toy", ENERGY_TOYS)
def test_the_energy_loss_has_the_gradient_of_the_relative_entropy(toy, temperature, path, monkeypatch):
    monkeypatch.setattr(losses, "LARGEST_ADVANTAGE", math.inf)  # a bias that is meant
    make, energy, axes = ENERGY_TOYS[toy]
    flow = make()
    exact = gradient(relative_entropy(flow, energy, axes, temperature), flow, leave=("prior.stiff",))
    rows = surrogate_gradients(flow, energy, temperature, 40, flatten=1.0, path=path)
    mean, error = rows.mean(0), rows.std(0) / math.sqrt(len(rows))
    error = error + 1e-9
    assert float(((mean - exact) / error).abs().max()) < 4.5
    assert int(((exact / error).abs() > 10.0).sum()) >= 5  # what would be missed if it were not there


@pytest.mark.parametrize("toy", ["anharmonic", "tsf with momenta", "real-nvp with momenta"])
def test_another_energy_has_another_gradient(toy):
    make, energy, axes = ENERGY_TOYS[toy]
    flow = make()
    exact = gradient(relative_entropy(flow, energy, axes, 1.0), flow, leave=("prior.stiff",))
    rows = surrogate_gradients(flow, lambda x: 1.1 * energy(x), 1.0, 40, flatten=1.0, path=True)
    error = rows.std(0) / math.sqrt(len(rows)) + 1e-9
    assert float(((rows.mean(0) - exact) / error).abs().max()) > 6.0


def test_quartic_potentials_are_left_to_the_likelihood():
    flow = ENERGY_TOYS["ring, quartic"][0]()
    stiff = list(flow.prior.stiff.parameters())
    result = energy_loss(flow, ring, 1.0, 100, start=NO_LIMIT, path=True, generator=seeded(1))
    parts = torch.autograd.grad(result.surrogate, stiff, allow_unused=True)
    assert all(part is None or float(part.abs().max()) == 0.0 for part in parts)


# --- energy: flattened draws ------------------------------------------------------------------------------------------


def twisted(size: float) -> Flow:
    """An angle turned by lengths that follow it."""
    return ring_flow(size, quartic=False, blocks=2)


@pytest.mark.parametrize("flatten", [1.0, 3.0])
def test_where_the_flow_is_right_no_draw_says_anything(flatten):
    flow, frozen = twisted(0.5), twisted(0.5).requires_grad_(False)

    def gradients(tilt: float, path: bool) -> torch.Tensor:
        return surrogate_gradients(
            flow, lambda x: tilt * x[:, 2].cos() - frozen.at(1.0).log_prob(x), 1.0, 2, flatten=flatten, path=path
        )  # fmt: skip

    plain = float(gradients(0.0, False).abs().max())
    assert float(gradients(0.0, True).abs().max()) < 1e-8 * plain
    assert float(gradients(0.5, True).abs().max()) > 0.1 * plain


MARGINAL = ("entropy",)
"""Left out here: the widths, which draws follow."""


def flattened_cloud(flow: Flow, flatten: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents on a grid, and their weights among draws with flattened torsions at T = 1."""
    points, area = space((laws.line(5.0, 41), laws.line(5.0, 41), laws.circle(32)))
    prior = flow.at(1.0).prior
    with torch.no_grad():
        hot = prior._log_prob_torsions(points[:, 2:], flatten)
        weights = (hot + prior.log_prob(points) - prior.log_prob_torsions(points[:, 2:])).exp() * area
    return points[weights > 1e-18], weights[weights > 1e-18]


def flattened_mean(flow: Flow, energy, flatten: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean path and plain gradients of layers over draws with flattened torsions, by quadrature, at T = 1.

    The path gradient is the mean of d[ln q + u]/dy . dG; the plain one is the derivative of E[ln p(u | a) - ln det + u]
    with the flattened density of a held fixed.
    """
    z, weights = flattened_cloud(flow, flatten)
    y, log_det = flow.transform(z)
    here = y.detach().requires_grad_()
    (force,) = torch.autograd.grad((flow.at(1.0).vectors.joint_log_prob(here) + energy(here)).sum(), here)
    path = gradient((weights * (force * y).sum(1)).sum(), flow, leave=MARGINAL)
    plain = gradient((weights * (energy(y) - log_det)).sum(), flow, leave=MARGINAL)
    return path, plain


def score_mean(flow: Flow, energy, flattens: tuple[float, float]) -> torch.Tensor:
    """Mean of (L - c) d ln m(a), L = ln q + u with c its mean over equal shares of two kinds of draws."""
    clouds = [flattened_cloud(flow, flatten) for flatten in flattens]
    z, weights = torch.cat([z for z, _ in clouds]), 0.5 * torch.cat([w for _, w in clouds])
    with torch.no_grad():
        y, log_det = flow.transform(z)
        level = flow.at(1.0).prior.log_prob(z) - log_det + energy(y)
        level = level - (weights * level).sum()
    return gradient((weights * level * flow.at(1.0).prior.log_prob_torsions(z[:, 2:])).sum(), flow, leave=MARGINAL)


@pytest.mark.parametrize("path", [True, False], ids=["path", "plain"])
def test_flattened_draws_have_the_gradient_that_is_meant(path, monkeypatch):
    monkeypatch.setattr(losses, "LARGEST_ADVANTAGE", math.inf)  # a bias that is meant
    flow = twisted(0.3)
    halves = [flattened_mean(flow, ring, f)[0 if path else 1] for f in (1.0, 3.0)]
    exact = 0.5 * (halves[0] + halves[1]) + score_mean(flow, ring, (1.0, 3.0))
    flat = halves[0] + score_mean(flow, ring, (1.0, 1.0))
    rows = []
    for i in range(30):
        result = energy_loss(flow, ring, 1.0, 2000, start=NO_LIMIT, flatten=3.0, path=path, generator=seeded(i))
        rows.append(gradient(result.surrogate, flow, leave=MARGINAL))
    rows = torch.stack(rows)
    error = rows.std(0) / math.sqrt(len(rows)) + 1e-9
    assert float(((rows.mean(0) - exact) / error).abs().max()) < 4.5
    assert int(((exact / error).abs() > 8.0).sum()) >= 5
    assert float(((flat - exact) / error).abs().max()) > 6.0  # flattening matters


def test_flattened_draws_keep_the_right_flow_only_with_the_path_gradient():
    """Where q is the target the path gradient has nothing to say whatever torsions it is given; the plain one has.

    The latter minimises the relative entropy of a mixture whose torsions' density does not move with the map.
    """
    flow, frozen = twisted(0.5), twisted(0.5).requires_grad_(False)
    path, plain = flattened_mean(flow, lambda x: -frozen.at(1.0).log_prob(x), 3.0)
    assert float(path.abs().max()) < 1e-9
    size = float(plain.abs().max())
    assert size > 1e-2
    path, plain = flattened_mean(flow, lambda x: -frozen.at(1.0).log_prob(x), 1.0)
    assert float(torch.cat((path, plain)).abs().max()) < 0.05 * size


def test_softened_energies_soften_the_path_gradient():
    """Above the start energies grow logarithmically, in both estimators; weights stay raw."""
    flow = line_flow("anharmonic", 0.1)
    options = {"flatten": 1.0, "generator": None}
    found = {}
    for start in (NO_LIMIT, 0.5):
        for path in (True, False):
            rows = [
                energy_loss(flow, bowl, 1.0, 2000, start=start, path=path, **{**options, "generator": seeded(i)})
                for i in range(30)
            ]
            found[start, path] = torch.stack([gradient(r.surrogate, flow, leave=("prior.",)) for r in rows])
    for start in (NO_LIMIT, 0.5):
        delta = found[start, True] - found[start, False]
        z = delta.mean(0) / (delta.std(0) / math.sqrt(30) + 1e-9)
        assert float(z.abs().max()) < 4.5
    delta = found[0.5, True] - found[NO_LIMIT, True]
    assert float((delta.mean(0) / (delta.std(0) / math.sqrt(30) + 1e-9)).abs().max()) > 8.0


# --- training ---------------------------------------------------------------------------------------------------------

SHORT = TrainingSettings(
    steps=24, batch_frames=32, batch_draws=16, evaluate_every=4, checkpoint_every=6, patience=50, held_out=0.2
)


class Interrupted(Exception):
    """Stands for Ctrl-C."""


def stop_at(step: int | None):
    def progress(done: int, total: int, message: str) -> None:
        if done == step:
            raise Interrupted

    return progress


def trained(what: str, estimator: str, directory, stop: int | None = None):
    """A short run of a molecule or of vectors, from scratch or on: (flow, history)."""
    settings = dataclasses.replace(SHORT, estimator=estimator)
    if what == "molecule":
        frames = Frames(coupled_frames(400, HOT, 3, BEND), np.repeat([HOT, 500.0], 200))
        flow = build_flow(harmonic_chain4(), frames, FlowSettings(**SMALL), generator=seeded(1))
        energy = coupled_energy
    else:
        frames, energy = Samples(WELL_FRAMES[1.0][:400]), bowl
        flow_settings = FlowSettings(kind=what, momenta=True, **SMALL)
        flow = build_vector_flow(2, frames, flow_settings, generator=seeded(1))
    history = train(flow, frames, energy, settings, directory=directory, seed=5, progress=stop_at(stop))
    return flow, history


@pytest.fixture
def short_pretraining(monkeypatch):
    monkeypatch.setattr(pretraining, "STEPS", 5)
    monkeypatch.setattr(pretraining, "BATCH", 64)


@pytest.mark.parametrize("estimator", ["path", "plain"])
@pytest.mark.parametrize("what", ["molecule", "tsf", "real-nvp", "anharmonic"])
def test_training_goes_on_to_the_same_bits_with_either_estimator(what, estimator, tmp_path, short_pretraining):
    whole, history = trained(what, estimator, tmp_path / "whole")
    with pytest.raises(Interrupted):
        trained(what, estimator, tmp_path / "parts", 15)
    resumed, history_resumed = trained(what, estimator, tmp_path / "parts")
    a, b = whole.state_dict(), resumed.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert repr(history) == repr(history_resumed)
    if estimator == "path":
        plain, _ = trained(what, "plain", tmp_path / "other")
        assert any(not torch.equal(a[name], value) for name, value in plain.state_dict().items())
    with pytest.raises(ValueError, match="belongs to a run with other settings"):
        trained(what, "plain" if estimator == "path" else "path", tmp_path / "whole")


@pytest.mark.parametrize("estimator", ["path", "plain"])
def test_every_frame_trains_with_its_own_slopes(estimator, tmp_path, short_pretraining, monkeypatch):
    seen = []

    def recorded(flow, q, temperatures, *, slopes=None, generator=None):
        if torch.is_grad_enabled():
            seen.append((q, temperatures, slopes))
        return likelihood_loss(flow, q, temperatures, slopes=slopes, generator=generator)

    monkeypatch.setattr(training, "likelihood_loss", recorded)
    flow, _ = trained("molecule", estimator, tmp_path)
    assert len(seen) == 24
    for q, temperatures, slopes in seen:
        assert (slopes is None) == (estimator == "plain")
        if slopes is not None:
            expected = slopes_of(flow, coupled_energy, q, temperatures)
            assert len(q) == 32 and laws.difference(slopes, expected) < 1e-5 * float(expected.abs().max())


def test_forces_at_the_frames_are_counted_as_energies(tmp_path, short_pretraining):
    _, path = trained("tsf", "path", tmp_path / "a")
    _, plain = trained("tsf", "plain", tmp_path / "b")
    assert path.n_energy_evaluations - plain.n_energy_evaluations == 320  # of 400, a fifth held out
    assert 0 < plain.n_energy_evaluations - len(plain.rows) * JUDGED_BY <= 24 * 16


def test_the_plain_estimator_asks_no_forces_of_frames(tmp_path, short_pretraining):
    """A trajectory with one broken force trains in the plain way, and is refused with advice otherwise."""
    frames = Samples(WELL_FRAMES[1.0][:400])
    worst = torch.tensor(frames.positions[7]).double()

    def energy(x: torch.Tensor) -> torch.Tensor:
        return bowl(x) + 0.01 * (x - worst.to(x)).norm(dim=1).sqrt()

    def run(estimator: str):
        flow = build_vector_flow(2, frames, FlowSettings(kind="tsf", **SMALL), generator=seeded(1))
        settings = dataclasses.replace(SHORT, estimator=estimator)
        return train(flow, frames, energy, settings, directory=tmp_path / estimator, seed=5)

    assert run("plain").rows[-1]["step"] == 24
    with pytest.raises(ValueError, match="1 of 320 frames have forces that are not finite"):
        run("path")
