"""Figures of matplotlib in a page, readable on a light and on a dark background."""

from __future__ import annotations

import hashlib
import io
import re
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

# Told apart by the colour-blind, and each with a contrast of at least 3 to both themes' background.
COLORS = ("#4477aa", "#e0566a", "#228833", "#b8478c", "#a8850f", "#2593b5", "#7a7a7a")
MARKERS = "osD^vPX"

_GRID = {"color": "#808080", "alpha": 0.3, "linewidth": 0.6}
_SVG = {"svg.fonttype": "path", "svg.hashsalt": "bn_detection"}


def new_figure(width: float = 6.4, height: float = 4.0, **subplots: Any) -> tuple[Figure, Any]:
    """A figure in the style of the pages. Nothing holds it: it needs no closing.

    Args:
        width: in inches; the page shrinks what is too wide for it.
        height: in inches.
        subplots: for :meth:`matplotlib.figure.Figure.subplots`.

    Returns:
        The figure and its axes.
    """
    made = Figure(figsize=(width, height), layout="constrained")
    axes = made.subplots(**subplots)
    for panel in made.axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(**_GRID)
        panel.set_axisbelow(True)
    return made, axes


def figure(fig: Figure, alt: str, caption: str) -> Markup:
    """A figure as inline SVG with a text alternative.

    Its background is transparent and what is black takes the colour of the page's text.

    Args:
        fig: the figure, without a background of its own.
        alt: what it shows, with the numbers, for those who do not see it.
        caption: below the figure, for all.

    Returns:
        A ``<figure>`` element.
    """
    file = io.StringIO()
    with matplotlib.rc_context(_SVG):
        fig.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    # Ids are those of the whole page, and matplotlib repeats its own from figure to figure.
    own = "f" + hashlib.sha256(svg.encode()).hexdigest()[:8]
    svg = re.sub(r'\bid="', f'id="{own}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{own}-", svg)
    svg = re.sub(r"<(metadata|style).*?</\1>", "", svg, flags=re.DOTALL)
    svg = svg.replace("#000000", "currentColor")
    return Markup(
        '<figure><div class="scroll" tabindex="0" role="img" aria-label="{}">{}</div>'
        "<figcaption>{}</figcaption></figure>"
    ).format(alt, Markup(svg), caption)
