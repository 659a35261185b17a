"""``--model`` of the command line: any torch model, with its weights and images."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models import detection

from ..config import ConfigError, one_line
from ..files import make_folder, replacing
from ..imports import import_module_of_user
from ..leakage.diagnosis import Diagnosis
from ..leakage.diagnosis_formats import render_diagnosis
from ..leakage.findings import rules
from ..leakage.layers import batch_norms
from ..pickles import why_not_loaded
from ..words import listed
from .diagnosing import diagnose
from .images import Data
from .measuring import measure_leakage
from .recalibrating import recalibrate

_TORCHVISION = "torchvision:"
_IMAGES, _QUICK_IMAGES = 512, 64


def diagnose_model(args: argparse.Namespace) -> int:
    """``bn-detection diagnose --model``; the exit status is as with ``--config-file``."""
    folder = Path(args.output_dir or Path("output", f"diagnosis_{_stem(args)}"))
    outputs = [folder / name for name in ("diagnosis.json", "diagnosis.html")]
    for path in outputs:
        if path.exists() and not args.overwrite:
            raise ConfigError(f"{path} exists. Give another --output-dir, or --overwrite.")
    in_text = args.format == "text"
    with nullcontext() if in_text else redirect_stdout(sys.stderr):
        model = load_model(args)[0]
        data = data_of(args) if batch_norms(model) else ()
        found: Diagnosis = _said(
            lambda: diagnose(
                model,
                data,
                images_per_worker=args.images_per_gpu,
                workers=args.workers or 1,
                num_images=args.images or (_QUICK_IMAGES if args.quick else _IMAGES),
            )
        )
    vars(found)["settings"] |= {"model": args.model, "weights": args.weights or ""}
    make_folder(folder, f"--output-dir {folder}")
    from ..leakage.diagnosis_page import page

    known = rules.registered_rules()
    for path, text in zip(
        outputs, (render_diagnosis(found, "json", known) + "\n", page(found)), strict=True
    ):
        with replacing(path) as file:
            file.write_text(text, encoding="utf-8")
    print(render_diagnosis(found, args.format, known))
    print(f"Wrote {outputs[0]} and {outputs[1]}", file=sys.stderr)
    shown = {"finding": found.findings, "note": [*found.findings, *found.notes]}
    return 1 if shown.get(args.fail_on) else 0


def probe_model(args: argparse.Namespace) -> None:
    """``bn-detection probe --model``: on detections."""
    for asked, flag in ((args.on == "rois", "--on rois"), (args.by_layer, "--by-layer")):
        if asked:
            raise ConfigError(
                f"{flag}: the RoIs of a training sampler are known with --config-file."
            )
    output = _output(args, ".json")
    model = load_model(args)[0]
    if not batch_norms(model):
        print(_NOTHING)
        return
    data = data_of(args)
    report = _said(
        lambda: measure_leakage(
            model, data, images_per_worker=args.images_per_gpu, by_class=args.by_class
        )
    )
    _write_json(output, report.to_json())
    print(f"{report.text()}\nWrote {output}")


def recalibrate_model(args: argparse.Namespace) -> None:
    """``bn-detection recalibrate --model``."""
    for flag in ("images", "dataset", "mix", "keep_if_better"):
        if getattr(args, flag):
            raise ConfigError(
                f"--{flag.replace('_', '-')} goes with --config-file. --model has its images from "
                "--coco or --image-folder."
            )
    output = _output(args, ".pth")
    model, checkpoint = load_model(args)
    if not batch_norms(model):
        print(_NOTHING)
        return
    data = data_of(args)
    made = _said(lambda: recalibrate(model, data, images_per_batch=args.images_per_gpu))
    print(made.text())
    if not made.layers:
        return
    state = model.state_dict()
    with replacing(output) as file:
        torch.save({**checkpoint, "model": state} if "model" in checkpoint else state, file)
    settings = {"model": args.model, "weights": args.weights or ""}
    record = made.to_json()
    _write_json(output.with_suffix(".json"), record | {"settings": settings | record["settings"]})
    print(f"Wrote {output} and {output.with_suffix('.json')}")


_NOTHING = "The model has no BN layer: nothing leaks through one, and there is nothing to change."


def load_model(args: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """The model of ``--model``, with ``--weights``, on a GPU where there is one.

    Args:
        args: with ``model``, ``weights``, ``num_classes`` and ``opts``.

    Returns:
        The model, and what else is in the file of its weights.

    Raises:
        ConfigError: the model cannot be imported or built, or is no module; the weights cannot be
            read or are of another model; an override of a config.
    """
    if args.opts:
        raise ConfigError(
            f"KEY VALUE overrides {' '.join(args.opts)}: they are of --config-file, and --model "
            "has no config."
        )
    for module in args.imports:
        import_module_of_user(module, f"--import {module}")
    model = _build(args)
    checkpoint = _load_weights(model, args.weights) if args.weights else {}
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), checkpoint


def data_of(args: argparse.Namespace) -> Data:
    """The images of ``--coco`` or of ``--image-folder``.

    Raises:
        ConfigError: neither is given.
    """
    if args.coco:
        return args.coco[0], args.coco[1]
    if args.image_folder:
        return str(args.image_folder)
    raise ConfigError("--model needs images: --coco annotations.json images/, or --image-folder.")


def _build(args: argparse.Namespace) -> nn.Module:
    what = f"--model {args.model}"
    if args.model.startswith(_TORCHVISION):
        name = args.model.removeprefix(_TORCHVISION)
        known = sorted(key for key in vars(detection) if key.endswith(("fpn", "fpn_v2")))
        known += ["ssd300_vgg16", "ssdlite320_mobilenet_v3_large"]
        if name not in known:
            raise ConfigError(f"{what}: torchvision's detectors are {', '.join(known)}.")
        classes = {} if args.num_classes is None else {"num_classes": args.num_classes}
        model: nn.Module = getattr(detection, name)(weights=None, weights_backbone=None, **classes)
        return model
    module_name, _, function_name = args.model.partition(":")
    if not module_name or not function_name:
        raise ConfigError(
            f"{what}: give package.module:function, whose function returns a torch.nn.Module, or "
            "torchvision:fasterrcnn_resnet50_fpn_v2."
        )
    if args.num_classes is not None:
        raise ConfigError(f"--num-classes {args.num_classes} is of torchvision:NAME alone.")
    function: Any = import_module_of_user(module_name, f"{what}: importing {module_name}")
    for part in function_name.split("."):
        if not hasattr(function, part):
            raise ConfigError(f"{what}: {module_name} has no {function_name}.")
        function = getattr(function, part)
    if not callable(function):
        raise ConfigError(f"{what} is a {type(function).__name__}, and no function.")
    try:
        made = function()
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ConfigError(f"{what}: calling it without arguments failed: {reason}") from error
    if not isinstance(made, nn.Module):
        raise ConfigError(f"{what} returned a {type(made).__name__}; it must be a torch.nn.Module.")
    return made


def _load_weights(model: nn.Module, path: str) -> dict[str, Any]:
    """Load a state_dict, or a checkpoint with one as "model", as torchvision's script saves it."""
    what = f"--weights {path}"
    if not os.path.isfile(path):
        raise ConfigError(f"{what}: there is no such file.")
    try:
        # What torchvision's script saves has its command line, which is data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConfigError(f"{what} cannot be read: {why_not_loaded(error)}") from error
    if not isinstance(checkpoint, dict):
        raise ConfigError(f"{what} holds a {type(checkpoint).__name__}, and no state_dict.")
    state = checkpoint.get("model", checkpoint)
    own = model.state_dict()
    missing = [k for k in own.keys() - state.keys() if not k.endswith("num_batches_tracked")]
    problems = {
        "missing": missing,
        "not in the model": list(state.keys() - own.keys()),
        "of another shape": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
            for key in own.keys() & state.keys()
            if state[key].shape != own[key].shape
        ],
    }
    said = [
        f"{len(keys)} {kind}: {listed(sorted(keys), 5)}" for kind, keys in problems.items() if keys
    ]
    if said:
        raise ConfigError(f"{what} do not fit the model (--num-classes?). {'; '.join(said)}.")
    model.load_state_dict(state, strict=False)
    return checkpoint if "model" in checkpoint else {}


def _said(run: Callable[[], Any]) -> Any:
    """What the model or the data cannot do becomes a line."""
    try:
        return run()
    except (ValueError, FloatingPointError) as error:
        raise ConfigError(one_line(error)) from error


def _stem(args: argparse.Namespace) -> str:
    return Path(args.weights).stem if args.weights else args.model.rpartition(":")[2]


def _output(args: argparse.Namespace, suffix: str) -> Path:
    output = Path(args.output)
    if output.suffix != suffix:
        raise ConfigError(f"--output {output}: its name ends in {suffix}.")
    for path in {output, output.with_suffix(".json")}:
        if path.exists():
            raise ConfigError(f"--output {output}: {path} exists; give another name.")
    make_folder(output.parent, f"--output {output}")
    return output


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as file:
        file.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
