"""Targets of the diffusion generator against closed forms, quadrature, enumeration and finite differences."""

import itertools
import math

import pytest
import torch
from molecules import seeded
from scipy.integrate import quad
from scipy.stats import chi2
from torch.autograd import gradcheck, gradgradcheck

from openmm_tsf.edg import lennard_jones, mmd, relaxed_ising, targets
from openmm_tsf.tuning.ising import pair_energies, spin_states, square_lattice
from openmm_tsf.weights import effective_sample_size
from openmm_tsf.wells import random_wells

# --- densities of the plane -------------------------------------------------------------------------------------------

NAMES = list(targets.DENSITIES_2D)


def on_grid(density, tau: float = 1.0, reach: float = 14.0, step: float = 0.0611):
    """Points and ln of exp(-U/tau) times their area, on a grid that has nothing to do with that of the module."""
    axis = torch.arange(-reach, reach, step) + 0.011
    x = torch.cartesian_prod(axis, axis)
    return x, torch.cat([-density(rows) / tau for rows in x.split(65536)]) + 2.0 * math.log(step)


@pytest.mark.parametrize("tau", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("name", NAMES)
def test_log_z_is_that_of_quadrature(name, tau):
    density = targets.density_2d(name)
    if isinstance(density, targets.Rings2D):
        kinks = [(a + b) / 2 for a, b in itertools.pairwise(density.radii)]
        u = lambda r: float(density(torch.tensor([[0.0, r]]))[0])  # noqa: E731
        edges = [0.0, *kinks, 12.0]
        parts = (quad(lambda r: 2 * math.pi * r * math.exp(-u(r) / tau), *ab, epsabs=1e-13, limit=200)[0]
                 for ab in itertools.pairwise(edges))  # fmt: skip
        exact, tolerance = math.log(sum(parts)), 1e-8
    else:
        exact, tolerance = float(on_grid(density, tau, reach=24.0)[1].logsumexp(0)), 1e-9
    assert density.log_z(tau) == pytest.approx(exact, abs=tolerance)


def test_log_z_of_one_gaussian_in_closed_form():
    one = targets.Mixture2D("one", torch.zeros(1, 2), torch.tensor([0.7]))
    for tau in (0.3, 3.0):
        exact = math.log(2 * math.pi * 0.7 * tau) - math.log(2 * math.pi * 0.7) / tau
        assert one.log_z(tau) == pytest.approx(exact, abs=1e-10)


def test_energies_by_hand():
    assert float(targets.density_2d("Ring")(torch.tensor([[0.0, 3.0]]))[0]) == pytest.approx(1.0 / 0.32)
    assert float(targets.density_2d("Ring5")(torch.tensor([[2.2, 0.0]]))[0]) == pytest.approx(0.04 / 0.04)
    centre = targets.density_2d("MoG2")(torch.tensor([[5.0, 0.0], [5.0, 1.0]]))
    assert torch.allclose(centre, math.log(2 * 2 * math.pi * 0.5) + torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_are_finite_differences(name):
    density = targets.density_2d(name)
    x = (4.0 * torch.randn(12, 2, generator=seeded(1))).requires_grad_()
    assert gradcheck(density, x)
    assert gradgradcheck(density, x)
    origin = torch.zeros(1, 2, requires_grad=True)
    (slope,) = torch.autograd.grad(density(origin).sum(), origin, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), origin, allow_unused=True)
    assert torch.isfinite(slope).all()
    assert torch.isfinite(curvature).all()
    assert density(x.float()).dtype == torch.float32


def chi_square_p(density, x) -> float:
    """p-value of points against the density, over modes and quartiles-or-so of the energy within each."""
    grid, log_p = on_grid(density)
    p = log_p.softmax(0)
    edges = torch.tensor([0.1, 0.4, 1.0, 2.0])

    def cells(points):
        energy = density(points) - float(density(grid).min())
        return 5 * density.mode(points) + torch.bucketize(energy, edges)

    n = 5 * density.n_modes
    share = torch.bincount(cells(grid), weights=p, minlength=n)
    seen = torch.bincount(cells(x), minlength=n)
    kept = share > 1e-4
    return float(chi2.sf(float(((seen - len(x) * share) ** 2 / (len(x) * share))[kept].sum()), int(kept.sum()) - 1))


@pytest.mark.parametrize("name", NAMES)
def test_draws_are_of_the_density(name):
    density = targets.density_2d(name)
    x = density.sample(20_000, generator=seeded(2))
    assert chi_square_p(density, x) > 1e-3
    assert chi_square_p(density, 1.06 * x) < 1e-6
    assert targets.modes_found(density, x) == density.n_modes
    angles = torch.atan2(*x.T)
    if isinstance(density, targets.Rings2D):
        assert abs(float(angles.cos().mean())) < 4 / math.sqrt(2 * len(x))
    assert torch.equal(x, density.sample(20_000, generator=seeded(2)))


@pytest.mark.parametrize("name", NAMES)
def test_mode_shares_are_those_of_quadrature(name):
    density = targets.density_2d(name)
    grid, log_p = on_grid(density)
    shares = targets.mode_shares(density, grid, log_p.softmax(0))
    assert torch.allclose(shares, density.mode_shares, atol=5e-3 if name == "MoG9" else 1e-3)
    assert float(density.mode_shares.sum()) == pytest.approx(1.0)


def test_a_mode_that_is_missing_is_missed():
    density = targets.density_2d("MoG6")
    x = density.sample(3000, generator=seeded(3))
    assert targets.modes_found(density, x[density.mode(x) != 4]) == 5
    assert targets.modes_found(density, x, (density.mode(x) != 4).double()) == 5


def test_densities_refuse():
    with pytest.raises(ValueError, match="no density 'MoG3'; there are MoG2"):
        targets.density_2d("MoG3")
    with pytest.raises(ValueError, match="2 variances need as many centres"):
        targets.Mixture2D("x", torch.zeros(3, 2), torch.ones(2))
    with pytest.raises(ValueError, match="variances must be above 0"):
        targets.Mixture2D("x", torch.zeros(1, 2), torch.zeros(1))
    with pytest.raises(ValueError, match="must ascend"):
        targets.Rings2D("x", (2.0, 1.0), 0.1)
    with pytest.raises(ValueError, match="must be above 0, not 0"):
        targets.Rings2D("x", (1.0,), 0.0)


def test_double_wells_are_a_target():
    wells = random_wells(4, generator=seeded(4))
    x = torch.randn(20, 4, generator=seeded(5))
    assert wells.dim == 4
    assert torch.allclose(-wells(x) - wells.at(1.0).log_z, wells.at(1.0).log_prob(x))
    assert gradgradcheck(wells, x[:3].requires_grad_())


# --- mean discrepancies -----------------------------------------------------------------------------------------------


def naive_mmd2(x, y, w, v) -> float:
    def k(a, b):
        return sum(math.exp(-float((a - b).square().sum()) / (2 * s * s)) for s in (0.25, 0.5, 1, 2, 4)) / 5

    def pairs(p, q, a, b, same):
        keep = [(i, j) for i in range(len(p)) for j in range(len(q)) if not (same and i == j)]
        total = sum(float(a[i] * b[j]) * k(p[i], q[j]) for i, j in keep)
        return total / sum(float(a[i] * b[j]) for i, j in keep)

    return pairs(x, x, w, w, True) + pairs(y, y, v, v, True) - 2 * pairs(x, y, w, v, False)


def test_mmd_is_the_double_sum():
    x, y = torch.randn(7, 2, generator=seeded(6)), 2 * torch.randn(5, 2, generator=seeded(7))
    w, v = torch.rand(7, generator=seeded(8)), torch.ones(5)
    assert mmd.squared_mmd(x, y) == pytest.approx(naive_mmd2(x, y, torch.ones(7), v), abs=1e-12)
    assert mmd.squared_mmd(x, y, w) == pytest.approx(naive_mmd2(x, y, w, v), abs=1e-12)
    assert mmd.mmd(x, y, w) == pytest.approx(math.sqrt(max(naive_mmd2(x, y, w, v), 0.0)))


def test_mmd_is_unbiased_and_has_a_floor():
    density, generator = targets.density_2d("MoG2"), seeded(9)
    values = torch.tensor([
        mmd.squared_mmd(density.sample(300, generator=generator), density.sample(300, generator=generator))
        for _ in range(60)
    ])  # fmt: skip
    assert abs(float(values.mean())) < 4 * float(values.std()) / math.sqrt(60)
    floor = mmd.noise_floor(density.sample, 300, 300, repeats=40, generator=generator)
    assert floor == pytest.approx(float(values.square().mean()) ** 0.25, rel=0.35)
    x = density.sample(300, generator=generator)
    one_sided = torch.where(x[:, :1] < 0, x + torch.tensor([10.0, 0.0]), x)
    # half of a mixture of two distant Gaussians against the whole: MMD^2 = E k of one with itself / 2
    s2 = torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0]) ** 2
    exact = math.sqrt(0.5 * float((s2 / (s2 + 1.0)).mean()))
    assert mmd.mmd(one_sided, density.sample(300, generator=generator)) == pytest.approx(exact, rel=0.1)
    assert exact > 10 * floor


def test_weights_bring_draws_to_the_target():
    density, generator = targets.density_2d("MoG2"), seeded(10)
    wide = targets.Mixture2D("wide", density.centres, torch.tensor([1.5, 1.2]))
    x, y = wide.sample(2000, generator=generator), density.sample(2000, generator=generator)
    log_w = wide(x) - density(x)
    n = int(len(x) * effective_sample_size(log_w))
    floor = mmd.noise_floor(density.sample, n, 2000, repeats=8, generator=generator)
    assert mmd.mmd(x, y, log_w.softmax(0)) < 2 * floor < 0.5 * mmd.mmd(x, y)


def test_mmd_refuses():
    x = torch.randn(4, 2)
    with pytest.raises(ValueError, match="at least 2 points of one dimension"):
        mmd.mmd(x, torch.randn(4, 3))
    with pytest.raises(ValueError, match="1 points are not finite"):
        mmd.mmd(x, torch.tensor([[0.0, math.nan], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="as many weights"):
        mmd.mmd(x, x, torch.ones(3))
    with pytest.raises(ValueError, match="one point has all the weight"):
        mmd.mmd(x, x, torch.tensor([1.0, 0.0, 0.0, 0.0]))


# --- Lennard-Jones ----------------------------------------------------------------------------------------------------


def icosahedron() -> torch.Tensor:
    """Twelve corners (12, 3) at distance 1."""
    g = (1 + math.sqrt(5)) / 2
    signs = list(itertools.product((-1, 1), repeat=2))
    corners = [p for a, b in signs for p in ((0, a, b * g), (a, b * g, 0), (b * g, 0, a))]
    x = torch.tensor(corners, dtype=torch.float64)
    return x / x.norm(dim=1, keepdim=True)


def magic_cluster(n: int) -> torch.Tensor:
    """Mackay's icosahedron of 13 or 55."""
    v = icosahedron()
    parts = [torch.zeros(1, 3), v]
    if n == 55:
        edge = float(torch.pdist(v).min())
        i, j = torch.triu_indices(12, 12, 1)
        beside = (v[i] - v[j]).norm(dim=1) < 1.1 * edge
        parts += [2 * v, v[i][beside] + v[j][beside]]
    return torch.cat(parts)


@pytest.mark.parametrize(("n", "lowest"), [(13, -44.326801), (55, -279.248470)])
def test_magic_clusters_have_their_known_energies(n, lowest):
    """Global minima of the Cambridge Cluster Database (D. J. Wales, J. P. K. Doye, J. Phys. Chem. A 101, 5111)."""
    cluster = lennard_jones.LennardJones(n, trap=1e-12)
    x = magic_cluster(n)
    assert len(x) == n
    y = cluster.relative(x[None]).requires_grad_()
    optimiser = torch.optim.LBFGS([y], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        energy = cluster(y).sum()
        energy.backward()
        return energy

    optimiser.step(closure)
    assert float(cluster(y.detach())) == pytest.approx(lowest, abs=2e-6)


def test_cluster_energy_is_the_double_loop():
    cluster = lennard_jones.LennardJones(6, temperature=0.7, trap=0.3)
    x = 1.2 * torch.randn(4, 6, 3, generator=seeded(11))
    y = cluster.relative(x)
    for row, u in zip(x.tolist(), cluster(y), strict=True):
        r = [math.dist(a, b) for a, b in itertools.combinations(row, 2)]
        mean = [sum(c) / 6 for c in zip(*row, strict=True)]
        trap = 0.5 * 0.3 * sum(math.dist(a, mean) ** 2 for a in row)
        assert float(u) == pytest.approx((sum(d**-12 - 2 * d**-6 for d in r) + trap) / 0.7, rel=1e-10)
    placed = cluster.positions(y)
    assert torch.allclose(placed, x - x.mean(1, keepdim=True), atol=1e-12)
    assert torch.allclose(cluster.relative(placed + 3.0), y, atol=1e-12)
    assert torch.allclose(cluster.basis @ cluster.basis.T, torch.eye(5), atol=1e-14)
    assert cluster.dim == y.shape[1] == 15


def test_cluster_energy_is_invariant_and_differentiable():
    cluster = lennard_jones.LennardJones(4)
    x = lennard_jones.LennardJones(4).positions(torch.randn(3, 9, generator=seeded(12)))
    u = cluster(cluster.relative(x))
    turn = torch.linalg.qr(torch.randn(3, 3, generator=seeded(13)))[0]
    assert torch.allclose(cluster(cluster.relative(x[:, [2, 0, 3, 1]] @ turn)), u)
    for each in (cluster, cluster.softened(0.9)):
        y = (1.5 * torch.randn(5, 9, generator=seeded(14))).requires_grad_()
        assert gradcheck(each, y)
        assert gradgradcheck(each, y)


def test_the_core_is_a_line_and_nothing_else_changes():
    cluster = lennard_jones.LennardJones(2, trap=1e-9)
    soft = cluster.softened()
    core = lennard_jones.CORE
    at = lambda r: torch.tensor([[0.0, 0.0, r / math.sqrt(2)]])  # noqa: E731
    assert float(soft(at(core + 1e-3))) == float(cluster(at(core + 1e-3)))
    inside = torch.tensor([float(soft(at(r))) for r in (core, 0.5 * core, 0.25 * core)])
    slope = 12 * (core**-7 - core**-13)
    value = core**-12 - 2 * core**-6
    assert (value, -slope) == (pytest.approx(6.92, abs=0.02), pytest.approx(161, abs=0.5))
    assert torch.allclose(inside, value - slope * core * torch.tensor([0.0, 0.5, 0.75]))
    together = torch.zeros(1, 3, requires_grad=True)
    (pushed,) = torch.autograd.grad(soft(together).sum(), together)
    assert torch.isfinite(pushed).all()
    assert float(soft(together.detach())) == pytest.approx(value - slope * core, abs=1e-3)
    assert float(cluster(torch.zeros(1, 3))) == math.inf or math.isnan(float(cluster(torch.zeros(1, 3))))


def test_clusters_refuse():
    for arguments in ({"n": 1}, {"n": 3, "temperature": 0.0}, {"n": 3, "trap": math.inf}, {"n": 3, "core": 1.2}):
        with pytest.raises(ValueError, match=r"at least 2 particles|above 0"):
            lennard_jones.LennardJones(**arguments)
    with pytest.raises(ValueError, match="6 relative coordinates"):
        lennard_jones.LennardJones(3)(torch.zeros(2, 9))


# --- Ising ------------------------------------------------------------------------------------------------------------

KAUFMAN_16 = {2.0: 263.296, 2.1: 252.895, 2.2: 243.976, 2.3: 236.481, 2.4: 230.311, 2.5: 225.229, 2.6: 220.961,
              2.7: 217.305}  # fmt: skip


@pytest.mark.parametrize("temperature", KAUFMAN_16)
def test_kaufman_at_16(temperature):
    assert relaxed_ising.ising_log_z(16, temperature) == pytest.approx(KAUFMAN_16[temperature], abs=6e-4)


@pytest.mark.parametrize("temperature", [0.2, 1.0, 2.0, 2.0 / math.log(1.0 + math.sqrt(2.0)), 2.6, 40.0])
@pytest.mark.parametrize("side", [3, 4])
def test_kaufman_is_the_sum_over_states(side, temperature):
    """Below, at and above the critical temperature."""
    half = -pair_energies(square_lattice(side)) / temperature
    exact = float(half.logsumexp(0)) + math.log(2.0)
    assert relaxed_ising.ising_log_z(side, temperature) == pytest.approx(exact, rel=1e-13, abs=1e-12)


def all_states(side: int, temperature: float):
    """Spins (2^N, N) and ln p of each."""
    half = spin_states(side**2)
    log_p = -pair_energies(square_lattice(side)) / temperature
    spins, log_p = torch.cat((half, -half)), torch.cat((log_p, log_p))
    return spins, log_p - log_p.logsumexp(0)


@pytest.mark.parametrize("whitened", [False, True])
def test_relaxation_is_the_mixture_over_all_spins(whitened):
    """exp(-U)/Z = sum_s p(s) N(x; M s, M), at every x: ln Z and the relation to ln Z_Ising are exact."""
    model = relaxed_ising.RelaxedIsing(3, 1.8, a=2.6, whitened=whitened)
    spins, log_p = all_states(3, 1.8)
    x = 3.0 * torch.randn(6, 9, generator=seeded(15))
    mean = spins.double() @ (model.root if whitened else model.matrix)
    covariance = torch.eye(9) if whitened else model.matrix
    normal = torch.distributions.MultivariateNormal(mean, covariance)
    mixture = (log_p + normal.log_prob(x[:, None])).logsumexp(1)
    assert torch.allclose(-model(x) - model.log_z, mixture, atol=1e-10)
    assert model.ising(model.log_z - 0.3) == pytest.approx(model.log_z_ising - 0.3)
    # given x, spins are independent
    joint = (log_p + normal.log_prob(x[:, None])).softmax(1)
    up = joint @ (spins == 1).double()
    assert torch.allclose(up, torch.sigmoid(2.0 * model.field(x)), atol=1e-12)


def test_log_z_as_written():
    model = relaxed_ising.RelaxedIsing(4, 2.0)
    k = square_lattice(4) / 2.0
    log_det = float(torch.linalg.slogdet(k + model.diagonal * torch.eye(16))[1])
    expected = relaxed_ising.ising_log_z(4, 2.0) + log_det / 2 - 8 * (math.log(2 / math.pi) - model.diagonal)
    assert model.log_z == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize("whitened", [False, True])
def test_draws_of_the_relaxation_and_of_its_spins(whitened):
    model, generator, n = relaxed_ising.RelaxedIsing(3, 2.5, whitened=whitened), seeded(16), 40_000
    spins, log_p = all_states(3, 2.5)
    drawn = spins[torch.multinomial(log_p.exp(), n, replacement=True, generator=generator)]
    x = model.given(drawn, generator=generator)
    correlation = spins.double().T @ (spins * log_p.exp()[:, None])
    root, m = model.root, model.matrix
    exact = torch.eye(9) + root @ correlation @ root if whitened else m + m @ correlation @ m
    error = (x.T @ x / n - exact).abs() / (exact.diagonal().outer(exact.diagonal()) * 2 / n).sqrt()
    assert error.max() < 4.5
    again = model.spins(x, generator=generator).double()
    assert ((again.T @ again / n - correlation).abs() / math.sqrt(1 / n)).max() < 4.5
    energies = model.energy(spins)
    half = len(energies) // 2
    assert torch.allclose(energies[:half], pair_energies(square_lattice(3)))


def test_relaxation_is_differentiable_and_does_not_overflow():
    for whitened in (False, True):
        model = relaxed_ising.RelaxedIsing(3, 2.2, whitened=whitened)
        x = (2.0 * torch.randn(3, 9, generator=seeded(17))).requires_grad_()
        assert gradcheck(model, x)
        assert gradgradcheck(model, x)
        far = 400.0 * torch.tensor([[1.0, -1.0] * 4 + [1.0]])
        assert torch.isfinite(model(far)).all()


def test_relaxations_refuse():
    with pytest.raises(ValueError, match=r"a = 2 must be finite and above 4/T = 2"):
        relaxed_ising.RelaxedIsing(4, 2.0, a=2.0)
    with pytest.raises(ValueError, match="at least 3"):
        relaxed_ising.RelaxedIsing(2, 2.0)
    with pytest.raises(ValueError, match="above 0"):
        relaxed_ising.RelaxedIsing(4, 0.0)
    with pytest.raises(ValueError, match="at least 3"):
        relaxed_ising.ising_log_z(2, 1.0)
