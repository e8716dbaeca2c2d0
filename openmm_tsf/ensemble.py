"""Weighted draws of a flow: what was drawn, how dense the flow was there, and what the molecule says to it.

An ensemble holds raw energies, so the same draws serve any temperature: weights are arithmetic.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import mdtraj
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from . import weights
from .storage import read_npz, write_npz
from .typing import Energy
from .units import kT, to_kelvin

FORMAT = "openmm-tsf ensemble 1"
PLAIN = ("temperature", "sampling_temperature", "n_rejected", "explore")
LEAST_ESS = 0.01
LARGEST_SHARE = 0.1
FEWEST_VALID = 1e-3
"""Share of draws on the chart below which `draw` gives up."""


@dataclass(frozen=True, eq=False, repr=False)
class Ensemble:
    """Draws of a flow with everything that weighs them for a Boltzmann distribution.

    A draw of density q has weight exp(-U/kT) c / q, with c the constraint factor (1 where nothing is constrained).

    Args:
        positions: (N, A, 3) [nm].
        energy: (N,) raw potential energy U [kJ/mol]; +inf is a weight of zero.
        log_prob: (N,) [nat], ln q of the density that made the draws.
        temperature: of the target [K], a number or a Quantity.
        n_rejected: draws off the flow's chart on the way to these N; they count as zero weights.
        log_factor: (N,) [nat], ln c; zeros by default.
        sampling_temperature: [K] the flow ran at; by default `temperature`.
        explore: share of the draws that the flow spread over all basins; `log_prob` has it in, raw shares show it.

    Raises:
        ValueError: shapes that do not fit, NaN or -inf energies, densities not finite, temperatures not above 0.
    """

    # the types are loose because this is a door: __post_init__ checks, and makes float64 CPU tensors and floats of them
    positions: Tensor
    energy: Tensor
    log_prob: Tensor
    temperature: Any
    n_rejected: int = 0
    log_factor: Tensor | None = None
    sampling_temperature: Any = None
    explore: float = 0.0

    def __post_init__(self) -> None:
        positions = _on_cpu(self.positions)
        if positions.ndim != 3 or positions.shape[2] != 3 or len(positions) == 0:
            raise ValueError(f"positions must have shape (draws, atoms, 3), draws > 0, not {tuple(positions.shape)}")
        sampling = self.temperature if self.sampling_temperature is None else self.sampling_temperature
        values = {
            "positions": positions,
            "temperature": to_kelvin(self.temperature),
            "n_rejected": int(self.n_rejected),
            "sampling_temperature": to_kelvin(sampling),
            "explore": float(self.explore),
        }
        if values["n_rejected"] < 0:
            raise ValueError(f"n_rejected cannot be negative, got {self.n_rejected}")
        zeros = torch.zeros(len(positions)) if self.log_factor is None else self.log_factor
        for name, column in (("energy", self.energy), ("log_prob", self.log_prob), ("log_factor", zeros)):
            values[name] = _column(name, column, len(positions))
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.positions)

    def __repr__(self) -> str:
        drawn = "" if self.sampling_temperature == self.temperature else f", drawn at {self.sampling_temperature:g} K"
        return (
            f"Ensemble({len(self)} draws of {self.positions.shape[1]} atoms, {self.temperature:g} K{drawn}, "
            f"{self.n_rejected} rejected, ESS {100 * self.ess:.3g} %)"
        )

    @cached_property
    def log_weights(self) -> Float[Tensor, " draws"]:
        """ln w = -U/kT - ln q + ln c [nat] at `temperature`, not normalised."""
        return -self.energy / kT(self.temperature) - self.log_prob + self.log_factor

    @cached_property
    def ess(self) -> float:
        """Kish's effective sample size as a share of all draws, the rejected ones included; unclipped."""
        return weights.effective_sample_size(self.log_weights, self.n_rejected)

    @cached_property
    def n_effective(self) -> float:
        """Kish's effective number of draws."""
        return self.ess * (len(self) + self.n_rejected)

    @cached_property
    def largest_weight_share(self) -> float:
        """Share of the total weight that the heaviest draw carries."""
        return weights.largest_weight_share(self.log_weights)

    @cached_property
    def log_z(self) -> float:
        """ln of the configuration integral of exp(-U/kT) c over the flow's coordinates [nat]: the mean weight of all
        draws, which is that of the valid ones times the share of them."""
        return weights.log_mean_exp(self.log_weights, self.n_rejected)

    @property
    def log_z_bound(self) -> float:
        """Lower bound of ln Z [nat]: the mean of ln w of draws of finite energy, and ln of their share of all draws.

        They are draws of the density as cut down to such configurations, for which the mean is a bound by itself.
        """
        finite = torch.isfinite(self.energy)
        share = int(finite.sum()) / (len(self) + self.n_rejected)
        return float(self.log_weights[finite].mean()) + math.log(share) if share else -math.inf

    @property
    def log_z_error(self) -> float:
        """Standard error of `log_z` [nat]; see `weights.log_mean_exp_error`."""
        return weights.log_mean_exp_error(self.ess, len(self) + self.n_rejected)

    def reweighted(self, temperature: Any) -> Ensemble:
        """The same draws weighed for another target temperature [K]."""
        return replace(self, temperature=temperature)

    def mean(
        self, values: Any, *, n_replicates: int = 200, generator: torch.Generator | None = None
    ) -> weights.Estimate:
        """Average of an observable at `temperature`.

        Args:
            values: (N, ...) tensor or array, the observable of each draw.
            n_replicates: of the bootstrap.
            generator: of the bootstrap; by default a fresh one with a fixed seed.

        Returns:
            value and bootstrap standard error, tensors of shape (...), in the unit of the values.
        """
        rest = {"n_rejected": self.n_rejected, "n_replicates": n_replicates, "generator": generator}
        return weights.bootstrap_mean(self.log_weights, _on_cpu(values), **rest)

    def resampled(self, n: int | None = None, *, generator: torch.Generator) -> Float[Tensor, "n atoms 3"]:
        """Positions [nm] of n draws (default: as many as there are) of equal weight, heavy ones repeated."""
        return self.positions[weights.systematic_resample(self.log_weights, n or len(self), generator)]

    def to_mdtraj(self, topology: Any) -> mdtraj.Trajectory:
        """All draws in order as a trajectory; they are NOT equally likely: row i belongs to `log_weights[i]`.

        `to_mdtraj(ensemble.resampled(generator=g), topology)` gives equally likely frames.

        Args:
            topology: an `openmm.app.Topology`, an `mdtraj.Topology` or a Molecule.
        """
        return to_mdtraj(self.positions, topology)

    def save(self, path: str | os.PathLike) -> None:
        """Write an npz file, whole or not at all (a temporary file beside it is renamed when complete).

        Keys: positions [nm] (float32), energy [kJ/mol], log_prob, log_weight, log_factor [nat], temperature,
        sampling_temperature [K], n_rejected, explore, format.
        """
        write_npz(
            path,
            format=np.array(FORMAT),
            log_weight=self.log_weights.numpy(),
            **{
                field.name: np.asarray(getattr(self, field.name)) for field in fields(self) if field.name != "positions"
            },
            positions=self.positions.numpy().astype(np.float32),
        )

    @classmethod
    def load(cls, path: str | os.PathLike) -> Ensemble:
        """Read what `save` wrote; positions come back in float32.

        Raises:
            ValueError: the file is not an ensemble, is cut short or was altered.
            OSError: it cannot be read.
        """
        data = read_npz(path, ["format", "log_weight", *(field.name for field in fields(cls))], "an ensemble file")
        if str(data["format"]) != FORMAT:
            raise ValueError(f"{path} has format {str(data['format'])!r}; this version reads {FORMAT!r}")
        try:
            columns = {name: data.pop(name).item() for name in PLAIN}
            columns |= {field.name: torch.from_numpy(data[field.name]) for field in fields(cls) if field.name in data}
            ensemble = cls(**columns)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a valid ensemble: {error}") from error
        expected = ensemble.log_weights.numpy()
        if data["log_weight"].shape != expected.shape or not np.allclose(data["log_weight"], expected, atol=1e-6):
            raise ValueError(f"{path} contradicts itself: its weights do not follow from its energies; it was altered")
        return ensemble


def to_mdtraj(positions: Tensor | np.ndarray, topology: Any) -> mdtraj.Trajectory:
    """Positions [nm] as a trajectory.

    Args:
        positions: (N, A, 3), tensor or array.
        topology: an `openmm.app.Topology`, an `mdtraj.Topology` or anything with `.mdtraj_topology`.

    Raises:
        ValueError: the topology has another number of atoms.
    """
    topology = getattr(topology, "mdtraj_topology", topology)
    if not isinstance(topology, mdtraj.Topology):
        topology = mdtraj.Topology.from_openmm(topology)
    xyz = _on_cpu(positions).numpy().astype(np.float32)
    if xyz.shape[1] != topology.n_atoms:
        raise ValueError(f"positions have {xyz.shape[1]} atoms, the topology {topology.n_atoms}")
    return mdtraj.Trajectory(xyz, topology)


def draw(
    flow: Any,
    energy: Energy,
    *,
    temperature: Any,
    n: int,
    generator: torch.Generator,
    at: Any = None,
    explore: float | int = 0.0,
    chunk: int = 4096,
    progress: Callable[[int, int, str], None] | None = None,
) -> Ensemble:
    """Draw n valid configurations from a flow and weigh them for the Boltzmann distribution.

    Args:
        flow: a Flow, or anything whose `at(T)` has `propose(n, generator=...)` -> (positions (n, A, 3) [nm], log_prob
            (n,) [nat], valid (n,) bool) and `log_constraint_factor(positions)`.
        energy: U [kJ/mol] of positions [nm].
        temperature: of the target [K].
        n: valid draws wanted; the rejected ones on the way are counted.
        generator: of the draws.
        at: temperature the flow runs at [K]; by default `temperature`.
        explore: share of the draws spread over all basins, for the sake of rare ones; see `SteeredFlow.exploring`. Only
            flows that have potentials of torsions can.
        chunk: most draws, and energies, in one batch.
        progress: called as progress(done, n, message) after each batch.

    Raises:
        ValueError: n < 1, NaN energies or densities, or `explore` of a flow that cannot.
        RuntimeError: almost no draw lies on the flow's chart.

    Warns:
        UserWarning: the weights say that the temperature is out of the flow's reach.
    """
    if n < 1:
        raise ValueError(f"draws a positive number of configurations, not {n}")
    target = to_kelvin(temperature)
    sampling = target if at is None else to_kelvin(at)
    steered = flow.at(sampling).exploring(explore) if explore else flow.at(sampling)
    trained = getattr(flow, "training_temperature", None)
    columns: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    done = n_rejected = 0
    with torch.no_grad():
        while done < n:
            size = min(chunk, n - done + (n - done) // 8 + 8)
            x, log_prob, rejected = _valid_draws(steered, size, n - done, generator)
            n_rejected += rejected
            done += len(x)
            _check_progress(done, n_rejected, sampling, trained)
            if len(x) > 0:
                columns.append((x, energy(x), log_prob, steered.log_constraint_factor(x)))
            if progress is not None:
                progress(done, n, f"{n_rejected} rejected")
    x, energies, log_prob, log_factor = (torch.cat(parts) for parts in zip(*columns, strict=True))
    ensemble = Ensemble(x, energies, log_prob, target, n_rejected, log_factor, sampling, explore)
    message = out_of_reach(ensemble, trained, getattr(flow, "noun", "flow"))
    if message is not None:
        warnings.warn(message, stacklevel=2)
    return ensemble


def out_of_reach(
    ensemble: Ensemble, training_temperature: float | int | None = None, noun: str = "flow"
) -> str | None:  # fmt: skip
    """One line that says why the weights are not to be trusted and what to do; None where they are.

    An ESS below 1 %, or one draw that carries over a tenth of the weight and ten times its own share, is out of reach.
    """
    alone = ensemble.largest_weight_share > max(LARGEST_SHARE, 10.0 / len(ensemble))
    if ensemble.ess >= LEAST_ESS and not alone:
        return None
    trained = "" if training_temperature is None else f" (trained at {training_temperature:g} K)"
    run = f"{noun}{trained} run at {ensemble.sampling_temperature:g} K"
    advice = "draw nearer to the training temperature or train longer"
    if ensemble.temperature == ensemble.sampling_temperature == training_temperature:
        run, advice = f"{noun}, which was trained there", "train longer"
    tried = len(ensemble) + ensemble.n_rejected
    return (
        f"{ensemble.temperature:g} K is out of reach of this {run}: ESS {100 * ensemble.ess:.2g} % of {tried} draws, "
        f"largest weight {100 * ensemble.largest_weight_share:.2g} % of all; {advice}"
    )


def _valid_draws(steered: Any, size: int, wanted: int, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
    """At most `wanted` valid rows of `size` draws, their log_prob, and how many were rejected before the last of them.

    Rows after the one that completes the number are not counted, neither valid nor rejected: the share of
    rejections would be biased otherwise.
    """
    x, log_prob, valid = steered.propose(size, generator=generator)
    rows = valid.nonzero().squeeze(1)[:wanted]
    seen = int(rows[-1]) + 1 if len(rows) == wanted else size
    return x[rows], log_prob[rows], seen - len(rows)


def _check_progress(done: int, n_rejected: int, temperature: float, trained: float | int | None) -> None:
    tried = done + n_rejected
    if tried >= 10 / FEWEST_VALID and done < FEWEST_VALID * tried:
        far = "" if temperature == trained else f", or {temperature:g} K is far from the temperature it was trained at"
        raise RuntimeError(
            f"only {done} of {tried} draws at {temperature:g} K lie on the flow's chart: the flow is not trained{far}"
        )


def _on_cpu(tensor: Any) -> Tensor:
    """A floating-point tensor on the CPU, outside of any graph."""
    # copied from numpy, because torch warns about arrays that are read-only
    tensor = torch.as_tensor(np.array(tensor) if isinstance(tensor, np.ndarray) else tensor).detach().cpu()
    return tensor if tensor.is_floating_point() else tensor.to(torch.float64)


def _column(name: str, values: Any, n: int) -> Tensor:
    column = _on_cpu(values).to(torch.float64)
    if column.shape != (n,):
        raise ValueError(f"{name} must have shape ({n},) like the {n} positions, not {tuple(column.shape)}")
    bad = torch.isnan(column) | (column == -math.inf)
    if name != "energy":
        bad |= column == math.inf
    if bad.any():
        allowed = "NaN or -inf" if name == "energy" else "not finite"
        raise ValueError(f"{int(bad.sum())} of {n} values of {name} are {allowed} (first: row {int(bad.nonzero()[0])})")
    return column
