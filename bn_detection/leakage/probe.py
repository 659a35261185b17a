"""The leakage probe: a detector's second stage on fixed RoIs, with other normalization batches.

After *Rethinking "Batch" in BatchNorm* (Wu & Johnson 2021), Sec. 5 on leakage between the RoIs of
an image: only the normalization batch changes, so what changes in the outputs came through it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any, TypeVar

import torch
from detectron2.config import CfgNode
from torch import nn

from ..config import ConfigError
from ..population import untouched
from .by_layer import LayerLeakage, LayerScores
from .report import LeakageReport
from .rois import draw, labelled_images, sample_rois
from .scoring import Scores
from .second_stage import KEYPOINT, MASK, SecondStage
from .window import Window, accuracy_of

logger = logging.getLogger(__name__)

_LOG_SECONDS = 10.0
# Own batches are compared with RoIs that come from at least so many workers, if there are two times
# as many: without a second window nothing has an interval.
_LEAST_WORKERS = 8


def measure_leakage(
    cfg: CfgNode,
    model: nn.Module,
    *,
    num_workers: int = 1,
    by_layer: bool = False,
    by_class: bool = False,
) -> LeakageReport:
    """Evaluate a detector's second stage with four kinds of normalization batch.

    The RoIs are those that training would sample from the labelled images of ``DATASETS.TEST[0]``,
    resized as inference does, the same for all modes. Which images share a batch is random, and
    no matter of their order in the dataset. The model, and the random number generators, are
    afterwards as they were.

    Args:
        cfg: with the keys of :func:`bn_detection.add_bn_detection_config`; ``BN.LEAKAGE`` says how
            many images.
        model: a ``GeneralizedRCNN`` with an RPN, of ``cfg``, its weights loaded.
        num_workers: of the training, to tell the images of a worker from SOLVER.IMS_PER_BATCH,
            where neither BN.LEAKAGE.IMAGES_PER_WORKER nor BN.VIRTUAL_WORKERS does.
        by_layer: whether to measure the leakage through each layer, too.
        by_class: whether to report each class, too.

    Raises:
        UnknownSecondStage: the model has none that is known here, or one whose outputs depend on
            more than the pooled features of its RoIs; named by its class.
        ConfigError: a dataset without labels or with too few images; outputs that are not finite; a
            wrong key.
    """
    with _windows_of(cfg, model, num_workers) as (stage, made):
        name: str = cfg.DATASETS.TEST[0]
        scores = Scores(model, stage, images_per_worker(cfg, num_workers))
        layers = LayerScores(stage, list(stage.layers) if by_layer else [])
        scores.look_for_limit(name)
        for window in made:
            scores.add(window)
            layers.add(window)
    resamples = cfg.BN.LEAKAGE.RESAMPLES
    report = scores.report(name, resamples, by_class=by_class)
    return replace(report, by_layer=layers.leakages(resamples))


def measure_layers(
    cfg: CfgNode, model: nn.Module, metrics: Iterable[str], *, num_workers: int = 1
) -> list[LayerLeakage]:
    """Measure what :func:`measure_leakage` measures by layer, and nothing else.

    Args:
        cfg: as there.
        model: as there.
        metrics: accuracies of its report: the layers of the parts that they are of are measured.
        num_workers: as there.

    Raises:
        ConfigError: as there.
    """
    wanted = set(metrics)
    with _windows_of(cfg, model, num_workers) as (stage, made):
        layers = LayerScores(stage, [part for part in stage.layers if accuracy_of(part) in wanted])
        for window in islice(made, layers.most_windows):
            layers.add(window)
    return layers.leakages(cfg.BN.LEAKAGE.RESAMPLES)


@contextmanager
def _windows_of(
    cfg: CfgNode, model: nn.Module, num_workers: int
) -> Iterator[tuple[SecondStage, Iterator[Window]]]:
    """The second stage of a model, and windows of images; it is afterwards as it was."""
    check_probe_config(cfg)
    stage = SecondStage(model)
    per_worker = images_per_worker(cfg, num_workers)
    records = _choose(cfg, per_worker)
    _leave_out_unlabelled(stage, cfg.DATASETS.TEST[0], records)
    rois = sample_rois(cfg, model, stage, records)
    together = windows(rois, len(records), per_worker, cfg.BN.LEAKAGE.SHUFFLED_IMAGES)
    with untouched(model), torch.no_grad(), closing(rois):
        model.eval()
        yield (
            stage,
            (Window(images, stage, per_worker, seed) for seed, images in enumerate(together)),
        )


def check_probe_config(cfg: CfgNode) -> None:
    """Refuse a config that the probe cannot use, whatever the model.

    Raises:
        ConfigError: names the key.
    """
    node = cfg.BN.LEAKAGE
    least = {"NUM_IMAGES": 0, "IMAGES_PER_WORKER": 0, "SHUFFLED_IMAGES": 1, "RESAMPLES": 1}
    for key, minimum in least.items():
        if node[key] < minimum:
            raise ConfigError(f"BN.LEAKAGE.{key} {node[key]}: it must be at least {minimum}.")
    if not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST is empty: the probe takes its labelled images from there.")


def check_probe(cfg: CfgNode, model: nn.Module) -> None:
    """Refuse what the probe cannot measure.

    Raises:
        UnknownSecondStage: names the class.
        ConfigError: names the key.
    """
    check_probe_config(cfg)
    SecondStage(model)


def images_per_worker(cfg: CfgNode, num_workers: int) -> int:
    """Images whose RoIs share a normalization batch in the mode "own_worker".

    BN.LEAKAGE.IMAGES_PER_WORKER, or SOLVER.IMS_PER_BATCH, scaled as Detectron2 does with
    SOLVER.REFERENCE_WORLD_SIZE, over the (virtual) workers.

    Raises:
        ConfigError: the images cannot be divided among the workers.
    """
    if cfg.BN.LEAKAGE.IMAGES_PER_WORKER:
        return int(cfg.BN.LEAKAGE.IMAGES_PER_WORKER)
    workers, images = cfg.BN.VIRTUAL_WORKERS or num_workers, cfg.SOLVER.IMS_PER_BATCH
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE or num_workers
    per_worker, left = map(int, divmod(images * num_workers, reference * workers))
    if left:
        scaled = "" if reference == num_workers else f" (SOLVER.REFERENCE_WORLD_SIZE {reference})"
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH {images}{scaled} cannot be divided among the {workers} workers "
            "of the training; set BN.LEAKAGE.IMAGES_PER_WORKER."
        )
    return per_worker


def _choose(cfg: CfgNode, per_worker: int) -> list[dict[str, Any]]:
    """Labelled images in random order, as many as fill some workers.

    Files have the images of a scene, a camera or a day side by side, which look alike: RoIs of
    neighbours would say nearly as much as those of the own image.
    """
    return in_random_order(cfg, labelled_images(cfg, cfg.DATASETS.TEST[0]), per_worker)


def in_random_order(
    cfg: CfgNode, records: list[dict[str, Any]], per_worker: int
) -> list[dict[str, Any]]:
    """As many of the images as BN.LEAKAGE.NUM_IMAGES says, by their names, in whole workers.

    Args:
        cfg: the config.
        records: dataset dicts, of labelled images of ``DATASETS.TEST[0]``.
        per_worker: images of a worker.

    Raises:
        ConfigError: they do not fill two workers.
    """
    name, wanted = cfg.DATASETS.TEST[0], cfg.BN.LEAKAGE.NUM_IMAGES
    number = min(wanted or len(records), len(records)) // per_worker * per_worker
    if number < 2 * per_worker:
        raise ConfigError(
            f'DATASETS.TEST "{name}" with BN.LEAKAGE.NUM_IMAGES {wanted}: {len(records)} images '
            f"have labels, and with {per_worker} images a worker (BN.LEAKAGE.IMAGES_PER_WORKER) "
            f"the probe needs {2 * per_worker} or more."
        )
    return sorted(records, key=draw)[:number]


T = TypeVar("T")


def windows(
    images: Iterator[T], expected: int, per_worker: int, shuffled_images: int
) -> Iterator[list[T]]:
    """Images to shuffle together: workers divided evenly into parts of about the wanted size.

    Args:
        images: what there is of each.
        expected: their number, if all can be read.
        per_worker: images of a worker; windows have whole workers.
        shuffled_images: that are wanted in a window; those of 8 workers at least, where there are
            two times as many.
    """
    workers = expected // per_worker
    least = 1 if workers < 4 else 2
    number = max(workers // max(shuffled_images // per_worker, _LEAST_WORKERS), least)
    last_logged = start = time.monotonic()
    done = 0
    for k in range(number):
        size = (workers * (k + 1) // number - workers * k // number) * per_worker
        window = list(islice(images, size))
        # An image that could not be read leaves its worker incomplete.
        window = window[: len(window) // per_worker * per_worker]
        if window:
            yield window
        done += size
        now = time.monotonic()
        if now - last_logged > _LOG_SECONDS:
            last_logged = now
            left = (now - start) / done * (expected - done)
            logger.info("%d of %d images, about %.0f s left", done, expected, left)


def _leave_out_unlabelled(stage: SecondStage, dataset: str, records: list[dict[str, Any]]) -> None:
    """Leave out what is not measured where objects lack its labels."""
    objects = [item for record in records for item in record["annotations"]]
    labels = (MASK, "segmentation", "mask"), (KEYPOINT, "keypoints", "keypoints")
    for part, key, label in labels:
        without = sum(key not in item for item in objects)
        if part in stage.layers and without:
            stage.leave_out(
                part, f'{without} of {len(objects)} objects of "{dataset}" have no {label}.'
            )
