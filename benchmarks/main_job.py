"""The table of the main job's figures from finished run directories, as markdown.

python benchmarks/main_job.py runs/seed1 runs/seed2 runs/seed3
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def percent(value: float, digits: int) -> str:
    return f"{100 * value:.{digits}f} %"


def with_error(value: float, error: float, scale: float = 1.0, digits: int = 3, unit: str = "") -> str:
    return f"{scale * value:.{digits}f} +- {scale * error:.{digits}f}{unit}"


def rows(m: dict[str, Any]) -> dict[str, str]:
    """Figures of one run by name."""
    stages = ("simulate", "train", "sample")
    apart = m["alpha_left_target"] - m["reference_alpha_left"]
    error = (m["alpha_left_target_error"] ** 2 + m["reference_alpha_left_error"] ** 2) ** 0.5
    return {
        "ESS at 300 K": percent(m["ess_target"], 1),
        "ESS at 600 K": percent(m["ess_train"], 1),
        "largest weight at 300 K": percent(m["largest_weight_share_target"], 3),
        "draws off the chart, of 100,000": str(m["n_rejected_target"]),
        "alpha_L share at 300 K": with_error(m["alpha_left_target"], m["alpha_left_target_error"], 100, 3, " %"),
        "from the reference, in standard errors": f"{apart / error:+.1f}",
        "<U> at 300 K, kJ/mol": with_error(
            m["mean_energy_target_kj_per_mol"], m["mean_energy_target_error_kj_per_mol"], digits=2
        ),
        "Ramachandran excess TV at 300 K": f"{m['ramachandran_excess_tv']:.4f}",
        "Ramachandran KL at 300 K": f"{m['ramachandran_kl']:.4f}",
        "steering spread 300/600 K, nat": f"{m['steering_spread_nat']:.0e}",
        "energy evaluations": f"{m['n_energy_evaluations'] / 1e6:.2f} million",
        "simulate, train, sample": ", ".join(f"{m[f'seconds_{stage}']:.0f}" for stage in stages) + " s",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run directories with metrics.json")
    found = [json.loads((run / "metrics.json").read_text("utf-8")) for run in parser.parse_args().runs]
    columns = [rows(metrics) for metrics in found]
    print("| | " + " | ".join(f"seed {metrics['seed']}" for metrics in found) + " |")
    print("|---|" + "---|" * len(found))
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(column[name] for column in columns) + " |")


if __name__ == "__main__":
    main()
