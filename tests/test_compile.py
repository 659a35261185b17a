"""torch.compile: whole graphs for plain BN and for inference, one break a layer for groups."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from detectron2.layers import ShapeSpec
from reference import CHANNELS, assert_close, relative_error, samples, set_affine, step
from torch import nn
from torch.utils.checkpoint import checkpoint

from bn_detection.heads import BNConvFCHead, BNOptions
from bn_detection.norm import (
    LevelBatchNorm2d,
    PartitionedBatchNorm2d,
    partition_names,
    scope,
    set_rows_per_image,
)

PARTITIONS = ("worker", "world", "shuffle", "ghost", "image")


@pytest.fixture(autouse=True)
def compiles_anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(module: nn.Module, *, fullgraph: bool = True) -> nn.Module:
    return torch.compile(module, backend="aot_eager", fullgraph=fullgraph)


def head(norm: str, mode: str = "statistics") -> BNConvFCHead:
    torch.manual_seed(0)
    options = BNOptions(shuffle_seed=0, shuffle_mode=mode, ghost_size=2)
    shape = ShapeSpec(channels=CHANNELS, height=4, width=5)
    return BNConvFCHead(shape, conv_dims=[4, 4], fc_dims=[2], conv_norm=norm, bn_options=options)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_plain_bn_trains_in_one_graph(momentum: float | None) -> None:
    layers = [set_affine(PartitionedBatchNorm2d(CHANNELS, momentum=momentum)) for _ in range(2)]
    run = compiled(layers[0])
    for seed in (0, 2):
        x, grad = samples([6], seed)[0], samples([6], seed + 1)[0]
        inputs = [x.clone().requires_grad_() for _ in layers]
        for layer, each in zip((run, layers[1]), inputs, strict=True):
            layer(each).backward(grad)
        assert relative_error(inputs[0].grad, inputs[1].grad) < 1e-6
    assert_close(layers[0].state_dict(), layers[1].state_dict(), 1e-6)
    assert int(layers[0].num_batches_tracked) == 2


@pytest.mark.parametrize("inference", ["population", "batch"])
@pytest.mark.parametrize("partition", PARTITIONS)
def test_inference_is_one_graph(partition: str, inference: str) -> None:
    assert set(PARTITIONS) <= set(partition_names())
    layer = PartitionedBatchNorm2d(CHANNELS, partition=partition, inference=inference).eval()
    x = samples([4])[0]
    assert relative_error(compiled(layer)(x), layer(x)) < 1e-6


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "ShuffleBN", "GhostBN", "ImageBN", "BatchRenorm"])
@pytest.mark.parametrize("mode", ["statistics", "features"])
def test_inference_of_a_head_is_one_graph(norm: str, mode: str) -> None:
    module = head(norm, mode).eval()
    x = samples([4])[0]
    assert relative_error(compiled(module)(x), module(x)) < 1e-6


def test_inference_of_levels_is_one_graph() -> None:
    layer = LevelBatchNorm2d(CHANNELS, 2).eval()
    levels = [samples([2], shape=(side, side))[0] for side in (4, 2)]
    for y, expected in zip(compiled(layer)(levels), layer(levels), strict=True):
        assert relative_error(y, expected) < 1e-6


@pytest.mark.parametrize("norm", ["ShuffleBN", "GhostBN", "ImageBN", "BatchRenorm"])
def test_groups_break_the_graph_at_most_once_a_layer(norm: str) -> None:
    set_rows_per_image([4, 2])
    options = BNOptions(shuffle_seed=0, ghost_size=2, virtual_workers=2)
    shape = ShapeSpec(channels=CHANNELS, height=4, width=5)
    module = BNConvFCHead(shape, conv_dims=[4] * 3, fc_dims=[2], conv_norm=norm, bn_options=options)
    found = torch._dynamo.explain(module)(samples([6])[0])
    assert 0 < found.graph_break_count <= 3
    assert all("_grouped" in reason.reason for reason in found.break_reasons)


@pytest.mark.parametrize("partition", ["ghost", "image"])
def test_training_with_groups_is_that_of_eager(partition: str) -> None:
    set_rows_per_image([4, 2])
    x, grad = samples([6])[0], samples([6], seed=1)[0]
    layers = [set_affine(PartitionedBatchNorm2d(CHANNELS, partition=partition)) for _ in range(2)]
    for layer in layers:
        layer.scope.seed = layer.scope.own_seed = 0
    results = [step(layer, x, grad) for layer in (compiled(layers[0], fullgraph=False), layers[1])]
    actual = {key.removeprefix("_orig_mod."): value for key, value in results[0].items()}
    assert_close(actual, results[1], 1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("partition", ["worker", "ghost"])
def test_checkpointing_without_torchs_own_sign_of_a_backward(
    partition: str, reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scope, "_graph_task_id", None)
    plain, repeated = (
        set_affine(PartitionedBatchNorm2d(CHANNELS, partition=partition)) for _ in range(2)
    )
    for layer in (plain, repeated):
        layer.scope.seed = layer.scope.own_seed = 0
    x, grad = samples([6])[0], samples([6], seed=1)[0]
    expected = step(plain, x, grad)
    x = x.requires_grad_()
    checkpoint(repeated, x, use_reentrant=reentrant).backward(grad)
    assert_close(
        {"grad_x": x.grad, **repeated.state_dict()},
        {key: expected[key] for key in ("grad_x", *repeated.state_dict())},
    )
    assert int(repeated.num_batches_tracked) == 1
