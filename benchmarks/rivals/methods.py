"""Every method by name, each a function of (case, budget, n, seed) that gives `Drawn`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch

from openmm_tsf.edg import EDGSettings, EDGTrainingSettings, build_edg, draw, train_edg

from .cases import Case
from .common import Budget, Drawn, without_numbers
from .flows import real_nvp, steerable
from .hmc import hmc
from .l2hmc import l2hmc
from .pis import pis

Method = Callable[[Case, Budget, int, int], Drawn]


DYNAMICS_RATE = 1e-3
"""Learning rate where draws go through gradients of the target: at 5e-3 three of the six modes of MoG6 were kept."""
TRAJECTORY = EDGTrainingSettings.trajectory
OF_TRAINING = tuple(field.name for field in fields(EDGTrainingSettings))


def generator_settings(case: Case, decoder: str, score: str) -> tuple[EDGSettings, dict[str, Any], int]:
    """Settings of a diffusion generator and of its training, "steps" being the most, and slopes that a draw takes."""
    special = {"hamiltonian": {"learning_rate": DYNAMICS_RATE, **case.dynamics}, "pairs": case.pairs}
    given = {"spread": case.scale, "batch": 512, **case.steps, **case.network, **special.get(decoder, {})}
    training = {name: given.pop(name) for name in OF_TRAINING if name in given}
    settings = EDGSettings(decoder=decoder, score=score, **given)
    slopes = settings.stages * settings.leaps + 1 if decoder == "hamiltonian" else 0
    return settings, training, slopes


def diffusion(case: Case, budget: Budget, n: int, seed: int, *, decoder: str, score: str, name: str) -> Drawn:
    """The diffusion generator; it stops with its steps, of which the budget of energies has so many.

    With the score "variational" it is the source's ablation, an autoencoder: all but the diffusion is the same.
    """
    settings, given, slopes = generator_settings(case, decoder, score)
    cost = given["batch"] * (1 + 2 * slopes) + given.get("walkers", 0) * (given.get("trajectory", TRAJECTORY) + 1)
    begin = time.process_time()
    edg = build_edg(case.learned, settings, seed=seed)
    steps = max(1, min(budget.evaluations // cost, given.pop("steps", budget.evaluations)))
    training = EDGTrainingSettings(steps=steps, **given)
    history = train_edg(edg, case.learned, training, seed=seed)
    middle = time.process_time()
    weighing = case.weighing if edg.score.corrected else {}  # a Gaussian's density is a formula
    made = draw(edg, case.target, 1.0, n, generator=torch.Generator().manual_seed(seed), chunk=2048, **weighing)
    facts = {
        "steps": training.steps, "batch": training.batch, "tolerance": made.tolerance and list(made.tolerance),
        "n_parameters": sum(p.numel() for p in edg.parameters()),
        "n_function_evaluations": made.n_function_evaluations,
        "bound_training": history.rows[-1]["bound"], "n_nonfinite_training": history.n_nonfinite,
    }  # fmt: skip
    return Drawn(
        name, made.x, made.energy, without_numbers(made.log_weights), history.n_energy_evaluations,
        n * (1 + edg.decoder.n_slopes), middle - begin, time.process_time() - middle, facts,
    )  # fmt: skip


def rival(
    method: Callable[..., Drawn], case: Case, budget: Budget, n: int, seed: int, *, name: str, **settings: Any
) -> Drawn:  # fmt: skip
    """A method that takes target, budget and scale."""
    settings |= case.rivals.get(name, {})
    return method(case.learned, budget, n, scale=case.scale, seed=seed, name=name, **settings)


def annealed(case: Case, budget: Budget, n: int, seed: int) -> Drawn:
    """A Boltzmann generator that begins as hot as the diffusion generator and cools as long."""
    _, given, _ = generator_settings(case, "gaussian", "gaussian")
    training = EDGTrainingSettings(**given)
    cooling = {"anneal_from": training.anneal_from, "anneal_share": training.anneal_share}
    return rival(real_nvp, case, budget, n, seed, name="bg-annealed", **cooling)


def shipped(case: Case, budget: Budget, n: int, seed: int, *, name: str) -> Drawn:
    """The flow of alanine dipeptide that comes with the package, with what it cost to train; the budget is not its own.

    Raises:
        ValueError: another target.
    """
    import openmm_tsf as tsf

    if case.group != "molecule":
        raise ValueError(f"the shipped flow is of alanine dipeptide, not of {case.name}")
    begin, kelvin = time.process_time(), case.facts["kelvin"]
    flow = tsf.pretrained("ala2").at(kelvin)
    ensemble = tsf.draw(
        flow.flow, case.facts["energy"], temperature=kelvin, n=n, generator=torch.Generator().manual_seed(seed)
    )
    seconds = time.process_time() - begin
    x = case.target.standardised(ensemble.positions)
    facts = {"n_rejected": ensemble.n_rejected, "positions": ensemble.positions}
    return Drawn(name, x, -ensemble.log_weights - ensemble.log_prob, ensemble.log_weights, 0, n, 0.0, seconds, facts)


METHODS: dict[str, Method] = {
    "edg": partial(diffusion, decoder="gaussian", score="gaussian", name="edg"),
    "edg-ghd": partial(diffusion, decoder="hamiltonian", score="gaussian", name="edg-ghd"),
    "edg-plain": partial(diffusion, decoder="gaussian", score="plain", name="edg-plain"),
    "edg-energy": partial(diffusion, decoder="gaussian", score="energy", name="edg-energy"),
    "edg-pairs": partial(diffusion, decoder="pairs", score="pairs", name="edg-pairs"),
    "vae": partial(diffusion, decoder="gaussian", score="variational", name="vae"),
    "vae-ghd": partial(diffusion, decoder="hamiltonian", score="variational", name="vae-ghd"),
    "bg": partial(rival, real_nvp, name="bg"),
    "bg-annealed": annealed,
    "pis": partial(rival, pis, name="pis"),
    "pis-variance": partial(rival, pis, loss="variance", name="pis-variance"),
    "hmc": partial(rival, hmc, name="hmc"),
    "l2hmc": partial(rival, l2hmc, name="l2hmc"),
    "tsf": partial(rival, steerable, name="tsf"),
    "flow": partial(shipped, name="flow"),
}
"""Diffusion generators with a network or with dynamics ("ghd") for decoder, with the scores of the source ("plain",
"energy"), or made of pairs, for clusters alone ("pairs"); autoencoders ("vae") are the same, trained the same way,
without diffusion; "flow" is the one that ships, of alanine dipeptide alone."""

DEFAULT = [name for name in METHODS if name not in ("edg-plain", "edg-energy", "edg-pairs", "tsf", "flow")]
ALSO = {"wells": ["tsf"], "lj": ["edg-pairs"], "molecule": ["flow"]}
"""Methods of a group beyond the default ones."""


def judged_by(drawn: Drawn, case: Case) -> Drawn:
    """The same draws with energies and weights of the target itself, where methods learnt from a smoother one."""
    if case.training is None or drawn.method.startswith(("edg", "vae", "flow")):
        return drawn
    with torch.no_grad():
        energy = torch.cat([case.target(x) for x in drawn.x.split(4096)])
    weights = drawn.log_weights
    if weights is not None:
        weights = without_numbers(weights + drawn.energy - energy)
    return replace(drawn, energy=energy, log_weights=weights, n_drawing=drawn.n_drawing + len(energy))
