"""Data loaders that check what they load and pass over images that cannot be read."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    DatasetFromList,
    DatasetMapper,
    build,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.build import _train_loader_from_config
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader

from ..config import ConfigError, one_line
from ..generators import derive_seed, seeded
from ..pickles import only_data
from .coco_json import check_classes, check_num_classes, check_train_records
from .stream import TrainLoader, outlive_signals
from .unreadable import Mapper, ReadableLoader, SkipUnreadable


def build_train_loader(
    cfg: CfgNode, mapper: Mapper | None = None, *, seed: int | None = None
) -> TrainLoader:
    """A loader of DATASETS.TRAIN with the samplers, batches and settings of Detectron2's.

    Args:
        cfg: the config.
        mapper: instead of Detectron2's ``DatasetMapper(cfg, True)``.
        seed: of a uniform order of the images, the same on all workers; by default the sampler is
            that of DATALOADER.SAMPLER_TRAIN, with the seed SEED, or a random one where that is
            negative.

    Returns:
        An endless iterable over batches of this worker, lists of dicts, that can go on where
        another stopped.

    Raises:
        ConfigError: a dataset's number of classes is not the model's, or a batch cannot be divided
            among the workers. Iterating raises ConfigError if no image can be read.
    """
    workers = comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH < 1 or cfg.SOLVER.IMS_PER_BATCH % workers:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} cannot be divided among {workers} "
            "workers."
        )
    dicts = load_training_dicts(cfg, labels=True)
    for name in cfg.DATASETS.TRAIN:
        check_num_classes(cfg, name)
    skipping = SkipUnreadable(
        mapper or DatasetMapper(cfg, True),
        cfg.OUTPUT_DIR,
        dataset=", ".join(cfg.DATASETS.TRAIN),
        num_images=len({record["file_name"] for record in dicts}),
    )

    def uniform(seed: int) -> Iterable[int]:
        return TrainingSampler(len(dicts), seed=seed)

    def by_name(seed: int) -> Iterable[int]:
        # Detectron2's samplers draw their seeds from numpy's generator.
        with seeded(derive_seed(seed, "sampler")):
            return _train_loader_from_config(cfg, skipping, dataset=dicts)["sampler"]

    make_sampler = by_name if seed is None else uniform
    if seed is None:
        seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    return TrainLoader(
        DatasetFromList(dicts, copy=False),
        skipping,
        make_sampler,
        seed=seed,
        batch_size=cfg.SOLVER.IMS_PER_BATCH // workers,
        group=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )


def load_training_dicts(cfg: CfgNode, *, labels: bool) -> list[dict[str, Any]]:
    """The dataset dicts of DATASETS.TRAIN.

    Args:
        cfg: the config.
        labels: whether images without the annotations that training needs are left out.

    Raises:
        ConfigError: a record is not what the model needs; with labels also: there is no object, or
            classes are not those of DATASETS.TEST.
    """
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD
    needs_keypoints = labels and cfg.MODEL.KEYPOINT_ON
    names = cfg.DATASETS.TRAIN
    try:
        with _proposals(cfg, "PROPOSAL_FILES_TRAIN") as files:
            records = get_detection_dataset_dicts(
                names,
                filter_empty=labels and cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
                min_keypoints=keypoints.MIN_KEYPOINTS_PER_IMAGE if needs_keypoints else 0,
                proposal_files=files,
            )
    except ConfigError:
        raise
    except Exception as error:  # what Detectron2 does with records that are wrong
        if not names:
            raise ConfigError("DATASETS.TRAIN is empty; name a dataset to train on.") from error
        if labels:
            check_classes(cfg)
        every = [record for name in names for record in DatasetCatalog.get(name)]
        check_train_records(cfg, names, every, labels=labels)
        raise ConfigError(f"DATASETS.TRAIN {', '.join(names)}: {one_line(error)}") from error
    check_train_records(cfg, names, records, labels=labels)
    if labels:
        check_classes(cfg)
    return records


@contextmanager
def _proposals(cfg: CfgNode, key: str) -> Iterator[Sequence[str] | None]:
    """The files of proposals, which Detectron2 then reads as data; None if it loads none."""
    if not cfg.MODEL.LOAD_PROPOSALS:
        yield None
        return
    files = cfg.DATASETS[key]
    try:
        with only_data(build):
            yield files
    except pickle.UnpicklingError as error:
        raise ConfigError(f"DATASETS.{key} {', '.join(files)}: {one_line(error)}") from error


def load_test_dicts(cfg: CfgNode, dataset_name: str) -> list[dict[str, Any]]:
    """The dataset dicts of a dataset to evaluate on, with proposals if the model takes them.

    Args:
        cfg: the config.
        dataset_name: of a registered dataset.

    Raises:
        ConfigError: the dataset's number of classes is not the model's.
    """
    with _proposals(cfg, "PROPOSAL_FILES_TEST") as files:
        if files is not None:
            files = [files[list(cfg.DATASETS.TEST).index(dataset_name)]]
        dicts = get_detection_dataset_dicts(
            dataset_name, filter_empty=False, proposal_files=files, check_consistency=False
        )
    check_num_classes(cfg, dataset_name)
    return dicts


def build_test_loader(
    cfg: CfgNode, dataset_name: str, mapper: Mapper | None = None
) -> Iterable[list[dict[str, Any]]]:
    """Detectron2's test loader for one dataset, without the images that cannot be read.

    A batch has BN.INFERENCE_BATCH_SIZE images of this worker, the last one what is left; images
    of unequal size are padded to the largest of their batch.

    Args:
        cfg: the config.
        dataset_name: of a registered dataset.
        mapper: instead of Detectron2's ``DatasetMapper(cfg, False)``.

    Returns:
        An iterable with a length, over the batches of this worker: lists of dicts.

    Raises:
        ConfigError: the dataset's number of classes is not the model's. Iterating raises
            ConfigError if no image can be read.
    """
    skipping = SkipUnreadable(
        mapper or DatasetMapper(cfg, False), cfg.OUTPUT_DIR, dataset=dataset_name
    )
    with _proposals(cfg, "PROPOSAL_FILES_TEST"):
        stock = build_detection_test_loader(cfg, dataset_name, mapper=skipping)
    check_num_classes(cfg, dataset_name)
    # Detectron2 v0.6 takes no batch size.
    loader = DataLoader(
        stock.dataset,
        batch_size=cfg.BN.INFERENCE_BATCH_SIZE,
        sampler=stock.sampler,
        num_workers=stock.num_workers,
        collate_fn=stock.collate_fn,
        worker_init_fn=outlive_signals,
    )
    return ReadableLoader(loader, dataset_name)
