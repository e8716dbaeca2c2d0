"""Losses: their values against closed forms, their gradients against quadrature and an independent estimator."""

import math

import laws
import numpy as np
import pytest
import torch
from molecules import (
    BEND,
    CHAIN4,
    MOLECULES,
    chain4_internals,
    chain4_log_z,
    coupled_energy,
    coupled_frames,
    frames_of,
    harmonic_chain4,
    perturbed,
    seeded,
)

from openmm_tsf import geometry, torsions
from openmm_tsf.flow import Flow, FlowSettings, build_flow
from openmm_tsf.losses import energy_loss, likelihood_loss, soften
from openmm_tsf.trajectories import Frames
from openmm_tsf.units import kT
from openmm_tsf.weights import log_mean_exp

HOT = 600.0
SLIGHT = 0.03
"""A coupling of angles to the torsion that a Gaussian almost fits."""
NO_LIMIT = 1e6
"""Where reduced energies would begin to be softened."""


def chain_flow(size: float, bend: float = BEND) -> Flow:
    """A small flow of four atoms in a chain, with one soft torsion, random weights and Gaussian stiff coordinates."""
    frames = Frames(coupled_frames(2000, HOT, seed=3, bend=bend), np.full(2000, HOT))
    settings = FlowSettings(blocks=1, hidden=6, depth=1, energy_order=2, entropy_order=1, quartic=False)
    return perturbed(build_flow(harmonic_chain4(), frames, settings, generator=seeded(1)), size)


def ala2_flow(size: float) -> Flow:
    frames = Frames(frames_of("ala2", 1000), np.full(1000, HOT))
    settings = FlowSettings(blocks=1, hidden=8, depth=1, energy_order=2, entropy_order=1)
    return perturbed(build_flow(MOLECULES["ala2"](), frames, settings, generator=seeded(1)), size)


def torsion_energy(x: torch.Tensor) -> torch.Tensor:
    """U [kJ/mol] of the torsion of chain4 alone."""
    phi = geometry.dihedrals(x, torch.tensor([[2, 0, 1, 3]]))[:, 0]
    return CHAIN4["barrier"] * (1.0 - torch.cos(phi - CHAIN4["centre"]))


def replicates(flow: Flow, sample, n: int, parameters: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard error over n replicates of the gradient of sample(replicate) by parameters, flattened."""
    rows = []
    for i in range(n):
        gradient = torch.autograd.grad(sample(i), parameters, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([part.flatten() for part in gradient]))
    stacked = torch.stack(rows)
    return stacked.mean(0), stacked.std(0) / math.sqrt(n)


# --- likelihood -------------------------------------------------------------------------------------------------------


def test_frames_of_several_temperatures_are_scored_each_at_its_own():
    flow = chain_flow(0.1)
    q = chain4_internals(60, HOT, seed=5)
    temperatures = torch.tensor([300.0, 450.0, 600.0])[torch.randint(3, (60,), generator=seeded(2))]
    loss = likelihood_loss(flow, q, temperatures)
    alone = torch.cat(
        [-flow.at(float(t)).log_prob_internals(row[None]) for row, t in zip(q, temperatures, strict=True)]
    )
    assert laws.difference(loss, alone) < 1e-9
    assert laws.difference(loss, -flow.at(600.0).log_prob_internals(q)) > 1.0
    parameters = list(flow.parameters())
    one, other = (torch.autograd.grad(total.sum(), parameters, allow_unused=True) for total in (loss, alone))
    for a, b in zip(one, other, strict=True):
        assert (a is None and b is None) or laws.difference(a, b) < 1e-8 * (1 + float(b.abs().max()))


def test_frames_of_one_temperature_are_scored_by_the_density():
    flow = chain_flow(0.1)
    q = chain4_internals(20, HOT, seed=5)
    x = flow.internals.forward(q)[0]
    assert laws.difference(likelihood_loss(flow, q, torch.full((20,), 300.0)), -flow.at(300.0).log_prob(x)) < 1e-8


# --- energy: values ---------------------------------------------------------------------------------------------------


def test_soft_energies_are_the_energies_below_the_start_and_grow_slowly_above():
    u = torch.linspace(-50.0, 200.0, 501).requires_grad_()
    soft = soften(u, start=30.0)
    below = u <= 30.0
    assert torch.equal(soft[below], u[below])
    assert laws.difference(soft[~below], 30.0 + torch.log1p(u[~below] - 30.0)) < 1e-12
    (slope,) = torch.autograd.grad(soft.sum(), u)
    assert float(slope.min()) > 0 and laws.difference(slope[below], torch.ones(int(below.sum()))) < 1e-12
    assert float(slope[-1]) == pytest.approx(1 / 171.0)
    assert torch.equal(soften(torch.tensor([math.inf]), start=1.0), torch.tensor([math.inf]))


@pytest.mark.parametrize("temperature", [HOT, 300.0])
def test_weights_are_those_of_the_raw_energy(temperature):
    """Their mean is Z of the coupled chain, however hard the energies are softened for training."""
    flow = chain_flow(0.02)
    estimates = []
    for start in (NO_LIMIT, -20.0):
        result = energy_loss(flow, coupled_energy, temperature, 40_000, start=start, flatten=1.0, generator=seeded(4))
        estimates.append(log_mean_exp(result.log_weights))
        w = torch.exp(result.log_weights - result.log_weights.max())
        error = float(w.std() / w.mean() / math.sqrt(len(w)))
        assert error < 0.1
        assert abs(estimates[-1] - chain4_log_z(temperature)) < 4 * error
    assert abs(estimates[0] - estimates[1]) < 1e-9


def test_the_value_is_the_mean_of_ln_q_and_the_reduced_energy():
    flow = chain_flow(0.02)
    result = energy_loss(flow, coupled_energy, HOT, 20_000, start=NO_LIMIT, flatten=1.0, generator=seeded(4))
    on_chart = ~torch.isneginf(result.log_weights)
    assert result.value == pytest.approx(-float(result.log_weights[on_chart].mean()), abs=1e-9)
    x, log_q = flow.at(HOT).sample(20_000, generator=seeded(5))
    direct = (log_q + coupled_energy(x) / kT(HOT)).detach()
    error = float(direct.std() / math.sqrt(len(direct) / 2))
    assert abs(result.value - float(direct.mean())) < 5 * error
    assert result.value > -chain4_log_z(HOT)  # Gibbs' inequality


# --- energy: gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [HOT, 300.0])
def test_the_gradient_of_a_single_torsion_is_exact(temperature):
    """Energy and entropy of one torsion: E_q[ln q + u] by quadrature over the circle, differentiated by autograd."""
    flow = chain_flow(0.0)
    factor = flow.prior.factors[0]
    perturbed(factor, 0.8, seed=2)
    coefficients = [factor.marginal.coefficients, factor.entropy.coefficients]

    tau = temperature / HOT
    phi = laws.circle(400)[:, None]
    log_p = factor.entropy(phi) - factor.energy(phi) / tau
    log_p = log_p - log_p.logsumexp(0)
    u = CHAIN4["barrier"] * (1.0 - torch.cos(phi[:, 0] - CHAIN4["centre"])) / kT(temperature)
    relative_entropy = (log_p.exp() * (log_p - factor.entropy(phi) + u)).sum()  # -s: the entropy of the Gaussians
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(relative_entropy, coefficients)])

    def sample(i: int) -> torch.Tensor:
        g = seeded(100 + i)
        return energy_loss(flow, torsion_energy, temperature, 4096, start=NO_LIMIT, flatten=1.0, generator=g).surrogate

    mean, error = replicates(flow, sample, 60, coefficients)
    assert float(((mean - exact) / error).abs().max()) < 4.5
    scores = (exact / error).abs()[: coefficients[0].numel()]
    assert float(scores.max()) > 20  # the part that a draw's own derivative would not give: zero for the potential


def test_the_gradient_of_everything_agrees_with_an_independent_estimator():
    """Surrogate against the plain score-function estimator, whose draws are fixed positions.

    For a flow that is not far off: deviations of 10 nat and more are cut in training.
    """
    largest: list[float] = []

    def energy(x: torch.Tensor) -> torch.Tensor:
        return coupled_energy(x, SLIGHT)

    flow = chain_flow(0.1, SLIGHT)
    parameters = list(flow.parameters())
    g = seeded(77)
    directions = [torch.randn(p.shape, generator=g) for p in parameters]

    def project(gradient: tuple) -> torch.Tensor:
        return torch.stack([(a * b).sum() for a, b in zip(gradient, directions, strict=True)])

    def ours(i: int) -> torch.Tensor:
        generator = seeded(1000 + i)
        return energy_loss(flow, energy, HOT, 1000, start=NO_LIMIT, flatten=1.0, generator=generator).surrogate

    def theirs(i: int) -> torch.Tensor:
        x, _ = flow.at(HOT).sample(1000, generator=seeded(5000 + i))
        log_q = flow.at(HOT).log_prob(x)
        loss = (log_q + energy(x) / kT(HOT)).detach()
        largest.append(float((loss - loss.mean()).abs().max()))
        return ((loss - loss.mean()) * log_q).sum() / (len(x) - 1)

    results = []
    for sample, n in ((ours, 60), (theirs, 120)):
        rows = [
            project(torch.autograd.grad(sample(i), parameters, allow_unused=True, materialize_grads=True))
            for i in range(n)
        ]
        stacked = torch.stack(rows)
        results.append((stacked.mean(0), stacked.std(0) / math.sqrt(n)))
    assert max(largest) < 10.0
    (one, error_one), (other, error_other) = results
    error = (error_one**2 + error_other**2).sqrt()
    used = error > 0
    assert int(used.sum()) > 0.8 * len(parameters)
    assert float(((one - other)[used] / error[used]).abs().max()) < 4.5
    assert int(((one[used] / error[used]).abs() > 4.5).sum()) >= 3  # there is something to agree on


@pytest.mark.parametrize("flatten", [1.0, 3.0])
def test_the_gradient_vanishes_where_the_flow_is_right(flatten):
    """Whatever the torsions that draws are given: where q is the target, training has nothing to say.

    The plain gradient on average, the path gradient with every draw.
    """
    flow = ala2_flow(0.03)
    frozen = ala2_flow(0.03).requires_grad_(False)
    parameters = list(flow.parameters())
    g = seeded(78)
    directions = [torch.randn(p.shape, generator=g) for p in parameters]

    def scores(tilt: float, path: bool) -> tuple[torch.Tensor, torch.Tensor]:
        def energy(x: torch.Tensor) -> torch.Tensor:
            phi = geometry.dihedrals(x, torch.tensor([torsions.backbone(flow.molecule)[0]]))[:, 0]
            return -kT(HOT) * frozen.at(HOT).log_prob(x) + tilt * phi.cos()

        rows = []
        for i in range(40 if not path else 2):
            options = {"start": NO_LIMIT, "flatten": flatten, "path": path, "generator": seeded(300 + i)}
            result = energy_loss(flow, energy, HOT, 128, **options)
            gradient = torch.autograd.grad(result.surrogate, parameters, allow_unused=True, materialize_grads=True)
            rows.append(torch.stack([(a * b).sum() for a, b in zip(gradient, directions, strict=True)]))
        stacked = torch.stack(rows)
        mean, error = stacked.mean(0), stacked.std(0) / math.sqrt(len(rows))
        return mean.abs(), error

    mean, error = scores(0.0, path=False)
    assert float((mean / error)[error > 1e-9].max()) < 4.5
    tilted, tilted_error = scores(5.0, path=False)
    assert float((tilted / tilted_error)[tilted_error > 1e-9].max()) > 4.5
    assert float(scores(0.0, path=True)[0].max()) < 1e-9 * float(error.max())
    assert float(scores(5.0, path=True)[0].max()) > 1e-3 * float(tilted.max())


def test_flattened_draws_visit_rare_torsions():
    flow = ala2_flow(0.0)
    joint = next(factor for factor in flow.prior.factors if factor.dim == 2)
    perturbed(joint, 0.5, seed=2)
    log_density = [
        joint.exponent(flow.at(HOT).prior.sample_torsions(4000, warmth=f, generator=seeded(1))[:, :2], 1.0).mean()
        for f in (1.0, 3.0)
    ]
    assert float(log_density[1].detach()) < float(log_density[0].detach()) - 0.3


# --- energy: what goes wrong ------------------------------------------------------------------------------------------


def gradient_of(flow: Flow, energy, n: int = 400) -> tuple[list[torch.Tensor], object]:
    result = energy_loss(flow, energy, HOT, n, start=NO_LIMIT, flatten=1.0, generator=seeded(6))
    parameters = list(flow.parameters())
    return torch.autograd.grad(result.surrogate, parameters, allow_unused=True, materialize_grads=True), result


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_draws_without_a_finite_energy_are_left_out(bad):
    flow = chain_flow(0.05)

    def broken(x: torch.Tensor) -> torch.Tensor:
        u = coupled_energy(x)
        return torch.where(torch.arange(len(u)) % 3 == 0, bad, u)

    gradient, result = gradient_of(flow, broken)
    assert all(torch.isfinite(part).all() for part in gradient)
    assert math.isfinite(result.value)
    assert 0.2 < float(torch.isneginf(result.log_weights).double().mean()) < 0.5
    _, whole = gradient_of(flow, coupled_energy)
    good = ~torch.isneginf(result.log_weights)
    assert laws.difference(result.log_weights[good], whole.log_weights[good]) < 1e-9


def test_energies_whose_slope_is_not_a_number_do_not_poison_the_gradient():
    """A torch energy with a singularity: 0 times NaN in the backward pass of a draw that was left out."""
    flow = chain_flow(0.05)

    def broken(x: torch.Tensor) -> torch.Tensor:
        inverse_distance = torch.where(torch.arange(len(x)) % 3 == 0, 0.0, 1.0) * (x[:, 2] - x[:, 3]).norm(dim=1)
        return coupled_energy(x) + 0.01 / inverse_distance.sqrt()

    gradient, result = gradient_of(flow, broken)
    assert torch.isneginf(result.log_weights).any()
    assert all(torch.isfinite(part).all() for part in gradient)


def test_draws_off_the_chart_are_left_out():
    flow = perturbed(ala2_flow(0.0), 0.1, seed=3)
    seen: list[int] = []

    def energy(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        assert torch.isfinite(x).all()
        return (x**2).sum((1, 2))

    gradient, result = gradient_of(flow, energy)
    assert 0 < seen[0] < 400
    assert torch.isneginf(result.log_weights).any() and torch.isfinite(result.log_weights).any()
    assert all(torch.isfinite(part).all() for part in gradient)


def test_no_finite_energy_at_all_is_an_error():
    flow = chain_flow(0.05)
    with pytest.raises(RuntimeError, match=r"none of 50 draws has a finite energy at 600 K"):
        energy_loss(
            flow, lambda x: coupled_energy(x) * math.inf, HOT, 50, start=1.0, generator=seeded(1)
        )  # fmt: skip


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_draws_are_enough(n):
    gradient = energy_loss(chain_flow(0.05), coupled_energy, HOT, n, start=1.0, generator=seeded(1))
    assert math.isfinite(gradient.value) and len(gradient.log_weights) == n - n // 2
