"""The flows of figure 3: what they are, and the energy that each has taken for U."""

import numpy as np
import pytest
import torch

from openmm_tsf.architecture import FlowSettings
from openmm_tsf.flow import build_vector_flow
from openmm_tsf.portraits import of_reference
from openmm_tsf.reference import load_reference
from openmm_tsf.steering_study import FLOWS, Study, energy_curve, share_table, training_of
from openmm_tsf.vectors import Samples


def vector_flow(settings):
    x = np.random.default_rng(0).normal(size=(200, 7))
    generator = torch.Generator().manual_seed(1)
    return build_vector_flow(7, Samples(x, 2.0), settings, generator=generator)


@pytest.mark.parametrize("name", ["tsf", "entropy"])
def test_the_energy_behind_a_gaussian_is_a_straight_line_and_behind_quartic_wells_it_is_not(name):
    """With momenta or without, the slope is half the number of coordinates."""
    flow = vector_flow(FlowSettings(blocks=1, hidden=8, **FLOWS[name]))
    if name == "entropy":
        with torch.no_grad():
            flow.prior.stiff.coefficients[1] = -1.5
    slopes = np.array([row["heat_capacity"] for row in energy_curve(flow, [1.0, 2.0, 3.0, 4.0])])
    assert (abs(slopes / 3.5 - 1.0).max() < 1e-6) == (name == "tsf")


def test_flows_of_the_paper_have_the_plain_gradient():
    assert {name: training_of(name, 100).estimator for name in FLOWS} == {
        "real-nvp": "plain", "tsf": "plain", "no-entropy": "path", "entropy": "path"
    }  # fmt: skip


def test_table_has_means_and_errors_over_seeds():
    exact = of_reference(load_reference("ala2"), model="ff96-obc1")
    portraits = [exact.at(300.0), exact.at(600.0)]
    made = [
        Study(
            "ff96-obc1", "entropy", seed, 10, 100, 5, 1000, 1.0, {},
            *([type(p)(**{**p.__dict__, "positive": factor * p.positive, "ess": 0.5}) for p in portraits],) * 2, [],
        )
        for seed, factor in ((1, 0.9), (2, 1.1))
    ]  # fmt: skip
    assert Study.from_json(made[0].to_json()) == made[0]
    lines = share_table([exact], made).splitlines()
    assert len(lines) == 4
    assert "4.014 +- 0.028" in lines[1]
    assert lines[2].split()[-2:] == ["0.215", "0.676"]
    assert lines[3].split()[4:10] == ["0.318", "+-", "0.032", "1.000", "+-", "0.000"]
    assert lines[3].endswith("50.0")
