"""Corrupted datasets: the images, the names, and a job that uses them."""

from __future__ import annotations

import builtins
import json
import os
import random
import re
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.utils.file_io import PathManager
from PIL import Image
from tooling import run_script

from bn_detection.config import ConfigError, add_bn_detection_config
from bn_detection.data import (
    CORRUPTIONS,
    build_test_loader,
    build_train_loader,
    check_datasets,
    make_leaky_shapes,
    register_coco_json,
    register_corrupted,
)
from bn_detection.engine.setup import register_datasets

pytestmark = pytest.mark.usefixtures("own_catalogs")

ROOT = Path(__file__).parents[1]
SHAPES = ((128, 128), (61, 97), (97, 61), (20, 40))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_leaky_shapes(tmp_path_factory.mktemp("data") / "shapes", 3, 0, split="val")


@pytest.fixture
def shapes(made):
    register_coco_json([["shapes", str(made.annotations), str(made.images)]])
    return "shapes"


def photograph(height: int, width: int) -> np.ndarray:
    """``(height, width, 3)`` uint8: smooth colours, edges and noise."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([130 + 60 * np.sin(x / 9), 110 + 50 * np.cos(y / 7), 90 + 0.5 * x], axis=-1)
    image[height // 4 : height // 2, width // 4 : width // 2] = (200, 60, 30)
    return (image + np.random.default_rng(0).normal(0, 4, image.shape)).clip(0, 255).astype("uint8")


def save(path: Path, image: np.ndarray) -> str:
    Image.fromarray(image).save(path)
    return str(path)


# ---------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------


def test_the_kinds_are_those_of_coco_c():
    paper = (
        "gaussian_noise shot_noise impulse_noise defocus_blur glass_blur motion_blur zoom_blur "
        "snow frost fog brightness contrast elastic_transform pixelate jpeg_compression"
    )
    assert list(CORRUPTIONS) == paper.split()


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_every_severity_of_every_kind(corruption, tmp_path, recwarn, capfd):
    distances = np.zeros(5)
    for height, width in SHAPES:
        clean = photograph(height, width)
        for number in range(2):
            path = save(tmp_path / f"{number}.png", clean)
            for severity in range(1, 6):
                image = read_image(f"corrupted://{corruption}:{severity}/{path}", format="RGB")
                assert image.shape == clean.shape and image.dtype == np.uint8
                difference = np.abs(image.astype(float) - clean).mean()
                assert difference > 0.5
                if corruption in ("frost", "fog"):  # which also keep the brightness in bounds
                    difference = 1 - np.corrcoef(image.ravel(), clean.ravel())[0, 1]
                distances[severity - 1] += difference
    assert np.polyfit(range(5), distances, 1)[0] > 0
    # Of files that other tests have left open Python warns when it collects them.
    ours = [warning for warning in recwarn if warning.category is not ResourceWarning]
    assert not [str(warning.message) for warning in ours]
    assert capfd.readouterr() == ("", "")


def test_brightness_and_contrast_follow_their_formulas(tmp_path):
    """Hendrycks & Dietterich 2019: value + 0.3, and 0.2 of the distance from the mean."""
    grey = np.random.default_rng(0).integers(40, 160, (48, 64), dtype=np.uint8)
    path = save(tmp_path / "grey.png", grey)
    brighter = read_image(f"corrupted://brightness:3/{path}", format="L")[..., 0]
    assert np.abs(brighter - (grey + 0.3 * 255)).max() <= 1
    flatter = read_image(f"corrupted://contrast:3/{path}", format="L")[..., 0]
    assert np.abs(flatter - (grey.mean() + 0.2 * (grey - grey.mean()))).max() <= 1


def test_jpeg_compression_is_that_of_pillow(tmp_path):
    image = photograph(64, 80)
    path = save(tmp_path / "a.png", image)
    Image.fromarray(image).save(tmp_path / "a.jpg", quality=15)
    expected = np.asarray(Image.open(tmp_path / "a.jpg"))
    found = read_image(f"corrupted://jpeg_compression:3/{path}", format="RGB")
    np.testing.assert_array_equal(found, expected)


def test_gaussian_noise_has_the_papers_standard_deviation(tmp_path):
    path = save(tmp_path / "flat.png", np.full((200, 200, 3), 128, np.uint8))
    noisy = read_image(f"corrupted://gaussian_noise:1/{path}", format="RGB").astype(float)
    assert noisy.std() == pytest.approx(0.08 * 255, rel=0.02)
    channels = np.corrcoef(noisy.reshape(-1, 3).T)
    assert np.abs(channels - np.eye(3)).max() < 0.02


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_an_image_is_the_same_whenever_and_wherever_it_is_read(corruption, tmp_path):
    image = photograph(64, 64)
    (tmp_path / "elsewhere").mkdir()
    paths = [save(tmp_path / "a.png", image), save(tmp_path / "elsewhere" / "a.png", image)]
    first, second, again = (
        read_image(f"corrupted://{corruption}:2/{path}", format="RGB")
        for path in (*paths, paths[0])
    )
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("corruption", ["gaussian_noise", "impulse_noise", "glass_blur", "fog"])
def test_images_of_other_names_and_severities_have_other_noise(corruption, tmp_path):
    image = photograph(64, 64)
    a, b = (save(tmp_path / name, image) for name in ("a.png", "b.png"))
    noises = [
        read_image(f"corrupted://{corruption}:{severity}/{path}", format="RGB").astype(float)
        - image
        for path, severity in ((a, 2), (b, 2), (a, 3))
    ]
    assert not np.array_equal(noises[0], noises[1])
    if corruption == "gaussian_noise":  # its severity scales, but does not repeat, the noise
        assert abs(np.corrcoef(noises[0].ravel(), noises[2].ravel())[0, 1]) < 0.1


def test_another_process_sees_the_same_pixels_and_imports_the_library_late(tmp_path):
    path = save(tmp_path / "a.png", photograph(64, 64))
    names = [f"corrupted://{corruption}:3/{path}" for corruption in CORRUPTIONS]
    code = (
        "import sys, zlib, bn_detection.data\n"
        "assert not {'imagecorruptions', 'numba'} & {*sys.modules}\n"
        "from detectron2.data.detection_utils import read_image\n"
        "print([zlib.crc32(read_image(name, 'RGB').tobytes()) for name in sys.argv[1:]])"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, *reversed(names)], capture_output=True, text=True, check=True
    )
    here = [zlib.crc32(read_image(name, "RGB").tobytes()) for name in names]
    assert json.loads(process.stdout.splitlines()[-1]) == here[::-1]


def test_random_number_generators_are_untouched(tmp_path):
    path = save(tmp_path / "a.png", photograph(40, 40))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    expected = random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    for corruption in CORRUPTIONS:
        read_image(f"corrupted://{corruption}:3/{path}")
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected  # noqa: NPY002


def test_exif_orientation_is_applied_before_the_corruption(tmp_path):
    image = Image.fromarray(photograph(40, 64))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    path = str(tmp_path / "turned.png")
    clean = read_image(path, format="RGB")
    corrupted = read_image(f"corrupted://pixelate:1/{path}", format="RGB")
    assert corrupted.shape == clean.shape == (64, 40, 3)
    assert np.abs(corrupted.astype(float) - clean).mean() < 10  # not turned once more


def test_a_file_that_is_no_image_and_one_that_is_missing(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(Image.UnidentifiedImageError):
        read_image(f"corrupted://fog:1/{tmp_path}/text.png")
    with pytest.raises(FileNotFoundError):
        read_image(f"corrupted://fog:1/{tmp_path}/none.png")
    assert not PathManager.exists(f"corrupted://fog:1/{tmp_path}/none.png")
    assert PathManager.isfile(f"corrupted://fog:1/{tmp_path}/text.png")


def test_corrupted_files_are_only_read(tmp_path):
    path = save(tmp_path / "a.png", photograph(40, 40))
    for mode in ("r", "w", "wb"):
        with pytest.raises(ValueError, match='mode "rb"'):
            PathManager.open(f"corrupted://fog:1/{path}", mode)


# ---------------------------------------------------------------------------------------------
# Datasets
# ---------------------------------------------------------------------------------------------


def test_a_corrupted_dataset_is_the_dataset_with_other_pixels(shapes, made):
    register_corrupted("shapes@fog:3")
    clean, corrupted = DatasetCatalog.get("shapes"), DatasetCatalog.get("shapes@fog:3")
    for a, b in zip(clean, corrupted, strict=True):
        assert b["file_name"] == f"corrupted://fog:3/{a['file_name']}"
        assert {**b, "file_name": None} == {**a, "file_name": None}
        assert not np.array_equal(read_image(a["file_name"]), read_image(b["file_name"]))
    of_clean, of_corrupted = (MetadataCatalog.get(n).as_dict() for n in ("shapes", "shapes@fog:3"))
    assert of_corrupted.pop("name") == "shapes@fog:3" and of_clean.pop("name") == "shapes"
    assert of_corrupted.pop("image_root") == f"corrupted://fog:3/{of_clean.pop('image_root')}"
    assert of_corrupted == of_clean


def test_registering_twice_is_fine(shapes):
    register_corrupted("shapes@fog:3")
    register_corrupted("shapes@fog:3")
    register_corrupted("shapes@fog:4")
    assert len(DatasetCatalog.get("shapes@fog:4")) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shapes@frog:3", r'"shapes@frog:3".*"frog".*fog.*gaussian_noise'),
        ("shapes@fog:6", r'"shapes@fog:6".*severity "6".*1, 2, 3, 4, 5'),
        ("shapes@fog:0", r'severity "0"'),
        ("shapes@fog:high", r'severity "high"'),
        ("shapes@fog", r'severity "".*shapes@fog:3'),
        ("shapes@", r'corruption ""'),
        ("shapes@fog:1@snow:2", r'"shapes@fog:1@snow:2".*"shapes@fog:1" is corrupted already'),
        ("shape@fog:3", r'"shape@fog:3".*no dataset "shape".*shapes'),
        ("@fog:3", r'no dataset ""'),
        ("shapes", r"name@corruption:severity"),
    ],
)
def test_a_name_that_means_nothing_is_refused(shapes, name, message):
    before = set(DatasetCatalog)
    with pytest.raises(ConfigError, match=message):
        register_corrupted(name)
    assert set(DatasetCatalog) == before


def test_a_missing_library_is_an_error_with_the_command(shapes, monkeypatch):
    real_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "imagecorruptions":
            raise ImportError("No module named 'imagecorruptions'")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install --no-deps imagecorruptions-imaug") as error:
        register_corrupted("shapes@fog:3")
    assert 'pip install "bn_detection[corruptions]"' in str(error.value)
    assert "\n" not in str(error.value)


def make_cfg(tmp_path, train=(), test=()):
    cfg = get_cfg()
    add_bn_detection_config(cfg)
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = tuple(train), tuple(test)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 4
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (128,), 128
    return cfg


def test_names_of_a_config_are_registered_with_what_they_are_made_of(tmp_path, made, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    # The embedded dataset is there, so that none is made.
    os.makedirs(tmp_path / "leaky_shapes")
    (tmp_path / "leaky_shapes/val").symlink_to(made.images.parent)
    cfg = make_cfg(tmp_path, ["mine@snow:2"], ["leaky_shapes_val@contrast:3"])
    cfg.DATASETS.COCO_JSON = [["mine", str(made.annotations), str(made.images)]]
    register_datasets(cfg)
    check_datasets(cfg, cfg.DATASETS.TRAIN)
    assert {"mine", "mine@snow:2", "leaky_shapes_val", "leaky_shapes_val@contrast:3"} <= {
        *DatasetCatalog
    }
    batch = next(iter(build_train_loader(cfg)))
    assert batch[0]["file_name"].startswith("corrupted://snow:2/")
    assert len(batch[0]["instances"]) > 0
    mapped = [batch[0] for batch in build_test_loader(cfg, "leaky_shapes_val@contrast:3")]
    assert len(mapped) == 3
    clean = DatasetMapper(cfg, False)(DatasetCatalog.get("mine")[0])
    standard_deviations = (item["image"].float().std().item() for item in (mapped[0], clean))
    assert next(standard_deviations) == pytest.approx(0.2 * next(standard_deviations), rel=0.1)


def test_classes_are_checked_without_loading_the_clean_dataset_first(tmp_path, shapes):
    cfg = make_cfg(tmp_path, test=["shapes@fog:3"])
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 7
    register_datasets(cfg)
    with pytest.raises(ConfigError, match=r'"shapes@fog:3" has 4 classes'):
        check_datasets(cfg, [])


# ---------------------------------------------------------------------------------------------
# A job
# ---------------------------------------------------------------------------------------------


def evaluate(*overrides: str | Path) -> subprocess.CompletedProcess[str]:
    config = ROOT / "configs/quickstart/mask_rcnn_bn.yaml"
    tool = ROOT / "tools/train_net.py"
    return run_script(tool, "--eval-only", "--config-file", config, *overrides)


@pytest.mark.timeout(120)
def test_evaluation_on_a_corrupted_dataset(made, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for path in made.images.iterdir():
        (images / path.name).write_bytes(path.read_bytes())
    (images / "000002.png").write_bytes(b"not a picture")
    process = evaluate(
        *("DATASETS.COCO_JSON", str([["mine", str(made.annotations), str(images)]])),
        *("DATASETS.TEST", "('mine@fog:3', 'mine')", "OUTPUT_DIR", tmp_path / "run"),
        *("MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "1"),
    )
    assert process.returncode == 0, process.stdout + process.stderr
    folder = tmp_path / "run" / "eval_random_weights_population"
    results = json.loads((folder / "results.json").read_text())["results"]
    assert results.keys() == {"mine@fog:3", "mine"}
    assert results["mine@fog:3"].keys() == {"bbox", "segm"}
    noted = (tmp_path / "run/unreadable_images.txt").read_text().splitlines()
    assert set(noted) == {f"{images}/000002.png"}
    assert "Unreadable images left out: 1 " in process.stdout
    left_out = re.findall(r'"(mine\S*)": 1 of 3 images could not be read', process.stdout)
    assert left_out == ["mine@fog:3", "mine"]


def test_an_unknown_corruption_ends_the_job_before_it_starts(made, tmp_path):
    process = evaluate(
        *("DATASETS.COCO_JSON", str([["mine", str(made.annotations), str(made.images)]])),
        *("DATASETS.TEST", "('mine@forg:3',)", "OUTPUT_DIR", tmp_path / "run"),
    )
    assert process.returncode == 2
    assert "Traceback" not in process.stderr
    assert 'DATASETS: "mine@forg:3"' in process.stderr and "fog" in process.stderr
    assert not (tmp_path / "run").exists()
