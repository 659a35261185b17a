"""Pages: escaping, figures, and the base template in a browser."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from jinja2 import UndefinedError
from matplotlib.colors import to_rgb

from bn_detection.page import COLORS, figure, new_figure, render, write_page
from bn_detection.page.render import _number

TEMPLATES = Path(__file__).parents[1] / "bn_detection/page/templates"


def _luminance(color: str) -> float:
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


def test_what_is_filled_in_is_escaped_and_must_be_there() -> None:
    with pytest.raises(UndefinedError):
        render("report.html.j2")


def test_numbers() -> None:
    assert _number(-1.25, 1) == "−1.2"
    assert _number(3.0, 1, signed=True) == "+3.0"
    assert _number(None) == "–"


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


def test_a_page_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    write_page(path, "old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_page(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
