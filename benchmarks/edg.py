"""The energy-based diffusion generator beside its rivals, on every target of arXiv 2401.02080 and on alanine dipeptide.

    python benchmarks/edg.py --out edg                                  # everything: a day
    python benchmarks/edg.py --out edg --groups 2d --seeds 1 2 3 4 5    # the densities of the plane
    python benchmarks/edg.py --out edg --targets MoG6 LJ13 --methods edg hmc
    python benchmarks/edg.py --out edg --quick                          # a fiftieth of every budget

Every method has the same budget of energies (one with its gradient counts one, a product with the Hessian one more) and
may take `--minutes` of CPU; what each spent is in the tables. Results are kept in the directory as they come, one file
for each target, method and seed, and what is there is not done again. `table.md` and `table.json` have all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from rivals import tables
from rivals.cases import GROUPS, Case, case, names
from rivals.common import Budget
from rivals.measures import measured
from rivals.methods import ALSO, DEFAULT, METHODS, judged_by

from openmm_tsf.canvas import versions
from openmm_tsf.files import whole, write_text

QUICK = 50
"""What a quick run divides budgets by."""
KEPT = 4000
"""Draws of a run in the plane that are kept for pictures."""


def main() -> None:
    """Run what is missing and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of results")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--targets", nargs="+", choices=names(GROUPS), metavar="TARGET", help="instead of groups")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="by default all that apply")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--budget", type=float, default=1.0, help="times the budget of each target")
    parser.add_argument("--draws", type=int, help="that are judged; by default what each target says")
    parser.add_argument("--minutes", type=float, default=60.0, help="of CPU, at most, for a rival to learn")
    parser.add_argument("--quick", action="store_true", help=f"budgets and draws divided by {QUICK}")
    options = parser.parse_args()
    if not (options.budget > 0 and options.minutes > 0):
        parser.error("--budget and --minutes must be above 0")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.targets or names(options.groups):
        chosen = case(name)
        for method in options.methods or DEFAULT + ALSO.get(chosen.group, []):
            for seed in options.seeds:
                path = place(options.out, name, method, seed)
                if not is_done(path, asked(chosen, options)):
                    result = run(chosen, method, seed, options)
                    write_text(path, json.dumps(result, indent=1, allow_nan=False))
                    print(line(result), flush=True)
    rows = [json.loads(path.read_text("utf-8")) for path in sorted(options.out.glob("run_*.json"))]
    rows = in_order(rows)
    write_text(options.out / "table.json", json.dumps(rows, indent=1, allow_nan=False))
    write_text(options.out / "table.md", tables.markdown(rows))
    print(tables.markdown(rows))


def place(out: Path, target: str, method: str, seed: int) -> Path:
    """Where the results of a run are."""
    plain = target.replace("(", "_").replace(")", "")
    return out / f"run_{plain}_{method}_{seed}.json"


def asked(chosen: Case, options: argparse.Namespace) -> dict:
    """What a result depends on beside target, method and seed."""
    share = options.budget / (QUICK if options.quick else 1)
    n = options.draws or (max(500, chosen.n // QUICK) if options.quick else chosen.n)
    evaluations = max(1, round(chosen.evaluations * share))
    return {"budget_evaluations": evaluations, "budget_seconds": 60.0 * options.minutes, "asked_draws": n}


def is_done(path: Path, asked: dict) -> bool:
    """Whether there is a result that did not fail; exits where it is one of another budget or number of draws."""
    found = json.loads(path.read_text("utf-8")) if path.exists() else {"error": "none yet"}
    if "error" in found:
        return False
    other = [
        f"{key} was {found.get(key)} and is now {value}" for key, value in asked.items() if found.get(key) != value
    ]
    if other:
        sys.exit(f"{path}: {'; '.join(other)}; take another --out, or delete it")
    return True


def run(chosen: Case, method: str, seed: int, options: argparse.Namespace) -> dict:
    """Run a method; one that breaks down is a result too."""
    given = asked(chosen, options)
    budget, n = Budget(given["budget_evaluations"], given["budget_seconds"]), given["asked_draws"]
    facts = {"target": chosen.name, "group": chosen.group, "method": method, "seed": seed, "versions": versions()}
    facts |= given
    try:
        drawn = judged_by(METHODS[method](chosen, budget, n, seed), chosen)
        row = measured(chosen, drawn)
    except (RuntimeError, ValueError, ArithmeticError) as error:
        traceback.print_exc()
        return {**facts, "error": f"{type(error).__name__}: {error}"}
    if chosen.group == "2d":
        kept = {"x": drawn.x[:KEPT].float().numpy()}
        if drawn.log_weights is not None:
            kept["log_weights"] = drawn.log_weights[:KEPT].float().numpy()
        path = place(options.out, chosen.name, method, seed).with_suffix(".npz")
        with whole(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **kept)
    return {**row, **facts}


def in_order(rows: list[dict]) -> list[dict]:
    """Rows in the order of targets, methods and seeds."""
    targets, methods = names(list(GROUPS)), list(METHODS)
    return sorted(rows, key=lambda row: (targets.index(row["target"]), methods.index(row["method"]), row["seed"]))


def line(row: dict) -> str:
    """What a run gave."""
    head = f"{row['target']:>10} {row['method']:>12} seed {row['seed']}"
    if "error" in row:
        return f"{head} failed: {row['error']}"
    names = ("modes", "mmd", "mmd_weighted", "ess", "log_z_error", "bound_gap", "accuracy", "excess_tv")
    cells = [f"{name} {row[name]:.4g}" for name in names if row.get(name) is not None]
    seconds = row["seconds_training"] + row["seconds_drawing"]
    return f"{head} {seconds:6.0f} s  {row['evaluations_training']:,} energies  " + "  ".join(cells)


if __name__ == "__main__":
    main()
