"""Pages: escaping, figures, and the base template in a browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import open_browser, open_page
from jinja2 import UndefinedError
from matplotlib.colors import to_rgb

from bn_detection.page import COLORS, figure, new_figure, render
from bn_detection.page.render import _environment, _number

TEMPLATES = Path(__file__).parents[1] / "bn_detection/page/templates"


def _luminance(color: str | list[float]) -> float:
    """Relative luminance of WCAG 2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _contrast(one: str, other: str) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _themes() -> list[dict[str, str]]:
    """The colours of the light and of the dark theme."""
    css = (TEMPLATES / "base.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", css, re.DOTALL)[:2]
    return [dict(re.findall(r"--(\w+): (#\w+);", block)) for block in blocks]


def test_contrast_of_known_pairs() -> None:
    assert _contrast("#000000", "#ffffff") == pytest.approx(21)
    assert _contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("theme", _themes(), ids=["light", "dark"])
def test_text_and_lines_stand_out_on_both_themes(theme: dict[str, str]) -> None:
    for name in ("ink", "soft", "accent", "good", "bad"):
        assert _contrast(theme[name], theme["page"]) >= 4.5, name
        assert _contrast(theme[name], theme["card"]) >= 4.5, name
    for color in COLORS:
        assert _contrast(color, theme["page"]) >= 3, color


def test_a_name_that_is_missing_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="study"):
        render("report.html.j2")


def test_numbers() -> None:
    assert _number(-1.26, 1) == "\N{MINUS SIGN}1.3"
    assert _number(3.0, 1, signed=True) == "+3.0"
    assert _number(None) == "\N{EN DASH}"


def test_figure_says_what_it_shows_and_repeats_no_id() -> None:
    parts = []
    for height in (1, 2):
        made, axes = new_figure()
        axes.plot([1, 2], [1, height], marker="o", color=COLORS[0])
        parts.append(str(figure(made, 'AP "rises" <fast>', "a & b")))
    for part in parts:
        assert 'aria-label="AP &#34;rises&#34; &lt;fast&gt;"' in part
        assert "<figcaption>a &amp; b</figcaption>" in part
        ids = re.findall(r'\bid="([^"]+)"', part)
        used = re.findall(r'(?:href="|url\()#([\w.-]+)', part)
        assert used and {*used} <= {*ids}
        assert "#000000" not in part
    one, other = ({*re.findall(r'\bid="([^"]+)"', part)} for part in parts)
    assert not one & other


PAGE = """{% extends "base.html.j2" %}
{% block title %}Tables{% endblock %}
{% block content %}
<h1>{{ heading }}</h1>
<label>Rows <input class="filter" data-table="t"></label>
<div class="scroll"><table class="sortable" id="t"><caption>Things</caption>
<thead><tr><th scope="col">Name</th><th scope="col">Value</th></tr></thead>
<tbody>
{% for name, text, value in rows %}
<tr><th scope="row">{{ name }}</th><td data-value="{{ value }}">{{ text }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endblock %}"""
ROWS = [
    ("run 10", "9.5 ± 1", "9.5"),
    ("Run 2", "10.1 ± 1", "10.1"),
    ("run 1", "\N{MINUS SIGN}3", "-3"),
    ("other", "", ""),
]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with open_browser() as browser:
        yield browser


@pytest.fixture
def page(tmp_path: Path) -> Path:
    environment = _environment()
    path = tmp_path / "page.html"
    html = environment.from_string(PAGE).render(heading="<b>bold</b>", rows=ROWS)
    path.write_text(html, encoding="utf-8")
    return path


def _names(page: Any) -> list[str]:
    return page.locator("tbody tr:visible th").all_inner_texts()


def test_tables_sort_by_number_and_by_text(chromium: Any, page: Path) -> None:
    with open_page(chromium, page) as opened:
        assert opened.locator("h1").inner_text() == "<b>bold</b>"
        name, value = opened.locator("thead th").all()
        assert value.get_attribute("aria-sort") is None
        value.locator("button").click()
        assert _names(opened) == ["run 1", "run 10", "Run 2", "other"]
        assert value.get_attribute("aria-sort") == "ascending"
        value.locator("button").click()
        assert _names(opened) == ["Run 2", "run 10", "run 1", "other"]
        assert value.get_attribute("aria-sort") == "descending"
        name.locator("button").click()
        assert _names(opened) == ["other", "run 1", "Run 2", "run 10"]
        assert value.get_attribute("aria-sort") is None


def test_rows_are_filtered_by_every_word(chromium: Any, page: Path) -> None:
    with open_page(chromium, page) as opened:
        opened.locator("input").fill("RUN 1")
        assert _names(opened) == ["run 10", "Run 2", "run 1"]  # "10.1" has a 1 as well
        opened.locator("input").fill("9.5 run")
        assert _names(opened) == ["run 10"]
        assert opened.locator("output").inner_text() == "1 of 4 rows"
        assert opened.locator(".more button").is_hidden()
        for negative in ("-3", "\N{MINUS SIGN}3"):
            opened.locator("input").fill(negative)
            assert _names(opened) == ["run 1"]
        opened.locator("input").fill("")
        assert len(_names(opened)) == 4


def test_keyboard_alone_reaches_the_content_and_sorts(chromium: Any, page: Path) -> None:
    with open_page(chromium, page) as opened:
        focused = opened.locator(":focus")
        opened.keyboard.press("Tab")
        assert focused.inner_text() == "Skip to the content"
        assert focused.bounding_box()["x"] >= 0
        opened.keyboard.press("Enter")
        assert focused.get_attribute("id") == "content"
        opened.keyboard.press("Tab")
        while focused.evaluate("e => e.tagName") != "BUTTON":
            opened.keyboard.press("Tab")
        assert focused.evaluate("e => getComputedStyle(e).outlineStyle") == "solid"
        opened.keyboard.press("Enter")
        assert _names(opened)[0] == "other"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_is_that_of_the_reader(scheme: str, chromium: Any, page: Path) -> None:
    with open_page(chromium, page, color_scheme=scheme) as opened:
        found = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    shade = _luminance([int(part) / 255 for part in re.findall(r"\d+", found)][:3])
    assert shade > 0.9 if scheme == "light" else shade < 0.05


def test_print_has_no_controls(chromium: Any, page: Path) -> None:
    with open_page(chromium, page, color_scheme="dark") as opened:
        opened.emulate_media(media="print")
        assert opened.locator(".skip").is_hidden()
        arrow = "getComputedStyle(document.querySelector('th button'), '::after').content"
        assert opened.evaluate(arrow) == "none"
        color = "getComputedStyle(document.body).backgroundColor"
        assert opened.evaluate(color) == "rgb(255, 255, 255)"
