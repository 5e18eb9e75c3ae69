"""Time of training steps by phase, their FLOPs, and the peak FLOP/s of a device."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import lightning as L
import torch
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy
from torch.utils.flop_counter import flop_registry

from ldm.compat import TorchDispatchMode, trainer_of

# names of actions that Lightning's loops write out as text, and of hooks
DATALOADER_NEXT, TRAINING_BATCH = "train_dataloader_next", "run_training_batch"
BEFORE_BACKWARD, AFTER_BACKWARD = L.Callback.on_before_backward.__name__, L.Callback.on_after_backward.__name__
# phase by the name of the profiled function of Lightning, whichever object has it
HOOKS = {
    **dict.fromkeys((DATALOADER_NEXT, Strategy.batch_to_device.__name__), "data"),
    Strategy.training_step.__name__: "forward",
    Strategy.backward.__name__: "backward",
    Strategy.optimizer_step.__name__: "optimiser",
    L.LightningModule.optimizer_zero_grad.__name__: "optimiser",
    L.LightningModule.on_before_optimizer_step.__name__: "optimiser",
}
# "callbacks": those of a config, which Lightning calls itself; "other": loops, and ldm's callbacks without a phase
ORDER = ("data", "encode", "forward", "backward", "optimiser", "EMA", "logging", "saving", "callbacks", "other")
ATEN = torch.ops.aten
# torch counts no attention of the CPU's kernels: it costs what that of the GPU's kernels does.
FLOP_COUNTS = flop_registry | {
    ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[ATEN._scaled_dot_product_flash_attention],
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        ATEN._scaled_dot_product_flash_attention_backward
    ],
}
SIDE = {"cpu": 1024, "cuda": 8192}  # rows of the square matrices whose product measures a device's peak


class StepTimer(L.Callback):
    """Time each step of a training; seconds: of the steps, in order."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.since = 0.0

    def on_train_batch_start(self, trainer, lit, batch, batch_idx) -> None:
        self.since = synchronized_time(lit.device)

    def on_train_batch_end(self, trainer, lit, outputs, batch, batch_idx) -> None:
        self.seconds.append(synchronized_time(lit.device) - self.since)


def synchronized_time(device: torch.device) -> float:
    """Return the time in seconds on a monotonic clock, after the device has finished its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


class PhaseProfiler(Profiler):
    """Seconds spent in each phase of ORDER, every second in exactly one, and the FLOPs of a step.

    parts: batches that make a step.  clock: returns the time in seconds.
    grouped: state key of the callbacks that time what they call themselves; all others are of the phase "callbacks".
    """

    def __init__(self, parts: int = 1, clock: Callable[[], float] = time.monotonic, grouped: str = ""):
        super().__init__()
        self.clock, self.parts, self.grouped = clock, parts, grouped
        self.seconds = dict.fromkeys(ORDER, 0.0)
        self.doing = ["other"]  # phases that are active, the innermost last
        self.outer: str | None = None  # during a backward pass, the phase around it
        self.since = clock()
        self.counter, self.counted = FlopCounter(), -parts

    @property
    def flops(self) -> int | None:
        """Return the FLOPs of this process's second step, None before its end: the first step does some work once."""
        return self.counter.flops if self.counted == self.parts else None

    def start(self, action_name: str) -> None:
        self._until_now()
        if action_name.endswith(AFTER_BACKWARD) and self.outer is not None:
            self.doing[-1], self.outer = self.outer, None
        self.doing.append(self._phase(action_name))
        if action_name == TRAINING_BATCH and 0 <= self.counted < self.parts:
            self.counter.__enter__()

    def stop(self, action_name: str) -> None:
        if action_name == TRAINING_BATCH and self.counted < self.parts:
            if self.counted >= 0:
                self.counter.__exit__(None, None, None)
            self.counted += 1
        self._until_now()
        self.doing.pop()
        if action_name.endswith(BEFORE_BACKWARD) and self.outer is None:
            self.outer, self.doing[-1] = self.doing[-1], "backward"

    def elapsed(self) -> dict[str, float]:
        """Return `seconds` up to this moment."""
        self._until_now()
        return dict(self.seconds)

    def describe(self) -> None:
        """Print nothing at the end of the training."""

    def _phase(self, action: str) -> str:
        """Return the phase of an action: a phase's own name, or Lightning's text [kind of owner]owner.function."""
        owner, _, function = action.rpartition(".")
        if owner.startswith("[Callback]") and owner != f"[Callback]{self.grouped}":
            return "callbacks"
        return action if action in ORDER else HOOKS.get(function, "other")

    def _until_now(self) -> None:
        moment = self.clock()
        self.seconds[self.doing[-1]] += moment - self.since
        self.since = moment


def phase_of(callback: L.Callback) -> str | None:
    """Return the phase of a callback of ldm, its attribute `phase`; None without one: that of the hook.

    Raises ValueError for a phase that is not in ORDER.
    """
    phase = getattr(callback, "phase", None)
    if phase is not None and phase not in ORDER:
        raise ValueError(f"{type(callback).__name__}.phase={phase!r}: expected one of {', '.join(ORDER)}")
    return phase


def phase(lit: L.LightningModule, kind: str) -> AbstractContextManager:
    """Return a context whose time counts as a phase of a module's training; without a trainer it has no effect."""
    trainer = trainer_of(lit)
    return nullcontext() if trainer is None else profiler_of(trainer).profile(kind)


def profiler_of(trainer: Any) -> PhaseProfiler:
    """Return a trainer's profiler."""
    return trainer.profiler


class FlopCounter(TorchDispatchMode):
    """Count the FLOPs of products, convolutions and attention within the block, a multiply-add as two.

    flops: counted so far.
    torch's FlopCounterMode decomposes operators in order to count them, which changes the last digits of the counted
    step; this one runs each operator as it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (count := FLOP_COUNTS.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        return out


def peak_flops(precision: str, device: torch.device) -> float:
    """Measure the FLOP/s of a product of two square matrices in one of Lightning's precisions: the fastest of three."""
    dtype = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}.get(
        precision.partition("-")[0], torch.float32
    )
    return _peak(dtype, device, torch.get_num_threads())


@cache
def _peak(dtype: torch.dtype, device: torch.device, threads: int) -> float:
    side = SIDE.get(device.type, SIDE["cpu"])
    a, seconds = torch.ones(side, side, dtype=dtype, device=device), []
    for _ in range(3):
        start = synchronized_time(device)
        a @ a
        seconds.append(synchronized_time(device) - start)
    return 2 * side**3 / max(min(seconds), 1e-9)


def table(spent: Mapping[str, float], steps: int) -> str:
    """Format the seconds by phase as lines of milliseconds per step and shares, which add up to the step's."""
    total = max(sum(spent.values()), 1e-12)
    rows = [*((kind, spent[kind]) for kind in ORDER), ("a step", total)]
    return "\n".join(
        f"{kind:<12}{1e3 * seconds / steps:>12.3f} ms{100 * seconds / total:>10.2f} %" for kind, seconds in rows
    )
