"""Folders of Pascal VOC, written by hand here, as COCO's JSON."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from detectron2.data import DatasetCatalog
from detectron2.data.datasets.pascal_voc import load_voc_instances
from detectron2.structures import BoxMode
from PIL import Image

from bn_detection import ConfigError, cli
from bn_detection.data import register_coco_json, voc_to_coco

SIZE = (100, 80)


def thing(name: str, *corners: object, difficult: int = 0) -> str:
    tags = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    box = "".join(f"<{tag}>{value}</{tag}>" for tag, value in tags)
    return (
        f"<object><name>{name}</name><difficult>{difficult}</difficult>"
        f"<bndbox>{box}</bndbox></object>"
    )


def write(root: Path, stem: str, *things: str, image: bool = True) -> Path:
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    path = root / "Annotations" / f"{stem}.xml"
    path.write_text(f"<annotation><filename>{stem}.jpg</filename>{''.join(things)}</annotation>\n")
    if image:
        Image.new("RGB", SIZE).save(root / "JPEGImages" / f"{stem}.jpg")
    return path


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Three images: two of train, one of val with a class of its own."""
    root = tmp_path / "VOC"
    write(root, "b", thing("dog", 1, 1, 100, 80), thing("cat", 11, 21, 30, 60, difficult=1))
    write(root, "a", thing("cat", 11.5, 21, 30, 60))
    write(root, "c", thing("ape", 5, 5, 9, 9))
    (root / "ImageSets/Main/train.txt").write_text("b\na\n\n")
    (root / "ImageSets/Main/val.txt").write_text("c  1\n")
    return root


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_boxes_by_hand(voc: Path, tmp_path: Path) -> None:
    made = voc_to_coco(voc, tmp_path / "new" / "train.json", "train")
    assert made == (2, 3, ("ape", "cat", "dog"))
    content = read(tmp_path / "new" / "train.json")
    assert content["images"] == [
        {"id": 1, "file_name": "b.jpg", "width": 100, "height": 80},
        {"id": 2, "file_name": "a.jpg", "width": 100, "height": 80},
    ]
    # 20 columns and 40 rows of pixels, after 10 columns and 20 rows.
    found = [(a["image_id"], a["category_id"], a["bbox"]) for a in content["annotations"]]
    assert found == [
        (1, 3, [0, 0, 100, 80]),
        (1, 2, [10, 20, 20, 40]),
        (2, 2, [10.5, 20, 19.5, 40]),
    ]
    assert [a["area"] for a in content["annotations"]] == [8000, 800, 780]
    assert [a["iscrowd"] for a in content["annotations"]] == [0, 1, 0]
    assert [a["id"] for a in content["annotations"]] == [1, 2, 3]


def test_the_categories_of_every_split_are_the_same(voc: Path, tmp_path: Path) -> None:
    for split in ("train", "val", None):
        voc_to_coco(voc, tmp_path / f"{split}.json", split)
    expected = [{"id": 1, "name": "ape"}, {"id": 2, "name": "cat"}, {"id": 3, "name": "dog"}]
    contents = [read(tmp_path / f"{split}.json") for split in ("train", "val", None)]
    assert [content["categories"] for content in contents] == [expected] * 3
    # All annotations, by name.
    assert [image["file_name"] for image in contents[2]["images"]] == ["a.jpg", "b.jpg", "c.jpg"]
    voc_to_coco(voc, tmp_path / "given.json", "val", classes=("dog", "ape"))
    given = read(tmp_path / "given.json")
    assert [category["name"] for category in given["categories"]] == ["dog", "ape"]
    assert given["annotations"][0]["category_id"] == 2
    with pytest.raises(ConfigError, match=r"b\.xml: the class cat is none of dog, ape"):
        voc_to_coco(voc, tmp_path / "other.json", "train", classes=("dog", "ape"))


@pytest.mark.usefixtures("own_catalogs")
def test_as_detectron2_reads_pascal_voc(voc: Path, tmp_path: Path) -> None:
    for path in (voc / "Annotations").glob("*.xml"):  # its reader needs a size
        size = "<size><width>100</width><height>80</height></size><object>"
        path.write_text(path.read_text().replace("<object>", size, 1))
    voc_to_coco(voc, tmp_path / "train.json", "train")
    register_coco_json([("ours", str(tmp_path / "train.json"), str(voc / "JPEGImages"))])
    ours = DatasetCatalog.get("ours")
    theirs = load_voc_instances(str(voc), "train", ["ape", "cat", "dog"])
    for one, two in zip(ours, theirs, strict=True):
        assert Path(one["file_name"]).samefile(two["file_name"])
        assert [one[key] for key in ("width", "height")] == [
            two[key] for key in ("width", "height")
        ]
        for a, b in zip(one["annotations"], two["annotations"], strict=True):
            assert a["category_id"] == b["category_id"]
            assert BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) == b["bbox"]


def test_boxes_that_leave_the_image_or_have_no_area(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    boxes = [(0, -5, 20, 20), (90, 70, 105, 90), (30, 30, 30, 40), (101, 5, 110, 9), (8, 9, 7, 20)]
    path = write(tmp_path, "one", *(thing("cat", *box) for box in boxes))
    with caplog.at_level(logging.WARNING):
        made = voc_to_coco(tmp_path, tmp_path / "out.json")
    found = [annotation["bbox"] for annotation in read(tmp_path / "out.json")["annotations"]]
    assert found == [[0, 0, 20, 20], [89, 69, 11, 11]] and made.num_objects == 2
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: the cat at {box} has no area within the image and is left out."
        for box in ("30 30 30 40", "101 5 110 9", "8 9 7 20")
    ]


BOMB = (
    '<!DOCTYPE a [<!ENTITY x "ha"><!ENTITY y "&x;&x;">]><annotation><object><name>&y;</name>'
    "</object></annotation>"
)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("<annotation><object>", "no element found"),
        ("", "no element found"),
        (BOMB, "it has a DOCTYPE"),
        (thing("", 1, 2, 3, 4), "an object has no name"),
        (thing("cat", 1, 2, 3, "wide"), "ymax of a cat is 'wide'"),
        (thing("cat", 1, "nan", 3, 4), "ymin of a cat is 'nan'"),
        ("<annotation><object><name>cat</name></object></annotation>", "xmin of a cat is ''"),
    ],
)
def test_malformed_annotations_are_named(content: str, words: str, tmp_path: Path) -> None:
    path = write(tmp_path, "one")
    path.write_text(content)
    with pytest.raises(ConfigError) as info:
        voc_to_coco(tmp_path, tmp_path / "out.json")
    assert str(info.value).startswith(f"{path} is no annotation of Pascal VOC: ")
    assert words in str(info.value)
    assert not (tmp_path / "out.json").exists()


def test_what_is_missing_is_named(voc: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    (voc / "ImageSets/Main/empty.txt").touch()
    for split, words in (("test", "Splits: empty, train, val"), ("empty", "names no image")):
        with pytest.raises(ConfigError, match=rf"--split {split}: .*{split}\.txt.*{words}"):
            voc_to_coco(voc, out, split)
    (voc / "JPEGImages/c.jpg").write_text("no image")
    with pytest.raises(ConfigError, match=r"c\.jpg cannot be read as an image"):
        voc_to_coco(voc, out)
    (voc / "JPEGImages/c.jpg").unlink()
    with pytest.raises(ConfigError, match=r"c\.jpg: there is no such image"):
        voc_to_coco(voc, out)
    Image.new("RGB", SIZE).save(voc / "JPEGImages" / "c.PNG")
    assert voc_to_coco(voc, out).num_images == 3
    (voc / "Annotations/b.xml").unlink()
    with pytest.raises(ConfigError, match=r"b\.xml: No such file"):
        voc_to_coco(voc, tmp_path / "train.json", "train")
    with pytest.raises(ConfigError, match="Annotations: there is no such folder"):
        voc_to_coco(tmp_path, tmp_path / "other.json")


def test_the_command(voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["voc-to-coco", str(voc), "--split", "val", "--output", str(tmp_path / "val.json")]
    assert cli.main(line) == 0
    assert "1 images, 1 objects of 3 classes (ape, cat, dog)" in capsys.readouterr().out
    before = (tmp_path / "val.json").read_bytes()
    line[3] = "train"
    assert cli.main(line) == 2
    assert "val.json exists. Give another --output, or --overwrite" in capsys.readouterr().err
    assert (tmp_path / "val.json").read_bytes() == before
    assert cli.main([*line, "--overwrite"]) == 0
    assert len(read(tmp_path / "val.json")["images"]) == 2
