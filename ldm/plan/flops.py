"""What a computation would cost, found out on the meta device: nothing is calculated, every shape, dtype and lifetime is real."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import flop_registry

from ldm.compat import TorchDispatchMode, run_backward, tree_leaves, tree_map

LOW = (
    torch.conv2d,
    F.linear,
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.bmm,
    torch.addmm,
)  # what autocast rounds
FULL = (
    torch.group_norm,
    F.group_norm,
    F.layer_norm,
    torch.layer_norm,
    torch.softmax,
    F.softmax,
    Tensor.softmax,
)  # what it does not


@dataclass(frozen=True)
class Cost:
    """Of one forward and backward pass: FLOPs (a multiplication and an addition are two), bytes that the backward pass finds kept, and
    the most bytes alive at any moment, gradients included, parameters not."""

    flops: int
    saved_for_backward: int
    peak: int


class FlopMemoryMode(TorchDispatchMode):
    """Counts FLOPs, and the bytes of tensors made within it for as long as they live: `now`, and the most there were, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.now = self.peak = 0
        self.known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        given = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        for one in tree_leaves(out):
            if isinstance(one, Tensor) and one.untyped_storage()._cdata not in given:
                self._born(one.untyped_storage())
        return out

    def _born(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return

        def died(_: object) -> None:
            self.known.pop(key, None)
            self.now -= size

        self.known[key] = weakref.ref(storage, died)
        self.now += size
        self.peak = max(self.peak, self.now)


class GpuKernelMode(TorchFunctionMode):
    """What a GPU does and the meta device does not: attention in one kernel that keeps no scores, and the casts of autocast in `dtype`."""

    def __init__(self, dtype: torch.dtype | None = None):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k, v = (self._cast(one, self.dtype) for one in args[:3])
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
        if self.dtype is not None and func in LOW:
            args, kwargs = tree_map(lambda x: self._cast(x, self.dtype), (args, kwargs))
        if self.dtype is not None and func in FULL:
            args, kwargs = tree_map(lambda x: self._cast(x, torch.float32), (args, kwargs))
        return func(*args, **kwargs)

    @staticmethod
    def _cast(one: Any, dtype: torch.dtype | None) -> Any:
        return one.to(dtype) if dtype is not None and isinstance(one, Tensor) and one.is_floating_point() else one


@contextmanager
def meta_device() -> Iterator[None]:
    """Within it modules are built without memory and without drawing their weights."""
    with torch.device("meta"):
        yield


def training_cost(
    step: Callable[[int], Tensor], parameters: list[Tensor], batch: int, dtype: torch.dtype | None = None
) -> Cost:
    """The cost of step(batch) -> loss and its backward pass. dtype: of autocast, None for none."""
    with FlopMemoryMode() as meter, GpuKernelMode(dtype):
        loss = step(batch)
        kept = meter.now
        backward_cost(loss)
    for one in parameters:
        one.grad = None
    return Cost(meter.flops, kept, meter.peak)


def backward_cost(loss: Tensor) -> None:
    """loss.backward(), but that a TorchFunctionMode stays on while it runs: for what checkpointing computes again."""
    run_backward((loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True)


def forward_cost(run: Callable[[int], Any], batch: int, dtype: torch.dtype | None = None) -> Cost:
    """The cost of run(batch) without a backward pass."""
    with torch.no_grad(), FlopMemoryMode() as meter, GpuKernelMode(dtype):
        run(batch)
    return Cost(meter.flops, 0, meter.peak)


def num_bytes(tensors: Mapping[str, Tensor] | list[Tensor]) -> int:
    """Bytes of tensors, one that is there twice counted once."""
    found = tensors.values() if isinstance(tensors, Mapping) else tensors
    return sum(one.numel() * one.element_size() for one in {id(one): one for one in found}.values())
