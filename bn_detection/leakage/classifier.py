"""How well something can be told from features: a small classifier, judged on held-out images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

FOLDS = 5
_HIDDEN = 32
_STEPS, _STEPS_BETWEEN_LOOKS = 600, 30
_BATCH = 256
_RATE, _DECAY = 5e-3, 1e-2


@dataclass(frozen=True)
class CrossValidation:
    """Objects divided by their images: each fold has a classifier that never saw its images.

    Attributes:
        labels: int64 ``(N,)``, from 0.
        folds: int64 ``(N,)``, from 0 to FOLDS - 1.
        classes: C.
    """

    labels: Tensor
    folds: Tensor
    classes: int

    @classmethod
    def by_image(
        cls, labels: NDArray[np.int64], images: NDArray[np.int64], seed: int
    ) -> CrossValidation:
        """Whole images at random to folds of equal size.

        Args:
            labels: ``(N,)``, from 0.
            images: ``(N,)``, the image of each object, from 0.
            seed: of the drawing.
        """
        order = np.random.default_rng(seed).permutation(int(images.max()) + 1) % FOLDS
        number = int(labels.max()) + 1
        return cls(torch.as_tensor(labels), torch.as_tensor(order[images]), number)

    def frequencies(self) -> Tensor:
        """What :meth:`fit` starts from: the class frequencies that each fold has learned from.

        Returns:
            float32 ``(FOLDS, N, C)``, log-probabilities.
        """
        learned = [self._rows(fold)[0] for fold in range(FOLDS)]
        counts = torch.stack([F.one_hot(self.labels[k], self.classes).sum(0) for k in learned])
        shares = (counts + 0.5) / (counts + 0.5).sum(1, keepdim=True)
        return shares.log()[:, None].expand(-1, len(self.labels), -1)

    def fit(self, features: NDArray[np.float64], base: Tensor | None = None) -> Tensor:
        """Train a perceptron with two hidden layers on the features, one a fold.

        The images of another fold say when to stop. Training starts from the class frequencies, or
        from ``base``, so features that tell nothing leave what was there as it is.

        Args:
            features: ``(N, D)``.
            base: what an earlier fit gave; this one learns what to add to its logits.

        Returns:
            float32 ``(FOLDS, N, C)``, log-probabilities that the classifier of each fold gives.
        """
        x = torch.as_tensor(features, dtype=torch.float32)
        x = (x - x.mean(0)) / x.std(0, correction=0).clamp(min=1e-6)
        random = torch.Generator().manual_seed(0)
        parts = [self._rows(fold) for fold in range(FOLDS)]
        weights = self._initial(x.shape[1], random)
        base = self.frequencies() if base is None else base
        for weight in weights:
            weight.requires_grad_()
        optimizer = torch.optim.AdamW(weights, _RATE, weight_decay=_DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
        best, kept = [math.inf] * FOLDS, base.clone()
        fold = torch.arange(FOLDS)[:, None]
        for step in range(_STEPS + 1):
            if step % _STEPS_BETWEEN_LOOKS == 0:
                with torch.no_grad():
                    found = (_logits(x.expand(FOLDS, -1, -1), weights) + base).log_softmax(2)
                for k, (_, stop) in enumerate(parts):
                    loss = float(F.nll_loss(found[k, stop], self.labels[stop]))
                    if loss < best[k]:
                        best[k], kept[k] = loss, found[k]
            drawn = (torch.randint(len(learn), (_BATCH,), generator=random) for learn, _ in parts)
            chosen = torch.stack([learn[k] for (learn, _), k in zip(parts, drawn, strict=True)])
            logits = _logits(x[chosen], weights) + base[fold, chosen]
            optimizer.zero_grad()
            # The sum over folds, which share nothing.
            losses = F.cross_entropy(
                logits.flatten(0, 1), self.labels[chosen].flatten(), reduction="sum"
            )
            (losses / _BATCH).backward()
            optimizer.step()
            schedule.step()
        return kept

    def held_out(self, fitted: Tensor) -> Tensor:
        """Of each object what the classifier says that never saw its image.

        Args:
            fitted: what :meth:`fit` gave.

        Returns:
            float32 ``(N, C)``, log-probabilities.
        """
        return fitted[self.folds, torch.arange(len(self.folds))]

    def _rows(self, fold: int) -> tuple[Tensor, Tensor]:
        """Of the classifier of a fold: those that it learns from, and those that it stops by."""
        stop = self.folds == (fold + 1) % FOLDS
        learn = ~stop & (self.folds != fold)
        return torch.nonzero(learn)[:, 0], torch.nonzero(stop)[:, 0]

    def _initial(self, width: int, random: torch.Generator) -> list[Tensor]:
        weights = []
        for inputs, outputs in ((width, _HIDDEN), (_HIDDEN, _HIDDEN), (_HIDDEN, self.classes)):
            weights.append(torch.randn(FOLDS, inputs, outputs, generator=random) * inputs**-0.5)
            weights.append(torch.zeros(FOLDS, 1, outputs))
        weights[-2].zero_()  # adds nothing at first
        return weights


def _logits(x: Tensor, weights: list[Tensor]) -> Tensor:
    for layer in range(0, len(weights) - 2, 2):
        x = F.gelu(torch.baddbmm(weights[layer + 1], x, weights[layer]))
    return torch.baddbmm(weights[-1], x, weights[-2])
