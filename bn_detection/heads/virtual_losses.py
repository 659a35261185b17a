"""The second stage's losses, averaged over virtual workers as DDP averages them over workers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from detectron2.modeling import ROIHeads
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.modeling.roi_heads.keypoint_head import BaseKeypointRCNNHead
from detectron2.modeling.roi_heads.mask_head import BaseMaskRCNNHead
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor, nn

from ..norm import images_per_virtual_worker, virtual_share

Losses = dict[str, Tensor]

_SUPPORTED = (FastRCNNOutputLayers, BaseMaskRCNNHead, BaseKeypointRCNNHead)
_PARTS = ("box_predictor", "mask_head", "keypoint_head")


def average_losses_over_virtual_workers(model: nn.Module, virtual_workers: int) -> None:
    """Average the box, mask and keypoint losses over the virtual workers of this process.

    Detectron2's losses are means over the RoIs of a process, which DDP averages over processes.
    With this, one process has the losses (and so the gradients) that its virtual workers would
    have as processes. The layers still run once, on all RoIs.

    The heads are subclasses of Detectron2's: losses are those of ``FastRCNNOutputLayers.losses``,
    and of a ``forward`` of mask and keypoint heads that begins with ``self.layers(x)``.

    Args:
        model: with Detectron2's ROI heads; changed in place.
        virtual_workers: their total number over all processes.

    Raises:
        ValueError: the model has no second stage, or one whose losses are not Detectron2's.
    """
    _check(model)
    for name, module in model.named_modules():
        # Partials, not closures or bound methods: deep copies and pickles of a model take them
        # along with its modules.
        if isinstance(module, FastRCNNOutputLayers):
            module.losses = partial(_box_losses, module, name, virtual_workers)
        elif isinstance(module, _SUPPORTED):
            module.forward = partial(_head_forward, module, name, virtual_workers)


def _check(model: nn.Module) -> None:
    if not any(isinstance(module, _SUPPORTED) for module in model.modules()):
        raise ValueError(
            "BN.VIRTUAL_LOSSES True averages the losses of Detectron2's box, mask and keypoint "
            f"heads, and the model ({type(model).__name__}) has none; set BN.VIRTUAL_LOSSES False."
        )
    for name, roi_heads in model.named_modules():
        if not isinstance(roi_heads, ROIHeads):
            continue
        for part in _PARTS:
            head = getattr(roi_heads, part, None)
            for module in head if isinstance(head, nn.ModuleList) else (head,):
                if module is not None and not isinstance(module, _SUPPORTED):
                    raise ValueError(
                        f"BN.VIRTUAL_LOSSES True: {name}.{part} is a {type(module).__name__}, "
                        "whose losses cannot be averaged over virtual workers, as it is no "
                        "subclass of Detectron2's heads; set BN.VIRTUAL_LOSSES False."
                    )


def _box_losses(
    predictor: FastRCNNOutputLayers,
    name: str,
    virtual_workers: int,
    predictions: Sequence[Tensor],
    proposals: list[Instances],
) -> Losses:
    losses = partial(type(predictor).losses, predictor)
    return _average(losses, predictions, proposals, virtual_workers, name)


def _head_forward(
    head: nn.Module, name: str, virtual_workers: int, x: Any, instances: list[Instances]
) -> Losses | list[Instances]:
    if not head.training:
        return type(head).forward(head, x, instances)
    # The head, except that its layers have run.
    after_layers = copy.copy(head)
    vars(after_layers)["layers"] = _identity

    def losses(logits: tuple[Tensor], instances: list[Instances]) -> Losses:
        return type(head).forward(after_layers, *logits, instances)

    return _average(losses, (head.layers(x),), instances, virtual_workers, name)


def _identity(x: Tensor) -> Tensor:
    return x


def _average(
    losses: Callable[[tuple[Tensor, ...], list[Instances]], Losses],
    outputs: Sequence[Tensor],
    instances: list[Instances],
    virtual_workers: int,
    owner: str,
) -> Losses:
    """The mean of ``losses`` over the virtual workers of this process.

    Args:
        losses: of the outputs for some images, and their instances.
        outputs: tensors with a row for each instance of all images.
        instances: one an image.
        virtual_workers: their total number over all processes.
        owner: the head, for messages.
    """
    images = images_per_virtual_worker(len(instances), virtual_share(virtual_workers), owner)
    shares = [instances[first : first + images] for first in range(0, len(instances), images)]
    rows = [sum(len(of_image) for of_image in share) for share in shares]
    with _MeanStorage(get_event_storage()):
        of_workers = [
            losses(parts, share)
            for *parts, share in zip(*(t.split(rows) for t in outputs), shares, strict=True)
        ]
    return {key: torch.stack([of[key] for of in of_workers]).mean() for key in of_workers[0]}


class _MeanStorage(EventStorage):
    """Gives another storage the mean of what is put for each scalar (the last, if a counter)."""

    def __init__(self, target: EventStorage) -> None:
        super().__init__(target.iter)
        self._target = target

    def put_image(self, img_name: str, img_tensor: Tensor) -> None:
        self._target.put_image(img_name, img_tensor)

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for name, history in self.histories().items():
            # Counters are the scalars that are not to be smoothed.
            smooth = self.smoothing_hints()[name]
            value = history.global_avg() if smooth else history.latest()
            self._target.put_scalar(name, value, smoothing_hint=smooth)
