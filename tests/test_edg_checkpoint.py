"""Diffusion generators in files: what comes back is what went in, and a wrong file or target is named."""

import json

import pytest
import torch
from molecules import perturbed, seeded
from safetensors import safe_open
from safetensors.torch import save_file
from test_edg_proposal import Pair, chain_generator

from openmm_tsf import __version__
from openmm_tsf.checkpoint import CheckpointError, load_flow, pretrained_path
from openmm_tsf.edg import EDG, EDGSettings, build_edg, draw
from openmm_tsf.edg.targets import density_2d
from openmm_tsf.edg_checkpoint import (
    load_edg,
    load_molecular_edg,
    molecular_edg_info,
    save_edg,
    save_molecular_edg,
)

SETTINGS = EDGSettings(hidden=6, depth=1, spread=2.0, latent_dim=1, conditioned=True)


def made(settings: EDGSettings = SETTINGS, target=None) -> EDG:
    return perturbed(build_edg(target or Pair(), settings, seed=2), 0.1)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pair.edg"


def altered(path, **changes):
    """The file with other facts or another format, and no other hash."""
    with safe_open(path, framework="pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={**header, **changes})


@pytest.mark.parametrize("decoder", ["gaussian", "hamiltonian"])
def test_a_generator_comes_back(path, decoder):
    settings = EDGSettings(decoder=decoder, hidden=6, depth=1, stages=1, spread=2.0)
    edg = made(settings)
    digest = save_edg(edg, path, target=Pair(), extra={"seed": 2})
    again = load_edg(path, Pair())
    assert again.settings == settings and len(digest) == 64
    one, two = (draw(e, Pair(), n=200, generator=seeded(1)) for e in (edg, again))
    assert torch.equal(one.x, two.x) and torch.equal(one.log_weights, two.log_weights)
    assert not list(path.parent.glob("*partial*"))


def test_a_network_decoder_needs_no_target_and_dynamics_do(path):
    save_edg(made(), path, target=Pair())
    x, _ = load_edg(path).at(1.2).sample(5, generator=seeded(1))
    assert torch.equal(x, made().at(1.2).sample(5, generator=seeded(1))[0])
    save_edg(made(EDGSettings(decoder="hamiltonian", stages=1, hidden=6)), path, target=Pair())
    with pytest.raises(ValueError, match="made for its target: give it"):
        load_edg(path)


@pytest.mark.parametrize("known", [None, (0.5, 2.0)])
def test_the_range_of_the_training_comes_back(path, known):
    edg = made()
    edg.temperatures = known
    save_edg(edg, path, target=Pair())
    assert load_edg(path, Pair()).temperatures == known


def test_another_target_is_noticed(path):
    save_edg(made(), path, target=Pair())
    with pytest.raises(ValueError, match=r"trained for another target: at 8 of 8 points energies differ, .* now"):
        load_edg(path, density_2d("MoG2"))

    class Holes(Pair):
        def __call__(self, x):
            return torch.where(x[:, 0] > 0.0, torch.nan, super().__call__(x))

    with pytest.raises(ValueError, match=r"energies differ, .* then and nan now"):
        load_edg(path, Holes())
    save_edg(made(), path, target=Holes())
    load_edg(path, Holes())

    class Solid(Pair):
        dim = 3

    with pytest.raises(ValueError, match=r"the target has 3 dimensions, the generator in .* 2"):
        load_edg(path, Solid())
    with pytest.raises(ValueError, match="the target has 3 dimensions, the generator 2"):
        save_edg(made(), path, target=Solid())

    class Sizeless(Pair):
        dim = None

    with pytest.raises(ValueError, match=r"has a whole number `dim`"):
        load_edg(path, Sizeless())

    class Nowhere(Pair):
        def __call__(self, x):
            return super().__call__(x) + torch.inf

    with pytest.raises(ValueError, match="finite at none of 8 draws of the generator"):
        save_edg(made(), path, target=Nowhere())


def test_a_generator_put_together_by_hand_is_refused(path):
    edg = made()
    with pytest.raises(ValueError, match="put together by hand"):
        save_edg(EDG(edg.decoder, edg.score), path, target=Pair())


def test_wrong_files_are_named(path, tmp_path):
    save_edg(made(), path, target=Pair())
    with pytest.raises(FileNotFoundError, match=r"no generator of vectors at .*none\.edg"):
        load_edg(tmp_path / "none.edg")
    with pytest.raises(CheckpointError, match=r"not an openmm_tsf generator of vectors .*'openmm_tsf flow 1'"):
        load_edg(pretrained_path("ala2"))
    with pytest.raises(CheckpointError, match=r"not an openmm_tsf flow .*'openmm_tsf edg 2'"):
        load_flow(path)
    with pytest.raises(CheckpointError, match="not an openmm_tsf generator of a molecule"):
        load_molecular_edg(path)
    altered(path, format="openmm_tsf edg 0")
    with pytest.raises(CheckpointError, match="'openmm_tsf edg 0', expected 'openmm_tsf edg 2'"):
        load_edg(path)
    save_edg(made(), path, target=Pair())
    altered(path, facts=json.dumps({"settings": {}, "dim": 3}))
    with pytest.raises(CheckpointError, match="altered"):
        load_edg(path)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(CheckpointError, match="cut short or not a generator"):
        load_edg(path)


def test_numbers_that_are_not_finite_are_refused(path):
    edg = made()
    edg.score.encoder[0].weight.data[0, 0] = torch.nan
    save_edg(edg, path, target=Pair())
    with pytest.raises(CheckpointError, match=r"1 of its tensors are not finite \(edg\.score"):
        load_edg(path)


@pytest.mark.parametrize("decoder", ["gaussian", "hamiltonian"])
def test_the_generator_of_a_molecule_comes_back_alone(tmp_path, decoder):
    generator = chain_generator(600.0, conditioned=True, decoder=decoder, stages=1)
    path = tmp_path / "generator.edg"
    save_molecular_edg(generator, path, extra={"seed": 4})
    again = load_molecular_edg(path)
    assert (again.temperatures, again.training_temperature) == ((300.0, 600.0), 600.0)
    assert again.molecule.name == generator.molecule.name
    for temperature in (600.0, 400.0):
        one, two = (g.at(temperature).propose(50, generator=seeded(1)) for g in (generator, again))
        # walls are those of training: they reach into the dynamics of the decoder beyond the chart alone
        assert torch.allclose(one[0], two[0], atol=1e-12) and torch.allclose(one[1], two[1], atol=1e-9)
    info = molecular_edg_info(path)
    assert info["extra"] == {"seed": 4} and info["versions"]["openmm_tsf"] == __version__
    assert info["settings"]["decoder"] == decoder and len(info["sha256"]) == 64
    altered(path, format="openmm_tsf molecular edg 0")
    with pytest.raises(CheckpointError, match="molecular edg 0"):
        load_molecular_edg(path)
