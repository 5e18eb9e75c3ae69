"""The peers' recipes: a network, what it is trained on, its loss and its average, and how its weights are drawn from."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import Eps
from ldm.model import LatentDiffusion

BATCH, WARMUP, DROP = 128, 100, 0.1
State = dict[str, Tensor]


class Space:
    """A first stage and what it made of the data: where a peer is trained."""

    def __init__(self, autoencoder: Any, data: Any):
        from ldm.data.latents import LatentDataset, encode_latents

        self.autoencoder, self.latents = autoencoder, LatentDataset(data, encode_latents(autoencoder, data))

    def batch(self) -> tuple[Tensor, dict[str, Any]]:
        """z (BATCH, C, h, w) of images drawn at random, and what is known of them."""
        batch = self.latents.batch([(0, int(i)) for i in torch.randint(len(self.latents), (BATCH,))])
        with torch.no_grad():
            posterior = self.autoencoder.posterior_of(batch["moments"])
            return self.autoencoder.normalise(posterior.sample(torch.randn_like(posterior.mean))), batch


class Diffusers:
    """diffusers' UNet2DConditionModel, told captions, trained as train_text_to_image.py trains: epsilon, AdamW, a
    constant rate, EMAModel.

    widths: channels of its levels; the rest is as in conf/net/quick.yaml.
    """

    def __init__(self, name: str, space: Space, conditioner: Any, size: tuple[int, int], widths: Sequence[int]):
        from diffusers import DDPMScheduler

        self.name, self.space, self.conditioner, self.size, self.widths = name, space, conditioner, size, widths
        self.scheduler, self.null = DDPMScheduler(), conditioner.null({"index": [0]})

    def net(self) -> Any:
        from diffusers import UNet2DConditionModel

        channels, levels = self.space.autoencoder.z_channels, len(self.widths)
        return UNet2DConditionModel(
            **{
                "sample_size": 8,
                "in_channels": channels,
                "out_channels": channels,
                "block_out_channels": tuple(self.widths),
            },
            **{
                "down_block_types": ("DownBlock2D",) * levels,
                "up_block_types": ("UpBlock2D",) * levels,
                "layers_per_block": 1,
            },
            **{
                "cross_attention_dim": self.conditioner.context_dim,
                "attention_head_dim": 3,
                "norm_num_groups": self.widths[0] // 16,
            },
            **{"resnet_time_scale_shift": "scale_shift", "use_linear_projection": True},
        )

    def optimizer(self, net: Any, rate: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=1e-2)

    def average(self, net: Any) -> tuple[Callable[[], None], Callable[[], State]]:
        from diffusers.training_utils import EMAModel

        average = EMAModel(net.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
        names = [name for name, _ in net.named_parameters()]
        return lambda: average.step(net.parameters()), lambda: dict(zip(names, average.shadow_params, strict=True))

    def loss(self, net: Any, z: Tensor, batch: dict[str, Any]) -> Tensor:
        with torch.no_grad():
            cond = self.conditioner(batch).where(torch.rand(BATCH) >= DROP, self.null.index([0] * BATCH))
        noise, t = torch.randn_like(z), torch.randint(0, 1000, (BATCH,))
        out = net(self.scheduler.add_noise(z, noise, t), t, cond.context, encoder_attention_mask=cond.mask).sample
        return F.mse_loss(out.float(), noise)

    def model(self, state: State) -> LatentDiffusion:
        """Their weights in our network, so that all are drawn by one code."""
        from hydra.utils import instantiate

        from ldm.diffusion.schedule import linear
        from ldm.interop import diffusers, diffusers_config

        config = self.net().config
        made = instantiate(diffusers_config.net(dict(config)), in_channels=config.in_channels, out_channels=config.out_channels,
                           context_dim=config.cross_attention_dim)  # fmt: skip
        made.load_state_dict(diffusers.import_unet(dict(state)))
        return LatentDiffusion(
            self.space.autoencoder, self.conditioner, Denoiser(made.eval(), linear(), Eps()), self.size
        )


class DenoisingDiffusion:
    """denoising-diffusion-pytorch's U-Net and GaussianDiffusion in pixels, told the class, with its Trainer's Adam,
    clipping and EMA.
    """

    name = "denoising-diffusion-pytorch"

    def __init__(self, space: Space, classes: int, size: tuple[int, int]):
        self.space, self.classes, self.size = space, classes, size

    def net(self) -> Any:
        from denoising_diffusion_pytorch.classifier_free_guidance import GaussianDiffusion, Unet

        channels = self.space.autoencoder.z_channels
        unet = Unet(24, self.classes, cond_drop_prob=DROP, dim_mults=(1, 2, 4), channels=channels)
        return GaussianDiffusion(unet, image_size=self.size[0])

    def optimizer(self, net: Any, rate: float) -> torch.optim.Optimizer:
        return torch.optim.Adam(net.parameters(), lr=rate, betas=(0.9, 0.99))

    def average(self, net: Any) -> tuple[Callable[[], None], Callable[[], State]]:
        from ema_pytorch import EMA

        average = EMA(net, beta=0.995, update_every=10, include_online_model=False)
        return average.update, lambda: average.ema_model.state_dict()

    def loss(self, net: Any, z: Tensor, batch: dict[str, Any]) -> Tensor:
        return net(z / 2 + 0.5, classes=batch["label"])  # it asks for [0, 1]

    def model(self, state: State) -> LatentDiffusion:
        from ldm.conditioner.none import Unconditional
        from ldm.diffusion.schedule import from_betas

        diffusion = self.net()
        diffusion.load_state_dict(state)
        denoiser = Denoiser(Told(diffusion.model.eval()), from_betas(diffusion.betas), Eps())
        return LatentDiffusion(self.space.autoencoder, Unconditional(), denoiser, self.size)


class Told(nn.Module):
    """Its U-Net under our networks' signature, told the label."""

    def __init__(self, unet: Any):
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return self.unet(x, t, cond.label, cond_drop_prob=0.0)


Recipe = Diffusers | DenoisingDiffusion


def trained(recipe: Recipe, rate: float, marks: Sequence[float], seed: int) -> Iterator[tuple[int, dict[str, State]]]:
    """Train; at each mark, in seconds of CPU time, the step and the weights {"raw": ..., "ema": ...}. Scoring is not on
    the clock.
    """
    torch.manual_seed(seed)
    net = recipe.net().train()
    optimizer, (follow, averaged) = recipe.optimizer(net, rate), recipe.average(net)
    low, spent, step = torch.cpu._is_amx_tile_supported(), 0.0, 0
    for mark in marks:
        since = time.process_time()
        while spent + time.process_time() - since < mark:
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / WARMUP)
            z, batch = recipe.space.batch()
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                loss = recipe.loss(net, z, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            follow()
            step += 1
        spent += time.process_time() - since
        yield step, {"raw": net.state_dict(), "ema": averaged()}
