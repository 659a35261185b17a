"""Training steps of the whole quickstart detector, on real and on virtual workers.

The sampled anchors and RoIs are held fixed: they follow from the ground truth. With free sampling
rounding changes them, and two ways to compute the same step cannot be compared. For the same reason
steps are compared in float64: in float32 ten steps amplify a rounding that a ReLU cuts off.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetMapper
from detectron2.data.datasets import load_coco_json
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from distributed import run_workers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bn_detection import add_bn_detection_config, configure_model
from bn_detection.data import make_leaky_shapes

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart"
NARROW: dict[str, Any] = {
    "MODEL.ROI_BOX_HEAD.CONV_DIM": 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
}

Image = dict[str, Any]
Tensors = dict[str, Tensor]
Run = dict[str, Tensors]


def config(kind: str, options: dict[str, Any]) -> CfgNode:
    cfg = get_cfg()
    add_bn_detection_config(cfg)
    cfg.merge_from_file(str(QUICKSTART / f"mask_rcnn_{kind}.yaml"))
    cfg.merge_from_list([part for pair in (NARROW | options).items() for part in pair])
    return cfg


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Image]:
    """Two images with different numbers of objects, as the quickstart's loader gives them."""
    folder = tmp_path_factory.mktemp("data") / "train"
    make_leaky_shapes(folder, 8, seed=7, split="train")
    dicts = load_coco_json(str(folder / "annotations.json"), str(folder / "images"), "detector")
    dicts.sort(key=lambda image: len(image["annotations"]))
    mapper = DatasetMapper(config("bn", {}), is_train=True)
    return [mapper(dicts[0]), mapper(dicts[-1])]


def proposals(targets: Instances) -> Instances:
    """Boxes at and around the objects, then a grid over the image."""
    steps = torch.tensor([0.0, -5.0, 5.0])
    shifts = torch.cartesian_prod(steps, steps).repeat(1, 2)
    near = (targets.gt_boxes.tensor[:, None] + shifts).reshape(-1, 4)
    corners = torch.cartesian_prod(*2 * [torch.arange(0.0, 100.0, 25.0)])
    result = Instances(targets.image_size)
    result.proposal_boxes = Boxes(torch.cat([near, torch.cat([corners, corners + 25], dim=1)]))
    result.proposal_boxes.clip(targets.image_size)
    result.objectness_logits = torch.zeros(len(result.proposal_boxes))
    return result


def first_ones(
    labels: Tensor, number: int, positive_fraction: float, background: int
) -> tuple[Tensor, Tensor]:
    """Detectron2's ``subsample_labels`` without chance."""
    positive = ((labels != -1) & (labels != background)).nonzero()[:, 0]
    positive = positive[: int(number * positive_fraction)]
    return positive, (labels == background).nonzero()[: number - len(positive), 0]


@contextmanager
def samples_held_fixed(model: nn.Module) -> Iterator[None]:
    rpn, roi_heads = model.proposal_generator, model.roi_heads
    sample = roi_heads.label_and_sample_proposals

    def of_targets(_: None, targets: list[Instances]) -> list[Instances]:
        return sample([proposals(of_image) for of_image in targets], targets)

    with ExitStack() as stack:
        for module in ("proposal_generator.rpn", "roi_heads.roi_heads"):
            name = f"detectron2.modeling.{module}.subsample_labels"
            stack.enter_context(mock.patch(name, first_ones))
        stack.enter_context(mock.patch.object(rpn, "predict_proposals", lambda *_: None))
        stack.enter_context(mock.patch.object(roi_heads, "label_and_sample_proposals", of_targets))
        yield


def train(
    rank: int,
    world_size: int,
    kind: str,
    options: dict[str, Any],
    batches: list[list[Image]],
    steps: int = 1,
    dtype: torch.dtype = torch.float64,
    ddp: bool = True,
) -> Run:
    """Train with one batch a worker.

    Returns:
        The losses, gradients and running statistics of the first step, and the last parameters.
    """
    cfg = config(kind, {**options, "SOLVER.WARMUP_ITERS": 0})
    torch.manual_seed(0)
    model = configure_model(cfg, build_model(cfg)).to(dtype).train()
    box, mask = model.roi_heads.box_predictor, model.roi_heads.mask_head
    for predictor in (box.cls_score, box.bbox_pred, mask.predictor):
        # Detectron2's are so near zero that the losses hardly depend on the RoIs.
        nn.init.normal_(predictor.weight, std=0.1)
    network = DistributedDataParallel(model) if ddp and world_size > 1 else model
    optimizer = build_optimizer(cfg, model)
    first: Run = {}
    with samples_held_fixed(model), EventStorage() as storage:
        for _ in range(steps):
            losses = network(batches[rank])
            optimizer.zero_grad()
            sum(losses.values()).backward()
            first = first or {
                "losses": {name: loss.detach() for name, loss in losses.items()},
                "gradients": {
                    name: parameter.grad.clone()
                    for name, parameter in model.named_parameters()
                    if parameter.grad is not None
                },
                "statistics": {
                    name: buffer.clone()
                    for name, buffer in model.named_buffers()
                    if "running" in name
                },
            }
            optimizer.step()
            storage.step()
    return {**first, "parameters": {name: p.detach() for name, p in model.named_parameters()}}


def largest_error(actual: Tensors, expected: Tensors) -> float:
    """Of all tensors, each relative to its largest value."""
    assert actual.keys() == expected.keys() != set()
    return max(
        float((actual[name] - right).abs().max() / right.abs().max())
        for name, right in expected.items()
    )


def mean(runs: list[Run], what: str) -> Tensors:
    return {name: sum(run[what][name] for run in runs) / len(runs) for name in runs[0][what]}


@pytest.mark.parametrize("kind", ["bn", "shuffle", "syncbn"])
@pytest.mark.timeout(180)
def test_a_step_on_virtual_workers_is_that_of_ddp_workers(kind: str, images: list[Image]) -> None:
    workers = run_workers(train, 2, kind, {}, [[image] for image in images])
    options = {"BN.VIRTUAL_WORKERS": 2}
    run = train(0, 1, kind, {**options, "BN.VIRTUAL_LOSSES": True}, [images])
    # Detectron2 computes the mask loss in float32, whatever the logits are.
    for what, tolerance in {"losses": 1e-6, "gradients": 1e-10, "statistics": 1e-10}.items():
        assert largest_error(run[what], mean(workers, what)) < tolerance, what
    unequal = train(0, 1, kind, options, [images])
    for what in ("losses", "gradients"):
        assert largest_error(unequal[what], run[what]) > 1e-3, what


@pytest.mark.timeout(180)
def test_shuffling_by_statistics_is_shuffling_by_features(images: list[Image]) -> None:
    batches = [[image] for image in images]
    by_statistics, by_features = (
        run_workers(train, 2, "shuffle", {"BN.SHUFFLE.MODE": mode}, batches, 10)[0]
        for mode in ("statistics", "features")
    )
    for what in ("gradients", "parameters"):
        assert largest_error(by_features[what], by_statistics[what]) < 1e-10, what
    of_workers = run_workers(train, 2, "bn", {}, batches)[0]
    assert largest_error(of_workers["gradients"], by_statistics["gradients"]) > 1e-2


@pytest.mark.timeout(180)
def test_modes_of_shuffling_agree_in_single_precision(images: list[Image]) -> None:
    batches = [[image] for image in images]
    found = []
    for seed in range(5):
        gradients = []
        for mode in ("statistics", "features"):
            options = {"SEED": seed, "BN.SHUFFLE.MODE": mode}
            runs = run_workers(train, 2, "shuffle", options, batches, 1, torch.float32)
            gradients.append(runs[0]["gradients"])
        found.append(largest_error(*gradients))
    # Not each: now and then rounding takes an activation to the other side of a ReLU.
    assert statistics.median(found) < 1e-4


@pytest.mark.parametrize(
    ("norm", "mode"),
    [
        *((norm, "statistics") for norm in ("BN", "SyncBN", "ShuffleBN", "GhostBN", "ImageBN")),
        *((norm, "statistics") for norm in ("BatchRenorm", "IN", "LN")),
        ("ShuffleBN", "features"),
    ],
)
@pytest.mark.timeout(180)
def test_a_worker_without_a_foreground_roi(norm: str, mode: str, images: list[Image]) -> None:
    empty = {**images[0], "instances": images[0]["instances"][:0]}
    options = {
        "MODEL.ROI_BOX_HEAD.NORM": norm,
        "MODEL.ROI_MASK_HEAD.NORM": norm,
        "BN.SHUFFLE.MODE": mode,
        "BN.RENORM.WARMUP_ITERS": 0,
        "BN.RENORM.R_ITERS": 1,
        "BN.RENORM.D_ITERS": 1,
    }
    # Without DDP, so that each worker has gradients of its own.
    runs = run_workers(train, 2, "bn", options, [[empty], [images[1]]], 2, torch.float32, False)
    for run in runs:
        for what in ("losses", "gradients", "parameters"):
            assert all(tensor.isfinite().all() for tensor in run[what].values()), what
        assert run["gradients"].keys() == run["parameters"].keys()
    without, with_masks = (
        {what: {n: t for n, t in tensors.items() if "mask" in n} for what, tensors in run.items()}
        for run in runs
    )
    assert without["losses"]["loss_mask"] == 0 < with_masks["losses"]["loss_mask"]
    assert all(gradient.any() for gradient in with_masks["gradients"].values())
    if mode == "statistics":
        assert not any(gradient.any() for gradient in without["gradients"].values())
    for name, moved in with_masks["statistics"].items():
        initial = float("var" in name)
        assert moved.ne(initial).all()
        if norm in ("SyncBN", "ShuffleBN"):
            assert without["statistics"][name].ne(initial).all()
        else:
            assert without["statistics"][name].eq(initial).all()
