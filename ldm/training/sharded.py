"""Training with weights, gradients and optimizer states sharded over the processes (FSDP2, Zhao et al. 2023)."""

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import lightning as L
import torch
from torch import nn

from ldm.checkpoint.dtensor import distribute_like, full_tensors
from ldm.checkpoint.state import extra_state, load_trainable, trainable_parameters
from ldm.conditioner.none import Unconditional
from ldm.diffusion.objective import Objective
from ldm.ema import WeightAverage
from ldm.net.unet import UNet
from ldm.training.callbacks import EMACallback, EvaluationCallback, SampleGridCallback

# methods besides forward that use a module's parameters: of a conditioner, of a network and of an objective
FSDP_METHODS = tuple(method.__name__ for method in (Unconditional.null, UNet.embed, UNet.memory, Objective.loss_at))


def shard(modules: Iterable[nn.Module], mesh: Any) -> None:
    """Shard the parameters of each trainable module over the processes of a mesh; each is gathered while it is used."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    warnings.filterwarnings(
        "ignore", message="FSDP2-wrapped module"
    )  # about views changed in place, of which there are none
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
    """Yield a copy of lit to be sharded and trained, and its callbacks; at the end lit and its averages get the result.

    Scores and sample grids use the copy's average, gathered in lit: functions that sample with lit's network need no
    change, one process may sample alone, and no sharded module runs without gradients, after which FSDP2 would go on
    with the weights that it gathered for that.
    """
    other = copy.deepcopy(lit)
    averages = [callback.ema for callback in callbacks if isinstance(callback, EMACallback)]
    names = {id(module): name for name, module in lit.named_modules()}
    modules = [average.module for average in averages]
    viewers: list[Any] = [
        callback
        for callback in callbacks
        if isinstance(callback, EvaluationCallback | SampleGridCallback) and callback.ema is not None
    ]
    viewed = [viewer.ema for viewer in viewers]
    for viewer in viewers:
        average = viewer.ema
        outside = [
            (part, other.get_submodule(name)) for name, part in lit.named_children() if part is not average.module
        ]
        viewer.ema = Gathered(average, average.module, outside)
    for average in averages:
        average.module = other.get_submodule(names[id(average.module)])
    try:
        yield other, [ShardAverages(averages), *callbacks]
        with torch.no_grad():
            for name, value in full_tensors(trainable_parameters(other)).items():
                lit.get_parameter(name).copy_(value)
        for name, state in extra_state(other).items():
            lit.get_submodule(name).set_extra_state(state)
        for average in averages:
            average.shadow = {name: value.cpu() for name, value in full_tensors(average.shadow).items()}
    finally:
        for average, module in zip(averages, modules, strict=True):
            average.module = module
        for viewer, average in zip(viewers, viewed, strict=True):
            viewer.ema = average


class Gathered:
    """The average of a sharded module, for an unsharded module of the same parameter names that is not trained.

    outside: pairs of a module and the sharded one that is trained in its place, which have no average.
    """

    def __init__(self, average: WeightAverage, module: nn.Module, outside: Sequence[tuple[nn.Module, nn.Module]] = ()):
        self.average, self.module, self.outside = average, module, outside

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Give the module the averaged weights within the block, on the shards' device; all processes must enter it.

        The modules outside get the weights of training.
        """
        before, shadow = next(self.module.parameters()).device, self.average.shadow
        device = next(iter(shadow.values())).device
        load_trainable(self.module, full_tensors(shadow))
        self.module.eval().to(device)
        for part, trained in self.outside:
            load_trainable(part, full_tensors(trainable_parameters(trained)))
            part.to(device)
        try:
            yield
        finally:
            self.module.train().to(before)
            for part, _ in self.outside:
                part.to(before)


class ShardAverages(L.Callback):
    """Shard averages as their modules' weights are, and keep the weights sharded while the averages follow them."""

    def __init__(self, averages: Sequence[Any]):
        self.averages = averages

    def on_fit_start(self, trainer: L.Trainer, lit: L.LightningModule) -> None:
        for average in self.averages:
            live = trainable_parameters(average.module)
            average.shadow = {name: distribute_like(value, live[name]) for name, value in average.shadow.items()}

    def on_train_batch_end(self, trainer: L.Trainer, lit: L.LightningModule, *args: Any) -> None:
        """Give the module its shards back, which the optimizer changed: torch 2.9 leaves whole weights in it."""
        for module in lit.modules():
            if hasattr(module, "reshard"):
                cast(Any, module).reshard()
