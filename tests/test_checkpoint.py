"""Checkpoints that are damaged, of another model, or not there: one line."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from training import build_trainer, make_images

from bn_detection import ConfigError
from bn_detection.engine import AtomicCheckpointer, evaluate
from bn_detection.engine.checkpoint import check_intact, last_checkpoint
from bn_detection.engine.setup import register_datasets


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, and in ``output`` a checkpoint of two iterations."""
    folder = tmp_path_factory.mktemp("checkpoint")
    make_images(folder)
    build_trainer(folder, folder / "output", *SHORT).train()
    return folder


SHORT = ("SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 1, "DATASETS.TEST", "()")


def resume(run: Path, content: Any, output: Path, *more: object, config: str = "bn") -> str:
    output.mkdir()
    torch.save(content, output / "model.pth")
    (output / "last_checkpoint").write_text("model.pth")
    with pytest.raises(ConfigError) as info:
        build_trainer(run, output, *SHORT, *more, config=config, resume=True)
    assert "\n" not in str(info.value)
    return str(info.value)


def checkpoint(run: Path) -> dict[str, Any]:
    return torch.load(run / "output" / "model_final.pth")


def test_a_checkpoint_of_another_model_is_not_resumed(run: Path, tmp_path: Path) -> None:
    message = resume(run, checkpoint(run), tmp_path / "gn", config="gn")
    assert message.startswith(f"--resume: {tmp_path}/gn/model.pth: the weights do not fit")
    assert "roi_heads.box_head.conv1.norm.running_mean" in message


def test_weights_alone_are_not_resumed(run: Path, tmp_path: Path) -> None:
    message = resume(run, {"model": checkpoint(run)["model"]}, tmp_path / "weights")
    assert 'it has no "trainer"' in message and "MODEL.WEIGHTS" in message


def test_a_trainer_without_an_iteration_is_one_line(run: Path, tmp_path: Path) -> None:
    content = checkpoint(run)
    content["trainer"] = {}
    assert "iteration" in resume(run, content, tmp_path / "empty")


def test_weights_of_another_model_still_begin_a_training(run: Path, tmp_path: Path) -> None:
    weights = ("MODEL.WEIGHTS", run / "output" / "model_final.pth")
    assert build_trainer(run, tmp_path, *SHORT, *weights, config="gn").start_iter == 0


@pytest.mark.parametrize("at", [0.3, 0.6, 0.9])
def test_a_zeroed_stretch_is_noticed(run: Path, tmp_path: Path, at: float) -> None:
    path = tmp_path / "model.pth"
    content = bytearray((run / "output" / "model_final.pth").read_bytes())
    check_intact(str(run / "output" / "model_final.pth"))
    start = int(at * len(content))
    content[start : start + 4096] = bytes(4096)
    path.write_bytes(content)
    torch.load(path)  # notices nothing
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=f"MODEL.WEIGHTS {path}: the file is damaged: "):
        AtomicCheckpointer(model).resume_or_load(str(path), resume=False)
    (tmp_path / "last_checkpoint").write_text("model.pth")
    with pytest.raises(ConfigError, match=f"--resume: {path}: the file is damaged: "):
        AtomicCheckpointer(model, str(tmp_path)).resume_or_load("", resume=True)


def test_classes_in_another_order_are_not_evaluated(run: Path, tmp_path: Path) -> None:
    weights = run / "output" / "model_final.pth"
    names = [f"class_{k}" for k in range(4)]
    assert torch.load(weights)["thing_classes"] == names
    annotations = json.loads((run / "val" / "annotations.json").read_text())
    for category in annotations["categories"]:
        category["name"] = names[category["id"] % 4]
    (tmp_path / "moved.json").write_text(json.dumps(annotations))
    trainer = build_trainer(run, tmp_path / "output", *SHORT)
    cfg = trainer.cfg.clone()
    cfg.defrost()
    cfg.merge_from_list(["MODEL.WEIGHTS", str(weights), "DATASETS.TEST", "('moved',)"])
    cfg.DATASETS.COCO_JSON = [["moved", str(tmp_path / "moved.json"), str(run / "val" / "images")]]
    register_datasets(cfg)
    reason = f'its class 0 is "class_1", and that of MODEL.WEIGHTS "{weights}" is "class_0"'
    with pytest.raises(ConfigError, match=re.escape(reason)):
        evaluate(cfg, resume=False)


def test_files_without_checksums_pass(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(99)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    check_intact(str(tmp_path / "old.pth"))
    if hasattr(torch.serialization, "set_crc32_options"):
        torch.serialization.set_crc32_options(False)
        try:
            torch.save({"a": torch.ones(99)}, tmp_path / "none.pth")
        finally:
            torch.serialization.set_crc32_options(True)
        check_intact(str(tmp_path / "none.pth"))


@pytest.mark.parametrize(
    ("tag", "reason"),
    [
        (b"\xff\x00\xfe", "is damaged: it is no text"),
        (b"model\x00.pth", "is damaged: it has "),
        (b"", "is damaged: it has ''"),
        (b"model_0000009.pth\n", "names model_0000009.pth, which is not in the folder"),
        (None, "cannot be read: Is a directory"),
    ],
)
def test_a_damaged_tag_is_one_line(tmp_path: Path, tag: bytes | None, reason: str) -> None:
    path = tmp_path / "last_checkpoint"
    if tag is None:
        path.mkdir()
    else:
        path.write_bytes(tag)
    with pytest.raises(ConfigError, match=re.escape(f"{path} {reason}")) as info:
        last_checkpoint(str(tmp_path))
    assert "\n" not in str(info.value)
    with pytest.raises(ConfigError):
        AtomicCheckpointer(torch.nn.Linear(2, 2), str(tmp_path)).resume_or_load("", resume=True)


def test_without_a_tag_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert last_checkpoint(str(tmp_path)) is None
    (tmp_path / "last_checkpoint").write_text("model.pth")
    torch.save({}, tmp_path / "model.pth")
    assert last_checkpoint(str(tmp_path)) == os.path.join(tmp_path, "model.pth")
