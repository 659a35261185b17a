"""The leak of a detector measured while it trains."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from ..config import ConfigError
from .from_config import measure_own_detections
from .on_detections import DetectionReport
from .probe import check_probe, images_per_worker, in_random_order, measure_leakage
from .report import LeakageReport
from .rois import labelled_images

logger = logging.getLogger(__name__)

KINDS = ("leakage", "inconsistency")
"""What is measured; the event storage has ``<kind>/<metric>``."""

# The intervals are not shown.
_RESAMPLES = 1


class MeasureLeakage(HookBase):
    """Measures leakage and inconsistency on a few images, on worker 0, as training goes on.

    The event storage (``metrics.json``, TensorBoard) gets ``leakage/accuracy``,
    ``inconsistency/box_ap`` and so on, in points and nats: by the probe on fixed RoIs where the
    second stage is known, else on detections. They are of the weights after the step, and of the
    running statistics of worker 0. Training is the same with and without the hook, bit for bit. The
    other workers wait at their next collective. The log says what it costs.

    Register it on every worker, before the hooks that write.

    Args:
        measure: takes nothing, and gives a report; leaves model and generators as they were.
        period: iterations between measurements, at least 1.
    """

    def __init__(self, measure: Callable[[], LeakageReport | DetectionReport], period: int) -> None:
        self._measure = measure
        self._period = period
        self._start = self._spent = 0.0

    def before_train(self) -> None:
        self._start, self._spent = time.perf_counter(), 0.0

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self._period or not comm.is_main_process():
            return
        start = time.perf_counter()
        try:
            # What torch.jit makes of a function depends on the calls before.
            with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
                report = self._measure()
        except ConfigError as error:  # of weights that have diverged, for example
            logger.warning("No leakage at iteration %d: %s", self.trainer.iter, error)
            return
        now = time.perf_counter()
        self._spent += now - start
        for kind in KINDS:
            for metric, estimate in getattr(report, kind).items():
                if estimate.is_known:
                    self.trainer.storage.put_scalar(
                        f"{kind}/{metric}", estimate.value, smoothing_hint=False
                    )
        first = next(iter(report.leakage))
        metric = report.metrics[first]
        logger.info(
            "Leakage %.1f, inconsistency %.1f %s of %s, on %d images: %.1f s; all measurements "
            "%.1f %% of the training so far.",
            *(getattr(report, kind)[first].value for kind in KINDS),
            *(metric.of_difference, metric.name, report.images, now - start),
            100 * self._spent / (now - self._start),
        )


def live_measurement(
    cfg: CfgNode, model: nn.Module
) -> Callable[[], LeakageReport | DetectionReport]:
    """What :class:`MeasureLeakage` measures: always the same BN.LEAKAGE.LIVE_IMAGES images.

    Args:
        cfg: of the training; it is not changed.
        model: that is trained, without DDP.

    Raises:
        ConfigError: the first of DATASETS.TEST has no labels or too few images; a wrong key.
    """
    cfg = cfg.clone()
    cfg.defrost()
    name = cfg.DATASETS.TEST[0]
    per_worker = images_per_worker(cfg, comm.get_world_size())
    cfg.BN.LEAKAGE.IMAGES_PER_WORKER, cfg.BN.LEAKAGE.RESAMPLES = per_worker, _RESAMPLES
    cfg.BN.LEAKAGE.NUM_IMAGES = max(cfg.BN.LEAKAGE.LIVE_IMAGES, 2 * per_worker)
    cfg.DATALOADER.NUM_WORKERS = 0  # the loader lives beside that of the training
    records = in_random_order(cfg, labelled_images(cfg, name), per_worker)
    # Read once: a dataset of its own, in place of one that an earlier training made.
    few = f"{name}, {len(records)} images"
    if few in DatasetCatalog:
        DatasetCatalog.remove(few)
        MetadataCatalog.remove(few)
    DatasetCatalog.register(few, lambda: records)
    metadata = MetadataCatalog.get(name).as_dict()
    MetadataCatalog.get(few).set(**{k: v for k, v in metadata.items() if k != "name"})
    cfg.DATASETS.TEST = (few,)
    cfg.DATASETS.PROPOSAL_FILES_TEST = cfg.DATASETS.PROPOSAL_FILES_TEST[:1]
    cfg.freeze()
    try:
        check_probe(cfg, model)
    except ConfigError as error:
        logger.info("BN.LEAKAGE.PERIOD: measured on detections. %s", error)
        return lambda: measure_own_detections(cfg, model)
    return lambda: measure_leakage(cfg, model)
