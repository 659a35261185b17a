"""The registered rules, each of which looks for one kind of finding."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from detectron2.config import CfgNode

from ...config import ConfigError
from ..layers import LayerReport
from .finding import Evidence, Examined, Finding, count, named, names_of

SEVERITIES = ("finding", "note")
Found = Iterator[Finding]
Examine = Callable[[Examined, "Rule"], Found]


@dataclass(frozen=True)
class Rule:
    """One kind of finding.

    Attributes:
        id: such as ``BN201``; it never comes to mean something else.
        measures: what is compared with the threshold, in words.
        examine: yields what it finds.
        symptom: what users see where it is found, in their words; "" where that is its title.
        severity: "finding", or "note" for a rule that has notes alone.
        threshold: that a measurement has to exceed, with its interval where it has one; NaN where
            there is none. ``BN.DIAGNOSIS.THRESHOLDS`` sets another.
        unit: of the threshold; "" where there is none.
        residual: whether it is examined only where no other rule has a finding.
        docs: the section of the documentation.
    """

    id: str
    measures: str
    examine: Examine
    symptom: str = ""
    severity: str = "finding"
    threshold: float = math.nan
    unit: str = ""
    residual: bool = False
    docs: str = ""

    def finding(
        self,
        title: str,
        layers: Iterable[LayerReport],
        evidence: Iterable[Evidence],
        fix: dict[str, Any],
        advice: str,
        **more: Any,
    ) -> Finding:
        """Something that hurts the model; the arguments are those of :class:`Finding`."""
        given = (title, names_of(layers), tuple(evidence), fix, advice)
        return Finding(self.id, "finding", self.docs, *given, symptom=self.symptom, **more)

    def note(self, text: str, layers: Iterable[LayerReport] = ()) -> Finding:
        """Something that is worth knowing."""
        return Finding(self.id, "note", self.docs, text, names_of(layers))


_REGISTRY: dict[str, Rule] = {}


def register_finding(id: str, *, measures: str, **about: Any) -> Callable[[Examine], Examine]:
    """Function decorator: let a diagnosis look for a kind of finding.

    The function takes an :class:`Examined` and its own :class:`Rule`, with the threshold of the
    config, and yields what ``rule.finding`` and ``rule.note`` make.

    Args:
        id: letters and a number, such as ``MY101``.
        measures: what is compared with the threshold, in words.
        about: ``symptom``, ``severity``, ``threshold``, ``unit``, ``residual`` and ``docs`` of
            :class:`Rule`.

    Raises:
        ValueError: the id is taken or is none, or the severity is unknown.
    """

    def register(examine: Examine) -> Examine:
        rule = Rule(id, measures, examine, **about)
        if not re.fullmatch(r"[A-Z]+\d+", id) or id in _REGISTRY:
            raise ValueError(f'The finding "{id}" is registered already, or is no id like "MY101".')
        if rule.severity not in SEVERITIES:
            raise ValueError(f'{id}: the severity "{rule.severity}" is none of {SEVERITIES}.')
        _REGISTRY[id] = replace(rule, docs=rule.docs or f"docs/diagnosis.md#{id.lower()}")
        return examine

    return register


def registered_rules() -> dict[str, Rule]:
    """The registered rules by id."""
    return dict(sorted(_REGISTRY.items()))


def configured_rules(cfg: CfgNode) -> dict[str, Rule]:
    """The registered rules by id, with the thresholds of ``BN.DIAGNOSIS.THRESHOLDS``.

    Raises:
        ConfigError: an entry is no pair of the id of a rule that has a threshold, and a number.
    """
    rules = registered_rules()
    for entry in cfg.BN.DIAGNOSIS.THRESHOLDS:
        match entry:
            case [str(id), float() | int() as threshold] if id in rules and rules[id].unit:
                rules[id] = replace(rules[id], threshold=float(threshold))
            case _:
                known = ", ".join(
                    f"{rule.id} ({rule.threshold:g} {rule.unit})"
                    for rule in rules.values()
                    if rule.unit
                )
                raise ConfigError(
                    f"BN.DIAGNOSIS.THRESHOLDS {entry!r}: an entry is [id, number], such as "
                    f'["BN201", 2.0]. The thresholds that there are: {known}.'
                )
    return rules


def conclude(examined: Examined) -> tuple[list[Finding], list[Finding]]:
    """Findings, worst first, and notes: what is worth knowing and no finding.

    Those whose cost in AP was measured come first, by the cost that is certain, the lower end of
    its interval; the others by id.

    Args:
        examined: the measurements.

    Raises:
        ConfigError: as :func:`configured_rules`.
    """
    items: list[Finding] = []
    for rule in sorted(configured_rules(examined.cfg).values(), key=lambda rule: rule.residual):
        if not rule.residual or all(item.severity == "note" for item in items):
            items += rule.examine(examined, rule)
    found = [item for item in items if item.severity == "finding"]
    found.sort(key=lambda item: math.inf if item.cost is None else -item.cost.low)
    return found, [item for item in items if item.severity == "note"]


def used(
    examined: Examined, layers: Iterable[LayerReport], what: str, rule: Rule
) -> tuple[list[LayerReport], list[Finding]]:
    """The layers whose population statistics inference uses; the others become a note."""
    layers = list(layers)
    unused = [layer for layer in layers if not examined.uses_population(layer)]
    text = (
        f"The running statistics of {count(unused)} {what}; with BN.INFERENCE batch they are not "
        f"used ({named(unused)})."
    )
    return [x for x in layers if x not in unused], [rule.note(text, unused)] if unused else []
