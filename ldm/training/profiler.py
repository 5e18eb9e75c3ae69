"""How long training steps take, what the time goes into, and how much arithmetic that is of what the device can do."""

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import lightning as L
import torch
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ldm.compat import trainer_of

HOOKS = {  # by the functions of Lightning that are called, whoever has them
    **dict.fromkeys(("train_dataloader_next", Strategy.batch_to_device.__name__), "data"),
    Strategy.training_step.__name__: "forward",
    Strategy.backward.__name__: "backward",
    Strategy.optimizer_step.__name__: "optimiser",
    L.LightningModule.optimizer_zero_grad.__name__: "optimiser",
    L.LightningModule.on_before_optimizer_step.__name__: "optimiser",
}
ORDER = ("data", "encode", "forward", "backward", "optimiser", "EMA", "logging", "saving", "other")
ATEN = torch.ops.aten
COUNTED = {  # torch has no formula for attention on a CPU: these are its own for the same attention on a GPU
    ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(
        g, q, k, v
    ),
}
SIDE = {"cpu": 1024, "cuda": 8192}  # of the product that a device's peak is measured with


class StepTimer(L.Callback):
    """seconds: of each step of the training, in order."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.since = 0.0

    def on_train_batch_start(self, trainer, lit, batch, batch_idx) -> None:
        self.since = synchronized_time(lit.device)

    def on_train_batch_end(self, trainer, lit, outputs, batch, batch_idx) -> None:
        self.seconds.append(synchronized_time(lit.device) - self.since)


def synchronized_time(device: torch.device) -> float:
    """Seconds on a clock, once the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


class PhaseProfiler(Profiler):
    """seconds: spent so far by kind (ORDER), each second in one of them.  flops: of this process's second step, None before its end: in
    the first much is done once, as captions are read.

    parts: batches that a step is made of.  clock: what tells the time.  callbacks: what they do counts as their `phase`
    says.
    """

    def __init__(
        self, parts: int = 1, clock: Callable[[], float] = time.monotonic, callbacks: Iterable[L.Callback] = ()
    ):
        super().__init__()
        self.clock, self.parts = clock, parts
        self.phases = {f"[Callback]{one.state_key}": phase for one in callbacks if (phase := phase_of(one)) != "other"}
        self.seconds = dict.fromkeys(ORDER, 0.0)
        self.doing = ["other"]  # the innermost last
        self.around: str | None = None  # what goes on around a backward pass, while there is one
        self.since = clock()
        self.counter, self.counted, self.total = count_flops(), -parts, 0

    @property
    def flops(self) -> int | None:
        return self.total if self.counted == self.parts else None

    def start(self, action_name: str) -> None:
        self._until_now()
        if action_name.endswith("on_after_backward") and self.around is not None:
            self.doing[-1], self.around = self.around, None
        self.doing.append(self._phase(action_name))
        if action_name == "run_training_batch" and 0 <= self.counted < self.parts:
            self.counter.__enter__()

    def stop(self, action_name: str) -> None:
        if action_name == "run_training_batch" and self.counted < self.parts:
            if self.counted >= 0:
                self.counter.__exit__(None, None, None)
                self.total += self.counter.get_total_flops()
            self.counted += 1
        self._until_now()
        self.doing.pop()
        if action_name.endswith("on_before_backward") and self.around is None:
            self.around, self.doing[-1] = self.doing[-1], "backward"

    def elapsed(self) -> dict[str, float]:
        """seconds, up to this moment."""
        self._until_now()
        return dict(self.seconds)

    def describe(self) -> None:
        """Nothing at the end: those who want to know ask before."""

    def _phase(self, action: str) -> str:
        """Of a phase's own name, or of what Lightning calls a call: [kind of owner]owner.function."""
        owner, _, function = action.rpartition(".")
        return action if action in ORDER else self.phases.get(owner) or HOOKS.get(function, "other")

    def _until_now(self) -> None:
        moment = self.clock()
        self.seconds[self.doing[-1]] += moment - self.since
        self.since = moment


def phase_of(callback: L.Callback) -> str:
    """What the time of a callback counts as, one of ORDER: its attribute `phase`, if it has one."""
    return getattr(callback, "phase", "other")


def phase(lit: L.LightningModule, kind: str) -> AbstractContextManager:
    """What is done within the block is of this kind, in a training."""
    trainer = trainer_of(lit)
    return nullcontext() if trainer is None else profiler_of(trainer).profile(kind)


def profiler_of(trainer: Any) -> PhaseProfiler:
    """What counts a trainer's seconds."""
    return trainer.profiler


def count_flops() -> FlopCounterMode:
    """Count the FLOPs of products, convolutions and attention within the block, a multiplication and an addition being two."""
    return FlopCounterMode(display=False, custom_mapping=COUNTED)


def peak_flops(precision: str, device: torch.device) -> float:
    """FLOP/s of a product of two square matrices in the precision that Lightning names so: the fastest of three."""
    kind = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}.get(
        precision.partition("-")[0], torch.float32
    )
    return _peak(kind, device, torch.get_num_threads())


@cache
def _peak(dtype: torch.dtype, device: torch.device, threads: int) -> float:
    side = SIDE.get(device.type, SIDE["cpu"])
    a, seconds = torch.ones(side, side, dtype=dtype, device=device), []
    for _ in range(3):
        since = synchronized_time(device)
        a @ a
        seconds.append(synchronized_time(device) - since)
    return 2 * side**3 / max(min(seconds), 1e-9)


def table(spent: Mapping[str, float], steps: int) -> str:
    """Seconds by kind as lines of milliseconds a step and shares, which add up to the whole."""
    whole = max(sum(spent.values()), 1e-12)
    rows = [*((kind, spent[kind]) for kind in ORDER), ("a step", whole)]
    return "\n".join(
        f"{kind:<12}{1e3 * seconds / steps:>12.3f} ms{100 * seconds / whole:>10.2f} %" for kind, seconds in rows
    )
