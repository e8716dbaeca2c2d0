"""Sparse linear maps along the first axis, as gathers in both directions.

A force field gathers atoms into bonds, angles and pairs, and its gradient sums what they got back onto the atoms. The
usual scatter for that is slow and, on GPUs, not reproducible. With fixed indices the sum is a gather too: from a table
that lists, for each atom, the rows it went to. Both directions read and write along the last, contiguous axis only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class SparseMap(nn.Module):
    """y[r] = sum_k coefficient[k, r] * x[column[k, r]], for x of shape (columns, ..., batch).

    The gradient is the transposed map, which is a SparseMap of the same kind, so any order of derivative exists.

    Args:
        columns: for each row the columns that it sums.
        n_columns: number of columns.
        coefficients: for each row the factors, ones by default.
    """

    def __init__(
        self,
        columns: Sequence[Sequence[int]],
        n_columns: int,
        coefficients: Sequence[Sequence[float]] | None = None,
    ) -> None:
        super().__init__()
        coefficients = coefficients or [[1.0] * len(row) for row in columns]
        rows_of: list[list[int]] = [[] for _ in range(n_columns)]
        back: list[list[float]] = [[] for _ in range(n_columns)]
        for r, (row, factors) in enumerate(zip(columns, coefficients, strict=True)):
            for column, factor in zip(row, factors, strict=True):
                rows_of[column].append(r)
                back[column].append(factor)
        self._add("forward", columns, coefficients)
        self._add("backward", rows_of, back)
        self._gather = _simplest(self.forward_index, self.forward_factor)

    def forward(self, x: Tensor) -> Tensor:
        """Rows (rows, ..., batch) of columns (columns, ..., batch)."""
        return self._gather(x, *self._tables("forward"), *self._tables("backward"))

    def transposed(self, y: Tensor) -> Tensor:
        """The transposed map: columns (columns, ..., batch) from rows (rows, ..., batch)."""
        return _Apply.apply(y, *self._tables("backward"), *self._tables("forward"))

    def _add(self, name: str, entries: Sequence[Sequence[int]], factors: Sequence[Sequence[float]]) -> None:
        # (k, rows) and not (rows, k): inductor then vectorises over the batch, which is six times as fast
        width = max([1, *map(len, entries)])
        index = np.zeros((width, len(entries)), dtype=np.int64)
        factor = np.zeros((width, len(entries)))
        for r, (row, values) in enumerate(zip(entries, factors, strict=True)):
            index[: len(row), r], factor[: len(row), r] = row, values
        self.register_buffer(f"{name}_index", torch.from_numpy(index))
        self.register_buffer(f"{name}_factor", None if (factor == 1.0).all() else torch.from_numpy(factor))

    def _tables(self, name: str) -> tuple[Tensor, Tensor | None]:
        return getattr(self, f"{name}_index"), getattr(self, f"{name}_factor")


def take(index: Sequence[int], n_columns: int) -> SparseMap:
    """The map that takes one column for each row; its transpose sums rows onto the columns they came from."""
    return SparseMap([[i] for i in index], n_columns)


def differences(first: Sequence[int], second: Sequence[int], n_columns: int) -> SparseMap:
    """The map x[second] - x[first]."""
    return SparseMap(list(zip(first, second, strict=True)), n_columns, [(-1.0, 1.0)] * len(first))


def _simplest(index: Tensor, factor: Tensor | None) -> Callable[..., Tensor]:
    if len(index) == 1 and factor is None:
        return _Take.apply
    if len(index) == 2 and factor is not None and bool((factor == factor.new_tensor([[-1.0], [1.0]])).all()):
        return _Difference.apply
    return _Apply.apply


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, index: Tensor, factor: Tensor | None, back: Tensor, back_factor: Tensor | None
    ) -> Tensor:
        ctx.tables = index, factor, back, back_factor
        if len(x) == 0:  # nothing to sum, as of the pairs of one atom
            return x.new_zeros(index.shape[1], *x.shape[1:])
        gathered = x[index]
        if factor is not None:
            gathered = gathered * factor.reshape(*factor.shape, *[1] * (x.ndim - 1))
        return gathered.sum(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        index, factor, back, back_factor = ctx.tables
        return _Apply.apply(grad, back, back_factor, index, factor), None, None, None, None


class _Take(torch.autograd.Function):
    """x[index[0]], without a sum: inductor inlines this into what comes after."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, factor: None, back: Tensor, back_factor: Tensor | None) -> Tensor:
        ctx.tables = index, factor, back, back_factor
        return x[index[0]]

    backward = _Apply.backward


class _Difference(torch.autograd.Function):
    """x[index[1]] - x[index[0]], without a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, factor: Tensor, back: Tensor, back_factor: Tensor) -> Tensor:
        ctx.tables = index, factor, back, back_factor
        return x[index[1]] - x[index[0]]

    backward = _Apply.backward
