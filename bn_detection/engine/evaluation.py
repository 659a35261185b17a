"""Evaluators: COCO's metrics computed in C++, and Detectron2's evaluators for other datasets."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from itertools import chain
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
    coco_evaluation,
)
from detectron2.evaluation import COCOEvaluator as StockCOCOEvaluator
from detectron2.utils import comm
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..config import ConfigError
from ..data import read_unreadable
from ..data.records import original_path
from ..substitutes import substituted

try:
    from faster_coco_eval import COCOeval_faster
except ImportError:
    COCOeval_faster = None

logger = logging.getLogger(__name__)


def _coco_eval(ground_truth: COCO, detections: COCO, iou_type: str) -> Any:
    """faster-coco-eval's or pycocotools' evaluation: one interface, the same numbers."""
    # For keypoints the former needs ground truth that its own API has loaded, and ids are numbers.
    numbers = not any(isinstance(image_id, str) for image_id in ground_truth.imgs)
    fast = COCOeval_faster is not None and iou_type != "keypoints" and numbers
    logger.info("COCO %s metrics by %s.", iou_type, "faster-coco-eval" if fast else "pycocotools")
    return (COCOeval_faster if fast else COCOeval)(ground_truth, detections, iou_type)


class COCOEvaluator(StockCOCOEvaluator):
    """Detectron2's COCO evaluator, computed by faster-coco-eval, on the images that can be read.

    Without any prediction it gives what COCO defines for an empty set of detections, and a warning:
    0 for every metric, except nan where there is no ground truth to find (such as ``APl`` without
    large objects). Detectron2's gives nan, or no results at all.
    """

    def __init__(
        self,
        dataset_name: str,
        *,
        output_dir: str | None = None,
        tasks_without_predictions: Sequence[str] = ("bbox",),
        unreadable_dir: str | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            dataset_name: of a registered dataset.
            output_dir: for the predictions; None writes none.
            tasks_without_predictions: of "bbox", "segm" and "keypoints": those to report if there
                is no prediction to tell from.
            unreadable_dir: where :func:`bn_detection.data.read_unreadable` finds the names of
                images that could not be read. Their ground truth does not count as missed.
            kwargs: Detectron2's further arguments.
        """
        super().__init__(dataset_name, output_dir=output_dir, use_fast_impl=False, **kwargs)
        self._use_fast_impl = True  # Detectron2's name for COCOeval_opt, replaced below
        self._tasks_without_predictions = list(tasks_without_predictions)
        self._unreadable_dir = unreadable_dir
        self._img_ids: Collection[int] | None = None

    def evaluate(self, img_ids: Collection[int] | None = None) -> dict[str, Any]:
        """
        Args:
            img_ids: the images to evaluate on; by default all that could be read.

        Returns:
            Metrics by task, in percent; empty on workers other than 0.

        Raises:
            ConfigError: no image of the dataset could be read.
        """
        # Every worker knows what it could not read, and only its own host's files for certain.
        mine = read_unreadable(self._unreadable_dir) if self._unreadable_dir else set()
        predicted = {prediction["image_id"] for prediction in self._predictions}
        gather = comm.gather if self._distributed else lambda value: [value]
        unreadable, predicted = (set(chain(*part)) for part in map(gather, (mine, predicted)))
        is_main = not self._distributed or comm.is_main_process()
        if is_main and img_ids is None:
            img_ids = self._readable(unreadable, predicted)
        self._img_ids = img_ids
        results = super().evaluate(img_ids)
        if is_main and not results and not predicted:
            self._results = OrderedDict()
            if self._output_dir:
                os.makedirs(self._output_dir, exist_ok=True)
            self._eval_predictions([], img_ids=img_ids)
            results = self._results
        return results

    def _readable(self, unreadable: set[str], predicted: set[int]) -> list[int] | None:
        """The ids of the images that could be read, or None for all of them."""
        root = self._metadata.get("image_root", "")
        all_ids = self._coco_api.getImgIds()
        readable = [
            image["id"]
            for image in self._coco_api.loadImgs(all_ids)
            # An image noted in an earlier run may have been repaired since.
            if image["id"] in predicted
            or original_path(os.path.join(root, image["file_name"])) not in unreadable
        ]
        if len(readable) == len(all_ids):
            return None
        name = self._metadata.name
        if not readable:
            raise ConfigError(
                f'Dataset "{name}": none of its {len(all_ids)} images could be read; their names '
                f"are in {self._unreadable_dir}."
            )
        logger.warning(
            'Dataset "%s": %d of %d images could not be read; the metrics are of the other %d.',
            name,
            len(all_ids) - len(readable),
            len(all_ids),
            len(readable),
        )
        return readable

    def _tasks_from_predictions(self, predictions: list[dict[str, Any]]) -> list[str]:
        if not predictions:
            return self._tasks_without_predictions
        return super()._tasks_from_predictions(predictions)

    def _eval_predictions(
        self, predictions: list[dict[str, Any]], img_ids: Collection[int] | None = None
    ) -> None:
        # Detectron2 v0.6 and main look the class up under this name when they use it.
        with substituted(coco_evaluation, "COCOeval_opt", _coco_eval):
            super()._eval_predictions(predictions, img_ids=img_ids)

    def _derive_coco_results(
        self, coco_eval: Any, iou_type: str, class_names: list[str] | None = None
    ) -> dict[str, float]:
        if coco_eval is None:
            logger.warning("The model predicted nothing: the %s metrics are 0.", iou_type)
            coco_eval = self._evaluate_nothing(iou_type)
        return super()._derive_coco_results(coco_eval, iou_type, class_names)

    def _evaluate_nothing(self, iou_type: str) -> Any:
        nothing = COCO()
        nothing.dataset = {**self._coco_api.dataset, "annotations": []}
        nothing.createIndex()
        coco_eval = COCOeval(self._coco_api, nothing, iou_type)
        if self._img_ids is not None:
            coco_eval.params.imgIds = list(self._img_ids)
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
        return coco_eval


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: str | None = None
) -> DatasetEvaluator:
    """The evaluator of a dataset's ``evaluator_type``, as in Detectron2's ``tools/train_net.py``.

    Args:
        cfg: the config.
        dataset_name: of a registered dataset.
        output_folder: for the evaluator's files; by default ``OUTPUT_DIR/inference``.

    Raises:
        ConfigError: there is no evaluator for the dataset's type.
    """
    folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")

    def coco() -> DatasetEvaluator:
        in_heads = cfg.MODEL.META_ARCHITECTURE in ("GeneralizedRCNN", "PanopticFPN")
        tasks = ["bbox"]
        tasks += ["segm"] if in_heads and cfg.MODEL.MASK_ON else []
        tasks += ["keypoints"] if in_heads and cfg.MODEL.KEYPOINT_ON else []
        return COCOEvaluator(
            dataset_name,
            output_dir=folder,
            tasks_without_predictions=tasks,
            unreadable_dir=cfg.OUTPUT_DIR,
            kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
        )

    def semantic() -> DatasetEvaluator:
        return SemSegEvaluator(dataset_name, distributed=True, output_dir=folder)

    def panoptic() -> DatasetEvaluator:
        evaluator = COCOPanopticEvaluator(dataset_name, folder)
        return DatasetEvaluators([semantic(), coco(), evaluator])

    def cityscapes(evaluator: type[DatasetEvaluator]) -> DatasetEvaluator:
        if comm.get_world_size() > max(torch.cuda.device_count(), 1):
            raise ConfigError(
                f'Dataset "{dataset_name}": the Cityscapes evaluators work on one machine only.'
            )
        return evaluator(dataset_name)

    builders: dict[str, Callable[[], DatasetEvaluator]] = {
        "coco": coco,
        "coco_panoptic_seg": panoptic,
        "sem_seg": semantic,
        "cityscapes_instance": lambda: cityscapes(CityscapesInstanceEvaluator),
        "cityscapes_sem_seg": lambda: cityscapes(CityscapesSemSegEvaluator),
        "lvis": lambda: LVISEvaluator(dataset_name, output_dir=folder),
        "pascal_voc": lambda: PascalVOCDetectionEvaluator(dataset_name),
    }
    if kind not in builders:
        raise ConfigError(
            f'Dataset "{dataset_name}": its metadata\'s evaluator_type is {kind!r}; it can be one '
            f"of {', '.join(builders)}."
        )
    return builders[kind]()
