"""The page of a replica exchange: what was reached, what should make a reader careful, and the tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

from .flow_steps import STEPS
from .report import ALPHA, FAR, LOW_ESS, page, percent, share_with_error, table, with_error

Found = Mapping[str, Any]

FEW_SWAPS, FEW_MOVES, FEW_SAMPLES = 0.1, 0.01, 100.0
REMARK = (
    "Errors of the exchange are one standard error from a block jackknife over time with MBAR redone for each block; "
    "those of the flow come from a bootstrap over its draws. f is -ln of the configuration integral over that of the "
    "lowest temperature. Effective samples are Kish's number of the weights, for the exchange over the statistical "
    "inefficiency of the energy; slower motions have fewer."
)
SETTINGS = ("seed", "sampler", "n_temperatures", "n_replicas", "n_iterations", "n_discarded_iterations", "n_draws_flow")


def render(found: Found, pictures: Mapping[str, bytes], notes: Sequence[str] = ()) -> str:
    """The page as text.

    Args:
        found: what `exchange_report.write_exchange_report` measured.
        pictures: bytes of PNG files by name.
        notes: more warnings, whole sentences.
    """
    low, high = ladder(found)[0], ladder(found)[-1]
    return page(
        f"{found['molecule']}: replica exchange from {low:g} to {high:g} K",
        summary=summary(found),
        warnings=[*warning_sentences(found), *notes],
        tables=[_ladder_table(found), _coldest_table(found)],
        remark=REMARK,
        figures=pictures,
        settings={name: found[name] for name in SETTINGS} | {"temperatures_kelvin": ladder(found)},
        versions={key.removeprefix("version_"): value for key, value in found.items() if key.startswith("version_")},
        metrics=found,
        file="exchange.json",
    )


def ladder(found: Found) -> list[float]:
    """Temperatures [K]."""
    return [found[f"temperature_{k}_kelvin"] for k in range(found["n_temperatures"])]


def summary(found: Found) -> list[str]:
    """What was reached, in sentences."""
    temperatures, trips = ladder(found), found["round_trips"]
    text = (
        f"{found['n_replicas']} replicas on {len(temperatures)} temperatures, {found['n_iterations']:,} iterations, "
        f"the first {found['n_discarded_iterations']:,} left out of the averages; {trips:,} round trips from the "
        "lowest temperature to the highest and back."
    )
    if found["n_energy_evaluations"] is not None:
        text += f" It took {found['n_energy_evaluations']:,} energy evaluations"
        text += "." if found["seconds"] is None else f" and {found['seconds']:,.0f} s."
    if any("_acceptance_" in key and not key.startswith("swap") for key in found):
        text += " Flow moves are Metropolis steps: they keep the distribution, however good or bad the flow is."
    sentences = [text]
    share, error = found["alpha_left_exchange"], found["alpha_left_exchange_error"]
    if share is None or error is None:
        return sentences
    text = (
        f"alpha_L (0 < phi < 2.4 rad) holds {share_with_error(share, error)} of the molecules at {temperatures[0]:g} K"
    )
    for source, words in (("flow", "reweighted draws of the flow give"), ("reference", "a long reference has")):
        other, deviation = found[f"alpha_left_{source}"], found[f"alpha_left_{source}_error"]
        if other is not None and deviation is not None:
            text += f"; {words} {share_with_error(other, deviation)}"
    return [*sentences, text + "."]


def warning_sentences(found: Found) -> list[str]:
    """What should make a reader careful, in sentences; empty when nothing does."""
    return [*_about_swaps(found), *_about_moves(found), *_about_samples(found), *_about_agreement(found)]


def _about_swaps(found: Found) -> list[str]:
    words, temperatures = [], ladder(found)
    for k, (low, high) in enumerate(pairwise(temperatures)):
        share = found.get(f"swap_acceptance_{k}_{k + 1}")
        if share is not None and share < FEW_SWAPS:
            words.append(
                f"Only {percent(share)} of the exchanges between {low:.0f} and {high:.0f} K are accepted; put another "
                "temperature between them."
            )
    if found["round_trips"] == 0:
        words.append("No replica went from the lowest temperature to the highest and back; run longer.")
    return words


def _about_moves(found: Found) -> list[str]:
    words = []
    for k, temperature in enumerate(ladder(found)):
        for kind in STEPS:
            share = found.get(f"{kind}_acceptance_{k}")
            if share is not None and share < FEW_MOVES:
                words.append(
                    f"{percent(share)} of the {kind} moves at {temperature:.0f} K are accepted: no help there."
                )
        lost = found.get(f"unrepresentable_{k}", 0)
        if lost:
            words.append(
                f"{lost:,} times a state at {temperature:.0f} K was one that the flow cannot represent; its moves were "
                "rejected, which is right but does not help."
            )
    return words


def _about_samples(found: Found) -> list[str]:
    words = [
        f"{temperature:.0f} K has {found[f'n_effective_{k}']:.0f} effective samples only; run longer."
        for k, temperature in enumerate(ladder(found))
        if found[f"n_effective_{k}"] is not None and found[f"n_effective_{k}"] < FEW_SAMPLES
    ]
    share, error = found["alpha_left_exchange"], found["alpha_left_exchange_error"]
    if share is not None and error is None:
        words.append(
            "The shares of the basins have no error bars: all stored frames lie in one of the blocks of time that are "
            "left out in turn; store frames more often (--store-every), or run longer."
        )
    elif share == 0.0:
        words.append("The stored frames have too little alpha_L to say how much there is; run longer.")
    elif share and error > 0.1 * share:
        words.append(f"The alpha_L share is known to {percent(error / share)} of itself only; a longer run narrows it.")
    ess = found["ess_flow"]
    if ess is not None and ess < LOW_ESS:
        words.append(
            f"The flow's effective sample size at {ladder(found)[0]:g} K is {percent(ess)}: mind its error bars."
        )
    return words


def _about_agreement(found: Found) -> list[str]:
    words, kinds = [], {"mean_energy": "The mean energy", "alpha_left": "The alpha_L share"}
    for name, what in kinds.items():
        for key, text in (
            (f"{name}_exchange_deviation", "of the exchange lies {:.1f} standard errors from the reference."),
            (f"{name}_flow_difference", "by the flow lies {:.1f} standard errors from that by the exchange."),
        ):
            distance = found[key]
            if distance is not None and abs(distance) > FAR:
                words.append(f"{what} {text.format(abs(distance))}")
    return words


def _ladder_table(found: Found) -> str:
    """One row a temperature: acceptances, free energy, effective samples."""
    kinds = [kind for kind in STEPS if any(f"{kind}_acceptance_" in key for key in found)]
    head = ["temperature", *(f"{kind} moves accepted" for kind in kinds), "swaps with the next", "f [nat]"]
    rows = []
    for k, temperature in enumerate(ladder(found)):
        error = found[f"free_energy_{k}_error_nat"]
        cells = [
            *(percent(found.get(f"{kind}_acceptance_{k}")) for kind in kinds),
            percent(found.get(f"swap_acceptance_{k}_{k + 1}")),
            with_error(found[f"free_energy_{k}_nat"], error),
            _count(found[f"n_effective_{k}"]),
        ]
        rows.append(_row(f"{temperature:.1f} K", cells))
    return table([*head, "effective samples"], rows)


def _coldest_table(found: Found) -> str:
    """The lowest temperature by exchange, flow and reference."""
    sources = {"exchange": "exchange, MBAR", "flow": "flow, reweighted", "reference": "reference"}
    shown = [source for source in sources if found.get(f"mean_energy_{source}_kj_per_mol") is not None]

    def row(label: str, template: str, scale: float = 1.0) -> str:
        pairs = [(found[template.format(source, "")], found[template.format(source, "_error")]) for source in shown]
        return _row(label, [with_error(*(None if x is None else scale * x for x in pair)) for pair in pairs])

    rows = [
        _row("effective samples", [_count(found[f"n_effective_{source}"]) for source in shown]),
        row("mean potential energy [kJ/mol]", "mean_energy_{}{}_kj_per_mol"),
        row("heat capacity, potential part [J/mol/K]", "heat_capacity_{}{}_kj_per_mol_per_kelvin", 1000.0),
    ]
    if found["alpha_left_exchange"] is not None:
        rows.append(row(f"{ALPHA} share [%]", "alpha_left_{}{}", 100.0))
        rows.append(row(f"{ALPHA} free energy [kT]", "alpha_left_{}_free_energy{}_kt"))
        rows.append(row("&alpha;<sub>R</sub> free energy [kT]", "alpha_right_{}_free_energy{}_kt"))
    return table([f"at {ladder(found)[0]:g} K", *(sources[source] for source in shown)], rows)


def _row(label: str, cells: Sequence[str]) -> str:
    """A row in HTML; the label is HTML, the cells are plain text."""
    return f"<tr><th>{label}</th>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"


def _count(number: float | None) -> str:
    return "-" if number is None else f"{number:,.0f}"
