"""A training that was interrupted and resumed ends with the bits of one that was not."""

from __future__ import annotations

import logging
import os
import random
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import run_workers
from tooling import run_script
from torch.utils.data import Dataset
from training import RETINANET, build_trainer, different, make_images, train

from bn_detection import engine
from bn_detection.data.stream import TrainLoader, continued_by
from bn_detection.workers import restarted

COMMON = (
    *("SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 3, "TEST.EVAL_PERIOD", 2),
    *("DATASETS.TEST", "()"),
    *("SOLVER.IMS_PER_BATCH", 2, "INPUT.RANDOM_FLIP", "horizontal"),
    *("INPUT.MIN_SIZE_TRAIN", "(96, 112, 128)", "DATALOADER.NUM_WORKERS", 0),
)
POOLED = ("BN.POPULATION.ESTIMATOR", "pooled", "BN.POPULATION.NUM_SAMPLES", 4)
FVCORE = ("BN.POPULATION.ESTIMATOR", "fvcore", "BN.POPULATION.NUM_SAMPLES", 4)
EMA = ("BN.POPULATION.RESTORE_EMA", True, "BN.POPULATION.PERIOD", 3)
RENORM = ("BN.RENORM.WARMUP_ITERS", 1, "BN.RENORM.R_ITERS", 9, "BN.RENORM.D_ITERS", 9)
HALF = ("SOLVER.AMP.ENABLED", True, "INPUT.MIN_SIZE_TRAIN", "(32,)")  # slow on a CPU
VARIANTS: dict[str, tuple[str, tuple[object, ...]]] = {
    "bn": ("bn", ()),
    "evaluated": ("bn", ("TEST.EVAL_PERIOD", 3)),
    "random seed": ("shuffle", ("SEED", -1)),
    "shuffle by features": ("shuffle", ("BN.SHUFFLE.MODE", "features")),
    "pooled": ("bn", POOLED),
    "restore ema": ("bn", (*POOLED, *EMA)),
    "fvcore": ("bn", FVCORE),
    "freeze": ("bn", ("BN.FREEZE.LAST_ITERS", 4)),
    "renorm": ("renorm", RENORM),
    "ghost": ("ghost", ("BN.GHOST.SIZE", 8)),
    "retinanet": ("bn", RETINANET),
    "float16": ("bn", (*HALF, "SOLVER.MAX_ITER", 2, "SOLVER.CHECKPOINT_PERIOD", 1)),
    "one image a batch": ("bn", ("DATALOADER.ASPECT_RATIO_GROUPING", False)),
}
ON_TWO_WORKERS = ("random seed", "shuffle by features", "restore ema", "fvcore", "retinanet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    make_images(folder)
    return folder


def elsewhere() -> None:
    """Another state of the generators, as in another process."""
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002
    torch.manual_seed(99)


def both(
    folder: Path, output: Path, variant: str, *then: object, at_all: tuple[object, ...] = ()
) -> list[dict[str, Any]]:
    """What an uninterrupted training leaves, and one that was resumed after half of it."""
    config, options = VARIANTS[variant]
    options = (*COMMON, *options, *at_all)
    if variant == "evaluated":
        options = [option for option in options if option not in ("DATASETS.TEST", "()")]
    whole = train(build_trainer(folder, output / "whole", *options, config=config))
    resumed = resume(folder, output, config, *options, *then)
    whole["images"] = whole["images"][len(whole["images"]) // 2 :]
    return [whole, resumed]


def resume(folder: Path, output: Path, config: str, *options: object) -> dict[str, Any]:
    """Go on from the checkpoint in the middle of ``whole``, elsewhere."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    part = output / "part"
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        part.mkdir()
        first = min((output / "whole").glob("model_0*.pth"))
        shutil.copy(first, part)
        (part / "last_checkpoint").write_text(first.name)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    trainer = build_trainer(folder, part, *options, config=config, resume=True)
    assert 2 * trainer.start_iter == trainer.max_iter
    elsewhere()
    return train(trainer)


@pytest.mark.parametrize("variant", sorted(VARIANTS.keys() - {"shuffle by features"}))
def test_one_worker(variant: str, folder: Path, tmp_path: Path) -> None:
    whole, resumed = both(folder, tmp_path, variant)
    assert different(resumed, whole) == []
    if variant == "retinanet":
        assert whole["loss normalizer"] != 100


def test_the_processes_that_load_may_be_more_or_fewer(folder: Path, tmp_path: Path) -> None:
    two = ("DATALOADER.NUM_WORKERS", 2)
    whole, resumed = both(folder, tmp_path, "bn", "DATALOADER.NUM_WORKERS", 0, at_all=two)
    assert different(resumed, whole) == []


def _workers(
    rank: int, world_size: int, folder: str, output: str, variants: tuple[str, ...]
) -> list[list[str]]:
    torch.use_deterministic_algorithms(True)
    found = []
    for variant in variants:
        images = ("SOLVER.IMS_PER_BATCH", world_size)
        pair = both(Path(folder), Path(output, variant), variant, at_all=images)
        found.append(different(*pair[::-1]))
    torch.use_deterministic_algorithms(False)
    return found


# Of three, DDP adds the gradients in an order that its first step decides.
@pytest.mark.timeout(200)
@pytest.mark.parametrize(("number", "variants"), [(2, ON_TWO_WORKERS), (3, ("random seed",))])
def test_several_workers(
    number: int, variants: tuple[str, ...], folder: Path, tmp_path: Path
) -> None:
    for found in run_workers(_workers, number, str(folder), str(tmp_path), variants, timeout=180):
        assert not any(found), dict(zip(variants, found, strict=True))


def test_another_number_of_workers_goes_on_with_a_line(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_workers(_train_whole, 2, str(folder), str(tmp_path))
    with caplog.at_level(logging.WARNING, "bn_detection"):
        resumed = resume(folder, tmp_path, "bn", *COMMON, *RETINANET)
    assert [line.message.partition(":")[0] for line in caplog.records if "bn_" in line.name] == [
        "The checkpoint is of 2 workers, and these are 1"
    ]
    saved = torch.load(tmp_path / "whole" / "model_0000002.pth")["trainer"]["resume"]
    used = [worker["loaders"][0]["used"] for worker in saved["workers"]]
    assert used == [3, 3]
    assert saved["workers"][0]["numbers"] != saved["workers"][1]["numbers"]
    assert len(resumed["images"]) == 6


def _train_whole(rank: int, world_size: int, folder: str, output: str) -> None:
    train(build_trainer(Path(folder), Path(output, "whole"), *COMMON, *RETINANET))


def test_a_checkpoint_of_before_goes_on_with_a_line(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(build_trainer(folder, tmp_path / "whole", *COMMON))
    path = tmp_path / "whole" / "model_0000002.pth"
    content = torch.load(path)
    del content["trainer"]["resume"]
    torch.save(content, path)
    with caplog.at_level(logging.WARNING, "bn_detection"):
        resume(folder, tmp_path, "bn", *COMMON)
    assert [line.message.partition(":")[0] for line in caplog.records if "bn_" in line.name] == [
        "The checkpoint does not say where the data and random numbers were"
    ]


def test_another_seed_is_not_that_of_the_checkpoint(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, resumed = both(folder, tmp_path, "bn", "SEED", 5)
    assert different(resumed, whole) == []
    assert "SEED 5 is not that of the checkpoint, 1" in caplog.text


class Numbers(Dataset):
    """Every third image is wide."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> int:
        return index


def sample(index: int) -> dict[str, Any] | None:
    if index == 4:
        return None
    draws = (random.random(), np.random.rand(), float(torch.rand(())))  # noqa: NPY002
    return {"index": index, "width": 3 if index % 3 == 0 else 1, "height": 2, "draws": draws}


def endless(seed: int) -> list[int]:
    return torch.randint(7, (200,), generator=torch.Generator().manual_seed(seed)).tolist()


def loader(num_workers: int = 0, *, seed: int = 3, group: bool = True) -> TrainLoader:
    return TrainLoader(
        *(Numbers(), sample, endless),
        **{"seed": seed, "batch_size": 3, "group": group, "num_workers": num_workers},
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_goes_on_with_the_images_that_waited_for_a_batch(num_workers: int) -> None:
    whole, batches, states = loader(), [], []
    for batch in whole:
        batches.append(batch)
        states.append(whole.state_dict())
        if len(batches) == 12:
            break
    assert any(len(state["waiting"]) > 1 for state in states)
    for batch in batches:
        assert len({item["width"] for item in batch}) == 1
    assert len({item["draws"] for batch in batches for item in batch}) == 36
    for done in (0, 3, 7):
        again = loader(num_workers, seed=8)
        again.load_state_dict(states[done])
        elsewhere()
        before = random.getstate(), torch.get_rng_state()
        iterator = iter(again)
        assert [next(iterator) for _ in range(11 - done)] == batches[done + 1 :]
        assert again.state_dict() == states[11]
        assert random.getstate() == before[0]
        assert torch.equal(torch.get_rng_state(), before[1])
        again.close()


def test_an_image_in_place_of_another_does_not_depend_on_the_past() -> None:
    samples = [item for batch, _ in zip(loader(group=False), range(20)) for item in batch]  # noqa: B905
    places = [position for position, index in enumerate(endless(3)[:60]) if index == 4]
    assert len(places) > 3
    state = loader().state_dict()
    for position in places:
        again = loader(group=False)
        again.load_state_dict({**state, "used": position})
        assert next(iter(again))[0] == samples[position]
    assert len({samples[position]["index"] for position in places}) > 1


def test_a_loader_that_has_begun_is_not_moved() -> None:
    begun = loader()
    next(iter(begun))
    with pytest.raises(RuntimeError, match="before its first batch"):
        begun.load_state_dict(loader().state_dict())


@pytest.mark.parametrize(
    ("used", "workers", "starts"), [([6, 6], 1, [12]), ([5, 7], 4, [4, 4, 3, 3]), ([9], 2, [5, 4])]
)
def test_other_workers_go_on_behind_all_that_was_used(
    used: list[int], workers: int, starts: list[int]
) -> None:
    states = [{"seed": 1, "images": 9, "used": number, "waiting": [1]} for number in used]
    found = [continued_by(states, rank, workers) for rank in range(workers)]
    assert [state["used"] for state in found] == starts
    assert all(state["waiting"] == [] for state in found)


def _trainings(folder: str, output: str) -> None:
    """One that nothing disturbs, and one of which a worker is killed once."""
    torch.use_deterministic_algorithms(True)
    if not restarted():
        engine.train(build_trainer(Path(folder), Path(output, "whole"), *COMMON).cfg, resume=False)
    cfg = build_trainer(Path(folder), Path(output, "killed"), *COMMON).cfg
    run_step = engine.Trainer.run_step

    def run_or_die(trainer: engine.Trainer) -> None:
        if trainer.iter == 4 and torch.distributed.get_rank() == 1 and not restarted():
            os.kill(os.getpid(), signal.SIGKILL)
        run_step(trainer)

    engine.Trainer.run_step = run_or_die
    engine.train(cfg, resume=False)


@pytest.mark.timeout(240)
def test_restarted_workers_go_on_from_the_last_checkpoint(folder: Path, tmp_path: Path) -> None:
    run = run_script(__file__, folder, tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    whole, killed = (
        torch.load(tmp_path / name / "model_final.pth")["model"] for name in ("whole", "killed")
    )
    assert different(whole, killed) == []
    assert "worker failed (rank 1 of 2): it was killed by SIGKILL" in run.stderr
    assert run.stderr.count("the workers start again (1 of 2 restarts)") == 1


if __name__ == "__main__":
    engine.launch(_trainings, 2, device="cpu", args=sys.argv[1:], max_restarts=2)
