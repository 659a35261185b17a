"""Configs, studies and flags that are wrong in one way or two: all work, or end in one line."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml
from tooling import QUICKSTART, ROOT

from bn_detection.engine import argument_parser, load_config
from bn_detection.engine.values import leaves

from .counting import Tally, attempt
from .running import arguments, beginning, running, working_in

PART = "configs and flags"
TOOLS = ("train_net", "train_net", "evaluate", "recalibrate", "probe", "diagnose", "study")
CONFIGS = sorted(path.name for path in QUICKSTART.glob("[mr]*.yaml"))
# As Python, and as YAML.
VALUES = (
    *("None", "''", "foo", "True", "0", "1", "-1", "-7.5", "0.5", "nan", "inf", "-inf"),
    *("1e400", "1e-320", "1e30", "1000000000", "9223372036854775808", "[]", "()", "{}"),
    *("[None]", "['foo']", "[0]", "[-1]", "[[]]", "[[3]]", "[1, 2, 3, 4, 5, 6, 7]", "{'a': 1}"),
    *("('p9',)", "['*']", "[['*', 'Foo']]", "b'x'", "1j", "x" * 300, "\u00e9\u4e2d", "%s{0}", "\\"),
)
YAML_VALUES = (
    *("null", "~", ".nan", ".inf", "-.inf", "-1", "0", "1.5", "foo", "''", "[]", "{}", "[~]"),
    *("[[]]", "[foo]", "{a: 1}", "1e30", "9223372036854775808", "2026-11-26", "!!binary aGk="),
    *("!!python/none", "!!python/tuple [1]", "!foo bar", "!!set {a}", "&a [*a]", "0x10", "yes"),
)
DAMAGE = (
    *(b"\t", b"{", b"]", b'"', b"'", b": :", b"- -", b"&a *b", b"*a", b"!!", b"!<", b"%YAML 9\n"),
    *(b"\0", b"\xff\xfe", b"\x85", b"---\n", b"...\n", b"? ", b"| ", b"@", b"`", b"<<: 3\n"),
    *(b"\n  x: 1\n", b"[" * 3000, b"{a: " * 1500),
)
WHOLE = (
    *(b"", b"\n", b"# only this\n", b"[1, 2]\n", b"3\n", b"text\n", b"~\n", b"\0\0", b"{}\n"),
    *(b"\xef\xbb\xbfSEED: 1\n", b"\xff\xfeS\0", b"SEED: 1\nSEED: 2\n", b"1: 2\n", b"~: 2\n"),
    *(b"MODEL: 3\n", b"MODEL:\n", b"MODEL: [1]\n", b"model: {}\n", b"FOO: 1\n", b"_BASE_:\n"),
    *(b"_BASE_: nowhere.yaml\n", b"_BASE_: config.yaml\n", b"_BASE_: [config.yaml]\n"),
    *(b"_BASE_: 3\n", b"_BASE_: {a: 1}\n", b"_BASE_: .\n", b"_BASE_: ''\n", b"_BASE_: [3]\n"),
    *(b'_BASE_: "a\\0b"\n', b"SEED: 1\n---\nSEED: 2\n", b"BN: {MODULES: &a [*a]}\n"),
)
FLAGS: dict[str, tuple[tuple[str, ...], ...]] = {
    "any": (
        *(("--foo",), ("--config-file",), ("--config-file", "nowhere.yaml"), ("SEED",)),
        *(("--config-file", "."), ("--config-file", ""), ("--config-file", "nowhere/\0")),
        *(("--config-file", "model.py"), ("--import", "nowhere"), ("--import", "")),
        *(("--import", ".."), ("--import", "a b"), ("--import", "yaml"), ("SEED", "1", "FOO", "2")),
        *(("MODEL", "3"), ("MODEL.", "3"), ("", "3"), ("=", "="), ("BN.MODULES.x", "1")),
    ),
    "train_net": (
        *(("--num-gpus", value) for value in ("0", "-1", "foo", "1.5", "2", "3", "1000000000")),
        *(("--num-machines", value) for value in ("0", "-1", "foo", "2", "1000000000")),
        *(("--machine-rank", value) for value in ("-1", "1", "foo")),
        *(("--num-gpus", "2", "--dist-url", url) for url in ("", "foo", "tcp://", "tcp://:0")),
        *(("--num-gpus", "2", "--dist-url", url) for url in ("tcp://[", "tcp://127.0.0.1:99999")),
        *(("--resume",), ("--eval-only", "--resume"), ("OUTPUT_DIR", ""), ("OUTPUT_DIR", "a\0b")),
        *(("OUTPUT_DIR", "x" * 300), ("OUTPUT_DIR", "file/below"), ("OUTPUT_DIR", "file")),
    ),
    "recalibrate": (
        *(("--output", value) for value in ("", "x.txt", ".pth", "file/x.pth", "a\0.pth")),
        *(("--dataset", value) for value in ("", "foo", "foo@fog:3", "leaky_shapes_train@foo:3")),
        *(("--images", value) for value in ("", "nowhere", "file", ".")),
        *(("--dataset", "a", "--images", "b"), ("--resume",), ("--eval-only",)),
        *(("--num-gpus", value) for value in ("0", "-1", "foo")),
    ),
    "probe": (
        *(("--output", value) for value in ("", "x.txt", ".json", "file/x.json", "a\0.json")),
        *(("--num-gpus", "2"), ("--output",)),
    ),
    "diagnose": (
        *(("--images", value) for value in ("0", "-1", "foo", "1.5", "1000000000")),
        *(("--num-gpus", value) for value in ("0", "-1", "foo", "3", "1000000000")),
        *(("--output-dir", value) for value in ("", "file", "file/x", "a\0b", "x" * 300)),
        *(("--config-file", "COCO-Detection/nowhere.yaml"), ("--quick",), ("--overwrite",)),
    ),
    "study": (
        *(("--seeds", *value) for value in (["-1"], ["foo"], ["4294967296"], ["1", "1"], [])),
        *(("--jobs", value) for value in ("0", "-1", "foo", "1000000000")),
        *(("--executor", "foo"), ("--executor", "slurm", "--slurm", "foo"), ("--slurm", "a=b")),
        *(("--executor", "slurm", "--slurm", "timeout_min=foo"), ("--output-dir", "file")),
        *(("--output-dir", "a\0b"), ("SEED", "3"), ("OUTPUT_DIR", "x"), ("FOO", "3"), ("SEED",)),
    ),
}


def study_content() -> dict[str, Any]:
    """A study that is right, of which every part can be spoilt."""
    return {
        "about": "x",
        "workers": 2,
        "seeds": [1, 2],
        "baseline": "a",
        "overrides": {"SOLVER.MAX_ITER": 10, "SOLVER.STEPS": []},
        "runs": {
            "a": {"config": str(QUICKSTART / "mask_rcnn_bn.yaml")},
            "b": {
                "config": str(QUICKSTART / "mask_rcnn_shuffle.yaml"),
                "overrides": {"BN.MOMENTUM": 0.2},
            },
        },
        "evaluations": {
            "EMA": None,
            "precise": {"recalibrate": {"BN.POPULATION.ESTIMATOR": "pooled"}, "runs": ["a"]},
            "leak": {"probe": {"BN.LEAKAGE.IMAGES_PER_WORKER": 1}},
        },
    }


def run(seed: int, first: int, last: int, material: Path, folder: Path, seconds: float) -> Tally:
    """Try the inputs from ``first`` to before ``last`` of a seed.

    Args:
        seed: of the campaign.
        first: number of the first input.
        last: number behind the last one.
        material: of :func:`campaign.running.make_material`.
        folder: to write to.
        seconds: that each may take.
    """
    tally = Tally(PART)
    keys = _keys()
    with beginning():
        for number in range(first, last):
            own = folder / f"{number}"
            own.mkdir()
            (own / "file").write_text("a file")
            with working_in(own):
                tool, line = draw(random.Random(f"{seed}/{PART}/{number}"), keys, material, own)
                outcome, detail = attempt(running(tool, line), seconds)
            for path in own.glob("*.yaml"):
                detail += f"\n{path.name}: {path.read_bytes()[-1000:]!r}"
            tally.add(f"{tool} {_shown(line, own)}", outcome, detail)
    return tally


def draw(
    rng: random.Random, keys: dict[str, Any], material: Path, own: Path
) -> tuple[str, list[str]]:
    """A tool and a command line of it, spoilt; the files that it names are in ``own``."""
    tool = rng.choice(TOOLS)
    if tool == "study":
        return tool, _spoilt_study(rng, keys, own)
    config = QUICKSTART / rng.choice(CONFIGS)
    how = rng.choice(("option", "option", "option", "value", "value", "flag", "text", "whole"))
    more: list[str] = []
    flags: list[str] = []
    if how == "option":
        for _ in range(rng.choice((1, 1, 1, 2))):
            key = rng.choice(_of_config(keys, config))
            fitting = repr(_fitting(rng, keys[key])).replace("inf", "1e400")
            more += [key, rng.choice((fitting, fitting, fitting, rng.choice(VALUES)))]
    elif how == "flag":
        kinds = FLAGS["train_net" if tool == "evaluate" else tool] + FLAGS["any"]
        flags = list(rng.choice(kinds))
    else:
        path = own / "config.yaml"
        path.write_bytes(_spoilt_config(rng, how, keys, config))
        config = path
    name, line = arguments(tool, material, own / "out", *more, config=config)
    if flags and flags[0].startswith("--"):  # the last of two is what counts
        place = line.index("DATASETS.COCO_JSON")
        return name, [*line[:place], *flags, *line[place:]]
    return name, [*line, *flags]


def _fitting(rng: random.Random, value: Any) -> Any:
    """A value of the same type that may mean nothing."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice((0, 1, 2, -1, -7, value + 1, -value, 10**9, 2**63))
    if isinstance(value, float):
        return rng.choice((0.0, 1.0, -1.0, 1.5, -value, 1e-320, 1e30, math.inf, -math.inf))
    if isinstance(value, str):
        return rng.choice(("", "foo", value.lower(), f"{value} ", "BN", "*", "p9", "\u00e9", "\0"))
    if isinstance(value, list | tuple):
        items = list(value)
        if items and rng.random() < 0.6:
            place = rng.randrange(len(items))
            items[place] = rng.choice((_fitting(rng, items[place]), None, "foo", -1, []))
        else:
            items = rng.choice(
                ([], items * 2, items[1:], [items], [None], [0], [-1], ["foo"], [{}])
            )
        return type(value)(items)
    return rng.choice((0, -1, "foo", [], 1.5))


def _in_yaml(value: Any) -> str:
    lists = json.loads(json.dumps(value))  # of tuples
    return yaml.safe_dump(lists, default_flow_style=True).removesuffix("...\n").strip()


def _spoilt_config(rng: random.Random, how: str, keys: dict[str, Any], config: Path) -> bytes:
    if how == "whole":
        return rng.choice(WHOLE)
    base = f"_BASE_: {config}\n"
    if how == "value":
        key = rng.choice(_of_config(keys, config))
        fitting = _in_yaml(_fitting(rng, keys[key]))
        value = rng.choice((fitting, fitting, fitting, rng.choice(YAML_VALUES)))
        *path, last = key.split(".")
        inner = "".join(f"{part}: {{" for part in path) + f"{last}: {value}" + "}" * len(path)
        return f"{base}{inner}\n".encode()
    text = config.read_bytes().replace(b'"Base-', f'"{QUICKSTART}/Base-'.encode())
    return _damaged(rng, text)


def _damaged(rng: random.Random, text: bytes) -> bytes:
    place = rng.randrange(len(text))
    if rng.random() < 0.25:
        return text[:place]
    return text[:place] + rng.choice(DAMAGE) + text[place + rng.choice((0, 0, 1, 5)) :]


def _spoilt_study(rng: random.Random, keys: dict[str, Any], own: Path) -> list[str]:
    path = own / "study.yaml"
    flags: list[str] = []
    how = rng.choice(("value", "value", "option", "flag", "text"))
    content = study_content()
    if how == "value":
        _spoil(rng, content)
    elif how == "option":
        of = rng.choice((content["overrides"], content["evaluations"]["leak"]["probe"]))
        of[rng.choice(sorted(keys))] = yaml.safe_load(rng.choice(YAML_VALUES[:19]))
    elif how == "flag":
        flags = list(rng.choice(FLAGS["study"]))
    text = yaml.safe_dump(content).encode()
    if how == "text":
        text = rng.choice((_damaged(rng, text), rng.choice(WHOLE)))
    path.write_bytes(text)
    return [str(path), *flags, "--dry-run"]


def _spoil(rng: random.Random, content: dict[str, Any]) -> None:
    """Replace, remove or add one entry, at any depth."""
    node: Any = content
    while True:
        key = rng.choice(list(node))
        if isinstance(node[key], dict) and node[key] and rng.random() < 0.7:
            node = node[key]
            continue
        break
    change = rng.choice(("replace", "replace", "remove", "add"))
    if change == "remove":
        del node[key]
    else:
        value = yaml.safe_load(rng.choice(YAML_VALUES[:19]))
        node[key if change == "replace" else rng.choice(("foo", "", 3, "a/b", "..", None))] = value


def _keys() -> dict[str, Any]:
    cfg = load_config(argument_parser().parse_args([]))
    return {key: value for key, value in leaves(cfg) if key != "OUTPUT_DIR"}


def _of_config(keys: dict[str, Any], config: Path) -> list[str]:
    """All keys, and those that the quickstart configs set three times as often."""
    found = argument_parser().parse_args(["--config-file", str(config)])
    cfg = load_config(found)
    changed = [key for key, value in leaves(cfg) if key in keys and keys[key] != value]
    return sorted(keys) + 3 * sorted(changed)


def _shown(line: list[str], own: Path) -> str:
    """A command line that can be read, without paths of this run."""
    shown = " ".join(part if part.isprintable() and part else repr(part) for part in line)
    return shown.replace(str(own), ".").replace(str(ROOT), ".")
