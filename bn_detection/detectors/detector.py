"""How a detector is called, and what its rows are: torchvision's convention, and its adapters.

A new family is a subclass of :class:`Detector` that says what differs, registered under a name::

    @register_detector("my_library")
    class MyDetector(Detector):
        @classmethod
        def fits(cls, model):
            return isinstance(model, my_library.Detector)

        def detect(self, samples):
            ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..norm import lineage

Sample = tuple[Tensor, dict[str, Any]]
"""An image, float32 RGB ``(3, H, W)`` from 0 to 1, and its target: ``image_id``, and where there
are labels ``boxes`` ``(N, 4)`` in absolute x0, y0, x1, y1, ``labels`` ``(N,)`` int64, and perhaps
``masks`` ``(N, H, W)`` uint8 and ``iscrowd`` ``(N,)``."""

_OF_OBJECTS = ("boxes", "labels", "masks", "iscrowd")
_NEEDED = {"boxes": 4, "scores": None, "labels": None}


class FormError(ValueError):
    """A model or its outputs are not of the form that its adapter knows."""


class Detector:
    """A detector in torchvision's convention; subclasses say what another family does otherwise.

    In training the model takes a list of images and a list of targets, and returns a dict of
    losses; else it takes the images, and returns for each a dict of ``boxes``, ``scores``,
    ``labels`` and perhaps ``masks`` ``(N, 1, H, W)``, probabilities.

    Args:
        model: the detector.
    """

    roi_heads: ClassVar[tuple[type[nn.Module], ...]] = ()
    """Classes of modules in which a row is an RoI. Each part of one has rows of its own."""
    poolers: ClassVar[Mapping[type[nn.Module], Callable[[tuple[Any, ...]], Sequence[int]]]] = {}
    """Classes of modules that pool RoIs, with what tells from their arguments the number of RoIs of
    each image."""
    maps_are_images: ClassVar[bool] = False
    """Whether each row is an image wherever it is no RoI of ``roi_heads``."""
    first_label: ClassVar[int] = 1
    """The label of the first class: 1 where 0 is the background."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        """Whether the model is of this family."""
        return True

    @property
    def num_labels(self) -> int | None:
        """One more than the largest label that the model knows, if that is known."""
        return None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        parameter = next(self.model.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    def read(self, item: Any) -> tuple[Any, Any] | None:
        """Image and target of an item of a form that this family's loaders have, or None."""
        return None

    def forward(self, samples: Sequence[Sample]) -> Any:
        """Run the model in the mode that it is in: with the targets in training, else without."""
        images = [image.to(self.device) for image, _ in samples]
        if not self.model.training:
            return self.model(images)
        targets = [without_crowds(target) for _, target in samples]
        moved = [{key: to(value, self.device) for key, value in t.items()} for t in targets]
        return self.model(images, moved)

    def detect(self, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        """What a model in eval mode finds in each image, in the form of torchvision.

        Raises:
            FormError: the outputs have another form.
        """
        outputs = self.forward(samples)
        check_form(outputs, len(samples), type(self.model).__name__)
        return [{key: value.detach().cpu() for key, value in found.items()} for found in outputs]


D = TypeVar("D", bound=type[Detector])
_REGISTRY: dict[str, type[Detector]] = {}


def register_detector(name: str) -> Callable[[D], D]:
    """Class decorator: know a family of detectors.

    Of several that fit a model the last that was registered is taken.

    Args:
        name: of the family.

    Raises:
        ValueError: the name is taken.
    """

    def register(cls: D) -> D:
        if name in _REGISTRY:
            raise ValueError(f'The detector "{name}" is registered already.')
        _REGISTRY[name] = cls
        return cls

    return register


def detector_of(model: nn.Module) -> Detector:
    """The adapter of a model; of a family that nobody registered it is torchvision's convention."""
    fitting = (cls for cls in reversed(_REGISTRY.values()) if cls.fits(model))
    return next(fitting, Detector)(model)


def roi_heads() -> tuple[type[nn.Module], ...]:
    """Classes of the ROI heads of all families."""
    return tuple(head for cls in _REGISTRY.values() for head in cls.roi_heads)


def in_roi_heads(model: nn.Module, name: str) -> bool:
    """Whether a module is in the ROI heads of a model, or is them."""
    return any(isinstance(model.get_submodule(part), roi_heads()) for part in lineage(name))


_maps: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()
"""Of models of no known family, the layers whose rows are images."""


def rows_are_images(model: nn.Module, name: str) -> bool:
    """Whether each row of a module's input is an image, as far as that is known.

    Args:
        model: the whole model.
        name: of the module.
    """
    if in_roi_heads(model, name):
        return False
    return detector_of(model).maps_are_images or name in _maps.get(model, ())


@torch.no_grad()
def find_maps(detector: Detector, layers: Mapping[str, nn.Module], samples: list[Sample]) -> None:
    """Learn of a model of no known family which layers have as many rows as there are images.

    Args:
        detector: its model in eval mode.
        layers: by name.
        samples: two images.
    """
    found = set(layers)
    for number in (1, 2):

        def see(name: str, x: Tensor, number: int = number) -> None:
            if x.shape[0] != number:
                found.discard(name)

        handles = [
            layer.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0]))
            for name, layer in layers.items()
        ]
        try:
            detector.forward(samples[:number])
        finally:
            for handle in handles:
                handle.remove()
    _maps[detector.model] = frozenset(found)


def poolers() -> dict[type[nn.Module], Callable[[tuple[Any, ...]], Sequence[int]]]:
    """The poolers of all families."""
    return {pooler: tell for cls in _REGISTRY.values() for pooler, tell in cls.poolers.items()}


def without_crowds(target: dict[str, Any]) -> dict[str, Any]:
    """The objects that are trained on: those that are no crowd."""
    if "iscrowd" not in target:
        return target
    kept = target["iscrowd"] == 0
    return {key: value[kept] if key in _OF_OBJECTS else value for key, value in target.items()}


def to(value: Any, device: torch.device) -> Any:
    """A tensor on a device; anything else as it is."""
    return value.to(device) if isinstance(value, Tensor) else value


def check_form(outputs: Any, images: int, model: str) -> None:
    """Whether outputs are those of torchvision's convention.

    Raises:
        FormError: says what they are, and what is needed.
    """
    problem = _wrong_form(outputs, images)
    if problem:
        raise FormError(
            f"{model} in eval mode gave {problem}. What is needed, from a list of {images} images "
            "(3, H, W): a list of as many dicts with the tensors boxes (N, 4) in absolute x0, y0, "
            "x1, y1, scores (N,) and labels (N,), perhaps masks (N, 1, H, W). For a model of "
            "another form write an adapter: docs/extending/detector.md."
        )


def _wrong_form(outputs: Any, images: int) -> str:
    if not isinstance(outputs, list | tuple):
        return _described(outputs)
    if len(outputs) != images:
        return f"a {type(outputs).__name__} of {len(outputs)} for {images} images"
    for found in outputs:
        if not isinstance(found, Mapping):
            return f"a {type(outputs).__name__} of {_described(found)}"
        missing = [key for key in _NEEDED if not isinstance(found.get(key), Tensor)]
        if missing:
            return f"{_described(found)}, without the tensors {', '.join(missing)}"
        number = len(found["scores"])
        for key, last in _NEEDED.items():
            shape = tuple(found[key].shape)
            if shape != ((number,) if last is None else (number, last)):
                return f"{key} of shape {shape} beside scores of {tuple(found['scores'].shape)}"
    return ""


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a dict with the keys {', '.join(map(str, value)) or 'none'}"
    return f"a {type(value).__name__}"
