"""The cures by other statistics, tried on the spot: what each gives, without training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from torch import nn

from ..config import ConfigError
from ..leakage.findings import (
    Examined,
    apart_in_training,
    configured_rules,
    frozen_far,
    stale,
    together_in_training,
)
from ..leakage.from_config import detect, own_images
from ..leakage.layers import LayerReport
from ..leakage.on_detections import Detections
from ..leakage.probe import check_probe_config
from ..leakage.trial import Trial, having, measure_trial
from ..population import (
    PopulationStatistics,
    collect_statistics,
    mix_statistics,
    mixing_weight,
    quiet_collection,
    untouched,
)
from .checkpoint import StrictCheckpointer
from .trainer import Trainer

logger = logging.getLogger(__name__)

_Cured = tuple[nn.Module, dict[str, PopulationStatistics]]


@dataclass(frozen=True)
class Source:
    """The images of DATASETS.TRAIN that statistics are of.

    Attributes:
        batches: makes the batches, anew at each call.
        number: of batches.
        images: in them.
        rois: as in :func:`bn_detection.population.collect_statistics`.
    """

    batches: Callable[[], Iterable[Any]]
    number: int
    images: int
    rois: str

    def collect(self, model: nn.Module, **options: Any) -> dict[str, PopulationStatistics]:
        """The statistics of a model in training mode."""
        with quiet_collection(), EventStorage(0):
            batches = self.batches()
            return collect_statistics(
                model, batches, self.number, rois=self.rois, allow_fewer=True, **options
            )


def run_trials(
    cfg: CfgNode, model: nn.Module, examined: Examined, source: Source, left_out: list[str]
) -> dict[str, Trial]:
    """Try what would cure statistics that are far from those of the data.

    Statistics are of DATASETS.TRAIN, the AP of DATASETS.TEST; nothing in the model changes.

    Args:
        cfg: of the model, with MODEL.WEIGHTS; BN.LEAKAGE says how many images to evaluate.
        model: in training mode.
        examined: says which layers are far.
        source: the images for statistics.
        left_out: gets the reason where a trial is not possible.

    Returns:
        By the id of the finding.
    """
    rules = configured_rules(examined.cfg)
    cures: Mapping[str, tuple[list[LayerReport], Callable[..., _Cured]]] = {
        "BN103": (stale(examined, rules["BN103"]), _recalibrated),
        "BN202": (apart_in_training(examined, rules["BN202"]), partial(_levels, "separate")),
        "BN205": (together_in_training(examined), partial(_levels, "shared")),
        "BN302": (frozen_far(examined, rules["BN302"]), _mixed),
    }
    found = {}
    for name, (layers, cure) in cures.items():
        layers = [x for x in layers if examined.uses_population(x)]
        if not layers or not cfg.MODEL.WEIGHTS:
            continue
        logger.info("Trial of the cure of %s", name)
        try:
            check_probe_config(cfg)
            cured, statistics = cure(cfg, model, [x.name for x in layers], source)
            found[name] = _compare(cfg, model, cured, statistics)
        except (ConfigError, ValueError) as error:
            left_out.append(f"What the cure of {name} gives: {error}")
    return found


def _recalibrated(cfg: CfgNode, model: nn.Module, far: list[str], source: Source) -> _Cured:
    """As ``bn-detection recalibrate``, with the layers of the finding in BN.MODULES."""
    return model, source.collect(model, modules=[*cfg.BN.MODULES, *far])


def _mixed(cfg: CfgNode, model: nn.Module, far: list[str], source: Source) -> _Cured:
    """As ``bn-detection recalibrate --mix auto``."""
    weight = mixing_weight(source.images)
    statistics = source.collect(model, modules=far, mixing=weight)
    return model, mix_statistics(model, statistics, weight)


def _levels(
    population: str, cfg: CfgNode, model: nn.Module, far: list[str], source: Source
) -> _Cured:
    """As BN.LEVELS.POPULATION, recalibrated."""
    if cfg.MODEL.META_ARCHITECTURE != "BNRetinaNet":
        raise ConfigError(f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} has no levels.")
    cfg = cfg.clone()
    cfg.BN.LEVELS.POPULATION = population
    cured = Trainer.build_model(cfg).train()
    StrictCheckpointer(cured).resume_or_load(cfg.MODEL.WEIGHTS, resume=False)
    return cured, source.collect(cured, modules=["head.*"])


def _compare(
    cfg: CfgNode, model: nn.Module, cured: nn.Module, statistics: Mapping[str, PopulationStatistics]
) -> Trial:
    batches, truth = own_images(cfg, per_worker=1)

    def after(batch: list[Any]) -> Detections:
        with having(cured, statistics):
            return detect(cured, batch)

    with untouched(model):
        model.eval()
        return measure_trial(
            batches,
            partial(detect, model),
            after,
            truth,
            resamples=cfg.BN.LEAKAGE.RESAMPLES,
            dataset=cfg.DATASETS.TEST[0],
        )
