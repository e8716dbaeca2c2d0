"""The checks of shapes that all tests have: a wrong shape is an error, in every test anew."""

import os

import pytest
import shape_checks
import torch
from jaxtyping import TypeCheckError

from openmm_tsf.weights import weighted_mean

pytestmark = pytest.mark.skipif(os.environ.get("OPENMM_TSF_CHECK_SHAPES") == "0", reason="asked to do without")


@pytest.mark.parametrize("time", ["first", "second"])
def test_a_wrong_shape_is_an_error_in_the_first_calls_of_a_test(time):
    weights = torch.full((4,), 0.25)
    for _ in range(shape_checks.CALLS - 1):
        weighted_mean(weights, torch.ones(4, 2))
    with pytest.raises(TypeCheckError, match="weighted_mean"):
        weighted_mean(weights, torch.ones(3, 2))
    with pytest.raises(IndexError, match="mask"):  # torch's own: further calls are those of a loop
        weighted_mean(weights, torch.ones(3, 2))
