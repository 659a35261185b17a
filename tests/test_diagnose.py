"""The diagnosis: distances against their formula, findings of known causes, and the tool."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from browser import open_browser, open_page
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from PIL import Image
from test_train_net import QUICKSTART, overrides, parse
from tooling import ROOT, run_script, run_tool
from torch import Tensor, nn

from bn_detection import ConfigError, cli
from bn_detection.data import SinglePassLoader, make_leaky_shapes
from bn_detection.engine import check_config, diagnose, load_config, preflight_diagnosis
from bn_detection.engine.setup import register_datasets
from bn_detection.engine.trainer import Trainer
from bn_detection.heads import BNOptions, convert_norm
from bn_detection.leakage import Estimate
from bn_detection.leakage.diagnosis import Diagnosis
from bn_detection.leakage.diagnosis_page import page as page_of
from bn_detection.leakage.findings import (
    Evidence,
    Examined,
    Finding,
    conclude,
)
from bn_detection.leakage.layers import LayerReport, inspect_layers
from bn_detection.leakage.trial import Trial
from bn_detection.population import apply_statistics, collect_statistics

CONFIG = QUICKSTART / "mask_rcnn_bn.yaml"
IMAGES = 6


class Toy(nn.Module):
    """A layer that is called for each of two levels, one that is called once, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = FrozenBatchNorm2d(3)
        self.once = nn.BatchNorm2d(3)
        self.shared = nn.BatchNorm2d(3)

    def forward(self, batch: list[Tensor]) -> None:
        x = torch.stack(batch)
        self.frozen(x)
        self.once(x)
        for scale in (1, 3):
            self.shared(scale * x)


@pytest.fixture
def batches() -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    return [
        [spread * torch.randn(3, 4, 5, generator=generator) + 1 for _ in range(2)] for _ in range(8)
    ]


def distance(one: Tensor, mean: Tensor, var: Tensor, eps: float = 1e-5) -> float:
    """By the formula of docs/diagnosis.md, of the values ``(C, N)`` and other statistics."""
    std = (one.var(1) + eps).sqrt()
    shift = (mean - one.mean(1)) / std
    scale = ((var + eps).sqrt() / std).log()
    return math.sqrt((shift.square() + scale.square()).mean())


def values(batch: list[Tensor]) -> Tensor:
    return torch.stack(batch).double().transpose(0, 1).flatten(1)


def test_distances_are_those_of_the_formula(batches: list[list[Tensor]]) -> None:
    model = Toy().train()
    model.once.running_mean.fill_(2.0)
    model.frozen.running_var.fill_(4.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reports = {report.name: report for report in inspect_layers(model, batches, len(batches))}

    together = torch.cat([values(batch) for batch in batches], dim=1)
    mean, var = torch.full((3,), 2.0), torch.ones(3)
    once = reports["once"]
    assert once.ema_to_precise.value == pytest.approx(distance(together, mean, var), rel=1e-5)
    of_batches = [distance(together, v.mean(1), v.var(1)) for v in map(values, batches)]
    assert once.batch_to_precise.value == pytest.approx(sum(of_batches) / 8, rel=1e-5)
    assert once.batch_to_precise.low < sum(of_batches) / 8 < once.batch_to_precise.high
    assert (once.rows_per_batch, once.values_per_batch) == (2, 2 * 4 * 5)
    assert (once.sharing, once.rows, once.levels, once.dead) == ("worker", "images", (), ())

    frozen = reports["frozen"]
    expected = distance(together, torch.zeros(3), torch.full((3,), 4.0))
    assert frozen.ema_to_precise.value == pytest.approx(expected, rel=1e-5)
    assert not frozen.trains
    assert not frozen.is_initial

    scales = torch.cat([together, 3 * together], dim=1)
    levels = [distance(scales, x.mean(1), x.var(1)) for x in (together, 3 * together)]
    shared = reports["shared"]
    assert [level.value for level in shared.levels] == pytest.approx(levels, rel=1e-5)
    assert shared.levels_apart.value == pytest.approx(max(levels), rel=1e-5)
    assert shared.level_batches
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_frozen_layers_after_the_last_trained_one_see_all_batches(
    batches: list[list[Tensor]],
) -> None:
    class FrozenHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = nn.BatchNorm2d(3), FrozenBatchNorm2d(3)

        def forward(self, batch: list[Tensor]) -> None:
            x = torch.stack(batch)
            self.backbone(x)
            self.head(x)

    head = inspect_layers(FrozenHead().train(), batches, len(batches))[1]
    together = torch.cat([values(batch) for batch in batches], dim=1)
    expected = distance(together, torch.zeros(3), torch.ones(3))
    assert head.ema_to_precise.value == pytest.approx(expected, rel=1e-5)
    assert math.isfinite(head.ema_to_precise.low)


def test_interval_of_a_distance_covers_the_truth() -> None:
    """Statistics of the distribution itself: their distance from its samples is noise alone."""
    covered = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        model = Toy().train()
        samples = [[torch.randn(3, 4, 5, generator=generator)] for _ in range(16)]
        once = next(r for r in inspect_layers(model, samples, 16) if r.name == "once")
        covered += once.ema_to_precise.low == 0
    assert covered >= 18


def test_impossible_statistics(batches: list[list[Tensor]]) -> None:
    model = Toy().train()
    model.once.running_var[1] = -0.5
    model.shared.running_mean[2] = math.nan
    model.frozen.running_var[0] = math.inf
    found = {report.name: report.impossible for report in inspect_layers(model, batches, 8)}
    assert found == {"frozen": (0,), "once": (1,), "shared": (2,)}


def test_dead_channels(batches: list[list[Tensor]]) -> None:
    model = Toy().train()
    with torch.no_grad():
        model.once.weight[1] = 1e-6
    flat = [[x * torch.tensor([0.0, 1.0, 1.0])[:, None, None] for x in batch] for batch in batches]
    once = next(r for r in inspect_layers(model, flat, 8) if r.name == "once")
    assert once.dead == (0, 1)
    assert once.dead_weights == (1,)


def config(*more: object, config_file: Path = CONFIG) -> CfgNode:
    return load_config(parse(config_file, [str(part) for part in more]))


def estimate(value: float, half: float = 0.05) -> Estimate:
    return Estimate(value, value - half, value + half)


def layer(name: str = "roi_heads.box_head.conv1.norm", **changes: Any) -> LayerReport:
    described = {
        "kind": "BatchNorm2d",
        "channels": 64,
        "sharing": "worker",
        "spans_workers": False,
        "rows": "RoIs",
        "is_ours": False,
        "is_exact": True,
        "trains": True,
        "momentum": 0.1,
        "affine_frozen": False,
        "updates": 100,
        "is_initial": False,
        "is_folded": False,
        "ema_to_precise": estimate(0.05),
        "batch_to_precise": estimate(0.1),
    }
    return LayerReport(name=name, **(described | changes))


def probe(leakage: float, inconsistency: float, half: float = 1.0) -> dict[str, Any]:
    def metrics(value: float) -> dict[str, Any]:
        one = estimate(value, half).to_json()
        return {"accuracy": one, "box_ap": one, "mask_accuracy": one, "mask_ap": one}

    measured = {"leakage": metrics(leakage), "inconsistency": metrics(inconsistency)}
    measured["staleness"] = metrics(inconsistency - leakage)
    return {**measured, "images_per_worker": 2}


BACKBONE = "backbone.res2.0.conv1.norm"
CAUSES = {
    "box head reads": {"probe": probe(20, 30)},
    "mask head reads": {
        "probe": probe(20, 30),
        "layers": [layer("roi_heads.mask_head.mask_fcn1.norm")],
    },
    "running statistics of 1 layer": {"layers": [layer(ema_to_precise=estimate(0.6))]},
    "are impossible": {"layers": [layer(impossible=(3,))]},
    "never updated": {"layers": [layer(BACKBONE, is_initial=True)]},
    "look frozen": {"layers": [layer(BACKBONE, affine_frozen=True), layer()]},
    "frozen as they were built": {"layers": [layer(BACKBONE, trains=False, is_initial=True)]},
    "frozen statistics of 1 layer": {
        "layers": [layer(BACKBONE, trains=False, ema_to_precise=estimate(2.0))]
    },
    "each FPN level by itself": {
        "layers": [layer(BACKBONE, level_batches=True, levels_apart=estimate(1.0))]
    },
    "normalize all FPN levels together": {
        "more": ("MODEL.META_ARCHITECTURE", "BNRetinaNet"),
        "layers": [layer("head.cls_subnet.1.0", level_populations=True)],
    },
    "own running statistics": {
        "workers": 2,
        "averages_workers": False,
        "layers": [layer(batch_to_precise=estimate(0.6))],
    },
    "PreciseBN": {
        "workers": 2,
        "more": ("TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 2),
        "layers": [layer(batch_to_precise=estimate(0.6))],
    },
    "is dead": {"layers": [layer(dead=tuple(range(32)), dead_weights=tuple(range(32)))]},
    "not read its batch": {"probe": probe(0, 10)},
}


def examined(**changes: Any) -> Examined:
    cfg = config(*changes.pop("more", ()))
    given = {"layers": [layer()], "probe": None, "workers": 1, "averages_workers": True} | changes
    others = given.pop("others", [])
    return Examined(cfg, norm_layers=[*(x.name for x in given["layers"]), *others], **given)


@pytest.mark.parametrize("title", CAUSES)
def test_a_cause_is_found_and_its_config_can_be_used(title: str, tmp_path: Path) -> None:
    found, _ = conclude(examined(**CAUSES[title]))
    assert [title in finding.title for finding in found] == [True], found
    file = tmp_path / "fixed.yaml"
    file.write_text(f'_BASE_: "{CONFIG}"\n{found[0].yaml}')
    cfg = config(
        *CAUSES[title].get("more", ())[2:],  # the fix replaces the first
        "OUTPUT_DIR",
        tmp_path,
        config_file=file,
    )
    assert config().dump() != cfg.dump()
    check_config(cfg, num_workers=2, eval_only=False, resume=False)


def test_the_fix_of_a_leak_builds_the_head_it_names(tmp_path: Path) -> None:
    for workers, there, norm in (
        (2, False, "shuffle"),
        (2, True, None),
        (1, False, None),
    ):
        leaky = examined(probe=probe(20, 30), workers=workers, layers=[layer(spans_workers=there)])
        file = tmp_path / "fixed.yaml"
        file.write_text(f'_BASE_: "{CONFIG}"\n{conclude(leaky)[0][0].yaml}')
        head = Trainer.build_model(config(config_file=file)).roi_heads.box_head
        assert partitions(head) == ({"ShufflePartition"} if norm else set())


def partitions(head: nn.Module) -> set[str]:
    return {type(m.partition).__name__ for m in head.modules() if hasattr(m, "partition")}


@pytest.mark.parametrize("glob", ["*.norm", "roi_heads.box_head.conv*", "roi_heads"])
def test_the_fix_of_a_converted_head_comes_after_its_conversion(glob: str, tmp_path: Path) -> None:
    there = f'_BASE_: "{CONFIG}"\nBN: {{CONVERT: [["{glob}", "BN"]]}}\n'
    (tmp_path / "there.yaml").write_text(there)
    box = [layer(f"roi_heads.box_head.conv{k}.norm") for k in range(1, 5)]
    leaky = examined(
        more=("BN.CONVERT", [[glob, "BN"]]), probe=probe(20, 30), workers=2, layers=box
    )
    file = tmp_path / "fixed.yaml"
    file.write_text(f"_BASE_: there.yaml\n{conclude(leaky)[0][0].yaml}")
    head = Trainer.build_model(config(config_file=file)).roi_heads.box_head
    assert partitions(head) == {"ShufflePartition"}


def test_small_things_are_no_findings() -> None:
    for changes in (
        {},
        {"probe": probe(0.5, 0.5)},
        {"probe": probe(5, 5, half=6)},
        {"probe": probe(5, -5)},
        {"layers": [layer(ema_to_precise=Estimate(0.4, 0.1, 0.7))]},
        {"layers": [layer(ema_to_precise=Estimate(0.4, math.nan, math.nan))]},
        {"layers": [layer(updates=0)]},
        {"layers": [layer(dead=(1, 2))]},
        {"layers": [layer(BACKBONE, trains=False, ema_to_precise=estimate(0.5))]},
        {"layers": [layer(levels_apart=estimate(1.0))]},
        {"layers": []},
    ):
        assert conclude(examined(**changes))[0] == [], changes


def tried(gain: Estimate) -> Trial:
    return Trial(50, Estimate(30.0), Estimate(30 + gain.value), gain)


def test_the_worst_comes_first() -> None:
    found, _ = conclude(
        examined(
            probe=probe(5, 20),
            layers=[layer(ema_to_precise=estimate(0.6)), layer(BACKBONE, is_initial=True)],
            trials={"BN103": tried(estimate(15))},
        )
    )
    assert [finding.cost and round(finding.cost.value) for finding in found] == [20, 15, None]


def test_worse_is_what_costs_more_for_certain() -> None:
    trials = {"BN103": tried(Estimate(25, 1, 49))}
    layers = [layer(ema_to_precise=estimate(0.6))]
    found, _ = conclude(examined(probe=probe(5, 20), layers=layers, trials=trials))
    assert [(item.id, item.cost.value) for item in found] == [("BN201", 20), ("BN103", 25)]


def test_globs_take_no_other_layer() -> None:
    frozen = [layer(f"backbone.res2.{k}.norm", affine_frozen=k == 0) for k in range(2)]
    (found,), _ = conclude(examined(layers=[*frozen, layer()]))
    assert found.fix == {"BN": {"CONVERT": [["backbone.res2.0", "FrozenBN"]]}}


def test_globs_take_no_layer_of_another_kind() -> None:
    frozen = [layer("backbone.bottom_up.res2.norm", trains=False, is_initial=True)]
    others = ["backbone.fpn_output2.norm"]
    (found,), _ = conclude(examined(layers=frozen, others=others))
    assert found.fix["BN"] == {"CONVERT": [["backbone.bottom_up", "SyncBN"]]}


def test_conversions_of_several_findings_are_given_as_one_list(tmp_path: Path) -> None:
    both = [
        layer("backbone.res2.norm", trains=False, is_initial=True),
        layer("backbone.res3.norm", affine_frozen=True),
    ]
    found, notes = conclude(examined(layers=[*both, layer()]))
    lists = [finding.fix["BN"]["CONVERT"] for finding in found]
    assert lists == [[["backbone.res2", "SyncBN"]], [["backbone.res3", "FrozenBN"]]]
    of_all = yaml.safe_load(Diagnosis({}, both, None, found, notes, []).yaml_of_all)
    assert of_all["BN"]["CONVERT"] == [*lists[1], *lists[0]]
    assert of_all["MODEL"] == found[0].fix["MODEL"]
    found, notes = conclude(examined(layers=both[:1]))
    assert Diagnosis({}, both, None, found, notes, []).yaml_of_all == ""


class FiveLevels(nn.Module):
    """A layer of torch for five levels that differ."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3, momentum=None)

    def forward(self, batch: list[Tensor]) -> None:
        for level in range(5):
            self.norm(torch.stack(batch) + 4 * level)


def test_levels_that_are_normalized_apart_are_not_stale(batches: list[list[Tensor]]) -> None:
    model = FiveLevels().train()
    for batch in batches:
        model(batch)  # the EMA is up to date
    reports = inspect_layers(model, batches, len(batches))
    assert reports[0].ema_to_precise.low > 0.25
    found, _ = conclude(examined(layers=reports))
    assert ["each FPN level by itself" in finding.title for finding in found] == [True]


def test_one_batch_gives_a_note_and_no_finding_by_distance(batches: list[list[Tensor]]) -> None:
    model = Toy().train()
    model.once.running_mean.fill_(50.0)
    model.frozen.running_mean.fill_(50.0)
    reports = inspect_layers(model, batches[:1], 1)
    found, notes = conclude(examined(layers=reports, workers=2, averages_workers=False))
    assert ["never updated" in finding.title for finding in found] == [True]
    assert "nan" not in " ".join(item.text for item in found[0].evidence)
    (note,) = (note.title for note in notes if "without intervals" in note.title)
    assert "3 layers" in note
    assert "(frozen, once, shared)" in note


STATISTICS = {
    "BN103": layer(ema_to_precise=estimate(0.6)),
    "BN202": layer(level_batches=True, levels_apart=estimate(1.0)),
    "BN205": layer(level_populations=True),
    "BN302": layer(BACKBONE, trains=False, ema_to_precise=estimate(2.0)),
}


@pytest.mark.parametrize("rule", STATISTICS)
@pytest.mark.parametrize(
    ("gain", "severity", "cost"),
    [
        (None, "finding", None),
        (Estimate(8, 5, 11), "finding", 8),
        # Not told from nothing: frozen statistics are those of the training.
        (Estimate(2, -1, 5), {"BN302": "note"}, None),
        (Estimate(-1.9, -3, -0.8), "note", None),
        (Estimate(0.2, -0.3, 0.7), "note", None),
        (Estimate(3), {"BN302": "note"}, None),
    ],
)
def test_statistics_far_from_the_data_are_a_finding_if_their_cure_gains(
    rule: str, gain: Estimate | None, severity: Any, cost: float | None
) -> None:
    """BCCD's frozen backbone: 32 layers up to 3.7 standard deviations off, and nothing lost."""
    trials = {} if gain is None else {rule: tried(gain)}
    found, notes = conclude(examined(layers=[STATISTICS[rule]], trials=trials))
    if isinstance(severity, dict):
        severity = severity.get(rule, "finding")
    items = found if severity == "finding" else notes
    (item,) = [x for x in items if x.id == rule]
    assert len(found) == (severity == "finding")
    assert (item.cost and item.cost.value) == cost
    if gain is not None:
        said = " ".join([item.title, *(x.text for x in item.evidence)])
        assert f"{gain.value:+.1f}" in said


UNUSED = {
    "far from those of the data": {"layers": [layer(ema_to_precise=estimate(0.6))]},
    "were never updated": {"layers": [layer(is_initial=True)]},
    "levels": {"layers": [layer(level_batches=True, levels_apart=estimate(1.0))]},
    "workers": {
        "workers": 2,
        "averages_workers": False,
        "layers": [layer(batch_to_precise=estimate(0.6))],
    },
    "inconsistency": {"probe": probe(0, 10)},
}


@pytest.mark.parametrize("cause", UNUSED)
def test_population_statistics_that_inference_does_not_use_hurt_nobody(cause: str) -> None:
    assert len(conclude(examined(**UNUSED[cause]))[0]) == 1
    cured = ("BN.INFERENCE", "batch")
    found, notes = conclude(examined(**UNUSED[cause], more=cured))
    assert found == []
    if cause in ("far from those of the data", "were never updated"):
        assert any(cause in n.title and "BN.INFERENCE batch" in n.title for n in notes)
    elsewhere = (*cured, "BN.MODULES", ("backbone.*",))
    assert len(conclude(examined(**UNUSED[cause], more=elsewhere))[0]) == 1


def test_a_leak_costs_nothing_where_inference_uses_the_batch() -> None:
    (found,), _ = conclude(examined(probe=probe(20, 30), more=("BN.INFERENCE", "batch")))
    assert found.cost is None
    assert "population" not in " ".join(item.text for item in found.evidence)


def test_leakage_of_batches_of_one_image_is_that_of_another_mode() -> None:
    for sharing, told in (("image", True), ("worker", False)):
        _, notes = conclude(examined(probe=probe(0, 0), layers=[layer(sharing=sharing)]))
        assert any("own_image" in note.title for note in notes) == told


def test_a_leak_in_detections_is_found_in_any_layers() -> None:
    interval = Estimate(30.0, 29.0, 31.0).to_json()
    measured = {
        **{"on": "detections", "images_per_worker": 1, "batch_norms": ["head.cls_subnet.1"]},
        **{kind: {"box_ap": interval} for kind in ("leakage", "inconsistency", "staleness")},
    }
    dense = layer("head.cls_subnet.1", rows="images")
    layers = [dense, layer("other")]
    (found,), _ = conclude(examined(layers=layers, probe=measured, workers=2))
    assert (found.id, found.layers) == ("BN201", ("head.cls_subnet.1",))
    assert "The detector reads the rest of its own images" in found.title
    assert found.evidence[0].text.startswith("Box AP: 30.0 [29.0, 31.0] points better")
    assert found.fix == {"BN": {"CONVERT": [["head", "SyncBN"]]}}
    retinanet = examined(
        layers=[dense],
        probe=measured,
        workers=2,
        more=("MODEL.META_ARCHITECTURE", "RetinaNet"),
    )
    (found,), _ = conclude(retinanet)
    of_head = {"META_ARCHITECTURE": "BNRetinaNet", "RETINANET": {"NORM": "SyncBN"}}
    assert found.fix == {"MODEL": of_head}


def test_weights_that_do_not_decay_are_not_blamed() -> None:
    dead = layer(dead=tuple(range(32)), dead_weights=tuple(range(32)))
    for decay, key in ((1e-4, "WEIGHT_DECAY_NORM"), (0.0, "BASE_LR")):
        more = ("SOLVER.WEIGHT_DECAY_NORM", decay)
        (found,), _ = conclude(examined(layers=[dead], more=more))
        assert list(found.fix["SOLVER"]) == [key]


@pytest.mark.parametrize(
    ("norm", "spans"),
    [("BN", False), ("GhostBN", False), ("SyncBN", True), ("ShuffleBN", True), ("renorm", True)],
)
def test_layers_whose_batches_span_workers(
    norm: str, spans: bool, batches: list[list[Tensor]]
) -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    options = BNOptions(renorm_partition="shuffle")
    convert_norm(model, "BatchRenorm" if norm == "renorm" else norm, "0", options=options)
    images = [torch.stack(batch) for batch in batches]
    (report,) = inspect_layers(model.train(), images, len(images))
    assert report.spans_workers == spans


def test_workers_that_share_statistics_are_not_apart() -> None:
    precise_bn = ("TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 2)
    described = {"is_ours": True, "batch_to_precise": estimate(0.6), "spans_workers": True}
    for sharing in ("world", "shuffle"):
        shared = [layer(sharing=sharing, **described)]
        assert conclude(examined(workers=2, layers=shared, more=precise_bn)) == ([], [])


def test_workers_are_not_compared_by_batches_of_another_size() -> None:
    stock = layer(batch_to_precise=estimate(0.6))
    synchronized = layer(BACKBONE, sharing="world", spans_workers=True)
    found, (note,) = conclude(
        examined(workers=2, averages_workers=False, layers=[synchronized, stock])
    )
    assert found == []
    assert f"({stock.name})" in note.title
    (found,), _ = conclude(examined(workers=2, averages_workers=False, layers=[stock]))
    assert "own running statistics" in found.title


def test_group_norm_only_where_its_groups_divide_the_channels() -> None:
    for channels, norm in ((256, "GN"), (80, "LN")):
        apart = layer(BACKBONE, channels=channels, level_batches=True, levels_apart=estimate(1.0))
        (found,), _ = conclude(examined(layers=[apart]))
        assert found.fix == {"BN": {"CONVERT": [["backbone", norm]]}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds ``train`` and ``val``, and ``weights.pth`` with running statistics far off."""
    folder = tmp_path_factory.mktemp("diagnosed")
    for split in ("train", "val"):
        make_leaky_shapes(folder / split, IMAGES, seed=7, split=split)
    torch.manual_seed(0)
    model = build_model(config(*overrides(folder, folder)))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.fill_(5.0)
    torch.save({"model": model.state_dict()}, folder / "weights.pth")
    return folder


def tool(
    data: Path,
    output: Path,
    *more: object,
    flags: tuple[object, ...] = (),
    config_file: Any = CONFIG,
) -> int:
    """What the tool does; its exit status, unless it raises."""
    opts = overrides(data, output, "MODEL.WEIGHTS", data / "weights.pth", *more)
    flags = ("--config-file", config_file, "--output-dir", output, "--images", IMAGES, *flags)
    args = cli.parse(["diagnose", *map(str, flags), *opts])
    preflight_diagnosis(args)
    return diagnose(args)


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "diagnosis.json").read_text())


@pytest.mark.timeout(120)
def test_tool(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert tool(data, output, flags=("--num-gpus", 2)) == 1
    found = result(output)
    assert "running statistics of 6 layers" in " ".join(f["title"] for f in found["findings"])
    assert found["settings"]["images_per_worker"] == 1
    assert found["probe"]["images"] == IMAGES
    assert len(found["layers"]) == 6
    assert all(report["ema_to_precise"]["low"] > 0.25 for report in found["layers"])
    assert (output / "diagnosis.html").read_text().startswith("<!DOCTYPE html>")

    before = (output / "diagnosis.json").read_bytes()
    with pytest.raises(ConfigError, match="--overwrite"):
        tool(data, output)
    assert (output / "diagnosis.json").read_bytes() == before


@pytest.mark.timeout(120)
def test_shuffled_and_synchronized_batches_are_those_of_all_workers(
    data: Path, tmp_path: Path
) -> None:
    for norm, sharing, workers in (("ShuffleBN", "shuffle", 1), ("SyncBN", "world", 2)):
        more = ("MODEL.ROI_BOX_HEAD.NORM", norm, "MODEL.ROI_MASK_HEAD.NORM", "GN")
        output = tmp_path / norm
        tool(
            data,
            output,
            *more,
            "MODEL.MASK_ON",
            False,
            "MODEL.WEIGHTS",
            "",
            flags=("--num-gpus", 2),
        )
        layers = result(output)["layers"]
        assert {report["sharing"] for report in layers} == {sharing}
        # A random head proposes enough for 64 RoIs an image, one image a worker.
        assert layers[0]["rows_per_batch"] == pytest.approx(64 * workers, rel=0.2)


@pytest.mark.timeout(120)
def test_stock_syncbn_heads_on_a_cpu(data: Path, tmp_path: Path) -> None:
    heads = {"BOX": "FastRCNNConvFCHead", "MASK": "MaskRCNNConvUpsampleHead"}
    more = [
        part
        for head, name in heads.items()
        for key, value in (("NAME", name), ("NORM", "SyncBN"))
        for part in (f"MODEL.ROI_{head}_HEAD.{key}", value)
    ]
    assert tool(data, tmp_path / "out", *more, flags=("--num-gpus", 2)) == 1
    found = result(tmp_path / "out")
    assert {report["sharing"] for report in found["layers"]} == {"world"}
    assert len(found["probe"]["batch_norms"]) == 6


@pytest.mark.timeout(120)
def test_random_weights_and_no_labels(data: Path, tmp_path: Path) -> None:
    unlabelled = tmp_path / "unlabelled.json"
    content = json.loads((data / "train/annotations.json").read_text())
    unlabelled.write_text(json.dumps({**content, "annotations": []}))
    dataset = [[f"{tmp_path.name}_unlabelled", str(unlabelled), str(data / "train/images")]]
    more = ("DATASETS.COCO_JSON", dataset, "DATASETS.TRAIN", (dataset[0][0],))
    more = (*more, "DATASETS.TEST", (), "MODEL.WEIGHTS", "")
    assert tool(data, tmp_path / "out", *more) == 1
    found = result(tmp_path / "out")
    assert ["never updated" in finding["title"] for finding in found["findings"]] == [True]
    assert found["probe"] is None
    left_out = " ".join(found["left_out"])
    assert "no labels" in left_out
    assert "random weights" in left_out


@pytest.mark.timeout(120)
def test_keys_of_other_projects_are_named_and_passed_over(data: Path, tmp_path: Path) -> None:
    config_file = tmp_path / "theirs.yaml"
    config_file.write_text(
        f"_BASE_: {CONFIG}\nTHEIRS: {{DEPTH: 2}}\nMODEL: {{ROI_HEADS: {{THEIR_KEY: x}}}}\n"
    )
    more = ("MODEL.ROI_BOX_HEAD.NORM", "GN", "MODEL.ROI_MASK_HEAD.NORM", "GN", "MODEL.WEIGHTS", "")
    flags = ("--fail-on", "note")
    assert tool(data, tmp_path / "noted", *more, config_file=config_file, flags=flags) == 1
    assert tool(data, tmp_path / "out", *more, config_file=config_file) == 0
    (note,) = result(tmp_path / "out")["notes"]
    assert note["title"].endswith("MODEL.ROI_HEADS.THEIR_KEY, THEIRS, THEIRS.DEPTH.")
    with pytest.raises(ConfigError, match=r"MODEL\.TYPO"):
        tool(data, tmp_path / "typo", "MODEL.TYPO", 1)


@pytest.mark.timeout(120)
def test_model_without_bn_has_no_finding(data: Path, tmp_path: Path) -> None:
    norms = [f"MODEL.ROI_{head}_HEAD.NORM" for head in ("BOX", "MASK")]
    more = [part for key in norms for part in (key, "GN")]
    assert tool(data, tmp_path / "out", *more, "MODEL.WEIGHTS", "") == 0
    found = result(tmp_path / "out")
    assert "no BN layer" in found["verdict"]
    assert found["settings"]["statistics_from"].startswith("0 images")


@pytest.mark.timeout(120)
def test_weights_of_another_model_and_missing_datasets_are_refused(
    data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        tool(data, tmp_path / "out", "MODEL.ROI_BOX_HEAD.CONV_DIM", 32)
    assert "roi_heads.box_head.conv1.weight (64, 64, 3, 3) instead of (32, 64, 3, 3)" in str(
        error.value
    )
    with pytest.raises(ConfigError, match=r"missing.*roi_heads\.box_head\.conv5"):
        tool(data, tmp_path / "out", "MODEL.ROI_BOX_HEAD.NUM_CONV", 5)
    with pytest.raises(ConfigError, match="nowhere"):
        tool(data, tmp_path / "other", "DATASETS.TRAIN", ("nowhere",))
    assert not (tmp_path / "out" / "diagnosis.json").exists()
    assert not (tmp_path / "other").exists()


def test_an_error_is_no_finding() -> None:
    ended = run_tool("diagnose", "--config-file", "nowhere.yaml")
    assert ended.status == 2
    assert "error: --config-file nowhere.yaml" in ended.error


@pytest.mark.timeout(200)
def test_json_alone_is_on_stdout(data: Path, tmp_path: Path) -> None:
    command = [ROOT / "tools" / "diagnose.py", "--config-file", CONFIG]
    command += ["--output-dir", tmp_path / "out", "--images", 4, "--format", "json"]
    command += ["--fail-on", "never", *overrides(data, tmp_path / "out")]
    command += ["MODEL.WEIGHTS", data / "weights.pth"]
    done = run_script(*command, timeout=190)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed == result(tmp_path / "out")
    assert printed["findings"]
    assert "Wrote" in done.stderr


@pytest.mark.timeout(200)
def test_stock_config_of_the_model_zoo(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("detectron2.model_zoo")
    more = (
        *("MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.NUM_CLASSES", 4),
        *("MODEL.ROI_BOX_HEAD.NORM", "BN", "MODEL.ROI_BOX_HEAD.NUM_CONV", 1),
        *("INPUT.MIN_SIZE_TRAIN", (128,), "SOLVER.IMS_PER_BATCH", 2),
        *("DATALOADER.NUM_WORKERS", 0, "MODEL.FPN.NORM", "GN"),
    )
    name = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
    flags = ("--num-gpus", 2)
    assert tool(data, tmp_path / "out", *more, config_file=name, flags=flags) == 1
    found = result(tmp_path / "out")
    titles = " ".join(finding["title"] for finding in found["findings"])
    assert "53 layers are frozen as they were built" in titles
    assert "statistics of 1 layer were never updated" in titles
    assert any("[backbone.bottom_up, SyncBN]" in finding["yaml"] for finding in found["findings"])
    assert len(found["layers"]) == 54


@pytest.mark.timeout(200)
def test_stock_retinanet_of_the_model_zoo_with_syncbn_on_a_cpu(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("detectron2.model_zoo")
    more = (
        *("MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", "MODEL.RETINANET.NUM_CLASSES", 4),
        *("MODEL.RETINANET.NORM", "SyncBN", "MODEL.RETINANET.NUM_CONVS", 1),
        *("INPUT.MIN_SIZE_TRAIN", (128,), "SOLVER.IMS_PER_BATCH", 2),
        *("DATALOADER.NUM_WORKERS", 0),
    )
    name = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
    flags = ("--num-gpus", 2)
    assert tool(data, tmp_path / "out", *more, config_file=name, flags=flags) == 1
    layers = result(tmp_path / "out")["layers"]
    assert {report["sharing"] for report in layers} == {"frozen", "world, level"}
    assert len(layers) == 53 + 2 * 5
    assert all(report["ema_to_precise"] for report in layers)


def other_labels(data: Path, folder: Path, split: str, **changes: Any) -> list[object]:
    """Overrides for a split with other contents of its annotation file."""
    folder.mkdir()
    entries = [
        [f"{data.name}_{s}", f"{data}/{s}/annotations.json", f"{data}/{s}/images"]
        for s in ("train", "val")
    ]
    content = json.loads((data / split / "annotations.json").read_text())
    (folder / "labels.json").write_text(json.dumps(content | changes))
    name = f"{data.name}_{folder.name}"
    entries.append([name, str(folder / "labels.json"), str(data / split / "images")])
    key = {"train": "DATASETS.TRAIN", "val": "DATASETS.TEST"}[split]
    return ["DATASETS.COCO_JSON", entries, key, (name,)]


@pytest.mark.timeout(120)
def test_a_probe_that_cannot_run_leaves_the_statistics(data: Path, tmp_path: Path) -> None:
    content = json.loads((data / "val/annotations.json").read_text())
    crowds = [{**item, "iscrowd": 1} for item in content["annotations"]]
    classes = content["categories"] + [{"id": 99, "name": "fifth"}]
    for name, changes, flags, reason in (
        ("crowds", {"annotations": crowds}, (), "none of its 6 images has a labelled object"),
        ("classes", {"categories": classes}, (), "5 classes"),
        ("few", {"images": content["images"][:1]}, ("--num-gpus", 2), "needs 2 or more"),
    ):
        more = other_labels(data, tmp_path / name, "val", **changes)
        tool(data, tmp_path / name, *more, flags=flags)
        found = result(tmp_path / name)
        assert found["probe"] is None
        assert reason in " ".join(found["left_out"])
        assert all(report["ema_to_precise"] for report in found["layers"])


@pytest.mark.timeout(120)
def test_few_images_are_still_four_batches_and_two_probed_workers(
    data: Path, tmp_path: Path
) -> None:
    tool(data, tmp_path / "out", flags=("--num-gpus", 2, "--images", 1))
    found = result(tmp_path / "out")
    assert found["settings"]["statistics_from"].startswith("4 images")
    assert found["probe"]["images"] == 2
    assert all(report["batch_to_precise"]["low"] is not None for report in found["layers"])


@pytest.mark.timeout(120)
def test_too_few_images_for_a_batch_are_refused_by_name(data: Path, tmp_path: Path) -> None:
    more = ("MODEL.ROI_BOX_HEAD.NORM", "ShuffleBN", "SOLVER.IMS_PER_BATCH", 8)
    with pytest.raises(ConfigError, match=rf"{data.name}_train: its 6 images .* batch of 8 "):
        tool(data, tmp_path / "out", *more, flags=("--num-gpus", 8))


@pytest.mark.timeout(120)
def test_crowds_are_no_labels(data: Path, tmp_path: Path) -> None:
    content = json.loads((data / "train/annotations.json").read_text())
    crowds = [{**item, "iscrowd": 1} for item in content["annotations"]]
    more = other_labels(data, tmp_path / "of_crowds", "train", annotations=crowds)
    tool(data, tmp_path / "out", *more, "DATASETS.TEST", (), "MODEL.WEIGHTS", "")
    assert "of_crowds has no labels" in " ".join(result(tmp_path / "out")["left_out"])


@pytest.mark.timeout(120)
def test_statistics_of_proposals_are_compared_with_proposals(data: Path, tmp_path: Path) -> None:
    more = ("BN.POPULATION.ESTIMATOR", "pooled", "BN.POPULATION.ROIS", "inference")
    more = (*more, "MODEL.RPN.POST_NMS_TOPK_TEST", 20, "MODEL.WEIGHTS", "")
    tool(data, tmp_path / "out", *more, flags=("--num-gpus", 2))
    found = result(tmp_path / "out")
    assert "BN.POPULATION.ROIS" in " ".join(found["left_out"])
    box = [x for x in found["layers"] if "box_head" in x["name"]]
    assert {round(report["rows_per_batch"]) for report in box} == {20}


@pytest.mark.timeout(120)
def test_images_are_padded_as_in_training(tmp_path: Path) -> None:
    """Images of two orientations, which training does not pad to one size."""
    generator = torch.Generator().manual_seed(0)
    images, objects = [], []
    (tmp_path / "images").mkdir()
    for number in range(48):
        height, width = (64, 128) if number % 2 else (128, 64)
        pixels = torch.randint(180, 256, (height, width, 3), generator=generator)
        file = f"{number}.png"
        Image.fromarray(pixels.byte().numpy()).save(tmp_path / "images" / file)
        images.append({"id": number, "file_name": file, "height": height, "width": width})
        box = {"bbox": [10, 10, 20, 20], "area": 400, "iscrowd": 0}
        objects.append({"id": number + 1, "image_id": number, "category_id": 1, **box})
    classes = [{"id": k, "name": f"class{k}"} for k in range(1, 5)]
    content = {"images": images, "annotations": objects, "categories": classes}
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "images").symlink_to(tmp_path / "images")
        (tmp_path / split / "annotations.json").write_text(json.dumps(content))

    config_file = QUICKSTART / "retinanet_shared.yaml"
    more = ("INPUT.MIN_SIZE_TRAIN", (64,), "SOLVER.IMS_PER_BATCH", 8)
    cfg = config(*overrides(tmp_path, tmp_path, *more), config_file=config_file)
    register_datasets(cfg)
    model = build_model(cfg).train()
    alone = SinglePassLoader(cfg, labels=True, num_images=48, batch_size=1)
    with EventStorage(0):
        apply_statistics(model, collect_statistics(model, alone, alone.num_batches))
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")

    flags = ("--num-gpus", 4, "--images", 32)
    assert tool(tmp_path, tmp_path / "out", *more, config_file=config_file, flags=flags) == 0
    found = result(tmp_path / "out")
    assert {report["sharing"] for report in found["layers"]} == {"world"}
    assert max(report["ema_to_precise"]["value"] for report in found["layers"]) < 0.05
    assert found["probe"]["on"] == "detections"
    assert {*found["probe"]["batch_norms"]} == {report["name"] for report in found["layers"]}
    assert "own detections in" in (tmp_path / "out/diagnosis.html").read_text()


@pytest.mark.timeout(120)
def test_levels_that_share_population_statistics_alone(data: Path, tmp_path: Path) -> None:
    config_file = QUICKSTART / "retinanet_separate_shared.yaml"
    more = ("MODEL.WEIGHTS", "", "SOLVER.IMS_PER_BATCH", 2)
    tool(data, tmp_path / "out", *more, config_file=config_file)
    found = result(tmp_path / "out")
    assert all(report["level_batches"] and len(report["levels"]) == 3 for report in found["layers"])
    config_file = QUICKSTART / "retinanet_shared.yaml"
    tool(data, tmp_path / "shared", *more, config_file=config_file)
    layers = result(tmp_path / "shared")["layers"]
    assert all(not report["level_batches"] and len(report["levels"]) == 3 for report in layers)
    assert not any(report["level_populations"] for report in layers)
    config_file = QUICKSTART / "retinanet_shared_separate.yaml"
    tool(data, tmp_path / "apart", *more, config_file=config_file)
    found = result(tmp_path / "apart")
    assert all(report["level_populations"] for report in found["layers"])
    (finding,) = [x for x in found["findings"] if x["id"] == "BN205"]
    assert finding["fix"]["BN"] == {"LEVELS": {"TRAIN": "shared", "POPULATION": "shared"}}


SAMPLES = (
    Finding(
        *("BN201", "finding", "docs/diagnosis.md#bn201", "A <b>title</b>", ("a", "b")),
        *((Evidence("evidence"),), {"BN": {}}, "Do.", estimate(9)),
    ),
    Finding("BN203", "note", "docs/diagnosis.md#bn203", "a note"),
)


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Any]:
    layers = [
        layer(f"roi_heads.box_head.conv{k}.norm", ema_to_precise=estimate(k)) for k in (2, 10)
    ]
    finding, note = SAMPLES
    settings = {"config": "c.yaml", "weights": "w.pth", "versions": {"torch": "2"}}
    path = tmp_path / "diagnosis.html"
    path.write_text(page_of(Diagnosis(settings, layers, None, [finding], [note], ["why"])))
    with (
        open_browser() as browser,
        open_page(browser, path, viewport={"width": 390, "height": 800}) as p,
    ):
        yield p


def test_page_sorts_and_fits_a_phone(page: Any) -> None:
    assert page.locator("h3").inner_text() == "1. BN201: A <b>title</b>"
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    header = page.locator("#layers th", has_text="EMA to precise")
    header.locator("button").press("Enter")
    header.locator("button").press("Enter")
    assert header.get_attribute("aria-sort") == "descending"
    assert page.locator("#layers tbody th").first.inner_text() == "roi_heads.box_head.conv10.norm"
    page.fill("#filter", "conv2")
    assert page.locator("#layers tbody tr:visible").count() == 1


@pytest.mark.timeout(120)
def test_a_checkpoint_with_a_negative_variance_is_a_finding(data: Path, tmp_path: Path) -> None:
    state = torch.load(data / "weights.pth", weights_only=True)
    name = next(key for key in state["model"] if key.endswith("box_head.conv2.norm.running_var"))
    state["model"][name][0] = -1.0
    torch.save(state, tmp_path / "weights.pth")
    more = ("MODEL.WEIGHTS", tmp_path / "weights.pth")
    assert tool(data, tmp_path / "out", *more, flags=("--num-gpus", 2)) == 1
    titles = [finding["title"] for finding in result(tmp_path / "out")["findings"]]
    assert any("impossible" in title for title in titles), titles
