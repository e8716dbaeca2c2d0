"""Training: it learns, it goes on after any interruption to the bit, and it refuses what is not its own."""

import dataclasses
import json
import math
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import laws
import numpy as np
import pytest
import scipy.stats
import torch
from molecules import (
    CHAIN4,
    MOLECULES,
    chain4_internals,
    chain4_log_z,
    coupled_energy,
    coupled_frames,
    frames_of,
    harmonic_chain4,
    internals_of,
)

from openmm_tsf import pretraining, training
from openmm_tsf.ensemble import draw
from openmm_tsf.flow import Flow, FlowSettings, build_flow
from openmm_tsf.losses import Divergence, energy_loss, likelihood_loss
from openmm_tsf.pretraining import fit_torsions
from openmm_tsf.priors import MolecularPrior
from openmm_tsf.training import History, TrainingSettings, train
from openmm_tsf.trajectories import Frames
from openmm_tsf.units import kT

HOT = 600.0
SMALL = {"blocks": 1, "hidden": 8, "depth": 1, "energy_order": 2, "entropy_order": 1}
SHORT = {
    "steps": 24, "batch_frames": 32, "batch_draws": 16, "evaluate_every": 4, "checkpoint_every": 6, "patience": 50,
    "held_out": 0.2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def short_pretraining(monkeypatch):
    monkeypatch.setattr(pretraining, "STEPS", 5)
    monkeypatch.setattr(pretraining, "BATCH", 64)


def some_frames(n: int = 400, seed: int = 3, temperature: float = HOT) -> Frames:
    return Frames(coupled_frames(n, temperature, seed), np.full(n, temperature))


def untrained(frames: Frames | None = None, seed: int = 1, **settings) -> Flow:
    flow_settings = FlowSettings(**{**SMALL, **settings})
    generator = torch.Generator().manual_seed(seed)
    return build_flow(harmonic_chain4(), frames or some_frames(), flow_settings, generator=generator)


def short(**changes) -> TrainingSettings:
    return TrainingSettings(**{**SHORT, **changes})


class Interrupted(Exception):
    """Stands for Ctrl-C, a crash or a full disk."""


def stop_at(step: int):
    def progress(done: int, total: int, message: str) -> None:
        if done == step:
            raise Interrupted

    return progress


def run(directory: Path, settings: TrainingSettings, *, flow: Flow | None = None, frames: Frames | None = None, **more):
    """A run from scratch, or from what is in the directory, as the command line does it: (flow, history)."""
    flow = flow or untrained()
    history = train(
        flow, frames or some_frames(), coupled_energy, settings, **{"directory": directory, "seed": 5, **more}
    )
    return flow, history


def assert_same(one: tuple[Flow, History], other: tuple[Flow, History]) -> None:
    """Weights and history, to the bit."""
    a, b = one[0].state_dict(), other[0].state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert repr(one[1]) == repr(other[1])  # NaN included


# --- it learns --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A flow trained on a toy for a few seconds, and its history, the frames and the untrained flow."""
    torch.set_default_dtype(torch.float64)
    frames = some_frames(6000)
    flow, start = untrained(frames, hidden=16), untrained(frames, hidden=16)
    settings = TrainingSettings(
        steps=300, batch_frames=128, batch_draws=64, evaluate_every=25, learning_rate=5e-3, weight_average=0.95
    )
    history = train(flow, frames, coupled_energy, settings, directory=tmp_path_factory.mktemp("run"), seed=1)
    return flow, history, frames, start


def ess(flow: Flow, temperature: float) -> float:
    generator = torch.Generator().manual_seed(2)
    return draw(flow, coupled_energy, temperature=temperature, n=10_000, generator=generator).ess


def test_held_out_likelihood_improves(learned):
    flow, history, _, start = learned
    new = some_frames(4000, seed=99)  # never seen by anyone
    q = flow.internals.of_frames(new.positions)[0]
    before, after = (float(likelihood_loss(f, q, torch.full((len(q),), HOT)).detach().mean()) for f in (start, flow))
    # the entropy of the target is the lowest nll there is: ln Z plus the mean reduced energy
    least = chain4_log_z(HOT) + float(coupled_energy(torch.tensor(new.positions).double()).mean()) / kT(HOT)
    assert before > least + 0.5
    assert least - 0.1 < after < least + 0.25
    nll = [row["held_out_nll"] for row in history.rows]
    assert min(nll) < nll[0]


def test_weights_become_even_at_the_training_temperature_and_below(learned):
    flow, _, _, start = learned
    assert ess(start, HOT) < 0.5
    assert ess(flow, HOT) > 0.75
    assert ess(flow, 300.0) > max(0.6, ess(start, 300.0) + 0.1)


def test_the_free_energy_of_the_trained_flow_is_right(learned):
    for temperature in (HOT, 300.0):
        generator = torch.Generator().manual_seed(3)
        ensemble = draw(learned[0], coupled_energy, temperature=temperature, n=10_000, generator=generator)
        assert ensemble.log_z_error < 0.01
        assert abs(ensemble.log_z - chain4_log_z(temperature)) < 4 * ensemble.log_z_error


def test_trained_flows_steer(learned):
    x = torch.tensor(learned[2].positions[:1000]).double()
    laws.steerable(learned[0], x, 300.0, HOT, bound=1e-9)


def test_the_result_is_in_double_precision_and_holds_the_best_weights(learned):
    flow, history, frames, _ = learned
    assert flow.dtype == torch.float64
    _, late = frames.split(0.1)
    q = flow.internals.of_frames(late.positions)[0]
    best = next(row for row in history.rows if row["step"] == history.best_step)
    assert float(likelihood_loss(flow, q, torch.full((len(q),), HOT)).detach().mean()) == pytest.approx(
        best["held_out_nll"], abs=1e-3
    )


def test_history_has_what_plots_and_reports_need(tmp_path):
    seen = []
    settings = short(ramp_start=0.25, ramp_end=0.5, learning_rate=1e-3)
    _, history = run(tmp_path, settings, progress=lambda *what: seen.append(what))
    assert [row["step"] for row in history.rows] == list(range(4, 25, 4))
    wanted = {"step", "loss", "held_out_nll", "ess_train", "energy_loss", "learning_rate"}
    assert all(wanted <= row.keys() for row in history.rows)
    assert all(0 < row["ess_train"] <= 1 and math.isfinite(row["energy_loss"]) for row in history.rows)
    assert max(row["learning_rate"] for row in history.rows) <= 1e-3  # the largest that was asked for
    first = 8  # after a quarter of the steps, and one whose weight is just zero
    judged = len(history.rows) * training.JUDGED_BY
    assert history.n_energy_evaluations == 320 + (24 - first + 1) * 16 + judged  # forces at the frames, and draws
    text = (tmp_path / "history.json").read_text()
    assert repr(History.from_json(text)) == repr(history)
    assert [(done, total) for done, total, _ in seen] == [(i, 24) for i in range(25)]  # forces at the frames first
    assert all(isinstance(message, str) and "\n" not in message for *_, message in seen)


@pytest.mark.parametrize(("estimator", "n"), [("plain", 0), ("path", 320)])
def test_without_an_energy_loss_no_draw_costs_an_energy(tmp_path, estimator, n):
    _, history = run(tmp_path, short(energy_weight=0.0, estimator=estimator))
    assert history.n_energy_evaluations == n
    assert history.best_step == min(history.rows, key=lambda row: row["held_out_nll"])["step"]
    text = (tmp_path / "history.json").read_text()
    assert repr(History.from_json(text)) == repr(history)
    assert json.loads(text)["rows"][0]["ess_train"] is None and "NaN" not in text  # strict JSON has no NaN


def test_the_score_is_of_held_out_frames_and_fresh_draws(tmp_path):
    _, history = run(tmp_path, short(energy_weight=0.3, evaluate_every=3, learning_rate=3e-2))
    score = {row["step"]: 0.7 * row["held_out_nll"] + 0.3 * row["energy_loss"] for row in history.rows}
    assert len(score) == 8 and history.best_step == min(score, key=score.get)


def test_frames_of_two_temperatures_train_one_flow(tmp_path):
    hot, cold = coupled_frames(600, HOT, 3), coupled_frames(600, 300.0, 4)
    positions = np.stack((hot, cold), 1).reshape(-1, 4, 3)
    frames = Frames(positions, np.tile([HOT, 300.0], 600), n_walkers=2)
    flow, history = run(tmp_path, short(steps=40), flow=untrained(frames), frames=frames)
    assert flow.training_temperature == HOT
    assert history.rows[-1]["held_out_nll"] < history.rows[0]["held_out_nll"]


# --- held-out frames and early stopping -------------------------------------------------------------------------------


def test_held_out_frames_are_the_latest_of_every_walker(tmp_path):
    """Late frames with stretched bonds: the held-out nll is theirs, and they leave no trace in the weights."""
    n, walkers = 100, 4
    x = coupled_frames(n * walkers, HOT, 3).reshape(n, walkers, 4, 3)
    stretched = x.copy()
    stretched[80:] *= 1.02
    frames = [Frames(a.reshape(-1, 4, 3), np.full(n * walkers, HOT), n_walkers=walkers) for a in (x, stretched)]
    settings = short(energy_weight=0.0, steps=4, evaluate_every=4)  # one evaluation: nothing to choose from
    plain, strange = (run(tmp_path / str(i), settings, flow=untrained(frames[0]), frames=frames[i]) for i in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(plain[0].parameters(), strange[0].parameters(), strict=True))
    nlls = [history.rows[-1]["held_out_nll"] for _, history in (plain, strange)]
    for (flow, _), late, nll in zip((plain, strange), (x[80:], stretched[80:]), nlls, strict=True):
        q = flow.internals.of_frames(late.reshape(-1, 4, 3))[0]
        exact = float(likelihood_loss(flow, q, torch.full((len(q),), HOT)).detach().mean())
        assert nll == pytest.approx(exact, abs=1e-2)
    assert nlls[1] > nlls[0] + 0.3


def test_training_stops_early_and_keeps_the_best(tmp_path):
    frames = some_frames(60)  # few enough to be learnt by heart
    settings = short(
        steps=2000,
        energy_weight=0.0,
        learning_rate=2e-2,
        evaluate_every=10,
        patience=3,
        weight_average=0.0,
        held_out=0.5,
    )
    flow, history = run(tmp_path, settings, flow=untrained(frames, hidden=32), frames=frames)
    assert history.stopped_early
    last = history.rows[-1]["step"]
    assert last < 2000 and last - history.best_step == 30
    nll = {row["step"]: row["held_out_nll"] for row in history.rows}
    assert nll[history.best_step] == min(nll.values()) < nll[last]
    _, late = frames.split(0.5)
    q = flow.internals.of_frames(late.positions)[0]
    kept = float(likelihood_loss(flow, q, torch.full((len(q),), HOT)).detach().mean())
    assert kept == pytest.approx(nll[history.best_step], abs=1e-2)
    again = run(tmp_path, settings, flow=untrained(frames, hidden=32), frames=frames)
    assert_same((flow, history), again)  # and a second call has nothing to add


# --- interrupted and resumed ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretraining, "STEPS", 5)
        patch.setattr(pretraining, "BATCH", 64)
        torch.set_default_dtype(torch.float64)
        return run(tmp_path_factory.mktemp("whole"), short())


def trained(steps: list[int]):
    """Progress that notes steps of training alone, and not the forces at the frames before them."""
    return lambda done, total, message: None if message.startswith("forces") else steps.append(done)


@pytest.mark.parametrize("step", [1, 5, 6, 13, 23, 24])
def test_an_interrupted_run_goes_on_to_the_same_bits(step, tmp_path, uninterrupted):
    flow = untrained()
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    with pytest.raises(Interrupted):
        run(tmp_path, short(), flow=flow, progress=stop_at(step))
    assert all(torch.equal(value, before[name]) for name, value in flow.state_dict().items())  # untouched so far
    steps = []
    resumed = run(tmp_path, short(), progress=trained(steps))
    assert_same(resumed, uninterrupted)
    assert steps == list(range(step - step % 6 + 1, 25))  # from the last checkpoint, not from the start


def test_two_interruptions_are_no_worse_than_one(tmp_path, uninterrupted):
    for step in (8, 15):
        with pytest.raises(Interrupted):
            run(tmp_path, short(), progress=stop_at(step))
    assert_same(run(tmp_path, short()), uninterrupted)


def test_a_finished_run_is_not_repeated(tmp_path, uninterrupted):
    run(tmp_path, short())
    steps = []
    again = run(tmp_path, short(), progress=lambda *what: steps.append(what))
    assert steps == []
    assert_same(again, uninterrupted)


def test_other_random_numbers_in_the_program_do_not_matter(tmp_path, uninterrupted):
    torch.manual_seed(123)
    np.random.seed(4)  # noqa: NPY002 - on purpose
    before = torch.random.get_rng_state()
    result = run(tmp_path, short(), progress=lambda *what: torch.rand(3))
    assert_same(result, uninterrupted)
    torch.random.set_rng_state(before)
    run(tmp_path / "again", short())
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_write_that_fails_leaves_the_last_checkpoint_whole(tmp_path, uninterrupted, monkeypatch):
    with pytest.raises(Interrupted):
        run(tmp_path, short(), progress=stop_at(8))
    before = (tmp_path / "training_state.pt").read_bytes()
    real = torch.save

    def half(state, path):
        real(state, path)
        whole = Path(path).read_bytes()
        Path(path).write_bytes(whole[: len(whole) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(OSError, match="No space left"):
            run(tmp_path, short())
    assert (tmp_path / "training_state.pt").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} <= {"training_state.pt", "history.json"}
    assert_same(run(tmp_path, short()), uninterrupted)


KILLED = """
import os, signal, sys
from pathlib import Path
import conftest
import torch
from openmm_tsf import pretraining
import test_training as t

torch.set_default_dtype(torch.float64)
pretraining.STEPS, pretraining.BATCH = 5, 64

def progress(done, total, message):
    if done == 15:
        os.kill(os.getpid(), signal.SIGKILL)

t.run(Path(sys.argv[1]), t.short(), progress=progress)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kill -9 is a matter of POSIX systems")
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, uninterrupted):
    here = Path(__file__).resolve().parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(here), str(here.parent)))}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", KILLED, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    steps = []
    resumed = run(tmp_path, short(), progress=trained(steps))
    assert steps[0] == 13
    assert_same(resumed, uninterrupted)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture
def started(tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, short(), progress=stop_at(8))
    return tmp_path


OTHER_RUNS = {
    "settings": lambda folder: run(folder, short(learning_rate=3e-3)),
    "number of steps": lambda folder: run(folder, short(steps=25)),
    "seed": lambda folder: run(folder, short(), seed=6),
    "number of frames": lambda folder: run(folder, short(), frames=some_frames(405)),
    "frames": lambda folder: run(folder, short(), frames=some_frames(seed=4)),
    "temperature": lambda folder: run(folder, short(), frames=some_frames(temperature=500.0)),
    "architecture": lambda folder: run(folder, short(), flow=untrained(hidden=9)),
    "number of blocks": lambda folder: run(folder, short(), flow=untrained(blocks=2)),
}


@pytest.mark.parametrize("what", OTHER_RUNS)
def test_a_directory_of_another_run_is_refused(what, started):
    before = (started / "training_state.pt").read_bytes()
    with pytest.raises(ValueError, match="belongs to a run with other settings or frames") as error:
        OTHER_RUNS[what](started)
    assert "\n" not in str(error.value) and str(started) in str(error.value)
    assert (started / "training_state.pt").read_bytes() == before


class Trap:
    """A pickle that leaves a mark when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def damaged(how: str, path: Path) -> bytes:
    whole = path.read_bytes()
    if how == "cut in half":
        return whole[: len(whole) // 2]
    if how == "empty":
        return b""
    if how == "text":
        return b"not a checkpoint at all"
    if how == "a pickle":
        return pickle.dumps(Trap(path.with_name("executed")))
    value = Trap(path.with_name("executed")) if how == "a trap" else torch.ones(3)
    torch.save(value if how == "a tensor" else {"identity": value}, path)
    return path.read_bytes()


@pytest.mark.parametrize("how", ["cut in half", "empty", "text", "a pickle", "a trap", "a tensor", "a foreign state"])
def test_a_damaged_state_is_refused_in_one_line_and_nothing_is_executed(how, started):
    path = started / "training_state.pt"
    path.write_bytes(damaged(how, path))
    with pytest.raises(ValueError, match=r"training_state\.pt") as error:
        run(started, short())
    assert "\n" not in str(error.value)
    assert not (started / "executed").exists()


def test_frames_of_another_isomer_are_refused(tmp_path):
    x = coupled_frames(400, HOT, 3)
    with pytest.raises(ValueError, match="positions have shape"):
        train(untrained(), Frames(x[:, :3], np.full(400, HOT)), coupled_energy, short(), directory=tmp_path, seed=1)
    molecule, x = MOLECULES["ala2"](), frames_of("ala2", 1000)
    flow = build_flow(
        molecule, Frames(x, np.full(1000, HOT)), FlowSettings(**SMALL), generator=torch.Generator().manual_seed(1)
    )
    mirror = Frames(x * np.array([1.0, 1.0, -1.0]), np.full(1000, HOT))
    with pytest.raises(ValueError, match="another isomer than the reference structure"):
        train(flow, mirror, lambda x: x.sum((1, 2)), short(), directory=tmp_path, seed=1)


def test_an_energy_that_is_never_finite_is_refused(tmp_path):
    with pytest.raises((RuntimeError, ValueError), match=r"finite"):
        train(
            untrained(), some_frames(), lambda x: math.inf * (1 + coupled_energy(x) ** 2), short(ramp_start=0.0),
            directory=tmp_path, seed=1,
        )  # fmt: skip


def test_a_gradient_that_is_not_finite_stops_training_with_advice(tmp_path):
    def poisonous(x: torch.Tensor) -> torch.Tensor:
        u = coupled_energy(x)
        return u + torch.where(u > -1.0, 0.0 * (u - u.detach()).sqrt(), 0.0)  # slope inf * 0 = NaN at finite values

    with pytest.raises(ValueError, match=r"320 of 320 frames have forces that are not finite; check the trajectory"):
        train(untrained(), some_frames(), poisonous, short(), directory=tmp_path, seed=1)


def test_ten_steps_are_a_number_like_any_other(tmp_path):
    assert run(tmp_path, short(steps=10))[1].rows[-1]["step"] == 10


def test_a_flow_that_breaks_stops_training_with_advice(tmp_path):
    flow = untrained()
    flow.transform.transforms[0].net.last.bias.data[:] = 1e30
    with pytest.raises(RuntimeError, match=r"gradient is not finite at step \d+; more frames, or a smaller"):
        train(flow, some_frames(), coupled_energy, short(energy_weight=0.0), directory=tmp_path, seed=1)


@pytest.mark.parametrize("n_bad", [2, 6])
def test_an_evaluation_without_a_finite_draw_has_no_score(n_bad, tmp_path, monkeypatch):
    seen = []

    def clashing(flow, energy, temperature, n, **options):
        seen.append(n)
        if n == training.JUDGED_BY and seen.count(n) <= n_bad:
            raise Divergence(f"none of {n} draws has a finite energy")
        return energy_loss(flow, energy, temperature, n, **options)

    monkeypatch.setattr(training, "energy_loss", clashing)
    if n_bad == 6:  # that is all of them
        with pytest.raises(Divergence, match="no evaluation gave a finite score"):
            run(tmp_path, short())
        return
    _, history = run(tmp_path, short())
    assert [row["ess_train"] > 0 for row in history.rows] == [False] * 2 + [True] * 4
    assert (
        history.best_step > 8 and json.loads((tmp_path / "history.json").read_text())["rows"][0]["energy_loss"] is None
    )


@pytest.mark.parametrize("n", [15, 1])
def test_training_that_diverges_keeps_its_best_weights_if_it_has_some(n, tmp_path, monkeypatch):
    calls = []

    def broken(flow, q, temperatures, **options):
        calls.append(torch.is_grad_enabled())
        return likelihood_loss(flow, q, temperatures, **options) * (math.nan if sum(calls) > n else 1.0)

    monkeypatch.setattr(training, "likelihood_loss", broken)
    if n == 1:  # no evaluation before
        with pytest.raises(Divergence, match=r"gradient is not finite at step 1;"):
            run(tmp_path, short())
        return
    with pytest.warns(UserWarning, match=r"weights of step \d+ are kept: the gradient is not finite at step 15;"):
        result = run(tmp_path, short())
    flow, history = result
    assert history.diverged_at == 15 and history.stopped_early and 0 < history.best_step <= 12
    assert all(torch.isfinite(p).all() for p in flow.parameters())
    assert_same(run(tmp_path, short()), result)  # and a second call does not try again


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *((name, 0) for name in ("steps", "batch_frames", "batch_draws", "evaluate_every", "patience")),
        ("checkpoint_every", -1),
        ("flatten", 0.5), ("flatten", math.nan), ("flatten", math.inf),
        ("learning_rate", 0.0), ("learning_rate", math.nan), ("learning_rate", -1e-3),
        ("clip", 0.0), ("clip", math.inf),
        ("energy_weight", -0.1), ("energy_weight", 1.1), ("energy_weight", math.nan),
        ("held_out", 0.0), ("held_out", 0.95), ("held_out", math.nan),
        ("weight_average", 1.0), ("weight_average", -0.5),
        ("ramp_start", 0.5), ("ramp_end", 1.5), ("ramp_end", math.nan),
    ],
)  # fmt: skip
def test_settings_are_checked(setting, value):
    with pytest.raises(ValueError, match=setting):
        TrainingSettings(**{setting: value})


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainingSettings().steps = 3


@pytest.mark.parametrize(
    "settings", [{"steps": 1}, {"steps": 2, "batch_draws": 1, "ramp_start": 0.0}, {"energy_weight": 1.0}]
)
def test_extreme_settings_run(settings, tmp_path):
    _, history = run(tmp_path, short(**{"ramp_end": 0.4, **settings}))
    assert history.rows[-1]["step"] == settings.get("steps", 24)
    assert math.isfinite(history.rows[-1]["held_out_nll"])


def test_the_directory_is_made_if_need_be(tmp_path):
    run(tmp_path / "deep" / "down", short(steps=2))
    assert (tmp_path / "deep" / "down" / "history.json").exists()


# --- pretraining ------------------------------------------------------------------------------------------------------


def test_torsion_potentials_are_the_most_likely_ones():
    """Twice the gain in likelihood over the truth is chi-square distributed with as many degrees as coefficients."""
    truth = MolecularPrior(0, [(0,), (1, 2)], energy_order=2, entropy_order=0).requires_grad_(False)
    g = torch.Generator().manual_seed(11)
    for factor in truth.factors:
        shape = factor.marginal.coefficients.shape
        factor.marginal.coefficients.data = 0.6 * torch.randn(shape, generator=g)
    n, taus = 20_000, (1.0, 0.5)
    angles = torch.cat([truth.at(tau).sample(n, generator=g)[0] for tau in taus])
    tau = torch.tensor(taus).repeat_interleave(n)
    fitted = MolecularPrior(0, [(0,), (1, 2)], energy_order=2, entropy_order=0)
    fit_torsions(fitted, angles, tau)
    gain = sum(
        float((fitted.at(t).log_prob(angles[tau == t]) - truth.at(t).log_prob(angles[tau == t])).detach().sum())
        for t in taus
    )
    n_coefficients = sum(factor.marginal.coefficients.numel() for factor in truth.factors)
    low, high = scipy.stats.chi2.ppf([1e-4, 1 - 1e-4], n_coefficients)
    assert low < 2 * gain < high


def test_stretches_that_were_never_visited_do_not_become_bottomless():
    angles = 0.3 * torch.randn(5000, 1, generator=torch.Generator().manual_seed(1))
    prior = MolecularPrior(0, [(0,)], energy_order=6, entropy_order=0)
    fit_torsions(prior, angles, torch.ones(5000))
    potential = prior.factors[0].energy(laws.circle(200)[:, None]).detach()
    assert 5.0 < float(potential.max() - potential.min()) < 100.0


def test_widths_that_depend_on_the_torsion_are_found(monkeypatch):
    """Angles four times as wide at one side of the circle: pretraining alone comes close to the truth."""
    monkeypatch.setattr(pretraining, "STEPS", 150)
    monkeypatch.setattr(pretraining, "BATCH", 512)
    n, tau = 6000, kT(HOT)
    q = chain4_internals(2 * n, HOT, seed=3)
    rest = internals_of("chain4").reference
    log_scale = 0.7 * q[:, 5:].cos() - 0.7
    q[:, 3:5] = rest[3:5] + (q[:, 3:5] - rest[3:5]) * log_scale.exp()
    x = internals_of("chain4").forward(q)[0].numpy()
    train_x, test_q = Frames(x[:n], np.full(n, HOT)), q[n:]
    flow = untrained(train_x, hidden=16)
    pretraining.pretrain(
        flow, q[:n], torch.ones(n), flatten=1.0, generator=torch.Generator().manual_seed(1)
    )  # fmt: skip
    kappa = CHAIN4["barrier"] / tau
    delta = (test_q[:, 3:5] - rest[3:5]) / log_scale[n:].exp()
    exact = -chain4_log_z(HOT) - 2 * log_scale[n:, 0] - kappa * (1 - torch.cos(test_q[:, 5] - CHAIN4["centre"]))
    exact -= (
        0.5 * (CHAIN4["angle"] * (delta**2).sum(1) + CHAIN4["bond"] * ((test_q[:, :3] - rest[:3]) ** 2).sum(1)) / tau
    )
    temperatures = torch.full((n,), HOT)
    excess, before = (
        float((likelihood_loss(f, test_q, temperatures) + exact).mean().detach())
        for f in (flow, untrained(train_x, hidden=16))
    )
    assert before > 0.5
    assert -0.05 < excess < 0.25
