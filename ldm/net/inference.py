"""A network prepared for sampling: the same signature and the same results, faster.

What the steps of one sampling run share is computed once; on a CPU the layers are packed, in the precision of sampling.
"""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ldm.condition import Condition

MAX_CACHED_CONDITIONS = 4  # with and without guidance, for a network and for a second one that guides it


class InferenceNet(nn.Module):
    """A network with `embed` and `memory`, and a packed copy for sampling that caches keys and values per Condition.

    A time that is the same for all rows is embedded once.  Later changes of the weights, or of a Condition in place,
    have no effect.
    With gradients enabled, the original network is called.
    dtype: of matrix products on a CPU.
    """

    original: Any
    net: Any

    def __init__(self, net: nn.Module, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.original, self.net = net, pack_copy(net, dtype)
        self.cache: list[tuple[Condition, Any]] = []

    def memory(self, cond: Condition) -> Any:
        """Return the network's memory of this Condition object; the last few are cached."""
        for cached, memory in self.cache:
            if cached is cond:
                return memory
        self.cache = [*self.cache[1 - MAX_CACHED_CONDITIONS :], (cond, self.net.memory(cond))]
        return self.cache[-1][1]

    def embed(self, t: Tensor, cond: Condition) -> Tensor:
        """Compute the embedding (B, E), or (1, E) if t is one expanded number and cond adds nothing to it."""
        is_same = t.stride(0) == 0 and cond.vector is None and cond.scale is None
        return self.net.embed(t[:1] if is_same else t, cond)

    def forward(self, x: Tensor, t: Tensor, cond: Condition, **options: Any) -> Tensor:
        if torch.is_grad_enabled():
            return self.original(x, t, cond, **options)
        if x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)  # attention's tokens are then a view
        return self.net(x, t, cond, emb=self.embed(t, cond), memory=self.memory(cond), **options)


@contextmanager
def fast_inference(model: Any, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Let a LatentDiffusion sample with an InferenceNet and a packed first stage within the block.

    A network that does not share work between steps (see `shares_work`) is left unchanged.
    """
    net, autoencoder = model.denoiser.net, model.autoencoder
    model.denoiser.net = InferenceNet(net, dtype) if shares_work(net) else net
    model.autoencoder = pack_copy(autoencoder, dtype)
    try:
        yield
    finally:
        model.denoiser.net, model.autoencoder = net, autoencoder


def shares_work(net: nn.Module) -> bool:
    """Return whether a network has `embed` and `memory`, and a forward that takes their results as emb= and memory=."""
    parameters = inspect.signature(net.forward).parameters.values()
    names = {parameter.name for parameter in parameters}
    accepts_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    methods = all(callable(getattr(net, name, None)) for name in ("embed", "memory"))
    return methods and (accepts_any or {"emb", "memory"} <= names)


def pack_copy(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a packed copy of a module with float32 weights on a CPU that has kernels for dtype.

    Any other module is returned itself.
    """
    weight = next(module.parameters(), None)
    if (
        weight is None
        or weight.device.type != "cpu"
        or weight.dtype != torch.float32
        or not torch.backends.mkldnn.is_available()
    ):
        return module
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return module
    from ldm.net.cpu_kernels import pack  # here, because it names operators that a torch without oneDNN lacks

    # a memo of all weights, so that only the modules are copied
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return pack(copy.deepcopy(module, shared).eval(), dtype)
