"""A diagnosis of every config of Detectron2's model zoo, in small: what it measures of each.

Depths, heads, samplers and losses are those of the config; channels, images and proposals are few,
so that a CPU does it, the weights random, and what can have a NORM has BN. LeakyShapes gets
keypoints, and a map of its objects for semantic segmentation.

    python benchmarks/model_zoo.py --output docs/model_zoo.md
    python benchmarks/model_zoo.py COCO-Detection/retinanet_R_50_FPN_1x.yaml
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image, ImageDraw

from bn_detection import ConfigError, add_bn_detection_config, cli
from bn_detection.config import one_line
from bn_detection.data import make_leaky_shapes
from bn_detection.engine import Trainer, diagnose, load_config, preflight_diagnosis

ZOO = Path(model_zoo.__file__).with_name("configs")
IMAGES = 6
KEYPOINTS = ["left", "right"]
DATASET = "zoo_leaky_shapes"
NATIVE = "deformable convolutions are a native operator of Detectron2, which is not built here"
HEAD = """# Detectron2's model zoo

`bn-detection diagnose` on every YAML config of the model zoo, by
`python benchmarks/model_zoo.py --output docs/model_zoo.md`: depths, heads, samplers and losses are
those of the config, channels and images few, weights random, and what can have a `NORM` has BN.
*BN layers* are those whose statistics were measured; *probe* is what the
[leakage probe](leakage.md) measured, on the training sampler's RoIs or on detections, or why not.

"""


class Row(NamedTuple):
    """What a diagnosis did with a config."""

    config: str
    architecture: str
    layers: str
    probe: str

    def markdown(self) -> str:
        return f"| `{self.config}` | {self.architecture} | {self.layers} | {self.probe} |"


def configs() -> list[str]:
    """The names of all configs that are no base of others."""
    names = (path.relative_to(ZOO) for path in ZOO.rglob("*.yaml"))
    return sorted(str(name) for name in names if not name.name.startswith("Base"))


def make_data(folder: Path) -> None:
    """Register a few images with boxes, masks, keypoints, proposals and a map of their objects."""
    made = make_leaky_shapes(folder / "images", IMAGES, seed=7, split="val")
    content = json.loads(made.annotations.read_text())
    records = []
    for image in content["images"]:
        objects = [x for x in content["annotations"] if x["image_id"] == image["id"]]
        file = made.annotations.parent / "images" / image["file_name"]
        labels = Image.new("L", (image["width"], image["height"]))
        annotations, boxes = [], []
        for item in objects:
            x, y, width, height = item["bbox"]
            ImageDraw.Draw(labels).rectangle([x, y, x + width, y + height], item["category_id"])
            points = [x + width / 3, y + height / 2, 2, x + width / 2, y + height / 3, 2]
            about = {"category_id": item["category_id"] - 1, "bbox_mode": BoxMode.XYWH_ABS}
            annotations.append({**item, **about, "keypoints": points})
            boxes.append([x - 2, y, x + width, y + height + 3])
        labels.save(folder / f"{image['id']}.png")
        records.append(
            {
                "file_name": str(file),
                "image_id": image["id"],
                "height": image["height"],
                "width": image["width"],
                "annotations": annotations,
                "sem_seg_file_name": str(folder / f"{image['id']}.png"),
            }
        )
    DatasetCatalog.register(DATASET, lambda: records)
    names = [category["name"] for category in content["categories"]]
    MetadataCatalog.get(DATASET).set(
        thing_classes=names,
        stuff_classes=["background", *names],
        keypoint_names=KEYPOINTS,
        keypoint_flip_map=[tuple(KEYPOINTS)],
        ignore_label=255,
        evaluator_type="coco",
    )
    number = 20
    rng = np.random.default_rng(0)
    proposals: dict[str, Any] = {"ids": [], "boxes": [], "objectness_logits": [], "bbox_mode": 0}
    for record in records:
        corners = rng.uniform(0, 60, (number, 2))
        proposals["ids"].append(record["image_id"])
        proposals["boxes"].append(np.concatenate([corners, corners + 40], 1).astype("float32"))
        proposals["objectness_logits"].append(rng.normal(size=number).astype("float32"))
    (folder / "proposals.pkl").write_bytes(pickle.dumps(proposals))


def overrides(name: str, folder: Path) -> list[str]:
    """What makes a config small, and gives it BN."""
    cfg = get_cfg()
    add_bn_detection_config(cfg)
    cfg.merge_from_file(str(ZOO / name))
    groups = cfg.MODEL.RESNETS.NUM_GROUPS
    values: dict[str, object] = {
        "MODEL.DEVICE": "cpu",
        "MODEL.RESNETS.STEM_OUT_CHANNELS": 32,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
        "MODEL.RESNETS.WIDTH_PER_GROUP": max(32 // groups, 1),
        "MODEL.FPN.OUT_CHANNELS": 32,
        "MODEL.ROI_BOX_HEAD.CONV_DIM": 32,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
        "MODEL.ROI_MASK_HEAD.CONV_DIM": 32,
        "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": len(KEYPOINTS),
        "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 5,
        "MODEL.ROI_HEADS.NUM_CLASSES": 4,
        "MODEL.RETINANET.NUM_CLASSES": 4,
        "MODEL.RETINANET.NUM_CONVS": 1,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 50,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 20,
        "MODEL.RPN.PRE_NMS_TOPK_TEST": 50,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
        "DATASETS.TRAIN": (DATASET,),
        "DATASETS.TEST": (DATASET,),
        "DATALOADER.NUM_WORKERS": 0,
        "INPUT.MIN_SIZE_TRAIN": (128,),
        "INPUT.MIN_SIZE_TEST": 128,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.REFERENCE_WORLD_SIZE": 0,
        "BN.LEAKAGE.RESAMPLES": 20,
        "OUTPUT_DIR": folder / "output",
        "MODEL.WEIGHTS": folder / "weights.pth",
    }
    if cfg.MODEL.LOAD_PROPOSALS:
        files = (str(folder / "proposals.pkl"),)
        values |= {"DATASETS.PROPOSAL_FILES_TRAIN": files, "DATASETS.PROPOSAL_FILES_TEST": files}
    if cfg.MODEL.ROI_BOX_HEAD.NAME == "FastRCNNConvFCHead":
        values["MODEL.ROI_BOX_HEAD.NUM_CONV"] = cfg.MODEL.ROI_BOX_HEAD.NUM_CONV or 1
    used = {
        "RESNETS": True,
        "FPN": "fpn" in cfg.MODEL.BACKBONE.NAME,
        "RETINANET": cfg.MODEL.META_ARCHITECTURE == "RetinaNet",
        "ROI_BOX_HEAD": cfg.MODEL.ROI_BOX_HEAD.NAME == "FastRCNNConvFCHead",
        "ROI_MASK_HEAD": cfg.MODEL.MASK_ON and cfg.MODEL.ROI_MASK_HEAD.NUM_CONV > 0,
    }
    for key, is_used in used.items():
        if is_used and cfg.MODEL[key].NORM in ("", "FrozenBN"):
            values[f"MODEL.{key}.NORM"] = "BN"
    return [str(part) for pair in values.items() for part in pair]


def diagnose_config(name: str, folder: Path) -> Row:
    """Diagnose a config of the zoo on random weights."""
    opts = overrides(name, folder)
    cfg = load_config(argparse.Namespace(config_file=str(ZOO / name), opts=opts))
    architecture = cfg.MODEL.META_ARCHITECTURE
    if architecture in ("GeneralizedRCNN", "PanopticFPN"):
        architecture += f", {cfg.MODEL.ROI_HEADS.NAME}"
    if any(cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE) and not has_native():
        return Row(name, architecture, "none", NATIVE)
    torch.manual_seed(0)
    torch.save({"model": Trainer.build_model(cfg).state_dict()}, folder / "weights.pth")
    flags = ("--config-file", str(ZOO / name), "--num-gpus", "2", "--images", "4", "--overwrite")
    args = cli.parse(["diagnose", *flags, "--output-dir", str(folder / "diagnosis"), *opts])
    try:
        preflight_diagnosis(args)
        diagnose(args)
    except ConfigError as error:
        return Row(name, architecture, "none", one_line(error))
    found = json.loads((folder / "diagnosis" / "diagnosis.json").read_text())
    measured = sum(layer["ema_to_precise"] is not None for layer in found["layers"])
    left_out = [text for text in found["left_out"] if "leakage probe" in text.lower()]
    if not found["layers"]:
        probe = found["verdict"]
    elif found["probe"] is None:
        probe = " ".join(left_out).removeprefix("The leakage probe: ")
    else:
        on, metrics = found["probe"]["on"], found["probe"]["leakage"]
        parts = [metric for metric in metrics if on == "detections" or "loss" in metric]
        probe = "; ".join([f"on {on}: {', '.join(parts)}", *left_out])
    return Row(name, architecture, f"{measured} of {len(found['layers'])}", probe)


def has_native() -> bool:
    """Whether Detectron2's compiled part is there."""
    try:
        from detectron2 import _C
    except ImportError:
        return False
    return hasattr(_C, "deform_conv_forward")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="*", help="by default all")
    parser.add_argument("--output", help="a Markdown file")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        make_data(Path(temporary))
        for name in args.configs or configs():
            rows.append(diagnose_config(name, Path(temporary)))
            logging.getLogger().handlers.clear()
            print(rows[-1].markdown(), flush=True)
    if args.output:
        titles = ("config", "model", "BN layers", "probe")
        lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
        text = HEAD + "\n".join([*lines, *(row.markdown() for row in rows)]) + "\n"
        Path(args.output).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
