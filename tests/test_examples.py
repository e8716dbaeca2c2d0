"""Every example runs, in a quick setting, and says something true."""

import re
import subprocess
import sys
from pathlib import Path

from openmm_tsf.config import load_config

EXAMPLES = Path(__file__).parents[1] / "examples"
TESTED = {
    "double_well.py",
    "draw.py",
    "edg_2d.py",
    "figure3.py",
    "own_molecule.py",
    "replica_exchange.py",
    "temperature_tuning.py",
    "look.ipynb",
    "ala2.toml",
    "ala2_accurate.toml",
    "ala2_edg.toml",
}


def run(*arguments):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=300, cwd=EXAMPLES.parent
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def number(pattern, text):
    return float(re.search(pattern, text).group(1))


def test_every_example_is_tested():
    """ala2.toml is the main job; tests of the configuration hold it to the defaults."""
    assert {path.name for path in EXAMPLES.iterdir() if not path.name.startswith((".", "__"))} == TESTED


def test_double_well(tmp_path):
    """Means are those of quadrature, and the quartic prior is nearly exact where a Gaussian is a nat off."""
    printed = run(
        EXAMPLES / "double_well.py", "--dim", 2, "--steps", 20, "--samples", 800, "--seeds", 1, "--out", tmp_path
    )
    for mean, exact in re.findall(r"<U> at T = .*: (-?[\d.]+) by parallel tempering, (-?[\d.]+) by", printed):
        assert abs(float(mean) - float(exact)) < 0.5
    excess = {
        kind: number(rf"{kind}, seed 1: nll beyond the exact one (-?[\d.]+) at 0.1,", printed)
        for kind in ("tsf", "anharmonic")
    }
    assert excess["anharmonic"] < 0.2 < 1.0 < excess["tsf"]
    assert all((tmp_path / name).stat().st_size > 20_000 for name in ("nll.png", "marginals.png"))


def test_the_generator_of_alanine_dipeptide_is_one():
    """Trained on energies, at the temperature that it draws at; runs of small ones are in test_generator_stage.py."""
    config = load_config(EXAMPLES / "ala2_edg.toml")
    assert config.model == "edg"
    assert config.sample.temperatures == (config.simulate.temperature,)


def test_draw():
    """Energy at 300 K: -98.4 +- 0.1 kJ/mol by reweighting 1e5 draws, -98.2 +- 0.2 by replica exchange."""
    printed = run(EXAMPLES / "draw.py", "-n", 2000)
    assert abs(number(r"<U> at 300 K: (-?[\d.]+)", printed) - -98.3) < 3.0
    assert number(r"ESS ([\d.]+) %", printed) > 30.0


def test_edg_2d(tmp_path):
    """A few hundred steps find both modes, with weights that give ln Z = 0, which the bound does not exceed."""
    printed = run(EXAMPLES / "edg_2d.py", "--targets", "MoG2", "--steps", 300, "--draws", 2000, "--out", tmp_path)
    assert "MoG2: 2 of 2 modes" in printed
    ess = number(r"ESS ([\d.]+) %", printed)
    log_z, error, bound = map(
        float, re.search(r"ln Z (-?[\d.]+) \+- ([\d.]+) \(exact -?0.000, bound (-?[\d.]+)\)", printed).groups()
    )
    assert ess > 3.0 and abs(log_z) < 5.0 * error < 1.0 and bound < 0.1
    assert number(r"([\d.]+) reweighted", printed) < 0.5 * number(r"MMD ([\d.]+) raw", printed) + 0.05
    assert all((tmp_path / name).stat().st_size > 20_000 for name in ("draws.png", "training.png"))


def test_figure3(tmp_path):
    """The energy behind a Gaussian of 60 coordinates has the heat capacity 30 k_B at any temperature."""
    frames = ("--frames", 640, "--walkers", 32, "--equilibration", 0.2, "--steps", 16, "--draws", 400)
    exchange = ("--iterations", 10, "--corrected", 3, "--replicas", 1)
    printed = run(EXAMPLES / "figure3.py", "--flows", "tsf", *frames, *exchange, "--out", tmp_path)
    assert abs(number(r"tsf: its energy has the heat capacity ([\d.]+) J/mol/K", printed) - 30 * 8.314) < 0.1
    assert re.search(r"tsf +[\d.]+ \+- [\d.]+ +[\d.]+ \+- ", printed)
    assert all((tmp_path / name).stat().st_size > 20_000 for name in ("maps.png", "histograms.png", "entropy.png"))


def test_own_molecule():
    """Training lowers -ln q of held-out frames: by 0.6 nat from step 10 on; the first ten gain the most."""
    printed = run(EXAMPLES / "own_molecule.py", "--steps", 100, "--frames", 2000)
    first, last = map(float, re.search(r"held-out -ln q: (-?[\d.]+) -> (-?[\d.]+)", printed).groups())
    assert last < first - 0.2
    assert "root: ACE1-C - ALA2-N - ALA2-CA" in printed


def test_replica_exchange():
    """Means of the shipped reference: -98.3 and -25.2 kJ/mol; the errors printed are those of the test."""
    printed = run(EXAMPLES / "replica_exchange.py", "--iterations", 60)
    shares = [float(share) for share in re.findall(r"(\d+) % of 960 proposals accepted", printed)]
    assert len(shares) == 4
    assert min(shares) > 40.0
    for kelvin, exact in ((300, -98.3), (600, -25.2)):
        found = re.search(rf"<U> at {kelvin} K: (-?[\d.]+) \+- ([\d.]+) kJ/mol", printed)
        mean, error = map(float, found.groups())
        assert abs(mean - exact) < 5.0 * error < 30.0
    assert "60 frames at 300 K" in printed


def test_temperature_tuning(tmp_path):
    """Medians at M = 10: a wide gap is cooled to 0.62, a narrow one heated to 1.47; see tests/test_two_level.py."""
    few = ("--replicates", 5, "--grid", 9, "--sides", 3)
    printed = run(EXAMPLES / "temperature_tuning.py", *few, "--out", tmp_path)
    medians = re.findall(r"gap ([\d.]+): median t\* = ([\d.]+) at M = 10, ([\d.]+) at", printed)
    found = {float(gap): (float(few), float(many)) for gap, few, many in medians}
    assert abs(found[9.0][0] - 0.62) < 0.06 and abs(found[4.0][0] - 1.47) < 0.25
    assert all(abs(many - 1.0) < 0.05 for _, many in found.values())
    assert number(r"3 x 3, T = 4.4, M = 100: median t\* = ([\d.]+)", printed) > 1.05
    names = ("divergences.png", "levels.png", "sizes.png", "phases.png", "ising.png")
    assert all((tmp_path / name).stat().st_size > 20_000 for name in names)


def test_notebook_runs():
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(EXAMPLES / "look.ipynb", as_version=4)
    setup = notebook.cells[1]
    assert "n = 2000" in setup.source
    setup.source = setup.source.replace("n = 2000", "n = 200")
    NotebookClient(notebook, timeout=200, kernel_name="python3").execute()
    (said,) = (output for output in notebook.cells[-1].outputs if output.output_type == "stream")
    assert abs(number(r"<U> = (-?[\d.]+)", said.text) - -98.3) < 10.0
