"""Short trainings on a few images of LeakyShapes, and what is left of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bn_detection.data import make_leaky_shapes
from bn_detection.engine import Trainer, argument_parser, load_config
from bn_detection.engine.hooks import model_itself
from bn_detection.engine.setup import register_datasets

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart"
RETINANET = (
    *("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.MASK_ON", False),
    *("MODEL.RETINANET.NORM", "BN", "MODEL.RETINANET.IN_FEATURES", "['p2']"),
    *("MODEL.RETINANET.NUM_CLASSES", 4, "MODEL.RETINANET.NUM_CONVS", 1),
)


def make_images(folder: Path) -> None:
    """``train`` and ``val``, a few images each."""
    for split, num_images in (("train", 8), ("val", 2)):
        make_leaky_shapes(folder / split, num_images, seed=7, split=split)


def build_trainer(
    folder: Path, output: Path, *more: object, config: str = "bn", resume: bool = False
) -> Trainer:
    """A trainer of a quickstart config but for its sizes, generators seeded, weights loaded.

    Args:
        folder: of :func:`make_images`.
        output: OUTPUT_DIR.
        more: keys and values.
        config: of the heads.
        resume: whether to go on from the last checkpoint.
    """
    datasets = [
        [f"{folder.name}_{s}", f"{folder}/{s}/annotations.json", f"{folder}/{s}/images"]
        for s in ("train", "val")
    ]
    options: dict[str, object] = {
        "DATASETS.COCO_JSON": datasets,
        "DATASETS.TRAIN": (datasets[0][0],),
        "DATASETS.TEST": (datasets[1][0],),
        "OUTPUT_DIR": output,
        "SOLVER.WARMUP_ITERS": 1,
        "SOLVER.STEPS": (),
        # A fraction of the time, and the same layers.
        "MODEL.ROI_BOX_HEAD.CONV_DIM": 32,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    }
    values = [str(part) for pair in options.items() for part in pair] + [str(m) for m in more]
    path = QUICKSTART / f"mask_rcnn_{config}.yaml"
    cfg = load_config(argument_parser().parse_args(["--config-file", str(path), *values]))
    register_datasets(cfg)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  Detectron2 draws from it
    torch.manual_seed(0)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    return trainer


def train(
    trainer: Trainer, before_step: Callable[[Trainer], None] = lambda _: None
) -> dict[str, Any]:
    """Train, and tell everything that the training leaves, by name.

    Args:
        trainer: of :func:`build_trainer`.
        before_step: called before the hooks of each iteration.
    """
    images: list[str] = []
    run_step = trainer._trainer.run_step
    hooks = trainer.before_step

    def recorded() -> None:
        handle = trainer.model.register_forward_pre_hook(
            lambda _, args: images.extend(item["file_name"] for item in args[0])
        )
        run_step()
        handle.remove()

    def stepped() -> None:
        before_step(trainer)
        hooks()

    trainer._trainer.run_step, trainer.before_step = recorded, stepped
    trainer.train()
    model = model_itself(trainer)
    left: dict[str, Any] = {name: value.clone() for name, value in model.state_dict().items()}
    for index, state in trainer._trainer.optimizer.state_dict()["state"].items():
        left[f"momentum {index}"] = state["momentum_buffer"].clone()
    left["images"] = images
    left["torch"] = torch.get_rng_state()
    left["python"] = random.getstate()
    left["numpy"] = np.random.get_state()[1].tolist()  # noqa: NPY002
    scaler = getattr(trainer._trainer, "grad_scaler", None)
    left["scaler"] = scaler and scaler.state_dict()
    left["loss normalizer"] = getattr(model, "loss_normalizer", None)
    return left


def different(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names of what is not the same, bit for bit."""
    assert one.keys() == other.keys()
    return [
        name
        for name, value in one.items()
        if not (
            torch.equal(value, other[name])
            if isinstance(value, torch.Tensor)
            else value == other[name]
        )
    ]
