"""BatchNorm in layers that are applied to several feature levels, as dense heads are to an FPN."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .functional import group_statistics, grouped_batch_norm, merge_statistics
from .layer import PartitionedBatchNorm2d
from .partition import check_choice

logger = logging.getLogger(__name__)

_CHOICES = ("shared", "separate")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class LevelOptions:
    """What feature levels share: the rows of Table 5 of *Rethinking "Batch" in BatchNorm*.

    The defaults are those of Detectron2's ``CycleBatchNormList``.

    Attributes:
        train: whether all levels are one normalization batch in training, or each is one.
        population: whether inference normalizes all levels with the same statistics.
        affine: whether all levels have the same affine parameters.

    Raises:
        ValueError: a value is not ``shared`` or ``separate``.
    """

    train: str = "separate"
    population: str = "separate"
    affine: str = "shared"

    def __post_init__(self) -> None:
        for key in ("train", "population", "affine"):
            check_choice(f"BN.LEVELS.{key.upper()}", getattr(self, key), _CHOICES)


class LevelBatchNorm2d(nn.ModuleList):
    """BatchNorm of all levels in one call, with a choice of what the levels share.

    Its items are the :class:`PartitionedBatchNorm2d` that hold the population statistics: one for
    all levels, or one each. Rows are images; all levels of an image are in the same group of the
    partition. Training normalizes, with the statistics of

    * ``train`` and ``population`` equal: the mini-batch of all levels, or of each level. The
      running statistics follow those.
    * separate training, shared population: each level, which feeds the running statistics one
      after the other, as sequential calls of one BatchNorm do.
    * shared training, separate population: all levels, while each level's running statistics follow
      its own. When population statistics are collected (an ``observer`` keeps the running ones from
      moving), each level is normalized by itself, as at inference.

    Inference uses the population statistics of the level, or, where ``inference`` is ``batch``, the
    mini-batch statistics of training on this worker.

    The affine parameters are ``weight`` and ``bias``, ``(C,)``, if shared, else ``weights`` and
    ``biases``, ``(L, C)``. With shared ones and a separate population the state_dict is that of
    Detectron2's ``CycleBatchNormList``. A state_dict of another choice loads too: shared statistics
    or parameters are copied to each level; separate statistics are merged into those of an equal
    mixture of the levels, with a warning. Only separate parameters cannot become shared.

    Args:
        num_features: channels C.
        num_levels: number of levels L.
        options: what the levels share.
        kwargs: of :class:`PartitionedBatchNorm2d`.

    Raises:
        ValueError: Batch Renormalization where the mini-batch is not of the same levels as the
            population that it is corrected towards.
    """

    def __init__(
        self,
        num_features: int,
        num_levels: int,
        options: LevelOptions | None = None,
        **kwargs: Any,
    ) -> None:
        self.options = options = options or LevelOptions()
        self.num_levels = num_levels
        number = 1 if options.population == "shared" else num_levels
        super().__init__(
            PartitionedBatchNorm2d(num_features, affine=False, **kwargs) for _ in range(number)
        )
        self.check(self[0])
        if options.affine == "shared":
            self.weight = nn.Parameter(torch.ones(num_features))
            self.bias = nn.Parameter(torch.zeros(num_features))
        else:
            self.weights = nn.Parameter(torch.ones(num_levels, num_features))
            self.biases = nn.Parameter(torch.zeros(num_levels, num_features))
        self.rename("")

    def rename(self, name: str) -> None:
        """Set the name of the list in messages: the one that the model has for it."""
        self.name = name

    def check(self, layer: nn.Module) -> None:
        """Whether a layer can be an item.

        Raises:
            ValueError: it cannot.
        """
        if not isinstance(layer, PartitionedBatchNorm2d):
            raise ValueError(
                f"a {type(layer).__name__} does not normalize levels as BN.LEVELS says; build the "
                "head with that NORM instead."
            )
        options = self.options
        if layer.renorm is not None and options.train != options.population:
            raise ValueError(
                "BatchRenorm corrects the statistics of a mini-batch towards those of its "
                f'population, but BN.LEVELS.TRAIN is "{options.train}" and BN.LEVELS.POPULATION '
                f'"{options.population}"; set both alike.'
            )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Args: features: by level, ``(N, C, H_l, W_l)``. Returns the same shapes and dtype.

        Raises:
            TypeError: not a list.
            ValueError: another number of levels.
        """
        if isinstance(features, Tensor):
            raise TypeError(f"{self._owner}: it takes a list of all levels at once, not a tensor.")
        if len(features) != self.num_levels:
            raise ValueError(
                f"{self._owner}: {len(features)} feature levels were given, and it was made for "
                f"{self.num_levels} levels, which share or own statistics by their position."
            )
        if not isinstance(self[0], PartitionedBatchNorm2d):
            raise TypeError(
                f"{self._owner}: its layers were replaced by {type(self[0]).__name__}, which knows "
                "nothing of levels. Replace layers by bn_detection.convert_norm, or call "
                "to_plain_batch_norm first."
            )
        if self.options.train == "shared" and self._use_mini_batch():
            return self._normalize_together(features)
        return [
            self[level % len(self)](x, weight=weight, bias=bias)
            for level, (x, weight, bias) in enumerate(zip(features, *self._affine(), strict=True))
        ]

    @property
    def _owner(self) -> str:
        return self.name or type(self).__name__

    def _affine(self) -> tuple[list[Tensor], list[Tensor]]:
        """Scale and shift of each level."""
        if self.options.affine == "shared":
            return [self.weight] * self.num_levels, [self.bias] * self.num_levels
        return list(self.weights.unbind()), list(self.biases.unbind())

    def _use_mini_batch(self) -> bool:
        """Whether no item uses its population statistics."""
        training = [layer.training for layer in self]
        return all(training) or (
            not any(training) and all(layer.inference == "batch" for layer in self._layers)
        )

    @property
    def _layers(self) -> list[PartitionedBatchNorm2d]:
        return cast("list[PartitionedBatchNorm2d]", list(self))

    def _normalize_together(self, features: list[Tensor]) -> list[Tensor]:
        joined = torch.cat([x.flatten(2) for x in features], dim=2).unsqueeze(3)
        shared_affine = self.options.affine == "shared"
        weight, bias = (self.weight, self.bias) if shared_affine else (None, None)
        layers = self._layers
        first = layers[0]
        if len(layers) == 1 or not first.training:
            joined = first(joined, weight=weight, bias=bias)
        else:
            # Of rows that are images, so the groups of one level are those of all.
            groups, all_reduce = first.sharing(joined)
            kernels = first.kernels
            statistics = [
                group_statistics(x, groups, all_reduce, kernels=kernels) for x in features
            ]
            moves = [layer.observe(s) for layer, s in zip(layers, statistics, strict=True)]
            if not all(moves):
                return [
                    grouped_batch_norm(
                        x,
                        weight,
                        bias,
                        s,
                        groups,
                        first.eps,
                        all_reduce=all_reduce,
                        kernels=kernels,
                    )
                    for x, s, weight, bias in zip(
                        features, statistics, *self._affine(), strict=True
                    )
                ]
            for layer, s in zip(layers, statistics, strict=True):
                layer.move_running_statistics(s)
            joined = grouped_batch_norm(
                joined,
                weight,
                bias,
                merge_statistics(statistics),
                groups,
                first.eps,
                all_reduce=all_reduce,
                kernels=kernels,
            )
        # Not views of one tensor, or an in-place ReLU after the layer would be refused.
        sizes = [x.shape[2] * x.shape[3] for x in features]
        parts = torch.unsafe_split_with_sizes(joined, sizes, dim=2)
        outputs = [part.reshape(x.shape) for part, x in zip(parts, features, strict=True)]
        if shared_affine:
            return outputs
        return [
            torch.addcmul(bias[:, None, None], y, weight[:, None, None]).to(y.dtype)
            for y, weight, bias in zip(outputs, *self._affine(), strict=True)
        ]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        self._adapt_statistics(state_dict, prefix)
        if self.options.affine == "separate":
            for key, own in (("weight", "weights"), ("bias", "biases")):
                if f"{prefix}{key}" in state_dict:
                    shared = state_dict.pop(f"{prefix}{key}")
                    state_dict[f"{prefix}{own}"] = shared.expand(self.num_levels, -1)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _adapt_statistics(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Turn statistics of one level into those of all levels, or of all levels into one.

        One BN layer for all levels has them without a level, as in the checkpoints of Detectron2's
        project Rethinking-BatchNorm.
        """
        for key in _STATISTICS:
            if f"{prefix}{key}" in state_dict:
                state_dict[f"{prefix}0.{key}"] = state_dict.pop(f"{prefix}{key}")
        numbers = range(self.num_levels)
        levels = [level for level in numbers if f"{prefix}{level}.running_mean" in state_dict]
        if levels == [0]:
            for key in _STATISTICS:
                value = state_dict.get(f"{prefix}0.{key}")
                if value is not None:
                    state_dict.update({f"{prefix}{k}.{key}": value for k in range(len(self))})
        elif len(levels) == self.num_levels and len(self) == 1:
            logger.warning(
                "%s: the checkpoint has statistics of %d levels, and BN.LEVELS.POPULATION is "
                '"shared". They become those of an equal mixture of the levels; recalibrate the '
                "model (bn-detection recalibrate) to have those of the data.",
                prefix.rstrip(".") or self._owner,
                self.num_levels,
            )
            means, variances = (
                torch.stack([state_dict[f"{prefix}{k}.{key}"].double() for k in levels])
                for key in ("running_mean", "running_var")
            )
            mean = means.mean(0)
            state_dict[f"{prefix}0.running_mean"] = mean
            state_dict[f"{prefix}0.running_var"] = (variances + (means - mean).square()).mean(0)
            for level in levels[1:]:
                for key in _STATISTICS:
                    state_dict.pop(f"{prefix}{level}.{key}", None)
