"""What the ``BN`` keys do to a model after it is built."""

from __future__ import annotations

from detectron2.config import CfgNode
from torch import nn

from ..config import ConfigError
from ..norm import set_inference
from .roi_heads import ShuffledHead


def configure_model(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """Apply the ``BN`` keys to a model, in place; for a training script of your own.

    ``tools/train_net.py`` does it for every model it builds.

    Args:
        cfg: with :func:`bn_detection.add_bn_detection_config`'s keys.
        model: built from ``cfg``, before an optimizer or DDP holds it.

    Returns:
        The model.

    Raises:
        ConfigError: ``BN.INFERENCE`` is "batch", and no BN layer is in ``BN.MODULES``.
    """
    for name, module in model.named_modules():
        if isinstance(module, ShuffledHead) and module.shuffle is not None:
            module.shuffle.name = name
    selected = set_inference(model, cfg.BN.INFERENCE, cfg.BN.MODULES)
    if cfg.BN.INFERENCE == "batch" and not selected:
        raise ConfigError(
            f'BN.INFERENCE is "batch", but the model has no BN layer in BN.MODULES '
            f"{list(cfg.BN.MODULES)}. Give a head a NORM of the BN kinds, or set BN.MODULES to "
            "globs that match BN layers (their names are printed with the model)."
        )
    return model
