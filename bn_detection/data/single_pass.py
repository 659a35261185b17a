"""A dataset once through, divided among the workers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader
from detectron2.utils import comm

from ..config import ConfigError
from .coco_json import check_num_classes
from .loaders import load_training_dicts
from .records import NoObjectsError
from .unreadable import ReadableLoader, SkipUnreadable

logger = logging.getLogger(__name__)


class SinglePassLoader:
    """Batches of DATASETS.TRAIN in which no image comes twice, in a random order.

    Of W workers the one of rank r has the images r, r + W, ... of the order, so that the batches of
    all workers together are the same for any W. Images that cannot be read are passed over. The
    last batch may be smaller; with BN.VIRTUAL_WORKERS it is then left out.

    Attributes:
        num_images: that there are to read, of all workers.
        num_batches: of the worker that has the most.
    """

    def __init__(
        self, cfg: CfgNode, *, labels: bool, num_images: int, batch_size: int, seed: int = 0
    ) -> None:
        """
        Args:
            cfg: the config.
            labels: whether to map images as training does, with annotations and augmentation, or
                as inference does.
            num_images: to use at most, of all workers.
            batch_size: images of all workers together, a multiple of their number.
            seed: of the order.

        Raises:
            ConfigError: ``labels``, and a dataset has none, or another number of classes than the
                model. Iterating raises ConfigError if no image can be read.
        """
        dicts = _load(cfg, labels)
        self.num_images = min(num_images, len(dicts))
        self._dataset = ", ".join(cfg.DATASETS.TRAIN)
        if self.num_images < num_images:
            logger.info("%s has %d images: all are used.", self._dataset, len(dicts))
        order = torch.randperm(len(dicts), generator=torch.Generator().manual_seed(seed))
        workers = comm.get_world_size()
        mine = order[: self.num_images][comm.get_rank() :: workers].tolist()
        self._batch_size = batch_size // workers
        # Virtual workers divide a batch evenly.
        self._whole_batches = cfg.BN.VIRTUAL_WORKERS > 0
        self.num_batches = -(-self.num_images // batch_size)
        mapper = SkipUnreadable(DatasetMapper(cfg, labels), cfg.OUTPUT_DIR, dataset=self._dataset)
        self._loader = build_detection_test_loader(
            dicts, mapper=mapper, sampler=mine, num_workers=cfg.DATALOADER.NUM_WORKERS
        )

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        images = chain.from_iterable(ReadableLoader(self._loader, self._dataset))
        while batch := list(islice(images, self._batch_size)):
            if len(batch) == self._batch_size or not self._whole_batches:
                yield batch


def _load(cfg: CfgNode, labels: bool) -> list[dict[str, Any]]:
    names = ", ".join(cfg.DATASETS.TRAIN)
    problem = (
        'and BN.POPULATION.ROIS is "training": the RoIs that training samples need labels. Set '
        "BN.POPULATION.ROIS inference, which takes the proposals of the model."
    )
    try:
        dicts = load_training_dicts(cfg, labels=labels)
    except NoObjectsError as error:
        raise ConfigError(f"{error} That is needed, {problem}") from error
    if labels:
        if not all("annotations" in record for record in dicts):
            raise ConfigError(f"{names}: images have no annotations, {problem}")
        for name in cfg.DATASETS.TRAIN:
            check_num_classes(cfg, name)
    return dicts
