"""Damaged COCO files and images: a job works without them, or ends in one line."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from test_data import edit
from test_records import BOTH, first, image, rle, without

from .counting import Tally, attempt
from .running import DATA, arguments, beginning, running, working_in

PART = "damaged datasets"
TOOLS = ("train_net", "evaluate", "recalibrate")
Spoil = Callable[[Path, random.Random], None]
BAD = (
    *(None, True, 0, -1, 1.5, 10**400, math.nan, math.inf, "", "x", "1", "\udcff", "\0"),
    *([], [None], [[]], [1, 2, 3], ["a"], [1, math.nan, 2, 3], {}, {"a": 1}, [[1, 2, 3, 4]]),
)


def _content(change: Callable[[dict[str, Any]], object]) -> Spoil:
    def spoil(folder: Path, _: random.Random) -> None:
        edit(folder / "annotations.json", change)

    return spoil


def _bytes(change: Callable[[bytes], bytes]) -> Spoil:
    def spoil(folder: Path, _: random.Random) -> None:
        path = folder / "annotations.json"
        path.write_bytes(change(path.read_bytes()))

    return spoil


def _images(number: int | None, change: Callable[[Path], object]) -> Spoil:
    """Of the image of that number; None are all."""

    def spoil(folder: Path, _: random.Random) -> None:
        paths = sorted((folder / "images").iterdir())
        for path in paths if number is None else [paths[number]]:
            change(path)

    return spoil


def _all(**values: object) -> Spoil:
    return _content(lambda content: [a.update(values) for a in content["annotations"]])


def _instead(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


def _deep(path: Path) -> None:
    Image.fromarray(np.full((128, 128), 40_000, np.uint16)).save(path)


IMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:200]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no image"),
    "missing": Path.unlink,
    "a folder": _instead(Path.mkdir),
    "a pipe": _instead(os.mkfifo),
    "a link to nothing": _instead(lambda path: path.symlink_to("nowhere")),
    "16 bits": _deep,
    "another size": lambda path: Image.new("RGB", (64, 32)).save(path),
    "gray": lambda path: Image.new("L", (128, 128)).save(path),
    "a palette": lambda path: Image.new("P", (128, 128)).save(path),
    "with transparency": lambda path: Image.new("RGBA", (128, 128)).save(path),
    "floats": lambda path: Image.new("F", (128, 128)).save(path, "TIFF"),
}


def _random(folder: Path, rng: random.Random) -> None:
    """Replace, remove or repeat something at a random place."""

    def change(content: dict[str, Any]) -> None:
        for _ in range(rng.choice((1, 1, 2))):
            of = content[rng.choice(("images", "annotations", "annotations", "categories"))]
            record = rng.choice(of)
            key = rng.choice(sorted(record)) if isinstance(record, dict) and record else None
            how = rng.choice(("value", "value", "value", "remove", "repeat", "record", "list"))
            if how == "value" and key:
                record[key] = rng.choice(BAD)
            elif how == "remove" and key:
                del record[key]
            elif how == "repeat":
                of.append(record)
            elif how == "record":
                of[rng.randrange(len(of))] = rng.choice(BAD)
            elif how == "list":
                content[rng.choice(sorted(content))] = rng.choice(BAD)
                return

    edit(folder / "annotations.json", change)


def cases(random_ones: int) -> list[tuple[str, Spoil]]:
    """Names and damages, of a copy of a small dataset."""
    found = [(f"record {number}", _content(spoil)) for number, (spoil, _) in enumerate(BOTH)]
    found += [
        ("no masks", _content(lambda c: [a.pop("segmentation") for a in c["annotations"]])),
        ("one mask missing", _content(without("segmentation"))),
        ("RLE", _content(first(segmentation=rle(128, 128)))),
        ("RLE of another size", _content(first(segmentation=rle(3, 4)))),
        ("crowds only", _all(iscrowd=1)),
        ("no annotations", _content(lambda content: content["annotations"].clear())),
        ("no images", _content(lambda content: content["images"].clear())),
        ("no categories", _content(lambda content: content["categories"].clear())),
        ("no list of images", _content(lambda content: content.pop("images"))),
        ("ids that are text", _text_ids),
        ("another order of classes", _content(_rename)),
        ("boxes of no size", _all(bbox=[3, 3, 0, 0])),
        ("boxes outside", _all(bbox=[500, 500, 30, 30])),
        ("boxes of negative size", _all(bbox=[50, 50, -10, -10])),
        ("huge boxes", _all(bbox=[0, 0, 1e30, 1e30])),
        ("a huge image", _content(image(height=10**9, width=10**9))),
        ("a name with a way out", _content(image(file_name="../annotations.json"))),
        ("an absolute name", _content(image(file_name="/dev/null"))),
        ("no area", _content(lambda content: [a.pop("area") for a in content["annotations"]])),
        ("a byte order mark", _bytes(lambda text: b"\xef\xbb\xbf" + text)),
        ("UTF-16", _bytes(lambda text: text.decode().encode("utf-16"))),
        ("nested JSON", _bytes(lambda _: b"[" * 100_000 + b"]" * 100_000)),
        ("cut JSON", _bytes(lambda text: text[:-50])),
        ("empty JSON", _bytes(lambda _: b"")),
        ("a list", _bytes(lambda _: b"[]")),
        ("a number", _bytes(lambda _: b"3")),
        ("bytes", _bytes(lambda _: bytes(range(256)))),
        ("a folder", lambda folder, _: _instead(Path.mkdir)(folder / "annotations.json")),
        ("a pipe", lambda folder, _: _instead(os.mkfifo)(folder / "annotations.json")),
        ("no folder of images", lambda folder, _: shutil.rmtree(folder / "images")),
    ]
    for name, change in IMAGES.items():
        found += [(f"first image {name}", _images(0, change)), (f"an image {name}", _later(change))]
    for name in ("truncated", "missing", "16 bits"):
        found.append((f"all images {name}", _images(None, IMAGES[name])))
    return found + [(f"random damage {number}", _random) for number in range(random_ones)]


def _later(change: Callable[[Path], object]) -> Spoil:
    """The last image, which training meets in its first batch or not."""
    return _images(-1, change)


def _text_ids(folder: Path, _: random.Random) -> None:
    def change(content: dict[str, Any]) -> None:
        for record in content["images"]:
            record["id"] = f"image {record['id']}"
        for annotation in content["annotations"]:
            annotation["image_id"] = f"image {annotation['image_id']}"

    edit(folder / "annotations.json", change)


def _rename(content: dict[str, Any]) -> None:
    names = [category["name"] for category in content["categories"]]
    for category, name in zip(content["categories"], [*names[1:], names[0]], strict=True):
        category["name"] = name


def run(
    seed: int,
    chosen: list[tuple[str, str]],
    random_ones: int,
    material: Path,
    folder: Path,
    seconds: float,
) -> Tally:
    """Try damages of the training data with ``train_net`` and ``recalibrate``, of the other else.

    Args:
        seed: of the campaign.
        chosen: tools, and names of :func:`cases`.
        random_ones: number of random damages in :func:`cases`.
        material: of :func:`campaign.running.make_material`.
        folder: to write to.
        seconds: that each may take.
    """
    tally, spoils = Tally(PART), dict(cases(random_ones))
    with beginning("recalibrate", "evaluate"):
        for tool, name in chosen:
            own = folder / f"{tool} {name}"
            shutil.copytree(material / DATA, own / "data")
            split = "val" if tool == "evaluate" else "train"
            spoils[name](own / "data" / split, random.Random(f"{seed}/{PART}/{name}"))
            with working_in(own):
                line = _line(tool, material, own)
                tally.add(f"{tool}: {name}", *attempt(running(*line), seconds))
    return tally


def _line(tool: str, material: Path, own: Path) -> tuple[str, list[str]]:
    """A command line with the damaged dataset."""
    datasets = [
        [split, f"{own}/data/{split}/annotations.json", f"{own}/data/{split}/images"]
        for split in ("train", "val")
    ]
    more = ("DATASETS.COCO_JSON", json.dumps(datasets), "BN.POPULATION.NUM_SAMPLES", 8)
    more += ("DATASETS.TRAIN", "('train',)", "DATASETS.TEST", "('val',)")
    return arguments(tool, material, own / "out", *more)
