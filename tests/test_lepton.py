"""Custom expressions: language, values and derivatives as OpenMM's Reference platform has them; errors; structure."""

import copy
import math
import re
from collections import Counter
from functools import cache

import numpy as np
import openmm
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from openmm import unit
from openmm.app.internal import customgbforces
from torch.fx.experimental.proxy_tensor import make_fx

from openmm_tsf.energy import graph
from openmm_tsf.energy.lepton import FUNCTIONS, ExpressionError, parse


def reference(force: openmm.Force, n_atoms: int) -> openmm.Context:
    system = openmm.System()
    for _ in range(n_atoms):
        system.addParticle(12.0)
    system.addForce(force)
    platform = openmm.Platform.getPlatformByName("Reference")
    return openmm.Context(system, openmm.VerletIntegrator(0.001), platform)


def state(context: openmm.Context, positions) -> tuple[float, np.ndarray]:
    """Energy and its gradient (atoms, 3)."""
    context.setPositions(np.asarray(positions, dtype=np.float64))
    found = context.getState(energy=True, forces=True)
    forces = found.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)
    return found.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole), -forces


def openmm_bond(text: str, distances, **constants: float) -> list[tuple[float, float]]:
    """Value and derivative by r of an expression, according to OpenMM."""
    force = openmm.CustomBondForce(text)
    for name, value in constants.items():
        force.addGlobalParameter(name, value)
    force.addBond(0, 1, [])
    context = reference(force, 2)
    states = [state(context, [[0.0, 0.0, 0.0], [r, 0.0, 0.0]]) for r in distances]
    return [(energy, gradient[1, 0]) for energy, gradient in states]


def openmm_refuses(text: str) -> bool:
    try:
        openmm_bond(text, [1.0])
    except openmm.OpenMMException:
        return True
    return False


def ours(text: str, distances, **constants: float) -> list[tuple[float, float]]:
    """The same, all distances at once."""
    expression = parse(text)
    r = torch.tensor(list(distances), requires_grad=True)
    values = expression({"r": r, **constants}) * torch.ones_like(r)
    gradient = torch.autograd.grad(values.sum(), r, allow_unused=True)[0] if values.requires_grad else None
    return list(zip(values.tolist(), (torch.zeros_like(r) if gradient is None else gradient).tolist(), strict=True))


def assert_same(text: str, distances, tolerance: float = 1e-12, **constants: float) -> None:
    """The same energies, infinite and nan ones too; the same derivatives wherever OpenMM has one."""
    for r, (e, de), (f, df) in zip(
        distances, openmm_bond(text, distances, **constants), ours(text, distances, **constants), strict=True
    ):
        assert f == pytest.approx(e, rel=tolerance, abs=tolerance, nan_ok=True), (text, r)
        if not math.isnan(de):
            assert df == pytest.approx(de, rel=tolerance, abs=tolerance), (text, r)


def operations(text: str) -> Counter:
    return Counter(op for _, (op, _) in parse(text).program)


DISTANCES = [0.25, 0.5, 1.0, 1.7, 2.0, 3.1]  # 1 and 2 are where the expressions below have their corners

# --- the language -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    {
        "2^3^2": 512.0,
        "-2^2": -4.0,
        "2^-1": 0.5,
        "2^-2^2": 0.0625,
        "-2^-2": -0.25,
        "2*-3^2": -18.0,
        "12/4*3": 9.0,
        "2/3/4": 1 / 6,
        "7-3-2": 2.0,
        "2--3": 5.0,
        "--3": 3.0,
        "-3-2": -5.0,
        "-6/3*2": -4.0,
        "2+3*4^2": 50.0,
        "(2+3)*4": 20.0,
        " 1 +\n\t2 ": 3.0,
        "1": 1.0,
        "1.": 1.0,
        ".5": 0.5,
        "1e-3": 0.001,
        "2.5E+3": 2500.0,
        "1.5e2": 150.0,
        "1e400": 1.7976931348623157e308,
        "0^0": 1.0,
        "1/0": math.inf,
        "log(0)": -math.inf,
        "step(0)": 1.0,
        "step(-0)": 1.0,
        "delta(0)": 1.0,
        "select(0, 1, 2)": 2.0,
        "select(1e-300, 1, 2)": 1.0,
        "select(-1, 1, 2)": 1.0,
    }.items(),
)
def test_numbers_precedence_and_association(text, value):
    folded = parse(text)
    assert folded.variables == frozenset()
    assert isinstance(folded({}), float)
    assert folded({}) == pytest.approx(value, rel=1e-15)
    assert len(folded.program) == 1
    assert openmm_bond(text, [1.0])[0][0] == pytest.approx(value, rel=1e-15)


def test_not_a_number_folds_too():
    # No comparison: OpenMM 8.6 does not return from a constant that is not a number.
    assert math.isnan(parse("sqrt(-1)")({}))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function(name):
    inner = {1: ["r-1", "1-r", "r", "r/4", "-r/4"], 2: ["r, 2", "2, r", "r-1, 2-r", "2*r, r+1"]}
    inner[3] = ["r-1, r^2, 3*r", "2-r, 5, r", "step(r-1), sin(r), 4"]
    for arguments in inner[FUNCTIONS[name]]:
        assert_same(f"{name}({arguments})", DISTANCES)
        assert_same(f"1.5*{name}({arguments})^2 + r", DISTANCES)


@pytest.mark.parametrize("name", ["log10", "log2", "sign", "round", "pow", "mod", "Sin", "exp2", "clamp", "atan3"])
def test_there_are_no_other_functions(name):
    assert openmm_refuses(f"{name}(r)")
    with pytest.raises(ExpressionError, match=f"'{name}' at character 1 .*unknown function.* known are sqrt, exp, log"):
        parse(f"{name}(r)")


@pytest.mark.parametrize(
    "text",
    """r*a; a = b; b = 3; a = 7|a; b = 2; a = b*r; b = 3|r; r = r + 1|r; r = 2*r; r = r + 1|r;|r;; a = 2 ;
r; unused = foo|0*foo + r|foo - foo + r|r + foo/foo|(foo*0) + r|a.b*c'; a.b = r; c' = 2|x_1 + or; x_1 = r; or = 4
-U^2/2; U = r - a; a = 1|select(c, e1, e2); c = step(r - 1); e1 = r^2; e2 = 1""".replace("\n", "|").split("|"),
)
def test_definitions_and_names(text):
    assert parse(text).variables == {"r"}
    assert_same(text, DISTANCES)


def test_definitions_cannot_go_round_in_circles():
    # What is defined to the left of its use is free; the caller, like OpenMM, will not know the name.
    for text, names in (("a + r; a = b; b = a", {"a", "r"}), ("a + r; b = 2; a = b", {"b", "r"})):
        assert parse(text).variables == names
        assert openmm_refuses(text)


# --- values and derivatives -------------------------------------------------------------------------------------------

ODD = """min(r, 1)|min(1, r)|max(r, 1)|max(1, r)|min(2*r, r + 1)|max(2*r, r + 1)|min(r + 1, 2*r)|max(r + 1, 2*r)
abs(r - 1)|abs(1 - r)|abs(-(r - 1))|step(r - 1)|step(1 - r)*r|delta(r - 1)*r|r*step(r - 1)*(r - 1)^2|(1 - step(r - 2))*r
select(r - 1, 2*r, 3)|select(delta(r - 1), 1, 1/(r - 1))|select(step(r - 2), sqrt(r - 1), 0)|select(r - 1, 1/(r - 1), 0)
select(step(r - 2), select(step(r - 1), log(r - 1), 1/(r - 1)), 3) + r|select(step(1 - r), r, log(r - 1))
select(step(r - 1), sqrt(r - 1), sqrt(1 - r))|select(0, 1/(r - 1), r)|select(1 - 1, 1/(r - 1), r)|select(r, r^2, r^2)
max(0, 1/(r - 1))|min(3, 1/(r - 1))|min(1/(r - 1), 3)|max(sqrt(r - 1), 1)|max(1, sqrt(r - 1))|min(sqrt(r - 1), 1)
floor(1/(r - 1))|floor(r)*r|ceil(r)*r|floor(-r)|0*(1/(r - 1))|(r - 1)/(r - 1)|(r - 1) - (r - 1)|0/(r - 1)
0^(r - 1)|1^(r - 1)|(r - 1)^0|(r - 1)^1|(r - 1)^2|(r - 1)^3|(r - 1)^-1|(r - 1)^-2|(r - 2)^-3|(r - 2)^7|r^-6|r^12 - r^6
(r - 1)^0.5|(r - 1)^1.5|(r - 1)^2.5|(r - 1)^7.5|(r - 1)^-0.5|(r - 1)^-1.5|(r - 1)^-2.5|r^64.5|r^-100|r^1000|r^65
r^(1/6)|(r - 2)^(1/3)|r^0.3|2^r|r^r|(r - 1)^(r + 1)|r^-0.7|(2*r)^(3 - r)|0.5^(2*r - 1)|(r - 1)^1e-3
sqrt((r - 1)^2)|sqrt((1 - r)*(1 - r))|sqrt(r - 1)^2|sqrt(r - 1)*sqrt(r - 1)|1/sqrt(r - 1)|sqrt(1/r)|recip(sqrt(r))^2
1/(1/(r - 1))|recip(recip(r))|1/r^2 + 1/r|1/(r*r*r)|3*r*4*r/7|r/3*5|2*(3*(r*4))|-(-r)|-(2*r)|r*-1|r - -r|r + -r
r/0|0 - r|r - 0|r + 0|0 + r|1*r|r*1|r*r*r*r|exp(-r^2/(4*2*3))|1 - 2*r|square(r - 1)*cube(1 - r)|exp(1000*r)|r/1e300
atan2(r - 1, 1)|atan2(1, r - 1)|atan2(0, r - 2)|asin(r/2)|acos(r - 1)|tan(r)*cot(r)|sec(r)/csc(r)|erf(r) - erfc(r)
step(r - 2)*sqrt(r - 0.5)|delta(r - 1)*exp(r)|step(r - 1)*step(2 - r)*log(r)|k*step(r - 1)*(r - 1)^3; k = 0.5*8"""


@pytest.mark.parametrize("text", ODD.replace("\n", "|").split("|"))
def test_corners(text):
    assert_same(text, DISTANCES)


def test_corners_would_be_missed_by_plain_torch():
    r = torch.tensor([1.0], requires_grad=True)
    plain = {
        "abs(r - 1)": torch.abs(r - 1),
        "max(r, 1)": torch.maximum(r, torch.ones(1)),
        "select(step(r - 2), sqrt(r - 1), 0)": torch.where(r >= 2, torch.sqrt(r - 1), 0.0),
        "(r - 1)^1.5": (r - 1) * torch.sqrt(r - 1),
    }
    for text, value in plain.items():
        ((_, slope),) = openmm_bond(text, [1.0])
        assert torch.autograd.grad(value.sum(), r)[0].item() != slope
        assert ours(text, [1.0])[0][1] == slope


@pytest.mark.parametrize(
    "text",
    [
        "select(step(d - 1), (d - 1)^2, 0); d = sqrt(x^2 + y^2 + z^2)",
        "max(0, d - 1)^2; d = sqrt((x - x0)^2 + (y - y0)^2 + (z - z0)^2)",
        "max(0, d - 1)^2 + z; d = (x*x + y*y + z*z)^0.5",
        "x^2*y - exp(z)*min(x, y)/(1 + z^2)",
    ],
)
def test_restraints_of_a_point(text):
    force = openmm.CustomExternalForce(text)
    for name in ("x0", "y0", "z0"):
        force.addGlobalParameter(name, 0.0)
    force.addParticle(0, [])
    context, expression = reference(force, 1), parse(text)
    for point in ([0.0, 0.0, 0.0], [0.0, 0.0, 2.0], [0.3, -0.4, 0.0], [1.5, 2.0, -0.7]):
        energy, gradient = state(context, [point])
        position = torch.tensor(point, requires_grad=True)
        value = expression({**dict(zip("xyz", position, strict=True)), "x0": 0.0, "y0": 0, "z0": 0.0})
        assert value.item() == pytest.approx(energy, abs=1e-13)
        assert np.isfinite(gradient).all()
        torch.testing.assert_close(torch.autograd.grad(value, position)[0], torch.tensor(gradient[0]))


SHIELDED = {
    "step(r - 2)*sqrt(r - 1)": "step(r - 2)*(r - 1)",  # 0 in both, with slope 0
    "r*step(r - 2)*3*sqrt(r - 1)": "step(r - 2)",
    "step(1.5 - r)*step(r - 2)*sqrt(r - 1)": "0",
    "delta(r - 7)*sqrt(r - 1)*r": "0",
    "select(r - 1, 0, 2) + select(step(r - 2), u, 0) + select(delta(r - 9), u^2, 0); u = sqrt(r - 1)": "2",
    "select(step(r - 2), select(step(r - 1), u, u^3), 4); u = 1/(1 + sqrt(r - 1))": "4",
    "select(step(u - 1), u*r, 5); u = sqrt(r - 1)": "5",
}


@pytest.mark.parametrize("text", SHIELDED)
def test_what_is_not_taken_leaves_no_nan(text, monkeypatch):
    ((_, slope),) = ours(SHIELDED[text], [1.0])
    assert slope == 0.0
    assert ours(text, [1.0])[0][1] == 0.0
    monkeypatch.setitem(graph._TENSORS, "if", lambda wanted, x: x)
    assert math.isnan(ours(text, [1.0])[0][1])


def test_infinite_slopes_that_are_taken_stay():
    assert ours("select(step(r - 1), sqrt(r - 1), 0)", [1.0]) == [(0.0, math.inf)]
    assert ours("step(r - 1)*sqrt(r - 1)", [1.0]) == [(0.0, math.inf)]
    assert ours("select(step(r - 2), 0, u) + u; u = sqrt(r - 1)", [1.0]) == [(0.0, math.inf)]


def test_guards_take_operands_of_fewer_dimensions():
    r = torch.tensor([1.0, 1.5, 3.0])
    k = torch.zeros(2, 1, requires_grad=True)
    value = parse("select(step(r - 2), sqrt(k + r - 2)*k, 0)")({"r": r, "k": k})
    assert value.shape == (2, 3)
    (gradient,) = torch.autograd.grad(value.sum(), k)
    assert gradient.tolist() == [[1.0], [1.0]]  # of r = 3 alone


def test_twice_differentiable():
    expression = parse("select(step(r - 1), k*r^2.5/(1 + exp(-r)), sqrt(1 - r)) + max(r, 1)^3 + step(r - 2)*log(r - 1)")
    r = torch.tensor([0.4, 1.0, 1.7, 2.6], requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda r: expression({"r": r, "k": 2.0}), r[[0, 2, 3]])
    (slope,) = torch.autograd.grad(expression({"r": r, "k": 2.0}).sum(), r, create_graph=True)
    assert torch.autograd.grad(slope.sum(), r)[0].isfinite().all()


# --- random expressions -----------------------------------------------------------------------------------------------


def combined(inner):
    unary = st.sampled_from(
        [name for name, n in FUNCTIONS.items() if n == 1 and name not in ("sec", "csc", "tan", "cot")]
    )
    return st.one_of(
        st.builds("({}{}{})".format, inner, st.sampled_from([" + ", "-", "*", "/"]), inner),
        st.builds("{}{}{}".format, inner, st.sampled_from([" + ", "-", "*", "/"]), inner),
        st.builds("({})^{}".format, inner, st.sampled_from(["2", "-1", "3", "0.5", "-1.5", "-6", "2.5", "(1/3)"])),
        st.builds("-{}".format, inner),
        st.builds("{}({})".format, unary, inner),
        st.builds("{}({}, {})".format, st.sampled_from(["min", "max", "atan2"]), inner, inner),
        st.builds("select(step({}), {}, {})".format, inner, inner, inner),
    )


H = 1e-13
LEAVES = st.sampled_from(["r", "r", "k", "0.7", "2", "1.5e-1", "r^2", "a", "b"])


def in_python(text: str, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """An expression without definitions as Python and torch read it."""

    def flag(name: str):
        return lambda x: getattr(x, name)(0.0).to(x.dtype)

    functions = {name: getattr(torch, name) for name in FUNCTIONS if hasattr(torch, name)}
    functions |= {"min": torch.minimum, "max": torch.maximum, "step": flag("ge"), "delta": flag("eq")}
    functions |= {"cube": lambda x: x**3, "recip": lambda x: 1 / x, "select": lambda c, x, y: torch.where(c != 0, x, y)}
    python = re.sub(r"(?<![a-z])\d[\d.]*(e-?\d+)?", r"number(\g<0>)", text).replace("^", "**")
    return eval(python, {"number": torch.tensor, **functions, **values})


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.recursive(LEAVES, combined, max_leaves=12), st.recursive(LEAVES, combined, max_leaves=4))
@example("-a^2", "r - k")
@example("r/a", "-r")
def test_random_expressions(text, a):
    # Against Python, which binds powers and signs alike; OpenMM would not return from a constant like 0/0.
    expression = parse(f"{text}; a = {a}; b = r*k - 1")

    def inlined(text: str, a: str) -> str:
        return re.sub(r"\b[ab]\b", lambda m: {"a": a, "b": "(r*k - 1)"}[m[0]], text)

    def value_and_slope(function, shift: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        r = (torch.tensor([0.3, 0.9, 1.6]) * (1 + shift)).requires_grad_(True)
        value = function({"r": r, "k": torch.tensor(1.3), "a": torch.tensor(0.4)}) + 0 * r.detach()
        slope = torch.autograd.grad(value.sum(), r, allow_unused=True)[0] if value.requires_grad else None
        return value.detach(), torch.zeros_like(r) if slope is None else slope

    def python(values: dict[str, torch.Tensor]) -> torch.Tensor:
        return in_python(inlined(text, f"({inlined(a, 'a')})"), values)

    found, wanted, low, high = (value_and_slope(f, h) for f, h in ((expression, 0), *((python, h) for h in (0, -H, H))))
    for ours_, theirs, *bounds in zip(found, wanted, low, high, strict=True):
        # Rounding on the way may do as much as a change in the last digits of r; a jump there says nothing.
        error = sum((theirs - bound).abs() for bound in bounds)
        sound = theirs.isfinite() & (error < 1e-8 * (1 + theirs.abs()))
        assert ((ours_ - theirs).abs() <= 1e-9 * (1 + theirs.abs()) + 10 * error)[sound].all(), (ours_, theirs)


# --- expressions as they occur ----------------------------------------------------------------------------------------

SOFT_CORE = """
4*epsilon*lambda*x*(x - 1.0); x = (sigma/reff)^6; reff = sigma*(0.5*(1.0 - lambda) + (r/sigma)^6)^(1/6)|
U; U = lambda*4*epsilon*x*(x - 1.0); x = (sigma/reff)^c; reff = sigma*((a*(1.0 - lambda)^b + (r/sigma)^c))^(1/c);
    a = 0.5; b = 1; c = 6|
select(step(r - rlj), 4*epsilon*x*(x - 1.0), quadratic); x = (sigma/r)^6;
    quadratic = force*(((r - rlj)^2)/2 - (r - rlj)) + cut; force = 24*epsilon*(2*w^2 - w)/rlj;
    cut = 4*epsilon*w*(w - 1);
    w = (sigma/rlj)^6; rlj = 0.85*((26/7)*sigma^6*lambda)^(1/6)|
select(step(r - rs), S*lj, lj); S = 1 - 6*t^5 + 15*t^4 - 10*t^3; t = (r - rs)/(rc - rs); rs = 0.5; rc = 3;
    lj = 4*epsilon*((sigma/r)^12 - (sigma/r)^6)|
step(rc - r)*138.935456*lambda*(1/r + krf*r^2 - crf); krf = (1/rc^3)*((78.3 - 1)/(2*78.3 + 1));
    crf = (1/rc)*((3*78.3)/(2*78.3 + 1)); rc = 1.2|
0.5*k*max(0, abs(r - 1) - 0.5)^2; k = 100*lambda|
step(r - 1)*(epsilon/2)*(r - 1)^2 + step(0.5 - r)*(epsilon/2)*(r - 0.5)^2|
epsilon*(1 - exp(-2*(r - sigma)))^2|138.935456/r*erfc(3*r)*lambda"""


@pytest.mark.parametrize("text", SOFT_CORE.split("|"))
@pytest.mark.parametrize("lambda_", [0.0, 0.3, 1.0])
def test_pair_potentials(text, lambda_):
    constants = {"epsilon": 0.65, "sigma": 0.315, "lambda": lambda_}
    distances = [0.05, 0.31, 0.5, 1.0, 1.2, 2.9]
    if lambda_ == 0.0 and "rlj)" in text:
        distances = distances[1:]  # 0/0 there
    assert_same(text, distances, **constants, tolerance=1e-11)


@cache
def born_force(model: str, kappa: float) -> openmm.CustomGBForce:
    """The force of one of Amber's models for alanine dipeptide, with charges of every sign."""
    from openmm_tsf.systems import alanine_dipeptide

    topology = alanine_dipeptide().topology
    force = getattr(customgbforces, model)(SA="ACE", kappa=kappa)
    charges = np.linspace(-0.6, 0.5, topology.getNumAtoms())
    force.addParticles(np.column_stack([charges, force.getStandardParameters(topology)]))
    force.finalize()
    return force


def lookup(table: openmm.Discrete2DFunction):
    rows, _, values = table.getFunctionParameters()
    return lambda i, j: torch.tensor(values)[(i + rows * j).round().long()]


def born_energy(force: openmm.CustomGBForce, positions: torch.Tensor) -> torch.Tensor:
    """Energy of a CustomGBForce from its own text, all ordered pairs at once."""
    n = force.getNumParticles()
    names = [force.getPerParticleParameterName(i) for i in range(force.getNumPerParticleParameters())]
    table = torch.tensor([force.getParticleParameters(i) for i in range(n)])
    values = dict(zip(names, table.T, strict=True))
    tables = {
        force.getTabulatedFunctionName(i): lookup(force.getTabulatedFunction(i))
        for i in range(force.getNumTabulatedFunctions())
    }
    first, second = (~torch.eye(n, dtype=torch.bool)).nonzero().T
    r = (positions[first] - positions[second]).norm(dim=1)

    def pairs(text: str) -> torch.Tensor:
        sides = {f"{k}1": v[first] for k, v in values.items()} | {f"{k}2": v[second] for k, v in values.items()}
        return parse(text, tables)({"r": r, **sides})

    for i in range(force.getNumComputedValues()):
        name, text, kind = force.getComputedValueParameters(i)
        single = kind == force.SingleParticle
        found = parse(text, tables)(values) if single else torch.zeros(n).index_add(0, first, pairs(text))
        values[name] = found
    terms = [force.getEnergyTermParameters(i) for i in range(force.getNumEnergyTerms())]
    singles = sum(parse(text, tables)(values).sum() for text, kind in terms if kind == force.SingleParticle)
    return singles + sum(0.5 * pairs(text).sum() for text, kind in terms if kind != force.SingleParticle)


def assert_born(force: openmm.CustomGBForce, positions: np.ndarray) -> None:
    energy, gradient = state(reference(copy.deepcopy(force), force.getNumParticles()), positions)
    x = torch.tensor(positions, requires_grad=True)
    value = born_energy(force, x)
    assert value.item() == pytest.approx(energy, rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(value, x)[0], torch.tensor(gradient), rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("model", ["GBSAHCTForce", "GBSAOBC1Force", "GBSAOBC2Force", "GBSAGBnForce", "GBSAGBn2Force"])
@pytest.mark.parametrize("kappa", [0.0, 1.0])
def test_implicit_solvents(ala2, model, kappa):
    moved = ala2.positions + 0.02 * np.random.default_rng(4).normal(size=ala2.positions.shape)
    assert_born(born_force(model, kappa), moved)


@pytest.mark.filterwarnings("ignore")
def test_implicit_solvent_of_openmmtools(ala2):
    from openmmtools.testsystems import AlanineDipeptideImplicit

    system = AlanineDipeptideImplicit().system
    (force,) = [f for f in system.getForces() if isinstance(f, openmm.CustomGBForce)]
    assert_born(force, ala2.positions)


# --- errors -----------------------------------------------------------------------------------------------------------

WRONG = {
    "": "the end of '': a number, a name",
    " \n": "the end of ' .n': a number, a name",
    "; a = 1": "the end of '': a number, a name",
    "r; a = ": "the end of ' ': a number, a name",
    "r+": "the end of 'r[+]': a number",
    "+r": "'[+]' at character 1 of '[+]r': a number",
    "2*/r": "'/' at character 3",
    "(r": "the end of '[(]r': unbalanced parentheses",
    "sin(r": "the end .*unbalanced parentheses",
    "r)": "'[)]' at character 2 .* an operator or the end",
    "sin(r))": "'[)]' at character 7",
    "sin()": "'[)]' at character 5 .* a number",
    "sin (r)": "'[(]' at character 5 .* an operator or the end",
    "r r": "'r' at character 3",
    "2r": "'r' at character 2",
    "1.2.3": "'.3' at character 4",
    "1.5e0.5*r": "'.5' at character 6",
    "min(r, 1": "the end .*',' or '[)]'",
    "min(r)": "'min' at character 1 .*2 argument.*not 1",
    "sin(r, r)": "'sin' at character 1 .*1 argument.*not 2",
    "r; b + 1": "'name = expression' must follow ';', not 'b [+] 1'",
    "r; = 2": "'name = expression' must follow ';', not '= 2'",
    "r = 2": "'=' at character 3 of 'r = 2'",
    "r; a = b = 2": "'=' at character 4 of ' b = 2'",
    "1 + sqr(r)": "'sqr' at character 5 .*unknown function; did you mean sqrt[?]",
    "r*tanhh(r); a = 1": "did you mean tanh[?]",
    "r; a = 1 + qq(r)": "'qq' at character 6 of ' 1 [+] qq[(]r[)]': unknown function; known are sqrt",
    "r % 2": "'%' at character 3",
    "r\n2": "'2' at character 3",
}


@pytest.mark.parametrize("text", WRONG)
def test_errors_say_where_and_what(text):
    with pytest.raises(ExpressionError, match=WRONG[text]) as caught:
        parse(text)
    assert repr(text) in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert openmm_refuses(text)


@pytest.mark.parametrize("text", ["1e*r", "r*.", "r; 2 = 3", "r; a b = 3"])
def test_what_openmm_reads_without_a_word_is_an_error_here(text):
    assert not openmm_refuses(text)
    with pytest.raises(ExpressionError):
        parse(text)


def test_nesting_has_an_end():
    assert ours("(" * 100 + "r" + ")" * 100, [2.0]) == [(2.0, 1.0)]
    with pytest.raises(ExpressionError, match="nests parentheses or signs too deeply"):
        parse("(" * 20000 + "r" + ")" * 20000)


def test_long_sums_are_fine():
    assert ours("+".join(["r"] * 3000), [2.0]) == [(6000.0, 3000.0)]


def test_a_value_is_missing():
    with pytest.raises(ExpressionError, match=r"'k\*r \+ q' needs a value for k, q"):
        parse("k*r + q")({"r": 1.0})


def test_tabulated_functions_are_called():
    assert parse("f + r", {"f": torch.sin}).variables == {"f", "r"}  # a variable of that name
    r = torch.tensor([0.5])
    given_ = parse("sin(r) + f(r, 2)^2*f(r, 2)", {"f": lambda x, y: x + y, "sin": torch.cos})
    torch.testing.assert_close(given_({"r": r}), r.cos() + 2.5**3)  # a table hides a function, as in OpenMM
    assert len(given_.program) == 7
    assert parse("f(3)", {"f": lambda x: 2 * x})({}) == 6.0


def test_periodic_distances_are_refused():
    with pytest.raises(
        ExpressionError, match=r"'periodicdistance' at .* periodic boxes have no batched form; use OpenMM"
    ):
        parse("k*periodicdistance(x, y, z, 0, 0, 0)^2")


# --- structure --------------------------------------------------------------------------------------------------------


def test_powers_are_products():
    for power in [*range(-12, 13), *np.arange(-4.5, 5)]:
        assert "^" not in operations(f"r^{power}"), power
        assert operations(f"r^{power}")["*"] <= 5
    assert operations("(r + 1)^6")["*"] == 3
    assert operations("(s/r)^12 - (s/r)^6") == {"variable": 2, "recip": 1, "*": 5, "-": 1}
    assert operations("1/(U^2) + 1/U; U = r + s") == {"variable": 2, "+": 2, "recip": 1, "*": 1}
    assert operations("q/f; f = sqrt(r^2 + 1)") == {"variable": 2, "*": 2, "+": 1, "number": 1, "rsqrt": 1}
    assert operations("r^(1/6)") == {"variable": 1, "number": 1, "^": 1}


def test_constants_fold():
    assert operations("2*3*r/(4 - sqrt(4))*5") == {"variable": 1, "number": 1, "*": 1}
    assert operations("r/7") == {"variable": 1, "number": 1, "*": 1}
    assert operations("k*(1/e - 1/f)*r; e = 1; f = 78.5") == {"variable": 2, "number": 1, "*": 2}
    assert operations("0*exp(r) + 1*k + (r - r)") == {"variable": 1}


def test_what_is_there_twice_is_done_once():
    assert operations("exp(r*k) + exp(k*r)^2 + u; u = exp(r*k)")["exp"] == 1
    assert operations("select(step(r - 1), exp(r), 0) + exp(r)")["exp"] == 1
    assert operations("select(step(r - 1), S*exp(r), exp(r))")["exp"] == 1
    assert operations("select(c, exp(r), 0) + select(c, 1 + exp(r), 1); c = step(r - 1)")["exp"] == 1
    assert operations("step(u)*u^2; u = r - 1")["-"] == 1
    # Needed here or there and not always: once for each, or the gradient of neither could be kept clean
    assert operations("select(step(r - 1), exp(r), 0) + select(step(r - 2), exp(r), 0)")["exp"] == 2


def test_shapes_and_dtypes():
    text = "select(step(r - 1), k, 2) + select(r - k, 1, 2) + step(r) + max(r, 1)^1.5 + atan2(1, r) + 2^r + floor(r)/3"
    for dtype in (torch.float32, torch.float64):
        r, k = torch.rand(3, 1, dtype=dtype), torch.rand(4, dtype=dtype)
        for name, value in (("k", k), ("k", 0.3), ("k", 2), ("k", k[0])):
            found = parse(text)({"r": r, name: value, "unused": "x"})
            assert found.dtype == dtype
            assert found.shape == ((3, 4) if value is k else (3, 1))
        for part in text.split(" + "):
            assert parse(part)({"r": r, "k": 0.5}).dtype == dtype, part
    assert isinstance(parse(text)({"r": 0.7, "k": 2}), float)
    assert parse(text)({"r": 0.7, "k": 2}) == pytest.approx(openmm_bond(text, [0.7], k=2.0)[0][0])


def test_numbers_and_tensors_agree():
    for text in ODD.replace("\n", "|").split("|"):
        for r in (1.0, 1.3):
            number = parse(text)({"r": r})
            tensor = parse(text)({"r": torch.tensor(r)})
            assert float(tensor) == pytest.approx(number, rel=1e-14, nan_ok=True), text


# --- tracing ----------------------------------------------------------------------------------------------------------

TRACED = (
    "select(step(r + s - o), 0.5*(1/L - 1/U + 0.25*(r - s^2/r)*(1/(U^2) - 1/(L^2)) + 0.5*log(L/U)/r), 0) + k*(r/s)^-6"
    " + step(r - 1)*sqrt(abs(r - 1)) + max(0, r - 2)^2.5 + atan2(s, r)*select(r - 1, 1, k); "
    "U = r + s; L = max(o, abs(r - s))"
)


def value_and_gradient(r: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r = r.detach().requires_grad_(True)
    s = torch.linspace(0.3, 1.4, 5, dtype=r.dtype)[:, None]
    value = parse(TRACED)({"r": r, "s": s, "o": 0.4, "k": 3.0})
    return value.detach(), torch.autograd.grad(value.sum(), r)[0]


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_make_fx_traces_value_and_gradient(mode, dtype, generator):
    r = 0.1 + 3 * torch.rand(5, 7, generator=generator, dtype=dtype)
    r[0, 0] = 1.0  # the singular corner
    traced = make_fx(value_and_gradient, tracing_mode=mode)(r)
    other = 0.2 + 3 * torch.rand(5, 7 if mode != "symbolic" else 9, generator=generator, dtype=dtype)
    for x in (r, other):
        for found, expected in zip(traced(x), value_and_gradient(x), strict=True):
            assert torch.equal(found, expected)
            assert found.dtype == dtype
    assert not [node for node in traced.graph.nodes if "lift_fresh" in str(node.target)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_inductor_compiles_it(generator):
    r = 0.1 + 3 * torch.rand(5, 64, generator=generator)
    r[0, 0] = 1.0
    try:
        compiled = torch.compile(make_fx(value_and_gradient)(r), dynamic=False)
        found = compiled(r)
    except Exception as error:
        if "compiler" in str(error).lower():
            pytest.skip("no C++ compiler")
        raise
    for a, b in zip(found, value_and_gradient(r), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
