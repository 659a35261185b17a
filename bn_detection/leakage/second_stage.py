"""A detector's second stage on given RoIs: its own path, from pooled features to its outputs.

Whatever the model does between its pooler and its predictor is run as the model runs it: the pooler
gives features that were pooled before, and what the predictor gives ends the call. So what a
subclass adds in between is in it. One that looks elsewhere than at the features of its RoIs gives
other outputs so than in its own forward pass, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import (
    CascadeROIHeads,
    FastRCNNOutputLayers,
    Res5ROIHeads,
    StandardROIHeads,
)
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.modeling.roi_heads.keypoint_head import BaseKeypointRCNNHead
from detectron2.modeling.roi_heads.mask_head import BaseMaskRCNNHead
from detectron2.modeling.roi_heads.roi_heads import select_proposals_with_visible_keypoints
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from ..config import ConfigError, one_line
from .batches import batch_norms, replaced

Features = Mapping[str, Tensor]
Outputs = tuple[Tensor, ...]

MASK, KEYPOINT = "mask", "keypoint"
_PREFIX = "roi_heads."
# Side of the feature maps in place of an image's, which no output may depend on.
_BLANK = 8
_TOLERANCE = {"rtol": 1e-3, "atol": 1e-3}


class UnknownSecondStage(ConfigError):
    """A model that the probe on fixed RoIs does not know, named by its class.

    It may still be measured on its own detections.
    """


class Rois(NamedTuple):
    """What a part of the second stage is given of an image.

    Attributes:
        instances: R RoIs: ``proposal_boxes``, ``gt_classes`` and, of an image with objects, the
            other ``gt_`` fields of the object that each is matched to.
        features: pooled, ``(R, C, H, W)``.
    """

    instances: Instances
    features: Tensor


class SecondStage:
    """The heads of a ``GeneralizedRCNN``, part by part: one or more of boxes, masks, keypoints.

    Attributes:
        boxes: the parts that find boxes: "box", or "box_stage1", ... of a cascade.
        layers: of each part, its BN layers by name.
        left_out: by name, why a head that has BN is none of the parts.
    """

    def __init__(self, model: nn.Module) -> None:
        """
        Args:
            model: in eval mode, or to be set so.

        Raises:
            UnknownSecondStage: names the class that is not known.
        """
        heads: Any = getattr(model, "roi_heads", None)
        parts: list[tuple[str, object, type | tuple[type, ...]]] = [
            ("the model", model, GeneralizedRCNN),
            ("its proposal generator", getattr(model, "proposal_generator", None), RPN),
            ("its ROI heads", heads, (StandardROIHeads, Res5ROIHeads)),
        ]
        for what, part, needed in parts:
            _check(what, part, needed)
        self._heads = heads
        self._is_cascade = isinstance(heads, CascadeROIHeads)
        self._is_res5 = isinstance(heads, Res5ROIHeads)
        predictors = heads.box_predictor if self._is_cascade else [heads.box_predictor]
        for predictor in predictors:
            _check("its box predictor", predictor, FastRCNNOutputLayers)
        self.predictors: list[Any] = list(predictors)
        self.boxes = tuple(
            f"box_stage{k}" if self._is_cascade else "box"
            for k in range(1, len(self.predictors) + 1)
        )
        self.left_out: dict[str, str] = {}
        self.layers = {part: self._box_layers(k) for k, part in enumerate(self.boxes)}
        for part, base in ((MASK, BaseMaskRCNNHead), (KEYPOINT, BaseKeypointRCNNHead)):
            if layers := self._other_layers(part):
                head = getattr(heads, f"{part}_head")
                pooled = self._is_res5 or getattr(heads, f"{part}_pooler") is not None
                if isinstance(head, base) and pooled:
                    self.layers[part] = layers
                else:
                    self.left_out[f"{_PREFIX}{part}_head"] = (
                        f"it is a {type(head).__name__}, and the probe measures {part} heads on "
                        f"pooled RoI features with the layers of Detectron2's {base.__name__}."
                    )
        self._is_checked = False

    @property
    def num_classes(self) -> int:
        """Foreground classes."""
        return int(self._heads.num_classes)

    @property
    def in_features(self) -> list[str]:
        """Names of the feature maps that RoIs are pooled from."""
        return list(self._heads.in_features)

    @property
    def all_layers(self) -> dict[str, nn.Module]:
        """The BN layers of all parts by name, each once."""
        return {name: layer for of in self.layers.values() for name, layer in of.items()}

    def leave_out(self, part: str, reason: str) -> None:
        """Measure the heads without one of them."""
        del self.layers[part]
        self.left_out[f"{_PREFIX}{part}_head"] = reason

    def pool(
        self, images: Any, features: Features, sampled: Instances, target: Instances
    ) -> dict[str, Rois]:
        """What each part is given of an image.

        The RoIs of a later stage of a cascade are the boxes that the stage before finds in
        inference, labelled as training does. The first image is run through the model's own
        forward pass, too.

        Args:
            images: one.
            features: its feature maps.
            sampled: its RoIs, of ``label_and_sample_proposals``.
            target: its ground truth.

        Raises:
            UnknownSecondStage: the model's own forward pass gives other outputs.
        """
        heads = self._heads
        foreground = sampled[is_foreground(sampled.gt_classes, self.num_classes)]
        rois: dict[str, Rois] = {}
        if self._is_cascade:
            rois |= self._pool_stages(images, features, sampled, target)
        else:
            pooler = heads.pooler if self._is_res5 else heads.box_pooler
            pooled = _reach(pooler, "forward", lambda: heads(images, features, [sampled]))
            rois["box"] = Rois(sampled, pooled)
        if MASK in self.layers:
            if self._is_res5:  # its boxes and masks share the features of all RoIs
                rois[MASK] = rois["box"]
            else:
                rois[MASK] = self._pool_given(MASK, features, foreground)
        if KEYPOINT in self.layers:
            with EventStorage():  # it logs a count
                (visible,) = select_proposals_with_visible_keypoints([foreground])
            rois[KEYPOINT] = self._pool_given(KEYPOINT, features, visible)
        if not self._is_checked:
            self._blank = {
                name: torch.zeros_like(value[:1, :, :_BLANK, :_BLANK])
                for name, value in features.items()
            }
            self._check_path(images, features, rois)
            self._is_checked = True
        return rois

    def run(self, part: str, features: Tensor, instances: Sequence[Instances]) -> Outputs:
        """The outputs of a part.

        Args:
            part: one of :attr:`layers`.
            features: pooled, of the RoIs of all images.
            instances: of each image, its RoIs.

        Returns:
            Logits and deltas of boxes; the logits of masks of foreground RoIs; or the heatmaps.
        """
        heads = self._heads
        if part in (MASK, KEYPOINT):
            pooler = heads.pooler if self._is_res5 else getattr(heads, f"{part}_pooler")
            with replaced(pooler, forward=lambda *_, **__: features):
                return (self._given(part, self._blank, instances),)
        if self._is_cascade:
            with replaced(heads.box_pooler, forward=lambda *_, **__: features):
                maps = [self._blank[name] for name in heads.box_in_features]
                outputs: Outputs = heads._run_stage(maps, instances, self.boxes.index(part))
                return outputs
        pooler = heads.pooler if self._is_res5 else heads.box_pooler
        with replaced(pooler, forward=lambda *_, **__: features):
            found: Outputs = _reach(
                heads.box_predictor, "forward", lambda: heads(None, self._blank, instances)
            )
            return found

    def detections(
        self, outputs: Sequence[Outputs], instances: Sequence[Sequence[Instances]]
    ) -> list[tuple[Instances, Tensor]]:
        """What inference finds from the outputs of the parts that find boxes.

        Args:
            outputs: of each of :attr:`boxes`.
            instances: of each of them, the RoIs of each image.

        Returns:
            For each image the detections, and the RoI of each.
        """
        if not self._is_cascade:
            found = self.predictors[0].inference(outputs[0], instances[0])
            return list(zip(*found, strict=True))
        stages = list(zip(self.predictors, outputs, instances, strict=True))
        probabilities = [predictor.predict_probs(*given) for predictor, *given in stages]
        scores = [sum(of_image) / len(stages) for of_image in zip(*probabilities, strict=True)]
        last, *given = stages[-1]
        found = fast_rcnn_inference(
            last.predict_boxes(*given),
            scores,
            [image.image_size for image in instances[-1]],
            last.test_score_thresh,
            last.test_nms_thresh,
            last.test_topk_per_image,
        )
        return list(zip(*found, strict=True))

    def _box_layers(self, stage: int) -> dict[str, nn.Module]:
        def is_of(name: str) -> bool:
            top, _, rest = name.partition(".")
            if self._is_cascade and top in ("box_head", "box_predictor"):
                return rest.partition(".")[0] == str(stage)
            return top not in ("mask_head", "keypoint_head")

        return {_PREFIX + n: layer for n, layer in batch_norms(self._heads).items() if is_of(n)}

    def _other_layers(self, part: str) -> dict[str, nn.Module]:
        if not getattr(self._heads, f"{part}_on", False):
            return {}
        tops = (f"{part}_head", "res5") if self._is_res5 else (f"{part}_head",)
        named = batch_norms(self._heads).items()
        return {_PREFIX + name: layer for name, layer in named if name.partition(".")[0] in tops}

    def _pool_stages(
        self, images: Any, features: Features, sampled: Instances, target: Instances
    ) -> dict[str, Rois]:
        heads, calls = self._heads, []
        pool = heads.box_pooler.forward

        def noted(maps: Any, boxes: Any) -> Tensor:
            pooled: Tensor = pool(maps, boxes)
            calls.append((boxes, pooled))
            return pooled

        with replaced(heads.box_pooler, forward=noted):
            heads._forward_box(features, [sampled])
        if len(calls) != len(self.boxes):
            raise UnknownSecondStage(
                f"{_ABOUT} its ROI heads are a {type(heads).__name__} with {len(self.boxes)} "
                f"stages, which pool {len(calls)} times."
            )
        rois = {}
        for stage, (part, ((boxes,), pooled)) in enumerate(zip(self.boxes, calls, strict=True)):
            instances = sampled
            if stage:
                instances = Instances(sampled.image_size, proposal_boxes=boxes)
                with EventStorage():  # it logs counts
                    (instances,) = heads._match_and_label_boxes([instances], stage, [target])
            rois[part] = Rois(instances, pooled)
        return rois

    def _pool_given(self, part: str, features: Features, instances: Instances) -> Rois:
        pooler = getattr(self._heads, f"{part}_pooler")
        pooled = _reach(pooler, "forward", lambda: self._given(part, features, [instances]))
        return Rois(instances, pooled)

    def _given(self, part: str, features: Features, instances: Sequence[Instances]) -> Tensor:
        """The logits of masks or keypoints in given boxes."""
        heads = self._heads
        given = []
        for image in instances:
            boxes = Instances(image.image_size)
            boxes.pred_boxes, boxes.pred_classes = image.proposal_boxes, image.gt_classes
            given.append(boxes)
        head: nn.Module = getattr(heads, f"{part}_head")
        if not self._is_res5:
            call = getattr(heads, f"_forward_{part}")
            logits: Tensor = _reach(head, "layers", lambda: call(features, given))
            return logits
        classes = torch.cat([image.gt_classes for image in instances])
        foreground = is_foreground(classes, self.num_classes)
        layers: Any = head.layers
        with replaced(head, layers=lambda x: layers(x[foreground])):
            logits = _reach(head, "layers", lambda: heads.forward_with_given_boxes(features, given))
        return logits

    def _check_path(self, images: Any, features: Features, rois: Mapping[str, Rois]) -> None:
        heads = self._heads
        own: dict[str, Outputs] = {}
        if self._is_cascade:
            outputs: list[Outputs] = []
            with _noting(self.predictors, outputs):
                heads(images, features, [rois[self.boxes[0]].instances])
            own |= dict(zip(self.boxes, outputs, strict=False))
        else:
            own["box"] = _reach(
                heads.box_predictor,
                "forward",
                lambda: heads(images, features, [rois["box"].instances]),
            )
        for part in (MASK, KEYPOINT):
            if part in rois and len(rois[part].instances):
                own[part] = (self._given(part, features, [rois[part].instances]),)
        for part, expected in own.items():
            about = (
                f"{_ABOUT} on the pooled features of the same RoIs alone, the {part} part of a "
                f"{type(heads).__name__}"
            )
            try:
                found = self.run(part, rois[part].features, [rois[part].instances])
                same = all(
                    torch.allclose(one, other, **_TOLERANCE, equal_nan=True)
                    for one, other in zip(found, expected, strict=True)
                )
            except Exception as error:
                raise UnknownSecondStage(f"{about} fails: {one_line(error)}") from error
            if not same:
                raise UnknownSecondStage(f"{about} gives other outputs than in the model.")


_ABOUT = "The probe on fixed RoIs does not know this second stage:"


def is_foreground(classes: Tensor, num_classes: int) -> Tensor:
    """Which of the classes of RoIs, ``(R,)``, are those of objects."""
    return (classes >= 0) & (classes < num_classes)


def _check(what: str, part: object, needed: type | tuple[type, ...]) -> None:
    if not isinstance(part, needed):
        classes = needed if isinstance(needed, tuple) else (needed,)
        raise UnknownSecondStage(
            f"{_ABOUT} {what} must be a {' or '.join(c.__name__ for c in classes)} and is a "
            f"{type(part).__name__}."
        )


class _Reached(Exception):
    def __init__(self, owner: nn.Module, output: Any) -> None:
        self.owner, self.output = owner, output


def _reach(owner: nn.Module, method: str, call: Callable[[], object]) -> Any:
    """What a method gives, when a call comes to it; the call ends there."""
    function = getattr(owner, method)

    def end(*args: Any, **kwargs: Any) -> None:
        raise _Reached(owner, function(*args, **kwargs))

    with replaced(owner, **{method: end}):
        try:
            call()
        except _Reached as reached:
            if reached.owner is owner:
                return reached.output
            raise
    raise UnknownSecondStage(f"{_ABOUT} it makes no use of its {type(owner).__name__}.")


@contextmanager
def _noting(modules: Sequence[nn.Module], outputs: list[Outputs]) -> Iterator[None]:
    handles = [m.register_forward_hook(lambda *call: outputs.append(call[-1])) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
