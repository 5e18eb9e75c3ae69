"""The network: ConvNeXt blocks with cross-attention to the tokens of the condition."""

from torch import Tensor, nn

from ldm.condition import Condition
from ldm.net.blocks import timestep_embedding


class Block(nn.Module):
    """A ConvNeXt block (Liu et al. 2022, fig. 4), modulated by the time, with cross-attention to a context."""

    def __init__(self, width: int, context_dim: int, heads: int):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.GroupNorm(1, width, affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.mlp = nn.Sequential(nn.Conv2d(width, 4 * width, 1), nn.GELU(), nn.Conv2d(4 * width, width, 1))
        self.attention = nn.MultiheadAttention(width, heads, kdim=context_dim, vdim=context_dim, batch_first=True)
        nn.init.zeros_(self.mlp[-1].weight)  # the block begins as the identity
        nn.init.zeros_(self.attention.out_proj.weight)

    def forward(self, h: Tensor, time: Tensor, cond: Condition) -> Tensor:
        scale, shift = self.modulation(time)[:, :, None, None].chunk(2, dim=1)
        h = h + self.mlp(self.norm(self.depthwise(h)) * (1 + scale) + shift)
        padding = None if cond.mask is None else ~cond.mask
        tokens = self.norm(h).flatten(2).transpose(1, 2)  # (B, h w, width)
        heard = self.attention(tokens, cond.context, cond.context, key_padding_mask=padding, need_weights=False)[0]
        return h + heard.transpose(1, 2).unflatten(2, h.shape[2:])


class ConvNeXt(nn.Module):
    """A denoiser of any image size; the first three arguments are passed by what surrounds it."""

    def __init__(
        self, in_channels: int, out_channels: int, context_dim: int, width: int = 64, depth: int = 4, heads: int = 4
    ):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU())
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(Block(width, context_dim, heads) for _ in range(depth))
        self.head = nn.Sequential(nn.GroupNorm(1, width), nn.SiLU(), nn.Conv2d(width, out_channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Return the prediction (B, out_channels, h, w) for x (B, in_channels, h, w) at the times t (B,)."""
        time = self.time(timestep_embedding(t, self.stem.out_channels).to(x.dtype))
        h = self.stem(x)
        for block in self.blocks:
            h = block(h, time, cond)
        return self.head(h)
