"""A network that takes the guidance scale as a condition."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ldm.condition import Condition
from ldm.errors import ConfigError
from ldm.net.blocks import mlp, timestep_embedding, zero_module


class GuidanceEmbedding(nn.Module):
    """A network with cond.scale (B,) added to its time embedding, initially without effect.

    Meng et al. 2023, section 3.1.

    net: constructor of the network, called with the keywords in_channels to concat_channels.
    width: number of frequencies in the scale's embedding.
    Raises ConfigError for a network with concat_vector.
    """

    net: Any  # a network with embed and memory

    def __init__(
        self,
        net: Callable[..., nn.Module],
        in_channels: int,
        out_channels: int,
        context_dim: int | None = None,
        vector_dim: int | None = None,
        concat_channels: int = 0,
        width: int = 64,
    ):
        super().__init__()
        sizes: dict[str, Any] = {
            "context_dim": context_dim,
            "vector_dim": vector_dim,
            "concat_channels": concat_channels,
        }
        self.net = net(in_channels=in_channels, out_channels=out_channels, **sizes)
        if getattr(self.net, "concat_vector", False):
            raise ConfigError("net.concat_vector=true: the scale is added to the time embedding; expected false")
        self.width = width
        self.scale = mlp(width, self.net.time[-1].out_features)
        zero_module(self.scale[-1])

    def embed(self, t: Tensor, cond: Condition) -> Tensor:
        """Compute the network's embedding plus that of the scale, which is 1 if cond.scale is None."""
        emb = self.net.embed(t, cond)
        scale = t.new_ones(len(t)) if cond.scale is None else cond.scale
        return emb + self.scale(timestep_embedding(100 * scale, self.width).to(emb))

    def memory(self, cond: Condition) -> Any:
        return self.net.memory(cond)

    def forward(self, x: Tensor, t: Tensor, cond: Condition, *, emb: Tensor | None = None, **options: Any) -> Tensor:
        return self.net(x, t, cond, emb=self.embed(t, cond) if emb is None else emb, **options)
