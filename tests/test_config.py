"""Configurations: defaults, what a file may say, and one clear line for what it may not."""

import dataclasses
import tomllib
from pathlib import Path

import pytest

from openmm_tsf.config import ConfigError, differences, dump_config, flat, load_config, parse_config, save_config
from openmm_tsf.settings import Config

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_an_empty_file_is_the_alanine_dipeptide_job(tmp_path):
    (tmp_path / "empty.toml").write_text("")
    config = load_config(tmp_path / "empty.toml")
    assert config == Config()
    assert config.molecule.model == "ff96-obc1"
    assert config.simulate.temperature == 600.0
    assert config.sample.temperatures == (300.0,)
    assert config.sample.n == 100_000


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.name)
def test_examples_are_valid(path):
    assert load_config(path).sample.n >= 1


def test_the_example_of_the_main_job_is_the_defaults():
    assert load_config(EXAMPLES / "ala2.toml") == Config()


def test_time_step_follows_the_constraints():
    assert parse_config({}).simulate.timestep_fs == 1.0
    assert parse_config({"molecule": {"constraints": "HBonds"}}).simulate.timestep_fs == 2.0
    assert parse_config({"simulate": {"timestep_fs": 0.5}}).simulate.timestep_fs == 0.5


def test_values_are_read_with_their_types():
    config = parse_config(
        {"seed": 7, "simulate": {"temperature": 500}, "sample": {"temperatures": [300, 350.5], "n": 10}}
    )
    assert (config.seed, config.simulate.temperature, config.sample.temperatures) == (7, 500.0, (300.0, 350.5))
    assert isinstance(config.simulate.temperature, float)
    assert all(isinstance(t, float) for t in config.sample.temperatures)


def test_every_key_survives_a_round_trip(tmp_path):
    table = {
        "seed": 3,
        "molecule": {"constraints": "HBonds"},
        "zmatrix": {"kinds": {"NME3-N": "soft"}, "references": {"A": ["B", "C", "D"]}},
        "energy": {"platform": "Reference", "device_index": 0},
        "simulate": {"n_walkers": 3},
        "sample": {"temperatures": [280.0, 300.0]},
    }
    config = parse_config(table)
    save_config(config, tmp_path / "config.toml")
    assert load_config(tmp_path / "config.toml") == config
    written = tomllib.loads((tmp_path / "config.toml").read_text())
    assert written["zmatrix"]["kinds"] == {"NME3-N": "soft"}
    assert set(written["simulate"]) == {
        k[9:] for k, v in flat(config).items() if k[:9] == "simulate." and v is not None
    }


def test_every_setting_can_be_written_in_a_file():
    for section in dataclasses.fields(Config):
        value = getattr(Config(), section.name)
        if dataclasses.is_dataclass(value):
            parsed = parse_config(
                {section.name: {k: v for k, v in tomllib.loads(dump_config(Config()))[section.name].items()}}
            )
            assert getattr(parsed, section.name) == value


def test_files_are_found_from_the_folder_of_the_configuration(tmp_path):
    (tmp_path / "ff.xml").write_text("<ForceField/>")
    molecule = '[molecule]\nstructure = "a.pdb"\nforce_field = ["ff.xml", "amber14-all.xml"]\n'
    (tmp_path / "c.toml").write_text(molecule + '[simulate]\ntrajectory = "sub/b.dcd"\n')
    config = load_config(tmp_path / "c.toml")
    assert config.molecule.structure == str(tmp_path / "a.pdb")
    assert config.molecule.force_field == (str(tmp_path / "ff.xml"), "amber14-all.xml")
    assert config.molecule.model is None
    assert config.simulate.trajectory == str(tmp_path / "sub" / "b.dcd")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"simulate": {"temperature": -5.0}}, ["[simulate]", "temperature = -5", "above 0"]),
        ({"simulate": {"temperature": 0}}, ["[simulate]", "temperature = 0", "above 0"]),
        ({"simulate": {"temperature": float("nan")}}, ["simulate.temperature", "nan", "finite"]),
        ({"simulate": {"temperature": "hot"}}, ["simulate.temperature", "'hot'", "number"]),
        ({"simulate": {"temperature": True}}, ["simulate.temperature", "True", "number"]),
        ({"simulate": {"n_frames": 10.5}}, ["simulate.n_frames", "10.5", "whole number"]),
        ({"simulate": {"n_frames": 0}}, ["n_frames = 0", "at least 2"]),
        ({"simulate": {"n_walkers": 0}}, ["n_walkers = 0", "at least 1"]),
        ({"simulate": {"timestep_fs": 0.0}}, ["timestep_fs = 0", "above 0"]),
        ({"simulate": {"spacing_fs": 5.0, "timestep_fs": 2.0}}, ["spacing_fs = 5", "multiple of timestep_fs = 2"]),
        ({"simulate": {"equilibration_ps": -1}}, ["equilibration_ps = -1", "at least 0"]),
        ({"simulate": {"temprature": 600.0}}, ["simulate.temprature", "did you mean simulate.temperature?"]),
        ({"simulation": {}}, ["simulation", "did you mean simulate?"]),
        ({"qqq": 1}, ["qqq", "known here: seed, model, molecule"]),
        ({"simulate": 5}, ["simulate = 5", "must be a table"]),
        ({"sample": {"temperatures": 300.0}}, ["sample.temperatures", "300.0", "a list"]),
        ({"sample": {"temperatures": [300.0, "x"]}}, ["sample.temperatures[1]", "'x'", "number"]),
        ({"sample": {"temperatures": []}}, ["temperatures = []", "at least one"]),
        ({"sample": {"temperatures": [300.0, -1.0]}}, ["[sample]", "-1", "above 0 K"]),
        ({"sample": {"n": 0}}, ["n = 0", "at least 1"]),
        ({"molecule": {"model": "ff19"}}, ["molecule.model", "'ff19'", '"ff96-obc1"', '"vacuum"']),
        ({"molecule": {"constraints": "all"}}, ["molecule.constraints", "'all'", '"HBonds"']),
        ({"molecule": {"parameters": "a.prmtop"}}, ["[molecule]", "parameters", "structure"]),
        ({"molecule": {"model": "vacuum", "structure": "a.pdb"}}, ["[molecule]", "exclude each other"]),
        ({"energy": {"precision": "half"}}, ["energy.precision", "'half'", '"mixed"']),
        ({"energy": {"device_index": -1}}, ["device_index = -1", "at least 0"]),
        ({"zmatrix": {"root": ["A", "B"]}}, ["[zmatrix]", "root names 2 atoms", "must be 3"]),
        ({"zmatrix": {"references": {"A": ["B"]}}}, ["[zmatrix]", "A names 1 atoms"]),
        ({"zmatrix": {"kinds": {"NME3-N": "floppy"}}}, ["zmatrix.kinds.NME3-N", "'floppy'", '"soft"']),
        ({"zmatrix": {"kinds": ["soft"]}}, ["zmatrix.kinds", "a table"]),
        ({"flow": {"blocks": 0}}, ["[flow]", "blocks", "at least 1"]),
        ({"train": {"held_out": 0.0}}, ["[train]", "held_out", "above 0"]),
        ({"train": {"energy_weigth": 0.5}}, ["did you mean train.energy_weight?"]),
        ({"seed": -1}, ["seed = -1", "0 ..."]),
        ({"seed": 1.0}, ["seed = 1.0", "whole number"]),
    ],
)
def test_bad_values_get_one_clear_line(table, words):
    with pytest.raises(ConfigError) as error:
        parse_config(table)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_what_a_table_refuses_is_named_once():
    for table in ({"flow": {"blocks": 0}}, {"train": {"held_out": 0.0}}):
        with pytest.raises(ConfigError, match=r"^\[(flow|train)\] (blocks|held_out) must be"):
            parse_config(table)


@pytest.mark.parametrize("kind", ["tsf", "real-nvp", "spline"])
def test_flows_that_cannot_explore_are_not_asked_to(kind, tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(f'[flow]\nkind = "{kind}"\n')
    with pytest.warns(UserWarning, match=f"sample.explore is 0 .*kind '{kind}' have no potentials"):
        config = load_config(path)
    assert config.sample.explore == 0.0 and parse_config({}).sample.explore == 0.1
    save_config(config, path)
    assert load_config(path) == config  # says 0, and warns no more
    with pytest.raises(ConfigError, match=r"sample.explore = 0.2: flows of kind .*; leave it out, or 0"):
        parse_config({"flow": {"kind": kind}, "sample": {"explore": 0.2}})
    with pytest.raises(ConfigError, match="explore = 1 must be at least 0 and below 1"):
        parse_config({"sample": {"explore": 1.0}})


@pytest.mark.parametrize("kind", ["tsf", "real-nvp"])
def test_path_gradients_are_refused_where_torsions_are_cut_open(kind):
    with pytest.raises(ConfigError, match=f"wrong for flows of kind '{kind}', whose torsions are cut open"):
        parse_config({"flow": {"kind": kind}, "train": {"estimator": "path"}})
    assert parse_config({"flow": {"kind": kind}}).train.estimator is None
    assert parse_config({"flow": {"kind": "spline"}, "train": {"estimator": "path"}}).train.estimator == "path"


def test_errors_name_the_file(tmp_path):
    (tmp_path / "bad.toml").write_text("[simulate\n")
    with pytest.raises(ConfigError, match=r"bad\.toml: not a TOML file"):
        load_config(tmp_path / "bad.toml")
    (tmp_path / "bad.toml").write_text("[simulate]\ntemperature = -1.0\n")
    with pytest.raises(ConfigError, match=r"bad\.toml: \[simulate\] temperature = -1"):
        load_config(tmp_path / "bad.toml")
    (tmp_path / "bad.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not a TOML file"):
        load_config(tmp_path / "bad.toml")
    with pytest.raises(FileNotFoundError):
        load_config(tmp_path / "absent.toml")


def test_differences_name_the_keys_and_both_values():
    old, new = parse_config({}), parse_config({"seed": 2, "simulate": {"temperature": 500.0}})
    assert differences(old, new) == {"seed": (1, 2), "simulate.temperature": (600.0, 500.0)}
    assert differences(old, old) == {}


def test_a_configuration_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "config.toml"
    save_config(parse_config({"seed": 5}), path)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        save_config(parse_config({"seed": 6}), path)
    assert load_config(path).seed == 5
    assert [p.name for p in tmp_path.iterdir()] == ["config.toml"]
