"""What the site has from outside docs/ (README, examples), and what GitHub's Markdown has."""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
EXAMPLES = {
    f"examples/{p.name}": f"examples/{p.stem}.md"
    for p in (ROOT / "examples").iterdir()
    if p.suffix in (".py", ".ipynb")
}

LINK = re.compile(r"\[([^\[\]]*)\]\(([^)\s:#]+)((?:#[\w-]*)?)\)")
FORMULA = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MATH = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.+?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add pages for files outside docs/."""
    for source, page in PAGES.items():
        text = _site_links((ROOT / source).read_text(), ".", ".")
        text = text.replace('src="docs/', 'src="').replace('srcset="docs/', 'srcset="')
        files.append(File.generated(config, page, content=text))
    for source, page in EXAMPLES.items():
        text = (ROOT / source).read_text()
        text = _notebook(text) if source.endswith(".ipynb") else f"```python\n{text}```\n"
        text = text if text.startswith("# ") else f"# {source}\n\n{text}"
        files.append(File.generated(config, page, content=text))
    return files


def _notebook(text: str) -> str:
    """The cells of a notebook as Markdown."""
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
    return "\n\n".join(
        f"```python\n{code}\n```" if kind == "code" else code for kind, code in cells
    )


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to files outside docs/ lead to their pages, and pages are named by their titles."""
    if page.file.generated_by is None:
        folder = posixpath.dirname(page.file.src_uri)
        markdown = _site_links(markdown, posixpath.join("docs", folder), folder)
    return FORMULA.sub(r"$$\n\1$$", markdown)


def _site_links(text: str, folder: str, page_folder: str) -> str:
    """Links between files of ``folder`` as those of a page in ``page_folder`` of the site."""

    def link(match: re.Match[str]) -> str:
        shown, target, anchor = match.groups()
        path = posixpath.normpath(posixpath.join(folder, target))
        if shown.endswith(".md"):
            shown = re.search(r"^# (.+)$", (ROOT / path).read_text(), re.MULTILINE)[1]
        page = {**PAGES, **EXAMPLES}.get(path) or path.removeprefix("docs/")
        return f"[{shown}]({posixpath.relpath(page, page_folder or '.')}{anchor})"

    return LINK.sub(link, text)


def on_page_content(html: str, **_: Any) -> str:
    """Formulas as MathML, which browsers show without a script."""
    return MATH.sub(lambda m: convert(m[3], display="inline" if m[2] == "(" else "block"), html)
