"""Self-contained HTML pages: one look for the study's report and the diagnosis."""

from .figure import COLORS, MARKERS, figure, new_figure
from .render import render

__all__ = ["COLORS", "MARKERS", "figure", "new_figure", "render"]
