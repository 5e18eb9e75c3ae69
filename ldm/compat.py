"""Names of other packages that are not part of their public interface, gathered so that a release that moves one breaks this file alone.

Each is imported when it is first used: train.py reads much of this package before torch and Hydra.  The operators of oneDNN are in
ldm/net/cpu_kernels.py, of which they are the subject.
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

__all__ = [
    "BasicSweeper",
    "FileConfigSource",
    "SourcesRegistry",
    "TorchDispatchMode",
    "exit_with_parent",
    "get_args_parser",
    "has_fast_bfloat16",
    "is_compiled",
    "lerp_",
    "run_backward",
    "trainer_of",
    "tree_leaves",
    "tree_map",
]

MODULES = {
    # the jobs of a sweep are listed before it begins, split exactly as Hydra's own sweeper splits them; it has no public way to ask
    "BasicSweeper": ("hydra._internal.core_plugins.basic_sweeper", "BasicSweeper"),
    # experiments/ is a config group, but lies outside conf/: a source of our own, for which Hydra has no public base class with files
    "FileConfigSource": ("hydra._internal.core_plugins.file_config_source", "FileConfigSource"),
    "SourcesRegistry": ("hydra._internal.sources_registry", "SourcesRegistry"),
    # the command line is read once before Hydra does, with its own flags, so that mistakes are one line each
    "get_args_parser": ("hydra._internal.utils", "get_args_parser"),
    # every operator that runs is counted, in the backward pass too; torch.utils.flop_counter is built on it, PyTorch documents the module
    "TorchDispatchMode": ("torch.utils._python_dispatch", "TorchDispatchMode"),
    # tensors within the arguments of an operator, or within the answer of a module
    "tree_leaves": ("torch.utils._pytree", "tree_leaves"),
    "tree_map": ("torch.utils._pytree", "tree_map"),
    # Tensor.backward() switches a TorchFunctionMode off, and what gradient checkpointing computes again would not be counted
    "run_backward": ("torch.autograd.graph", "_engine_run_backward"),
}


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = MODULES[name]
    return getattr(import_module(module), attribute)


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in tiles (AMX), which torch knows and has no public function for."""
    import torch

    return torch.cpu._is_amx_tile_supported()


def lerp_(values: list[Any], ends: list[Any], weight: float) -> None:
    """torch.lerp of each tensor with its end, in place, in one call for all, as torch's optimisers do; one by one is slow."""
    import torch

    torch._foreach_lerp_(values, ends, weight)


def is_compiled(module: "nn.Module") -> bool:
    """Whether module.compile() was called: nn.Module keeps what it compiled to, and has no other way to ask."""
    return module._compiled_call_impl is not None


def trainer_of(lit: Any) -> Any:
    """The trainer that a LightningModule is in, None outside of one, where its public `trainer` raises."""
    return lit._trainer


def exit_with_parent() -> None:
    """Ends this process when the one that started it by multiprocessing ends.

    torch's own watch compares process ids, and the parent of one that a fork server started is the server; parent_process() is the right
    one, and waits on a pipe that closes with it (its join is documented for processes, not for a parent).
    """
    import multiprocessing

    threading.Thread(target=_exit_after, args=(multiprocessing.parent_process(),), daemon=True).start()


def _exit_after(parent: Any) -> None:
    parent.join()
    os._exit(1)
