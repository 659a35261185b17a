"""A notebook's code, run cell by cell in one namespace, as Jupyter shows what cells give."""

from __future__ import annotations

import ast
import contextlib
import io
import json
from pathlib import Path
from typing import Any, NamedTuple


class Shown(NamedTuple):
    """What a cell shows.

    Attributes:
        printed: its output.
        html: of its last expression, if that has a form for notebooks.
        value: of its last expression.
    """

    printed: str
    html: str
    value: Any


def run_notebook(path: Path, **names: Any) -> list[Shown]:
    """Run the code cells of a notebook.

    Args:
        path: of the ``.ipynb``.
        names: that replace what the notebook assigns to them at top level, such as fewer steps.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    cells = json.loads(path.read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return [_run(source, namespace, names) for source in sources]


def _run(source: str, namespace: dict[str, Any], names: dict[str, Any]) -> Shown:
    body = ast.parse(source).body
    for statement in body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            name = statement.targets[0].id
            if name in names:
                statement.value = ast.copy_location(ast.Constant(names[name]), statement)
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(body, []), "cell", "exec"), namespace)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), namespace)
    html = value._repr_html_() if hasattr(value, "_repr_html_") else ""
    return Shown(printed.getvalue(), html, value)
