"""From a template to a page that needs no network."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

MISSING = "\N{EN DASH}"


def render(template: str, **context: Any) -> str:
    """Fill a template of ``bn_detection/page/templates``.

    What is filled in is escaped, unless it is :class:`markupsafe.Markup`, as a :func:`figure` is. A
    template extends ``base.html.j2``, whose blocks are ``title``, ``style`` (more CSS) and
    ``content``. Of the base:

    * ``<table class="sortable">`` gets a button in each ``<th>`` of its head. The value that a cell
      sorts by is its ``data-value``, else its text; cells without one come last. Of many rows it
      shows the first 200, and all at a click.
    * ``<input class="filter" data-table="ID">`` shows the rows of that sortable table that hold
      each of the words typed.
    * ``<div class="scroll">`` around a wide table keeps the page itself from scrolling sideways; in
      print it stays on one page, if it fits and is not ``long`` too.
    * ``{{ value | number(1) }}`` rounds, with a sign if ``signed=True``; None gives a dash.

    Args:
        template: a file name, such as ``report.html.j2``.
        context: what the template names. A name that is missing is an error.

    Returns:
        The HTML of the page.

    Raises:
        jinja2.TemplateNotFound: no template has this name.
        jinja2.UndefinedError: the template names something that ``context`` lacks.
    """
    return _environment().get_template(template).render(**context)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("bn_detection.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    environment.globals["source"] = lambda name: Markup(
        environment.loader.get_source(environment, name)[0]
    )
    return environment


def _number(value: float | None, decimals: int = 1, signed: bool = False) -> str:
    """A number with a true minus sign, or a dash for None."""
    if value is None:
        return MISSING
    return f"{value:{'+' if signed else ''}.{decimals}f}".replace("-", "\N{MINUS SIGN}")
