"""A package of a person's own, with each part that a config can name, and its config folder: no file of ldm or conf.

Its modules have names that a config once might not contain.
"""

from pathlib import Path

NAME = "our_paper"
FILES = {
    "__init__.py": "from .ops import CrossNet\n",
    "ops.py": '''
import torch
from torch import nn


class Block(nn.Module):
    """Cross-attention from positions to the tokens of the context."""

    def __init__(self, width, context_dim, heads):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, kdim=context_dim, vdim=context_dim, batch_first=True)

    def forward(self, h, cond):
        tokens, mask = h.flatten(2).transpose(1, 2), None if cond.mask is None else ~cond.mask
        options = {"key_padding_mask": mask, "need_weights": False}
        tokens = tokens + self.attention(tokens, cond.context, cond.context, **options)[0]
        return tokens.transpose(1, 2).unflatten(2, h.shape[2:])


class CrossNet(nn.Module):
    def __init__(self, in_channels, out_channels, context_dim, width=16, heads=2):
        super().__init__()
        self.stem, self.time = nn.Conv2d(in_channels, width, 3, padding=1), nn.Linear(1, width)
        self.block = Block(width, context_dim, heads)
        self.memory = nn.Parameter(torch.zeros(width, 1, 1))  # no method, unlike the U-Net's of this name
        self.out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x, t, cond):
        h = self.stem(x) + self.time(t[:, None].to(x) / 1000)[:, :, None, None] + self.memory
        return self.out(self.block(h, cond).relu())


class Doubled(CrossNet):
    def __init__(self, width=8, **sizes):
        super().__init__(width=2 * width, **sizes)

    def forward(self, x, t, cond):
        out = super().forward(x, t, cond)
        return out.repeat(1, 1, 2, 2)


class Unary(CrossNet):
    def forward(self, x):
        return x


def built(width=8, **sizes):
    return CrossNet(width=width, **sizes)
''',
    "load.py": """
import torch
from torch import nn
from torch.nn import functional as F


class Encoder(nn.Module):
    def __init__(self, channels, z_channels, factor):
        super().__init__()
        self.factor = factor
        self.conv = nn.Conv2d(channels * factor**2, 2 * z_channels, 1)

    def forward(self, image):
        return self.conv(F.pixel_unshuffle(image, self.factor))


class Decoder(nn.Module):
    def __init__(self, channels, z_channels, factor):
        super().__init__()
        self.factor = factor
        self.conv = nn.Conv2d(z_channels, channels * factor**2, 1)

    @property
    def last_layer(self):
        return self.conv.weight

    def forward(self, z):
        return F.pixel_shuffle(self.conv(z), self.factor)


class Half(Encoder):
    def __init__(self, channels, z_channels, factor):
        super().__init__(channels, z_channels, factor // 2)


class Small(Decoder):
    def forward(self, z):
        return super().forward(z)[..., 1:]


class Unbalanced(nn.Module):
    def __init__(self, channels, z_channels, factor):
        super().__init__()
        self.decoder = Decoder(channels, z_channels, factor)

    def forward(self, z):
        return self.decoder(z)
""",
    "open.py": '''
import torch
from torch import nn

from ldm.condition import Condition
from ldm.conditioner.rows import num_rows


class Tokens(nn.Module):
    """The class and what every image has in common, as two tokens."""

    keys = ("label",)
    vector_dim, concat_channels = None, 0

    def __init__(self, num_classes, image_channels, dim=8):
        super().__init__()
        assert image_channels == 1
        self.context_dim = dim
        self.table = nn.Embedding(num_classes + 1, dim)
        self.common = nn.Parameter(torch.ones(dim))

    def tokens(self, rows):
        table = self.table(rows.to(self.common.device))
        mask = torch.ones(len(rows), 2, dtype=torch.bool, device=self.common.device)
        return Condition(context=torch.stack([table, self.common.expand_as(table)], 1), mask=mask)

    def forward(self, batch):
        return self.tokens(batch["label"])

    def null(self, batch):
        return self.tokens(torch.full((num_rows(batch),), self.table.num_embeddings - 1))


class Wide(Tokens):
    def __init__(self, num_classes, image_channels, dim=8):
        super().__init__(num_classes, image_channels, dim)
        self.context_dim = 2 * dim


class NullLess(nn.Module):
    keys, context_dim, vector_dim, concat_channels = ("label",), None, None, 0

    def forward(self, batch):
        return Condition()
''',
    "classes.py": '''
import torch

from ldm.data.memory import InMemoryDataset


class Stripes(InMemoryDataset):
    """Stripes of ten widths."""

    def __init__(self, split, num=40, size=16, seed=0, flip=False):
        labels = torch.arange(num) % 10
        column = torch.arange(size) + (0 if split == "train" else 3)
        rows = ((column[None] // (1 + labels[:, None] % 5)) % 2 * 200 + 5 * labels[:, None]).byte()
        captions = {f"stripes {k}": [f"stripes of kind {k}"] for k in range(10)}
        images = rows[:, None, None].expand(num, 1, size, size).contiguous()
        super().__init__(f"stripes-{split}", images, labels, captions, seed, flip)


class Bare:
    def __init__(self, split):
        self.classes, self.captions, self.shape, self.flip = ["a"], [["a"]], (1, 16, 16), False

    def __len__(self):
        return 8

    def batch(self, samples):
        return {}
''',
    "fields.py": '''
import torch
from torch import nn


class Waves:
    """Fields of any shape, without classes or captions, whose batches have neither key."""

    classes = captions = ()
    flip = False

    def __init__(self, split, num=20, shape=(2, 24, 40), medium="image"):
        self.shape, self.num, self.fingerprint = tuple(shape), num, f"waves-{split}-{num}-{list(shape)}"
        self.medium, self.rate = medium, 12.5 if medium == "clip" else None
        self.phase = 0.0 if split == "train" else 0.5

    def __len__(self):
        return self.num

    def batch(self, samples):
        batch = self.batch_metadata(samples)
        return {"image": self.pixels(batch["index"]), **batch}

    def batch_metadata(self, samples):
        epoch, index = map(list, zip(*samples))
        return {"flip": torch.zeros(len(index), dtype=torch.bool), "index": index, "epoch": epoch}

    def pixels(self, index):
        axes = torch.meshgrid(*(torch.linspace(0, 3 + side % 5, side) for side in self.shape[1:]), indexing="ij")
        start = self.phase + torch.arange(self.shape[0]) + torch.as_tensor(index)[:, None]
        return (sum(axes) + start.reshape(*start.shape, *[1] * len(axes))).sin()


class Shapeless(Waves):
    def __init__(self, split):
        super().__init__(split)
        del self.shape


class Local(nn.Module):
    """A convolution over one, two or three sides, then one of size 1."""

    def __init__(self, in_channels, out_channels, sides, width=8):
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[sides - 1]
        self.stem, self.time = conv(in_channels, width, 3, padding=1), nn.Linear(1, width)
        self.out = conv(width, out_channels, 1)

    def forward(self, x, t, cond):
        time = self.time(t[:, None].to(x) / 1000)
        return self.out((self.stem(x) + time.reshape(*time.shape, *[1] * (x.ndim - 2))).relu())
''',
    "compile.py": '''
from torch import nn

from ldm.diffusion.schedule import add_noise


class Absolute(nn.Module):
    """|x0 - its estimate|, at uniform times."""

    def forward(self, denoiser, x0, cond, noise, batch):
        t, eps = noise.uniform("time", x0[:, 0, 0, 0]).clamp(0.01, 0.99), noise.normal("eps", x0)
        error = (denoiser(add_noise(denoiser.schedule, x0, eps, t), t, cond).x0 - x0).abs()
        return {"loss": error.mean((1, 2, 3)), "t": t}


class Mean(Absolute):
    def forward(self, *arguments):
        return {"loss": super().forward(*arguments)["loss"].mean()}


class Bare(Absolute):
    def forward(self, *arguments):
        return super().forward(*arguments)["loss"]
''',
    "hub.py": """
from ldm.metrics.distribution import GatheredFeatures


class Spread(GatheredFeatures):
    names = ("spread",)

    def compute(self):
        return {"spread": self.values().std(0).mean().item()}


class Unfinished:
    def __init__(self, net, reference): ...
    def update(self, features, label, caption): ...
    def reset(self): ...
""",
    "jit.py": """
from ldm.diffusion.guidance import cfg
from ldm.diffusion.sampler import time_pairs


def renoise(denoise, schedule, x, ts, noise, churn: float = 1.0):
    for t, s in time_pairs(ts):
        x0 = denoise(x, t).x0
        alpha, sigma = schedule.alpha_sigma(s)
        x = alpha * x0 + churn * sigma * noise(x)
    return x


def cropped(denoise, schedule, x, ts, noise):
    return x[..., 1:]


def rising(denoiser, cond, uncond, scale: float = 1.0):
    return lambda x_t, t: cfg(denoiser, cond, uncond, 1 + (scale - 1) * (1 - float(t)))(x_t, t)
""",
    "package.py": '''
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Quarter:
    """alpha and sigma on a quarter of a circle."""

    stretch: float = 1000.0

    def alpha_sigma(self, t):
        angle = torch.pi / 2 * t.to(torch.promote_types(t.dtype, torch.float32))
        return angle.cos(), angle.sin()

    def log_snr(self, t):
        alpha, sigma = self.alpha_sigma(t)
        return 2 * (alpha / sigma).log()

    def t_from_log_snr(self, log_snr):
        return 2 / torch.pi * (-log_snr / 2).exp().atan()

    def net_time(self, t):
        return self.stretch * t


class Half:
    def alpha_sigma(self, t):
        return 1 - t, t
''',
    "exec.py": '''
import torch


class Sign(torch.optim.Optimizer):
    """Steps along the sign of a running mean of the gradient."""

    def __init__(self, params, lr, betas=(0.9, 0.99), weight_decay=0.0, fused=None):
        super().__init__(params, {"lr": lr, "beta": betas[0]})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                    mean.lerp_(p.grad, 1 - group["beta"])
                    p.add_(mean.sign(), alpha=-group["lr"])
        return loss


def nothing(params, **options):
    return [*params]
''',
    "system.py": """
def linear(step, steps, warmup: int = 0, end: float = 0.0):
    return 1 - (1 - end) * step / steps


def text(step, steps, warmup: int = 0, end: float = 0.0):
    return "fast"
""",
    "eval.py": '''
class Notes:
    """One line for each call."""

    def start(self, folder, config, choices):
        self.file = folder / "notes.txt"
        self.note(f"start {choices['net']}")

    def note(self, line):
        with self.file.open("a") as file:
            file.write(f"{line}\\n")

    def log_metrics(self, step, values):
        self.note(f"metrics {step} {sorted(values)[0]}")

    def log_file(self, step, name, path):
        self.note(f"image {step} {name}")

    def log_table(self, name, rows):
        self.note(f"table {name}")

    def finish(self, summary):
        self.note("finish")

    def close(self):
        self.note("close")


class Mute:
    def start(self, folder, config, choices): ...
''',
    "pickle.py": """
from dataclasses import dataclass

from ldm.recipes.diffusion import DiffusionRecipe


@dataclass(frozen=True, kw_only=True)
class Noted(DiffusionRecipe):
    note: str = ""

    def train(self, cfg):
        value = super().train(cfg)
        (self.run_dir(cfg) / "note.txt").write_text(self.note)
        return value
""",
}
CONF = {
    "net/cross": "_target_: our_paper.CrossNet\nwidth: 16\nheads: 2\n",
    "autoencoder/squeeze": """
_target_: ldm.autoencoder.kl.AutoencoderKL
z_channels: 4
factor: 4
encoder: {_target_: our_paper.load.Encoder, z_channels: "${..z_channels}", factor: "${..factor}"}
decoder: {_target_: our_paper.load.Decoder, z_channels: "${..z_channels}", factor: "${..factor}"}
""",
    "conditioner/tokens": "_target_: our_paper.open.Tokens\ndim: 8\n",
    "data/stripes": "_target_: our_paper.classes.Stripes\nnum: 40\nsize: 32\nseed: 0\nflip: false\n",
    "data/waves": "_target_: our_paper.fields.Waves\nnum: 20\nshape: [2, 24, 40]\nmedium: image\n",
    "net/local": "_target_: our_paper.fields.Local\nsides: 1\nwidth: 8\n",
    "objective/absolute": "_target_: our_paper.compile.Absolute\n",
    "metrics/spread": "defaults: [fd, _self_]\nmetrics: {spread: {_target_: our_paper.hub.Spread, _partial_: true}}\n",
    "sampler/renoise": "_target_: our_paper.jit.renoise\n_partial_: true\nchurn: 1.0\n",
    "guidance/rising": "_target_: our_paper.jit.rising\n_partial_: true\nscale: 3.0\n",
    "schedule/quarter": "_target_: our_paper.package.Quarter\nstretch: 1000.0\n",
    "optimizer/sign": "# @package training.optimizer\n_target_: our_paper.exec.Sign\n",
    "logger/notes": "_target_: our_paper.eval.Notes\n",
    "training/noted": "defaults: [diffusion, _self_]\n_target_: our_paper.pickle.Noted\nnote: ''\n",
    "preset/ours": """
# @package _global_
defaults:
  - override /autoencoder: squeeze
  - override /schedule: quarter
  - override /objective: absolute
  - override /sampler: renoise
  - override /guidance: rising
  - override /timestep_spacing: uniform
  - override /metrics: spread
  - override /training: noted
  - override /optimizer: sign
  - override /logger: notes
training:
  note: all of it is ours
  lr_schedule: {_target_: our_paper.system.linear}
""",
}


def write_package(folder: Path) -> Path:
    """Write the package below a folder and return its config folder."""
    for name, text in FILES.items():
        path = folder / NAME / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name, text in CONF.items():
        path = folder / NAME / "conf" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.lstrip())
    return folder / NAME / "conf"
