"""Report at the start of a training: its size, batch, learning rate and speed."""

from collections.abc import Callable
from typing import Any

import lightning as L

from ldm.compat import is_compiled
from ldm.io.progress import format_duration
from ldm.training.profiler import synchronized_time

MEASURED_STEPS = 3  # timed steps, after those of the warm-up
# warm-up steps by whether a network is compiled: one then counts FLOPs, and each of the next may compile
WARMUP_STEPS = {False: 1, True: 4}
MIN_REMAINING_STEPS = 10  # no time is predicted for fewer steps


class StartupReport(L.Callback):
    """Print parameters, steps, effective batch and peak learning rate, and after a few steps the images per second.

    For a compiled network the time of compilation is printed too.
    """

    phase = "logging"

    def __init__(self, name: str, total: int, schedule: Callable[[int, int], float], accumulate: int = 1):
        self.name, self.total, self.schedule, self.accumulate = name, total, schedule, accumulate
        self.compiled = False
        self.marks: list[float] = []  # times of the start of the first step and of the end of each, in seconds

    def on_train_batch_start(
        self, trainer: L.Trainer, lit: L.LightningModule, batch: dict[str, Any], batch_idx: int
    ) -> None:
        if self.marks or not trainer.is_global_zero:
            return
        self.compiled = any(map(is_compiled, lit.modules()))
        self.marks.append(synchronized_time(lit.device))
        parameters = sum(p.numel() for p in lit.parameters() if p.requires_grad)
        steps = range(batch["step"], self.total, max(1, (self.total - batch["step"]) // 1000))
        peak = max(self.schedule(step, self.total) for step in steps)
        rates = sorted(
            {group.get("base_lr", group["lr"]) * peak for o in trainer.optimizers for group in o.param_groups}
        )
        parts = [(trainer.world_size, "processes"), (self.accumulate, "batches")]
        factors = " x ".join(f"{number} {unit}" for number, unit in parts if number > 1)
        each = f" ({factors} x {batch['total'] // (trainer.world_size * self.accumulate)})" if factors else ""
        print(
            f"{self.name:<12}{parameters:,} parameters, {self.total:,} steps of {batch['total']} images{each}, "
            f"learning rate up to {', '.join(f'{rate:.3g}' for rate in rates)}",
            flush=True,
        )

    def on_train_batch_end(
        self, trainer: L.Trainer, lit: L.LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        remaining, warm = self.total - batch["step"] - 1, WARMUP_STEPS[self.compiled]
        if len(self.marks) > warm + MEASURED_STEPS or not trainer.is_global_zero:
            return
        self.marks.append(synchronized_time(lit.device))
        if len(self.marks) > warm + MEASURED_STEPS:
            step = max((self.marks[-1] - self.marks[warm]) / MEASURED_STEPS, 1e-9)
            if self.compiled:
                compilation = self.marks[warm] - self.marks[0] - warm * step
                print(f"\n{self.name:<12}compiled in {format_duration(max(compilation, 0.0))}", flush=True)
            if remaining >= MIN_REMAINING_STEPS:
                rate, time = f"{batch['total'] / step:,.3g} images/s", format_duration(remaining * step)
                print(f"\n{self.name:<12}about {rate} to expect, {time} to go", flush=True)
