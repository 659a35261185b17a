"""Changing the normalization of any model by name, after it is built."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from detectron2.layers import CycleBatchNormList, NaiveSyncBatchNorm
from detectron2.structures import Instances
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.convnext import LayerNorm2d

from ..detectors import poolers, roi_heads
from ..detectors import rows_are_images as has_maps
from ..norm import (
    ANY_DIMENSIONS,
    InferenceScope,
    LevelBatchNorm2d,
    PartitionedBatchNorm2d,
    Scope,
    check_initialized,
    input_dimensions,
    is_exact,
    lineage,
    matches,
    register_announcer,
    register_exact,
    replace_layers,
    set_rows_per_image,
    take_hooks,
    take_tensors,
    tracks_statistics,
)
from .norms import FROZEN, BNOptions, ChannelLayerNorm, NormFactory
from .roi_heads import PartitionedHead

logger = logging.getLogger(__name__)

_NORM_LAYERS = (
    *(_BatchNorm, *FROZEN),
    *(nn.GroupNorm, nn.InstanceNorm2d, ChannelLayerNorm, LayerNorm2d),
)
_PACKAGE = f"{__package__}."
#: Norms of feature maps alone.
_OF_MAPS = ("IN", "FrozenBN")

register_exact(NaiveSyncBatchNorm.forward)


def convert_norm(
    model: nn.Module,
    norm: str,
    modules: str | Sequence[str] = "*",
    *,
    options: BNOptions | None = None,
    rows_are_images: bool | None = None,
) -> list[str]:
    """Replace the normalization layers below some modules of any torch model, in place.

    Affine parameters are kept, and running statistics where both kinds have them; so are eps and
    momentum of a BN layer, and the hooks that a layer has. Layers below one matched module (the
    outermost that matches) share one permutation a call, as a head's do. Convert before an
    optimizer or DDP holds the model: the parameters of frozen layers are new.

    Args:
        model: the model to change.
        norm: one of :func:`bn_detection.heads.norm_names`.
        modules: a glob, or several, over module names (``fnmatch``: ``*`` also matches dots);
            "" is the model itself.
        options: of the BN kinds.
        rows_are_images: whether each row of the modules' input is an image, for partitions by
            image. By default True outside the ROI heads of a detector of Detectron2, torchvision
            or another family that :mod:`bn_detection.detectors` knows, else False.

    Returns:
        The names of the converted layers.

    Raises:
        ValueError: a glob matches no module, or none with a normalization layer below it, or a
            layer that does more than normalize; the model itself is a normalization layer; an
            unknown norm.
    """
    globs = [modules] if isinstance(modules, str) else list(modules)
    if isinstance(model, _NORM_LAYERS):
        raise ValueError("convert_norm changes layers within a model, and this model is a layer.")
    parts: list[tuple[str, nn.Module, NormFactory]] = []
    converted: list[str] = []
    matched: list[str] = []
    new: dict[nn.Module, nn.Module] = {}
    for glob in globs:
        found = False
        for name, module in _outermost(model, glob):
            matched.append(name)
            layers = norm_layers(module, name)
            if not layers:
                continue
            found = True
            images = has_maps(model, name) if rows_are_images is None else rows_are_images
            factory = NormFactory(norm, options, rows_are_images=images)
            if factory.shuffle is not None:
                raise ValueError(
                    f"{name or 'the model'}: BN.SHUFFLE.MODE features moves RoIs in this "
                    "project's heads (MODEL.ROI_BOX_HEAD.NAME BNConvFCHead and others), not "
                    "feature maps or converted layers; set BN.SHUFFLE.MODE statistics."
                )
            parts.append((name, module, factory))
            converted += [layer_name for layer_name, _ in layers]
            first_names = {layer: layer_name for layer_name, layer in reversed(layers)}
            for layer, at in first_names.items():
                new[layer] = _convert(at, layer, factory, _surrounding(model, at))
                _check_levels(model, at, new[layer])
        if not found:
            raise ValueError(_matches_nothing(model, glob, norm))
    previous = _scopes(model)
    replace_layers(model, lambda _, layer: new.get(layer))
    current = _scopes(model)
    for scope in previous - current:
        scope.detach()
    for name, module, factory in parts:
        _release_heads(module)
        if factory.scope in current:
            factory.scope.rename(name)
            # By name: the module itself may be a layer that was replaced.
            factory.scope.attach(model.get_submodule(name))
            announce_images(model, name, factory.scope)
    converted = list(dict.fromkeys(converted))
    logger.info("Converted %d layers to %s: %s", len(converted), norm or '""', ", ".join(converted))
    left = _other_norm_layers(model, matched, set(new.values()))
    if left:
        logger.info("Normalization layers that stay as they are: %s", ", ".join(left))
    return converted


def to_plain_batch_norm(model: nn.Module) -> nn.Module:
    """Replace this project's BN layers by those of torch and Detectron2, in place.

    A :class:`PartitionedBatchNorm2d` becomes an ``nn.BatchNorm2d``; a :class:`LevelBatchNorm2d`
    becomes a ``CycleBatchNormList``, and statistics that its levels share are copied to each. A
    registered head becomes Detectron2's; a subclass of your own keeps its class. The parameters and
    buffers are otherwise the same objects, so optimizers stay valid; the hooks of shared groups and
    RoI shuffling are removed. The model can then be exported, scripted, traced, and loaded without
    this package. In training it is BN per worker (and level); at inference it uses the population
    statistics.

    Args:
        model: the model to change.

    Returns:
        The model, or the new layer if the model is one.

    Raises:
        ValueError: levels have affine parameters of their own; names the layer. Nothing is changed.
    """
    for name, module in model.named_modules():
        if isinstance(module, LevelBatchNorm2d) and module.options.affine == "separate":
            raise ValueError(
                f'{name or "the layer"}: BN.LEVELS.AFFINE "separate" has no form in Detectron2, '
                "where all levels of a CycleBatchNormList have the same affine parameters."
            )
    for module in model.modules():
        for key, value in list(vars(module).items()):
            if isinstance(value, Scope):
                value.detach()
                if not isinstance(module, PartitionedBatchNorm2d):
                    setattr(module, key, None)
        if isinstance(module, PartitionedHead) and type(module).__module__.startswith(_PACKAGE):
            # Its own forward has nothing left to do, and torch.jit.script cannot read it.
            bases = (c for c in type(module).__mro__ if not issubclass(c, PartitionedHead))
            module.__class__ = next(bases)
    return replace_layers(model, lambda _, layer: _plain(layer))


def _plain(layer: nn.Module) -> nn.Module | None:
    if isinstance(layer, PartitionedBatchNorm2d):
        return take_hooks(take_tensors(_plain_class(layer)(layer.num_features), layer), layer)
    if not isinstance(layer, LevelBatchNorm2d):
        return None
    plain = CycleBatchNormList(layer.num_levels, num_features=layer[0].num_features)
    plain.weight, plain.bias = layer.weight, layer.bias
    for level, item in enumerate(plain):
        take_tensors(item, layer[level % len(layer)])
        if level >= len(layer):
            item._buffers = {key: value.clone() for key, value in item._buffers.items()}
    plain.training = layer.training
    return plain


def _plain_class(layer: PartitionedBatchNorm2d) -> type[nn.Module]:
    if layer.dimensions in ((2,), (3,), (2, 3)):
        return nn.BatchNorm1d
    return nn.BatchNorm3d if layer.dimensions == (5,) else nn.BatchNorm2d


def announce_images(model: nn.Module, name: str, scope: Scope[Any]) -> None:
    """Let the poolers around a head, and the instances given to it, say which images RoIs are of.

    Args:
        model: the whole model.
        name: of the head in it.
        scope: attached to the head; keeps the hooks.
    """
    head = model.get_submodule(name)
    scope.handles.append(head.register_forward_pre_hook(_rows_of_instances))
    _announce_boxes(_roi_heads_around(model, name), scope)


@register_announcer
def _announce_at_inference(
    model: nn.Module, names: list[str], scope: InferenceScope[Any]
) -> set[str]:
    around = {heads for name in names for heads in _roi_heads_around(model, name)}
    _announce_boxes(around, scope)
    for heads in around - {model}:
        for head in heads.children():
            scope.handles.append(head.register_forward_pre_hook(_rows_of_instances))
    return {name for name in names if has_maps(model, name)}


def _roi_heads_around(model: nn.Module, name: str) -> list[nn.Module]:
    """The ROI heads that a module is in; of a model of no known family the model itself."""
    modules = map(model.get_submodule, lineage(name))
    return [m for m in modules if isinstance(m, roi_heads())] or [model]


def _announce_boxes(around: Iterable[nn.Module], scope: Scope[Any]) -> None:
    known = tuple(poolers())
    for heads in around:
        for pooler in heads.modules():
            if isinstance(pooler, known):
                scope.handles.append(pooler.register_forward_pre_hook(_rows_of_pooler))


def _rows_of_pooler(pooler: nn.Module, args: tuple[Any, ...]) -> None:
    tell = next(tell for kind, tell in poolers().items() if isinstance(pooler, kind))
    set_rows_per_image(tell(args))


def _rows_of_instances(head: nn.Module, args: tuple[Any, ...]) -> None:
    for argument in args:
        if isinstance(argument, list) and all(isinstance(item, Instances) for item in argument):
            set_rows_per_image([len(instances) for instances in argument])


def _outermost(model: nn.Module, glob: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules that match, none below another.

    Of a list its items, as nobody calls a list; and of ROI heads each, as their RoIs differ.
    """
    lists: list[str] = []
    taken: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        # "*" is every part of the model, and not the model.
        matching = matches(name, [glob]) and (name == "") == (glob == "")
        in_list = name != "" and name.rpartition(".")[0] in lists
        if not (matching or in_list) or any(name.startswith(f"{t}.") for t in taken):
            continue
        if isinstance(module, (nn.ModuleList, nn.ModuleDict, *roi_heads())):
            lists.append(name)
            continue
        taken.append(name)
        yield name, module


def norm_layers(module: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """What :func:`convert_norm` replaces below a module: each layer by each of its names."""
    return [
        (name, layer)
        for name, layer in module.named_modules(prefix=prefix, remove_duplicate=False)
        if isinstance(layer, _NORM_LAYERS)
        and (tracks_statistics(layer) or not isinstance(layer, _BatchNorm))
    ]


def _other_norm_layers(
    model: nn.Module, parts: Iterable[str], converted: set[nn.Module]
) -> list[str]:
    """Names and classes of layers below some modules that normalize, by the names of classes."""
    return [
        f"{name} ({type(layer).__name__})"
        for part in parts
        for name, layer in model.get_submodule(part).named_modules(prefix=part)
        if "norm" in type(layer).__name__.lower()
        and layer not in converted
        and not any(layer.children())
    ]


def _release_heads(module: nn.Module) -> None:
    """Registered heads whose layers are replaced exchange and share nothing from now on."""
    for head in module.modules():
        if isinstance(head, PartitionedHead):
            for scope in (head.bn_scope, head.shuffle):
                if scope is not None:
                    scope.detach()
            head.bn_scope = head.shuffle = None


def _convert(
    name: str, old: nn.Module, factory: NormFactory, surrounding: Tensor | None
) -> nn.Module:
    is_batch_norm = isinstance(old, _BatchNorm)
    check_initialized(name, old)
    if any(old.children()) or (is_batch_norm and not is_exact(old)):
        raise ValueError(
            f"{name}: a {type(old).__name__} does more than normalize (an activation, for "
            "example), which a conversion would lose. Leave it out of the pattern."
        )
    dimensions = input_dimensions(old) if is_batch_norm else (4,)
    if factory.norm in _OF_MAPS and 4 not in dimensions:
        raise ValueError(
            f'{name}: the input of a {type(old).__name__} is not 4D, and "{factory.norm}" is of '
            "feature maps. Leave it out of the pattern."
        )
    channels = _num_channels(old)
    try:
        new = factory(channels)
    except ValueError as error:
        raise ValueError(
            f'{name}: its {channels} channels cannot have the norm "{factory.norm}": {error}.'
        ) from error
    if isinstance(new, PartitionedBatchNorm2d):
        new.rename(name)
        new.dimensions = ANY_DIMENSIONS if isinstance(old, nn.GroupNorm) else dimensions
        if is_batch_norm:
            new.inference = getattr(old, "inference", "population")
            new.inference_scope = getattr(old, "inference_scope", None)
            return take_hooks(take_tensors(new, old), old)
    source = old.state_dict()
    if (like := next(iter(source.values()), surrounding)) is not None:
        new.to(like.device, like.dtype)
    target = new.state_dict()
    for key in target.keys() & source.keys():
        target[key].copy_(source[key])
    trained = dict(old.named_parameters())
    for key, parameter in new.named_parameters():
        parameter.requires_grad_(key not in trained or trained[key].requires_grad)
    if isinstance(old, (_BatchNorm, *FROZEN)) and hasattr(new, "running_var"):
        new.eps = old.eps
    return take_hooks(new.train(old.training), old)


def _surrounding(model: nn.Module, name: str) -> Tensor | None:
    """A tensor of the nearest module around a layer that has one, for its dtype and device."""
    for module in map(model.get_submodule, reversed(lineage(name))):
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                return tensor
    return None


def _check_levels(model: nn.Module, name: str, new: nn.Module) -> None:
    """Refuse a layer that cannot be one of a list of levels."""
    parent, _, _ = name.rpartition(".")
    levels = model.get_submodule(parent)
    if isinstance(levels, LevelBatchNorm2d):
        try:
            levels.check(new)
        except ValueError as error:
            raise ValueError(f"{parent}: {error}") from error


def _num_channels(layer: nn.Module) -> int:
    for attribute in ("num_features", "num_channels"):
        if hasattr(layer, attribute):
            return getattr(layer, attribute)
    return len(next(iter(layer.state_dict().values())))


def _scopes(model: nn.Module) -> set[Scope[Any]]:
    return {m.scope for m in model.modules() if isinstance(m, PartitionedBatchNorm2d)}


def _matches_nothing(model: nn.Module, glob: str, norm: str) -> str:
    problem = f'The pattern "{glob}" (to convert to "{norm}") matches '
    matched = [name for name, _ in _outermost(model, glob)]
    if matched:
        return (
            f"{problem}{', '.join(matched)}, without a normalization layer below to convert. Build "
            'the model with one (such as MODEL.FPN.NORM "BN"), then convert it.'
        )
    having = [name for name, m in model.named_modules() if isinstance(m, _NORM_LAYERS)]
    return (
        f"{problem}no module of the model. It has {len(having)} normalization layers"
        f"{', such as ' + ', '.join(having[:3]) if having else ''}; its parts are "
        f"{', '.join(name for name, _ in model.named_children())}."
    )
