"""The house rules: dependencies agree, imports point downward, importing is silent and quick, rooms are small."""

import ast
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "openmm_tsf"

LAYERS = {
    0: "units typing checks files storage",
    1: "geometry nets potentials transforms splines priors architecture vectors weights swaps metropolis proposals "
    "wells",
    2: "systems molfiles dcd trajectories chart zmatrix internals cuts energy torsions reference",
    3: "flow tuning edg",
    4: "constraints langevin walkers batched_walkers dynamics losses pretraining training ensemble checkpoint "
    "edg_checkpoint edg_settings settings config rundir flow_steps flow_batches records exchange ladder tempering "
    "tempering_storage exchange_settings "
    "coverage refinement_record refinement wells_study latent_tuning tempered_draws flow_tuning",
    5: "analysis accuracy accuracy_table "
    "mbar multistate canvas series plotting wells_plots edg_plots tuning_plots portraits steering_study steering_plots "
    "report report_page notebook "
    "exchange_plots exchange_facts exchange_page exchange_report exchange_stage "
    "assembly generator_stage stages refine_stage flow_tuning_plots tune_stage reporting sampling console cli_base "
    "cli_flows cli __main__",
}
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names.split()}
THIRD_PARTY = {
    0: "numpy torch jaxtyping",
    1: "scipy",
    2: "openmm mdtraj networkx",
    3: "",
    4: "safetensors tomli_w",
    5: "typer rich",
}
LATE = {"matplotlib", "netCDF4", "nglview", "openmmtools", "pymbar", "torchdiffeq"}


# --- setup.py, environment.yml, constraints.txt -----------------------------------------------------------------------


def setup_literals() -> dict:
    tree = ast.parse((ROOT / "setup.py").read_text("utf-8"))
    values = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and node.targets[0].id in ("INSTALL_REQUIRES", "EXTRAS_REQUIRE"):
            values[node.targets[0].id] = ast.literal_eval(node.value)
    return values


def requirements(*extras: str) -> dict[str, Requirement]:
    values = setup_literals()
    lines = values["INSTALL_REQUIRES"] + [line for extra in extras for line in values["EXTRAS_REQUIRE"][extra]]
    return {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}


def pins() -> dict[str, Version]:
    found = {}
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"([A-Za-z0-9_.-]+)==([A-Za-z0-9.]+)", line)
        assert match, f"constraints.txt: {line!r} is not a plain name==version pin"
        assert canonicalize_name(match[1]) not in found, f"constraints.txt pins {match[1]} twice"
        found[canonicalize_name(match[1])] = Version(match[2])
    return found


ALL_EXTRAS = tuple(setup_literals()["EXTRAS_REQUIRE"])


def test_setup_states_lower_bounds_only_and_every_name_is_pinned_above_them():
    assert set(ALL_EXTRAS) == {"cuda12", "cuda13", "mpi", "edg", "test", "benchmarks", "docs"}
    pinned = pins()
    for extra in ((), *((name,) for name in ALL_EXTRAS)):
        for name, requirement in requirements(*extra).items():
            assert [s.operator for s in requirement.specifier] == [">="], f"{requirement}: lower bounds only"
            assert name in pinned, f"constraints.txt lacks {name}"
            assert requirement.specifier.contains(pinned[name]), f"{name}=={pinned[name]} is below {requirement}"
    assert str(pinned["torch"]) == "2.13.0"
    assert pinned["openmm"] == pinned["openmm-cuda-12"] == pinned["openmm-cuda-13"]


def test_packages_that_come_along_are_pinned_too():
    pinned, seen, queue = pins(), set(), list(requirements("test").values())
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        if name not in seen:
            seen.add(name)
            wanted = [Requirement(line) for line in needs]
            queue += [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    assert len(seen) > 50, "the walk over installed packages found too few to mean anything"
    assert not seen - set(pinned), f"constraints.txt lacks {sorted(seen - set(pinned))}"


def test_environment_yml_is_the_same_set():
    entries = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))["dependencies"]
    conda = [Requirement(line) for line in entries if isinstance(line, str) and line != "pip"]
    named = {canonicalize_name(r.name): str(r.specifier) for r in conda}
    named["torch"] = named.pop("pytorch")
    setup_py = (ROOT / "setup.py").read_text("utf-8")
    assert f'python_requires="{named.pop("python")}"' in setup_py
    assert named == {name: str(r.specifier) for name, r in requirements("test").items()}
    assert {"pip": ["-e ."]} in entries


# --- imports ----------------------------------------------------------------------------------------------------------


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    """The name that carries the layer: the module, or the subpackage it lies in."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> list[tuple[str, bool]]:
    """(absolute dotted name, whether at module level) of every import that runs; TYPE_CHECKING blocks do not run."""
    package = ["openmm_tsf", *path.relative_to(PACKAGE).parts[:-1]]
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, top: bool) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            found.extend((f"{stem}.{alias.name}", top) for alias in node.names)
        inner = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, top and not inner)

    visit(ast.parse(path.read_text("utf-8")), True)
    return found


def upward(path: Path) -> list[str]:
    """Imports of a module that its layer does not allow."""
    layer = LAYER_OF[room(path)]
    allowed = {name for level, names in THIRD_PARTY.items() if level <= layer for name in names.split()}
    wrong = []
    for name, top in imports(path):
        first, *rest = name.split(".")
        if first == "openmm_tsf":
            target = rest[0] if rest else ""
            if target in LAYER_OF and LAYER_OF[target] > layer:
                wrong.append(name)
        elif first not in sys.stdlib_module_names and (
            (top and first not in allowed) or (not top and first not in allowed | LATE | {"openmm"})
        ):
            wrong.append(name)
    return wrong


def test_every_module_has_a_layer():
    unknown = {room(path) for path in modules()} - set(LAYER_OF) - {"__init__", "data"}
    assert not unknown, f"give {sorted(unknown)} a layer in tests/test_house.py and CONTRIBUTING.md"


@pytest.mark.parametrize(
    "path", [p for p in modules() if room(p) in LAYER_OF], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_point_downward(path):
    assert not upward(path)


@pytest.mark.parametrize(
    "line", ["from .flow import Flow", "import mdtraj", "def f():\n    from openmm_tsf import cli", "import matplotlib"]
)
def test_the_import_rule_can_fail(tmp_path, monkeypatch, line):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "geometry.py").write_text(line)
    assert upward(tmp_path / "geometry.py")


def test_every_package_imported_is_declared():
    imported = {name.split(".")[0] for path in modules() for name, _ in imports(path)}
    outside = imported - sys.stdlib_module_names - {"openmm_tsf"}
    assert "torch" in outside
    assert {canonicalize_name(name) for name in outside} <= set(requirements("edg"))


def test_no_cycles_between_modules():
    names = {
        ".".join(["openmm_tsf", *p.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__"): p
        for p in modules()
    }
    graph = {}
    for name, path in names.items():
        targets = {t for i, top in imports(path) if top for t in (i, i.rpartition(".")[0]) if t in names}
        graph[name] = targets - {name, "openmm_tsf"}
    while leaves := [name for name, targets in graph.items() if not targets & set(graph)]:
        for name in leaves:
            del graph[name]
    assert not graph, f"modules that import each other: {sorted(graph)}"


# --- importing does nothing -------------------------------------------------------------------------------------------


def python(code: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONWARNINGS": "default", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_importing_is_silent_quick_and_changes_nothing():
    code = """
import json, random, sys, time
import numpy, torch
state = torch.random.get_rng_state(), random.getstate(), torch.get_default_dtype(), torch.get_num_threads()
begin = time.process_time()
import openmm_tsf
bare = time.process_time() - begin
for name in openmm_tsf.__all__:
    assert getattr(openmm_tsf, name) is not None, name
same = torch.equal(state[0], torch.random.get_rng_state()) and state[1:] == (
    random.getstate(), torch.get_default_dtype(), torch.get_num_threads())
print(json.dumps({"bare": bare, "full": time.process_time() - begin, "same": same, "modules": sorted(sys.modules)}))
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    report = json.loads(done.stdout)  # anything else that had been printed would break this
    assert report["same"]
    assert report["bare"] < 0.1
    assert report["full"] < 1.5, "all public names together must load within 1.5 s of CPU beyond torch"
    assert not {"openmmtools", "matplotlib", "nglview", "pymbar", "typer"} & set(report["modules"])


def test_public_names():
    import openmm_tsf as tsf

    design = "alanine_dipeptide OpenMMEnergy load_flow save_flow pretrained draw Molecule Ensemble"
    assert set(design.split()) <= set(tsf.__all__) <= set(dir(tsf))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = tsf.no_such_name


# --- small rooms ------------------------------------------------------------------------------------------------------


def function_lengths() -> dict[str, int]:
    lengths = {}
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef):
                docstring = ast.get_docstring(node, clean=False)
                length = node.end_lineno - node.lineno + 1 - (docstring.count("\n") + 1 if docstring else 0)
                lengths[f"{path.name}:{node.lineno} {node.name}"] = length
    return lengths


def test_modules_and_functions_are_small():
    lines = {path.name: len(path.read_text("utf-8").splitlines()) for path in modules()}
    assert max(lines.values()) <= 400, f"split {max(lines, key=lines.get)}"
    assert sum(n <= 300 for n in lines.values()) >= 0.9 * len(lines), lines
    code = function_lengths()
    assert max(code.values()) <= 60, f"split {max(code, key=code.get)}"
    assert sum(n <= 40 for n in code.values()) >= 0.95 * len(code)


def test_every_module_function_and_class_says_what_it_is():
    silent = []
    for path in modules():
        tree = ast.parse(path.read_text("utf-8"))
        nodes = [tree, *(n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name[0] != "_")]
        silent += [f"{path.name} {getattr(n, 'name', '')}" for n in nodes if not ast.get_docstring(n)]
    assert not silent


@pytest.mark.parametrize("arguments", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_is_content(arguments):
    done = subprocess.run([sys.executable, "-m", "ruff", *arguments, "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
