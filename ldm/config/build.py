"""Objects from a composed config, leaves first; every node that owns weights is built once and handed on as an object."""

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from ldm.model import LatentDiffusion


RUNTIME_PARAMETERS = {  # what the builders pass themselves, which a config need not hold
    **dict.fromkeys(
        ("ldm.net.unet.UNet", "ldm.net.dit.DiT", "ldm.net.guidance_embedding.GuidanceEmbedding"),
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
    "ldm.conditioner.spatial.SpatialMap": ("factor",),
    "ldm.conditioner.spatial.LowResolution": ("factor", "channels"),
    "ldm.conditioner.spatial.MaskedImage": ("factor", "z_channels", "encode"),
    "ldm.recipes.auto_config.choose_first_stage_and_net": ("cfg",),
}


def to_container(cfg: Any) -> Any:
    """A config as plain data, interpolations resolved."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else cfg


def build_dataset(cfg: Any, split: str = "train"):
    """The data set of a config's `data` node; split: train or test."""

    from hydra.utils import instantiate

    return instantiate(cfg.data, split=split)


def resolve_dataset_config(cfg: Any) -> Any:
    """The config with what its data set chooses and says of itself on sight of the files, so that the names of runs depend on them.

    Then comes its `choose` node, where it has one: a function that changes the config and says so.
    The process that a person started, which finds the config without, prints what they say.
    """
    from hydra.utils import instantiate

    import os

    from hydra.utils import get_object

    said = []
    if hasattr(get_object(cfg.data["_target_"]), "resolved_config"):
        data = build_dataset(cfg)
        if cfg.data.content_hash is None:
            said.append(data.summary)
        for name, value in data.resolved_config.items():
            cfg.data[name] = value
    if cfg.get("auto"):
        said.append(instantiate(cfg.auto, _recursive_=False)(cfg))
        cfg.auto = None
    if said and os.environ.get("RANK", "0") == "0":
        print(*said, sep="\n", flush=True)
    return cfg


def build_degraded_dataset(cfg: Any, split: str = "train"):
    """The data set as a diffusion model sees it: with the low resolution and the masks of the config's `degrade` node.

    To train on, in the images' own shapes where it has these.
    """

    from hydra.utils import instantiate

    data = build_dataset(cfg, split)
    if split == "train" and hasattr(data, "to_buckets"):
        data = data.to_buckets(image_size_multiple(cfg))
    return instantiate(cfg.degradation)(data)


def image_size_multiple(cfg: Any) -> int:
    """What must divide height and width of an image: the first stage's factor times the network's patch, or what it shrinks by."""
    net = cfg.net
    while hasattr(net.get("net"), "items"):  # one around another
        net = net["net"]
    return cfg.autoencoder.get("factor", 1) * net.get("patch_size", 2 ** (len(net.get("channel_mult", [1])) - 1))


def reject_degradation(cfg: Any) -> None:
    """Raises UserError for a config with a `degrade` node, or an adapter: only a denoiser is told what the one makes, or has the other."""
    from ldm.errors import UserError

    if cfg.get("adapter"):
        raise UserError("adapter= is for training=diffusion alone: leave it out")
    if cfg.get("degradation") and cfg.degradation["_target_"] != "ldm.data.degrade.identity":
        raise UserError(
            "degrade= is for training=diffusion alone, this one sees the images as they are: leave it out, or degradation=none"
        )


def require_labels(*data: Any) -> None:
    """Raises UserError for data sets with samples that have no label: a classifier learns from the label of each."""
    from ldm.errors import UserError

    if count := sum(getattr(one, "unlabelled", 0) for one in data):
        total = sum(map(len, data))
        raise UserError(
            f"{count:,} of {total:,} samples have no label, and a classifier needs one of each: leave them out"
        )


def build_autoencoder(node: Any, channels: int):
    """A first stage for images of `channels` channels, not trained."""

    from hydra.utils import instantiate

    return instantiate(node, **nested_kwargs(node, {"channels": channels}))


def build_conditioner(node: Any, autoencoder, data):
    """A conditioner, whole or composed of several, for a first stage and a data set."""

    from hydra.utils import instantiate

    known = {
        "num_classes": len(data.classes),
        "channels": data.channels,
        "factor": autoencoder.factor,
        "z_channels": autoencoder.z_channels,
        "encode": lambda image: autoencoder.encode(
            image
        ),  # not the bound method: Hydra copies what it is given, the first stage with it
    }
    return instantiate(node, **nested_kwargs(node, known))


def build_network(cfg: Any, autoencoder, told):
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


def build_model(cfg: Any, autoencoder, data) -> "LatentDiffusion":
    """A latent diffusion model in the given first stage's latent space, with fresh weights drawn from the config's seed."""
    import torch

    from hydra.utils import instantiate

    from ldm.diffusion.denoiser import Denoiser
    from ldm.model import LatentDiffusion
    from ldm.tensors import derive_seed

    torch.manual_seed(derive_seed(cfg.seed, "weights"))
    told = build_conditioner(cfg.conditioner, autoencoder, data)
    denoiser = Denoiser(build_network(cfg, autoencoder, told), instantiate(cfg.schedule), instantiate(cfg.prediction))
    return LatentDiffusion(autoencoder, told, denoiser, (data.size, data.size))


def supplied_parameters(node: Any) -> tuple[str, ...]:
    """The parameters of a node's target that the builders supply."""
    return RUNTIME_PARAMETERS.get(node.get("_target_", ""), ())


def nested_kwargs(node: Any, known: dict[str, Any]) -> dict[str, Any]:
    """Of what is known, what the targets of a node and of those within it need: keywords for instantiate."""
    inner = {name: nested_kwargs(child, known) for name, child in node.items() if hasattr(child, "items")}
    return {name: known[name] for name in supplied_parameters(node)} | {
        name: found for name, found in inner.items() if found
    }


def build_classifier(net: Any, autoencoder: Any, data: Any) -> Any:
    """The network for a first stage's latents of a data set; net: its constructor, options bound."""
    return net(in_channels=autoencoder.z_channels, classes=len(data.classes), size=data.size // autoencoder.factor)
