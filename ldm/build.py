"""Objects from a composed config, leaves first; every node that owns weights is built once and handed on as an object."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch is slow to import, and train.py reads SUPPLIED before it knows that the config is right
    from ldm.model import LatentDiffusion

SUPPLIED = {  # what the builders pass themselves, which a config need not hold
    **dict.fromkeys(
        ("ldm.net.unet.UNet", "ldm.net.dit.DiT", "ldm.net.told_scale.ToldScale"),
        ("in_channels", "out_channels", "context_dim", "vector_dim", "concat_channels"),
    ),
    "ldm.autoencoder.patch.PatchEncoder": ("channels",),
    "ldm.autoencoder.patch.PatchDecoder": ("channels",),
    "ldm.autoencoder.conv.Encoder": ("channels",),
    "ldm.autoencoder.conv.Decoder": ("channels",),
    "ldm.autoencoder.identity.Identity": ("channels",),
    "ldm.conditioner.label.Label": ("num_classes",),
    "ldm.conditioner.label.LabelVector": ("num_classes",),
    "ldm.conditioner.spatial.SemanticMap": ("factor",),
    "ldm.conditioner.spatial.Picture": ("factor",),
    "ldm.conditioner.spatial.LowRes": ("factor", "channels"),
    "ldm.conditioner.spatial.MaskedImage": ("factor", "z_channels", "encode"),
    "ldm.stage.diffusion.train": ("cfg",),
    "ldm.stage.autoencoder.train": ("cfg",),
    "ldm.stage.published.train": ("cfg",),
    "ldm.fitted.chosen": ("cfg",),
    "ldm.stage.judge.train": ("cfg",),
    "ldm.stage.classifier.train": ("cfg",),
    "ldm.stage.clip.train": ("cfg",),
}


def plain(cfg: Any) -> Any:
    """A config as plain data, interpolations resolved."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else cfg


def dataset(cfg: Any, split: str = "train"):
    """The data set of a config's `data` node; split: train or test."""
    from hydra.utils import instantiate

    return instantiate(cfg.data, split=split)


def settled(cfg: Any) -> Any:
    """The config with what its data set chooses and says of itself on sight of the files, so that the names of runs depend on them.

    Then comes its `choose` node, where it has one: a function that changes the config and says so.
    The process that a person started, which finds the config without, prints what they say.
    """
    import os

    from hydra.utils import get_object, instantiate

    said = []
    if hasattr(get_object(cfg.data["_target_"]), "settled"):
        data = dataset(cfg)
        if cfg.data.content is None:
            said.append(data.summary)
        for name, value in data.settled.items():
            cfg.data[name] = value
    if cfg.get("choose"):
        said.append(instantiate(cfg.choose, _recursive_=False)(cfg))
        cfg.choose = None
    if said and os.environ.get("RANK", "0") == "0":
        print(*said, sep="\n", flush=True)
    return cfg


def degraded(cfg: Any, split: str = "train"):
    """The data set as a diffusion model sees it: with the low resolution and the masks of the config's `degrade` node.

    To train on, in the images' own shapes where it has these.
    """
    from hydra.utils import instantiate

    data = dataset(cfg, split)
    if split == "train" and hasattr(data, "shaped"):
        data = data.shaped(divisor(cfg))
    return instantiate(cfg.degrade)(data)


def divisor(cfg: Any) -> int:
    """What must divide height and width of an image: the first stage's factor times the network's patch, or what it shrinks by."""
    net = cfg.net
    while hasattr(net.get("net"), "items"):  # one around another
        net = net["net"]
    return cfg.autoencoder.get("factor", 1) * net.get("patch", 2 ** (len(net.get("mult", [1])) - 1))


def undegraded(cfg: Any) -> None:
    """Raises UserError for a config with a `degrade` node, or an adapter: only a denoiser is told what the one makes, or has the other."""
    from ldm.errors import UserError

    if cfg.get("adapter"):
        raise UserError("adapter= is for training=diffusion alone: leave it out")
    if cfg.get("degrade") and cfg.degrade["_target_"] != "ldm.data.degrade.none":
        raise UserError("degrade= is for training=diffusion alone, this one sees the images as they are: leave it out, or degrade=none")


def labelled(*data: Any) -> None:
    """Raises UserError for data sets with samples that have no label: a classifier learns from the label of each."""
    from ldm.errors import UserError

    if count := sum(getattr(one, "unlabelled", 0) for one in data):
        total = sum(map(len, data))
        raise UserError(f"{count:,} of {total:,} samples have no label, and a classifier needs one of each: leave them out")


def autoencoder(node: Any, channels: int):
    """A first stage for images of `channels` channels, not trained."""
    from hydra.utils import instantiate

    return instantiate(node, **wanted(node, {"channels": channels}))


def conditioner(node: Any, autoencoder, data):
    """A conditioner, whole or composed of several, for a first stage and a data set."""
    from hydra.utils import instantiate

    known = {
        "num_classes": len(data.classes),
        "channels": data.channels,
        "factor": autoencoder.factor,
        "z_channels": autoencoder.z_channels,
        "encode": lambda image: autoencoder.encode(image),  # not the bound method: Hydra copies what it is given, the first stage with it
    }
    return instantiate(node, **wanted(node, known))


def net(cfg: Any, autoencoder, told):
    """A config's network for the latents of a first stage, told by a conditioner."""
    from hydra.utils import instantiate

    return instantiate(
        cfg.net,
        in_channels=autoencoder.z_channels,
        out_channels=autoencoder.z_channels * (2 if cfg.get("learned_variance") else 1),
        context_dim=told.context_dim,
        vector_dim=told.vector_dim,
        concat_channels=told.concat_channels,
    )


def model(cfg: Any, autoencoder, data) -> "LatentDiffusion":
    """A latent diffusion model in the given first stage's latent space, with fresh weights drawn from the config's seed."""
    import torch
    from hydra.utils import instantiate

    from ldm.diffusion.denoiser import Denoiser
    from ldm.model import LatentDiffusion
    from ldm.tensors import key

    torch.manual_seed(key(cfg.seed, "weights"))
    told = conditioner(cfg.conditioner, autoencoder, data)
    denoiser = Denoiser(net(cfg, autoencoder, told), instantiate(cfg.schedule), instantiate(cfg.prediction))
    return LatentDiffusion(autoencoder, told, denoiser, (data.size, data.size))


def needs(node: Any) -> tuple[str, ...]:
    """The parameters of a node's target that the builders supply."""
    return SUPPLIED.get(node.get("_target_", ""), ())


def wanted(node: Any, known: dict[str, Any]) -> dict[str, Any]:
    """Of what is known, what the targets of a node and of those within it need: keywords for instantiate."""
    inner = {name: wanted(child, known) for name, child in node.items() if hasattr(child, "items")}
    return {name: known[name] for name in needs(node)} | {name: found for name, found in inner.items() if found}
