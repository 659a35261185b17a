"""Running statistics averaged over workers, against the weighted mean written out."""

from __future__ import annotations

import pytest
import torch
from distributed import run_workers
from torch import Tensor, nn


def _statistics(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(4, generator=generator), torch.rand(4, generator=generator)


def _averaged(rank: int, world_size: int, seen: list[int]) -> dict[str, Tensor]:
    from bn_detection.population import average_running_statistics

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(2))
    if seen[rank]:
        mean, var = _statistics(rank)
        model[1].running_mean.copy_(mean)
        model[1].running_var.copy_(var)
        model[1].num_batches_tracked.fill_(seen[rank])
    average_running_statistics(model)
    return {name: value for name, value in model.state_dict().items() if "conv" not in name}


@pytest.mark.parametrize("seen", [[5, 5], [7, 0, 4], [3, 2], [0, 0]])
@pytest.mark.timeout(120)
def test_running_statistics_are_averaged_by_the_mini_batches_in_them(seen: list[int]) -> None:
    results = run_workers(_averaged, len(seen), seen)
    if any(seen):
        weighted = [(n, *_statistics(rank)) for rank, n in enumerate(seen)]
        mean = sum(n * m.double() for n, m, _ in weighted).div(sum(seen)).float()
        var = sum(n * v.double() for n, _, v in weighted).div(sum(seen)).float()
    else:
        mean, var = torch.zeros(4), torch.ones(4)
    for result in results:
        assert torch.allclose(result["1.running_mean"], mean, atol=1e-7)
        assert torch.allclose(result["1.running_var"], var, atol=1e-7)
        assert torch.equal(result["1.running_mean"], results[0]["1.running_mean"])
        assert torch.equal(result["1.running_var"], results[0]["1.running_var"])
        assert torch.equal(result["2.running_var"], torch.ones(2))
