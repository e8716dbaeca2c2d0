"""The words and the look of the report."""

CAPTIONS = {
    "ramachandran": (
        "Ramachandran maps",
        "Free energy over the two backbone torsions, all panels on one colour scale. The flow has seen only the first "
        "panel. The draws at the target temperature are shown as they come and reweighted; where these two look alike, "
        "the flow is good there, and the reweighted one is what to use. Blank cells were never visited.",
    ),
    "phi": (
        "The torsion \N{GREEK SMALL LETTER PHI}",
        "Density of \N{GREEK SMALL LETTER PHI} on a logarithmic scale, so that the rare left-handed region (shaded) "
        "can be seen. Lines that agree within the bands, which are one standard error, say that the ensembles agree.",
    ),
    "energies": (
        "Potential energies",
        "A flow that is not sharp enough draws energies that are too high. Reweighting brings them back; what it costs "
        "is the effective sample size. Draws beyond the axis are named in the legend.",
    ),
    "training": (
        "Training",
        "The likelihood loss on held-out frames, which come later in time than the training frames, should fall with "
        "the training loss and not rise again. The effective sample size is that at the training temperature.",
    ),
    "observables": (
        "Observables against temperature",
        "Reweighted averages at each temperature with bootstrap errors. The effective sample size says how far they "
        "may be trusted; where it falls below 1 % they are left out.",
    ),
    "exchange": (
        "Acceptance, swaps and paths",
        "Flow moves accepted at each temperature, exchanges accepted between temperatures, and how replicas travel. "
        "A round trip goes from the lowest temperature to the highest and back. Each strip is one replica, with the "
        "lowest temperature at its bottom and the highest at its top; a replica that never crosses its strip says that "
        "the ladder has a gap.",
    ),
    "ramachandran_exchange": (
        "Ramachandran maps at the lowest temperature",
        "The flow as it draws, the flow reweighted, the stored frames of the exchange weighed by MBAR, and a long "
        "reference where there is one, all on one colour scale. The exchange does not need the flow to be good; where "
        "the reweighted flow differs from it, one of the two has too few effective samples.",
    ),
    "observables_exchange": (
        "Observables against temperature",
        "MBAR over all temperatures of the exchange beside reweighted draws of the flow and the reference. The strips "
        "show the differences from the exchange in standard errors: two in three should lie in the grey band, and "
        "neighbours on a line go together, because they come from the same samples.",
    ),
}
"""Heading and caption of each figure."""

GENERATOR_CAPTIONS = {
    "ramachandran": (
        "Ramachandran maps",
        "Free energy over the two backbone torsions, all panels on one colour scale. The first panel is the short "
        "dynamics that coordinates were taken from; the generator has learned from energies alone. Its draws are shown "
        "as they come and reweighted; where these two look alike, it is good there, and the reweighted ones are what "
        "to use. Blank cells were never visited.",
    ),
    "energies": (
        "Potential energies",
        "A generator that is not sharp enough draws energies that are too high. Reweighting brings them back; what it "
        "costs is the effective sample size. Draws beyond the axis are named in the legend.",
    ),
    "training": (
        "Training",
        "The bound that training lowers, less ln Z, once the target is at its own temperature. Its distance from -ln Z "
        "bounds the relative entropy of generator and molecule; over a range of temperatures both are means.",
    ),
}
"""The same of a diffusion generator, where they differ."""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { --ink: #1a1d21; --soft: #5b636d; --line: #d9dde2; --accent: #0072b2; --warn: #d55e00; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.1rem 4rem; max-width: 64rem; color: var(--ink); background: #fff;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 1.65rem; line-height: 1.25; margin: 0 0 1rem; letter-spacing: -0.01em; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 0.7rem; padding-top: 0.7rem; border-top: 2px solid var(--ink); }
h3 { font-size: 1rem; margin: 0 0 0.4rem; }
p, figcaption, li { max-width: 44rem; }
figure { margin: 0 0 2.4rem; }
figcaption { color: var(--soft); font-size: 0.92rem; margin-top: 0.4rem; }
img { display: block; width: 100%; max-width: 60rem; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 0.6rem 0 1.4rem; font-size: 0.94rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.36rem 1.3rem 0.36rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
tbody th { font-weight: 400; color: var(--soft); }
thead th { font-weight: 600; border-bottom-color: var(--ink); }
td { white-space: nowrap; }
.pairs { font-size: 0.84rem; }
.pairs td { white-space: normal; overflow-wrap: anywhere; }
aside { border-left: 4px solid var(--warn); background: #fdf3ec; padding: 0.7rem 1.1rem; margin: 1.4rem 0; }
aside h2 { border: 0; margin: 0; padding: 0; font-size: 1.02rem; color: var(--warn); }
aside ul { margin: 0.3rem 0 0; padding-left: 1.1rem; }
summary { cursor: pointer; color: var(--accent); margin: 0.5rem 0; }
@media (max-width: 46rem) { h1 { font-size: 1.35rem; } img { min-width: 42rem; } th, td { padding-right: 0.9rem; } }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  figure, table, aside { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .wide { overflow: visible; }
  img { min-width: 0; max-width: 100%; }
}
</style>
</head>
<body>
<h1>$title</h1>
$summary
$warnings
<h2>Figures of merit</h2>
$table
<p>$remark</p>
<h2>Pictures</h2>
$pictures
<h2>How this was made</h2>
<h3>Settings</h3>
$settings
<h3>Versions</h3>
$versions
<details><summary>Every figure that was measured, as in $file</summary>
$metrics
</details>
</body>
</html>
"""
