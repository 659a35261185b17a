"""The RoIs of the training sampler on labelled images, with what the heads are given of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader, get_detection_dataset_dicts
from detectron2.data.detection_utils import build_augmentation
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from ..config import ConfigError
from ..data import ReadableLoader, SkipUnreadable, check_num_classes
from ..data.records import check_first_images, check_records, needs_of
from .second_stage import KEYPOINT, MASK, Rois, SecondStage, is_foreground


@dataclass(frozen=True)
class ImageRois:
    """The RoIs that training would sample from an image.

    Attributes:
        record: the dataset's dict of the image.
        proposals: with ``proposal_boxes``, ``gt_classes`` and, of an image with objects, the
            other ``gt_`` fields of the object that each is matched to; R of them.
        objects: ground truth boxes, in the coordinates of ``proposals``.
        foreground: bool ``(R,)``.
        parts: what each part of the second stage is given.
    """

    record: dict[str, Any]
    proposals: Instances
    objects: Boxes
    foreground: Tensor
    parts: dict[str, Rois]


def _objects(records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for record in records:
        yield from (x for x in record.get("annotations", ()) if not x.get("iscrowd", 0))


def labelled_images(cfg: CfgNode, dataset_name: str) -> list[dict[str, Any]]:
    """The dataset dicts of the images that have an object.

    Args:
        cfg: the config.
        dataset_name: of a registered dataset.

    Raises:
        ConfigError: there are none, the dataset's classes are not the model's, or a record is not
            what the model needs.
    """
    where = f'DATASETS.TEST: dataset "{dataset_name}"'
    dicts = get_detection_dataset_dicts(dataset_name, filter_empty=False, check_consistency=False)
    check_num_classes(cfg, dataset_name)
    needs = needs_of(cfg)  # a head whose labels are not there is left out
    if not all("segmentation" in item for item in _objects(dicts)):
        needs = replace(needs, masks=None)
    if not all("keypoints" in item for item in _objects(dicts)):
        needs = replace(needs, keypoints=None)
    check_records(dicts, where, needs)
    check_first_images(dicts, where)
    labelled = [
        record
        for record in dicts
        if any(not item.get("iscrowd", 0) for item in record.get("annotations", ()))
    ]
    if not labelled:
        raise ConfigError(
            f'DATASETS.TEST "{dataset_name}": none of its {len(dicts)} images has a labelled '
            "object, and the RoIs that training samples need labels."
        )
    return labelled


def draw(record: dict[str, Any]) -> tuple[int, str]:
    """A random number for an image, from its name alone, and its id, for names that are alike."""
    name = os.path.basename(record["file_name"])
    digest = hashlib.blake2b(name.encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big"), str(record.get("image_id"))


def sample_rois(
    cfg: CfgNode, model: Any, stage: SecondStage, records: list[dict[str, Any]]
) -> Generator[ImageRois]:
    """Sample RoIs image by image, as inference resizes the images and as training samples RoIs.

    Backbone and proposals run once an image, in the model's mode (eval, for the caller to set). An
    image's sample depends on its name and its proposals alone.

    Args:
        cfg: the config.
        model: a ``GeneralizedRCNN``.
        stage: its second stage, which says what labels are needed.
        records: dataset dicts; images that cannot be read are passed over.
    """
    numbered = [{**record, "number": number} for number, record in enumerate(records)]
    name = cfg.DATASETS.TEST[0]
    mapper = DatasetMapper(
        cfg,
        True,
        augmentations=build_augmentation(cfg, False),
        use_instance_mask=MASK in stage.layers,
        use_keypoint=KEYPOINT in stage.layers,
        recompute_boxes=False,  # nothing is cropped
    )
    loader = build_detection_test_loader(
        numbered,
        mapper=SkipUnreadable(mapper, cfg.OUTPUT_DIR, dataset=name),
        sampler=range(len(numbered)),  # all of them, also on one worker of several
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
    with training_proposals(model.proposal_generator):
        for (item,) in ReadableLoader(loader, name):
            record = records[item["number"]]
            torch.manual_seed(draw(record)[0])
            yield _of_image(model, stage, item, record)


@contextmanager
def training_proposals(generator: nn.Module) -> Iterator[None]:
    """Let an RPN in eval mode give as many proposals as in training."""
    before = {key: getattr(generator, key) for key in ("pre_nms_topk", "post_nms_topk")}
    try:
        for key, number in before.items():
            setattr(generator, key, {True: number[True], False: number[True]})
        yield
    finally:
        vars(generator).update(before)


@torch.no_grad()
def _of_image(
    model: Any, stage: SecondStage, item: dict[str, Any], record: dict[str, Any]
) -> ImageRois:
    images = model.preprocess_image([item])
    features = model.backbone(images.tensor)
    proposals, _ = model.proposal_generator(images, features, None)
    target = item["instances"].to(images.tensor.device)
    with EventStorage():  # the sampler logs its counts
        (sampled,) = model.roi_heads.label_and_sample_proposals(proposals, [target])
    parts = stage.pool(images, features, sampled, target)
    foreground = is_foreground(sampled.gt_classes, stage.num_classes)
    return ImageRois(record, sampled, target.gt_boxes, foreground, parts)


def coco_objects(number: int, record: dict[str, Any], masks: bool) -> list[dict[str, Any]]:
    """The ground truth of an image in COCO's format.

    Args:
        number: the image's id.
        record: its dataset dict.
        masks: whether segmentations are wanted.
    """
    objects = []
    for item in record["annotations"]:
        box = BoxMode.convert(list(map(float, item["bbox"])), item["bbox_mode"], BoxMode.XYWH_ABS)
        known = {
            "image_id": number,
            "category_id": item["category_id"],
            "bbox": box,
            "iscrowd": item.get("iscrowd", 0),
        }
        if masks:
            known["segmentation"] = item["segmentation"]
        objects.append(known)
    return objects


def sees_one_object(image: ImageRois, margin: float) -> Tensor:
    """Which foreground RoIs, grown by ``margin`` px on each side, touch one object only.

    Returns:
        Bool ``(R,)``.
    """
    boxes, objects = image.proposals.proposal_boxes.tensor, image.objects.tensor
    low = torch.maximum(boxes[:, None, :2] - margin, objects[:, :2])
    high = torch.minimum(boxes[:, None, 2:] + margin, objects[:, 2:])
    return image.foreground & ((low < high).all(2).sum(1) == 1)


def receptive_margin(model: Any, size: int, names: list[str]) -> int:
    """How far beyond its box the pooled features of an RoI can see, px.

    Measured: the reach of the gradient of one cell of a feature map, in the middle, and the cell
    that interpolation adds.

    Args:
        model: a ``GeneralizedRCNN``, in eval mode.
        size: side of the images, px.
        names: of the feature maps that RoIs are pooled from.
    """
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, size, size, generator=generator).to(model.device)
    image.requires_grad_()
    reach = 0
    with torch.enable_grad():
        features = model.backbone(image)
        for name in names:
            level = features[name]
            cell = level.shape[-1] // 2
            (gradient,) = torch.autograd.grad(
                level[0, :, cell, cell].sum(), image, retain_graph=True
            )
            columns = np.flatnonzero(gradient.abs().amax((0, 1, 2)).cpu().numpy())
            stride = size / level.shape[-1]
            centre = (cell + 0.5) * stride - 0.5
            if len(columns):
                reach = max(reach, np.ceil(np.abs(columns - centre).max() + stride))
    return int(reach)
