"""What the README and docs name exists: links, paths, commands, keys; their code runs."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from distributed import run_workers
from reference import CHANNELS, assert_close, reference_step, samples, set_affine, step
from test_diagnose import examined, layer
from torch import Tensor

from bn_detection import PartitionedBatchNorm2d, add_bn_detection_config
from bn_detection.engine import add_common_flags, argument_parser
from bn_detection.heads import norm_names
from bn_detection.leakage.findings import conclude, rules
from bn_detection.norm import partition, set_rows_per_image
from bn_detection.report_flags import add_report_flags

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"")
OURS = r"\b(?:tools|configs|benchmarks|examples|docs|tests|bn_detection)/[\w./*-]*\w"
KEY = re.compile(r"\b(?:BN|MODEL|SOLVER|DATASETS|TEST|INPUT)(?:\.[A-Z0-9_]+)+(?![\w{]|\.[\w{*])")


def blocks(page: Path, language: str) -> list[str]:
    return [code for name, code in FENCE.findall(page.read_text()) if name == language]


def anchors(page: Path) -> set[str]:
    """As GitHub makes them from headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in kept}


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Scripts of this project that code blocks run, each with its arguments."""
    indented = "\n".join(re.findall(r"^    (.*)$", page.read_text(), re.MULTILINE))
    code = "\n".join([indented, *(code for _, code in FENCE.findall(page.read_text()))])
    for line in code.replace("\\\n", " ").splitlines():
        match = re.match(
            r"(?:sudo )?(?:\S+=\S+ )*(?:\S*python|torchrun)(?: --?\S+ \d+)* (\w+/\S+\.py)(.*)", line
        )
        if match:
            yield match[1], match[2].split("#")[0].split()


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in (a or b for a, b in LINK.findall(FENCE.sub("", page.read_text()))):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name}: {target}"


@every_page
def test_images_have_a_text_alternative(page: Path) -> None:
    text = page.read_text()
    assert "![](" not in text
    assert all(re.search(r'alt="[^"]+"', tag) for tag in re.findall(r"<img[^>]*>", text))


@every_page
def test_paths_exist(page: Path) -> None:
    # That page is about the tests of upstream's checkout.
    pattern = OURS if page.name != "upstream_tests.md" else OURS.replace("|tests|", "|")
    for path in re.findall(
        rf"(?<![\w/.:-]){pattern}", re.sub(r"https?://\S+", "", page.read_text())
    ):
        assert list(ROOT.glob(path.replace("NAME", "*"))), f"{page.name}: {path}"


@every_page
def test_commands_have_these_flags(page: Path) -> None:
    shared = {"argument_parser": argument_parser()}
    for add in (add_common_flags, add_report_flags):
        add(shared.setdefault(add.__name__, argparse.ArgumentParser()))
    for script, arguments in commands(page):
        source = (ROOT / script).read_text()
        known = set(re.findall(r'"(--[\w-]+)"', source)) | {"--help"}
        for name, parser in shared.items():
            known |= set(parser._option_string_actions) if name in source else set()
        flags = {word.split("=")[0] for word in arguments if word.startswith("--")}
        assert flags <= known, f"{page.name}: {script} has no {flags - known}"


@every_page
def test_make_targets_exist(page: Path) -> None:
    targets = re.findall(r"(?:^    |`)make ([\w-]+)", page.read_text(), re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets), targets


def config() -> CfgNode:
    cfg = get_cfg()
    add_bn_detection_config(cfg)
    return cfg


@every_page
def test_config_keys_exist(page: Path) -> None:
    cfg = config()
    for key in sorted(set(KEY.findall(page.read_text()))):
        node = cfg
        for part in key.split("."):
            assert isinstance(node, CfgNode) and part in node, f"{page.name}: {key}"
            node = node[part]


@every_page
def test_yaml_is_valid(page: Path) -> None:
    for code in blocks(page, "yaml"):
        content = yaml.safe_load(code)
        if set(content) <= set(config()):  # otherwise a study file
            config().merge_from_other_cfg(CfgNode(content))


@every_page
def test_python_compiles(page: Path) -> None:
    for code in blocks(page, "python"):
        compile(code, page.name, "exec")


@pytest.mark.timeout(120)
def test_figures_are_those_that_the_script_draws(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, ROOT / "docs" / "figures.py", tmp_path], check=True, timeout=100
    )
    drawn = {path.name for path in tmp_path.iterdir()}
    shown = set(re.findall(r"images/(idea_\w+\.svg)", (ROOT / "docs" / "idea.md").read_text()))
    assert drawn == shown == {path.name for path in (ROOT / "docs/images").glob("idea_*.svg")}


def test_documented_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "_REGISTRY", dict(rules._REGISTRY))
    exec("\n".join(blocks(ROOT / "docs" / "adding_a_finding.md", "python")), {})
    small = [layer(values_per_batch=number) for number in (9.0, 100.0)]
    (found,), _ = conclude(examined(layers=small))
    assert (found.id, found.severity, len(found.layers)) == ("MY101", "finding", 1)
    assert found.evidence[0].value == 9
    assert found.fix == {"BN": {"CONVERT": [["*", "SyncBN"]]}}
    more = ("BN.DIAGNOSIS.THRESHOLDS", [["MY101", 5]])
    assert conclude(examined(layers=small, more=more))[0] == []


@pytest.fixture
def documented(monkeypatch: pytest.MonkeyPatch) -> None:
    """The partitions of docs/adding_a_partition.md, registered."""
    monkeypatch.setattr(partition, "_REGISTRY", dict(partition._REGISTRY))
    run_page()


def run_page() -> None:
    code = blocks(ROOT / "docs" / "adding_a_partition.md", "python")
    exec("\n".join(block for block in code if "@register_partition" in block), {})


@pytest.mark.usefixtures("documented")
def test_documented_partition_of_image_pairs() -> None:
    layer = set_affine(PartitionedBatchNorm2d(CHANNELS, partition="ImagePairs"))
    x, grad = (samples([9], seed)[0] for seed in range(2))
    set_rows_per_image([3, 0, 1, 2, 3])
    actual = step(layer, x, grad)
    expected = reference_step(x, grad, torch.tensor([0] * 3 + [1] * 3 + [2] * 3))
    assert_close(actual, expected)
    assert "ImagePairs" in norm_names()


def _step_of_worker_pairs(rank: int, world_size: int, sizes: list[int]) -> dict[str, Tensor]:
    if "WorkerPairs" not in partition.partition_names():
        run_page()
    layer = set_affine(PartitionedBatchNorm2d(CHANNELS, partition="WorkerPairs"))
    return step(layer, samples(sizes)[rank], samples(sizes, seed=1)[rank])


@pytest.mark.timeout(120)
def test_documented_partition_of_worker_pairs() -> None:
    sizes = [4, 2, 3]
    results = run_workers(_step_of_worker_pairs, 3, sizes)
    x, grad = (torch.cat(samples(sizes, seed)) for seed in range(2))
    expected = reference_step(x, grad, torch.tensor([0] * 6 + [1] * 3))
    for key in ("y", "grad_x"):
        actual = torch.cat([result[key] for result in results])
        assert_close({key: actual}, {key: expected[key]})
    for result in results:
        assert_close(result, {k: expected[k] for k in ("running_mean", "running_var")})
