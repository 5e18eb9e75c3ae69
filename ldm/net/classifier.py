"""ADM's classifier of noisy states: the U-Net's encoder and attention pooling.

Dhariwal & Nichol 2021, sec. 4 and app. H.
"""

import math
from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.condition import Condition
from ldm.errors import ConfigError
from ldm.net.attention import AttentionFn, QKVAttention, sdpa, tokens
from ldm.net.blocks import Downsample, norm
from ldm.net.unet import Attention, MemoryCursor, UNetBlockConfig, UNetEncoder, transformer_depths


class AttentionPool(nn.Module):
    """A feature map (B, C, ...) -> (B, out): the mean of its positions is a token that attends to all tokens.

    CLIP's pooling.  size: the map's sides.  Raises ConfigError for a map of another size, because the position
    embeddings are learned.
    """

    def __init__(self, size: Sequence[int], channels: int, heads: int, out: int, attend: AttentionFn = sdpa):
        super().__init__()
        self.size, self.heads, self.attend = tuple(size), heads, attend
        self.positions = nn.Parameter(torch.randn(math.prod(size) + 1, channels) * channels**-0.5)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, out)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] != self.size:
            found, learned = (" x ".join(map(str, sides)) for sides in (x.shape[2:], self.size))
            raise ConfigError(f"a map of {found}: this pooling has learned {learned} positions")
        h = tokens(x)
        h = torch.cat([h.mean(1, keepdim=True), h], dim=1) + self.positions  # (B, 1 + N, C)
        q, k, v = rearrange(self.qkv(h), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        return self.out(rearrange(self.attend(q[:, :, :1], k, v, None), "b h 1 d -> b (h d)"))


class NoisyClassifier(UNetEncoder):
    """Class logits (B, classes) of x_t (B, in_channels, *size) at the network's time t (B,).

    For guidance=classifier.
    size: the sides of x_t, (height, width) of an image's.  The other options are UNet's.
    Raises ConfigError for an x_t of another size.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        size: Sequence[int],
        channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (2, 4, 8),
        num_head_channels: int = 64,
        dropout: float = 0.0,
        num_groups: int = 32,
        eps: float = 1e-5,
        block: Callable[..., Attention] = QKVAttention,
        attention_fn: AttentionFn = sdpa,
        gradient_checkpointing: bool = False,
    ):
        config = UNetBlockConfig(
            4 * channels,
            None,
            None,
            num_head_channels,
            dropout,
            True,
            True,
            num_groups,
            eps,
            block,
            Downsample,
            attention_fn,
            len(size),
        )
        depths = transformer_depths(1, attention_resolutions, len(channel_mult))
        super().__init__(
            config,
            in_channels,
            channels,
            channel_mult,
            num_res_blocks,
            depths,
            gradient_checkpointing=gradient_checkpointing,
        )
        width, factor = self.skip_widths[-1], 2 ** (len(channel_mult) - 1)
        self.out = nn.Sequential(
            norm(width, num_groups, eps),
            nn.SiLU(),
            AttentionPool(
                [-(-side // factor) for side in size], width, width // num_head_channels, classes, attention_fn
            ),
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h, _ = self.encode(self.stem(x), self.embed(t, Condition()), MemoryCursor(None))
        return self.out(h)
