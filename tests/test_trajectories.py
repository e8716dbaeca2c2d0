"""Frames and their loading: order, splits, and what is wrong with other people's files."""

import mdtraj as md
import numpy as np
import pytest
from openmm import app, unit

from openmm_tsf.systems import Molecule
from openmm_tsf.trajectories import Frames, join_frames, load_frames


@pytest.fixture(scope="module")
def positions():
    """Forty frames of alanine dipeptide with thermal noise, float32 nm."""
    from openmm_tsf.systems import alanine_dipeptide

    noise = 0.004 * np.random.default_rng(5).normal(size=(40, 22, 3))
    return (alanine_dipeptide().positions + noise).astype(np.float32)


def trajectory(molecule, positions):
    return md.Trajectory(positions, molecule.mdtraj_topology)


def numbered(n_times, n_walkers, temperatures=600.0):
    """Frames whose first coordinate is the time and whose second is the walker."""
    x = np.zeros((n_times, n_walkers, 2, 3), np.float32)
    x[..., 0], x[..., 1] = np.arange(n_times)[:, None, None], np.arange(n_walkers)[None, :, None]
    kelvin = np.broadcast_to(temperatures, (n_times, n_walkers)).ravel()
    return Frames(x.reshape(-1, 2, 3), kelvin, n_walkers)


@pytest.mark.parametrize("suffix", ["dcd", "xtc", "trr", "nc", "pdb"])
def test_formats(ala2, positions, tmp_path, suffix):
    path = tmp_path / f"frames.{suffix}"
    trajectory(ala2, positions).save(str(path))
    frames = load_frames(path, ala2, 600.0)
    tolerance = {"pdb": 1e-4, "xtc": 1e-3}.get(suffix, 1e-6)
    assert frames.positions.dtype == np.float32
    assert frames.positions.shape == (40, 22, 3)
    assert np.abs(frames.positions - positions).max() < tolerance
    assert (frames.temperatures == 600.0).all()
    assert frames.n_walkers == 1


def test_pdb_written_by_openmm(ala2, tmp_path):
    with (tmp_path / "a.pdb").open("w") as file:
        app.PDBFile.writeFile(ala2.topology, ala2.positions * unit.nanometer, file)
    assert len(load_frames(tmp_path / "a.pdb", ala2, 300.0 * unit.kelvin)) == 1


def test_stride_keeps_whole_times_of_all_walkers(ala2, positions):
    frames = load_frames(trajectory(ala2, positions), ala2, 600.0, n_walkers=4, stride=3)
    rows = [time * 4 + walker for time in (0, 3, 6, 9) for walker in range(4)]
    assert np.array_equal(frames.positions, positions[rows])
    assert frames.n_walkers == 4
    assert frames.n_times == 4


def test_split_cuts_on_whole_times():
    early, late = numbered(10, 3).split(0.25)
    assert (early.n_times, late.n_times) == (8, 2)
    assert early.n_walkers == late.n_walkers == 3
    assert early.positions[:, 0, 0].max() < late.positions[:, 0, 0].min()
    assert sorted(late.positions[:, 0, 1]) == [0, 0, 1, 1, 2, 2]
    for holdout in (0.0, 0.01, 0.99, 1.0, -0.5, 2.0):
        with pytest.raises(ValueError, match="one part would be empty"):
            numbered(10, 3).split(holdout)


def test_at_temperature():
    by_walker = numbered(5, 3, [300.0, 600.0, 300.0])
    some = by_walker.at_temperature(300)
    assert (len(some), some.n_walkers) == (10, 2)
    assert sorted(set(some.positions[:, 0, 1])) == [0.0, 2.0]
    by_time = numbered(4, 2, np.array([[300.0], [300.0], [300.0], [600.0]])).at_temperature(300.0)
    assert (len(by_time), by_time.n_walkers) == (6, 1)
    with pytest.raises(ValueError, match=r"no frames at 450 K; there are frames at 300, 600 K"):
        by_walker.at_temperature(450.0)


def test_join_puts_walkers_side_by_side():
    joined = join_frames([numbered(5, 2, 300.0), numbered(5, 1, 600.0)])
    assert joined.n_walkers == 3
    assert joined.temperatures.reshape(5, 3).tolist() == [[300.0, 300.0, 600.0]] * 5
    assert np.array_equal(joined.at_temperature(300.0).positions, numbered(5, 2).positions)
    assert np.array_equal(joined.positions[:, 0, 0], np.repeat(np.arange(5), 3))
    with pytest.raises(ValueError, match=r"2 atoms x 5 times, 2 atoms x 6 times"):
        join_frames([numbered(5, 2), numbered(6, 2)])
    with pytest.raises(ValueError, match="got nothing"):
        join_frames([])


def test_frames_are_frozen_copies():
    x = np.zeros((2, 3, 3), np.float32)
    frames = Frames(x, np.array([300.0, 300.0]))
    x += 1.0
    assert not frames.positions.any()
    with pytest.raises(ValueError, match="read-only"):
        frames.positions[0] = 1.0
    with pytest.raises(ValueError, match="read-only"):
        frames.temperatures[0] = 1.0


@pytest.mark.parametrize(
    ("shape", "temperatures", "n_walkers", "message"),
    [
        ((4, 3), np.ones(4), 1, r"positions have shape \(4, 3\)"),
        ((4, 5, 3), np.ones(3), 1, r"temperatures \(3,\)"),
        ((0, 5, 3), np.ones(0), 1, r"0 frames are no positive multiple"),
        ((4, 5, 3), np.ones(4), 3, r"4 frames are no positive multiple of n_walkers=3"),
        ((2, 5, 3), np.array([300.0, -1.0]), 1, r"above 0 K; the lowest is -1 K"),
    ],
)
def test_frames_that_do_not_fit(shape, temperatures, n_walkers, message):
    with pytest.raises(ValueError, match=message):
        Frames(np.zeros(shape, np.float32), temperatures, n_walkers)


@pytest.mark.parametrize("temperature", [0.0, -300.0, float("nan"), "warm"])
def test_temperatures_that_are_none(ala2, positions, temperature):
    with pytest.raises(ValueError, match="temperature must be"):
        load_frames(trajectory(ala2, positions), ala2, temperature)


def test_frames_that_are_not_finite(ala2, positions, tmp_path):
    x = positions.copy()
    x[[7, 9, 30], 4, 1] = np.nan, np.inf, np.nan
    trajectory(ala2, x).save(str(tmp_path / "broken.dcd"))
    with pytest.raises(ValueError, match=r"^broken\.dcd: 3 of 40 frames .* not finite, first frame 7$"):
        load_frames(tmp_path / "broken.dcd", ala2, 600.0)


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (10.0, r"bonds are 10 times as long as the molecule's: looks like angstrom; divide by 10"),
        (0.1, r"bonds are 0\.1 times .*; divide by 0\.1"),
        (2.5, r"bonds have a wrong length"),
    ],
)
def test_wrong_units(ala2, positions, tmp_path, factor, message):
    trajectory(ala2, positions * factor).save(str(tmp_path / "frames.dcd"))
    with pytest.raises(ValueError, match=message):
        load_frames(tmp_path / "frames.dcd", ala2, 600.0)


def test_wrong_number_of_atoms(ala2, positions, tmp_path):
    fewer = trajectory(ala2, positions).atom_slice(range(21))
    with pytest.raises(ValueError, match=r"21 atoms, but the molecule has 22; cut it out with mdtraj's atom_slice"):
        load_frames(fewer, ala2, 600.0)
    fewer.save(str(tmp_path / "fewer.dcd"))
    with pytest.raises(ValueError, match=r"fewer\.dcd cannot be read as a trajectory of 22 atoms") as caught:
        load_frames(tmp_path / "fewer.dcd", ala2, 600.0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pair", [(9, 10), (0, 6), (4, 14), (5, 4)])
def test_wrong_order_without_names_shows_in_bonds(ala2, positions, tmp_path, pair):
    order = list(range(22))
    order[pair[0]], order[pair[1]] = pair[1], pair[0]
    trajectory(ala2, positions[:, order]).save(str(tmp_path / "frames.dcd"))
    with pytest.raises(
        ValueError, match=r"bonds have a wrong length, e\.g\. \w+-\w+ to \w+-\w+ is .* wrong atom order"
    ):
        load_frames(tmp_path / "frames.dcd", ala2, 600.0)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ((4, 5), r"2 of 22 differ, first atom 4 \(ACE1-O in the file, ACE1-C in the molecule\)"),
        ((9, 10), r"2 of 22 differ, first atom 9 \(ALA2-CB in the file, ALA2-HA in the molecule\)"),
        ((11, 12), r"2 of 22 differ, first atom 11 \(ALA2-HB2 in the file, ALA2-HB1 in the molecule\)"),
    ],
)
def test_wrong_order_with_names_is_named(ala2, positions, tmp_path, pair, message):
    order = list(range(22))
    order[pair[0]], order[pair[1]] = pair[1], pair[0]
    data, _ = ala2.mdtraj_topology.to_dataframe()
    data = data.iloc[order].assign(serial=range(1, 23)).reset_index(drop=True)
    shuffled = md.Trajectory(positions[:, order], md.Topology.from_dataframe(data))
    shuffled.save(str(tmp_path / "frames.pdb"))
    with pytest.raises(ValueError, match=message):
        load_frames(tmp_path / "frames.pdb", ala2, 600.0)


def test_names_of_a_pdb_count_as_they_stand_there(ala2, positions, tmp_path):
    """mdtraj knows other names for these hydrogens, and would put them in place of the file's."""
    data = ala2.to_dict()
    for index, name in ((0, "HH31"), (2, "HH32"), (3, "HH33")):
        data["atoms"][index][0] = name
    molecule = Molecule.from_dict(data)
    trajectory(molecule, positions).save(str(tmp_path / "swapped.pdb"))
    text = (tmp_path / "swapped.pdb").read_text()
    (tmp_path / "swapped.pdb").write_text(text.replace("HH33", "HHxx").replace("HH32", "HH33").replace("HHxx", "HH32"))
    with pytest.raises(ValueError, match=r"2 of 22 differ, first atom 2 \(ACE1-HH33 in the file, ACE1-HH32 in the mol"):
        load_frames(tmp_path / "swapped.pdb", molecule, 600.0)


def test_other_names_are_accepted_but_not_other_elements(ala2, positions):
    renamed = trajectory(ala2, positions)
    renamed.topology = ala2.mdtraj_topology.copy()
    for atom in renamed.topology.atoms:
        atom.name = f"X{atom.index}"
    assert len(load_frames(renamed, ala2, 600.0)) == 40
    renamed.topology.atom(5).element = md.element.sulfur
    with pytest.raises(
        ValueError, match=r"1 of 22 differ, first atom 5 \(ACE1-X5 in the file, ACE1-O in the molecule\)"
    ):
        load_frames(renamed, ala2, 600.0)


def test_a_frame_broken_across_a_box_is_found(ala2, positions):
    x = positions.copy()
    x[[13, 20], 14:] += 2.0
    with pytest.raises(ValueError, match=r"2 of 40 frames have broken bonds, first frame 13 \(ALA2-CA to ALA2-C\)"):
        load_frames(trajectory(ala2, x), ala2, 600.0)


def test_missing_and_unreadable_files_and_bad_options(ala2, positions, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*none\.dcd"):
        load_frames(tmp_path / "none.dcd", ala2, 600.0)
    (tmp_path / "text.dcd").write_text("not a trajectory")
    with pytest.raises(ValueError, match=r"text\.dcd cannot be read as a trajectory of 22 atoms"):
        load_frames(tmp_path / "text.dcd", ala2, 600.0)
    with pytest.raises(ValueError, match="stride and n_walkers must be at least 1, not 0 and 1"):
        load_frames(trajectory(ala2, positions), ala2, 600.0, stride=0)
    with pytest.raises(ValueError, match="trajectory: 40 frames are no multiple of n_walkers=7"):
        load_frames(trajectory(ala2, positions), ala2, 600.0, n_walkers=7)
