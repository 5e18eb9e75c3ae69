"""Private names of other packages, collected so that a release that moves one breaks only this file.

Each is imported when it is first used, because train.py imports much of this package before torch and Hydra.  The
operators of oneDNN are in ldm/net/cpu_kernels.py instead, which consists of them.
"""

import os
import threading
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra._internal.core_plugins.file_config_source import FileConfigSource
    from hydra._internal.sources_registry import SourcesRegistry
    from hydra._internal.utils import get_args_parser
    from torch import nn
    from torch.autograd.graph import _engine_run_backward as run_backward
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves, tree_map
    from trackio.sqlite_storage import SQLiteStorage as TrackioStorage

__all__ = [
    "BasicSweeper",
    "FileConfigSource",
    "SourcesRegistry",
    "TorchDispatchMode",
    "TrackioStorage",
    "exit_with_parent",
    "get_args_parser",
    "has_fast_bfloat16",
    "is_compiled",
    "lerp_",
    "run_backward",
    "set_global_step",
    "set_logger_step",
    "take_logged",
    "trainer_of",
    "tree_leaves",
    "tree_map",
    "unscales_itself",
]

MODULES = {
    # the jobs of a sweep are listed before it starts, split exactly as Hydra's sweeper splits them, which has no public
    # method for it
    "BasicSweeper": ("hydra._internal.core_plugins.basic_sweeper", "BasicSweeper"),
    # experiments/ is a config group outside conf/: a custom source, for which Hydra has no public base class with files
    "FileConfigSource": ("hydra._internal.core_plugins.file_config_source", "FileConfigSource"),
    "SourcesRegistry": ("hydra._internal.sources_registry", "SourcesRegistry"),
    # the command line is parsed once before Hydra parses it, with Hydra's flags, so that each mistake is reported in
    # one line
    "get_args_parser": ("hydra._internal.utils", "get_args_parser"),
    # counts every operator, in the backward pass too; torch.utils.flop_counter is built on it, and PyTorch documents
    # the module
    "TorchDispatchMode": ("torch.utils._python_dispatch", "TorchDispatchMode"),
    # what a resumed run has logged already, which the public trackio.Api cannot tell
    "TrackioStorage": ("trackio.sqlite_storage", "SQLiteStorage"),
    # tensors in the arguments of an operator or in the output of a module
    "tree_leaves": ("torch.utils._pytree", "tree_leaves"),
    "tree_map": ("torch.utils._pytree", "tree_map"),
    # Tensor.backward() disables a TorchFunctionMode, and what gradient checkpointing recomputes would not be counted
    "run_backward": ("torch.autograd.graph", "_engine_run_backward"),
}


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = MODULES[name]
    return getattr(import_module(module), attribute)


def has_fast_bfloat16() -> bool:
    """Return whether this CPU multiplies bfloat16 in tiles (AMX), for which torch has no public function."""
    import torch

    return torch.cpu._is_amx_tile_supported()


def lerp_(values: list[Any], ends: list[Any], weight: float) -> None:
    """Apply lerp_ to each tensor and its end in one call, as torch's optimisers do; a call per tensor is slow."""
    import torch

    torch._foreach_lerp_(values, ends, weight)


def is_compiled(module: "nn.Module") -> bool:
    """Return whether module.compile() was called, which nn.Module stores in a private attribute only."""
    return module._compiled_call_impl is not None


def unscales_itself(optimizer: Any) -> bool:
    """Return whether an optimizer divides gradients by a GradScaler's scale in its step, as fused ones of torch do."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def trainer_of(lit: Any) -> Any:
    """Return the trainer of a LightningModule, or None without one, where its public `trainer` raises."""
    return lit._trainer


def take_logged(trainer: Any) -> dict[str, float]:
    """Return the numbers of single steps that `log` was given for the loggers since the last call, by name.

    Lightning gives its loggers the last value of a name at every later step again.  What is logged with on_epoch=True
    is left to Lightning, which logs its mean at the end of the training.
    """
    if not trainer._results:
        return {}
    values = {name: value.item() for name, value in trainer._logger_connector.metrics["log"].items()}
    _ = trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics  # read, they keep the values
    for result in trainer._results.values():
        if result.meta.on_step:
            result._forward_cache = None
    return values


def set_global_step(trainer: Any, step: int) -> None:
    """Let a trainer's `global_step` go on from that of a checkpoint that is not Lightning's."""
    loop = trainer.fit_loop.epoch_loop
    loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step
    loop.manual_optimization.optim_step_progress.total.completed = step


def set_logger_step(trainer: Any, step: int) -> None:
    """Set the step with which Lightning, and callbacks of its library, log during the first step of a training."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def exit_with_parent() -> None:
    """End this process when the process that started it by multiprocessing ends.

    torch's watchdog compares process ids, but the parent of a process started by a fork server is the server.
    parent_process() is the right one; its join waits on a pipe that closes with it (documented for child processes, not
    for a parent).
    """
    import multiprocessing

    threading.Thread(target=_exit_after, args=(multiprocessing.parent_process(),), daemon=True).start()


def _exit_after(parent: Any) -> None:
    parent.join()
    os._exit(1)
