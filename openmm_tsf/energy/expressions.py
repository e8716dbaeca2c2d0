"""Expressions of OpenMM's custom forces, with their tabulated functions."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import openmm
import torch
from torch import Tensor

from openmm_tsf.energy.lepton import Expression, ExpressionError, parse
from openmm_tsf.energy.unsupported import UnsupportedForce


def parse_expression(force: Any, text: str) -> Expression:
    """An expression of a custom force, ready to be evaluated.

    Discrete tabulated functions are supported: they are lookups by a parameter, like an atom type. Continuous ones are
    not.

    Raises:
        UnsupportedForce: the text calls a continuous tabulated function.
        ExpressionError: it cannot be read.
    """
    label, tables = type(force).__name__, {}
    for k in range(force.getNumTabulatedFunctions() if hasattr(force, "getNumTabulatedFunctions") else 0):
        name, table = force.getTabulatedFunctionName(k), force.getTabulatedFunction(k)
        kind = type(table).__name__
        if kind.startswith("Discrete"):
            tables[name] = _lookup(table)
        elif re.search(rf"(?<![\w]){re.escape(name)}\(", text):
            raise UnsupportedForce(
                f"{label}: {name} is a tabulated {kind}, which has no batched form; use OpenMMEnergy"
            )
    try:
        return parse(text, tables)
    except ExpressionError as error:
        raise ExpressionError(f"{label}: {error}") from error


def check_names(force: Any, expression: Expression, known: Collection[str]) -> None:
    """Refuse an expression with names that mean nothing.

    Raises:
        ExpressionError: with the unknown names and the known ones.
    """
    unknown = sorted(expression.variables - set(known))
    if unknown:
        raise ExpressionError(
            f"{type(force).__name__}: unknown name {', '.join(unknown)} in {expression.text!r}; "
            f"known here: {', '.join(sorted(known))}"
        )


def own_parameters(force: Any, parameters: Mapping[str, float]) -> dict[str, float]:
    """Values of the global parameters that a force declares, the only ones that its expressions may use."""
    names = [force.getGlobalParameterName(k) for k in range(force.getNumGlobalParameters())]
    return {name: parameters[name] for name in names}


def _lookup(table: Any) -> Callable[..., Tensor]:
    """A discrete tabulated function of tensors; its derivative is zero, as in OpenMM."""
    parameters = table.getFunctionParameters()
    one = isinstance(table, openmm.Discrete1DFunction)
    sizes, values = ((len(parameters),), parameters) if one else (parameters[:-1], parameters[-1])
    array = np.asarray(values, dtype=np.float64)

    def look_up(*arguments: Tensor) -> Tensor:
        index, stride = 0, 1
        for argument, size in zip(arguments, sizes, strict=True):  # the first index runs fastest
            place = torch.nan_to_num(argument.detach()).round().clamp(0, size - 1)  # OpenMM keeps to the table too
            index = index + place.to(torch.int64) * stride
            stride *= size
        found = torch.as_tensor(array, dtype=arguments[0].dtype, device=arguments[0].device)[index]
        return found + 0.0 * sum(argument.detach() for argument in arguments)  # what is not a number stays none

    return look_up
