"""Findings: their registry, their globs, and the forms of a diagnosis."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_diagnose import SAMPLES, config, estimate, examined, layer, probe
from torch import nn

from bn_detection import ConfigError
from bn_detection.cli.diagnose import FORMATS
from bn_detection.estimate import Estimate
from bn_detection.heads import convert_norm, norm_layers
from bn_detection.leakage import findings
from bn_detection.leakage.diagnosis import SCHEMA, Diagnosis
from bn_detection.leakage.diagnosis_formats import render_diagnosis
from bn_detection.leakage.findings import (
    combined,
    conclude,
    configured_rules,
    fewest_globs,
    register_finding,
    rules,
)

PAGE = Path(__file__).parents[1] / "docs" / "diagnosis.md"


# --- globs ---


def converted(model: nn.Module, globs: list[str]) -> set[str]:
    """The layers that BN.CONVERT replaces for some globs."""
    return {name for glob in globs for name in convert_norm(model, "GN", glob)}


def tree(names: list[str]) -> nn.Module:
    """A model with a layer of each name."""
    model = nn.Module()
    for name in names:
        *parents, last = name.split(".")
        owner = model
        for part in parents:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.add_module(last, nn.BatchNorm2d(32))
    return model


@st.composite
def layers_of_a_model(draw: st.DrawFn) -> tuple[list[str], list[str]]:
    part = st.sampled_from(["res2", "res3", "res4", "conv1", "conv2", "0", "1", "10", "x[1]", "a*"])
    names = draw(
        st.lists(
            st.lists(part, min_size=1, max_size=4).map(lambda parts: ".".join([*parts, "norm"])),
            min_size=1,
            max_size=12,
            unique=True,
        )
    )
    wanted = draw(st.lists(st.sampled_from(names), unique=True, min_size=1))
    return wanted, [name for name in names if name not in wanted]


@given(layers_of_a_model())
@example(
    # The glob of most layers, taken first, is in two later ones.
    (
        [
            *("res2.norm", "res2.res2.res3.norm", "res3.norm", "conv1.norm"),
            *("res2.conv1.norm", "res3.res2.norm", "0.norm", "res2.res2.norm"),
        ],
        ["res2.res2.res2.norm"],
    )
)
@settings(max_examples=150, deadline=None)
def test_globs_convert_these_layers_and_no_others(model: tuple[list[str], list[str]]) -> None:
    wanted, others = model
    globs = fewest_globs(wanted, others)
    assert converted(tree([*wanted, *others]), globs) == set(wanted)
    # No glob can be left out.
    for glob in globs:
        rest = [other for other in globs if other != glob]
        assert converted(tree([*wanted, *others]), rest) != set(wanted)


@pytest.mark.parametrize(
    ("wanted", "others", "globs"),
    [
        (["a.norm", "b.norm"], [], ["*"]),
        (["a.1.norm", "a.2.norm", "a.3.norm"], ["a.4.norm"], ["a.[123]"]),
        (["a.c1.norm", "a.c2.norm", "b.c1.norm", "b.c2.norm"], ["a.c3.norm", "b.c3.norm"], 1),
        (["a.x.norm", "b.y.norm"], ["a.y.norm", "b.x.norm"], 2),
        # Either of two would do for the middle one, which the greedy would take with four others.
        ([f"{a}.{b}" for a in "ab" for b in "123456"], ["c.1", "c.6"], 1),
    ],
)
def test_fewest_globs(wanted: list[str], others: list[str], globs: list[str] | int) -> None:
    found = fewest_globs(wanted, others)
    assert len(found) == globs if isinstance(globs, int) else found == globs


@pytest.fixture(scope="module")
def backbone() -> nn.Module:
    """Of an R50-FPN, with normalization in the FPN too."""
    cfg = config()
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.NORM = "GN"
    model = nn.Module()
    model.backbone = build_backbone(cfg)
    return model


@pytest.mark.parametrize(
    ("chosen", "number"),
    [
        (r"bottom_up", 1),  # all 53
        (r"res[345].*conv[12]", 1),  # 26, a name each before
        (r"res[345]", 1),
        (r"bottom_up.*(conv1|conv3)", 1),
        (r"shortcut", 1),
        (r"(res2\.0|res5).*conv3", 2),
        (r"res4\.[0-4]\.conv[12]|stem", 2),
    ],
)
def test_fewest_globs_of_a_resnet(backbone: nn.Module, chosen: str, number: int) -> None:
    names = [name for name, _ in norm_layers(backbone)]
    wanted = [name for name in names if re.search(chosen, name)]
    others = [name for name in names if name not in wanted]
    assert len(names) == 53 + 8
    globs = fewest_globs(wanted, others)
    assert len(globs) == number, globs
    # FrozenBN is converted to BN, so that what was converted shows.
    before = {n for n, m in backbone.named_modules() if isinstance(m, FrozenBatchNorm2d)}
    assert converted(tree(names), globs) == set(wanted) <= before


def test_modules_of_a_fix_are_those_layers_alone() -> None:
    """res2.1 is not res2.10."""
    names = [f"backbone.res2.{k}.norm" for k in range(12)]
    far = [layer(name, ema_to_precise=estimate(1 if k == 1 else 0)) for k, name in enumerate(names)]
    (found,), _ = conclude(examined(layers=far))
    (glob,) = found.fix["BN"]["MODULES"][2:]
    assert glob == "backbone.res2.1.*"


# --- margins and thresholds ---


@pytest.mark.parametrize("leak", [probe(1.5, 1.5, half=1.0), probe(1.0, 1.0, half=0.5)])
def test_an_interval_that_has_the_margin_in_it_is_no_finding(leak: dict[str, Any]) -> None:
    assert conclude(examined(probe=leak))[0] == []
    assert len(conclude(examined(probe=probe(2.1, 3, half=1.0)))[0]) == 1


def test_effects_of_the_size_of_the_margin_are_rarely_found() -> None:
    """Of estimates of an effect at the margin, one in 40 has its interval above it."""
    import numpy as np

    drawn = np.random.default_rng(0).normal(1.0, 0.5, 4000)
    found = sum(Estimate(x, x - 1.96 * 0.5, x + 1.96 * 0.5).exceeds(1.0) for x in drawn)
    assert 0.015 < found / 4000 < 0.035
    assert not Estimate(5.0).exceeds(1.0)


def test_thresholds_are_those_of_the_config() -> None:
    leaky = {"probe": probe(5, 8, half=1.0), "layers": [layer(ema_to_precise=estimate(0.4))]}
    assert [x.id for x in conclude(examined(**leaky))[0]] == ["BN201", "BN103"]
    for entries, ids in (
        ([["BN201", 6]], ["BN103"]),
        ([["BN201", 6], ["BN103", 0.5]], ["BN501"]),
        ([["BN201", 1e9], ["BN103", 0.5], ["BN501", 7.5]], []),
    ):
        more = ("BN.DIAGNOSIS.THRESHOLDS", entries)
        assert [x.id for x in conclude(examined(**leaky, more=more))[0]] == ids


@pytest.mark.parametrize("entry", [["BN999", 1.0], ["BN201", "1"], ["BN301", 1.0], ["BN201"]])
def test_thresholds_that_cannot_be(entry: list[Any]) -> None:
    with pytest.raises(ConfigError, match=r"BN\.DIAGNOSIS\.THRESHOLDS .*BN201 \(1 points\)"):
        configured_rules(config("BN.DIAGNOSIS.THRESHOLDS", [entry]))


# --- registry ---


def test_ids_are_taken_once() -> None:
    with pytest.raises(ValueError, match='"BN201" is registered already'):
        register_finding("BN201", measures="")(lambda examined, rule: iter(()))
    with pytest.raises(ValueError, match='"leak" is registered already, or is no id'):
        register_finding("leak", measures="")(lambda examined, rule: iter(()))
    with pytest.raises(ValueError, match="severity"):
        register_finding("MY1", measures="", severity="bad")(lambda examined, rule: iter(()))


def test_each_finding_is_documented() -> None:
    text = PAGE.read_text()
    sections = dict(re.findall(r"^### (\w+)\n\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL))
    assert list(sections) == list(configured_rules(config()))
    tutorial = (PAGE.parent / "tutorial.md").read_text()
    for rule in configured_rules(config()).values():
        assert (rule.symptom != "") == (rule.severity == "finding")
        assert sections[rule.id].startswith(f"*{rule.symptom}*" if rule.symptom else "")
        assert not rule.symptom or f"(diagnosis.md#{rule.id.lower()})" in tutorial
        assert rule.docs == f"docs/diagnosis.md#{rule.id.lower()}"
        assert f"({rule.severity})" in "".join(sections[rule.id].splitlines()[:2])
        threshold = f"{rule.threshold:g} {rule.unit}".replace("1 points", "1 point")
        section = " ".join(sections[rule.id].split())
        assert rule.unit == "" or threshold.removesuffix("s") in section, threshold


def test_a_module_of_a_finding_is_short() -> None:
    for path in Path(findings.__file__).parent.glob("bn*.py"):
        assert len(path.read_text().splitlines()) < 100
        assert f'"{path.stem.partition("_")[0].upper()}"' in path.read_text()


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "_REGISTRY", dict(rules._REGISTRY))


@pytest.mark.usefixtures("registry")
def test_a_residual_finding_is_what_no_other_explains() -> None:
    @register_finding("MY1", measures="", threshold=5.0, unit="layers")
    def mine(examined: Any, rule: Any) -> Any:
        if len(examined.layers) > rule.threshold:
            yield rule.finding("Many layers.", examined.layers, [], {}, "Fewer.")

    few = examined(probe=probe(0, 10))
    assert [x.id for x in conclude(few)[0]] == ["BN501"]
    more = ("BN.DIAGNOSIS.THRESHOLDS", [["MY1", 0]])
    assert [x.id for x in conclude(examined(probe=probe(0, 10), more=more))[0]] == ["MY1"]


# --- forms ---


@pytest.fixture(scope="module")
def diagnosis() -> Diagnosis:
    layers = [
        layer(ema_to_precise=estimate(0.6)),
        layer("backbone.res3.norm", affine_frozen=True, rows="images", rows_per_batch=1.0),
    ]
    found, notes = conclude(examined(layers=layers, probe=probe(20, 30)))
    return Diagnosis({"weights": "w.pth"}, layers, None, found, notes, ["a <reason>"])


def test_schema_of_the_json(diagnosis: Diagnosis) -> None:
    content = json.loads(render_diagnosis(diagnosis, "json", {}))
    assert content["schema"] == SCHEMA == 1
    assert set(content) == {
        *("schema", "settings", "verdict", "findings", "yaml_of_all", "notes", "left_out"),
        *("layers", "probe"),
    }
    ids = [finding["id"] for finding in content["findings"]]
    assert ids == ["BN201", "BN103", "BN303"]
    assert [note["id"] for note in content["notes"]] == ["BN203"]
    for item in (*content["findings"], *content["notes"]):
        assert set(item) == {
            *("id", "severity", "docs", "title", "layers", "evidence", "fix", "advice", "cost"),
            *("yaml", "symptom"),
        }
    leak = content["findings"][0]
    assert leak["severity"] == "finding"
    assert leak["evidence"][0] == {
        "text": "Foreground accuracy: 20.0 [19.0, 21.0] points better with a batch of its own "
        "images than with as many RoIs of random images",
        "metric": "leakage.accuracy",
        "unit": "points",
        "value": 20,
        "low": 19,
        "high": 21,
    }
    assert yaml.safe_load(leak["yaml"]) == leak["fix"]


def test_keys_of_all_findings_together(diagnosis: Diagnosis) -> None:
    together = yaml.safe_load(diagnosis.yaml_of_all)
    assert together == combined(diagnosis.findings)
    assert together["MODEL"]["ROI_BOX_HEAD"]["NORM"] == "GN"
    assert together["BN"] == {
        "CONVERT": [["backbone", "FrozenBN"]],
        "POPULATION": {"ESTIMATOR": "pooled"},
    }
    assert combined([]) == {}


@pytest.mark.parametrize("style", FORMATS)
def test_all_is_said_in_every_form(diagnosis: Diagnosis, style: str) -> None:
    shown = " ".join(render_diagnosis(diagnosis, style, configured_rules(config())).split())
    for finding in (*diagnosis.findings, *diagnosis.notes):
        assert finding.id in shown
        assert " ".join(finding.title.split()) in shown
        assert finding.symptom in shown
        # What users see comes first.
        title = " ".join(finding.title.split())
        assert style == "json" or shown.index(finding.headline) <= shown.index(title)
    for part in ("docs/diagnosis.md#bn201", "points better with", "ESTIMATOR: pooled", "Freeze"):
        assert part in shown
    assert ("a &lt;reason&gt;" if style == "junit" else "a <reason>") in shown


def test_junit_has_a_case_a_rule(diagnosis: Diagnosis) -> None:
    known = configured_rules(config())
    suite = ElementTree.fromstring(render_diagnosis(diagnosis, "junit", known))
    cases = suite.findall("testcase")
    failed = [case for case in cases if case.find("failure") is not None]
    assert [case.get("name").partition(":")[0] for case in cases] == list(known)
    assert [case.get("name")[:5] for case in failed] == ["BN103", "BN201", "BN303"]
    assert (suite.get("tests"), suite.get("failures")) == (str(len(known)), "3")


def test_markdown_has_a_heading_a_finding(diagnosis: Diagnosis) -> None:
    shown = render_diagnosis(diagnosis, "markdown", {})
    assert re.findall(r"^## \d+\. (BN\d+):", shown, re.MULTILINE) == ["BN201", "BN103", "BN303"]
    assert yaml.safe_load(re.findall(r"```yaml\n(.*?)```", shown, re.DOTALL)[-1]) == combined(
        diagnosis.findings
    )


def test_a_model_without_findings() -> None:
    clean = Diagnosis({}, [layer()], None, [], [SAMPLES[1]], [])
    assert "No finding" in clean.text()
    assert render_diagnosis(clean, "markdown", {}).startswith("# Diagnosis")
    suite = ElementTree.fromstring(render_diagnosis(clean, "junit", configured_rules(config())))
    assert suite.get("failures") == "0"
