"""What the ``BN`` keys do to a model after it is built."""

from __future__ import annotations

from detectron2.config import CfgNode
from torch import nn

from ..config import ConfigError
from ..norm import FORWARD, LevelBatchNorm2d, Partition, PartitionedBatchNorm2d, set_inference
from .convert import announce_images, convert_norm
from .norms import BNOptions
from .roi_heads import PartitionedHead
from .virtual_losses import average_losses_over_virtual_workers


def configure_model(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """Apply the ``BN`` keys to a model, in place; for a training script of your own.

    ``bn-detection train`` does it for every model it builds.

    Args:
        cfg: with :func:`bn_detection.add_bn_detection_config`'s keys.
        model: built from ``cfg``, before an optimizer or DDP holds it.

    Returns:
        The model.

    Raises:
        ConfigError: ``BN.CONVERT`` matches nothing; ``BN.INFERENCE`` is "batch", and no BN layer
            is in ``BN.MODULES``; ``BN.VIRTUAL_LOSSES`` without ROI heads.
    """
    for name, module in model.named_modules():
        if isinstance(module, PartitionedBatchNorm2d | LevelBatchNorm2d):
            module.rename(name)
        elif isinstance(module, PartitionedHead):
            for scope in (module.bn_scope, module.shuffle):
                if scope is not None:
                    scope.rename(name)
                    announce_images(model, name, scope)
    try:
        for glob, norm in cfg.BN.CONVERT:
            convert_norm(model, norm, glob, options=BNOptions.from_config(cfg))
    except ValueError as error:
        raise ConfigError(f"BN.CONVERT {cfg.BN.CONVERT}: {error}") from error
    if cfg.BN.VIRTUAL_LOSSES:
        try:
            average_losses_over_virtual_workers(model, cfg.BN.VIRTUAL_WORKERS)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    partition: str | Partition = cfg.BN.INFERENCE_PARTITION
    if partition != FORWARD:
        partition = BNOptions.from_config(cfg).partition(cfg.BN.INFERENCE_PARTITION)
    selected = set_inference(model, cfg.BN.INFERENCE, cfg.BN.MODULES, partition=partition)
    if cfg.BN.INFERENCE == "batch" and not selected:
        raise ConfigError(
            f'BN.INFERENCE is "batch", but the model has no BN layer in BN.MODULES '
            f"{list(cfg.BN.MODULES)}. Give a head a NORM of the BN kinds, or set BN.MODULES to "
            "globs that match BN layers (their names are printed with the model)."
        )
    return model
