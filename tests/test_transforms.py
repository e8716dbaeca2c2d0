"""Maps between latents: one to one, of constant volume, and periodic in the torsions."""

import math

import laws
import pytest
import torch

from openmm_tsf.nets import Conditioner
from openmm_tsf.transforms import CircleCoupling, Compose, GlobalScale, LineCoupling, Standardise

N_STIFF, N_SOFT = 5, 3
SIZE = {"hidden": 8, "depth": 2}


def randomised(module: torch.nn.Module, seed: int = 3) -> torch.nn.Module:
    """Every parameter random, those that start at zero too."""
    g = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = 0.7 * torch.randn(parameter.shape, generator=g, dtype=parameter.dtype)
    return module.requires_grad_(False)


def standardise() -> Standardise:
    g = torch.Generator().manual_seed(4)
    circular = torch.tensor([False, True, False, False, True, False, True, False])
    matrix = torch.randn(N_STIFF, N_STIFF, generator=g) + 3 * torch.eye(N_STIFF)
    return Standardise(torch.randn(N_STIFF, generator=g), matrix, circular)


MADE = {
    "line": lambda: LineCoupling(N_STIFF, N_SOFT, (0, 3), **SIZE),
    "line, all given the torsions": lambda: LineCoupling(N_STIFF, N_SOFT, range(N_STIFF), **SIZE),
    "line, one": lambda: LineCoupling(N_STIFF, N_SOFT, (2,), **SIZE),
    "line, without torsions": lambda: LineCoupling(N_STIFF, 0, (1, 2), **SIZE),
    "circle": lambda: CircleCoupling(N_STIFF, N_SOFT, (1,), **SIZE),
    "circle, two": lambda: CircleCoupling(N_STIFF, N_SOFT, (2, 0), **SIZE),
    "circle, all given the stiff ones": lambda: CircleCoupling(N_STIFF, N_SOFT, (0, 1, 2), **SIZE),
    "circle, without stiff ones": lambda: CircleCoupling(0, N_SOFT, (0, 1), **SIZE),
    "composed": lambda: Compose(
        [
            LineCoupling(N_STIFF, N_SOFT, (0, 3), **SIZE),
            CircleCoupling(N_STIFF, N_SOFT, (1,), **SIZE),
            LineCoupling(N_STIFF, N_SOFT, (1, 2, 4), **SIZE),
            CircleCoupling(N_STIFF, N_SOFT, (0, 2), **SIZE),
        ]
    ),
    "standardise": standardise,
    "composed and standardised": lambda: Compose([LineCoupling(N_STIFF, N_SOFT, (0, 3), **SIZE), standardise()]),
}
REAL_NVP = lambda: LineCoupling(N_STIFF, N_SOFT, (0, 3), volume_preserving=False, **SIZE)  # noqa: E731


def latents(name: str, n: int = 20) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents (n, D), which of their columns are angles, and which of the columns of the result."""
    n_stiff = 0 if "without stiff" in name else N_STIFF
    n_soft = 0 if "without torsions" in name else N_SOFT
    g = torch.Generator().manual_seed(1)
    z = torch.cat((torch.randn(n, n_stiff, generator=g), 6.28 * torch.rand(n, n_soft, generator=g) - 3.14), 1)
    angles = torch.arange(n_stiff + n_soft) >= n_stiff
    return z, angles, standardise().columns.argsort() >= N_STIFF if "standardise" in name else angles


@pytest.mark.parametrize("name", MADE)
def test_transforms_are_bijective(name):
    z, circular_z, circular_x = latents(name)
    laws.bijective(randomised(MADE[name]()), z, circular_z=circular_z, circular_x=circular_x)


def test_real_nvp_is_bijective_too():
    z, angles, _ = latents("line")
    laws.bijective(randomised(REAL_NVP()), z, circular_z=angles, circular_x=angles)


@pytest.mark.parametrize("wrong", ["inverse", "log_det", "neighbours"])
def test_the_law_of_bijections_can_fail(wrong):
    z, angles, _ = latents("line")
    coupling = randomised(REAL_NVP())

    class Wrong:
        def forward(self, z):
            x, log_det = coupling.forward(z)
            if wrong == "log_det":
                log_det = log_det + 1e-6 * z[:, 1]
            return (x + 1e-6 * z.mean(0) if wrong == "neighbours" else x), log_det

        def inverse(self, x):
            z, log_det = coupling.inverse(x)
            if wrong == "neighbours":  # the inverse of the sum, to rounding: only the mixing of rows is wrong
                for _ in range(6):
                    z, log_det = coupling.inverse(x - 1e-6 * z.mean(0))
            return (z + 1e-8 if wrong == "inverse" else z), log_det

    with pytest.raises(AssertionError, match="inverse" if wrong == "inverse" else r"log-det|neighbour|batch"):
        laws.bijective(Wrong(), z, circular_z=angles, circular_x=angles)


@pytest.mark.parametrize("name", MADE)
def test_the_volume_element_is_constant(name):
    z, _, _ = latents(name, 200)
    transform = randomised(MADE[name]())
    log_det = torch.linalg.slogdet(laws.jacobians(lambda z: transform.forward(z)[0], z))[1]
    assert float(log_det.max() - log_det.min()) < 1e-11
    if "standardise" not in name:
        assert float(log_det.abs().max()) < 1e-11
    assert torch.equal(transform.forward(z)[1], transform.forward(z)[1][:1].expand(len(z)))  # to the last bit


def test_the_volume_of_real_nvp_is_not():
    z, _, _ = latents("line", 200)
    log_det = randomised(REAL_NVP()).forward(z)[1]
    assert float(log_det.max() - log_det.min()) > 0.1


@pytest.mark.parametrize("name", [name for name in MADE if "standardise" not in name and "without tors" not in name])
def test_torsions_count_modulo_a_turn(name):
    z, angles, _ = latents(name)
    transform = randomised(MADE[name]())
    turned = z + laws.TWO_PI * angles * torch.tensor([[1.0], [-2.0]]).repeat(len(z) // 2, 1)
    for way in (transform.forward, transform.inverse):
        assert laws.difference(way(turned)[0], way(z)[0], angles) < 1e-10  # 2 pi as it is rounded, magnified


@pytest.mark.parametrize("name", ["circle", "circle, two", "composed"])
def test_torsions_come_out_on_the_circle(name):
    z, angles, _ = latents(name)
    for way in (randomised(MADE[name]()).forward, randomised(MADE[name]()).inverse):
        moved = way(z)[0][:, angles]
        assert float(moved.abs().max()) <= math.pi


@pytest.mark.parametrize("name", [name for name in MADE if "standardise" not in name])
def test_couplings_start_as_the_identity(name):
    z, angles, _ = latents(name)
    assert laws.difference(MADE[name]().forward(z)[0], z, angles) < 1e-14


@pytest.mark.parametrize("name", ["line", "circle", "composed"])
def test_couplings_change_what_they_should_and_nothing_else(name):
    z, angles, _ = latents(name)
    x = randomised(MADE[name]()).forward(z)[0]
    changed = {"line": [0, 3], "circle": [N_STIFF + 1], "composed": list(range(N_STIFF + N_SOFT))}[name]
    moved = [i for i in range(z.shape[1]) if laws.difference(x[:, i], z[:, i], angles[i]) > 1e-3]
    assert moved == changed
    still = [i for i in range(z.shape[1]) if i not in changed]
    assert torch.equal(x[:, still], z[:, still])


def test_couplings_depend_on_all_that_they_read():
    z, _, _ = latents("line")
    for name, changed in (("line", [0, 3]), ("circle, two", [N_STIFF, N_STIFF + 2])):
        transform = randomised(MADE[name]())
        influence = laws.jacobians(lambda z, t=transform: t.forward(z)[0], z)[:, changed].abs().amax((0, 1))
        assert float(influence.min()) > 1e-4


def test_log_scales_are_limited():
    coupling = randomised(LineCoupling(2, 1, (0,), limit=2.0, volume_preserving=False, **SIZE))
    for parameter in coupling.parameters():
        parameter.data *= 50.0
    z = torch.randn(200, 3, generator=torch.Generator().manual_seed(1))
    log_det = coupling.forward(z)[1]
    assert 1.9 < float(log_det.abs().max()) <= 2.0


def test_the_global_scale_is_bijective_and_one_number_for_all_lines():
    z, angles, _ = latents("line")
    scale = randomised(GlobalScale(N_STIFF))
    laws.bijective(scale, z, circular_z=angles, circular_x=angles)
    x, log_det = scale.forward(z)
    factor = math.exp(float(scale.log_scale))
    assert abs(factor - 1.0) > 0.1 and laws.difference(x[:, :N_STIFF], factor * z[:, :N_STIFF]) < 1e-14
    assert torch.equal(x[:, N_STIFF:], z[:, N_STIFF:])
    assert torch.equal(log_det, (N_STIFF * scale.log_scale).expand(len(z)))  # to the last bit
    assert torch.equal(GlobalScale(N_STIFF).forward(z)[0], z)


def test_momenta_pass_where_coordinates_are_standardised():
    """Latents (u, p, a), vectors (q, p): momenta behind all coordinates, as they are."""
    plain, plain_dim, n_momenta = standardise(), 8, 3
    columns = torch.zeros(plain_dim, dtype=torch.bool).index_fill(0, plain.columns[N_STIFF:], True)
    wide = Standardise(plain.mean, plain.matrix, torch.cat((columns, torch.zeros(n_momenta, dtype=torch.bool))))
    z, _, _ = latents("line")
    p = torch.randn(len(z), n_momenta, generator=torch.Generator().manual_seed(2))
    joined = torch.cat((z[:, :N_STIFF], p, z[:, N_STIFF:]), 1)
    laws.bijective(wide, joined)
    x = wide.forward(joined)[0]
    assert torch.equal(x[:, plain_dim:], p) and laws.difference(x[:, :plain_dim], plain.forward(z)[0]) < 1e-14


def test_standardise_gives_columns_their_mean_and_covariance(generator):
    transform = standardise()
    circular = torch.zeros(8, dtype=torch.bool).index_fill(0, transform.columns[N_STIFF:], True)
    z = torch.randn(200_000, N_STIFF + N_SOFT, generator=generator)
    q, _ = transform.forward(z)
    stiff = q[:, ~circular]
    error = transform.matrix.norm() / math.sqrt(len(z))
    assert float((stiff.mean(0) - transform.mean).abs().max()) < 5 * error
    exact = transform.matrix @ transform.matrix.T
    assert float((stiff.T.cov() - exact).abs().max()) < 8 * error * transform.matrix.norm()
    assert torch.equal(q[:, circular], z[:, N_STIFF:])


def test_conditioners_are_periodic_and_see_multiples_of_angles():
    net = randomised(Conditioner(2, 1, 4, hidden=8, depth=2))
    plain = torch.zeros(3, 2)
    angles = torch.tensor([[0.3], [0.3 + 2 * math.pi], [0.3 - 4 * math.pi]])
    out = net(plain, angles)
    assert float((out - out[0]).abs().max()) < 1e-12
    inputs: list[torch.Tensor] = []
    net.body.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    net(plain, angles)
    assert torch.allclose(
        inputs[0][0], torch.tensor([0, 0, *(f(k * 0.3) for k in (1, 2, 3) for f in (math.sin, math.cos))])
    )
