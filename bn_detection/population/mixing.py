"""Population statistics between those of the training and those of a few new images.

Schneider et al. 2020, *Improving robustness against common corruptions by covariate shift
adaptation*: of few images the statistics are noise, and those of the training are a prior that
counts as ``prior`` images. From n images, both the mean and the variance are

    (1 - w) * source + w * target,    w = n / (n + prior).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..heads import FROZEN
from ..norm import (
    Groups,
    GroupStatistics,
    LevelBatchNorm2d,
    as_maps,
    group_statistics,
    matches,
    tracks_statistics,
)
from ..norm.functional import merge_statistics
from .collector import num_images
from .estimators import ESTIMATORS, PopulationStatistics

PRIOR = 16.0
"""Images that the statistics of the training count as, as in that paper for single images."""

_POOLED = ESTIMATORS["pooled"]
_ONE_GROUP = Groups(None, 1)

Choose = Callable[[str, GroupStatistics], tuple[Tensor, Tensor]]
"""Takes the name of a layer and the statistics of its input; gives a mean and a variance."""


def mixing_weight(images: float, prior: float = PRIOR) -> float:
    """The weight of new statistics that rest on some images: n / (n + prior); 0 for none."""
    return images / (images + prior) if images else 0.0


def mix_statistics(
    model: nn.Module, statistics: Mapping[str, PopulationStatistics], weight: float
) -> dict[str, PopulationStatistics]:
    """(1 - weight) times the statistics that layers have, plus weight times new ones.

    Args:
        model: has the layers.
        statistics: new ones, by name of the layer.
        weight: from 0 to 1.

    Returns:
        By name; the counts are those of the new ones, whose standard errors shrink by ``weight``.
    """

    def mixed(layer: Any, new: PopulationStatistics) -> PopulationStatistics:
        return replace(
            new,
            mean=layer.running_mean.double().lerp(new.mean, weight),
            var=layer.running_var.double().lerp(new.var, weight),
            mean_error=weight * new.mean_error,
            var_error=weight * new.var_error,
        )

    return {name: mixed(model.get_submodule(name), new) for name, new in statistics.items()}


def frozen_batch_norms(model: nn.Module, modules: Sequence[str]) -> dict[str, Any]:
    """The FrozenBN layers by name, of Detectron2 and torchvision."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, FROZEN) and matches(name, modules)
    }


@contextmanager
def choosing_statistics(
    model: nn.Module, layers: Mapping[str, Any], choose: Choose
) -> Iterator[None]:
    """Before each forward in eval mode, set a layer's statistics to what its input makes of them.

    Levels that share everything are one input.

    Args:
        model: has the layers.
        layers: by name; BN that tracks statistics, and FrozenBN.
        choose: see :data:`Choose`.

    Raises:
        ValueError: a layer normalizes with its mini-batch in eval mode too.
    """
    batch = [name for name, x in layers.items() if getattr(x, "inference", "") == "batch"]
    if batch:
        raise ValueError(
            f"{batch[0]} normalizes with its mini-batch at inference (BN.INFERENCE batch), so its "
            "population statistics are not used; set_inference(model, 'population') changes that."
        )
    together = {
        f"{name}.0": module
        for name, module in model.named_modules()
        if isinstance(module, LevelBatchNorm2d)
        and module.options.train == module.options.population == "shared"
    }

    @torch.no_grad()
    def before(name: str, inputs: Sequence[Tensor]) -> None:
        layer = layers[name]
        if layer.training and not isinstance(layer, FROZEN):
            return
        parts = [group_statistics(as_maps(x), _ONE_GROUP) for x in inputs]
        mean, var = choose(name, merge_statistics(parts))
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(var)

    with ExitStack() as hooks:
        for name, layer in layers.items():
            levels = together.get(name)
            handle = (
                layer.register_forward_pre_hook(lambda _, x, name=name: before(name, x))
                if levels is None
                else levels.register_forward_pre_hook(lambda _, x, name=name: before(name, x[0]))
            )
            hooks.callback(handle.remove)
        yield


class OnlineStatistics:
    """Population statistics that follow a stream of images, without labels.

    Each forward of ``model`` in eval mode moves them before they are used: a layer normalizes with
    its own statistics and those of all values since the last :meth:`reset`, weighed by the number
    of images since then, these included::

        with OnlineStatistics(model.eval()) as online:
            for images in stream:
                if is_another_scene(images):
                    online.reset()
                detections = model(images)

    Afterwards the model has the statistics again that it had.

    Args:
        model: any torch model, called with images first: a list, a tensor of N, or a batch with a
            length. Its BN layers, FrozenBN too, take part where they are in eval mode.
        modules: globs over the names of the layers.
        prior: images that the statistics of the model count as; 0 for none.

    Attributes:
        images: since the last reset.

    Raises:
        ValueError: ``prior`` is negative, no layer matches, or one normalizes with its mini-batch
            at inference.
    """

    def __init__(
        self, model: nn.Module, modules: Sequence[str] = ("*",), *, prior: float = PRIOR
    ) -> None:
        if not prior >= 0:
            raise ValueError(f"prior is {prior}; it is a number of images, 0 or more.")
        self._layers = {
            name: layer
            for name, layer in model.named_modules()
            if (isinstance(layer, FROZEN) or tracks_statistics(layer)) and matches(name, modules)
        }
        if not self._layers:
            raise ValueError(f"No BN layer of the model matches {list(modules)}.")
        self._prior = prior
        self._source = {
            name: (layer.running_mean.clone(), layer.running_var.clone())
            for name, layer in self._layers.items()
        }
        self._hooks = ExitStack()
        self._hooks.enter_context(choosing_statistics(model, self._layers, self._choose))
        handle = model.register_forward_pre_hook(lambda _, inputs: self._begin(num_images(inputs)))
        self._hooks.callback(handle.remove)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Forget the images: the statistics are those that the model came with."""
        self.images = self._in_forward = self._forwards = 0
        self._seen: dict[str, Tensor] = {}
        self._images = dict.fromkeys(self._layers, 0)
        self._last = dict.fromkeys(self._layers, 0)
        for name, (mean, var) in self._source.items():
            self._layers[name].running_mean.copy_(mean)
            self._layers[name].running_var.copy_(var)

    def close(self) -> None:
        """Reset, and leave the model alone from now on."""
        self._hooks.close()
        self.reset()

    def __enter__(self) -> OnlineStatistics:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _begin(self, images: int) -> None:
        self._forwards += 1
        self._in_forward = images
        self.images += images

    def _choose(self, name: str, statistics: GroupStatistics) -> tuple[Tensor, Tensor]:
        seen = _POOLED.keep(statistics)
        if name in self._seen:
            seen = _POOLED.merge(torch.stack([self._seen[name], seen]))
        self._seen[name] = seen
        # A head without RoIs has learned nothing of the image; levels are calls of one forward.
        if self._last[name] < self._forwards and statistics.count.item() > 0:
            self._last[name] = self._forwards
            self._images[name] += self._in_forward
        mean, var, *_ = _POOLED.estimate(seen[None])
        weight = mixing_weight(self._images[name], self._prior)
        old_mean, old_var = self._source[name]
        return old_mean.double().lerp(mean, weight), old_var.double().lerp(var, weight)
