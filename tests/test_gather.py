"""Sparse maps along the first axis: values, transposes and derivatives against dense matrices."""

import pytest
import torch

from openmm_tsf.energy.gather import SparseMap, differences, take

ROWS = [[0, 2], [3], [], [1, 1, 2], [3, 0]]
FACTORS = [[1.0, -2.0], [0.5], [], [1.0, 1.0, 3.0], [-1.0, 1.0]]
N = 5  # one column more than is used


def dense(rows, factors):
    matrix = torch.zeros(len(rows), N)
    for r, (row, values) in enumerate(zip(rows, factors, strict=True)):
        for column, value in zip(row, values, strict=True):
            matrix[r, column] += value
    return matrix


MAPS = {
    "general": (SparseMap(ROWS, N, FACTORS), dense(ROWS, FACTORS)),
    "ones": (SparseMap(ROWS, N), dense(ROWS, [[1.0] * len(row) for row in ROWS])),
    "take": (take([2, 2, 0, 4], N), dense([[2], [2], [0], [4]], [[1.0]] * 4)),
    "differences": (differences([0, 1], [3, 4], N), dense([[0, 3], [1, 4]], [[-1.0, 1.0]] * 2)),
}


@pytest.fixture(params=MAPS)
def pair(request):
    """A map and its matrix."""
    mapped, matrix = MAPS[request.param]
    return mapped.to(torch.float64), matrix.double()


@pytest.mark.parametrize("shape", [(7,), (3, 4)])
def test_both_directions_are_products_with_the_matrix(pair, shape, generator):
    mapped, matrix = pair
    x = torch.randn(matrix.shape[1], *shape, generator=generator)
    y = torch.randn(matrix.shape[0], *shape, generator=generator)
    torch.testing.assert_close(mapped(x), torch.einsum("rc,c...->r...", matrix, x))
    torch.testing.assert_close(mapped.transposed(y), torch.einsum("rc,r...->c...", matrix, y))


def test_derivatives_of_first_and_second_order(pair, generator):
    mapped, matrix = pair
    x = torch.randn(matrix.shape[1], 3, generator=generator).requires_grad_()
    y = torch.randn(matrix.shape[0], 3, generator=generator).requires_grad_()
    for function, value in ((lambda v: mapped(v) ** 3, x), (lambda v: mapped.transposed(v) ** 3, y)):
        assert torch.autograd.gradcheck(function, value)
        assert torch.autograd.gradgradcheck(function, value)


def test_no_rows_and_no_columns_sum_to_zero():
    nothing = take([], 3)
    assert nothing(torch.ones(3, 2)).shape == (0, 2)
    assert torch.equal(nothing.transposed(torch.ones(0, 2)), torch.zeros(3, 2))


def test_what_is_not_finite_stays_in_its_column_of_the_batch():
    x = torch.ones(N, 2)
    x[0, 1] = torch.nan  # what rows are padded with
    assert torch.isfinite(MAPS["general"][0].double()(x)[:, 0]).all()
