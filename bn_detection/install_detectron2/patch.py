"""Unified diffs, applied strictly: every line of a hunk must be where the hunk says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


class InstallError(RuntimeError):
    """Something the user can act on; printed without a traceback."""


@dataclass(frozen=True)
class Hunk:
    """Lines of a file, from line ``start`` (from 1; 0 in a new file) on, and their replacement."""

    header: str
    start: int
    old: list[str]
    new: list[str]


@dataclass(frozen=True)
class FilePatch:
    """The changes to one file.

    Attributes:
        file: path in the archive.
        reason: the comment lines above it: what goes wrong without the changes.
        hunks: from the top of the file to its end. A new file has one, without old lines.
    """

    file: str
    reason: str
    hunks: list[Hunk]


_HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+\d+(?:,(\d+))? @@")


def read_patch(text: str) -> list[FilePatch]:
    """Parse what ``git diff`` writes, with comments (``# ``) above a file.

    Raises:
        InstallError: for a line that has no place in such a text.
    """
    patches: list[FilePatch] = []
    comment: list[str] = []
    lines = iter(text.split("\n"))
    for line in lines:
        if line.startswith("# "):
            comment.append(line[2:])
        elif line.startswith("--- "):
            file = next(lines, "").removeprefix("+++ b/")
            patches.append(FilePatch(file, " ".join(comment), []))
            comment = []
        elif (match := _HUNK.match(line)) and patches:
            patches[-1].hunks.append(_read_hunk(patches[-1].file, match, lines))
        elif not line:
            comment = []
        else:
            raise InstallError(f"The patch has a line that belongs to no hunk: {line!r}.")
    return patches


def _read_hunk(file: str, match: re.Match[str], lines: Iterator[str]) -> Hunk:
    start, old_count, new_count = (1 if n is None else int(n) for n in match.groups())
    old: list[str] = []
    new: list[str] = []
    while len(old) < old_count or len(new) < new_count:
        line = next(lines, "")
        if line[:1] not in (" ", "-", "+"):
            break
        if line[0] != "+":
            old.append(line[1:])
        if line[0] != "-":
            new.append(line[1:])
    if (len(old), len(new)) != (old_count, new_count):
        raise InstallError(
            f"{file}, hunk {match[0]}: it has {len(old)} old and {len(new)} new lines."
        )
    return Hunk(match[0], start, old, new)


def apply_patch(root: Path, patches: Sequence[FilePatch]) -> None:
    """Apply ``patches`` to the source tree at ``root``, or stop at the first that does not match.

    Raises:
        InstallError: names the file, the hunk and the line. That file is as it was.
    """
    for patch in patches:
        path = root / patch.file
        added = not patch.hunks[0].old
        if path.is_file() is added:
            problem = "is there already" if added else "is not in the archive"
            raise InstallError(f"{patch.file}, which the patch changes, {problem}.")
        lines = [""] if added else path.read_text(encoding="utf-8").split("\n")
        for hunk in reversed(patch.hunks):  # from the end: the lines above keep their numbers
            first = max(hunk.start - 1, 0)
            found = lines[first : first + len(hunk.old)]
            if found != hunk.old:
                raise InstallError(f"{patch.file}, hunk {hunk.header}: {_difference(hunk, found)}")
            lines[first : first + len(hunk.old)] = hunk.new
        path.write_text("\n".join(lines), encoding="utf-8")


def _difference(hunk: Hunk, found: list[str]) -> str:
    for number, old in enumerate(hunk.old):
        line = found[number] if number < len(found) else None
        if line != old:
            break
    is_there = "is not there" if line is None else f"is {line!r}"
    return f"line {hunk.start + number} must be {old!r}, and {is_there}. Nothing was installed."
