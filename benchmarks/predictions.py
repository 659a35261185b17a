"""Does a diagnosis come true? Models are diagnosed, cured as it proposes, and compared.

Each case trains a small detector with one fault, or with none, and diagnoses it. What a finding
proposes is applied: its YAML in another training, or its statistics by bn-detection recalibrate.
The AP that this gains, with a bootstrap over images, stands against the cost that it named.

    python benchmarks/predictions.py --output-dir output/predictions
    python benchmarks/predictions.py --output-dir output/predictions --cases stale contrast

What is done is not repeated. ``predictions.json`` and ``predictions.png`` are written in the end.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import yaml
from detectron2.data import MetadataCatalog
from matplotlib.transforms import Bbox
from pycocotools.coco import COCO
from scipy.stats import spearmanr

from bn_detection.command_line import command_line
from bn_detection.engine import load_config
from bn_detection.engine.setup import installed_versions, register_datasets
from bn_detection.estimate import Estimate, resample
from bn_detection.files import replacing
from bn_detection.leakage.average_precision import mean_of_classes
from bn_detection.leakage.on_detections import ap_by_class
from bn_detection.shipped import find_config

RESAMPLES = 1000
NARROW = {
    "MODEL.MASK_ON": False,
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": 32,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 128,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 32,
    "BN.VIRTUAL_WORKERS": 2,
    "BN.VIRTUAL_LOSSES": True,
}


def steps(number: int, decay: float | None = 0.85) -> dict[str, Any]:
    """The length of a training, and where its step size falls."""
    at = () if decay is None else (int(decay * number),)
    return {"SOLVER.MAX_ITER": number, "SOLVER.STEPS": at}


MASK_RCNN = "quickstart/mask_rcnn_{}.yaml"
STALE = NARROW | steps(600, decay=None)


@dataclass(frozen=True)
class Case:
    """A model to diagnose.

    Attributes:
        about: what is wrong with it, if anything.
        config: to train it.
        overrides: of the config.
        of: the case whose model it has, or begins its own training from.
        trains: whether it is trained.
        images: overrides that name the images to diagnose and evaluate it on.
    """

    about: str
    config: str
    overrides: dict[str, Any]
    of: str = ""
    trains: bool = True
    images: dict[str, Any] = field(default_factory=dict)


def on(dataset: str) -> dict[str, Any]:
    """Images of a dataset, by its name with {} for the split."""
    return {f"DATASETS.{key}": [dataset.format(key.lower())] for key in ("TRAIN", "TEST")} | {
        "DATASETS.TEST": [dataset.format("val")]
    }


def corrupted(kind: str) -> dict[str, Any]:
    return on(f"leaky_shapes_{{}}@{kind}")


def leaky(about: str, number: int, dataset: str = "leaky_shapes_{}", **more: Any) -> Case:
    overrides = NARROW | steps(number) | on(dataset) | more
    return Case(about, MASK_RCNN.format("bn"), overrides)


HEAD_FROZEN = {"BN.CONVERT": [["roi_heads.box_head", "FrozenBN"]]}
LEVELS = {"MODEL.FPN.OUT_CHANNELS": 32}

CASES = {
    "leak, 1200 steps": leaky("an image a worker, early in the training", 1200),
    "leak, 2000 steps": leaky("an image a worker", 2000),
    "leak, seed 2": leaky("an image a worker, another seed", 2000, SEED=2),
    "leak, weak cast": leaky(
        "an image a worker, objects of an image alike in brightness by half as much",
        1600,
        "leaky_shapes(cast_std=20.0)_{}",
    ),
    "leak, correlated": leaky(
        "an image a worker, half of the objects of an image of one class",
        1600,
        "leaky_shapes(class_correlation=0.5)_{}",
    ),
    "leak, no other cue": leaky(
        "an image a worker, and nothing else tells the class",
        1200,
        "leaky_shapes_no_texture_{}",
    ),
    "shuffled": Case("nothing", MASK_RCNN.format("shuffle"), NARROW | steps(2000)),
    "stale": Case(
        "an EMA of too many steps",
        MASK_RCNN.format("syncbn"),
        STALE | {"BN.MOMENTUM": 0.003},
    ),
    "last batches": Case(
        "an EMA of too few steps", MASK_RCNN.format("syncbn"), STALE | {"BN.MOMENTUM": 0.5}
    ),
    "default EMA": Case("large steps to the end", MASK_RCNN.format("syncbn"), STALE),
    "levels, row 3": Case(
        "levels apart in training, one population",
        "quickstart/retinanet_separate_shared.yaml",
        LEVELS,
    ),
    "levels, row 2": Case(
        "levels together in training, a population each",
        "quickstart/retinanet_shared_separate.yaml",
        LEVELS,
    ),
    "levels, row 4": Case("nothing", "quickstart/retinanet_separate.yaml", LEVELS),
    **{
        name: Case(
            "statistics of clean images",
            MASK_RCNN.format("shuffle"),
            NARROW,
            of="shuffled",
            trains=False,
            images=corrupted(kind),
        )
        for name, kind in (
            ("contrast", "contrast:3"),
            ("noise", "gaussian_noise:3"),
            ("fog", "fog:1"),
        )
    },
    # docs/bccd.md says how its data are made.
    "blood cells": Case(
        "photographs, a frozen ImageNet backbone, an image a worker",
        "bccd/faster_rcnn_bn.yaml",
        {"BN.VIRTUAL_WORKERS": 2, "BN.VIRTUAL_LOSSES": True},
    ),
    "frozen, contrast": Case(
        "frozen statistics of clean images",
        MASK_RCNN.format("shuffle"),
        NARROW | HEAD_FROZEN,
        of="shuffled",
        trains=False,
        images=corrupted("contrast:3"),
    ),
    "frozen and tuned, contrast": Case(
        "frozen statistics of clean images, and the weights trained with them",
        MASK_RCNN.format("shuffle"),
        NARROW | HEAD_FROZEN | steps(400) | corrupted("contrast:3"),
        of="shuffled",
    ),
}


class Runner:
    """Runs commands of bn-detection in a folder, each once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def run(self, made: Path, command: str, *arguments: object) -> Path:
        """Run a command unless what it makes is there; its log lies beside that."""
        if made.exists():
            return made
        made.parent.mkdir(parents=True, exist_ok=True)
        log = made.with_suffix(".log")
        print(f"  {command}: {made.relative_to(self._folder)}", flush=True)
        with log.open("w") as file:
            ended = subprocess.run(
                command_line(command, *arguments), stdout=file, stderr=subprocess.STDOUT
            )
        # Of a diagnosis, 1 means that there are findings.
        if ended.returncode > (command == "diagnose"):
            sys.exit(f"error: {command} ended with {ended.returncode}; see {log}")
        return made

    def config(self, name: str, folder: str, *more: Mapping[str, Any]) -> list[object]:
        """The flag with a config: that of a case, and more of it, nested."""
        case, path = CASES[name], self._folder / name / folder / "case.yaml"
        content: dict[str, Any] = {"_BASE_": str(Path(find_config(case.config)).resolve())}
        for part in (_nested(case.overrides | case.images), *more):
            _merge(content, part)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(content))
        return ["--config-file", path]

    def weights(self, name: str) -> Path:
        """The checkpoint of a case."""
        case = CASES[name]
        if not case.trains:
            return self.weights(case.of)
        return self.train(name, "training")

    def train(self, name: str, folder: str, *more: Mapping[str, Any]) -> Path:
        """Train the model of a case, with more in its config."""
        begin = {"MODEL": {"WEIGHTS": str(self.weights(CASES[name].of))}} if CASES[name].of else {}
        output = self._folder / name / folder
        return self.run(
            output / "model_final.pth",
            *("train", *self.config(name, folder, begin, *more), "--resume"),
            *("OUTPUT_DIR", output),
        )

    def detections(self, name: str, folder: str, weights: Path, *more: Mapping[str, Any]) -> Path:
        """What a checkpoint finds in the images of a case."""
        output = self._folder / name / folder / "evaluation"
        kind = "batch" if "batch" in folder else "population"
        done = self.run(
            output / f"eval_{weights.stem}_{kind}" / "results.json",
            *("train", *self.config(name, folder, *more), "--eval-only"),
            *("OUTPUT_DIR", output, "MODEL.WEIGHTS", weights),
        )
        (found,) = done.parent.glob("*/coco_instances_results.json")
        return found

    def cures(self, name: str, finding: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
        """Do what a finding proposes; says what was done, and gives the detections."""
        folder, fix, weights = finding["id"], finding["fix"], self.weights(name)
        if folder == "BN201":
            of_batch = {"BN": {"INFERENCE": "batch"}}
            yield WITH_BATCH, self.detections(name, f"{folder} batch", weights, of_batch)
        if folder not in RECALIBRATED:
            # On other images than those of its training, another training is another model.
            if CASES[name].trains:
                again = self.train(name, folder, fix)
                yield TRAINED, self.detections(name, folder, again, fix)
            return
        # Frozen layers take part in a mixture alone.
        mix = ["--mix", "auto"] if "BN.CONVERT" in CASES[name].overrides else []
        modules = {"BN": {"MODULES": finding["layers"]}} if folder == "BN302" else fix
        output = self._folder / name / folder / "recalibrated.pth"
        self.run(
            output,
            *("recalibrate", *self.config(name, folder, modules), "--output", output, *mix),
            *("MODEL.WEIGHTS", weights),
        )
        levels = fix if folder == "BN205" else {}
        yield "recalibrated", self.detections(name, folder, output, levels)

    def measure(self, name: str) -> dict[str, Any]:
        """The findings of a case, and what came of each."""
        case, weights = CASES[name], self.weights(name)
        print(f"{name}: {case.about}", flush=True)
        path = self.run(
            self._folder / name / "diagnosis" / "diagnosis.json",
            *("diagnose", *self.config(name, "diagnosis"), "--overwrite"),
            *("--output-dir", self._folder / name / "diagnosis", "MODEL.WEIGHTS", weights),
        )
        diagnosis = json.loads(path.read_text())
        before = self.detections(name, "diagnosis", weights)
        findings = diagnosis["findings"] or [NO_FINDING]
        outcomes = []
        for finding in findings:
            for done, after in self.cures(name, finding):
                gain, aps = compare(truth_of(case), before, after)
                outcomes.append(
                    {
                        "finding": finding["id"],
                        "title": finding["title"],
                        "predicted": finding["cost"],
                        "cure": done,
                        "before": aps[0],
                        "after": aps[1],
                        "gain": gain.to_json(),
                    }
                )
        notes = [note["title"] for note in diagnosis["notes"] if note["id"] in RECALIBRATED]
        return {"case": name, "about": case.about, "outcomes": outcomes, "notes": notes}


TRAINED, WITH_BATCH = "trained again", "inference with the batch"
RECALIBRATED = ("BN103", "BN205", "BN302", "none")
"""Findings whose cure needs no training; of "none" that is what is tried in vain, or not."""
NO_FINDING: dict[str, Any] = {
    "id": "none",
    "title": "no finding",
    "layers": [],
    "cost": None,
    "fix": {"BN": {"POPULATION": {"ESTIMATOR": "pooled"}}},
}


def _nested(overrides: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in overrides.items():
        *parents, last = key.split(".")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = list(value) if isinstance(value, tuple) else value
    return nested


def _merge(into: dict[str, Any], more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, Mapping):
            _merge(into.setdefault(key, {}), value)
        else:
            into[key] = value


def truth_of(case: Case) -> COCO:
    """The objects of the images that a case is evaluated on."""
    options = case.overrides | case.images
    arguments = argparse.Namespace(config_file=find_config(case.config), opts=[])
    cfg = load_config(arguments)
    cfg.defrost()
    cfg.DATASETS.TEST = tuple(options.get("DATASETS.TEST", cfg.DATASETS.TEST))
    register_datasets(cfg)
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(MetadataCatalog.get(cfg.DATASETS.TEST[0]).json_file)


def compare(truth: COCO, before: Path, after: Path) -> tuple[Estimate, tuple[float, float]]:
    """Box AP gained, with an interval over the images, and both; percent."""
    ids = sorted(truth.imgs)
    weights = resample(len(ids), RESAMPLES)
    old, new = (
        mean_of_classes(ap_by_class(truth, ids, json.loads(path.read_text()), weights)["box_ap"])
        for path in (before, after)
    )
    return Estimate.of(new - old, len(ids)), (float(old[0]), float(new[0]))


def summarize(cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How the predictions fared: of cures without training, and of other trainings."""
    every = [{**o, "case": case["case"]} for case in cases for o in case["outcomes"]]
    found = [o for o in every if o["finding"] != "none"]
    silent = [o for o in every if o["finding"] == "none"]
    return {
        "models": len(cases),
        "findings": len({(o["case"], o["finding"]) for o in found}),
        "without training": _fared([o for o in found if o["cure"] != TRAINED]),
        "trained again": _fared([o for o in found if o["cure"] == TRAINED]),
        "models without a finding": len(silent),
        "of them, gains missed": [o["case"] for o in silent if o["gain"]["low"] > 0],
    }


def _fared(outcomes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The slope is of gain = slope x cost, least squares, with a bootstrap over the cures."""
    told = [o for o in outcomes if o["predicted"]]
    x, y = np.array([[o["predicted"]["value"], o["gain"]["value"]] for o in told]).T
    drawn = resample(len(x), RESAMPLES)
    slopes = (drawn @ (x * y)) / np.maximum(drawn @ (x * x), 1e-9)
    nothing = [o for o in outcomes if o["gain"]["low"] <= 0]
    return {
        "cures": len(outcomes),
        "with a likely cost": len(told),
        "slope": Estimate.of(slopes, len(x)).to_json(),
        "rank correlation": float(spearmanr(x, y).statistic),
        "mean absolute error": float(np.abs(x - y).mean()),
        "intervals that overlap": sum(_overlap(o["predicted"], o["gain"]) for o in told),
        "gained": len(outcomes) - len(nothing),
        "gained nothing for certain": [f"{o['case']}, {o['finding']}" for o in nothing],
    }


def _overlap(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    return one["low"] <= other["high"] and other["low"] <= one["high"]


def draw(cases: Sequence[Mapping[str, Any]], path: Path) -> None:
    """What was predicted, and what came: of cures without training, and of other trainings.

    A name that would lie over another one is left out.
    """
    every = [{**o, "case": case["case"]} for case in cases for o in case["outcomes"]]
    figure, both = plt.subplots(1, 2, figsize=(11, 5.2), sharex=True, sharey=True)
    titles = ("without training: recalibrated, or with the batch", "trained again with the YAML")
    labels = []
    for axes, title, trained in zip(both, titles, (False, True), strict=True):
        for o in every:
            if (o["cure"] == TRAINED) != trained:
                continue
            predicted = o["predicted"] or {"value": 0.0, "low": 0.0, "high": 0.0}
            color = COLORS[o["finding"]] if o["predicted"] else "0.6"
            (x, x_ends), (y, y_ends) = map(_bars, (predicted, o["gain"]))
            axes.errorbar(x, y, y_ends, x_ends, color=color, marker="o", ms=4, lw=1, capsize=2)
            place = {"textcoords": "offset points", "size": 7}
            labels.append((x, axes.annotate(o["case"], (x, y), (5, 3), **place)))
        axes.axline((0, 0), slope=1, color="0.7", lw=1, zorder=0)
        axes.axhline(0, color="0.85", lw=1, zorder=0)
        axes.set_title(title, size=10)
        axes.set_xlabel("likely cost that the finding names, points of box AP")
        axes.margins(0.12)
    both[0].set_ylabel("box AP gained by the cure, points")
    found = {o["finding"] for o in every}
    colors = {name: color for name, color in COLORS.items() if name in found}
    for label, color in {**colors, "no finding": "0.6"}.items():
        both[1].plot([], [], color=color, marker="o", ls="", label=label)
    both[1].legend(loc="upper left", frameon=False, fontsize=8)
    figure.tight_layout()
    figure.canvas.draw()
    shown: list[Bbox] = []
    for _, label in sorted(labels, key=lambda pair: -pair[0]):
        box = label.get_window_extent()
        label.set_visible(not any(box.overlaps(other) for other in shown))
        shown += [box] * label.get_visible()
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=110)


COLORS = {"BN103": "C0", "BN201": "C1", "BN202": "C2", "BN205": "C5", "BN302": "C3", "BN501": "C4"}


def _bars(estimate: Mapping[str, float]) -> tuple[float, list[list[float]]]:
    value = estimate["value"]
    return value, [[max(value - estimate["low"], 0)], [max(estimate["high"] - value, 0)]]


def main() -> None:
    """Run the cases, and write what came of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, default=Path("output", "predictions"))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    args = parser.parse_args()
    runner = Runner(args.output_dir.resolve())
    cases = [runner.measure(name) for name in args.cases]
    result = {"summary": summarize(cases), "cases": cases, "versions": installed_versions()}
    path = args.output_dir / "predictions.json"
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(result, indent=1) + "\n")
    draw(cases, args.output_dir / "predictions.png")
    print(json.dumps(result["summary"], indent=1))


if __name__ == "__main__":
    main()
