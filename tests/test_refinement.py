"""Refinement at a target: it raises the ESS there, loses no well, goes on after any interruption, refuses nonsense."""

import copy
import itertools
import json
import math
import shutil
from pathlib import Path

import laws
import numpy as np
import pytest
import torch
from molecules import BEND, CHAIN4, chain4_internals, harmonic_chain4, internals_of, perturbed, seeded
from typer.testing import CliRunner

from openmm_tsf import cli, pretrained, pretraining, refinement, training
from openmm_tsf.checkpoint import flow_info, load_flow, save_flow
from openmm_tsf.coverage import Coverage, find_wells, shares
from openmm_tsf.ensemble import Ensemble, draw
from openmm_tsf.flow import Flow, FlowSettings, build_flow
from openmm_tsf.potentials import QuarticPotentials
from openmm_tsf.refinement import OutOfReach, RefinementSettings, ess_error, fit_shares, joint_frames, refine
from openmm_tsf.refinement_record import Refinement
from openmm_tsf.rundir import open_run
from openmm_tsf.training import History, TrainingSettings, train
from openmm_tsf.trajectories import Frames
from openmm_tsf.units import kT

HOT, COLD = 600.0, 300.0
BARRIER, TILT, CENTRE = 10.0, 4.4, 1.0
"""Of the torsion [kJ/mol, kJ/mol, rad]: a second well, opposite to the first, holds 3 % at 300 K."""
TRAINING = {
    "steps": 40, "batch_frames": 128, "batch_draws": 64, "evaluate_every": 20, "weight_average": 0.9,
    "checkpoint_every": 10, "learning_rate": 5e-3, "ramp_start": 0.0, "ramp_end": 0.0,
}  # fmt: skip


def torsion_energy(phi):
    return BARRIER * (1 - np.cos(2 * (phi - CENTRE))) / 2 + TILT * (1 - np.cos(phi - CENTRE))


def two_wells(x: torch.Tensor) -> torch.Tensor:
    """U (batch,) [kJ/mol] of chain4: harmonic bonds, angles that follow the torsion, and two wells of the torsion."""
    internals = internals_of("chain4")
    q = internals.inverse(x)[0] - internals.reference.to(x)
    phi = q[:, 5] + float(internals.reference[5])
    angles = q[:, 3:5] - BEND * phi.cos()[:, None]
    harmonic = 0.5 * (CHAIN4["bond"] * (q[:, :3] ** 2).sum(1) + CHAIN4["angle"] * (angles**2).sum(1))
    return harmonic + 0.5 * BARRIER * (1 - torch.cos(2 * (phi - CENTRE))) + TILT * (1 - torch.cos(phi - CENTRE))


def exact_frames(n: int, temperature: float, seed: int) -> Frames:
    """Exact draws of exp(-U/kT): the torsion from a grid, the rest is Gaussian given it."""
    q = chain4_internals(n, temperature, seed)
    grid = np.linspace(-math.pi, math.pi, 20_001)
    p = np.exp(-torsion_energy(grid) / kT(temperature))
    q[:, 5] = torch.tensor(np.interp(np.random.default_rng(seed + 1).random(n), np.cumsum(p) / p.sum(), grid))
    q[:, 3:5] += BEND * q[:, 5:].cos()
    return Frames(internals_of("chain4").forward(q)[0].numpy(), np.full(n, temperature))


def minor_share(temperature: float) -> float:
    """Share of the well opposite to CENTRE, by quadrature between the barriers."""
    grid = np.linspace(CENTRE, CENTRE + 2 * math.pi, 20_001)
    p = np.exp(-torsion_energy(grid) / kT(temperature))
    return p[(grid > CENTRE + math.pi / 2 + 0.1) & (grid < CENTRE + 1.5 * math.pi - 0.1)].sum() / p.sum()


class Counted:
    """The energy, and how many it was asked for."""

    def __init__(self) -> None:
        self.n = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.n += len(x)
        return two_wells(x)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A flow trained at 600 K for a few seconds."""
    torch.set_default_dtype(torch.float64)
    frames = exact_frames(5000, HOT, 3)
    size = {"blocks": 1, "hidden": 16, "depth": 1, "energy_order": 2, "entropy_order": 1}
    flow = build_flow(harmonic_chain4(), frames, FlowSettings(**size), generator=seeded(1))
    settings = TrainingSettings(**{**TRAINING, "steps": 120})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretraining, "STEPS", 100)
        train(flow, frames, two_wells, settings, directory=tmp_path_factory.mktemp("good"), seed=1)
    return flow


@pytest.fixture
def poor(good):
    """The same flow, spoilt a little."""
    return perturbed(copy.deepcopy(good).requires_grad_(False), 0.05)


def few(**changes) -> RefinementSettings:
    training = TrainingSettings(**{**TRAINING, **changes.pop("training", {})})
    return RefinementSettings(**{"n": 2000, "rounds": 2, "training": training, **changes})


def drawn(flow: Flow, n: int = 20_000, seed: int = 9, **more) -> Ensemble:
    return draw(flow, two_wells, temperature=COLD, n=n, generator=seeded(seed), **more)


def weights_of(flow: Flow) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in flow.state_dict().values()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- it refines -------------------------------------------------------------------------------------------------------


def stiff_width(flow: Flow) -> float:
    """Standard deviation of the stiff latents of draws at 600 K."""
    z, _ = flow.at(HOT).prior.sample(20_000, generator=seeded(8))
    return float(z[:, : flow.prior.n_stiff].detach().std())


@pytest.mark.parametrize("several", [False, True])
def test_torsions_are_given_the_shares_of_weighted_draws(several, good):
    """Spoilt energies and entropies of the torsion are mended at the temperatures of the draws, and with two of them at
    a third: to within the error of as many exact draws."""
    flow, n = copy.deepcopy(good), 40_000
    g, factor = seeded(3), flow.prior.factors[0]
    for potential in (factor.marginal, factor.entropy):
        potential.coefficients.data += 0.3 * torch.randn(potential.coefficients.shape, generator=g)
    before, widths = weights_of(flow.transform), stiff_width(flow)
    temperatures = (HOT, 0.75 * HOT) if several else (HOT,)
    ensembles = [draw(flow, two_wells, temperature=t, n=n, generator=seeded(4)) for t in temperatures]
    spoilt = factor.entropy.coefficients.clone()
    fit_shares(flow, ensembles, seeded(5))
    assert same(before, weights_of(flow.transform))
    assert torch.equal(spoilt, factor.entropy.coefficients) != several
    assert abs(stiff_width(flow) / widths - 1.0) < 0.01  # what the entropies would have them is taken back
    for kelvin in (*temperatures, *([COLD] if several else [])):
        x, _ = flow.at(kelvin).sample(n, generator=seeded(6))
        torsion = internals_of("chain4").inverse(x)[0][:, 5]
        beyond = (torsion - CENTRE) % math.tau
        share = float(((beyond > math.pi / 2 + 0.1) & (beyond < 1.5 * math.pi - 0.1)).double().mean())
        exact = minor_share(kelvin)
        assert abs(share / exact - 1.0) < 4.0 * math.sqrt(2.0 / (n * exact)) + (0.1 if kelvin == COLD else 0.02)


def test_a_potential_is_rescaled():
    potentials = QuarticPotentials(3)
    potentials.coefficients.data = torch.tensor([[0.3, -0.2, 0.0], [0.2, 0.0, -0.6], [0.1, 0.05, 0.0]])
    v = torch.linspace(-3.0, 3.0, 7)[:, None].expand(-1, 3)
    stretched = potentials(1.03 * v)
    potentials.rescale(1.03)
    assert torch.allclose(potentials(v), stretched, atol=1e-12)


def test_refinement_may_look_elsewhere_too(poor, tmp_path, monkeypatch):
    """In the fit alone: energies of training are those of the target."""
    energy, steep, at, unwatched = Counted(), 1.5 * COLD, [], refinement.train

    def watched(flow, frames, energy, settings, **options):
        at.append(settings.energies_at)
        return unwatched(flow, frames, energy, settings, **options)

    monkeypatch.setattr(refinement, "train", watched)
    done = refine(poor, energy, COLD, few(also=(steep,), rounds=1), directory=tmp_path, seed=1)
    names = sorted(path.name for path in tmp_path.glob("*.npz"))
    assert [name for name in names if name.startswith("also")] == ["also_450K.npz"]
    assert Ensemble.load(tmp_path / "also_450K.npz").temperature == steep
    assert at == [(COLD,)]
    assert done.after.ess > done.before.ess
    assert done.n_energy_evaluations <= energy.n <= done.n_energy_evaluations + 600
    with pytest.raises(ValueError, match="above 0 K"):
        RefinementSettings(also=(450.0, -1.0))


def test_refinement_raises_the_ess_at_the_target_and_accounts_for_it(poor, tmp_path):
    start, energy, seen = drawn(poor), Counted(), []
    done = refine(
        poor, energy, COLD, few(), directory=tmp_path, seed=1, progress=lambda *what: seen.append(what)
    )  # fmt: skip
    end = drawn(poor)
    assert start.ess < 0.9
    assert end.ess > start.ess + 0.05
    for measured, told in ((start, done.before), (end, done.after)):  # other draws of the same flows
        assert abs(measured.ess - told.ess) < 4 * math.hypot(told.ess_error, ess_error(measured))
    assert [row.kept for row in done.rounds][:2] == [True, True]
    assert done.rounds[1].nll_change < 0
    untold = 600 * (len(done.rounds) - 1)  # training scales its losses by the energies of a few hundred frames
    assert done.n_energy_evaluations <= energy.n <= done.n_energy_evaluations + untold
    assert seen[0][:2] == (0, 80) and seen[-1][0] <= 80 and all(b[0] >= a[0] for a, b in itertools.pairwise(seen))
    assert repr(Refinement.from_json(done.to_json())) == repr(done)


def test_a_refined_flow_steers_as_exactly_as_before(poor, tmp_path):
    before = weights_of(poor)
    refine(poor, two_wells, COLD, few(rounds=1), directory=tmp_path, seed=1)
    assert not same(before, weights_of(poor))
    assert poor.training_temperature == HOT
    laws.steerable(poor, torch.tensor(exact_frames(1000, HOT, 5).positions).double(), COLD, HOT, bound=1e-9)


def test_flows_with_momenta_are_refined_too(tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "STEPS", 5)
    frames = exact_frames(2000, HOT, 3)
    flow = build_flow(
        harmonic_chain4(), frames, FlowSettings(kind="tsf", blocks=1, hidden=16, depth=1), generator=seeded(1)
    )
    train(flow, frames, two_wells, TrainingSettings(**TRAINING), directory=tmp_path / "first", seed=1)
    settings = few(rounds=1, training={"batch_draws": 32})
    with pytest.warns(UserWarning, match="go unwatched: flows of kind 'tsf' have no potentials of torsions"):
        done = refine(flow, two_wells, COLD, settings, directory=tmp_path / "second", seed=1)
    assert Ensemble.load(tmp_path / "second" / "cover.npz").explore == 0.0
    assert done.after.ess > done.before.ess


def weighed(log_weights: torch.Tensor, n_rejected: int = 0) -> Ensemble:
    n = len(log_weights)
    return Ensemble(torch.zeros(n, 1, 3), torch.zeros(n), -log_weights, COLD, n_rejected)


def test_the_error_of_the_ess_is_its_scatter(generator):
    many = [weighed(0.5 * torch.randn(1000, generator=generator)) for _ in range(200)]
    scatter = float(torch.tensor([e.ess for e in many]).std())
    told = float(torch.tensor([ess_error(e) for e in many]).mean())
    assert 0.8 < told / scatter < 1.25  # the scatter itself is known to 5 %
    assert ess_error(weighed(torch.zeros(50))) == pytest.approx(0.0, abs=1e-7)
    binomial = weighed(torch.zeros(50), n_rejected=150)
    assert ess_error(binomial) == pytest.approx(math.sqrt(0.25 * 0.75 / 200))


@pytest.mark.parametrize(("width", "least"), [(0.5, 0.93), (1.5, 0.8)])
def test_the_error_of_the_ess_covers_it_where_weights_are_heavy(width, least, generator):
    """exp(-width^2) is the ESS of lognormal weights; to first order alone, 1000 draws cover the wider in 55 %."""
    many = [weighed(width * torch.randn(1000, generator=generator)) for _ in range(200)]
    covered = [abs(e.ess - math.exp(-(width**2))) < 2 * ess_error(e) for e in many]
    assert sum(covered) / len(covered) > least


def test_frames_of_several_flows_are_equally_likely_and_the_last_are_the_last_drawn(good, poor):
    ensembles = [drawn(poor, 4000, 1, explore=0.3), drawn(good, 4000, 2)]
    frames = joint_frames(ensembles, seeded(3))
    assert len(frames) == round(sum(e.n_effective for e in ensembles))
    assert set(frames.temperatures) == {COLD}
    phi, exact = (
        internals_of("chain4").of_frames(f.positions)[0][:, 5] for f in (frames, exact_frames(40_000, COLD, 8))
    )
    minor = [float(((p - CENTRE).cos() < -0.2).double().mean()) for p in (phi, exact)]
    assert abs(minor[0] - minor[1]) < 4 * math.sqrt(minor[1] / len(phi) + minor[1] / 40_000) + 0.005
    assert abs(float((phi - CENTRE).cos().mean() - (exact - CENTRE).cos().mean())) < 0.03
    _, late = frames.split(0.1)
    last = np.concatenate([e.positions[-1000:].numpy() for e in ensembles]).astype(np.float32)
    assert {x.tobytes() for x in late.positions} <= {x.tobytes() for x in last}


# --- training that goes on --------------------------------------------------------------------------------------------


def test_training_goes_on_from_the_weights_that_there_are(good, tmp_path):
    flow, frames = copy.deepcopy(good), exact_frames(1000, COLD, 4)
    settings = TrainingSettings(**{**TRAINING, "steps": 1, "learning_rate": 1e-9, "energies_at": (COLD,)})
    train(flow, frames, two_wells, settings, directory=tmp_path, seed=1, fresh=False)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights_of(flow), weights_of(good), strict=True))


def test_energies_are_those_of_the_target(good, tmp_path):
    """From frames of 600 K alone, the energy loss at 300 K must read another ESS than that at 600 K."""
    frames, ess, loss = exact_frames(1000, HOT, 4), {}, {}
    for at in ((), (COLD,), (HOT,), (HOT, COLD)):
        flow, folder = copy.deepcopy(good), tmp_path / str(at)
        settings = TrainingSettings(**{**TRAINING, "batch_draws": 512, "steps": 2, "energies_at": at})
        history = train(flow, frames, two_wells, settings, directory=folder, seed=1, fresh=False)
        ess[at], loss[at] = history.rows[-1]["ess_train"], history.rows[-1]["energy_loss"]
        forces, draws = 0.9 * len(frames), 512  # the first step is at the foot of the ramp, without draws
        judged = len(history.rows) * max(1, len(at)) * training.JUDGED_BY
        assert history.n_energy_evaluations == forces + draws + judged
    assert ess[()] == ess[HOT,] != ess[COLD,]
    assert min(loss[HOT,], loss[COLD,]) < loss[HOT, COLD] < max(loss[HOT,], loss[COLD,])
    with pytest.raises(ValueError, match="belongs to a run with other settings"):  # other weights to start from
        train(perturbed(flow, 0.1), frames, two_wells, settings, directory=folder, seed=1, fresh=False)


def test_energies_of_two_temperatures_take_turns(good, tmp_path, monkeypatch):
    seen, real = [], training.energy_loss

    def watched(flow, energy, temperature, n, **options):
        seen.append((temperature, n))
        return real(flow, energy, temperature, n, **options)

    monkeypatch.setattr(training, "energy_loss", watched)
    settings = TrainingSettings(**{**TRAINING, "batch_draws": 64, "steps": 5, "energies_at": (HOT, COLD)})
    train(copy.deepcopy(good), exact_frames(300, HOT, 4), two_wells, settings, directory=tmp_path, seed=1, fresh=False)
    assert [kelvin for kelvin, n in seen if n == 64] == [COLD, HOT, COLD, HOT]  # none at the foot of the ramp


@pytest.mark.parametrize("kelvin", [-5.0, 0.0, float("nan"), float("inf")])
def test_energies_are_of_temperatures_above_zero(kelvin):
    with pytest.raises(ValueError, match="above 0 K"):
        TrainingSettings(energies_at=(600.0, kelvin))


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 11])
def test_training_may_be_short_and_tells_of_the_forces_first(steps, good, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "AT_ONCE", 100)
    flow, frames, seen = copy.deepcopy(good), exact_frames(280, COLD, 4), []
    train(
        flow, frames, two_wells, TrainingSettings(**{**TRAINING, "steps": steps}), directory=tmp_path, seed=1,
        fresh=False, progress=lambda *what: seen.append(what),
    )  # fmt: skip
    told = [f"forces at the frames, {done} of 252" for done in (0, 100, 200)]
    assert seen[:3] == [(0, steps, message) for message in told]
    assert seen[-1][:2] == (steps, steps) and len(seen) == 3 + steps


# --- interrupted and resumed ------------------------------------------------------------------------------------------


class Interrupted(Exception):
    """Stands for Ctrl-C, a crash or a full disk."""


SHORT = few(n=500)


@pytest.fixture(scope="module")
def uninterrupted(good, tmp_path_factory):
    """The spoilt flow refined in one go, and what was told of it."""
    flow = perturbed(copy.deepcopy(good).requires_grad_(False), 0.05)
    return flow, refine(flow, two_wells, COLD, SHORT, directory=tmp_path_factory.mktemp("whole"), seed=1)


@pytest.mark.parametrize("step", [0, 15, 40, 55])
def test_an_interrupted_refinement_ends_with_the_same_bits(step, poor, uninterrupted, tmp_path):
    whole, done = uninterrupted
    cut = copy.deepcopy(poor)

    def stop(now: int, total: int, message: str) -> None:
        if now == step:
            raise Interrupted

    def go(flow: Flow, progress=None) -> Refinement:
        return refine(flow, two_wells, COLD, SHORT, directory=tmp_path, seed=1, progress=progress)

    with pytest.raises(Interrupted):
        go(cut, stop)
    assert same(weights_of(cut), weights_of(poor))  # untouched so far
    assert repr(go(cut)) == repr(done)
    assert same(weights_of(cut), weights_of(whole))


def test_a_directory_of_another_refinement_is_refused(poor, good, tmp_path):
    settings = few(n=500, rounds=1)
    refine(copy.deepcopy(poor), two_wells, COLD, settings, directory=tmp_path, seed=1)
    for flow, temperature, seed, other in (
        (good, COLD, 1, settings),
        (poor, 310.0, 1, settings),
        (poor, COLD, 2, settings),
        (poor, COLD, 1, few(n=600, rounds=1)),
    ):
        with pytest.raises(ValueError, match="refinement of another flow or with other settings"):
            refine(copy.deepcopy(flow), two_wells, temperature, other, directory=tmp_path, seed=seed)


# --- guards -----------------------------------------------------------------------------------------------------------


def test_wells_are_found_and_their_shares_are_right(good):
    cover = drawn(good, 10_000, explore=0.2)
    wells = find_wells(cover, good.zmatrix)
    coverage = Coverage(cover, wells, shares(wells, drawn(good).positions))
    assert coverage.exact.value.sum() == pytest.approx(1.0)
    i = int(coverage.exact.value.argmin())
    assert len(wells) == 2
    assert abs(float(coverage.exact.value[i]) - minor_share(COLD)) < 4 * float(coverage.exact.error[i]) + 0.003
    assert "MOL1-H1 MOL1-O1 MOL1-O2 MOL1-H2" in str(wells[i])


@pytest.mark.parametrize(
    ("raw", "n", "word"),
    [
        (0.030, 5000, None),
        (0.018, 5000, None),  # within a factor of two
        (0.055, 5000, None),
        (0.000, 5000, "0 % of the draws"),
        (0.004, 5000, "0.4 % of the draws"),
        (0.150, 5000, "15 % of the draws"),
        (0.004, 100, None),  # too few draws to say
    ],
)
def test_a_well_that_empties_is_told_from_noise(raw, n, word):
    wells = find_wells(drawn_exactly(), internals_of("chain4").zmatrix)
    ensemble = drawn_exactly()
    first = int(ensemble.mean(torch.stack([w.holds(ensemble.positions) for w in wells], 1)).value.argmin())
    share = torch.tensor([raw, 1 - raw] if first == 0 else [1 - raw, raw])
    coverage = Coverage(ensemble, wells, torch.tensor([0.03, 0.97] if first == 0 else [0.97, 0.03]))
    assert (lost := coverage.lost(share, n)) is None if word is None else word in (lost := coverage.lost(share, n))
    assert word is None or str(wells[first]) in lost


def drawn_exactly() -> Ensemble:
    frames = exact_frames(20_000, COLD, 6)
    return Ensemble(torch.tensor(frames.positions), torch.zeros(20_000), torch.zeros(20_000), COLD)


def without_the_minor_well(flow: Flow) -> Flow:
    """The energy of the flow tilted, so that hardly a draw is opposite to CENTRE; near CENTRE it stays good."""
    flow = copy.deepcopy(flow)
    (factor,) = flow.prior.factors
    order = {int(k): i for i, k in enumerate(factor.marginal.modes[:, 0])}
    tilt = 14.0 / kT(HOT) * torch.tensor([math.cos(CENTRE), math.sin(CENTRE)])
    factor.marginal.coefficients.data[:, order[1]] += tilt
    return flow


def trained_to(flow: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training that ends with the weights of this flow, which stay what they are."""

    def train(other, frames, energy, settings, *, directory, **more):
        other.load_state_dict(flow.state_dict())
        Path(directory).mkdir()
        (Path(directory) / "history.json").write_text(History().to_json())

    monkeypatch.setattr(refinement, "train", train)
    monkeypatch.setattr(refinement._Refiner, "_fitted", lambda self, coverage: None)


@pytest.mark.parametrize("loses", [True, False])
def test_a_round_that_loses_a_well_is_undone_although_its_ess_is_higher(loses, good, poor, tmp_path, monkeypatch):
    trained_to(without_the_minor_well(good) if loses else good, monkeypatch)
    start = weights_of(poor)
    done = refine(poor, two_wells, COLD, few(n=4000, rounds=1), directory=tmp_path, seed=1)
    assert done.rounds[1].ess > done.rounds[0].ess + 0.05
    assert done.rounds[1].kept is not loses
    assert same(weights_of(poor), start if loses else weights_of(good))
    assert ("round 1 was undone" in done.stopped and "0 % of the draws" in done.stopped) is loses
    assert done.after is done.rounds[0 if loses else 1]


def test_a_round_that_makes_the_first_draws_less_likely_is_undone(good, poor, tmp_path, monkeypatch):
    """The same lost well, seen by the likelihood alone."""
    monkeypatch.setattr(Coverage, "lost", lambda self, raw, n: None)
    trained_to(without_the_minor_well(good), monkeypatch)
    done = refine(poor, two_wells, COLD, few(n=4000, rounds=1), directory=tmp_path, seed=1)
    assert done.rounds[1].ess > done.rounds[0].ess + 0.05
    assert "the first draws became less likely" in done.stopped


def test_a_round_that_lowers_the_ess_is_undone(good, poor, tmp_path, monkeypatch):
    trained_to(perturbed(copy.deepcopy(good).requires_grad_(False), 0.08), monkeypatch)
    start = weights_of(poor)
    done = refine(poor, two_wells, COLD, few(), directory=tmp_path, seed=1)
    assert not done.rounds[1].kept and len(done.rounds) == 2
    assert same(weights_of(poor), start)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_target_out_of_reach_is_refused_with_advice(good, tmp_path):
    flow = perturbed(copy.deepcopy(good).requires_grad_(False), 0.5)
    with pytest.raises(
        OutOfReach, match=r"40 K is out of reach of refinement: the ESS .*train longer, or refine nearer"
    ):
        refine(flow, two_wells, 40.0, few(n=1000), directory=tmp_path, seed=1)


def test_at_the_training_temperature_nothing_nearer_is_advised(good, tmp_path, monkeypatch):
    monkeypatch.setattr(refinement, "LEAST_ESS", 1.1)
    with pytest.raises(OutOfReach, match=r"600 K is out of reach of refinement: .* takes 110 %; train longer$"):
        refine(good, two_wells, HOT, few(n=1000), directory=tmp_path, seed=1)


def test_too_few_effective_draws_to_train_on_are_refused(good, tmp_path, monkeypatch):
    monkeypatch.setattr(refinement, "FEWEST", 10_000)
    with pytest.raises(OutOfReach, match=r"2000 draws at 600 K are worth \d+, and refinement takes 10000; draw more"):
        refine(good, two_wells, HOT, few(n=1000), directory=tmp_path, seed=1)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperatures_are_above_zero(temperature, good, tmp_path):
    with pytest.raises(ValueError, match="above 0 K"):
        refine(good, two_wells, temperature, directory=tmp_path / "none", seed=1)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("wrong", [{"n": 10}, {"rounds": 0}, {"explore": 0.0}, {"explore": 1.0}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RefinementSettings(**wrong)


# --- the command ------------------------------------------------------------------------------------------------------

QUICK = ("-n", 400, "--rounds", 2, "--steps", 4)


def invoke(*arguments: object):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def error_of(result) -> str:
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.strip()]
    return line


@pytest.fixture
def copied(tiny_run, tmp_path):
    """The tiny run with the flow that ships: its own is poor, how poor is up to the processor that trained it."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    save_flow(pretrained("ala2"), run / "flow.tsf")
    return run


def test_the_command_writes_a_flow_to_draw_from(copied, tmp_path):
    before = (copied / "flow.tsf").read_bytes()
    result = invoke("refine", copied, "-T", 550, *QUICK)
    assert result.exit_code == 0, result.output
    assert (copied / "flow.tsf").read_bytes() == before
    assert flow_info(copied / "flow_550K.tsf")["extra"]["refined_at"] == [550.0]
    assert load_flow(copied / "flow_550K.tsf").training_temperature == 600.0
    done = Refinement.from_json((copied / "refinement_550K.json").read_text())
    assert done.temperature == 550.0 and 2 <= len(done.rounds) <= 3
    for words in ("before", "after", done.stopped[:20], f"{done.n_energy_evaluations:,}", "to draw"):
        assert words in " ".join(result.stdout.replace("│", " ").split())
    assert not (copied / "refine_550K").exists()
    record = json.loads((copied / "stages.json").read_text())["refine 550 K"]
    assert record["done"] and record["n_energy_evaluations"] >= done.n_energy_evaluations
    sampled = invoke("sample", copied / "flow_550K.tsf", "-T", 550, "-n", 100, "--out", tmp_path / "a.npz")
    assert sampled.exit_code == 0, sampled.output
    assert Ensemble.load(tmp_path / "a.npz").temperature == 550.0


def test_the_same_command_again_does_nothing_and_another_is_refused(copied):
    first = invoke("refine", copied, "-T", 550, *QUICK)
    made = (copied / "flow_550K.tsf").read_bytes()
    again = invoke("refine", copied, "-T", 550, *QUICK)
    assert again.exit_code == 0 and again.stdout == first.stdout
    line = error_of(invoke("refine", copied, "-T", 550, "-n", 2000))
    assert "n was 400 and is now 2000" in line and "delete flow_550K.tsf" in line
    assert (copied / "flow_550K.tsf").read_bytes() == made
    (copied / "flow_550K.tsf").unlink()
    anew = invoke("refine", copied, "-T", 550, "-n", 2000, *QUICK[2:])
    assert anew.exit_code == 0, anew.output
    assert (copied / "flow_550K.tsf").read_bytes() != made


def test_one_refinement_goes_on_from_another(copied):
    line = error_of(invoke("refine", copied, "-T", 550, "--after", 600, *QUICK))
    assert "no flow refined at 600 K to go on from" in line and f"openmm-tsf refine {copied} --temperature 600" in line
    hot = invoke("refine", copied, "-T", 600, *QUICK)
    assert hot.exit_code == 0, hot.output
    assert "draw from the flow" not in " ".join(hot.stdout.replace("│", " ").split())
    assert "of 600 K itself" in error_of(invoke("refine", copied, "-T", 600, "--after", 600, *QUICK))
    result = invoke("refine", copied, "-T", 550, "--after", 600, *QUICK)
    assert result.exit_code == 0, result.output
    assert flow_info(copied / "flow_550K.tsf")["extra"]["refined_at"] == [600.0, 550.0]
    assert "flow was" in error_of(invoke("refine", copied, "-T", 550, *QUICK))  # not what it was made from


def test_an_interrupted_command_goes_on(copied, monkeypatch):
    whole = shutil.copytree(copied, copied.with_name("whole"))
    assert invoke("refine", whole, "-T", 550, *QUICK).exit_code == 0

    def interrupted(*arguments, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(refinement.Coverage, "nll_change", interrupted)
        assert invoke("refine", copied, "-T", 550, *QUICK).exit_code == 130
    assert (copied / "refine_550K" / "round_1" / "flow.tsf").exists() and not (copied / "flow_550K.tsf").exists()
    assert "steps was 4 and is now 5" in error_of(invoke("refine", copied, "-T", 550, *QUICK[:-1], 5))
    assert invoke("refine", copied, "-T", 550, *QUICK).exit_code == 0
    assert flow_info(copied / "flow_550K.tsf")["sha256"] == flow_info(whole / "flow_550K.tsf")["sha256"]


def test_bad_input_is_one_line(copied, tiny_run, tmp_path, monkeypatch):
    assert "not a run directory" in error_of(invoke("refine", tmp_path, "-T", 300))
    assert invoke("refine", copied, "-T", 0).exit_code == 2
    assert invoke("refine", copied).exit_code == 2
    assert "learning_rate" in error_of(invoke("refine", copied, "-T", 300, "--learning-rate", 0))
    monkeypatch.setattr(refinement, "LEAST_ESS", 1.1)
    assert "out of reach of refinement" in error_of(invoke("refine", copied, "-T", 300, *QUICK))
    assert not (copied / "refine_300K").exists()
    (copied / "flow.tsf").unlink()
    assert f"has no trained flow yet: run the train stage first (openmm-tsf train {copied})" in error_of(
        invoke("refine", copied, "-T", 300)
    )


def test_batches_are_those_of_the_run(copied):
    from openmm_tsf.refine_stage import settings_of

    with open_run(copied) as run:
        settings = settings_of(run, n=None, rounds=3, steps=None, learning_rate=1e-4)
    default = RefinementSettings()
    assert (settings.training.batch_frames, settings.training.batch_draws) == (64, 8)
    assert (settings.n, settings.rounds, settings.training.steps) == (default.n, 3, default.training.steps)
    assert (settings.training.learning_rate, settings.training.ramp_end) == (1e-4, 0.0)
