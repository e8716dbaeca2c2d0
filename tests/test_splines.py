"""Splines: the function against an oracle, its inverse in single precision, and couplings that are bijective."""

import math

import laws
import pytest
import torch
from zuko.transforms import MonotonicRQSTransform

from openmm_tsf.nets import Conditioner
from openmm_tsf.splines import (
    LARGEST_LOG_SLOPE,
    SMALLEST_BIN,
    SplineCoupling,
    rational_quadratic,
    spline_layers,
)
from openmm_tsf.transforms import Compose

N_STIFF, N_SOFT = 5, 3
SIZE = {"hidden": 8, "depth": 2}


# --- the function -----------------------------------------------------------------------------------------------------


def spline(bins: int, roughness: float, n: int = 400, dim: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Points, knots and logarithms of slopes, as rough as asked."""
    g = torch.Generator().manual_seed(bins)
    shares = (roughness * torch.randn(2, bins, dim, n, generator=g)).softmax(1)
    shares = SMALLEST_BIN + (1.0 - bins * SMALLEST_BIN) * shares
    knots = torch.cat((torch.zeros(2, 1, dim, n), shares.cumsum(1)[:, :-1], torch.ones(2, 1, dim, n)), 1)
    log_slopes = (roughness * torch.randn(bins + 1, dim, n, generator=g)).clamp(-LARGEST_LOG_SLOPE, LARGEST_LOG_SLOPE)
    return torch.rand(dim, n, generator=g), knots, log_slopes


@pytest.mark.parametrize("bins", [2, 8])
@pytest.mark.parametrize("roughness", [0.3, 1.0])
def test_the_function_is_that_of_zuko(bins, roughness):
    x, knots, log_slopes = spline(bins, roughness)
    oracle = MonotonicRQSTransform(*torch.zeros(2, *x.shape, bins), torch.zeros(*x.shape, bins - 1))
    oracle.horizontal, oracle.vertical = knots.movedim(1, -1)
    oracle.derivatives = log_slopes.exp().movedim(0, -1)
    y, log_slope = rational_quadratic(x, knots, log_slopes)
    expected, expected_slope = oracle.call_and_ladj(x)
    assert float((y - expected).abs().max()) < 1e-13
    assert float((log_slope - expected_slope).abs().max()) < 1e-11
    back, log_slope_back = rational_quadratic(x, knots, log_slopes, inverse=True)
    assert float((back - oracle.inv(x)).abs().max()) < 1e-10
    assert float((log_slope_back - oracle.inv.call_and_ladj(x)[1]).abs().max()) < 1e-9


def error_in_rounding() -> float:
    """How far the point is off whose exact inverse single precision returns, in roundings of it and of the answer."""
    worst = []
    for roughness in (1.0, 10.0):
        y, knots, log_slopes = (a.float() for a in spline(8, roughness, n=20_000))
        x, _ = rational_quadratic(y, knots, log_slopes, inverse=True)
        again, log_slope = rational_quadratic(x.double(), knots.double(), log_slopes.double())
        worst.append((again - y).abs() / (1.0 + log_slope.exp()))
    return float(torch.stack(worst).max()) / torch.finfo(torch.float32).eps


def test_the_inverse_is_stable_in_single_precision():
    assert error_in_rounding() < 4.0


def test_the_usual_form_of_the_root_is_not(monkeypatch):
    def usual(e, d0, excess):
        b = d0 - e * excess
        return 2.0 * e / (b + (b * b + 4.0 * (1.0 - b) * e).clamp_min(0.0).sqrt())

    monkeypatch.setattr("openmm_tsf.splines._solve", usual)
    assert error_in_rounding() > 100.0


# --- couplings --------------------------------------------------------------------------------------------------------

MADE = {
    "mixed": lambda: SplineCoupling(N_STIFF, N_SOFT, (0, 3, 5, 7), **SIZE),
    "line": lambda: SplineCoupling(N_STIFF, N_SOFT, (1, 4), **SIZE),
    "line, given the torsions alone": lambda: SplineCoupling(N_STIFF, N_SOFT, range(N_STIFF), **SIZE),
    "circle": lambda: SplineCoupling(N_STIFF, N_SOFT, (6,), **SIZE),
    "two bins in a small box": lambda: SplineCoupling(N_STIFF, N_SOFT, (2, 6), bins=2, bound=0.5, **SIZE),
    "without torsions": lambda: SplineCoupling(N_STIFF, 0, (0, 3), **SIZE),
    "without stiff ones": lambda: SplineCoupling(0, N_SOFT, (0, 1), **SIZE),
    "layers": lambda: Compose(spline_layers(N_STIFF, N_SOFT, blocks=2, **SIZE)),
}
MOVED = {"mixed": [0, 3, 5, 7], "line": [1, 4], "circle": [6], "layers": list(range(N_STIFF + N_SOFT))}


def shaken(module: torch.nn.Module, output: float = 0.1) -> torch.nn.Module:
    """Every parameter random; the splines are as rough as the output of the nets is large."""
    g = torch.Generator().manual_seed(3)
    for parameter in module.requires_grad_(False).parameters():
        parameter.copy_(0.7 * torch.randn(parameter.shape, generator=g))
    for part in module.modules():
        if isinstance(part, Conditioner):
            part.last.weight *= output
            part.last.bias *= output
    return module


def latents(name: str, n: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (n, D), the first row outside the box, and which of their columns are angles."""
    n_stiff = 0 if "without stiff" in name else N_STIFF
    n_soft = 0 if "without torsions" in name else N_SOFT
    g = torch.Generator().manual_seed(1)
    u, a = 2.0 * torch.randn(n, n_stiff, generator=g), 6.28 * torch.rand(n, n_soft, generator=g) - 3.14
    u[0] = 6.0
    return torch.cat((u, a), 1), torch.arange(n_stiff + n_soft) >= n_stiff


@pytest.mark.parametrize("name", MADE)
def test_spline_couplings_are_bijective(name):
    z, angles = latents(name)
    coupling = shaken(MADE[name]())
    laws.bijective(coupling, z, circular_z=angles, circular_x=angles)
    assert float(coupling.forward(z)[1].std()) > 0.05  # they do change volume


@pytest.mark.parametrize("name", MADE)
def test_spline_couplings_start_as_the_identity(name):
    z, angles = latents(name)
    for way in (MADE[name]().forward, MADE[name]().inverse):
        x, log_det = way(z)
        assert laws.difference(x, z, angles) < 1e-13
        assert float(log_det.detach().abs().max()) < 1e-13


@pytest.mark.parametrize("name", MOVED)
def test_spline_couplings_move_what_they_should_and_nothing_else(name):
    z, angles = latents(name)
    x = shaken(MADE[name]()).forward(z)[0]
    assert [i for i in range(z.shape[1]) if laws.difference(x[:, i], z[:, i], angles[i]) > 1e-3] == MOVED[name]
    still = [i for i in range(z.shape[1]) if i not in MOVED[name]]
    assert torch.equal(x[:, still], z[:, still])


@pytest.mark.parametrize("name", ["mixed", "circle", "without stiff ones", "layers"])
def test_torsions_count_modulo_a_turn_and_come_out_on_the_circle(name):
    z, angles = latents(name)
    coupling = shaken(MADE[name]())
    turned = z + laws.TWO_PI * angles * torch.tensor([[1.0], [-2.0]]).repeat(len(z) // 2, 1)
    for way in (coupling.forward, coupling.inverse):
        assert laws.difference(way(turned)[0], way(z)[0], angles) < 1e-11
        assert float(way(z)[0][:, angles].abs().max()) <= math.pi


@pytest.mark.parametrize(("column", "place"), [(5, math.pi), (0, 5.0), (0, -5.0)], ids=["circle", "box", "box, below"])
def test_values_and_slopes_agree_where_the_circle_closes_and_the_box_ends(column, place):
    z, angles = latents("mixed", 2)
    z[0] = z[1]
    coupling = shaken(MADE["mixed"]())
    z[:, column] = torch.tensor([place - 1e-9, place + 1e-9])
    x, log_det = coupling.forward(z)
    assert laws.difference(x[0], x[1], angles) < 1e-6
    assert abs(float(log_det[0] - log_det[1])) < 1e-6


def test_far_outside_the_box_nothing_happens():
    coupling = shaken(SplineCoupling(2, 0, (0,), **SIZE))
    z = torch.tensor([[5.0, 0.3], [-7.0, 0.3], [1e6, 0.3]])
    for x, log_det in (coupling.forward(z), coupling.inverse(z)):
        assert laws.difference(x, z) < 1e-9
        assert float(log_det.abs().max()) < 1e-12


def test_single_precision_does():
    z, angles = latents("layers", 500)
    layers = shaken(MADE["layers"](), output=0.03)
    exact, log_det = layers.forward(z)
    single = layers.float()
    z = z.float()
    x, log_det_single = single.forward(z)
    assert x.dtype == log_det_single.dtype == torch.float32
    assert laws.difference(x.double(), exact, angles) < 1e-4
    assert laws.difference(log_det_single.double(), log_det) < 1e-4
    assert laws.difference(single.inverse(x)[0], z, angles) < 1e-4
    knots, _, _ = single.transforms[0]._splines(z)
    assert (knots[:, 0] == 0.0).all() and (knots[:, -1] == 1.0).all()  # to the last bit: no point lies past the end


def test_gradients_are_finite_at_the_limits_of_slopes_and_bins():
    coupling = shaken(MADE["mixed"](), output=100.0).float().requires_grad_()
    z = torch.cat((latents("mixed", 500)[0], torch.zeros(1, 8), torch.full((1, 8), -math.pi))).float()
    for way in (coupling.forward, coupling.inverse):
        x, log_det = way(z.requires_grad_())
        slopes = torch.autograd.grad(x.square().sum() + log_det.sum(), [z, *coupling.parameters()])
        assert all(torch.isfinite(slope).all() for slope in slopes)


# --- layers -----------------------------------------------------------------------------------------------------------


def log_prob(layers: Compose, x: torch.Tensor) -> torch.Tensor:
    """ln of the density of (u, a) from a normal u and an even a."""
    z, log_det = layers.inverse(x)
    return log_det - 0.5 * z[:, 0] ** 2 - 0.5 * math.log(laws.TWO_PI) - math.log(laws.TWO_PI)


def test_densities_are_normalised():
    layers = shaken(Compose(spline_layers(1, 1, blocks=2, bins=4, **SIZE)))
    # slopes have kinks at the knots, so the trapezoid rule converges only as the square of the spacing
    laws.normalised(lambda x: log_prob(layers, x), (laws.line(8.0, 801), laws.circle(500)), atol=2e-5)


def test_layers_learn_a_torsion_with_two_basins_and_what_hangs_on_it():
    """a in two von Mises basins, 10 % in one of them; u normal about 2 cos a."""
    g = torch.Generator().manual_seed(6)
    n, kappa = 12_000, 8.0
    rare = torch.rand(n, generator=g) < 0.1
    a = torch.distributions.VonMises(torch.tensor(0.0), torch.tensor(kappa))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        angle = laws.wrap(a.sample((n,)) + torch.where(rare, 1.0, 3.0))
        layers = Compose(spline_layers(1, 1, blocks=3, hidden=24, depth=2)).float()
    u = 2.0 * angle.cos() + 0.5 * torch.randn(n, generator=g)
    exact = torch.logaddexp(a.log_prob(laws.wrap(angle - 3.0)) + math.log(0.9), a.log_prob(angle - 1.0) + math.log(0.1))
    exact = exact - 0.5 * ((u - 2.0 * angle.cos()) / 0.5) ** 2 - math.log(0.5) - 0.5 * math.log(laws.TWO_PI)
    x = torch.stack((u, angle), 1).float()
    optimiser = torch.optim.Adam(layers.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=200)
    for _ in range(200):
        loss = -log_prob(layers, x[torch.randint(10_000, (256,), generator=g)]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        gap = (exact[10_000:] - log_prob(layers, x[10_000:])).mean()
    assert abs(float(gap)) < 0.05  # of about 2 nat at the start


@pytest.mark.parametrize(("n_stiff", "n_soft"), [(2, 0), (0, 2), (1, 1), (5, 3), (53, 7)])
def test_every_two_columns_are_moved_one_given_the_other(n_stiff, n_soft):
    dim = n_stiff + n_soft
    met = torch.eye(dim, dtype=torch.bool)
    layers = spline_layers(n_stiff, n_soft, blocks=math.ceil(math.log2(dim)), hidden=1, depth=1)
    for layer in layers:
        read = torch.cat((layer.read_u, layer.read_a))
        assert sorted([*read.tolist(), *layer.change.tolist()]) == list(range(dim))
        met[layer.change[:, None], read] = True
    assert met.all()


def test_what_cannot_be_is_refused():
    for change in ((), range(8), (3, 8)):
        with pytest.raises(ValueError, match="some of 8 columns"):
            SplineCoupling(N_STIFF, N_SOFT, change, **SIZE)
    with pytest.raises(ValueError, match="bins, not 1"):
        SplineCoupling(N_STIFF, N_SOFT, (0,), bins=1, **SIZE)
    for bound in (0.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="width above 0"):
            SplineCoupling(N_STIFF, N_SOFT, (0,), bound=bound, **SIZE)
    with pytest.raises(ValueError, match="at least 2 coordinates, not 1"):
        spline_layers(1, 0, blocks=1, **SIZE)
