"""Widgets are built without a display; what they show is superposed and coloured as documented."""

import mdtraj
import numpy as np
import pytest
import torch
from poses import pose, posed_ensemble

from openmm_tsf import notebook
from openmm_tsf.ensemble import Ensemble

pytest.importorskip("nglview")


def messages(widget) -> list[dict]:
    return widget._ngl_msg_archive


def test_structures_are_superposed_on_the_backbone(ala2):
    rng = np.random.default_rng(1)
    rotation = np.linalg.qr(rng.standard_normal((50, 3, 3)))[0]
    rotation *= np.linalg.det(rotation)[:, None, None]
    frames = np.repeat(ala2.positions[None], 50, 0) + 0.002 * rng.standard_normal((50, 22, 3))
    frames = np.einsum("nij,naj->nai", rotation, frames) + rng.standard_normal((50, 1, 3))
    ensemble = Ensemble(torch.as_tensor(frames), torch.zeros(50), torch.zeros(50), 300.0)
    shown = notebook.superposed(ensemble, ala2, 50)
    atoms = shown.topology.select("backbone")
    spread = shown.xyz[:, atoms].std(0).max()
    assert spread < 5 * 0.002
    assert frames[:, atoms].std(0).max() > 0.3  # before


def test_weights_choose_the_structures(ala2):
    frames = torch.as_tensor(pose(ala2, np.radians([-75.0, 60.0]), np.radians([150.0, 40.0])))
    ensemble = Ensemble(frames, torch.zeros(2), torch.tensor([0.0, 40.0]), 300.0)
    shown = notebook.superposed(ensemble, ala2, 20)
    assert shown.n_frames == 20
    assert np.abs(np.degrees(mdtraj.compute_phi(shown)[1]) + 75.0).max() < 0.1


def test_view_shows_all_structures_at_once(ala2):
    widget = notebook.view(posed_ensemble(ala2, 300), ala2, n=30)
    load, show = messages(widget)[:2]
    assert load["methodName"] == "loadFile"
    assert load["args"][0]["data"].count("ENDMDL") == 30
    assert load["kwargs"]["name"] == "30 structures at 300 K"
    assert show["args"] == ["licorice"]
    assert show["kwargs"]["colorScheme"] == "element"


@pytest.mark.parametrize("topology", ["topology", "mdtraj_topology"])
def test_view_takes_any_topology(ala2, topology):
    assert len(messages(notebook.view(posed_ensemble(ala2, 20), getattr(ala2, topology), n=5))) >= 2


def test_basins_have_their_colours_and_numbers(ala2):
    phi, psi = np.radians([60.0, -75.0, -75.0, -150.0]), np.radians([40.0, -20.0, 150.0, 155.0])
    frames = torch.as_tensor(pose(ala2, phi, psi))
    widget = notebook.view_basins(Ensemble(frames, torch.zeros(4), torch.zeros(4), 300.0), ala2, n=40)
    loads, shows = messages(widget)[::2][:3], messages(widget)[1::2][:3]
    assert [load["kwargs"]["name"] for load in loads] == ["alpha_L: 10 of 40", "alpha_R: 10 of 40", "beta: 20 of 40"]
    assert [show["kwargs"]["color"] for show in shows] == [notebook.COLORS[name] for name in notebook.BASINS]
    assert [load["args"][0]["data"].count("ENDMDL") for load in loads] == [10, 10, 20]


def test_empty_basins_are_left_out(ala2):
    frames = torch.as_tensor(pose(ala2, np.radians([-75.0]), np.radians([150.0])))
    widget = notebook.view_basins(Ensemble(frames, torch.zeros(1), torch.zeros(1), 300.0), ala2, n=5)
    assert [m["kwargs"]["name"] for m in messages(widget) if m["methodName"] == "loadFile"] == ["beta: 5 of 5"]


def test_basins_need_a_backbone():
    topology = mdtraj.Topology()
    residue = topology.add_residue("XXX", topology.add_chain())
    for index in range(4):
        topology.add_atom(f"C{index}", mdtraj.element.carbon, residue)
    ensemble = Ensemble(
        torch.rand(3, 4, 3, generator=torch.Generator().manual_seed(1)), torch.zeros(3), torch.zeros(3), 300.0
    )
    assert len(messages(notebook.view(ensemble, topology, n=3))) >= 2  # superposed on its heavy atoms
    with pytest.raises(ValueError, match="0 residues with both phi and psi"):
        notebook.view_basins(ensemble, topology)
