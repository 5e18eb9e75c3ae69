"""What a training says when it begins: how large it is, how it learns, how fast it will go."""

from collections.abc import Callable
from typing import Any

import lightning as L

from ldm.compat import is_compiled
from ldm.io.progress import format_duration
from ldm.training.profiler import synchronized_time

MEASURED_STEPS = 3  # steps that are timed, after those that warm up
WARMUP_STEPS = {
    False: 1,
    True: 4,
}  # steps that warm up: one of a compiled network counts FLOPs, and each of the next may compile
MIN_REMAINING_STEPS = 10  # steps still to go for which it is worth saying how long they take


class StartupReport(L.Callback):
    """Prints parameters, steps, effective batch and peak learning rate; after a few steps the images per second to expect.

    Where a module is compiled it says how long that took.
    """

    phase = "logging"

    def __init__(self, name: str, total: int, schedule: Callable[[int, int], float], accumulate: int = 1):
        self.name, self.total, self.schedule, self.accumulate = name, total, schedule, accumulate
        self.compiled = False
        self.marks: list[float] = []  # when the first step began, and when each ended

    def on_train_batch_start(
        self, trainer: L.Trainer, lit: L.LightningModule, batch: dict[str, Any], batch_idx: int
    ) -> None:
        if self.marks or not trainer.is_global_zero:
            return
        self.compiled = any(map(is_compiled, lit.modules()))
        self.marks.append(synchronized_time(lit.device))
        parameters = sum(p.numel() for p in lit.parameters() if p.requires_grad)
        some = range(batch["step"], self.total, max(1, (self.total - batch["step"]) // 1000))
        peak = max(self.schedule(step, self.total) for step in some)
        rates = sorted(
            {group.get("base_lr", group["lr"]) * peak for one in trainer.optimizers for group in one.param_groups}
        )
        parts = [(trainer.world_size, "processes"), (self.accumulate, "batches")]
        shared = " x ".join(f"{number} {what}" for number, what in parts if number > 1)
        each = f" ({shared} x {batch['total'] // (trainer.world_size * self.accumulate)})" if shared else ""
        print(
            f"{self.name:<12}{parameters:,} parameters, {self.total:,} steps of {batch['total']} images{each}, "
            f"learning rate up to {', '.join(f'{rate:.3g}' for rate in rates)}",
            flush=True,
        )

    def on_train_batch_end(
        self, trainer: L.Trainer, lit: L.LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        left, warm = self.total - batch["step"] - 1, WARMUP_STEPS[self.compiled]
        if len(self.marks) > warm + MEASURED_STEPS or not trainer.is_global_zero:
            return
        self.marks.append(synchronized_time(lit.device))
        if len(self.marks) > warm + MEASURED_STEPS:
            step = max((self.marks[-1] - self.marks[warm]) / MEASURED_STEPS, 1e-9)
            if self.compiled:
                spent = self.marks[warm] - self.marks[0] - warm * step
                print(f"\n{self.name:<12}compiled in {format_duration(max(spent, 0.0))}", flush=True)
            if left >= MIN_REMAINING_STEPS:
                print(
                    f"\n{self.name:<12}about {batch['total'] / step:,.3g} images/s to expect, {format_duration(left * step)} to go",
                    flush=True,
                )
