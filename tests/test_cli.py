"""The command line: what each command takes, how it starts, and how it ends."""

from __future__ import annotations

import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from detectron2 import model_zoo
from detectron2.engine import default_argument_parser
from tooling import ROOT, run_tool

from bn_detection import ConfigError, __version__, cli, install_detectron2
from bn_detection.command_line import argument_parser, command_line
from bn_detection.engine import load_config
from bn_detection.shipped import SHIPPED, find_config

TOOLS = {
    "install_detectron2": "install-detectron2",
    **{name: name for name in ("diagnose", "probe", "recalibrate", "study", "demo")},
    **{"train_net": "train", "plot_trace": "plot-trace", "make_leaky_shapes": "make-leaky-shapes"},
    "voc_to_coco": "voc-to-coco",
    "leak_potential": "leak-potential",
}
START_SECONDS = 0.3
every_command = pytest.mark.parametrize("command", cli.COMMANDS)


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


# ---------------------------------------------------------------------------------------------
# Help
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [(), *((name,) for name in cli.COMMANDS)])
def test_help_comes_at_once(command: tuple[str, ...]) -> None:
    def seconds() -> float:
        """Of the processor, which others may use too."""
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = seconds()
    line = [sys.executable, "-m", "bn_detection", *command, "--help"]
    subprocess.run(line, check=True, capture_output=True, timeout=60)
    assert seconds() - before <= START_SECONDS


def test_help_and_version_import_nothing_heavy() -> None:
    code = """
import sys
from bn_detection.cli import COMMANDS, main
for line in (["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)):
    try:
        main(line)
    except SystemExit as end:
        assert end.code == 0
assert not {"torch", "detectron2", "matplotlib", "numpy", "yaml"} & {*sys.modules}
"""
    ended = python(code)
    assert ended.returncode == 0, ended.stderr
    assert f"bn-detection {__version__}" in ended.stdout.splitlines()


@every_command
def test_the_example_of_a_command_can_be_run(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = help_of(command, capsys)
    lines = text.partition("example:\n")[2].partition("\n\n")[0].replace("\\\n", " ").splitlines()
    assert lines[-1].split()[:2] == ["bn-detection", command]
    for line in lines:
        args = cli.parse(shlex.split(line)[1:])
        for name in (getattr(args, flag, None) for flag in ("config_file", "study")):
            # Of the package, or what the demo leaves.
            assert not name or (SHIPPED / name).exists() or name == "output/demo/BN/config.yaml"
    assert "exit status:\n  0 done; 1 a failure, or findings; 2 an error" in text


@pytest.mark.parametrize("tool", sorted(TOOLS))
def test_a_tool_is_its_command(tool: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tool(tool, "--help").status == 0
    assert capsys.readouterr().out == help_of(TOOLS[tool], capsys)


def test_every_tool_is_a_command() -> None:
    tools = {path.stem for path in (ROOT / "tools").glob("*.py")}
    assert tools == {*TOOLS}
    assert {*TOOLS.values()} == {*cli.COMMANDS}


def test_flags_of_training_are_those_of_detectron2() -> None:
    ours, theirs = argument_parser(), default_argument_parser()
    for flag, action in theirs._option_string_actions.items():
        own = ours._option_string_actions[flag]
        assert (own.dest, own.nargs, own.type) == (action.dest, action.nargs, action.type), flag
        assert own.default == action.default or flag == "--dist-url"
    line = ["--config-file", "a.yaml", "--num-gpus", "2", "--resume", "BN.EPS", "1", "--x"]
    found, expected = (vars(parser.parse_args(line)) for parser in (ours, theirs))
    assert {k: v for k, v in found.items() if k in expected} == {**expected, "dist_url": "auto"}


def test_the_shell_completes_commands_and_flags(tmp_path: Path) -> None:
    def completions(line: str) -> list[str]:
        file = tmp_path / "completions"
        variables = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": " ", "COMP_LINE": line}
        variables |= {"COMP_POINT": str(len(line)), "_ARGCOMPLETE_STDOUT_FILENAME": str(file)}
        command = [sys.executable, "-m", "bn_detection"]
        subprocess.run(command, check=True, env={**os.environ, **variables}, timeout=60)
        return [word.strip() for word in file.read_text().split(" ") if word.strip()]

    assert completions("bn-detection rec") == ["recalibrate"]
    assert completions("bn-detection study x.yaml --exe") == ["--executor"]


# ---------------------------------------------------------------------------------------------
# Start and end
# ---------------------------------------------------------------------------------------------


def test_a_command_line_is_of_this_python_and_package() -> None:
    line = [*command_line("train", "--num-gpus", 2), "--help"]
    assert line[:5] == [sys.executable, "-m", "bn_detection", "train", "--num-gpus"]
    ran = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0 and "usage: bn-detection train" in ran.stdout


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ([], "COMMAND"),
        (["trian"], "'trian' (choose from"),
        (["train", "--num-gpu"], "--num-gpu"),
        (["train", "--num-gpus", "two"], "--num-gpus"),
        (["probe"], "--output"),
        (["study", "x.yaml", "--executor", "cloud"], "--executor"),
    ],
)
def test_a_wrong_command_line_is_status_2(
    line: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(line)
    assert end.value.code == 2
    usage, _, error = capsys.readouterr().err.rpartition("error: ")
    assert usage.startswith("usage: bn-detection") and named in error


def test_overrides_of_a_study_stand_between_flags() -> None:
    line = "x.yaml SEED 3 --jobs 2 --dry-run"
    for words in (line, "x.yaml --jobs 2 SEED 3 --dry-run", "--dry-run --jobs 2 x.yaml SEED 3"):
        args = cli.parse(["study", *words.split()])
        assert (args.study, args.jobs, args.dry_run) == ("x.yaml", 2, True)
        assert args.opts == ["SEED", "3"]


@pytest.mark.parametrize(
    ("ending", "status", "error"),
    [
        (None, 0, ""),
        (1, 1, ""),
        (ConfigError("BN.EPS 0: too small"), 2, "error: BN.EPS 0: too small\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_the_exit_status(
    ending: object,
    status: int,
    error: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(args: object) -> object:
        if isinstance(ending, BaseException):
            raise ending
        return ending

    monkeypatch.setattr("bn_detection.cli.plot_trace.run", run)
    assert cli.main(["plot-trace", "nowhere"]) == status
    assert capsys.readouterr().err == error


def test_without_detectron2_one_line_says_how_to_get_it() -> None:
    code = """
import sys
class Missing:
    def find_spec(name, *_):
        if name == "detectron2":
            raise ModuleNotFoundError("No module named 'detectron2'", name=name)
sys.meta_path.insert(0, Missing)
from bn_detection.cli import main
lines = (
    ["train"], ["probe", "--config-file", "x", "--output", "y"], ["recalibrate", "--output", "x"],
    ["diagnose", "--config-file", "x"], ["study", "studies/leakage.yaml"], ["demo"],
    ["make-leaky-shapes"],
)
for line in lines:
    print(line[0], main(line))
import bn_detection
try:
    bn_detection.convert_norm
except ImportError as error:
    print(error)
"""
    ended = python(code)
    *lines, of_package = ended.stdout.splitlines()
    assert len(lines) == 7 and all(line.endswith(" 2") for line in lines), ended
    hint = "error: Detectron2 is not installed: run bn-detection install-detectron2"
    assert ended.stderr.splitlines() == [hint] * 7
    assert "bn-detection install-detectron2" in of_package


def test_install_detectron2_hands_its_flags_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[tuple[Path | None, Path | None]] = []
    monkeypatch.setattr(install_detectron2, "install", lambda *paths: given.append(paths))
    assert cli.main(["install-detectron2"]) == 0
    cli.main(["install-detectron2", "--wheel-dir", "a b", "--archive", "c.tar.gz"])
    assert given == [(None, None), (Path("c.tar.gz"), Path("a b"))]

    def fail(*paths: Path | None) -> None:
        raise install_detectron2.InstallError("no torch")

    monkeypatch.setattr(install_detectron2, "install", fail)
    assert cli.main(["install-detectron2"]) == 1
    assert capsys.readouterr().err == "error: no torch\n"


# ---------------------------------------------------------------------------------------------
# The package
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "order",
    [
        "import bn_detection; import detectron2.engine",
        "import detectron2.engine; import bn_detection; from bn_detection import *; BNOptions",
    ],
)
def test_importing_the_package_registers_its_components(order: str) -> None:
    code = f"""
import sys
{order}
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, ROI_BOX_HEAD_REGISTRY
from detectron2.modeling import ROI_KEYPOINT_HEAD_REGISTRY, ROI_MASK_HEAD_REGISTRY
from detectron2.utils.file_io import PathManager
BACKBONE_REGISTRY.get("SmallConvBackbone"), META_ARCH_REGISTRY.get("BNRetinaNet")
ROI_BOX_HEAD_REGISTRY.get("BNConvFCHead"), ROI_MASK_HEAD_REGISTRY.get("BNConvUpsampleHead")
ROI_KEYPOINT_HEAD_REGISTRY.get("BNConvDeconvKeypointHead")
assert PathManager.isfile("corrupted://fog:3/" + sys.executable)
"""
    ended = python(code)
    assert ended.returncode == 0, ended.stderr


def test_an_unknown_name_of_the_package_is_none() -> None:
    import bn_detection

    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        bn_detection.nothing  # noqa: B018


# ---------------------------------------------------------------------------------------------
# Configs by name
# ---------------------------------------------------------------------------------------------


def test_the_package_has_all_configs() -> None:
    names = {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")}
    assert all((SHIPPED.parent / name).is_file() for name in names) and names


@pytest.mark.parametrize("name", ["mask_rcnn_shuffle.yaml", "quickstart/mask_rcnn_shuffle.yaml"])
@pytest.mark.parametrize("folder", ["", "configs/"])
def test_a_config_is_found_in_the_package(
    folder: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    args = argument_parser().parse_args(["--config-file", folder + name])
    assert load_config(args).MODEL.ROI_BOX_HEAD.NORM == "ShuffleBN"
    assert find_config(folder + name) == str(SHIPPED / name)
    path = tmp_path / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("SEED: 5\n")
    args = argument_parser().parse_args(["--config-file", folder + name])
    assert load_config(args).SEED == 5  # what is there goes before


def test_a_config_is_found_in_the_model_zoo() -> None:
    name = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
    assert find_config(name) == model_zoo.get_config_file(name)


@pytest.mark.parametrize("name", ["quickstart/nothing.yaml", "x" * 5000, "", "configs/"])
def test_a_config_that_is_nowhere_is_refused(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        find_config(name)
    assert str(error.value).startswith(f"--config-file {name}: there is no such file")
    assert str(SHIPPED) in str(error.value) and "model zoo" in str(error.value)


def test_it_is_refused_at_once() -> None:
    line = command_line("diagnose", "--config-file", "nowhere.yaml")
    code = f"""
import sys
from bn_detection.cli import main
print(main({line[3:]}))
assert not {{"torch", "detectron2"}} & {{*sys.modules}}
"""
    ended = python(code)
    assert ended.returncode == 0 and ended.stdout == "2\n"
    assert ended.stderr.startswith("error: --config-file nowhere.yaml: there is no such file")


def test_a_study_that_is_nowhere_is_refused() -> None:
    ended = run_tool("study", "studies/nothing.yaml")
    assert ended.status == 2
    assert ended.error.startswith("error: studies/nothing.yaml: there is no such file or folder")
    assert str(SHIPPED) in ended.error
