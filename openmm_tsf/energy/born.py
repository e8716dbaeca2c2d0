"""Implicit solvent and other many-body terms of pairs: OpenMM's CustomGBForce, GBSAOBCForce and CustomNonbondedForce.

All three are expressions of the distance of two atoms and of values that the atoms have: parameters, or computed values
like Born radii. GBSAOBCForce is written out as the expressions that it stands for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from openmm_tsf.energy.expressions import check_names, own_parameters, parse_expression
from openmm_tsf.energy.lepton import Expression
from openmm_tsf.energy.nonbonded import COULOMB
from openmm_tsf.energy.pairs import Geometry, Pairs, check_particles
from openmm_tsf.energy.unsupported import UnsupportedForce, plain


@dataclass(frozen=True)
class Step:
    """One computed value (with a name) or one energy term (without) of a CustomGBForce.

    Args:
        expression: of r and of the two atoms' values (with endings 1 and 2) for pairs, of one atom's for `single`.
        single: a value of one atom, and not a sum over pairs.
        exclusions: leave out the excluded pairs.
        name: of the computed value.
    """

    expression: Expression
    single: bool
    exclusions: bool
    name: str | None = None


class PairExpressions(nn.Module):
    """Values of atoms computed one after the other, and energies of atoms and pairs made of them.

    Args:
        label: name of the force.
        parameters: (A,) values of each per-particle parameter.
        steps: in the order of evaluation.
        excluded: (P,) pairs that steps with `exclusions` leave out.
        constants: values of global parameters.
    """

    def __init__(
        self,
        label: str,
        parameters: Mapping[str, np.ndarray],
        steps: Sequence[Step],
        excluded: np.ndarray,
        constants: Mapping[str, float],
        pairs: Pairs,
    ) -> None:
        super().__init__()
        self.label, self.steps, self.constants = label, tuple(steps), dict(constants)
        self._names = tuple(parameters)
        for name, values in parameters.items():
            values = np.asarray(values, dtype=np.float64)
            for of, column in (("atom", values), ("first", values[pairs.first]), ("second", values[pairs.second])):
                self.register_buffer(f"{of}_{name}", torch.tensor(column)[:, None])
        self.register_buffer("included", torch.tensor(~excluded)[:, None] if excluded.any() else None)

    def forward(self, geometry: Geometry) -> Tensor:
        """Energy (batch,) [kJ/mol]."""
        single = {name: getattr(self, f"atom_{name}") for name in self._names}
        single |= dict(zip("xyz", geometry.positions.unbind(1), strict=True))
        pair = {f"{name}1": getattr(self, f"first_{name}") for name in self._names}
        pair |= {f"{name}2": getattr(self, f"second_{name}") for name in self._names}
        energies = []
        for step in self.steps:
            if step.single:
                value = step.expression({**self.constants, **single})
                value = _spread(value, geometry.positions[:, 0])
            elif step.name is None:
                value = self._pair_values(step, pair, geometry)
            else:
                swapped = {_swap(name): values for name, values in pair.items()}
                both = (self._pair_values(step, values, geometry) for values in (pair, swapped))
                value = geometry.pairs.onto_atoms(*both)
            if step.name is None:
                energies.append(value.sum(0))
            else:
                single[step.name] = value
                pair[f"{step.name}1"], pair[f"{step.name}2"] = geometry.pairs.of_atoms(value)
        return torch.stack(energies).sum(0)

    def _pair_values(self, step: Step, values: Mapping[str, Tensor], geometry: Geometry) -> Tensor:
        found = step.expression({**self.constants, **values, "r": geometry.distances})
        found = _spread(found, geometry.distances)
        return found if self.included is None or not step.exclusions else torch.where(self.included, found, 0.0)


def read_custom_gb(force: Any, parameters: Mapping[str, float], pairs: Pairs) -> PairExpressions | None:
    """The term of an openmm.CustomGBForce without cutoff.

    Raises:
        UnsupportedForce: a cutoff, or a continuous tabulated function.
        ValueError: an expression that cannot be read, with what is wrong with it.
    """
    if force.getNonbondedMethod() != force.NoCutoff:
        raise UnsupportedForce("CustomGBForce with a cutoff has no batched form; use OpenMMEnergy")
    names = [force.getPerParticleParameterName(k) for k in range(force.getNumPerParticleParameters())]
    computed = [force.getComputedValueParameters(k) for k in range(force.getNumComputedValues())]
    terms = [force.getEnergyTermParameters(k) for k in range(force.getNumEnergyTerms())]
    if not terms:
        return None
    if not computed or computed[0][2] == force.SingleParticle:
        raise ValueError("CustomGBForce: the first computed value must be a sum over pairs; OpenMM refuses it too")
    shared = own_parameters(force, parameters)
    steps, known = [], list(names)
    for name, text, kind in [*computed, *((None, *term) for term in terms)]:
        single = kind == force.SingleParticle
        expression = parse_expression(force, text)
        allowed = [*known, "x", "y", "z"] if single else ["r", *(f"{n}{i}" for n in known for i in "12")]
        check_names(force, expression, [*allowed, *shared])
        steps.append(Step(expression, single, kind == force.ParticlePair, name))
        known += [name] if name else []
    excluded = [force.getExclusionParticles(k) for k in range(force.getNumExclusions())]
    rows = _excluded("CustomGBForce", excluded, pairs)
    return PairExpressions("CustomGBForce", particle_table(force, names, pairs), steps, rows, shared, pairs)


def read_obc(force: Any, parameters: Mapping[str, float], pairs: Pairs) -> PairExpressions:
    """The term of an openmm.GBSAOBCForce without cutoff.

    Source: Onufriev, Bashford, Case, Proteins 55, 383 (2004), model II; surface term of Schaefer, Bartels, Karplus,
    J. Mol. Biol. 284, 835 (1998).

    Raises:
        UnsupportedForce: a cutoff.
    """
    if force.getNonbondedMethod() != force.NoCutoff:
        raise UnsupportedForce("GBSAOBCForce with a cutoff has no batched form; use OpenMMEnergy")
    check_particles(force, pairs)
    charge, radius, scale = np.array([plain(force.getParticleParameters(i)) for i in range(pairs.n_atoms)]).T
    offset = 0.009
    prefactor = COULOMB * (1.0 / force.getSoluteDielectric() - 1.0 / force.getSolventDielectric())
    (surface,) = plain([force.getSurfaceAreaEnergy()])
    integral = (
        "select(step(r+sr2-or1), 0.5*(1/L-1/U+0.25*(r-sr2^2/r)*(1/U^2-1/L^2)+0.5*log(L/U)/r), 0)"
        "+ step(sr2-r-or1)*(1/or1-1/L); U=r+sr2; L=max(or1, abs(r-sr2))"
    )
    born = "1/(1/or-tanh(psi-0.8*psi^2+4.85*psi^3)/radius); psi=I*or; radius=or+offset"
    texts = [
        ("I", integral, False),
        ("B", born, True),
        (None, "-0.5*prefactor*charge^2/B + 12.566370614359172*surface*(or+offset+0.14)^2*((or+offset)/B)^6", True),
        (None, "-prefactor*charge1*charge2/sqrt(r^2+B1*B2*exp(-r^2/(4*B1*B2)))", False),
    ]
    steps = [Step(parse_expression(force, text), single, False, name) for name, text, single in texts]
    table = {"charge": charge, "or": radius - offset, "sr": scale * (radius - offset)}
    constants = {"offset": offset, "prefactor": prefactor, "surface": float(surface)}
    nothing = np.zeros(len(pairs), dtype=bool)
    return PairExpressions("GBSAOBCForce", table, steps, nothing, constants, pairs)


def read_custom_nonbonded(force: Any, parameters: Mapping[str, float], pairs: Pairs) -> PairExpressions:
    """The term of an openmm.CustomNonbondedForce without cutoff.

    Raises:
        UnsupportedForce: a cutoff, interaction groups, computed values, or a continuous tabulated function.
        ValueError: an expression that cannot be read.
    """
    if force.getNonbondedMethod() != force.NoCutoff:
        raise UnsupportedForce("CustomNonbondedForce with a cutoff has no batched form; use OpenMMEnergy")
    if force.getNumInteractionGroups() or force.getNumComputedValues():
        what = "interaction groups" if force.getNumInteractionGroups() else "computed values"
        raise UnsupportedForce(f"CustomNonbondedForce with {what} has no batched form; use OpenMMEnergy")
    names = [force.getPerParticleParameterName(k) for k in range(force.getNumPerParticleParameters())]
    expression = parse_expression(force, force.getEnergyFunction())
    shared = own_parameters(force, parameters)
    check_names(force, expression, ["r", *(f"{n}{i}" for n in names for i in "12"), *shared])
    excluded = [force.getExclusionParticles(k) for k in range(force.getNumExclusions())]
    rows = _excluded("CustomNonbondedForce", excluded, pairs)
    steps = [Step(expression, single=False, exclusions=True)]
    table = particle_table(force, names, pairs)
    return PairExpressions("CustomNonbondedForce", table, steps, rows, shared, pairs)


def particle_table(force: Any, names: Sequence[str], pairs: Pairs) -> dict[str, np.ndarray]:
    """The (A,) values of each per-particle parameter of a custom force."""
    n = check_particles(force, pairs)
    table = np.array([force.getParticleParameters(i) for i in range(n)], dtype=np.float64).reshape(n, len(names))
    return dict(zip(names, table.T, strict=True))


def _excluded(label: str, exclusions: Sequence[Sequence[int]], pairs: Pairs) -> np.ndarray:
    excluded = np.zeros(len(pairs), dtype=bool)
    for k, (i, j) in enumerate(exclusions):
        if not (0 <= i < pairs.n_atoms and 0 <= j < pairs.n_atoms):
            raise ValueError(
                f"{label}: exclusion {k} is of atoms {i} and {j}; the System has atoms 0 to {pairs.n_atoms - 1}"
            )
        if i != j:
            excluded[pairs.row(i, j)] = True
    return excluded


def _swap(name: str) -> str:
    return name[:-1] + ("2" if name.endswith("1") else "1")


def _spread(value: Tensor | float, like: Tensor) -> Tensor:
    """The value in the shape of `like`, also where it does not depend on positions."""
    return value.expand_as(like) if isinstance(value, Tensor) else torch.full_like(like, value)
