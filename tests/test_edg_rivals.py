"""Rivals of the diffusion generator: exact where they should be, within their budgets, honest about bad energies."""

import json
import math
import sys
from dataclasses import replace

import benchmark_modules  # noqa: F401
import edg
import pytest
import torch
from rivals import cases, hmc, l2hmc, measures, methods, pis, tables
from rivals.common import Budget, Counted, Drawn, followed, learn, mean_of_finite, seeded
from rivals.flows import Cooler, real_nvp, steerable
from torch import nn

from openmm_tsf.edg import EDGTrainingSettings, build_edg

MEAN, PRECISION, OFFSET = (1.0, -0.5), ((2.0, 0.8), (0.8, 1.0)), 1.3


class Gaussian:
    """U = (x - m)^T P (x - m)/2 + c in two dimensions, with ln Z = ln(2 pi) - ln det P / 2 - c."""

    dim = 2
    log_z = math.log(2.0 * math.pi) - 0.5 * math.log(2.0 * 1.0 - 0.8**2) - OFFSET
    mean, precision = torch.tensor(MEAN).double(), torch.tensor(PRECISION).double()
    covariance = torch.linalg.inv(precision)

    def __call__(self, x):
        y = x - self.mean.to(x)
        return 0.5 * ((y @ self.precision.to(x)) * y).sum(1) + OFFSET


class Half(Gaussian):
    """The same where x_0 > 1, its mean; NaN below 0.5, and +inf between them: ln 2 less of ln Z."""

    log_z = Gaussian.log_z - math.log(2.0)

    def __call__(self, x):
        u = torch.where(x[:, 0] > 1.0, super().__call__(x), math.inf)
        return torch.where(x[:, 0] < 0.5, math.nan, u)


class Corner(Gaussian):
    """The same, but NaN where x_0 > 3, one part in a hundred."""

    log_z = Gaussian.log_z + math.log(0.5 * (1.0 + math.erf(2.0 / math.sqrt(2.0 * Gaussian.covariance[0, 0]))))

    def __call__(self, x):
        return torch.where(x[:, 0] > 3.0, math.nan, super().__call__(x))


class Nowhere(Gaussian):
    """No energy at all."""

    def __call__(self, x):
        return super().__call__(x) * math.nan


def moments(x):
    """Means and second moments about the true mean, of draws (..., 2), and the exact ones."""
    y = x.double() - Gaussian.mean
    found = torch.stack((y[..., 0], y[..., 1], y[..., 0] ** 2, y[..., 0] * y[..., 1], y[..., 1] ** 2), -1)
    (a, b), (_, c) = Gaussian.covariance
    return found, torch.tensor([0.0, 0.0, a, b, c])


def worst(visited):
    """Largest deviation of moments of chains (iterations, chains, 2), in standard errors between chains."""
    found, exact = moments(visited)
    by_chain = found.mean(0)
    return float(((by_chain.mean(0) - exact) / (by_chain.std(0) / len(by_chain) ** 0.5)).abs().max())


def log_z_error(drawn):
    """Standard error of ln of the mean weight."""
    return math.sqrt((1.0 / drawn.ess - 1.0) / len(drawn.x))


# --- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [(0,), (10, 0.0), (10, math.nan)])
def test_a_budget_is_above_zero(bad):
    with pytest.raises(ValueError, match="above 0"):
        Budget(*bad)


def test_energies_are_counted():
    counted = Counted(Gaussian(), Budget(100))
    x = torch.randn(7, 2, generator=torch.Generator().manual_seed(1), requires_grad=True)
    counted(x)
    assert counted.n == 7
    u, g = counted.slope(x)
    assert counted.n == 14 and not g.requires_grad
    assert torch.allclose(g, (x.detach() - Gaussian.mean) @ Gaussian.precision)
    _, g = counted.slope(x, create_graph=True)
    assert counted.n == 28 and counted.progress == 0.28
    assert torch.allclose(torch.autograd.grad(g[:, 0].sum(), x)[0], Gaussian.precision[0].expand(7, 2))
    assert u.shape == (7,)


def test_learning_stops_with_the_budget_of_energies_or_of_time():
    for budget in (Budget(200), Budget(10**9, 0.05)):
        model, counted = nn.Linear(2, 1), Counted(Gaussian(), budget)
        steps = sum(1 for _ in learn(model, counted, lambda _, m=model, c=counted: c(m.weight).sum(), rate=1e-2))
        assert steps == counted.n
        assert steps == 200 or (budget.evaluations > 200 and steps < 10**6 and counted.seconds >= 0.05)


def test_heat_falls_to_one_half_way():
    model, heats = nn.Linear(2, 1), []
    counted = Counted(Gaussian(), Budget(100))

    def loss(heat):
        heats.append(heat)
        return counted(model.weight).sum()

    list(learn(model, counted, loss, rate=1e-2, anneal_from=0.05, anneal_share=0.5))
    assert heats[0] == 20.0 and heats[25] == pytest.approx(20.0**0.5) and heats[50:] == [1.0] * 50


def test_bad_rows_leave_no_trace_in_gradients():
    x = torch.tensor([[2.0, 0.0], [0.7, 0.0], [0.0, 0.0]], requires_grad=True)
    u, finite = followed(Counted(Half(), Budget(10)), x)
    assert finite.tolist() == [True, False, False]
    mean_of_finite(u, finite).backward()
    assert torch.allclose(x.grad[0], (x[0].detach() - Gaussian.mean) @ Gaussian.precision)
    assert not x.grad[1:].any()
    with pytest.raises(RuntimeError, match="none of 3 draws"):
        mean_of_finite(u, finite & False)


# --- chains -----------------------------------------------------------------------------------------------------------


class Skewed(Counted):
    """Gradients that are half as large again: chains go elsewhere, and the Metropolis test must set it right."""

    def slope(self, x, *, create_graph=False):
        u, g = super().slope(x, create_graph=create_graph)
        return u, 1.5 * g


def exact_chains(n, generator):
    """Chains that start from the Gaussian itself, with the gradients of `Skewed`."""
    root = torch.linalg.cholesky(Gaussian.covariance)
    x = Gaussian.mean + torch.randn(n, 2, generator=generator) @ root.T
    return hmc.Chains(x, *Skewed(Gaussian(), Budget(1)).slope(x))


def run_hmc(chains, generator):
    target = Skewed(Gaussian(), Budget(10**9))
    tuning, visited = hmc.Tuning(torch.tensor([0.9, 1.2]), 0.5, 3), []
    for _ in range(150):
        chains, _, _ = hmc.iterate(chains, target, tuning, generator)
        visited.append(chains.x)
    return torch.stack(visited)


def test_hmc_is_exact_whatever_its_gradient(generator, monkeypatch):
    assert worst(run_hmc(exact_chains(400, generator), generator)) < 4.0
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *size, **rest: rand(*size, **rest) * 1e-300)  # everything is accepted
    monkeypatch.setattr(hmc, "OFTEN", 0.0)
    assert worst(run_hmc(exact_chains(400, generator), generator)) > 10.0


def test_hmc_gets_away_from_where_energies_are_steep(generator, monkeypatch):
    class Steep(Gaussian):
        def __call__(self, x):
            return 1e3 * (x**4).sum(1)

    target = Counted(Steep(), Budget(10**9))

    def left(often):
        monkeypatch.setattr(hmc, "OFTEN", often)
        chains = hmc.Chains(x := torch.full((50, 2), 8.0), *target.slope(x))
        for _ in range(600):
            chains, _, _ = hmc.iterate(chains, target, hmc.Tuning(torch.ones(2), 0.05, 2), generator)
        return int((chains.u < 20.0).sum())

    assert left(hmc.OFTEN) == 50 and left(0.0) == 0


def test_hmc_tunes_itself():
    made = hmc.hmc(Gaussian(), Budget(200_000), 3000, scale=4.0, seed=1)
    assert made.n_training + made.n_drawing < 202_000
    assert made.log_weights is None and made.log_z is None and made.ess is None
    assert 0.7 < made.facts["acceptance"] < 0.9 and made.facts["r_hat"] < 1.05
    assert torch.allclose(made.energy, Gaussian()(made.x))
    found, exact = moments(made.x)
    assert torch.allclose(found.mean(0), exact, atol=0.2)
    again = hmc.hmc(Gaussian(), Budget(200_000), 3000, scale=4.0, seed=1)
    assert torch.equal(made.x, again.x)


def test_r_hat_sees_chains_apart():
    x = torch.randn(200, 8, 2, generator=torch.Generator().manual_seed(1))
    assert abs(hmc.split_r_hat(x) - 1.0) < 0.01
    assert hmc.split_r_hat(x + 3.0 * torch.arange(8.0)[:, None]) > 3.0
    assert math.isnan(hmc.split_r_hat(x[:3]))


def learned_steps(generator):
    """Learned leapfrog steps with networks that are far from zero."""
    learned = seeded(1, lambda: l2hmc.Learned(2, 1.0, n_steps=3, step=0.3, hidden=8))
    with torch.no_grad():
        for p in learned.parameters():
            if p.ndim:
                p.add_(0.5 * torch.randn(p.shape, generator=generator))
    return learned


def test_learned_steps_go_back_and_know_their_volume(generator):
    learned, target = learned_steps(generator), Counted(Gaussian(), Budget(10**6))

    def move(state, sign):
        x, v = state.split(2)
        chains = hmc.Chains(x[None], *target.slope(x[None], create_graph=True))
        y, w, _, _, log_det = learned(chains, v[None], target, sign, 1.0)
        return torch.cat((y[0], w[0])), log_det[0]

    state = torch.randn(4, generator=generator, requires_grad=True)
    there, log_det = move(state, 1)
    back, minus = move(there, -1)
    assert torch.allclose(back, state, atol=1e-12) and torch.allclose(minus, -log_det)
    jacobian = torch.autograd.functional.jacobian(lambda s: move(s, 1)[0], state)
    assert torch.allclose(torch.linalg.slogdet(jacobian)[1], log_det, atol=1e-10)
    assert abs(float(log_det.detach())) > 0.05


@torch.no_grad()
def run_l2hmc(learned, chains, generator):
    target, visited = Skewed(Gaussian(), Budget(10**9)), []
    for _ in range(150):
        chains, _, _ = l2hmc.iterate(learned, chains, target, generator)
        visited.append(chains.x)
    return torch.stack(visited)


def test_l2hmc_is_exact_whatever_its_networks(generator, monkeypatch):
    learned = learned_steps(generator)
    assert worst(run_l2hmc(learned, exact_chains(400, generator), generator)) < 4.0
    forward = l2hmc.Learned.forward
    monkeypatch.setattr(l2hmc.Learned, "forward", lambda *a: (*forward(*a)[:4], 0.0))  # volumes forgotten
    assert worst(run_l2hmc(learned, exact_chains(400, generator), generator)) > 10.0


def test_l2hmc_learns_to_jump():
    made = l2hmc.l2hmc(Gaussian(), Budget(60_000), 1000, scale=2.0, n_chains=64, jump=1.0, rate=5e-3, seed=1)
    assert 30_000 <= made.n_training < 32_000 and made.n_training + made.n_drawing < 62_000
    found, exact = moments(made.x)
    assert torch.allclose(found.mean(0), exact, atol=0.3)
    assert made.facts["step"] > 0.1 and made.facts["acceptance"] > 0.8


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize("target", [Gaussian(), Half()], ids=["everywhere", "half"])
def test_paths_of_any_drift_have_exact_weights(generator, with_gradient, target):
    drift = seeded(1, lambda: pis.Drift(2, 2.0, hidden=8, depth=1, with_gradient=with_gradient))
    with torch.no_grad():
        for p in drift.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    counted = Counted(target, Budget(10**9))
    x, energy, log_weights = pis.drawn(drift, counted, 40_000, 4, generator)
    assert counted.n == 40_000 * (1 + 4 * with_gradient)
    drawn = Drawn("pis", x, energy, log_weights, 0, 0, 0.0, 0.0)
    assert abs(drawn.log_z - target.log_z) < 4.0 * log_z_error(drawn) < 0.3
    assert (drawn.log_z_bound < target.log_z - 0.1) if type(target) is Gaussian else drawn.log_z_bound == -math.inf
    wrong = Drawn("pis", x, energy, log_weights - 0.6, 0, 0, 0.0, 0.0)
    assert abs(wrong.log_z - target.log_z) > 4.0 * log_z_error(wrong)


@pytest.mark.parametrize("loss", ["entropy", "variance"])
def test_path_integral_sampler_learns(loss):
    made = pis.pis(Gaussian(), Budget(60_000), 4000, scale=2.0, batch=64, n_steps=8, hidden=32, loss=loss, seed=1)
    assert 60_000 <= made.n_training < 60_000 + 64 * 17 and made.n_drawing == 4000 * 9
    assert abs(made.log_z - Gaussian.log_z) < 4.0 * log_z_error(made)
    assert -0.5 < made.log_z_bound - Gaussian.log_z < 0.0  # without drift it is 2 nat below


def test_the_exact_drift_gives_all_paths_one_weight(generator):
    """With the drift that is exact for a Gaussian N(0, s^2), ln w is ln Z on every path, but for the steps."""
    width = 0.5

    class Exact(pis.Drift):
        """u = sigma grad ln E[N(X_1; 0, s^2)/N(X_1; 0, sigma^2) | X_t = x]."""

        def forward(self, x, t, gradient):
            r = 1.0 / width**2 - 1.0 / self.scale**2
            return -self.scale * r * x / (1.0 + r * self.scale**2 * (1.0 - t))

    class Narrow:
        dim = 2
        log_z = math.log(2.0 * math.pi * width**2)

        def __call__(self, x):
            return 0.5 * (x / width).square().sum(1)

    target = Counted(Narrow(), Budget(10**9))
    drift = Exact(2, 2.0, hidden=4, depth=1, with_gradient=False)
    spreads = []
    for n_steps in (16, 64):
        _, _, log_weights = pis.drawn(drift, target, 4000, n_steps, generator)
        assert abs(float(log_weights.mean()) - Narrow.log_z) < 8.0 / n_steps
        spreads.append(float(log_weights.std()))
    assert spreads[1] < 0.6 * spreads[0] < 0.6  # falls as 1/sqrt(steps), or faster


@pytest.mark.parametrize("target", [Gaussian(), Corner()], ids=["everywhere", "corner"])
def test_boltzmann_generator(target):
    made = real_nvp(target, Budget(25_000), 4000, scale=2.0, blocks=3, hidden=16, batch=128, rate=5e-3, seed=1)
    assert made.n_training < 25_128 and made.n_drawing == 4000
    assert made.ess > 0.9 and made.log_weights.isfinite().all() == (type(target) is Gaussian)
    assert abs(made.log_z - target.log_z) < 4.0 * log_z_error(made) + 1e-3


@pytest.mark.filterwarnings("ignore:100 draws are worth")
@pytest.mark.parametrize(("method", "slopes"), [("vae", 0), ("vae-ghd", 4)])
def test_without_diffusion_all_else_is_as_in_the_generator(method, slopes, monkeypatch):
    built = []
    monkeypatch.setattr(methods, "build_edg", lambda *a, **k: built.append(build_edg(*a, **k)) or built[-1])
    case, budget = cases.case("MoG2"), Budget(64 * 9 * 4)
    drawn = {name: methods.METHODS[name](case, budget, 100, 1) for name in (method, method.replace("vae", "edg"))}
    without, generator = built
    assert not without.score.corrected and generator.score.corrected
    assert without.decoder.state_dict().keys() == generator.decoder.state_dict().keys()
    assert replace(without.settings, score="gaussian") == generator.settings
    spent = {name: (made.n_training, made.facts["steps"], made.facts["batch"]) for name, made in drawn.items()}
    assert spent[method] == spent[method.replace("vae", "edg")]
    made = drawn[method]
    assert made.n_training == made.facts["steps"] * made.facts["batch"] * (1 + 2 * slopes)
    assert made.n_drawing == 100 * (1 + slopes) and made.facts["n_function_evaluations"] == 0


def test_annealed_rivals_cool_as_the_generator_does(monkeypatch):
    given = []
    monkeypatch.setattr(methods, "real_nvp", lambda *a, **k: given.append(k))
    case = cases.case("MoG2")
    methods.METHODS["bg-annealed"](case, Budget(1), 1, 1)
    methods.METHODS["bg-annealed"](replace(case, steps={"anneal_from": 0.3}), Budget(1), 1, 1)
    default = EDGTrainingSettings()
    assert [k["anneal_from"] for k in given] == [default.anneal_from, 0.3]
    assert [k["anneal_share"] for k in given] == [default.anneal_share] * 2


def test_steerable_flow_is_trained_hot_and_drawn_cold():
    made = steerable(Gaussian(), Budget(60_000), 4000, scale=3.0, n_samples=2000, n_chains=64, batch=256, seed=1)
    assert made.ess > 0.8 and made.n_training < 66_000
    assert abs(made.log_z - Gaussian.log_z) < 4.0 * log_z_error(made) + 1e-3


def test_a_hot_target_is_a_flat_one():
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(Cooler(Gaussian(), 4.0)(x), Gaussian()(x) / 4.0)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (hmc.hmc, {}), (l2hmc.l2hmc, {}), (pis.pis, {}), (real_nvp, {}),
    ],
    ids=["hmc", "l2hmc", "pis", "bg"],
)  # fmt: skip
def test_a_target_without_energies_is_refused(method, settings):
    with pytest.raises((ValueError, RuntimeError), match="finite energy"):
        method(Nowhere(), Budget(10_000), 100, scale=1.0, seed=1, **settings)


# --- the comparison ---------------------------------------------------------------------------------------------------


def in_the_plane(method, x, log_weights=None):
    """A run on MoG2 that gave these draws."""
    target = cases.case("MoG2").target
    return Drawn(method, x, target(x), log_weights, 10, 20, 30.0, 60.0)


def test_measures_in_the_plane(generator, monkeypatch):
    monkeypatch.setattr(measures, "N_MMD", 600)
    monkeypatch.setattr(measures, "FLOOR_REPEATS", 4)
    case = cases.case("MoG2")
    x = case.target.sample(3000, generator=generator)
    row = measures.measured(case, in_the_plane("exact", x, torch.zeros(3000)))
    assert row["modes"] == row["modes_all"] == 2 and row["mmd"] < 3.0 * row["mmd_floor"]
    assert row["ess"] == pytest.approx(1.0) and row["log_z_error"] == row["bound_gap"] == 0.0
    one_sided = x[x[:, 0] > 0.0]
    assert measures.measured(case, in_the_plane("half", one_sided))["modes"] == 1
    # shares 1/4 and 3/4, which weights 3 and 1 make even
    left = x[:, 0] < 0.0
    uneven = torch.cat((x[left][:400], x[~left][:1200]))
    log_weights = torch.where(uneven[:, 0] < 0.0, math.log(2.0), math.log(2.0 / 3.0))
    row = measures.measured(case, in_the_plane("uneven", uneven, log_weights))
    assert row["mmd"] > 5.0 * row["mmd_floor"] and row["mmd_weighted"] < 2.0 * row["mmd_floor"]
    assert row["log_z_error"] == pytest.approx(0.0, abs=1e-12)
    assert row["n_mmd_effective"] == pytest.approx(0.75 * row["n_mmd"], rel=0.05)
    assert row["ess"] == pytest.approx(0.75) and row["bound_gap"] > 0.1
    json.dumps(row, allow_nan=False)


def test_measures_of_a_posterior(generator):
    try:
        case = cases.case("heart")
    except ModuleNotFoundError:
        pytest.skip("the data packages are not installed")
    from openmm_tsf.edg.logistic import importance_sample

    drawn = importance_sample(case.target, 20_000, generator=generator)
    made = Drawn("exact", drawn.w, case.target(drawn.w), drawn.log_weights, 0, 0, 0.0, 0.0)
    row = measures.measured(case, made)
    assert abs(row["log_z_error"]) < 5.0 * row["log_z_standard_error"] < 0.1
    assert row["mean_error"] < 0.06 and row["covariance_error"] < 0.06
    assert row["accuracy"] == pytest.approx(row["accuracy_exact"], abs=0.02)
    row = measures.measured(case, replace(made, x=drawn.w + 0.5, log_weights=None))
    assert row["mean_error"] > 0.5 and "ess" not in row


def test_softened_targets_are_weighed_as_they_are(generator):
    case = cases.case("LJ13")
    x = 0.6 * torch.randn(200, case.target.dim, generator=generator)
    soft = case.training(x)
    drawn = Drawn("bg", x, soft, -soft, 0, 200, 0.0, 0.0)
    found = methods.judged_by(drawn, case)
    assert torch.equal(found.energy, case.target(x)) and found.n_drawing == 400
    assert torch.allclose(found.log_weights, -found.energy)
    assert (found.energy > drawn.energy).any()
    assert methods.judged_by(drawn, cases.case("MoG2")) is drawn


def test_tables():
    runs = [
        {"target": "MoG2", "group": "2d", "method": m, "seed": s, "modes": 2, "modes_all": 2, "mmd": 0.1 * s,
         "mmd_floor": 0.02, "seconds_training": 60.0, "seconds_drawing": 0.0, "evaluations_training": 10**6,
         "evaluations_drawing": 0} for m in ("edg", "hmc") for s in (1, 2)
    ]  # fmt: skip
    runs[0] |= {"mmd_weighted": 0.03, "ess": 0.5, "n_mmd": 100, "n_mmd_effective": 50.0}
    runs[1] |= {"mmd_weighted": 0.05, "ess": 0.7, "n_mmd": 100, "n_mmd_effective": 70.0}
    runs.append({"target": "MoG2", "group": "2d", "method": "bg", "seed": 1, "error": "RuntimeError: no"})
    text = tables.markdown(runs)
    assert (
        "| MoG2 | edg | 2 2 of 2 | 0.1500 ± 0.0707 | 0.0200 ± 0.0000 | 0.0400 ± 0.0141 | 1 of 2 | 0.600 ± 0.141 |"
        in text
    )
    assert "| MoG2 | hmc | 2 2 of 2 | 0.1500 ± 0.0707 | 0.0200 ± 0.0000 |  |  |  | 1.0 | 1.00 | 2 |" in text
    runs[0]["n_mmd_effective"] = 20.0  # too few to tell
    assert "| 0 of 2 | 0.600" in tables.markdown(runs)
    assert "- MoG2, bg, seed 1 failed: RuntimeError: no" in text and "largest weight" not in text


def test_the_benchmark_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measures, "N_MMD", 300)
    monkeypatch.setattr(measures, "FLOOR_REPEATS", 4)

    def run(*more):
        options = ["--methods", "hmc", "bg", "--seeds", "1", "--budget", "0.1", "--draws", "200", *more]
        given = ["edg.py", "--out", str(tmp_path), "--targets", "MoG2", "--quick", *options]
        monkeypatch.setattr(sys, "argv", given)
        edg.main()
        return capsys.readouterr().out

    first = run()
    assert first.count("seed 1") == 2
    record = json.loads((tmp_path / "run_MoG2_bg_1.json").read_text())
    assert record["budget_evaluations"] == 4000 <= record["evaluations_training"] < 4256
    assert (tmp_path / "run_MoG2_bg_1.npz").exists() and (tmp_path / "table.md").read_text() in first
    assert "seed 1" not in run()
    with pytest.raises(
        SystemExit, match=r"run_MoG2_hmc_1\.json: asked_draws was 200 and is now 250; take another --out"
    ):
        run("--draws", "250")
    with pytest.raises(SystemExit):
        run("--budget", "0")
    assert "above 0" in capsys.readouterr().err
    record["error"] = "RuntimeError: no"
    (tmp_path / "run_MoG2_bg_1.json").write_text(json.dumps(record))
    assert run().count("seed 1") == 1  # what failed is tried again


@pytest.mark.parametrize("name", cases.names(["2d", "wells", "lj", "ising"]))
def test_every_target_has_energies_where_methods_start(name, generator):
    case = cases.case(name)
    u = case.learned(case.scale * torch.randn(50, case.target.dim, generator=generator))
    assert u.shape == (50,) and u.isfinite().all()
    with pytest.raises(ValueError, match="no target 'nothing'"):
        cases.case("nothing")
