"""Objects from a composed config, leaves first; every node that owns weights is built once and handed on as an object."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch is slow to import, and train.py reads SUPPLIED before it knows that the config is right
    from ldm.model import LatentDiffusion

SUPPLIED = {  # what the builders pass themselves, which a config need not hold
    **dict.fromkeys(
        ("ldm.net.unet.UNet", "ldm.net.dit.DiT"), ("in_channels", "out_channels", "context_dim", "vector_dim", "concat_channels")
    ),
    "ldm.autoencoder.patch.PatchEncoder": ("channels",),
    "ldm.autoencoder.patch.PatchDecoder": ("channels",),
    "ldm.autoencoder.conv.Encoder": ("channels",),
    "ldm.autoencoder.conv.Decoder": ("channels",),
    "ldm.autoencoder.identity.Identity": ("channels",),
    "ldm.conditioner.label.Label": ("num_classes",),
    "ldm.conditioner.label.LabelVector": ("num_classes",),
    "ldm.stage.diffusion.train": ("cfg",),
    "ldm.stage.autoencoder.train": ("cfg",),
    "ldm.stage.judge.train": ("cfg",),
}


def plain(cfg: Any) -> Any:
    """A config as plain data, interpolations resolved."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else cfg


def dataset(cfg: Any, split: str = "train"):
    """The data set of a config's `data` node; split: train or test."""
    from hydra.utils import instantiate

    return instantiate(cfg.data, split=split)


def degraded(cfg: Any, split: str = "train"):
    """The data set as a diffusion model sees it: with the low resolution and the masks of the config's `degrade` node."""
    from hydra.utils import instantiate

    return instantiate(cfg.degrade)(dataset(cfg, split))


def autoencoder(node: Any, channels: int):
    """A first stage for images of `channels` channels, not trained."""
    from hydra.utils import instantiate

    asked = {"channels": channels}
    parts = {name: asked for name in ("encoder", "decoder") if "channels" in needs(node.get(name, {}))}
    return instantiate(node, **parts, **(asked if "channels" in needs(node) else {}))


def model(cfg: Any, autoencoder, data) -> "LatentDiffusion":
    """A latent diffusion model in the given first stage's latent space, with fresh weights drawn from the config's seed."""
    import torch
    from hydra.utils import instantiate

    from ldm.diffusion.denoiser import Denoiser
    from ldm.model import LatentDiffusion
    from ldm.tensors import key

    torch.manual_seed(key(cfg.seed, "weights"))
    conditioner = instantiate(cfg.conditioner, **({"num_classes": len(data.classes)} if "num_classes" in needs(cfg.conditioner) else {}))
    net = instantiate(
        cfg.net,
        in_channels=autoencoder.z_channels,
        out_channels=autoencoder.z_channels * (2 if cfg.get("learned_variance") else 1),
        context_dim=conditioner.context_dim,
        vector_dim=conditioner.vector_dim,
    )
    denoiser = Denoiser(net, instantiate(cfg.schedule), instantiate(cfg.prediction))
    return LatentDiffusion(autoencoder, conditioner, denoiser, (data.size, data.size))


def needs(node: Any) -> tuple[str, ...]:
    """The parameters of a node's target that the builders supply."""
    return SUPPLIED.get(node.get("_target_", ""), ())
