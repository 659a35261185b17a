"""The schedule of Batch Renormalization."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RenormSchedule:
    """How far Batch Renormalization may correct, by training step.

    Ioffe 2017 (arXiv:1702.03275), Sec. 3 and 4: r is clipped to [1 / r_max, r_max] and d to
    [-d_max, d_max]. Until ``warmup`` r_max is 1 and d_max 0, which is plain BN; then they rise
    linearly. The defaults are the paper's.

    Attributes:
        r_max: final limit of r, at least 1.
        d_max: final limit of d, at least 0.
        warmup: steps of plain BN.
        r_steps: step at which ``r_max`` is reached.
        d_steps: step at which ``d_max`` is reached.

    Raises:
        ValueError: a limit or step that cannot be.
    """

    r_max: float = 3.0
    d_max: float = 5.0
    warmup: float = 5_000
    r_steps: float = 40_000
    d_steps: float = 25_000

    def __post_init__(self) -> None:
        least = (
            ("R_MAX", self.r_max, 1),
            ("D_MAX", self.d_max, 0),
            ("WARMUP_ITERS", self.warmup, 0),
            ("R_ITERS", self.r_steps, self.warmup),
            ("D_ITERS", self.d_steps, self.warmup),
        )
        for key, value, minimum in least:
            if value < minimum:
                why = " (BN.RENORM.WARMUP_ITERS)" if key in ("R_ITERS", "D_ITERS") else ""
                raise ValueError(f"BN.RENORM.{key} {value} must be at least {minimum}{why}.")

    def scaled(self, factor: float) -> RenormSchedule:
        """The same limits at ``factor`` times the steps."""
        steps = (self.warmup * factor, self.r_steps * factor, self.d_steps * factor)
        return RenormSchedule(self.r_max, self.d_max, *steps)

    def limits(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """r_max and d_max after a number of training steps (0-dim), as 0-dim float64 tensors."""
        steps = steps.double()
        past = steps - self.warmup
        r = (past / max(self.r_steps - self.warmup, 1)).clamp(0, 1)
        d = (past / max(self.d_steps - self.warmup, 1)).clamp(0, 1)
        return 1 + r * (self.r_max - 1), d * self.d_max
