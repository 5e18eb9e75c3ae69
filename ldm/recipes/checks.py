"""Checks of the parts of a training, before anything is trained: each wrong part is one line.

Whether the parts fit the shape of the data, its classes and its captions is checked for all parts; what they return,
only for those that a config names in a package besides ldm: ldm's have tests.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from hydra.utils import get_object, instantiate
from torch import Tensor, nn

from ldm.conditioner.compose import condition_or_null
from ldm.config import build
from ldm.config.signatures import is_user_code
from ldm.config.tree import iter_nodes
from ldm.data.shape import COLOUR_CHANNELS, format_size, image_fault
from ldm.data.stream import Samples, length_of
from ldm.diffusion.schedule import Schedule
from ldm.errors import UserError
from ldm.evaluation.evaluate import CaptionSource
from ldm.interfaces import Conditioner, Dataset, Decoder, missing_members
from ldm.metrics.distribution import Metric
from ldm.model import LatentDiffusion
from ldm.recipes.latents import trains_first_stage
from ldm.sampling.generate import generate_samples
from ldm.tensors import KeyedNoise
from ldm.training.loggers import Logger

MODEL = ("autoencoder", "conditioner", "net", "schedule", "prediction", "objective", "sampler", "guidance")
ROWS = 2  # samples of the batch with which a model is tried


def check_parts(cfg: Any, data: Any, is_new: bool = True) -> None:
    """Check all parts of a diffusion model's training; is_new: whether it has not begun yet.

    Raises UserError for a part of one's own that does not fit, and for a first stage that does not fit the images.
    """
    check_classes(cfg)
    check_data(cfg, data)
    check_shape(cfg, data)
    check_conditions(cfg.conditioner, data)
    check_keys(cfg, data)
    check_training(cfg.training)
    if is_new and not cfg.get("adapter"):
        check_model(cfg, data)


def user_targets(node: Any) -> list[str]:
    """Return the targets in a node of a config that are neither ldm's nor a library's."""
    targets = [str(inner["_target_"]) for _, inner in iter_nodes(build.to_container(node))]
    return [name for name in targets if name.split(".")[0] != "ldm" and is_user_code(name.split(".")[0])]


def check_members(part: Any, protocol: type, path: str, name: str) -> None:
    """Raise UserError unless a part, or its class, has what its Protocol requires.

    path: of its node in the config.  name: its target.
    """
    if missing := missing_members(part, protocol):
        where = f"{protocol.__module__}.{protocol.__name__}"
        raise UserError(f"{path}: {name} has no {', '.join(missing)}; expected what {where} lists")


def check_classes(config: Mapping[str, Any]) -> None:
    """Raise UserError for a class of a metric or of a logger that lacks a method."""
    metrics = (config.get("metrics") or {}).get("metrics") or {}
    nodes = {f"metrics.metrics.{name}": (node, Metric) for name, node in metrics.items()}
    for path, (node, protocol) in {**nodes, "logger": (config.get("logger") or {}, Logger)}.items():
        target = get_object(node["_target_"]) if user_targets(node) else None
        if inspect.isclass(target):
            check_members(target, protocol, path, node["_target_"])


def check_data(cfg: Any, data: Any) -> None:
    """Raise UserError for a data set of one's own that lacks a member, or whose images are of another size."""
    if not user_targets(cfg.data):
        return
    if length_of(data) is None:  # an endless stream of batches
        check_members(data, Samples, "data", cfg.data["_target_"])
        return
    check_members(data, Dataset, "data", cfg.data["_target_"])
    if not hasattr(data, "shapes"):  # images of several shapes have no common size
        require_shape("data", "pixels", data.pixels([0]), (1, *data.shape))


def check_shape(cfg: Any, data: Any) -> None:
    """Raise UserError for parts that take samples of another number of sides, and for metrics that cannot measure them.

    Such parts state it as `spatial_dims`.
    """
    for name in ("autoencoder", "net", "objective"):
        check_dimensions(name, cfg[name], data)
    if "_target_" in cfg.metrics and (fault := image_fault(data.shape, COLOUR_CHANNELS)):
        raise UserError(f"metrics: {fault}, as feature networks take; choose metrics=none")


def check_dimensions(name: str, node: Any, data: Any) -> None:
    """Raise UserError for a part, `name` in the config, that takes samples of another number of sides than the data's.

    node: of the part, whose inner nodes are checked too.
    """
    sides = len(data.shape) - 1
    for _, inner in iter_nodes(build.to_container(node)):
        part = get_object(inner["_target_"])
        dims = getattr(part, "spatial_dims", sides)
        if dims != sides:
            raise UserError(
                f"{name}: {inner['_target_']} takes samples with {dims} sides besides the channels, these are of shape "
                f"{tuple(data.shape)}; choose {'autoencoder=identity, or ' * (name == 'autoencoder')}one of your own"
            )


def check_conditions(node: Any, data: Any) -> None:
    """Raise UserError for a conditioner that reads labels or captions, if the data have none."""
    for _, inner in iter_nodes(build.to_container(node)):
        keys = getattr(get_object(inner["_target_"]), "keys", ())
        for key, names, plural in (("label", data.classes, "classes"), ("caption", data.captions, "captions")):
            if isinstance(keys, tuple) and key in keys and not names:
                raise UserError(
                    f"conditioner: {inner['_target_']} reads each sample's {key}, and these data have no {plural}; "
                    "choose conditioner=none"
                )


def check_keys(cfg: Any, data: Any) -> None:
    """Raise UserError if batches of the data lack a key that a conditioner reads: it would train on its null alone.

    A conditioner states its keys as `keys`, or those without which it has only its null as `needs`; `requires` has what
    to choose for a key. One whose keys are those of an instance is passed the name as `key`.
    """
    nodes = [node for _, node in iter_nodes(build.to_container(cfg.conditioner))]
    keys = {node["_target_"]: needed_keys(node) for node in nodes}
    if not any(keys.values()):
        return
    has_images = cfg.training["latents"] != "cached" or any("image" in names for names in keys.values())
    batch = (data.batch if has_images else data.batch_metadata)([(0, 0)])
    for name, needed in keys.items():
        for key in needed:
            if key not in batch:
                option = getattr(get_object(name), "requires", {}).get(key, "data that have it")
                raise UserError(f"conditioner: {name} needs {key}, which these data do not have; choose {option}")


def needed_keys(node: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys of a batch without which the part of a config's node has only its null."""
    part = get_object(node["_target_"])
    keys = getattr(part, "needs", getattr(part, "keys", None))
    if keys is None and hasattr(part, "null") and "key" in node:
        return (node["key"],)
    return keys if isinstance(keys, tuple) else ()


def check_first_stage(cfg: Any, autoencoder: Any, data: Any) -> None:
    """Raise UserError unless the factor divides the images, and encoder and decoder map between the config's shapes.

    autoencoder: as built, on the CPU.  A decoder with weights needs what its training uses.
    """
    sides, factor = data.shape[1:], autoencoder.factor
    if any(side % factor for side in sides):
        raise UserError(
            f"data.size={format_size(sides)}: all sides must be multiples of {factor}, the first stage's factor; "
            "choose another of the two"
        )
    if not user_targets(cfg.autoencoder):
        return
    if next(autoencoder.parameters(), None) is not None:
        check_members(autoencoder.decoder, Decoder, "autoencoder.decoder", type(autoencoder.decoder).__name__)
    image = first_batch(data)["image"]
    z = autoencoder.z_channels, *(side // factor for side in image.shape[2:])
    with torch.no_grad():
        require_shape("autoencoder.encoder", "the latent", autoencoder.posterior(image).mean, (ROWS, *z))
        decoded = autoencoder.decode(torch.zeros(ROWS, *z))
    require_shape("autoencoder.decoder", "the image", decoded, tuple(image.shape))


def check_model(cfg: Any, data: Any) -> None:
    """Try the parts of a diffusion model on two samples, untrained and on the CPU, if any of them is one's own.

    Raises UserError for a class that lacks a member, and for a result of another shape than code needs.
    """
    is_tried = any(user_targets(cfg[name]) for name in MODEL)
    with torch.random.fork_rng([]):
        with torch.device("cpu" if is_tried else "meta"):
            autoencoder = build.build_autoencoder(cfg.autoencoder, data.shape[0])
        check_first_stage(cfg, autoencoder, data)
        if not is_tried:
            return
        check_members(instantiate(cfg.schedule), Schedule, "schedule", cfg.schedule["_target_"])
        check_conditioner(build.build_conditioner(cfg.conditioner, autoencoder, data), cfg, data)
        model = build.build_model(cfg, autoencoder, data).eval()
        with torch.no_grad():
            check_network(model, cfg)
            check_objective(model, cfg, data)
        check_sampling(model, cfg, data)


def check_training(node: Mapping[str, Any]) -> None:
    """Raise UserError unless an optimizer and a rate schedule of one's own give what a training needs.

    node: the recipe's options.
    """
    if user_targets(node.get("optimizer") or {}):
        optimizer = instantiate(node["optimizer"], _convert_="all")([nn.Parameter(torch.zeros(2, 2))])
        if not isinstance(optimizer, torch.optim.Optimizer):
            name, kind = node["optimizer"]["_target_"], type(optimizer).__name__
            raise UserError(f"training.optimizer: {name} gives a {kind}; expected a torch.optim.Optimizer")
    if user_targets(node.get("lr_schedule") or {}):
        factor = instantiate(node["lr_schedule"])(0, node["steps"])
        if not isinstance(factor, int | float):
            name, kind = node["lr_schedule"]["_target_"], type(factor).__name__
            raise UserError(f"training.lr_schedule: {name}(0, {node['steps']}) gives a {kind}; expected a number")


def first_batch(data: Any) -> dict[str, Any]:
    """Return a training batch of the first sample, repeated, with its noise."""
    noise = KeyedNoise(0, [(0, row) for row in range(ROWS)], list(range(ROWS)), ROWS)
    return {**data.batch([(0, 0)] * ROWS), "position": list(range(ROWS)), "total": ROWS, "step": 0, "noise": noise}


def check_conditioner(conditioner: Any, cfg: Any, data: Any) -> None:
    """Raise UserError unless conditions, null or not, have the fields and sizes that the conditioner states."""
    if not user_targets(cfg.conditioner):
        return
    name = cfg.conditioner["_target_"]
    parts = getattr(conditioner, "conditioners", {})
    for path, part in {"conditioner": conditioner, **{f"conditioner.{part}": parts[part] for part in parts}}.items():
        check_members(part, Conditioner, path, name if part is conditioner else type(part).__name__)
    batch = first_batch(data)
    conditions = {"forward": condition_or_null(conditioner, batch), "null": conditioner.null({"noise": batch["noise"]})}
    for method, cond in conditions.items():
        for field, stated in (("context", "context_dim"), ("vector", "vector_dim"), ("concat", "concat_channels")):
            value, expected = getattr(cond, field), getattr(conditioner, stated) or None
            size = None if value is None else value.shape[1 if field == "concat" else -1]
            rows = ROWS if value is None else len(value)
            if size != expected or rows != ROWS:
                shape = "none" if value is None else str(tuple(value.shape))
                raise UserError(
                    f"conditioner: {name}.{method} gives cond.{field} {shape} for {ROWS} rows; "
                    f"expected {stated}={getattr(conditioner, stated)}"
                )


def check_network(model: LatentDiffusion, cfg: Any) -> None:
    """Raise UserError unless the network takes (x, t, cond) and returns the shape of the latent."""
    net, name = model.denoiser.net, cfg.net["_target_"]
    try:
        inspect.signature(net.forward).bind(None, None, None)
    except TypeError as error:
        raise UserError(f"net: {name}.forward is called with (x, t, cond): {error}") from None
    x = torch.zeros(model.latent_shape(ROWS))
    cond = model.null_condition({"noise": KeyedNoise(0, range(ROWS))}).expand_concat(*x.shape[2:])
    out = net(x, model.denoiser.net_time(x, torch.tensor(0.5)), cond)
    channels = x.shape[1] * (2 if cfg.get("learned_variance") else 1)
    require_shape("net", f"{name}'s output", out, (ROWS, channels, *x.shape[2:]))


def check_objective(model: LatentDiffusion, cfg: Any, data: Any) -> None:
    """Raise UserError unless the objective returns a loss (B,)."""
    if not user_targets(cfg.objective):
        return
    name, objective, batch = cfg.objective["_target_"], instantiate(cfg.objective), first_batch(data)
    if not isinstance(objective, nn.Module):
        raise UserError(f"objective: what {name} gives is no nn.Module; expected one")
    z = model.encode(batch["image"])
    joint = {"first_stage": model.autoencoder} if trains_first_stage(cfg) else {}
    terms = objective.eval()(model.denoiser, z, model.condition(batch).to(z.dtype), batch["noise"], batch, **joint)
    loss = terms.get("loss") if isinstance(terms, Mapping) else None
    if not isinstance(loss, Tensor):
        raise UserError(f"objective: {name} returns {type(terms).__name__}; expected terms, with the tensor 'loss'")
    require_shape("objective", f"{name}'s loss", loss, (ROWS,))


def check_sampling(model: LatentDiffusion, cfg: Any, data: Any) -> None:
    """Raise UserError unless the sampler under guidance returns images of the data's shape."""
    if not (user_targets(cfg.sampler) or user_targets(cfg.guidance)):
        return
    ts = instantiate(cfg.timestep_spacing)(model.denoiser.schedule, 2)
    conditions = CaptionSource(data.classes, data.captions).batch
    ways = instantiate(cfg.sampler), instantiate(cfg.guidance)
    image, _ = next(generate_samples(model, conditions, range(ROWS), 0, ROWS, ts, *ways))
    name = (user_targets(cfg.sampler) or user_targets(cfg.guidance))[0]
    require_shape("sampler", f"{name}'s image", image, (ROWS, *data.shape))


def require_shape(path: str, what: str, value: Any, expected: tuple[int, ...]) -> None:
    """Raise UserError unless a value is a tensor of the expected shape."""
    shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    if shape != expected:
        raise UserError(f"{path}: {what} is {shape}; expected {expected}")
