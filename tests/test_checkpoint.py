"""Checkpoints: everything comes back to the bit, and nothing else comes in."""

import json
import os
import pickle
import stat
import struct
from pathlib import Path

import laws
import numpy as np
import pytest
import torch
from molecules import MOLECULES, frames_of
from safetensors import safe_open
from safetensors.torch import save_file

from openmm_tsf import checkpoint
from openmm_tsf.checkpoint import CheckpointError, flow_info, load_flow, pretrained, save_flow
from openmm_tsf.energy import OpenMMEnergy
from openmm_tsf.ensemble import draw
from openmm_tsf.flow import Flow, FlowSettings, build_flow, build_vector_flow
from openmm_tsf.trajectories import Frames
from openmm_tsf.vectors import Samples
from openmm_tsf.zmatrix import build_zmatrix

N = 300
SETTINGS = {"blocks": 2, "hidden": 6, "depth": 1, "energy_order": 2, "entropy_order": 1}


def flow_of(name: str, seed: int = 1, zmatrix=None, **settings) -> Flow:
    """A small flow with random weights in double precision, some of them not representable in single."""
    frames = Frames(frames_of(name, N), np.full(N, 600.0))
    generator = torch.Generator().manual_seed(seed)
    flow = build_flow(
        MOLECULES[name](), frames, FlowSettings(**{**SETTINGS, **settings}), zmatrix=zmatrix, generator=generator
    )
    for parameter in flow.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return flow.requires_grad_(False)


@pytest.fixture(scope="module")
def flow():
    torch.set_default_dtype(torch.float64)
    return flow_of("ala2")


@pytest.fixture
def file(flow, tmp_path) -> Path:
    save_flow(flow, tmp_path / "flow.tsf")
    return tmp_path / "flow.tsf"


# --- the round trip ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ala2", "ala2 rigid", "proline", "trimer", "rigid trimer", "chain4"])
def test_densities_and_draws_come_back_to_the_bit(name, tmp_path):
    flow = flow_of(name)
    save_flow(flow, tmp_path / "flow.tsf")
    loaded = load_flow(tmp_path / "flow.tsf").requires_grad_(False)
    x = torch.tensor(frames_of(name, N)[:50])
    for temperature in (600.0, 300.0):
        one, other = flow.at(temperature), loaded.at(temperature)
        assert torch.equal(one.log_prob(x), other.log_prob(x))
        drawn = [q.sample(20, generator=torch.Generator().manual_seed(1)) for q in (one, other)]
        assert torch.equal(drawn[0][0], drawn[1][0]) and torch.equal(drawn[0][1], drawn[1][1])
        assert torch.equal(one.log_constraint_factor(x), other.log_constraint_factor(x))


def test_all_that_a_flow_knows_comes_back(flow, file):
    loaded = load_flow(file)
    assert loaded.training_temperature == flow.training_temperature
    assert loaded.settings == flow.settings
    assert loaded.zmatrix == flow.zmatrix
    assert loaded.n_parameters == flow.n_parameters
    assert loaded.prior.groups == flow.prior.groups
    assert np.array_equal(loaded.molecule.positions, flow.molecule.positions)
    assert loaded.molecule.atom_labels == flow.molecule.atom_labels
    assert loaded.molecule.name == flow.molecule.name
    assert loaded.dtype == torch.float64


def test_other_coordinates_and_architectures_come_back(tmp_path):
    molecule = MOLECULES["ala2"]()
    atom = molecule.atom_labels.index("NME3-C")
    flow = flow_of("ala2", zmatrix=build_zmatrix(molecule, kinds={atom: "soft"}), kind="real-nvp", momenta=False)
    save_flow(flow, tmp_path / "flow.tsf")
    loaded = load_flow(tmp_path / "flow.tsf").requires_grad_(False)
    assert loaded.zmatrix == flow.zmatrix and loaded.settings.kind == "real-nvp"
    x = torch.tensor(frames_of("ala2", N)[:50])
    assert torch.equal(loaded.at(300.0).log_prob(x), flow.at(300.0).log_prob(x))


@pytest.mark.parametrize("settings", [{"kind": "tsf"}, {"kind": "real-nvp"}, {"momenta": True}], ids=str)
def test_flows_with_momenta_and_cut_torsions_come_back(settings, tmp_path):
    flow = flow_of("ala2", **settings)
    save_flow(flow, tmp_path / "flow.tsf")
    loaded = load_flow(tmp_path / "flow.tsf").requires_grad_(False)
    assert loaded.settings == flow.settings and loaded.n_momenta == flow.internals.dim
    x = torch.tensor(frames_of("ala2", N)[:50])
    scores = [f.at(300.0).log_prob(x, generator=torch.Generator().manual_seed(1)) for f in (flow, loaded)]
    assert torch.isfinite(scores[0]).all() and torch.equal(*scores)
    if settings.get("kind"):
        assert torch.equal(flow.internals.centre, loaded.internals.centre) and flow.internals.centre.any()


def test_files_of_before_there_were_kinds_are_read(tmp_path):
    flow = flow_of("ala2", quartic=False)
    save_flow(flow, tmp_path / "flow.tsf")

    def older(facts: dict, tensors: dict, volume_preserving: bool = True) -> None:
        for name in ("kind", "momenta", "quartic"):
            facts["settings"].pop(name, None)
        facts["settings"]["volume_preserving"] = volume_preserving

    reseal(tmp_path / "flow.tsf", older)
    loaded = load_flow(tmp_path / "flow.tsf").requires_grad_(False)
    assert loaded.settings == flow.settings
    x = torch.tensor(frames_of("ala2", N)[:50])
    assert torch.equal(loaded.at(300.0).log_prob(x), flow.at(300.0).log_prob(x))
    reseal(tmp_path / "flow.tsf", lambda facts, tensors: older(facts, tensors, False))
    with pytest.raises(CheckpointError, match="of kind real-nvp now; train the flow anew"):
        load_flow(tmp_path / "flow.tsf")


def test_flows_of_model_systems_are_not_stored(tmp_path):
    samples = Samples(torch.randn(50, 2, generator=torch.Generator().manual_seed(1)))
    flow = build_vector_flow(2, samples, FlowSettings(**SETTINGS), generator=torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match="have no molecule and no file"):
        save_flow(flow, tmp_path / "flow.tsf")
    assert not (tmp_path / "flow.tsf").exists()


def test_a_loaded_flow_steers(file):
    x = torch.tensor(frames_of("ala2", 1000))
    laws.steerable(load_flow(file).requires_grad_(False), x, 300.0, 600.0, bound=1e-9)


def test_single_precision_on_request(flow, file):
    loaded = load_flow(file, dtype=torch.float32).requires_grad_(False)
    x = torch.tensor(frames_of("ala2", N)[:20])
    assert loaded.dtype == torch.float32
    exact = flow.at(600.0).log_prob(x)
    assert 0 < float((loaded.at(600.0).log_prob(x) - exact).abs().max()) < 1e-3 * float(exact.abs().max())


@pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=str)
def test_the_default_dtype_does_not_matter_and_is_left_alone(default, flow, file):
    torch.set_default_dtype(default)
    x = torch.tensor(frames_of("ala2", N)[:20])
    before = torch.random.get_rng_state()
    assert torch.equal(load_flow(file).requires_grad_(False).at(300.0).log_prob(x), flow.at(300.0).log_prob(x))
    assert torch.get_default_dtype() == default
    assert torch.equal(before, torch.random.get_rng_state())


# --- the hash and the facts -------------------------------------------------------------------------------------------


def test_the_hash_is_that_of_the_content_and_not_of_the_path(flow, tmp_path):
    (tmp_path / "other folder").mkdir()
    paths = tmp_path / "a.tsf", tmp_path / "other folder" / "b.tsf"
    one, two = (save_flow(flow, path) for path in paths)
    assert one == two == flow_info(paths[0])["sha256"] == flow_info(paths[1])["sha256"]
    assert len(one) == 64
    assert save_flow(load_flow(paths[0]), tmp_path / "c.tsf") == one  # and it survives a round trip
    assert save_flow(flow, tmp_path / "d.tsf", extra={"ess": 0.5}) != one
    assert save_flow(flow_of("ala2", seed=2), tmp_path / "e.tsf") != one


def test_the_facts_can_be_read_without_the_tensors(flow, tmp_path):
    save_flow(flow, tmp_path / "flow.tsf", extra={"ess_train": 0.61, "seed": 3})
    info = flow_info(tmp_path / "flow.tsf")
    assert info["extra"] == {"ess_train": 0.61, "seed": 3}
    assert info["molecule"] == flow.molecule.name
    assert info["training_temperature"] == 600.0
    assert info["settings"]["hidden"] == 6
    assert {"torch", "openmm", "openmm_tsf"} <= info["versions"].keys()
    json.dumps(info)


@pytest.mark.parametrize("extra", [{"loss": float("nan")}, {"tensor": torch.ones(2)}], ids=["nan", "tensor"])
def test_facts_that_are_not_json_are_refused_before_anything_is_written(flow, file, extra):
    before = file.read_bytes()
    with pytest.raises((ValueError, TypeError), match="JSON"):
        save_flow(flow, file, extra=extra)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["flow.tsf"]


# --- damaged, altered, foreign ----------------------------------------------------------------------------------------


def refuse(path: Path, *words: str) -> None:
    """Both readers refuse the file in one line that names it."""
    for read in (load_flow, flow_info):
        with pytest.raises(CheckpointError) as error:
            read(path)
        text = str(error.value)
        assert "\n" not in text and str(path) in text
        assert any(word in text for word in words), text


def header_of(path: Path) -> tuple[dict, bytes]:
    """The JSON header of a safetensors file, and the bytes after it."""
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def write(path: Path, header: dict, body: bytes) -> None:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def test_an_untouched_file_written_anew_by_these_helpers_is_fine(file):
    write(file, *header_of(file))
    load_flow(file)


@pytest.mark.parametrize("share", [0.0, 1e-4, 0.1, 0.5, 0.999])
def test_a_file_that_is_cut_short_is_refused(share, file):
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    refuse(file, "cut short", "not a flow")


def test_a_file_with_something_at_its_end_is_refused(file):
    file.write_bytes(file.read_bytes() + b"more")
    refuse(file, "cut short", "altered", "not a flow")


@pytest.mark.parametrize("position", [0.3, 0.6, 0.95, 1.0])
def test_one_flipped_bit_in_a_tensor_is_found(position, file):
    header, body = header_of(file)
    index = min(int(position * len(body)), len(body) - 1)
    write(file, header, body[:index] + bytes([body[index] ^ 1]) + body[index + 1 :])
    refuse(file, "altered")


@pytest.mark.parametrize("what", ["training_temperature", "root", "rows", "molecule", "settings", "extra", "versions"])
def test_edited_facts_are_found(what, file):
    header, body = header_of(file)
    facts = json.loads(header["__metadata__"]["facts"])
    if what == "training_temperature":
        facts[what] = 300.0
    elif what in ("root", "rows"):
        facts[what] = facts[what][::-1]
    else:
        facts[what] = {**facts[what], "name": "another"}
    header["__metadata__"]["facts"] = json.dumps(facts, sort_keys=True)
    write(file, header, body)
    refuse(file, "altered")


def test_a_renamed_or_retyped_tensor_is_found(file):
    header, body = header_of(file)
    (one, *_) = (name for name in header if name.endswith("net.last.bias"))
    renamed = {("x" + name if name == one else name): value for name, value in header.items()}
    write(file, renamed, body)
    refuse(file, "altered")
    shape = header[one]["shape"]
    header[one]["shape"] = [1, *shape]
    write(file, header, body)
    refuse(file, "altered")


def test_a_hash_that_was_changed_or_removed_is_found(file):
    header, body = header_of(file)
    header["__metadata__"]["sha256"] = "0" * 64
    write(file, header, body)
    refuse(file, "altered")
    del header["__metadata__"]["sha256"]
    write(file, header, body)
    refuse(file, "altered")


def reseal(file: Path, change) -> None:
    """Change facts or tensors and give the file the hash that goes with it, as another program could."""
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
        facts = json.loads(opened.metadata()["facts"])
    change(facts, tensors)
    text = json.dumps(facts, sort_keys=True)
    digest = checkpoint._digest(tensors, text)
    save_file(tensors, file, metadata={"format": checkpoint.FORMAT, "facts": text, "sha256": digest})


IMPOSSIBLE = {
    "a missing fact": lambda facts, tensors: facts.pop("rows"),
    "an unknown setting": lambda facts, tensors: facts["settings"].update(colour="red"),
    "a setting out of range": lambda facts, tensors: facts["settings"].update(blocks=0),
    "another architecture": lambda facts, tensors: facts["settings"].update(blocks=3),
    "a z-matrix with a hole": lambda facts, tensors: facts["rows"].pop(),
    "a broken molecule": lambda facts, tensors: facts["molecule"].update(system="<System/>"),
    "no mean": lambda facts, tensors: tensors.pop(next(name for name in tensors if name.endswith(".mean"))),
    "a missing tensor": lambda facts, tensors: tensors.pop(next(n for n in tensors if n.endswith("last.bias"))),
    "a temperature below zero": lambda facts, tensors: facts.update(training_temperature=-1.0),
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_a_sealed_file_that_makes_no_sense_is_refused_in_one_line(what, file):
    reseal(file, IMPOSSIBLE[what])
    with pytest.raises(CheckpointError) as error:
        load_flow(file)
    assert "\n" not in str(error.value) and str(file) in str(error.value)


def test_a_sealed_file_without_a_change_is_fine(file, flow):
    reseal(file, lambda facts, tensors: None)
    assert load_flow(file).n_parameters == flow.n_parameters


def test_other_safetensors_are_refused(tmp_path):
    for metadata in (None, {"format": "pt"}, {"format": "openmm_tsf flow 999", "facts": "{}", "sha256": ""}):
        save_file({"weight": torch.ones(3)}, tmp_path / "model.safetensors", metadata=metadata)
        refuse(tmp_path / "model.safetensors", "not an openmm_tsf flow")


class Trap:
    """A pickle that leaves a mark when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_pickles_are_refused_without_being_run(how, tmp_path):
    path, mark = tmp_path / "flow.tsf", tmp_path / "executed"
    if how == "pickle":
        path.write_bytes(pickle.dumps(Trap(mark)))
    else:
        torch.save({"weights": Trap(mark)}, path)
    refuse(path, "cut short", "not a flow")
    assert not mark.exists()
    pickle.loads(pickle.dumps(Trap(mark)))
    assert mark.exists()  # the trap works


@pytest.mark.parametrize("content", [b"", b"hello", b"\x00" * 100, b"PK\x03\x04" + b"\x00" * 60])
def test_foreign_files_are_refused(content, tmp_path):
    (tmp_path / "flow.tsf").write_bytes(content)
    refuse(tmp_path / "flow.tsf", "cut short", "not a flow")


@pytest.mark.parametrize("read", [load_flow, flow_info])
def test_missing_files_and_folders(read, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no flow at .*nowhere\.tsf"):
        read(tmp_path / "nowhere.tsf")
    with pytest.raises(FileNotFoundError, match="no flow at"):
        read(tmp_path)


# --- writing ----------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_missing_is_an_oserror(flow, tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        save_flow(flow, tmp_path / "nowhere" / "flow.tsf")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_read_only_folder_is_an_oserror(flow, file):
    before = file.read_bytes()
    file.parent.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(PermissionError):
            save_flow(flow, file)
        assert file.read_bytes() == before
    finally:
        file.parent.chmod(stat.S_IRWXU)


def test_a_file_in_the_way_of_the_folder_is_an_oserror(flow, file):
    with pytest.raises(OSError, match="flow"):
        save_flow(flow, file / "flow.tsf")


def test_a_write_that_fails_half_way_leaves_the_old_file(flow, file, monkeypatch):
    before = file.read_bytes()

    def half(tensors, path, metadata):
        Path(path).write_bytes(before[: len(before) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", half)
    with pytest.raises(OSError, match="No space left"):
        save_flow(flow_of("ala2", seed=2), file)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["flow.tsf"]


def test_saving_does_not_change_the_flow(flow, tmp_path):
    before = {name: tensor.clone() for name, tensor in flow.state_dict().items()}
    save_flow(flow, tmp_path / "flow.tsf")
    assert all(torch.equal(tensor, before[name]) for name, tensor in flow.state_dict().items())


def test_files_are_small(flow, file):
    n_bytes = sum(t.numel() * t.element_size() for t in flow.state_dict().values())
    assert file.stat().st_size < n_bytes + 60_000


# --- shipped ----------------------------------------------------------------------------------------------------------


def test_the_pretrained_flow_steers_is_faithful_and_has_even_weights():
    flow = pretrained("ala2").requires_grad_(False)
    assert flow.training_temperature == 600.0 and flow.molecule.constraints == {}
    x = torch.tensor(frames_of("ala2", 1000))
    laws.steerable(flow, x, 300.0, 600.0, bound=1e-9)
    laws.steerable(flow, x, 150.0, 600.0, bound=1e-9)
    for temperature in (300.0, 600.0):
        laws.faithful(flow.at(temperature), 300, torch.Generator().manual_seed(1), atol=1e-7)
    energy = OpenMMEnergy(flow.molecule.system)
    ensemble = draw(flow, energy, temperature=300.0, n=1000, generator=torch.Generator().manual_seed(1))
    assert ensemble.ess > 0.9 and ensemble.n_rejected < 3


def test_an_unknown_pretrained_flow_is_an_error_that_lists_those_there_are():
    with pytest.raises(ValueError, match="no pretrained flow 'villin'; there are: "):
        pretrained("villin")
