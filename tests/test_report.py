"""The report: self-contained, well-formed, escaped, and honest about weak figures."""

import math
import re
from html.parser import HTMLParser

import pytest

from openmm_tsf import report

PNG = b"\x89PNG\r\n\x1a\nnot really"
VOID = {"meta", "img", "br", "link"}


def metrics(**changes) -> dict:
    values = {}
    for which, temperature in (("train", 600.0), ("target", 300.0)):
        values |= {
            f"temperature_{which}_kelvin": temperature,
            f"n_draws_{which}": 100_000,
            f"n_rejected_{which}": 321,
            f"ess_{which}": 0.55,
            f"largest_weight_share_{which}": 0.001,
            f"log_z_{which}_nat": -12.3456,
            f"log_z_{which}_error_nat": 0.0071,
            f"mean_energy_{which}_kj_per_mol": -97.8123,
            f"mean_energy_{which}_error_kj_per_mol": 0.0971,
            f"alpha_left_{which}": 0.0026,
            f"alpha_left_{which}_error": 0.00012,
            f"alpha_left_{which}_raw": 0.0031,
            f"alpha_left_{which}_free_energy_kt": 5.95,
            f"alpha_left_{which}_free_energy_error_kt": 0.046,
        }
    values |= {"reference_n_effective": 1e6, "reference_alpha_left": 0.00262, "reference_alpha_left_error": 0.00005}
    values |= {"reference_mean_energy_kj_per_mol": -97.7, "reference_mean_energy_error_kj_per_mol": 0.02}
    values |= {"alpha_left_target_deviation": -0.15, "ramachandran_kl": 0.003, "ramachandran_tv": 0.02}
    values |= {"ramachandran_excess_tv": 0.001, "ramachandran_excess_tv_raw": 0.03, "n_energy_evaluations": 10}
    return values | changes


def page(**changes) -> str:
    arguments = {
        "name": "ala2",
        "metrics": metrics(),
        "figures": {"ramachandran": PNG, "odd": PNG},
        "settings": {"train": {"steps": 3000, "sizes": [64, 64]}, "title": "x"},
        "versions": {"torch": "2.13"},
        "seed": 42,
    }
    return report.render(**(arguments | changes))


class Checker(HTMLParser):
    """Collects text, and complains about tags left open or closed out of turn."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.words, self.sources = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.sources += [value for key, value in attributes if key in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_page_is_well_formed_and_self_contained():
    text = page()
    checker = Checker(text)
    assert len(checker.sources) == 2
    assert all(source.startswith("data:image/png;base64,") for source in checker.sources)
    assert not re.search(r"https?://|<script|@import|\$\w", text)


def test_page_has_the_figures_settings_versions_and_seed():
    words = "".join(Checker(page()).words)
    for expected in (
        "ala2 at 300 K, from a flow trained at 600 K",
        "worth 55\u00a0% of as many independent ones",
        "0.260 ± 0.012\u00a0%",
        "0.2620 ± 0.0050\u00a0%, 0.1 standard errors away",
        "-12.3456 ± 0.0071",
        "-97.812 ± 0.097",
        "Ramachandran maps",
        "train.steps",
        "64, 64",
        "reference, 300 K",
    ):
        assert expected in words
    assert re.search(r"seed</th><td>42<", page())
    assert "Take care" not in words


def test_text_from_outside_is_escaped():
    nasty = "<script>alert('x')</script> & $title"
    text = page(name=nasty, settings={nasty: nasty}, versions={nasty: nasty}, notes=[nasty], figures={nasty: PNG})
    assert "<script" not in text
    words = "".join(Checker(text).words)
    assert words.count(nasty) >= 6


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"ess_target": 0.004}, "300 K is out of reach of this flow: the effective sample size is 0.4"),
        ({"ess_train": 0.05}, "600 K is at the edge of reach"),
        ({"ess_train": 0.05, "n_draws_train": 300}, "600 K is out of reach of this flow"),
        ({"largest_weight_share_target": 0.3}, "One single draw carries 30"),
        ({"alpha_left_target_deviation": -4.2}, "lies 4.2 standard errors from the reference"),
        ({"alpha_left_target_error": 0.0005}, "known to 19.2"),
    ],
)
def test_weak_figures_are_called_so(changes, expected):
    sentences = report.warning_sentences(metrics(**changes))
    assert len(sentences) == 1
    assert expected in sentences[0]
    assert "Take care" in page(metrics=metrics(**changes))
    assert report.warning_sentences(metrics()) == []


def test_at_the_training_temperature_nothing_nearer_is_advised():
    (sentence,) = report.warning_sentences(metrics(temperature_target_kelvin=600.0, ess_target=0.05, ess_train=0.05))
    assert "train longer." in sentence and "nearer" not in sentence
    (text, _) = report.summary(metrics(temperature_target_kelvin=600.0))
    assert (
        text.startswith("The flow was trained at 600 K. Its 100,000 draws there are worth 55") and "steer" not in text
    )


def test_flows_that_do_not_steer_are_not_said_to():
    assert "trained at 600 K only and steered to 300 K" in report.summary(metrics())[0]
    text = report.summary(metrics(steers=False, n_momenta=60))[0]
    assert "run, though it is of a kind that does not steer, at 300 K" in text
    assert "exact weight (that of its positions and momenta)" in text


@pytest.mark.parametrize(
    ("share", "error", "raw", "words"),
    [
        (0.0, 0.0, 0.0, "none of the 100,000 draws lies there"),
        (3e-102, 2.9e-102, 1e-5, "next to no weight lies there"),
    ],
)
def test_a_basin_that_was_not_drawn_has_a_bound_and_no_deviation(share, error, raw, words):
    """3 over the effective draws: 55 % of 100,321."""
    gone = {"alpha_left_target": share, "alpha_left_target_error": error, "alpha_left_target_raw": raw}
    found = metrics(**gone, alpha_left_target_deviation=-52.0, alpha_left_target_free_energy_kt=None)
    assert report.alpha_left_bound(found, "target") == pytest.approx(3 / 55_176.55)
    assert report.alpha_left_bound(found, "train") is None
    assert report.deviation(found) is None
    text = "".join(Checker(page(metrics=found)).words)
    assert f"{words}, below 0.00544\u00a0% at 95 %; a long reference simulation has 0.2620" in text
    assert "if the flow does not simply miss it" in text and "> 9.8" in text
    assert "52" not in text.split("How this was made")[0] and "standard errors" not in text and "0000000" not in text
    assert report.share_bound(0.0, 0.0, 1.5) == 1.0  # too few to say anything
    assert report.share_bound(1e-6, 1e-7, 50_000.0) is None  # rare, and well known from exploring draws


def test_page_without_reference_backbone_or_weights():
    gone = {key: None for key in metrics() if key.startswith(("reference", "ramachandran", "alpha_left"))}
    gone |= {"largest_weight_share_target": None, "ess_target": 0.0, "log_z_target_nat": None}
    text = page(metrics=metrics(**gone), figures={})
    words = "".join(Checker(text).words)
    assert "reference, 300 K" not in words
    assert "total variation" not in words
    assert "nan" not in words


def test_values_carry_two_digits_of_their_error():
    assert report.with_error(12.34567, 0.0234) == "12.346 ± 0.023"
    assert report.with_error(12.34567, 23.4) == "12 ± 23"
    assert report.with_error(12.34567, None) == report.with_error(12.34567, math.nan) == "12.35"
    assert report.with_error(None, None) == "-"
    assert report.with_error(3.2e-100, 2.5e-100) == "3.2e-100 ± 2.5e-100"
    assert report.percent(0.5678) == "56.8\u00a0%"


def test_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.html"
    arguments = {"name": "a", "metrics": metrics(), "settings": {}, "versions": {}, "seed": 1}
    report.write_report(path, figures={"phi": PNG}, **arguments)
    before = path.read_text("utf-8")
    assert before.startswith("<!DOCTYPE html>")
    with pytest.raises(AttributeError):
        report.write_report(path, figures={"phi": object()}, **arguments)
    assert path.read_text("utf-8") == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
