"""The RoIs of some images, together: run with any normalization batch, and scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    one_hot,
)

from ..config import ConfigError
from ..estimate import Ratio
from .batches import Division, Divisions, normalization_batches, normalizing
from .reuse import Pass, passing
from .rois import ImageRois
from .second_stage import KEYPOINT, MASK, Outputs, SecondStage, is_foreground

Scores = dict[str, tuple[list[float], list[float]]]
"""Of each image a numerator and a denominator, by metric."""


Metric = Callable[[NDArray[np.int64]], NDArray[np.float64]]
"""Of how often each image counts."""


class Sums:
    """The metrics that are one sum over images divided by another, image by image."""

    def __init__(self) -> None:
        self._above: dict[str, list[float]] = {}
        self._below: dict[str, list[float]] = {}

    def put(self, scores: Mapping[str, tuple[Iterable[float], Iterable[float]]]) -> None:
        """Add the numerators and denominators of some images, by metric."""
        for name, (above, below) in scores.items():
            self._above.setdefault(name, []).extend(above)
            self._below.setdefault(name, []).extend(below)

    def metrics(self) -> dict[str, Metric]:
        """Each as a function of how often each image counts."""
        return {
            name: Ratio(np.array(above), np.array(self._below[name]))
            for name, above in self._above.items()
        }


def accuracy_of(part: str) -> str:
    """The name of the accuracy of a part of the second stage."""
    return f"accuracy{part.removeprefix('box')}" if part.startswith("box") else f"{part}_accuracy"


class Window:
    """The RoIs of some images that share normalization batches."""

    def __init__(
        self, images: Sequence[ImageRois], stage: SecondStage, per_worker: int, seed: int
    ) -> None:
        """
        Args:
            images: with the RoIs of ``stage``.
            stage: the second stage.
            per_worker: images of a worker.
            seed: of the shuffle.
        """
        self.images, self._stage, self._per_worker, self._seed = images, stage, per_worker, seed
        self.instances = {
            part: [image.parts[part].instances for image in images] for part in stage.layers
        }
        # With channels last, convolutions of small maps take about half the time on a CPU.
        self._features = {
            part: torch.cat([image.parts[part].features for image in images]).contiguous(
                memory_format=torch.channels_last
            )
            for part in stage.layers
        }
        self.foreground_counts = [int(image.foreground.sum()) for image in images]
        self._counts = {part: list(map(len, of)) for part, of in self.instances.items()}
        self._divisions: dict[str, Divisions | None] = {"population": None}
        self._last: dict[str, Pass] = {}
        self._targets: dict[str, Any] = {}

    def batches(self, part: str, mode: str) -> tuple[list[Tensor], list[int]]:
        """The normalization batches of a part in a mode, and its RoIs of each image."""
        counts = self._counts[part]
        return normalization_batches(mode, counts, self._per_worker, self._seed), counts

    def run(
        self, modes: Mapping[str, str], parts: Sequence[str] | None = None, *, keep: bool = False
    ) -> dict[str, Outputs]:
        """The outputs of the parts that have RoIs.

        Args:
            modes: for each BN layer by name, whose RoIs share its batch.
            parts: which; by default all.
            keep: whether later passes differ from this one in some layers alone. What comes before
                all layers is computed once in any case.

        Raises:
            ConfigError: they are not finite.
        """
        outputs = {}
        layers = self._stage.all_layers
        by = {name: self._division(mode) for name, mode in modes.items()}
        for part in self._stage.layers if parts is None else parts:
            if not len(self._features[part]):
                continue
            last = self._last.get(part)
            with normalizing(layers, by), passing(layers, modes, last) as this:
                outputs[part] = self._stage.run(part, self._features[part], self.instances[part])
            if not all(bool(torch.isfinite(output).all()) for output in outputs[part]):
                used = ", ".join(dict.fromkeys(modes.values()))
                raise ConfigError(
                    f"MODEL.WEIGHTS: the {part} head's outputs are not finite with the "
                    f'normalization batch "{used}". The weights may have diverged.'
                )
            if keep or last is None:
                self._last[part] = this
                if not keep:
                    this.forget_all_but_the_first()
        return outputs

    def scores(self, outputs: Mapping[str, Outputs]) -> Scores:
        """Accuracies and losses.

        Args:
            outputs: of :meth:`run`; a part that has no RoIs scores nothing.
        """
        scores: Scores = {}
        for part in outputs:
            if part in self._stage.boxes:
                scores |= self._score_boxes(part, *outputs[part])
        stages = self._stage.boxes
        if len(stages) > 1 and all(part in outputs for part in stages):
            for metric in ("accuracy", "loss"):
                of_stages = [scores[metric + part.removeprefix("box")] for part in stages]
                above, below = (zip(*side, strict=True) for side in zip(*of_stages, strict=True))
                scores[metric] = list(map(sum, above)), list(map(sum, below))
        for part, score in ((MASK, self._score_masks), (KEYPOINT, self._score_keypoints)):
            if part in self._stage.layers and (part in outputs or not len(self._features[part])):
                scores |= score(*outputs.get(part, (None,)))
        return scores

    def correct(self, part: str, outputs: Outputs) -> Tensor:
        """Which RoIs are of an object whose class they are given, bool ``(R,)``.

        The class of a foreground RoI is the one with the largest logit; background counts where
        it has a probability of its own, which it has not among sigmoids.
        """
        classes, foreground = self._classes(part)
        logits = outputs[0][:, :-1] if self._has_sigmoids(part) else outputs[0]
        return (logits.argmax(1) == classes) & foreground

    def correct_by_class(self, outputs: Mapping[str, Outputs]) -> list[NDArray[np.int64]]:
        """Foreground RoIs of each image and class, of all stages: those given it, and all.

        Args:
            outputs: of :meth:`run`.

        Returns:
            Two ``(I, C)``.
        """
        shape = len(self.images), self._stage.num_classes
        correct, every = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for part in self._stage.boxes:
            classes, foreground = self._classes(part)
            images = np.repeat(np.arange(len(self.images)), self._counts[part])
            for counts, rows in (correct, self.correct(part, outputs[part])), (every, foreground):
                of_rows = rows.cpu().numpy()
                np.add.at(counts, (images[of_rows], classes.cpu().numpy()[of_rows]), 1)
        return [correct, every]

    def by_image(self, part: str, values: Tensor) -> list[float]:
        """The sum of values of RoIs, for each image."""
        return [of_image.sum().item() for of_image in torch.split(values, self._counts[part])]

    def _division(self, mode: str) -> Divisions | None:
        if mode not in self._divisions:
            counts = [*self._counts.values(), self.foreground_counts]
            device = self.images[0].foreground.device
            self._divisions[mode] = {
                sum(of_images): Division.of(
                    normalization_batches(mode, of_images, self._per_worker, self._seed), device
                )
                for of_images in counts
            }
        return self._divisions[mode]

    def _classes(self, part: str) -> tuple[Tensor, Tensor]:
        classes = torch.cat([of_image.gt_classes for of_image in self.instances[part]])
        return classes, is_foreground(classes, self._stage.num_classes)

    def _has_sigmoids(self, part: str) -> bool:
        predictor = self._stage.predictors[self._stage.boxes.index(part)]
        return bool(getattr(predictor, "use_sigmoid_ce", False))

    def _score_boxes(self, part: str, logits: Tensor, deltas: Tensor) -> Scores:
        classes, foreground = self._classes(part)
        if self._has_sigmoids(part):
            targets = one_hot(classes, logits.shape[1])[:, :-1].to(logits)
            of_classes = binary_cross_entropy_with_logits(logits[:, :-1], targets, reduction="none")
            loss = of_classes.sum(1)
        else:
            loss = cross_entropy(logits, classes, reduction="none")
        suffix = part.removeprefix("box")
        return {
            f"accuracy{suffix}": (
                self.by_image(part, 100 * self.correct(part, (logits, deltas))),
                self.by_image(part, foreground),
            ),
            f"loss{suffix}": (
                self.by_image(part, loss.double()),
                self.by_image(part, torch.ones_like(classes)),
            ),
        }

    def _score_masks(self, masks: Tensor | None) -> Scores:
        if masks is None or not len(masks):
            zeros = [0.0] * len(self.images)
            return {"mask_accuracy": (zeros, zeros), "mask_loss": (zeros, zeros)}
        classes = torch.cat([image.proposals.gt_classes[image.foreground] for image in self.images])
        rows = torch.arange(len(masks), device=masks.device)
        logits = masks[rows, torch.zeros_like(classes) if masks.shape[1] == 1 else classes]
        targets = self._mask_targets(masks.shape[-1])
        loss = binary_cross_entropy_with_logits(logits, targets.float(), reduction="none")

        def by_image(of_pixels: Tensor) -> list[float]:
            of_images = torch.split(of_pixels.sum((1, 2)), self.foreground_counts)
            return [of_image.sum().item() for of_image in of_images]

        pixels = by_image(torch.ones_like(targets))
        return {
            "mask_accuracy": (by_image(100 * ((logits > 0) == targets)), pixels),
            "mask_loss": (by_image(loss.double()), pixels),
        }

    def _score_keypoints(self, heatmaps: Tensor | None) -> Scores:
        if heatmaps is None:
            zeros = [0.0] * len(self.images)
            return {"keypoint_accuracy": (zeros, zeros), "keypoint_loss": (zeros, zeros)}
        side = heatmaps.shape[-1]
        targets, visible = self._keypoint_targets(side)
        logits = heatmaps.flatten(2).transpose(1, 2)
        loss = cross_entropy(logits, targets, reduction="none").double() * visible
        found = heatmaps.flatten(2).argmax(2)
        away = torch.maximum(
            (found // side - targets // side).abs(), (found % side - targets % side).abs()
        )

        def by_image(of_keypoints: Tensor) -> list[float]:
            return self.by_image(KEYPOINT, of_keypoints.sum(1))

        number = by_image(visible)
        return {
            "keypoint_accuracy": (by_image(100 * ((away <= 1) & visible)), number),
            "keypoint_loss": (by_image(loss), number),
        }

    def _mask_targets(self, side: int) -> Tensor:
        """Bool ``(F, side, side)``, as training crops them."""
        if MASK not in self._targets:
            parts = []
            for image in self.images:
                matched = image.proposals[image.foreground]
                if len(matched):
                    boxes = matched.proposal_boxes.tensor
                    parts.append(matched.gt_masks.crop_and_resize(boxes, side).to(boxes.device))
            self._targets[MASK] = torch.cat(parts)
        targets: Tensor = self._targets[MASK]
        return targets

    def _keypoint_targets(self, side: int) -> tuple[Tensor, Tensor]:
        """The cell of each keypoint, ``(V, K)``, and whether it is visible, in training's way."""
        if KEYPOINT not in self._targets:
            of_images = [
                image.gt_keypoints.to_heatmap(image.proposal_boxes.tensor, side)
                for image in self.instances[KEYPOINT]
                if len(image)
            ]
            cells, visible = (torch.cat(of) for of in zip(*of_images, strict=True))
            self._targets[KEYPOINT] = cells, visible.bool()
        targets: tuple[Tensor, Tensor] = self._targets[KEYPOINT]
        return targets
