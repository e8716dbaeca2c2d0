"""Training generators: what they learn, that they go on where they stopped, and second derivatives by differences."""

import json
import math
import re

import pytest
import torch
from torch.autograd.function import once_differentiable

from openmm_tsf.edg import EDGSettings, EDGTrainingSettings, build_edg, draw, kl_bound, train_edg
from openmm_tsf.edg.curvature import WithCurvature


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TwoWells:
    """An equal mixture of Gaussians of variance 0.3 at (+-3, 0): ln Z = 0."""

    dim = 2
    log_z = 0.0

    def __call__(self, x):
        centres = torch.tensor([[3.0, 0.0], [-3.0, 0.0]]).to(x)
        square = (x[:, None] - centres).square().sum(2)
        return -torch.logsumexp(-square / 0.6, 1) + math.log(2.0 * 2.0 * math.pi * 0.3)


class Correlated:
    """U = x K x/2 in two dimensions."""

    dim = 2
    stiffness = torch.tensor([[3.0, 1.2], [1.2, 0.8]], dtype=torch.float64)

    def __call__(self, x):
        return 0.5 * ((x @ self.stiffness.to(x)) * x).sum(1)

    def log_z(self, tau):
        return math.log(2.0 * math.pi * tau) - 0.5 * float(torch.logdet(self.stiffness))


QUICK = EDGTrainingSettings(steps=500, batch=64, anneal_from=0.05, record_every=50, checkpoint_every=200)
SMALL = {"hidden": 24, "depth": 2}


def test_two_wells_are_both_found_and_weighed():
    target, edg = TwoWells(), build_edg(TwoWells(), EDGSettings(spread=3.0, **SMALL), seed=1)
    before = kl_bound(edg, target, 4000, generator=seeded(5))
    history = train_edg(edg, target, QUICK, seed=1)
    after = kl_bound(edg, target, 4000, generator=seeded(5))
    assert -3.0 * after.error < after.value < 0.3 * before.value
    assert edg.dtype == torch.float64
    drawn = draw(edg, target, n=3000, companions=1, generator=seeded(2))
    right = (drawn.x[:, 0] > 0).double()
    assert 0.25 < right.mean() < 0.75
    weights = torch.softmax(drawn.log_weights, 0)
    assert abs((weights * right).sum() - 0.5) < 4.0 * 0.5 / math.sqrt(drawn.ess * 3000)
    assert abs(drawn.log_z) < 4.0 * drawn.log_z_error < 0.4
    assert drawn.ess > 0.2
    assert history.n_energy_evaluations == 500 * 64
    assert [row["step"] for row in history.rows] == list(range(50, 501, 50))
    assert history.rows[-1]["heat"] == 1.0
    assert history.rows[0]["heat"] > 10.0


def test_a_hamiltonian_decoder_and_every_score_learn():
    for settings in (
        EDGSettings(decoder="hamiltonian", stages=2, step=0.1, **SMALL), EDGSettings(score="plain", **SMALL),
        EDGSettings(score="energy", **SMALL), EDGSettings(score="variational", **SMALL),
    ):  # fmt: skip
        target = Correlated()
        edg = build_edg(target, settings, seed=1)
        before = kl_bound(edg, target, 2000, generator=seeded(5)).value + target.log_z(1.0)
        history = train_edg(edg, target, EDGTrainingSettings(steps=200, batch=64, anneal_share=0.0), seed=1)
        after = kl_bound(edg, target, 8000, generator=seeded(5))
        assert -3.0 * after.error < after.value + target.log_z(1.0) < 0.6 * before, settings
        assert history.n_energy_evaluations == 200 * 64 * (7 if settings.decoder == "hamiltonian" else 1)


def test_one_generator_for_a_range_of_temperatures():
    target, edg = Correlated(), build_edg(Correlated(), EDGSettings(conditioned=True, **SMALL), seed=1)
    train_edg(edg, target, EDGTrainingSettings(steps=300, batch=64, anneal_share=0.0), seed=1, temperatures=(0.5, 2.0))
    for tau in (0.5, 1.0, 2.0):
        drawn = draw(edg, target, tau, 2000, generator=seeded(1))
        assert abs(drawn.log_z - target.log_z(tau)) < 4.0 * drawn.log_z_error < 0.2
        assert drawn.ess > 0.25
        mean = float((torch.softmax(drawn.log_weights, 0) * drawn.energy).sum()) / tau
        assert abs(mean - 1.0) < 4.0 / math.sqrt(drawn.ess * 2000)  # equipartition: two degrees of freedom
        assert abs(float(drawn.energy.mean()) / tau - 1.0) < 0.5  # raw draws know of the temperature as well


def test_a_wrong_scale_is_made_good():
    """Draws start a hundred times too wide, where every energy is in the thousands."""
    target, edg = TwoWells(), build_edg(TwoWells(), EDGSettings(spread=100.0, **SMALL), seed=1)
    settings = EDGTrainingSettings(steps=300, batch=64, soften_above=50.0, record_every=20)
    before = kl_bound(edg, target, 1000, generator=seeded(5)).value
    with pytest.warns(UserWarning, match=r"^spread = 100 is far from the width of the draws while .* spread = \d+ and"):
        train_edg(edg, target, settings, seed=1)
    assert kl_bound(edg, target, 1000, generator=seeded(5)).value < 0.01 * before


def test_a_spread_that_may_cost_modes_is_noticed():
    """At 0.3 the warning names a spread that trains without one: the trainings of other tests have none either."""
    target, settings = TwoWells(), EDGTrainingSettings(steps=300, batch=64, record_every=20)
    with pytest.warns(UserWarning, match="modes may have been lost") as caught:
        history = train_edg(build_edg(target, EDGSettings(spread=0.3, **SMALL), seed=1), target, settings, seed=1)
    assert 0.2 < history.rows[0]["width"] < 1.0 < history.rows[2]["width"]
    better = float(re.search(r"with spread = (\S+) ", str(caught[0].message)).group(1))
    assert 1.0 < better < 8.0
    train_edg(build_edg(target, EDGSettings(spread=better, **SMALL), seed=1), target, settings, seed=1)


def test_training_goes_on_where_it_stopped(tmp_path):
    """Killed between two checkpoints and called again, it ends in the same weights as without."""
    target, settings = TwoWells(), EDGTrainingSettings(steps=60, batch=32, checkpoint_every=20, record_every=15)
    whole = build_edg(target, EDGSettings(**SMALL), seed=1)
    expected = train_edg(whole, target, settings, seed=3)

    def kill(done, total, message):
        if done == 50:
            raise KeyboardInterrupt

    again = build_edg(target, EDGSettings(**SMALL), seed=1)
    with pytest.raises(KeyboardInterrupt):
        train_edg(again, target, settings, seed=3, directory=tmp_path, progress=kill)
    steps = []
    history = train_edg(
        again, target, settings, seed=3, directory=tmp_path, progress=lambda *said: steps.append(said[0])
    )
    assert steps == list(range(41, 61))
    assert history.rows == expected.rows
    assert history.n_energy_evaluations == 60 * 32 + 8  # by which checkpoints know the target
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert json.loads((tmp_path / "history.json").read_text())["rows"] == expected.rows
    with pytest.raises(ValueError, match="other settings"):
        train_edg(again, target, settings, seed=4, directory=tmp_path)
    for other, seed in ((SMALL, 2), (SMALL | {"spread": 2.5}, 1)):
        with pytest.raises(ValueError, match="other settings"):
            train_edg(build_edg(target, EDGSettings(**other), seed=seed), target, settings, seed=3, directory=tmp_path)
    again = build_edg(target, EDGSettings(**SMALL), seed=1)
    with pytest.raises(ValueError, match=r"belongs to a run with another target: at 8 of 8 points energies differ"):
        train_edg(again, Correlated(), settings, seed=3, directory=tmp_path)
    (tmp_path / "edg_training.pt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="not a training checkpoint"):
        train_edg(again, target, settings, seed=3, directory=tmp_path)


def test_energies_that_are_not_finite_are_counted_in_training():
    class Holes(Correlated):
        def __call__(self, x):
            return torch.where(x[:, 0] > 1.0, torch.nan, super().__call__(x))

    edg = build_edg(Holes(), EDGSettings(**SMALL), seed=1)
    with pytest.warns(UserWarning, match=r"of 1920 draws of training \(\d+ %\) had an energy that is not finite"):
        history = train_edg(edg, Holes(), EDGTrainingSettings(steps=30, batch=64, record_every=10), seed=1)
    assert 50 < history.n_nonfinite < 30 * 64
    assert sum(row["n_nonfinite"] for row in history.rows) * 10 == pytest.approx(history.n_nonfinite)
    assert all(math.isfinite(row["bound"]) for row in history.rows)
    assert all(torch.isfinite(p).all() for p in edg.parameters())


class Spiked(Correlated):
    """Its gradient is right, and the product with its Hessian NaN, in the calls that are named."""

    def __init__(self, bad):
        self.bad, self.calls = bad, 0

    def __call__(self, x):
        self.calls += 1
        u = super().__call__(x)
        return u + Spike.apply(x).sum(1) if self.bad(self.calls) else u


class Spike(torch.autograd.Function):
    """Zero, with a gradient of zero whose own gradient is NaN."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * SpikeOfSlope.apply(x)


class SpikeOfSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx, grad):
        return torch.full_like(grad, torch.nan)


def test_softened_energies_pull_as_their_logarithm_does():
    """The gradient is that of a target with a logarithm above, the value that of the target itself."""

    class Steep:
        dim = 2

        def __call__(self, x):
            return 30.0 * x.square().sum(1)

    class Softened(Steep):
        def __call__(self, x):
            u = super().__call__(x)
            return torch.where(u > 50.0, 50.0 + torch.log1p((u - 50.0).clamp_min(0.0)), u)

    edg, sums = build_edg(Steep(), EDGSettings(**SMALL), seed=1), []
    for target, above in ((Steep(), 50.0), (Softened(), math.inf), (Steep(), math.inf)):
        sample = kl_bound(edg, target, 200, soften_above=above, generator=seeded(2))
        edg.zero_grad()
        sample.loss.backward()
        sums.append((sample.energy, torch.cat([p.grad.flatten() for p in edg.decoder.parameters()])))
    (raw, gradient), (soft, expected), (energy, hard) = sums
    assert torch.allclose(gradient, expected, rtol=1e-6, atol=1e-6) and not torch.allclose(gradient, hard, rtol=0.5)
    assert raw == energy > soft


def test_steps_without_a_finite_gradient_are_left_out():
    """A Hamiltonian decoder of one stage asks for the target three times a step: twice for its slopes, once for U."""
    settings = EDGSettings(decoder="hamiltonian", stages=1, **SMALL)
    training = EDGTrainingSettings(steps=40, batch=16, record_every=10)
    target = Spiked(lambda call: call % 30 == 1)  # every tenth step
    edg = build_edg(target, settings, seed=1)
    with pytest.warns(UserWarning, match="4 of 40 steps were left out"):
        history = train_edg(edg, target, training, seed=1)
    assert target.calls == 40 * 3
    assert history.n_left_out == 4
    assert history.n_energy_evaluations == 40 * 16 * 5
    assert all(p.isfinite().all() for p in edg.parameters())
    first = build_edg(target, settings, seed=1).state_dict()
    target = Spiked(lambda call: call > 30)  # from the tenth step on
    edg = build_edg(target, settings, seed=1)
    with pytest.raises(RuntimeError, match="20 steps in a row, up to step 30,"):
        train_edg(edg, target, training, seed=1)
    assert all(torch.equal(p, first[name]) for name, p in edg.state_dict().items())


@pytest.mark.slow
def test_dynamics_find_every_mode_and_stay_finite_where_the_target_is_steep():
    """Six Gaussians on a ring, far apart, as the benchmark learns them; other seeds may lose one. And double wells of
    x^4, where steps without taming overflowed."""
    from openmm_tsf.edg.targets import density_2d, modes_found
    from openmm_tsf.wells import random_wells

    target, settings = density_2d("MoG6"), EDGSettings(decoder="hamiltonian", stages=3, spread=5.0)
    edg = build_edg(target, settings, seed=1)
    train_edg(edg, target, EDGTrainingSettings(steps=3472, batch=64, learning_rate=1e-3), seed=1)
    x, _ = edg.at().sample(5000, generator=seeded(1))
    assert modes_found(target, x) == 6
    wells = random_wells(5, generator=seeded(1))
    edg = build_edg(wells, EDGSettings(decoder="hamiltonian", stages=3, spread=2.0), seed=1)
    history = train_edg(edg, wells, EDGTrainingSettings(steps=600, batch=128), seed=1)
    assert history.n_left_out == history.n_nonfinite == 0
    bound = kl_bound(edg, wells, 4000, generator=seeded(2))
    assert 0.0 < bound.value + float(wells.at(1.0).log_z) < 3.0


def test_targets_of_one_precision_are_told_so():
    class Single:
        dim = 2
        stiffness = torch.ones(2, 1, dtype=torch.float32)

        def __call__(self, x):
            return (x.square() @ self.stiffness)[:, 0]

    edg = build_edg(Single(), EDGSettings(**SMALL), seed=1)
    with pytest.raises(ValueError, match=r"fails for vectors of torch.float64: .* as constant.to\(x\) does"):
        draw(edg, Single(), n=200, generator=seeded(1))


def test_arguments_that_make_no_sense():
    edg = build_edg(Correlated(), EDGSettings(**SMALL), seed=1)
    for bad in ([2.0, 1.0], [0.0, 1.0], [1.0, 2.0, 3.0], []):
        with pytest.raises(ValueError, match="temperatures must be"):
            train_edg(edg, Correlated(), QUICK, seed=1, temperatures=bad)
    with pytest.raises(ValueError, match="conditioned=True"):
        train_edg(edg, Correlated(), QUICK, seed=1, temperatures=(0.5, 2.0))
    bad_ones = (
        {"steps": 0},
        {"batch": 1},
        {"learning_rate": 0.0},
        {"anneal_from": -1.0},
        {"anneal_from": 2.0},
        {"soften_above": -5.0},
    )
    for bad in (*bad_ones, {"weight_average": 1.0}, {"soften_above": math.nan}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            EDGTrainingSettings(**bad)


# --- second derivatives by differences --------------------------------------------------------------------------------


class Once(torch.autograd.Function):
    """sum x^4 + x_0 x_1 with no second derivative, as an energy from elsewhere."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x**4).sum(1) + x[:, 0] * x[:, 1]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad[:, None] * (4.0 * x**3 + x.flip(1))


def test_curvature_by_differences():
    x, v = torch.randn(5, 2, generator=seeded(1)).requires_grad_(), torch.randn(5, 2, generator=seeded(2))
    v[2] = 0.0
    curved = WithCurvature(Once.apply)
    (gradient,) = torch.autograd.grad(curved(x).sum(), x, create_graph=True)
    assert torch.equal(gradient, 4.0 * x**3 + x.flip(1))
    (product,) = torch.autograd.grad(gradient, x, v)
    assert torch.allclose(product, 12.0 * x**2 * v + v.flip(1), atol=1e-6)
    assert curved.n_products == 5
    (plain,) = torch.autograd.grad(Once.apply(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        torch.autograd.grad(plain, x, v)


def test_hamiltonian_decoder_of_an_energy_without_curvature():
    """The same gradient of the bound as with the true second derivatives."""

    def exact(x):
        return (x**4).sum(1) + x[:, 0] * x[:, 1]

    grads = []
    for energy in (WithCurvature(Once.apply), exact):
        energy.dim = 2
        edg = build_edg(energy, EDGSettings(decoder="hamiltonian", stages=2, **SMALL), seed=1)
        loss = kl_bound(edg, energy, 32, generator=seeded(1)).loss
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(edg.decoder.parameters()))]))
    assert torch.allclose(grads[0], grads[1], atol=1e-6)
    assert grads[1].abs().max() > 0.1


def test_curvature_of_openmm(ala2):
    """Against the Hessian of the batched energy; a row of two atoms on one spot has no energy and a product of zero."""
    from openmm_tsf import BatchedEnergy, OpenMMEnergy

    x = torch.tensor(ala2.positions)[None].repeat(3, 1, 1)
    x[1] += 0.005 * torch.randn(x[1].shape, generator=seeded(1))
    x[2, 1] = x[2, 0]
    v = torch.randn(x.shape, generator=seeded(2))
    slow = WithCurvature(OpenMMEnergy(ala2.system, "Reference", n_contexts=1))
    products = []
    for energy in (slow, BatchedEnergy(ala2.system, verify=False, compile=False)):
        here = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(energy(here).sum(), here, create_graph=True)
        products.append(torch.autograd.grad(gradient, here, v)[0])
    assert (products[0] - products[1]).abs().max() < 1e-5 * products[1].abs().max()
    assert not products[0][2].any()


def test_a_range_with_equal_ends_is_one_temperature():
    """Of 1 it needs no generator that is conditioned on temperature."""
    edg = build_edg(Correlated(), EDGSettings(**SMALL), seed=1)
    history = train_edg(edg, Correlated(), EDGTrainingSettings(steps=2, batch=8), seed=1, temperatures=(1.0, 1.0))
    assert history.rows[-1]["step"] == 2
    with pytest.raises(
        ValueError, match=r"a range of temperatures \[2.0, 2.0\] needs a generator with conditioned=True"
    ):
        train_edg(edg, Correlated(), seed=1, temperatures=(2.0, 2.0))


def test_a_generator_knows_the_range_of_its_training():
    target, brief = Correlated(), EDGTrainingSettings(steps=2, batch=8)
    edg = build_edg(target, EDGSettings(**SMALL, conditioned=True), seed=1)
    assert edg.temperatures is None and edg.at(50.0).tau == 50.0
    train_edg(edg, target, brief, seed=1, temperatures=(0.5, 2.0))
    assert [edg.at(tau).tau for tau in (0.5, 1.0, 2.0)] == [0.5, 1.0, 2.0]
    for tau in (0.4, 2.1):
        with pytest.raises(ValueError, match=f"trained from tau = 0.5 to 2, and knows nothing of {tau}"):
            draw(edg, target, tau, 200, generator=seeded(1))
    train_edg(edg, target, brief, seed=1)
    with pytest.raises(ValueError, match="from tau = 1 to 1"):
        edg.at(2.0)
