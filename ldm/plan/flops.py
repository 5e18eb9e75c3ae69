"""Measure FLOPs and memory of a computation on the meta device: shapes and lifetimes are real, nothing is computed."""

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

# Functions that autocast runs in low precision.
LOW = (
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    F.linear,
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.bmm,
    torch.addmm,
)
# Functions that autocast runs in float32.
FULL = (
    torch.group_norm,
    F.group_norm,
    F.layer_norm,
    torch.layer_norm,
    torch.softmax,
    F.softmax,
    Tensor.softmax,
)


@dataclass(frozen=True)
class Cost:
    """Cost of one forward and backward pass.

    flops: a multiplication and an addition count as two.  saved_for_backward: bytes alive after the forward pass.
    peak: maximum of bytes alive at any time, including gradients, excluding parameters.
    """

    flops: int
    saved_for_backward: int
    peak: int


class FlopMemoryMode(TorchDispatchMode):
    """Count FLOPs, and the bytes of tensors created within it while they live: `now`, and the maximum, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.now = self.peak = 0
        self.known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        inputs = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in inputs:
                self._track(x.untyped_storage())
        return out

    def _track(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return

        def forget(_: object) -> None:
            self.known.pop(key, None)
            self.now -= size

        self.known[key] = weakref.ref(storage, forget)
        self.now += size
        self.peak = max(self.peak, self.now)


class GpuKernelMode(TorchFunctionMode):
    """Imitate what a GPU does and the meta device does not.

    Attention is one kernel that does not store the scores, and autocast casts to `dtype`.
    """

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
    def _cast(x: Any, dtype: torch.dtype | None) -> Any:
        return x.to(dtype) if dtype is not None and isinstance(x, Tensor) and x.is_floating_point() else x


@contextmanager
def meta_device() -> Iterator[None]:
    """Build modules without allocating or initializing their weights."""
    with torch.device("meta"):
        yield


def training_cost(
    step: Callable[[int], Tensor], parameters: list[Tensor], batch: int, dtype: torch.dtype | None = None
) -> Cost:
    """Return the cost of step(batch) -> loss and its backward pass; dtype: of autocast, or None."""
    with FlopMemoryMode() as meter, GpuKernelMode(dtype):
        loss = step(batch)
        saved = meter.now
        backward_cost(loss)
    for one in parameters:
        one.grad = None
    return Cost(meter.flops, saved, meter.peak)


def backward_cost(loss: Tensor) -> None:
    """Run loss.backward() with the TorchFunctionMode still active, for what activation checkpointing recomputes."""
    run_backward((loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True)


def forward_cost(run: Callable[[int], Any], batch: int, dtype: torch.dtype | None = None) -> Cost:
    """Return the cost of run(batch) without a backward pass."""
    with torch.no_grad(), FlopMemoryMode() as meter, GpuKernelMode(dtype):
        run(batch)
    return Cost(meter.flops, 0, meter.peak)


def num_bytes(tensors: Mapping[str, Tensor] | list[Tensor]) -> int:
    """Return the bytes of tensors, counting a tensor that appears twice once."""
    unique = {id(x): x for x in (tensors.values() if isinstance(tensors, Mapping) else tensors)}
    return sum(x.numel() * x.element_size() for x in unique.values())
