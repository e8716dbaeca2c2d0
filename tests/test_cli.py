"""The command line: help, results, exit codes, and errors in one line."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mdtraj
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from openmm_tsf import __version__, cli, console, sampling
from openmm_tsf.checkpoint import save_flow
from openmm_tsf.ensemble import Ensemble
from openmm_tsf.flow import FlowSettings, build_flow
from openmm_tsf.trajectories import load_frames

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("run", "simulate", "train", "sample", "refine", "tune", "report", "info")


def invoke(*arguments: object):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def error_of(result, code: int = 1) -> str:
    """The one line that a failed command leaves on stderr."""
    assert result.exit_code == code, result.output
    (line,) = lines(result.stderr)
    assert "Traceback" not in result.output
    return line


@pytest.fixture
def copied(tiny_run, tmp_path):
    return shutil.copytree(tiny_run, tmp_path / "run")


@pytest.fixture
def tiny_file(tiny_toml, tmp_path):
    (tmp_path / "tiny.toml").write_text(tiny_toml)
    return tmp_path / "tiny.toml"


# --- help -------------------------------------------------------------------------------------------------------------


def test_help_teaches():
    result = invoke("--help")
    assert result.exit_code == 0
    for words in (
        *COMMANDS,
        "openmm-tsf run examples/ala2.toml --out runs/ala2",
        "sample ala2 --temperature 300",
        "130",
    ):
        assert words in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example_that_names_it(command):
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f"openmm-tsf {command}" in result.output.split("Examples")[1]


def test_version():
    assert invoke("--version").output.strip() == f"openmm-tsf {__version__}"


def test_help_loads_nothing_heavy():
    code = "import sys; from openmm_tsf import cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "openmm", "mdtraj", "numpy", "matplotlib"} & set(done.stdout.split())


# --- a finished run ---------------------------------------------------------------------------------------------------


def test_run_goes_on_with_a_directory_and_shows_its_figures(copied):
    result = invoke("run", copied)
    assert result.exit_code == 0, result.output
    assert lines(result.stderr) == [f"{stage}: done already" for stage in ("simulate", "train", "sample", "report")]
    assert "effective sample size, 500 K" in result.stdout
    assert "report.html" in result.stdout


def test_report_is_made_anew(copied):
    (copied / "metrics.json").write_text("{}")
    result = invoke("report", copied)
    assert result.exit_code == 0, result.output
    assert json.loads((copied / "metrics.json").read_text())["n_draws_target"] == 200
    assert "effective sample size" in result.stdout


def test_another_configuration_is_one_line(copied, tiny_file):
    tiny_file.write_text(tiny_file.read_text().replace("blocks = 1", "blocks = 2"))
    line = error_of(invoke("run", tiny_file, "--out", copied))
    assert "flow.blocks was 1 and is now 2" in line
    assert "seed was 3 and is now 5" in error_of(invoke("train", copied, "--seed", 5))


def test_wrong_usage_has_exit_code_2(copied, tiny_file, tmp_path):
    for arguments, words in (
        (("run", tiny_file), "--out"),
        (("run", copied, "--out", tmp_path / "other"), "--out"),
        (("run",), "Missing argument"),
        (("sample", tiny_file), "--temperature"),
        (("sample", copied, "-T", "-5"), "above 0 K"),
        (("sample", copied, "-T", "nan"), "above 0 K"),
        (("sample", copied, "-T", "300", "-n", "0"), "-n"),
        (("sample", copied, "-T", "300", "--tuned", "--at", "280"), "--at or --tuned"),
        (("sample", copied, "--tuned"), "--temperature"),
        (("tune", copied, "-T", "0"), "above 0 K"),
        (("tune", copied, "-n", "5"), "-n"),
        (("tune", copied, "--out", tmp_path), "own directory"),
        (("tune", copied / "flow.tsf"), "--temperature"),
        (("nonsense",), "nonsense"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert words in result.stderr
        assert "Traceback" not in result.output


# --- sample -----------------------------------------------------------------------------------------------------------


def test_sample_at_any_temperature(copied, tmp_path):
    out = tmp_path / "at550.npz"
    result = invoke("sample", copied, "-T", 550, "-n", 150, "--out", out, "--seed", 2)
    assert result.exit_code == 0, result.output
    ensemble = Ensemble.load(out)
    assert (len(ensemble), ensemble.temperature, ensemble.sampling_temperature) == (150, 550.0, 550.0)
    for words in ("550 K", "effective sample size", "largest weight", "alpha_L share", "reweighted", "raw", " s ("):
        assert words in result.stdout
    assert f"{100 * ensemble.ess:.3g} %" in result.stdout
    assert "too few draws" not in result.stdout


def test_a_single_draw_promises_nothing(copied, tmp_path):
    result = invoke("sample", copied, "-T", 600, "-n", 1, "--out", tmp_path / "one.npz")
    assert result.exit_code == 0, result.output
    assert "too few draws to tell" in result.stdout and "± inf kJ/mol" in result.stdout
    assert "± 0" not in result.stdout


@pytest.fixture
def tsf_file(copied, ala2, tmp_path):
    """An untrained flow of the paper's kind."""
    frames, size = load_frames(copied / "training.dcd", ala2, 600.0), {"blocks": 1, "hidden": 8, "depth": 1}
    flow = build_flow(ala2, frames, FlowSettings(kind="tsf", **size), generator=torch.Generator().manual_seed(1))
    save_flow(flow, tmp_path / "paper.tsf")
    return tmp_path / "paper.tsf"


def test_sample_of_a_flow_that_cannot_explore(tsf_file, tmp_path):
    rest = ("-T", 600, "-n", 20, "--out", tmp_path / "a.npz")
    assert "kind 'tsf' have no potentials" in error_of(invoke("sample", tsf_file, *rest, "--explore", 0.1))
    result = invoke("sample", tsf_file, *rest)
    assert result.exit_code == 0, result.output
    assert "warning: no draws explore: flows of kind 'tsf'" in result.stderr
    assert Ensemble.load(tmp_path / "a.npz").explore == 0.0
    assert "no draws explore" not in invoke("sample", tsf_file, *rest, "--explore", 0).stderr


def test_info_says_whether_a_flow_steers_and_has_momenta(tsf_file, copied):
    def shown(source) -> str:
        return " ".join(invoke("info", source).stdout.replace("│", " ").split())

    assert "steering exact momenta 60, as many as coordinates" in shown(tsf_file)
    assert "momenta True" in shown(tsf_file)
    assert "steering exact momenta none" in shown(copied)
    assert sampling.steering(FlowSettings(kind="spline")).startswith("none: flows of kind 'spline'")


def test_sample_writes_equally_likely_frames(copied, tmp_path):
    result = invoke("sample", copied / "flow.tsf", "-T", 600, "-n", 60, "--at", 580, "--out", tmp_path / "a.dcd")
    assert result.exit_code == 0, result.output
    frames = mdtraj.load(tmp_path / "a.dcd", top=copied / "topology.pdb")
    assert frames.n_frames == 60
    assert len(np.unique(frames.xyz[:, 0, 0])) < 60  # heavy draws are repeated


def test_a_temperature_out_of_reach_is_a_warning_on_stderr(copied, tmp_path):
    result = invoke("sample", copied, "-T", 20, "-n", 1000, "--out", tmp_path / "cold.npz")
    assert result.exit_code == 0, result.output
    (line,) = [line for line in lines(result.stderr) if line.startswith("warning")]
    assert "20 K is out of reach" in line


def test_sample_without_a_temperature_does_the_stage(copied):
    (copied / "ensemble_500K.npz").unlink()
    result = invoke("sample", copied)
    assert result.exit_code == 0, result.output
    assert (copied / "ensemble_500K.npz").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("sample", "no_such_flow", "-T", "300"), "no_such_flow"),
        (("sample", "{flow}", "-T", "300", "-o", "{tmp}/a.txt"), ".npz"),
        (("sample", "{flow}", "-T", "300", "-o", "{tmp}/absent/a.npz"), "absent"),
        (("sample", "{flow}", "-T", "300", "-o", "{tmp}", "--platform", "Reference"), "write .npz"),
        (("sample", "{flow}", "-T", "300", "--platform", "Abacus"), "Abacus"),
        (("sample", "{half}", "-T", "300"), "half.tsf"),
        (("info", "{half}"), "half.tsf"),
        (("sample", "{text}", "-T", "300"), "text.tsf"),
        (("run", "{tmp}/absent.toml", "-o", "{tmp}/x"), "absent.toml: No such file"),
        (("run", "{text}", "-o", "{tmp}/x"), "not a TOML file"),
        (("run", "{tmp}", "-o", "{tmp}"), "not a run directory"),
        (("report", "{tmp}"), "not a run directory"),
        (("run", "{toml}", "-o", "{flow}"), "flow.tsf"),
        (("run", "{toml}", "-o", "{flow}/below"), "below"),
    ],
)
def test_errors_are_one_line(tiny_run, tiny_file, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    flow = shutil.copy(tiny_run / "flow.tsf", tmp_path / "flow.tsf")
    (tmp_path / "half.tsf").write_bytes(flow.read_bytes()[: flow.stat().st_size // 2])
    (tmp_path / "text.tsf").write_text("not [ TOML, nor a flow")
    before = set(tmp_path.iterdir())
    names = {
        "tmp": tmp_path,
        "flow": flow,
        "half": tmp_path / "half.tsf",
        "text": tmp_path / "text.tsf",
        "toml": tiny_file,
    }
    line = error_of(invoke(*(a.format(**names) for a in arguments)))
    assert line.startswith("error: ")
    assert words in line
    assert set(tmp_path.iterdir()) == before  # nothing half-written is left


def test_debug_shows_the_traceback(tmp_path):
    result = invoke("run", tmp_path / "absent.toml", "-o", tmp_path / "x", "--debug")
    assert isinstance(result.exception, FileNotFoundError)


def test_defects_are_told_from_mistakes(monkeypatch, copied):
    monkeypatch.setattr(console, "table", None)
    monkeypatch.setattr(cli, "table", None)
    line = error_of(invoke("info"))
    assert "TypeError" in line and "--debug" in line


# --- tune -------------------------------------------------------------------------------------------------------------


def test_tune_and_sample_tuned(copied, tmp_path):
    rest = ("-T", 600, "-n", 300, "--lowest", 0.6, "--highest", 1.8)
    result = invoke("tune", copied, *rest)
    assert result.exit_code == 0, result.output
    for words in (
        "tuning_600K.json for 600 K",
        "K, C",
        "K - C",
        "t*, fidelity",
        "t', diversity",
        "as trained",
        "held-out",
    ):
        assert words in result.stdout
    assert (copied / "tuning_600K.png").stat().st_size > 10_000
    facts = json.loads((copied / "tuning_600K.json").read_text())
    assert facts["diagnostics"]["target_mean_from"] == "held-out samples"
    record = json.loads((copied / "stages.json").read_text())["tune 600 K"]
    assert record["done"] and record["n_energy_evaluations"] > 0
    facts["t_star"] = {"value": 0.9, "interval": [0.85, 0.95], "share_without": 0.0}
    trained = facts["checks"][0] | {"ess": 0.5, "ess_error": 0.03}
    facts["checks"] = [trained, trained | {"name": "t*", "t": 0.9, "ess": 0.4}]
    facts["highest_ess"] = {"t": 1.1, "ess": 0.55}
    (copied / "tuning_600K.json").write_text(json.dumps(facts))
    again = invoke("tune", copied, *rest).stdout  # what is done is not done again
    shown = " ".join(again.replace("│", " ").split())
    assert "run at 540 K" in shown and "55 %, the highest seen, at t = 1.1: sample --at 660" in shown

    out = tmp_path / "a.npz"
    result = invoke("sample", copied, "-T", 600, "-n", 50, "--tuned", "--out", out)
    assert result.exit_code == 0, result.output
    shown = " ".join(result.stdout.replace("│", " ").split())
    assert "540 K, weighed for 600 K; t* = 0.9" in shown and "tuning_600K.json" in shown
    ensemble = Ensemble.load(out)
    assert (ensemble.temperature, ensemble.sampling_temperature) == (600.0, 540.0)
    assert "ESS 40 % instead of 50 %; for weighted draws leave out --tuned, or take --at 660" in result.stderr
    facts["checks"][1]["ess"] = 0.45  # within the errors
    (copied / "tuning_600K.json").write_text(json.dumps(facts))
    assert "instead of" not in invoke("sample", copied, "-T", 600, "-n", 50, "--tuned", "--out", out).stderr

    facts["t_star"] = None
    (copied / "tuning_600K.json").write_text(json.dumps(facts))
    result = invoke("sample", copied, "-T", 600, "-n", 50, "--tuned", "--out", out)
    assert "warning: the flow runs at 600 K itself" in result.stderr
    assert Ensemble.load(out).sampling_temperature == 600.0
    (copied / "tuning_600K.json").write_text("{}")
    assert "delete it" in error_of(invoke("sample", copied, "-T", 600, "--tuned", "--out", out))


def test_tuned_finds_the_temperature_where_no_file_of_this_flow_says_it(copied, tmp_path, monkeypatch):
    from openmm_tsf import tune_stage

    quick = functools.partial(tune_stage.tune_flow, n=150, n_checked=300, n_replicates=10, span=(0.8, 1.25))
    monkeypatch.setattr(tune_stage, "tune_flow", quick)
    result = invoke("sample", copied / "flow.tsf", "-T", 550, "-n", 50, "--tuned", "--out", tmp_path / "a.npz")
    assert result.exit_code == 0, result.output
    assert "found now" in result.stdout or "the flow runs at 550 K itself" in result.stderr
    result = invoke("tune", copied / "flow.tsf", "-T", 550, "-n", 100, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "tuning_550K.json").exists() and (tmp_path / "tuning_550K.png").exists()


def test_tune_says_what_is_wrong_in_one_line(copied, tmp_path, ala2):
    assert "from 1.2 to 2" in error_of(invoke("tune", copied, "-T", 600, "--lowest", 1.2))
    assert "absent" in error_of(invoke("tune", copied / "flow.tsf", "-T", 300, "-o", tmp_path / "absent"))
    assert "no_such_flow" in error_of(invoke("tune", "no_such_flow", "-T", 300))
    frames, size = load_frames(copied / "training.dcd", ala2, 600.0), {"blocks": 1, "hidden": 8, "depth": 1}
    flow = build_flow(ala2, frames, FlowSettings(kind="spline", **size), generator=torch.Generator().manual_seed(1))
    save_flow(flow, tmp_path / "spline.tsf")
    line = error_of(invoke("tune", tmp_path / "spline.tsf", "-T", 300, "-o", tmp_path))
    assert "kind 'spline' do not steer" in line
    (copied / "flow.tsf").unlink()
    assert "no trained flow yet" in error_of(invoke("tune", copied, "-T", 600))


# --- info -------------------------------------------------------------------------------------------------------------


def test_info(copied):
    result = invoke("info")
    assert result.exit_code == 0, result.output
    assert "OpenMM platforms" in result.stdout and "Reference" in result.stdout and __version__ in result.stdout
    result = invoke("info", copied)
    assert result.exit_code == 0, result.output
    for words in ("alanine-dipeptide-ff96-obc1", "600 K", "blocks 1", "sha256", "ALA2-CB"):
        assert words in result.stdout


# --- interruptions and full disks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["simulate", "train", "sample", "report"])
def test_ctrl_c_in_a_stage_is_one_line_and_code_130(copied, monkeypatch, stage):
    from openmm_tsf import reporting

    def interrupted(run, progress):
        progress(1, 10, "at work")
        raise KeyboardInterrupt

    monkeypatch.setitem(reporting.STAGES, stage, (lambda run: False, interrupted))
    line = error_of(invoke(stage, copied), console.INTERRUPTED)
    assert "same command goes on" in line


def start(*arguments: object, limit: int | None = None) -> subprocess.Popen:
    def limited() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever runs the tests in the background may ignore it
        if limit is not None:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-m", "openmm_tsf", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, preexec_fn=limited, **pipes)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    for _ in range(1200):
        if path.exists() or process.poll() is not None:
            return
        time.sleep(0.05)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_real_ctrl_c_loses_nothing(tiny_file, tiny_run, tmp_path):
    out = tmp_path / "run"
    process = start("simulate", tiny_file, "--out", out)
    wait_for(out / "simulation.npz", process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("the simulation was quicker than the signal")
    assert process.returncode == 130, stderr
    assert [line for line in lines(stderr) if "interrupted" in line] == lines(stderr)
    assert invoke("simulate", tiny_file, "--out", out).exit_code == 0
    assert (out / "training.dcd").read_bytes() == (tiny_run / "training.dcd").read_bytes()


@pytest.mark.slow  # test_dynamics has full disks, test_a_real_ctrl_c has the command's way back
@pytest.mark.skipif(os.name != "posix", reason="needs a limit on the size of files")
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tiny_file, tiny_run, tmp_path):
    out = tmp_path / "run"
    process = start("simulate", tiny_file, "--out", out, limit=60_000)  # training.dcd needs 173 kB
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1, stderr
    (line,) = lines(stderr)
    assert line.startswith("error: ") and "training.dcd" in line
    assert not json.loads((out / "stages.json").read_text())["simulate"]["done"]
    assert invoke("simulate", tiny_file, "--out", out).exit_code == 0
    assert (out / "training.dcd").read_bytes() == (tiny_run / "training.dcd").read_bytes()


# --- progress ---------------------------------------------------------------------------------------------------------


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys, monkeypatch):
    clock = iter(range(0, 10_000, 7))
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(clock)))
    with console.Bar("train") as bar:
        for step in range(1, 11):
            bar(step, 10, "loss 1.0")
    shown = lines(capsys.readouterr().err)
    assert shown[0].startswith("train: 3 of 10 (30 %)") and "loss 1.0" in shown[0]
    assert len(shown) == 3


def test_progress_on_a_terminal_is_a_bar(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with console.Bar("train") as bar:
        bar(5, 10, "loss [1.0]")
    shown = capsys.readouterr().err
    assert "train" in shown and "50 %" in shown and "loss [1.0]" in shown
