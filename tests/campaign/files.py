"""Files that would run code if anything obeyed them: none of it may run."""

from __future__ import annotations

import os
import pickle
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from test_safe_files import Touch, unsafe

from .counting import RAN, Tally, attempt
from .running import CONFIG, arguments, beginning, running, working_in

PART = "malicious files"
TOOLS = ("train_net", "evaluate", "recalibrate", "probe", "diagnose")


class _Calls:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def _text(value: str) -> bytes:
    """Push text, in pickle's language."""
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def _named(module: str, name: str) -> bytes:
    """Push what a name with dots leads to, which a list of modules does not see."""
    return _text(module) + _text(name) + b"\x93"


def _nested(made: Path) -> bytes:
    inner = pickle.dumps(Touch(made))
    return pickle.dumps(_Calls(pickle.loads, inner))


PICKLES: dict[str, Callable[[Path], bytes]] = {
    **{
        f"protocol {number}": lambda made, number=number: pickle.dumps(
            {"model": Touch(made), "__author__": "x"}, number
        )
        for number in range(pickle.HIGHEST_PROTOCOL + 1)
    },
    "bare": lambda made: pickle.dumps(Touch(made)),
    "eval": lambda made: pickle.dumps(_Calls(eval, f"__import__('os').mkdir({str(made)!r})")),
    "exec": lambda made: pickle.dumps(_Calls(exec, f"import os; os.mkdir({str(made)!r})")),
    "a process": lambda made: pickle.dumps(_Calls(subprocess.call, ["mkdir", str(made)])),
    "a shell": lambda made: pickle.dumps(_Calls(os.system, f"mkdir '{made}'")),
    "opened for writing": lambda made: pickle.dumps(_Calls(open, str(made), "w")),
    "by instance": lambda made: b"(" + _text(str(made)) + b"ios\nmkdir\n.",
    "by object": lambda made: b"(cos\nmkdir\n" + _text(str(made)) + b"o.",
    "dotted": lambda made: (
        b"\x80\x04" + _named("numpy", "lib.format.os.mkdir") + _text(str(made)) + b"\x85R."
    ),
    "dotted, of torch": lambda made: (
        b"\x80\x04" + _named("torch", "os.mkdir") + _text(str(made)) + b"\x85R."
    ),
    "nested": _nested,
    "after a stop": lambda made: pickle.dumps({"model": {}}) + pickle.dumps(Touch(made)),
}
TAGS = (
    "!!python/object/apply:os.mkdir ['{made}']",
    "!!python/object/apply:os.system [\"mkdir '{made}'\"]",
    "!!python/object/apply:subprocess.check_call [[mkdir, '{made}']]",
    "!!python/object/apply:eval [\"__import__('os').mkdir('{made}')\"]",
    "!!python/object/apply:builtins.eval [\"__import__('os').mkdir('{made}')\"]",
    "!!python/object/apply:eval [\"[__import__('os').mkdir('{made}') for x in [1]]\"]",
    '!!python/object/apply:eval ["[x.__class__.__base__.__subclasses__() for x in [1]]"]',
    "!!python/object/new:os.mkdir ['{made}']",
    "!!python/object/new:type {{args: [a, !!python/tuple [], {{}}], state: {{}}}}",
    "!!python/object:os.mkdir {{path: '{made}'}}",
    "!!python/name:os.mkdir",
    "!!python/module:os",
    "!<tag:yaml.org,2002:python/object/apply:os.mkdir> ['{made}']",
)


class _Place(NamedTuple):
    """A command line with a malicious file in it.

    Attributes:
        name: what and where.
        prepare: writes the file; called with the folder of the input and the path of what the code
            would make. Returns the tool and its command line.
    """

    name: str
    prepare: Callable[[Path, Path], tuple[str, list[str]]]


def places(material: Path) -> Iterator[_Place]:
    """Every input of this part.

    Args:
        material: of :func:`campaign.running.make_material`.
    """
    for tool in TOOLS:
        for kind in PICKLES:
            yield _Place(f"{tool}, .pkl weights, {kind}", _weights(tool, kind, material))
        for suffix in (".pth", ".pyth"):
            for legacy in (False, True):
                name = f"{tool}, {suffix} weights, {'legacy' if legacy else 'zip'}"
                yield _Place(name, _torch_file(tool, suffix, legacy, material))
        for number in range(len(TAGS)):
            for in_base in (False, True):
                where = "_BASE_" if in_base else "config"
                yield _Place(
                    f"{tool}, {where}, tag {number}", _tag(tool, number, in_base, material)
                )
        yield _Place(f"{tool}, overrides", _override(tool, material))
    for flags in ((), ("--eval-only",)):
        for kind in PICKLES:
            yield _Place(f"resume {flags}, {kind}", _resumed(flags, kind, material))
    for kind in PICKLES:
        yield _Place(f"proposals, {kind}", _proposals(kind, material))
    for dry in (("--dry-run",), ()):
        for number in range(len(TAGS)):
            for where in ("config", "_BASE_", "study", "overrides"):
                name = f"study {dry}, {where}, tag {number}"
                yield _Place(name, _study(dry, number, where))


def _weights(tool: str, kind: str, material: Path) -> Any:
    def prepare(own: Path, made: Path) -> tuple[str, list[str]]:
        path = own / "weights.pkl"
        path.write_bytes(PICKLES[kind](made))
        return arguments(tool, material, own / "out", "MODEL.WEIGHTS", path)

    return prepare


def _torch_file(tool: str, suffix: str, legacy: bool, material: Path) -> Any:
    def prepare(own: Path, made: Path) -> tuple[str, list[str]]:
        path = own / f"weights{suffix}"
        data = {"model": {}, "model_state": Touch(made)}
        torch.save(data, path, _use_new_zipfile_serialization=not legacy)
        return arguments(tool, material, own / "out", "MODEL.WEIGHTS", path)

    return prepare


def _tagged(number: int, own: Path, made: Path, where: str) -> Path:
    config, base = own / "config.yaml", own / "base.yaml"
    text = f"_BASE_: {CONFIG}\nSEED: {TAGS[number].format(made=made)}\n"
    if number == 0:
        text = f"_BASE_: {CONFIG}\n{unsafe(made)}"
    (base if where == "_BASE_" else config).write_text(text)
    if where == "_BASE_":
        config.write_text("_BASE_: base.yaml\n")
    return config


def _tag(tool: str, number: int, in_base: bool, material: Path) -> Any:
    def prepare(own: Path, made: Path) -> tuple[str, list[str]]:
        config = _tagged(number, own, made, "_BASE_" if in_base else "config")
        return arguments(tool, material, own / "out", config=config)

    return prepare


def _override(tool: str, material: Path) -> Any:
    def prepare(own: Path, made: Path) -> tuple[str, list[str]]:
        call = f"__import__('os').mkdir('{made}')"
        return arguments(tool, material, own / "out", "BN.MODULES", f"[{call}]")

    return prepare


def _resumed(flags: tuple[str, ...], kind: str, material: Path) -> Any:
    def prepare(own: Path, made: Path) -> tuple[str, list[str]]:
        output = own / "out"
        output.mkdir()
        (output / "last.pkl").write_bytes(PICKLES[kind](made))
        (output / "last_checkpoint").write_text("last.pkl")
        tool, line = arguments("train_net", material, output)
        return tool, [*line[:2], "--resume", *flags, *line[2:]]

    return prepare


def _proposals(kind: str, material: Path) -> Any:
    def prepare(own: Path, made: Path) -> tuple[str, list[str]]:
        path = own / "proposals.pkl"
        path.write_bytes(PICKLES[kind](made))
        more = ["MODEL.LOAD_PROPOSALS", True]
        for key in ("TRAIN", "TEST"):
            more += [f"DATASETS.PROPOSAL_FILES_{key}", f"('{path}',)"]
        return arguments("train_net", material, own / "out", *more)

    return prepare


def _study(flags: tuple[str, ...], number: int, where: str) -> Any:
    def prepare(own: Path, made: Path) -> tuple[str, list[str]]:
        study, config = own / "study.yaml", CONFIG
        if where in ("config", "_BASE_"):
            config = _tagged(number, own, made, where)
        tag = TAGS[number].format(made=made)
        text = f"about: {tag if where == 'study' else 'x'}\n"
        text += f"overrides: {{BN.MOMENTUM: {tag if where == 'overrides' else 0.1}}}\n"
        text += f"runs: {{a: {{config: {config}}}}}\nevaluations: {{b: }}\n"
        study.write_text(text)
        return "study", [str(study), "--output-dir", str(own / "out"), *flags]

    return prepare


def run(names: list[str], material: Path, folder: Path, seconds: float) -> Tally:
    """Give the tools malicious files; torch's own guard of ``.pth`` files is turned off.

    Args:
        names: of :func:`places`.
        material: of :func:`campaign.running.make_material`.
        folder: to write to.
        seconds: that each may take.
    """
    tally = Tally(PART)
    chosen = [place for place in places(material) if place.name in set(names)]
    unguarded = mock.patch.dict(os.environ, {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"})
    with unguarded, beginning("evaluate", "recalibrate", "probe", "diagnose"):
        for number, place in enumerate(chosen):
            own = folder / f"file {number}"
            own.mkdir()
            made = own / "made"
            with working_in(own):
                outcome, detail = attempt(running(*place.prepare(own, made)), seconds)
            tally.add(place.name, RAN if made.exists() else outcome, detail)
    return tally


def sample(seed: int, number: int, material: Path) -> list[str]:
    """The names of some inputs."""
    names = [place.name for place in places(material)]
    return random.Random(f"{seed}/{PART}").sample(names, number)
