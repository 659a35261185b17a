"""Which rooms of the package import which: read from the sources, and drawn."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

PACKAGE = Path(__file__).parents[1] / "bn_detection"


def room(path: Path) -> str:
    """The subpackage of a module; "" of those beside the rooms."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


def imported(path: Path) -> Iterator[str]:
    """The full names of the modules that a file imports, also within functions."""
    here = ["bn_detection", *path.relative_to(PACKAGE).parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join([*here[: -node.level], *(node.module or "").split(".")]).rstrip(".")
            if node.module:
                yield base
            else:  # names of modules
                yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def rooms_imported(path: Path) -> set[str]:
    """The rooms that a file imports from, without its own."""
    found = set()
    for name in imported(path):
        package, _, rest = name.partition(".")
        if package == "bn_detection":
            first = rest.partition(".")[0]
            found.add(first if (PACKAGE / first).is_dir() and first else "")
    return found - {room(path)}


def imports() -> dict[str, set[str]]:
    """What each room imports from; the modules beside the rooms are left out."""
    graph: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.glob("*/**/*.py")):
        graph.setdefault(room(path), set()).update(rooms_imported(path) - {""})
    return graph


def draw_rooms() -> Figure:
    """The rooms, each above all that it imports; an arrow that follows from others is left out."""
    graph = imports()

    @cache
    def reach(name: str) -> frozenset[str]:
        return frozenset(graph[name]).union(*(reach(other) for other in graph[name]))

    @cache
    def level(name: str) -> int:
        return 1 + max(map(level, graph[name]), default=-1)

    arrows = {
        name: sorted(others - frozenset().union(*map(reach, others)))
        for name, others in graph.items()
    }
    # From the middle outwards, what is imported from higher and higher.
    importer = {
        name: max((level(n) for n in graph if name in arrows[n]), default=0) for name in graph
    }
    rows: dict[int, list[str]] = {}
    for name in sorted(graph, key=lambda name: importer[name]):
        rows.setdefault(level(name), []).append(name)
    place = {
        name: (2.6 * (-1) ** k * ((k + 1) // 2), 1.3 * height)
        for height, row in rows.items()
        for k, name in enumerate(row)
    }
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    for name, (x, y) in place.items():
        box = {
            "boxstyle": "round,pad=0.5",
            "facecolor": "none",
            "edgecolor": "C0",
            "linewidth": 1.5,
        }
        axes.text(x, y, name, ha="center", va="center", bbox=box)
        for other in arrows[name]:
            style = {"arrowstyle": "->", "color": "C7", "shrinkA": 16, "shrinkB": 16}
            axes.annotate("", place[other], (x, y), arrowprops=style)
    widest, top = max(abs(x) for x, _ in place.values()), max(y for _, y in place.values())
    axes.set(xlim=(-widest - 1.5, widest + 1.5), ylim=(-0.6, top + 0.6))
    axes.set_axis_off()
    return figure
