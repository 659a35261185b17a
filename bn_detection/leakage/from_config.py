"""The probe on detections of a Detectron2 model, on the dataset of its config."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MetadataCatalog, build_detection_test_loader
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from torch import nn

from ..config import ConfigError
from ..data import ReadableLoader, SkipUnreadable, load_test_dicts
from ..norm import matches, tracks_statistics
from .on_detections import DetectionReport, Detections, measure_detections
from .probe import check_probe_config, images_per_worker, in_random_order, windows
from .rois import coco_objects


def measure_own_detections(
    cfg: CfgNode,
    model: nn.Module,
    *,
    modules: Sequence[str] = (),
    num_workers: int = 1,
    by_class: bool = False,
) -> DetectionReport:
    """The AP of a detector's own detections in ``DATASETS.TEST[0]``, by inference partition.

    Which images share a forward is random, and no matter of their order in the dataset. The model,
    and the random number generators, are afterwards as they were.

    Args:
        cfg: with the keys of :func:`bn_detection.add_bn_detection_config`; ``BN.LEAKAGE`` says how
            many images.
        model: any of Detectron2's that gives instances, of ``cfg``, its weights loaded.
        modules: globs over the names of the BN layers to change; by default ``BN.MODULES``.
        num_workers: of the training, as in :func:`bn_detection.leakage.measure_leakage`.
        by_class: whether to report each class, too.

    Raises:
        ConfigError: no BN layer is in ``modules``, though the model has some; the model gives no
            instances; a dataset without labels or with too few images; a wrong key.
    """
    check_probe_config(cfg)
    per_worker = images_per_worker(cfg, num_workers)
    name = cfg.DATASETS.TEST[0]
    modules = modules or cfg.BN.MODULES
    layers = [layer for layer, module in model.named_modules() if tracks_statistics(module)]
    if layers and not any(matches(layer, modules) for layer in layers):
        raise ConfigError(
            f"BN.MODULES {list(modules)}: none of the {len(layers)} BN layers of the model, such "
            f"as {layers[0]}, is in them, so there is no batch to change."
        )
    batches, truth = own_images(cfg, per_worker)
    return measure_detections(
        model,
        batches,
        partial(detect, model),
        truth,
        ("image" if per_worker == 1 else "worker", "shuffle", "population"),
        modules=modules,
        images_per_worker=per_worker,
        resamples=cfg.BN.LEAKAGE.RESAMPLES,
        dataset=name,
        by_class=by_class,
    )


def own_images(
    cfg: CfgNode, per_worker: int
) -> tuple[Iterator[list[dict[str, Any]]], dict[str, Any]]:
    """Windows of the images of ``DATASETS.TEST[0]``, as inference reads them, and their objects.

    Args:
        cfg: as in :func:`measure_own_detections`.
        per_worker: images of a worker; windows have whole workers.

    Returns:
        Inputs of a model, and COCO's annotations.

    Raises:
        ConfigError: a dataset without labels or with too few images.
    """
    name = cfg.DATASETS.TEST[0]
    records = _labelled(cfg, name, per_worker)
    mapper = SkipUnreadable(DatasetMapper(cfg, False), cfg.OUTPUT_DIR, dataset=name)
    loader = build_detection_test_loader(
        records, mapper=mapper, sampler=range(len(records)), num_workers=cfg.DATALOADER.NUM_WORKERS
    )
    images = chain.from_iterable(ReadableLoader(loader, name))
    together = windows(images, len(records), per_worker, cfg.BN.LEAKAGE.SHUFFLED_IMAGES)
    return together, _truth(name, records)


def detect(model: nn.Module, batch: list[dict[str, Any]]) -> Detections:
    """What a model of Detectron2's, in eval mode, finds in images.

    Raises:
        ConfigError: the model gives no instances.
    """
    found: Detections = []
    for image, output in zip(batch, model(batch), strict=True):
        if "instances" not in output:
            raise ConfigError(
                f"The probe on detections: a {type(model).__name__} gives no instances, but "
                f"{', '.join(output)}."
            )
        found += instances_to_coco_json(output["instances"].to("cpu"), image["image_id"])
    return found


def _labelled(cfg: CfgNode, name: str, per_worker: int) -> list[dict[str, Any]]:
    """Dataset dicts in random order, numbered."""
    records = load_test_dicts(cfg, name)
    if not any(
        not item.get("iscrowd", 0) for record in records for item in record.get("annotations", ())
    ):
        raise ConfigError(
            f'DATASETS.TEST "{name}": none of its {len(records)} images has a labelled object, and '
            "AP needs labels."
        )
    records = in_random_order(cfg, records, per_worker)
    return [{**record, "image_id": number} for number, record in enumerate(records)]


def _truth(name: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    """COCO's annotations of dataset dicts."""
    every = [item for record in records for item in record.get("annotations", ())]
    masks = all("segmentation" in item for item in every)
    objects = [
        item
        for record in records
        if "annotations" in record
        for item in coco_objects(record["image_id"], record, masks)
    ]
    classes = MetadataCatalog.get(name).thing_classes
    return {
        "images": [
            {key: record[key] for key in ("height", "width") if key in record}
            | {"id": record["image_id"]}
            for record in records
        ],
        "annotations": [{**item, "id": number} for number, item in enumerate(objects, 1)],
        "categories": [{"id": number, "name": name} for number, name in enumerate(classes)],
    }
