"""What a BN layer is: one answer in conversion, inference, population statistics and diagnosis."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fvcore.nn import update_bn_stats
from reference import CHANNELS, assert_close, normalize, relative_error, samples
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.convnext import LayerNorm2d

from bn_detection import convert_norm, to_plain_batch_norm
from bn_detection.leakage.layers import inspect_layers
from bn_detection.norm import PartitionedBatchNorm2d, set_inference, set_rows_per_image
from bn_detection.population import collect_statistics


class BNRelu(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


class BNAct(nn.BatchNorm2d):
    """As timm's ``BatchNormAct2d``: torch's forward written out, and an activation."""

    def forward(self, x: Tensor) -> Tensor:
        use_batch = self.training or (self.running_mean is None and self.running_var is None)
        if self.training:
            self.num_batches_tracked.add_(1)
        kept = (self.running_mean, self.running_var)
        return F.silu(
            F.batch_norm(
                x, *kept, self.weight, self.bias, use_batch, self.momentum or 0.0, self.eps
            )
        )


def two_layers(cls: type[nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(CHANNELS, 4, 3, padding=1), cls(4), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5)
    )


@pytest.mark.parametrize("cls", [BNRelu, BNAct])
def test_statistics_are_those_of_the_layers_own_forward(cls: type[nn.Module]) -> None:
    model, other = two_layers(cls), two_layers(cls)
    batches = samples([3, 5, 4])
    update_bn_stats(other, batches, len(batches))
    found = collect_statistics(model, batches, len(batches))
    for name in ("1", "3"):
        layer, count = other.get_submodule(name), found[name].count
        assert relative_error(found[name].mean, layer.running_mean) < 1e-5
        # fvcore's pooled variance is without N / (N - 1).
        assert relative_error(found[name].var * (count - 1) / count, layer.running_var) < 1e-5


@pytest.mark.parametrize("cls", [BNRelu, BNAct])
def test_inference_with_the_batch_keeps_what_a_layer_does_beside(cls: type[nn.Module]) -> None:
    model = two_layers(cls).eval()
    x = samples([4])[0]
    by_population = model(x)
    expected = copy.deepcopy(model)
    for layer in (expected[1], expected[3]):
        layer.running_mean, layer.running_var = None, None
    assert set_inference(model, "batch", ["*"]) == ["1", "3"]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert relative_error(model(x), expected(x)) < 1e-6
    assert type(model[1]) is cls
    assert_close(model.state_dict(), before, 0)
    again = copy.deepcopy(model)
    for each in (model, again):
        set_inference(each, "population", ["*"])
        assert relative_error(each(x), by_population) < 1e-6
    model.train()(x)  # as before
    assert int(model[1].num_batches_tracked) == 1


def test_a_layer_that_does_more_is_not_converted_and_named() -> None:
    with pytest.raises(ValueError, match=r"^1: a BNRelu does more than normalize"):
        convert_norm(two_layers(BNRelu), "ShuffleBN")
    patched = nn.Sequential(nn.BatchNorm2d(CHANNELS))
    patched[0].forward = lambda x: x
    with pytest.raises(ValueError, match=r"^0: a BatchNorm2d does more"):
        convert_norm(patched, "GN")


def test_layers_of_timm() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("efficientnet_lite0", features_only=True, pretrained=False)
    other = copy.deepcopy(model)
    batches = [torch.rand(number, 3, 64, 64) for number in (3, 5, 4)]
    update_bn_stats(other, batches, len(batches))
    found = collect_statistics(model, batches, len(batches))
    layers = {n: m for n, m in other.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert found.keys() == layers.keys() and len(layers) > 40
    for name, layer in layers.items():
        count = found[name].count
        # Some means are 0, but for rounding: those behind a layer without an activation.
        error = (found[name].mean - layer.running_mean).abs() / layer.running_var.sqrt()
        assert error.max() < 1e-5
        assert relative_error(found[name].var * (count - 1) / count, layer.running_var) < 1e-5
    with pytest.raises(ValueError, match="BatchNormAct2d does more than normalize"):
        convert_norm(model, "ShuffleBN")
    expected = copy.deepcopy(other.eval())
    for name in layers:
        layer = expected.get_submodule(name)
        layer.running_mean, layer.running_var = None, None
    assert set_inference(other, "batch", ["*"]) == list(layers)
    for one, two in zip(other(batches[0]), expected(batches[0]), strict=True):
        assert relative_error(one, two) < 1e-6


SHAPES: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "1d": (nn.BatchNorm1d, ()),
    "1d of sequences": (nn.BatchNorm1d, (7,)),
    "3d": (nn.BatchNorm3d, (2, 3, 2)),
    "sync, of vectors": (nn.SyncBatchNorm, ()),
    "sync, of videos": (nn.SyncBatchNorm, (2, 3, 2)),
}


def rows(shape: tuple[int, ...], number: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(number, CHANNELS, *shape, generator=generator) + 1


@pytest.mark.parametrize("name", SHAPES)
def test_layers_of_other_dimensions(name: str) -> None:
    """Converted, collected, at inference with the batch, and plain again."""
    cls, shape = SHAPES[name]
    x = rows(shape)
    maps = x.reshape(*x.shape[:2], -1, 1).double()
    model = nn.Sequential(cls(CHANNELS))
    found = collect_statistics(model, [x], 1)["0"]
    assert relative_error(found.mean, maps.mean((0, 2, 3))) < 1e-6
    assert relative_error(found.var, maps.transpose(0, 1).flatten(1).var(1)) < 1e-6
    (report,) = inspect_layers(model, [x[:3], x[3:]], 2)
    assert report.rows_per_batch == 3 and report.is_exact

    at_inference = copy.deepcopy(model).eval()
    set_inference(at_inference, "batch", ["*"])
    expected, _ = normalize(maps, torch.zeros(6))
    assert relative_error(at_inference(x), expected.reshape(x.shape)) < 1e-5

    set_rows_per_image([4, 2])
    assert convert_norm(model, "ImageBN", "0") == ["0"]
    ids = torch.tensor([0] * 4 + [1] * 2)
    expected, _ = normalize(maps, ids)
    y = model(x)
    assert y.shape == x.shape
    assert relative_error(y, expected.reshape(x.shape)) < 1e-4
    weights = pickle.loads(pickle.dumps(model.state_dict()))
    plain = to_plain_batch_norm(model)[0]
    assert isinstance(plain, nn.BatchNorm1d if len(shape) < 2 else nn.BatchNorm3d)
    assert plain.eval()(x).shape == x.shape
    assert_close(model.state_dict(), weights, 0)


def test_other_dimensions_than_a_layers_own_are_refused() -> None:
    model = nn.Sequential(nn.BatchNorm1d(CHANNELS))
    convert_norm(model, "GhostBN", "0")
    with pytest.raises(ValueError, match="0: expected 2D or 3D input"):
        model(rows((2, 2)))
    for norm in ("IN", "FrozenBN"):
        with pytest.raises(
            ValueError, match=f'^0: the input of a BatchNorm1d is not 4D, and "{norm}"'
        ):
            convert_norm(nn.Sequential(nn.BatchNorm1d(CHANNELS)), norm)


def test_lazy_layers_are_named_until_they_have_channels() -> None:
    model = nn.Sequential(nn.LazyBatchNorm2d())
    wrong = r"^0: a LazyBatchNorm2d has no channels before its first forward"
    for change in (
        lambda: convert_norm(model, "ShuffleBN"),
        lambda: set_inference(model, "batch", ["*"]),
        lambda: collect_statistics(model, [rows((2, 2))], 1),
    ):
        with pytest.raises(ValueError, match=wrong):
            change()
    model(rows((2, 2)))
    assert convert_norm(model, "ShuffleBN") == ["0"]


def test_layers_that_are_left_out_of_a_conversion_are_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    model = nn.Sequential(nn.LayerNorm(4), LayerNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS))
    assert convert_norm(model, "GhostBN") == ["1", "2"]
    assert "Normalization layers that stay as they are: 0 (LayerNorm)" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("norm", ["BN", "GN", "IN", "LN", "ShuffleBN"])
@pytest.mark.parametrize(
    "old",
    [nn.InstanceNorm2d(32), nn.GroupNorm(32, 32, affine=False)],
    ids=lambda m: type(m).__name__,
)
def test_new_parameters_are_as_those_around_them(
    old: nn.Module, norm: str, dtype: torch.dtype
) -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 32, 1), copy.deepcopy(old))).to(dtype)
    convert_norm(model, norm)
    x = torch.randn(4, 3, 5, 5, dtype=dtype)
    assert model(x).dtype == dtype
    assert {p.dtype for p in model.parameters()} == {dtype}


def hooked(model: nn.Module, name: str) -> tuple[list[str], list[Any]]:
    seen: list[str] = []
    layer = model.get_submodule(name)
    handles = [
        layer.register_forward_pre_hook(lambda *_: seen.append("before")),
        layer.register_forward_hook(lambda *_: seen.append("after")),
        layer.register_full_backward_hook(lambda *_: seen.append("backward")),
    ]
    return seen, handles


@pytest.mark.parametrize(
    "change",
    [
        lambda model: convert_norm(model, "GhostBN"),
        lambda model: convert_norm(model, "GN"),
        lambda model: set_inference(model, "batch", ["*"]),
        lambda model: to_plain_batch_norm(model) and convert_norm(model, "LN"),
    ],
)
def test_hooks_of_a_user_stay(change: Callable[[nn.Module], Any]) -> None:
    model = nn.Sequential(nn.BatchNorm2d(32))
    seen, handles = hooked(model, "0")
    change(model)
    x = torch.randn(4, 32, 3, 3, requires_grad=True)
    model(x).sum().backward()
    assert seen == ["before", "after", "backward"]
    to_plain_batch_norm(model)(x).sum().backward()
    assert len(seen) == 6
    for handle in handles:
        handle.remove()
    model(x)
    assert len(seen) == 6


def test_after_torchs_own_conversion_nothing_of_a_scope_stays() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(CHANNELS, 4, 1), nn.BatchNorm2d(4)))
    convert_norm(model, "ShuffleBN", "0")
    assert model[0]._forward_pre_hooks
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model(samples([4])[0])
    assert not model[0]._forward_pre_hooks and not model[0]._forward_hooks


def test_after_plain_norms_a_pickle_has_nothing_of_this_package() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(CHANNELS, 4, 1), nn.BatchNorm2d(4)))
    convert_norm(model, "ShuffleBN", "0")
    model(samples([4])[0])
    to_plain_batch_norm(model)
    assert b"bn_detection" not in pickle.dumps(model)


class Chunks(nn.Module):
    """A head that works on five rows at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.norm(part) for part in x.split(5)])


class Retries(Chunks):
    """A model that tries again after whatever went wrong."""

    def forward(self, x: Tensor) -> Tensor:
        try:
            return super().forward(x)
        except Exception:
            return super().forward(x)


@pytest.mark.parametrize("cls", [Chunks, Retries])
def test_every_value_counts_once(cls: type[nn.Module]) -> None:
    batches = samples([4, 10, 12], shape=(3, 3))
    found = collect_statistics(cls(), batches, 3)["norm"]
    assert found.count == 26 * 9
    together = torch.cat(batches).double()
    assert relative_error(found.mean, together.mean((0, 2, 3))) < 1e-6


def test_batches_of_images_and_targets() -> None:
    class WithTargets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(CHANNELS)

        def forward(self, x: Tensor, targets: Tensor) -> Tensor:
            return self.norm(x).sum() * targets.sum()

    pairs = [(x, torch.zeros(len(x))) for x in samples([3, 5])]
    found = collect_statistics(WithTargets(), pairs, 2, forward=lambda model, batch: model(*batch))[
        "norm"
    ]
    assert found.count == 8 * 20


def test_images_of_one_head_are_not_those_of_the_next() -> None:
    heads = []
    for _ in range(2):
        head = nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS))
        outer = nn.Sequential(head)
        convert_norm(outer, "ImageBN", "0", rows_are_images=False)
        heads.append(outer)
    set_rows_per_image([3, 1])
    heads[0](samples([4])[0])
    with pytest.raises(ValueError, match="nothing says which image each belongs to"):
        heads[1](samples([4])[0])


def test_a_module_that_is_never_called_names_the_pattern_that_works() -> None:
    class Iterates(nn.Module):
        """As ultralytics' models do it."""

        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(*(nn.Sequential(nn.BatchNorm2d(CHANNELS)) for _ in range(2)))

        def forward(self, x: Tensor) -> Tensor:
            for part in self.model:
                x = part(x)
            return x

    model = Iterates()
    convert_norm(model, "GhostBN", "model")
    with pytest.raises(RuntimeError, match=r'with the pattern "model\.\*" in place of "model"'):
        model(samples([4])[0])
    model = Iterates()
    convert_norm(model, "GhostBN", "model.*")
    assert model(samples([4])[0]).shape == (4, CHANNELS, 4, 5)


def test_levels_whose_layers_torch_replaced_say_so() -> None:
    from bn_detection.norm import LevelBatchNorm2d

    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(LevelBatchNorm2d(CHANNELS, 2)))
    with pytest.raises(TypeError, match="replaced by SyncBatchNorm, which knows nothing of levels"):
        model([samples([2])[0], samples([2])[0]])
    assert not any(isinstance(m, PartitionedBatchNorm2d) for m in model.modules())
