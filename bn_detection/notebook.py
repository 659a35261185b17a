"""Reports in a notebook."""

from __future__ import annotations

from html import escape


def framed(page: str) -> str:
    """A whole page within a cell, with its own style and scripts.

    Args:
        page: of HTML that needs no network.
    """
    style = "width: 100%; height: 42rem; border: 1px solid #8888"
    return f'<iframe srcdoc="{escape(page)}" style="{style}" title="report"></iframe>'


def preformatted(text: str) -> str:
    """The text of a terminal within a cell."""
    return f'<pre style="line-height: 1.3; overflow-x: auto">{escape(text)}</pre>'
