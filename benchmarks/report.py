"""Tables in Markdown: those of the results of ``norm.py``, and what all reports share."""

from __future__ import annotations

from typing import Any

_ALL_GATHER = "all-gather shuffle"


def markdown(document: dict[str, Any]) -> str:
    """The tables of one run.

    Args:
        document: what ``norm.py`` wrote.
    """
    machine = document["machine"]
    heading = f"Link of {document['link']}" if document["link"] else machine.get("gpu", "CPU")
    parts = [
        f"### {heading}, {document['date']}\n",
        f"{describe(machine)}\n",
    ]
    for case in document["cases"]:
        if case["what"] == "bytes":
            table = _bytes(case)
        elif case["what"] == "link":
            table = _link(case)
        else:
            table = _times(case, share=document["link"] is not None)
        parts.append(f"**{case['title']}**\n\n{table}")
    return "\n".join(parts)


def describe(machine: dict[str, Any]) -> str:
    """What was measured on, in a line.

    Args:
        machine: of ``norm.machine``.
    """
    return (
        f"{machine.get('gpu', machine['cpu'])}, {machine['cores']} CPU cores, "
        f"{machine['memory_gib']} GiB, {machine['system']}, Python {machine['python']}, "
        f"torch {machine['torch']}."
    )


def replace_tables(text: str, tables: str, benchmark: str = "norm.py") -> str:
    """``text`` with other tables between the two comments that mark their place."""
    begin, end = f"<!-- tables of benchmarks/{benchmark} -->", "<!-- end of tables -->"
    before, rest = text.split(begin)
    _, after = rest.split(end, maxsplit=1)
    return f"{before}{begin}\n\n{tables}\n{end}{after}"


def _times(case: dict[str, Any], *, share: bool) -> str:
    results = case["results"]
    sends = case["workers"] > 1
    header = ["variant", "step", "ratio", "adds"]
    header += ["of what all-gather adds"] if share else []
    header += ["peak memory"] + (["sends"] if sends else [])
    rows = []
    for name, result in results.items():
        row = [
            name,
            format_seconds(result["seconds"]),
            f"{result['ratio']:.2f}",
            format_seconds(result["added_seconds"]),
        ]
        if share:
            row.append(f"{result['added_seconds'] / results[_ALL_GATHER]['added_seconds']:.3f}")
        row.append(f"{result['memory_ratio']:.2f}")
        if sends:
            row.append(format_size(result["bytes_sent"]))
        rows.append(row)
    return format_table(header, rows)


def _bytes(case: dict[str, Any]) -> str:
    results = case["results"]
    sent = results["bytes_sent"]
    rows = [
        [name, f"{value:,.0f}", f"{sent[_ALL_GATHER] / value:,.1f}"] for name, value in sent.items()
    ]
    share = results["share_of_rows_moved"]
    expected = 1 - 1 / case["workers"]
    return (
        format_table(["variant", "bytes a worker and step", "all-gather sends times as much"], rows)
        + f"\nCounted on maps of one and two positions, and computed for 7x7 from these (the bytes "
        f"are linear in the positions). Share of the RoIs that features mode moves, counted in "
        f"{results['draws']} draws: {share:.4f} +- {results['standard_error']:.4f}; "
        f"(W - 1) / W = {expected:.4f}.\n"
    )


def _link(case: dict[str, Any]) -> str:
    results = case["results"]
    return (
        f"Each worker sent {results['gbit_per_second']:.2f} Gbit/s to the other; an all-reduce of "
        f"one number took {format_seconds(results['all_reduce_seconds'])}.\n"
    )


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def format_seconds(value: float) -> str:
    """In ms or us."""
    return f"{value * 1e3:.1f} ms" if abs(value) >= 1e-3 else f"{value * 1e6:.0f} us"


def format_size(value: float) -> str:
    """Bytes, in the largest unit below."""
    for unit in ("B", "kB", "MB"):
        if abs(value) < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"
