"""Build objects from a composed config, leaves first; a node that owns weights is built once and passed on."""

import inspect
import math
from collections.abc import Collection, Mapping, Sequence
from operator import mul
from typing import TYPE_CHECKING, Any

from ldm.config.signatures import read_signature

if TYPE_CHECKING:
    from ldm.model import LatentDiffusion


def to_container(cfg: Any) -> Any:
    """Return a config as plain data with interpolations resolved."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else cfg


def build_dataset(cfg: Any, split: str = "train"):
    """Build the data set of a config's `data` node; split: train or test.  Raises UserError for one without a shape."""
    from hydra.utils import instantiate

    from ldm.errors import UserError

    data = instantiate(cfg.data, split=split)
    shape = getattr(data, "shape", None)
    if not isinstance(shape, Sequence) or not 2 <= len(shape) <= 4:
        raise UserError(
            f"data._target_={cfg.data._target_}: its shape is {shape}; "
            "expected that of a sample, (C, L), (C, H, W) or (C, F, H, W)"
        )
    return data


def resolve_dataset_config(cfg: Any) -> Any:
    """Fill in, in place, what a config leaves to its data set and to its `auto` node, and return the config.

    The data set's `resolved_config` (values read from its files, such as a content hash) replaces keys of `data`, so
    that run names depend on them. Then the function at `auto`, if any, changes the config. Both describe what they
    chose; rank 0 prints it, except for a config that was already resolved.
    """
    import os

    from hydra.utils import get_object, instantiate

    messages = []
    if hasattr(get_object(cfg.data["_target_"]), "resolved_config"):
        data = build_dataset(cfg)
        if cfg.data.content_hash is None:
            messages.append(data.summary)
        for name, value in data.resolved_config.items():
            cfg.data[name] = value
    if cfg.get("auto"):
        messages.append(instantiate(cfg.auto, _recursive_=False)(cfg))
        cfg.auto = None
    if messages and os.environ.get("RANK", "0") == "0":
        print(*messages, sep="\n", flush=True)
    return cfg


def build_degraded_dataset(cfg: Any, split: str = "train"):
    """Build the data set with the augmentation, and then the degradations (low resolution, masks), of the config.

    The training split keeps the images' own aspect ratios if the data set supports buckets. Other splits are not
    augmented at random.  Raises UserError for data without the method that training calls.
    """
    from hydra.utils import instantiate

    from ldm.errors import UserError

    data = build_dataset(cfg, split)
    if not hasattr(data, "batch"):
        raise UserError(
            f"data._target_={cfg.data._target_}: it has no batch(samples); expected a data set that returns the "
            "samples of (epoch, index) pairs, as ldm.data.stream.Samples describes, so that a training can be resumed"
        )
    if split == "train" and hasattr(data, "to_buckets"):
        data = data.to_buckets(image_size_multiple(cfg))
    if cfg.get("augmentation"):
        data = instantiate(cfg.augmentation)(data, training=split == "train")
    return instantiate(cfg.degradation)(data)


def image_size_multiple(cfg: Any) -> int:
    """Return the number that must divide an image's height and width.

    It is the first stage's factor times the network's patch size or, without patches, its downsampling factor, of both
    sides together.
    """
    from ldm.tensors import one_for_each

    net = cfg.net
    while hasattr(net.get("net"), "items"):  # a network that wraps another
        net = net["net"]
    factors = one_for_each(cfg.autoencoder.get("factor", 1), 2, "autoencoder.factor")
    patch = net.get("patch_size", 2 ** (len(net.get("channel_mult", [1])) - 1))
    return math.lcm(*map(mul, factors, one_for_each(patch, 2, "net.patch_size")))


def reject_degradation(cfg: Any) -> None:
    """Check that a config has no `degradation`, augmentation or adapter, which only training=diffusion supports.

    Raises UserError otherwise.
    """
    from ldm.errors import UserError

    for name in ("adapter", "augmentation"):
        if cfg.get(name):
            raise UserError(f"{name}= is only for training=diffusion: leave it out")
    if cfg.get("degradation") and cfg.degradation["_target_"] != "ldm.data.degrade.identity":
        raise UserError(
            "degradation= is only for training=diffusion, this training uses the images unchanged: "
            "leave it out, or set degradation=none"
        )


def require_labels(*data: Any) -> None:
    """Check that every sample of the data sets has a label, as training a classifier needs; else raise UserError."""
    from ldm.errors import UserError

    if not all(one.classes for one in data):
        raise UserError(
            "these data have no classes, and a classifier needs a label for each sample; choose other data="
        )
    if count := sum(getattr(one, "unlabelled", 0) for one in data):
        total = sum(map(len, data))
        raise UserError(
            f"{count:,} of {total:,} samples have no label, and a classifier needs one for each: remove them"
        )


def build_autoencoder(node: Any, channels: int):
    """Build a first stage (untrained) for samples of `channels` channels."""
    from hydra.utils import instantiate

    return instantiate(node, **supplied_kwargs(node, {"channels": channels}))


def build_conditioner(node: Any, autoencoder, data):
    """Build a conditioner, single or composed of several, for a first stage and a data set."""
    from hydra.utils import instantiate

    values = {
        "num_classes": len(data.classes),
        "image_channels": data.shape[0],
        "factor": autoencoder.factor,
        "z_channels": autoencoder.z_channels,
        # Not the bound method: Hydra would deep-copy it, and the first stage with it.
        "encode": lambda image: autoencoder.encode(image),
    }
    return instantiate(node, **supplied_kwargs(node, values))


def build_network(cfg: Any, autoencoder, conditioner):
    """Build a config's network for the latents of a first stage and the conditions of a conditioner."""
    from hydra.utils import instantiate

    values = {
        "in_channels": autoencoder.z_channels,
        "out_channels": autoencoder.z_channels * (2 if cfg.get("learned_variance") else 1),
        "context_dim": conditioner.context_dim,
        "vector_dim": conditioner.vector_dim,
        "concat_channels": conditioner.concat_channels,
    }
    return instantiate(cfg.net, **supplied_kwargs(cfg.net, values, replace=True))


def build_model(cfg: Any, autoencoder, data) -> "LatentDiffusion":
    """Build a latent diffusion model on the given first stage, with weights initialized from the config's seed."""
    import torch
    from hydra.utils import instantiate

    from ldm.diffusion.denoiser import Denoiser
    from ldm.model import LatentDiffusion
    from ldm.tensors import derive_seed

    torch.manual_seed(derive_seed(cfg.seed, "weights"))
    conditioner = build_conditioner(cfg.conditioner, autoencoder, data)
    net = build_network(cfg, autoencoder, conditioner)
    denoiser = Denoiser(net, instantiate(cfg.schedule), instantiate(cfg.prediction))
    return LatentDiffusion(autoencoder, conditioner, denoiser, tuple(data.shape[1:]))


def supplied_kwargs(node: Mapping[str, Any], values: Mapping[str, Any], replace: bool = False) -> dict[str, Any]:
    """Return the keywords for `instantiate` by which a node and the nodes nested in it get their values.

    Each constructor gets the values that its signature names and its node does not set; replace: those that the outer
    node sets, too.  A `_partial_` node gets none: whatever calls it passes them.
    """
    inner = {name: supplied_kwargs(child, values) for name, child in node.items() if hasattr(child, "items")}
    names = () if "_target_" not in node or node.get("_partial_") else parameter_names(node["_target_"])
    direct = {name: value for name, value in values.items() if name in names and (replace or name not in node)}
    return direct | {name: kwargs for name, kwargs in inner.items() if kwargs}


def parameter_names(target: str) -> Collection[str]:
    """Return the names in the signature behind a dotted name; it is imported only if its source does not tell them."""
    from hydra.utils import get_object

    signature = read_signature(target)
    if signature is not None:
        return signature.parameters.keys()
    try:
        return inspect.signature(get_object(target)).parameters.keys()
    except (TypeError, ValueError):  # a class written in C
        return ()


def build_classifier(net: Any, autoencoder: Any, data: Any) -> Any:
    """Build a classifier for the latents of a data set.

    net: its constructor with options bound.
    """
    from ldm.tensors import divide_sides

    size = divide_sides(data.shape[1:], autoencoder.factor)
    return net(in_channels=autoencoder.z_channels, classes=len(data.classes), size=size)
