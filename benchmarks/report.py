"""Tables in Markdown: of the results of ``norm.py`` and ``gpu.py``, and what all reports share."""

from __future__ import annotations

from typing import Any

_ALL_GATHER = "all-gather shuffle"


def markdown(document: dict[str, Any]) -> str:
    """The tables of one run.

    Args:
        document: what ``norm.py`` or ``gpu.py`` wrote.
    """
    if "parts" in document:
        return gpu_tables(document)
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


def gpu_tables(document: dict[str, Any]) -> str:
    """The tables of one run of ``gpu.py``.

    Args:
        document: what it wrote.
    """
    machine = document["machine"]
    heading = f"### {machine.get('gpu', 'CPU')}, {document['date']}\n\n{describe(machine)}\n"
    if document["quick"]:
        heading += "\nTiny sizes: these numbers say that it runs, and nothing of its speed.\n"
    return "\n".join([heading, *(gpu_part(*part) for part in document["parts"].items())])


def gpu_part(name: str, part: dict[str, Any]) -> str:
    """The tables of a part of ``gpu.py``, as far as it came.

    Args:
        name: the letter of the part.
        part: its title, results, and error if it failed.
    """
    tables = {"a": _tests, "b": _layers, "c": _heads, "d": _detectors, "e": _leaks}
    text = f"**{part['title']}** ({part['seconds']:.0f} s)\n\n"
    if "error" in part:
        text += f"Failed: {part['error'].strip().splitlines()[-1]}\n\n"
    return text + (tables[name](part["results"]) if part["results"] else "")


def _tests(results: dict[str, Any]) -> str:
    text = f"{results['passed']} tests passed, {results['failed']} failed, "
    text += f"{results['skipped']} skipped.\n"
    notes = {**results["failures"], **results["incomplete"]}
    return text + "".join(f"* {name}: {note}\n" for name, note in notes.items())


def _layers(results: dict[str, Any]) -> str:
    header = ["layer", "step", "ratio", "of the floor", "launched in", "waits", "peak memory"]
    text = ""
    for title, case in results.items():
        text += (
            f"{title}: a copy moves {case['bytes_per_second'] / 1e9:,.0f} GB/s, so the floor is "
            f"{format_seconds(case['floor_seconds'])}.\n\n"
        )
        rows = [
            [*_step(name, result), f"{result['times_the_floor']:.2f}", *_launch(result)]
            for name, result in case["variants"].items()
        ]
        text += format_table(header, rows) + "\n"
    return text


def _heads(results: dict[str, Any]) -> str:
    header = ["NORM", "step", "ratio", "launched in", "waits", "peak memory"]
    text = ""
    for title, variants in results.items():
        rows = [[*_step(name, result), *_launch(result)] for name, result in variants.items()]
        text += f"{title[0].upper()}{title[1:]}\n\n{format_table(header, rows)}\n"
    return text


def _step(name: str, result: dict[str, Any]) -> list[str]:
    return [name, format_seconds(result["seconds"]), f"{result['ratio']:.2f}"]


def _launch(result: dict[str, Any]) -> list[str]:
    """What the host does for a step; waits for a GPU there are none of on a CPU."""
    waits = "-" if result["waits"] is None else str(result["waits"])
    return [format_seconds(result["host_seconds"]), waits, f"{result['memory_ratio']:.2f}"]


def _detectors(results: dict[str, Any]) -> str:
    header = ["config", "iteration", "ratio", "peak memory", "iterations"]
    text = ""
    for title, case in results.items():
        rows = [
            [*_step(name, result), format_size(result["peak_bytes"]), str(result["iterations"])]
            for name, result in case["variants"].items()
        ]
        loading = format_seconds(case["loading_seconds"])
        text += f"{title}; loading them takes {loading} of one process, and is not counted.\n\n"
        text += format_table(header, rows) + "\n"
    return text


def _leaks(results: dict[str, Any]) -> str:
    header = ["heads", "iterations", "an iteration", "box AP, population", "box AP, batch"]
    header += ["leakage, accuracy", "leakage, box AP"]
    rows = []
    for name, result in results.items():
        row = [name, str(result["iterations"]), format_seconds(result["seconds"])]
        if "box_ap" in result:
            row += [f"{result['box_ap'][mode]:.1f}" for mode in ("population", "batch")]
            row += [_estimate(result["leakage"][metric]) for metric in ("accuracy", "box_ap")]
        rows.append(row + ["-"] * (len(header) - len(row)))
    return format_table(header, rows)


def _estimate(estimate: dict[str, float | None]) -> str:
    if estimate["low"] is None:
        return "-" if estimate["value"] is None else f"{estimate['value']:.1f}"
    return "{value:.1f} [{low:.1f}, {high:.1f}]".format(**estimate)


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
