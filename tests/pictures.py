"""What a reader would see of a figure: its texts, and which of them are in each other's way."""

import itertools

from openmm_tsf import canvas


def words(figure) -> list[str]:
    """Texts of a figure that are visible and not empty."""
    import matplotlib.text

    found = [text for text in figure.findobj(matplotlib.text.Text) if text.get_visible() and text.get_text().strip()]
    return [text.get_text() for text in found]


def misplaced(figure) -> list[str]:
    """Texts that overlap another or leave the page: titles, labels, ticks, legends and the small print."""
    import matplotlib.text

    canvas.png(figure, dpi=100)  # lays it out
    page, texts = figure.bbox, list(figure.texts)
    assert len(texts) <= 1  # the small print
    for axes in figure.axes:
        texts += [axes.get_xaxis().label, axes.get_yaxis().label, *axes.texts]
        texts += [part for part in axes.get_children() if isinstance(part, matplotlib.text.Text)]  # titles
        texts += [] if axes.get_legend() is None else axes.get_legend().get_texts()
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            for where, label in zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=False):
                texts += [label] if min(limits) - 1e-9 <= where <= max(limits) + 1e-9 else []
    shown = {id(text): text for text in texts if text.get_visible() and text.get_text().strip()}
    boxes = [(text.get_text(), text.get_window_extent()) for text in shown.values()]
    assert len(boxes) > 10
    found = [label for label, box in boxes if min(box.x0, box.y0) < -1 or box.x1 > page.x1 + 1 or box.y1 > page.y1 + 1]
    for (first, a), (second, b) in itertools.combinations(boxes, 2):
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1:
            found.append(f"{first!r} overlaps {second!r}")
    return found
