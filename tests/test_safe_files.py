"""Nothing in a file runs as code: configs, weights, checkpoints to resume, proposals."""

from __future__ import annotations

import io
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_train_net import overrides
from tooling import QUICKSTART, Ended, run_tool
from training import make_images

from bn_detection import ConfigError
from bn_detection.arithmetic import compute
from bn_detection.engine import Trainer, argument_parser, load_config
from bn_detection.engine.checkpoint import AtomicCheckpointer
from bn_detection.pickles import load_plain

pytestmark = pytest.mark.usefixtures("own_catalogs")

CONFIG = QUICKSTART / "mask_rcnn_bn.yaml"
TOOLS = ("train_net", "evaluate", "recalibrate", "probe", "diagnose")


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    make_images(folder)
    return folder


def use(tool: str, folder: Path, output: Path, *more: object, config: Path = CONFIG) -> Ended:
    """Run a tool; "evaluate" is ``train_net --eval-only``."""
    opts = overrides(folder, output, *more)
    if tool == "evaluate":
        return run_tool("train_net", "--config-file", config, "--eval-only", *opts)
    named = {"probe": f"{output}.json", "recalibrate": f"{output}.pth"}
    flags = ("--output", named[tool]) if tool in named else ()
    return run_tool(tool, "--config-file", config, *flags, *opts)


def assert_refused(ended: Ended, *words: object) -> None:
    assert ended.status == 2, ended
    assert ended.error.startswith("error: ") and "\n" not in ended.error, ended.error
    for word in words:
        assert str(word) in ended.error


# ---------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", TOOLS)
def test_a_pickle_that_runs_code_is_refused_by_every_tool(
    tool: str, folder: Path, tmp_path: Path
) -> None:
    weights, made = tmp_path / "weights.pkl", tmp_path / "made"
    weights.write_bytes(pickle.dumps({"model": Touch(made), "__author__": "x"}))
    ended = use(tool, folder, tmp_path / "out", "MODEL.WEIGHTS", weights)
    assert not made.exists()
    assert_refused(ended, weights, "mkdir")


def test_so_is_one_that_resume_finds(folder: Path, tmp_path: Path) -> None:
    made, output = tmp_path / "made", tmp_path / "out"
    output.mkdir()
    (output / "last.pkl").write_bytes(pickle.dumps(Touch(made)))
    (output / "last_checkpoint").write_text("last.pkl")
    for flags in ((), ("--eval-only",)):
        opts = overrides(folder, output)
        ended = run_tool("train_net", "--config-file", CONFIG, "--resume", *flags, *opts)
        assert not made.exists()
        assert_refused(ended, output / "last.pkl", "mkdir")


@pytest.mark.parametrize("suffix", [".pth", ".pyth"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_torch_file_that_runs_code_is_refused(
    suffix: str, legacy: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What turns torch's own guard off.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    weights, made = tmp_path / f"weights{suffix}", tmp_path / "made"
    data = {"model": {}, "model_state": Touch(made)}
    torch.save(data, weights, _use_new_zipfile_serialization=not legacy)
    ended = use("evaluate", folder, tmp_path / "out", "MODEL.WEIGHTS", weights)
    assert not made.exists()
    assert_refused(ended, weights, "mkdir")


def refuses(data: bytes, tmp_path: Path) -> str:
    path = tmp_path / "weights.pkl"
    path.write_bytes(data)
    with pytest.raises(pickle.UnpicklingError) as raised, open(path, "rb") as file:
        load_plain(file)
    return str(raised.value)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (torch.nn.Linear(1, 1), "torch"),
        (torch.zeros(2), "torch"),
        (np.matrix([[1]]), "matrix"),
        (np.random.default_rng(0), "numpy.random"),
        (np.zeros(2).sum, "getattr"),
        (print, "print"),
        (Path("x"), "Path"),
    ],
)
def test_what_is_no_array_is_named(value: object, name: str, tmp_path: Path) -> None:
    for protocol in range(2, 6):
        try:
            data = pickle.dumps({"model": {"a": value}}, protocol)
        except TypeError:
            continue
        assert name in refuses(data, tmp_path)


def test_an_array_of_objects_or_with_forged_flags_is_refused(tmp_path: Path) -> None:
    assert "object" in refuses(pickle.dumps(np.array([{}, None])), tmp_path)
    assert "dtype" in refuses(pickle.dumps(np.zeros(2, [("a", "f4")])), tmp_path)
    # A dtype of numbers that says it holds references: numpy would follow them.
    state = pickle.dumps(np.zeros(3, "f8"), 2)
    end = b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t"
    assert state.count(end) == 1
    assert "dtype" in refuses(state.replace(end, end.replace(b"K\x00", b"K\x3f")), tmp_path)


ARRAYS: dict[str, Callable[[], Any]] = {
    "floats": lambda: np.arange(6, dtype=np.float32).reshape(2, 3),
    "fortran": lambda: np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big endian": lambda: np.arange(3, dtype=">f8"),
    "no dimension": lambda: np.array(3, dtype=np.int64),
    "empty": lambda: np.zeros((0, 4), np.float16),
    "scalar": lambda: np.float32(0.5),
    "text": lambda: np.array(["a", "bc"]),
    "bools": lambda: np.array([True, False]),
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_are_what_pickle_makes_of_them(kind: str, protocol: int) -> None:
    value = ARRAYS[kind]()
    data = pickle.dumps({"a": [value, value]}, protocol)
    one, other = load_plain(io.BytesIO(data))["a"]
    expected = pickle.loads(data)["a"][0]
    assert one is other
    assert isinstance(one, type(value)) and one.dtype == expected.dtype
    np.testing.assert_array_equal(one, expected)


def test_plain_containers_are_what_pickle_makes_of_them() -> None:
    value = {
        "list": [1, 2.5, None, True, "text", b"bytes", 10**30],
        "tuple": (1, (2,)),
        "set": {1, 2},
        "frozen": frozenset({3}),
        "ordered": OrderedDict(b=1, a=2),
        "complex": 1 + 2j,
        "bytearray": bytearray(b"x"),
    }
    for protocol in range(6):
        found = load_plain(io.BytesIO(pickle.dumps(value, protocol)))
        assert found == value and list(found["ordered"]) == ["b", "a"]


def test_what_python_2_wrote_is_read_as_latin1() -> None:
    # {'w\xe9': array([1.5, 2.5], dtype=float32)} by Python 2 and protocol 2, as Caffe2's are.
    data = (
        b"\x80\x02}q\x00U\x02w\xe9cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85"
        b"U\x01b\x87R(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNN"
        b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08\x00\x00\xc0?\x00\x00 @tbs."
    )
    found = load_plain(io.BytesIO(data), encoding="latin1")
    assert found["wé"].tolist() == [1.5, 2.5]


def test_the_weights_of_a_model_zoo_load(folder: Path, tmp_path: Path) -> None:
    opts = overrides(folder, tmp_path)
    cfg = load_config(argument_parser().parse_args(["--config-file", str(CONFIG), *opts]))
    model = Trainer.build_model(cfg)
    arrays = {key: (value + 1).numpy() for key, value in model.state_dict().items()}
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "somebody"}, 2))
    AtomicCheckpointer(model).load(str(path))
    for key, value in model.state_dict().items():
        assert np.array_equal(value.numpy(), arrays[key]), key


@pytest.mark.parametrize("kind", ["detection", "classification"])
def test_so_do_those_of_caffe2(kind: str, tmp_path: Path) -> None:
    path, value = tmp_path / "weights.pkl", np.ones((2, 3), np.float32)
    blobs = {"conv_w": value, "conv_w_momentum": value}
    data = {"blobs": blobs, "cfg": "text"} if kind == "detection" else blobs
    path.write_bytes(pickle.dumps(data, 2))
    found = AtomicCheckpointer(torch.nn.Linear(1, 1))._load_file(str(path))
    assert found["__author__"] == "Caffe2" and list(found["model"]) == ["conv_w"]
    assert torch.equal(torch.from_numpy(found["model"]["conv_w"]), torch.ones(2, 3))


def test_proposals_that_run_code_are_refused(folder: Path, tmp_path: Path) -> None:
    made, proposals = tmp_path / "made", tmp_path / "proposals.pkl"
    proposals.write_bytes(pickle.dumps({"ids": Touch(made)}))
    files = f"('{proposals}',)"
    more = (
        *("MODEL.LOAD_PROPOSALS", True, "DATASETS.PROPOSAL_FILES_TRAIN", files),
        *("DATASETS.PROPOSAL_FILES_TEST", files),
    )
    ended = use("train_net", folder, tmp_path / "out", *more)
    assert not made.exists()
    assert_refused(ended, proposals, "mkdir", "DATASETS.PROPOSAL_FILES_TRAIN")


# ---------------------------------------------------------------------------------------------
# Configs
# ---------------------------------------------------------------------------------------------


def unsafe(made: Path) -> str:
    return f"SEED: !!python/object/apply:os.mkdir ['{made}']\n"


@pytest.fixture(params=["the file", "its base"])
def evil(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A config, the file of it that has the tag, and what it would make."""
    made, base, config = tmp_path / "made", tmp_path / "base.yaml", tmp_path / "config.yaml"
    if request.param == "the file":
        config.write_text(f"_BASE_: {CONFIG}\n{unsafe(made)}")
        return config, config, made
    base.write_text(f"_BASE_: {CONFIG}\n{unsafe(made)}")
    config.write_text("_BASE_: base.yaml\n")
    return config, base, made


@pytest.mark.parametrize("tool", TOOLS)
def test_a_config_that_runs_code_is_refused_by_every_tool(
    tool: str, evil: tuple[Path, Path, Path], folder: Path, tmp_path: Path
) -> None:
    config, file, made = evil
    ended = use(tool, folder, tmp_path / "out", config=config)
    assert not made.exists()
    assert_refused(ended, file, "line 2", "python/object/apply:os.mkdir")


@pytest.mark.parametrize("flags", [(), ("--dry-run",)])
def test_so_is_one_of_a_study(
    flags: tuple[str, ...], evil: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    config, file, made = evil
    study = tmp_path / "study.yaml"
    study.write_text(f"about: x\nruns: {{a: {{config: {config}}}}}\nevaluations: {{b: }}\n")
    ended = run_tool("study", study, "--output-dir", tmp_path / "out", *flags)
    assert not made.exists()
    assert_refused(ended, study, file, "python/object/apply:os.mkdir")


def test_so_is_a_study_itself(tmp_path: Path) -> None:
    study, made = tmp_path / "study.yaml", tmp_path / "made"
    study.write_text(f"about: x\n{unsafe(made)}")
    assert_refused(run_tool("study", study, "--dry-run"), study, "python/object/apply")
    assert not made.exists()


def test_values_on_the_command_line_are_literals(folder: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    call = f"__import__('os').mkdir('{made}')"
    assert use("train_net", folder, tmp_path / "out", "SEED", call).status == 2
    assert not made.exists()
    with pytest.raises(ConfigError):
        load_config(
            argument_parser().parse_args(["SEED", f"!!python/object/apply:os.mkdir {made}"])
        )


# ---------------------------------------------------------------------------------------------
# The arithmetic of Detectron2's model zoo
# ---------------------------------------------------------------------------------------------

ANCHORS = "[[x, x * 2**(1.0/3), x * 2**(2.0/3) ] for x in [32, 64, 128, 256, 512 ]]"


def test_arithmetic_is_computed_as_python_does(tmp_path: Path) -> None:
    for text in (
        ANCHORS,
        "[1, -2.5, (3 + 4) / 2]",
        "(1, 2)",
        "[[y * x for y in [1]] for x in (2,)]",
    ):
        assert compute(text) == eval(text)
    config = tmp_path / "config.yaml"
    tag = f'!!python/object/apply:eval ["{ANCHORS}"]'
    config.write_text(f"_BASE_: {CONFIG}\nMODEL: {{ANCHOR_GENERATOR: {{SIZES: {tag}}}}}\n")
    cfg = load_config(argument_parser().parse_args(["--config-file", str(config)]))
    assert eval(ANCHORS) == cfg.MODEL.ANCHOR_GENERATOR.SIZES


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').mkdir('{made}')",
        "[x.real for x in [1]]",
        "print(1)",
        "(lambda: 1)()",
        "9**9**9",
        "[1] * 10**6",
        "'a' * 3",
        "[x for x in 10**5]",
        "[a for b in [1]]",
        "[x for x in [1] if x]",
        "f'{{1}}'",
        "1j",
        "99999**65",
        "[[[x * y * z for z in [1]] for y in [1]] for x in [1]]",
        "1/0",
        "(",
        "",
    ],
)
def test_all_else_is_refused(text: str, folder: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    text = text.format(made=made)
    with pytest.raises(ValueError, match=r"number|million"):
        compute(text)
    config = tmp_path / "config.yaml"
    quoted = text.replace('"', "'")
    config.write_text(f'_BASE_: {CONFIG}\nSEED: !!python/object/apply:eval ["{quoted}"]\n')
    with pytest.raises(ConfigError, match=r"config.yaml, line 2.*lists? of numbers"):
        load_config(argument_parser().parse_args(["--config-file", str(config)]))
    assert not made.exists()
