"""The flags that say how a diagnosis is shown, and when it fails."""

from __future__ import annotations

import argparse

FORMATS = ("text", "json", "markdown", "junit")
FAIL_ON = ("finding", "note", "never")


def add_report_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--format`` and ``--fail-on``."""
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="text",
        help="of what is printed; the log goes to stderr unless it is text",
    )
    parser.add_argument(
        "--fail-on",
        choices=FAIL_ON,
        default="finding",
        help="what makes the exit status 1; it is 2 after an error, whatever this says",
    )
