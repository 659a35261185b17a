"""A diagnosis for people (text, Markdown) and for machines (JSON, JUnit)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from xml.etree import ElementTree as xml

from .diagnosis import Diagnosis
from .findings import Rule


def render_diagnosis(diagnosis: Diagnosis, style: str, rules: Mapping[str, Rule]) -> str:
    """A diagnosis as text.

    Args:
        diagnosis: the diagnosis.
        style: one of ``text``, ``json``, ``markdown`` and ``junit``.
        rules: that were examined, by id; of JUnit each is a test case.
    """
    styles: dict[str, Callable[[], str]] = {
        "text": diagnosis.text,
        "json": lambda: json.dumps(diagnosis.to_json(), indent=2, allow_nan=False),
        "markdown": lambda: _markdown(diagnosis),
        "junit": lambda: _junit(diagnosis, rules),
    }
    return styles[style]()


def _markdown(diagnosis: Diagnosis) -> str:
    parts = ["# Diagnosis of BN layers", f"**{diagnosis.verdict}**"]
    for number, finding in enumerate(diagnosis.findings, 1):
        parts.append(f"## {number}. {finding.id}: {finding.headline}")
        if finding.symptom:
            parts.append(finding.title)
        if finding.cost is not None:
            parts.append(f"Likely cost: {finding.cost.text(1)} points of box AP.")
        parts.append("\n".join(f"* {item.text}" for item in finding.evidence))
        parts.append(f"{finding.advice} See `{finding.docs}`.\n\n```yaml\n{finding.cure}```")
    if diagnosis.yaml_of_all:
        parts.append(f"## The keys of all findings together\n\n```yaml\n{diagnosis.yaml_of_all}```")
    if diagnosis.notes or diagnosis.left_out:
        notes = [f"* {note.id}: {note.title}" for note in diagnosis.notes]
        notes += [f"* Left out: {reason}" for reason in diagnosis.left_out]
        parts.append("## Notes\n\n" + "\n".join(notes))
    if diagnosis.layers:
        parts.append(f"## Layers\n\n{diagnosis.table('github')}")
    if diagnosis.probe is not None:
        parts.append(f"## Leakage probe\n\n{diagnosis.probe.table('github')}")
    return "\n\n".join(parts)


def _junit(diagnosis: Diagnosis, rules: Mapping[str, Rule]) -> str:
    """A suite with a test case a rule, which fails with the findings of it."""
    suite = xml.Element("testsuite", name="bn_detection.diagnosis")
    suite.set("tests", str(len(rules)))
    suite.set("failures", str(len({finding.id for finding in diagnosis.findings})))
    suite.set("errors", "0")
    for rule in rules.values():
        case = xml.SubElement(suite, "testcase", classname=suite.get("name", ""))
        case.set("name", f"{rule.id}: {rule.measures}")
        if found := [finding for finding in diagnosis.findings if finding.id == rule.id]:
            failure = xml.SubElement(case, "failure", type=rule.id)
            failure.set("message", " ".join(f"{x.symptom} {x.title}".strip() for x in found))
            failure.text = "\n".join(
                "\n".join([*(item.text for item in x.evidence), f"{x.advice} ({x.docs})", x.cure])
                for x in found
            )
        if notes := [note.title for note in diagnosis.notes if note.id == rule.id]:
            xml.SubElement(case, "system-out").text = "\n".join(notes)
    if diagnosis.left_out:
        xml.SubElement(suite, "system-out").text = "\n".join(diagnosis.left_out)
    xml.indent(suite)
    return xml.tostring(suite, encoding="unicode", xml_declaration=True)
