"""One self-contained HTML page that says what a run did, how good it is and how to do it again.

Pictures are inside the page; there are no scripts and no links to anything outside.
"""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from string import Template
from typing import TYPE_CHECKING, Any

from .canvas import png
from .files import write_text
from .report_page import CAPTIONS, GENERATOR_CAPTIONS, PAGE
from .weights import FEWEST_EFFECTIVE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Metrics = Mapping[str, Any]

LOW_ESS, FAR = 0.1, 3.0
UNSEEN = 0.1
"""Effective draws below which a basin counts as not seen, where its share is not known to a half of itself either."""
REMARK = (
    "The effective sample size counts rejected draws as zero weights and clips nothing. Errors are one standard error, "
    "from a bootstrap over the draws. ln Z is that of the {}'s internal coordinates, rigid motions integrated out."
)


def write_report(
    path: str | os.PathLike,
    *,
    name: str,
    metrics: Metrics,
    figures: Mapping[str, Figure | bytes],
    settings: Mapping[str, Any],
    versions: Mapping[str, str],
    seed: int,
    notes: Sequence[str] = (),
) -> None:
    """Write the page, whole or not at all.

    Args:
        path: of the HTML file.
        name: of the molecule.
        metrics: as `analysis.metrics` gives, with anything else that was measured.
        figures: matplotlib figures, or the bytes of PNG files, by the names that `plotting.figures` uses.
        settings: the resolved configuration, sections within sections.
        versions: of packages.
        seed: of the run.
        notes: more warnings, whole sentences.

    Raises:
        OSError: the file cannot be written.
    """
    write_text(
        path,
        render(
            name=name,
            metrics=metrics,
            figures=figures,
            settings=settings,
            versions=versions,
            seed=seed,
            notes=notes,
        ),
    )


def render(
    *,
    name: str,
    metrics: Metrics,
    figures: Mapping[str, Figure | bytes],
    settings: Mapping[str, Any],
    versions: Mapping[str, str],
    seed: int,
    notes: Sequence[str] = (),
) -> str:
    """The page as text; arguments as in `write_report`."""
    cold = metrics["temperature_target_kelvin"]
    return page(
        f"{name} at {cold:g} K, from a {noun(metrics)} trained {trained(metrics)}",
        summary=summary(metrics),
        warnings=[*warning_sentences(metrics), *notes],
        tables=[_main_table(metrics), _comparison(metrics)],
        remark=REMARK.format(noun(metrics)),
        figures=figures,
        settings={"seed": seed, **settings},
        versions=versions,
        metrics=metrics,
        file="metrics.json",
        captions=CAPTIONS if noun(metrics) == "flow" else CAPTIONS | GENERATOR_CAPTIONS,
    )


def page(
    title: str,
    *,
    summary: Sequence[str],
    warnings: Sequence[str],
    tables: Sequence[str],
    remark: str,
    figures: Mapping[str, Figure | bytes],
    settings: Mapping[str, Any],
    versions: Mapping[str, str],
    metrics: Metrics,
    file: str,
    captions: Mapping[str, tuple[str, str]] = CAPTIONS,
) -> str:
    """A whole page.

    Args:
        title: plain text, like everything but the tables.
        summary: paragraphs; `warnings`: sentences, may be empty.
        tables: as `table` gives, with `remark` below them.
        figures: matplotlib figures or the bytes of PNG files by name.
        settings: sections within sections, or flat; `versions`: of packages.
        metrics: every figure that was measured, which is in the file of this name too.
        captions: heading and caption of each figure.
    """
    return Template(PAGE).substitute(
        title=escape(title),
        summary="".join(f"<p>{escape(sentence)}</p>" for sentence in summary),
        warnings=_warnings(warnings),
        table="".join(tables),
        remark=escape(remark),
        pictures="".join(_picture(key, figure, captions) for key, figure in figures.items()),
        settings=_pairs(_flat(settings)),
        versions=_pairs(versions),
        file=escape(file),
        metrics=_pairs(metrics),
    )


def noun(metrics: Metrics) -> str:
    """What the model is called: a flow, or another generator."""
    return "diffusion generator" if metrics.get("model") == "edg" else "flow"


def trained(metrics: Metrics) -> str:
    """At which temperature a model was trained, or over which."""
    low, high = (metrics.get(f"temperature_{which}_kelvin") for which in ("lowest", "highest"))
    if low is None or low == high:
        return f"at {metrics['temperature_train_kelvin']:g} K"
    return f"from {low:g} to {high:g} K"


def summary(metrics: Metrics) -> list[str]:
    """What was reached, in sentences."""
    cold = metrics["temperature_target_kelvin"]
    jointly = " (that of its positions and momenta)" if metrics.get("n_momenta") else ""
    jointly = " (that of its positions and latents)" if metrics.get("n_latents") else jointly
    sentences = [
        f"{_course(metrics)} Every draw has its exact weight{jointly}, so reweighted figures are free of the "
        f"{noun(metrics)}'s own errors as long as these numbers are not small."
    ]
    share, error = metrics.get("alpha_left_target"), metrics.get("alpha_left_target_error")
    if share is None or error is None:
        return sentences
    text, found = "alpha_L (0 < phi < 2.4 rad)", alpha_left(metrics, "target")
    seen = alpha_left_bound(metrics, "target") is None
    text += f" holds {found} of the molecules at {cold:g} K" if seen else f" at {cold:g} K: {found}"
    exact, exact_error = metrics.get("reference_alpha_left"), metrics.get("reference_alpha_left_error")
    if exact is not None and exact_error is not None:
        text += f"; a long reference simulation has {share_with_error(exact, exact_error)}"
        distance = deviation(metrics)
        text += "" if distance is None else f", {abs(distance):.1f} standard errors away"
    return [*sentences, text + "."]


def _course(metrics: Metrics) -> str:
    """How the flow came to its temperatures, and what its draws are worth there."""
    hot, cold = metrics["temperature_train_kelvin"], metrics["temperature_target_kelvin"]
    worth = f"Its {metrics['n_draws_target']:,} draws there are worth {percent(metrics['ess_target'])} of as many"
    at_home = f"those at {hot:g} K are worth {percent(metrics['ess_train'])}."
    if noun(metrics) != "flow":
        learned = "; what temperature does to it is learned, not exact" if metrics.get("is_conditioned") else ""
        end = "independent ones." if hot == cold else f"independent ones; {at_home}"
        return f"The {noun(metrics)} was trained {trained(metrics)} on energies alone{learned}. {worth} {end}"
    if hot == cold:
        return f"The flow was trained at {hot:g} K. {worth} independent ones."
    steered = "steered to" if metrics.get("steers", True) else "run, though it is of a kind that does not steer, at"
    return f"The flow was trained at {hot:g} K only and {steered} {cold:g} K. {worth} independent ones; {at_home}"


def share_bound(share: float, error: float, n_effective: float) -> float | None:
    """Upper bound (95 %, 3/n) on a share of which n effective draws show next to nothing; None where they show it.

    It takes for granted that the draws come from everywhere. 1 where they are too few to say anything.
    """
    if share * n_effective >= UNSEEN or error < 0.5 * share:
        return None
    return 3.0 / max(n_effective, 3.0)


def unseen(n_draws: int, raw: float | None, bound: float) -> str:
    """What such a bound means, in words; `raw` is the share of the draws as they come."""
    text = "next to no weight lies there" if raw else f"none of the {n_draws:,} draws lies there"
    return f"{text}, {'so few that it says nothing' if bound == 1.0 else f'below {percent(bound)} at 95 %'}"


def alpha_left_bound(metrics: Metrics, which: str) -> float | None:
    """`share_bound` of alpha_L in the metrics, "train" or "target"; None also where there is no such share."""
    share, error = metrics.get(f"alpha_left_{which}"), metrics.get(f"alpha_left_{which}_error")
    if share is None or error is None:
        return None
    n = metrics[f"n_draws_{which}"] + metrics[f"n_rejected_{which}"]
    return share_bound(share, error, metrics[f"ess_{which}"] * n)


def alpha_left(metrics: Metrics, which: str) -> str:
    """The share of alpha_L in the metrics, with its error or as a bound."""
    bound = alpha_left_bound(metrics, which)
    if bound is not None:
        return unseen(metrics[f"n_draws_{which}"], metrics.get(f"alpha_left_{which}_raw"), bound)
    return share_with_error(metrics[f"alpha_left_{which}"], metrics[f"alpha_left_{which}_error"])


def deviation(metrics: Metrics) -> float | None:
    """Standard errors by which alpha_L differs from the reference; None where the draws do not show it."""
    return None if alpha_left_bound(metrics, "target") is not None else metrics.get("alpha_left_target_deviation")


def warning_sentences(metrics: Metrics) -> list[str]:
    """What should make a reader careful, in sentences; empty when nothing does."""
    found = []
    same = metrics["temperature_target_kelvin"] == metrics["temperature_train_kelvin"]
    for which in ("target",) if same else ("target", "train"):
        temperature, ess = metrics[f"temperature_{which}_kelvin"], metrics[f"ess_{which}"]
        if ess < LOW_ESS:
            few = ess * metrics.get(f"n_draws_{which}", math.inf) < FEWEST_EFFECTIVE
            verdict = "out of reach" if ess < 0.01 or few else "at the edge of reach"
            at_home = temperature == metrics["temperature_train_kelvin"]
            nearer = "" if at_home else ", or ask for a temperature nearer to that of training"
            found.append(
                f"{temperature:g} K is {verdict} of this {noun(metrics)}: the effective sample size is {percent(ess)}. "
                f"Error bars there are themselves uncertain; train longer{nearer}."
            )
        largest = metrics.get(f"largest_weight_share_{which}")
        if largest is not None and largest > 0.1:
            found.append(f"One single draw carries {percent(largest)} of the weight at {temperature:g} K.")
    share, error = metrics.get("alpha_left_target"), metrics.get("alpha_left_target_error")
    if alpha_left_bound(metrics, "target") is not None:
        found.append(f"alpha_L: {alpha_left(metrics, 'target')}, if the {noun(metrics)} does not simply miss it.")
    elif share and error and error > 0.1 * share:
        found.append(f"The alpha_L share is known to {percent(error / share)} of itself only; more draws narrow it.")
    distance = deviation(metrics)
    if distance is not None and abs(distance) > FAR:
        found.append(f"The alpha_L share lies {abs(distance):.1f} standard errors from the reference.")
    return found


def percent(share: float | None) -> str:
    """A share as text with three digits."""
    return "-" if share is None else f"{100.0 * share:.3g}\N{NO-BREAK SPACE}%"


def share_with_error(share: float, error: float) -> str:
    """A share and its standard error in percent."""
    return f"{with_error(100.0 * share, 100.0 * error)}\N{NO-BREAK SPACE}%"


def with_error(value: float | None, error: float | None) -> str:
    """A value and its standard error, both to two digits of the error."""
    if value is None:
        return "-"
    if error is None or not error > 0.0 or not math.isfinite(error):
        return f"{value:.4g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    if digits > 9:  # not a row of zeros
        return f"{value:.2g} ± {error:.2g}"
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _main_table(metrics: Metrics) -> str:
    """Training temperature, target and reference side by side."""
    hot, cold = metrics["temperature_train_kelvin"], metrics["temperature_target_kelvin"]
    has_reference = metrics.get("reference_n_effective") is not None
    head = ["", f"{hot:g} K", f"{cold:g} K", *([f"reference, {cold:g} K"] if has_reference else [])]

    def row(label: str, cell: Any, reference: str = "") -> str:
        cells = [cell("train"), cell("target"), *([reference] if has_reference else [])]
        return f"<tr><th>{label}</th>" + "".join(f"<td>{escape(text)}</td>" for text in cells) + "</tr>"

    def get(key: str) -> Any:
        return metrics.get(key)

    def shares(key: str, error: str) -> str:
        value, deviation = get(key), get(error)
        return "-" if value is None or deviation is None else share_with_error(value, deviation)

    energy = "mean_energy_{}_kj_per_mol", "mean_energy_{}_error_kj_per_mol"
    rows = [
        row("draws", lambda w: f"{get(f'n_draws_{w}'):,}"),
        row("rejected on the way", lambda w: f"{get(f'n_rejected_{w}'):,}"),
        row("effective sample size (Kish, unclipped)", lambda w: percent(get(f"ess_{w}"))),
        row("largest weight, share of all", lambda w: percent(get(f"largest_weight_share_{w}"))),
        row("ln Z [nat]", lambda w: with_error(get(f"log_z_{w}_nat"), get(f"log_z_{w}_error_nat"))),
        *(
            [row("lower bound of ln Z [nat]", lambda w: with_error(get(f"log_z_bound_{w}_nat"), None))]
            if get("log_z_bound_target_nat") is not None
            else []
        ),
        row(
            "mean potential energy [kJ/mol]",
            lambda w: with_error(get(energy[0].format(w)), get(energy[1].format(w))),
            with_error(get("reference_mean_energy_kj_per_mol"), get("reference_mean_energy_error_kj_per_mol")),
        ),
    ]
    if get("alpha_left_target") is not None:
        free = "alpha_left_{}_free_energy_kt", "alpha_left_{}_free_energy_error_kt"
        exact = shares("reference_alpha_left", "reference_alpha_left_error")
        bound = {w: alpha_left_bound(metrics, w) for w in ("train", "target")}

        def share(w: str) -> str:
            return shares(f"alpha_left_{w}", f"alpha_left_{w}_error") if bound[w] is None else f"< {percent(bound[w])}"

        def free_energy(w: str) -> str:
            if bound[w] is not None:
                return f"> {abs(math.log(bound[w])):.2g}"
            return with_error(*(get(key.format(w)) for key in free))

        rows += [
            row(f"{ALPHA} share", share, exact),
            row(f"{ALPHA} share as drawn, unweighted", lambda w: percent(get(f"alpha_left_{w}_raw"))),
            row(f"{ALPHA} free energy [kT]", free_energy),
        ]
    return table(head, rows)


def _comparison(metrics: Metrics) -> str:
    """Distance of the Ramachandran histogram to the reference; empty without one."""
    names = {
        "ramachandran_kl": f"KL(reference || {noun(metrics)}) [nat]",
        "ramachandran_tv": "total variation",
        "ramachandran_excess_tv": "total variation beyond what exact samples show",
        "ramachandran_excess_tv_raw": "the same, draws unweighted",
    }
    rows = [
        f"<tr><th>{escape(label)}</th><td>{metrics[key]:.4f}</td></tr>"
        for key, label in names.items()
        if metrics.get(key) is not None
    ]
    return table(["Ramachandran histogram against the reference, 64 by 64 bins", ""], rows) if rows else ""


ALPHA = "&alpha;<sub>L</sub>"


def table(head: Sequence[str], rows: Sequence[str]) -> str:
    """A table in HTML: headings in plain text, rows in HTML."""
    cells = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    return f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _picture(name: str, figure: Figure | bytes, captions: Mapping[str, tuple[str, str]]) -> str:
    content = figure if isinstance(figure, bytes) else png(figure)
    data = base64.b64encode(content).decode("ascii")
    title, caption = captions.get(name, (name, ""))
    image = f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">'
    return (
        f'<figure id="{escape(name)}"><h3>{escape(title)}</h3><div class="wide">{image}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _warnings(sentences: Sequence[str]) -> str:
    if not sentences:
        return ""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f'<aside role="note"><h2>Take care</h2><ul>{items}</ul></aside>'


def _pairs(values: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><th>{escape(key)}</th><td>{escape(_plain(value))}</td></tr>" for key, value in values.items())
    return f'<div class="wide"><table class="pairs"><tbody>{rows}</tbody></table></div>'


def _plain(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    return ", ".join(map(_plain, value)) if isinstance(value, (list, tuple)) else str(value)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
