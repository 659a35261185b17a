"""The AP of a model with its old and its new population statistics, of which the better stay."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.utils import comm
from torch import nn

from ..config import ConfigError
from ..data import check_datasets
from .trainer import Trainer


@dataclass(frozen=True)
class Comparison:
    """The AP of each task, by ``task`` or, of several datasets, ``dataset/task``, in percent.

    Attributes:
        before: with the old statistics.
        after: with the new ones.
    """

    before: Mapping[str, float]
    after: Mapping[str, float]

    @property
    def is_better(self) -> bool:
        """Whether the mean AP over tasks and datasets has grown; the old ones stay at a tie."""
        return sum(self.after.values()) > sum(self.before.values())

    def to_json(self) -> dict[str, Any]:
        """JSON types."""
        kept = "new" if self.is_better else "old"
        return {"kept": kept, "before": dict(self.before), "after": dict(self.after)}

    def text(self) -> str:
        """In a sentence."""
        aps = ", ".join(
            f"{name} {old:.2f} before, {self.after[name]:.2f} after"
            for name, old in self.before.items()
        )
        kept = "The new statistics are kept" if self.is_better else "The old statistics are kept"
        return f"AP: {aps}. {kept} (--keep-if-better)."


def check_comparison(cfg: CfgNode) -> None:
    """Refuse to compare where there is nothing to compare on.

    Raises:
        ConfigError: names the key.
    """
    if not cfg.DATASETS.TEST:
        raise ConfigError(
            "--keep-if-better: DATASETS.TEST is empty; name the labelled images to evaluate on."
        )
    check_datasets(cfg, [])
    for name in cfg.DATASETS.TEST:
        records = DatasetCatalog.get(name)
        objects = (item for record in records for item in record.get("annotations", ()))
        if all(item.get("iscrowd", 0) for item in objects):
            raise ConfigError(
                f'--keep-if-better: DATASETS.TEST "{name}" has no labelled object to compute an AP '
                "with. Name a dataset that has, or leave the flag out."
            )


def evaluate_ap(cfg: CfgNode, model: nn.Module, when: str) -> dict[str, float]:
    """The AP on DATASETS.TEST, by task or, of several datasets, dataset and task.

    Every worker must call it; the others than worker 0 get nothing.

    Args:
        cfg: the config.
        model: to evaluate; it is afterwards in training mode if it was.
        when: names the folder in OUTPUT_DIR for the results.

    Raises:
        ConfigError: the evaluation gives no AP.
    """
    results = Trainer.test(cfg, model, folder=os.path.join(cfg.OUTPUT_DIR, when))
    if not comm.is_main_process():
        return {}
    found = dict(_aps(results))
    if not found:
        raise ConfigError(
            f"--keep-if-better: the evaluation of DATASETS.TEST {', '.join(cfg.DATASETS.TEST)} "
            "gives no AP."
        )
    return found


def _aps(results: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in results.items():
        if isinstance(value, Mapping):
            yield from _aps(value, f"{prefix}{name}/")
        elif name == "AP" and math.isfinite(value):
            yield prefix.rstrip("/"), float(value)
