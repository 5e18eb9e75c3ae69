"""Training with weights, gradients and optimiser states shared out among the processes (FSDP2, Zhao et al. 2023)."""

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import nn

from ldm.checkpoint.dtensor import distribute_like, full_tensors
from ldm.checkpoint.state import extra_state, load_trainable, trainable_parameters
from ldm.ema import PowerEMA
from ldm.training.callbacks import EMACallback, EvaluationCallback, SampleGridCallback

FSDP_METHODS = ("null", "embed", "memory", "at")  # besides forward, through which parameters of ours are used


def shard(modules: Iterable[nn.Module], mesh: Any) -> None:
    """Share out the parameters of each module that has any over the processes of a mesh; it is put together while it is used."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # views changed in place: ours are not
    for module in modules:
        if any(p.requires_grad for p in module.parameters()):
            fully_shard(module, mesh=mesh)
            for name in FSDP_METHODS:
                if hasattr(module, name):
                    register_fsdp_forward_method(module, name)


@contextmanager
def sharded_copy(
    lit: L.LightningModule, callbacks: Sequence[L.Callback]
) -> Iterator[tuple[L.LightningModule, list[L.Callback]]]:
    """A copy of lit to be sharded and trained, and the callbacks for it; at the end lit, and its averages, are what it became.

    Scores and pictures are of the copy's average, gathered in lit: what draws by lit's network needs no change, one
    process may draw alone, and no sharded module runs without gradients, after which FSDP2 would go on with the weights
    that it gathered for that.
    """
    other = copy.deepcopy(lit)
    averages = [one.ema for one in callbacks if isinstance(one, EMACallback)]
    names = {id(module): name for name, module in lit.named_modules()}
    modules = [one.module for one in averages]
    viewers: list[Any] = [
        one for one in callbacks if isinstance(one, EvaluationCallback | SampleGridCallback) and one.ema is not None
    ]
    viewed = [one.ema for one in viewers]
    for viewer in viewers:
        viewer.ema = Gathered(viewer.ema, viewer.ema.module)
    for one in averages:
        one.module = other.get_submodule(names[id(one.module)])
    try:
        yield other, [ShardAverages(averages), *callbacks]
        with torch.no_grad():
            for name, value in full_tensors(trainable_parameters(other)).items():
                lit.get_parameter(name).copy_(value)
        for name, state in extra_state(other).items():
            lit.get_submodule(name).set_extra_state(state)
        for one in averages:
            one.shadow = {name: value.cpu() for name, value in full_tensors(one.shadow).items()}
    finally:
        for one, module in zip(averages, modules, strict=True):
            one.module = module
        for viewer, average in zip(viewers, viewed, strict=True):
            viewer.ema = average


class Gathered:
    """The average of a sharded module, shown in an unsharded module with parameters of the same names, which nothing trains."""

    def __init__(self, average: PowerEMA, module: nn.Module):
        self.average, self.module = average, module

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the module has the averaged weights, on the device of the shards; all processes must enter it."""
        before, shadow = next(self.module.parameters()).device, self.average.shadow
        load_trainable(self.module, full_tensors(shadow))
        self.module.eval().to(next(iter(shadow.values())).device)
        try:
            yield
        finally:
            self.module.train().to(before)


class ShardAverages(L.Callback):
    """Shares out averages as the weights that they are of."""

    def __init__(self, averages: Sequence[Any]):
        self.averages = averages

    def on_fit_start(self, trainer: L.Trainer, lit: L.LightningModule) -> None:
        for one in self.averages:
            live = trainable_parameters(one.module)
            one.shadow = {name: distribute_like(value, live[name]) for name, value in one.shadow.items()}
