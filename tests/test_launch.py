import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from detectron2.utils import comm
from distributed import run_workers
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from bn_detection.command_line import argument_parser
from bn_detection.config import ConfigError
from bn_detection.workers import WorkerError, launch, restarted, run
from bn_detection.workers.agent import _describe_exit, _when

REPO = Path(__file__).resolve().parents[1]

MARK = "BN_DETECTION_TEST"

pytestmark = pytest.mark.timeout(180)


# ---------------------------------------------------------------------------------------------
# What workers do
# ---------------------------------------------------------------------------------------------


def record_worker(folder):
    total = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(total)
    if "OMP_NUM_THREADS" not in os.environ:
        assert torch.get_num_threads() <= max(1, os.cpu_count() // comm.get_local_size())
    facts = {
        "world_size": comm.get_world_size(),
        "local_rank": comm.get_local_rank(),
        "local_size": comm.get_local_size(),
        "gathered": comm.all_gather(comm.get_rank()),
        "backend": dist.get_backend(),
        "total": total.item(),
    }
    torch.save(facts, Path(folder) / f"{comm.get_rank()}.pt")


def read_records(folder):
    return {int(path.stem): torch.load(path) for path in Path(folder).iterdir()}


def no_process_group(value):
    assert not dist.is_initialized()
    assert comm.get_world_size() == 1
    return value


def scenario(args):
    """What the workers of a command line do, chosen by its first config option."""
    name, *options = args.opts
    if name == "config error":
        raise ConfigError("BN.MOMENTUM 2.0: expected a number in (0, 1]")
    if name == "record":
        record_worker(*options)
    if name == "fail" and comm.get_rank() == 1:
        raise ValueError("the root cause")
    if name == "hang" and comm.get_rank() == 1:
        print("hanging", flush=True)
        subprocess.run(["sleep", "1000"])
    dist.all_reduce(torch.zeros(1))


def tool(argv):
    run(scenario, argument_parser().parse_args(argv), lambda args: "cpu")


# ---------------------------------------------------------------------------------------------
# Starting processes
# ---------------------------------------------------------------------------------------------


def start_tool(*argv, torchrun=0):
    """A command line of its own, with a mark by which its processes can be found."""
    prefix = [sys.executable]
    if torchrun:
        prefix += ["-m", "torch.distributed.run", "--nproc-per-node", str(torchrun)]
        prefix += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    path = [str(REPO), str(REPO / "tests"), os.environ.get("PYTHONPATH", "")]
    mark = str(time.monotonic_ns())
    started = subprocess.Popen(
        [*prefix, __file__, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={
            **os.environ,
            **{"PYTHONPATH": os.pathsep.join(path), "PYTHONWARNINGS": "ignore", MARK: mark},
        },
    )
    started.mark = mark
    return started


def processes_of(started):
    """The command line's, those of its workers too, which have sessions of their own."""
    found = []
    for process in psutil.process_iter():
        try:
            is_of_it = process.environ().get(MARK) == started.mark
            if is_of_it and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.Error):
            pass
    return found


def finish(process):
    """Wait for a command line; nothing of it may be left. Returns its status and output."""
    stdout, stderr = process.communicate(timeout=150)
    deadline = time.monotonic() + 5
    while processes_of(process) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_of(process) == []
    return process.returncode, stdout, stderr


# ---------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------


def launch_together(*jobs, what=record_worker):
    """Launch several jobs at the same time, each a dict of arguments."""

    def start(arguments):
        launch(what, **{"device": "cpu", **arguments})

    with ThreadPoolExecutor() as threads:
        assert list(threads.map(start, jobs)) == [None] * len(jobs)


def test_two_jobs_at_the_same_time(tmp_path):
    sizes = [2, 3]
    folders = [tmp_path / str(size) for size in sizes]
    for folder in folders:
        folder.mkdir()
    launch_together(
        *(
            {"num_workers_per_machine": size, "args": (str(folder),)}
            for size, folder in zip(sizes, folders, strict=True)
        )
    )
    for size, folder in zip(sizes, folders, strict=True):
        assert read_records(folder) == {
            rank: {
                "world_size": size,
                "local_rank": rank,
                "local_size": size,
                "gathered": list(range(size)),
                "backend": "gloo",
                "total": sum(range(size)),
            }
            for rank in range(size)
        }


def test_single_worker_is_a_call():
    assert launch(no_process_group, 1, args=(5,)) == 5


def record_attempt_and_die_in_the_first(folder):
    record_worker(Path(folder, str(int(restarted()))))
    comm.synchronize()
    if comm.get_rank() == 1 and not restarted():
        os.kill(os.getpid(), signal.SIGKILL)


def test_two_machines_and_their_restart(tmp_path):
    for attempt in "01":
        (tmp_path / attempt).mkdir()
    with dist_port() as port:
        url = f"tcp://127.0.0.1:{port}"
    launch_together(
        *(
            {
                **{"num_workers_per_machine": 1, "num_machines": 2, "machine_rank": rank},
                **{"dist_url": url, "args": (str(tmp_path),), "max_restarts": 1},
            }
            for rank in range(2)
        ),
        what=record_attempt_and_die_in_the_first,
    )
    for attempt in "01":
        records = read_records(tmp_path / attempt)
        assert sorted(records) == [0, 1]
        for facts in records.values():
            assert (facts["world_size"], facts["local_rank"], facts["local_size"]) == (2, 0, 1)
            assert facts["total"] == 1


class dist_port:
    """A port of this machine that a store listens on, until the end of the block."""

    def __enter__(self):
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        return self.store.port

    def __exit__(self, *exc):
        del self.store


# ---------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------


def test_argument_parser():
    parser = argument_parser()
    args = parser.parse_args(["--config-file", "a.yaml", "--num-gpus", "2", "BN.EPS", "0.1"])
    assert args.config_file == "a.yaml"
    assert args.num_gpus == 2
    assert args.dist_url == "auto"
    assert (args.num_machines, args.machine_rank, args.resume, args.eval_only) == (
        1,
        0,
        False,
        False,
    )
    assert args.opts == ["BN.EPS", "0.1"]
    assert "otherwise CPU processes" in " ".join(parser.format_help().split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_workers_per_machine": 0}, "--num-gpus 0"),
        ({"num_machines": 0}, "--num-machines 0"),
        ({"num_machines": 2, "machine_rank": 2}, "--machine-rank 2.* 0 to 1"),
        ({"num_machines": 2}, "--dist-url auto.*--num-machines 2"),
        ({"max_restarts": -1}, "--max-restarts -1"),
        ({"num_workers_per_machine": 2, "dist_url": "foo"}, "tcp://HOST:PORT"),
        ({"num_workers_per_machine": 2, "dist_url": "tcp://["}, "tcp://HOST:PORT"),
        ({"num_workers_per_machine": 2, "dist_url": "tcp://localhost"}, "tcp://HOST:PORT"),
        ({"num_workers_per_machine": 2, "dist_url": "tcp://localhost:x"}, "tcp://HOST:PORT"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        launch(no_process_group, **{"num_workers_per_machine": 1, "device": "cpu", **arguments})


def test_more_workers_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"--num-gpus 3: .* 2 GPU.*MODEL.DEVICE cpu"):
        launch(no_process_group, 3, device="cuda")


def test_port_in_use():
    with (
        dist_port() as port,
        pytest.raises(ConfigError, match=f"--dist-url tcp://.*{port}: cannot"),
    ):
        launch(no_process_group, 2, dist_url=f"tcp://127.0.0.1:{port}", device="cpu")


def test_torchrun_contradicts_flag(monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ConfigError, match=r"--num-gpus 4 contradicts torchrun.* 2 worker"):
        launch(no_process_group, 4, device="cpu")


# ---------------------------------------------------------------------------------------------
# Failures
# ---------------------------------------------------------------------------------------------


def run_tool(argv, monkeypatch, capfd):
    """The exit status and the output, with that of the workers, of a command line run here."""
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    before = set(psutil.Process().children())
    with pytest.raises(SystemExit) as exit_info:
        tool(argv)
    left = set(psutil.Process().children()) - before
    assert [child for child in left if "resource_tracker" not in " ".join(child.cmdline())] == []
    return exit_info.value.code, *capfd.readouterr()


def test_failing_worker_ends_the_others(monkeypatch, capfd):
    status, stdout, stderr = run_tool(["--num-gpus", "2", "fail"], monkeypatch, capfd)
    assert status == 1
    assert stderr.startswith("error: worker failed (rank 1 of 2): ValueError: the root cause")
    assert "in scenario" in stderr
    assert stderr.count("Traceback") == 1
    assert stdout == ""


@pytest.mark.parametrize("num_gpus", ["1", "2"])
def test_config_error_is_printed_once(monkeypatch, capfd, num_gpus):
    status, _, stderr = run_tool(["--num-gpus", num_gpus, "config error"], monkeypatch, capfd)
    assert status == 2
    assert stderr == "error: BN.MOMENTUM 2.0: expected a number in (0, 1]\n"


def config_error_for_device(args):
    raise ConfigError("MODEL.DEVICE tpu: expected cpu or cuda")


def test_config_error_of_get_device(capsys):
    with pytest.raises(SystemExit) as exit_info:
        run(scenario, argument_parser().parse_args([]), config_error_for_device)
    assert exit_info.value.code == 2
    assert "MODEL.DEVICE tpu" in capsys.readouterr().err


def killed_worker(number):
    if dist.get_rank() == 1:
        os.kill(os.getpid(), number)
    dist.all_reduce(torch.zeros(1))


def test_killed_worker():
    with pytest.raises(WorkerError, match=r"rank 1 of 2.*SIGKILL.*memory"):
        launch(killed_worker, 2, device="cpu", args=(signal.SIGKILL,))


def fails_alone():
    assert not dist.is_initialized()
    raise ValueError("again" if restarted() else "the first time")


def test_a_failure_that_a_restart_does_not_mend(capfd):
    with pytest.raises(WorkerError, match=r"rank 0 of 1\): ValueError: again"):
        launch(fails_alone, 1, device="cpu", max_restarts=1)
    stderr = capfd.readouterr().err
    assert "error: worker failed (rank 0 of 1): ValueError: the first time" in stderr
    assert stderr.endswith("\nthe workers start again (1 of 1 restarts)\n")


def test_a_config_error_is_not_tried_again(monkeypatch, capfd):
    status, _, stderr = run_tool(["--max-restarts", "1", "config error"], monkeypatch, capfd)
    assert (status, stderr) == (2, "error: BN.MOMENTUM 2.0: expected a number in (0, 1]\n")


@pytest.mark.parametrize(
    ("exit_code", "seconds_later", "first"),
    [
        # From outside, which its peer told before the agent saw it.
        (-signal.SIGKILL, 0, 1),
        (7, 0, 1),
        # By the agent, and by torch for want of peers.
        (-signal.SIGKILL, 30, 0),
        (-signal.SIGTERM, 0, 0),
        (-signal.SIGABRT, 0, 0),
    ],
)
def test_the_first_failure_is_the_cause(tmp_path, exit_code, seconds_later, first):
    report = {"message": "ValueError: x", "extraInfo": {"py_callstack": "", "timestamp": "0"}}
    (tmp_path / "0.json").write_text(json.dumps({"message": report}))
    reported = ProcessFailure(0, 1, 1, str(tmp_path / "0.json"))
    silent = ProcessFailure(1, 2, exit_code, str(tmp_path / "none"))
    silent.timestamp += seconds_later
    assert min([reported, silent], key=_when).local_rank == first


def test_exit_without_exception():
    assert "exited with status 7" in _describe_exit(7)
    assert "killed by SIGSEGV" in _describe_exit(-signal.SIGSEGV)


@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_signal_to_the_tool_ends_its_workers(signum, status):
    process = start_tool("--num-gpus", "2", "hang")
    assert process.stdout.readline() == "hanging\n"
    # At least the tool, two workers, and a child of one of them.
    while len(processes_of(process)) < 4:
        time.sleep(0.1)
    started = time.monotonic()
    if signum == signal.SIGINT:
        os.killpg(process.pid, signum)  # as a terminal does
    else:
        process.send_signal(signum)
    while signum == signal.SIGKILL and processes_of(process):
        time.sleep(0.1)
    exit_status, _, stderr = finish(process)
    assert exit_status == status
    assert time.monotonic() - started < 10
    assert "Traceback" not in stderr


# ---------------------------------------------------------------------------------------------
# torchrun
# ---------------------------------------------------------------------------------------------


def test_torchrun(tmp_path):
    status, _, stderr = finish(start_tool("record", str(tmp_path), torchrun=2))
    assert status == 0, stderr
    records = read_records(tmp_path)
    assert [records[rank]["local_rank"] for rank in range(2)] == [0, 1]
    assert records[0]["backend"] == "gloo"


def test_torchrun_config_error_is_printed_once():
    status, _, stderr = finish(start_tool("config error", torchrun=2))
    assert status != 0
    assert stderr.count("error: BN.MOMENTUM 2.0") == 1


def test_torchrun_failure():
    status, _, stderr = finish(start_tool("fail", torchrun=2))
    assert status != 0
    assert "worker failed (rank 1 of 2): ValueError: the root cause" in stderr


# ---------------------------------------------------------------------------------------------
# The helper of the other tests
# ---------------------------------------------------------------------------------------------


def rank_sum(rank, world_size, offset):
    total = torch.tensor([rank + offset])
    dist.all_reduce(total)
    return total, world_size, os.getpid()


def fail_on_rank_1(rank, world_size):
    if rank == 1:
        raise ValueError("the root cause")
    dist.barrier()


def sleep_long(rank, world_size):
    time.sleep(1000)


def test_run_workers():
    first = run_workers(rank_sum, 2, 1)
    assert [(total.item(), world_size) for total, world_size, _ in first] == [(3, 2), (3, 2)]
    assert [pid for _, _, pid in run_workers(rank_sum, 2, 1)] == [pid for _, _, pid in first]
    with pytest.raises(
        AssertionError, match=r"(?s)rank 1 of 2 failed.*in fail_on_rank_1.*root cause"
    ):
        run_workers(fail_on_rank_1, 2)
    with pytest.raises(TimeoutError, match=r"workers \[0\] of 1 did not finish sleep_long"):
        run_workers(sleep_long, 1, timeout=0.5)
    assert not any(psutil.pid_exists(pid) for _, _, pid in first)


if __name__ == "__main__":
    tool(sys.argv[1:])
