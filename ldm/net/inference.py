"""A network prepared for drawing: the same signature and the same answers, sooner.

What the steps of one drawing share is computed once; on a CPU the layers are packed, in the precision of the drawing.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ldm.condition import Condition

MAX_CACHED_CONDITIONS = 4  # conditions: with and without guidance, of a network and of what guides it


class InferenceNet(nn.Module):
    """A network with `embed` and `memory`, and its copy that draws: it keeps what it looked up for a Condition, and embeds one time once.

    Of weights changed afterwards, or of a Condition changed in place, it knows nothing.  Asked for gradients, the network itself answers.
    dtype: in which a CPU multiplies.
    """

    original: Any
    net: Any

    def __init__(self, net: nn.Module, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.original, self.net = net, pack_copy(net, dtype)
        self.kept: list[tuple[Condition, Any]] = []

    def memory(self, cond: Condition) -> Any:
        """The network's memory of this very Condition; of the last few it is kept."""
        for told, memory in self.kept:
            if told is cond:
                return memory
        self.kept = [*self.kept[1 - MAX_CACHED_CONDITIONS :], (cond, self.net.memory(cond))]
        return self.kept[-1][1]

    def embed(self, t: Tensor, cond: Condition) -> Tensor:
        """The embedding (B, E), or (1, E) where t is one number expanded and the rows differ in nothing that it tells."""
        alike = t.stride(0) == 0 and cond.vector is None and cond.scale is None
        return self.net.embed(t[:1] if alike else t, cond)

    def forward(self, x: Tensor, t: Tensor, cond: Condition, **given: Any) -> Tensor:
        if torch.is_grad_enabled():
            return self.original(x, t, cond, **given)
        x = x.contiguous(memory_format=torch.channels_last)  # of which attention's tokens are a view
        return self.net(x, t, cond, emb=self.embed(t, cond), memory=self.memory(cond), **given)


@contextmanager
def fast_inference(model: Any, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Within it a LatentDiffusion draws by a prepared network, and by a packed first stage; a network without a memory draws as it is."""
    net, autoencoder = model.denoiser.net, model.autoencoder
    model.denoiser.net = InferenceNet(net, dtype) if hasattr(net, "memory") else net
    model.autoencoder = pack_copy(autoencoder, dtype)
    try:
        yield
    finally:
        model.denoiser.net, model.autoencoder = net, autoencoder


def pack_copy(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A packed copy of a module with float32 weights on a CPU that has kernels for dtype; any other module as it is."""
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
    from ldm.net.cpu_kernels import pack  # which names operators that a torch without oneDNN lacks

    shared = {
        id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())
    }  # a copy of the modules, not of the weights
    return pack(copy.deepcopy(module, shared).eval(), dtype)
