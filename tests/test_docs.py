"""What the README and docs name exists: links, paths, commands, keys; their code compiles."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from detectron2.config import CfgNode, get_cfg
from tooling import run_script, run_tool

from bn_detection import add_bn_detection_config, cli

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(page for page in ROOT.glob("docs/**/*.md") if page.parent.name != "api")]
)
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

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
    """Commands and scripts of this project that code blocks run, each with its arguments."""
    indented = "\n".join(re.findall(r"^    (.*)$", page.read_text(), re.MULTILINE))
    code = "\n".join([indented, *(code for _, code in FENCE.findall(page.read_text()))])
    for line in code.replace("\\\n", " ").splitlines():
        python = r"(?:\S*python|torchrun)(?: --?\S+ \d+)* (?:-m bn_detection|(\w+/\S+\.py))"
        match = re.match(rf"(?:sudo )?(?:\S+=\S+ )*(?:\S*bn-detection|{python}) (.*)", line)
        if match:
            arguments = match[2].split("#")[0].split()
            yield match[1] or arguments[0], arguments


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
def test_commands_have_these_flags(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for program, arguments in commands(page):
        if program.startswith(("benchmarks/", "examples/", "docs/", "tests/")):
            text = (ROOT / program).read_text()
        elif program.startswith("tools/"):
            assert run_tool(Path(program).stem, "--help").status == 0
            text = capsys.readouterr().out
        else:
            with pytest.raises(SystemExit):
                cli.main([program, "--help"])
            text = capsys.readouterr().out
        known = set(re.findall(r"(?<![\w-])--[\w-]+", text)) | {"--help"}
        flags = {word.split("=")[0] for word in arguments if word.startswith("--")}
        assert flags <= known, f"{page.name}: {program} has no {flags - known}"


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
    done = run_script(ROOT / "docs" / "figures.py", tmp_path)
    assert done.returncode == 0, done.stderr
    drawn = {path.name for path in tmp_path.iterdir()}
    pages = (ROOT / "docs" / "idea.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    shown = set(re.findall(r"images/(\w+\.svg)", pages))
    assert drawn == shown == {path.name for path in (ROOT / "docs/images").glob("*.svg")}
    rooms = (tmp_path / "rooms_light.svg").read_text()
    assert rooms == (ROOT / "docs/images/rooms_light.svg").read_text(), "python docs/figures.py"
